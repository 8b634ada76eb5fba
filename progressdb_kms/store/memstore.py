"""The store's twin in memory: the same contract (see `contract`), no file, no SQLite.

It lets the keeper and rotation be tried without a disk, and it says in plain dicts what SQLite is held to:
both pass the same contract tests. What it holds is gone with the process, so no daemon serves from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ..errors import StoreUnavailable
from .contract import DekRecord, KekCount, counted


class State(NamedTuple):
    """All there is. It is replaced by each transaction, never edited."""

    deks: dict[str, DekRecord]
    kms: dict[str, dict[str, Any]]
    keks: dict[str, KekCount]
    staged: Optional[dict[str, DekRecord]] = None
    retired: tuple[dict[str, DekRecord], ...] = ()

    def copy(self) -> State:
        staged = None if self.staged is None else dict(self.staged)
        return State(dict(self.deks), dict(self.kms), self.keks, staged, tuple(dict(t) for t in self.retired))


class MemoryReader:
    """Sees what the store has committed."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    @property
    def _state(self) -> State:
        return self._store.committed

    def get(self, key_id: str) -> Optional[DekRecord]:
        return self._state.deks.get(key_id)

    def page(self, after: str, limit: int, thread_id: Optional[str] = None) -> list[DekRecord]:
        rows = (record for key_id, record in sorted(self._state.deks.items()) if key_id > after)
        return [record for record in rows if thread_id in (None, record.thread_id)][:limit]

    def read(self, name: str) -> Optional[dict[str, Any]]:
        return self._state.kms.get(name)

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name in self._state.kms if name.startswith(prefix))

    def keks(self) -> dict[str, KekCount]:
        return self._state.keks

    def close(self) -> None:
        """Nothing is held."""


class MemoryStore(MemoryReader):
    """The writer. One thread at a time, as with the keeper."""

    def __init__(self) -> None:
        super().__init__(self)
        self.committed = State({}, {}, {})
        self._working: Optional[State] = None

    @property
    def _state(self) -> State:
        return self._working or self.committed

    def _writable(self) -> State:
        if self._working is None:
            raise StoreUnavailable("a write outside of a transaction")
        return self._working

    @contextlib.contextmanager
    def transaction(self, durable: bool = True) -> Iterator[None]:
        if self._working is not None:
            raise StoreUnavailable("a transaction is under way")
        self._working = self.committed.copy()
        try:
            yield
            self.committed = self._working
        finally:
            self._working = None

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        before = self._writable().copy()
        try:
            yield
        except BaseException:
            self._working = before
            raise

    def put(self, record: DekRecord) -> None:
        state = self._writable()
        keks = counted(state.keks, state.deks.get(record.key_id), record)
        state.deks[record.key_id] = record
        self._working = state._replace(keks=keks)

    def write(self, name: str, value: dict[str, Any]) -> None:
        self._writable().kms[name] = value

    def erase(self, name: str) -> None:
        self._writable().kms.pop(name, None)

    def due(self, now: str, limit: int) -> list[DekRecord]:
        names = [name for name in self.names("deletion:") if name < f"deletion:{now}"][:limit]
        found = (self.get(name.split("|", 1)[1]) for name in names)
        return [record for record in found if record is not None]

    # ---- rotation ------------------------------------------------------------------------------

    def staging(self, on: bool) -> None:
        state = self._writable()
        left = () if state.staged is None else (state.staged,)
        self._working = state._replace(staged={} if on else None, retired=state.retired + left)

    def stage(self, records: Iterable[DekRecord]) -> None:
        staged = self._writable().staged
        if staged is None:
            raise StoreUnavailable("no table for rewrapped rows was made")
        staged.update((record.key_id, record) for record in records)

    def check_staged(self, after: str, limit: int) -> str:
        state = self._state
        rows = sorted(key_id for key_id in state.deks if key_id > after)[:limit]
        if missing := [key_id for key_id in rows if key_id not in (state.staged or {})]:
            raise StoreUnavailable(f"{len(missing)} rewrapped rows are missing: nothing was changed")
        return rows[-1] if rows else ""

    def swap(self, keks: dict[str, KekCount]) -> None:
        state = self._writable()
        if state.staged is None:
            raise StoreUnavailable("no table for rewrapped rows was made")
        self._working = State(state.staged, state.kms, keks, None, (*state.retired, state.deks))

    def retire(self, limit: int) -> bool:
        state = self._writable()
        if not state.retired:
            return False
        first, *others = state.retired
        for key_id in list(first)[:limit]:
            del first[key_id]
        self._working = state._replace(retired=(first, *others) if first else tuple(others))
        return True

    def forget(self, key_id: str) -> None:
        for table in self._writable().retired:
            table.pop(key_id, None)

    # ---- what only a file needs --------------------------------------------------------------------

    def trouble(self) -> str:
        """None."""
        return ""

    lost = trouble

    def files(self) -> dict[str, tuple[int, int]]:
        return {}

    def rescue(self, now: float) -> Path:
        raise StoreUnavailable("a store in memory has no file")

    def compact(self) -> None:
        """No free pages."""

    def checkpoint(self, patient: bool = True) -> None:
        """No write-ahead log."""
