"""What one peer may take from the others: nothing that they notice. Attacks that stopped the service once."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.wire.slab import SPARES
from tests.harness import Daemon, raw
from tests.harness.load import Load
from tests.harness.procs import as_user, rss_kib, wait_until
from tests.harness.wire import b64, connect

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can connect as another user")

OURS, OTHER, STRANGER = 12_001, 12_002, 12_003
GET = b"GET /healthz HTTP/1.1\r\nHost: unix\r\n\r\n"
HUGE = (
    b"POST /encrypt HTTP/1.1\r\nHost: unix\r\nExpect: 100-continue\r\n"
    b"Content-Type: application/json\r\nContent-Length: 8388608\r\n\r\n"
)
BATCH = (
    b"POST /encrypt_batch HTTP/1.1\r\nHost: unix\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


@contextlib.contextmanager
def serving(workers: int = 2, **config: Any) -> Iterator[Daemon]:
    with Daemon({"allowed_peer_uids": [0, OURS, OTHER], **config}, workers=workers) as daemon:
        daemon.home.chmod(0o755)
        daemon.socket.chmod(0o666)
        wait_until(lambda: len(daemon.pids()) == workers + 2, 60, "all processes")  # whose memory counts
        yield daemon


def connected(daemon: Daemon, uid: int, count: int, stack: ExitStack) -> list[socket.socket]:
    with as_user(uid):
        return [stack.enter_context(connect(daemon.socket)) for _ in range(count)]


def memory(daemon: Daemon) -> int:
    return sum(rss_kib(pid) for pid in daemon.pids())


def status(sock: socket.socket) -> int:
    with contextlib.suppress(BrokenPipeError):  # who is turned away has its answer
        sock.sendall(GET)
    return int(sock.recv(4096)[9:12])


def waits(pid: int) -> bool:
    """Does this process serve connections?"""
    with contextlib.suppress(FileNotFoundError):  # a descriptor that was closed meanwhile
        files = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        return "anon_inode:[eventpoll]" in files
    return False


def refusals(daemon: Daemon) -> list[dict[str, Any]]:
    events = [json.loads(line)["event"] for line in daemon.audit_log.read_text().splitlines()]
    return [event for event in events if event["outcome"] == "refused"]


def answered(daemon: Daemon, data: bytes) -> bytes:
    return raw(daemon.socket, data, end=False, timeout=30)


# ---- peers that are not served --------------------------------------------------------------------------


class TestRefusedPeers:
    def test_heads_that_promise_much_cost_nothing(self) -> None:
        with serving() as daemon, ExitStack() as stack:
            before = memory(daemon)
            socks = connected(daemon, STRANGER, 60, stack)
            for sock in socks:
                sock.sendall(HUGE)
            for sock in socks:
                assert sock.recv(4096).startswith(b"HTTP/1.1 403 ")  # and not 100 Continue
            assert memory(daemon) - before < 8 << 10
            assert daemon.ok("GET", "/readyz")["ready"]

    def test_idle_they_take_no_place(self) -> None:
        with serving(max_connections=20) as daemon, ExitStack() as stack:
            connected(daemon, STRANGER, 300, stack)
            with as_user(OURS):
                assert daemon.healthy()

    def test_they_hear_why_whatever_they_send(self) -> None:
        with serving() as daemon, ExitStack() as stack:
            with as_user(STRANGER):
                reply = daemon.request("POST", "/encrypt", bytes(1 << 20))
            assert (reply.status, reply.code) == (403, "peer_refused")
            (silent,) = connected(daemon, STRANGER, 1, stack)
            assert silent.recv(4096).startswith(b"HTTP/1.1 403 ")  # in a second, whatever it says

    def test_of_many_each_hears_why_and_who_leaves_takes_no_place(self) -> None:
        with serving(workers=1) as daemon, ExitStack() as stack:
            (pid,) = [pid for pid in daemon.pids() if waits(pid)]
            before = len(os.listdir(f"/proc/{pid}/fd"))
            socks = connected(daemon, STRANGER, 60, stack)
            with ExitStack() as gone:
                connected(daemon, STRANGER, 60, gone)
            for sock in socks:
                sock.settimeout(60)
                sock.sendall(HUGE)
                assert sock.recv(4096).startswith(b"HTTP/1.1 403 ") and sock.recv(4096) == b""
                sock.close()
            wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before, 60, "their descriptors")
            assert sum(event["count"] for event in refusals(daemon)) == 1  # the others are counted
            assert daemon.healthy()

    def test_they_do_not_fill_the_audit_log(self) -> None:
        with serving() as daemon:
            for _ in range(300):
                with as_user(STRANGER), connect(daemon.socket) as sock:
                    assert status(sock) == 403
            assert 1 <= len(refusals(daemon)) <= 2  # the first in each worker; the others are counted
            daemon.stop()
            assert sum(event["count"] for event in refusals(daemon)) == 300
            assert daemon.offline("audit", "verify").returncode == 0


# ---- peers that are served ------------------------------------------------------------------------------


class TestShares:
    def test_one_uid_leaves_a_quarter_to_the_others(self) -> None:
        with serving(max_connections=40) as daemon, ExitStack() as stack:
            assert status(connected(daemon, OTHER, 1, stack)[0]) == 200
            found = [status(sock) for sock in connected(daemon, OURS, 60, stack)]
            assert found[:20] == [200] * 20 and found.count(200) <= 31 and found[-1] == 503
            assert [status(sock) for sock in connected(daemon, OTHER, 5, stack)] == [200] * 5

    def test_who_is_alone_may_have_all(self) -> None:
        with Daemon({"max_connections": 40}, workers=2) as daemon, ExitStack() as stack:
            socks = [stack.enter_context(connect(daemon.socket)) for _ in range(40)]
            assert [status(sock) for sock in socks] == [200] * 40


def test_what_a_dead_worker_held_is_free_again() -> None:
    with serving(max_connections=10) as daemon, ExitStack() as stack:
        socks = connected(daemon, OURS, 7, stack)
        assert {status(sock) for sock in socks} == {200}
        for pid in [pid for pid in daemon.pids() if pid not in (daemon.pid, daemon.writer)]:
            os.kill(pid, 9)
        wait_until(lambda: len(daemon.pids()) == 4 and daemon.healthy(), 20, "new workers")
        assert [status(sock) for sock in connected(daemon, OTHER, 7, stack)] == [200] * 7


def closing(body: bytes) -> bytes:
    return (BATCH % len(body)).replace(b"unix", b"unix\r\nConnection: close") + body


class TestBatches:
    def bodies(self, key: str) -> list[bytes]:
        item = json.dumps({"key_id": key, "plaintext": b64(bytes(6000))}, separators=(",", ":")).encode()
        return [
            b'{"items":[' + b"{}," * 2_790_000 + b"{}]}",
            b'{"items":[' + b"[]," * 2_790_000 + b"{}]}",
            b'{"items":[{"a":[' + b"[]," * 2_790_000 + b"[]]}]}",
            b'{"items":[{' + b'"a":1,' * 1_390_000 + b'"b":1}]}',
            b'{"key_id":[' + b"{}," * 2_790_000 + b"{}]}",
            b"[" * 8_380_000,
            b'{"items":[' + b",".join([item] * 1000) + b"]}",
        ]

    def test_none_costs_more_than_its_bytes(self) -> None:
        """8 MiB of `{},` took 256 MiB, which stayed, and two seconds."""
        with serving(workers=1) as daemon:
            key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
            answered(daemon, closing(b"{}"))
            before = memory(daemon)
            for body in self.bodies(key):
                found = answered(daemon, closing(body))
                assert found.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 "))
                assert memory(daemon) - before < 64 << 10
            wait_until(lambda: memory(daemon) - before < 8 << 10, 60, "the memory to go back")

    def test_many_at_once_and_a_neighbour(self) -> None:
        with serving(workers=1) as daemon:
            key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
            bodies = self.bodies(key)
            before, taken = memory(daemon), []

            def send(session: object, number: int) -> None:
                body = bodies[(0, -1)[number % 2]]
                with connect(daemon.socket) as sock, contextlib.suppress(OSError):
                    sock.sendall(BATCH % len(body) + body)
                    assert sock.recv(100)[9:12] in (b"200", b"400", b"503")

            with Load(daemon.socket, send, threads=16, keep_going=True) as load:
                load.wait_for(4)
                with daemon.session() as kms:
                    for _ in range(50):
                        begun = time.perf_counter()
                        kms.encrypt(key, b"x")
                        taken.append(time.perf_counter() - begun)
                        assert memory(daemon) - before < 96 << 10
            assert sorted(taken)[25] < 0.25, sorted(taken)  # it was seconds; a bound, no measure
            wait_until(lambda: memory(daemon) - before < 16 << 10, 60, "the memory to go back")

    def test_slow_bodies_are_counted_and_past_the_budget_refused(self) -> None:
        with serving(workers=2, max_body_bytes=1 << 20) as daemon, ExitStack() as stack:
            head = HUGE.replace(b"8388608", b"1048576").replace(b"Expect: 100-continue\r\n", b"")
            before, found = memory(daemon), []
            socks = connected(daemon, OURS, 30, stack)
            for sock in socks:
                sock.sendall(head + bytes(1_000_000))
            for sock in socks:
                sock.settimeout(0.5)
                with contextlib.suppress(socket.timeout):
                    found.append(sock.recv(100)[9:12])
            assert found and set(found) == {b"503"}
            assert memory(daemon) - before < 24 << 10
            stack.close()
            key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
            wait_until(
                lambda: daemon.request("POST", f"/encrypt?key_id={key}", bytes(1 << 20)).status == 200,
                20,
                "the budget to be free again",
            )


def test_who_holds_all_locked_memory_keeps_nobody_else_from_sending_a_key() -> None:
    """Where it is scarce there is a piece for each UID that has none. What is urgent waits for nobody."""
    piece = b"POST /wrap HTTP/1.1\r\nHost: unix\r\nContent-Length: 100\r\n\r\n{"
    with serving(workers=1) as daemon, ExitStack() as stack:
        socks = connected(daemon, OURS, SPARES + 5, stack)
        for sock in socks:
            sock.sendall(piece)
        assert socks[-1].recv(100)[9:12] == b"503"
        (urgent,) = connected(daemon, OURS, 1, stack)
        urgent.send(GET[:1], socket.MSG_OOB)
        urgent.sendall(GET[1:])
        assert urgent.recv(100)[9:12] == b"200"
        with as_user(OTHER):
            told = {"new_kek_hex": os.urandom(32).hex(), "dry_run": True}
            assert daemon.ok("POST", "/rotate_kek", told)["status"] == "dry_run"


def test_who_sends_ahead_does_not_starve_the_others() -> None:
    with serving(workers=1) as daemon, ExitStack() as stack:
        (greedy,) = connected(daemon, OURS, 1, stack)
        greedy.setblocking(False)
        request, taken = b"GET /metrics HTTP/1.1\r\nHost: u\r\n\r\n" * 1000, []

        def feed() -> None:
            with contextlib.suppress(BlockingIOError):
                greedy.send(request)
            with contextlib.suppress(BlockingIOError):
                while greedy.recv(1 << 20):
                    pass

        with daemon.session() as kms:
            for _ in range(100):
                feed()
                begun = time.perf_counter()
                assert kms.request("GET", "/healthz").status == 200
                taken.append(time.perf_counter() - begun)
        assert sorted(taken)[50] < 0.1, sorted(taken)


# ---- what the daemon itself needs -----------------------------------------------------------------------


def limited(*limits: str) -> dict[str, Any]:
    drop = ["setpriv", "--bounding-set", "-ipc_lock,-sys_resource", "--inh-caps", "-ipc_lock,-sys_resource"]
    return {"wrapper": [*drop, "prlimit", *limits]}


class TestDescriptors:
    def test_the_soft_limit_is_raised(self) -> None:
        with Daemon(workers=1, wrapper=["prlimit", "--nofile=256:4096"]) as daemon, ExitStack() as stack:
            socks = [stack.enter_context(connect(daemon.socket)) for _ in range(400)]
            assert {status(sock) for sock in socks} == {200}

    @pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
    def test_too_few_end_nothing(self, workers: int) -> None:
        """They ended the daemon, or a worker in its anchor, and accept spun."""
        with Daemon(workers=workers, wrapper=["prlimit", "--nofile=128:128"]) as daemon:
            assert "open files are allowed" in daemon.stderr and "LimitNOFILE" in daemon.stderr
            pids = daemon.pids()
            with ExitStack() as stack:
                found = []
                for _ in range(300):
                    sock = stack.enter_context(connect(daemon.socket))
                    found.append(status(sock))
                assert found[:50] == [200] * 50 and set(found) == {200, 503}
                time.sleep(2)  # some anchors
                sock = stack.enter_context(connect(daemon.socket))
                assert status(sock) == 503
            wait_until(daemon.healthy, 20, "a free place")
            assert daemon.pids() == pids
            assert daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_none_at_all_ends_nothing(self, workers: int) -> None:
        """A limit that was lowered meanwhile, or a full table of the system: not even the one in reserve is
        to be had again. The worker ended of that, and `/readyz` was a fault of the daemon's."""
        with Daemon(workers=workers) as daemon, ExitStack() as stack:
            key_id = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
            pids = daemon.pids()
            wait_until(lambda: sum(map(waits, pids)) == workers, 60, "all workers to be up")
            kept = [stack.enter_context(daemon.session()) for _ in range(4)]
            for kms in kept:
                assert kms.request("GET", "/healthz").status == 200
            soft, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
            for pid in pids:
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (5, hard))
            waiting = [stack.enter_context(connect(daemon.socket)) for _ in range(8)]
            wait_until(lambda: "no connection can be accepted" in daemon.stderr, 60, "a word of that")
            for kms in kept:
                assert kms.request("GET", "/readyz").status == 503
                kms.ok("POST", "/encrypt", {"key_id": key_id, "plaintext": b64(b"x")})
            time.sleep(2)  # some anchors
            assert "Traceback" not in daemon.stderr and daemon.pids() == pids, daemon.stderr
            for pid in pids:
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
            assert {status(sock) for sock in waiting} <= {200, 503}
            wait_until(lambda: daemon.request("GET", "/readyz").status == 200, 60, "the daemon to be ready")
            assert "Traceback" not in daemon.stderr and daemon.pids() == pids, daemon.stderr


FEW_WATCHES = """
import os, select, sys
flag = os.path.join(sys.argv[sys.argv.index("--data-dir") + 1], "..", "few")
real, asked = select.epoll, []
class Few:
    def __init__(self):
        self._real = real()
    def register(self, fd, events):
        asked.append(fd)
        if os.path.exists(flag) and len(asked) > 3 and len(asked) % 3 == 0:  # a start takes three
            raise OSError(28, "No space left on device")
        self._real.register(fd, events)
    def __getattr__(self, name):
        return getattr(self._real, name)
select.epoll = Few
from progressdb_kms.__main__ import main
sys.exit(main())
"""


def test_no_memory_of_the_kernels_to_wait_for_connections_ends_nothing() -> None:
    """`fs.epoll.max_user_watches`, or a group's memory: it ended the worker, and all that it served."""
    with Daemon(workers=2, command=(sys.executable, "-c", FEW_WATCHES)) as daemon:
        key_id = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        pids, few, done = daemon.pids(), daemon.home / "few", 0
        few.touch()
        for size in (1, 1, 300_000) * 20:
            with suppress(OSError, http.client.HTTPException), daemon.session() as kms:
                message = {"key_id": key_id, "plaintext": b64(bytes(size))}
                done += kms.request("POST", "/encrypt", message).status == 200
                done += kms.request("POST", "/deks", {"thread_id": "u"}).status == 201
        few.unlink()
        assert done and daemon.pids() == pids and "Traceback" not in daemon.stderr, daemon.stderr
        wait_until(daemon.healthy, 60, "it to serve")
        assert daemon.request("GET", "/readyz").status == 200


class TestLockedMemory:
    def test_required_and_not_to_be_had_is_a_refusal(self) -> None:
        """With 64 KiB it said "ready" and served nobody."""
        refused = Daemon({"memory_lock": "require"}, workers=2, **limited("--memlock=65536:65536")).refusal()
        assert refused.code == 1 and "LimitMEMLOCK" in refused.stderr

    def test_wanted_and_not_to_be_had_is_told(self) -> None:
        with Daemon({"memory_lock": "try"}, workers=2, **limited("--memlock=65536:65536")) as daemon:
            assert "LimitMEMLOCK" in daemon.stderr
            assert daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]


class TestMemory:
    @pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
    def test_none_for_long_bodies_ends_nothing(self, workers: int) -> None:
        """`LimitAS=`, or a host that promises no more memory than it has: one long body ended the worker."""
        with Daemon(workers=workers) as daemon, daemon.session() as kms:
            key_id = kms.create_dek("t")["key_id"]
            pids = daemon.pids()
            wait_until(lambda: sum(map(waits, pids)) == workers, 60, "all workers to be up")
            _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_AS)
            for pid in pids:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
                resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 20), hard))
            head = (
                f"POST /encrypt?key_id={key_id} HTTP/1.1\r\nHost: u\r\nContent-Type: application/octet-stream"
            )
            size = 7 << 20
            for framing, lead in (
                (f"Content-Length: {size}", ""),
                ("Transfer-Encoding: chunked", f"{size:x}\r\n"),
            ):
                with connect(daemon.socket) as sock:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was answered
                        sock.sendall(f"{head}\r\n{framing}\r\n\r\n{lead}".encode() + bytes(size))
                    assert b" 503 " in sock.recv(4096)[:20]
                kms.ok("POST", "/encrypt", {"key_id": key_id, "plaintext": b64(b"x")})
            assert daemon.pids() == pids and "Traceback" not in daemon.stderr, daemon.stderr
            for pid in pids:
                resource.prlimit(pid, resource.RLIMIT_AS, (hard, hard))
            assert kms.request("POST", f"/encrypt?key_id={key_id}", bytes(size)).status == 200

    def test_none_to_work_with_is_no_fault_of_ours(self) -> None:
        """The message is there, and to read or seal it takes more: it was 500, with a traceback."""
        with Daemon(workers=1) as daemon, daemon.session() as kms:
            key_id = kms.create_dek("t")["key_id"]
            message = {"plaintext": b64(bytes(1 << 20)), "key_id": key_id}
            (worker,) = [pid for pid in daemon.pids() if pid not in (daemon.pid, daemon.writer)]
            _, hard = resource.prlimit(worker, resource.RLIMIT_AS)
            heard: set[tuple[int, str]] = set()
            for left in range(0, 12 << 20, 256 << 10):
                pages = int(Path(f"/proc/{worker}/statm").read_text().split()[0])
                resource.prlimit(worker, resource.RLIMIT_AS, (pages * resource.getpagesize() + left, hard))
                reply = kms.request("POST", "/encrypt", message)
                heard.add((reply.status, reply.code))
                resource.prlimit(worker, resource.RLIMIT_AS, (hard, hard))
            assert heard == {(200, ""), (503, "overloaded")} and "Traceback" not in daemon.stderr


class TestALoneConnection:
    """It is waited for in recv, which blocks: nobody else may be kept waiting for it, and it for nothing."""

    def alone(self, daemon: Daemon, stack: ExitStack) -> socket.socket:
        sock = stack.enter_context(connect(daemon.socket))
        assert [status(sock) for _ in range(200)] == [200] * 200
        return sock

    @pytest.mark.parametrize("workers", [1, 2])
    def test_others_are_served_beside_it(self, workers: int) -> None:
        with Daemon(workers=workers) as daemon, ExitStack() as stack:
            sock = self.alone(daemon, stack)
            others = [stack.enter_context(connect(daemon.socket)) for _ in range(4)]
            for _ in range(50):
                assert [status(one) for one in (*others, sock)] == [200] * 5

    def test_what_is_long_slow_or_ahead(self) -> None:
        with Daemon(workers=1) as daemon, ExitStack() as stack:
            key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
            sock = self.alone(daemon, stack)
            sock.sendall(GET[:20])
            time.sleep(0.01)
            sock.sendall(GET[20:] + GET)  # the rest, and one ahead
            answers = b""
            while answers.count(b"HTTP/1.1 200 OK") < 2:
                answers += sock.recv(4096)
            head = f"POST /encrypt?key_id={key} HTTP/1.1\r\nHost: unix\r\n"
            sock.sendall(
                f"{head}Content-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\n".encode()
            )
            with daemon.session() as other:  # while it is sent, too
                assert other.request("GET", "/healthz").status == 200
            sock.sendall(bytes(1_000_000))
            got = 0
            while got < 1_000_000:
                got += len(sock.recv(1 << 20))
            assert [status(sock) for _ in range(200)][-1] == 200

    def test_the_end_of_the_daemon_or_of_the_peer(self) -> None:
        with Daemon(workers=1) as daemon, ExitStack() as stack:
            self.alone(daemon, stack).close()
            self.alone(daemon, stack)
            daemon.stop()


def cpu_seconds(daemon: Daemon) -> float:
    ticks = os.sysconf("SC_CLK_TCK")
    stats = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in daemon.pids()]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / ticks


def test_an_idle_connection_is_not_waited_for_by_spinning() -> None:
    with Daemon(workers=2) as daemon, daemon.session() as kms:
        for _ in range(200):  # as fast as it can: such a one is waited for awake
            kms.request("GET", "/healthz")
        before = cpu_seconds(daemon)
        time.sleep(5)
        assert (
            cpu_seconds(daemon) - before < 0.1
        )  # two hundredths of a core, with the beats of four processes
