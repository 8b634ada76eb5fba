"""notify, the socket that systemd hands over, the watchdog's interval."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.process import systemd

NAMES = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "WATCHDOG_USEC", "WATCHDOG_PID")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


# ---- notify


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[tuple[socket.socket, str]]:
    """A stand-in for systemd, and the address it gives out."""
    name = f"{short_tmp}/n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.bind(name if request.param == "path" else "\0" + name)
        yield sock, name if request.param == "path" else "@" + name


def test_notify_sends_one_datagram(
    manager: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sock, address = manager
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert systemd.notify("READY=1\nSTATUS=läuft") is True
    assert sock.recv(100) == "READY=1\nSTATUS=läuft".encode()


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:9999", "/nonexistent/notify", "@" + "x" * 200])
def test_nobody_to_notify_is_no_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert systemd.notify("READY=1") is False


def test_a_relative_name_is_not_used(
    manager: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sock, address = manager
    monkeypatch.chdir(os.path.dirname(address.lstrip("@")))
    monkeypatch.setenv("NOTIFY_SOCKET", "n")
    assert systemd.notify("READY=1") is False


def test_notify_outside_of_systemd() -> None:
    assert systemd.notify("READY=1") is False


# ---- the socket

TAKE = """
import os, sys
from progressdb_kms.process import systemd
from progressdb_kms.errors import ConfigError
os.dup2(int(sys.argv[3]), 3)
if sys.argv[3] == "0":
    os.close(3)
if sys.argv[1] != "none":
    os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[1]))
if sys.argv[2] != "none":
    os.environ["LISTEN_FDS"] = sys.argv[2]
try:
    sock = systemd.listen_socket()
except ConfigError as error:
    print("refused:", error.message, "|", error.hint)
else:
    print(sock and (sock.fileno(), sock.getsockname(), os.get_inheritable(3)))
print("open" if os.path.exists("/proc/self/fd/3") else "closed")
"""


def take(third: int | None, pid: str = "0", count: str = "1", program: str = TAKE) -> str:
    """What a process says that has `third` as its descriptor 3, and what became of that descriptor."""

    result = subprocess.run(
        [sys.executable, "-c", program, pid, count, str(third or 0)],
        pass_fds=() if third is None else (third,),
        capture_output=True,
        text=True,
        check=True,
    )
    assert not result.stderr
    return result.stdout


@pytest.fixture
def listener(short_tmp: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(f"{short_tmp}/s")
        sock.listen(1)
        yield sock


def test_takes_a_listening_unix_stream_socket(listener: socket.socket) -> None:
    assert take(listener.fileno()) == f"(3, {listener.getsockname()!r}, False)\nopen\n"


@pytest.mark.parametrize(
    "pid, count", [("1", "1"), ("none", "1"), ("0", "none"), ("0", "0"), ("0", "")], ids=str
)
def test_variables_for_another_process_or_none(listener: socket.socket, pid: str, count: str) -> None:
    assert take(listener.fileno(), pid, count) == "None\nopen\n"


@pytest.mark.parametrize("count", ["2", "-1", "x", "1 ", "01"])
def test_any_other_number_of_sockets_is_refused(listener: socket.socket, count: str) -> None:
    said = take(listener.fileno(), count=count)
    assert said.startswith("refused: systemd hands over more than one socket")
    assert "one ListenStream=" in said


def test_a_descriptor_that_is_no_socket() -> None:
    with open("/dev/null") as file:
        assert take(file.fileno()).startswith("refused: systemd hands over no socket")
    assert take(None).startswith("refused: systemd hands over no socket")


@pytest.mark.parametrize("count", ["9" * 30, "9" * 5000, "\u00b2", "\u0661"], ids=["many", "more", "²", "١"])
def test_a_number_of_sockets_that_can_t_be(listener: socket.socket, count: str) -> None:
    """It was counted up to, or a traceback, before it could be refused."""
    most = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
    settle = "from progressdb_kms.process import inherited\ninherited.settle(os.environ)\n"
    said = take(listener.fileno(), count=count, program=most + TAKE.replace("try:", settle + "try:"))
    assert said.startswith("refused: systemd hands over more than one socket")


@pytest.mark.parametrize("kind", ["not listening", "datagram", "seqpacket", "tcp", "connected", "abstract"])
def test_other_sockets_are_refused_and_left_alone(kind: str, short_tmp: Path) -> None:
    types = {"datagram": socket.SOCK_DGRAM, "seqpacket": socket.SOCK_SEQPACKET}
    if kind == "connected":
        pair = socket.socketpair()
        sock, other = pair
    else:
        family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
        sock = other = socket.socket(family, types.get(kind, socket.SOCK_STREAM))
        path = "\0" * (kind == "abstract") + f"{short_tmp}/s"
        sock.bind(("127.0.0.1", 0) if kind == "tcp" else path)
        if kind in ("seqpacket", "tcp", "abstract"):
            sock.listen(1)
    with sock, other:
        said = take(sock.fileno())
    assert said.startswith("refused: what systemd hands over is not a listening Unix stream socket")
    assert said.endswith("open\n")


# ---- the watchdog


def watch(monkeypatch: pytest.MonkeyPatch, micros: str, pid: int | None) -> float | None:
    monkeypatch.setenv("WATCHDOG_USEC", micros)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(pid))
    return systemd.watchdog_seconds()


@pytest.mark.parametrize("micros, seconds", [("30000000", 30.0), ("1", 1e-6), ("500000", 0.5)])
def test_the_interval_is_in_microseconds(
    micros: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watch(monkeypatch, micros, os.getpid()) == seconds
    monkeypatch.delenv("WATCHDOG_PID")
    assert watch(monkeypatch, micros, None) == seconds


@pytest.mark.parametrize("micros", ["", "0", "-1", "1.5", "1e6", "٣", "x", "9" * 30])
def test_no_interval(micros: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch(monkeypatch, micros, None) is None


def test_the_watchdog_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch(monkeypatch, "30000000", os.getppid()) is None
    assert systemd.watchdog_seconds() is None


def test_no_watchdog() -> None:
    assert systemd.watchdog_seconds() is None
