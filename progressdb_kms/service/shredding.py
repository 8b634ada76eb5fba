"""Shreds, from the row's mark to the last copy; and the janitor, who marks what is due.

A shred is a tombstone in the DEK's row and an entry `erasure:<key_id>` beside it, in one transaction. From
then on nothing opens the DEK. Every copy of its wrapped bytes is removed after that, at once where somebody
waits for it, and again with growing pauses where a copy can't be removed; the entry goes last, so that a
crash at any point leaves it due. A scheduled deletion is an entry `deletion:<time>|<key_id>`, in order of
time.

No entry decides anything: a DEK's own row does, and an entry that it does not bear out is removed.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Callable

from ..encoding import timestamp
from ..errors import StoreDamaged, StoreUnavailable
from ..journal import Chore, Overdue
from ..store import erasure
from ..store.contract import DekRecord
from ..store.policy import SHREDDED
from .anchors import Anchors
from .common import Common
from .keks import Keks

log = logging.getLogger(__name__)

MOST = 256
"""Deletions and erasures that are done at a time."""

JANITOR_SECONDS = 30.0
"""How often scheduled deletions are looked at; they are due to the day."""

JANITOR_PAUSES = 1.0, 60.0
ERASE_PAUSES = 5.0, 60.0
"""What failed is tried again after so many seconds, and after twice as many each time; at most. Each try of
an erasure rewrites what can be rewritten, and a foreign reader may stay for hours."""

IDLE_SAVE_SECONDS = 600.0
"""How often the trusted time is kept while nothing else is written."""


class Shredding:
    """The keeper's."""

    def __init__(self, common: Common, keks: Keks, anchors: Anchors) -> None:
        self._store, self._data_dir, self._audit = common.store, common.data_dir, common.audit
        self._clock, self._time = common.time.clock, common.time
        self._keks, self._anchors = keks, anchors
        self.due: dict[str, bytes] = {}  # shredded, and copies may remain: key_id and blob, if known
        self._erasing = Chore("copies of shredded DEKs remain", ERASE_PAUSES)
        self._looking = Chore("scheduled deletions can't be looked at now", JANITOR_PAUSES)
        self._overdue = Overdue()
        self._next = 0.0

    # ---- in a transaction ------------------------------------------------------------------------

    def mark(self, old: DekRecord, now: float) -> DekRecord:
        """The tombstone, and the note that the erasure is due."""
        record = old._replace(wrapped=b"", state=SHREDDED, delete_at="", shredded_at=timestamp(now))
        self._store.put(record)
        self.index(old, record)
        self._store.write(_entry(record), {"since": record.shredded_at, "kek_id": old.kek_id})
        return record

    def index(self, old: DekRecord, new: DekRecord) -> None:
        """Where the time of a scheduled deletion changed."""
        if old.delete_at:
            self._store.erase(_entry(old))
        if new.delete_at:
            self._store.write(_entry(new), {})

    def noted(self, key_id: str) -> bool:
        return self._store.read(f"erasure:{key_id}") is not None

    # ---- after its COMMIT ------------------------------------------------------------------------

    def soon(self, blobs: Mapping[str, bytes]) -> None:
        for key_id, blob in blobs.items():
            self.due.setdefault(key_id, blob)

    def now(self) -> None:
        """Somebody waits for it; but where it failed just now, nobody else shall wait for it again."""
        patient = self._erasing.over()
        if self.due:
            self._erasing.attend(lambda: self._erase(patient))

    def later(self) -> Callable[[], object] | None:
        """What is to be done beside the jobs."""
        if not self.due or not self._erasing.over():
            return None
        return lambda: self._erasing.attend(lambda: self._erase(False))

    def _erase(self, patient: bool) -> None:
        """Finish shreds, all at once: remove every copy, write the audit records, forget that it was due."""
        due = dict(itertools.islice(self.due.items(), MOST))
        erasure.erase(self._store, self._data_dir, due, patient)
        for key_id in due:
            self._audit.note("shred", key_id=key_id)
        with self._store.transaction():
            for key_id in due:
                self._store.erase(f"erasure:{key_id}")
            self._anchors.write()
        for key_id in due:
            del self.due[key_id]

    def remains(self, key_id: str) -> StoreUnavailable | None:
        """What a caller hears of a shred that is not finished."""
        if key_id not in self.due:
            return None
        return StoreUnavailable(
            f"the key {key_id} is shredded, and nothing opens it any more; but a copy of its "
            f"wrapped bytes remains: {self._erasing.why or 'others are removed first'}",
            hint=f"it is tried again by itself, after {ERASE_PAUSES[0]:.0f} s, and with growing pauses at "
            f"least every {ERASE_PAUSES[1]:.0f} s: `status` tells how many are due",
        )

    def tell(self) -> None:
        """The journal, of what is due for long."""
        self._overdue.tell(self.due, self._erasing.why or "others are removed first")

    # ---- the janitor -----------------------------------------------------------------------------

    def look(self) -> None:
        """In each round of the keeper."""
        if self._clock.monotonic() >= self._next and self._looking.over():
            self._looking.attend(self._tidy_up)

    def _tidy_up(self) -> None:
        """Shred what is due, and finish what an earlier shred could not."""
        now = self._clock.now()
        with self._store.transaction():  # reads too: it is opened again where that has to be
            dead = self._to_be_erased()
            due = self._time.due()
            records = [] if due is None else self._borne_out(self._store.due(timestamp(due), MOST))
            for record in records:
                self.mark(record, now)
            if self._time.unsaved >= IDLE_SAVE_SECONDS:
                self._anchors.write()
        self.soon({record.key_id: b"" for record in dead})
        if records:
            self._keks.forget()
            self.soon({record.key_id: record.wrapped for record in records})
        self._next = self._clock.monotonic() + JANITOR_SECONDS

    def _to_be_erased(self) -> list[DekRecord]:
        return self._borne_out(self._store.names("erasure:"))

    def _borne_out(self, entries: Iterable[str]) -> list[DekRecord]:
        """The rows of what is listed beside them: a row's own state and time decide, never the list."""
        found = []
        for name in entries:
            try:
                record = self._store.get(name.removeprefix("erasure:").rpartition("|")[2])
            except StoreDamaged as error:
                log.error("%r", error.line)  # it names what stands there, of which nobody knows anything
                record = None
            if record is not None and name == _entry(record):
                found.append(record)
            else:
                log.error("the entry %r is not borne out by the row of that key: removed", name[:200])
                self._store.erase(name)
        return found


def _entry(record: DekRecord) -> str:
    """What lists it: its erasure is due, or its deletion is scheduled."""
    if record.state == SHREDDED:
        return f"erasure:{record.key_id}"
    return f"deletion:{record.delete_at}|{record.key_id}" if record.delete_at else ""
