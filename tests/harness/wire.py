"""An HTTP client for the daemon's socket, written from the API table alone.

It shares no code with `progressdb_kms`: a fault in the product's own client can't hide a fault in the
server. Requests look like those of Go's net/http with a Unix dialer (`Host: unix`,
`Accept-Encoding: gzip`, keep-alive, no `Expect`).

    reply = request(sock, "GET", "/healthz")            # one connection, one call
    with Session(sock) as kms:                          # keep-alive
        key = kms.create_dek("thread-1")["key_id"]
        assert kms.decrypt(key, kms.encrypt(key, b"hello")) == b"hello"
    raw(sock, b"GET / HTTP/1.1\\r\\n\\r\\n")            # bytes as they are

A `Session` belongs to one thread.
"""

from __future__ import annotations

import base64
import errno
import http.client
import json
import random
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Union

SocketPath = Union[str, Path]
Address = Union[SocketPath, tuple[str, int]]
"""A Unix socket, or (host, port)."""
Body = Union[None, bytes, dict[str, Any], list[Any]]

GO_HEADERS = {"Host": "unix", "User-Agent": "Go-http-client/1.1", "Accept-Encoding": "gzip"}
TIMEOUT = 30.0  # seconds without a byte: a hung daemon fails the test instead of hanging it


def free_port(host: str = "127.0.0.1") -> tuple[str, int]:
    """Below those that the kernel gives to whoever connects: one of these may be gone before a daemon has it,
    or while it starts anew. Raises OSError where there is no such host."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in random.SystemRandom().sample(range(20_000, 32_000), 99):
        with socket.socket(family) as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return host, port
    raise OSError(errno.EADDRINUSE, "no port was free")


class Reply(NamedTuple):
    """An answer. Unpacks as `status, headers, body`."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The `code` of an error body, "" where there is none."""
        try:
            return str(self.json()["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return ""


class UnexpectedReply(AssertionError):
    """An answer with another status than the test asked for."""

    def __init__(self, what: str, wanted: int, reply: Reply) -> None:
        super().__init__(f"{what}: {reply.status} instead of {wanted}: {reply.body[:500]!r}")
        self.reply = reply


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, address: Address, timeout: float) -> None:
        super().__init__("unix", timeout=timeout)
        self._address = address
        self.opened = 0

    def connect(self) -> None:
        self.sock = connect(self._address, self.timeout or TIMEOUT)
        self.opened += 1


class Session:
    """A keep-alive connection. Opens again by itself where the server closed it in good order;
    `connections` counts how often it was opened."""

    def __init__(self, address: Address, timeout: float = TIMEOUT) -> None:
        self._conn = _UnixConnection(address, timeout)
        self._host = "unix" if isinstance(address, (str, Path)) else host_of(address)

    @property
    def connections(self) -> int:
        return self._conn.opened

    def request(
        self, method: str, path: str, body: Body = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One call. A dict or list is sent as JSON, bytes as they are. A header given here replaces the
        default of the same name; the value "" leaves it out."""
        self.begin(method, path, body, headers)
        return self.reply()

    def begin(
        self, method: str, path: str, body: Body = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """The first half of `request`."""
        data, wanted = _encode(body)
        wanted.update({"Host": self._host, **(headers or {})})
        try:
            self._send(method, path, data, wanted)
        except BaseException:
            self.close()
            raise

    def reply(self) -> Reply:
        try:
            return self._receive()
        except BaseException:
            self.close()
            raise

    def _send(self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]) -> None:
        self._conn.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if value:
                self._conn.putheader(name, value)
        try:
            self._conn.endheaders(data)
        except (BrokenPipeError, ConnectionResetError):
            # A server may refuse before it has read all. http.client sends only in the state that
            # follows the headers, so the answer that is waiting can still be read.
            if self._conn.sock is None:
                raise

    def _receive(self) -> Reply:
        response = self._conn.getresponse()
        return Reply(response.status, response.headers, response.read())

    def ok(
        self,
        method: str,
        path: str,
        body: Body = None,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The JSON of the answer; UnexpectedReply where the status is another."""
        reply = self.request(method, path, body, headers)
        if reply.status != status:
            raise UnexpectedReply(f"{method} {path}", status, reply)
        return reply.json()

    # ---- the calls that most tests need -----------------------------------------------------------

    def create_dek(self, thread_id: str) -> dict[str, str]:
        """key_id, wrapped, kek_id, kek_version of a new DEK."""
        answer: dict[str, str] = self.ok("POST", "/create_dek_for_thread", {"thread_id": thread_id})
        return answer

    def get_wrapped(self, key_id: str) -> dict[str, str]:
        answer: dict[str, str] = self.ok("GET", f"/get_wrapped?key_id={key_id}")
        return answer

    def encrypt(self, key_id: str, plaintext: bytes, aad: bytes | None = None) -> bytes:
        """nonce ‖ ciphertext ‖ tag."""
        fields = {
            "key_id": key_id,
            "plaintext": b64(plaintext),
            **({"aad": b64(aad)} if aad is not None else {}),
        }
        return base64.b64decode(self.ok("POST", "/encrypt", fields)["ciphertext"], validate=True)

    def decrypt(self, key_id: str, ciphertext: bytes, aad: bytes | None = None) -> bytes:
        fields = {
            "key_id": key_id,
            "ciphertext": b64(ciphertext),
            **({"aad": b64(aad)} if aad is not None else {}),
        }
        return base64.b64decode(self.ok("POST", "/decrypt", fields)["plaintext"], validate=True)

    def rotate(self, new_kek: bytes) -> dict[str, Any]:
        answer: dict[str, Any] = self.ok("POST", "/rotate_kek", {"new_kek_hex": new_kek.hex()})
        return answer

    def close(self) -> None:
        self._conn.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def request(
    path: Address,
    method: str,
    target: str,
    body: Body = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> Reply:
    """One call over a connection of its own."""
    with Session(path, timeout) as session:
        return session.request(method, target, body, headers)


def raw(path: Address, pieces: bytes | Iterable[bytes], *, end: bool = True, timeout: float = 10.0) -> bytes:
    """Send bytes as they are (each piece by a write of its own) and read until the server closes.

    `end` shuts our side for writing first, so that a server which waits for more sees that none comes.
    Raises TimeoutError with what had come, where the server neither answers to the end nor closes.
    """
    with connect(path, timeout) as sock:
        try:
            for piece in (pieces,) if isinstance(pieces, bytes) else pieces:
                sock.sendall(piece)
            if end:
                sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has hung up on us: what it said before is what counts
        return _read_all(sock, time.monotonic() + timeout)


def _read_all(sock: socket.socket, deadline: float) -> bytes:
    found = bytearray()
    while True:
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            piece = sock.recv(65536)
        except ConnectionResetError:
            return bytes(found)
        except socket.timeout:
            raise TimeoutError(f"the server neither closed nor finished; so far: {bytes(found)!r}") from None
        if not piece:
            return bytes(found)
        found += piece


def host_of(address: tuple[str, int]) -> str:
    """As it stands in a URL: `127.0.0.1:6820`, `[::1]:6820`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connect(address: Address, timeout: float = TIMEOUT) -> socket.socket:
    if isinstance(address, tuple):
        return socket.create_connection(address, timeout)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(str(address))
    except BaseException:
        sock.close()
        raise
    return sock


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _encode(body: Body) -> tuple[bytes | None, dict[str, str]]:
    headers = dict(GO_HEADERS)
    if body is None:
        return None, headers
    if isinstance(body, bytes):
        data, kind = body, "application/octet-stream"
    else:
        data, kind = json.dumps(body, separators=(",", ":")).encode(), "application/json"
    headers.update({"Content-Length": str(len(data)), "Content-Type": kind})
    return data, headers
