"""How often a thing that failed is tried again."""

from __future__ import annotations

import time


class Pause:
    """For `first` seconds after a failure, twice as long after each further one, up to `longest`.

    By the monotonic clock: nobody sets that back. A failure within a pause (somebody could not wait) changes
    nothing of it. Without lengths it only tells what is news.
    """

    def __init__(self, first: float = 0.0, longest: float = 0.0) -> None:
        self._first, self._longest = first, longest
        self._length = self._until = 0.0
        self.why = ""  # what the last failure said; empty where the last try worked

    def over(self) -> bool:
        return not self.why or time.monotonic() >= self._until

    def failed(self, why: str) -> bool:
        """Returns whether that is news: the time before it had worked, or failed otherwise."""
        if self.over():
            self._length = min(max(self._first, 2 * self._length), self._longest)
            self._until = time.monotonic() + self._length
        news, self.why = why != self.why, why or "?"
        return news

    def worked(self) -> bool:
        """Returns whether that is news."""
        news, self.why, self._length = bool(self.why), "", 0.0
        return news
