"""The place of a host in the fleet, step by step, against an engine in memory."""

from __future__ import annotations

from typing import Any

import pytest

from progressdb_kms.errors import KMSError
from progressdb_kms.fleet import barrier, lease
from progressdb_kms.fleet.lease import NONE
from progressdb_kms.fleet.rows import ALL, KEY, ChangeRow, HostRow, Point
from tests.fleet.simulation import Db
from tests.fleet.twin import SPAN, Database, Stepped


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def host(database: Database) -> Stepped:
    result = Stepped(database)
    result.turn()
    return result


def changed(database: Database, *key_ids: str, kind: str = KEY) -> Point:
    for key_id in key_ids:
        db = database.db
        row = ChangeRow(db.gen + 1, kind, key_id)
        database.db = db._replace(gen=db.gen + 1, changes=(*db.changes, row))
    return database.db.fleet.point


def row(database: Database, one: Stepped) -> Any:
    return database.db.hosts.get((one.service.host, one.inc))


class TestRegistering:
    def test_a_host_registers_and_has_a_lease_from_before_it_asked(
        self, database: Database, host: Stepped
    ) -> None:
        assert row(database, host).seen == 0 and row(database, host).keks == {"k1", "k2"}
        assert host.board.lease == lease.granted(host.clock.read(), SPAN)
        assert host.service.adopted == ["k1"] and host.host.why == ""

    def test_it_has_no_lease_before(self, database: Database) -> None:
        database.away = True
        one = Stepped(database)
        one.board.grant(lease.granted(one.clock.read(), SPAN))  # of a keeper that died
        one.steps = one.host.life()
        one.question = next(one.steps)
        one.turn()
        assert one.board.lease == NONE and "away" in one.host.why

    def test_it_is_tried_again_until_it_works(self, database: Database) -> None:
        database.away = True
        one = Stepped(database)
        for _ in range(3):
            one.turn()
        assert 0 < one.waited < SPAN / 10
        database.away = False
        one.turn()
        assert one.host.why == "" and row(database, one) is not None

    def test_what_is_over_goes(self, database: Database, host: Stepped) -> None:
        again = Stepped(database)
        again.service.made, again.service.before = ["a.0"], ["a.0"]
        again.turn()
        assert list(database.db.hosts) == [("a", "a.1")]

    def test_what_may_run_stays(self, database: Database, host: Stepped) -> None:
        again = Stepped(database)
        again.service.made = ["a.0"]
        again.turn()
        assert list(database.db.hosts) == [("a", "a.0"), ("a", "a.1")]

    def test_a_registration_of_which_nobody_knows_is_given_up(self, database: Database) -> None:
        one = Stepped(database)
        do = database.do
        lost: list[str] = []

        def ambiguous(name: str, *args: Any) -> Any:
            answer = do(name, *args)
            if name == "register" and not lost:
                lost.append(name)
                database.away = True
                return do(name, *args)
            return answer

        database.do = ambiguous  # type: ignore[method-assign]
        one.turn()
        assert list(database.db.hosts) == [("a", "a.0")] and one.board.lease == NONE
        database.away = False
        one.turn()
        assert list(database.db.hosts) == [("a", "a.1")]

    def test_a_host_without_the_active_kek_isnt_waited_for(self, database: Database) -> None:
        one = Stepped(database, keks="k0")
        one.turn()
        assert database.db.hosts == {} and "k1" in one.host.why and one.board.lease == NONE

    def test_it_signs_off(self, database: Database, host: Stepped) -> None:
        host.host.end()
        with pytest.raises(StopIteration):
            host.turn()
            host.turn()
        assert database.db.hosts == {} and host.board.lease == NONE


class TestBeating:
    def test_a_heartbeat_renews_the_lease(self, database: Database, host: Stepped) -> None:
        host.turn()
        assert row(database, host).beat == 0  # not before it is due
        host.clock.seconds += SPAN / 4
        host.turn()
        assert row(database, host).beat == 1
        assert host.board.lease == lease.granted(host.clock.read(), SPAN)

    def test_without_an_answer_the_lease_stays_as_it_was(self, database: Database, host: Stepped) -> None:
        before = host.board.lease
        database.away = True
        host.clock.seconds += SPAN / 4
        host.turn()
        assert host.board.lease == before and "away" in host.host.why
        database.away = False
        host.turn()
        assert host.board.lease == lease.granted(host.clock.read(), SPAN) and host.host.why == ""

    def test_who_is_fenced_forgets_all_and_registers_anew(self, database: Database, host: Stepped) -> None:
        first, flushes = host.inc, host.board.flushes
        database.do("fence", "a", first, 0, 1)
        host.clock.seconds += SPAN
        host.turn()
        assert host.board.lease == NONE and "given up" in host.host.why
        host.turn()
        assert host.inc != first and list(database.db.hosts) == [("a", host.inc)]
        assert host.board.flushes > flushes and host.host.why == ""

    def test_a_fault_of_ours_is_told_and_begun_anew_from_nothing(
        self, database: Database, host: Stepped, caplog: pytest.LogCaptureFixture
    ) -> None:
        first, do = host.inc, database.do

        def broken(name: str, *args: Any) -> Any:
            raise ValueError("unheard of")

        database.do = broken  # type: ignore[method-assign]
        host.turn()
        assert host.board.lease == NONE and "fault" in host.host.why and "unheard of" in caplog.text
        database.do = do  # type: ignore[method-assign]
        host.turn()
        assert list(database.db.hosts) == [("a", host.inc)] and host.inc != first and host.host.why == ""

    def test_other_keys_are_told_at_once(self, database: Database, host: Stepped) -> None:
        host.service.configured = frozenset(["k1", "k3"])
        host.host.tell_keks()
        host.turn()
        assert row(database, host).keks == {"k1", "k3"}


class TestFollowing:
    def test_a_change_is_on_the_board_and_then_acknowledged(self, database: Database, host: Stepped) -> None:
        changed(database, "x", "y")
        host.turn()
        assert host.board.seen == Point(1, 2) and row(database, host).seen == 2
        assert (host.board.key_id(1), host.board.key_id(2)) == ("x", "y")

    def test_more_than_a_page(self, database: Database, host: Stepped) -> None:
        changed(database, *(f"k{n}" for n in range(1201)))
        host.turn()
        assert host.board.seen == Point(1, 1201) and host.board.key_id(1201) == "k1200"
        assert row(database, host).seen == 1201

    def test_what_was_pruned_takes_all(self, database: Database, host: Stepped) -> None:
        flushes = host.board.flushes
        changed(database, "x", "y")
        database.db = database.db._replace(changes=database.db.changes[1:])
        host.turn()
        assert host.board.seen == Point(1, 2) and host.board.flushes > flushes

    def test_a_change_of_all_takes_all(self, database: Database, host: Stepped) -> None:
        flushes = host.board.flushes
        changed(database, "", kind=ALL)
        host.turn()
        assert host.board.seen == Point(1, 1) and host.board.flushes > flushes

    def test_another_kek_is_adopted_before_it_is_acknowledged(
        self, database: Database, host: Stepped
    ) -> None:
        database.do("begin", "a", host.inc, "k1", "k2")
        database.do("swap", "a", host.inc, "k1", "k2", True)
        host.turn()
        assert host.service.adopted == ["k1", "k2"]
        assert row(database, host).seen == 1

    def test_a_host_without_another_kek_leaves(self, database: Database, host: Stepped) -> None:
        host.service.configured = frozenset(["k1"])
        changed(database, "", kind="keks")
        database.db = database.db._replace(kek="k2")
        host.turn()
        assert database.db.hosts == {} and host.board.lease == NONE and "k2" in host.host.why
        host.service.configured = frozenset(["k1", "k2"])
        host.turn()
        assert row(database, host).seen == 1 and host.host.why == ""

    def test_it_has_no_lease_any_more_when_it_leaves(self, database: Database, host: Stepped) -> None:
        host.service.configured = frozenset(["k1"])
        changed(database, "", kind="keks")
        database.db = database.db._replace(kek="k2")
        leases, do = [], database.do

        def watched(name: str, *args: Any) -> Any:
            if name == "leave":
                leases.append(host.board.lease)
            return do(name, *args)

        database.do = watched  # type: ignore[method-assign]
        host.turn()
        assert leases == [NONE]

    def test_another_timeline_takes_all(self, database: Database, host: Stepped) -> None:
        changed(database, "x")
        host.turn()
        flushes = host.board.flushes
        database.db = database.db._replace(
            timeline=2, gen=0, changes=()
        )  # that change was acknowledged to nobody
        host.turn()
        assert host.board.seen == Point(2, 0) and host.board.flushes > flushes
        assert host.host.why == ""

    def test_another_timeline_takes_all_though_its_changes_seem_to_be_the_next(
        self, database: Database, host: Stepped
    ) -> None:
        """Its first change has the number of one that was acknowledged to nobody, and is another."""
        changed(database, "x")
        host.turn()
        flushes = host.board.flushes
        database.db = database.db._replace(timeline=2, gen=0, changes=())
        changed(database, "y", "z")
        host.turn()
        assert host.board.seen == Point(2, 2) and host.board.flushes > flushes

    def test_an_engine_that_is_behind_is_left(self, database: Database, host: Stepped) -> None:
        changed(database, "x")
        host.turn()
        database.db = database.db._replace(gen=0, changes=())
        host.turn()
        assert host.registry.dropped == 1 and "old primary" not in host.host.why and "seen" in host.host.why
        assert host.board.seen == Point(1, 1)


class TestAnotherFleetsDatabase:
    """An address leads there, since it was mistaken, or moved. It may have the same KEK."""

    def test_it_has_no_place_there(self, database: Database, host: Stepped) -> None:
        ours = database.db
        database.db = Db(50, "k1", 1, 1, {}, (), {}, name="g")
        for _ in range(3):
            host.turn()
        assert database.db.hosts == {} and "of the fleet g" in host.host.why
        assert host.registry.dropped == 3 and host.board.seen == Point(1, 0)
        database.db = ours
        host.turn()
        assert host.host.why == ""

    def test_a_host_that_registers_anew_does_so_in_its_own(self, database: Database, host: Stepped) -> None:
        database.do("fence", "a", host.inc, 0, 1)
        host.clock.seconds += SPAN
        host.turn()
        ours = database.db
        database.db = Db(50, "k1", 1, 1, {}, (), {}, name="g")
        host.turn()
        assert database.db.hosts == {} and "of the fleet g" in host.host.why
        database.db = ours
        host.turn()
        assert host.host.why == "" and row(database, host) is not None

    def test_it_says_nothing_of_where_a_change_holds(self, database: Database, host: Stepped) -> None:
        """Found between two questions of one turn."""
        heard: list[KMSError | None] = []
        silent = HostRow("b", "1", "", 0, 0, frozenset(["k1"]), False)
        database.db = database.db._replace(hosts={**database.db.hosts, ("b", "1"): silent})
        point = changed(database, "x")
        host.turn()
        host.host.everywhere(point, float("inf"), heard.append)
        ours, sight = database.db, host.registry.sight

        def elsewhere() -> Any:
            database.db = Db(50, "k1", 1, 1, {}, (), {}, name="g")
            return sight()

        host.registry.sight = elsewhere  # type: ignore[method-assign]
        host.turn()
        assert heard == [] and "of the fleet g" in host.host.why
        database.db = ours


class TestEverywhere:
    def ask(self, one: Stepped, point: Point, seconds: float = 1000.0) -> list[KMSError | None]:
        told: list[KMSError | None] = []
        one.host.everywhere(point, one.clock.seconds + seconds, told.append)
        return told

    def test_alone_at_once(self, database: Database, host: Stepped) -> None:
        told = self.ask(host, changed(database, "x"))
        host.turn()
        assert told == [None]

    def test_when_the_other_has_seen_it(self, database: Database, host: Stepped) -> None:
        other = Stepped(database, "b")
        other.turn()
        told = self.ask(host, changed(database, "x"))
        host.turn()
        assert told == [] and 0 < host.waited <= 0.1
        other.turn()
        host.turn()
        assert told == [None] and host.waited > 0.1

    def test_a_silent_one_is_fenced_and_then_no_more_waited_for(
        self, database: Database, host: Stepped
    ) -> None:
        other = Stepped(database, "b")
        other.turn()
        told = self.ask(host, changed(database, "x"))
        for _ in range(int(SPAN * 1.1)):
            host.turn()
            assert not row(database, other).fenced and told == []
            host.clock.seconds += 0.94
        for _ in range(3):
            host.clock.seconds += 1.0
            host.turn()
        assert row(database, other).fenced and told == [None]
        told = self.ask(host, changed(database, "y"))
        host.turn()
        assert told == [None]

    def test_one_that_was_silent_for_long_costs_nothing(self, database: Database, host: Stepped) -> None:
        other = Stepped(database, "b")
        other.turn()
        for _ in range(6):
            host.turn()
            host.clock.seconds += SPAN / 4
        assert not row(database, other).fenced  # nobody waits for it
        told = self.ask(host, changed(database, "x"))
        host.turn()
        host.turn()
        assert row(database, other).fenced and told == [None]

    def test_one_that_beats_is_never_fenced(self, database: Database, host: Stepped) -> None:
        """It lives, and can't follow: the caller hears of it in time, and the change stands."""
        other = Stepped(database, "b")
        other.turn()
        told = self.ask(host, changed(database, "x"), seconds=3 * SPAN)
        for _ in range(15):
            host.turn()
            host.clock.seconds += SPAN / 4
            database.do("beat", "b", other.inc, Point(1, 0), frozenset())
        assert not row(database, other).fenced
        assert [error.code for error in told if error] == ["done_not_everywhere"]

    def test_a_caller_who_can_t_be_told_holds_up_no_other(
        self, database: Database, host: Stepped, caplog: pytest.LogCaptureFixture
    ) -> None:
        point = changed(database, "x")

        def gone(error: KMSError | None) -> None:
            raise OSError("its socket is gone")

        host.host.everywhere(point, host.clock.seconds + 9, gone)
        told = self.ask(host, point)
        host.turn()
        assert told == [None] and "could not be told" in caplog.text

    def test_the_engine_away(self, database: Database, host: Stepped) -> None:
        told = self.ask(host, changed(database, "x"), seconds=5.0)
        database.away = True
        host.turn()
        host.clock.seconds += 6.0
        host.turn()
        assert told[0] is not None and "away" in told[0].message and told[0].status == 503


class TestWhatNoChangeWaitsFor:
    def test_a_host_that_rotates_and_is_dead_is_fenced(self, database: Database, host: Stepped) -> None:
        """Else the table that it stages would stay, and the marks grow, until somebody changes something."""
        dead = Stepped(database, "b")
        dead.turn()
        database.do("begin", "b", dead.inc, "k1", "k2")
        for _ in range(6):
            assert not row(database, dead).fenced
            host.clock.seconds += SPAN / 4
            host.turn()
        assert row(database, dead).fenced
        assert database.db.staged is not None  # that is the keeper's to throw away
        database.do("discard", "a")
        assert database.db.staged is None

    def test_changes_that_all_hosts_know_are_pruned(
        self, database: Database, host: Stepped, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(barrier, "KEPT_CHANGES", 2)
        changed(database, *"abcde")
        host.turn()
        assert len(database.db.changes) == 5
        host.clock.seconds += SPAN / 4
        host.turn()
        assert [change.key_id for change in database.db.changes] == ["c", "d", "e"]
        asked = database.asked.count("prune")
        host.clock.seconds += SPAN / 4
        host.turn()
        assert database.asked.count("prune") == asked
