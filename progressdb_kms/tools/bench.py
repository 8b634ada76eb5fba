"""What this machine can do, each figure beside the limits that it can reach in the same run.

    socket   a socket's worth of requests and answers of that size, and nothing done with them: see `bare`
    http     GET /healthz through the same socket and handler: HTTP without keys, cipher or audit
    cipher   unwrap a DEK and encrypt in a loop: no HTTP, no audit

Figures of one run compare with each other only. The load comes from one Python process, which takes a share
of the cores itself; a client in C would show more. Nothing here touches a running daemon: it starts its own
in a temporary folder, and in a session of its own, as a unit of systemd runs it: the scheduler shares the
cores among sessions first, so that in one session with its callers a daemon is measured at half of its rate.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import random
import resource
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Union

from ..audit import verify as auditverify
from ..audit.log import AuditLog, Fragment, fragment, key_fragment, peer_fragment
from ..audit.shared import Shared
from ..client import Client
from ..config import load as config
from ..config.keysource import Source
from ..config.options import cores
from ..crypto import aead, envelope
from ..crypto.aead import KEY_SIZE, NONCE_SIZE, Aead
from ..crypto.envelope import parse
from ..crypto.keyring import REGION_SIZE, Keyring
from ..crypto.memory import LockedBuffer
from ..encoding import b64encode, new_key_id, timestamp
from ..errors import OperatorError
from ..process import hardening
from ..rules import Peer, PeerRules
from ..service.channel import channel
from ..service.lock import claim
from ..service.metrics import Metrics
from ..service.plan import Configured, ConfiguredKey
from ..service.rotation import Rotation
from ..service.service import Service
from ..service.start import open_keeper
from ..store.contract import DekRecord
from ..store.mending import SqliteMending
from ..store.sqlite import SqliteStore
from ..wire import data
from ..wire.call import App, Call
from ..wire.http1 import parse_head
from .auditcounts import Counts
from .auditsearch import Hits, Query
from .bare import alone

MESSAGE = 200  # bytes: a chat message
ANSWER = 500  # bytes of an answer with one, its head included
PAGE = 100  # messages of a page of chat
CONNECTIONS = (1, 16, 64)
LARGE = (64 << 10, 1 << 20)  # bytes of raw bodies
MANY = 40_000  # DEKs: twice of what a worker remembers
TURN = 0.25  # seconds
SAMPLE = 200_000  # of them that are asked for, at most
START_SECONDS = 60.0
STORES = (1_000, 100_000, 1_000_000)  # DEKs: rotation is measured on each of these
DISK = 10 << 10  # bytes that a DEK takes while its store is rotated: two rows, and a snapshot file of 4 KiB


MESSAGES = (40, 300, 4096, 50_000)  # bytes of a message or field of ProgressDB

Address = Union[str, tuple[str, int]]
"""A Unix socket, or (host, port)."""


class BenchFailed(OperatorError):
    """The daemon that is measured did not start or gave a wrong answer."""

    default_code = "bench_failed"


class Figure(NamedTuple):
    name: str
    value: float
    unit: str
    note: str = ""


def run(what: str, *, seconds: int, deks: int | None, as_json: bool) -> int:
    """`what`: a key of MEASURES. Prints the figures; returns 0."""
    many = MANY if what in ("many", "usage", "audit") else STORES[-1]
    return show(MEASURES[what](float(seconds), deks or many), as_json)


def show(figures: Iterator[Figure], as_json: bool) -> int:
    for figure in figures:
        if as_json:
            print(json.dumps(figure._asdict()), flush=True)
        else:
            print(
                f"{figure.name:<42} {figure.value:>12,.0f} {figure.unit:<12} {figure.note}".rstrip(),
                flush=True,
            )
    return 0


# ---- calls -----------------------------------------------------------------------------------------


def calls(seconds: float, deks: int) -> Iterator[Figure]:
    cipher = _cipher_alone(min(seconds, 1.0))
    yield Figure("cipher alone: unwrap and encrypt 200 B", cipher, "a second", "one core")
    with daemon() as path, Client(path) as client:
        key_id = client.create_dek("bench").key_id
        text = os.urandom(MESSAGE)
        sealed = client.encrypt(key_id, text)
        page = {"items": [{"key_id": key_id, "ciphertext": b64encode(sealed)}] * PAGE}
        rows = (
            ("encrypt 200 B", post("/encrypt", {"key_id": key_id, "plaintext": b64encode(text)}), 1),
            ("decrypt 200 B", post("/decrypt", {"key_id": key_id, "ciphertext": b64encode(sealed)}), 1),
            ("decrypt a page of 100, messages", post("/decrypt_batch", page), PAGE),
            ("create a DEK", post("/create_dek_for_thread", {"thread_id": "bench"}), 1),
        )
        for count in CONNECTIONS:
            bare = _socket_alone(rows[0][1], ANSWER, count, seconds)
            yield Figure(f"socket alone, {count} connections", bare.rate, "a second", bare.latency)
            http = load(path, b"GET /healthz HTTP/1.1\r\nHost: unix\r\n\r\n", count, seconds)
            yield Figure(f"http alone, {count} connections", http.rate, "a second", http.latency)
            for name, request, items in rows:
                done = load(path, request, count, seconds)
                limits = (
                    f"{done.rate / bare.rate:.0%} of the socket alone, {done.rate / http.rate:.0%} of http"
                )
                share = f"{limits}; {done.latency}"
                yield Figure(f"{name}, {count} connections", done.rate * items, "a second", share)
        for size in LARGE:
            cipher = _cipher_of(size, min(seconds, 1.0))
            raw = _request(f"/encrypt?key_id={key_id}", "application/octet-stream", os.urandom(size))
            bare = _socket_alone(raw, size, 1, seconds)
            done = load(path, raw, 1, seconds)
            limits = (
                f"{done.rate / bare.rate:.0%} of the socket alone, {done.rate / cipher:.0%} of the cipher"
            )
            rate = done.rate * size / 1e6
            share = f"{limits}; {done.latency}"
            yield Figure(f"encrypt {size >> 10} KiB raw, 1 connection", rate, "MB a second", share)


def many(seconds: float, deks: int) -> Iterator[Figure]:
    """Encrypts under one DEK, and under DEKs at random of a store that holds more than a worker remembers; a
    page of 100 messages under one DEK and under 100."""
    with daemon(fill=lambda folder: _fill_store(folder, deks)) as path, Client(path) as client:
        names = [dek.key_id for dek in islice(client.list(), SAMPLE)]
        text = b64encode(os.urandom(MESSAGE))
        asked = [post("/encrypt", {"key_id": name, "plaintext": text}) for name in names]
        one = load(path, asked[0], 4, seconds)
        yield Figure("encrypt 200 B, one DEK", one.rate, "a second", one.latency)
        load(path, asked, 4, seconds)  # as if it had run for a while
        each = load(path, asked, 4, seconds)
        share = f"{each.rate / one.rate:.0%} of one DEK; {each.latency}"
        yield Figure(f"encrypt 200 B, {deks} DEKs at random", each.rate, "a second", share)
        pages = [_page(client, chosen) for chosen in (names[:1] * PAGE, names[:PAGE])]
        same, mixed = (load(path, page, 4, seconds) for page in pages)
        yield Figure("a page of 100 under one DEK", same.rate * PAGE, "messages a second", same.latency)
        share = f"{mixed.rate / same.rate:.0%} of one DEK; {mixed.latency}"
        yield Figure("a page of 100 under as many DEKs", mixed.rate * PAGE, "messages a second", share)


def usage(seconds: float, deks: int) -> Iterator[Figure]:
    """What it costs that uses are counted, under one DEK and under DEKs at random: three daemons on copies of
    one store, of which one does not count, take turns. That two of them count tells
    how far a figure is chance."""
    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kmsbench")))
        _make_key(made / "key")
        _fill_store(made, deks)
        paths = [
            stack.enter_context(daemon(fill=_copy_of(made), before=before)) for before in ("", _UNCOUNTED, "")
        ]
        with Client(paths[0]) as client:
            names = [dek.key_id for dek in islice(client.list(), SAMPLE)]
        text = b64encode(os.urandom(MESSAGE))
        asked = [post("/encrypt", {"key_id": name, "plaintext": text}) for name in names]
        for what, requests in (("one DEK", asked[:1]), (f"{deks} DEKs at random", asked)):
            counting, without, again = _in_turn(paths, requests, seconds)
            yield _share(f"uses counted, {what}", counting, without)
            yield _share(f"the same counted twice, {what}", again, counting)


_UNCOUNTED = """\
from progressdb_kms.service.usage import Uses
Uses.add = lambda self, *use: None
Uses.batch = lambda self, now: None
"""
"""Run before a daemon that is measured, and that nobody else can get: there is no such setting."""


class Turns(NamedTuple):
    rates: list[float]  # answers a second of each turn
    processor: float  # seconds a request


def _in_turn(paths: Sequence[str], requests: list[bytes], seconds: float) -> list[Turns]:
    """So many seconds for each."""
    for path in paths:
        load(path, requests, 4, min(seconds, 1.0))  # as if it had run for a while
    sessions, spent = [session_of(path) for path in paths], [0.0] * len(paths)
    rates: list[list[float]] = [[] for _ in paths]
    for turn in range(max(4, round(seconds / TURN))):
        for i in range(len(paths)) if turn % 2 else reversed(range(len(paths))):
            before = processor_seconds(sessions[i])
            rates[i].append(load(paths[i], requests, 4, TURN).rate)
            spent[i] += processor_seconds(sessions[i]) - before
    return [Turns(rates[i], spent[i] / (sum(rates[i]) * TURN)) for i in range(len(paths))]


def _share(name: str, one: Turns, other: Turns) -> Figure:
    rate = sorted(a / b for a, b in zip(one.rates, other.rates))[len(one.rates) // 2]
    time = f"{one.processor / other.processor:.1%} of the processor time, {len(one.rates)} turns"
    return Figure(name, rate * 100, "% of the rate", time)


def session_of(path: str) -> int:
    """Of the daemon that listens there: it has one of its own."""
    with _connect(path) as sock:
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return os.getsid(pid)


def processor_seconds(leader: int) -> float:
    """Of a session, and of what its leader has started: an engine's backends make a session each."""
    ticks = 0
    for process in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = process.read_text().rpartition(")")[2].split()
            if leader in (int(fields[1]), int(fields[3])):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _copy_of(folder: Path) -> Callable[[Path], None]:
    def copy(target: Path) -> None:
        shutil.copytree(folder, target, dirs_exist_ok=True)

    return copy


def _page(client: Client, names: list[str]) -> bytes:
    items = [
        {"key_id": name, "ciphertext": b64encode(client.encrypt(name, os.urandom(MESSAGE)))} for name in names
    ]
    return post("/decrypt_batch", {"items": items})


def progressdb(seconds: float, deks: int) -> Iterator[Figure]:
    """What ProgressDB does to it: one connection, one message after another, a page by 25 calls in sequence.
    In its newest dialect, over the socket and over TCP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        tcp: Address = probe.getsockname()
    host = f"{tcp[0]}:{tcp[1]}"
    with daemon(f"tcp_address: {host}\n") as path, Client(path) as client:
        key_id = client.create_dek("bench").key_id
        for way, address in (("socket", path), ("tcp", tcp)):
            for size in MESSAGES:
                text = b'"%b"' % (b"m" * (size - 2))
                kept = b'"%b"' % b64encode(client.encrypt(key_id, text)).encode()
                sealing = post("/encrypt", {"key_id": key_id, "plaintext": b64encode(text)}, host)
                opening = post("/decrypt", {"key_id": key_id, "ciphertext": b64encode(kept)}, host)
                for name, request in (("encrypt", sealing), ("decrypt", opening)):
                    done = load(address, request, 1, seconds)
                    yield Figure(f"{name} {size} B, {way}", done.rate, "a second", done.latency)
                if size == 300:
                    done = load(address, opening, 1, seconds, each=25)
                    yield Figure(f"page of 25, {way}", done.rate, "pages a second", done.latency)


def _socket_alone(request: bytes, answer: int, connections: int, seconds: float) -> Load:
    with alone(answer, cores()) as path:
        return load(path, request, connections, seconds)


def _cipher_alone(seconds: float) -> float:
    with LockedBuffer(KEY_SIZE) as kek, LockedBuffer(envelope.SCRATCH_SIZE) as scratch:
        _fill(kek.view)
        blob = envelope.wrap(Aead(kek.view), "0" * 16, "bench", bytes(NONCE_SIZE), kek.view)
        wrapped, text, count = parse(blob), os.urandom(MESSAGE), 0
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            dek = envelope.unwrap(Aead(kek.view), wrapped, scratch.view)
            aead.seal(Aead(dek), os.urandom(NONCE_SIZE), text, b"")
            count += 1
        del dek
        return count / seconds


def _cipher_of(size: int, seconds: float) -> float:
    """Seals of so many bytes a second, on one core."""
    with LockedBuffer(KEY_SIZE) as dek:
        _fill(dek.view)
        cipher, text = Aead(dek.view), bytes(size)
        return _rate(lambda: aead.seal(cipher, os.urandom(NONCE_SIZE), text, b""), seconds)


class Load(NamedTuple):
    rate: float  # answers a second
    p50: float  # seconds
    p99: float

    @property
    def latency(self) -> str:
        return f"p50 {self.p50 * 1e6:.0f} us, p99 {self.p99 * 1e6:.0f} us"


PATIENCE = 30.0
"""Seconds beyond those of a measurement for which its first answers are waited for on a busy machine."""


def _too_few(took: list[float], each: int, until: float) -> bool:
    return len(took) < each and time.perf_counter() < until + PATIENCE


def load(
    path: Address,
    request: bytes | Sequence[bytes],
    connections: int,
    seconds: float,
    ended: Callable[[], bool] = lambda: False,
    each: int = 1,
) -> Load:
    """A closed loop: each connection sends the next request when it has the answer. It ends after `seconds`,
    or earlier, as soon as `ended` says so. `request`: one, or several with answers of one length, of which
    each time one is drawn. `each`: so many answers are counted and timed as one. Raises BenchFailed at an
    answer that is not 2xx."""
    requests = [request] if isinstance(request, bytes) else request
    with selectors.DefaultSelector() as selector, ExitStack() as opened, _lost():
        socks = [opened.enter_context(_connect(path)) for _ in range(connections)]
        size = _first_answer(socks[0], requests[0])
        took: list[float] = []
        for sock in socks:
            sock.sendall(random.choice(requests))  # noqa: S311
            selector.register(sock, selectors.EVENT_READ, [size, time.perf_counter()])
        begun = time.perf_counter()
        until = begun + seconds
        while ((now := time.perf_counter()) < until or _too_few(took, each, until)) and not ended():
            for event, _ in selector.select(0.1):
                _answered(event, requests, size, took)
    took = sorted(map(sum, zip(*([iter(took)] * each))))
    if not took:
        raise BenchFailed("no answer came")
    p50, p99 = (took[int(len(took) * part)] for part in (0.5, 0.99))
    return Load(len(took) / (now - begun), p50, p99)


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BenchFailed(f"the daemon that is measured is gone: {error.strerror}") from error


def _answered(event: selectors.SelectorKey, requests: Sequence[bytes], size: int, took: list[float]) -> None:
    """Take in what came; where the answer is whole, send the next request."""
    sock = event.fileobj
    assert isinstance(sock, socket.socket)
    state = event.data
    state[0] -= len(_received(sock))
    if state[0] <= 0:
        now = time.perf_counter()
        took.append(now - state[1])
        state[0], state[1] = size, now
        sock.sendall(random.choice(requests))  # noqa: S311


def _received(sock: socket.socket) -> bytes:
    if not (some := sock.recv(1 << 21)):
        raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
    return some


def _connect(path: Address) -> socket.socket:
    family = socket.AF_UNIX if isinstance(path, str) else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(30)
    sock.connect(path)
    return sock


def _first_answer(sock: socket.socket, request: bytes) -> int:
    """Bytes of an answer: nearly the same each time, as only the number of the audit record grows."""
    sock.sendall(request)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += _received(sock)
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.split(b" ")[1][:1] != b"2":
        raise BenchFailed(f"the daemon answered {head.splitlines()[0].decode()}")
    length = next(int(line[15:]) for line in head.splitlines() if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += _received(sock)
    return len(head) + 4 + length


def post(path: str, body: dict[str, Any], host: str = "unix") -> bytes:
    return _request(path, "application/json", json.dumps(body).encode(), host)


def _request(path: str, kind: str, body: bytes, host: str = "unix") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextmanager
def daemon(
    config_lines: str = "", fill: Callable[[Path], None] = lambda folder: None, before: str = ""
) -> Iterator[str]:
    """A daemon of its own on a temporary folder; yields the path of its socket. `fill` makes the store, in
    `d` of that folder, for the key in `key`. `before`: Python that it runs first."""
    folder = tempfile.mkdtemp(prefix="kmsbench")
    try:
        socket_path = f"{folder}/s"
        _make_key(Path(folder, "key"))
        config = Path(folder, "c.yaml")
        config.write_text("master_key_file: key\n" + config_lines)
        config.chmod(0o600)
        fill(Path(folder))
        command = [
            *_program(before),
            "--socket",
            socket_path,
            "--data-dir",
            f"{folder}/d",
            "--config",
            str(config),
        ]
        with (
            open(f"{folder}/said", "w") as said,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True
            ) as process,
        ):
            timer = threading.Timer(START_SECONDS, process.kill)
            timer.start()
            try:
                assert process.stdout is not None
                if not process.stdout.readline():
                    why = Path(folder, "said").read_text().strip() or "it said nothing"
                    raise BenchFailed(f"the daemon that is to be measured did not start: {why}")
                timer.cancel()
                yield socket_path
            finally:
                timer.cancel()
                process.terminate()
    finally:
        shutil.rmtree(folder)


def _make_key(path: Path) -> None:
    subprocess.run([*_program(), "genkey", str(path)], check=True, stdout=subprocess.DEVNULL)


def _program(before: str = "") -> list[str]:
    """This very program, however it was started."""
    if before:
        root = str(Path(__file__).parents[2])
        start = "from progressdb_kms.__main__ import main\nsys.exit(main())"
        return [sys.executable, "-c", f"import sys\nsys.path.insert(0, {root!r})\n{before}{start}"]
    if sys.argv[0].endswith(".pyz"):
        return [sys.executable, sys.argv[0]]
    return [sys.executable, "-m", "progressdb_kms"]


# ---- the store and rotation ------------------------------------------------------------------------


def store(seconds: float, deks: int) -> Iterator[Figure]:
    """Durable creates: alone, each pays for its disk flush; together they share them."""
    with daemon() as path:
        alone = flushes(Path(path).parent, min(seconds, 1.0))
        yield Figure("disk flushes alone", alone, "a second", "4 KiB and fdatasync, one after another")
        request = post("/create_dek_for_thread", {"thread_id": "bench"})
        for count in (1, 64):
            done = load(path, request, count, seconds)
            share = f"{done.rate / (alone * count):.0%} of a flush for each {count}; {done.latency}"
            yield Figure(f"durable creates, {count} callers", done.rate, "a second", share)


def flushes(folder: Path, seconds: float) -> float:
    with open(folder / "flushed", "wb", buffering=0) as file:

        def flush() -> None:
            file.write(bytes(4096))
            os.fdatasync(file.fileno())

        return _rate(flush, seconds)


def rotate(seconds: float, deks: int) -> Iterator[Figure]:
    """Stores of STORES DEKs each, as far as `deks`. They are removed at the end: a file system that has just
    deleted many files makes new ones slowly, which would show in the next figure."""
    sizes = [size for size in STORES if size < deks] + [deks]
    folder = Path(tempfile.mkdtemp(prefix="kmsbench"))
    try:
        if (free := shutil.disk_usage(folder).free) < (needed := sum(sizes) * DISK):
            raise BenchFailed(
                f"{folder.parent} has {free >> 20} MiB free, the stores to rotate take {needed >> 20}",
                hint="fewer --deks, or another TMPDIR",
            )
        resident = _resident()
        for size in sizes:
            yield from _rotation(folder / str(size), size, resident)
    finally:
        shutil.rmtree(folder)
    yield from _beside_a_rotation(seconds)


def _beside_a_rotation(seconds: float) -> Iterator[Figure]:
    """What callers notice of it: a daemon with as many DEKs as can be made in a while, at work meanwhile."""
    with daemon() as path, Client(path) as client:
        load(path, post("/create_dek_for_thread", {"thread_id": "bench"}), 64, 2 * seconds)
        key_id = client.create_dek("bench").key_id
        encrypt = post("/encrypt", {"key_id": key_id, "plaintext": b64encode(os.urandom(MESSAGE))})
        create = post("/create_dek_for_thread", {"thread_id": "bench"})
        for name, request in (("encrypt 200 B", encrypt), ("create a DEK", create)):
            alone = load(path, request, 4, seconds / 2)
            with ThreadPoolExecutor(1) as pool:
                rotating = pool.submit(client.rotate_kek, os.urandom(KEY_SIZE))
                beside = load(path, request, 4, 60 * seconds, ended=rotating.done)
                deks = rotating.result().rewrapped
            note = f"beside a rotation of {deks} DEKs; alone {alone.p99 * 1e6:.0f}"
            yield Figure(f"{name}, p99", beside.p99 * 1e6, "us", note)


def _rotation(folder: Path, deks: int, resident: int) -> Iterator[Figure]:
    """A store of `deks` DEKs: time to open it, rate of a rotation, and how far that takes the memory of this
    process above `resident` KiB."""
    folder.mkdir()
    with _made(folder, deks, _fill) as made:
        begun = time.perf_counter()
        keeper, _ = open_keeper(folder, made.keyring, made.configured, made.new, made.inbox, 0)
        yield Figure(f"start-up checks, {deks} DEKs", (time.perf_counter() - begun) * 1e3, "ms")
        keeper.close()
        opened = SqliteStore(folder)
        opened.unlock(made.keyring.row_key)
        _resident(anew=True)
        begun = time.perf_counter()
        for _ in Rotation(opened, made.keyring, folder).run(made.new):
            pass
        yield Figure(f"rotation, {deks} DEKs", deks / (time.perf_counter() - begun), "DEKs a second")
        yield Figure(f"its memory, {deks} DEKs", max(0, _resident() - resident) / 1024, "MiB")
        opened.close()


# ---- the audit log -----------------------------------------------------------------------------------


def audit(seconds: float, deks: int) -> Iterator[Figure]:
    """How quickly a log is gone through: encrypts and decrypts of four callers under DEKs at random, written
    by two workers. In a process that wipes on free, as that of the commands does, since they have keys."""
    if WAY not in os.environ:
        prepared = hardening.new_environment(os.environ, os.getpid(), wipes=True) or os.environ
        words = ["bench", "audit", "--json", "--seconds", f"{max(1, round(seconds))}", "--deks", f"{deks}"]
        environ = {**prepared, WAY: "careful"}
        done = subprocess.run([*_program(), *words], env=environ, check=True, stdout=subprocess.PIPE)
        yield from (Figure(**json.loads(line)) for line in done.stdout.splitlines())
        return
    with tempfile.TemporaryDirectory(prefix="kmsbench") as folder, LockedBuffer(KEY_SIZE) as key:
        _fill(key.view)
        path = Path(folder, "log")
        _write_log(path, key.view, max(1000, int(seconds * 50_000)), deks)
        found = Hits(Query(key="k_none"), key.view, lambda event: None)
        for processes in dict.fromkeys((1, cores())):
            by = f"{processes} process" + "es" * (processes > 1)
            yield _gone_through(f"verify, {by}", path, key.view, None, processes)
            yield _gone_through(f"search, nothing found, {by}", path, key.view, found, processes)
            yield _gone_through(f"report, {by}", path, key.view, Counts(), processes)


def _gone_through(
    name: str, path: Path, key: memoryview, observe: Hits | Counts | None, processes: int
) -> Figure:
    begun, spent = time.perf_counter(), _used()
    shared = partial(Shared, processes=processes)
    report = auditverify.verify([path], key, {}, observe=observe, reading=shared)
    if report.fault is not None:
        raise BenchFailed(str(report.fault))
    took, spent = time.perf_counter() - begun, _used() - spent
    note = f"{report.lines / spent:,.0f} of processor time; {report.lines} lines, {_resident() >> 10} MiB"
    return Figure(f"audit {name}", report.lines / took, "lines a second", note)


def _used() -> float:
    """Seconds of processor time, of this process and of those that it waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def _write_log(path: Path, key: memoryview, lines: int, deks: int) -> None:
    logs = [AuditLog(path, key, f"1.{place}") for place in (1, 2)]
    peers = [peer_fragment(1000 + number, 1000, 1) for number in range(4)]
    for number in range(lines):
        dek, op = random.randrange(deks), random.choice(("encrypt", "decrypt"))  # noqa: S311
        about = fragment(request_id=f"bench-{number}")
        named = key_fragment(f"k_{dek:025}", f"thread-{dek % 1000}")
        logs[number % 7 & 1].record(op, "ok", 200, named, peers[number % 4], about)
    for log in logs:
        log.close()


# ---- what keeping keys out of memory costs ----------------------------------------------------------

WAY = "PROGRESSDB_KMS_BENCH_WAY"
"""In the environment of a process that measures one way: `naive` or `careful`."""


def memory(seconds: float, deks: int) -> Iterator[Figure]:
    """One encrypt of 200 B from its JSON to its JSON, without HTTP and audit log: as the daemon does it, and
    as one would without a thought for memory (keys as bytes, json, no wiping). Each in a process of its own,
    since wiping on free belongs to the one and not to the other; in turn, so that drift hits both."""
    if WAY in os.environ:
        body = json.dumps({"key_id": "bench", "plaintext": b64encode(os.urandom(MESSAGE))}).encode()
        encrypt = _naive(body) if os.environ[WAY] == "naive" else _careful(body)
        yield Figure("encrypt", _rate(encrypt, seconds), "a second")
        return
    prepared = hardening.new_environment(os.environ, os.getpid(), wipes=True) or os.environ
    plain, careful = {**os.environ, WAY: "naive"}, {**prepared, WAY: "careful"}
    rounds = [(_measured(plain, seconds / 3), _measured(careful, seconds / 3)) for _ in range(3)]
    naive, ours = (sorted(column)[1] for column in zip(*rounds))
    yield Figure("encrypt 200 B, naive", naive, "a second", "no HTTP, no audit log")
    yield Figure("encrypt 200 B, as the daemon does it", ours, "a second", f"{naive / ours - 1:+.0%} time")


def _measured(environ: dict[str, str], seconds: float) -> float:
    command = [*_program(), "bench", "memory", "--json", "--seconds", str(max(1, round(seconds)))]
    done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    rate: float = json.loads(done.stdout)["value"]
    return rate


def _rate(work: Callable[[], object], seconds: float) -> float:
    count, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        work()
        count += 1
    return count / seconds


def _naive(body: bytes) -> Callable[[], bytes]:
    kek, nonce = os.urandom(KEY_SIZE), os.urandom(NONCE_SIZE)
    wrapped = nonce + aead.seal(Aead(memoryview(kek)), nonce, os.urandom(KEY_SIZE), b"bench")

    def encrypt() -> bytes:
        plaintext = base64.b64decode(json.loads(body)["plaintext"], validate=True)
        dek = aead.open(Aead(memoryview(kek)), wrapped, b"bench")
        own = os.urandom(NONCE_SIZE)
        sealed = own + aead.seal(Aead(memoryview(dek)), own, plaintext, b"")
        return json.dumps({"ciphertext": base64.b64encode(sealed).decode()}).encode()

    return encrypt


class _Stored:
    """A store of one DEK."""

    record: DekRecord

    def existing(self, key_id: str) -> DekRecord:
        return self.record

    def heavy(self) -> dict[str, int]:
        return {}


def _careful(body: bytes) -> Callable[[], bytes]:
    region, scratch = LockedBuffer(REGION_SIZE), LockedBuffer(2 * envelope.SCRATCH_SIZE)
    keyring, store = Keyring(region.view), _Stored()
    with LockedBuffer(KEY_SIZE) as key:
        _fill(key.view)
        kek_id = keyring.install(key.view, 1)
        keyring.activate(kek_id, 1)
        blob = envelope.wrap(Aead(key.view), kek_id, "bench", os.urandom(NONCE_SIZE), key.view)
    store.record = DekRecord("bench", "bench", blob, kek_id, 1, "")
    reader: Any = store
    unused: Any = None
    service = Service(reader, keyring, unused, unused, PeerRules(), Metrics(1).block(0), dict)
    app = App(service, unused, unused, 1 << 20)
    head = parse_head(b"POST /encrypt HTTP/1.1\r\nHost: u\r\nContent-Type: application/json\r\n\r\n")
    locked = scratch.view[: envelope.SCRATCH_SIZE]
    call = Call(head, body, Peer(0, 0, 0), Fragment(""), locked, locked)

    def encrypt() -> bytes:
        call.body = body  # which the route lets go
        return bytes(data.encrypt(app, call).body)

    return encrypt


# ---- a store to measure with ------------------------------------------------------------------------


class Made(NamedTuple):
    keyring: Keyring
    configured: Configured
    new: memoryview  # another KEK
    inbox: socket.socket


@contextmanager
def _made(folder: Path, deks: int, key: Callable[[memoryview], None]) -> Iterator[Made]:
    """A data-dir with so many DEKs, under the KEK that `key` writes."""
    region = LockedBuffer(REGION_SIZE)  # its pages go with the process: keepers hold views of them
    inbox, outbox = channel()
    lock = claim(folder)
    try:
        with LockedBuffer(KEY_SIZE) as kek, LockedBuffer(KEY_SIZE) as new:
            key(kek.view)
            _fill(new.view)
            keyring = Keyring(region.view)
            kek_id = keyring.install(kek.view, 1)
            keys = [ConfiguredKey(kek_id, Source("", "", "bench"))]
            defaults = config.load({}, {}, need_key=False).settings
            made = Made(keyring, Configured(defaults, keys), new.view, inbox)
            open_keeper(folder, keyring, made.configured, new.view, inbox, 0)[0].close()
            _make_deks(folder, keyring, kek_id, deks)
            yield made
    finally:
        region.wipe()
        lock.close()
        for end in (inbox, outbox):
            end.close()


def _fill_store(folder: Path, deks: int) -> None:
    """The data-dir `d` of a daemon whose key stands in `key`."""
    (folder / "d").mkdir(mode=0o700)

    def read(view: memoryview) -> None:
        view[:] = bytes.fromhex((folder / "key").read_text())

    with _made(folder / "d", deks, read):
        pass


def _make_deks(folder: Path, keyring: Keyring, kek_id: str, count: int) -> None:
    made = SqliteMending(folder)
    made.unlock(keyring.row_key)
    with LockedBuffer(KEY_SIZE) as dek, keyring.borrow(kek_id) as kek:
        _fill(dek.view)
        with made.transaction():
            made.staging(True)
        for start in range(0, count, 1000):
            numbers = range(start, min(count, start + 1000))
            with made.transaction(durable=False):
                made.stage(_dek(kek, kek_id, number, dek.view) for number in numbers)
        with made.transaction():
            made.swap({})
            made.recount()
    made.close()


def _dek(kek: memoryview, kek_id: str, number: int, dek: memoryview) -> DekRecord:
    key_id = new_key_id(number, os.urandom(10))
    wrapped = envelope.wrap(Aead(kek), kek_id, key_id, os.urandom(NONCE_SIZE), dek)
    return DekRecord(key_id, f"thread-{number % 1000}", wrapped, kek_id, 1, timestamp(number))


def _fill(view: memoryview) -> None:
    with open("/dev/urandom", "rb", buffering=0) as source:
        os.readv(source.fileno(), [view])


def _resident(anew: bool = False) -> int:
    """KiB of this process in memory, at its highest; `anew`: from now on (proc(5), clear_refs)."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


MEASURES: dict[str, Callable[[float, int], Iterator[Figure]]] = {
    "calls": calls,
    "many": many,
    "usage": usage,
    "progressdb": progressdb,
    "store": store,
    "rotate": rotate,
    "audit": audit,
    "memory": memory,
}
