"""Who is at the other end of a TCP connection: the kernel's socket table, and what of it counts."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from progressdb_kms.errors import PeerRefused
from progressdb_kms.rules import TCP, Peer, PeerRules
from progressdb_kms.wire import loopback
from progressdb_kms.wire.loopback import Peers, read_answer

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user and to make a namespace")
NOBODY = 65534


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET6 if ":" in request.param else socket.AF_INET) as sock:
        try:
            sock.bind((request.param, 0))
        except OSError as error:
            pytest.skip(f"no {request.param} here: {error}")
        sock.listen(64)
        sock.settimeout(20)
        yield sock


@pytest.fixture
def peers() -> Iterator[Peers]:
    found = Peers()
    yield found
    found.close()


def pair(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = socket.create_connection(listener.getsockname()[:2])
    return client, listener.accept()[0]


def refused(peers: Peers, sock: Any) -> None:
    with pytest.raises(PeerRefused, match="does not tell who"):
        peers.identify(sock)


class TestIdentified:
    def test_one_of_ours(self, listener: socket.socket, peers: Peers) -> None:
        client, accepted = pair(listener)
        with client, accepted:
            assert peers.identify(accepted) == Peer(os.geteuid(), -1, 0, TCP)
            assert peers.identify(client) == Peer(os.geteuid(), -1, 0, TCP)  # from the other side, too
            client.shutdown(socket.SHUT_WR)  # it has sent all, and waits for the answer
            assert peers.identify(accepted).uid == os.geteuid()

    @ROOT
    def test_another_uid(self, listener: socket.socket, peers: Peers) -> None:
        host, port = listener.getsockname()[:2]
        code = (
            f"import encodings.idna, os, socket, sys; os.setuid({NOBODY}); "
            f"c = socket.create_connection(({host!r}, {port})); sys.stdin.read()"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
            accepted, _ = listener.accept()
            with accepted:
                assert peers.identify(accepted).uid == NOBODY
                assert child.stdin is not None
                child.stdin.close()
                child.wait()
                refused(peers, accepted)

    def test_many(self, listener: socket.socket, peers: Peers) -> None:
        pairs = [pair(listener) for _ in range(100)]
        assert {peers.identify(accepted).uid for _, accepted in pairs} == {os.geteuid()}
        for client, accepted in pairs:
            client.close()
            refused(peers, accepted)
            accepted.close()


class TestRefused:
    def test_one_that_is_gone(self, listener: socket.socket, peers: Peers) -> None:
        """The kernel tells it as root's; what it sent is still here."""
        client, accepted = pair(listener)
        with accepted:
            client.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
            client.close()
            refused(peers, accepted)
            assert accepted.recv(100).startswith(b"GET")

    def test_one_that_was_reset(self, listener: socket.socket, peers: Peers) -> None:
        client, accepted = pair(listener)
        with accepted:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            refused(peers, accepted)

    def test_a_listener_is_no_connection(self, listener: socket.socket, peers: Peers) -> None:
        """What the kernel may answer after a reset: whoever listens on the port that the peer had."""
        client, accepted = pair(listener)
        with client, accepted, socket.socket(listener.family) as other:
            other.bind((listener.getsockname()[0], 0))
            other.listen(1)
            refused(peers, Tuple(other.getsockname(), accepted.getsockname()))

    def test_a_four_tuple_that_nobody_has(self, listener: socket.socket, peers: Peers) -> None:
        client, accepted = pair(listener)
        with client, accepted:
            host, port = accepted.getpeername()[:2]
            refused(peers, Tuple((host, port ^ 1), accepted.getsockname()))
            refused(peers, Tuple(accepted.getpeername(), (host, accepted.getsockname()[1] ^ 1)))
            assert peers.identify(Tuple(accepted.getpeername(), accepted.getsockname())).uid == os.geteuid()

    def test_one_that_ended_during_the_look_up(self, listener: socket.socket, peers: Peers) -> None:
        """Its four-tuple may be another's by now."""
        client, accepted = pair(listener)
        with client, accepted:
            refused(peers, Tuple(accepted.getpeername(), accepted.getsockname(), once=True))

    def test_a_unix_socket(self, peers: Peers) -> None:
        one, two = socket.socketpair()
        with one, two:
            refused(peers, one)

    @ROOT
    @pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
    def test_another_network_namespace(self, peers: Peers) -> None:
        if not hasattr(socket, "send_fds") or shutil.which("ip") is None:
            pytest.skip("needs ip, and Python 3.9")
        ours, theirs = socket.socketpair()
        code = (
            "import socket, subprocess, sys\n"
            "subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)\n"
            "s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname())\n"
            "a, _ = s.accept()\n"
            f"socket.send_fds(socket.socket(fileno={theirs.fileno()}), [b'x'], [a.fileno()])\n"
            "sys.stdin.read()\n"
        )
        command = ["unshare", "--net", sys.executable, "-c", code]
        with (
            ours,
            theirs,
            subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()]) as child,
        ):
            ours.settimeout(20)
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            with socket.socket(fileno=fds[0]) as foreign:
                refused(peers, foreign)
            assert child.stdin is not None
            child.stdin.close()


class Tuple:
    """Stands for a socket: the addresses alone are looked at."""

    def __init__(self, peer: tuple[Any, ...], own: tuple[Any, ...], once: bool = False) -> None:
        self.family = socket.AF_INET6 if ":" in peer[0] else socket.AF_INET
        self._peers = [peer, peer if not once else None]
        self._own = own

    def getpeername(self) -> tuple[Any, ...]:
        found = self._peers.pop(0) if self._peers else None
        if found is None:
            raise OSError("not connected")
        return found

    def getsockname(self) -> tuple[Any, ...]:
        return self._own


class TestAnswers:
    """Each member that an answer must have."""

    WANTED = bytes(range(36))

    def told(self, **fields: Any) -> bytes:
        at = {"family": 2, "state": 1, "told": self.WANTED, "uid": 0, "inode": 5, **fields}
        head = struct.pack("=BBBB36s12s", at["family"], at["state"], 0, 0, at["told"], b"")
        return head + struct.pack("=IIIII", 0, 0, 0, at["uid"], at["inode"])

    @pytest.mark.parametrize("state", range(13))
    def test_states(self, state: int) -> None:
        found = read_answer(20, self.told(state=state, uid=7), 2, self.WANTED)
        assert found == (7 if state in (1, 4, 5, 8) else None)

    @pytest.mark.parametrize("uid", [0, 1000, 2**32 - 2])
    def test_uids(self, uid: int) -> None:
        assert read_answer(20, self.told(uid=uid) + b"attributes", 2, self.WANTED) == uid

    @pytest.mark.parametrize("fields", [{"inode": 0}, {"family": 10}, {"told": bytes(36)}], ids=str)
    def test_what_is_not_exactly_that(self, fields: dict[str, Any]) -> None:
        assert read_answer(20, self.told(**fields), 2, self.WANTED) is None

    def test_an_error_and_a_short_answer(self) -> None:
        assert read_answer(2, struct.pack("=i", -2), 2, self.WANTED) is None
        assert read_answer(20, self.told()[:-1], 2, self.WANTED) is None


def test_the_daemon_looks_itself_up(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    host = listener.getsockname()[0]
    loopback.check(host)
    monkeypatch.setattr(loopback, "_SOCK_DIAG", 9999)
    with pytest.raises(PeerRefused):
        loopback.check(host)


class TestRules:
    """Without a list, a port has no permissions: the daemon's own UID and root alone."""

    own = frozenset((0, 500))

    @pytest.mark.parametrize(
        ("callers", "admins", "uid", "calls", "administers"),
        [
            (None, None, 500, True, True), (None, None, 0, True, True), (None, None, 7, False, False),
            (None, {7}, 7, True, True), (None, {7}, 500, True, False), (None, {7}, 8, False, False),
            ({7}, None, 7, True, True), ({7}, None, 500, False, False), ({7}, {8}, 8, True, True),
        ],
    )  # fmt: skip
    def test_over_tcp(self, callers: Any, admins: Any, uid: int, calls: bool, administers: bool) -> None:
        rules = PeerRules(callers, admins, self.own)
        for admin, allowed in ((False, calls), (True, administers)):
            peer = Peer(uid, via=TCP)
            if allowed:
                rules.check(peer, admin)
            else:
                with pytest.raises(PeerRefused):
                    rules.check(peer, admin)

    def test_over_the_socket_its_permissions_decide(self) -> None:
        PeerRules(None, None, self.own).check(Peer(7, 7, 7), True)
