"""A request on its way through: the row of the table that it met, the call, the reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, NamedTuple

from ..audit.log import Fragment
from ..encoding import Buffer
from ..errors import KMSError
from ..rules import Peer, Rights
from ..service.channel import StagingSlots
from ..service.metrics import Metrics
from ..service.service import Service
from .http1 import Head

JSON = "application/json"
BINARY = "application/octet-stream"
TEXT = "text/plain; charset=utf-8"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

SECRET_BODY = 1024
"""Bytes of a body that carries a key: it lies in locked memory."""

MAX_PAGE = 1000
DEFAULT_PAGE = 100


class Reply:
    """An answer. `secret`: the body lies in locked memory and is wiped once it was sent. `rest` goes
    out behind the body: what was made in pieces is not copied into one, and each goes when it was sent."""

    def __init__(
        self,
        status: int,
        body: bytes | memoryview,
        content_type: str = JSON,
        secret: bool = False,
        extra: str = "",
        close: bool = False,
        rest: Sequence[bytes] = (),
    ) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.secret = secret
        self.receipt = ""
        self.extra = extra
        self.close = close
        self.rest = rest
        self.size = len(body) + sum(map(len, rest))


NOTHING = Fragment("")


class Call:
    """One request on its way through."""

    key = details = NOTHING
    paid = 1  # operations that were counted under a rate before they are done
    denials: frozenset[int] = frozenset()  # entries of `policies` that refused items of a batch

    def __init__(
        self,
        head: Head,
        body: Buffer,
        peer: Peer,
        peer_fragment: Fragment,
        scratch: memoryview,
        answer: memoryview,
        rights: Rights | None = None,
        breathe: Callable[[], None] = lambda: None,
    ) -> None:
        """`scratch` and `answer` are locked memory of the thread: for a DEK in use, and for an answer that
        holds one. `breathe` is to be called every millisecond or so of long work: it lets others in."""
        self.head = head
        self.body = body
        self.peer = peer
        self.peer_fragment = peer_fragment
        self.scratch = scratch
        self.answer = answer
        self.rights = rights
        self.breathe = breathe


class App(NamedTuple):
    """What the routes work with."""

    service: Service
    staging: StagingSlots
    metrics: Metrics
    max_body_bytes: int
    denied: Callable[[Peer, KMSError, str], None] = lambda peer, error, op: None
    """puts on record that a policy refused a call; many such are one record"""
    hosts: frozenset[str] = frozenset()
    """what may stand in Host where the request came over TCP"""


Handler = Callable[[App, Call], Reply]


class Route(NamedTuple):
    """One row of the table. `op`: its name in audit and metrics ('' = not a key operation). It says all that
    is decided before a byte of a body is read: who may (`admin`), how long (`body_limit`), where it lies
    (`secret`)."""

    method: str
    path: str
    op: str
    handler: Handler
    admin: bool = False
    secret: bool = False
    waits: bool = False
    """for the keeper: not to be served by the thread that waits for all connections"""
    long: bool = False
    """reads many rows: long work, whatever its body"""
    slack: int = 0
    """bytes of a body beyond max_body_bytes: what /encrypt took must come back, with nonce and tag"""
    tokens: bool = False
    """a body may be longer by a third: a message that was kept as its JSON token comes as base64 once more"""
    batch: bool = False

    def body_limit(self, app: App) -> int:
        if self.method == "GET":
            return 0
        if self.secret:
            return SECRET_BODY
        return app.max_body_bytes * (4 if self.tokens else 3) // 3 + self.slack
