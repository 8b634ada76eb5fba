"""Leases, fences and barriers against a real PostgreSQL."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from progressdb_kms.errors import KMSError, StoreUnavailable
from progressdb_kms.fleet.board import Board
from progressdb_kms.fleet.lease import Clock
from progressdb_kms.fleet.rows import KEY, ChangeRow, Point
from tests.fleet.twin import Service
from tests.harness import postgres

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())

SPAN = 2.0
PATIENCE = 60.0
K = frozenset(["k1"])


@pytest.fixture
def engine(fleet_database: postgres.Fleet) -> Iterator[Any]:
    from progressdb_kms.fleet.registry import EngineRegistry

    fleet_database.sql("UPDATE kms.fleet SET active_kek = 'k1', version = 1")
    result = EngineRegistry(fleet_database.link(), SPAN)
    yield result
    result.close()


def changes(database: postgres.Fleet, *key_ids: str) -> None:
    for key_id in key_ids:
        database.sql(
            "WITH f AS (UPDATE kms.fleet SET gen = gen + 1 RETURNING gen) "
            f"INSERT INTO kms.changes SELECT gen, 'key', '{key_id}' FROM f",
            "SELECT pg_notify('kms', '')",
        )


class TestQuestions:
    def test_a_row_is_made_and_read(self, engine: Any, fleet_database: postgres.Fleet) -> None:
        changes(fleet_database, "x")
        fleet = engine.register("a", "a1", "name", frozenset(["k1", "k2"]))
        assert fleet.point == Point(1, 1) and fleet.active_kek == "k1"
        (row,) = engine.sight().hosts
        assert row == ("a", "a1", "name", 0, 1, frozenset(["k1", "k2"]), False)

    def test_an_incarnation_that_is_over_goes_and_fenced_ones(self, engine: Any) -> None:
        for inc in ("a1", "a2", "a3"):
            engine.register("a", inc, "", K)
        engine.register("b", "a1", "", K)
        assert engine.fence("a", "a3", 0, 1)
        engine.register("a", "a4", "", K, ["a1"])
        assert [(row.host, row.inc) for row in engine.sight().hosts] == [
            ("a", "a2"),
            ("a", "a4"),
            ("b", "a1"),
        ]

    def test_a_beat_only_renews(self, engine: Any) -> None:
        assert not engine.beat("a", "a1", Point(1, 0), K)
        assert engine.sight().hosts == []
        engine.register("a", "a1", "", K)
        assert engine.beat("a", "a1", Point(1, 7), K)
        assert engine.beat("a", "a1", Point(1, 5), frozenset(["k2"]))  # one that was late
        (row,) = engine.sight().hosts
        assert (row.beat, row.seen, row.keks) == (2, 7, {"k2"})

    def test_a_beat_for_another_timeline_does_nothing(self, engine: Any) -> None:
        engine.register("a", "a1", "", K)
        assert not engine.beat("a", "a1", Point(2, 0), K)
        assert engine.sight().hosts[0].beat == 0

    def test_a_fence_compares(self, engine: Any) -> None:
        engine.register("a", "a1", "", K)
        engine.beat("a", "a1", Point(1, 0), K)
        assert not engine.fence("a", "a1", 0, 1)
        assert not engine.fence("a", "a2", 1, 1)
        assert not engine.fence("a", "a1", 1, 2)  # what was seen on another server is no news of this one
        assert engine.fence("a", "a1", 1, 1)
        assert not engine.fence("a", "a1", 1, 1)
        assert not engine.beat("a", "a1", Point(1, 0), K)

    def test_who_leaves_is_gone(self, engine: Any) -> None:
        engine.register("a", "a1", "", K)
        engine.leave("a", "a1")
        engine.leave("a", "a1")
        assert engine.sight().hosts == []

    def test_news_in_order_and_by_pages(self, engine: Any, fleet_database: postgres.Fleet) -> None:
        assert engine.news(0, 5).changes == []
        changes(fleet_database, "x", "y", "z")
        news = engine.news(1, 1)
        assert news.fleet.point == Point(1, 3)
        assert news.changes == [ChangeRow(2, KEY, "y")]
        assert [row.gen for row in engine.news(0, 5).changes] == [1, 2, 3]

    def test_a_registration_waits_for_a_change_under_way(
        self, engine: Any, fleet_database: postgres.Fleet
    ) -> None:
        """Either it has the change's gen, or the change's barrier has its row."""
        admin = fleet_database.server.connect(fleet_database.where.database)
        with admin:
            admin.execute("BEGIN; UPDATE kms.fleet SET gen = gen + 1")
            found: list[Any] = []
            thread = threading.Thread(target=lambda: found.append(engine.register("a", "a1", "", K)))
            thread.start()
            waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            until(lambda: fleet_database.sql(waits) == [(1,)])
            admin.execute("COMMIT")
            thread.join()
        assert found[0].gen == 1
        assert engine.sight().hosts[0].seen == 1


class TestWaiting:
    def test_a_notice_ends_it(self, engine: Any, fleet_database: postgres.Fleet) -> None:
        engine.sight()
        assert engine.wait(0.0)  # a new connection: what was told before is not known
        assert not engine.wait(0.01)
        changes(fleet_database, "x")
        assert engine.wait(PATIENCE)
        assert not engine.wait(0.0)

    def test_one_that_came_beside_an_answer_counts(self, engine: Any, fleet_database: postgres.Fleet) -> None:
        engine.sight()
        engine.wait(0.0)
        changes(fleet_database, "x")
        engine.sight()
        assert engine.wait(PATIENCE)

    def test_any_thread_may_end_it(self, engine: Any) -> None:
        engine.wait(0.0)
        threading.Thread(target=engine.wake).start()
        assert engine.wait(PATIENCE)
        assert not engine.wait(0.0)

    def test_without_a_connection_it_only_waits(self, engine: Any, fleet_database: postgres.Fleet) -> None:
        engine.sight()
        engine.wait(0.0)
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'kms'"
        fleet_database.sql(end)
        until(lambda: engine.wait(1.0))  # its end was noticed
        assert not engine.wait(0.01)
        assert engine.sight().hosts == []

    def test_whoever_wakes_one_that_is_closed_wakes_nobody(self, fleet_database: postgres.Fleet) -> None:
        from progressdb_kms.fleet.registry import EngineRegistry

        engine = EngineRegistry(fleet_database.link(), SPAN)
        engine.close()
        engine.wake()


class Running:
    """A host in a thread of its own."""

    def __init__(self, database: postgres.Fleet, name: str) -> None:
        from progressdb_kms.fleet.host import Host, run
        from progressdb_kms.fleet.registry import EngineRegistry

        self.service, self.board, self.clock = Service(name), Board.new(), Clock()
        self.registry = EngineRegistry(database.link(), SPAN)
        self.host = Host(self.service, self.service, self.board, self.clock, self.registry.wake, SPAN)
        self.thread = threading.Thread(target=run, args=(self.host, self.registry))
        self.thread.start()

    @property
    def serves(self) -> bool:
        now = self.clock.read()
        return self.board.serves(now.boot, now.wall)

    def end(self) -> None:
        self.host.end()
        self.thread.join()


@pytest.fixture
def hosts(engine: Any, fleet_database: postgres.Fleet) -> Iterator[list[Running]]:
    running = [Running(fleet_database, name) for name in ("a", "b")]
    try:
        until(lambda: all(one.serves for one in running))
        yield running
    finally:
        for one in running:
            one.end()


def until(true: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def everywhere(one: Running, point: Point) -> KMSError | None:
    told: list[KMSError | None] = []
    heard = threading.Event()

    def then(error: KMSError | None) -> None:
        told.append(error)
        heard.set()

    one.host.everywhere(point, time.monotonic() + PATIENCE, then)
    assert heard.wait(PATIENCE)
    return told[0]


class TestHosts:
    def test_a_change_holds_on_both_when_it_is_answered(
        self, hosts: list[Running], fleet_database: postgres.Fleet
    ) -> None:
        for number in range(1, 20):
            changes(fleet_database, f"k{number}")
            assert everywhere(hosts[0], Point(1, number)) is None
            assert [one.board.seen for one in hosts] == [Point(1, number)] * 2
            assert hosts[1].board.key_id(number) == f"k{number}"

    def test_one_that_is_silent_is_fenced(
        self, engine: Any, hosts: list[Running], fleet_database: postgres.Fleet
    ) -> None:
        engine.register("c", "c1", "", K)
        changes(fleet_database, "x")
        assert everywhere(hosts[0], Point(1, 1)) is None
        assert [row.host for row in engine.sight().hosts if row.fenced] == ["c"]
        changes(fleet_database, "y")
        assert everywhere(hosts[1], Point(1, 2)) is None

    def test_one_that_is_fenced_comes_back(
        self, engine: Any, hosts: list[Running], fleet_database: postgres.Fleet
    ) -> None:
        first = hosts[1].service.made[0]
        fleet_database.sql("UPDATE kms.hosts SET fenced = true WHERE host = 'b'")
        until(lambda: len(hosts[1].service.made) > 1 and hosts[1].serves)
        assert first not in {row.inc for row in engine.sight().hosts}

    def test_the_engine_goes_and_comes_back(
        self, hosts: list[Running], fleet_database: postgres.Fleet
    ) -> None:
        fleet_database.sql(
            "ALTER ROLE kms NOLOGIN",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'kms'",
        )
        until(lambda: not any(one.serves for one in hosts))
        assert all(one.host.why for one in hosts)
        fleet_database.sql("ALTER ROLE kms LOGIN")
        until(lambda: all(one.serves and not one.host.why for one in hosts))

    def test_who_ends_is_gone(self, engine: Any, hosts: list[Running]) -> None:
        hosts[1].end()
        assert [row.host for row in engine.sight().hosts] == ["a"]
        assert not hosts[1].serves


def test_a_host_that_was_stopped_in_half_of_a_transaction_holds_nothing_up(
    fleet_database: postgres.Fleet,
) -> None:
    """Of a pipeline without its Sync the engine waits for the rest, and knows no timeout for that."""
    from progressdb_kms.fleet.engine import Link
    from progressdb_kms.fleet.registry import EngineRegistry
    from progressdb_kms.fleet.store import WRITER

    other = fleet_database.store(host="two")
    fleet_database.sql("INSERT INTO kms.hosts VALUES ('one', '1', '', 0, 0, '{}', false)")
    stopped = Link(fleet_database.where, WRITER + "one")
    engine = EngineRegistry(Link(fleet_database.where), 60.0)
    with contextlib.closing(engine), pytest.raises(StoreUnavailable), stopped.session() as session:
        for half in (
            "BEGIN",
            "SET LOCAL idle_in_transaction_session_timeout = 0",
            "LOCK TABLE kms IN SHARE ROW EXCLUSIVE MODE",
            "SELECT 1 FROM hosts WHERE host = 'one' FOR UPDATE",
        ):
            session.execute(half)
        assert not engine.fence("one", "1", 9, 1)  # it has beaten meanwhile: nothing of it is ended
        session.execute("SELECT 1")
        assert engine.fence("one", "1", 0, 1)
        with other.transaction():
            other.write("probe", {"at": "now"})
        session.execute("COMMIT")
