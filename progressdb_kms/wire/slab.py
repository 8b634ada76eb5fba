"""The locked memory of one worker's connections: made once, before the first fork, and never more.

    received 16 KiB | spare pieces of 16 KiB | scratch 64 and answer 128 of each thread that serves

What a peer sends is received into the first part, and wiped from it before the next peer's; but what is still
to come of a body goes straight to where that lies. A request that is there whole is read, and answered, where
it lies. A spare piece is for the few that must lie in locked memory between two moments: the body of a
`secret` route that comes in pieces, and requests that were sent ahead. An idle connection has none. Where
they are scarce, what was sent ahead stays in the socket.
"""

from __future__ import annotations

from ..crypto.envelope import SCRATCH_SIZE
from ..crypto.memory import LockedBuffer

RECEIVED = 16 * 1024
"""Bytes: the longest head (8 KiB), a secret body behind it, or a page of chat."""

SPARES, LAST = 16, 4
"""The last few are for bodies alone, one each for UIDs that have none there: who holds all that he can get
keeps nobody else from sending a key."""

ANSWER = 128
"""Bytes of an answer that holds a DEK."""

_OWN = SCRATCH_SIZE + ANSWER
ZEROS = bytes(RECEIVED)


def size_of(threads: int) -> int:
    """Bytes."""
    return RECEIVED * (1 + SPARES) + (1 + threads) * _OWN


class Slab:
    def __init__(self, mode: str, threads: int) -> None:
        """`threads`: those that serve beside the waiter. Raises LockRefused."""
        first = RECEIVED * (1 + SPARES)
        self.buffer = LockedBuffer(size_of(threads), mode)
        self.map = self.buffer.map
        view = self.buffer.view
        self.received = view[:RECEIVED]
        self._spares = [view[at : at + RECEIVED] for at in range(RECEIVED, first, RECEIVED)]
        self.scarce = False  # are fewer than LAST left?
        own = [view[at : at + _OWN] for at in range(first, len(view), _OWN)]
        self.waiter, *self.threads = [(piece[:SCRATCH_SIZE], piece[SCRATCH_SIZE:]) for piece in own]

    def take(self) -> memoryview | None:
        """A spare piece, or None: all are in use."""
        self.scarce = len(self._spares) <= LAST
        return self._spares.pop() if self._spares else None

    def give_back(self, piece: memoryview) -> None:
        piece[:] = ZEROS
        self._spares.append(piece)
        self.scarce = len(self._spares) < LAST
