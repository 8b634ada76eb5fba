"""The machine that holds the lines of an audit log against each other: bytes in, the first fault out.

A line that begins as the next of its chain must, and is signed, costs one HMAC and is looked into no
further: who can sign is who writes them. Everything else goes the slow way, `look`, and ends there as a
fault, or as one of the few things that an honest log may hold: see `loose`. What is loose at the end is a
fault.

The daemon does not verify its log: no process of it loads this.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, NoReturn

from ..crypto.aead import mac, same
from ..encoding import b64decode
from .log import MARK, RECORD, Torn, genuine, parse
from .loose import Account

_NAME, _EVENT, _TAIL = len(MARK), len(b'{"event":'), len(b',"sig":""}') + 44
"""Where in a line the chain's name begins, where its event does, and how far from the end that ends."""
_BEGUN = re.compile(rb'\{"event":\{"chain":"([0-9.]{3,32})","seq":([0-9]{1,19}),"prev":"([A-Za-z0-9+/=]*)",')
SPECIAL = frozenset((b"start", b"shred", b"audit_recovered"))
_SPECIAL_OP = re.compile(rb'"ts":"[^"]*","op":"(?:%b)"' % b"|".join(SPECIAL)).match

AT_THE_END = "the log ends before that"
"""Of what is loose: as a killed process, or a full disk, leaves it until the next start."""


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


class Verifier(Account):
    def __init__(self, key: memoryview, watch: dict[bytes, Watch], partial: bool, report: Report) -> None:
        super().__init__(key)
        self.watch = watch
        self.partial = partial
        self._report = report
        self.chains: dict[bytes, Chain] = {}
        self._blank: tuple[str, int] | None = None  # the first blank line
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
        found = self.split(line)
        if not found and self._blank is None:
            self._blank = (self.file, self.line)
        if shaped and all(record is None for _, record in found):
            self.fault(self._unsigned(block))
        self.enter(found, ended)

    def end_of_file(self, rest: bytes) -> None:
        """`rest`: what stands after the last line end."""
        if rest:
            self.line += 1
            self.look(rest, False, bool(RECORD.fullmatch(rest)), rest)

    # -- one record

    def accept(self, record: re.Match[bytes], first: bool) -> None:
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
                self.fault(f"line {seq} of chain {name.decode()} is not the one that {expected.who} names")

    def _begin(self, name: bytes, seq: int, prev: bytes) -> Chain:
        if (seq == 1) != (prev == b"") or (seq != 1 and not self.partial):
            self.fault(
                f"chain {name.decode()} begins at its line {seq}: earlier log files were not given, "
                "or the lines before it were removed"
            )
        return Chain(name, seq, self.watch.setdefault(name, {}))

    def _continues(self, name: bytes, chain: Chain, seq: int, prev: bytes) -> None:
        if seq > chain.seq + 1:
            missing = f"line {seq - 1}" if seq == chain.seq + 2 else f"lines {chain.seq + 1} to {seq - 1}"
            self.fault(f"{missing} of chain {name.decode()} should stand before this one: deleted or moved")
        if seq <= chain.seq:
            self.fault(
                f"line {seq} of chain {name.decode()} stands after line {chain.seq}: repeated or moved"
            )
        if prev != chain.sig:
            self.fault(f"line {seq} of chain {name.decode()} does not continue the line before it")

    def _special(self, op: bytes, event: dict[str, Any], first: bool) -> None:
        try:
            if op == b"start":
                for name, (seq, sig) in event.get("previous", {}).items():
                    self._left(name, seq, sig)
            elif op == b"shred" and event["outcome"] == "ok":
                self._report.shredded[event["key_id"]] = event["ts"]
            elif op == b"audit_recovered":
                if not first:
                    self.fault(
                        "a recovery event always begins a line, this one doesn't: a line end was removed"
                    )
                self._report.recoveries += 1
                self.recovered(event["torn"], event["ends"])
        except (KeyError, TypeError, ValueError, AttributeError):
            self.fault(f"this {op.decode()} event is signed, but not in a form that this version knows")

    def _left(self, name: str, seq: int, sig: str) -> None:
        """A start names the heads that the run before it left."""
        chain = self.chains.get(name.encode())
        if chain is None and (self.partial or not seq):
            return
        if chain is None or chain.seq < seq or (chain.seq == seq and chain.sig != sig.encode()):
            self.fault(
                f"this start follows on line {seq} of chain {name}, which is not in the log: "
                "earlier log files were not given, or lines were removed"
            )

    # -- torn records and their repair

    def remains(self, piece: bytes) -> None:
        """A torn record that says so much of itself must be the next of its chain."""
        begun = _BEGUN.match(piece)
        if begun is None:
            return
        chain = self.chains.get(begun[1])
        if chain is None and self.partial:
            return
        seq, sig = (chain.seq, chain.sig) if chain else (0, b"")
        if (int(begun[2]), begun[3]) != (seq + 1, sig):
            self.fault(f"a part of line {int(begun[2])} of chain {begun[1].decode()}, out of its place")

    def unknown(self, claim: Torn) -> None:
        if not self.partial or self._files != 1:
            self.fault(f"no torn record of {claim[0]} bytes is in the log, as this recovery event says")
        self._blind = True  # the torn record stands in a file that was not given

    def lasts(self) -> Iterator[bytes]:
        return (b'{"event":%b,"sig":"%b"}' % (c.event, c.sig) for c in self.chains.values())

    # -- the end

    def finish(self) -> None:
        if self.loose:
            self.fault(AT_THE_END)
        for name, watch in self.watch.items():
            for seq in sorted(watch):
                self._unmet(name, seq, watch[seq])
        if self.spare and not self._blind:
            if self.spare > 0 and self._blank:
                self.file, self.line = self._blank
                self.fault("a blank line that no recovery event accounts for")
            self.fault("line ends are missing that a recovery event names")
        self._report.lines += self.line
        self._report.chains = {name.decode(): (c.first, c.seq) for name, c in self.chains.items()}

    def _unmet(self, name: bytes, seq: int, expected: Sequence[Expected]) -> None:
        chain = self.chains.get(name)
        if self.partial and (chain is None or seq < chain.first):
            self._report.unchecked += len(expected)
        elif chain is None:
            self.fault(f"chain {name.decode()} is missing whole: {expected[0].who} names its line {seq}")
        else:
            self.fault(
                f"chain {name.decode()} ends with line {chain.seq}, but {expected[0].who} names "
                f"its line {seq}: the end was cut off"
            )

    def fault(self, what: str) -> NoReturn:
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
