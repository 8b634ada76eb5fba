"""How often each DEK was used, when, and by whom: what a worker has seen and not handed over yet.

Whoever uses a DEK counts in the DEK's row: no lock, no system call, no clock, no memory taken (a queue of
uses, tried first, cost 5 % of the rate). `next` of a counter is one step of the interpreter, so no thread
loses a count. A row that was used is listed, by its user, behind the count; the worker's main loop takes it
off the list first and reads it then, so that a use between is seen now or listed again.

That happens twice a second, and what was read goes to the keeper with the head of the audit chain, which goes
then anyway: the same job, the same transaction, no flush of the disk of its own. So the numbers in the store
are right over all workers and restarts, a second old while no more than ROWS a beat are used, and what dies
with a process is what it had not handed over: its last second, or what waited.

A batch is handed over again, under the same number, until the keeper has answered: it counts none twice. Who
uses more DEKs at random than ROWS a beat has them wait, up to WAITING of them; past that they are handed over
as they come. While the keeper takes nothing, MOST of them wait: uses of further DEKs are lost then.

AES-GCM with random nonces is safe for 2**32 messages under one key (NIST SP 800-38D, 8.3): then the odds of a
nonce that came twice pass 2**-32. Such a DEK is `spent`: it decrypts, and encrypts no more.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..encoding import timestamp
from ..errors import Conflict
from ..store.contract import DekRecord, Usage
from ..store.policy import SHREDDED

SPENT = 2**32
"""Encrypts under one DEK at which it takes no more."""

LOST = 1 << 15
"""Encrypts of a second, which a worker that died may not have handed over: each that starts adds them to
DEKs that are heavy."""

ROWS = 100
"""DEKs of one job: 17 kB with the longest names; 200 a second and worker, each some 20 us of the keeper's."""

WAITING = 20_000
"""DEKs that wait to be handed over at the most, and rows that are kept for the next use: some 10 MB."""

MOST = 200_000
"""DEKs that wait while they can't be handed over: some 60 MB."""

NOBODY = -1
"""In the place of a UID that isn't known."""


class Row:
    """Uses of one DEK. A counter that is read has counted one more."""

    __slots__ = ("decrypts", "encrypts", "key_id", "listed", "read", "uid")

    def __init__(self, key_id: str) -> None:
        self.key_id = key_id
        self.encrypts, self.decrypts = itertools.count(), itertools.count()
        self.uid = NOBODY
        self.listed = False
        self.read = (0, 0)

    def taken(self) -> tuple[int, int]:
        """Encrypts and decrypts since it was read last."""
        self.listed = False
        before, now = self.read, (next(self.encrypts), next(self.decrypts))
        self.read = now[0] + 1, now[1] + 1
        return now[0] - before[0], now[1] - before[1]


class Uses:
    """Of one worker. `add` may be called by any thread, the rest by its main loop alone."""

    def __init__(self, chain: str, spent: frozenset[str] = frozenset()) -> None:
        """`chain` tells this worker's batches from those of others."""
        self._rows: dict[str, Row] = {}
        self._listed: deque[Row] = deque()
        self.spent = spent
        self._chain = chain
        self._waiting: dict[str, list[int]] = {}
        self._sent: Sequence[Sequence[Any]] = []
        self._number = 0

    def add(self, key_id: str, encrypts: int, decrypts: int, uid: int) -> None:
        row = self._rows.get(key_id) or self._row(key_id)
        if encrypts == 1 and not decrypts:
            next(row.encrypts)
        elif decrypts == 1 and not encrypts:
            next(row.decrypts)
        else:
            deque(itertools.islice(row.encrypts, encrypts), 0)
            deque(itertools.islice(row.decrypts, decrypts), 0)
        row.uid = uid
        if not row.listed:
            row.listed = True
            self._listed.append(row)

    def _row(self, key_id: str) -> Row:
        if len(self._rows) >= WAITING:
            self._rows.clear()  # those that are listed stay so
        return self._rows.setdefault(key_id, Row(key_id))

    def check(self, key_id: str) -> None:
        """Raises Conflict for a DEK that may encrypt no more."""
        if key_id in self.spent:
            raise Conflict(
                f"the key {key_id} has encrypted {SPENT:,} messages, as many as one AES-GCM key may: it "
                "only decrypts from now on",
                code="key_spent",
                hint="make another DEK for its thread, and encrypt under that",
            )

    def batch(self, now: float) -> dict[str, Any] | None:
        """What to hand over; None where there is nothing."""
        waiting, second = self._waiting, int(now)
        for _ in range(len(self._listed)):
            used = self._listed.popleft()
            encrypts, decrypts = used.taken()
            row = waiting.get(used.key_id)
            if row is None and len(waiting) < MOST:
                waiting[used.key_id] = [encrypts, decrypts, second, second, used.uid]
            elif row is not None:
                row[0] += encrypts
                row[1] += decrypts
                row[3:] = second, used.uid
        if not self._sent:
            names = list(itertools.islice(waiting, ROWS))
            self._sent = [(name, *waiting.pop(name)) for name in names]
            self._number += bool(names)
        return {"chain": self._chain, "number": self._number, "rows": self._sent} if self._sent else None

    def taken(self, spent: frozenset[str]) -> bool:
        """The last batch is counted. True: too many wait, or there is no later."""
        self._sent, self.spent = [], spent
        return len(self._waiting) > WAITING

    @property
    def left(self) -> bool:
        return bool(self._waiting or self._sent or self._listed)


def told(record: DekRecord, usage: Usage | None) -> dict[str, Any]:
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


def near(heavy: dict[str, int]) -> list[str]:
    """What the operator should know of DEKs with many encrypts, the nearest to the end first."""
    found = sorted(heavy.items(), key=lambda item: -item[1])
    return [
        f"the DEK {key_id} has {count:,} encrypts"
        + (", which is the end: it only decrypts" if count >= SPENT else f" of {SPENT:,} that it may have")
        + ": make another one for its thread"
        for key_id, count in found
    ]


def spent(heavy: dict[str, int]) -> frozenset[str]:
    return frozenset(key_id for key_id, count in heavy.items() if count >= SPENT)
