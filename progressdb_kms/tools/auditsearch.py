"""`audit search`: records by key, thread, UID, operation, outcome and time, over any number of files.

A regular expression finds candidates in C; each is then parsed and held against the query exactly, because a
thread_id may hold any text. The chains are verified in the same pass where the audit key is at hand, and each
record that is shown is checked for itself: a fault is named, and what stands around it is still found.
"""

from __future__ import annotations

import csv
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, NamedTuple

from ..audit.chain import Report
from ..audit.log import RECORD, genuine, parse
from ..encoding import json_dumps, timestamp
from .console import UsageError, safe

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

COLUMNS = ("ts", "chain", "seq", "op", "outcome", "status", "key_id", "thread_id", "uid", "pid", "request_id")
"""Of a table and of CSV; what a record has beyond them stands in the last column."""

HIDDEN = ("prev", "sig", "actor", "gid")

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet may take for a formula at the beginning of a cell."""


class Query(NamedTuple):
    """None: whatever it is. `since` and `until` are times as the log writes them; `until` is exclusive."""

    key: str | None = None
    thread: str | None = None
    uid: int | None = None
    op: str | None = None
    outcome: str | None = None
    since: str = ""
    until: str = ""
    embedded: bool = False
    """that opened a message of ProgressDB's embedded mode"""

    def holds(self, event: Mapping[str, Any]) -> bool:
        return (
            self.since <= event.get("ts", "") < (self.until or "~")
            and self.op in (None, event.get("op"))
            and self.outcome in (None, event.get("outcome"))
            and (self.uid is None or event.get("uid") == self.uid)
            and (not self.embedded or "embedded" in event)
            and self.thread in (None, event.get("thread_id"))
            and (self.key is None or self.key in keys_of(event))
        )

    def needles(self) -> list[bytes]:
        """What stands somewhere in each line that is meant."""
        found = []
        if self.key is not None:
            found.append(json_dumps(self.key).encode())
        if self.thread is not None:
            found.append(b'"thread_id":' + json_dumps(self.thread).encode())
        if self.uid is not None:
            found.append(b'"uid":%d' % self.uid)
        if self.embedded:
            found.append(b'"embedded":')
        return found

    def candidates(self) -> re.Pattern[bytes]:
        """Matches a line that may be one of those, in its first fields and anywhere behind them."""
        op = re.escape(self.op).encode() if self.op else b"[a-z_]+"
        outcome = re.escape(self.outcome).encode() if self.outcome else b"[a-z]+"
        ahead = b"".join(rb"(?=[^\n]*%b)" % re.escape(needle) for needle in self.needles())
        head = rb'^\{"event":\{"chain":"[0-9.]+","seq":[0-9]+,"prev":"[^"\n]*","ts":"([^"\n]*)"'
        return re.compile(head + rb',"op":"%b","outcome":"%b"%b[^\n]*' % (op, outcome, ahead), re.M)


def keys_of(event: Mapping[str, Any]) -> set[str]:
    """Every key_id that a record names: its own, the target of a reencrypt, the keys of a batch."""
    many = event.get("keys")
    return {str(event[name]) for name in ("key_id", "new_key_id") if name in event} | set(many or ())


def seconds_of(text: str) -> int | None:
    """`90d` in seconds; None where it is no such time."""
    span = re.fullmatch(r"([0-9]{1,6})([smhdw])", text)
    return int(span[1]) * UNITS[span[2]] if span else None


def moment(text: str, now: float) -> str:
    """A time of the command line as the log writes it: `2h` ago, a date, or RFC 3339 (UTC where it says no
    other). Raises UsageError."""
    ago = seconds_of(text)
    if ago is not None:
        return timestamp(now - ago)
    try:
        found = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))
    except ValueError:
        raise UsageError(
            f"{text[:40]!r} is no time: give 2h, 7d, 2026-11-24 or 2026-11-24T10:00:00Z"
        ) from None
    if found.tzinfo is None:
        found = found.replace(tzinfo=timezone.utc)
    since = (found - datetime(1970, 1, 1, tzinfo=timezone.utc)) / timedelta(seconds=1)
    return timestamp(max(0.0, since))


class Hits:
    """Takes blocks of a log and hands on what the query finds, in the order of the files."""

    def __init__(self, query: Query, key: memoryview | None, show: Callable[[dict[str, Any]], None]) -> None:
        """`key`: the audit key, where it is at hand. `show` gets the event, with `verified`: True, False, or
        None where nobody can tell."""
        self.found = self.unsigned = 0
        self._query = query
        self._search = query.candidates().finditer
        self._needles = query.needles()
        self._key = key
        self._show = show

    def __call__(self, path: str, block: bytes) -> None:
        if not all(needle in block for needle in self._needles):
            return  # most blocks, where a key is seldom used
        low, high = self._query.since.encode(), (self._query.until or "~").encode()
        for match in self._search(block):
            if low <= match[1] < high:
                self._look(match[0])

    def _look(self, line: bytes) -> None:
        try:
            event = parse(line)
        except ValueError:  # torn, or edited: the verifier names it
            return
        if not self._query.holds(event):
            return
        record = RECORD.fullmatch(line)
        event["verified"] = None if self._key is None else record is not None and genuine(self._key, record)
        self.found += 1
        self.unsigned += event["verified"] is False
        self._show(event)


# ---- how they are shown ----------------------------------------------------------------------------------


def as_json(event: dict[str, Any]) -> None:
    sys.stdout.write(json_dumps(event) + "\n")


def as_csv() -> Callable[[dict[str, Any]], None]:
    """A writer of rows below a header line. A cell that a spreadsheet would calculate gets a quote first."""
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow((*COLUMNS, "verified", "more"))

    def write(event: dict[str, Any]) -> None:
        rows.writerow(
            [_tame(cell) for cell in (*cells(event), _told(event["verified"]), json.dumps(more(event)))]
        )

    return write


def _tame(cell: str) -> str:
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def as_table() -> Callable[[dict[str, Any]], None]:
    """A line a record, written as it is found: columns have fixed widths that are seldom passed."""
    sys.stdout.write("TIME                  OP               OUTCOME     UID  KEY / THREAD\n")

    def write(event: dict[str, Any]) -> None:
        outcome = f"{event.get('outcome', '?')} {event.get('status', '')}"
        uid = event.get("uid", "-")
        about = [str(event[name]) for name in ("key_id", "thread_id") if name in event]
        about += [f"{name}={value}" for name, value in more(event).items()]
        mark = "  NOT SIGNED" if event["verified"] is False else ""
        time_of = str(event.get("ts", ""))[:19].replace("T", " ")
        line = f"{time_of:20}  {event.get('op', ''):15}  {outcome:9} {uid!s:>5}  {'  '.join(about)}{mark}"
        sys.stdout.write(safe(line.rstrip()) + "\n")

    return write


def cells(event: Mapping[str, Any]) -> Iterator[str]:
    return (str(event.get(name, "")) for name in COLUMNS)


def more(event: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in (*COLUMNS, *HIDDEN, "verified")}


def _told(verified: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[verified]


def summary(report: Report, hits: Hits, key: bool, started: float) -> str:
    """The line on stderr: what was looked through, and whether it can be believed."""
    if not key:
        trust = "not verified: the audit key needs the configured master key (--config)"
    elif report.fault is not None:
        trust = f"FAULT at {report.fault}: chains are verified up to there"
    else:
        trust = f"{len(report.chains)} chains verified"
    unsigned = f", {hits.unsigned} of them NOT SIGNED" if hits.unsigned else ""
    seconds = time.monotonic() - started
    return f"{hits.found} records found{unsigned} in {len(report.files)} files ({seconds:.1f} s); {trust}"
