"""Many, slow, idle and half-closed peers: each limit holds, neighbours are served, nothing is left behind."""

from __future__ import annotations

import os
import resource
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.harness import Daemon, raw
from tests.harness.load import Load
from tests.harness.procs import rss_kib, wait_until
from tests.harness.wire import connect

pytestmark = pytest.mark.fresh

HEAD = (
    b"POST /encrypt HTTP/1.1\r\nHost: unix\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
)
GET = b"GET /healthz HTTP/1.1\r\nHost: unix\r\n\r\n"


def descriptors(daemon: Daemon) -> int:
    """Without those of locked memory, which is kept for the next connections. The daemon is not dumpable, so
    that root alone sees its descriptors; others see the open ends of its socket."""
    if os.geteuid() != 0:
        ends = Path("/proc/net/unix").read_text().splitlines()
        return sum(line.endswith(f" {daemon.socket}") for line in ends)
    found = 0
    for path in [path for pid in daemon.pids() for path in Path(f"/proc/{pid}/fd").iterdir()]:
        with suppress(FileNotFoundError):  # closed meanwhile
            found += "secretmem" not in os.readlink(path)
    return found


def threads(daemon: Daemon) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in daemon.pids())


def held(daemon: Daemon) -> tuple[int, int]:
    return threads(daemon), descriptors(daemon)


@contextmanager
def nothing_left(daemon: Daemon) -> Iterator[None]:
    """After the block as many threads and descriptors as before it, when all had been used once."""
    for _ in range(4):
        daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})
    before = (0, 0)
    while before != (before := held(daemon)):  # all workers are up when nothing more comes
        time.sleep(0.5)
    yield
    wait_until(
        lambda: all(now <= then for now, then in zip(held(daemon), before)),
        30,
        f"threads and descriptors to be {before} again",
    )


@contextmanager
def served(daemon: Daemon) -> Iterator[list[float]]:
    """A neighbour who works all the while, and whose every call must succeed. Seconds of each call."""
    key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "neighbour"})["key_id"]
    taken: list[float] = []

    def work(session: object, number: int) -> None:
        begun = time.perf_counter()
        session.ok("POST", "/encrypt", {"key_id": key, "plaintext": "aGVsbG8="})  # type: ignore[attr-defined]
        taken.append(time.perf_counter() - begun)

    with Load(daemon.socket, work, threads=1) as load:
        load.wait_for(20)
        yield taken
        load.wait_for(len(load.results) + 20)
    assert not load.errors


def open_many(daemon: Daemon, count: int, stack: ExitStack) -> list[socket.socket]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count + 100 > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 200), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    return [stack.enter_context(connect(daemon.socket)) for _ in range(count)]


def healthy(sock: socket.socket) -> bool:
    sock.sendall(GET)
    return sock.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_thousand_idle_connections() -> None:
    with Daemon({"max_connections": 1100}, workers=2) as daemon, nothing_left(daemon), served(daemon):
        before = sum(rss_kib(pid) for pid in daemon.pids())
        locked = daemon.ok("GET", "/status")["memory"]["locked_bytes"]
        with ExitStack() as stack:
            open_ones = open_many(daemon, 1000, stack)
            assert all(healthy(sock) for sock in open_ones)
            each = (sum(rss_kib(pid) for pid in daemon.pids()) - before) / 1000
            more = (daemon.ok("GET", "/status")["memory"]["locked_bytes"] - locked) / 1000
            print(f"an idle connection costs {each:.1f} KiB")
            assert each < 10 and more == 0  # no thread, no buffer, no locked page
            assert threads(daemon) < 20
            assert all(healthy(sock) for sock in open_ones)


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_connects_in_a_row(count: int) -> None:
    with Daemon(workers=2) as daemon, nothing_left(daemon), served(daemon):
        for _ in range(count):
            with connect(daemon.socket) as sock:
                assert healthy(sock)


def test_past_max_connections() -> None:
    with Daemon({"max_connections": 20}, workers=2) as daemon, nothing_left(daemon), ExitStack() as stack:
        open_ones = open_many(daemon, 20, stack)
        assert all(healthy(sock) for sock in open_ones)
        for _ in range(50):
            answer = raw(daemon.socket, GET, end=False)  # returns: it is closed
            assert answer.startswith(b"HTTP/1.1 503 ") and b'"overloaded"' in answer
        assert all(healthy(sock) for sock in open_ones)
        open_ones[0].close()
        wait_until(lambda: raw(daemon.socket, GET).startswith(b"HTTP/1.1 200"), 20, "a free place")


SLOW = {
    "the head": HEAD[:40],
    "the body": HEAD + b'{"key_id":',
    "the first byte": b"",
}


@pytest.mark.parametrize(
    "what",
    ["the body", *(pytest.param(what, marks=pytest.mark.long) for what in ("the head", "the first byte"))],
)
def test_slow_senders(what: str) -> None:
    """A byte now and then keeps nobody alive: there is one deadline for the whole."""
    config = {"request_timeout": 2, "idle_timeout": 2}
    with Daemon(config, workers=2) as daemon, nothing_left(daemon), served(daemon), ExitStack() as stack:
        waiting = set(open_many(daemon, 100, stack))
        for sock in waiting:
            sock.sendall(SLOW[what])
            sock.settimeout(0.001)
        deadline = time.monotonic() + 30
        while waiting and time.monotonic() < deadline:
            waiting = {sock for sock in waiting if not let_go(sock, drip=bool(SLOW[what]))}
        assert not waiting


def let_go(sock: socket.socket, drip: bool) -> bool:
    """Another byte; has the daemon hung up?"""
    try:
        if drip:
            sock.send(b"a")
        answer = sock.recv(1000)
    except socket.timeout:
        return False
    except OSError:
        return True
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")
    return True


def test_slow_readers() -> None:
    """Who does not take his answers is let go; the others don't wait for him."""
    config = {"request_timeout": 2, "max_body_bytes": 4 << 20}
    with Daemon(config, workers=2) as daemon, nothing_left(daemon), served(daemon), ExitStack() as stack:
        key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        size = 2 << 20
        head = f"POST /encrypt?key_id={key} HTTP/1.1\r\nHost: u\r\nContent-Type: application/octet-stream\r\n"
        request = head.encode() + b"Content-Length: %d\r\n\r\n" % size + bytes(size)
        slow = open_many(daemon, 8, stack)
        for sock in slow:
            sock.sendall(request)
        wait_until(lambda: open_connections(daemon) <= 2, 30, "the slow readers to be let go")


def open_connections(daemon: Daemon) -> int:
    text = daemon.request("GET", "/metrics").body.decode()
    return int(text.split("\nprogressdb_kms_connections ")[1].split("\n")[0])


def test_half_closed_peers_get_their_answer(daemon: Daemon) -> None:
    with nothing_left(daemon):
        for _ in range(200):
            assert raw(daemon.socket, GET, end=True).startswith(b"HTTP/1.1 200")
        for _ in range(200):  # gone without reading
            with connect(daemon.socket) as sock:
                sock.sendall(HEAD[:30])


@pytest.mark.long
def test_neighbours_hardly_notice() -> None:
    """Prints the p99 of a neighbour alone and beside each crowd, in one run."""

    def p99(taken: list[float]) -> float:
        return statistics.quantiles(taken[20:], n=100)[98] * 1e6

    with Daemon({"max_connections": 1100, "request_timeout": 30}, workers=2) as daemon:
        with served(daemon) as alone:
            time.sleep(3)
        print(f"alone: {p99(alone):.0f} us")
        with ExitStack() as stack:
            for sock in open_many(daemon, 1000, stack):
                healthy(sock)
            with served(daemon) as beside:
                time.sleep(3)
        print(f"beside 1,000 idle connections: {p99(beside):.0f} us")
        with ExitStack() as stack:
            for sock in open_many(daemon, 400, stack):
                sock.sendall(HEAD[:40])
            with served(daemon) as beside:
                time.sleep(3)
        print(f"beside 400 slow senders: {p99(beside):.0f} us")
