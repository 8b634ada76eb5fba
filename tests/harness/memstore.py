"""The store's twin in memory: the same contract (see `store.sqlite`), no file, no SQLite.

It lets the keeper and rotation be tried without a disk, and it says in plain dicts what SQLite is held to:
both pass the same contract tests. What it holds is gone with the process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from progressdb_kms.encoding import json_dumps, json_loads
from progressdb_kms.errors import StoreUnavailable
from progressdb_kms.fleet.rows import added
from progressdb_kms.store.contract import HEAVY, KEK_ROW, Usage
from progressdb_kms.store.mending import Mending
from progressdb_kms.store.policy import SHREDDED
from progressdb_kms.store.seal import Seal, StoreState, Tally
from progressdb_kms.store.sealed import Reader, Row, Written


class State(NamedTuple):
    """All there is. It is replaced by each transaction, never edited."""

    deks: dict[str, Row]
    kms: dict[str, Row]
    usage: dict[str, Usage]
    staged: dict[str, Row] | None = None
    retired: tuple[dict[str, Row], ...] = ()

    def copy(self) -> State:
        staged = None if self.staged is None else dict(self.staged)
        left = tuple(dict(t) for t in self.retired)
        return State(dict(self.deks), dict(self.kms), dict(self.usage), staged, left)


def _parsed(rows: list[Written]) -> dict[str, Row]:
    return {row.key_id: json_loads(row.text) for row in rows}


class MemoryReader(Reader):
    """Sees what the store has committed."""

    def __init__(self, store: MemoryStore, key: memoryview | None = None) -> None:
        self._store = store
        self._seal = Seal(key) if key is not None else None

    @property
    def _state(self) -> State:
        return self._store.committed

    def _text(self, key_id: str) -> Any:
        row = self._state.deks.get(key_id)
        return None if row is None else json_dumps(row)

    def there(self, key_ids: Sequence[str]) -> set[str]:
        return {key_id for key_id in key_ids if key_id in self._state.deks}

    def _texts(self, after: str, limit: int, thread_id: str | None) -> list[tuple[str, Any]]:
        rows = ((key_id, row) for key_id, row in sorted(self._state.deks.items()) if key_id > after)
        found = [(key_id, json_dumps(row)) for key_id, row in rows if thread_id in (None, row["thread_id"])]
        return found[:limit]

    def _read(self, name: str) -> Any:
        return self._state.kms.get(name)

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name in self._state.kms if name.startswith(prefix))

    def span(self, prefix: str) -> tuple[int, str]:
        names = self.names(prefix)
        return len(names), names[0] if names else ""

    def usage(self, key_ids: Sequence[str]) -> dict[str, Usage]:
        kept = self._state.usage
        return {key_id: kept[key_id] for key_id in key_ids if key_id in kept}

    def heavy(self) -> dict[str, int]:
        return {key_id: row.encrypts for key_id, row in self._state.usage.items() if row.encrypts >= HEAVY}

    def close(self) -> None:
        """Nothing is held."""


class MemoryStore(Mending, MemoryReader):
    """The writer. One thread at a time, as with the keeper."""

    def __init__(self, key: memoryview | None = None) -> None:
        super().__init__(self)
        self.committed = State({}, {}, {})
        self._working: State | None = None
        if key is not None:
            self.unlock(key)

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
        before = self._book, self._tally
        try:
            yield
            self._settle(before[0])
            self.committed = self._working
        except BaseException:
            self._book, self._tally = before
            raise
        finally:
            self._working = None
        self._committed(before[0])

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        before: tuple[StoreState, Tally | None] = self._book, self._tally
        working = self._writable().copy()
        try:
            yield
        except BaseException:
            self._working = working
            self._book, self._tally = before
            raise

    def _write(self, name: str, row: dict[str, Any]) -> None:
        self._writable().kms[name] = row

    def _erase(self, name: str) -> None:
        self._writable().kms.pop(name, None)

    def count(self, rows: Iterable[tuple[str, Usage]]) -> None:
        usage = self._writable().usage
        for key_id, more in rows:
            state = self._state.deks.get(key_id, {"state": SHREDDED})["state"]
            if key_id.startswith(KEK_ROW) or state != SHREDDED:
                usage[key_id] = added(usage.get(key_id, Usage()), more)

    def _forget_usage(self, key_id: str) -> None:
        self._writable().usage.pop(key_id, None)

    def due(self, now: str, limit: int) -> list[str]:
        return [name for name in self.names("deletion:") if name < f"deletion:{now}"][:limit]

    # ---- rotation ------------------------------------------------------------------------------

    def staging(self, on: bool) -> None:
        state = self._writable()
        left = () if state.staged is None else (state.staged,)
        self._working = state._replace(staged={} if on else None, retired=state.retired + left)
        self._tally = None

    def _next(self) -> dict[str, Row]:
        staged = self._state.staged
        if staged is None:
            raise StoreUnavailable("no table for rewrapped rows was made")
        return staged

    def _set_all(self, rows: list[Written]) -> None:
        self._writable().deks.update(_parsed(rows))

    def _set_staged(self, rows: list[Written]) -> None:
        self._writable()
        self._next().update(_parsed(rows))

    def _staged(self, key_id: str) -> Row | None:
        return self._next().get(key_id)

    def _pairs(self, after: str, limit: int) -> list[tuple[str, Row, Row | None]]:
        staged = self._next()
        return [
            (key_id, json_loads(text), staged.get(key_id)) for key_id, text in self._texts(after, limit, None)
        ]

    def _swap_tables(self) -> None:
        state = self._writable()
        self._working = State(self._next(), state.kms, state.usage, None, (*state.retired, state.deks))

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
