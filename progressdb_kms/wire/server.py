"""The edge: connections, threads, deadlines. The bytes are judged by `http1`, the requests by `routes`.

A connection is a thread and a piece of 4,096 bytes of locked memory:

    scratch 64 | answer 128 | what was received 3,904

A request that fits in there is never copied but for the parts that its route asks for; a longer body gets a
buffer of its own, made once at its full length. What was received is wiped before the next read.

Time: `idle_timeout` while nothing of a request is here; from its first byte on, one deadline for the head and
one for the body, however slowly the bytes drip in; one deadline for taking the answer.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import struct
import sys
import threading
import time
from contextlib import suppress
from typing import NamedTuple, Optional, Union

from ..audit.log import Fragment, peer_fragment
from ..crypto.envelope import SCRATCH_SIZE
from ..crypto.memory import LockedBuffer
from ..encoding import Buffer, wall
from ..errors import (
    HeadTooLarge,
    KMSError,
    LockRefused,
    Overloaded,
    PeerRefused,
    RequestTimeout,
)
from ..rules import Peer
from ..service.metrics import Block, Metrics
from . import routes
from .call import App, Call, Reply, Route
from .http1 import Chunked, Head, cached_parse_head, find_head_end

log = logging.getLogger(__name__)

PIECE = 4096
_ANSWER = 128
_RECEIVED = SCRATCH_SIZE + _ANSWER
CAPACITY = PIECE - _RECEIVED
"""Bytes of head and body that fit into the locked piece; a head must."""

SLAB_PIECES = 32
"""Pieces that are locked at a time (128 KiB), as connections come."""

LINGER_SECONDS = 1.0
"""After a refusal the peer may still be sending: so long it is listened to, so that it reads the answer."""

YIELDS = 5
"""Milliseconds that a worker leaves a new connection to another one that has fewer."""

_Request = Union[socket.socket, tuple[bytes, socket.socket]]

LARGE = 64 * 1024
"""Bytes of an answer from which on head and body are not joined before they are sent."""

BACKLOG = 4096

_ZEROS = bytes(PIECE)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Limits(NamedTuple):
    max_connections: int
    idle_timeout: float
    request_timeout: float


# ---- peers -----------------------------------------------------------------------------------------


def peer_of(sock: socket.socket) -> Peer:
    """The credentials of the process at the other end, as they were at connect()."""
    if hasattr(socket, "SO_PEERCRED"):
        pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return Peer(uid, gid, pid)
    if sys.platform == "darwin":  # struct xucred; LOCAL_PEERPID
        _, uid, _, gid = struct.unpack_from("=IIhxxI", sock.getsockopt(0, 1, 76))
        return Peer(uid, gid, struct.unpack("i", sock.getsockopt(0, 2, 4))[0])
    raise PeerRefused("this platform does not tell who is at the other end of a socket")


# ---- locked pieces -----------------------------------------------------------------------------------


class Slab:
    """Locked memory for connections, grown as they come, reused when they go."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._lock = threading.Lock()
        self._buffers: list[LockedBuffer] = []
        self._free: list[tuple[LockedBuffer, int]] = []

    def take(self) -> tuple[LockedBuffer, int]:
        """(buffer, offset of a piece). Raises LockRefused where locking is required and the limit reached."""
        with self._lock:
            if not self._free:
                buffer = LockedBuffer(PIECE * SLAB_PIECES, self._mode)
                self._buffers.append(buffer)
                self._free = [(buffer, i * PIECE) for i in range(SLAB_PIECES)]
            return self._free.pop()

    def give_back(self, piece: tuple[LockedBuffer, int]) -> None:
        buffer, offset = piece
        buffer.view[offset : offset + PIECE] = _ZEROS
        with self._lock:
            self._free.append(piece)

    @property
    def locked_bytes(self) -> int:
        return sum(buffer.locked_bytes for buffer in self._buffers)

    def wipe(self) -> None:
        for buffer in self._buffers:
            buffer.wipe()


# ---- one connection ----------------------------------------------------------------------------------


class Handler(socketserver.BaseRequestHandler):
    """Reads requests, hands them to `routes.dispatch`, sends the answers, in order."""

    request: socket.socket
    server: Server

    def setup(self) -> None:
        self._piece: Optional[tuple[LockedBuffer, int]] = None
        server = self.server
        _timeout(self.request, socket.SO_RCVTIMEO, server.limits.idle_timeout)
        _timeout(self.request, socket.SO_SNDTIMEO, server.limits.request_timeout)
        self._peer = peer_of(self.request)
        self._fragment: Fragment = peer_fragment(*self._peer)
        self._piece = buffer, offset = server.slab.take()
        view = buffer.view[offset : offset + PIECE]
        self._scratch = view[:SCRATCH_SIZE]
        self._answer = view[SCRATCH_SIZE:_RECEIVED]
        self._view = view[_RECEIVED:]
        self._map = buffer.map
        self._start = offset + _RECEIVED
        self._fill = 0

    def handle(self) -> None:
        try:
            while self._one():
                pass
        except KMSError as error:  # what was received is no request: say so and hang up
            self._send(routes.error_reply(error), False, False, "1.1")
            self._linger()

    def finish(self) -> None:
        if self._piece is not None:
            self.server.slab.give_back(self._piece)
            self._piece = None

    # ---- one request -----------------------------------------------------------------------------

    def _one(self) -> bool:
        """Serve one request. False: the connection is over. Raises HttpError where it can't be read."""
        head_end = self._receive_head()
        if head_end == 0:
            return False
        head = cached_parse_head(bytes(self._view[:head_end]))
        try:
            route = routes.find(head)
            routes.check_length(self.server.app, route, head.content_length)
        except KMSError as error:
            return self._refuse(head, head_end, error)
        body, used = self._receive_body(head, head_end, route)
        call = Call(head, body, self._peer, self._fragment, self._scratch, self._answer)
        reply = routes.dispatch(self.server.app, route, call)
        keep = head.keep_alive and not reply.close and not self.server.draining
        self._send(reply, keep, head.method == "HEAD", head.version)
        if reply.secret:
            self._answer[:] = _ZEROS[:_ANSWER]
        self._forget(used)
        return keep

    def _refuse(self, head: Head, head_end: int, error: KMSError) -> bool:
        """No such route, or the body too long: go on only where the body is here already."""
        used = head_end + head.content_length
        keep = head.keep_alive and not error.close and not head.chunked and used <= self._fill
        keep = keep and not self.server.draining
        self._send(routes.error_reply(error), keep, head.method == "HEAD", head.version)
        self.server.app.service.counters.request("service", error.status, 0.0)
        if keep:
            self._forget(used)
        else:
            self._linger()
        return keep

    def _receive_head(self) -> int:
        """Length of the next head in the buffer; 0 where the peer is gone or was idle too long."""
        view, fill = self._view, self._fill
        if not fill:
            try:
                fill = self._fill = self.request.recv_into(view)
            except BlockingIOError:  # idle_timeout
                return 0
            if not fill:
                return 0
        start = self._start
        end = find_head_end(self._map, start, start + fill)
        if end > 0:
            return end - start
        deadline = time.monotonic() + self.server.limits.request_timeout
        while end < 0:
            if self._fill == CAPACITY:
                raise HeadTooLarge(f"the head of the request is longer than {CAPACITY} bytes")
            if not self._more(view[self._fill :], deadline, "head"):
                return 0
            end = find_head_end(self._map, start, start + self._fill)
        return end - start

    def _more(self, into: memoryview, deadline: float, what: str) -> int:
        """Receive once, into `into`, before the deadline. Counts what came into the piece."""
        size = self._receive(into, deadline, what)
        self._fill += size
        return size

    def _receive(self, into: memoryview, deadline: float, what: str) -> int:
        left = deadline - time.monotonic()
        if left > 0:
            _timeout(self.request, socket.SO_RCVTIMEO, left)
            try:
                return self.request.recv_into(into)
            except BlockingIOError:
                pass
            finally:
                _timeout(self.request, socket.SO_RCVTIMEO, self.server.limits.idle_timeout)
        raise RequestTimeout(f"the {what} of the request did not come within the time limit")

    def _receive_body(self, head: Head, head_end: int, route: Route) -> tuple[Buffer, int]:
        """(body, bytes of the piece that this request takes up)."""
        length = head.content_length
        used = head_end + length
        if used <= self._fill and not head.chunked:
            return self._view[head_end:used], used
        if head.expect_continue:
            self.request.sendall(_CONTINUE)
        deadline = time.monotonic() + self.server.limits.request_timeout
        if head.chunked:
            return self._receive_chunked(head_end, route.body_limit(self.server.app), deadline)
        if used <= CAPACITY:
            while self._fill < used:
                if not self._more(self._view[self._fill :], deadline, "body"):
                    raise ConnectionResetError
            return self._view[head_end:used], used
        return self._receive_long(length, head_end, route.secret, deadline), self._fill

    def _receive_long(self, length: int, head_end: int, secret: bool, deadline: float) -> Buffer:
        """A body that does not fit: into a buffer of its own, straight from the kernel."""
        here = self._fill - head_end
        body = LockedBuffer(length, self.server.slab_mode).view if secret else memoryview(bytearray(length))
        body[:here] = self._view[head_end : self._fill]
        while here < length:
            size = self._receive(body[here:], deadline, "body")
            if not size:
                raise ConnectionResetError
            here += size
        return body

    def _receive_chunked(self, head_end: int, limit: int, deadline: float) -> tuple[Buffer, int]:
        chunked = Chunked(limit)
        at = head_end
        try:
            while True:
                at += chunked.feed(self._view[at : self._fill])
                if chunked.done:
                    return chunked.body, at
                rest = self._fill - at  # what the decoder could not use yet
                self._view[head_end : head_end + rest] = bytes(self._view[at : self._fill])
                at, self._fill = head_end, head_end + rest
                if not self._more(self._view[self._fill :], deadline, "body"):
                    raise ConnectionResetError
        except BaseException:
            chunked.wipe()
            raise

    def _forget(self, used: int) -> None:
        """Wipe the request; what was pipelined behind it moves to the front."""
        rest = self._fill - used
        if rest > 0:
            self._view[:rest] = bytes(self._view[used : self._fill])
        self._view[rest : self._fill] = _ZEROS[: self._fill - rest]
        self._fill = rest

    # ---- answers -----------------------------------------------------------------------------------

    def _send(self, reply: Reply, keep: bool, head_only: bool, version: str) -> None:
        head = render_head(reply, keep, version)
        body = reply.body
        if head_only:
            self.request.sendall(head)
        elif reply.secret or len(body) > LARGE:
            self._send_long(head + reply.lead, memoryview(body))
        else:
            self.request.sendall(head + reply.lead + body)

    def _send_long(self, head: bytes, body: memoryview) -> None:
        """Head and body without joining them; one deadline for the peer to take it all."""
        deadline = time.monotonic() + self.server.limits.request_timeout
        sent = self.request.sendmsg([head, body]) - len(head)
        if sent < 0:
            raise ConnectionResetError
        while sent < len(body):
            if time.monotonic() > deadline:
                raise TimeoutError
            sent += self.request.send(body[sent:])

    def _linger(self) -> None:
        """Let the peer read the answer before the connection goes (RFC 9112, 9.6)."""
        self.request.shutdown(socket.SHUT_WR)
        self._view[: self._fill] = _ZEROS[: self._fill]
        deadline = time.monotonic() + LINGER_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            _timeout(self.request, socket.SO_RCVTIMEO, left)
            if not self.request.recv_into(self._view):
                return


def _timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """The kernel's own timeout: no poll() before each call. At least a microsecond: 0 means for ever."""
    micros = max(1, int(seconds * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", micros // 1_000_000, micros % 1_000_000))


# ---- answer heads --------------------------------------------------------------------------------------

_PHRASES = {
    200: "OK",
    201: "Created",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    410: "Gone",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    417: "Expectation Failed",
    422: "Unprocessable Content",
    423: "Locked",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}
_date = (0, "")


def _http_date() -> str:
    """RFC 9110, 5.6.7; made once a second."""
    global _date
    now = int(wall())
    if _date[0] != now:
        _date = (now, time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now)))
    return _date[1]


def render_head(reply: Reply, keep: bool, version: str) -> bytes:
    receipt = f"X-KMS-Audit: {reply.receipt}\r\n" if reply.receipt else ""
    connection = (
        ("" if version == "1.1" else "Connection: keep-alive\r\n") if keep else "Connection: close\r\n"
    )
    return (
        f"HTTP/1.1 {reply.status} {_PHRASES[reply.status]}\r\nDate: {_http_date()}\r\n"
        f"Content-Type: {reply.content_type}\r\nContent-Length: {len(reply.lead) + len(reply.body)}\r\n"
        f"Cache-Control: no-store\r\n"
        f"{receipt}{reply.extra}{connection}\r\n"
    ).encode("ascii")


# ---- the server ------------------------------------------------------------------------------------------


class Server(socketserver.ThreadingUnixStreamServer):
    """A thread a connection, on a listening socket that other workers may share."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        listener: socket.socket,
        app: App,
        limits: Limits,
        counters: Block,
        metrics: Metrics,
        lock_mode: str,
    ) -> None:
        super().__init__(str(listener.getsockname()), Handler, bind_and_activate=False)
        self.socket.close()
        listener.setblocking(False)
        self.socket = listener
        self.app = app
        self.limits = limits
        self.slab_mode = lock_mode
        self.slab = Slab(lock_mode)
        self.draining = False
        self._counters = counters
        self._metrics = metrics
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()

    def get_request(self) -> tuple[socket.socket, str]:
        """Accept; where another worker has fewer connections, leave it some moments to be the first."""
        for _ in range(YIELDS):
            *workers, _ = self._metrics.gauge("connections")  # the last is the keeper's
            if self._counters.get("connections") <= min(workers):
                break
            time.sleep(0.001)
        connection, _ = self.socket.accept()
        connection.setblocking(True)
        return connection, ""

    def process_request(self, request: _Request, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        if sum(self._metrics.gauge("connections")) >= self.limits.max_connections:
            self._turn_away(request, "too many connections")
            return
        with self._open_lock:
            self._open.add(request)
        self._counters.add("connections", 1)
        try:
            threading.Thread(target=self._serve, args=(request,), daemon=True).start()
        except RuntimeError:  # the system has no thread left
            self._turn_away(request, "no thread is left")
            self._gone(request)

    def _serve(self, request: socket.socket) -> None:
        try:
            Handler(request, "", self)
        except (OSError, TimeoutError):
            pass  # the peer went away; nothing can be told to it
        except LockRefused:
            self._turn_away(request, "no locked memory is left")
        except Exception:
            log.exception("a connection ended with an error")
        finally:
            request.close()
            self._gone(request)

    def _gone(self, request: socket.socket) -> None:
        with self._open_lock:
            self._open.discard(request)
        self._counters.add("connections", -1)

    def _turn_away(self, request: socket.socket, why: str) -> None:
        self._counters.add("refused_connections", 1)
        reply = routes.error_reply(Overloaded(why, hint="raise max_connections, or close idle connections"))
        request.setblocking(False)
        with suppress(OSError):
            request.recv(LARGE)  # so that closing does not reset what the peer is about to read
        with suppress(OSError):
            request.sendall(render_head(reply, False, "1.1") + bytes(reply.body))
        request.close()

    def handle_error(self, request: object, client_address: object) -> None:
        log.exception("a connection could not be served")

    def take_waiting(self) -> None:
        """Serve the connections that were made but not accepted yet."""
        while True:
            try:
                request, address = self.get_request()
            except OSError:
                return
            self.process_request(request, address)

    def drain(self, seconds: float) -> bool:
        """Answer what was received in full, take nothing new. True: all connections are closed."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while True:
            with self._open_lock:
                waiting = list(self._open)
            if not waiting:
                return True
            for connection in waiting:
                try:
                    connection.shutdown(socket.SHUT_RD)
                except OSError:
                    continue  # closed meanwhile
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
