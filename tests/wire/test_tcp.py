"""The daemon on TCP: who is served, what keeps browsers out, and ProgressDB's clients as they connect."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from progressdb_kms.process.socket import listen_tcp
from progressdb_kms.rules import PeerRules
from tests.harness import Daemon, DaemonFailed, Session
from tests.harness.dialects import GENERATIONS
from tests.harness.procs import wait_until
from tests.harness.wire import connect, free_port, host_of, raw, request

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
NOBODY = 65534
Address = tuple[str, int]


def on_tcp(address: Address, **config: Any) -> Daemon:
    return Daemon({"tcp_address": host_of(address), **config})


@pytest.fixture(scope="module", params=["127.0.0.1", "::1"])
def address(request: pytest.FixtureRequest) -> Address:
    try:
        return free_port(request.param)
    except OSError as error:
        pytest.skip(f"no {request.param} here: {error}")


@pytest.fixture
def fresh(address: Address) -> Address:
    """For a daemon of the test's own."""
    return free_port(address[0])


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "workers"])
def daemon(request: pytest.FixtureRequest, address: Address) -> Iterator[Daemon]:
    with on_tcp(address, workers=request.param) as running:
        yield running


def as_user(uid: int, address: Address, path: str = "/healthz") -> str:
    """The status that another user gets."""
    code = (
        f"import encodings.idna, http.client, os, sys; os.setuid({uid})\n"
        f"c = http.client.HTTPConnection({address[0]!r}, {address[1]}, timeout=20)\n"
        f"c.request('GET', {path!r})\n"
        "r = c.getresponse(); print(r.status, r.read().decode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_stopped(pid: int) -> bool:
    """All of its threads: one that is running goes on for a moment."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def records(daemon: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line)["event"] for line in daemon.audit_log.read_text().splitlines()]


class TestServed:
    def test_as_on_the_socket_and_on_the_record(self, daemon: Daemon, address: Address) -> None:
        with Session(address) as kms, daemon.session() as other:
            key = kms.create_dek("t")["key_id"]
            assert other.decrypt(key, kms.encrypt(key, b"text")) == b"text"
        mine = [r for r in records(daemon) if r.get("key_id") == key]
        assert [r.get("via") for r in mine] == ["tcp", "tcp", None]
        assert mine[0]["uid"] == os.geteuid() and "pid" not in mine[0] and "gid" not in mine[0]
        assert f"tcp={host_of(address)}" in daemon.stdout and "only uid" in daemon.stderr

    def test_answers_are_not_lost_by_what_is_sent_behind_the_last(
        self, daemon: Daemon, address: Address
    ) -> None:
        """Whoever closes while bytes lie there resets the connection, and takes back what was not read."""
        health = f"GET /healthz HTTP/1.1\r\nHost: {host_of(address)}\r\n\r\n".encode()
        last = health.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        for where in (address, daemon.socket):
            with connect(where, 60.0) as sock:
                sock.sendall(health * 100 + last + health * 1000)
                assert daemon.healthy() and daemon.healthy()  # it had some turns
                with sock.makefile("rb") as answers:
                    assert answers.read().count(b"HTTP/1.1 200 OK") == 101

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_its_clients(self, daemon: Daemon, address: Address, generation: Any) -> None:
        client = generation(address)
        client.healthy()
        key = client.create(f"t:{generation.__name__}:{daemon.pid}")
        texts = [b'"%b"' % (b"m" * size) for size in (0, 40, 300, 4096, 100_000)]
        kept = [client.encrypt(key, text) for text in texts]
        assert [client.decrypt(key, one) for one in kept] == [client.message(text) for text in texts]
        assert client.session.connections == 1
        client.close()

    @ROOT
    def test_without_a_list_no_other_user(self, daemon: Daemon, address: Address) -> None:
        assert as_user(NOBODY, address).startswith("403 ")
        refusals = [r for r in records(daemon) if r["op"] == "connect" and r.get("uid") == NOBODY]
        assert refusals and all((r["outcome"], r["via"]) == ("refused", "tcp") for r in refusals)


def test_no_delay(fresh: Address) -> None:
    """Head and body of an answer that go out apart do not wait for each other's acknowledgement."""
    rules = PeerRules(None, frozenset((7,)), frozenset((0,)))
    settings: Any = SimpleNamespace(
        tcp_address=host_of(fresh), allowed_peer_uids=None, admin_peer_uids=rules.admins, peer_rules=rules
    )
    listener = listen_tcp(settings)
    assert listener is not None
    with listener, socket.create_connection(fresh):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


class TestBrowsers:
    @pytest.mark.parametrize(
        ("headers", "code"),
        [
            ({"Origin": "http://evil.example"}, "browser_refused"),
            ({"Origin": "null"}, "browser_refused"),
            ({"Sec-Fetch-Site": "none"}, "browser_refused"),
            ({"sec-fetch-mode": "cors"}, "browser_refused"),
            ({"Host": "evil.example:80"}, "host_refused"),
            ({"Host": "evil.example"}, "host_refused"),
            ({"Host": "unix"}, "host_refused"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize(
        ("method", "path"), [("GET", "/healthz"), ("POST", "/encrypt"), ("GET", "/status")]
    )
    def test_refused(
        self, daemon: Daemon, address: Address, method: str, path: str, headers: dict[str, str], code: str
    ) -> None:
        with Session(address) as kms:
            body = {"key_id": "k", "plaintext": ""} if method == "POST" else None
            reply = kms.request(method, path, body, headers)
            assert (reply.status, reply.code) == (403, code)
        with daemon.session() as kms:  # the socket's callers are no browsers
            assert kms.request("GET", "/healthz", None, headers).status == 200

    def test_another_port_or_none_in_host(self, daemon: Daemon, address: Address) -> None:
        for host in (host_of((address[0], address[1] ^ 1)), host_of(address).rpartition(":")[0], "localhost"):
            assert request(address, "GET", "/healthz", headers={"Host": host}).status == 403
        for host in (f"localhost:{address[1]}", f"LOCALHOST:{address[1]}", host_of(address)):
            assert request(address, "GET", "/healthz", headers={"Host": host}).status == 200
        assert raw(address, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403")

    @pytest.mark.parametrize(
        ("method", "path", "body"),
        [
            ("POST", "/create_dek_for_thread", b'{"thread_id":"t"}'),
            ("DELETE", "/deks/k", None),
            ("POST", "/deks/k/disable", None),
        ],
    )
    def test_a_content_type_is_needed(
        self, daemon: Daemon, address: Address, method: str, path: str, body: bytes | None
    ) -> None:
        with Session(address) as kms:
            for kind, status in (("", 415), ("text/plain", 415), ("application/json", None)):
                reply = kms.request(method, path, body, {"Content-Type": kind})
                assert reply.status == status if status else reply.status in (200, 404), (kind, reply)
                if body is None:
                    break


class TestStrangers:
    def test_a_peer_that_is_gone_is_not_served_as_root(self, daemon: Daemon, address: Address) -> None:
        """It closed before it was looked at: the kernel says uid 0, and its request is still here."""
        body = b'{"thread_id":"forged"}'
        head = (
            b"POST /create_dek_for_thread HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (host_of(address).encode(), len(body))
        )
        stopped = daemon.pids()
        for pid in stopped:  # so that all of them are gone before one is accepted
            os.kill(pid, 19)
        wait_until(lambda: all(map(is_stopped, stopped)), 20, "the daemon to stand still")
        try:
            for number in range(20):
                sock = socket.create_connection(address)
                sock.sendall(head + body)
                if number % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
        finally:
            for pid in stopped:
                os.kill(pid, 18)
        deadline = time.monotonic() + 20
        while not any(r.get("actor") == "unknown" for r in records(daemon)):
            assert time.monotonic() < deadline, "nothing was recorded"
            time.sleep(0.05)
        with Session(address) as kms:
            assert kms.ok("GET", "/deks?thread_id=forged")["deks"] == []

    def test_a_thousand_at_once(self, daemon: Daemon, address: Address) -> None:
        socks: list[socket.socket] = []
        try:
            for _ in range(1000):
                socks.append(socket.create_connection(address, 20))
            line = b"GET /healthz HTTP/1.1\r\nHost: %b\r\n\r\n" % host_of(address).encode()
            for sock in socks:
                sock.sendall(line)
            answers = [sock.recv(4096).split(b"\r\n")[0] for sock in socks]
            assert set(answers) == {b"HTTP/1.1 200 OK"}
        finally:
            for sock in socks:
                sock.close()


@ROOT
def test_a_list_lets_others_in_and_nobody_else(fresh: Address) -> None:
    with on_tcp(fresh, workers=1, allowed_peer_uids=[NOBODY, 0], admin_peer_uids=[77]) as daemon:
        assert as_user(NOBODY, fresh).startswith("200 ") and "only uid" not in daemon.stderr
        assert as_user(77, fresh).startswith("200 ") and as_user(78, fresh).startswith("403 ")
        with Session(fresh) as kms:
            assert kms.request("POST", "/deks/k/disable", {}).status == 403


def test_a_port_that_is_taken(address: Address) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as sock:
        sock.bind((address[0], 0))
        sock.listen(1)
        with contextlib.closing(on_tcp(sock.getsockname()[:2], workers=1).spawn()) as daemon:
            with pytest.raises(DaemonFailed) as refused:
                daemon.wait_ready()
            assert refused.value.code == 1 and "can't be bound" in refused.value.stderr
            assert "ss -ltnp" in refused.value.stderr
            assert not daemon.socket.exists()  # a name that nobody answers under


def test_nobody_else_can_listen_beside_it(daemon: Daemon, address: Address) -> None:
    """Nor at an address that is in it, by whatever option; and root is not asked for less than others."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    for host in (address[0], "::" if family == socket.AF_INET6 else "0.0.0.0"):
        for options in ((), (socket.SO_REUSEADDR,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)):
            with socket.socket(family) as other:
                for option in options:
                    other.setsockopt(socket.SOL_SOCKET, option, 1)
                with pytest.raises(OSError, match="in use"):
                    other.bind((host, address[1]))
                    other.listen()


def test_a_restart_takes_the_port_again(fresh: Address) -> None:
    with on_tcp(fresh, workers=2) as daemon:
        for _ in range(2):
            with Session(fresh) as kms:
                kms.create_dek("t")
                daemon.stop()
            daemon.start()
        assert request(fresh, "GET", "/healthz").status == 200


def test_the_flag(fresh: Address) -> None:
    daemon = Daemon(workers=1, args=["--addr", host_of(fresh)])
    with daemon:
        assert request(fresh, "GET", "/healthz").status == 200


def test_two_servers_over_tcp(daemon: Daemon, address: Address) -> None:
    done: list[int] = []

    def serve() -> None:
        client = GENERATIONS[1](address)
        key = client.create(f"t:two:{daemon.pid}")
        kept = [client.encrypt(key, b"%d" % n) for n in range(50)]
        done.append(sum(client.decrypt(key, one) == b"%d" % n for n, one in enumerate(kept)))
        client.close()

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done == [50, 50]


def test_where_the_kernel_does_not_tell_there_is_no_tcp(tmp_path: Any, fresh: Address) -> None:
    """As under a filter that knows no AF_NETLINK."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import socket\nreal = socket.socket\n"
        "class Filtered(real):\n"
        "    def __init__(self, family=-1, *args, **more):\n"
        "        if family == socket.AF_NETLINK: raise OSError(97, 'Address family not supported')\n"
        "        super().__init__(family, *args, **more)\n"
        "socket.socket = Filtered\n"
    )
    daemon = on_tcp(fresh, workers=1)
    daemon.env["PYTHONPATH"] = os.pathsep.join((str(site), daemon.environment()["PYTHONPATH"]))
    with daemon:
        assert re.search(r"no TCP: the kernel does not tell who connects to .* tcp\.conf", daemon.stderr)
        assert "tcp=" not in daemon.stdout
        with pytest.raises(OSError):
            socket.create_connection(fresh, 5)
