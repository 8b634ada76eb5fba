"""Did a fleet keep its word? A pure function over the history of what its callers were told.

A DEK is a register: creates and changes write its state, whatever uses it reads it. Each operation has an
interval, from before it was sent to after its answer had come, by one clock. A fleet keeps its word if all
could have happened one after another, each at a moment within its interval. For a register that is decided
read by read: what was read must have been written by an operation that had begun by then, and after which no
other, that was acknowledged, took place wholly before the read began. So that finds

- an acknowledged DEK that is lost: `absent` is read, though a create was acknowledged before;
- a stale answer: a use that is answered after a disable was, as if it had not been;
- an undead: anything but `shredded` after a shred that was acknowledged;
- a DEK in another's place: what was encrypted under it does not open (`other`).

What is read counts as if it had been written at that moment, since it was there then: so a DEK that was found
disabled by a change which nobody acknowledged may not be found enabled later, unless somebody enabled it.
With an engine that fails over that isn't promised (`seen=False`): it may show a commit that no standby has.

An operation whose outcome nobody was told (503, no answer, a broken connection) may have taken place at any
moment after it was sent, or may yet, or never."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

ABSENT, ENABLED, DISABLED, SHREDDED, OTHER = "absent", "enabled", "disabled", "shredded", "other"

NEVER = float("inf")


class Op(NamedTuple):
    """One call. `state`: what it makes of the DEK, or what its answer shows of it. `known`: was it answered?
    A change that was surely refused is a read of the state that refused it."""

    key_id: str
    sent: float
    answered: float
    state: str
    writes: bool = False
    known: bool = True
    host: str = ""

    @property
    def end(self) -> float:
        """Of the time in which it may take effect."""
        return self.answered if self.known else NEVER

    def __str__(self) -> str:
        what = f"{'makes' if self.writes else 'finds'} {self.key_id} {self.state}"
        return (
            f"{self.host} {what} ({self.sent:.3f} to {self.answered:.3f}{'' if self.known else ', unknown'})"
        )


def check(history: Iterable[Op], seen: bool = True) -> list[str]:
    """What can't have happened if the fleet kept its word."""
    by_key: dict[str, list[Op]] = defaultdict(list)
    for op in history:
        by_key[op.key_id].append(op)
    return [text for ops in by_key.values() for text in Register(ops, seen).violations()]


class Highest:
    """Of operations in an order: the one that is highest in another, among the first of them."""

    def __init__(self, ops: Iterable[Op], at: str, by: str) -> None:
        ordered = sorted(ops, key=lambda op: float(getattr(op, at)))
        self._at = [float(getattr(op, at)) for op in ordered]
        self._best: list[Op] = []
        for op in ordered:
            best = self._best[-1] if self._best else op
            self._best.append(op if getattr(op, by) > getattr(best, by) else best)

    def before(self, moment: float) -> Op | None:
        found = bisect_left(self._at, moment)
        return self._best[found - 1] if found else None

    def until(self, moment: float) -> Op | None:
        found = bisect_right(self._at, moment)
        return self._best[found - 1] if found else None


class Register:
    """One DEK."""

    def __init__(self, ops: Sequence[Op], seen: bool) -> None:
        self._ops = ops
        never = Op(ops[0].key_id, -NEVER, -NEVER, ABSENT, writes=True, host="nobody")
        states = {ABSENT, *(op.state for op in ops)}
        known = [never, *(op for op in ops if op.known and (op.writes or seen))]
        self._others = {
            state: Highest((op for op in known if op.state != state), "answered", "sent") for state in states
        }
        self._writers = {
            state: Highest((op for op in [never, *ops] if op.writes and op.state == state), "sent", "end")
            for state in states
        }
        self._shreds = Highest((op for op in known if op.state == SHREDDED), "answered", "sent")

    def violations(self) -> Iterator[str]:
        for op in self._ops:
            if op.known and (against := self._against(op)) is not None:
                yield f"{op}: but {against}"

    def _against(self, op: Op) -> Op | str | None:
        """What shows that this can't have been so; None where it can."""
        shred = self._shreds.before(op.sent)
        if shred is not None and op.state != SHREDDED:
            return shred
        if op.writes:
            return None
        later = self._others[op.state].before(op.sent)
        writer = self._writers[op.state].until(op.answered)
        if writer is None:
            return "nobody made it that"
        return later if later is not None and writer.end < later.sent else None
