"""Verify audit logs: against themselves, the store's anchors and receipts, over any number of files.

Read as a stream, in flat memory; `chain` is the machine that the lines go through.

Found: lines edited, deleted, inserted, repeated, moved within a chain; a chain that begins late, ends before
its anchor or a receipt, or is gone; another key. Not found, and harmless or known: two lines of different
chains that changed places (between processes there is no order), and lines cut off after everything that
anchors and receipts name.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO, Callable, NamedTuple

from ..encoding import b64decode
from ..errors import StoreDamaged
from . import tail
from .chain import LONGEST, Expected, Fault, Found, Report, Verifier, Watch
from .log import parse, pieces
from .tail import UNREADABLE, Name, in_order, opened

__all__ = ["Fault", "Report", "history", "verify"]

Observer = Callable[[bytes, bool], None]
"""Is given a block of whole lines, or at last what stands after the last line end; and whether it was
verified: then whatever has a record's form in a line of its own is one."""

BLOCK = 256 << 10
"""Bytes read at a time: some 600 records. 1 MiB is 8 % slower: what is made of it leaves the cache."""

_RECEIPT = re.compile(r"([0-9.]{3,32}):([1-9][0-9]{0,18}):([0-9a-f]{16})(?:\s.*)?", re.S)


# ---- blocks and witnesses ------------------------------------------------------------------------


def _blocks(file: BinaryIO, live: bool) -> Iterator[bytes]:
    """Blocks that end with a line end, and at last what stands after the last one, maybe nothing. Of a line
    that is far too long the beginning comes in between, without a line end: it is a fault, and no end.

    `live`: the daemon may be in the middle of a line; give it a moment.
    """
    rest = b""
    while True:
        block = file.read(BLOCK)
        if not block:
            if not (live and rest):
                break
            live = False
            time.sleep(tail.SETTLE)
            continue
        cut = block.rfind(b"\n") + 1
        if cut:
            yield rest + memoryview(block)[:cut]
            rest = block[cut:]
        elif len(rest) + len(block) <= 2 * LONGEST:
            rest += block
        else:
            yield rest
            rest = _next_line(file)
    yield rest


def _next_line(file: BinaryIO) -> bytes:
    """What is read with the end of this line, behind it."""
    while block := file.read(BLOCK):
        if cut := block.find(b"\n") + 1:
            return block[cut:]
    return b""


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
                        observe(block, machine is not None and self._report.fault is None)
                    if self._progress:
                        self._progress(done + position, total)
            except UNREADABLE as error:
                fault = Fault(path, machine.line if machine else 0, f"can't be read ({error})")
                if observe is None:
                    raise Found(fault) from None
                self._report.fault = self._report.fault or fault
                continue
            done += os.path.getsize(path)

    def _file(self, path: str) -> Iterator[tuple[bytes, int]]:
        file, raw = opened(path)
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
            file, raw = opened(path)
            with raw:
                for block in _blocks(file, False):
                    for line in block.split(b"\n") if _TOLD.search(block) else ():
                        if _TOLD.search(line[:LONGEST]):
                            _note(line, key, found)
        except UNREADABLE as error:
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
