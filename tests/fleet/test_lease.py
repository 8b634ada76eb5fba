"""How long a host may serve, and when another may give it up."""

from __future__ import annotations

import time

import pytest

from progressdb_kms.fleet import lease
from progressdb_kms.fleet.board import SIZE, Board
from progressdb_kms.fleet.lease import Clock, Reading

SECOND = 1_000_000_000
BEFORE = Reading(1000 * SECOND, 5000 * SECOND, 77.0)


@pytest.mark.parametrize(
    "boot, wall, good",
    [
        (0, 0, True),
        (56.9, 56.9, True),
        (57, 57, False),
        (56.9, 57, False),  # a hypervisor held the guest, or the clock was set forward
        (57, 56.9, False),
        (57, -1000, False),  # a clock that is set back keeps nothing alive
        (1, -1000, True),
    ],
)
def test_a_lease_ends_by_either_clock(boot: float, wall: float, good: bool) -> None:
    board = Board(memoryview(bytearray(SIZE)))
    assert not board.serves(0, 0)
    board.grant(lease.granted(BEFORE, 60.0))
    assert board.serves(BEFORE.boot + int(boot * SECOND), BEFORE.wall + int(wall * SECOND)) is good
    board.end()
    assert not board.serves(0, 0)


@pytest.mark.parametrize("waited, given_up", [(0.0, False), (60.0, False), (62.9, False), (63.0, True)])
def test_a_silent_host_is_given_up_later_than_its_lease_ends(waited: float, given_up: bool) -> None:
    assert lease.silent(10.0, 10.0 + waited, 60.0) is given_up


@pytest.mark.parametrize("span", [10.0, 60.0, 3600.0])
def test_clocks_may_differ_in_rate_by_nearly_five_percent(span: float) -> None:
    """The lease by a clock that is slow, the silence by one that is fast."""
    granted = lease.granted(Reading(0, 0, 0.0), span)
    longest = granted.boot / SECOND / 0.953
    shortest = (span + lease.margin(span)) / 1.047
    assert longest < shortest


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="Linux has it")
def test_the_lease_runs_on_while_the_machine_sleeps() -> None:
    """With another clock a laptop, or a host that was suspended, would come back with its lease."""
    assert lease.BOOTTIME == time.CLOCK_BOOTTIME


def test_the_clocks_are_those_of_the_machine() -> None:
    first, second = Clock().read(), Clock().read()
    assert first.boot <= second.boot and first.steady <= second.steady
    assert first.boot >= first.steady * SECOND - SECOND  # CLOCK_BOOTTIME counts sleep, too
    assert abs(first.wall - time.time_ns()) < 3600 * SECOND
