"""An answer as bytes: its head, made once a second for all answers of a kind, and sending without a copy."""

from __future__ import annotations

import socket
import time
from http import HTTPStatus

from ..encoding import wall
from .call import Reply

_starts: dict[tuple[int, str, bool, str], bytes] = {}
_second = 0

PIECES = 1024
"""That a system call takes (IOV_MAX)."""


def _start(status: int, content_type: str, keep: bool, version: str) -> bytes:
    """All that answers of a kind have in common in this second (Date: RFC 9110, 5.6.7)."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(_second))
    connection = (
        ("" if version == "1.1" else "Connection: keep-alive\r\n") if keep else "Connection: close\r\n"
    )
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


def last_words(reply: Reply, version: str = "1.1", head_only: bool = False) -> bytes:
    """All of an answer behind which the connection is closed."""
    return render(reply, False, version, b"" if head_only else reply.body)
