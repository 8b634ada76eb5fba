"""A fleet's store in the hands of a command: see `store.mending`."""

from __future__ import annotations

import contextlib

from ..store.mending import Mending
from .store import FleetStore


class FleetMending(Mending, FleetStore):
    def recount(self) -> bool:
        """In one snapshot, so that other hosts may write meanwhile: what they add, they count themselves.
        What is wrong becomes this host's."""
        with contextlib.nullcontext() if self._open is not None else self.snapshot():
            self._refresh()
            return super().recount()
