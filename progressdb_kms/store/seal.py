"""Rows are authentic: who writes the file can destroy rows, and can't make or change one unnoticed.

- A row of a DEK carries a MAC under the row key over its name and all of its members. It is checked wherever
  the row is read by somebody who has the key; `backup` and `export` have none and copy.
- The state row carries one too. It holds what must be true of all rows together: the number of the last
  change, the counts by KEK, the active KEK, and the sum of the rows' MACs modulo 2**256. So a row that was
  deleted, or replaced by an older one that is genuine, is found by whoever adds up: `verify`, and a rotation.
- So do the few rows of the service's own that decide something (OWN): how far each audit chain was, the list
  of retired KEKs, the trusted time. They have a sum of their own, which each start adds up.
- The number grows with each change of a row, and each audit record carries the last one that is on disk. So
  an older store that is put back beside its log is found at the start.

What stands beside these rows (the list of deletions that are due, notes of erasures) has no MAC and decides
nothing about a DEK.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..crypto.aead import mac, same
from ..encoding import b64decode, b64encode, json_dumps
from ..errors import StoreDamaged

MODULUS = 1 << 256
LABEL = b"progressdb-kms row v1\0"
_TAIL = ',"mac":"'
_MAC = 46
"""Characters of a MAC in base64, and of what ends the row after it."""

STATE = "store:state"
"""The name of the state row."""

OWN = ("audit:", "clock:", "kek:", "row:")
"""Rows of the service's own that carry a MAC, by how their names begin."""


class Seal:
    """Signs and checks rows. `key`: the row key, 32 bytes of locked memory that must outlive this."""

    def __init__(self, key: memoryview) -> None:
        self._key = key

    def _mac(self, name: str, text: str) -> bytes:
        """Of a row's JSON, without its own MAC. A name holds no NUL, and JSON has one spelling of a parsed
        value."""
        return mac(self._key, b"%b%b\0%b" % (LABEL, name.encode(), text.encode()))

    def sealed(self, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
        return {**row, "mac": b64encode(self._mac(name, json_dumps(row)))}

    def written(self, name: str, row: Mapping[str, Any]) -> tuple[str, int]:
        """The JSON of `sealed`, and its weight: for many rows, each of which is spelled out once."""
        text = json_dumps(row)
        found = self._mac(name, text)
        return f'{text[:-1]},"mac":"{b64encode(found)}"}}', int.from_bytes(found, "big")

    def wrote(self, name: str, text: str) -> bool:
        """Whether this JSON is what `written` made, letter by letter. False proves nothing: `check` judges.
        True also says that no name stands twice in it."""
        end = len(text) - len(_TAIL) - _MAC
        if text[end : end + len(_TAIL)] != _TAIL:
            return False
        found = b64encode(self._mac(name, text[:end] + "}")) + '"}'
        return same(text[end + len(_TAIL) :].encode(), found.encode())

    def check(self, name: str, row: Any) -> None:
        """Raises StoreDamaged where the row was not written by us, or under another name."""
        try:
            found = b64decode(row["mac"])
            genuine = same(found, self._mac(name, json_dumps(without_mac(row))))
        except (KeyError, TypeError, ValueError, AttributeError):
            genuine = False
        if not genuine:
            raise StoreDamaged(
                f"the row {name} of the store is not as the daemon wrote it",
                hint="run `progressdb-kms verify`, then restore a backup: `progressdb-kms restore FILE`",
            )


def weight(row: Mapping[str, Any]) -> int:
    """What a row that was checked adds to the sum."""
    return int.from_bytes(b64decode(row["mac"]), "big")


def without_mac(row: Mapping[str, Any]) -> dict[str, Any]:
    return {member: row[member] for member in row if member != "mac"}


class KekCount(NamedTuple):
    """How much of the store needs one KEK: its version, DEKs wrapped under it, time of the first."""

    version: int
    deks: int
    since: str


class ActiveKek(NamedTuple):
    kek_id: str
    version: int
    since: str


class StoreState(NamedTuple):
    """The state row. `change` 0: a store that was never used."""

    change: int = 0
    active: ActiveKek | None = None
    keks: Mapping[str, KekCount] = {}  # noqa: RUF012  # never edited: each change makes a new one
    total: int = 0
    own: int = 0
    """The sum of the MACs of the rows OWN."""
    wraps: Mapping[str, int] = {}  # noqa: RUF012  # by kek_id, in this transaction so far: in no row

    def to_row(self) -> dict[str, Any]:
        return {
            "change": self.change,
            "active": list(self.active) if self.active else None,
            "keks": {kek_id: list(row) for kek_id, row in self.keks.items()},
            "sum": f"{self.total:064x}",
            "own": f"{self.own:064x}",
        }

    @classmethod
    def from_row(cls, row: Any) -> StoreState:
        """Raises StoreDamaged where a row is not one of ours; None is that of a fresh store."""
        if row is None:
            return cls()
        try:
            active = ActiveKek(str(it[0]), int(it[1]), str(it[2])) if (it := row["active"]) else None
            keks = {kek: KekCount(int(v), int(deks), str(at)) for kek, (v, deks, at) in row["keks"].items()}
            return cls(int(row["change"]), active, keks, int(row["sum"], 16), int(row["own"], 16))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError):
            raise StoreDamaged(
                f"the row {STATE} can't be read", hint="restore a backup: `progressdb-kms restore FILE`"
            ) from None

    def wrapped(self, kek_ids: Iterable[str]) -> StoreState:
        """After a wrap under each of these."""
        return self._replace(wraps=Counter(self.wraps) + Counter(kek_ids))

    def counted(self, rows: int, more: int, keks: Mapping[str, KekCount]) -> StoreState:
        """After so many rows were replaced: the weights of the new ones less those of the old."""
        return self._replace(change=self.change + rows, keks=keks, total=(self.total + more) % MODULUS)


class Tally(NamedTuple):
    """A comparison of the live with the staged rows, as far as `after`: what each side adds up to.

    Rows that change behind that place must be reckoned in; those before it are still to come.
    """

    after: str = ""
    live: int = 0
    staged: int = 0

    def moved(self, name: str, live: int = 0, staged: int = 0) -> Tally:
        if name > self.after:
            return self
        return self._replace(live=(self.live + live) % MODULUS, staged=(self.staged + staged) % MODULUS)


END = "\uffff"
"""A place behind all rows."""
