"""Load from many connections at once.

results = hammer(sock, lambda kms, i: kms.create_dek(f"t{i}"), count=10_000, threads=16)

with Load(sock, lambda kms, i: kms.create_dek(f"t{i}"), threads=4) as load:
    load.wait_for(100)          # that many are acknowledged
    daemon.kill()               # each thread ends at its first failure
acknowledged = load.results
"""

from __future__ import annotations

import itertools
import threading
from typing import Callable, Generic, TypeVar

from .procs import wait_until
from .wire import Session, SocketPath

T = TypeVar("T")
Work = Callable[[Session, int], T]


class Load(Generic[T]):
    """Threads that call `work(session, i)` over and over, i counting up over all of them.

    Ends after `count` calls, when the block ends, or, thread by thread, at the first exception.
    `results` holds what was returned, so what was acknowledged; `errors` what ended the threads.
    `keep_going` goes on with a new connection instead.
    """

    def __init__(
        self,
        path: SocketPath,
        work: Work[T],
        *,
        threads: int = 8,
        count: int | None = None,
        keep_going: bool = False,
    ) -> None:
        self.results: list[T] = []
        self.errors: list[Exception] = []
        self._path, self._work, self._keep_going = path, work, keep_going
        self._numbers = iter(range(count)) if count is not None else itertools.count()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"load-{i}", daemon=True) for i in range(threads)
        ]

    def _next(self) -> int | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._numbers, None)

    def _run(self) -> None:
        with Session(self._path) as session:
            while (number := self._next()) is not None:
                try:
                    result = self._work(session, number)
                except Exception as error:
                    self.errors.append(error)
                    if not self._keep_going:
                        return
                    session.close()
                else:
                    self.results.append(result)

    def start(self) -> Load[T]:
        for thread in self._threads:
            thread.start()
        return self

    def join(self, timeout: float = 120.0) -> Load[T]:
        """Wait for the end of all calls. AssertionError where one hangs."""
        for thread in self._threads:
            thread.join(timeout)
        hung = [thread.name for thread in self._threads if thread.is_alive()]
        assert not hung, f"calls without an answer after {timeout:g} s in {hung}"
        return self

    def stop(self) -> Load[T]:
        """No further calls; those under way are finished."""
        self._stop.set()
        return self.join()

    def wait_for(self, results: int, timeout: float = 60.0) -> None:
        """Until so many calls were answered."""
        wait_until(
            lambda: len(self.results) >= results or not any(thread.is_alive() for thread in self._threads),
            timeout,
            f"{results} answers",
        )
        assert len(self.results) >= results, (
            f"the load ended after {len(self.results)} answers: {self.errors[:3]}"
        )

    def __enter__(self) -> Load[T]:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()


def hammer(path: SocketPath, work: Work[T], *, count: int, threads: int = 8) -> list[T]:
    """Make `count` calls; the first error is raised."""
    load = Load(path, work, threads=threads, count=count).start().join()
    if load.errors:
        raise load.errors[0]
    return load.results
