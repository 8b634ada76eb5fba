"""A service with the daemon's API in memory, for tests of the client and of the commands.

    with FakeKms(path) as kms:
        kms.refuse["/encrypt"] = (503, "audit_unavailable", "no room for the audit log")
        ...
        assert kms.seen[-1].path == "/deks"

It ciphers for real, so that what the client sends is what the other side understood. `script` answers
connections with bytes as they are, for what no HTTP server of good manners would do.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Callable, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .procs import wait_until


class Seen(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status, self.error = (
            status,
            {"code": code, "message": message, **({"hint": hint} if hint else {})},
        )


def kek_id_of(key: bytes) -> str:
    return hmac.digest(key, b"progressdb-kms kek_id v1", "sha256")[:8].hex()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


class FakeKms:
    def __init__(self, path: Path, kek: bytes = bytes(range(32))) -> None:
        self.path = path
        self.kek = kek
        self.kek_id = kek_id_of(kek)
        self.version = 1
        self.deks: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.refuse: dict[str, tuple[int, str, str] | tuple[int, str, str, str]] = {}
        self.drop: set[str] = set()  # carry out, and close without an answer
        self.rotation: dict[str, Any] | None = None
        self.may_rotate: Callable[[], bool] = lambda: True  # a rotation goes on until then
        self.not_ready: list[str] = []
        self.connections = 0
        self._server = _Server(str(path), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FakeKms:
        self._thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    # ---- the API -------------------------------------------------------------------------------------

    def call(self, seen: Seen) -> tuple[int, str, bytes]:
        url = urlsplit(seen.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path in self.refuse:
            raise Refusal(*self.refuse[url.path])
        if seen.headers.get("content-type") == "application/octet-stream":
            aad = base64.b64decode(seen.headers.get("x-kms-aad", ""))
            work = self.seal if url.path == "/encrypt" else self.open
            return 200, "application/octet-stream", work({"key_id": query["key_id"]}, seen.body, aad)
        fields = json.loads(seen.body) if seen.body else {}
        if url.path in ("/healthz", "/health"):
            return 200, "text/plain", b"ok"
        if url.path == "/metrics":
            return 200, "text/plain; version=0.0.4", b"progressdb_kms_deks 1\n"
        status, value = self.route(seen.method, url.path, query, fields)
        return status, "application/json", json.dumps(value).encode()

    def route(self, method: str, path: str, query: dict[str, str], fields: dict[str, Any]) -> tuple[int, Any]:
        if path == "/readyz":
            return (503 if self.not_ready else 200), {"ready": not self.not_ready, "reasons": self.not_ready}
        if path == "/status":
            return 200, self.status()
        if path == "/deks" and method == "POST":
            return 201, self.create(fields["thread_id"], fields.get("key_id"))
        if path == "/deks":
            return 200, self.page(query)
        if path.startswith("/deks/"):
            return 200, self.change(method, unquote(path[6:]), fields)
        if path == "/get_wrapped":
            self.usable(query["key_id"])
            return 200, self.wrapped(query["key_id"])
        if path.endswith("_batch"):
            return 200, {"items": [self.item(path, item) for item in fields["items"]]}
        return 200, self.simple(path, fields)

    def simple(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        data = {name: base64.b64decode(fields[name]) for name in fields if name in _BINARY}
        if path == "/encrypt":
            return {"ciphertext": b64(self.seal(fields, data["plaintext"], data.get("aad", b"")))}
        if path == "/decrypt":
            return {"plaintext": b64(self.open(fields, data["ciphertext"], data.get("aad", b"")))}
        if path == "/reencrypt":
            plain = self.open(fields, data["ciphertext"], data.get("aad", b""))
            return {
                "ciphertext": b64(
                    self.seal({"key_id": fields["new_key_id"]}, plain, data.get("new_aad", b""))
                )
            }
        if path == "/wrap":
            blob = (fields.get("key_id") or "generated").encode() + b"|" + data["dek"]
            return {"wrapped": b64(blob), "kek_id": self.kek_id, "kek_version": str(self.version)}
        if path == "/unwrap":
            return {"dek": b64(data["wrapped"].partition(b"|")[2])}
        if path == "/rewrap":
            new = kek_id_of(bytes.fromhex(fields["new_kek_hex"]))
            self.deks[fields["key_id"]]["kek_id"] = new
            return {"status": "ok", **self.wrapped(fields["key_id"])}
        if path == "/rotate_kek":
            return self.rotate(bytes.fromhex(fields["new_kek_hex"]), fields.get("dry_run", False))
        raise Refusal(404, "not_found", "there is nothing at this path")

    def status(self) -> dict[str, Any]:
        return {
            "version": "1.0.0",
            "state": "ready",
            "kek_id": self.kek_id,
            "kek_version": str(self.version),
            "uptime_seconds": 12,
            "workers": 1,
            "deks": {"total": len(self.deks), "by_kek": {}},
            "memory": {"kind": "memfd_secret", "locked_bytes": 16384},
            "audit": {"chain": "1.1", "seq": 3},
            "rotation": self.rotation,
        }

    def create(self, thread_id: str, key_id: str | None) -> dict[str, Any]:
        key_id = key_id or f"k_{len(self.deks):04d}"
        if key_id in self.deks:
            if self.deks[key_id]["thread_id"] != thread_id:
                raise Refusal(409, "key_exists", f"the key_id {key_id} is taken by another thread")
            return {**self.deks[key_id], "wrapped": self.wrapped(key_id)["wrapped"]}
        self.keys[key_id] = os.urandom(32)
        self.deks[key_id] = {
            "key_id": key_id,
            "thread_id": thread_id,
            "state": "enabled",
            "kek_id": self.kek_id,
            "kek_version": str(self.version),
            "created_at": "2026-11-24T02:13:32.123456Z",
        }
        return {**self.deks[key_id], "wrapped": self.wrapped(key_id)["wrapped"]}

    def wrapped(self, key_id: str) -> dict[str, Any]:
        blob = key_id.encode() + b"|" + self.keys[key_id]
        return {
            "key_id": key_id,
            "wrapped": b64(blob),
            "kek_id": self.deks[key_id]["kek_id"],
            "kek_version": str(self.version),
        }

    def page(self, query: dict[str, str]) -> dict[str, Any]:
        wanted = [
            row for row in self.deks.values() if row["thread_id"] == query.get("thread_id", row["thread_id"])
        ]
        rows = sorted(
            (row for row in wanted if row["key_id"] > query.get("cursor", "")), key=lambda row: row["key_id"]
        )
        limit = int(query.get("limit", "100"))
        return {"deks": rows[:limit], "next_cursor": rows[limit - 1]["key_id"] if len(rows) > limit else None}

    def change(self, method: str, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        key_id, _, action = path.partition("/")
        row = self.known(key_id)
        if method == "DELETE" and fields.get("immediately"):
            row.update(state="shredded", shredded_at="2026-11-24T03:00:00.000000Z")
        elif method == "DELETE":
            row.update(state="pending_deletion", delete_at=f"in {fields.get('pending_days', 7)} days")
        elif action:
            row["state"] = {"disable": "disabled", "enable": "enabled"}[action]
            row.pop("delete_at", None)
        return row

    def known(self, key_id: str) -> dict[str, Any]:
        if key_id not in self.deks:
            raise Refusal(404, "key_not_found", f"there is no key {key_id}")
        return self.deks[key_id]

    def usable(self, key_id: str) -> bytes:
        state = self.known(key_id)["state"]
        if state == "shredded":
            raise Refusal(410, "key_shredded", f"the key {key_id} was shredded")
        if state != "enabled":
            raise Refusal(423, "key_disabled", f"the key {key_id} is disabled", "enable it first")
        return self.keys[key_id]

    def dek(self, fields: dict[str, Any]) -> bytes:
        if "wrapped" in fields:
            return base64.b64decode(fields["wrapped"]).partition(b"|")[2]
        return self.usable(fields["key_id"])

    def seal(self, fields: dict[str, Any], data: bytes, aad: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + AESGCM(self.dek(fields)).encrypt(nonce, data, aad)

    def open(self, fields: dict[str, Any], data: bytes, aad: bytes) -> bytes:
        try:
            return AESGCM(self.dek(fields)).decrypt(data[:12], data[12:], aad)
        except (InvalidTag, ValueError):
            raise Refusal(422, "authentication_failed", "the data does not open under this key") from None

    def item(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.simple(path[: -len("_batch")], fields)
        except Refusal as refusal:
            return {"error": refusal.error}

    def rotate(self, key: bytes, dry_run: bool) -> dict[str, Any]:
        new = kek_id_of(key)
        if new == self.kek_id:
            raise Refusal(409, "kek_in_use", f"the KEK {new} is the active one already")
        if dry_run:
            answer = {
                "status": "dry_run",
                "kek_version": str(self.version + 1),
                "by_kek": {self.kek_id: len(self.deks)},
            }
            return {**answer, "kek_id": new, "rewrapped": len(self.deks)}
        self.rotation = {"phase": "rewrapping", "done": 1, "total": 4, "new_kek_id": new}
        wait_until(self.may_rotate, 60, "leave to end the rotation")
        self.kek, self.kek_id, self.version, self.rotation = key, new, self.version + 1, None
        for row in self.deks.values():
            row["kek_id"] = new
        answer = {"status": "ok", "kek_version": str(self.version), "backup": "/data/kms-deks-backup/x"}
        return {**answer, "kek_id": new, "rewrapped": len(self.deks)}


_BINARY = ("plaintext", "ciphertext", "aad", "new_aad", "dek", "wrapped")


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


def _handler(kms: FakeKms) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            kms.connections += 1
            super().setup()

        def address_string(self) -> str:
            return "unix"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            headers = {name.lower(): value for name, value in self.headers.items()}
            seen = Seen(self.command, self.path, headers, body)
            kms.seen.append(seen)
            try:
                status, kind, data = kms.call(seen)
            except Refusal as refusal:
                status, kind, data = (
                    refusal.status,
                    "application/json",
                    json.dumps({"error": refusal.error}).encode(),
                )
            if urlsplit(self.path).path in kms.drop:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-KMS-Audit", f"1.1:{len(kms.seen)}:00112233aabbccdd")
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = answer

    return Handler


Script = Callable[[socket.socket], None]


@contextlib.contextmanager
def script(path: Path, *scripts: Script) -> Iterator[list[int]]:
    """Accept a connection for each script and run it there. Yields a list that grows with each connection."""
    accepted: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(8)

        def run() -> None:
            for one in scripts:
                try:
                    conn, _ = listener.accept()
                except OSError:
                    return
                accepted.append(len(accepted))
                with conn:
                    one(conn)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield accepted
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def request(conn: socket.socket) -> bytes:
    """Read one request, whole: the head, and as many bytes as its Content-Length says."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += conn.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        ),
        0,
    )
    while len(body) < length:
        body += conn.recv(65536)
    return head + b"\r\n\r\n" + body


def answer(conn: socket.socket, body: bytes = b"{}", status: str = "200 OK", more: str = "") -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    conn.sendall(head.encode() + body)
