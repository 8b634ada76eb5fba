"""`bench fleet`: a host of a fleet beside one with a store of its own, the wait until a change holds on all
hosts, and how long the end of a rotation locks the rows; each beside what it is meant to reach. It starts a
PostgreSQL of its own in a temporary folder, which waits for the disk and has no standby."""

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
from ..crypto import envelope
from ..crypto.aead import KEY_SIZE, NONCE_SIZE, Aead
from ..crypto.keyring import REGION_SIZE, KekNotLoaded, Keyring
from ..crypto.memory import LockedBuffer, random_into
from ..encoding import b64encode, new_key_id, timestamp, wall
from ..errors import KMSError
from ..fleet import schema
from ..fleet.board import Board
from ..fleet.engine import LEAST_SERVER, Link, connect
from ..fleet.host import Host, run
from ..fleet.lease import Clock
from ..fleet.registry import EngineRegistry
from ..fleet.settings import Where
from ..fleet.store import Contended, Fenced, FleetStore
from ..service import ownkeys
from ..service.fleetrotation import FleetRotation
from ..store.contract import DekRecord
from .bench import (
    MESSAGE,
    BenchFailed,
    Figure,
    daemon,
    flushes,
    load,
    post,
    processor_seconds,
    session_of,
)

TURNS = 5
"""Measures of each of two daemons, in turn: what counts is the median of each."""

HOSTS = 3, 100
"""Of fleets whose barrier is measured."""

DEKS, BESIDE = 20_000, 10
"""DEKs of the fleet whose KEK is rotated, and those that another host makes every 20 ms meanwhile."""

AIMS = {"creates": 5000.0, "encrypts": 0.95, "barrier": 500.0, "lock": 50.0}
"""What is to be reached, on a machine that does nothing else: creates a second, a part of SQLite's encrypts,
the barrier's p99 in ms with 100 hosts, and the lock in ms at a million DEKs."""

SPAN = 60.0
PATIENCE = 60.0


def fleet(seconds: float, deks: int | None = None) -> Iterator[Figure]:
    with _engine() as folder:
        where = _database(folder, "calls")
        block = f"{{hosts: '{where.folder}', database: {where.database}, user: {where.user}}}"
        with daemon() as own, daemon(f"store: postgresql\npostgresql: {block}\n") as of_fleet:
            yield Figure("disk flushes alone", flushes(Path(own).parent, min(seconds, 1.0)), "a second")
            engine = os.getsid(int(Path(folder, "data", "postmaster.pid").read_text().split()[0]))
            creates = "durable creates, 64 callers"
            yield from _beside(own, of_fleet, creates, 64, seconds, _create, f"aim {AIMS['creates']:.0f}")
            yield from _cost(own, of_fleet, engine, seconds)
            encrypts = "encrypt 200 B, one DEK, 16 connections"
            aim = f"aim {AIMS['encrypts']:.0%} of SQLite"
            yield from _beside(own, of_fleet, encrypts, 16, seconds, _encrypt, aim)
        for hosts in HOSTS:
            yield from _barrier(_database(folder, f"of{hosts}"), hosts, seconds)
        yield from _rotation(_database(folder, "rotated"), Path(folder), deks or DEKS)


def _create(path: str) -> bytes:
    return post("/create_dek_for_thread", {"thread_id": "bench"})


def _encrypt(path: str) -> bytes:
    with Client(path) as client:
        key_id = client.create_dek("bench").key_id
    return post("/encrypt", {"key_id": key_id, "plaintext": b64encode(bytes(MESSAGE))})


def _beside(
    own: str, of_fleet: str, name: str, connections: int, seconds: float, request: Any, aim: str
) -> Iterator[Figure]:
    asked = {path: request(path) for path in (own, of_fleet)}
    found: dict[str, list[Any]] = {own: [], of_fleet: []}
    for _ in range(TURNS):
        for path, rows in found.items():
            rows.append(load(path, asked[path], connections, seconds / TURNS))
    alone, shared = (statistics.median(one.rate for one in rows) for rows in found.values())
    yield Figure(f"{name}: SQLite", alone, "a second", found[own][-1].latency)
    share = f"{shared / alone:.0%} of SQLite; {aim}; {found[of_fleet][-1].latency}"
    yield Figure(f"{name}: fleet", shared, "a second", share)


def _cost(own: str, of_fleet: str, engine: int, seconds: float) -> Iterator[Figure]:
    """Of the processor, which others at work on this machine move less than a rate. `engine`: its session."""
    for name, path, sessions in (("SQLite", own, ()), ("fleet", of_fleet, (engine,))):
        taking = [session_of(path), *sessions]
        before = sum(map(processor_seconds, taking)) + time.process_time()
        made = load(path, _create(path), 64, seconds).rate * seconds
        took = (sum(map(processor_seconds, taking)) + time.process_time() - before) / made
        cores = os.cpu_count() or 1
        most = f"callers and engine too: {cores} cores allow {cores / took:.0f} a second"
        yield Figure(f"processor time of a create: {name}", took * 1e6, "us", most)


# ---- the barrier -------------------------------------------------------------------------------------


class _Member:
    """A host without a daemon: its place in the fleet, kept by the daemon's own code."""

    def __init__(self, where: Where, number: int) -> None:
        self.host, self.name, self.inc = f"bench{number}", f"bench{number}", ""
        self._engine = EngineRegistry(Link(where, "progressdb-kms bench"), SPAN)
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
        aim = f"; aim {AIMS['barrier']:.0f}" if (hosts, part) == (100, 0.99) else ""
        yield Figure(f"a change holds on {hosts} hosts, {name}", value, "ms", f"{len(took)} changes{aim}")


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


# ---- a rotation --------------------------------------------------------------------------------------


def _rotation(where: Where, folder: Path, deks: int) -> Iterator[Figure]:
    """Of so many DEKs, while another host makes more."""
    with contextlib.ExitStack() as stack:
        keys = [stack.enter_context(LockedBuffer(KEY_SIZE)) for _ in range(3)]
        region = LockedBuffer(REGION_SIZE)  # its pages go with the process: the stores hold views of them
        stack.callback(region.wipe)
        for key in keys:
            random_into(key.view)
        keyring = Keyring(region.view)
        old, new = keyring.install(keys[0].view, 1), keyring.install(keys[1].view)
        keyring.activate(old, 1)
        for own in ownkeys.held(keyring).values():
            random_into(own)
        one, two = (stack.enter_context(_host(where, name, keyring, (old, new))) for name in ("one", "two"))
        with one.transaction():
            one.activate(old, 1, "2026-01-01T00:00:00.000000Z")
        two.acting = old
        for store in (one, two):
            with store.transaction():
                for name, held in ownkeys.held(keyring).items():
                    store.write(ownkeys.ROWS[name], ownkeys.wrap(keyring, old, name, held))
        for start in range(0, deks, 1000):
            _fill(one, keyring, old, keys[2].view, min(1000, deks - start))
        rotation = FleetRotation({new}, one, keyring, folder)
        begun, over = time.perf_counter(), threading.Event()
        other = threading.Thread(target=_make_beside, args=(two, keyring, old, keys[2].view, over))
        other.start()
        try:
            for _ in rotation.run(keys[1].view):
                pass
            lock, took = time.monotonic() - one.locked_at, time.perf_counter() - begun
        finally:
            over.set()
            other.join()
    yield Figure(f"rotation, {deks} DEKs", deks / took, "DEKs a second")
    aim = f"aim {AIMS['lock']:.0f} at 1000000"
    yield Figure(f"its lock of the rows, {deks} DEKs", lock * 1e3, "ms", aim)


@contextlib.contextmanager
def _host(where: Where, name: str, keyring: Keyring, keks: tuple[str, ...]) -> Iterator[FleetStore]:
    link = Link(where, "progressdb-kms bench")
    with link.session() as session:
        row = (name, name, name, list(keks))
        session.execute("INSERT INTO hosts VALUES (%s, %s, %s, 0, 0, %s, false)", row)
    with contextlib.closing(FleetStore(link, name, name, keyring.row_key)) as store:
        yield store


def _fill(store: FleetStore, keyring: Keyring, kek_id: str, dek: memoryview, count: int) -> None:
    now = wall()
    with keyring.borrow(kek_id) as kek:
        names = [new_key_id(int(now * 1000), os.urandom(10)) for _ in range(count)]
        blobs = [envelope.wrap(Aead(kek), kek_id, name, os.urandom(NONCE_SIZE), dek) for name in names]
    with store.transaction():
        store.put_all([DekRecord(*row, kek_id, 1, timestamp(now)) for row in zip(names, names, blobs)])


def _make_beside(
    store: FleetStore, keyring: Keyring, kek_id: str, dek: memoryview, over: threading.Event
) -> None:
    while not over.wait(0.02):
        try:
            _fill(store, keyring, kek_id, dek, BESIDE)
        except (Fenced, KekNotLoaded):  # the fleet has another KEK: a keeper would follow it
            return
        except Contended:
            continue


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
