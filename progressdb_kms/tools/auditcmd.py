"""`audit verify`, `search`, `report` and `tail`: the audit log on the command line."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Callable, NamedTuple

from ..audit import verify as auditverify
from ..audit.log import FILE_NAME
from ..audit.shared import Shared
from ..audit.verify import Report, originals
from ..config.options import cores
from ..crypto.envelope import AUDIT_KEY, ROW_KEY
from ..crypto.keyring import KekNotLoaded
from ..disk import regular
from ..encoding import json_loads, timestamp
from ..errors import KeyMismatch, StoreDamaged
from ..service import ownkeys
from ..service.ownkeys import ROWS
from ..store.heads import Head, heads
from ..store.sqlite import SqliteReader
from . import asowner, auditreport, datadir
from .auditcounts import Counts
from .auditsearch import Hits, Query, as_csv, as_json, as_table, moment, summary
from .command import EVENTS
from .console import CommandFailed, Progress, UsageError, check_replaceable, output, safe, say, show

if TYPE_CHECKING:
    from ..config.load import Loaded
    from ..config.options import Settings
    from ..fleet.reader import FleetReader


BLOCK = 64 * 1024
"""Bytes a read, from the end of the log backwards."""

POLL = 0.25
"""Seconds between two looks for new records."""

SHOWN = ("ts", "chain", "seq", "op", "outcome", "status")
"""Fields with a place of their own; the others follow as name=value. `prev` is of no use to a reader."""


# ---- verify ------------------------------------------------------------------------------------------


def verify(args: argparse.Namespace, loaded: Loaded, progress: Progress) -> int:
    """Returns 1 where a fault was found, which is told on stdout: it is what was asked for."""
    data_dir = loaded.settings.data_dir
    receipts = Path(args.receipts).read_text("utf-8", "replace").splitlines() if args.receipts else []
    if args.receipts and not any(map(str.strip, receipts)):
        raise CommandFailed(
            f"{args.receipts} holds no receipt, so nothing would be held against the log",
            hint="of the journal: once an hour, and at a stop, the daemon writes a line `witness:` to it",
        )
    with _audit_key(loaded, args.host) as (key, anchors):
        report = auditverify.verify(
            args.log or _logs(data_dir),
            key,
            anchors,
            receipts=receipts,
            partial=args.partial,
            progress=progress,
            reading=_shared,
        )
    _tell(report, args.json)
    return 0 if report.ok else 1


def _shared(report: Report, progress: Callable[[int, int], None] | None) -> Shared:
    return Shared(report, progress, cores())


def _logs(data_dir: Path) -> Sequence[Path]:
    """The log and those that logrotate made of it, where they lie beside it."""
    found = sorted(data_dir.glob(FILE_NAME + "*"))
    if not found:
        raise CommandFailed(
            f"there is no audit log in {data_dir}", hint="--data-dir or --config says where it is"
        )
    return found


def _tell(report: Report, as_json: bool) -> None:
    values: dict[str, Any] = {
        "result": "ok" if report.ok else "fault",
        "fault": str(report.fault) if report.fault else None,
        "lines": report.lines,
        "chains": len(report.chains),
        "recoveries": report.recoveries,
        "receipts": report.receipts,
        "unchecked": report.unchecked,
        "shredded": len(report.shredded),
        "files": list(report.files) if as_json else len(report.files),
    }
    if report.fault and not as_json:  # nothing was counted to the end
        values = {name: values[name] for name in ("result", "fault", "files")}
    show(values, as_json)


@contextlib.contextmanager
def _audit_key(loaded: Loaded, host: str | None) -> Iterator[tuple[memoryview, Mapping[str, Head]]]:
    """The audit key in locked memory, and the heads of the chains, both from the store; of this `host` of a
    fleet, if one is named. The KEKs are wiped before it is lent: who reads a log has no use for them, nor
    have the processes that help with it. Raises StoreDamaged where they are not all that the daemon wrote."""
    with contextlib.ExitStack() as stack:
        with datadir.keys(loaded) as keys:
            with _reader(loaded.settings, host) as reader:
                row = reader.read(ROWS[AUDIT_KEY])
                with datadir.own_key(keys.keyring, ROW_KEY, reader.read(ROWS[ROW_KEY])) as row_key:
                    if row_key is not None:  # else the audit key tells what is wrong
                        reader.unlock(row_key)
                        reader.vouch()
                anchors = heads(reader)
            if row is None:
                raise StoreDamaged("the store has no audit key", hint="is data_dir the right folder?")
            try:
                key = stack.enter_context(ownkeys.opened(keys.keyring, AUDIT_KEY, row))
            except KekNotLoaded as missing:
                raise KeyMismatch(
                    f"the audit key is wrapped under the KEK {missing.kek_id}, which is not configured",
                    hint="`progressdb-kms kek-id FILE…` finds the key file",
                ) from None
        loaded.close()
        yield key, anchors


@contextlib.contextmanager
def _reader(settings: Settings, host: str | None = None) -> Iterator[FleetReader | SqliteReader]:
    """The store, as its owner opens it: SQLite makes files beside it."""
    data_dir = settings.data_dir
    if settings.store != "sqlite":
        with datadir.reading(settings, host) as fleet:
            yield fleet
        return
    if host:
        raise CommandFailed("--host names one of a fleet, and this store is no fleet's", hint="leave it out")
    with asowner.acting_as(asowner.of(data_dir)), contextlib.closing(datadir.reader_of(data_dir)) as reader:
        yield reader


# ---- search ------------------------------------------------------------------------------------------


def search(args: argparse.Namespace, loaded: Loaded, progress: Progress) -> int:
    """Records to stdout, as they are found; what can be said of their chains to stderr. Returns 1 where a
    fault was found."""
    (since, until), started = span(args), time.monotonic()
    op = _op(args.op)
    query = Query(
        args.key,
        args.thread,
        args.uid,
        op,
        args.outcome,
        since,
        until,
        args.embedded,
    )
    if args.json and args.csv:
        raise UsageError("--json and --csv exclude each other")
    with _read_log(args, loaded, args.no_verify) as read:
        show_as = as_json if args.json else as_csv() if args.csv else as_table()
        hits = Hits(query, read.key, show_as)
        report = read(progress, hits)
        sys.stdout.flush()
        say(summary(report, hits, read.key is not None, started))
        if op and op not in EVENTS and not hits.found:
            say(f"this release records no operation {op[:40]!r} (but {', '.join(EVENTS)})")
    return 0 if report.ok and not hits.unsigned else 1


def _op(word: str | None) -> str | None:
    """As the log has it; one that it never has is looked for, too: another release may have written it."""
    if word is None or word in EVENTS:
        return word
    from .policycmd import operation

    return operation(word) or word


def span(args: argparse.Namespace) -> tuple[str, str]:
    """From when until when records are meant. Raises UsageError."""
    now = time.time()
    since, until = (moment(text, now) if text else "" for text in (args.since, args.until))
    if until and since > until:
        raise UsageError(f"--until {args.until[:40]} is before --since {args.since[:40]}")
    return since, until


def report(args: argparse.Namespace, loaded: Loaded, progress: Progress) -> int:
    """One HTML page to a file. Returns 1 where a fault was found; the page is made and tells it."""
    now, data_dir, counts = time.time(), loaded.settings.data_dir, Counts(*span(args))
    check_replaceable(args.output, auditreport.BEGINS)
    with output(args.output) as file:  # now, so that nobody waits for a page that can't be written
        with _read_log(args, loaded, False) as read:
            found = read(progress, counts)
        with _reader(loaded.settings, args.host) as reader:
            held = auditreport.holdings(reader, counts.keys, now)
        file.write(auditreport.page(counts, held, found, str(data_dir), timestamp(now)).encode())
    say(f"{args.output}: {counts.lines} records" + (f", FAULT at {found.fault}" if found.fault else ""))
    return 0 if found.ok else 1


class LogReader(NamedTuple):
    """Goes through a log once, verifying where `key` is there."""

    logs: Sequence[Path]
    key: memoryview | None
    anchors: Mapping[str, Head]

    def __call__(self, progress: Progress, observe: auditverify.Observer) -> Report:
        if self.key is None:
            report = Report(originals(self.logs))
            _shared(report, progress).through(None, observe)
            return report
        return auditverify.verify(
            self.logs,
            self.key,
            self.anchors,
            partial=True,
            progress=progress,
            observe=observe,
            reading=_shared,
        )


@contextlib.contextmanager
def _read_log(args: argparse.Namespace, loaded: Loaded, unverified: bool) -> Iterator[LogReader]:
    logs = args.log or _logs(loaded.settings.data_dir)
    if unverified:
        yield LogReader(logs, None, {})
        return
    with _audit_key(loaded, args.host) as (key, anchors):
        yield LogReader(logs, key, anchors)


# ---- tail --------------------------------------------------------------------------------------------


def tail(data_dir: Path, lines: int, *, follow: bool, as_json: bool) -> None:
    """Write to stdout; signatures are `verify`'s matter. With `follow` it ends by a signal only."""
    path = data_dir / FILE_NAME
    try:
        log: IO[bytes] = open(regular(path), "rb")  # noqa: SIM115  # followed over rotations, closed below
    except FileNotFoundError:
        raise CommandFailed(
            f"there is no audit log {path}", hint="--data-dir or --config says where it is"
        ) from None
    try:
        for line in _last(log, lines):
            _write(line, as_json)
        while follow:
            log = _new(path, log, as_json)
            time.sleep(POLL)
    finally:
        log.close()


def _last(log: IO[bytes], lines: int) -> list[bytes]:
    """The last lines, and the position behind them. Reads no more of the log than it needs."""
    end = start = log.seek(0, os.SEEK_END)
    data = b""
    while start > 0 and data.count(b"\n") <= lines:
        size = min(BLOCK, start)
        start -= size
        log.seek(start)
        data = log.read(size) + data
    log.seek(end)
    whole = data[: data.rfind(b"\n") + 1]
    log.seek(end - (len(data) - len(whole)))  # a line that is being written is read again, when it is whole
    return whole.splitlines()[-lines:]


def _new(path: Path, log: IO[bytes], as_json: bool) -> IO[bytes]:
    """Write what was appended. Returns the log to go on with: another one after a rotation."""
    for line in _whole_lines(log):
        _write(line, as_json)
    sys.stdout.flush()
    try:
        other = os.stat(path)
    except FileNotFoundError:
        return log
    if os.path.samestat(other, os.fstat(log.fileno())):
        return log
    log.close()
    return open(regular(path), "rb")


def _whole_lines(log: IO[bytes]) -> Iterator[bytes]:
    while True:
        place = log.tell()
        line = log.readline()
        if not line.endswith(b"\n"):
            log.seek(place)
            return
        yield line[:-1]


def _write(line: bytes, as_json: bool) -> None:
    text = line.decode("utf-8", "replace")
    sys.stdout.write((safe(text) if as_json else picture(text)) + "\n")


def picture(line: str) -> str:
    """One record for people; a line that is none is shown as it is."""
    event = _event(line)
    if event is None:
        return safe(line)
    place = f"{event.get('chain', '?')}:{event.get('seq', '?')}"
    parts = [
        event.get("ts", "?"),
        place,
        event.get("op", "?"),
        event.get("outcome", "?"),
        event.get("status", ""),
    ]
    more = [f"{name}={value}" for name, value in _flat(event) if name not in (*SHOWN, "prev")]
    return safe(" ".join(str(part) for part in (*parts, *more) if part != ""))


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json_loads(line)["event"]
    except (ValueError, TypeError, KeyError):
        return None
    return event if isinstance(event, dict) else None


def _flat(event: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in event.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", item) for inner, item in value.items())
        else:
            yield name, value
