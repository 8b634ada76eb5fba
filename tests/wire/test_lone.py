"""Whether the waiter of a lone connection looks or sleeps is found out by trying, again and again."""

from __future__ import annotations

import pytest

from progressdb_kms.wire.lone import CLEARLY, ROUND, SPIN, TRIAL, Lone


def waits(lone: Lone, count: int, looking: float, sleeping: float) -> int:
    """So many; how many of them looked."""
    looked = 0
    for _ in range(count):
        looked += lone.spins
        lone.waited(looking if lone.spins else sleeping)
    return looked


@pytest.mark.parametrize(
    ("looking", "sleeping", "rest"),
    [
        (40e-6, 90e-6, True),
        (90e-6, 40e-6, False),
        (40e-6, 40e-6 / CLEARLY * 0.99, False),  # for so little no core is given
        (1.0, 1.0, False),  # an idle one
        (SPIN * 100, SPIN * 200, False),  # neither is quick
    ],
)
def test_the_quicker_way_is_taken(looking: float, sleeping: float, rest: bool) -> None:
    lone = Lone()
    assert waits(lone, TRIAL, looking, sleeping) == TRIAL
    assert waits(lone, TRIAL, looking, sleeping) == 0
    left = ROUND - 2 * TRIAL
    assert waits(lone, left, looking, sleeping) == (left if rest else 0)


def test_it_is_tried_anew() -> None:
    lone = Lone()
    waits(lone, ROUND, 40e-6, 90e-6)
    assert waits(lone, ROUND, 90e-6, 40e-6) == TRIAL
    assert waits(lone, ROUND, 40e-6, 90e-6) == ROUND - TRIAL
