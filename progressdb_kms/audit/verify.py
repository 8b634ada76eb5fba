"""Verify audit logs: against themselves, the store's anchors and receipts, over any number of files.

Read as a stream, in flat memory; `chain` is the machine that the lines go through.

Found: lines edited, deleted, inserted, repeated, moved within a chain; a chain that begins late, ends before
its anchor or a receipt, or is gone; another key. Not found, and harmless or known: two lines of different
chains that changed places (between processes there is no order), and lines cut off after everything that
anchors and receipts name.
"""

from __future__ import annotations

import gzip
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Callable, NamedTuple, Union

from ..encoding import b64decode
from ..errors import StoreDamaged
from .chain import LONGEST, Expected, Fault, Found, Report, Verifier, Watch
from .log import FILE_NAME, MARK, RECORD, AuditLog, genuine, parse, pieces, torn

__all__ = ["Fault", "Floor", "Report", "floor", "history", "in_order", "logs", "recover", "verify"]

Name = Union[str, "os.PathLike[str]"]
Observer = Callable[[str, bytes], None]
"""Is given a file's name and a block of whole lines, or at last what stands after the last line end."""

BLOCK = 256 << 10
"""Bytes read at a time: some 600 records. 1 MiB is 8 % slower: what is made of it leaves the cache."""

SCAN = 16 << 20
"""Bytes of the log's end that a starting daemon searches for torn records: 40,000 records, in 0.15 s."""

TAIL = 64 << 10
"""Bytes in which the number of the store's last change is looked for: some 150 records."""

SETTLE = 0.05
"""Seconds after which the end of a log that stays the same is not a line that is just being written."""

_BORN = re.compile(MARK + rb'([0-9]+)\.[0-9.]+","seq":[0-9]+,"prev":"[^"]*","ts":"([0-9T:.Z-]+)"')
_RECEIPT = re.compile(r"([0-9.]{3,32}):([1-9][0-9]{0,18}):([0-9a-f]{16})(?:\s.*)?", re.S)
_UNREADABLE = (OSError, EOFError, zlib.error)


# ---- files and witnesses -------------------------------------------------------------------------


def _opened(path: str) -> tuple[BinaryIO, BinaryIO]:
    """The file's lines, and the raw file behind them: gzip is told by its first two bytes."""
    raw = open(path, "rb")  # noqa: SIM115  # closed by who asked for it
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return (gzip.GzipFile(fileobj=raw) if packed else raw), raw  # type: ignore[return-value]


def _blocks(file: BinaryIO, live: bool) -> Iterator[bytes]:
    """Blocks that end with a line end, and at last what stands after the last one, maybe nothing.

    `live`: the daemon may be in the middle of a line; give it a moment.
    """
    rest = b""
    while True:
        block = file.read(BLOCK)
        if not block:
            if not (live and rest):
                break
            live = False
            time.sleep(SETTLE)
            continue
        cut = block.rfind(b"\n") + 1
        if cut:
            yield rest + block[:cut]
            rest = block[cut:]
        else:
            rest += block
            if len(rest) > 2 * LONGEST:
                break
    yield rest


def _age(path: str) -> tuple[int, str]:
    """When a file's first record was written: its start epoch and time. A file without one is the newest."""
    try:
        file, raw = _opened(path)
        with raw:
            found = _BORN.search(file.read(LONGEST))
    except _UNREADABLE:
        found = None
    return (int(found[1]), found[2].decode()) if found else (1 << 62, "")


def in_order(paths: Iterable[Name]) -> list[str]:
    """Log files, oldest first, each once, whatever logrotate called them."""
    found: dict[object, str] = {}
    for path in [os.fspath(name) for name in paths]:
        try:
            status = os.stat(path)
            found.setdefault((status.st_dev, status.st_ino), path)
        except OSError:
            found.setdefault(path, path)
    return sorted(found.values(), key=_age)


def _expectations(
    anchors: Mapping[str, tuple[int, str]], receipts: Iterable[str], report: Report
) -> dict[bytes, Watch]:
    watch: dict[bytes, Watch] = {}

    def expect(chain: str, seq: int, digest: bytes, who: str) -> None:
        watch.setdefault(chain.encode(), {}).setdefault(seq, []).append(Expected(digest, who))

    for chain, (seq, sig) in anchors.items():
        if seq:
            expect(chain, seq, b64decode(sig), "the store")
    for number, text in enumerate(receipts, 1):
        text = text.strip()
        if not text or text.startswith("#"):
            continue
        receipt = _RECEIPT.fullmatch(text)
        if receipt is None:
            raise Found(Fault("receipts", number, "not a receipt (<chain>:<seq>:<16 hex digits>)"))
        report.receipts += 1
        expect(receipt[1], int(receipt[2]), bytes.fromhex(receipt[3]), f"the receipt in line {number}")
    return watch


def verify(
    paths: Iterable[Name],
    key: memoryview,
    anchors: Mapping[str, tuple[int, str]],
    *,
    receipts: Iterable[str] = (),
    partial: bool = False,
    sort: bool = True,
    progress: Callable[[int, int], None] | None = None,
    observe: Observer | None = None,
) -> Report:
    """Verify the log in `paths` (.gz too), up to the first fault.

    `anchors`: (seq, sig) by chain, as the store keeps them; read them before the log, which only grows.
    `receipts`: lines `<chain>:<seq>:<16 hex>`, with whatever comment after white space.
    `partial`: earlier files are not at hand; what only they could show is no fault.
    `sort`: the files may be in any order; else they are taken as given, oldest first.
    `progress`: called with bytes done and bytes in all.
    `observe`: given all that is read, block by block; then a fault ends the verifying and not the reading.
    """
    report = Report(in_order(paths) if sort else [os.fspath(path) for path in paths])
    try:
        machine = Verifier(key, _expectations(anchors, receipts, report), partial, report)
        read = Reading(report, progress)
        read.through(machine, observe)
        if report.fault is None:
            machine.finish()
    except Found as found:
        report.fault = found.fault
    return report


class Reading:
    """One pass over the files of a report, in order."""

    def __init__(self, report: Report, progress: Callable[[int, int], None] | None) -> None:
        self._report = report
        self._progress = progress

    def through(self, machine: Verifier | None, observe: Observer | None) -> None:
        """Raises Found at a fault where nobody observes; else notes it, and goes on without the machine."""
        total = sum(os.path.getsize(path) for path in self._report.files if os.path.exists(path))
        done = 0
        for path in self._report.files:
            if machine is not None and self._report.fault is None:
                machine.open(path)
            try:
                for block, position in self._file(path):
                    if machine is not None and self._report.fault is None:
                        self._verify(machine, block, observe is not None)
                    if observe is not None:
                        observe(path, block)
                    if self._progress:
                        self._progress(done + position, total)
            except _UNREADABLE as error:
                fault = Fault(path, machine.line if machine else 0, f"can't be read ({error})")
                if observe is None:
                    raise Found(fault) from None
                self._report.fault = self._report.fault or fault
                continue
            done += os.path.getsize(path)

    def _file(self, path: str) -> Iterator[tuple[bytes, int]]:
        file, raw = _opened(path)
        with raw:
            for block in _blocks(file, file is raw and path == self._report.files[-1]):
                yield block, raw.tell()

    def _verify(self, machine: Verifier, block: bytes, go_on: bool) -> None:
        try:
            if block.endswith(b"\n"):
                machine.feed(block)
            else:
                machine.end_of_file(block)
        except Found as found:
            if not go_on:
                raise
            self._report.fault = found.fault


class History(NamedTuple):
    """What the signed events of a log say of DEKs. `shredded`: time by key_id. `closed`: those whose last
    event says that they must not be used, with the time of their deletion ("": disabled)."""

    shredded: dict[str, str]
    closed: dict[str, str]


_TOLD = re.compile(rb'"op":"(?:shred|disable_dek|enable_dek|delete_dek)","outcome":"ok"')


def history(paths: Iterable[Name], key: memoryview) -> History:
    """Whatever else is in the files. An event may have been edited away: who relies on this calls `verify`.

    Raises StoreDamaged where a file can't be read to its end.
    """
    found = History({}, {})
    for path in in_order(paths):
        try:
            file, raw = _opened(path)
            with raw:
                for block in _blocks(file, False):
                    for line in block.split(b"\n") if _TOLD.search(block) else ():
                        if _TOLD.search(line[:LONGEST]):
                            _note(line, key, found)
        except _UNREADABLE as error:
            raise StoreDamaged(
                f"the audit log {path} can't be read ({error})", hint="restore the file, or leave it out"
            ) from None
    return found


def _note(line: bytes, key: memoryview, found: History) -> None:
    for piece, record in pieces(line, key):
        if record is None or not _TOLD.search(piece):
            continue
        event = parse(piece)
        op, key_id = event["op"], event["key_id"]
        if op == "shred" or event.get("immediately"):
            found.shredded[key_id] = event["ts"]
        elif op == "enable_dek":
            found.closed.pop(key_id, None)
        else:
            found.closed[key_id] = event.get("delete_at", "")


# ---- how far the store was --------------------------------------------------------------------------

_CHANGE = re.compile(rb'"status":[0-9]{1,3},"change":([0-9]{1,18})[,}]')

OLDER_HINT = (
    "use `progressdb-kms restore FILE`, which keeps shredded keys shredded and disabled ones disabled; "
    "`serve --accept-older-store` takes it as it is, on the record"
)


class Floor(NamedTuple):
    """The latest start and the latest change of the store that signed records know of."""

    epoch: int
    change: int

    def above(self, epoch: int, change: int) -> str:
        """Why a store that is at these was put back; "" where it wasn't."""
        if change < self.change:
            return f"kms.db is older than the audit log beside it (change {change} against {self.change})"
        if epoch < self.epoch:
            return f"kms.db is older than the audit log beside it (start {epoch} against {self.epoch})"
        return ""


def logs(data_dir: Path) -> list[Path]:
    """The present log and those that logrotate made of it, where they lie beside it."""
    return sorted(data_dir.glob(FILE_NAME + "*"))


def floor(paths: Iterable[Name], key: memoryview) -> Floor | None:
    """From the end of the newest file that has a signed record; None where none has. Every record carries the
    number, so that a few are enough; what is not signed doesn't count."""
    for path in reversed(in_order(paths)):
        for size in (TAIL, SCAN, None):
            found = _floor(_records(path, size), key)
            if found is not None:
                return found
            if size is None or size >= os.path.getsize(path):
                break
    return None


def _records(path: str, size: int | None) -> bytes:
    """The last bytes of a file, of a packed one all that it holds."""
    try:
        file, raw = _opened(path)
        with raw:
            if size is not None and file is raw:
                raw.seek(max(0, raw.seek(0, os.SEEK_END) - size))
            return file.read()
    except _UNREADABLE:
        return b""


def _floor(data: bytes, key: memoryview) -> Floor | None:
    found = [record for record in RECORD.finditer(data) if genuine(key, record)]
    if not found:
        return None
    changes = [int(change[1]) for record in found if (change := _CHANGE.search(record[1]))]
    return Floor(max(int(record[2].split(b".")[0]) for record in found), max(changes, default=0))


# ---- the start of the daemon ---------------------------------------------------------------------


def recover(log: AuditLog) -> int:
    """Have `log` name the torn records that processes left when they died; returns how many there are.

    For the one process that holds the data-dir, at its start, before it records anything. Other processes
    may be appending: what changes while we look was not torn, and a piece that is named twice does no harm.
    Only the end of the current file is looked at; a torn record before that stays a fault, and so does
    whatever else is wrong.
    """
    block, rest = _settled(log.path)
    machine = Verifier(log.key, {}, True, Report([]))
    try:
        machine.open(log.path)
        machine.feed(block)
        machine.end_of_file(rest)
        left = [torn(loose.data) for loose in machine.loose]
        ends = max(0, machine.spare + sum(loose.whole for loose in machine.loose))
    except Found:
        left, ends = [torn(piece) for piece, _ in pieces(rest, log.key)], 0
    if left:
        log.adopt(left, ends)
    return len(left)


def _settled(path: str) -> tuple[bytes, bytes]:
    """The last whole lines, and what stands after them, once that is no longer changing."""
    before = None
    while True:
        data = _end(path)
        cut = data.rfind(b"\n") + 1
        if cut == len(data) or data == before:
            return data[:cut], data[cut:]
        before = data
        time.sleep(SETTLE)


def _end(path: str) -> bytes:
    """The last SCAN bytes of a file, from the beginning of a line on."""
    with open(path, "rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - SCAN)
        file.seek(start)
        data = file.read(2 * SCAN)
    return data[data.find(b"\n") + 1 :] if start else data
