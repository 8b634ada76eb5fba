"""Threads for what the waiter must not do itself: wait for the keeper, or work for long.

A lane is a bounded number of threads, started when there is work and gone when there was none for a while,
and a queue that gives each UID its turn: a hundred jobs of one delay another's by one.

A connection whose request goes to a lane is lent to its thread, which sends the answer too. It comes `back`
with what the peer has not taken of that, and a bell wakes the waiter.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections import OrderedDict, deque
from contextlib import suppress
from functools import partial
from typing import Callable

from ..errors import Overloaded
from . import dispatch
from .call import App, Call, Route
from .connection import IN, Connection
from .pace import Pace
from .sending import Sender
from .slab import ANSWER, ZEROS, Slab

log = logging.getLogger("progressdb_kms.server")

WAITING, WORKING = 64, 1
"""Threads of a worker that wait for the keeper, and that do long work: more of these would only take the
interpreter from the thread that waits for all connections."""

ASKING = 4
"""Threads for what is no key operation (readyz, status, metrics): changes wait 30 s for a keeper that hangs,
and who asks how it is must not stand behind them."""

THREADS = WAITING + WORKING + ASKING

IDLE_SECONDS = 5.0
"""A thread that had nothing to do for so long ends."""

SLICE = 0.0002
"""Seconds after which the waiter gets the interpreter from long work."""

Job = Callable[[memoryview, memoryview], None]
"""Is given the locked memory of its thread, see `Slab`."""


class Lane:
    def __init__(self, name: str, memory: list[tuple[memoryview, memoryview]]) -> None:
        """As many threads as there are pieces of `memory`."""
        self._name = name
        self._memory = list(memory)
        self._changed = threading.Condition()
        self._jobs: OrderedDict[int, deque[Job]] = OrderedDict()
        self._most = len(memory)
        self._queued = self._idle = 0

    def submit(self, uid: int, job: Job) -> None:
        """Raises Overloaded where the system has no thread left, and none is at work here."""
        with self._changed:
            if self._idle > self._queued:
                self._changed.notify()
            elif self._memory:
                self._start()
            self._jobs.setdefault(uid, deque()).append(job)
            self._queued += 1

    def _start(self) -> None:
        memory = self._memory.pop()
        try:
            threading.Thread(target=self._run, args=memory, name=self._name, daemon=True).start()
        except RuntimeError:
            self._memory.append(memory)
            if len(self._memory) == self._most:
                raise Overloaded(
                    "no thread is left", hint="raise TasksMax= and LimitNPROC= in the unit"
                ) from None

    def _run(self, scratch: memoryview, answer: memoryview) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._idle += 1
                    self._changed.wait_for(lambda: bool(self._jobs), IDLE_SECONDS)
                    self._idle -= 1
                if not self._jobs:
                    self._memory.append((scratch, answer))
                    return
                uid, jobs = self._jobs.popitem(last=False)
                job = jobs.popleft()
                self._queued -= 1
                if jobs:
                    self._jobs[uid] = jobs  # behind the others
            job(scratch, answer)
            del job  # it holds a request


class Lanes:
    """One worker's, with its waiter at the other end: `at_work` says whether that is in a turn. `back`:
    connections that were answered, as far as could be."""

    def __init__(self, app: App, pace: Pace, sender: Sender, slab: Slab) -> None:
        self._app = app
        self._pace = pace
        self._sender = sender
        self.waiting = Lane("waiting", slab.threads[:WAITING])
        self._working = Lane("working", slab.threads[WAITING : WAITING + WORKING])
        self._asking = Lane("asking", slab.threads[WAITING + WORKING :])
        self.at_work = False
        self.back: deque[Connection] = deque()
        self._bell, self._ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        pace.poll.register(self._bell, IN)

    def submit(self, connection: Connection, route: Route, call: Call, long: bool) -> None:
        """Raises Overloaded."""
        lane = self._working if long else self.waiting if route.op else self._asking
        lane.submit(connection.peer.uid, partial(self._run, connection, route, call, long))

    def _run(self, connection: Connection, route: Route, call: Call, long: bool, *memory: memoryview) -> None:
        call.scratch, call.answer = memory
        if long:
            call.breathe = self._pace.breath(connection.peer.uid, lambda: self.at_work)
        self.finish(self._app, connection, route, call)
        call.answer[:] = ZEROS[:ANSWER]
        self.wake()
        call.breathe()

    def finish(self, app: App, connection: Connection, route: Route, call: Call, begun: float = 0.0) -> None:
        """In a thread: carry it out, and give the connection back."""
        try:
            reply = dispatch.dispatch(app, route, call, begun)
            call.body = b""  # which may be long, and so may the answer
            self._sender.send(connection, call.head, reply)
        except Exception:
            connection.keep = False
            log.exception("a connection ended with an error")
        self.back.append(connection)

    def wake(self) -> None:
        """Any thread may call this."""
        with suppress(BlockingIOError):  # it rings already
            os.write(self._ring, b"\0")

    def heard(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._bell, 4096)

    def trim(self) -> None:
        """What a long call took goes back to the system. Raises Overloaded."""
        self._working.submit(0, _trim)


_libc = ctypes.CDLL(None)


def _trim(scratch: memoryview, answer: memoryview) -> None:
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(ctypes.c_size_t(0))
