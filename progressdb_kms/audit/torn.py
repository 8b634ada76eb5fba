"""Which torn record is which: the bytes that stand loose in a log against what recovery events name.

A disk that is full cuts a record anywhere, and the processes of a daemon append where another was cut. So a
run of loose bytes is several beginnings of records side by side, and the events that name them, by length and
SHA-256, come later and in any order. Mostly there is one way to take a piece out. But what a record begins
with has its own first bytes in it again (`{"event":{"chain"…`), so that `{"event":{` may be one piece of ten
bytes, or one of nine and one of one. The machine takes the likely one. Where that comes to no end, `solve`
goes through what was read, from the last moment at which nothing was loose, and looks for another.

The start of the daemon has no use for it: what it finds loose it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from .chain import Verifier
from .log import Torn
from .loose import Loose, ways

TRIES = 10_000
"""Steps of a search: an honest log has its way after a few."""


class Named(NamedTuple):
    """A torn record as a recovery event names it. `again`: it was named before, and may be the same piece: a
    keeper that starts may name what a worker names too."""

    claim: Torn
    again: bool


class Thorough(Verifier):
    """Looks for another way before it says that an honest log is none."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._since: list[Loose | Named] = []  # what came since nothing was loose

    def look(self, line: bytes, ended: bool, shaped: bool, block: bytes) -> None:
        super().look(line, ended, shaped, block)
        here = self.file, self.line  # a recovery event begins its line: what is loose of it came after that
        new = takewhile(lambda one: (one.file, one.line) == here, reversed(self.loose))
        self._since += reversed(list(new))

    def claim(self, claim: Torn) -> bool:
        named = Named(claim, claim in self._named)
        if super().claim(claim) or named.again:
            self._since.append(named)
            if not self.loose:
                self._since.clear()
            return True
        return self._solved(named)

    def finish(self) -> None:
        if self.loose:
            self._solved()
        super().finish()

    def _solved(self, *named: Named) -> bool:
        """Was what is loose, or named now, taken for something else? At the end nothing is named."""
        left = solve([*self._since, *named], not named)
        if left is None:
            return False
        self._since += named
        self.loose = left
        return True


def solve(history: Sequence[Loose | Named], finished: bool) -> list[Loose] | None:
    """What is left loose (nothing, where the log is `finished`) by a way in which each name has its piece;
    None where there is none."""
    stack: list[tuple[int, list[Loose]]] = [(0, [])]
    seen = set()
    for _ in range(TRIES):
        if not stack:
            return None
        at, loose = stack.pop()
        if at == len(history):
            if not (finished and loose):
                return loose
            continue
        item = history[at]
        if isinstance(item, Loose):
            stack.append((at + 1, [*loose, item]))
        elif (state := (at, tuple(loose))) not in seen:
            seen.add(state)
            found = [*ways(loose, item.claim), *([loose] if item.again else [])]
            stack.extend((at + 1, way) for way in reversed(found))
    return None
