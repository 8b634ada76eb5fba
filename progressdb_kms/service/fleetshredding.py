"""Shreds in a fleet: refused everywhere at once, gone with the KEK.

A tombstone takes the place of the row, on every host before it is answered, and in what rotations left. But
the engine keeps what was overwritten: in dead rows, in its log, on its standbys, in its backups. There the
wrapped bytes lie until the KEK that wraps them is destroyed. So an entry `erasure:<key_id>` names that KEK,
and stays, and `erasures_due` counts it, until no host of the fleet has that KEK in its memory any more and no
stored DEK needs it; then `shred_complete` is recorded by the host that finds it so. What files may still hold
the KEK is the operator's to know."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import StoreUnavailable
from ..fleet.store import FleetStore
from ..store import snapshots
from ..store.contract import DekRecord
from .shredding import MOST, Shredding

HURRIED = 30
"""Looks, a second apart, after a rotation: the hosts tell that they have wiped the old KEK by then."""


class FleetShredding(Shredding):
    _store: FleetStore
    _hurried = 0

    def hurry(self) -> None:
        """A rotation is done."""
        self._hurried, self._next = HURRIED, 0.0

    def _tidy_up(self) -> None:
        super()._tidy_up()
        if self._hurried:
            self._hurried -= 1
            self._next = self._clock.monotonic() + 1.0

    def mark(self, old: DekRecord, now: float) -> DekRecord:
        self._store.forget(old.key_id)
        return super().mark(old, now)

    def soon(self, blobs: Mapping[str, bytes]) -> None:
        """What this host has from before it was one of a fleet goes at once."""
        for key_id in blobs:
            snapshots.forget(self._data_dir, key_id)

    def remains(self, key_id: str) -> StoreUnavailable | None:
        return None

    def tell(self) -> None:
        """Nothing is late: it is due until a rotation."""

    def _to_be_erased(self) -> list[DekRecord]:
        """None that could be by this host alone; those that are gone by now are recorded. Inside a
        transaction: of two hosts that find the same, one has it."""
        needed = {self._store.state().active.kek_id, *self._store.keks()}  # type: ignore[union-attr]
        for key_id in self._store.taken(self._store.erasures(needed, MOST)):
            self._audit.note("shred_complete", key_id=key_id)
        return []
