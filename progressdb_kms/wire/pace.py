"""Long bodies, long answers and long work, at a pace: beside somebody who asks for little they get a quarter
of the time.

Whoever sends 8 MiB without end does so as quickly as they are taken, and takes all cores for it, the peers'
and the daemon's: who sends 40 bytes meanwhile waits for a core, for the interpreter, and for a turn. So while
another UID's short requests come, in whatever worker, long ones rest three times as long as they took. Among
themselves, and of one UID, they are as quick as the machine is.

A connection whose body or answer is long lies in a set of its own, in which the waiter's lies the other way
round: a set that rests is taken out of the waiter's, and wakes nobody.
"""

from __future__ import annotations

import select
import time
from typing import Callable

from ..service.metrics import Block, Metrics

REST = 3.0
"""Times as long as it took. Of 1, 3 and 7 the first left others twice the wait, the last gained nothing."""

LONGEST = 0.005
"""Seconds of a rest."""

RECENT = 1.0
"""Seconds for which a UID counts as here after its last short request."""

SEVERAL = 2**33
"""Stands for more than one UID."""

BREATH, NAP = 0.001, 0.00005
"""Seconds: of the longest breath of long work, behind each of its pages; of the naps of which it is made."""


class Pace:
    """One worker's: its `poll`, and in that the set of the long ones. The waiter's thread alone may call what
    isn't marked."""

    def __init__(self, metrics: Metrics, counters: Block) -> None:
        self._metrics = metrics
        self._counters = counters
        self.poll, self.slow = select.epoll(), select.epoll()
        self.fd = self.slow.fileno()
        self.poll.register(self.fd, select.POLLIN)
        self.resting = False
        self._until = 0.0
        self.came: dict[int, float] = {}  # the monotonic time of each UID's last short request here
        self._short: set[int] = set()

    def look(self, now: float) -> None:
        """Whose short requests came here of late, and in the other workers?"""
        self.came = {uid: last for uid, last in self.came.items() if last > now - RECENT}
        uid = next(iter(self.came), -1)
        self._counters.set("short_requests_of", SEVERAL if len(self.came) > 1 else uid + 1)
        self._short = set(self._metrics.gauge("short_requests_of")) - {0}

    def disturbs(self, uid: int) -> bool:
        """Does this UID's long work take the time of another one's short requests? Any thread may ask."""
        return bool(self._short - {uid + 1})

    def rest(self, took: float) -> None:
        """So many seconds were given to connections of the set."""
        self.resting = True
        self._until = time.monotonic() + min(LONGEST, REST * took)
        self.poll.modify(self.fd, 0)

    def left(self, seconds: float) -> float:
        """Of so many seconds to wait, those until the set's rest is over."""
        left = self._until - time.monotonic()
        if left > 0:
            return min(seconds, left)
        self.resting = False
        self.poll.modify(self.fd, select.POLLIN)
        return seconds

    def breath(self, uid: int, busy: Callable[[], bool]) -> Callable[[], None]:
        """For long work of this UID, to be called behind each of its pages: a rest, and after that the
        interpreter is the waiter's as long as that is `busy`, but not for ever. It comes to its turn at the
        end of a slice; without this it would lose the interpreter again with each call of the system, of
        which a request takes some."""
        begun = time.monotonic()

        def breathe() -> None:
            nonlocal begun
            now = time.monotonic()
            if self.disturbs(uid):
                time.sleep(min(LONGEST, REST * (now - begun)))
            until = time.monotonic() + BREATH
            while busy() and time.monotonic() < until:
                time.sleep(NAP)
            begun = time.monotonic()

        return breathe
