"""Peers that take all they can, and one that only wants its answers: processes of their own, as another user.

    python -m tests.harness.attack KIND SOCKET UID KEY_ID [SECONDS]

    heads     400 connections, each with a head that promises 8 MiB, and nothing behind it
    idle      300 connections that say nothing
    batches   16 connections that send batches of 8 MiB of `{},`
    pages     100 connections that send batches of 1,000 messages, 8 MiB each
    caller    encrypts one message after another for SECONDS; prints its p50, p99 and longest, in seconds

The attackers go on until they are ended; whoever is hung up on connects again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from .wire import b64, connect

HEAD = (
    b"POST /%b HTTP/1.1\r\nHost: unix\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Expect: 100-continue\r\n\r\n"
)


def post(path: bytes, body: bytes) -> bytes:
    return (HEAD % (path, len(body))).replace(b"Expect: 100-continue\r\n", b"") + body


def again_and_again(address: str, count: int, work: Callable[[socket.socket], None]) -> None:
    """In as many threads, until this process is ended."""

    def run() -> None:
        while True:
            with contextlib.suppress(OSError), connect(address, 30.0) as sock:
                work(sock)
            time.sleep(0.001)  # refused at once: not all of a core for that

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def sending(request: bytes) -> Callable[[socket.socket], None]:
    def work(sock: socket.socket) -> None:
        while True:
            sock.sendall(request)
            answer = sock.recv(1 << 20)
            left = length(answer) - len(answer)
            while left > 0:
                left -= len(sock.recv(1 << 20)) or left

    return work


def length(answer: bytes) -> int:
    """Of a whole answer that begins so."""
    head, _, _ = answer.partition(b"\r\n\r\n")
    if not head:
        raise ConnectionResetError
    lines = head.lower().split(b"\r\n")
    return len(head) + 4 + next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))


def listening(first: bytes) -> Callable[[socket.socket], None]:
    def work(sock: socket.socket) -> None:
        sock.sendall(first)
        while sock.recv(4096):
            pass

    return work


def caller(address: str, key_id: str, seconds: float) -> None:
    request = post(b"encrypt", json.dumps({"key_id": key_id, "plaintext": b64(os.urandom(200))}).encode())
    taken: list[float] = []
    until = time.monotonic() + seconds
    with connect(address, 30.0) as sock:
        while (begun := time.monotonic()) < until:
            sock.sendall(request)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
            taken.append(time.monotonic() - begun)
    taken.sort()
    print(json.dumps([taken[len(taken) // 2], taken[len(taken) * 99 // 100], taken[-1], len(taken)]))


def main(kind: str, address: str, uid: str, key_id: str, seconds: str = "0") -> None:
    os.setgid(int(uid))
    os.setuid(int(uid))
    item = json.dumps({"key_id": key_id, "plaintext": b64(bytes(6000))}, separators=(",", ":")).encode()
    if kind == "caller":
        caller(address, key_id, float(seconds))
    elif kind == "heads":
        again_and_again(address, 400, listening(HEAD % (b"encrypt", 8 << 20)))
    elif kind == "idle":
        again_and_again(address, 300, listening(b""))
    elif kind == "batches":
        body = b'{"items":[' + b"{}," * 2_790_000 + b"{}]}"
        again_and_again(address, 16, sending(post(b"encrypt_batch", body)))
    else:
        body = b'{"items":[' + b",".join([item] * 1000) + b"]}"
        again_and_again(address, 100, sending(post(b"encrypt_batch", body)))


if __name__ == "__main__":
    main(*sys.argv[1:])
