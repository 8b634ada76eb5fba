"""How much was done under a policy within this second: a slot a worker and policy, with one writer each.

Two workers that look at the same moment may both say yes: a rate is passed by one operation of each worker
then, never by more, and nobody waits for a lock.
"""

from __future__ import annotations

import mmap
import threading
import time

from ..config.values import MAX_POLICIES


def meters(workers: int) -> list[RateMeter]:
    """One for each worker, over slots that all share: (second, count). To be made before they fork."""
    words = memoryview(mmap.mmap(-1, workers * MAX_POLICIES * 16)).cast("Q")
    return [RateMeter(words, workers, worker) for worker in range(workers)]


class RateMeter:
    """One worker's view. Safe for its threads."""

    def __init__(self, words: memoryview, workers: int, worker: int) -> None:
        self._words = words
        self._bases = [MAX_POLICIES * 2 * number for number in range(workers)]
        self._own = self._bases[worker]
        self._lock = threading.Lock()

    def spend(self, number: int, count: int, limit: int) -> int:
        """How many of `count` may be done in this second under the policy of this number."""
        at, second = 2 * (number - 1), int(time.monotonic())
        words = self._words
        with self._lock:
            own = self._own + at
            if words[own] != second:
                words[own + 1] = 0
                words[own] = second
            done = sum(words[base + at + 1] for base in self._bases if words[base + at] == second)
            granted = max(0, min(count, limit - done))
            words[own + 1] += granted
        return granted
