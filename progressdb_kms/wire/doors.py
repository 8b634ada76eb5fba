"""The doors of a worker: sockets that all workers listen on, who comes in by them, and who of the workers
lets a peer in.

A door rests for a moment where another worker has fewer connections, or where no descriptor is left to accept
with: whoever waits longest hears so then, by one that is held in reserve.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Callable, NamedTuple

from ..errors import Overloaded
from ..rules import TCP, Peer
from .admission import Shares
from .answers import last_words
from .dispatch import error_reply

log = logging.getLogger("progressdb_kms.server")

BACKLOG = 4096

EVENTS, ENTERING, ENTERING_SECONDS = 64, 64, 0.0005
"""Connections that are served before new ones are let in; how many of these before the next, and for how
long; or, while all is calm, for as long as those were served. So who comes last of many waits for a turn or
two of the others, and not for all of theirs."""

YIELDS, CALM_YIELDS, CALM_SECONDS = 10, 2, 1.0
"""How often a worker leaves a new connection to another one that has fewer, for a millisecond each time.
While all is calm, who is still there then is let in with all others: the other worker has much to do. It is
calm when nobody was refused for so long: who comes again and again to be refused would take half of the time
of those who are served, and the worker that has the fewest of these should have him."""

STARVED_SECONDS, TELL_SECONDS = 0.1, 60.0
"""Without a descriptor to accept with: the pause, and how often the log says so."""

STRANGER = Peer(-1, via=TCP)
"""Of whom the kernel does not tell the UID. Over a Unix socket it always does."""

SO_PEERGROUPS = 59  # socket(7); since Linux 4.13

_OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def peer_of(sock: socket.socket) -> Peer:
    """The credentials of the process at the other end, as they were at connect()."""
    pid, uid, gid = struct.unpack("i2I", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(uid, gid, pid)


def groups_of(sock: socket.socket) -> tuple[int, ...] | None:
    """All groups that the process at the other end was in at connect(); None where that can't be told: over
    TCP, before Linux 4.13, and of more groups than one can ask for (256)."""
    try:
        told = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError:
        return None
    return tuple(memoryview(told).cast("I"))


class Door(NamedTuple):
    """A listening stream socket that does not block, and how to tell who came in by it."""

    listener: socket.socket
    identify: Callable[[socket.socket], Peer]


Greet = Callable[[Door, socket.socket], bool]
"""Is told of who came in, and answers: is that one served?"""


class Doors:
    """Belongs to the waiter's thread, but for `renew`."""

    def __init__(self, doors: Sequence[Door], poll: select.epoll, greet: Greet, shares: Shares) -> None:
        self._doors = {door.listener.fileno(): door for door in doors}
        self._poll = poll
        self._greet = greet
        self._shares = shares
        self.resting: dict[int, float] = {}  # doors, and until when
        self.renewed: deque[int] = deque()
        self._yields = 0
        self._calm_from = 0.0
        self._reserve = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)]
        self._told = -TELL_SECONDS
        for fd in self._doors:
            self._poll.register(fd, select.POLLIN)

    def __contains__(self, fd: int) -> bool:
        return fd in self._doors

    def let_in(self, fd: int, served: float = 0.0, most: int = ENTERING, closing: bool = False) -> None:
        """`served`: seconds that this turn took up to here."""
        door, now = self._doors[fd], time.monotonic()
        calm = now >= self._calm_from
        until = now + max(ENTERING_SECONDS, served * calm)
        patience, yields = 0 if closing else CALM_YIELDS if calm else YIELDS, self._yields
        for _ in range(most):
            if yields < patience and self._shares.others_have_fewer():
                self._yields = yields + 1
                self._rest(fd, 0.001)
                return
            self._yields = 0
            yields *= calm  # else it is left to the other again before each
            try:
                request, _ = door.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF:
                    self._starved(fd, door, error)
                    return
                continue  # it was gone before it was let in
            request.setblocking(False)
            request.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # else a peek passes it by
            if not self._greet(door, request):
                self._calm_from = now + CALM_SECONDS
            if time.monotonic() > until and not closing:
                return

    def _rest(self, fd: int, seconds: float) -> None:
        self._listen(fd, 0)
        self.resting[fd] = time.monotonic() + seconds

    def _listen(self, fd: int, events: int = select.POLLIN) -> None:
        """At a door that is where it was this takes no memory of the kernel's: there may be none."""
        try:
            self._poll.modify(fd, events)
        except FileNotFoundError:  # it leads elsewhere
            self._poll.register(fd, events)

    def go_on(self, now: float) -> None:
        """Doors that have rested, and those that lead elsewhere by now, are listened at again."""
        while self.renewed:
            self._listen(self.renewed.popleft())
        for fd in [fd for fd, until in self.resting.items() if until <= now]:
            del self.resting[fd]
            self._listen(fd)

    def renew(self, listener: socket.socket) -> None:
        """The descriptor of this door leads to another socket now. Any thread may say so."""
        self.renewed.append(listener.fileno())

    def _starved(self, fd: int, door: Door, error: OSError) -> None:
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            log.error("no connection can be accepted (%s): raise LimitNOFILE", error.strerror)
        with suppress(OSError, IndexError):
            os.close(self._reserve.pop())
            request, _ = door.listener.accept()
            with request:
                request.setblocking(False)
                request.send(last_words(error_reply(Overloaded("no descriptor is left", hint="try again"))))
        with suppress(OSError):  # somebody took it first: who waits goes on waiting
            self._reserve.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        self._rest(fd, STARVED_SECONDS)

    def close(self) -> None:
        """Let in who is there, and nobody after that."""
        for fd in self._doors:
            self.let_in(fd, most=BACKLOG, closing=True)
            self._listen(fd, 0)
        self.resting.clear()
