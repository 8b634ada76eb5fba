"""The socket's file: removed under the daemon it comes back, and what would be no path is refused."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from progressdb_kms.wire.handed import SO_PASSRIGHTS
from tests.conftest import MakeDaemon
from tests.harness import Daemon
from tests.harness.procs import wait_until
from tests.harness.wire import connect
from tests.wire.test_handed import slow_to_close

SPREAD = 8


@pytest.fixture
def daemon(make_daemon: MakeDaemon, workers: int) -> Daemon:
    return make_daemon({"socket_mode": "0620"}, workers=workers)


def chains(daemon: Daemon) -> set[str]:
    """Which workers answer over the name, when several connections are open at once."""
    sessions = [daemon.session() for _ in range(SPREAD)]
    try:
        return {s.request("GET", "/deks").headers["X-KMS-Audit"].split(":")[0] for s in sessions}
    finally:
        for session in sessions:
            session.close()


def mode(path: Path) -> int:
    """None of these where nothing is there."""
    return path.stat().st_mode & 0o777 if path.exists() else 0


def test_a_removed_name_comes_back(daemon: Daemon, workers: int) -> None:
    """All workers serve the new one, also one that is replaced later; who was connected stays so."""
    wait_until(lambda: len(chains(daemon)) == workers, 60, "all workers to serve")
    for turn in range(2):
        with daemon.session() as kept:
            kept.request("GET", "/healthz")
            daemon.socket.unlink()
            wait_until(lambda: mode(daemon.socket) == 0o620, 60, "the name to come back")
            assert kept.request("GET", "/healthz").status == 200
        wait_until(lambda: len(chains(daemon)) == workers, 60, "all workers to take it over")
        assert daemon.stderr.count("was removed: bound again") == turn + 1
    if workers > 1:
        os.kill(daemon.pids()[-1], signal.SIGKILL)
        wait_until(lambda: len(chains(daemon)) == workers, 20, "the new worker to serve it")
    daemon.stop()
    assert not daemon.socket.exists()


def knows_rights() -> bool:
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        return sock.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS) == 1
    return False


@pytest.mark.skipif(not knows_rights(), reason="since Linux 6.16")
@pytest.mark.parametrize("again", [False, True], ids=["first", "bound again"])
def test_nobody_hands_over_a_descriptor(daemon: Daemon, again: bool) -> None:
    """The waiter would drop it, and that may take as long as its owner likes."""
    if again:
        daemon.socket.unlink()
        wait_until(lambda: mode(daemon.socket) == 0o620, 60, "the name to come back")
    with slow_to_close() as slow, connect(daemon.socket) as sock:
        with pytest.raises(PermissionError):
            socket.send_fds(sock, [b"GET /healthz HTTP/1.1\r\nHost: unix\r\n\r\n"], [slow.fileno()])
        assert daemon.healthy()


def test_a_name_that_was_moved_away_and_back(daemon: Daemon) -> None:
    """As under a mount that came and went. It called the old socket in use, by itself, and nobody was served:
    its processes held it open."""
    aside = daemon.home / "aside"
    daemon.socket.rename(aside)
    wait_until(daemon.socket.exists, 60, "the name to come back")
    wait_until(daemon.healthy, 60, "it to be served")
    aside.replace(daemon.socket)
    wait_until(lambda: daemon.stderr.count("was removed: bound again") == 2, 60, "it to be bound once more")
    wait_until(daemon.healthy, 60, "it to be served again")
    assert "can't be had again" not in daemon.stderr


def test_a_name_that_somebody_else_took_is_told_once_and_left_alone(daemon: Daemon) -> None:
    daemon.socket.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(daemon.socket))
        other.listen(1)
        told = "can't be had again: the socket"
        wait_until(lambda: told in daemon.stderr, 60, "it to be told")
        time.sleep(2.5)
        assert daemon.stderr.count(told) == 1
        other.close()
    wait_until(daemon.healthy, 60, "it to bind again")


def test_at_the_stop_another_one_s_name_stays(daemon: Daemon) -> None:
    daemon.socket.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(daemon.socket))
        other.listen(1)
        daemon.stop()
        assert daemon.socket.exists()


@pytest.mark.parametrize("name", ["@kms", "unix:kms.sock", "127.0.0.1:8200", "localhost:8200"])
def test_what_is_no_path_makes_no_file(make_daemon: MakeDaemon, name: str) -> None:
    daemon = make_daemon(args=["--socket", name], start=False)
    assert "write" in daemon.refusal().stderr
    assert not (daemon.home / name).exists()


HOLDS = """
import os, socket, sys, time
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
sock.listen(64)
child = os.fork()
if child:
    print(child)
    sys.stdout.flush()
    os._exit(0)
os.close(1)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("seconds", [1, 60])
def test_the_socket_of_a_killed_daemon_is_had_once_its_children_are_gone(
    make_daemon: MakeDaemon, seconds: int
) -> None:
    """Who was started right behind the kill -9 was refused, with the pid of the dead one."""
    daemon = make_daemon(start=False)
    words = [sys.executable, "-c", HOLDS, str(daemon.socket), str(seconds)]
    child = int(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    if seconds == 1:
        assert daemon.start().healthy()
    else:
        assert "is in use by pid" in str(daemon.refusal())
        os.kill(child, signal.SIGKILL)
