"""What all processes of one host know of the fleet: until when they may serve, and which DEKs to forget.

A region of shared memory, made before the first fork. The process that keeps the host's place in the fleet
writes, the workers read. There is nothing secret in it.

    u64 each:   lease by boot time, lease by the wall clock (ns) | flushes | timeline | seen |
                epoch of this run, 0 before the store was opened | slots of workers that the keeper knows
    slots:      gen u64 | length u64 | key_id 128                    (SLOTS times, a ring by gen)

- **Any mix of an old and a new lease is good**: while it is renewed, either old word is the earlier end; the
  boot time is the first to be zeroed.
- A slot's gen goes first and comes last; who reads compares it before and after. A slot that doesn't hold the
  gen that is looked for (the ring went round, or the change was of all DEKs) means: forget everything.
- `seen` is written after its slot, and acknowledged to the engine after that: from then on no process of this
  host uses what it remembered from before.

What a worker reads of the store brings the `Point` of its snapshot along, which must cover the one
that was seen when the call began: an old primary that nobody told of its end still answers. And what is
remembered must be of the same timeline, and not older than what was forgotten last: the ring went past it.
A new timeline flushes everything."""

from __future__ import annotations

import mmap
import threading
from typing import Generic, TypeVar

from .lease import NONE, Lease
from .rows import KEY, ChangeRow, Point

SLOTS = 1024
"""Changes that a worker may be behind. It looks at each call, so that is a burst within one."""

HEADER = 64
SLOT = 144
SIZE = HEADER + SLOTS * SLOT
BOOT, WALL, FLUSHES, TIMELINE, SEEN, _EPOCH, _KNOWN = range(7)
"""Words of the header. A worker looks at some of them at each call, where a method would be half of it."""
_WORD = 8


class Board:
    """A view on the region. Cheap to make; every process has its own."""

    def __init__(self, region: memoryview) -> None:
        self._region = region[:SIZE]
        self.words = self._region.cast("Q")

    @classmethod
    def new(cls) -> Board:
        return cls(memoryview(mmap.mmap(-1, SIZE)))

    # ---- reading -------------------------------------------------------------------------------

    @property
    def lease(self) -> Lease:
        return Lease(self.words[BOOT], self.words[WALL])

    def serves(self, boot: int, wall: int) -> bool:
        """Does the lease hold by these clocks? To be asked before the work and after it."""
        return boot < self.words[BOOT] and wall < self.words[WALL]

    @property
    def seen(self) -> Point:
        return Point(self.words[TIMELINE], self.words[SEEN])

    @property
    def flushes(self) -> int:
        return self.words[FLUSHES]

    def key_id(self, gen: int) -> str | None:
        """Of the DEK that this change was of; None: it isn't known any more, or of more than one."""
        start = HEADER + gen % SLOTS * SLOT
        if self.words[start // _WORD] != gen:
            return None
        length = self.words[start // _WORD + 1]
        text = bytes(self._region[start + 16 : start + 16 + min(length, SLOT - 16)])
        return text.decode("ascii", "replace") if self.words[start // _WORD] == gen else None

    @property
    def epoch(self) -> int:
        """Of the audit chains of this run; 0 as long as no store was opened."""
        return self.words[_EPOCH]

    def knows(self, slots: int) -> bool:
        """Has the keeper heard of the workers in slots 1 to this one?"""
        return self.words[_KNOWN] == (1 << slots + 1) - 2

    # ---- writing: the keeper ---------------------------------------------------------------------

    def opened(self, epoch: int) -> None:
        """The first keeper of this run that had a store says so; its replacements change nothing."""
        self.words[_EPOCH] = self.words[_EPOCH] or epoch

    def met(self, slot: int) -> None:
        self.words[_KNOWN] |= 1 << slot

    # ---- writing: one thread of one process ------------------------------------------------------

    def grant(self, lease: Lease) -> None:
        self.words[WALL] = max(0, lease.wall)
        self.words[BOOT] = lease.boot

    def end(self) -> None:
        """No process begins or ends a call any more, until a lease is granted again."""
        self.words[BOOT] = 0
        self.grant(NONE)

    def flush(self, seen: Point) -> None:
        """All that is remembered is old. The count grows before and after: whoever looked in between looks
        again."""
        self.words[FLUSHES] += 1
        self.words[TIMELINE], self.words[SEEN] = seen
        self.words[FLUSHES] += 1

    def tell(self, change: ChangeRow) -> None:
        """The next change after `seen`."""
        start = HEADER + change.gen % SLOTS * SLOT
        self.words[start // _WORD] = 0
        if change.kind != KEY or not change.key_id.isascii() or len(change.key_id) > SLOT - 16:
            return self.flush(self.seen._replace(gen=change.gen))
        text = change.key_id.encode("ascii")
        self.words[start // _WORD + 1] = len(text)
        self._region[start + 16 : start + 16 + len(text)] = text
        self.words[start // _WORD] = change.gen
        self.words[SEEN] = change.gen
        return None


T = TypeVar("T")


class Follower(Generic[T]):
    """What one worker remembers of the store, by key_id, and how far it has followed the board."""

    def __init__(self, board: Board, room: int) -> None:
        """`room`: how many DEKs are remembered before the oldest are forgotten; at most twice as many are."""
        self._board = board
        self._room = room
        self._lock = threading.Lock()  # for whatever changes the next four; a hit takes none
        self.young: dict[str, T] = {}
        self._old: dict[str, T] = {}
        self._words = board.words
        self.flushes = board.flushes
        self._position = board.seen
        self.gen = self._position.gen

    def follow(self) -> Point:
        """Forget what has changed. Returns the point up to which all is known; at the beginning of a call:
        every change that was answered before is in it, as long as there is a lease."""
        words = self._words
        if words[SEEN] != self.gen or words[FLUSHES] != self.flushes:
            with self._lock:
                self._catch_up()
        return self._position

    def _catch_up(self) -> None:
        flushes, seen = self._board.flushes, self._board.seen
        for key_id in self._changed(flushes, seen):
            if key_id is None:
                self.young, self._old = {}, {}
                break
            self.young.pop(key_id, None)
            self._old.pop(key_id, None)
        self._position = seen
        self.flushes, self.gen = flushes, seen.gen

    def _changed(self, flushes: int, seen: Point) -> list[str | None]:
        """The DEKs of the changes up to this one; None for all of them."""
        before = self._position.gen
        if flushes != self.flushes or not 0 <= seen.gen - before <= SLOTS:
            return [None]
        return [self._board.key_id(gen) for gen in range(before + 1, seen.gen + 1)]

    def get(self, key_id: str) -> T | None:
        """Followed."""
        words = self._words
        if words[SEEN] != self.gen or words[FLUSHES] != self.flushes:
            self.follow()
        found = self.young.get(key_id)
        return found if found is not None else self._rejuvenated(key_id)

    def _rejuvenated(self, key_id: str) -> T | None:
        if not self._old:
            return None
        with self._lock:
            found = self._old.pop(key_id, None)
            if found is not None:
                self._put(key_id, found)
            return found

    def remember(self, key_id: str, value: T, read: Point) -> None:
        """What was read in a snapshot of this point."""
        with self._lock:
            if read.timeline == self._position.timeline and read.gen >= self._position.gen:
                self._put(key_id, value)

    def _put(self, key_id: str, value: T) -> None:
        if len(self.young) >= self._room:
            self.young, self._old = {}, self.young
        self.young[key_id] = value

    def __len__(self) -> int:
        return len(self.young) + len(self._old)
