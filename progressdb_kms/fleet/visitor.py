"""A command's place in the fleet, for as long as it writes: it registers, beats, and leaves.

It is a host like any other, so that nobody can put it out of the fleet and be overtaken by what it writes. It
remembers nothing of the store: whatever has happened, it has seen.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading

from ..errors import StoreUnavailable
from .engine import Link
from .lease import BEATS
from .registry import EngineRegistry
from .settings import Where


class Visitor:
    """In a `with` block. The data-dir's lock is held, so no daemon of this host is at work."""

    def __init__(self, where: Where, host: str, keks: frozenset[str]) -> None:
        self.host, self.inc = host, os.urandom(8).hex()
        self._keks = keks
        self._pause = where.fence_seconds / BEATS
        self._engine = EngineRegistry(Link(where, "progressdb-kms visitor"), where.fence_seconds)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beats, daemon=True)

    def __enter__(self) -> Visitor:
        """Raises StoreUnavailable, StoreDamaged, ConfigError."""
        self._engine.register(self.host, self.inc, platform.node() + " (a command)", self._keks)
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
