"""What jobs do to DEKs in a fleet: creates that come together are one job."""

from __future__ import annotations

import functools
from typing import Any, Callable

from ..crypto.aead import Aead
from ..errors import KMSError, StoreUnavailable
from ..fleet.rows import Wanted
from ..fleet.store import FleetStore
from ..store.contract import DekRecord
from .channel import telling
from .deks import Deks, described, same
from .rotation import refuse_spent


class FleetDeks(Deks):
    _store: FleetStore

    def create_many(self, deks: list[Wanted]) -> dict[str, Any]:
        """As many times `create`, for one look at the KEK and one cipher under it. `made`: of each, what came
        of it."""
        active, now = self._keyring.active, self._time.clock.now()
        new: dict[str, DekRecord] = {}
        with self._keyring.borrow(active.kek_id) as kek:
            make = functools.partial(self._new, active, Aead(kek), now)
            made = [telling(self._one(new, make, *wanted)) for wanted in deks]
            del make
        if new:
            self._store.put_all(list(new.values()))
        return {"made": made}

    def _one(
        self,
        new: dict[str, DekRecord],
        make: Callable[[str | None, str | None], DekRecord],
        thread_id: str | None,
        key_id: str | None,
    ) -> dict[str, Any] | KMSError:
        try:
            old = (new.get(key_id) or self._store.get(key_id)) if key_id is not None else None
            if old is not None:
                return {**described(same(old, thread_id or old.key_id)), "repeated": True}
            refuse_spent(self._store, self._keyring.active.kek_id)
            record = make(thread_id, key_id)
        except StoreUnavailable:
            raise
        except KMSError as error:
            return error
        if key_id is None:
            self._store.fresh(record.key_id)  # it was drawn just now: the engine need not be asked
        new[record.key_id] = record
        return described(record)
