"""What a fleet's store holds beyond the contract of every store: many hosts write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from progressdb_kms.errors import Conflict, StoreDamaged, StoreUnavailable
from progressdb_kms.store.contract import DekRecord
from progressdb_kms.store.policy import SHREDDED
from progressdb_kms.store.seal import STATE, KekCount
from tests.harness import postgres
from tests.harness.postgres import Fleet
from tests.store.test_contract import KEY, NEW, OLD, Stop, dek, keys, put

SINCE = dek("").created_at

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing() or "")


@pytest.fixture
def one(fleet_database: Fleet) -> Any:
    return fleet_database.store(KEY, "one")


@pytest.fixture
def two(one: Any, fleet_database: Fleet) -> Any:
    return fleet_database.store(KEY, "two")


class TestTwoHosts:
    def test_each_sees_what_the_other_wrote(self, one: Any, two: Any) -> None:
        put(one, dek("a"), dek("b"))
        assert two.get("a") == dek("a")
        put(two, dek("a", state="disabled"), dek("c", kek_id=NEW))
        assert one.get("a").state == "disabled"  # type: ignore[union-attr]
        assert one.keks() == two.keks() == {OLD: one.keks()[OLD]._replace(deks=2), NEW: one.keks()[NEW]}

    def test_each_has_its_own_number(self, one: Any, two: Any) -> None:
        put(one, dek("a"), dek("b"))
        put(two, dek("c"))
        assert (one.state().change, two.state().change) == (2, 1)

    def test_what_one_counted_the_other_may_take_away(
        self, one: Any, two: Any, fleet_database: Fleet
    ) -> None:
        put(one, dek("a"), dek("b"))
        put(two, dek("a", state=SHREDDED)._replace(wrapped=b""), dek("b", kek_id=NEW))
        reader = fleet_database.reader(KEY, "three")
        for side in (one, two, reader):
            assert {kek_id: row.deks for kek_id, row in side.keks().items()} == {NEW: 1}
        assert one.state().total == two.state().total == reader.state().total
        with one.transaction():
            assert not one.recount()

    def test_the_state_of_any_host_is_authentic(self, one: Any, two: Any, fleet_database: Fleet) -> None:
        put(one, dek("a"))
        fleet_database.sql("UPDATE kms.kms SET value = replace(value, '\"change\":1', '\"change\":2')")
        with pytest.raises(StoreDamaged, match=STATE):
            two.state()

    def test_rows_of_the_service(self, one: Any, two: Any) -> None:
        with one.transaction():
            one.write("deletion:2026|a", {})
            one.write("audit:head:1.0", {"seq": 1})
        assert two.due("2027", 9) == ["deletion:2026|a"] and two.read("audit:head:1.0") is None
        with two.transaction():
            two.erase("deletion:2026|a")
            two.erase("audit:head:1.0")
        assert one.due("2027", 9) == [] and one.read("audit:head:1.0") == {"seq": 1}

    def test_rows_of_the_service_are_authentic(self, one: Any, two: Any, fleet_database: Fleet) -> None:
        """Each is its host's: two that were exchanged add up, and are found all the same."""
        for store, sig in ((one, "x"), (two, "y")):
            with store.transaction():
                store.write("audit:head:1.0", {"seq": 1, "sig": sig})
                store.write(f"kek:retired:{sig}", {"since": "2026"})
        with two.transaction():
            two.erase("kek:retired:x")
        one.vouch()
        row = "kms.kms WHERE name = 'audit:head:1.0' AND host ="
        rows = fleet_database.sql(f"SELECT host, value FROM {row} ANY('{{one,two}}') ORDER BY host")
        for statement, says in (
            ("DELETE FROM kms.kms WHERE name = 'kek:retired:y'", "don't add up"),
            (f"UPDATE kms.kms SET value = '{rows[1][1]}' WHERE name = 'audit:head:1.0'", "not as the daemon"),
        ):
            fleet_database.sql("CREATE TEMP TABLE IF NOT EXISTS kept AS SELECT * FROM kms.kms", statement)
            for side in (one, two):
                with pytest.raises(StoreDamaged, match=says):
                    side.vouch()
            fleet_database.sql("DELETE FROM kms.kms", "INSERT INTO kms.kms SELECT * FROM kept")
        one.vouch()

    def test_an_active_kek_is_the_fleet_s(self, one: Any, two: Any) -> None:
        with one.transaction():
            one.activate(OLD, 1, "2026")
        with one.transaction():
            one.activate(NEW, 2, "2027")
        assert two.state().active == one.state().active == (NEW, 2, "2027")


class TestCrossing:
    """Both saw the same row. One is first, and the other hears that it was not."""

    def crossed(self, first: Any, second: Any, record: DekRecord) -> None:
        from progressdb_kms.fleet.store import Contended

        with pytest.raises(Contended), second.transaction():
            second.put(record)
            put(first, dek("a", "first"))
        assert second.get("a") == dek("a", "first")

    def test_two_changes(self, one: Any, two: Any) -> None:
        put(one, dek("a"))
        self.crossed(one, two, dek("a", "second"))
        put(two, dek("a", "third"))
        assert one.get("a") == dek("a", "third") and one.keks()[OLD].deks == 1

    def test_two_creates(self, one: Any, two: Any) -> None:
        self.crossed(one, two, dek("a", "second"))
        with two.transaction():
            assert not two.recount()

    def test_nothing_of_the_batch_took_place(self, one: Any, two: Any) -> None:
        from progressdb_kms.fleet.store import Contended

        put(one, dek("a"))
        with pytest.raises(Contended), two.transaction():
            two.put(dek("b"))
            two.write("x", {})
            two.put(dek("a", "second"))
            put(one, dek("a", "first"))
        assert two.get("b") is None and two.read("x") is None and two.state().change == 0


class TestFence:
    def test_a_host_that_was_put_out_writes_nothing(self, one: Any, fleet_database: Fleet) -> None:
        from progressdb_kms.fleet.store import Fenced

        put(one, dek("a"))
        for statement in ("UPDATE kms.hosts SET fenced = true", "DELETE FROM kms.hosts"):
            fleet_database.sql(statement)
            for record in (dek("a", "other"), dek("b")):
                with pytest.raises(Fenced):
                    put(one, record)
            with pytest.raises(Fenced), one.transaction():
                one.staging(True)
        assert keys(one.page("", 9)) == ["a"] and one.get("a") == dek("a")
        fleet_database.sql("INSERT INTO kms.hosts VALUES ('one', '2', '', 0, 0, '{}', false)")
        one.inc = "2"
        put(one, dek("b"))

    def test_who_does_not_know_the_active_kek(self, one: Any, two: Any) -> None:
        from progressdb_kms.fleet.store import Fenced

        with one.transaction():
            one.activate(OLD, 1, "2026")
        with pytest.raises(Fenced):
            put(two, dek("b"))
        with pytest.raises(Fenced):
            put(two, dek("b"))  # to have read of it is not to have the key
        assert one.get("b") is None and two.state().active == (OLD, 1, "2026")
        two.acting = OLD
        put(two, dek("b"))

    def test_it_waits_for_what_is_under_way(self, one: Any, fleet_database: Fleet) -> None:
        """Who fences this host comes before its fence, or after its COMMIT."""
        import psycopg

        with one.transaction():
            one.put(dek("a"))
            session = one._inside()
            for sql, args in one._told():
                session.execute(sql, args)
            with pytest.raises(psycopg.errors.LockNotAvailable):
                fleet_database.sql("SET lock_timeout = '50ms'", "UPDATE kms.hosts SET fenced = true")

    def test_another_daemon_of_the_same_host(self, one: Any, fleet_database: Fleet) -> None:
        """A copy of its data-dir: each is told, and neither's count is lost."""
        from progressdb_kms.fleet.store import Contended

        again = fleet_database.store(KEY, "one", "2")
        put(one, dek("a"))
        with pytest.raises(Contended):
            put(again, dek("b"))
        put(again, dek("b"))
        with pytest.raises(Contended):
            put(one, dek("c"))
        put(one, dek("c"))
        with one.transaction():
            assert not one.recount()


class TestChanges:
    def changes(self, fleet: Fleet) -> list[tuple[Any, ...]]:
        return fleet.sql("SELECT gen, kind, key_id FROM kms.changes ORDER BY gen")

    def test_creates_are_none(self, one: Any, fleet_database: Fleet) -> None:
        put(one, dek("a"), dek("b"))
        assert self.changes(fleet_database) == [] and one.point == (1, 0)

    def test_who_finds_that_all_is_so_already_waits_for_it_too(self, one: Any, two: Any) -> None:
        """It may have been done by a try that nobody answered, and not be known everywhere yet."""
        put(one, dek("a"))
        put(two, dek("a", state="disabled"))
        with one.transaction():
            assert one.get("a").state == "disabled"
        assert one.point == (1, 1)

    def test_each_has_a_number(self, one: Any, two: Any, fleet_database: Fleet) -> None:
        put(one, dek("a"), dek("b"))
        put(two, dek("a", state="disabled"))
        assert two.point == (1, 1)
        put(one, dek("a"), dek("b", state="disabled"), dek("c"))
        assert one.point == (1, 3)
        assert self.changes(fleet_database) == [(1, "key", "a"), (2, "key", "a"), (3, "key", "b")]
        assert fleet_database.sql("SELECT gen FROM kms.fleet") == [(3,)]

    def test_of_many_it_is_told_that_there_were_many(self, one: Any, fleet_database: Fleet) -> None:
        names = [f"k{n}" for n in range(100)]
        put(one, *map(dek, names))
        put(one, *(dek(name, "other") for name in names))
        assert self.changes(fleet_database) == [(1, "all", "")]

    def test_another_kek(self, one: Any, fleet_database: Fleet) -> None:
        with one.transaction():
            one.activate(OLD, 1, "2026")
        assert self.changes(fleet_database) == [(1, "keks", "")]

    def test_who_listens_is_told(self, one: Any, fleet_database: Fleet) -> None:
        put(one, dek("a"))
        with fleet_database.server.connect(fleet_database.where.database) as listener:
            listener.execute("LISTEN kms")
            put(one, dek("a", "other"))
            assert next(listener.notifies()).channel == "kms"


def test_who_only_looks_writes_too(one: Any, fleet_database: Fleet) -> None:
    """A create that is repeated answers what another one wrote: it waits for the standby as that did."""
    put(one, dek("a"))
    count = "SELECT value FROM kms.kms WHERE name = 'store:writes'"
    before = fleet_database.sql(count)
    with one.transaction():
        assert one.get("a") == dek("a")
    assert fleet_database.sql(count) != before
    with one.transaction():
        assert one.read("x") is None


class Engine:
    """What happens to the next pipelines of a store: see `after`."""

    def __init__(self, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan: list[str] = []
        real = store._send

        def send(statements: Any) -> None:
            what = self.plan.pop(0) if self.plan else ""
            if what != "lost before":
                real(statements)
            if what:
                from progressdb_kms.fleet.store import Unknown

                store._link.drop()
                raise Unknown("the connection was lost")

        monkeypatch.setattr(store, "_send", send)


class TestUnknownOutcome:
    @pytest.fixture
    def engine(self, one: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
        engine = Engine(one, monkeypatch)
        yield engine
        assert engine.plan == []

    @pytest.mark.parametrize("what", ["lost before", "lost after"])
    def test_it_is_sent_again_and_took_place_once(self, one: Any, engine: Engine, what: str) -> None:
        told: list[int] = []
        one.unlock(KEY, told.append)
        put(one, dek("a"))
        engine.plan = [what]
        put(one, dek("a", state="disabled"), dek("b"))
        assert told == [0, 1, 3] and one.point == (1, 1)
        assert keys(one.page("", 9)) == ["a", "b"] and one.keks()[OLD].deks == 2
        with one.transaction():
            one.count([])
            assert not one.recount()

    def test_uses_are_counted_once(self, one: Any, engine: Engine) -> None:
        from progressdb_kms.store.contract import Usage

        put(one, dek("a"))
        engine.plan = ["lost after"]
        with one.transaction():
            one.count([("a", Usage(1, 0, 1, 1, 1))])
        assert one.usage(["a"])["a"].encrypts == 1

    @pytest.mark.parametrize("last", ["lost before", "lost after"])
    def test_twice_is_told_and_looked_at_before_the_next(self, one: Any, engine: Engine, last: str) -> None:
        put(one, dek("a"))
        engine.plan = ["lost before", last]
        with pytest.raises(StoreUnavailable, match="nobody knows"):
            put(one, dek("b"))
        assert one.trouble()
        put(one, dek("c"))
        assert not one.trouble()
        assert keys(one.page("", 9)) == (["a", "c"] if last == "lost before" else ["a", "b", "c"])
        with one.transaction():
            assert not one.recount()

    def test_a_warning_at_the_commit(self, one: Any, fleet_database: Fleet) -> None:
        """As where the wait for a standby was cancelled. It is sent again, and was there."""
        fleet_database.sql(
            "CREATE FUNCTION kms.warn() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE WARNING 'canceling wait for synchronous replication'; RETURN NULL; END $$",
            "CREATE CONSTRAINT TRIGGER warn AFTER INSERT ON kms.deks DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION kms.warn()",
        )
        try:
            with one._link.session() as session:
                put(one, dek("a"))
            assert session.warning == "" and keys(one.page("", 9)) == ["a"] and one.state().change == 1
        finally:
            fleet_database.sql("DROP TRIGGER warn ON kms.deks", "DROP FUNCTION kms.warn")

    def test_an_old_one_that_is_still_under_way_is_waited_for(self, one: Any, fleet_database: Fleet) -> None:
        put(one, dek("a"))
        with fleet_database.server.connect(fleet_database.where.database) as old:
            old.execute("BEGIN")
            old.execute("UPDATE kms.kms SET value = value WHERE name = 'store:writes'")
            one._unclear = "for the test"
            with pytest.raises(StoreUnavailable, match="too busy"), one.transaction():
                pass
            assert one.trouble()
            old.execute("COMMIT")
        put(one, dek("b"))

    def test_what_fails_on_our_side_leaves_no_half(self, one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        real = one._told
        monkeypatch.setattr(one, "_told", lambda: [*real(), ("SELECT %s", ())])
        with pytest.raises(StoreUnavailable):
            put(one, dek("a"))
        monkeypatch.undo()
        assert one.get("a") is None
        put(one, dek("b"))
        assert one.state().change == 1

    def test_an_engine_that_lost_what_it_acknowledged(self, one: Any, fleet_database: Fleet) -> None:
        put(one, dek("a"))
        rows = fleet_database.sql("SELECT name, value FROM kms.kms")
        put(one, dek("b"))
        for name, value in rows:
            fleet_database.sql(f"UPDATE kms.kms SET value = '{value}' WHERE name = '{name}'")
        fleet_database.sql("DELETE FROM kms.deks WHERE key_id = 'b'")
        for _ in range(3):
            with pytest.raises(StoreUnavailable) as caught:
                put(one, dek("c"))
        assert "older than what was acknowledged" in caught.value.message


class TestRotationOfAFleet:
    """The others write on while one rotates."""

    def moved(self, record: DekRecord) -> DekRecord:
        return record._replace(kek_id=NEW, kek_version=2)

    def begin(self, store: Any) -> None:
        with store.transaction():
            store.staging(True)
        self.stage(store, store.page("", 99))

    def stage(self, store: Any, records: list[DekRecord]) -> None:
        with store.transaction():
            store.stage([self.moved(record) for record in records])

    def swap(self, store: Any) -> None:
        with store.transaction():
            store.settle(lambda records: store.stage([self.moved(record) for record in records]))
            count = sum(row.deks for row in store.keks().values())
            store.swap({NEW: KekCount(2, count, SINCE)})

    def test_what_others_wrote_meanwhile_is_staged_again(self, one: Any, two: Any) -> None:
        put(one, *(dek(f"k{n}") for n in range(6)))
        self.begin(one)
        put(two, dek("k0", "before"), dek("k35", "new"))
        assert one.check_staged("", 3) == "k2"
        put(two, dek("k1", "behind"), dek("k4", "ahead"), dek("k15", "new, behind"), dek("k9", "new, ahead"))
        assert one.check_staged("k2", 99) == "k9" and one.check_staged("k9", 99) == ""
        assert [record.key_id for record in one.touched(2)] == ["k0", "k1"]
        while records := one.touched(2):
            self.stage(one, records)
        put(two, dek("k2", "at last"), dek("k99", "new, at last"))
        self.swap(one)
        found = {record.key_id: record for record in two.page("", 99)}
        assert {record.kek_id for record in found.values()} == {NEW} and len(found) == 10
        assert found["k0"].thread_id == "before" and found["k2"].thread_id == "at last"
        assert one.keks() == two.keks() == {NEW: KekCount(2, 10, SINCE)}
        for store in (one, two):
            with store.transaction():
                assert not store.recount()

    @pytest.mark.parametrize("when", ["a question", "what waited", "the end"])
    def test_a_session_that_is_lost_before_the_commit(
        self, one: Any, fleet_database: Fleet, when: str
    ) -> None:
        """It was a fault of ours, in a rotation's swap and in an import of many, or at their end an outcome
        that nobody knew: nothing took place."""
        put(one, dek("a"))
        lost = "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE state LIKE 'idle in tr%'"
        with pytest.raises(StoreUnavailable, match="was lost") as caught, one.transaction():
            one.staging(True)
            if when != "a question":
                one.put(dek("b"))
            assert fleet_database.sql(lost) == [(True,)]
            if when != "the end":
                one.census()
        assert "nothing took place" in caught.value.hint and not one.trouble()
        assert fleet_database.sql("SELECT rotating FROM kms.fleet") == [(False,)]
        put(one, dek("c"))
        assert keys(one.page("", 9)) == ["a", "c"]
        with one.transaction():
            assert not one.recount()

    def test_nothing_is_swapped_that_was_not_settled(self, one: Any, two: Any) -> None:
        from progressdb_kms.fleet.store import Contended

        put(one, dek("a"))
        self.begin(one)
        put(two, dek("a", "meanwhile"))
        with pytest.raises(Contended, match="written meanwhile"), one.transaction():
            one.swap({NEW: KekCount(2, 1, "s")})
        assert one.get("a") == dek("a", "meanwhile")

    def test_one_that_is_under_way_holds_the_swap_up_and_is_not_missed(
        self, one: Any, two: Any, fleet_database: Fleet
    ) -> None:
        put(one, dek("a"))
        self.begin(one)
        with pytest.raises(Stop), two.transaction():
            two.put(dek("a", "under way"))
            two._inside()
            with pytest.raises(StoreUnavailable):
                self.swap(one)
            raise Stop
        self.swap(one)
        assert two.get("a") == self.moved(dek("a"))

    def test_the_beginning_waits_for_who_writes(self, one: Any, two: Any) -> None:
        put(one, dek("a"))
        with pytest.raises(Stop), two.transaction():
            two.put(dek("b"))
            two._inside()
            with pytest.raises(StoreUnavailable), one.transaction():
                one.staging(True)
            raise Stop

    def test_two_don_t_rotate_at_once(self, one: Any, two: Any, fleet_database: Fleet) -> None:
        put(one, dek("a"))
        self.begin(one)
        with pytest.raises(Conflict, match="another host rotates"), two.transaction():
            two.staging(True)
        with two.transaction():
            two.staging(False)  # the tidying of any host: it is not his
        self.swap(one)
        self.begin(one)
        fleet_database.sql("UPDATE kms.hosts SET fenced = true WHERE host = 'one'")
        self.begin(two)  # of a dead host anybody may throw it away
        self.swap(two)

    def test_own_writes_that_were_not_mirrored(self, one: Any, two: Any) -> None:
        put(one, dek("a"), dek("b"))
        self.begin(one)
        assert one.check_staged("", 1) == "a"
        put(one, dek("a", "later"))
        assert one.check_staged("a", 99) == "b" and one.check_staged("b", 99) == ""
        self.swap(one)
        assert two.get("a") == self.moved(dek("a", "later"))
        with two.transaction():
            assert not two.recount()

    def test_a_write_that_failed_forgets_nothing_of_what_is_owed(self, one: Any, two: Any) -> None:
        """One of this host's own, of a row that it has to stage again: that must come all the same."""
        put(one, dek("a"))
        self.begin(one)
        put(two, dek("a", "later"))
        one.check_staged("", 9)
        with pytest.raises(Stop), one.transaction():
            one.put(dek("a", "mine"))
            one.stage([self.moved(dek("a", "mine"))])
            raise Stop
        assert one.check_staged("a", 9) == ""
        self.swap(one)
        assert two.get("a") == self.moved(dek("a", "later"))

    def test_no_row_is_staged_for_another_host(self, one: Any, two: Any, fleet_database: Fleet) -> None:
        """It was fenced while it was stopped, and another began anew. When it comes back it is one of the
        fleet again, and none of its steps does anything."""
        from progressdb_kms.fleet.store import Contended

        put(one, dek("a"))
        self.begin(one)
        fleet_database.sql("UPDATE kms.hosts SET fenced = true WHERE host = 'one'")
        with two.transaction():
            two.staging(True)
        fleet_database.sql("UPDATE kms.hosts SET fenced = false WHERE host = 'one'")
        with pytest.raises(Contended):
            self.stage(one, [dek("a", "old")])
        with pytest.raises(Contended):
            self.swap(one)
        self.stage(two, two.page("", 9))
        self.swap(two)
        assert one.get("a") == self.moved(dek("a"))

    def test_who_comes_in_the_swap_is_not_missed(self, one: Any, two: Any, fleet_database: Fleet) -> None:
        """A host that has begun its first transaction, which touches no DEK: its key is there, or it finds
        another active KEK."""
        from progressdb_kms.fleet.store import Locked

        put(one, dek("a"))
        self.begin(one)
        with pytest.raises(Stop), two.transaction():
            two.write("clock:trusted", {"n": 1})
            two._inside()
            with pytest.raises(Locked), one.transaction():
                one.settle(lambda records: None)
            raise Stop

    def test_who_tidies_up_and_who_swaps_don_t_wait_for_each_other(
        self, one: Any, two: Any, fleet_database: Fleet
    ) -> None:
        """Each has the fleet's row and the host's rows in the same order: here the second waits at once."""
        from progressdb_kms.fleet.store import Locked

        put(one, dek("a"))
        self.begin(one)
        with pytest.raises(Stop), two.transaction():
            two.staging(False)
            with pytest.raises(Locked), one.transaction():
                one.settle(lambda records: None)
            raise Stop
        self.swap(one)

    def test_rows_of_all_hosts_are_renewed(self, one: Any, two: Any, fleet_database: Fleet) -> None:
        from progressdb_kms.fleet.store import Contended

        for store, n in ((one, 1), (two, 2)):
            with store.transaction():
                store.write("audit:key", {"n": n})
        ((host, text),) = one.foreign("audit:key").items()
        assert (host, one.opened(host, "audit:key", text)) == ("two", {"n": 2})
        with pytest.raises(StoreDamaged):
            one.opened("one", "audit:key", text)
        with one.transaction():
            one.write_foreign("audit:key", {"two": (text, {"n": 3})})
        assert two.read("audit:key") == {"n": 3} and one.read("audit:key") == {"n": 1}
        two.vouch()
        with pytest.raises(Contended), one.transaction():
            one.write_foreign("audit:key", {"two": (text, {"n": 4})})
        fleet_database.reader(KEY, "three").vouch()

    def test_the_census_stays_true_to_the_end(self, one: Any, two: Any, fleet_database: Fleet) -> None:
        import psycopg

        with pytest.raises(Stop), one.transaction():
            assert [(row.host, row.keks) for row in one.census()] == [
                ("one", frozenset()),
                ("two", frozenset()),
            ]
            with pytest.raises(psycopg.errors.LockNotAvailable):
                fleet_database.sql("SET lock_timeout = 100", "UPDATE kms.hosts SET keks = '{k}'")
            raise Stop

    def test_a_reader_of_one_moment_and_a_swap_wait_for_each_other(
        self, one: Any, fleet_database: Fleet
    ) -> None:
        """Else the reader would find the new table in its old moment: empty."""
        put(one, dek("a"))
        self.begin(one)
        reader = fleet_database.reader(KEY)
        with reader.snapshot():
            assert reader.state().change
            with pytest.raises(StoreUnavailable):
                self.swap(one)
            assert [record.key_id for record in reader.page("", 9)] == ["a"]
        self.swap(one)

    def test_a_dead_rotation_is_seen(self, one: Any, two: Any, fleet_database: Fleet) -> None:
        assert not two.abandoned()
        with one.transaction():
            one.staging(True)
        assert two.fleet().owner == "one" and not two.abandoned()
        fleet_database.sql("UPDATE kms.hosts SET fenced = true WHERE host = 'one'")
        assert two.abandoned()
        with two.transaction():
            two.staging(False)
        assert not two.abandoned() and not two.fleet().rotating


class TestErasures:
    def test_due_as_long_as_a_host_has_the_kek(self, one: Any, two: Any, fleet_database: Fleet) -> None:
        fleet_database.sql("UPDATE kms.hosts SET keks = ARRAY['k1', 'k2'] WHERE host = 'two'")
        with one.transaction():
            for key_id, kek_id in (("a", "k1"), ("b", "k2"), ("c", "k3"), ("d", "k4")):
                one.write(f"erasure:{key_id}", {"since": "2026", "kek_id": kek_id})
            one.write("erasure:e", {"since": "2026"})  # nobody knows which KEK
        assert one.erasures({"k4"}, 9) == ["c"]
        fleet_database.sql("UPDATE kms.hosts SET keks = ARRAY['k2'] WHERE host = 'two'")
        assert one.erasures({"k4"}, 9) == ["a", "c"] and one.erasures({"k4"}, 1) == ["a"]
        fleet_database.sql("UPDATE kms.hosts SET fenced = true WHERE host = 'two'")
        assert one.erasures(set(), 9) == ["a", "b", "c", "d"]
        with one.transaction():
            assert one.taken(["a", "b"]) == ["a", "b"]
            assert one.taken(["b", "c"]) == ["c"] and one.taken([]) == []
        assert one.span("erasure:") == (2, "erasure:d")


def test_a_batch_asks_the_engine_once(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many creates and changes share a transaction: each question is a round trip."""
    put(one, *(dek(f"k{n}") for n in range(20)))
    asked: list[str] = []
    select = type(one)._select

    def noted(self: Any, sql: str, args: Any = ()) -> Any:
        asked.append(sql)
        return select(self, sql, args)

    monkeypatch.setattr(type(one), "_select", noted)
    one.expect([f"k{n}" for n in range(30)])
    with one.transaction():
        for n in range(20):
            assert one.get(f"k{n}") is not None and one.heavy() == {}
            one.put(dek(f"k{n}", state="disabled"))
        for n in range(20, 30):
            assert one.get(f"k{n}") is None
            one.put(dek(f"k{n}"))
        for n in range(10):
            one.fresh(f"new{n}")
            one.put(dek(f"new{n}"))
    assert len(asked) == 2
    assert len(one.page("", 99)) == 40


def test_an_id_that_was_drawn_and_is_taken(one: Any) -> None:
    put(one, dek("k"))
    with pytest.raises(StoreUnavailable), one.transaction():
        one.fresh("k")
        one.put(dek("k", state="disabled"))
    assert one.get("k") == dek("k")


def test_a_session_that_lost_its_statements_is_left(one: Any) -> None:
    """The driver prepares what it is asked often, and may take for prepared what an aborted pipeline was to
    prepare: then each later use fails, for as long as the session lives. Seen after a failover."""

    def forget() -> None:
        with one._link.session() as session:
            session.pgconn.exec_(b"DEALLOCATE ALL")  # so that the driver doesn't hear of it

    for n in range(12):
        put(one, dek(f"k{n}"))
        assert one.get(f"k{n}") is not None
    forget()
    put(one, dek("after"))  # sent again, by another session
    for n in range(12):
        assert one.get(f"k{n}") is not None
    forget()
    assert one.get("k1") == dek("k1")
