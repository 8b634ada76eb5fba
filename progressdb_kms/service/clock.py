"""How late is it, surely? A deletion can't be undone, and a wall clock may be wrong for a second.

So a scheduled deletion is due when two clocks have passed its time: the wall clock, and a trusted one. The
trusted time is kept in the store with the heads of the audit chains. Within one boot it grows by
CLOCK_BOOTTIME, which nobody sets. Over a reboot it grows by what the wall clock says that the gap was, where
that can be: not back, and at most a week.

Where the two clocks contradict each other, scheduled deletions are held, which is told, until the wall clock
is right again or the operator accepts it (`progressdb-kms clock accept`). Nothing else waits for a clock:
neither a start nor a call, and all that is done from time to time goes by the monotonic one. What is kept
is the last state without a contradiction: a wrong clock that is set right leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

from ..encoding import LATEST, moment, timestamp, wall
from ..journal import Matter
from ..store.seal import ActiveKek
from ..store.sealed import Reader, Store

ROW = "clock:trusted"

BACK = 300.0
"""Seconds that the wall clock may be behind the trusted one."""

AHEAD = 7 * 86400.0
"""Seconds that it may have gone ahead, and that a reboot may have taken."""

RELEASED = 1764000000
"""Seconds since 1970, about when this release was made: no right clock shows an earlier time."""

SAVE_SECONDS = 60.0
"""How often the trusted time is kept, at most."""


class Reading(NamedTuple):
    """What the clocks show: the wall, and the seconds since which boot."""

    wall: float
    boot: str
    uptime: float


class Anchor(NamedTuple):
    """The trusted time, and what the clocks showed then. As a row of the store."""

    trusted: float
    wall: float
    boot: str
    uptime: float


class Verdict(NamedTuple):
    """The trusted time, and why scheduled deletions are held, or ""."""

    trusted: float
    held: str


class Clock:
    """What tells the time. One object, so that a test can set it."""

    def __init__(self) -> None:
        self._boot = ""
        with contextlib.suppress(OSError):
            self._boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()

    def now(self) -> float:
        return wall()

    def monotonic(self) -> float:
        return time.monotonic()

    def reading(self) -> Reading:
        return Reading(self.now(), self._boot, time.clock_gettime(time.CLOCK_BOOTTIME))


def judge(anchor: Anchor | None, now: Reading) -> Verdict:
    """Hold the clocks against what was kept."""
    if now.wall < RELEASED:
        return Verdict(anchor.trusted if anchor else now.wall, f"the clock shows {timestamp(now.wall)[:10]}")
    if anchor is None:
        return Verdict(now.wall, "")
    if anchor.boot and anchor.boot == now.boot and now.uptime >= anchor.uptime:
        trusted = anchor.trusted + now.uptime - anchor.uptime
    else:
        gap = now.wall - anchor.wall
        if gap > AHEAD:
            return Verdict(anchor.trusted, f"the clock went on by {_span(gap)} over a reboot")
        trusted = anchor.trusted + max(gap, 0.0)
        if gap < -BACK:
            return Verdict(trusted, f"the clock went back by {_span(-gap)} over a reboot")
    ahead = now.wall - trusted
    if ahead < -BACK:
        return Verdict(trusted, f"the clock is {_span(-ahead)} behind the trusted time")
    if ahead > AHEAD:
        return Verdict(trusted, f"the clock is {_span(ahead)} ahead of the trusted time")
    return Verdict(trusted, "")


def age(begun: str, now: float) -> float | None:
    """Seconds since that time; None where nobody can tell: none was noted, or a clock was wrong, then or
    now."""
    try:
        since = moment(begun)
    except ValueError:
        return None
    return now - since if RELEASED <= since <= now else None


def overdue(active: ActiveKek | None, now: float, days: int | None) -> str:
    """Why the KEK should be rotated by now, or ""."""
    if active is None or days is None:
        return ""
    seconds = age(active.since, now)
    if seconds is None:
        return f"nobody can tell how old the KEK {active.kek_id} is: a clock was wrong, then or now"
    if seconds <= days * 86400:
        return ""
    told = f"the KEK {active.kek_id} is the active one for {seconds / 86400:.0f} days"
    return f"{told}, and kek_max_age_days is {days}: `progressdb-kms rotate-kek`"


def _span(seconds: float) -> str:
    if seconds < 2 * 86400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 86400:.0f} days"


def kept(store: Reader) -> Anchor | None:
    row = store.read(ROW)
    return Anchor(**row) if row else None


class TrustedTime:
    """The keeper's: looks, tells the log of a change, and keeps what is sure."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self.clock = clock
        self._anchor = kept(store)
        self._holding = Matter(
            f"scheduled deletions are held: %s ({REMEDY})", "scheduled deletions go on", logging.WARNING
        )
        self._saved = -SAVE_SECONDS
        self.look()

    def look(self) -> Verdict:
        now = self.clock.reading()
        found = judge(self._anchor, now)
        if self._anchor is None and not found.held:  # the first look of a new store
            self._anchor = Anchor(now.wall, *now)
        self._holding.tell(found.held)
        return found

    def due(self) -> float | None:
        """Deletions of up to this time are due; None: they are held."""
        found = self.look()
        return None if found.held else min(found.trusted, self.clock.now())

    def later(self, seconds: float) -> float:
        """A time that is so far from now by either clock."""
        return min(max(self.clock.now(), self.look().trusted) + seconds, LATEST)

    def save(self, at_once: bool = False) -> None:
        """Inside a transaction. While the clocks contradict each other, what was kept before stays."""
        if (at_once or self.unsaved >= SAVE_SECONDS) and not (found := self.look()).held:
            self._anchor = Anchor(found.trusted, *self.clock.reading())
            self._store.write(ROW, self._anchor._asdict())
            self._saved = self.clock.monotonic()

    @property
    def unsaved(self) -> float:
        return self.clock.monotonic() - self._saved

    def accept(self) -> dict[str, Any]:
        """Inside a transaction: from now on the wall clock is trusted as it stands."""
        before, now = self.look(), self.clock.reading()
        self._store.write(ROW, Anchor(now.wall, *now)._asdict())
        return {
            "status": "ok",
            "now": timestamp(now.wall),
            "trusted": timestamp(before.trusted),
            "held": before.held,
        }

    def reload(self) -> None:
        """What `accept` wrote is on the disk."""
        self._anchor = kept(self._store)
        self.look()


REMEDY = "set the clock; where it is right, `progressdb-kms clock accept`"
