"""`bench fleet`: a host of a fleet beside one with a store of its own, and the wait until a change holds on
all hosts. It starts a PostgreSQL of its own in a temporary folder, which waits for the disk and has no
standby."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import queue
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..client import Client
from ..encoding import b64encode
from ..errors import KMSError
from ..fleet import schema
from ..fleet.board import Board
from ..fleet.engine import LEAST_SERVER, Link, connect
from ..fleet.host import Host, run
from ..fleet.lease import Clock
from ..fleet.registry import Engine
from ..fleet.settings import Where
from ..fleet.store import FleetStore
from ..store.contract import DekRecord
from .bench import MESSAGE, BenchFailed, Figure, daemon, flushes, load, post

TURNS = 5
"""Measures of each of two daemons, in turn: what counts is the median of each."""

HOSTS = 3, 100
"""Of fleets whose barrier is measured."""

SPAN = 60.0
PATIENCE = 60.0


def fleet(seconds: float) -> Iterator[Figure]:
    with _engine() as folder:
        where = _database(folder, "calls")
        block = f"{{hosts: '{where.folder}', database: {where.database}, user: {where.user}}}"
        with daemon() as own, daemon(f"store: postgresql\npostgresql: {block}\n") as of_fleet:
            yield Figure("disk flushes alone", flushes(Path(own).parent, min(seconds, 1.0)), "a second")
            yield from _beside(own, of_fleet, "durable creates, 64 callers", 64, seconds, _create)
            yield from _beside(own, of_fleet, "encrypt 200 B, one DEK, 16 connections", 16, seconds, _encrypt)
        for hosts in HOSTS:
            yield from _barrier(_database(folder, f"of{hosts}"), hosts, seconds)


def _create(path: str) -> bytes:
    return post("/create_dek_for_thread", {"thread_id": "bench"})


def _encrypt(path: str) -> bytes:
    with Client(path) as client:
        key_id = client.create_dek("bench").key_id
    return post("/encrypt", {"key_id": key_id, "plaintext": b64encode(bytes(MESSAGE))})


def _beside(
    own: str, of_fleet: str, name: str, connections: int, seconds: float, request: Any
) -> Iterator[Figure]:
    asked = {path: request(path) for path in (own, of_fleet)}
    found: dict[str, list[Any]] = {own: [], of_fleet: []}
    for _ in range(TURNS):
        for path, rows in found.items():
            rows.append(load(path, asked[path], connections, seconds / TURNS))
    alone, shared = (statistics.median(one.rate for one in rows) for rows in found.values())
    yield Figure(f"{name}: SQLite", alone, "a second", found[own][-1].latency)
    share = f"{shared / alone:.0%} of SQLite; {found[of_fleet][-1].latency}"
    yield Figure(f"{name}: fleet", shared, "a second", share)


# ---- the barrier -------------------------------------------------------------------------------------


class _Member:
    """A host without a daemon: its place in the fleet, kept by the daemon's own code."""

    def __init__(self, where: Where, number: int) -> None:
        self.host, self.name, self.inc = f"bench{number}", f"bench{number}", ""
        self._engine = Engine(Link(where, "progressdb-kms bench"), SPAN)
        self.place = Host(self, self, Board.new(), Clock(), self._engine.wake, SPAN)
        self._thread = threading.Thread(target=run, args=(self.place, self._engine), daemon=True)
        self._thread.start()

    def fresh(self) -> str:
        return os.urandom(8).hex()

    def gone(self) -> list[str]:
        return []

    def keks(self) -> frozenset[str]:
        return frozenset()

    def registered(self, inc: str) -> None:
        self.inc = inc

    def adopt(self, kek_id: str, version: int) -> None:
        """There is no KEK here."""

    def close(self) -> None:
        self.place.end()
        self._thread.join()


def _barrier(where: Where, hosts: int, seconds: float) -> Iterator[Figure]:
    """From before a change is sent to when all hosts are known to have heard of it."""
    members = [_Member(where, number) for number in range(hosts)]
    try:
        deadline = time.monotonic() + PATIENCE
        while any(not member.inc or member.place.why for member in members):
            if time.monotonic() > deadline:
                raise BenchFailed("the hosts could not register")
            time.sleep(0.01)
        link = Link(where, "progressdb-kms bench")
        with contextlib.closing(FleetStore(link, members[0].host, members[0].inc)) as store:
            store.unlock(memoryview(os.urandom(32)))
            took = sorted(_changes(store, members[0].place, seconds))
    finally:
        for member in members:
            member.place.end()
        for member in members:
            member.close()
    for part, name in ((0.5, "p50"), (0.99, "p99")):
        value = took[int(len(took) * part)] * 1e3
        yield Figure(f"a change holds on {hosts} hosts, {name}", value, "ms", f"{len(took)} changes")


def _changes(store: FleetStore, place: Host, seconds: float) -> Iterator[float]:
    record = DekRecord("bench", "bench", b"", "", 1, "2026-01-01T00:00:00Z")
    with store.transaction():
        store.put(record)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        record = record._replace(state="disabled" if record.state == "enabled" else "enabled")
        begun = time.monotonic()
        with store.transaction():
            store.put(record)
        done: queue.SimpleQueue[KMSError | None] = queue.SimpleQueue()
        place.everywhere(store.point, begun + PATIENCE, done.put)
        if (error := done.get(timeout=2 * PATIENCE)) is not None:
            raise BenchFailed(f"a change did not come through: {error.message}")
        yield time.monotonic() - begun


# ---- the engine --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _engine() -> Iterator[str]:
    """The folder of its socket. Raises BenchFailed where there can be none."""
    programs = _programs()
    folder = tempfile.mkdtemp(prefix="kmsbench")
    data = f"{folder}/data"
    words = []
    if os.geteuid() == 0:  # PostgreSQL doesn't run as root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        words = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]

    def program(name: str, *more: str) -> None:
        command = [*words, f"{programs}/{name}", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode:
            raise BenchFailed(f"{name}: {done.stderr.strip() or done.stdout.strip()}")

    try:
        program("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C")
        options = f"-c unix_socket_directories='{folder}' -c listen_addresses='' -c max_connections=200"
        program("pg_ctl", "start", "-w", "-s", "-D", data, "-l", f"{folder}/log", "-o", options)
        try:
            yield folder
        finally:
            program("pg_ctl", "stop", "-w", "-s", "-m", "immediate", "-D", data)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _database(folder: str, name: str) -> Where:
    """A fresh one, with the tables of an empty fleet."""
    with contextlib.closing(connect(Where((), folder, "postgres", "postgres"))) as session:
        session.execute(f"CREATE ROLE {name} LOGIN".encode())
        session.execute(f"CREATE DATABASE {name} OWNER {name}".encode())
    where = Where((), folder, name, name)
    with contextlib.closing(Link(where)) as link:
        schema.create(link)
    return where


def _programs() -> str:
    """The folder of the newest server that is installed."""
    found = [os.path.dirname(path) for path in glob.glob("/usr/lib/postgresql/*/bin/initdb")]
    found += [os.path.dirname(os.path.realpath(path)) for path in [shutil.which("initdb")] if path]
    known = [(_version(folder), folder) for folder in found]
    if not known or max(known)[0] < LEAST_SERVER // 10000:
        raise BenchFailed(
            "bench fleet starts a PostgreSQL of its own, and finds no initdb of version 14 or newer",
            hint="install the server, such as Debian's `postgresql`",
        )
    return max(known)[1]


def _version(folder: str) -> int:
    done = subprocess.run([f"{folder}/postgres", "--version"], capture_output=True, text=True, check=False)
    digits = done.stdout.split()[2].split(".")[0] if done.stdout else ""
    return int(digits) if digits.isdigit() else 0
