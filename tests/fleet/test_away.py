"""The database of a fleet is away, at a start or later: what waits for it, what is refused meanwhile, and
that all is well again by itself."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Callable

import pytest

from tests.conftest import MakeDaemon
from tests.harness import postgres
from tests.harness.daemon import Daemon
from tests.harness.faults import Shim
from tests.harness.quickfence import QUICK
from tests.harness.wire import Session, b64

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())

PATIENCE = 90.0
TEXT = b64(b"hello")


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def told(daemon: Daemon, method: str, path: str, body: Any = None) -> tuple[int, str]:
    """Status and code."""
    reply = daemon.request(method, path, body)
    return reply.status, reply.code


def ready(daemon: Daemon) -> bool:
    return daemon.request("GET", "/readyz").status == 200


def served(daemon: Daemon, key_id: str, wrapped: str) -> set[tuple[int, str]]:
    """Every way to use or change a key; also with a DEK that the caller brings."""
    blob = {"wrapped": wrapped, "plaintext": TEXT}
    calls: list[tuple[str, str, Any]] = [
        ("POST", "/encrypt", {"key_id": key_id, "plaintext": TEXT}),
        ("POST", "/encrypt", blob),
        ("POST", "/unwrap", {"wrapped": wrapped}),
        ("POST", "/wrap", {"dek": b64(os.urandom(32))}),
        ("GET", f"/deks/{key_id}", None),
        ("POST", "/deks", {"thread_id": "t"}),
        ("POST", f"/deks/{key_id}/disable", {}),
    ]
    return {told(daemon, *call) for call in calls} - {(503, "store_unreachable")}


def test_a_start_without_it(fleet_database: postgres.Fleet, make_daemon: MakeDaemon) -> None:
    """It listens, says why it isn't ready, refuses every key, and is ready once the database is there."""
    other = make_daemon(fleet_database.configured(), workers=1)
    dek = other.ok("POST", "/deks", {"thread_id": "t"}, 201)
    other.stop()
    daemon = make_daemon(fleet_database.configured(), kek=other.kek, workers=2, start=False)
    with fleet_database.away():
        daemon.start()
        reply = daemon.request("GET", "/readyz")
        assert reply.status == 503 and "can't be reached" in str(reply.json()["reasons"])
        assert not served(daemon, dek["key_id"], dek["wrapped"])
        assert daemon.request("GET", "/metrics").status == 200
        assert "listening, not ready" in daemon.stdout and "kek_id=" not in daemon.stdout
    until(lambda: ready(daemon))
    with daemon.session(PATIENCE) as kms:
        assert kms.decrypt(dek["key_id"], kms.encrypt(dek["key_id"], b"hello")) == b"hello"
        kms.ok("POST", "/deks", {"thread_id": "t"}, 201)
    until(lambda: "kek_id=" in daemon.stdout)
    lines = [line for line in daemon.stderr.splitlines() if "no store yet" in line]
    assert lines and len(set(lines)) == len(lines)  # each reason once, however often it was tried
    daemon.stop()
    done = daemon.offline("audit", "verify")
    assert done.returncode == 0, done.stderr
    assert b'"chain":"0.' not in daemon.audit_log.read_bytes()


def test_what_no_waiting_mends_ends_it(fleet_database: postgres.Fleet, make_daemon: MakeDaemon) -> None:
    """Found out late, it is said as if it had been found at once."""
    fleet_database.sql("UPDATE kms.fleet SET schema = 7, least = 6")
    daemon = make_daemon(fleet_database.configured(), workers=2, start=False)
    with fleet_database.away():
        daemon.start()
    daemon.wait(PATIENCE, code=1)
    assert "has schema 7" in daemon.stderr.splitlines()[-1]


def test_it_ends_in_order_while_it_waits(fleet_database: postgres.Fleet, make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(fleet_database.configured(), workers=2, start=False)
    with fleet_database.away():
        daemon.start()
        daemon.stop()
    assert not daemon.socket.exists()


def seen(session: Session, key_id: str) -> int:
    return session.request("POST", "/encrypt", {"key_id": key_id, "plaintext": TEXT}).status


def test_it_goes_away_and_comes_back(fleet_database: postgres.Fleet, make_daemon: MakeDaemon) -> None:
    """Changes are refused at once; what is remembered serves until the lease ends, and from then on nothing
    does, until the database is back. No process is replaced for that."""
    daemon = make_daemon(fleet_database.configured(fence_seconds=4), command=QUICK, workers=2)
    dek = daemon.ok("POST", "/deks", {"thread_id": "t"}, 201)
    key_id = dek["key_id"]
    before = daemon.pids()
    with daemon.session(PATIENCE) as kms:
        assert seen(kms, key_id) == 200
        with fleet_database.away("immediate"):
            assert told(daemon, "POST", "/deks", {"thread_id": "t"}) == (503, "store_unreachable")
            assert told(daemon, "POST", f"/deks/{key_id}/disable", {}) == (503, "store_unreachable")
            until(lambda: seen(kms, key_id) == 503)
            assert not served(daemon, key_id, dek["wrapped"])
            reply = daemon.request("GET", "/readyz")
            assert reply.status == 503 and reply.json()["reasons"]
            assert seen(kms, key_id) == 503
        until(lambda: seen(kms, key_id) == 200)
        until(lambda: ready(daemon))
        assert kms.ok("POST", f"/deks/{key_id}/disable", {})["state"] == "disabled"
        assert seen(kms, key_id) == 423
    assert daemon.pids() == before


def test_a_wall_clock_that_is_set_ends_a_lease_and_lengthens_none(
    fleet_database: postgres.Fleet, make_daemon: MakeDaemon
) -> None:
    with Shim() as shim:
        config = fleet_database.configured(fence_seconds=3)
        daemon = make_daemon(config, command=QUICK, workers=1, env=shim.env)
        key_id = daemon.ok("POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
        with daemon.session(PATIENCE) as kms:
            shim.clock(3600)
            until(lambda: seen(kms, key_id) == 200)  # with the next heartbeat
            shim.clock(-3600)
            until(lambda: seen(kms, key_id) == 200)
            with fleet_database.away("immediate"):
                until(lambda: seen(kms, key_id) == 503)  # by the other clock: this one has hours left
            until(lambda: seen(kms, key_id) == 200)
            with fleet_database.away("immediate"):
                shim.clock(0)
                assert seen(kms, key_id) == 503
            until(lambda: seen(kms, key_id) == 200)


@pytest.mark.parametrize("which", [1, 2], ids=["the keeper", "a worker"])
def test_a_process_that_dies_meanwhile_comes_back(
    fleet_database: postgres.Fleet, make_daemon: MakeDaemon, which: int
) -> None:
    daemon = make_daemon(fleet_database.configured(fence_seconds=4), command=QUICK, workers=2)
    key_id = daemon.ok("POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    pid = daemon.pids()[which]  # in the order in which they were forked
    with fleet_database.away():
        os.kill(pid, signal.SIGKILL)
        until(lambda: len(daemon.pids()) == 4 and pid not in daemon.pids())
        until(lambda: not ready(daemon))
    use = {"key_id": key_id, "plaintext": TEXT}
    until(lambda: all(daemon.request("POST", "/encrypt", use).status == 200 for _ in range(20)))  # by both
    until(lambda: ready(daemon))
    assert daemon.ok("POST", f"/deks/{key_id}/disable", {})["state"] == "disabled"


def test_a_dead_host_costs_the_first_change_once(
    fleet_database: postgres.Fleet, make_daemon: MakeDaemon
) -> None:
    """The first change waits until it is fenced, the next ones for nobody."""
    kek = os.urandom(32)
    config = fleet_database.configured(fence_seconds=2)
    one, two = (make_daemon(config, kek=kek, command=QUICK, workers=1) for _ in range(2))
    deks = [one.ok("POST", "/deks", {"thread_id": "t"}, 201)["key_id"] for _ in range(6)]
    two.signal(signal.SIGKILL)
    took = []
    for key_id in deks:
        begun = time.monotonic()
        assert one.ok("POST", f"/deks/{key_id}/disable", {})["state"] == "disabled"
        took.append(time.monotonic() - begun)
    rows = fleet_database.sql("SELECT fenced FROM kms.hosts ORDER BY fenced")
    assert rows == [(False,), (True,)]
    two.wait(code=-signal.SIGKILL)
    assert min(took[1:]) < min(1.0, took[0])
