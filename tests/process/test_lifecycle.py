"""Start and stop of the real daemon: the drain, Ctrl-C, a signal right after the start, kill -9."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import Daemon, procs, raw
from tests.harness.wire import connect

pytestmark = pytest.mark.fresh

TEXT = base64.b64encode(b"hello").decode()
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: unix\r\n\r\n"


def post(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in {"Content-Length": len(body), **headers}.items()]
    return f"POST {path} HTTP/1.1\r\nHost: unix\r\n{''.join(lines)}\r\n".encode() + body


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_ends_with_zero(workers: int) -> None:
    with Daemon(workers=workers) as daemon:
        daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})
        daemon.stop()
        assert not daemon.socket.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_all_that_was_sent_before_sigterm_is_answered(workers: int) -> None:
    """Of requests that were sent ahead, the first alone was; none but the last answer may say that it is."""
    raw_type = {"Content-Type": "application/octet-stream"}
    with Daemon(workers=workers) as daemon, contextlib.ExitStack() as opened:
        key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        create = post("/create_dek_for_thread", b'{"thread_id":"t"}', {"Content-Type": "application/json"})
        long = post(f"/encrypt?key_id={key}", bytes(70_000), raw_type)
        sent = [
            HEALTH,
            HEALTH * 3,
            HEALTH * 3000,
            (create + HEALTH) * 3,
            (long + HEALTH) * 2,
            create,
            long,
            b"",
        ]
        socks = [opened.enter_context(connect(daemon.socket, 60.0)) for _ in sent]
        for sock in socks[::2]:  # these were answered before
            sock.sendall(HEALTH)
            assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
        for data, answers in zip(sent, daemon.stopped_behind(list(zip(socks, sent)))):
            heads = re.findall(rb"HTTP/1.1 200 OK\r\n(?:[A-Z][^\r\n]*\r\n)*\r\n", answers)
            told = [b"Connection: close" in head for head in heads]
            assert len(told) == data.count(b" HTTP/1.1\r\n") and not any(told[:-1])
        daemon.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_it_in_order(number: int) -> None:
    """Ctrl-C, `timeout`, a container's manager: the keeper must outlive the workers all the same."""
    with Daemon(workers=2) as daemon:
        key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        os.killpg(daemon.pid, number)
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        told = [line for line in daemon.stderr.splitlines() if "witness: change" not in line]
        assert told == [], "nobody waited in vain for somebody who was gone"
        daemon.start()
        daemon.ok("POST", "/encrypt", {"key_id": key, "plaintext": TEXT})


def test_a_child_that_was_just_forked_hears_the_signal() -> None:
    """SIGTERM to workers between fork and their own handlers was lost; they were then killed after 25 s."""
    for _ in range(5):
        with Daemon(workers=2) as daemon:
            begun = time.monotonic()
            daemon.stop()
            assert time.monotonic() - begun < 20  # a bound on the loss of a signal, no measure of speed


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone sees which process has the store open")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGRTMIN + 6])  # one without a name, too
def test_a_killed_worker_is_replaced_and_the_keys_stay(number: int) -> None:
    with Daemon(workers=2) as daemon:
        key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        parent, writer = daemon.pid, daemon.writer
        victim = next(pid for pid in daemon.pids() if pid not in (parent, writer))
        os.kill(victim, number)
        deadline = time.monotonic() + 60
        while victim in daemon.pids() or len(daemon.pids()) < 4:
            assert time.monotonic() < deadline, "the worker was not replaced"
            time.sleep(0.02)
        for _ in range(20):
            daemon.ok("POST", "/encrypt", {"key_id": key, "plaintext": TEXT})
        daemon.stop()
        assert daemon.offline("audit", "verify").returncode == 0


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.long)])
def test_kill_9_loses_no_acknowledged_dek(rounds: int) -> None:
    """Creators run while the whole tree is killed; what was answered before must open after it."""
    acknowledged: dict[str, str] = {}
    with Daemon(workers=2) as daemon:
        for number in range(rounds):
            if number:
                daemon.start()
            stop = threading.Event()

            def create(stop: threading.Event = stop) -> None:
                try:
                    with daemon.session() as kms:
                        while not stop.is_set():
                            key = kms.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
                            sealed = kms.ok("POST", "/encrypt", {"key_id": key, "plaintext": TEXT})
                            acknowledged[key] = sealed["ciphertext"]
                except (OSError, EOFError):
                    return  # killed in the middle: not acknowledged

            threads = [threading.Thread(target=create) for _ in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(0.05 + 0.4 * int.from_bytes(os.urandom(1), "big") / 255)
            daemon.kill()
            stop.set()
            for thread in threads:
                thread.join()
        daemon.start()
        assert acknowledged
        with daemon.session() as kms:
            for key, sealed in acknowledged.items():
                opened = kms.ok("POST", "/decrypt", {"key_id": key, "ciphertext": sealed})
                assert opened["plaintext"] == TEXT
        daemon.stop()
        assert daemon.offline("verify").returncode == 0
        audit = daemon.offline("audit", "verify")
        assert audit.returncode == 0, audit.stderr


def test_a_malformed_request_is_refused_and_the_worker_goes_on() -> None:
    with Daemon(workers=1) as daemon:
        answer = raw(daemon.socket, b"GET / HTTP/1.1\r\nHost : x\r\n\r\n")
        assert b" 400 " in answer[:20]
        assert daemon.healthy()


A_WAIT = """
import os, sys, time
from progressdb_kms.process import supervisor
from progressdb_kms.wire import lone
supervisor.STALE_SECONDS = 1.5
flag = os.path.join(sys.argv[sys.argv.index("--data-dir") + 1], "fault")
look = lone.Lone.look_around
def look_around(*args):
    while os.path.exists(flag):
        time.sleep(0.01)
    look(*args)
lone.Lone.look_around = look_around
from progressdb_kms.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_the_watchdog_is_not_fed_where_connections_wait(workers: int, short_tmp: Path) -> None:
    """The main loop of the worker went on, and so did the watchdog."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short_tmp / "notify"))
        manager.settimeout(60.0)
        env = {"NOTIFY_SOCKET": str(short_tmp / "notify"), "WATCHDOG_USEC": "200000"}
        with contextlib.ExitStack() as stack:
            command = sys.executable, "-c", A_WAIT
            daemon = Daemon({"request_timeout": 2}, workers=workers, command=command, env=env)
            stack.enter_context(daemon)
            for _ in range(2 * workers):  # where there is one, a worker looks about in short times
                stack.enter_context(connect(daemon.socket))
            fault = daemon.data_dir / "fault"
            fault.touch()
            procs.wait_until(lambda: "no step for 1.5 s" in daemon.stderr, 60, "it to be told")
            manager.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    manager.recv(100)
            manager.settimeout(60.0)
            fault.unlink()
            assert manager.recv(100) == b"WATCHDOG=1"
            procs.wait_until(lambda: "come on again" in daemon.stderr, 60, "it to be told")
            assert daemon.healthy()


NO_PROCESS = """
import errno, os, sys
flag = os.path.join(sys.argv[sys.argv.index("--data-dir") + 1], "fault")
fork = os.fork
def refused():
    if os.path.exists(flag):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fork()
os.fork = refused
from progressdb_kms.__main__ import main
sys.exit(main())
"""


@pytest.mark.root
def test_where_no_process_can_be_had_the_others_go_on() -> None:
    """A dead worker, a dead keeper and a SIGHUP under a limit of processes ended the daemon."""
    with Daemon(workers=2, command=(sys.executable, "-c", NO_PROCESS)) as daemon:
        fault = daemon.data_dir / "fault"
        fault.touch()
        worker = max(set(daemon.pids()) - {daemon.pid, daemon.writer})
        os.kill(worker, signal.SIGKILL)
        procs.wait_until(lambda: "a worker is missing" in daemon.stderr, 60, "it to be told")
        daemon.signal(signal.SIGHUP)
        procs.wait_until(lambda: "the policies stay as they were" in daemon.stderr, 60, "it to be told")
        os.kill(daemon.writer, signal.SIGKILL)
        procs.wait_until(lambda: "no change can be made" in daemon.stderr, 60, "it to be told")
        assert daemon.healthy()
        assert daemon.request("POST", "/deks", {"thread_id": "t"}).status == 503
        fault.unlink()
        procs.wait_until(lambda: "over: a worker is missing" in daemon.stderr, 60, "another in its place")
        daemon.ok("POST", "/deks", {"thread_id": "t"}, status=201)
        daemon.stop()


def test_where_no_worker_can_live_callers_hear_it(make_daemon: MakeDaemon, workers: int) -> None:
    """The folder is gone, and all who served died: callers waited for nobody, and the journal had sixteen
    lines a second."""
    daemon = make_daemon(workers=workers)
    procs.wait_until(lambda: len(daemon.pids()) == workers + 2, 60, "all processes")
    elsewhere = daemon.home / "elsewhere"
    daemon.data_dir.rename(elsewhere)
    for worker in daemon.pids()[2:]:  # behind the first process and the keeper
        os.kill(worker, signal.SIGKILL)
    procs.wait_until(lambda: answered(daemon) == (503, "store_unavailable"), 60, "a caller to hear it")
    elsewhere.rename(daemon.data_dir)
    procs.wait_until(lambda: answered(daemon) == (200, ""), 100, "a worker to live")
    ended = [line for line in daemon.stderr.splitlines() if "it is replaced" in line]
    assert len(ended) <= 8 * workers, "\n".join(ended)


def answered(daemon: Daemon) -> tuple[int, str]:
    with contextlib.suppress(OSError, http.client.HTTPException):
        reply = daemon.request("GET", "/deks")
        return reply.status, reply.code
    return 0, ""


STAYS = """
import pathlib, sys
unlink = pathlib.Path.unlink
def refused(self, missing_ok=False):
    if self.name == "s":
        raise PermissionError(1, "Operation not permitted")
    unlink(self, missing_ok)
pathlib.Path.unlink = refused
from progressdb_kms.__main__ import main
sys.exit(main())
"""


def test_a_name_that_can_not_be_removed() -> None:
    """The workers were not told to end, and were cut off."""
    with Daemon(workers=2, command=(sys.executable, "-c", STAYS)) as daemon:
        daemon.ok("POST", "/deks", {"thread_id": "t"}, status=201)
        daemon.stop()
        assert "can't be removed: Operation not permitted" in daemon.stderr
        assert b'"op":"stop"' in daemon.audit_log.read_bytes().splitlines()[-1]


ENDS_BY_A_FAULT = """
import os, sys, time
from progressdb_kms.process import streams, supervisor
at = os.path.join(sys.argv[sys.argv.index("--data-dir") + 1], "..", "fault-")
def failing(work, name):
    def wrapped(self, *args):
        if os.path.exists(at + name):
            raise OSError(11, "Resource temporarily unavailable")
        return work(self, *args)
    return wrapped
supervisor.Supervisor._start_worker = failing(supervisor.Supervisor._start_worker, "start")
supervisor.Front.turn = failing(supervisor.Front.turn, "later")
fail = streams.fail
def slow(*args):
    time.sleep(2)
    return fail(*args)
streams.fail = slow
from progressdb_kms.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("when", ["start", "later"])
def test_no_process_is_left_with_keys_that_are_wiped(when: str) -> None:
    """Where no process could be had at a start, or the supervisor failed, the keys were wiped under a keeper
    that still wrote: it signed rows without the row key, and the next start refused the store as damaged."""
    command = (sys.executable, "-c", ENDS_BY_A_FAULT)
    with Daemon(workers=2, command=command) as daemon:
        fault = daemon.data_dir.parent / f"fault-{when}"
        daemon.ok("POST", "/deks", {"thread_id": "t"}, status=201)
        if when == "start":
            daemon.stop()
            fault.touch()
            daemon.spawn()
        else:
            fault.touch()
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    daemon.request("POST", "/deks", {"thread_id": "t"})
        daemon.wait(code=1)
        assert "no task can be started (raise TasksMax=" in daemon.stderr
        assert b'"op":"stop"' in daemon.audit_log.read_bytes().splitlines()[-1]
        assert not daemon.socket.exists()
        fault.unlink()
        daemon.start().stop()
        for words in (("verify",), ("audit", "verify")):
            done = daemon.offline(*words)
            assert done.returncode == 0, done.stderr


HANGS = """
import sys, time
from progressdb_kms.service import start
start.open_keeper = lambda *args: time.sleep(3600)
from progressdb_kms.__main__ import main
sys.exit(main())
"""


def test_a_start_that_hangs_can_be_ended() -> None:
    """The supervisor waited for its first keeper, deaf to SIGTERM: a disk that hangs left nothing but a
    SIGKILL, and a fleet's database that is away half a minute."""
    daemon = Daemon(workers=1, command=(sys.executable, "-c", HANGS))
    with contextlib.closing(daemon.spawn()):
        # the child that reads the configuration is a second process, too, and gone before the socket is there
        procs.wait_until(lambda: daemon.socket.exists() and len(daemon.pids()) == 2, 60, "the keeper's begin")
        daemon.stop()
        assert not daemon.socket.exists()


A_FAULT = """
import os, sys
from progressdb_kms.wire import lone
flag = os.path.join(sys.argv[sys.argv.index("--data-dir") + 1], "fault")
look = lone.Lone.look_around
def look_around(*args):
    try:
        os.unlink(flag)
    except FileNotFoundError:  # or another one takes it
        return look(*args)
    raise ValueError("a fault of ours")
lone.Lone.look_around = look_around
from progressdb_kms.__main__ import main
sys.exit(main())
"""


def test_a_worker_that_can_not_serve_any_more_ends() -> None:
    """Its other threads were well, and it stayed: alive, and deaf."""
    with Daemon(workers=2, command=(sys.executable, "-c", A_FAULT)) as daemon:
        before = set(daemon.pids())
        (daemon.data_dir / "fault").touch()
        procs.wait_until(lambda: len(before & set(daemon.pids())) == 3, 60, "it to end")
        procs.wait_until(lambda: len(daemon.pids()) == 4, 60, "another in its place")
        assert daemon.healthy()
        assert "a fault of ours" in daemon.stderr
