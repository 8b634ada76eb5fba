"""Verify audit logs: against themselves, the store's anchors and receipts, over any number of files.

Read as a stream, in flat memory; `chain` is the machine that the lines go through.

Found: lines edited, deleted, inserted, repeated, moved within a chain; a chain that begins late, ends before
its anchor or a receipt, or is gone; another key. Not found, and harmless or known: two lines of different
chains that changed places (between processes there is no order), and lines cut off after everything that
anchors and receipts name.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO, Callable, NamedTuple, Union

from ..encoding import b64decode
from ..errors import StoreDamaged
from . import tail
from .chain import Expected, Fault, Found, Report, Verifier, Watch
from .log import parse, pieces
from .loose import LONGEST
from .tail import UNREADABLE, Name, in_order, opened
from .torn import Thorough

__all__ = ["Fault", "Report", "history", "verify"]

Observer = Callable[[bytes, bool], None]
"""Is given a block of whole lines, or at last what stands after the last line end; and whether it was
verified: then whatever has a record's form in a line of its own is one."""

BLOCK = 256 << 10
"""Bytes read at a time: some 600 records. 1 MiB is 8 % slower: what is made of it leaves the cache."""

PIECE = 1024
"""Bytes read at a time where a block can't be: of a packed file that was cut, all but the last few lines."""

_RECEIPT = re.compile(r"([0-9.]{3,32}):([1-9][0-9]{0,18}):([0-9a-f]{16})(?:\s.*)?", re.S)


# ---- blocks and witnesses ------------------------------------------------------------------------


class Blocks:
    """A file's blocks of whole lines, and at last what stands after the last line end, maybe nothing. Of a
    line that is far too long the beginning comes in between, without a line end: it is a fault, and no end.

    Where a block ends follows from the place in the file alone, wherever one begins to read.
    """

    def __init__(self, file: BinaryIO, *, live: bool = False, start: int = 0, careful: bool = False) -> None:
        """`live`: the daemon may be in the middle of a line; give it a moment. `start`: a multiple of BLOCK.
        `careful`: a line that is far too long is a TooLong, as it is always where `start` is in one."""
        self.position = start
        self.ended = False
        self._file = file
        self._live = live
        self._careful = careful
        self._rest = _begun(file, start) if start else b""
        self._skips = False  # the rest of a line that is too long
        self._broken: Unreadable | None = None  # behind what was read

    def read(self, stop: int | None = None) -> Iterator[bytes]:
        """Those of the bytes before `stop`, a multiple of BLOCK; the last only where there is no such limit
        or the file ends before."""
        while stop is None or self.position < stop:
            block = self._next()
            if not block:
                if self._live and self._rest:
                    self._live = False
                    time.sleep(tail.SETTLE)
                    continue
                self.ended = True
                yield self._rest
                return
            yield from self._take(block)

    def _next(self) -> bytes:
        """Of a file that can't be read further, first what can be."""
        if self._broken is not None:
            raise self._broken
        try:
            with _reading():
                block = self._file.read(BLOCK)
        except Unreadable as error:
            block, self._broken = self._readable(), error
        self.position += len(block)
        return block if block or self._broken is None else self._next()

    def _readable(self) -> bytes:
        found = b""
        with contextlib.suppress(*UNREADABLE):
            self._file.seek(self.position)
            while len(found) < BLOCK and (piece := self._file.read(PIECE)):
                found += piece
        return found

    def _take(self, block: bytes) -> Iterator[bytes]:
        if self._skips:
            begin = block.find(b"\n") + 1
            self._rest, self._skips = block[begin:] if begin else b"", not begin
            return
        cut = block.rfind(b"\n") + 1
        if self._careful and len(self._rest) + (block.find(b"\n") if cut else len(block)) > LONGEST:
            raise TooLong(self.position - len(block))
        if cut:
            rest, self._rest = self._rest, block[cut:]
            yield rest + memoryview(block)[:cut]
        elif len(self._rest) + len(block) <= 2 * LONGEST:
            self._rest += block
        else:
            rest, self._rest, self._skips = self._rest, b"", True
            yield rest


def _begun(file: BinaryIO, start: int) -> bytes:
    """Of the line in which `start` is, what stands before; leaves the file there."""
    with _reading():
        for size in (BLOCK, LONGEST):
            file.seek(begin := max(0, start - size))
            before = file.read(start - begin)
            cut = before.rfind(b"\n") + 1
            if cut or not begin:
                return before[cut:]
    raise TooLong(start)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from None


class TooLong(Exception):
    """In a line that is longer than a record can be. `position`: the last end of a block before that is
    known."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


class Unreadable(Exception):
    """What the system says of a file that can't be read, or unpacked. Of reading alone: whoever observes may
    fail with an OSError of its own."""


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
    reading: Callable[[Report, Callable[[int, int], None] | None], Reading] | None = None,
) -> Report:
    """Verify the log in `paths` (.gz too), up to the first fault.

    `anchors`: (seq, sig) by chain, as the store keeps them; read them before the log, which only grows.
    `receipts`: lines `<chain>:<seq>:<16 hex>`, with whatever comment after white space.
    `partial`: earlier files are not at hand; what only they could show is no fault.
    `sort`: the files may be in any order; else they are taken as given, oldest first.
    `progress`: called with bytes done and bytes in all.
    `observe`: given all that is read, block by block; then a fault ends the verifying and not the reading.
    `reading`: who goes through the files, such as `Shared`; else this process does.
    """
    report = Report(originals(paths) if sort else [os.fspath(path) for path in paths])
    try:
        machine = Thorough(key, _expectations(anchors, receipts, report), partial, report)
        (reading or Reading)(report, progress).through(machine, observe)
        if report.fault is None:
            machine.finish()
    except Found as found:
        report.fault = found.fault
    return report


class Reading:
    """One pass over the files of a report, in order."""

    def __init__(self, report: Report, progress: Callable[[int, int], None] | None) -> None:
        self.report = report
        self._progress = progress
        self._done = 0  # bytes of the files before
        self._total = 0  # bytes of all of them

    def through(self, machine: Verifier | None, observe: Observer | None) -> None:
        """Raises Found at a fault where nobody observes; else notes it, and goes on without the machine."""
        sizes = self.sizes()
        self._total = sum(sizes)
        for path, size in zip(self.report.files, sizes):
            if machine is not None and self.report.fault is None:
                machine.open(path)
            try:
                self.one(path, machine, observe)
            except Unreadable as error:
                fault = Fault(path, machine.line if machine else 0, f"can't be read ({error})")
                if observe is None:
                    raise Found(fault) from None
                self.report.fault = self.report.fault or fault
            self._done += size

    def sizes(self) -> list[int]:
        """In bytes, as the files lie there."""
        return [os.path.getsize(path) if os.path.exists(path) else 0 for path in self.report.files]

    def one(self, path: str, machine: Verifier | None, observe: Observer | None) -> None:
        """Raises Unreadable."""
        with _reading():
            file, raw = opened(path)
        with raw:
            for block in Blocks(file, live=file is raw and path == self.report.files[-1]).read():
                self.block(block, machine, observe)
                self.tell(raw.tell())

    def block(self, block: bytes, machine: Verifier | None, observe: Observer | None) -> None:
        if machine is not None and self.report.fault is None:
            with self.going_on(observe):
                if block.endswith(b"\n"):
                    machine.feed(block)
                else:
                    machine.end_of_file(block)
        if observe is not None:
            observe(block, machine is not None and self.report.fault is None)

    @contextlib.contextmanager
    def going_on(self, observe: Observer | None) -> Iterator[None]:
        """A fault in here is noted, where somebody goes on to observe."""
        try:
            yield
        except Found as found:
            if observe is None:
                raise
            self.report.fault = found.fault

    def tell(self, position: int) -> None:
        if self._progress:
            self._progress(self._done + position, self._total)


Left = Union[str, None]
"""How a DEK was left: None: enabled; "": disabled; else the time for which its deletion is scheduled."""


class History(NamedTuple):
    """What the signed events of a log say of DEKs. `shredded`: time by key_id. `left`: how the last event
    left a DEK that was closed or opened, and the number of the store's last change by then."""

    shredded: dict[str, str]
    left: dict[str, tuple[int, Left]]


_TOLD = re.compile(rb'"op":"(?:shred|disable_dek|enable_dek|delete_dek)","outcome":"ok"')


def originals(paths: Iterable[Name]) -> list[str]:
    """In order, without what logrotate was packing, or had just packed, when the power went: a beginning
    of the file that lies beside it still."""
    files = in_order(paths)
    packed = [path for path in files if path.endswith(".gz") and path[:-3] in files]
    copies = {path for path in packed if _beginning(path[:-3]).startswith(_beginning(path))}
    return [path for path in files if path not in copies]


def _beginning(path: str) -> bytes:
    """As much of the first 64 KiB as can be read."""
    found = b""
    with contextlib.suppress(*UNREADABLE):
        file, raw = opened(path)
        with raw:
            while len(found) < 64 * 1024 and (more := file.read(1024)):
                found += more
    return found


def history(paths: Iterable[Name], key: memoryview) -> History:
    """Whatever else is in the files. An event may have been edited away: who relies on this calls `verify`.

    Raises StoreDamaged where a file can't be read to its end.
    """
    found = History({}, {})
    for path in originals(paths):
        try:
            file, raw = opened(path)
            with raw:
                for block in Blocks(file).read():
                    for line in block.split(b"\n") if _TOLD.search(block) else ():
                        if _TOLD.search(line[:LONGEST]):
                            _note(line, key, found)
        except (OSError, Unreadable) as error:
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
        else:
            left = None if op == "enable_dek" else event.get("delete_at", "")
            found.left[key_id] = event["change"], left
