"""How to wait for the next request of a connection that is alone in its worker.

    look    without sleeping until it comes: to be woken is half of a lone call where an idle core is halted
    sleep   until it comes, or somebody else
    sole    sleep in recv until it comes, for a moment at most: a system call and a turn less. Who comes
            meanwhile waits as long

To look costs a core, and takes longer where that core is wanted, or is the other half of the peer's. No
number tells which it is, so it is tried, where no other connection is in the daemon and a core seems to be
spare: of ROUND waits the first TRIAL look, as many sleep, and then it looks where that was clearly quicker.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from contextlib import suppress

from .connection import CLOSED, IDLE, Connection
from .doors import EVENTS

LOOK = 0.0002
"""Seconds to look at most."""

SOON = 0.002
"""Seconds to wait for this connection alone."""

STREAK = 32
"""Requests in a row that came so soon, before it is waited for alone."""

TRIAL, ROUND = 64, 4096
"""Waits."""

CLEARLY = 0.9
"""Of the time that sleeping took: what costs a core must pay."""


Events = list[tuple[int, int]]

_SOON = struct.pack("ll", 0, int(SOON * 1e6))


class Lone:
    """`sole`: whose socket blocks for a moment. `spare`: may it be looked? `looks`: before the next wait."""

    def __init__(self) -> None:
        self.sole: Connection | None = None
        self.spare = False
        self._streak = 0
        self._begin()

    def _begin(self) -> None:
        self.looks = True
        self._waits = 0
        self._looked = self._slept = 0.0

    def look_around(self, cores: int, alone: bool) -> None:
        """Is it `alone` in all the daemon, and a core to spare to wait for it? Who runs now, of all that want
        to."""
        self.spare = False
        if cores > 1 and alone:
            with suppress(OSError, ValueError), open("/proc/loadavg", "rb") as file:
                self.spare = int(file.read().split()[3].partition(b"/")[0]) <= cores

    def wait(self, poll: select.epoll, seconds: float, connection: Connection) -> Events:
        """For its next request, or for somebody else: what the waiter's set tells."""
        events: Events = []
        begun = now = time.monotonic()
        while self.spare and self.looks and not events and now - begun < LOOK:
            events = poll.poll(0.0, EVENTS)
            now = time.monotonic()
        events = events or poll.poll(seconds, EVENTS)
        if self.waited(time.monotonic() - begun) and self.sole is None and connection.phase == IDLE:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                connection.request.setsockopt(socket.SOL_SOCKET, option, _SOON)
            os.set_blocking(connection.request.fileno(), True)
            self.sole = connection
        return events

    def leave(self, connection: Connection) -> None:
        """It is one of several, or slow: its socket blocks no more."""
        self.sole = None
        if connection.phase != CLOSED:
            os.set_blocking(connection.request.fileno(), False)

    def waited(self, seconds: float) -> bool:
        """So long until something came. True: wait for it alone from now on."""
        self._streak = self._streak + 1 if seconds < SOON else 0
        if self.spare:
            self._try(seconds)
        trying = self.spare and (self.looks or self._waits < 2 * TRIAL)
        return self._streak >= STREAK and not trying

    def _try(self, seconds: float) -> None:
        """Who is idle tells nothing of what is quicker: no wait counts for much."""
        self._waits += 1
        if self._waits <= TRIAL:
            self._looked += min(seconds, 5 * LOOK)
            self.looks = self._waits < TRIAL
        elif self._waits <= 2 * TRIAL:
            self._slept += min(seconds, 5 * LOOK)
            self.looks = self._waits == 2 * TRIAL and self._looked < CLEARLY * self._slept
        elif self._waits >= ROUND:
            self._begin()

    def served(self, count: int, more: bool) -> bool:
        """So many while it was waited for alone. True: no longer."""
        self._waits += count
        if more and self._waits < ROUND:
            return False
        self._streak = 0
        if self._waits >= ROUND:
            self._begin()
        return True
