"""Daemons on one database: what one changes holds on all when its answer leaves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import postgres
from tests.harness.daemon import Daemon, DaemonFailed
from tests.harness.faults import Shim
from tests.harness.wire import Session, b64

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())

PATIENCE = 90.0
TEXT = b64(b"hello")


def configured(database: postgres.Fleet, **more: Any) -> dict[str, Any]:
    where = database.where
    block = {"hosts": [where.folder], "database": where.database, "user": where.user, "fence_seconds": "10"}
    return {"store": "postgresql", "postgresql": block, **more}


Pair = tuple[Daemon, Daemon]


@pytest.fixture(params=[(1, 2)], ids=["one worker beside two"])
def pair(fleet_database: postgres.Fleet, make_daemon: MakeDaemon, request: pytest.FixtureRequest) -> Pair:
    """What each test does, it does to the second."""
    kek = os.urandom(32)
    one, two = (make_daemon(configured(fleet_database), kek=kek, workers=number) for number in request.param)
    return one, two


def status(session: Session, method: str, path: str, body: Any = None) -> int:
    return session.request(method, path, body).status


def use(session: Session, key_id: str) -> int:
    return status(session, "POST", "/encrypt", {"key_id": key_id, "plaintext": TEXT})


def until(true: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_one_host_does_holds_on_the_other_at_once(pair: Pair) -> None:
    one, two = pair
    with one.session(PATIENCE) as a, two.session(PATIENCE) as b:
        for number in range(10):
            key_id = a.create_dek(f"thread-{number}")["key_id"]
            sealed = b.encrypt(key_id, b"hello")
            assert a.decrypt(key_id, sealed) == b"hello"
            assert status(a, "POST", f"/deks/{key_id}/disable", {}) == 200
            assert use(b, key_id) == 423
            assert status(b, "POST", f"/deks/{key_id}/enable", {}) == 200
            assert a.decrypt(key_id, sealed) == b"hello"
            assert status(b, "DELETE", f"/deks/{key_id}", {"immediately": True}) == 200
            assert use(a, key_id) == 410
        assert use(a, "k_absent") == use(b, "k_absent") == 404


def test_a_host_s_own_change_takes_nothing_else_from_its_memory(
    pair: Pair, fleet_database: postgres.Fleet
) -> None:
    """The engine is away then: a DEK that was forgotten could not be found again."""
    _, two = pair
    with two.session(PATIENCE) as session:
        kept, gone = (session.create_dek("t")["key_id"] for _ in range(2))
        until(lambda: [use(session, kept) for _ in range(20)] == [200] * 20)  # each worker knows it
        assert status(session, "POST", f"/deks/{gone}/disable", {}) == 200
        fleet_database.sql(
            "ALTER ROLE kms NOLOGIN",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'kms'",
        )
        try:
            assert use(session, kept) == 200
            assert use(session, gone) == 503
        finally:
            fleet_database.sql("ALTER ROLE kms LOGIN")


def rows(database: postgres.Fleet) -> list[tuple[Any, ...]]:
    return database.sql("SELECT host, inc, fenced FROM kms.hosts ORDER BY host, inc")


def test_hosts_come_and_go(pair: Pair, fleet_database: postgres.Fleet) -> None:
    """A clean stop leaves no row; a sudden death leaves one, which the next start on the same boot takes
    away: no change waits for it."""
    one, two = pair
    before = rows(fleet_database)
    assert len(before) == 2 and not any(row[2] for row in before)
    two.stop()
    assert len(rows(fleet_database)) == 1
    two.start()
    two.kill()
    assert len(rows(fleet_database)) == 2
    two.start()
    assert len(rows(fleet_database)) == 2 and rows(fleet_database) != before
    key_id = one.ok("POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    one.ok("POST", f"/deks/{key_id}/disable", {})
    assert not any(row[2] for row in rows(fleet_database))


def test_a_keeper_that_is_killed_comes_back(fleet_database: postgres.Fleet, make_daemon: MakeDaemon) -> None:
    one = make_daemon(configured(fleet_database), workers=2)
    key_id = one.ok("POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    (first,) = rows(fleet_database)
    os.kill(one.pids()[1], signal.SIGKILL)  # the first that is forked
    until(lambda: rows(fleet_database) != [first] and len(rows(fleet_database)) == 1)
    with one.session(PATIENCE) as session:
        until(lambda: use(session, key_id) == 200)
        assert status(session, "POST", f"/deks/{key_id}/disable", {}) == 200
        assert use(session, key_id) == 423


def test_what_the_next_try_mends_is_no_reason_to_be_unready(
    fleet_database: postgres.Fleet, make_daemon: MakeDaemon
) -> None:
    daemon = make_daemon(configured(fleet_database), workers=1)
    daemon.ok("GET", "/readyz")
    fleet_database.sql("UPDATE kms.kms SET value = value || ' ' WHERE name = 'store:writes'")
    daemon.ok("GET", "/readyz")


def test_another_master_key_is_refused(pair: Pair, fleet_database: postgres.Fleet) -> None:
    refused = Daemon(configured(fleet_database), workers=1)
    try:
        told = refused.refusal()
    finally:
        refused.close()
    active = fleet_database.sql("SELECT active_kek FROM kms.fleet")[0][0]
    assert f"the fleet's active KEK {active} is not configured on this host" in told.stderr
    assert len(rows(fleet_database)) == 2


def test_a_kek_that_another_host_lacks_closes_nothing(pair: Pair) -> None:
    one, _ = pair
    key_id = one.ok("POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    new = {"key_id": key_id, "new_kek_hex": os.urandom(32).hex()}
    for path in ("/rewrap", "/rotate_kek"):
        reply = one.request("POST", path, new if path == "/rewrap" else {"new_kek_hex": new["new_kek_hex"]})
        assert (reply.status, reply.code) == (409, "kek_not_everywhere")
    assert one.ok("GET", f"/deks/{key_id}")["state"] == "enabled"


BOTH = pytest.mark.parametrize("pair", [(1, 2), (2, 1)], indirect=True)


@pytest.mark.long
@BOTH
def test_a_host_that_is_stopped_is_fenced_and_comes_back(pair: Pair, fleet_database: postgres.Fleet) -> None:
    one, two = pair
    with one.session(PATIENCE) as a, two.session(PATIENCE) as b:
        key_id, other = a.create_dek("t")["key_id"], a.create_dek("t")["key_id"]
        assert use(b, key_id) == use(b, other) == 200
        pids = two.pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            assert status(a, "POST", f"/deks/{key_id}/disable", {}) == 200
            assert [row[2] for row in rows(fleet_database)].count(True) == 1
            assert status(a, "POST", f"/deks/{other}/disable", {}) == 200
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        until(lambda: use(b, key_id) != 503)
        assert use(b, key_id) == 423
        assert use(b, other) == 423


@pytest.mark.long
@BOTH
def test_without_the_engine_all_is_refused_once_the_lease_is_over(
    pair: Pair, fleet_database: postgres.Fleet
) -> None:
    one, two = pair
    with one.session(PATIENCE) as a, two.session(PATIENCE) as b:
        key_id = a.create_dek("t")["key_id"]
        assert use(a, key_id) == use(b, key_id) == 200
        away = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'kms'"
        fleet_database.sql("ALTER ROLE kms NOLOGIN", away)
        assert use(a, key_id) == 200  # what it remembers is good until then
        assert status(a, "POST", "/deks", {"thread_id": "t"}) == 503
        until(lambda: use(a, key_id) == 503 and use(b, key_id) == 503)
        assert (
            a.request("POST", "/encrypt", {"key_id": key_id, "plaintext": TEXT}).code == "store_unreachable"
        )
        assert status(a, "GET", "/readyz") == 503
        fleet_database.sql("ALTER ROLE kms LOGIN")
        until(lambda: use(a, key_id) == 200 and use(b, key_id) == 200)
        until(lambda: status(a, "GET", "/readyz") == 200)
        assert status(a, "POST", "/deks", {"thread_id": "t"}) == 201


def with_a_deletion(fleet_database: postgres.Fleet, make_daemon: MakeDaemon) -> tuple[Daemon, str]:
    """A host, and a DEK that is to be shredded in 30 days."""
    one = make_daemon(configured(fleet_database), workers=1)
    key_id = one.ok("POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    one.ok("DELETE", f"/deks/{key_id}", {"pending_days": 30})
    return one, key_id


def test_a_host_whose_clock_is_wrong_when_it_comes_shreds_nothing(
    fleet_database: postgres.Fleet, make_daemon: MakeDaemon
) -> None:
    """It has no trusted time of its own yet, and takes that of the others."""
    one, key_id = with_a_deletion(fleet_database, make_daemon)
    with Shim() as shim:
        shim.clock(10 * 365 * 86400)
        two = make_daemon(configured(fleet_database), kek=one.kek, workers=1, env=shim.env)
        until(lambda: two.request("GET", "/readyz").status == 200)
        assert any("days ahead" in line for line in two.ok("GET", "/readyz")["warnings"])
        shim.clock(0)
        assert not any("ahead" in line for line in two.ok("GET", "/readyz")["warnings"])
        two.stop()
    assert one.ok("GET", f"/deks/{key_id}")["state"] == "pending_deletion"


def test_nor_does_the_first_one_of_a_fleet_that_was_restored(
    fleet_database: postgres.Fleet, make_daemon: MakeDaemon
) -> None:
    one, key_id = with_a_deletion(fleet_database, make_daemon)
    file = str(one.home / "backup")
    assert one.offline("backup", file).returncode == 0
    one.stop()
    fleet_database.again()
    with Shim() as shim:
        shim.clock(10 * 365 * 86400)
        two = make_daemon(configured(fleet_database), kek=one.kek, workers=1, env=shim.env, start=False)
        assert two.offline("restore", file).returncode == 0
        two.start()
        until(lambda: two.request("GET", "/readyz").status == 200)
        assert any("days ahead" in line for line in two.ok("GET", "/readyz")["warnings"])
        assert two.ok("GET", f"/deks/{key_id}")["state"] == "pending_deletion"
        two.stop()


YEARS = 10 * 365 * 86400


def exported(make_daemon: MakeDaemon) -> tuple[bytes, str, bytes]:
    """What a host with a store of its own had: a master key, a DEK that is to be shredded in 30 days, and the
    lines."""
    host = make_daemon(workers=1)
    key_id = host.ok("POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    host.ok("DELETE", f"/deks/{key_id}", {"pending_days": 30})
    host.stop()
    return host.kek, key_id, host.offline("export").stdout


def hosts(
    database: postgres.Fleet, make_daemon: MakeDaemon, kek: bytes, *clocks: Shim | None
) -> Iterator[Daemon]:
    """Not started yet, each with the clock that a shim sets or, for None, with the right one."""
    for shim in clocks:
        env = shim.env if shim else None
        yield make_daemon(configured(database), kek=kek, workers=1, env=env, start=False)


def holds(daemon: Daemon, key_id: str) -> bool:
    """Ready, and the janitor of a keeper that starts has looked: what is due is shredded by then."""
    until(lambda: daemon.request("GET", "/readyz").status == 200)
    told = daemon.ok("GET", "/readyz")["warnings"]
    assert daemon.ok("GET", f"/deks/{key_id}")["state"] == "pending_deletion"
    return any("scheduled deletions are held" in line for line in told)


def test_nor_does_one_that_imports_into_an_empty_fleet(
    fleet_database: postgres.Fleet, make_daemon: MakeDaemon
) -> None:
    """Nobody there knew how late it is, so the clock of the first daemon was believed."""
    kek, key_id, lines = exported(make_daemon)
    with Shim() as shim:
        shim.clock(YEARS)
        one, two = hosts(fleet_database, make_daemon, kek, shim, shim)
        done = one.offline("import", "-", stdin=lines)
        assert done.returncode == 0 and b"1 of the deletions are due by this host's clock, and held" in (
            done.stderr
        )
        for daemon in (two, one):
            assert holds(daemon.start(), key_id)
        assert one.cli("clock", "accept").returncode == 0
        until(lambda: two.ok("GET", f"/deks/{key_id}")["state"] == "shredded")
        one.stop()
        two.stop()
        assert one.offline("verify").returncode == 0


def test_nor_another_one_than_the_host_that_imports(
    fleet_database: postgres.Fleet, make_daemon: MakeDaemon
) -> None:
    """The one that imports has a clock that is right, and what it knows of the time stays."""
    kek, key_id, lines = exported(make_daemon)
    with Shim() as shim:
        one, two = hosts(fleet_database, make_daemon, kek, None, shim)
        assert one.offline("import", "-", stdin=lines).stderr == b""
        shim.clock(YEARS)
        assert holds(two.start(), key_id)
        assert not holds(one.start(), key_id)
        two.stop()


def test_nor_daemons_that_were_there_before_any_dek(
    fleet_database: postgres.Fleet, make_daemon: MakeDaemon
) -> None:
    """What they kept as the time is their own clocks' word. One that runs would shred at once."""
    kek, key_id, lines = exported(make_daemon)
    with Shim() as shim:
        shim.clock(YEARS)
        one, two = hosts(fleet_database, make_daemon, kek, None, shim)
        two.start()
        until(lambda: two.request("GET", "/readyz").status == 200)
        done = one.offline("import", "-", stdin=lines)
        assert done.returncode == 1 and b"nothing was stored" in done.stderr and b"stop" in done.stderr
        assert fleet_database.sql("SELECT count(*) FROM kms.deks") == [(0,)]
        two.stop()
        done = one.offline("import", "-", stdin=lines)
        assert done.returncode == 0 and b"and held" in done.stderr
        assert holds(two.start(), key_id)
        assert not holds(one.start(), key_id)
        two.stop()
        one.stop()
        assert one.offline("verify").returncode == 0


def test_nor_does_what_a_host_backed_up_that_only_commands_ran_on(
    fleet_database: postgres.Fleet, make_daemon: MakeDaemon
) -> None:
    """It has kept no time; the fleet has."""
    one, key_id = with_a_deletion(fleet_database, make_daemon)
    two = make_daemon(configured(fleet_database), kek=one.kek, start=False)
    file = str(two.home / "backup")
    assert two.offline("verify", "--recount").returncode == 0
    assert two.offline("backup", file).returncode == 0
    with Shim() as shim:
        shim.clock(YEARS)
        alone = make_daemon(kek=one.kek, workers=1, env=shim.env, start=False)
        assert alone.offline("restore", file).returncode == 0
        assert holds(alone.start(), key_id)
        alone.stop()


def test_a_database_that_was_put_back(fleet_database: postgres.Fleet, make_daemon: MakeDaemon) -> None:
    """It was told as kms.db, and that `serve --accept-older-store` takes it, which is not for a fleet's."""
    daemon = make_daemon(configured(fleet_database), workers=1)
    daemon.ok("POST", "/deks", {"thread_id": "t"}, 201)
    daemon.stop()
    tables = [
        row[0] for row in fleet_database.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'kms'")
    ]
    for table in tables:
        fleet_database.sql(f"CREATE TABLE public.saved_{table} AS SELECT * FROM kms.{table}")
    daemon.start()
    daemon.ok("POST", "/deks", {"thread_id": "t"}, 201)
    daemon.stop()
    for table in tables:
        fleet_database.sql(f"DELETE FROM kms.{table}")
        fleet_database.sql(f"INSERT INTO kms.{table} SELECT * FROM public.saved_{table}")
    with pytest.raises(DaemonFailed) as plain:
        daemon.start()
    daemon.args = ["--accept-older-store"]
    for told in (plain.value.stderr, daemon.refusal().stderr):
        assert "the fleet's database is older than the audit log here (change " in told
        assert "help fleet" in told and "kms.db" not in told and "--accept-older-store" not in told
