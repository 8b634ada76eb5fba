"""What is known of a peer between two turns of the waiter, and what it waits for."""

from __future__ import annotations

import socket
from typing import Any

from ..audit.log import Fragment
from ..rules import Peer, Rights
from .call import Route
from .http1 import Reader

IDLE, HEAD, BODY, AHEAD, BUSY, ANSWERING, LINGERING, REFUSED, CLOSED = range(9)


class Connection:
    """Most of it is empty while it is idle."""

    __slots__ = (
        "answered", "body_piece", "deadline", "fragment", "keep", "kept", "kept_piece", "peer", "pending",
        "phase", "poll", "reader", "request", "reserved", "rights", "round", "route", "row", "turn",
    )  # fmt: skip

    def __init__(self, request: socket.socket, peer: Peer, fragment: Fragment) -> None:
        self.request = request
        self.peer = peer
        self.fragment = fragment
        self.phase = IDLE
        self.poll: Any = None  # the set in which it lies: the waiter's, or that of the long ones
        self.deadline = 0.0
        self.answered = False  # a request of it, with good grace: it stays
        self.turn = 0  # in which something was done for it
        self.row = -1  # of the table of shares
        self.rights: Rights | None = None  # what policies leave this peer, since `round` of them
        self.round = -1
        self.reader: Reader | None = None  # of a request that is not whole
        self.kept: memoryview | None = None  # bytes that were received and not used yet
        self.kept_piece: memoryview | None = None  # the spare piece in which they lie
        self.body_piece: memoryview | None = None  # the one of a secret body
        self.route: Route | None = None
        self.reserved = 0  # bytes of the budget
        self.pending: list[memoryview] = []  # of an answer
        self.keep = True
