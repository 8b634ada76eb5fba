"""Answers on their way out.

A short answer waits for the others of its turn: each that was sent alone would wake its peer, which takes
the core. What holds a key, is long, or is the last goes at once; what the peer's buffer doesn't take is kept
under the budget of bodies until that has room, or its time is over. Behind the last the connection lingers.
"""

from __future__ import annotations

import socket
from contextlib import suppress

from ..errors import Overloaded
from .answers import last_words, render
from .call import Reply
from .connection import ANSWERING, AWAY, BODY, IDLE, IN, LINGERING, NEXT, OUT, Connection
from .connections import Connections
from .http1 import Head
from .slab import ANSWER, ZEROS, Slab

TOGETHER = 16
"""Answers that are sent together: the first of them waits half a millisecond."""

LARGE = 64 * 1024
"""Bytes of an answer from which on head and body are not joined before they are sent."""

PIECES = 1024
"""That a system call takes (IOV_MAX)."""

_CONTINUE = memoryview(b"HTTP/1.1 100 Continue\r\n\r\n")


def send_parts(sock: socket.socket, parts: list[memoryview]) -> list[memoryview]:
    """Send without joining; what is left. A socket that blocks for a moment would do so for each piece that
    a slow peer takes."""
    try:
        sent = sock.sendmsg(parts[:PIECES], (), socket.MSG_DONTWAIT)
    except BlockingIOError:
        return parts
    left = []
    for part in parts:
        if sent < len(part):
            left.append(part[sent:])
        sent = max(0, sent - len(part))
    return left


def _more_lies_in(sock: socket.socket) -> bool:
    with suppress(OSError):  # nothing is there, or nobody; a first byte is no secret
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    return False


class Sender:
    """One worker's. The waiter's thread alone may call what isn't marked. `draining`: all connections end."""

    def __init__(self, connections: Connections, slab: Slab) -> None:
        self._connections = connections
        self._slab = slab
        self.draining = False
        self.out: list[tuple[Connection, bytes]] = []

    def answer(self, connection: Connection, head: Head, reply: Reply) -> int:
        """At the end of the turn, or at once. NEXT: the next request may come; or AWAY."""
        last = reply.close or self.draining or not head.keep_alive
        held = connection.reserved or connection.body_piece is not None
        if last or held or connection.behind or reply.secret or reply.size > LARGE or head.method == "HEAD":
            return self.answer_now(connection, head, reply)
        self.out.append((connection, render(reply, True, head.version, reply.body, *reply.rest)))
        if len(self.out) >= TOGETHER:
            self.flush()
        return NEXT if connection.phase == IDLE else AWAY

    def flush(self) -> None:
        """Send what was kept for that, at most one a connection, with nothing behind it."""
        out, self.out = self.out, []
        for connection, whole in out:
            try:
                sent = connection.request.send(whole)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._connections.close(connection)
                continue
            if sent < len(whole):
                connection.pending = [memoryview(whole)[sent:]]
                self._later(connection)

    def answer_now(self, connection: Connection, head: Head, reply: Reply) -> int:
        self.send(connection, head, reply)
        if reply.secret:
            self._slab.waiter[1][:] = ZEROS[:ANSWER]
        return self.sent(connection)

    def send(self, connection: Connection, head: Head, reply: Reply) -> None:
        """As much as the peer's buffer takes. Any thread may call this for a connection that it was lent."""
        sock, keep = connection.request, head.keep_alive and not reply.close
        if self.draining and not connection.behind:  # while all end, as long as more was sent
            keep = keep and _more_lies_in(sock)
        body = [] if head.method == "HEAD" else [reply.body, *reply.rest]
        apart = reply.secret or reply.size > LARGE
        joined = render(reply, keep, head.version, *() if apart else body)
        parts = [memoryview(part) for part in ([joined, *body] if apart else [joined])]
        try:
            left = send_parts(sock, parts)
        except OSError:
            left, keep = [], False
        if left and reply.secret:  # a peer that leaves its answers lying gets no key
            left, keep = [], False
        connection.pending, connection.keep = left, keep

    def sent(self, connection: Connection) -> int:
        """After an answer, or the part of it that could be sent. NEXT, or AWAY."""
        self._connections.forget_key(connection)
        if connection.pending:
            return self._later(connection)
        self._connections.forget_body(connection)
        if not connection.keep:  # over TCP more may be on its way
            more = connection.peer.via or _more_lies_in(connection.request)
            (self._linger if more else self._connections.close)(connection)
            return AWAY
        return NEXT

    def _later(self, connection: Connection) -> int:
        size = sum(map(len, connection.pending))
        try:
            if size > connection.reserved:
                self._connections.reserve(connection, size - connection.reserved)
        except Overloaded:
            self._connections.close(connection)
            return AWAY
        self._connections.goes(connection, ANSWERING)
        poll = self._connections.slow if size > LARGE else connection.poll
        self._connections.wait_in(connection, poll, OUT)
        return AWAY

    def go_on(self, connection: Connection) -> None:
        """Its buffer has room again."""
        try:
            connection.pending = send_parts(connection.request, connection.pending)
        except OSError:
            self._connections.close(connection)
            return
        if connection.pending and connection.phase != ANSWERING:
            self._later(connection)
        elif not connection.pending:
            self._connections.wait_in(connection, connection.poll, IN)
            if connection.reader is not None and connection.reader.head is not None:
                self._connections.goes(connection, BODY)  # it was asked for; what is kept of it stays
                return
            self._connections.forget_body(connection)
            (self._connections.rest if connection.keep else self._linger)(connection)

    def ask_for_body(self, connection: Connection) -> None:
        with suppress(OSError):  # that is told of
            connection.pending = send_parts(connection.request, [_CONTINUE])
        if connection.pending:
            self._later(connection)

    def say(self, connection: Connection, reply: Reply, head: Head | None = None) -> None:
        """A last word, behind the answers that the peer has not taken yet."""
        self._connections.let_go(connection)
        connection.pending, connection.keep = [memoryview(last_words(reply, head))], False
        self.go_on(connection)

    def _linger(self, connection: Connection) -> None:
        """The peer has some time to read what it was told, whatever it still sends (RFC 9112, 9.6)."""
        self._connections.let_go(connection)
        try:
            connection.request.shutdown(socket.SHUT_WR)
        except OSError:
            self._connections.close(connection)
            return
        if connection.row >= 0:  # what it sends may be long
            self._connections.wait_in(connection, self._connections.slow, IN)
        self._connections.goes(connection, LINGERING)
