"""What workers say of themselves: how far their audit chains are, and what they did under which key. It is
kept in the store; the journal is told of the chains now and then, and of each key that comes near its end.

The heads of the chains ride along in the keeper's transactions, so that a tail that was cut off is noticed.
Only heads that the disk has: else a power cut would leave the store ahead of the log. The journal is no part
of the data-dir: who puts store and log back together is found by its lines.
"""

from __future__ import annotations

import logging
from typing import Any

from ..encoding import b64decode
from ..journal import Chore
from ..store import heads
from ..store.contract import Usage
from .channel import Head
from .common import Common
from .usage import LOST, SPENT, USING, dead, near

log = logging.getLogger(__name__)

SYNC_SECONDS = 0.5
"""How often, at most, the audit log is brought to the disk beside other work, and its end kept."""

WITNESS_SECONDS = 3600.0
"""How often the number of changes and the heads of the audit chains are told to the journal."""


class Anchors:
    """The keeper's. `hello` and `anchor` are jobs."""

    def __init__(self, common: Common) -> None:
        self._store, self._audit, self._effects = common.store, common.audit, common.effects
        self._clock, self._time = common.time.clock, common.time
        self._counted: dict[str, int] = {}  # of each worker, by its chain: the last batch of uses
        self._told: dict[str, bool] = {}  # keys that are used much: is it their end?
        self._heads: dict[str, Head] = {}
        self._syncing = Chore("the audit log can't be brought to the disk")
        self._keeping = Chore("the end of the audit log can't be kept in the store now", (1.0, 60.0))
        self._own = 0  # how far our own chain is kept
        self._synced = -SYNC_SECONDS
        self._next_witness = self._clock.monotonic() + WITNESS_SECONDS

    def hello(self, chain: str) -> dict[str, Any]:
        """A worker introduces its audit chain, and gets to know that the keeper is up."""
        self._audit.note("chain_opened", opened=chain)
        lost = dead(chain, [name[len(USING) :] for name in self._store.names(USING)])
        self._store.count([(name, Usage(LOST * len(lost))) for name in self._store.heavy() if lost])
        for name in lost:
            self._store.erase(USING + name)
        self._store.write(USING + chain, {})
        self._effects.append(self._tell)
        return {}

    def anchor(
        self, uses: dict[str, Any] | None = None, closed: str = "", failing: bool = False
    ) -> dict[str, Any]:
        """The head that came with the job, and uses of keys, each batch once. `closed`: the chain of a worker
        that has none left. `failing`: it can't write records."""
        if failing:
            self._audit.doubt()
        if closed:
            self._store.erase(USING + closed)
        if uses and self._counted.get(uses["chain"]) != uses["number"]:
            self._store.count((key_id, Usage(*counts)) for key_id, *counts in uses["rows"])
            self._effects += [lambda: self._counted.update({uses["chain"]: uses["number"]}), self._tell]
        return {}

    def _tell(self) -> None:
        """Each key that comes near its limit, or is there, is a line of the journal once."""
        for key_id, count in self._store.heavy().items():
            if self._told.get(key_id) != (end := count >= SPENT):
                self._told[key_id] = end
                log.warning("%s", *near({key_id: count}))

    def heard(self, head: Head) -> None:
        """A worker says with a job how far it is."""
        self._heads[head[0]] = head

    def write(self, at_once: bool = False) -> None:
        """In a transaction. For all chains at once, and no more often than that is worth it, except
        `at_once`: a worker that says how far it is must not wait because another said so a moment ago."""
        self._time.save()
        now = self._clock.monotonic()
        if not at_once and now - self._synced < SYNC_SECONDS:
            return
        self.heard(self._audit.head)
        due = list(self._heads.values())
        if not self._syncing.attend(self._audit.sync):
            return
        self._synced = now
        for chain, seq, sig in due:
            if seq:
                heads.anchor(self._store, chain, heads.Head(seq, sig))

    def look(self) -> None:
        """In each round of the keeper: our own records, where no job came along since; and the journal."""
        if self._clock.monotonic() >= self._next_witness:
            self.witness()
        head = self._audit.head
        if head[1] == self._own or self._clock.monotonic() - self._synced < SYNC_SECONDS:
            return
        if self._keeping.over():
            self._keeping.attend(lambda: self._keep(head[1]))

    def _keep(self, seq: int) -> None:
        before = self._synced
        with self._store.transaction():
            self.write(at_once=True)
        if self._synced != before:  # else the log could not be synced
            self._own = seq

    def witness(self) -> None:
        """Each head is written like a receipt: `audit verify --receipts` takes it."""
        self._next_witness = self._clock.monotonic() + WITNESS_SECONDS
        own = self._audit.head
        known = [*(head for name, head in self._heads.items() if name != own[0]), own]
        told = [f"{chain}:{seq}:{b64decode(sig)[:8].hex()}" for chain, seq, sig in known if seq]
        log.info("witness: change %d of the store, audit %s", self._store.state().change, " ".join(told))

    def close(self) -> None:
        """The last transaction holds the last heads."""
        self._keep(self._audit.head[1])
        self.witness()
