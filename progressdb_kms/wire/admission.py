"""Who gets how much of what all connections share: connections, bodies, words in the audit log.

Each sum over the workers is a slot a worker in the shared block of counters, which that worker alone writes.
Two workers that look at the same moment may both say yes: a limit is passed by a connection or a buffer then,
never by more, and nobody waits for a lock.
"""

from __future__ import annotations

import threading
import time
from typing import Callable, NamedTuple, Union

from ..audit.log import AuditLog, Fragment, fragment, peer_fragment
from ..errors import KMSError, Overloaded
from ..rules import Peer
from ..service.metrics import SECONDS, Block, Metrics

BODIES = 3
"""Bodies of full length that all workers together may hold at a time; more is 503. Of these one UID may have
three quarters while another is here: two bodies."""

NAMED = 64
"""Refused UIDs that a worker's audit chain names; the others are one number."""

EACH = 60.0
"""Seconds between two records of how often a UID was refused."""


SPARE_FILES = 64
"""Descriptors that a worker needs beside its connections: store, log, jobs for the keeper, a reserve."""


class Limits(NamedTuple):
    max_connections: int
    idle_timeout: float
    request_timeout: float
    descriptors: int = 1 << 20
    """that this process may open"""
    cores: int = 1


_Kind = tuple[int, str, int, str, Union[int, None]]
"""Refusals that are counted together: UID, operation, status, code, number of the policy."""

_OTHERS = (-2, "connect", 403, "refused", None)


class Shares:
    """Connections: `max_connections` in all workers. Bodies: bytes of requests and answers that are kept for
    a peer, `most` in all. Of either one UID gets three quarters while another is here: is connected, or asked
    for that within the last minute. `freed`: were bodies given back since somebody looked?"""

    def __init__(self, metrics: Metrics, block: Block, limits: Limits, longest: int) -> None:
        """`longest`: bytes of a body of full length."""
        self._metrics = metrics
        self._block = block
        self._limits = limits
        self.most = BODIES * longest
        self.freed = False

    def refusal(self, uid: int) -> str:
        """Why this UID gets no connection now; empty where it gets one."""
        held, most = sum(self._metrics.gauge("connections")), self._limits.max_connections
        if held >= most or self._block.get("connections") >= self._limits.descriptors - SPARE_FILES:
            self.leave(self.enter(uid))  # from now on it is here
            return "too many connections"
        if held >= most * 3 // 4 and self.crowds(uid, 1):
            return f"uid {uid} has three quarters of all connections, and others need some"
        return ""

    def crowds(self, uid: int, more: int, what: str = "connections") -> bool:
        """With so much more, has this UID over three quarters, while another one is here?"""
        most = self._limits.max_connections if what == "connections" else self.most
        rows, since = list(self._metrics.holdings()), int(time.monotonic()) - SECONDS
        if sum(getattr(row, what) for row in rows if row.uid == uid) + more <= most * 3 // 4:
            return False
        return any(row.uid != uid and (row.connections or row.last >= since) for row in rows)

    def enter(self, uid: int) -> int:
        self._block.add("connections", 1)
        return self._block.connected(uid, int(time.monotonic()))

    def leave(self, row: int) -> None:
        self._block.add("connections", -1)
        self._block.disconnected(row)

    def others_have_fewer(self) -> bool:
        """Connections, by a quarter and more, in some other worker."""
        *workers, _ = self._metrics.gauge("connections")  # the last is the keeper's
        least = min(workers)
        return self._block.get("connections") > least + least // 4

    def take(self, size: int, uid: int, row: int) -> None:
        """Bytes of bodies. Raises Overloaded."""
        held = sum(self._metrics.gauge("body_bytes")) + size
        if held > self.most or (held > self.most * 3 // 4 and self.crowds(uid, size, "body_bytes")):
            raise Overloaded("too many long messages at once", hint="try again; max_body_bytes bounds them")
        self._block.hold(row, size)

    def give_back(self, size: int, row: int) -> None:
        self._block.hold(row, -size)
        self.freed = True


class Refusals:
    """Peers that are not served at all, or not with what they ask for by a policy, for the audit log: the
    first of each kind at once, then how many in a minute. Who asks without end writes a line a minute."""

    def __init__(self, audit: AuditLog, counters: Block, clock: Callable[[], float] = time.monotonic) -> None:
        self._audit = audit
        self._counters = counters
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[_Kind, tuple[Fragment, list[int]]] = {}  # who was the first; how often
        self._next = 0.0

    def add(self, peer: Peer, error: KMSError, op: str = "connect") -> None:
        policy = getattr(error, "entry", None)
        kind = peer.uid, op, error.status, error.code, policy
        self._counters.add("refused_peers" if policy is None else "policy_denials", 1)
        with self._lock:
            self._next = self._next or self._clock() + EACH
            found = self._kinds.get(kind)
            if found is None and len(self._kinds) < NAMED:
                found = self._kinds[kind] = peer_fragment(*peer), [0]
                if self._record(kind, found[0], 1):
                    return
            if found is None:
                found = self._kinds.setdefault(_OTHERS, (Fragment(',"actor":"others"'), [0]))
            found[1][0] += 1

    def flush(self, everything: bool = False) -> None:
        """Record the counts, once a minute or at the end. Who was not refused in that time is forgotten, so
        that others can be named."""
        if not self._next or (self._clock() < self._next and not everything):
            return
        with self._lock:
            for kind, (who, count) in list(self._kinds.items()):
                if not count[0]:
                    del self._kinds[kind]
                elif self._record(kind, who, count[0]):
                    count[0] = 0
            self._next = self._clock() + EACH if self._kinds else 0.0

    def _record(self, kind: _Kind, who: Fragment, count: int) -> bool:
        """False: the log can't be written now, and the count waits."""
        _, op, status, code, policy = kind
        try:
            self._audit.record(op, "refused", status, who, fragment(code=code, policy=policy, count=count))
        except KMSError:
            return False
        return True
