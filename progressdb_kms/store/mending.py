"""A store in the hands of a command: no daemon replaces a row that isn't genuine, nor lets what is counted
follow the rows. By that, who can write the file could have it forget what was taken away. Where a person says
so it is done, on the record.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import StoreDamaged
from .contract import DekRecord, counted
from .seal import MODULUS, KekCount, weight
from .sealed import ROWS, Store, as_it_stands
from .sqlite import SqliteStore


class Mending(Store):
    mending = False
    """Rows that can't be trusted are being replaced, and counted anew after."""

    def recount(self) -> bool:
        """Count and add up all rows anew, each of which must be genuine. True: the state had it otherwise.
        Since when a KEK is needed is no count: a rotation says that, and its oldest DEK may be gone."""
        keks: Mapping[str, KekCount] = {}
        total, after, known = 0, "", dict(self._book.keks)
        while page := self._texts(after, ROWS, None):
            keks = counted(keks, [(None, self._record(key_id, text)) for key_id, text in page])
            total = (total + sum(weight(as_it_stands(text)) for _, text in page)) % MODULUS
            after = page[-1][0]
        keks = {kek_id: known.get(kek_id, row)._replace(deks=row.deks) for kek_id, row in keks.items()}
        if other := (keks, total) != (known, self._book.total):
            self._book = self._book._replace(change=self._book.change + 1, keks=keks, total=total)
        return other

    def _replaced(self, key_id: str) -> tuple[DekRecord | None, int]:
        try:
            return super()._replaced(key_id)
        except StoreDamaged:
            if not self.mending:
                raise
            return None, 0


class SqliteMending(Mending, SqliteStore):
    """Made as a SqliteStore is."""
