"""A row of the store, and what is counted of all rows; what every store does is in `sealed`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from ..encoding import b64decode, b64encode
from ..errors import StoreDamaged
from .policy import ENABLED, SHREDDED
from .seal import KekCount

FORMAT = 1  # of one row

HEAVY = 2**31
"""Encrypts under one DEK, or wraps under one KEK, from which on the store finds it without a search, and the
operator is warned."""

KEK_ROW = ":kek:"
"""Before a kek_id: the name of a KEK's row of usage, which no key_id can be; its wraps stand for encrypts."""


class Usage(NamedTuple):
    """What was done under a DEK. Times are whole seconds since 1970, 0 for never; `uid` made the last use."""

    encrypts: int = 0
    decrypts: int = 0
    first: int = 0
    last: int = 0
    uid: int = -1


class DekRecord(NamedTuple):
    """One DEK, as stored. `wrapped` is the blob of `envelope`; empty once shredded."""

    key_id: str
    thread_id: str
    wrapped: bytes
    kek_id: str
    kek_version: int
    created_at: str
    state: str = ENABLED
    delete_at: str = ""
    shredded_at: str = ""

    def to_row(self) -> dict[str, Any]:
        row = dict(zip(_MEMBERS, self[1:]), wrapped=b64encode(self.wrapped), format=FORMAT)
        for name in _UNSET:
            if not row[name]:
                del row[name]
        return row

    @classmethod
    def from_row(cls, key_id: str, row: dict[str, Any]) -> DekRecord:
        """Raises StoreDamaged where a row is not one of ours."""
        try:
            if row["format"] != FORMAT:
                raise ValueError("format")
            thread_id, wrapped, *others = _members({**_UNSET, **row})
            return cls(key_id, thread_id, b64decode(wrapped), *others)
        except (KeyError, TypeError, ValueError):
            raise StoreDamaged(
                f"the row of key {key_id} can't be read",
                hint="run `progressdb-kms verify`, then restore a backup",
            ) from None


_MEMBERS = DekRecord._fields[1:]
"""Of a row, whose name has the key_id."""

_members = itemgetter(*_MEMBERS)

_UNSET = {"delete_at": "", "shredded_at": ""}
"""Left out of a row where they are so."""


# ---- counts per KEK ------------------------------------------------------------------------------


def counted(
    keks: Mapping[str, KekCount], changes: Iterable[tuple[DekRecord | None, DekRecord]]
) -> dict[str, KekCount]:
    """The counts after each old record (None: nothing) was replaced by the new one beside it. A shredded DEK
    needs no KEK. One host of a fleet may count below zero: it replaced what another had counted."""
    result = dict(keks)
    for old, new in changes:
        if old is not None and old.state != SHREDDED:
            row = result.get(old.kek_id) or KekCount(old.kek_version, 0, old.created_at)
            result[old.kek_id] = KekCount(row.version, row.deks - 1, row.since)
        if new.state != SHREDDED:
            row = result.get(new.kek_id) or KekCount(new.kek_version, 0, new.created_at)
            result[new.kek_id] = KekCount(row.version, row.deks + 1, min(row.since, new.created_at))
    return {kek_id: row for kek_id, row in result.items() if row.deks}
