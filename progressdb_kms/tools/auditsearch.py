"""`audit search`: records by key, thread, UID, operation, outcome and time, over any number of files.

The chains are verified in the same pass, where the audit key is at hand. Lines that may be meant are found
by a search for the rarest text that each must have. Of a block that was verified, each line in a record's
plain form is one that we wrote: a regular expression decides, and JSON is not parsed. Behind a fault,
without the key, and where a line is not so plain, it is parsed and held against the query, because a
thread_id may hold any text, and what is shown is checked for itself: a fault is named, and what stands
around it is still found.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, NamedTuple

from ..audit.chain import Report
from ..audit.log import MARK, MISSES, RECORD, genuine, parse
from ..audit.loose import LONGEST
from ..encoding import json_dumps, json_loads, timestamp
from .console import UsageError, safe

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

COLUMNS = ("ts", "chain", "seq", "op", "outcome", "status", "key_id", "thread_id", "uid", "pid", "request_id")
"""Of a table and of CSV; what a record has beyond them stands in the last column."""

HIDDEN = ("prev", "sig", "actor", "gid")

PLAIN = 2
"""Braces that open in a line without any within its event."""

_TIMES = re.compile(rb'","ts":"([^"\n]*)"').findall

_PLACED = frozenset((*COLUMNS, *HIDDEN, "verified"))

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
            self.since <= event["ts"] < (self.until or "~")
            and self.op in (None, event["op"])
            and self.outcome in (None, event["outcome"])
            and (self.uid is None or event.get("uid") == self.uid)
            and (not self.embedded or "embedded" in event)
            and self.thread in (None, event.get("thread_id"))
            and (self.key is None or self.key in keys_of(event))
        )

    def needles(self) -> list[bytes]:
        """What stands somewhere in each line that is meant, the rarest first."""
        found = []
        if self.key is not None:
            found.append(json_dumps(self.key).encode())
        if self.thread is not None:
            found.append(b'"thread_id":' + json_dumps(self.thread).encode())
        if self.embedded:
            found.append(b'"embedded":')
        if self.uid is not None:
            found.append(b'"uid":%d' % self.uid)
        if self.outcome is not None:
            found.append(b'"outcome":"%b"' % self.outcome.encode())
        if self.op is not None:
            found.append(b'"op":"%b"' % self.op.encode())
        return found

    def plain(self) -> Callable[[bytes], re.Match[bytes] | None]:
        """Matches a whole line that was verified and is meant; groups: event, time, sig. Of what we wrote, a
        field outside of strings has a comma before it and no backslash; lines with a brace within, which a
        string may have and a few events of the keeper do, are left to `holds`."""
        op, outcome = (re.escape(word).encode() if word else b"[a-z_]+" for word in (self.op, self.outcome))
        ahead = b""
        if self.key is not None:
            key = re.escape(json_dumps(self.key)).encode()
            ahead += rb'(?=[^\n]*,"(?:(?:new_)?key_id":%b|keys":\[[^\]]*%b))' % (key, key)
        if self.thread is not None:
            ahead += rb'(?=[^\n]*,"thread_id":%b)' % re.escape(json_dumps(self.thread)).encode()
        if self.uid is not None:
            ahead += rb'(?=[^\n]*,"uid":%d[,}])' % self.uid
        if self.embedded:
            ahead += rb'(?=[^\n]*,"embedded":)'
        head = rb'\{"event":(\{"chain":"[0-9.]+","seq":[0-9]+,"prev":"[^"{]*","ts":"([^"{]*)"'
        tail = rb',"op":"%b","outcome":"%b"%b[^\n{]*\}),"sig":"([^"{]*)"\}' % (op, outcome, ahead)
        return re.compile(head + tail).fullmatch


def events_of(line: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """What has the form of a record in a line, whoever wrote that: its bytes and what it says. Behind a torn
    record others may stand in the same line."""
    event = _event(line)
    if event is not None:
        yield line, event
        return
    at, misses = line.find(MARK), 0
    while at >= 0 and misses < MISSES and len(line) <= LONGEST:
        record = RECORD.match(line, at)
        event = _event(record[0]) if record else None
        if record and event:
            yield record[0], event
        misses += event is None
        at = line.find(MARK, record.end() if record and event else at + 1)


def _event(text: bytes) -> dict[str, Any] | None:
    try:
        event = parse(text)
    except ValueError:  # torn, or edited: the verifier names it
        return None
    return event if all(isinstance(event.get(name), str) for name in ("ts", "op", "outcome")) else None


def keys_of(event: Mapping[str, Any]) -> set[str]:
    """Every key_id that a record names: its own, the target of a reencrypt, the keys of a batch."""
    many = event.get("keys")
    named = {str(event[name]) for name in ("key_id", "new_key_id") if name in event}
    return named.union(map(str, many)) if isinstance(many, list) else named


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


Show = Callable[[dict[str, Any]], None]


def lines_with(needle: bytes, block: bytes) -> Iterator[bytes]:
    """Each line that has it, once."""
    end = 0
    while (at := block.find(needle, end)) >= 0:
        begin, end = block.rfind(b"\n", 0, at) + 1, block.find(b"\n", at)
        end = end if end >= 0 else len(block)
        yield block[begin:end]


class Hits:
    """Takes blocks of a log and hands on what the query finds, in the order of the files."""

    def __init__(self, query: Query, key: memoryview | None, show: Show) -> None:
        """`key`: the audit key, where it is at hand. `show` gets the event, with `verified`: True, False, or
        None where nobody can tell."""
        self.found = self.unsigned = 0
        self._query = query
        self._needles = query.needles()
        self._plain = query.plain()
        self._low, self._high = query.since.encode(), (query.until or "~").encode()
        self._key = key
        self._show = show
        self._text = io.StringIO()

    def __call__(self, block: bytes, verified: bool) -> None:
        if not all(needle in block for needle in self._needles) or not self._at_that_time(block):
            return  # most blocks, where a key is seldom used
        for line in self._lines(block):
            match = self._plain(line) if verified else None
            if match is not None:
                if self._low <= match[2] < self._high:
                    self.found += 1
                    self._show_plain(match)
            elif not verified or line.count(b"{") != PLAIN:
                self._look(line)

    # -- as part of several processes, each of which renders what it finds

    def apart(self) -> None:
        sys.stdout = self._text = io.StringIO()

    def piece(self) -> list[Any]:
        seen = [self._text.getvalue(), self.found, self.unsigned]
        self._text.seek(0)
        self._text.truncate()
        self.found = self.unsigned = 0
        return seen

    def told_of(self, found: list[Any]) -> None:
        sys.stdout.write(found[0])
        self.found += found[1]
        self.unsigned += found[2]

    def rest(self) -> None:
        """All was told."""

    def add(self, rest: None) -> None:
        """Nothing."""

    def _at_that_time(self, block: bytes) -> bool:
        if not self._query.since and not self._query.until:
            return True
        times = _TIMES(block)
        return bool(times) and max(times) >= self._low and min(times) < self._high

    def _lines(self, block: bytes) -> Iterator[bytes]:
        """Those that have the rarest of the needles."""
        if not self._needles:
            return iter(block.split(b"\n"))
        return lines_with(self._needles[0], block)

    def _show_plain(self, match: re.Match[bytes]) -> None:
        if self._show is as_json:  # it stands there already
            sys.stdout.write((b'%b,"sig":"%b","verified":true}\n' % (match[1][:-1], match[3])).decode())
        else:
            self._show({**json_loads(match[1]), "sig": match[3].decode(), "verified": True})

    def _look(self, line: bytes) -> None:
        for text, event in events_of(line):
            if self._query.holds(event):
                record = RECORD.fullmatch(text)
                event["verified"] = None if self._key is None else bool(record and genuine(self._key, record))
                self.found += 1
                self.unsigned += event["verified"] is False
                self._show(event)


# ---- how they are shown ----------------------------------------------------------------------------------


def as_json(event: dict[str, Any]) -> None:
    sys.stdout.write(json_dumps(event) + "\n")


def as_csv() -> Callable[[dict[str, Any]], None]:
    """A writer of rows below a header line. A cell that a spreadsheet would calculate gets a quote first."""
    csv.writer(sys.stdout, lineterminator="\n").writerow((*COLUMNS, "verified", "more"))

    def write(event: dict[str, Any]) -> None:
        csv.writer(sys.stdout, lineterminator="\n").writerow(
            [_tame(cell) for cell in (*cells(event), _told(event["verified"]), json.dumps(more(event)))]
        )

    return write


def _tame(cell: str) -> str:
    text = cell.encode("utf-8", "backslashreplace").decode()  # half a pair of UTF-16 can't be written
    return f"'{text}" if text.startswith(_FORMULA) else text


def as_table() -> Callable[[dict[str, Any]], None]:
    """A line a record, written as it is found: columns have fixed widths that are seldom passed."""
    sys.stdout.write("TIME                  OP               OUTCOME       UID  KEY / THREAD\n")

    def write(event: dict[str, Any]) -> None:
        outcome, uid = f"{event['outcome']} {event.get('status', '')}", event.get("uid", "-")
        about = [str(event[name]) for name in ("key_id", "thread_id") if name in event]
        about += [f"{name}={value}" for name, value in more(event).items()]
        mark = "  NOT SIGNED" if event["verified"] is False else ""
        time_of = event["ts"][:19].replace("T", " ")
        line = f"{time_of:20}  {event['op']:15}  {outcome:11} {uid!s:>5}  {'  '.join(about)}{mark}"
        sys.stdout.write(safe(line.rstrip()) + "\n")

    return write


def cells(event: Mapping[str, Any]) -> Iterator[str]:
    return (str(event.get(name, "")) for name in COLUMNS)


def more(event: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in _PLACED}


def _told(verified: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[verified]


def summary(report: Report, hits: Hits, key: bool, started: float) -> str:
    """The line on stderr: what was looked through, and whether it can be believed."""
    if not key:
        trust = f"FAULT at {report.fault}; " if report.fault else ""
        trust += "not verified (--no-verify)"
    elif report.fault is not None:
        trust = f"FAULT at {report.fault}: chains are verified up to there"
    else:
        trust = f"{_count(len(report.chains), 'chain')} verified"
        trust += f"; {missing(report)}" if report.unchecked else ""
    unsigned = f", {hits.unsigned} of them NOT SIGNED" if hits.unsigned else ""
    found, files = _count(hits.found, "record"), _count(len(report.files), "file")
    return f"{found} found{unsigned} in {files} ({time.monotonic() - started:.1f} s); {trust}"


def missing(report: Report) -> str:
    """What `audit verify` calls a fault, unless it is told that older files are kept elsewhere."""
    what = "a chain's head" if report.unchecked == 1 else f"{report.unchecked:,} heads of chains"
    return f"{what} that the store names, in none of these files: older logs, or all of one, are missing"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)
