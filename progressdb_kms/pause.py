"""How often a thing that failed is tried again."""

from __future__ import annotations

import time


class Pause:
    """For `first` seconds after a failure, twice as long after each further one, up to `longest`.

    By the monotonic clock: nobody sets that back. A failure within a pause (somebody could not wait) changes
    nothing of it.
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first, self._longest = first, longest
        self._length = self._until = 0.0
        self.why = ""  # what the last failure said; empty where the last try worked

    def over(self) -> bool:
        return not self.why or time.monotonic() >= self._until

    def failed(self, why: str) -> None:
        if self.over():
            self._length = min(max(self._first, 2 * self._length), self._longest)
            self._until = time.monotonic() + self._length
        self.why = why or "?"

    def worked(self) -> None:
        self.why, self._length = "", 0.0
