"""The rotation of a fleet's KEK, from one of its hosts: as `rotation`, and what more hosts ask for.

- **Who has the new KEK?** Every host that is not fenced must have it configured: asked before anything is
  begun, so that nothing is staged in vain, and again under the lock of the swap, where it decides. No KEK
  passes through the store.
- **What others write meanwhile** stands in `touched`. It is staged again and again until little is left; the
  rest is, under the lock.
- **Every host's audit key** is wrapped anew in the swap, of those that are down now, too.
- **The snapshot** is the table that the swap leaves behind. `backups prune` drops it.
- **The lock** is asked for a moment at a time, since all hosts wait behind it: a backup that reads all rows
  may hold it up for minutes. Each try begins with what was touched meanwhile.

The owner may die, or be fenced while it is stopped: then another host throws away what it had staged, and
each of its own later transactions fails: see `fleet.store`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from ..crypto.envelope import AUDIT_KEY
from ..crypto.keyring import Keyring
from ..errors import Conflict
from ..fleet import barrier
from ..fleet.rows import HostRow
from ..fleet.store import FleetStore, Locked
from ..store.contract import DekRecord
from ..store.seal import END
from . import ownkeys
from .rotation import CHECK, RETIRED_KEK, Rotation

log = logging.getLogger("progressdb_kms")

STEP_SECONDS = 0.025
"""Of the processor, in a step: each ends with a COMMIT, that may wait for a standby."""

WORKED_OFF = 500
"""Touched rows that are staged again at a time."""

FEW = 50
"""So many may be left for the lock: each costs some 40 µs there."""

ROUNDS = 1000
"""Where others write faster than this host works off, it goes on like this no longer."""

PATIENCE = 600.0
"""Seconds for which the lock of the swap is asked for."""

PAUSE = 0.1, 5.0
"""Between two tries: first, and at most."""

MOMENT = 0.005
"""A step of a pause, after which other jobs have their turn."""


def refuse_absent(hosts: Iterable[HostRow], kek_id: str) -> None:
    """The census. A KEK that another host doesn't have would close DEKs there."""
    absent = barrier.without_kek(list(hosts), kek_id)
    if absent:
        raise Conflict(
            f"the KEK {kek_id} is not configured on every host of the fleet: {', '.join(absent)}",
            code="kek_not_everywhere",
            hint="add it to next_master_keys there, and send these daemons SIGHUP; nothing was changed",
        )


class LeftTable:
    """The snapshot of a rotation of a fleet: nothing is to be written."""

    def __init__(self, store: FleetStore) -> None:
        self._store = store

    @property
    def path(self) -> PurePath:
        return PurePath(self._store.left)

    def save(self, pairs: Iterable[tuple[DekRecord, DekRecord]]) -> int:
        return sum(bool(new.wrapped) for _, new in pairs)

    def finish(self, audit_key: memoryview, new_kek_id: str) -> Iterator[None]:
        return iter(())

    def close(self) -> None:
        pass


class FleetRotation(Rotation):
    """`coming`: KEKs that are configured for it, on this host."""

    _store: FleetStore
    step = STEP_SECONDS

    def __init__(
        self,
        coming: Collection[str],
        store: FleetStore,
        keyring: Keyring,
        data_dir: Path,
    ) -> None:
        super().__init__(store, keyring, data_dir)
        self.coming = coming
        self._audit_keys: dict[str, tuple[str, dict[str, Any]]] = {}
        self._seen = ""

    def _begin(self, now: float, old_id: str, new_id: str, total: int) -> LeftTable:
        self._snapshot = snapshot = LeftTable(self._store)
        with self._store.transaction():
            self._store.staging(True)
        return snapshot

    def _compare(self) -> Iterator[None]:
        """To the first page that is not full. DEKs that others make come to the end, and would keep it from
        ever ending: they are compared while it is caught up, and the last of them under the lock."""
        while self._compare_page():
            yield

    def _compare_page(self) -> bool:
        """True: there is more than a page left."""
        if self._seen != END:
            self._seen = self._store.check_staged(self._seen, CHECK) or END
        return self._store.paired == CHECK

    def _change_over(self, new_id: str, version: int, now: float) -> Iterator[None]:
        deadline, (pause, most) = time.monotonic() + PATIENCE, PAUSE
        while True:
            yield from self._catch_up(new_id)
            try:
                yield from super()._change_over(new_id, version, now)
                break
            except Locked as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("the rotation can't change over yet: %s", error.message)
            yield from _rest(pause)
            pause = min(2 * pause, most)
        self._store.acting = new_id

    def _catch_up(self, new_id: str) -> Iterator[None]:
        """Until what the lock must wait for is little."""
        self._renew_audit_keys(new_id)
        for _ in range(ROUNDS):
            records = self._store.touched(WORKED_OFF)
            with self._store.transaction():
                self._restage(records)
            self._compare_page()
            yield
            if len(records) < FEW:
                return

    def _restage(self, records: list[DekRecord]) -> None:
        assert self._rewrapper is not None
        self._store.stage(self._rewrapper.records(records))

    def _renew_audit_keys(self, new_id: str) -> None:
        """Those that changed since the last time: none, but for hosts that came."""
        name = ownkeys.ROWS[AUDIT_KEY]
        rows = self._store.foreign(name)
        known = {
            host: (text, new) for host, (text, new) in self._audit_keys.items() if rows.get(host) == text
        }
        for host in rows.keys() - known.keys():
            row = self._store.opened(host, name, rows[host])
            with ownkeys.opened(self._keyring, AUDIT_KEY, row) as key:
                known[host] = rows[host], ownkeys.wrap(self._keyring, new_id, AUDIT_KEY, key)
        self._audit_keys = known

    def _swap(self, new_id: str, version: int, now: float) -> None:
        retired = RETIRED_KEK + self._keyring.active.kek_id
        self._store.settle(self._restage, [*ownkeys.ROWS.values(), retired])
        refuse_absent(self._store.census(), new_id)
        self._renew_audit_keys(new_id)
        self._store.write_foreign(ownkeys.ROWS[AUDIT_KEY], self._audit_keys)
        super()._swap(new_id, version, now)

    def _take_over(self, new_id: str, version: int, old_id: str) -> None:
        """Unless this host's place has heard of it first."""
        log.info(
            "the fleet's rows were locked for %.0f ms", 1000 * (time.monotonic() - self._store.locked_at)
        )
        if self._keyring.active.kek_id != new_id:
            self._keyring.activate(new_id, version)
        if old_id in self._keyring.kek_ids():
            self._keyring.remove(old_id)

    def _end(self, new_id: str, committed: bool) -> None:
        """A KEK that became the active one meanwhile, because another host rotated to it, stays."""
        if not committed and self._keyring.active.kek_id == new_id:
            self.coming = {*self.coming, new_id}
        super()._end(new_id, committed)


def _rest(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(MOMENT)
        yield
