"""The order in which several UIDs are served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from progressdb_kms.wire.fair import KNOWN, Fair


def of(uid: int, turn: int = 0) -> Any:
    return SimpleNamespace(peer=SimpleNamespace(uid=uid), turn=turn)


def uids(fair: Fair, *asked: int) -> list[int]:
    return [one.peer.uid for one in fair.order([of(uid) for uid in asked])]


def test_whoever_took_least_comes_first() -> None:
    fair = Fair()
    for uid, seconds in ((1, 0.003), (2, 0.001), (3, 0.002)):
        fair.took(uid, seconds)
    assert uids(fair, 1, 2, 3, 4) == [4, 2, 3, 1]
    fair.took(2, 0.005)
    assert uids(fair, 1, 2, 3, 4) == [4, 3, 1, 2]


def test_of_one_uid_whoever_waits_longest() -> None:
    one, two, three = of(1, turn=7), of(1, turn=5), of(1, turn=6)
    assert Fair().order([one, two, three]) == [two, three, one]


def test_as_they_came_where_nobody_took_anything() -> None:
    assert uids(Fair(), 3, 1, 2) == [3, 1, 2]


def test_whoever_was_away_has_saved_nothing() -> None:
    """It comes first once, and is one of several from then on."""
    fair = Fair()
    for _ in range(1000):
        fair.took(1, 0.001)
    assert uids(fair, 1, 2) == [2, 1]
    fair.took(2, 0.0015)
    assert uids(fair, 1, 2) == [1, 2]


def test_two_that_take_alike_take_turns_beside_one_that_takes_much() -> None:
    fair, cost, served = Fair(), {1: 0.001, 2: 0.001, 3: 0.01}, []
    for _ in range(120):
        uid = uids(fair, 1, 2, 3)[0]
        served.append(uid)
        fair.took(uid, cost[uid])
    shares = [served.count(uid) * cost[uid] for uid in cost]
    assert max(shares) - min(shares) <= 0.01


def test_so_many_uids_are_told_from_each_other() -> None:
    fair = Fair()
    for uid in range(3 * KNOWN):
        fair.took(uid, 1.0)
    assert len(fair._marks) <= KNOWN
    assert uids(fair, 3 * KNOWN - 1, 3 * KNOWN) == [3 * KNOWN, 3 * KNOWN - 1]
