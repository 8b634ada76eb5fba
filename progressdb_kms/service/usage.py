"""How often each DEK was used, when, and by whom; how often each KEK wrapped: what a worker has seen and not
handed over yet.

A use is one name at the end of a list: no lock, no system call, no clock, nothing that the caches hold no
more. Twice a second the worker's main loop takes the lists' beginnings off and has C count them: a use costs
0.5 us, where a row that each counts in cost 2.2 over 20,000 DEKs at random.

What was counted waits, the oldest first, and goes to the keeper with the head of the audit chain, which goes
then anyway: the same job, the same transaction, no flush of the disk of its own; ROWS at most, over all
workers. A batch is handed over again, under the same number, until the keeper has answered: a keeper counts
none twice. One that takes the place of another, which died before its answer, may: that is too many, never
too few. While MOST wait, uses of further DEKs are lost, but for those with BUSY of them in a beat.

AES-GCM with random nonces is safe for 2**32 messages under one key (NIST SP 800-38D, 8.3): then the odds of a
nonce that came twice pass 2**-32. Such a DEK is `spent`: it decrypts, and encrypts no more. A KEK wraps
with random nonces too, under itself and no key derived from it, so that the same bound holds for it; its
wraps are counted like a DEK's encrypts, in a row of its name. Creates, rewraps and rotations are counted by
the store as it writes them; what `/wrap` makes comes from here. Not counted: our own two keys, two wraps a
rotation, and what ProgressDB's embedded mode sealed before the KEK was ours.

**What a kill -9 takes.** Of one key, a worker holds what it saw since the last beat, and what waits or is on
its way: below SOON of it, else it goes ahead of all others, and so does each use of a heavy key. With a beat
of half a second, another for the answer, and the 5 s that a job may take, at 300,000 encrypts a second (pages
of 1,000 short items; single calls reach a tenth of that), that is SOON + 6 s * 300,000 = 1.83 million: LOST.
So much is added to each heavy key for each worker that didn't stop in order. Only where the keeper can't
write, which /readyz tells, more may wait.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..encoding import timestamp
from ..errors import Conflict
from ..store.contract import KEK_ROW, DekRecord, Usage
from ..store.policy import SHREDDED

SPENT = 2**32
"""Encrypts under one DEK, and wraps under one KEK, at which it takes no more."""

LOST = 1 << 21
"""Encrypts under one DEK that a worker may not have handed over when it died; see the module."""

SOON = 1 << 15
"""Encrypts under one DEK that wait: it goes ahead of others. A second has few of such."""

ROWS = 150
"""Rows of a beat, over all workers: 300 a second, each some 20 us of the keeper's. With the longest names
they are 28 kB, and fit one job."""

LEAST = 10
"""Rows of a beat and worker, however many these are."""

MOST = 100_000
"""Keys that wait: some 25 MB, and two seconds of the keeper's at a stop."""

BUSY = 16
"""Uses in a beat, for which a key that doesn't wait yet takes the place of the newest that does."""

USING = "uses:"
"""Before a worker's chain: the name of a row that stands while the worker may have uses to hand over."""

NOBODY = -1
"""In the place of a UID that isn't known."""

ENCRYPTED, DECRYPTED, TOUCHED = range(3)
"""Kinds of uses, and their places in Seen."""

Seen = tuple[list[str], list[str], list[str]]
"""The names of what one UID encrypted under, decrypted under and used otherwise, in order. Any thread
appends, the main loop takes off what was there when it came: neither step can be seen half done."""


class Uses:
    """Of one worker. `add` and `check` may be called by any thread, the rest by its main loop alone."""

    def __init__(self, chain: str, heavy: Mapping[str, int], workers: int = 1) -> None:
        """`chain` tells this worker's batches from those of others. `heavy`: as the store knows them."""
        self._seen: dict[int, Seen] = {}
        self.chain = chain
        self._rows = max(LEAST, ROWS // workers)
        self._first: dict[str, int] = {}  # of all that wait, the oldest first: seconds since 1970
        self._last: dict[str, tuple[int, int]] = {}  # the same and the UID
        self._encrypts: Counter[str] = Counter()
        self._decrypts: Counter[str] = Counter()
        self._soon: dict[str, None] = {}
        self._sent: list[tuple[Any, ...]] = []
        self._number = 0
        self._learn(heavy)

    def add(self, kind: int, names: Iterable[str], uid: int) -> None:
        """Each name as often as it was used so."""
        seen = self._seen.get(uid) or self._seen.setdefault(uid, ([], [], []))
        seen[kind].extend(names)

    def check(self, name: str) -> None:
        """Raises Conflict for a DEK that may encrypt no more, or a KEK that may wrap no more."""
        if name in self.spent:
            raise refusal(name)

    def batch(self, now: float) -> dict[str, Any] | None:
        """What to hand over; None where there is nothing."""
        for uid, seen in list(self._seen.items()):
            for names, counter in zip(seen, (self._encrypts, self._decrypts, Counter[str]())):
                some = names[:]
                del names[: len(some)]
                self._wait(some, counter, (int(now), uid))
        if not self._sent and self._first:
            self._sent = [self._row(name) for name in self._next()]
            self._number += 1
        return {"chain": self.chain, "number": self._number, "rows": self._sent} if self._sent else None

    def _wait(self, names: list[str], counter: Counter[str], stamp: tuple[int, int]) -> None:
        fresh = dict.fromkeys(names, stamp)
        if len(self._first) + len(fresh) > MOST:
            fresh = self._fitting(fresh, names)
            names = list(filter(fresh.__contains__, names))
        counter.update(names)
        deque(map(self._first.setdefault, fresh, itertools.repeat(stamp[0])), 0)
        self._last.update(fresh)
        if counter is self._encrypts:
            early = [name for name in fresh if counter[name] >= SOON]
            self._soon.update(dict.fromkeys([*early, *(self._heavy.keys() & fresh.keys())]))

    def _fitting(self, fresh: dict[str, tuple[int, int]], names: list[str]) -> dict[str, tuple[int, int]]:
        others = [name for name in fresh if name not in self._first]
        lost = set(others[max(0, MOST - len(self._first)) :])
        if len(names) - len(fresh) >= BUSY - 1:  # else none can be busy
            often = Counter(names)
            busy = {name for name in lost if often[name] >= BUSY}
            for _ in busy:
                self._row(next(reversed(self._first)))
            lost -= busy
        return {name: stamp for name, stamp in fresh.items() if name not in lost}

    def _next(self) -> list[str]:
        ahead = list(itertools.islice(self._soon, self._rows))
        others = (name for name in self._first if name not in self._soon)
        return ahead + list(itertools.islice(others, self._rows - len(ahead)))

    def _row(self, name: str) -> tuple[Any, ...]:
        """Of one key that waits, which it does no more."""
        self._soon.pop(name, None)
        counts = self._encrypts.pop(name, 0), self._decrypts.pop(name, 0)
        return (name, *counts, self._first.pop(name), *self._last.pop(name))

    def taken(self, heavy: Mapping[str, int]) -> None:
        """The last batch is counted."""
        self._sent = []
        self._learn(heavy)

    def _learn(self, heavy: Mapping[str, int]) -> None:
        self._heavy = heavy
        self.spent = frozenset(name for name, count in heavy.items() if count + self._encrypts[name] >= SPENT)


_DEK = "the DEK {} has {:,} encrypts", "decrypts", "key_spent", "make another DEK for its thread"
_KEK = (
    "the KEK {} has wrapped {:,} DEKs",
    "unwraps",
    "kek_spent",
    "rotate it: `progressdb-kms rotate-kek --generate`",
)


def _words(name: str, count: int) -> tuple[str, ...]:
    text, *more = _KEK if name.startswith(KEK_ROW) else _DEK
    return (text.format(name[len(KEK_ROW) :] if name.startswith(KEK_ROW) else name, count), *more)


def refusal(name: str) -> Conflict:
    text, end, code, todo = _words(name, SPENT)
    return Conflict(f"{text}, as many as one AES-GCM key may: it only {end}", code=code, hint=todo)


def describe_usage(record: DekRecord, usage: Usage | None) -> dict[str, Any]:
    """For the API: `usage` with what applies of it, and nothing of a DEK that is shredded."""
    if record.state == SHREDDED:
        return {}
    usage = usage or Usage()
    result: dict[str, Any] = {"encrypts": usage.encrypts, "decrypts": usage.decrypts}
    if usage.last:
        result.update(first_used_at=timestamp(usage.first), last_used_at=timestamp(usage.last))
        if usage.uid != NOBODY:
            result["last_uid"] = usage.uid
    return {"usage": result}


def near(heavy: Mapping[str, int]) -> list[str]:
    """What the operator should know of keys that are used much, the nearest to the end first."""
    found = []
    for name, count in sorted(heavy.items(), key=lambda item: -item[1]):
        text, end, _, todo = _words(name, count)
        most = f", which is the end: it only {end}" if count >= SPENT else f" of {SPENT:,} that it may have"
        found.append(f"{text}{most}: {todo}")
    return found


def counts(heavy: Mapping[str, int]) -> tuple[int, int]:
    """DEKs that come near to what one may encrypt, and those that are there."""
    deks = [count for name, count in heavy.items() if not name.startswith(KEK_ROW)]
    spent = sum(count >= SPENT for count in deks)
    return len(deks) - spent, spent


def dead(chain: str, running: Sequence[str]) -> list[str]:
    """Of workers that didn't stop in order, by their chains `start.place` or `start.place.number`, those that
    can't be at work beside the one of this chain: of another start, or in its place."""
    start, place = chain.split(".")[:2]
    return [
        name
        for name in running
        if name != chain and (name.split(".")[0] != start or name.split(".")[1:2] == [place])
    ]
