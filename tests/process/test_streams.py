"""The daemon's standard streams, of which several threads tell at the same time."""

from __future__ import annotations

import os
import select
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from progressdb_kms.process.streams import Unblocked


def test_two_threads_may_look_at_the_same_time_whether_somebody_reads_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = threading.Barrier(2)

    class Poll:
        """One that is asked by two threads at a time says what Python's does."""

        def __init__(self) -> None:
            self._asked = False

        def register(self, fd: int, events: int) -> None:
            pass

        def poll(self, milliseconds: float) -> list[tuple[int, int]]:
            if self._asked:
                both.abort()
                raise RuntimeError("concurrent poll() invocation")
            self._asked = True
            both.wait(60)
            self._asked = False
            return []

    monkeypatch.setattr(select, "poll", Poll)
    with open(os.devnull, "wb") as file, Unblocked(file.fileno()) as stream, ThreadPoolExecutor(2) as threads:
        stream.dropped = 1
        for told in [threads.submit(stream.catch_up) for _ in range(2)]:
            told.result()
        assert stream.dropped == 1
