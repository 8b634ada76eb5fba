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
from .chain import LONGEST, Found, Report, Verifier
from .log import FILE_NAME, MARK, RECORD, AuditLog, genuine, pieces, torn

Name = Union[str, "os.PathLike[str]"]

SCAN = 16 << 20
"""Bytes of the log's end that a starting daemon searches for torn records: 40,000 records, in 0.15 s."""

TAIL = 64 << 10
"""Bytes in which the number of the store's last change is looked for: some 150 records."""

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


def floor(paths: Iterable[Name], key: memoryview) -> Floor | None:
    """From the end of the newest file that has a signed record; None where none has. Every record carries the
    number, so that a few are enough; what is not signed doesn't count."""
    for path in reversed(in_order(paths)):
        found: list[Floor] = []
        with suppress(*UNREADABLE):  # what was read before counts
            for data, packed in _blocks(path):
                found += _floors(data, key)
                if found and not packed:
                    break
        if found:
            return Floor(max(one.epoch for one in found), max(one.change for one in found))
    return None


def _blocks(path: str) -> Iterator[tuple[bytes, bool]]:
    """A file from its end on, a packed one from its beginning, and whether it is that. Each block has a whole
    line in common with the next: however long a file without a record is, little of it is held."""
    file, raw = opened(path)
    with raw:
        end, size, held = raw.seek(0, os.SEEK_END), TAIL, b""
        while file is raw and end:
            start = max(0, end - size)
            raw.seek(start)
            yield raw.read(end - start + LONGEST), False
            end, size = start, SCAN
        raw.seek(0)
        while file is not raw and (block := file.read(SCAN)):
            yield held + block, True
            held = block[-LONGEST:]


def _floors(data: bytes, key: memoryview) -> Iterator[Floor]:
    for record in RECORD.finditer(data):
        if genuine(key, record):
            change = _CHANGE.search(record[1])
            yield Floor(int(record[2].split(b".")[0]), int(change[1]) if change else 0)


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
