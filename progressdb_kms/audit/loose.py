"""What stands loose in a log, and what recovery events say of it: as a start reads it, and who verifies.

An honest log may hold more than one record a line:

- a torn record: bytes that a recovery event, further on, names by length and SHA-256. Until then they are
  "loose"; what is loose at the end nobody has named yet.
- several pieces in one line, because another process appended straight after the torn part. The records
  among them are records; one that has lost its line end is loose like a torn one.
- blank lines, as many as recovery events account for: each line end belongs to a record or to a repair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

from .log import MARK, Torn, pieces, torn

LONGEST = 1 << 20
"""Bytes of the longest line that is looked into; a record has 300 to 2,000."""

Pieces = list["tuple[bytes, re.Match[bytes] | None]"]
"""Of a line: see `log.pieces`."""


class Loose(NamedTuple):
    """Bytes that a recovery event must account for."""

    data: bytes
    whole: bool  # a record without its line end
    file: str
    line: int


class Account:
    """Of the lines of a log, one after another. Who derives from it says what a record must be otherwise."""

    def __init__(self, key: memoryview) -> None:
        self.key = key
        self.file, self.line = "", 0
        self.loose: list[Loose] = []
        self.spare = 0  # line ends beyond those of records and named repairs: must come out as 0
        self._named: set[Torn] = set()  # a keeper that starts may name what a worker names too

    def split(self, line: bytes) -> Pieces:
        if len(line) > LONGEST:
            self.fault(f"a line of {len(line)} bytes is no audit record")
        return list(pieces(line, self.key))

    def enter(self, found: Pieces, ended: bool) -> None:
        """The pieces of a line, in their order; `ended`: it has its line end."""
        self.spare += ended - sum(record is not None for _, record in found)
        for number, (piece, record) in enumerate(found, 1):
            if record is None:
                self.remains(piece)
            else:
                self.accept(record, number == 1)
            if record is None or number < len(found) or not ended:
                self.loose.append(Loose(piece, record is not None, self.file, self.line))
                self.spare += record is not None  # a repair will end it

    def recovered(self, named: Iterable[Torn], ends: int) -> None:
        """A recovery event names these, and tells how many line ends repairs wrote."""
        for size, digest in named:
            claim = (size, digest)
            if not self.claim(claim) and claim not in self._named:
                if any(torn(record) == claim for record in self.lasts()):
                    self.spare += 1  # only its line end was missing, and a repair wrote that
                else:
                    self.unknown(claim)
            self._named.add(claim)
        self.spare -= ends

    def claim(self, claim: Torn) -> bool:
        """Take the torn record that is named out of what is loose."""
        left = next(ways(self.loose, claim), None)
        self.loose = self.loose if left is None else left
        return left is not None

    # -- what else is looked at

    def accept(self, record: re.Match[bytes], first: bool) -> None:
        """A record that is signed. `first`: its line begins with it."""

    def remains(self, piece: bytes) -> None:
        """What is none."""

    def unknown(self, claim: Torn) -> None:
        """A recovery event names what isn't there."""

    def lasts(self) -> Iterable[bytes]:
        """The last record of each chain."""
        return ()

    def fault(self, what: str) -> NoReturn:
        raise ValueError(what)


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
