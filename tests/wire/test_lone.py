"""How a lone connection is waited for is found out by trying, again and again."""

from __future__ import annotations

import pytest

from progressdb_kms.wire.lone import CLEARLY, LOOK, ROUND, SOON, STREAK, TRIAL, Lone


def with_a_core_to_spare() -> Lone:
    lone = Lone()
    lone.spare = True
    return lone


def waits(lone: Lone, count: int, looking: float, sleeping: float) -> int:
    """So many; how many of them looked."""
    looked = 0
    for _ in range(count):
        looked += lone.looks
        lone.waited(looking if lone.looks else sleeping)
    return looked


@pytest.mark.parametrize(
    ("looking", "sleeping", "rest"),
    [
        (40e-6, 90e-6, True),
        (90e-6, 40e-6, False),
        (40e-6, 40e-6 / CLEARLY * 0.99, False),  # for so little no core is given
        (1.0, 1.0, False),  # an idle one
        (LOOK * 100, LOOK * 200, False),  # neither is quick
    ],
)
def test_the_quicker_way_is_taken(looking: float, sleeping: float, rest: bool) -> None:
    lone = with_a_core_to_spare()
    assert waits(lone, TRIAL, looking, sleeping) == TRIAL
    assert waits(lone, TRIAL, looking, sleeping) == 0
    left = ROUND - 2 * TRIAL
    assert waits(lone, left, looking, sleeping) == (left if rest else 0)


def test_it_is_tried_anew() -> None:
    lone = with_a_core_to_spare()
    waits(lone, ROUND, 40e-6, 90e-6)
    assert waits(lone, ROUND, 90e-6, 40e-6) == TRIAL
    assert waits(lone, ROUND, 40e-6, 90e-6) == ROUND - TRIAL


def test_who_comes_soon_is_waited_for_alone() -> None:
    lone = Lone()
    assert [lone.waited(40e-6) for _ in range(STREAK)] == [False] * (STREAK - 1) + [True]
    assert not lone.served(10, more=True)
    assert lone.served(1, more=False)  # nothing came: others are waited for, too
    assert not lone.waited(40e-6)
    assert [lone.waited(SOON) for _ in range(STREAK * 2)] == [False] * STREAK * 2


def test_where_a_core_is_spare_looking_is_tried_first() -> None:
    lone = with_a_core_to_spare()
    assert not any(lone.waited(90e-6 if lone.looks else 40e-6) for _ in range(2 * TRIAL - 1))
    assert lone.waited(40e-6)
    assert not lone.served(100, more=True)
    assert lone.served(ROUND, more=True) and lone.looks  # and again at times
    quicker = with_a_core_to_spare()
    assert not any(quicker.waited(40e-6 if quicker.looks else 90e-6) for _ in range(3 * TRIAL))
