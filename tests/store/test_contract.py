"""What every store must do: SQLite on disk and the twin in memory, held against the same tests."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Union

import pytest

from progressdb_kms.errors import StoreDamaged, StoreUnavailable
from progressdb_kms.store.contract import DekRecord, KekCount
from progressdb_kms.store.memstore import MemoryReader, MemoryStore
from progressdb_kms.store.policy import SHREDDED
from progressdb_kms.store.sqlite import SqliteReader, SqliteStore

AnyStore = Union[SqliteStore, MemoryStore]
AnyReader = Union[SqliteReader, MemoryReader]

OLD, NEW = "00" * 8, "11" * 8


class Stop(Exception):
    """Raised in a transaction to see it undone."""


@pytest.fixture(params=["sqlite", "memory"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[AnyStore, AnyReader]]:
    """A writer, and a reader of what it commits."""
    if request.param == "memory":
        memory = MemoryStore()
        yield memory, MemoryReader(memory)
        return
    store = SqliteStore(tmp_path)
    reader = SqliteReader(tmp_path)
    yield store, reader
    reader.close()
    store.close()


@pytest.fixture
def store(pair: tuple[AnyStore, AnyReader]) -> AnyStore:
    return pair[0]


@pytest.fixture
def reader(pair: tuple[AnyStore, AnyReader]) -> AnyReader:
    return pair[1]


def dek(key_id: str, thread_id: str = "t", **fields: Any) -> DekRecord:
    at = {"kek_id": OLD, "kek_version": 1, "created_at": "2026-01-02T00:00:00.000000Z", **fields}
    return DekRecord(key_id, thread_id, b"wrapped " + key_id.encode(), **at)


def put(store: AnyStore, *records: DekRecord) -> None:
    with store.transaction():
        for record in records:
            store.put(record)


def keys(records: list[DekRecord]) -> list[str]:
    return [record.key_id for record in records]


class TestRows:
    @pytest.mark.parametrize(
        "record",
        [
            dek("a"),
            dek("k_1:2.3-4", "Ünï cöde / \"quoted\" 'thread'; --"),
            dek("a", state="disabled"),
            dek("a", state="pending_deletion", delete_at="2027-01-01T00:00:00.000000Z"),
            dek("a", state=SHREDDED, shredded_at="2027-01-01T00:00:00.000000Z")._replace(wrapped=b""),
        ],
        ids=lambda record: f"{record.key_id}-{record.state}",
    )
    def test_a_record_comes_back_whole(self, store: AnyStore, reader: AnyReader, record: DekRecord) -> None:
        put(store, record)
        assert store.get(record.key_id) == reader.get(record.key_id) == record

    def test_the_last_put_counts(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"))
        put(store, dek("a", "other"))
        assert reader.get("a") == dek("a", "other") and keys(reader.page("", 9)) == ["a"]

    def test_what_is_not_there(self, store: AnyStore, reader: AnyReader) -> None:
        assert reader.get("a") is None and reader.read("x") is None
        assert reader.page("", 9) == [] and reader.names("") == [] and reader.keks() == {}
        with store.transaction():
            store.erase("x")

    def test_rows_of_the_service(self, store: AnyStore, reader: AnyReader) -> None:
        with store.transaction():
            for name in ("kek:b", "kek:a", "kel", "audit:1.0"):
                store.write(name, {"name": name, "list": [1, {"ü": None}]})
        assert reader.read("kek:a") == {"name": "kek:a", "list": [1, {"ü": None}]}
        assert sorted(reader.names("kek:")) == ["kek:a", "kek:b"]
        with store.transaction():
            store.erase("kek:a")
        assert reader.read("kek:a") is None and reader.names("kek:") == ["kek:b"]


class TestPages:
    @pytest.fixture
    def filled(self, store: AnyStore) -> AnyStore:
        put(store, *(dek(f"k{n:02}", f"thread {n % 3}") for n in (7, 2, 9, 0, 5, 1, 8, 3, 6, 4)))
        return store

    @pytest.mark.parametrize(
        ("after", "limit", "found"),
        [("", 3, "012"), ("k02", 3, "345"), ("k08", 3, "9"), ("k09", 3, ""), ("", 99, "0123456789")],
    )
    def test_in_order_of_key_id(self, filled: AnyStore, after: str, limit: int, found: str) -> None:
        assert keys(filled.page(after, limit)) == [f"k{int(n):02}" for n in found]

    @pytest.mark.parametrize(
        ("after", "limit", "thread", "found"),
        [
            ("", 9, "thread 1", "147"),
            ("k01", 1, "thread 1", "4"),
            ("k07", 9, "thread 1", ""),
            ("", 9, "x", ""),
        ],
    )
    def test_of_a_thread(self, filled: AnyStore, after: str, limit: int, thread: str, found: str) -> None:
        assert keys(filled.page(after, limit, thread)) == [f"k{int(n):02}" for n in found]

    def test_a_cursor_that_is_gone_is_still_a_place(self, filled: AnyStore) -> None:
        assert keys(filled.page("k03x", 1)) == ["k04"]

    def test_upper_and_lower_case_are_apart(self, store: AnyStore) -> None:
        put(store, dek("a"), dek("A"), dek("B"))
        assert keys(store.page("", 9)) == ["A", "B", "a"]


class TestTransactions:
    def test_all_or_nothing(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"))
        with pytest.raises(Stop), store.transaction():
            store.put(dek("a", "other"))
            store.put(dek("b"))
            store.write("x", {})
            assert store.get("b") == dek("b")  # the writer sees what it wrote
            raise Stop
        for one in (store, reader):
            assert one.get("a") == dek("a") and one.get("b") is None and one.read("x") is None
        assert store.keks()[OLD].deks == 1

    def test_readers_see_what_is_committed(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"))
        with store.transaction():
            store.put(dek("a", "other"))
            store.put(dek("b"))
            assert reader.get("a") == dek("a") and reader.get("b") is None
            assert reader.keks()[OLD].deks == 1
        assert reader.get("a") == dek("a", "other") and reader.keks()[OLD].deks == 2

    def test_the_next_one_begins_clean(self, store: AnyStore) -> None:
        with contextlib.suppress(Stop), store.transaction():
            store.put(dek("a"))
            raise Stop
        put(store, dek("b"))
        assert keys(store.page("", 9)) == ["b"]

    def test_a_part_can_fail_alone(self, store: AnyStore, reader: AnyReader) -> None:
        with store.transaction():
            store.put(dek("a"))
            with contextlib.suppress(Stop), store.savepoint():
                store.put(dek("b"))
                store.write("x", {})
                raise Stop
            with store.savepoint():
                store.put(dek("c"))
        assert keys(reader.page("", 9)) == ["a", "c"] and reader.read("x") is None
        assert reader.keks()[OLD].deks == 2


class TestCounts:
    """`keks()`: kept with every write, so that a start need not count."""

    @pytest.mark.parametrize(
        ("puts", "counts"),
        [
            ([dek("a"), dek("b")], {OLD: 2}),
            ([dek("a"), dek("a", "other")], {OLD: 1}),
            ([dek("a"), dek("b"), dek("a", kek_id=NEW)], {OLD: 1, NEW: 1}),
            ([dek("a"), dek("a", kek_id=NEW)], {NEW: 1}),
            ([dek("a"), dek("b"), dek("a", state="disabled")], {OLD: 2}),
            ([dek("a"), dek("b"), dek("a", state=SHREDDED)], {OLD: 1}),
            ([dek("a"), dek("a", state=SHREDDED)], {}),
            ([dek("a", state=SHREDDED), dek("a", state=SHREDDED)], {}),
        ],
    )
    def test_of_deks_that_need_a_kek(
        self, store: AnyStore, reader: AnyReader, puts: list[DekRecord], counts: dict[str, int]
    ) -> None:
        for record in puts:
            put(store, record)
        assert {kek_id: row.deks for kek_id, row in reader.keks().items()} == counts
        assert store.keks() == reader.keks()

    def test_since_is_the_oldest(self, store: AnyStore) -> None:
        put(
            store,
            dek("a", created_at="2026-02"),
            dek("b", created_at="2026-01"),
            dek("c", created_at="2026-03"),
        )
        assert store.keks() == {OLD: KekCount(1, 3, "2026-01")}


class TestRotation:
    def rewrapped(self, *key_ids: str) -> list[DekRecord]:
        return [dek(key_id, kek_id=NEW, kek_version=2) for key_id in key_ids]

    def test_swapped_at_once(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"), dek("b", "u"))
        with store.transaction():
            store.staging(True)
        with store.transaction():
            store.stage(self.rewrapped("a"))
        with store.transaction():
            store.stage([dek("b", "u", kek_id=NEW, kek_version=2)])
            store.stage(self.rewrapped("a"))  # again: what changed meanwhile
        assert reader.get("a") == dek("a")
        with store.transaction():
            store.swap({NEW: KekCount(2, 2, "s")})
        assert reader.page("", 9) == [*self.rewrapped("a"), dek("b", "u", kek_id=NEW, kek_version=2)]
        assert keys(reader.page("", 9, "u")) == ["b"]
        assert reader.keks() == store.keks() == {NEW: KekCount(2, 2, "s")}

    def test_a_missing_row_is_noticed(self, store: AnyStore) -> None:
        put(store, *(dek(name) for name in "abcd"))
        with store.transaction():
            store.staging(True)
            store.stage(self.rewrapped("a", "b", "d"))
        assert store.check_staged("", 2) == "b"
        with pytest.raises(StoreUnavailable, match="1 rewrapped rows are missing"):
            store.check_staged("b", 2)

    def test_none_is_missing(self, store: AnyStore) -> None:
        put(store, *(dek(name) for name in "abc"))
        with store.transaction():
            store.staging(True)
            store.stage(self.rewrapped("a", "b", "c"))
        assert store.check_staged("", 2) == "b" and store.check_staged("b", 2) == "c"
        assert store.check_staged("c", 2) == ""

    def test_nothing_is_swapped_in_where_nothing_was_staged(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"))
        with pytest.raises(StoreUnavailable), store.transaction():
            store.swap({NEW: KekCount(2, 1, "s")})
        assert reader.page("", 9) == [dek("a")] and reader.keks()[OLD].deks == 1

    def test_what_need_not_be_durable_is_seen_at_once(self, store: AnyStore, reader: AnyReader) -> None:
        with store.transaction(durable=False):
            store.put(dek("a"))
        assert reader.get("a") == dek("a")
        with pytest.raises(RuntimeError), store.transaction(durable=False):
            store.put(dek("b"))
            raise RuntimeError
        assert keys(reader.page("", 9)) == ["a"]

    def test_an_earlier_try_leaves_nothing(self, store: AnyStore) -> None:
        put(store, dek("a"))
        for _ in range(2):
            with store.transaction():
                store.staging(True)
                store.stage(self.rewrapped("gone"))
        with store.transaction():
            store.staging(True)
            store.stage(self.rewrapped("a"))
            store.swap({NEW: KekCount(2, 1, "s")})
        assert keys(store.page("", 9)) == ["a"]

    def test_what_was_swapped_out_goes_bit_by_bit(self, store: AnyStore) -> None:
        put(store, *(dek(f"k{n}") for n in range(5)))
        with store.transaction():
            store.staging(True)
            store.stage(self.rewrapped(*(f"k{n}" for n in range(5))))
            store.swap({NEW: KekCount(2, 5, "s")})
            store.forget("k3")
        rounds = 0
        more = True
        while more:
            with store.transaction():
                more = store.retire(2)
            rounds += more
        assert 2 <= rounds <= 3 and len(store.page("", 9)) == 5

    def test_given_up(self, store: AnyStore) -> None:
        put(store, dek("a"))
        with store.transaction():
            store.staging(True)
            store.stage(self.rewrapped("a"))
        with store.transaction():
            store.staging(False)
        assert store.get("a") == dek("a")


class TestDue:
    def test_by_time(self, store: AnyStore) -> None:
        put(store, dek("a"), dek("b"), dek("c"))
        with store.transaction():
            for at, key_id in (("2026-03", "a"), ("2026-01", "b"), ("2026-02", "c"), ("2026-01", "unknown")):
                store.write(f"deletion:{at}|{key_id}", {})
        assert keys(store.due("2026-00", 9)) == []
        assert keys(store.due("2026-02|z", 9)) == ["b", "c"]
        assert keys(store.due("2027", 1)) == ["b"]


def test_tidying_changes_nothing(store: AnyStore, reader: AnyReader) -> None:
    put(store, dek("a"))
    store.checkpoint()
    store.compact()
    assert reader.get("a") == store.get("a") == dek("a")


class TestFile:
    """What only a file can have."""

    def test_rows_outlive_the_process_that_wrote_them(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path)
        put(store, dek("a"))
        store.close()
        again = SqliteStore(tmp_path)
        assert again.get("a") == dek("a") and again.keks()[OLD].deks == 1
        again.close()

    @pytest.mark.parametrize(
        ("harm", "says", "hint"),
        [
            (lambda path: path.unlink(), "missing or empty", "restore"),
            (lambda path: path.write_bytes(b""), "missing or empty", "restore"),
            (lambda path: path.write_bytes(bytes(path.stat().st_size)), "no database|something else", ""),
            (lambda path: path.write_bytes(b"garbage " * 999), "no database", "restore"),
            (lambda path: path.write_bytes(path.read_bytes()[:-4096]), "was cut|damaged", "restore"),
        ],
        ids=["missing", "empty", "zeroed", "garbage", "cut"],
    )
    def test_a_damaged_file_is_refused(
        self, tmp_path: Path, harm: Callable[[Path], None], says: str, hint: str
    ) -> None:
        store = SqliteStore(tmp_path)
        put(store, *(dek(f"k{n}") for n in range(200)))
        store.checkpoint()
        store.close()
        (tmp_path / "kms-audit.log").touch()  # a data-dir in use
        harm(tmp_path / "kms.db")
        with pytest.raises(StoreDamaged, match=says) as caught:
            SqliteStore(tmp_path)
        assert hint in caught.value.hint

    def sql(self, tmp_path: Path, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "kms.db")) as db, db:
            db.executescript(statement)

    @pytest.mark.parametrize(
        ("statement", "says", "hint"),
        [
            ("PRAGMA user_version=99", "schema version 99, and this release knows", "newer release"),
            ("PRAGMA application_id=7", "something else", "right folder"),
        ],
    )
    def test_a_file_that_is_not_ours_is_refused(
        self, tmp_path: Path, statement: str, says: str, hint: str
    ) -> None:
        SqliteStore(tmp_path).close()
        self.sql(tmp_path, statement)
        with pytest.raises(StoreDamaged, match=says) as caught:
            SqliteStore(tmp_path)
        assert hint in caught.value.hint

    @pytest.mark.parametrize(
        "value",
        ["not json", "[]", "{}", '{"format": 2}', '{"format": 1, "wrapped": "***"}', "gASVBQAAAAAAAABLKi4="],
    )
    def test_a_row_that_is_not_ours_is_refused(self, tmp_path: Path, value: str) -> None:
        store = SqliteStore(tmp_path)
        put(store, dek("a"))
        store.close()
        self.sql(tmp_path, f"DROP INDEX deks_thread_1; UPDATE deks SET value = '{value}'")  # noqa: S608
        again = SqliteStore(tmp_path)
        for read in (lambda: again.get("a"), lambda: again.page("", 9)):
            with pytest.raises(StoreDamaged) as caught:
                read()
            assert "verify" in caught.value.hint
        again.close()

    def test_the_file_is_written_so_that_nothing_is_lost(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path)
        pragmas = ("journal_mode", "synchronous", "secure_delete")
        pragma = {name: store._conn.select_one(f"PRAGMA {name}")[0] for name in pragmas}
        assert pragma == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}
        store.close()

    def test_what_follows_a_write_that_need_not_be_durable_is(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path)
        found = []
        for durable in (True, False, False, True):
            with store.transaction(durable=durable):
                found.append(store._conn.select_one("PRAGMA synchronous")[0])
        assert found == [2, 1, 1, 2]
        store.close()

    def test_a_failed_commit_is_an_error_of_that_call(self, tmp_path: Path) -> None:
        """And the file is opened anew before the next write."""
        store = SqliteStore(tmp_path)
        put(store, dek("a"))
        real, statements = store._conn.execute, []

        def failing(sql: str, args: tuple[Any, ...] = ()) -> None:
            statements.append(sql)
            if sql == "COMMIT":
                raise StoreUnavailable("disk I/O error")
            real(sql, args)

        store._conn.execute = failing  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailable, match="disk I/O error"):
            put(store, dek("b"))
        assert statements[-1] == "ROLLBACK" and store.keks()[OLD].deks == 1
        put(store, dek("c"))
        assert keys(store.page("", 9)) == ["a", "c"] and store.keks()[OLD].deks == 2
        store.close()

    def test_a_read_only_folder(self, tmp_path: Path) -> None:
        with pytest.raises(StoreUnavailable, match="unable to open"):
            SqliteReader(tmp_path / "nowhere")
