"""Who comes first where several UIDs are here: whoever took least of the waiter's time of late.

Each UID has a mark: the seconds that were taken for it. The lowest comes first, and of one UID the connection
that waits longest. So one who asks for little waits for one long request of others, however many of them are
ready (of the EVENTS that a turn is told of). Whoever was away has saved nothing: no mark is lower than
that of the last who was served.
"""

from __future__ import annotations

from collections.abc import Iterable

from .connection import Connection

KNOWN = 1024
"""UIDs that are told from each other."""


class Fair:
    def __init__(self) -> None:
        self._marks: dict[int, float] = {}
        self._floor = 0.0

    def order(self, ready: Iterable[Connection]) -> list[Connection]:
        return sorted(ready, key=lambda one: (self._mark(one.peer.uid), one.turn))

    def _mark(self, uid: int) -> float:
        return max(self._marks.get(uid, 0.0), self._floor)

    def took(self, uid: int, seconds: float) -> None:
        if len(self._marks) >= KNOWN:
            self._marks.clear()
        self._floor = self._mark(uid)
        self._marks[uid] = self._floor + seconds
