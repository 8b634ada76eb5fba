"""ProgressDB's three clients, written from the table of dialects alone: what each sends, what it insists on,
and what it keeps of an answer. An AssertionError where a client of that generation would have failed.

The first and the second make the same calls, one over a Unix socket, the other over TCP. The third keeps JSON
tokens as they stand in the answer, so it takes the bytes apart and not the values.
"""

from __future__ import annotations

import json
from typing import Any

from .wire import Address, Reply, Session, b64

TIMEOUT = 10.0  # theirs


def tokens(body: bytes) -> dict[str, str]:
    """The members of a JSON object, each as the text that stands in it (Go's json.RawMessage)."""
    text = body.decode("utf-8")
    found: dict[str, str] = {}
    decode, at = json.JSONDecoder().raw_decode, 1
    assert text[0] == "{" and text.rstrip()[-1] == "}", text
    while text[at] != "}":
        name, at = decode(text, at)
        assert text[at] == ":", text
        _, end = decode(text, at + 1)
        found[name] = text[at + 1 : end]
        at = end + 1 if text[end] == "," else end
    return found


class Dialect:
    """One keep-alive connection, one call after another."""

    def __init__(self, address: Address) -> None:
        self.session = Session(address, TIMEOUT)

    def call(self, method: str, path: str, status: int, body: dict[str, Any] | None = None) -> Reply:
        reply = self.session.request(method, path, body)
        assert reply.status == status, f"{method} {path}: {reply.status} {reply.body[:300]!r}"
        return reply

    def healthy(self) -> None:
        for path in ("/healthz", "/health"):
            self.call("GET", path, 200)

    def close(self) -> None:
        self.session.close()


class First(Dialect):
    """September 2025, and November over TCP."""

    def create(self, thread: str) -> str:
        made = self.call("POST", "/create_dek_for_thread", 200, {"thread_id": thread}).json()
        assert all(isinstance(made[name], str) for name in ("key_id", "wrapped", "kek_id", "kek_version"))
        wrapped = self.call("GET", "/get_wrapped?key_id=" + made["key_id"], 200).json()
        assert wrapped["wrapped"] == made["wrapped"]
        return str(made["key_id"])

    def encrypt(self, key_id: str, message: bytes) -> bytes:
        reply = self.call("POST", "/encrypt", 200, {"key_id": key_id, "plaintext": b64(message)})
        return str(reply.json()["ciphertext"]).encode("ascii")

    def decrypt(self, key_id: str, kept: bytes) -> bytes:
        reply = self.call("POST", "/decrypt", 200, {"key_id": key_id, "ciphertext": kept.decode("ascii")})
        return str(reply.json()["plaintext"]).encode("ascii")

    def message(self, text: bytes) -> bytes:
        """What `decrypt` gives for this message."""
        return b64(text).encode("ascii")


class Third(Dialect):
    """v0.2.0-alpha and after."""

    def create(self, key_id: str) -> str:
        made = self.call("POST", "/deks", 201, {"key_id": key_id} if key_id else {})
        found = made.json()
        assert all(isinstance(found[name], str) for name in ("key_id", "kek_id", "kek_version", "created_at"))
        assert found["key_id"] == key_id or not key_id
        self.wrapped_dek = tokens(made.body)["wrapped_dek"]
        return str(found["key_id"])

    def encrypt(self, key_id: str, message: bytes) -> bytes:
        reply = self.call("POST", "/encrypt", 200, {"key_id": key_id, "plaintext": b64(message)})
        return tokens(reply.body)["ciphertext"].encode()

    def decrypt(self, key_id: str, kept: bytes) -> bytes:
        reply = self.call("POST", "/decrypt", 200, {"key_id": key_id, "ciphertext": b64(kept)})
        return tokens(reply.body)["plaintext"].encode()

    def message(self, text: bytes) -> bytes:
        return text


GENERATIONS = (First, Third)
