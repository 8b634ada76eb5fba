"""A fleet in simulated time: nothing that was promised is broken, and would be without each safeguard."""

from __future__ import annotations

import multiprocessing
import os
from typing import Callable

import pytest

from tests.fleet.simulation import SAFEGUARDS, Tally, play, search, unheard

ENGINE = ("lonely", "fail_over", "cut")
NETWORK = ("cut", "stop", "slow")

WITHOUT = {
    "barrier": (),
    "lease": NETWORK,
    "fence": NETWORK,
    "insert": ("come_back",),
    "synchronous": ENGINE,
    "warning": ENGINE,
    "written": ENGINE,
    "snapshot": ENGINE,
    "timeline": ("split",),
    "sure": ENGINE,
    "census": ("kill",),
    "touched": ("slow",),
    "owner": ("pause",),
}
"""Each safeguard, and what must happen so that one sees what it is good for."""

FIRST = {"timeline": 1195}
"""Where that is rare: the schedule to begin with, so that the search is short."""

LONG_SECONDS = 600.0


def test_nothing_is_violated() -> None:
    tally = search(0, 200)
    assert tally.found == ""
    assert tally.schedules == 200 and tally.changes > 800 and tally.made > 800 and tally.rotations > 100
    assert tally.refusals < tally.calls  # else they would be safe for doing nothing


@pytest.mark.parametrize("safeguard", SAFEGUARDS)
def test_each_safeguard_is_needed(safeguard: str) -> None:
    assert search(FIRST.get(safeguard, 0), 5000, without=[safeguard], troubles=WITHOUT[safeguard]).found


@pytest.mark.parametrize("number", [10_074_342, 20_074_796])
def test_a_beat_of_the_same_number_on_another_timeline(number: int) -> None:
    """Two of 150,000: who looked at the old primary, and then at the new one, took a host that beat on both
    for one that was silent."""
    assert search(number, 1).found == ""


def test_a_schedule_replays() -> None:
    """The same number, the same history: whatever was found can be looked at line by line."""
    with unheard():
        first, second = play(7), play(7)
    assert first.answered == second.answered and first.made == second.made
    assert Tally.of(first) == Tally.of(second)


def _part(first: int) -> Tally:
    return search(first, 1_000_000, seconds=LONG_SECONDS)


@pytest.mark.long
def test_nothing_is_violated_in_a_million_schedules(record_property: Callable[[str, object], None]) -> None:
    """Or as many as ten minutes allow."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        parts = pool.map(_part, range(1_000_000, 1_000_000 * (cores + 1), 1_000_000), chunksize=1)
    for part in parts:
        assert part.found == ""
    record_property("schedules", sum(part.schedules for part in parts))
    print(f"\n{sum(part.schedules for part in parts)} schedules, {sum(part.calls for part in parts)} calls")
