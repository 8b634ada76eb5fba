"""What every store does: what is alike in all of them, MACs and sums above all, and the steps that differ."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple

from ..encoding import json_loads
from ..errors import KeyNotFound, StoreDamaged, StoreUnavailable
from .contract import KEK_ROW, DekRecord, Usage, counted
from .policy import SHREDDED
from .seal import END, MODULUS, OWN, STATE, ActiveKek, KekCount, Seal, StoreState, Tally, weight, without_mac

ROWS = 1000
"""Rows of one look at both sides of a rotation."""

LOOKS = 100
"""A writer moves its rows a few times a second, and a look at all of them takes a millisecond."""

OWN_DONT_ADD_UP = "the rows of the service's own don't add up: one was deleted, or an older one was put back"
OWN_HINT = "the audit log may have been cut: see `progressdb-kms help troubleshooting`"

Row = dict[str, Any]


def as_it_stands(text: object) -> Any:
    """An empty text for what is no JSON, as a byte that the disk lost makes it: its reader names the row."""
    with suppress(ValueError):
        return json_loads(text) if isinstance(text, str) else ""
    return ""


class Written(NamedTuple):
    """A row as it goes to the disk."""

    key_id: str
    text: str
    weight: int
    record: DekRecord


class Reader(ABC):
    """What the workers see of a store. Rows are checked where the key is at hand."""

    _seal: Seal | None = None

    @abstractmethod
    def _text(self, key_id: str) -> Any:
        """The row as it stands: JSON, if it is ours; None where there is none."""

    @abstractmethod
    def _texts(self, after: str, limit: int, thread_id: str | None) -> list[tuple[str, Any]]: ...

    @abstractmethod
    def there(self, key_ids: Sequence[str]) -> set[str]:
        """Those of the key_ids that have a row, of whatever kind."""

    @abstractmethod
    def _read(self, name: str) -> Any:
        """A row of the service's own, as by `as_it_stands`; None where there is none."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]: ...

    @abstractmethod
    def span(self, prefix: str) -> tuple[int, str]:
        """How many names there are, and the first of them."""

    @abstractmethod
    def usage(self, key_ids: Sequence[str]) -> dict[str, Usage]:
        """Of these DEKs those that were used."""

    @abstractmethod
    def heavy(self) -> dict[str, int]:
        """Encrypts under the DEKs that have HEAVY of them or more."""

    @abstractmethod
    def close(self) -> None: ...

    def read(self, name: str) -> Row | None:
        """A row of the service's own. Those that carry a MAC are held against it all at once: see `vouch`."""
        row = self._read(name)
        if row is not None and not isinstance(row, dict):
            raise StoreDamaged(f"the row {name} of the store can't be read", hint="restore a backup")
        return without_mac(row) if row and name.startswith(OWN) else row

    def get(self, key_id: str) -> DekRecord | None:
        text = self._text(key_id)
        return None if text is None else self._record(key_id, text)

    def existing(self, key_id: str) -> DekRecord:
        """Raises KeyNotFound."""
        if (record := self.get(key_id)) is None:
            raise KeyNotFound(f"there is no key {key_id}")
        return record

    def page(self, after: str, limit: int, thread_id: str | None = None) -> list[DekRecord]:
        """Up to `limit` records with a key_id behind `after`, in order of key_id."""
        return [self._record(key_id, text) for key_id, text in self._texts(after, limit, thread_id)]

    def judged(
        self, after: str, limit: int, thread_id: str | None = None
    ) -> list[tuple[str, DekRecord | None]]:
        """As `page`, with None for a row that is not as the daemon wrote it."""
        return [(key_id, self._judge(key_id, text)) for key_id, text in self._texts(after, limit, thread_id)]

    def _judge(self, key_id: str, text: Any) -> DekRecord | None:
        try:
            return self._record(key_id, text)
        except StoreDamaged:
            return None

    def state(self) -> StoreState:
        row = self._read(STATE)
        self.check(STATE, row)
        return StoreState.from_row(row)

    def vouch(self) -> None:
        """Raises StoreDamaged where a row of the service's own was edited, deleted or replaced by an older
        one. Beside a writer the state is read before and after."""
        for _ in range(LOOKS):
            own = Reader.state(self).own
            rows = [(name, self._read(name)) for prefix in OWN for name in self.names(prefix)]
            if Reader.state(self).own == own:
                break
        else:
            raise StoreUnavailable("the rows of the service's own don't stand still", hint="try again")
        for name, row in rows:
            self.check(name, row)
        if sum(weight(row) for _, row in rows) % MODULUS != own:
            raise StoreDamaged(OWN_DONT_ADD_UP, hint=OWN_HINT)

    def keks(self) -> Mapping[str, KekCount]:
        return self.state().keks

    def unlock(self, key: memoryview) -> None:
        """From now on rows are checked."""
        self._seal = Seal(key)

    def check(self, name: str, row: Any) -> None:
        """Raises StoreDamaged for a row that is not as the daemon wrote it."""
        if self._seal is not None and row is not None:
            self._seal.check(self._signed(name), row)

    def _signed(self, name: str) -> str:
        """A row's name as its MAC has it."""
        return name

    def _record(self, key_id: str, text: Any) -> DekRecord:
        """With one parse and one MAC where it is spelled as we write it: a worker asks for each DEK that it
        doesn't remember."""
        name = "meta:" + key_id
        if self._seal is not None and isinstance(text, str) and self._seal.wrote(name, text):
            return DekRecord.from_row(key_id, json.loads(text))
        row = as_it_stands(text)
        self.check(name, row)
        return DekRecord.from_row(key_id, row)


def nobody(change: int) -> None:
    """Hears of changes where nobody else does."""


class Store(Reader):
    """What the keeper sees: the reader's side, and writes inside transactions, which put this object back
    where they fail. `unlock` comes before the first `put`: it brings the row key, and who hears the number
    of each change once it is on disk."""

    _book = StoreState()
    _tally: Tally | None = None
    _publish: Callable[[int], None] = staticmethod(nobody)
    mirror: Callable[[Sequence[DekRecord]], None] | None = None
    """What is done with rows that are put, in the same transaction: while a rotation is under way, to stage
    them anew."""

    @abstractmethod
    def _staged(self, key_id: str) -> Row | None: ...

    @abstractmethod
    def _set_all(self, rows: list[Written]) -> None: ...

    @abstractmethod
    def _set_staged(self, rows: list[Written]) -> None: ...

    @abstractmethod
    def _pairs(self, after: str, limit: int) -> list[tuple[str, Row, Row | None]]:
        """Live rows and their staged ones; of each no more than its MAC."""

    @abstractmethod
    def _swap_tables(self) -> None: ...

    @abstractmethod
    def count(self, rows: Iterable[tuple[str, Usage]]) -> None:
        """Add to what is kept of DEKs and KEKs. A DEK that is not stored, or shredded, is left out."""

    @abstractmethod
    def _forget_usage(self, key_id: str) -> None: ...

    @abstractmethod
    def _write(self, name: str, row: Row) -> None: ...

    @abstractmethod
    def _erase(self, name: str) -> None: ...

    @abstractmethod
    def transaction(self, durable: bool = True) -> AbstractContextManager[None]: ...

    @abstractmethod
    def savepoint(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def due(self, now: str, limit: int) -> list[str]:
        """Rows `deletion:<time>|<key_id>` of a time that has come: a hint where to look, no more."""

    @abstractmethod
    def staging(self, on: bool) -> None:
        """Make the empty table that rewrapped rows are built in; drop what an earlier try left of one."""

    @abstractmethod
    def retire(self, limit: int) -> bool:
        """Delete up to `limit` rows that a swap left behind. True: there are more."""

    @abstractmethod
    def forget(self, key_id: str) -> None:
        """Delete a key's row from the tables that are being emptied: it was shredded."""

    @abstractmethod
    def trouble(self) -> str:
        """Why nothing can be written now, as far as it is known; empty where nothing is."""

    def lost(self) -> str:
        """Why what is open must not be written to: it isn't what the next start would find."""
        return ""

    def files(self) -> dict[str, tuple[int, int]]:
        """Device and inode of what is open, where it is watched."""
        return {}

    @abstractmethod
    def rescue(self, now: float) -> Path:
        """Write what is open to a new file beside our own. Raises StoreUnavailable."""

    def compact(self) -> None:
        """Write the whole database anew: free space and gaps between rows are left behind."""

    def checkpoint(self, patient: bool = True) -> None:
        """Move the write-ahead log into the file and cut it to nothing: no old page image stays behind."""

    # ---- the state ---------------------------------------------------------------------------

    def unlock(self, key: memoryview, publish: Callable[[int], None] = nobody) -> None:
        """From now on rows are checked, and may be written. Raises StoreDamaged."""
        self._seal, self._publish = Seal(key), publish
        self._look()
        if not self._book.change and self._texts("", 1, None):
            raise StoreDamaged(
                f"the row {STATE} of the store is missing",
                hint="restore a backup: `progressdb-kms restore FILE`",
            )

    def _look(self) -> None:
        """Take the state from the disk."""
        self._book, self._tally = Reader.state(self), None
        self._publish(self._book.change)

    def state(self) -> StoreState:
        return self._book

    @property
    def _key(self) -> Seal:
        if self._seal is None:
            raise StoreUnavailable("the row key is not loaded: nothing can be written")
        return self._seal

    def _settle(self, before: StoreState) -> None:
        """At the end of a transaction."""
        if self._book.wraps:
            self.count((KEK_ROW + kek_id, Usage(wraps)) for kek_id, wraps in self._book.wraps.items())
            self._book = self._book._replace(wraps={})
        if self._book != before:
            self._write(STATE, self._key.sealed(self._signed(STATE), self._own().to_row()))

    def _own(self) -> StoreState:
        """What the state row of this writer says."""
        return self._book

    def _committed(self, before: StoreState) -> None:
        if self._book != before:
            self._publish(self._book.change)

    # ---- rows of the service's own -------------------------------------------------------------

    def write(self, name: str, value: Row) -> None:
        if name.startswith(OWN):
            value = self._key.sealed(self._signed(name), value)
            self._owns(name, weight(value))
        self._write(name, value)

    def erase(self, name: str) -> None:
        if name.startswith(OWN):
            self._owns(name, 0)
        self._erase(name)

    def _owns(self, name: str, come: int) -> None:
        """What was edited meanwhile is not reckoned out: the sum tells of it at the next start."""
        old = self._read(name)
        try:
            self.check(name, old)
            gone = weight(old) if old is not None else 0
        except StoreDamaged:
            gone = 0
        self._book = self._book._replace(own=(self._book.own - gone + come) % MODULUS)

    # ---- what changes the state alone ----------------------------------------------------------

    def activate(self, kek_id: str, version: int, since: str) -> None:
        """Another active KEK."""
        active = ActiveKek(kek_id, version, since)
        self._book = self._book._replace(change=self._book.change + 1, active=active)

    def advance(self, floor: int) -> None:
        """The number of changes goes on above this one, where it is not there yet."""
        self._book = self._book._replace(change=max(self._book.change, floor) + 1)

    # ---- rows --------------------------------------------------------------------------------

    def put(self, record: DekRecord) -> None:
        self.put_all((record,))

    def put_all(self, records: Sequence[DekRecord]) -> None:
        """Many at once, of a key no more than one."""
        there = self.there([one.key_id for one in records])
        old = [self._replaced(one.key_id) if one.key_id in there else (None, 0) for one in records]
        rows = [self._written(one) for one in records]
        self._set_all(rows)
        changes = [(was, new) for new, (was, _) in zip(records, old)]
        more = sum(row.weight - gone for row, (_, gone) in zip(rows, old))
        book = self._book.counted(len(rows), more, counted(self._book.keks, changes))
        made = [new.kek_id for was, new in changes if new.wrapped and new.wrapped != (was and was.wrapped)]
        self._book = book.wrapped(made)
        for row, (_, gone) in zip(rows, old):
            if row.record.state == SHREDDED:
                self._forget_usage(row.key_id)
            if self._tally is not None:
                self._tally = self._tally.moved(row.key_id, live=row.weight - gone)
        if self.mirror is not None:
            self.mirror(records)

    def _written(self, record: DekRecord) -> Written:
        return Written(record.key_id, *self._key.written("meta:" + record.key_id, record.to_row()), record)

    def _replaced(self, key_id: str) -> tuple[DekRecord | None, int]:
        text = self._text(key_id)
        return (None, 0) if text is None else (self._record(key_id, text), weight(as_it_stands(text)))

    # ---- a second table for rotation -----------------------------------------------------------

    def stage(self, records: Iterable[DekRecord]) -> None:
        rows = [self._written(one) for one in records]
        self._book = self._book.wrapped(row.record.kek_id for row in rows if row.record.wrapped)
        if self._tally is not None:
            for row in rows:
                gone = weight(old) if (old := self._staged(row.key_id)) else 0
                self._tally = self._tally.moved(row.key_id, staged=row.weight - gone)
        self._set_staged(rows)

    def check_staged(self, after: str, limit: int) -> str:
        """See that each of up to `limit` rows behind the key_id `after` is staged. Returns the last key_id,
        or "" at the end. Raises StoreUnavailable where one is missing, StoreDamaged where the live rows are
        not those that the state tells of."""
        pairs = self._pairs(after, limit)
        tally = Tally() if not after else self._tally
        if tally is None:
            raise StoreUnavailable("the store was opened anew meanwhile", hint="begin the rotation again")
        if missing := sum(staged is None for _, _, staged in pairs):
            raise StoreUnavailable(f"{missing} rewrapped rows are missing: nothing was changed")
        live = sum(weight(row) for _, row, _ in pairs)
        staged = sum(weight(row) for _, _, row in pairs if row)
        last = pairs[-1][0] if pairs else ""
        self._tally = Tally(last or END, (tally.live + live) % MODULUS, (tally.staged + staged) % MODULUS)
        if not last:
            self._check_sum(self._tally.live)
        return last

    def _check_sum(self, live: int) -> None:
        if live != self._book.total:
            raise StoreDamaged(
                "the rows of the store don't add up: one was deleted, or an older one was put back",
                hint="run `progressdb-kms verify`, then restore a backup: `progressdb-kms restore FILE`",
            )

    def swap(self, keks: Mapping[str, KekCount]) -> None:
        """Let the staged table be the store. The old one is emptied bit by bit by `retire`."""
        after = "" if self._tally is None else self._tally.after
        while after != END:
            after = self.check_staged(after, ROWS) or END
        assert self._tally is not None
        self._check_sum(self._tally.live)
        self._swap_tables()
        self._book = self._book._replace(change=self._book.change + 1, keks=keks, total=self._tally.staged)
        self._tally = None
