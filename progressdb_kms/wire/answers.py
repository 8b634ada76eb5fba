"""An answer as bytes: its head is made once a second for all answers of a kind."""

from __future__ import annotations

import time
from http import HTTPStatus

from ..encoding import wall
from .call import Reply
from .http1 import Head

_starts: dict[tuple[int, str, bool, str], bytes] = {}
_second = 0


def _start(status: int, content_type: str, keep: bool, version: str) -> bytes:
    """All that answers of a kind have in common in this second (Date: RFC 9110, 5.6.7)."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(_second))
    kept = "" if version == "1.1" else "Connection: keep-alive\r\n"
    connection = kept if keep else "Connection: close\r\n"
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nDate: {date}\r\nContent-Type: {content_type}\r\n"
        f"Cache-Control: no-store\r\n{connection}"
    ).encode("ascii")


def render(reply: Reply, keep: bool, version: str, *body: bytes | memoryview) -> bytes:
    """The head of an answer, and what of its body shall go out with it."""
    global _second
    now = int(wall())
    if now != _second:
        _second = now
        _starts.clear()
    kind = (reply.status, reply.content_type, keep, version)
    start = _starts.get(kind) or _starts.setdefault(kind, _start(*kind))
    receipt = f"X-KMS-Audit: {reply.receipt}\r\n" if reply.receipt else ""
    rest = f"Content-Length: {reply.size}\r\n{receipt}{reply.extra}\r\n"
    return b"".join((start, rest.encode("ascii"), *body))


def last_words(reply: Reply, head: Head | None = None) -> bytes:
    """All of an answer behind which the connection is closed."""
    body = b"" if head is not None and head.method == "HEAD" else reply.body
    return render(reply, False, head.version if head is not None else "1.1", body)
