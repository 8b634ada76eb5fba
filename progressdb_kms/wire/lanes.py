"""Threads for what the waiter must not do itself: wait for the keeper, or work for long.

A lane is a bounded number of threads, started when there is work and gone when there was none for a while,
and a queue that gives each UID its turn: a hundred jobs of one delay another's by one.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict, deque
from typing import Callable

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
        """Raises RuntimeError where the system has no thread left, and none is at work here."""
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
                raise

    def _run(self, scratch: memoryview, answer: memoryview) -> None:
        while True:
            with self._changed:
                if not self._jobs and not self._wait():
                    self._memory.append((scratch, answer))
                    return
                uid, jobs = self._jobs.popitem(last=False)
                job = jobs.popleft()
                self._queued -= 1
                if jobs:
                    self._jobs[uid] = jobs  # behind the others
            job(scratch, answer)
            del job  # it holds a request

    def _wait(self) -> bool:
        """Is there a job now?"""
        self._idle += 1
        try:
            return self._changed.wait_for(lambda: bool(self._jobs), IDLE_SECONDS)
        finally:
            self._idle -= 1


# ---- long work


_libc = ctypes.CDLL(None)


def trim() -> None:
    """What a long call took goes back to the system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(ctypes.c_size_t(0))
