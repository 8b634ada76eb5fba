"""One connection: what it is at, and what it holds.

refused ──answered──▶ lingering ──▶ closed       who connects is judged at accept
idle ─▶ head ─▶ body ─▶ busy ─▶ answering ─▶ idle
  │       └──────┴──────┴── a fault, or the last: answered ──▶ lingering
  └─ ahead: more requests are here than one turn serves
"""

from __future__ import annotations

import select
import socket

from ..audit.log import Fragment
from ..rules import Peer, Rights
from .http1 import Reader

IDLE, HEAD, BODY, AHEAD, BUSY, ANSWERING, LINGERING, REFUSED, CLOSED = range(9)

MORE, NEXT, AWAY = range(3)
"""After a step: the request is not whole; it was answered; the connection is not the waiter's any more."""

IN, OUT = select.POLLIN, select.POLLOUT  # the same numbers as EPOLLIN and EPOLLOUT


class Connection:
    """Most of it is empty while it is idle."""

    def __init__(self, request: socket.socket, peer: Peer, fragment: Fragment) -> None:
        self.request = request
        self.peer = peer
        self.fragment = fragment
        self.phase = IDLE
        self.deadline = 0.0
        self.poll: select.epoll  # the set in which it lies: the waiter's, or that of the long ones
        self.answered = False  # a request of it, with good grace: it stays
        self.turn = 0  # in which something was done for it
        self.row = -1  # of the table of shares
        self.rights: Rights | None = None  # what policies leave this peer, since `round` of them
        self.round = -1
        self.reader: Reader | None = None  # of a request that is not whole
        self.kept: memoryview | None = None  # bytes that were received and not used yet
        self.kept_piece: memoryview | None = None  # the spare piece in which they lie
        self.body_piece: memoryview | None = None  # the one of a secret body
        self.behind = False  # is more here behind the request?
        self.reserved = 0  # bytes of the budget
        self.pending: list[memoryview] = []  # of an answer
        self.keep = True
