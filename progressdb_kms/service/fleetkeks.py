"""The KEKs of a host that is one of a fleet: those that a rotation may move to are in its keyring beforehand.

They come from `next_master_keys`, at the start and at SIGHUP. One that left that list is wiped once the fleet
has heard that this host has it no more; the keyring's other writer is kept out meanwhile (see `fleetkeeper`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

from ..config.keysource import COMING
from ..config.weakkeys import check_master_key
from ..crypto.aead import KEY_SIZE
from ..crypto.memory import LockedBuffer
from ..errors import Conflict, StoreUnavailable, WeakKey
from ..fleet.store import FleetStore
from .fleetkeys import Coming
from .fleetrotation import FleetRotation
from .keks import Keks
from .plan import Configured
from .rotation import RETIRED_KEK, Rotation, Steps

log = logging.getLogger("progressdb_kms")


class FleetKeks(Keks):
    _store: FleetStore

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._leaving: set[str] = set()

    def forget(self) -> None:
        """The board tells the workers, DEK by DEK, before a change is answered."""

    # ---- those that a rotation may move to -------------------------------------------------------

    def renew(self, coming: Coming) -> Configured:
        """SIGHUP: what is in next_master_keys now. A KEK that left is wiped once the fleet has heard so."""
        before = set(self.keys.coming)
        self.keys = coming.into(self._keyring, self.keys, self._is_retired)
        self._leaving = (self._leaving | before) - self.keys.kek_ids
        return self.keys

    def _is_retired(self, kek_id: str) -> bool:
        found = self._store.read(RETIRED_KEK + kek_id) is not None
        if found:
            log.warning("the KEK %s of %s was rotated out: take it out there", kek_id, COMING)
        return found

    def let_go(self, told: Collection[str], ring: AbstractContextManager[Any]) -> None:
        """`told`: what the fleet has heard that this host has."""
        gone = self._leaving.difference(told)
        if self.rotation is None and gone:
            with ring:
                kept = {self._keyring.active.kek_id, *self._store.keks()}
                for kek_id in gone & set(self._keyring.kek_ids()) - kept:
                    self._keyring.remove(kek_id)
            self._leaving -= gone

    def _rotations(self, *args: Any) -> Rotation:
        return FleetRotation(set(self.keys.coming), *args)

    def rotate(self, new_kek: LockedBuffer | None = None, dry_run: bool = False, kek_id: str = "") -> Steps:
        if new_kek is None and kek_id in self.keys.coming and kek_id in self._keyring.kek_ids():
            new_kek = self._copy(kek_id)
        return super().rotate(new_kek, dry_run, kek_id)

    def _copy(self, kek_id: str) -> LockedBuffer:
        copy = LockedBuffer(KEY_SIZE)
        with self._keyring.borrow(kek_id) as key:
            copy.view[:] = key
        try:
            check_master_key(copy.view)
        except WeakKey as error:
            copy.close()
            raise Conflict(f"{self.keys.coming[kek_id].label} can't be a KEK: {error.message}") from None
        return copy

    # ---- what rotations left ---------------------------------------------------------------------

    def look_for_abandoned(self) -> None:
        with contextlib.suppress(StoreUnavailable):  # the next look finds it
            self._left = self._left or self._store.abandoned()

    def _remove(self) -> None:
        """What an earlier rotation staged, of this host or of one that is dead. What a swap left stays: it is
        the snapshot."""
        with self._store.transaction():
            self._store.staging(False)
        self._left = False
