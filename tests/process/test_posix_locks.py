"""SQLite's locks are POSIX locks: a process that closes *any* descriptor of kms.db loses all that it held.
Then another program that opens and closes the store takes itself for the last one and removes the -wal, and
what was acknowledged since is gone with the next kill -9. So: whatever the daemon does, its locks stay."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from tests.harness import Daemon, Session
from tests.harness.faults import need_strace, watching
from tests.harness.kept import Kept
from tests.harness.procs import wait_until

FILES = ("kms.db", "kms.db-shm")


def locks(pid: int, path: Path) -> int:
    """How many POSIX locks the process holds on the file."""
    about = path.stat()
    name = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return sum(1 for words in lines if "POSIX" in words and str(pid) in words and name in words)


def has_open(pid: int, path: Path) -> bool:
    return str(path) in [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]


def visit(daemon: Daemon) -> None:
    """What any program does: open the store, read, close."""
    with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db")) as db:
        db.execute("SELECT count(*) FROM deks").fetchone()


def shred(daemon: Daemon, kms: Session) -> None:
    key = kms.create_dek("t")["key_id"]
    kms.ok("DELETE", f"/deks/{key}", {"immediately": True})


def rotate(daemon: Daemon, kms: Session) -> None:
    daemon.write_kek(os.urandom(32))
    kms.rotate(daemon.kek)


def command(*words: str) -> Callable[[Daemon, Session], None]:
    def run(daemon: Daemon, kms: Session) -> None:
        done = daemon.offline(*(word.replace("HOME", str(daemon.home)) for word in words))
        assert done.returncode == 0, done.stderr

    return run


OPERATIONS: dict[str, Callable[[Daemon, Session], object]] = {
    "create": lambda daemon, kms: kms.create_dek("t"),
    "visit": lambda daemon, kms: visit(daemon),
    "list": lambda daemon, kms: kms.ok("GET", "/deks"),
    "status": lambda daemon, kms: kms.ok("GET", "/status"),
    "ready": lambda daemon, kms: kms.ok("GET", "/readyz"),
    "metrics": lambda daemon, kms: kms.request("GET", "/metrics"),
    "shred": shred,
    "rotate": rotate,
    "shred after it": shred,
    "sighup": lambda daemon, kms: daemon.signal(signal.SIGHUP),
    "backup": command("backup", "HOME/copy"),
    "verify": command("verify"),
    "list of snapshots": command("backups", "list"),
}


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.long), 2])
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with Daemon(workers=request.param) as daemon:
        yield daemon


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone sees which process has the store open")
def test_no_operation_costs_a_lock(daemon: Daemon) -> None:
    with daemon.session() as kms:
        kms.create_dek("t")
        for name, run in OPERATIONS.items():
            run(daemon, kms)
            kms.create_dek("t")  # whatever the operation left to do
            for file in FILES:
                assert locks(daemon.writer, daemon.data_dir / file), f"no lock on {file} after {name}"


def test_no_process_that_has_the_store_open_opens_or_closes_it_otherwise(daemon: Daemon) -> None:
    """Also where no lock is lost by chance: SQLite opens it once a connection, and keeps it."""
    need_strace()
    visited = daemon.data_dir / "kms.db"
    with daemon.session() as kms:
        kms.create_dek("t")
        serving = daemon.pids() if len(daemon.pids()) == 1 else daemon.pids()[1:]
        wait_until(lambda: all(has_open(pid, visited) for pid in serving), 30, "all to have the store open")
        with watching(daemon.pids(), "open", "openat", "openat2", "close", path=visited) as calls:
            for run in OPERATIONS.values():
                run(daemon, kms)
        assert [text for text in calls if "O_PATH" not in text] == []


def test_what_is_acknowledged_after_a_visit_survives(daemon: Daemon) -> None:
    kept = Kept()
    with daemon.session() as kms:
        shred(daemon, kms)
        for _ in range(3):
            visit(daemon)
            kept.create(kms, 2)
    daemon.kill()
    daemon.start()
    with daemon.session() as kms:
        kept.opens(kms)
    kept.verifies(daemon)
