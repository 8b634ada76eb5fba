"""A command's place in the fleet, for as long as it writes: it registers, beats, and leaves.

It is a host like any other, so that nobody can put it out of the fleet and be overtaken by what it writes. It
remembers nothing of the store: whatever has happened, it has seen.
"""

from __future__ import annotations

import contextlib
import threading

from ..errors import StoreUnavailable
from .engine import Link
from .identity import Identity
from .lease import BEATS
from .registry import EngineRegistry
from .settings import Where


class Visitor:
    """In a `with` block. The data-dir's lock is held, so no daemon of this host is at work."""

    def __init__(self, where: Where, who: Identity, keks: frozenset[str]) -> None:
        """Where it is killed, or loses the engine at its end, its row stays: `who` lets the next start of
        this host take it away, before a change waits for it or a rotation misses a KEK there."""
        self.host, self._who, self.inc = who.host, who, ""
        self._keks = keks
        self._pause = where.fence_seconds / BEATS
        self._engine = EngineRegistry(Link(where, "progressdb-kms visitor"), where.fence_seconds)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beats, daemon=True)

    def __enter__(self) -> Visitor:
        """Raises StoreUnavailable, StoreDamaged, ConfigError."""
        self.inc = self._who.fresh()
        name, gone = f"{self._who.name} (a command)", self._who.gone()
        self._engine.register(self.host, self.inc, name, self._keks, gone)
        self._thread.start()
        return self

    def _beats(self) -> None:
        """One that fails is made up for by the next; where none is in time, the fence refuses the writes."""
        while not self._over.wait(self._pause):
            with contextlib.suppress(StoreUnavailable):
                self._engine.beat(self.host, self.inc, self._engine.news(0, 1).fleet.point, self._keks)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(StoreUnavailable):  # then it is fenced like any dead host
            self._engine.leave(self.host, self.inc)
        self._engine.close()
