"""What the journal is told of the whole service: a line where something begins, one where it is over."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Sequence
from typing import Callable

from ..errors import KMSError
from ..store.pause import Pause

log = logging.getLogger("progressdb_kms")

OVERDUE_SECONDS = 60.0
"""After so long a shred that is not finished is told by name."""

NAMED = 5
"""Keys that are named in a line."""


def attend(what: str, work: Callable[[], None], pause: Pause) -> bool:
    """Work beside the jobs: no failure ends the process, each is told once, and tried again. Was it done?"""
    try:
        work()
    except (KMSError, OSError) as error:
        if pause.failed(str(error)):
            log.error("%s: %s; it is tried again", what, error)
        return False
    if pause.worked():
        log.info("over: %s", what)
    return True


class Outage:
    """Why the service isn't ready. Each reason is told once until all are over. A number in it may change
    unheard, and it may come and go beside another: else a disk that fills up would be a line a second."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}  # reasons, by what they are without their numbers
        self._since = 0.0

    def tell(self, reasons: Sequence[str]) -> None:
        kinds = {re.sub("[0-9]+", "#", reason): reason for reason in reasons}
        now = time.monotonic()
        if kinds:
            self._since = self._since if self._told else now
            if not kinds.keys() <= self._told.keys():
                log.error("not ready: %s", "; ".join(reasons))
            self._told = {**kinds, **self._told}
        elif self._told:
            log.info("ready again, after %d s: %s", now - self._since, "; ".join(self._told.values()))
            self._told = {}


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
