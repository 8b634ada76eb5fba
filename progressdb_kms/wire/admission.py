"""Who gets how much of what all connections share: connections, bodies, words in the audit log.

Each sum over the workers is a slot a worker in the shared block of counters, which that worker alone writes.
Two workers that look at the same moment may both say yes: a limit is passed by a connection or a buffer then,
never by more, and nobody waits for a lock.
"""

from __future__ import annotations

import time
from typing import Callable, Optional

from ..audit.log import AuditLog, Fragment, fragment, peer_fragment
from ..errors import KMSError, Overloaded
from ..rules import Peer
from ..service.metrics import SECONDS, Block, Metrics

BODIES = 3
"""Bodies of full length that all workers together may hold at a time; more is 503."""

NAMED = 64
"""Refused UIDs that a worker's audit chain names; the others are one number."""

EACH = 60.0
"""Seconds between two records of how often a UID was refused."""


class Shares:
    """Connections: `most` in all workers, of which one UID gets three quarters while another is here."""

    def __init__(self, metrics: Metrics, block: Block, most: int, own: int) -> None:
        """`own`: as many as this process has descriptors for."""
        self._metrics = metrics
        self._block = block
        self._most = most
        self._own = own

    def refusal(self, uid: int) -> str:
        """Why this UID gets no connection now; empty where it gets one."""
        held = sum(self._metrics.gauge("connections"))
        if held >= self._most or self._block.get("connections") >= self._own:
            return "too many connections"
        if held < self._most * 3 // 4:
            return ""
        rows = list(self._metrics.holdings())
        mine = sum(row.connections for row in rows if row.uid == uid)
        since = int(time.monotonic()) - SECONDS
        if mine >= self._most * 3 // 4 and any(row.uid != uid and row.last >= since for row in rows):
            return f"uid {uid} has three quarters of all connections, and others need some"
        return ""

    def enter(self, uid: int) -> int:
        self._block.add("connections", 1)
        return self._block.connected(uid, int(time.monotonic()))

    def leave(self, row: int) -> None:
        self._block.add("connections", -1)
        self._block.disconnected(row)


class Bodies:
    """Bytes of requests and answers that are kept for a peer, under one budget for all workers."""

    def __init__(self, metrics: Metrics, block: Block, most: int) -> None:
        self._metrics = metrics
        self._block = block
        self._most = most

    def take(self, size: int) -> None:
        """Raises Overloaded."""
        if sum(self._metrics.gauge("body_bytes")) + size > self._most:
            raise Overloaded("too many long messages at once", hint="try again, or lower max_body_bytes")
        self._block.add("body_bytes", size)

    def give_back(self, size: int) -> None:
        self._block.add("body_bytes", -size)


class Refusals:
    """Peers that are not served at all, for the audit log: the first of each UID at once, then how many in a
    minute. A stranger who connects without end writes a line a minute."""

    def __init__(self, audit: AuditLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._audit = audit
        self._clock = clock
        self._counts: dict[Optional[int], int] = {}
        self._peers: dict[Optional[int], Fragment] = {}
        self._next = 0.0

    def add(self, peer: Peer, error: KMSError) -> None:
        uid: Optional[int] = peer.uid
        if uid not in self._counts:
            if len(self._counts) >= NAMED:
                uid = None
            self._peers[uid] = Fragment(',"actor":"others"') if uid is None else peer_fragment(*peer)
            self._counts.setdefault(uid, 0)
            if uid is not None and self._record(uid, 1, error.code):
                self._next = self._next or self._clock() + EACH
                return
        self._counts[uid] += 1
        self._next = self._next or self._clock() + EACH

    def flush(self, everything: bool = False) -> None:
        """Record the counts, once a minute or at the end."""
        if not self._next or (self._clock() < self._next and not everything):
            return
        self._next = 0.0
        for uid, count in self._counts.items():
            if count and self._record(uid, count, "peer_refused"):
                self._counts[uid] = 0
            elif count:
                self._next = self._clock() + EACH

    def _record(self, uid: Optional[int], count: int, code: str) -> bool:
        """False: the log can't be written now, and the count waits."""
        try:
            self._audit.record("connect", "refused", 403, self._peers[uid], fragment(code=code, count=count))
        except KMSError:
            return False
        return True
