"""Who may call what: the UID at connect() against allowed_peer_uids and admin_peer_uids."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.audit.log import AuditLog
from progressdb_kms.errors import PolicyRefused
from progressdb_kms.rules import Peer
from progressdb_kms.service.metrics import Metrics
from progressdb_kms.wire.admission import EACH, NAMED, Refusals
from progressdb_kms.wire.routes import ROUTES
from tests.harness import Daemon
from tests.harness.procs import as_user
from tests.harness.wire import Reply, connect

CALLER, ADMIN, STRANGER = 12_001, 12_002, 12_003
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can connect as another user")

ADMIN_CALLS = [
    ("POST", "/unwrap", {"wrapped": "AAAA"}),
    ("POST", "/rewrap", {"key_id": "k", "new_kek_hex": "x"}),
    ("POST", "/rotate_kek", {"new_kek_hex": "x"}),
    ("POST", "/deks/k_1/disable", None),
    ("POST", "/deks/k_1/enable", None),
    ("DELETE", "/deks/k_1", None),
    ("POST", "/clock/accept", None),
]
CALLS = [
    ("POST", "/create_dek_for_thread", {"thread_id": "t"}),
    ("GET", "/get_wrapped?key_id=k_1", None),
    ("POST", "/encrypt", {"key_id": "k_1", "plaintext": ""}),
    ("GET", "/deks", None),
    ("POST", "/wrap", {"dek": "x"}),
    ("GET", "/status", None),
    ("GET", "/metrics", None),
    ("GET", "/healthz", None),
]


def ask(daemon: Daemon, uid: int, call: tuple[str, str, Any]) -> Reply:
    with as_user(uid):
        return daemon.request(*call)


@contextlib.contextmanager
def serving(**rules: Any) -> Iterator[Daemon]:
    """A daemon whose socket everybody can reach; its data-dir stays closed."""
    with Daemon(rules, workers=1) as daemon:
        daemon.home.chmod(0o755)
        daemon.socket.chmod(0o666)
        yield daemon


def refusals(daemon: Daemon) -> list[dict[str, Any]]:
    events = [json.loads(line)["event"] for line in daemon.audit_log.read_text().splitlines()]
    return [event for event in events if event["outcome"] == "refused"]


def told(event: dict[str, Any]) -> tuple[int, int]:
    return event["uid"], event["count"]


def last(daemon: Daemon) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(daemon.audit_log.read_text().splitlines()[-1])["event"]
    return event


def test_the_calls_here_are_all_that_need_an_admin() -> None:
    admin = {(route.method, route.path) for route in ROUTES if route.admin}
    assert admin == {(method, path.replace("k_1", "{key_id}")) for method, path, _ in ADMIN_CALLS}


class TestWithoutRules:
    def test_whom_the_socket_lets_in_is_served_and_named(self) -> None:
        with serving() as daemon:
            for call in ADMIN_CALLS + CALLS:
                assert ask(daemon, STRANGER, call).status != 403
            ask(daemon, STRANGER, CALLS[0])
            event = last(daemon)
            assert (event["uid"], event["gid"], event["pid"]) == (STRANGER, STRANGER, os.getpid())
            assert event["actor"] == f"peer_uid:{STRANGER}"

    @pytest.mark.parametrize("name", ["uid", "gid"])
    @pytest.mark.parametrize("number", [2**31, 2**32 - 2])
    def test_a_number_that_fills_all_bits_is_one_too(self, name: str, number: int) -> None:
        with serving(policies=[{name: number, "operations": ["create_dek"]}]) as daemon:
            pids = daemon.pids()
            assert ask(daemon, number, CALLS[0]).status == 200
            event = last(daemon)
            assert (event["uid"], event["gid"], event["actor"]) == (number, number, f"peer_uid:{number}")
            assert ask(daemon, number, CALLS[3]).code == "policy_refused"
            assert daemon.pids() == pids, "a worker ended"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with serving(allowed_peer_uids=[0, CALLER]) as running:
        yield running


class TestAllowedPeers:
    @pytest.mark.parametrize("call", ADMIN_CALLS + CALLS, ids=lambda call: call[1])
    def test_others_are_refused(self, daemon: Daemon, call: tuple[str, str, Any]) -> None:
        assert ask(daemon, CALLER, call).status != 403
        reply = ask(daemon, STRANGER, call)
        assert (reply.status, reply.code) == (403, "peer_refused")
        assert str(STRANGER) in reply.json()["error"]["message"]

    def test_the_first_refusal_of_each_uid_is_recorded_and_the_others_are_counted(self) -> None:
        with serving(allowed_peer_uids=[0]) as daemon:
            for uid in (STRANGER, STRANGER, CALLER, STRANGER):
                assert ask(daemon, uid, CALLS[2]).status == 403
            assert [told(event) for event in refusals(daemon)] == [(STRANGER, 1), (CALLER, 1)]
            page = daemon.request("GET", "/metrics").body
            assert b"\nprogressdb_kms_refused_peers_total 4\n" in page
            assert {(e["op"], e["status"], e["code"]) for e in refusals(daemon)} == {
                ("connect", 403, "peer_refused")
            }
            daemon.stop()
            assert [told(event) for event in refusals(daemon)] == [(STRANGER, 1), (CALLER, 1), (STRANGER, 2)]

    def test_who_is_quiet_makes_room_for_others_on_the_record(self, tmp_path: Path) -> None:
        """However many UIDs, operations and entries are refused: the log grows by so many lines a minute."""
        now, counters = [0.0], Metrics(1).block(0)
        log = AuditLog(tmp_path / "log", memoryview(bytes(32)), "1.1")
        refused = Refusals(log, counters, lambda: now[0])

        def lines() -> int:
            return (tmp_path / "log").read_bytes().count(b"\n")

        for _ in range(20):
            for uid in range(200):
                refused.add(Peer(uid), PolicyRefused("no", entry=3), "encrypt")
        assert lines() == NAMED
        now[0] += EACH
        refused.flush()
        assert lines() == 2 * NAMED + 1  # the last says how many others there were
        for _ in range(2):
            now[0] += EACH
            refused.flush()
        refused.add(Peer(199), PolicyRefused("no", entry=4), "encrypt")
        log.close()
        events = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
        assert len(events) == 2 * NAMED + 2 and (events[-1]["uid"], events[-1]["policy"]) == (199, 4)
        assert sum(event["count"] for event in events) == 4001
        assert counters.get("policy_denials") == 4001

    def test_what_counts_is_who_connected(self, daemon: Daemon) -> None:
        with as_user(STRANGER):
            session = connect(daemon.socket)
        session.sendall(b"GET /healthz HTTP/1.1\r\nHost: u\r\n\r\n")  # we are root again; it is not
        assert session.recv(1000).startswith(b"HTTP/1.1 403 ")
        session.close()


class TestAdminPeers:
    @pytest.mark.parametrize("allowed", [None, [CALLER]], ids=["callers: all", "callers: one"])
    def test_the_rights_of_each(self, allowed: list[int] | None) -> None:
        rules: dict[str, Any] = {} if allowed is None else {"allowed_peer_uids": [0, *allowed]}
        with serving(admin_peer_uids=[0, ADMIN], **rules) as daemon:
            for call in ADMIN_CALLS:
                assert ask(daemon, ADMIN, call).status != 403
                assert ask(daemon, CALLER, call).status == 403
                assert last(daemon)["outcome"] == "refused"
            for call in CALLS:
                assert ask(daemon, ADMIN, call).status != 403  # an admin is a caller too
                assert ask(daemon, CALLER, call).status != 403
                assert (ask(daemon, STRANGER, call).status == 403) == (allowed is not None)

    def test_a_refused_rotation_changes_nothing(self) -> None:
        with serving(admin_peer_uids=[ADMIN]) as daemon:
            new = os.urandom(32).hex()
            reply = ask(daemon, CALLER, ("POST", "/rotate_kek", {"new_kek_hex": new}))
            assert reply.status == 403 and new not in reply.body.decode()
            assert daemon.ok("GET", "/status")["kek_version"] == "1"
            assert new not in daemon.audit_log.read_text() + daemon.stderr
