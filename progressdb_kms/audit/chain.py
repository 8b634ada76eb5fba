"""The machine that holds the lines of an audit log against each other: bytes in, the first fault out.

A line that begins as the next of its chain must, and is signed, costs one HMAC and is looked into no
further: who can sign is who writes them. Everything else goes the slow way, `look`, and ends there as a
fault, or as one of the few things that an honest log may hold:

- a torn record: bytes that a recovery event, further on, names by length and SHA-256. Until then they are
  "loose"; what is loose at the end is a fault.
- several pieces in one line, because another process appended straight after the torn part. The records
  among them are records; one that has lost its line end is loose like a torn one.
- blank lines, as many as recovery events account for: each line end belongs to a record or to a repair.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, NoReturn

from ..crypto.aead import mac, same
from ..encoding import b64decode
from .log import MARK, RECORD, Torn, genuine, parse, pieces, torn

LONGEST = 1 << 20
"""Bytes of the longest line that is looked into; a record has 300 to 2,000."""

_NAME, _EVENT, _TAIL = len(MARK), len(b'{"event":'), len(b',"sig":""}') + 44
"""Where in a line the chain's name begins, where its event does, and how far from the end that ends."""
_BEGUN = re.compile(rb'\{"event":\{"chain":"([0-9.]{3,32})","seq":([0-9]{1,19}),"prev":"([A-Za-z0-9+/=]*)",')
SPECIAL = frozenset((b"start", b"shred", b"audit_recovered"))
_SPECIAL_OP = re.compile(rb'"ts":"[^"]*","op":"(?:%b)"' % b"|".join(SPECIAL)).match


class Fault(NamedTuple):
    """The first thing that is wrong. `line` counts from 1; 0: the file as a whole."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}" if self.line else f"{self.file}: {self.what}"


class Report:
    """What `verify` found. `chains`: first and last seq seen of each. `shredded`: time by key_id.

    `unchecked`: anchors and receipts that only earlier files could confirm (with `partial`).
    """

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.lines = self.recoveries = self.receipts = self.unchecked = 0
        self.chains: dict[str, tuple[int, int]] = {}
        self.shredded: dict[str, str] = {}
        self.fault: Fault | None = None

    @property
    def ok(self) -> bool:
        return self.fault is None


class Found(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault


class Expected(NamedTuple):
    """A line that must be in the log, and how its HMAC begins."""

    digest: bytes
    who: str


class Loose(NamedTuple):
    """Bytes that a recovery event must account for."""

    data: bytes
    whole: bool  # a record without its line end
    file: str
    line: int


Watch = dict[int, list[Expected]]


class Chain:
    __slots__ = ("_begin", "event", "first", "next", "seq", "sig", "watch")

    def __init__(self, name: bytes, first: int, watch: Watch) -> None:
        self.first = first
        self.watch = watch
        self._begin = MARK + name + b'","seq":'
        self.follow(0, b"", b"")

    def follow(self, seq: int, sig: bytes, event: bytes) -> None:
        """`next`: what the next line begins with, where nobody expects more of it."""
        self.seq, self.sig, self.event = seq, sig, event
        self.next = b'%b%d,"prev":"%b",' % (self._begin, seq + 1, sig) if seq + 1 not in self.watch else b"\n"


# ---- the machine ---------------------------------------------------------------------------------


class Verifier:
    def __init__(self, key: memoryview, watch: dict[bytes, Watch], partial: bool, report: Report) -> None:
        self.file, self.line = "", 0
        self.key = key
        self.watch = watch
        self.partial = partial
        self._report = report
        self.chains: dict[bytes, Chain] = {}
        self.loose: list[Loose] = []
        self._named: set[Torn] = set()  # a keeper that starts may name what a worker names too
        self._blank: tuple[str, int] | None = None  # the first blank line
        self.spare = 0  # line ends beyond those of records and named repairs: must come out as 0
        self._blind = False  # a torn record stands in a file that was not given
        self._files = 0

    def open(self, file: str) -> None:
        self._report.lines += self.line
        self.file, self.line = file, 0
        self._files += 1

    def feed(self, block: bytes) -> None:
        """Take whole lines. What continues its chain byte by byte, and is signed, is a record."""
        chains, line, key = self.chains, self.line, self.key
        for text in block[:-1].split(b"\n") if block else ():
            line += 1
            chain = chains.get(text[_NAME : text.find(b'"', _NAME, _NAME + 33)])
            event = text[_EVENT:-_TAIL]
            if (
                chain is not None
                and text.startswith(chain.next)
                and not _SPECIAL_OP(text, len(chain.next))
                and same(b',"sig":"%b"}' % (sig := b2a_base64(mac(key, event), newline=False)), text[-_TAIL:])
            ):
                chain.follow(chain.seq + 1, sig, event)
            else:
                self.line = line
                self.look(text, True, bool(RECORD.fullmatch(text)), block)
        self.line = line

    def look(self, line: bytes, ended: bool, shaped: bool, block: bytes) -> None:
        """The slow way: a line of any kind. `shaped`: it looks like one record."""
        if len(line) > LONGEST:
            self._fault(f"a line of {len(line)} bytes is no audit record")
        found = list(pieces(line, self.key))
        records = sum(record is not None for _, record in found)
        self.spare += ended - records
        if not found and self._blank is None:
            self._blank = (self.file, self.line)
        if shaped and not records:
            self._fault(self._unsigned(block))
        for number, (piece, record) in enumerate(found, 1):
            if record is None:
                self._in_place(piece)
            else:
                self._accept(record, number == 1)
            if record is None or number < len(found) or not ended:
                self.loose.append(Loose(piece, record is not None, self.file, self.line))
                self.spare += record is not None  # a repair will end it

    def end_of_file(self, rest: bytes) -> None:
        """`rest`: what stands after the last line end."""
        if rest:
            self.line += 1
            self.look(rest, False, bool(RECORD.fullmatch(rest)), rest)

    # -- one record

    def _accept(self, record: re.Match[bytes], first: bool) -> None:
        event, name, digits, prev, op, sig = record.groups()
        seq = int(digits)
        chain = self.chains.get(name)
        if chain is None:
            chain = self.chains[name] = self._begin(name, seq, prev)
        else:
            self._continues(name, chain, seq, prev)
        if op in SPECIAL:
            self._special(op, parse(record[0]), first)
        chain.follow(seq, sig, event)
        for expected in chain.watch.pop(seq, ()):
            if not b64decode(sig).startswith(expected.digest):
                self._fault(f"line {seq} of chain {name.decode()} is not the one that {expected.who} names")

    def _begin(self, name: bytes, seq: int, prev: bytes) -> Chain:
        if (seq == 1) != (prev == b"") or (seq != 1 and not self.partial):
            self._fault(
                f"chain {name.decode()} begins at its line {seq}: earlier log files were not given, "
                "or the lines before it were removed"
            )
        return Chain(name, seq, self.watch.setdefault(name, {}))

    def _continues(self, name: bytes, chain: Chain, seq: int, prev: bytes) -> None:
        if seq > chain.seq + 1:
            missing = f"line {seq - 1}" if seq == chain.seq + 2 else f"lines {chain.seq + 1} to {seq - 1}"
            self._fault(f"{missing} of chain {name.decode()} should stand before this one: deleted or moved")
        if seq <= chain.seq:
            self._fault(
                f"line {seq} of chain {name.decode()} stands after line {chain.seq}: repeated or moved"
            )
        if prev != chain.sig:
            self._fault(f"line {seq} of chain {name.decode()} does not continue the line before it")

    def _special(self, op: bytes, event: dict[str, Any], first: bool) -> None:
        try:
            if op == b"start":
                for name, (seq, sig) in event.get("previous", {}).items():
                    self._left(name, seq, sig)
            elif op == b"shred" and event["outcome"] == "ok":
                self._report.shredded[event["key_id"]] = event["ts"]
            elif op == b"audit_recovered":
                self._recovered(event["torn"], event["ends"], first)
        except (KeyError, TypeError, ValueError, AttributeError):
            self._fault(f"this {op.decode()} event is signed, but not in a form that this version knows")

    def _left(self, name: str, seq: int, sig: str) -> None:
        """A start names the heads that the run before it left."""
        chain = self.chains.get(name.encode())
        if chain is None and (self.partial or not seq):
            return
        if chain is None or chain.seq < seq or (chain.seq == seq and chain.sig != sig.encode()):
            self._fault(
                f"this start follows on line {seq} of chain {name}, which is not in the log: "
                "earlier log files were not given, or lines were removed"
            )

    # -- torn records and their repair

    def _in_place(self, piece: bytes) -> None:
        """A torn record that says so much of itself must be the next of its chain."""
        begun = _BEGUN.match(piece)
        if begun is None:
            return
        chain = self.chains.get(begun[1])
        if chain is None and self.partial:
            return
        seq, sig = (chain.seq, chain.sig) if chain else (0, b"")
        if (int(begun[2]), begun[3]) != (seq + 1, sig):
            self._fault(f"a part of line {int(begun[2])} of chain {begun[1].decode()}, out of its place")

    def _recovered(self, named: list[Torn], ends: int, first: bool) -> None:
        if not first:
            self._fault("a recovery event always begins a line, this one doesn't: a line end was removed")
        self._report.recoveries += 1
        unended = 0
        for size, digest in named:
            claim = (size, digest)
            known = self._claim(claim) or claim in self._named
            if not known and self._ended_for(claim):
                unended += 1
            elif not known and self.partial and self._files == 1:
                self._blind = True  # the torn record stands in a file that was not given
            elif not known:
                self._fault(f"no torn record of {size} bytes is in the log, as this recovery event says")
            self._named.add(claim)
        self.spare += unended - ends

    def _claim(self, claim: Torn) -> bool:
        """Take the torn record that is named out of what is loose."""
        left = next(ways(self.loose, claim), None)
        self.loose = self.loose if left is None else left
        return left is not None

    def _ended_for(self, claim: Torn) -> bool:
        """Is it a whole record, of which only the line end was missing, and a repair wrote that?"""
        return any(torn(b'{"event":%b,"sig":"%b"}' % (c.event, c.sig)) == claim for c in self.chains.values())

    # -- the end

    def finish(self) -> None:
        if self.loose:
            self._fault("the log ends before that")
        for name, watch in self.watch.items():
            for seq in sorted(watch):
                self._unmet(name, seq, watch[seq])
        if self.spare and not self._blind:
            if self.spare > 0 and self._blank:
                self.file, self.line = self._blank
                self._fault("a blank line that no recovery event accounts for")
            self._fault("line ends are missing that a recovery event names")
        self._report.lines += self.line
        self._report.chains = {name.decode(): (c.first, c.seq) for name, c in self.chains.items()}

    def _unmet(self, name: bytes, seq: int, expected: Sequence[Expected]) -> None:
        chain = self.chains.get(name)
        if self.partial and (chain is None or seq < chain.first):
            self._report.unchecked += len(expected)
        elif chain is None:
            self._fault(f"chain {name.decode()} is missing whole: {expected[0].who} names its line {seq}")
        else:
            self._fault(
                f"chain {name.decode()} ends with line {chain.seq}, but {expected[0].who} names "
                f"its line {seq}: the end was cut off"
            )

    def _fault(self, what: str) -> NoReturn:
        """Whatever is loose comes first in the log, and is the likely cause of what was noticed later."""
        if not self.loose:
            raise Found(Fault(self.file, self.line, what))
        loose = self.loose[0]
        is_what = (
            "a record runs on without a line end"
            if loose.whole
            else f"{len(loose.data)} bytes that are no audit record"
        )
        raise Found(
            Fault(
                loose.file,
                loose.line,
                f"{is_what}; no recovery event accounts for it (at {self.file}:{self.line}: {what})",
            )
        )

    def _unsigned(self, block: bytes) -> str:
        """Why does a signature not fit? Where nothing fits at all, it is the key."""
        if self.chains:
            return "the signature does not fit: the line was edited"
        others = list(islice(RECORD.finditer(block), 33))
        if len(others) > 1 and not any(genuine(self.key, record) for record in others):
            return "no signature fits: the audit key is not the one that wrote this log"
        return "the signature does not fit: the line was edited, or the audit key is another"


def ways(loose: Sequence[Loose], claim: Torn) -> Iterator[list[Loose]]:
    """What is left loose without the piece that is named, by each place where it may have stood; first those
    that are this piece and nothing else: the end of a longer one may look like a short one."""
    for index, one in sorted(enumerate(loose), key=lambda place: len(place[1].data) != claim[0]):
        for rest in _without(one.data, claim) if not one.whole or len(one.data) == claim[0] else ():
            yield [*loose[:index], *(one._replace(data=data) for data in rest), *loose[index + 1 :]]


def _without(run: bytes, named: Torn) -> Iterator[list[bytes]]:
    """What is left of torn bytes when the named piece is taken out.

    Several processes may have left theirs side by side, and each piece begins as a record does.
    """
    size = named[0]
    for at in range(len(run) - size + 1):
        left, piece, right = run[:at], run[at : at + size], run[at + size :]
        fits = (not left or _begins(piece)) and _begins(right)
        if fits and torn(piece) == named:
            yield [part for part in (left, right) if part]


def _begins(run: bytes) -> bool:
    """Nothing, or torn records side by side: beginnings of MARK, the last perhaps with all of it."""
    reached = {0}
    for at in range(len(run)):
        if at > max(reached):
            return False
        if at in reached and run.startswith(MARK, at):
            return True
        if at in reached:
            reached |= {at + size for size in range(1, len(MARK)) if run.startswith(MARK[:size], at)}
    return len(run) in reached
