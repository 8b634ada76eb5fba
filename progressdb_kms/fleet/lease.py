"""How long may a host serve what it remembers? As long as no other can have given it up.

A heartbeat is a row that the engine has committed. The host counts from **before it sent** it: so long as
`fence_seconds`, less a margin. Another host counts from **after it saw** it: so long as `fence_seconds`, and
a margin more, before it fences the silent one. Sent comes before seen, so the first span is over before the
second, whatever the network did between; the two margins are for clocks of different rates. No time of one
host is ever held against that of another.

The lease goes by CLOCK_BOOTTIME, which runs on while a machine sleeps. It stands still while a hypervisor has
the guest paused. So the lease ends by the wall clock too, which can only shorten it: a wall clock that is set
forward ends it early (the next heartbeat begins another), one that is set back changes nothing. Not
protected: a guest that was paused for longer than its lease, and whose wall clock isn't right yet when it
goes on."""

from __future__ import annotations

import time
from typing import NamedTuple

BEATS = 4
"""Heartbeats in the time after which a host is given up: three may be lost."""

SPARE = 20
"""The margin is this part of fence_seconds: clocks may differ in rate by that much, 5 %."""


class Reading(NamedTuple):
    """What the clocks of one host show."""

    boot: int  # CLOCK_BOOTTIME, ns
    wall: int  # ns since 1970
    steady: float  # CLOCK_MONOTONIC, seconds: for the spans that are measured in others


class Lease(NamedTuple):
    """It ends where either clock has come so far."""

    boot: int
    wall: int


NONE = Lease(0, 0)

BOOTTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock:
    """One object, so that a test can set it."""

    def read(self) -> Reading:
        return Reading(time.clock_gettime_ns(BOOTTIME), time.time_ns(), time.monotonic())

    def steady(self) -> float:
        return time.monotonic()


def margin(fence_seconds: float) -> float:
    return fence_seconds / SPARE


def granted(before: Reading, fence_seconds: float) -> Lease:
    """By a heartbeat that is committed. `before`: the clocks when it was about to be sent."""
    span = int((fence_seconds - margin(fence_seconds)) * 1e9)
    return Lease(before.boot + span, before.wall + span)


def silent(since: float, now: float, fence_seconds: float) -> bool:
    """May a host be given up, of which nothing moved from `since` (a reading after an answer had come) to
    `now` (one before the next question goes)? Both by the asker's own steady clock."""
    return now - since >= fence_seconds + margin(fence_seconds)
