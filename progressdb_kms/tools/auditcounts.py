"""What `audit report` counts of a log: calls, callers, DEKs, and the events that are listed one by one.

An observer of `verify`, of which only counts are kept. Several processes may count parts of a log (see
`audit.shared`): what is listed goes to the first of them piece by piece, in order, and all counts at the end.
"""

from __future__ import annotations

import re
from collections import Counter
from operator import itemgetter
from typing import Any

from ..rules import BATCHES
from .auditsearch import events_of, lines_with

EVENTS = 200
"""Rotations, shreds and starts that are shown at most, the newest."""

LONG = 1 << 16
"""Bytes of a line whose event is listed, and of records that we write far more than the longest has."""

MAX_KEY_ID = 128
"""Characters of the longest."""

TOLD = frozenset(
    (
        *("start", "stop", "restore", "import", "rewrap", "shred", "unwrap"),
        *("rotate_kek", "rotation_finished", "rotation_failed", "audit_recovered", "audit_reopened"),
    )
)
"""Operations that are listed one by one."""

MANY = frozenset((*BATCHES, "reencrypt"))
"""Operations whose records name more than one DEK."""

# A run that stops at the next quote costs half of one over a class of characters, and in a record of ours it
# ends at the same place. What others wrote may be long: no word of it is.
_LINES = re.compile(
    rb'"ts":"([^"]{13})([^"]{0,24})","op":"([a-z_]{1,40}","outcome":"[a-z]{1,9})","status":[0-9]*'
    rb'(?:,"change":[0-9]*)?(?:,"key_id":"([^"]{0,%d})")?(?:,"thread_id":"[^"\\]*(?:\\.[^"\\]*)*")?'
    rb'(?:,"actor":"peer_uid:([0-9]{0,10}))?' % MAX_KEY_ID
).findall
_CALL = itemgetter(0, 2, 4)
_OTHERS = re.compile(rb'"ts":"([^"]*)","op":"[^\n]*,"(?:keys":\[([^\]\n]*)\]|new_key_id":("[^"\n]*"))').search
_USED = frozenset(
    b'%b","outcome":"ok' % op for op in (b"encrypt", b"decrypt", b"reencrypt", b"get_wrapped", b"unwrap")
)
_COUNT = re.compile(rb',"count":([0-9]{1,9})[,}]').search
_FAILED = re.compile(rb',"failed":([1-9][0-9]{0,8})[,}]').search
_TOLD_OPS = re.compile(rb'"op":"(?:%b)","outcome"' % "|".join(sorted(TOLD)).encode()).finditer


class Counts:
    """What the page tells of the log."""

    def __init__(self, since: str = "", until: str = "") -> None:
        self.since, self.until = since, until or "~"
        self.calls: Counter[tuple[bytes, bytes, bytes]] = Counter()  # hour, op, outcome
        self.uids: Counter[tuple[bytes, bytes]] = (
            Counter()
        )  # uid, outcome, or "items": that failed in batches
        self.keys: Counter[bytes] = Counter()
        self.told: list[dict[str, Any]] = []
        self.lines = 0

    def __call__(self, block: bytes, verified: bool) -> None:
        rows = self._meant(_LINES(block))
        self.lines += len(rows)
        kinds = Counter(map(_CALL, rows))  # a block has few
        ops, outcomes = set(), set()
        for (hour, what, uid), count in kinds.items():
            op, _, outcome = what.partition(b'","outcome":"')
            self.calls[hour, op, outcome] += count
            self.uids[uid, outcome] += count
            ops.add(op.decode())
            outcomes.add(outcome)
        self.keys.update([row[3] for row in rows if row[2] in _USED])
        self.keys.pop(b"", None)
        if b"refused" in outcomes:
            self._refusals(block)
        for op in ops.intersection(MANY):
            self._named(b'"op":"%b","outcome":"ok"' % op.encode(), block)
        if not ops.isdisjoint(TOLD):
            self._tell(block)

    def _meant(self, rows: list[tuple[bytes, ...]]) -> list[tuple[bytes, ...]]:
        low, high = self.since.encode(), self.until.encode()
        if not low and high == b"~":
            return rows
        return [row for row in rows if low <= row[0] + row[1] < high]

    def _refusals(self, block: bytes) -> None:
        """Many may be one record, which says how many."""
        for line in lines_with(b'","outcome":"refused","status":', block):
            if many := _COUNT(line):
                for hour, _, what, _, uid in self._meant(_LINES(line))[:1]:
                    self.calls[hour, what.partition(b'"')[0], b"refused"] += int(many[1]) - 1
                    self.uids[uid, b"refused"] += int(many[1]) - 1

    def _named(self, needle: bytes, block: bytes) -> None:
        """The other DEKs that a record names, beside its own or in its place, and items of a batch that
        failed."""
        low, high = self.since.encode(), self.until.encode()
        for line in lines_with(needle, block):
            match = _OTHERS(line)
            if match is not None and low <= match[1] < high:
                names = (name.strip(b'"') for name in (match[2] or match[3] or b"").split(b","))
                self.keys.update(name for name in names if 0 < len(name) <= MAX_KEY_ID)
            if failed := _FAILED(line):
                for *_, uid in self._meant(_LINES(line))[:1]:
                    self.uids[uid, b"items"] += int(failed[1])

    def _tell(self, block: bytes) -> None:
        for match in _TOLD_OPS(block):
            begin, end = block.rfind(b"\n", 0, match.start()) + 1, block.find(b"\n", match.end())
            line = block[begin : end if end >= 0 else len(block)]
            for _, event in events_of(line) if len(line) <= LONG else ():
                if event["op"] in TOLD and self.since <= event["ts"] < self.until:
                    self.told.append(event)
        del self.told[:-EVENTS]

    # -- as part of several

    def apart(self) -> None:
        """Nothing was counted yet."""

    def piece(self) -> list[dict[str, Any]]:
        told, self.told = self.told, []
        return told

    def told_of(self, found: list[dict[str, Any]]) -> None:
        self.told = (self.told + found)[-EVENTS:]

    def rest(self) -> dict[str, Any]:
        """As JSON takes it: each byte of a name is a character."""
        tables = (("calls", self.calls), ("uids", self.uids), ("keys", self.keys))
        return {
            **{name: [[_chars(key), count] for key, count in table.items()] for name, table in tables},
            "lines": self.lines,
        }

    def add(self, rest: dict[str, Any]) -> None:
        self.calls.update({tuple(map(_bytes, call)): count for call, count in rest["calls"]})  # type: ignore[misc]
        self.uids.update({tuple(map(_bytes, uid)): count for uid, count in rest["uids"]})  # type: ignore[misc]
        self.keys.update({_bytes(key): count for key, count in rest["keys"]})
        self.lines += rest["lines"]


def _chars(name: bytes | tuple[bytes, ...]) -> str | list[str]:
    return name.decode("latin-1") if isinstance(name, bytes) else [part.decode("latin-1") for part in name]


def _bytes(name: str) -> bytes:
    return name.encode("latin-1")
