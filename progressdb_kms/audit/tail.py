"""What a start reads of the log: how far the store was by it, and what processes left torn when they died.

Only the end is looked at; `verify` reads all of it.
"""

from __future__ import annotations

import gzip
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Union

from ..disk import regular
from .log import EVENT, FILE_NAME, MARK, SIG, AuditLog, parse, pieces, torn
from .loose import LONGEST, Account

Name = Union[str, "os.PathLike[str]"]

SCAN = 16 << 20
"""Bytes of the log's end that a starting daemon searches for torn records: 40,000 records, in 0.15 s."""

TAIL = 64 << 10
"""Bytes in which the number of the store's last change is looked for: some 150 records."""

DENSEST = 64
"""Bytes of a log, at most, that gzip makes one of: of two HMACs in each record it can make one at best, so an
honest log has less than 16. What unpacks to more is none, and could be without an end."""

SETTLE = 0.05
"""Seconds after which the end of a log that stays the same is not a line that is just being written."""

_BORN = rb'([0-9]+)\.%b[0-9.]*","seq":[0-9]+,"prev":"[^"]*","ts":"([0-9T:.Z-]+)"'
_BY_A_WORKER, _BY_ANYBODY = (re.compile(MARK + _BORN % slot).search for slot in (b"[1-9]", b""))
UNREADABLE = (OSError, EOFError, zlib.error)


# ---- the files -------------------------------------------------------------------------------------


def opened(path: str) -> tuple[BinaryIO, BinaryIO]:
    """The file's lines, and the raw file behind them: gzip is told by its first two bytes."""
    raw = open(regular(path), "rb")  # noqa: SIM115  # closed by who asked for it
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return (gzip.GzipFile(fileobj=raw) if packed else raw), raw  # type: ignore[return-value]


def _age(path: str) -> tuple[int, str]:
    """When a file's first record was written: its start epoch and time. A file without one is the newest.

    A keeper that took another's place has an epoch of its own, while the workers keep theirs: that counts,
    whoever was the first in the file. Of a packed file that was cut the beginning can be read."""
    head = b""
    with suppress(*UNREADABLE):
        file, raw = opened(path)
        with raw:
            for size in (1024, TAIL, TAIL):
                head += file.read(size)
    found = _BY_A_WORKER(head) or _BY_ANYBODY(head)
    return (int(found[1]), found[2].decode()) if found else (1 << 62, "")


def begun(path: Name) -> bool:
    """Does a log file begin with a record, whoever signed it?"""
    return bool(_age(os.fspath(path))[1])


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


def logs(data_dir: Path) -> list[Path]:
    """The present log and those that logrotate made of it, where they lie beside it."""
    return sorted(data_dir.glob(FILE_NAME + "*"))


# ---- how far the store was --------------------------------------------------------------------------

_CHANGE = re.compile(rb'"status":[0-9]{1,3},"change":([0-9]{1,18})[,}]')

OLDER_HINT = (
    "was its kms.db-wal left behind? Put it there; else `progressdb-kms restore FILE`, which keeps shredded "
    "keys shredded and disabled ones disabled; `serve --accept-older-store` takes it as it is, on the record"
)


class Floor(NamedTuple):
    """The latest start and the latest change of the store that signed records know of."""

    epoch: int
    change: int

    def above(self, epoch: int, change: int, store: str = "kms.db") -> str:
        """Why a store that is at these was put back; "" where it wasn't."""
        if change < self.change:
            return f"{store} is older than the audit log here (change {change} against {self.change})"
        if epoch < self.epoch:
            return f"{store} is older than the audit log here (start {epoch} against {self.epoch})"
        return ""


def floor(paths: Iterable[Name], key: memoryview) -> Floor | None:
    """From the ends of all files that are plain, whatever they are called and begin with: nothing that is put
    beside the log lowers it. A packed one is read where no newer file has a record that is signed, as in the
    moment after logrotate. Every record carries the number, so that a few are enough."""
    found: list[Floor] = []
    for path in reversed(in_order(paths)):
        with suppress(*UNREADABLE):  # what was read before counts
            found += next((some for data in _backwards(path) if (some := list(_floors(data, key)))), [])
            found += () if found else (one for data in _unpacked(path) for one in _floors(data, key))
    return Floor(max(one.epoch for one in found), max(one.change for one in found)) if found else None


def _backwards(path: str) -> Iterator[bytes]:
    """A plain file from its end on, without its holes, which may be of any length. Each block has a whole
    line in common with the next: however long a file without a record is, little of it is held."""
    file, raw = opened(path)
    with raw:
        at, size, stretches = 0, TAIL, []
        with suppress(OSError):  # there are no more
            while file is raw:
                at = os.lseek(raw.fileno(), at, os.SEEK_DATA)
                begin, at = at, os.lseek(raw.fileno(), at, os.SEEK_HOLE)
                stretches.append((begin, at))
        for begin, end in reversed(stretches):
            while end > begin:
                start = max(begin, end - size)
                yield os.pread(raw.fileno(), end - start + LONGEST, start)
                end, size = start, SCAN


def _unpacked(path: str) -> Iterator[bytes]:
    """A packed file from its beginning, as far as it may be a log."""
    file, raw = opened(path)
    with raw:
        held, size = b"", 0
        while file is not raw and size <= SCAN + DENSEST * raw.tell() and (block := file.read(SCAN)):
            yield held + block
            held, size = block[-LONGEST:], size + len(block)


def _floors(data: bytes, key: memoryview) -> Iterator[Floor]:
    """A line that is longer than any is not looked into: what begins as a record again and again takes the
    square of its length."""
    for line in data.split(b"\n"):
        for _, record in pieces(line, key) if len(line) <= LONGEST else ():
            if record:
                change = _CHANGE.search(record[1])
                yield Floor(int(record[2].split(b".")[0]), int(change[1]) if change else 0)


# ---- the start of the daemon ---------------------------------------------------------------------


class _End(Account):
    """The last lines of a log, of which nobody knows what was before them."""

    def __init__(self, key: memoryview) -> None:
        super().__init__(key)
        self._last: dict[bytes, re.Match[bytes]] = {}

    def feed(self, line: bytes) -> None:
        """A whole line. One that looks like a record, and like one alone, is taken for one: only what
        recovery events name decides anything here, and theirs must be signed."""
        record = _LINE(line)
        if record is None or record[5] == _RECOVERED or line.find(MARK, 1) > 0:
            self.enter(self.split(line), True)
        else:
            self.accept(record, True)

    def accept(self, record: re.Match[bytes], first: bool) -> None:
        last = self._last.get(record[2])
        if last is not None and (int(record[3]), record[4]) != (int(last[3]) + 1, last[6]):
            self.fault("a line is missing, or was moved")
        if record[5] == _RECOVERED:
            event = parse(record[0])
            self.recovered(event["torn"], event["ends"])
        self._last[record[2]] = record

    def lasts(self) -> Iterator[bytes]:
        return (record[0] for record in self._last.values())


_RECOVERED = b"audit_recovered"
_LINE = re.compile(rb'\{"event":(' + EVENT % b"" + rb'),"sig":"' + SIG + rb'"\}').fullmatch


def recover(log: AuditLog) -> int:
    """Have `log` name the torn records that processes left when they died; returns how many there are.

    For the one process that holds the data-dir, at its start, before it records anything. Other processes
    may be appending: what changes while we look was not torn, and a piece that is named twice does no harm.
    Only the end of the current file is looked at; a torn record before that stays a fault. Where something
    else is wrong, which `verify` tells, only what stands after the last line end is named.
    """
    lines, rest = _settled(log.path)
    end = _End(log.key)
    try:
        for line in lines.split(b"\n")[:-1]:
            end.feed(line)
        if rest:
            end.enter(end.split(rest), False)
        left, ends = [torn(loose.data) for loose in end.loose], max(0, end.spare)
    except (KeyError, TypeError, ValueError):
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
