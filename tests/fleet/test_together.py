"""Creates that come together are one job for the keeper, and each is answered for itself."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.fleet.test_daemons import PATIENCE, configured
from tests.harness import postgres
from tests.harness.daemon import Daemon
from tests.harness.wire import Reply, connect
from tests.wire.test_ahead_fuzz import all_is_free, drawn, play_all, refusing
from tests.wire.test_http1 import NEXT
from tests.wire.test_socket import CREATE, statuses

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())

LONG = "\N{GRINNING FACE}" * 512


@pytest.fixture
def daemon(fleet_database: postgres.Fleet, make_daemon: MakeDaemon) -> Daemon:
    return make_daemon(configured(fleet_database), workers=2)


@contextlib.contextmanager
def waiting(daemon: Daemon) -> Iterator[None]:
    """The keeper does nothing meanwhile: what is asked for gathers."""
    keeper = daemon.pids()[1]  # the first that is forked
    os.kill(keeper, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(keeper, signal.SIGCONT)


def asked_together(daemon: Daemon, *bodies: Any) -> list[Reply]:
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(daemon.session(PATIENCE)) for _ in bodies]
        with waiting(daemon):
            for session, body in zip(sessions, bodies):
                session.begin("POST", "/deks", body)
        return [session.reply() for session in sessions]


def test_each_is_answered_for_itself(daemon: Daemon) -> None:
    other = daemon.ok("POST", "/deks", {"thread_id": "u", "key_id": "theirs"}, 201)
    same = {"thread_id": "t", "key_id": "mine"}
    bodies = [same] * 8 + [{"thread_id": "t", "key_id": "theirs"}, {"thread_id": 7}, {"thread_id": "u"}] * 8
    replies = asked_together(daemon, *bodies)
    mine, mixed = [one.json() for one in replies[:8]], replies[8:]
    assert len({one["wrapped"] for one in mine}) == 1 and {one["key_id"] for one in mine} == {"mine"}
    assert {(one.status, one.code) for one in mixed[::3]} == {(409, "key_exists")}
    assert {one.status for one in mixed[1::3]} == {400}
    made = [one.json() for one in mixed[2::3]]
    assert len({one["key_id"] for one in made} | {other["key_id"]}) == 9
    with daemon.session(PATIENCE) as session:
        for one in (*made, mine[0], other):
            assert session.ok("GET", f"/deks/{one['key_id']}")["thread_id"] == one["thread_id"]
            assert session.decrypt(one["key_id"], session.encrypt(one["key_id"], b"x")) == b"x"
    receipts = [one.headers["x-kms-audit"] for one in replies]
    assert len(set(receipts)) == len(receipts)


def test_more_than_one_message_takes(daemon: Daemon) -> None:
    replies = asked_together(daemon, *[{"thread_id": LONG}] * 12)
    assert {one.status for one in replies} == {201}
    assert {one.json()["thread_id"] for one in replies} == {LONG}


def test_a_database_that_is_away(daemon: Daemon, fleet_database: postgres.Fleet) -> None:
    """All of them hear so; and the next ones are made."""
    away = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'kms'"
    fleet_database.sql("ALTER ROLE kms NOLOGIN", away)
    try:
        assert {one.status for one in asked_together(daemon, *[{"thread_id": "t"}] * 6)} == {503}
    finally:
        fleet_database.sql("ALTER ROLE kms LOGIN")


def test_all_that_was_sent_before_sigterm_is_answered(daemon: Daemon) -> None:
    sent = [CREATE, (CREATE + NEXT) * 3, CREATE * 40]
    with contextlib.ExitStack() as opened:
        socks = [opened.enter_context(connect(daemon.socket, PATIENCE)) for _ in sent]
        for sock in socks:
            sock.sendall(NEXT)
            assert statuses(sock.recv(1000)) == [200]
        for data, answers in zip(sent, daemon.stopped_behind(list(zip(socks, sent)))):
            assert len(statuses(answers)) == data.count(b"HTTP/1.1")
    daemon.wait()


@pytest.mark.long
def test_those_that_send_ahead(fleet_database: postgres.Fleet, make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(configured(fleet_database, **refusing()), workers=2)
    play_all(daemon, drawn(float(os.environ.get("AHEAD_SECONDS", "60"))), [None])
    all_is_free(daemon, 2)
