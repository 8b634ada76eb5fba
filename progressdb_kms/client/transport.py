"""HTTP/1.1 over a Unix socket, for the client: a pool of connections, and when to repeat a request.

- Each request borrows a connection that nobody else uses, so any number of threads may send at once. A
  connection made before a fork is dropped by the child: two processes on one stream would mix up answers.
- The daemon may close an idle connection at any time. That is seen before the next request is sent, or by
  its going unanswered; then it is sent once more over a fresh connection. A request that must not be
  carried out twice (`repeatable=False`) is sent again only where the first can't have been complete.
- An answer has a bounded length, and a status and body only where it is whole.
"""

from __future__ import annotations

import errno
import http.client
import os
import select
import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import Callable, NamedTuple

from . import listener

LOOK_SECONDS = 0.5
"""Between two looks at signals while an answer is waited for without a limit."""

QUEUE_SECONDS = 0.02
"""Between two tries to get into the daemon's queue of connections."""

IDLE_CONNECTIONS = 16
"""Connections kept open for the next request; more may be in use."""

CHUNK = 64 * 1024
"""Bytes a read, where the answer comes in chunks."""

HINT_NOT_RUNNING = "is it running? systemctl status progressdb-kms"
HINT_HANGS = "it listens, and may hang: `progressdb-kms help troubleshooting`"


class ClientError(Exception):
    """A call failed. `status` is the HTTP status, 0 where there is none; `hint` says what to do next."""

    def __init__(self, message: str, *, code: str = "", status: int = 0, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.hint = hint

    @property
    def line(self) -> str:
        """For a person: the message, and the hint where there is one."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConnectionFailed(ClientError):
    """No answer came. `code`: connection_failed (none was made), connection_lost (it broke) or timeout."""


class ListenerRefused(ConnectionFailed):
    """Somebody else than the daemon may listen there: nothing was sent. `code`: listener_refused."""


class BadAnswer(ClientError):
    """What listens on the socket doesn't speak this protocol, or its answer is too long."""


def bad_answer(why: str) -> BadAnswer:
    hint = "is it progressdb-kms that listens there?"
    return BadAnswer(f"the answer can't be used: {why}", code="bad_answer", hint=hint)


class Request(NamedTuple):
    """`timeout`: seconds without a byte, None for ever. `repeatable`: doing it twice does no harm. `patient`:
    after that time it is waited for as long as the daemon answers others."""

    method: str
    path: str
    body: bytes | memoryview | None = None
    headers: Mapping[str, str] = {}
    timeout: float | None = None
    repeatable: bool = True
    patient: bool = False


class Reply(NamedTuple):
    """`kind` is the media type without parameters; `receipt` names the audit record of the call;
    `retry_after`: seconds that the daemon asks to wait, 0 where it doesn't say."""

    status: int
    kind: str
    receipt: str
    body: bytes
    retry_after: float = 0.0


class Pool:
    """Connections to one socket. Lock-free, so that a fork can't leave a lock held: deques are atomic."""

    def __init__(self, path: str, max_response: int, server_uid: int | None = None) -> None:
        self._path = path
        self._server_uid = server_uid
        self._max_response = max_response
        self._idle: deque[tuple[int, _Connection]] = deque()

    def exchange(self, request: Request) -> Reply:
        """Send and receive. Raises ConnectionFailed or BadAnswer; an HTTP error is a Reply like any other."""
        conn = self._take()
        if conn is not None:
            try:
                return self._use(conn, request)
            except _NotAnswered as lost:
                if lost.complete and not request.repeatable:
                    raise self._broken(request, "it was closed before the answer", True) from lost
        try:
            return self._use(_Connection(self._path, self._server_uid), request)
        except _NotAnswered as lost:
            raise self._broken(request, "it was closed before the answer", lost.complete) from lost

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()

    def _use(self, conn: _Connection, request: Request) -> Reply:
        try:
            conn.open(request.timeout)
            reply = _round_trip(conn, request, self._max_response, self._alive)
        except BaseException as error:
            conn.close()
            if isinstance(error, socket.timeout):
                raise self._timed_out(request) from error
            if isinstance(error, OSError):
                raise self._broken(request, error.strerror or str(error), True) from error
            raise
        if conn.sock is not None and len(self._idle) < IDLE_CONNECTIONS:
            self._idle.append((os.getpid(), conn))
        else:
            conn.close()
        return reply

    def _alive(self, timeout: float) -> bool:
        """Does the daemon answer another connection?"""
        probe = _Connection(self._path, self._server_uid)
        try:
            probe.open(timeout)
            question = Request("GET", "/healthz", timeout=timeout)
            return _round_trip(probe, question, self._max_response, self._alive).status == 200
        except (OSError, ClientError, _NotAnswered):
            return False
        finally:
            probe.close()

    def _take(self) -> _Connection | None:
        """The connection that was used last, unless it is stale: then the others are, too."""
        while self._idle:
            try:
                pid, conn = self._idle.pop()
            except IndexError:  # another thread was quicker
                break
            if pid == os.getpid() and not conn.stale():
                return conn
            conn.close()
        return None

    def _timed_out(self, request: Request) -> ConnectionFailed:
        message = f"no answer from {self._path} within {request.timeout:g} s"
        return ConnectionFailed(message, code="timeout", hint=_what_now(request, True, HINT_HANGS))

    def _broken(self, request: Request, why: str, complete: bool) -> ConnectionFailed:
        message = f"the connection to {self._path} broke: {why}"
        return ConnectionFailed(message, code="connection_lost", hint=_what_now(request, complete))


class _NotAnswered(Exception):
    """The other side closed without a byte of an answer. `complete`: it may have had the whole request."""

    def __init__(self, complete: bool) -> None:
        super().__init__()
        self.complete = complete


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, server_uid: int | None) -> None:
        super().__init__("unix")
        self._path = path
        self._server_uid = server_uid

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            self._join_queue(sock)
        except OSError as error:
            sock.close()
            raise _unreachable(self._path, error) from error
        uid = listener.of(sock)
        if why := listener.distrust(uid, self._path, self._server_uid):
            sock.close()
            raise ListenerRefused(
                f"uid {uid} listens at {self._path}, and may not be the daemon: {why}",
                code="listener_refused",
                hint=f"nothing was sent; if it is: --server-uid {uid}, or Client(server_uid={uid})",
            )
        self.sock = sock

    def _join_queue(self, sock: socket.socket) -> None:
        """Where the daemon's queue is full (it hangs, or many come at once) connect(2) waits only on a socket
        that has no time limit. Raises OSError."""
        until = time.monotonic() + (self.timeout or 0.0)
        while True:
            try:
                return sock.connect(self._path)
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise socket.timeout from None
                time.sleep(QUEUE_SECONDS)

    def open(self, timeout: float | None) -> None:
        """Connect where need be, and set the time limit. Raises ConnectionFailed, which names the socket."""
        self.timeout = timeout
        if self.sock is None:
            self.connect()
        else:
            self.sock.settimeout(timeout)

    def stale(self) -> bool:
        """The daemon closed it, or sent what nobody asked for, while it lay idle."""
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(0))


def _round_trip(conn: _Connection, request: Request, limit: int, alive: Callable[[float], bool]) -> Reply:
    complete = True
    try:
        conn.request(request.method, request.path, request.body, dict(request.headers))
    except (BrokenPipeError, ConnectionResetError):
        # Its last piece was not taken, so the request can't have been carried out. It may have been refused
        # before all of it was read: then that answer is waiting.
        complete = False
    if request.timeout is None or request.patient:
        _wait(conn, request.timeout, alive)
    try:
        response = conn.getresponse()
    except ConnectionResetError:  # also http.client.RemoteDisconnected
        conn.close()
        raise _NotAnswered(complete) from None
    except (http.client.HTTPException, ValueError) as error:
        raise bad_answer("it is not HTTP") from error
    reply = _receive(response, limit)
    if not complete:
        conn.close()
    return reply


def _wait(conn: _Connection, timeout: float | None, alive: Callable[[float], bool]) -> None:
    """For as long as it takes, with a look in between at signals: one that comes right before a call that
    blocks, or to another thread, doesn't end the call. Every `timeout` seconds the daemon must be alive."""
    if conn.sock is None:
        return
    poller, asked = select.poll(), time.monotonic()
    poller.register(conn.sock, select.POLLIN)
    while not poller.poll(min(LOOK_SECONDS, timeout or LOOK_SECONDS) * 1000):
        if timeout is not None and time.monotonic() - asked >= timeout:
            if not alive(timeout):
                raise socket.timeout
            asked = time.monotonic()


def _receive(response: http.client.HTTPResponse, limit: int) -> Reply:
    with response:
        if response.length is None and not response.chunked:
            raise _cut()  # within its head, which http.client takes for the whole of it
        try:
            body = _body(response, limit)
        except http.client.HTTPException as error:
            raise (bad_answer("it ends too early") if response.chunked else _cut()) from error
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    wait = response.headers.get("Retry-After", "")
    seconds = float(wait) if wait.isascii() and wait.isdigit() else 0.0
    return Reply(response.status, kind, response.headers.get("X-KMS-Audit", ""), body, seconds)


def _cut() -> OSError:
    return ConnectionAbortedError(errno.ECONNABORTED, "it was closed within the answer")


def _body(response: http.client.HTTPResponse, limit: int) -> bytes:
    if response.length is not None and response.length <= limit:
        return response.read()
    parts, size = [], response.length or 0
    while size <= limit and (part := response.read(CHUNK)):
        parts.append(part)
        size += len(part)
    if size > limit:
        raise bad_answer(f"it is longer than {limit} bytes")
    return b"".join(parts)


def _unreachable(path: str, error: OSError) -> ConnectionFailed:
    if isinstance(error, FileNotFoundError):
        why, hint = "there is no such socket", HINT_NOT_RUNNING
    elif isinstance(error, ConnectionRefusedError):
        why, hint = "nobody listens there", HINT_NOT_RUNNING
    elif isinstance(error, PermissionError):
        why, hint = "permission denied", "socket_mode and socket_group in its config decide who may connect"
    elif isinstance(error, socket.timeout):
        why, hint = "it takes no connections", HINT_HANGS
    else:
        why, hint = error.strerror or str(error), HINT_NOT_RUNNING
    return ConnectionFailed(f"can't connect to {path}: {why}", code="connection_failed", hint=hint)


def _what_now(request: Request, complete: bool, hint: str = HINT_NOT_RUNNING) -> str:
    if complete and not request.repeatable:
        return "whether it was carried out is not known: look before you repeat it"
    return hint
