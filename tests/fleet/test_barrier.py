"""When a change may be answered, who is given up, and whom a rotation would lock out."""

from __future__ import annotations

import pytest

from progressdb_kms.fleet import barrier
from progressdb_kms.fleet.barrier import FIRST
from progressdb_kms.fleet.rows import FleetRow, HostRow, Point, Sight

SPAN = 60.0
ME = ("a", "a1")


def host(name: str, seen: int = 5, beat: int = 1, fenced: bool = False, keks: str = "k1") -> HostRow:
    return HostRow(name[0], name, f"host-{name[0]}", beat, seen, frozenset(keks.split()), fenced)


def sight(*hosts: HostRow, gen: int = 5, timeline: int = 1) -> Sight:
    return Sight(FleetRow("f", 1, 1, gen, "k1", 1, False, "", timeline), hosts)


@pytest.mark.parametrize(
    "seen, mine, change, holds",
    [
        (sight(host("a1")), Point(1, 5), Point(1, 5), True),
        (sight(host("a1", seen=0)), Point(1, 5), Point(1, 5), True),  # our own row may be behind
        (sight(host("a1")), Point(1, 4), Point(1, 5), False),
        (sight(host("b1")), Point(1, 5), Point(1, 5), True),
        (sight(host("b1", seen=4)), Point(1, 5), Point(1, 5), False),
        (sight(host("b1", seen=4)), Point(1, 5), Point(1, 4), True),
        (sight(host("b1", seen=4, fenced=True)), Point(1, 5), Point(1, 5), True),
        (
            sight(host("a0", seen=4)),
            Point(1, 5),
            Point(1, 5),
            False,
        ),  # an earlier incarnation may still serve
        (sight(host("b1", seen=5), host("b0", seen=4)), Point(1, 5), Point(1, 5), False),
        (sight(gen=4), Point(1, 5), Point(1, 5), False),  # an old primary, or a moment before the COMMIT
        (sight(timeline=1), Point(2, 5), Point(2, 5), False),
        (sight(timeline=2), Point(1, 5), Point(2, 5), False),
        (sight(host("b1"), timeline=2), Point(2, 5), Point(1, 5), True),
        (sight(host("b1", seen=4), timeline=2), Point(2, 5), Point(1, 5), False),  # no order of tuples
    ],
)
def test_a_change_holds_everywhere(seen: Sight, mine: Point, change: Point, holds: bool) -> None:
    assert barrier.everywhere(seen, ME, mine, change) is holds


def looks(*steps: tuple[float, HostRow]) -> barrier.Watch:
    watch = FIRST
    for when, row in steps:
        watch = barrier.watched(watch, sight(row), when, when + 0.1, SPAN)
    return watch


def every(seconds: float, *, until: float, row: HostRow) -> list[tuple[float, HostRow]]:
    return [(float(n) * seconds, row) for n in range(int(until / seconds) + 1)]


def test_a_host_is_given_up_after_it_was_silent_for_so_long_under_our_eyes() -> None:
    row = host("b1", seen=4)
    watch = looks(*every(15.0, until=60.0, row=row))
    assert barrier.dead(watch, [row], ME, 63.0, SPAN) == []  # it was first seen at 0.1, after the answer
    assert barrier.dead(watch, [row], ME, 63.2, SPAN) == [row]


def test_a_beat_begins_the_wait_anew() -> None:
    row = host("b1", seen=4, beat=2)
    watch = looks(*every(15.0, until=45.0, row=host("b1", seen=4)), (60.0, row))
    assert barrier.dead(watch, [row], ME, 120.0, SPAN) == []
    assert barrier.dead(watch, [row], ME, 123.2, SPAN) == [row]


def test_a_beat_of_the_same_number_on_another_timeline_begins_the_wait_anew() -> None:
    """The old primary lives on: a host that moved to the new one may reach the same number there."""
    row = host("b1", seen=4)
    watch = looks(*every(15.0, until=60.0, row=row))
    watch = barrier.watched(watch, sight(row, timeline=2), 75.0, 75.1, SPAN)
    assert barrier.dead(watch, [row], ME, 120.0, SPAN) == []
    watch = barrier.watched(watch, sight(row), 90.0, 90.1, SPAN)  # nor does the old one's count go on
    assert barrier.dead(watch, [row], ME, 120.0, SPAN) == []


def test_another_incarnation_is_another_host() -> None:
    row = host("b2", seen=4)
    watch = looks(*every(15.0, until=60.0, row=host("b1", seen=4)), (75.0, row))
    assert barrier.dead(watch, [row], ME, 100.0, SPAN) == []


def test_whoever_looked_away_knows_nothing() -> None:
    """The engine was away: all the others are late by that, too, and have the same time to come back."""
    row = host("b1", seen=4)
    watch = looks((0.0, row), (31.0, row), (60.0, row))
    assert barrier.dead(watch, [row], ME, 64.0, SPAN) == []
    assert barrier.dead(watch, [row], ME, 94.2, SPAN) == [row]


def test_who_isnt_in_the_last_look_or_beat_since_isnt_given_up() -> None:
    row = host("b1", seen=4)
    watch = looks(*every(15.0, until=60.0, row=row))
    assert barrier.dead(watch, [row._replace(beat=2)], ME, 90.0, SPAN) == []
    assert barrier.dead(watch, [host("c1")], ME, 90.0, SPAN) == []
    assert barrier.dead(watch, [row._replace(fenced=True)], ME, 90.0, SPAN) == []


def test_a_host_doesnt_give_itself_up() -> None:
    row = host("a1", seen=4)
    watch = looks(*every(15.0, until=60.0, row=row))
    assert barrier.dead(watch, [row], ME, 90.0, SPAN) == []


def test_whom_a_change_waits_for() -> None:
    rows = [host("a1"), host("b1", seen=4), host("c1", seen=3, fenced=True)]
    assert barrier.behind(rows, 5) == [rows[1]]


def test_a_rotation_names_whoever_lacks_the_key() -> None:
    rows = [host("a1", keks="k1 k2"), host("c1"), host("b1"), host("d1", fenced=True), host("b0")]
    assert barrier.without_kek(rows, "k2") == ["host-b", "host-c"]
    assert barrier.without_kek([host("b1")._replace(name="")], "k2") == ["b"]


def test_who_rotates_is_looked_after() -> None:
    rows = [host("a1"), host("b1", seen=9), host("b0", fenced=True)]
    seen = sight(*rows)
    assert barrier.rotating(seen) == []
    assert barrier.rotating(seen._replace(fleet=seen.fleet._replace(rotating=True, owner="b"))) == [rows[1]]


def test_what_may_be_forgotten_of_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one host; of those that serve, the one that is furthest behind decides."""
    monkeypatch.setattr(barrier, "KEPT_CHANGES", 100)
    rows = [host("a1", seen=900), host("b1", seen=700), host("c1", seen=3, fenced=True)]
    assert barrier.prunable(sight(*rows), ME) == 600
    assert barrier.prunable(sight(*rows), ("b", "b1")) == 0
    assert barrier.prunable(sight(host("a1", seen=99)), ME) == 0
    assert barrier.prunable(sight(), ME) == 0
