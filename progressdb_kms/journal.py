"""What the journal is told of the whole service: a line where something begins, one where it is over."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from typing import Callable

from .errors import KMSError
from .pause import Pause

log = logging.getLogger("progressdb_kms")

OVERDUE_SECONDS = 60.0
"""After so long a shred that is not finished is told by name."""

REMEMBERED = 16
"""Reasons of one matter. Of more the oldest are news again, and the line at its end stays one to be read."""

NAMED = 5
"""Keys that are named in a line."""


class Matter:
    """Something that goes wrong for a time: a line of the journal where it begins, one where it is over.

    Each reason is told once until all are over. A number in it may change unheard, and it may come and go
    beside another: else a disk that fills up would be a line a second.
    """

    def __init__(self, begins: str, over: str, level: int = logging.ERROR) -> None:
        """`begins`: with %s for the reasons."""
        self._begins, self._over, self._level = begins, over, level
        self._told: dict[str, str] = {}  # reasons, by what they are without their numbers
        self._since = 0.0

    def tell(self, *reasons: str) -> None:
        """Why it goes wrong now. None, or empty ones: it doesn't."""
        kinds = {re.sub("[0-9]+", "#", reason): reason for reason in reasons if reason}
        now = time.monotonic()
        if not kinds.keys() <= self._told.keys():
            log.log(self._level, self._begins, "; ".join(filter(None, reasons)))
            self._since = self._since if self._told else now
            self._told = dict([*{**kinds, **self._told}.items()][:REMEMBERED])
        elif self._told and not kinds:
            log.info("%s, after %d s: %s", self._over, now - self._since, "; ".join(self._told.values()))
            self._told = {}


class Chore(Pause):
    """Work beside the jobs: no failure ends the process, each is told once, and it is tried again, without
    `pauses` each time that it is due."""

    def __init__(self, what: str, pauses: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__(*pauses)
        self._matter = Matter(f"{what}: %s; it is tried again", f"over: {what}")

    def attend(self, work: Callable[[], None]) -> bool:
        """Was it done?"""
        try:
            work()
        except (KMSError, OSError) as error:
            self.failed(str(error))
        else:
            self.worked()
        self._matter.tell(self.why)
        return not self.why


class Scarcity:
    """Calls are refused since something ran out. Told at the first of them, and when there was none for a
    minute: whoever holds and frees it again and again must not write the journal full."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._refused = 0
        self._last = 0.0

    def refused(self, now: float) -> None:
        if not self._refused:
            log.warning("%s: such calls are refused", self._what)
        self._refused += 1
        self._last = now

    def look(self, now: float) -> None:
        if self._refused and now - self._last >= OVERDUE_SECONDS:
            log.info("over: %s (%d calls were refused)", self._what, self._refused)
            self._refused = 0


class Overdue:
    """Shreds of which a copy remains for long. That they are over is told where the cause is."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def tell(self, due: Iterable[str], why: str) -> None:
        now = time.monotonic()
        since = {key_id: self._since.get(key_id, now) for key_id in due}
        late = [key_id for key_id, begun in since.items() if now - begun >= OVERDUE_SECONDS]
        if late:
            names = ", ".join(late[:NAMED]) + (", …" if len(late) > NAMED else "")
            what = "shreds are" if len(late) > 1 else "shred is"
            log.warning("%d %s still due after %d s: %s (%s)", len(late), what, OVERDUE_SECONDS, names, why)
        self._since = {**since, **dict.fromkeys(late, float("inf"))}
