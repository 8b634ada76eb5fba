"""Audit logs for tests: made, torn and held against what is known of them.

    anchors = fill(path)        a log of three chains; check(path, anchors) and fault(…) verify it
    with tearing(8, None, 3):   the next three writes take 8 bytes, all, 3 bytes; later ones take all

As a program, one process of several that append to a log until they are told to stop (stdin ends):

    python -m tests.harness.auditlogs PATH CHAIN [SOFT_FILE_LIMIT [PAUSE]]

It writes each receipt to stdout as soon as it has it, or `! reason` where there is none.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from progressdb_kms.audit import log as audit
from progressdb_kms.audit.log import (
    AuditLog,
    fragment,
    key_fragment,
    peer_fragment,
)
from progressdb_kms.audit.verify import Report, verify
from progressdb_kms.errors import AuditUnavailable

KEY = memoryview(bytearray(range(32)))
OTHER_KEY = memoryview(bytearray(range(1, 33)))
PEER = peer_fragment(1000, 1001, 4242)

Anchors = dict[str, tuple[int, str]]


class Clock:
    """A second further at each look."""

    def __init__(self, now: float = 1_790_000_000.5) -> None:
        self.now = now

    def __call__(self) -> float:
        self.now += 1
        return self.now


def encrypt(log: AuditLog, number: int = 0) -> str:
    return log.record(
        "encrypt",
        "ok",
        200,
        key_fragment(f"k_{number}", "thread-1"),
        PEER,
        fragment(request_id=f"r-{number}"),
    )


def made(path: Path, chains: Iterable[str], clock: Clock | None = None) -> list[AuditLog]:
    clock = clock or Clock()
    return [AuditLog(path, KEY, chain, clock) for chain in chains]


def fill(path: Path, rounds: int = 4, chains: Iterable[str] = ("1.0", "1.1", "1.2")) -> Anchors:
    """A log of several chains, one line each in turn. Returns the anchors of its end."""
    logs = made(path, chains)
    for number in range(rounds):
        for log in logs:
            encrypt(log, number)
    return closed(logs)


def closed(logs: Iterable[AuditLog]) -> Anchors:
    anchors = {log.chain: log.head[1:] for log in logs}
    for log in logs:
        log.close()
    return anchors


def check(path: Path | list[Path], anchors: Anchors, **options: object) -> Report:
    return verify(path if isinstance(path, list) else [path], KEY, anchors, **options)  # type: ignore[arg-type]


def fault(path: Path | list[Path], anchors: Anchors, **options: object) -> tuple[int, str]:
    """The line and the words of the fault that must be there."""
    found = check(path, anchors, **options).fault
    assert found is not None, "no fault found"
    return found.line, found.what


@contextlib.contextmanager
def tearing(*limits: int | None | OSError) -> Iterator[None]:
    """Make writes short, or fail, in this order: bytes taken, None for all of them, or an error."""
    script = list(limits)
    real = audit._write

    def write(fd: int, data: Any) -> int:
        limit = script.pop(0) if script else None
        if isinstance(limit, OSError):
            raise limit
        return os.write(fd, data if limit is None else data[:limit])

    audit._write = write
    try:
        yield
    finally:
        audit._write = real


def main(path: str, chain: str, limit: str = "0", pause: str = "0") -> None:
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    log = AuditLog(path, KEY, chain)
    number = 0
    while not select.select([0], [], [], 0)[0]:
        number += 1
        try:
            print(encrypt(log, number), flush=True)
            time.sleep(float(pause))
        except AuditUnavailable as error:
            print("!", error.message, flush=True)
            time.sleep(0.002)
    log.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
