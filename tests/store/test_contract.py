"""What every store must do: SQLite on disk, the twin in memory and a fleet's PostgreSQL, held against the
same tests."""

from __future__ import annotations

import base64
import contextlib
import errno
import hmac
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Union

import pytest

from progressdb_kms.encoding import json_dumps
from progressdb_kms.errors import StoreDamaged, StoreUnavailable
from progressdb_kms.pause import Pause
from progressdb_kms.store.contract import HEAVY, KEK_ROW, DekRecord, Usage
from progressdb_kms.store.mending import SqliteMending
from progressdb_kms.store.policy import SHREDDED
from progressdb_kms.store.seal import STATE, KekCount, Seal
from progressdb_kms.store.sealed import Written, as_it_stands
from progressdb_kms.store.sqlite import FILE_NAME, FILES, SqliteReader, SqliteStore
from tests.harness.memstore import MemoryReader, MemoryStore
from tests.harness.vectors import load, secret

AnyStore = Union[SqliteMending, MemoryStore]
AnyReader = Union[SqliteReader, MemoryReader]

OLD, NEW = "00" * 8, "11" * 8
KEY = memoryview(bytearray(range(32)))


class Stop(Exception):
    """Raised in a transaction to see it undone."""


@pytest.fixture(params=["sqlite", "memory", "postgresql"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[AnyStore, AnyReader]]:
    """A writer, and a reader of what it commits."""
    if request.param == "memory":
        memory = MemoryStore(KEY)
        yield memory, MemoryReader(memory, KEY)
        return
    if request.param == "postgresql":
        fleet = request.getfixturevalue("fleet_database")
        yield fleet.store(KEY), fleet.reader(KEY)
        return
    store = SqliteMending(tmp_path)
    store.unlock(KEY)
    reader = SqliteReader(tmp_path, KEY)
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


def opened(folder: Path, key: memoryview = KEY) -> SqliteStore:
    with contextlib.ExitStack() as undo:
        store = SqliteStore(folder)
        undo.callback(store.close)
        store.unlock(key)
        undo.pop_all()
    return store


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

    def test_many_at_once_are_as_many_puts(self, store: AnyStore, reader: AnyReader) -> None:
        """The same rows, counts, sum and number of changes, over rows that are there already too."""
        one_by_one = MemoryStore(KEY)
        first = [dek("a"), dek("b", kek_id=NEW), dek("c:1", state="disabled")]
        others = [dek("b", "other"), dek("d"), dek("a", state=SHREDDED)._replace(wrapped=b"")]
        for records in (first, others, []):
            put(one_by_one, *records)  # type: ignore[arg-type]
            with store.transaction():
                store.put_all(records)
        assert reader.page("", 9) == one_by_one.page("", 9) and len(reader.page("", 9)) == 4
        assert store.state() == reader.state() == one_by_one.state()
        assert not store.recount()

    def test_which_are_there(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"), dek("b:2"))
        for side in (store, reader):
            assert side.there(["a", "b:2", "c", "meta:a", ""]) == {"a", "b:2"} and side.there([]) == set()

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


class TestUsage:
    """What was done under a DEK: added up, gone with it, and no change of the store."""

    def count(self, store: AnyStore, **rows: Usage) -> None:
        with store.transaction():
            store.count(rows.items())

    def test_it_adds_up(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"), dek("b"))
        before = store.state()
        assert reader.usage(["a", "b"]) == {}
        self.count(store, a=Usage(1, 2, 50, 60, 7), b=Usage(0, 1, 10, 10, 0))
        self.count(store, a=Usage(10, 20, 40, 55, 8))
        assert reader.usage(["a", "b", "c"]) == {"a": Usage(11, 22, 40, 60, 7), "b": Usage(0, 1, 10, 10, 0)}
        self.count(store, a=Usage(5, last=60, first=60, uid=9))
        self.count(store, a=Usage(5))
        assert reader.usage(["a"]) == {"a": Usage(21, 22, 40, 60, 9)}
        assert store.state() == before

    def test_a_dek_that_is_not_there_has_none(self, store: AnyStore, reader: AnyReader) -> None:
        self.count(store, a=Usage(1, 1, 1, 1, 1))
        assert reader.usage(["a"]) == {} and reader.usage([]) == {}

    def test_it_goes_with_the_dek(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"), dek("b"))
        self.count(store, a=Usage(HEAVY, 0, 1, 1, 1), b=Usage(1, 0, 1, 1, 1))
        put(store, dek("a", state=SHREDDED)._replace(wrapped=b""))
        assert reader.usage(["a", "b"]) == {"b": Usage(1, 0, 1, 1, 1)} and reader.heavy() == {}
        self.count(store, a=Usage(1, 0, 1, 1, 1))  # it was under way
        assert reader.usage(["a"]) == {}

    def test_a_rotation_leaves_it(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"))
        self.count(store, a=Usage(3, 2, 1, 1, 1))
        with store.transaction():
            store.staging(True)
            store.stage([dek("a", kek_id=NEW)])
            store.swap({NEW: KekCount(2, 1, "")})
        self.count(store, a=Usage(1, 0, 2, 2, 2))
        assert reader.usage(["a"]) == {"a": Usage(4, 2, 1, 2, 2)}

    def test_the_heavy_ones_are_found(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"), dek("b"), dek("c"))
        self.count(store, a=Usage(HEAVY - 1), b=Usage(HEAVY), c=Usage(3 * HEAVY))
        assert reader.heavy() == {"b": HEAVY, "c": 3 * HEAVY}

    def test_every_wrap_is_counted_for_its_kek(self, store: AnyStore, reader: AnyReader) -> None:
        def wraps(kek_id: str) -> int:
            return reader.usage([KEK_ROW + kek_id]).get(KEK_ROW + kek_id, Usage()).encrypts  # type: ignore[no-any-return]

        put(store, dek("a"), dek("b"))
        old = dek("a").kek_id
        put(store, dek("a", state="disabled"))  # the same wrapped bytes
        assert (wraps(old), wraps(NEW)) == (2, 0)
        with store.transaction():
            store.put(dek("a")._replace(wrapped=b"w again"))
            with contextlib.suppress(Stop), store.savepoint():
                store.put(dek("c"))
                raise Stop
        with contextlib.suppress(Stop), store.transaction():
            store.put(dek("c"))
            raise Stop
        assert wraps(old) == 3
        with store.transaction():
            store.staging(True)
            store.stage([dek("a", kek_id=NEW), dek("b", kek_id=NEW)])
        with store.transaction():
            store.swap({NEW: KekCount(2, 2, "")})
        self.count(store, **{KEK_ROW + NEW: Usage(5)})  # what workers made
        assert (wraps(old), wraps(NEW)) == (3, 7)

    def test_a_failed_transaction_counts_nothing(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"))
        with contextlib.suppress(Stop), store.transaction():
            store.count([("a", Usage(1))])
            raise Stop
        assert reader.usage(["a"]) == {}


def test_heavy_ones_are_found_by_an_index(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "kms.db")) as db:
        (row,) = db.execute(f"EXPLAIN QUERY PLAN SELECT key_id FROM usage WHERE encrypts >= {HEAVY}")
    assert "usage_heavy" in row[3]


def test_what_is_no_number_of_uses_is_not_heavy(tmp_path: Path) -> None:
    """It has no MAC: whatever stands there ends no process."""
    with contextlib.closing(opened(tmp_path)) as store:
        for name, count in (("a", HEAVY), ("b", "x"), ("c", b"x"), (b"d", HEAVY), ("e", 1.5 * HEAVY + 0.5)):
            store._conn.execute("INSERT INTO usage VALUES (?, ?, 0, 0, 0, 0)", (name, count))
        assert store.heavy() == {"a": HEAVY}


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
        assert store.due("2026-00", 9) == []
        assert store.due("2026-02|z", 9) == [
            f"deletion:{entry}" for entry in ("2026-01|b", "2026-01|unknown", "2026-02|c")
        ]
        assert store.due("2027", 1) == ["deletion:2026-01|b"]


def write(store: AnyStore, key_id: str, row: dict[str, Any]) -> None:
    """A row as it stands, whatever it says."""
    told = DekRecord(key_id, row.get("thread_id", ""), b"", row.get("kek_id", ""), 0, "")
    store._set_all([Written(key_id, json_dumps(row), 0, told)])


def edit(store: AnyStore, key_id: str, **fields: Any) -> None:
    """As somebody with an SQL shell would: nothing else is changed with it."""
    with store.transaction():
        row = {**as_it_stands(store._text(key_id)), **fields}
        write(store, key_id, {name: value for name, value in row.items() if value is not None})


def lose(store: AnyStore, key_id: str) -> None:
    """Likewise, within a transaction."""
    if isinstance(store, MemoryStore):
        store._writable().deks.pop(key_id)
    elif isinstance(store, SqliteStore):
        store._conn.execute(f"DELETE FROM deks WHERE key = 'meta:{key_id}'")
    else:
        store._inside().execute(f"DELETE FROM deks WHERE key_id = '{key_id}'")


class TestAuthentic:
    """A row is as the daemon wrote it, or nobody takes it."""

    EDITS = [
        {"state": "enabled"},
        {"thread_id": "other"},
        {"wrapped": "AAAA"},
        {"kek_id": NEW},
        {"kek_version": 2},
        {"created_at": "2020-01-02T00:00:00.000000Z"},
        {"delete_at": "2020-01-02T00:00:00.000000Z"},
        {"shredded_at": "2020-01-02T00:00:00.000000Z"},
        {"format": 1.0},
        {"other": 1},
        {"mac": None},
        {"mac": ""},
        {"mac": 7},
        {"mac": "A" * 43 + "="},
    ]

    @pytest.mark.parametrize("fields", EDITS, ids=str)
    def test_an_edited_row(self, store: AnyStore, reader: AnyReader, fields: dict[str, Any]) -> None:
        put(store, dek("a", state="disabled"), dek("b"))
        edit(store, "a", **fields)
        for read in (
            store.get,
            reader.get,
            lambda key_id: store.page("", 9),
            lambda key_id: reader.page("", 9),
        ):
            with pytest.raises(StoreDamaged, match="meta:a .* not as the daemon wrote it"):
                read("a")
        with pytest.raises(StoreDamaged):
            put(store, dek("a"))
        assert reader.judged("", 9) == [("a", None), ("b", dek("b"))]

    def test_what_is_as_we_wrote_it_is_so_to_the_last_letter(self) -> None:
        """It is parsed without a second look."""
        seal = Seal(KEY)
        text, _ = seal.written("meta:a", dek("a").to_row())
        assert seal.wrote("meta:a", text) and not seal.wrote("meta:b", text)
        for at in range(len(text)):
            assert not seal.wrote("meta:a", text[:at] + "\x01" + text[at + 1 :])
            assert not seal.wrote("meta:a", text[:at])
        assert not seal.wrote("meta:a", text + " ")

    def test_a_row_under_another_name(self, store: AnyStore, reader: AnyReader) -> None:
        put(store, dek("a"), dek("b"))
        with store.transaction():
            write(store, "b", as_it_stands(store._text("a")))
        assert reader.get("a") == dek("a")
        with pytest.raises(StoreDamaged):
            reader.get("b")

    @pytest.mark.parametrize("how", ["older", "deleted", "added"])
    def test_what_is_genuine_must_add_up(self, store: AnyStore, reader: AnyReader, how: str) -> None:
        put(store, dek("a"), dek("b"))
        was = as_it_stands(store._text("a"))
        put(store, dek("a", state="disabled"), dek("c"))
        with store.transaction():
            if how == "older":
                write(store, "a", was)
            elif how == "deleted":
                lose(store, "c")
            elif isinstance(store, MemoryStore):
                rows = store._writable().deks
                rows.update(d=rows["c"])
            elif not isinstance(store, SqliteStore):
                store._inside().execute(
                    "INSERT INTO deks SELECT 'a0', thread_id, value, kek_id, rev FROM deks WHERE key_id = 'a'"
                )
            else:
                store._conn.execute("INSERT INTO deks SELECT 'meta:a0', value FROM deks WHERE key='meta:a'")
        if how == "older":
            assert reader.get("a") == dek("a")  # by itself there is nothing wrong with it
        with store.transaction():
            store.staging(True)
            store.stage([dek(key_id, kek_id=NEW) for key_id, _ in store.judged("", 9)])
        with pytest.raises(StoreDamaged, match="don't add up"):
            store.check_staged(store.check_staged("", 9), 9)
        with pytest.raises(StoreDamaged, match="don't add up"), store.transaction():
            store.swap({NEW: KekCount(2, 2, "s")})
        if how != "added":
            with store.transaction():
                assert store.recount()
            with store.transaction():
                assert not store.recount()

    def test_since_when_a_kek_is_needed_is_no_count(self, store: AnyStore, reader: AnyReader) -> None:
        """The oldest DEK goes, and a rotation has a time of its own: what adds up was recounted, on the
        record, and that time moved."""
        put(store, dek("a", created_at="2026-01-01T00:00:00.000000Z"), dek("b"), dek("c"))
        put(store, dek("a", state=SHREDDED)._replace(wrapped=b""))
        before = reader.state()
        with store.transaction():
            assert not store.recount()
        assert reader.state() == before
        with store.transaction():
            lose(store, "c")
        with store.transaction():
            assert store.recount()
        after = reader.state()
        assert after.keks == {OLD: before.keks[OLD]._replace(deks=1)} and after.change == before.change + 1

    @pytest.mark.parametrize("member", ["change", "active", "keks", "sum"])
    def test_an_edited_state(self, store: AnyStore, reader: AnyReader, member: str) -> None:
        with store.transaction():
            store.activate(OLD, 1, "2026")
            store.put(dek("a"))
        row = reader.read(STATE)
        assert row is not None
        values = {"change": 1, "active": [NEW, 1, "2026"], "keks": {NEW: [1, 1, "2026"]}, "sum": "0" * 64}
        with store.transaction():
            store.write(STATE, {**row, member: values[member]})
        for read in (reader.state, lambda: store.unlock(KEY)):
            with pytest.raises(StoreDamaged, match=STATE):
                read()

    def test_a_state_that_was_taken_away(self, store: AnyStore) -> None:
        put(store, dek("a"))
        with store.transaction():
            store.erase(STATE)
        with pytest.raises(StoreDamaged, match="missing"):
            store.unlock(KEY)

    def test_the_state_of_a_row_is_no_state_of_the_store(self, store: AnyStore) -> None:
        put(store, dek("a"))
        with store.transaction():
            store.write(STATE, as_it_stands(store._text("a")))
        with pytest.raises(StoreDamaged):
            store.unlock(KEY)

    def test_another_key(self, store: AnyStore) -> None:
        put(store, dek("a"))
        with pytest.raises(StoreDamaged):
            store.unlock(memoryview(bytearray(32)))


class TestNumber:
    """Each change has a number that grows; it is told when the change is on disk, and never before."""

    def test_grows_with_each_change(self, store: AnyStore, reader: AnyReader) -> None:
        told: list[int] = []
        store.unlock(KEY, told.append)
        put(store, dek("a"), dek("b"))
        put(store, dek("a", state="disabled"))
        with store.transaction():
            store.activate(OLD, 1, "2026")
        with store.transaction():
            store.write("x", {})  # no change of a row
        assert told == [0, 2, 3, 4] and reader.state().change == store.state().change == 4
        with store.transaction():
            store.advance(9)
        with store.transaction():
            store.advance(3)
        assert told[-2:] == [10, 11] and reader.state().change == 11

    def test_of_what_failed_is_not_told(self, store: AnyStore, reader: AnyReader) -> None:
        told: list[int] = []
        store.unlock(KEY, told.append)
        with contextlib.suppress(Stop), store.transaction():
            store.put(dek("a"))
            raise Stop
        with store.transaction():
            with contextlib.suppress(Stop), store.savepoint():
                store.put(dek("b"))
                raise Stop
            store.put(dek("c"))
            assert told == [0]
        assert told == [0, 1] and reader.state().change == 1
        with store.transaction():
            assert not store.recount()

    def test_nothing_is_written_without_the_key(
        self, pair: tuple[AnyStore, AnyReader], tmp_path: Path
    ) -> None:
        (tmp_path / "bare").mkdir()
        bare = MemoryStore() if isinstance(pair[0], MemoryStore) else SqliteStore(tmp_path / "bare")
        with contextlib.closing(bare), pytest.raises(StoreUnavailable, match="row key"):
            put(bare, dek("a"))


class TestTally:
    """Rows change while a rotation adds up: before the place that it has reached, and behind it."""

    def test_changes_meanwhile_are_reckoned_in(self, store: AnyStore) -> None:
        names = [f"k{n}" for n in range(8)]
        put(store, *map(dek, names))

        def change(*records: DekRecord) -> None:
            with store.transaction():
                for record in records:
                    store.put(record)
                    store.stage([record._replace(kek_id=NEW, kek_version=2)])

        with store.transaction():
            store.staging(True)
        with store.transaction():
            store.stage([dek(name, kek_id=NEW, kek_version=2) for name in names])
        change(dek("k0", "before"))
        assert store.check_staged("", 4) == "k3"
        change(dek("k1", "behind"), dek("k6", "ahead"), dek("k15", "new, behind"), dek("k7x", "new, ahead"))
        with contextlib.suppress(Stop), store.transaction():
            store.put(dek("k2", "undone"))
            store.stage([dek("k2", "undone", kek_id=NEW)])
            raise Stop
        assert store.check_staged("k3", 9) == "k7x" and store.check_staged("k7x", 9) == ""
        change(dek("k3", "at last"), dek("k9", "new at last"))
        with store.transaction():
            store.swap({NEW: KekCount(2, 11, "2026-01-02T00:00:00.000000Z")})
        with store.transaction():
            assert not store.recount()
        assert {record.thread_id for record in store.page("", 99)} == {
            "t", "before", "behind", "ahead", "new, behind", "new, ahead", "at last", "new at last"
        }  # fmt: skip

    def test_a_store_that_was_opened_anew_is_not_compared_on(self, store: AnyStore) -> None:
        put(store, dek("a"))
        with store.transaction():
            store.staging(True)
            store.stage([dek("a", kek_id=NEW)])
        assert store.check_staged("", 1) == "a"
        store._look()
        with pytest.raises(StoreUnavailable, match="opened anew"):
            store.check_staged("a", 1)


def test_tidying_changes_nothing(store: AnyStore, reader: AnyReader) -> None:
    put(store, dek("a"))
    store.checkpoint()
    store.compact()
    assert reader.get("a") == store.get("a") == dek("a")


class TestFile:
    """What only a file can have."""

    def test_rows_outlive_the_process_that_wrote_them(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        put(store, dek("a"))
        store.close()
        again = opened(tmp_path)
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
        store = opened(tmp_path)
        put(store, *(dek(f"k{n}") for n in range(200)))
        store.checkpoint()
        store.close()
        (tmp_path / "kms-audit.log").touch()  # a data-dir in use
        harm(tmp_path / "kms.db")
        with pytest.raises(StoreDamaged, match=says) as caught:
            opened(tmp_path)
        assert hint in caught.value.hint

    def sql(self, tmp_path: Path, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "kms.db")) as db, db:
            db.executescript(statement)

    def test_a_row_that_is_spelled_otherwise(self, tmp_path: Path) -> None:
        """What it says is what the daemon wrote: it is judged by that. What is no row at all is refused."""
        store = opened(tmp_path)
        put(store, dek("a"))
        self.sql(tmp_path, "UPDATE deks SET value = replace(value, ',', ' , ')")
        assert store.get("a") == dek("a")
        for value in ("7", "NULL", "'{}'", "'[]'"):
            self.sql(tmp_path, f"UPDATE deks SET value = {value}")
            with pytest.raises(StoreDamaged):
                store.get("a")
        store.close()

    def test_a_name_that_stands_twice(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        put(store, dek("a", state="disabled"))
        self.sql(tmp_path, 'UPDATE deks SET value = \'{"state":"enabled",\' || substr(value, 2)')
        with pytest.raises(StoreDamaged):
            store.get("a")
        store.close()

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
        opened(tmp_path).close()
        self.sql(tmp_path, statement)
        with pytest.raises(StoreDamaged, match=says) as caught:
            opened(tmp_path)
        assert hint in caught.value.hint

    @pytest.mark.parametrize(
        "value",
        ["not json", "[]", "{}", '{"format": 2}', '{"format": 1, "wrapped": "***"}', "gASVBQAAAAAAAABLKi4="],
    )
    def test_a_row_that_is_not_ours_is_refused(self, tmp_path: Path, value: str) -> None:
        store = opened(tmp_path)
        put(store, dek("a"))
        store.close()
        self.sql(tmp_path, f"DROP INDEX deks_thread_1; UPDATE deks SET value = '{value}'")  # noqa: S608
        again = opened(tmp_path)
        for read in (lambda: again.get("a"), lambda: again.page("", 9)):
            with pytest.raises(StoreDamaged) as caught:
                read()
            assert "verify" in caught.value.hint
        again.close()

    def test_the_file_is_written_so_that_nothing_is_lost(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        pragmas = ("journal_mode", "synchronous", "secure_delete")
        pragma = {name: store._conn.select_one(f"PRAGMA {name}")[0] for name in pragmas}
        assert pragma == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}
        store.close()

    def test_what_follows_a_write_that_need_not_be_durable_is(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        found = []
        for durable in (True, False, False, True):
            with store.transaction(durable=durable):
                found.append(store._conn.select_one("PRAGMA synchronous")[0])
        assert found == [2, 1, 1, 2]
        store.close()

    def test_a_failed_commit_is_an_error_of_that_call(self, tmp_path: Path) -> None:
        """And the file is opened anew before the next write."""
        store = opened(tmp_path)
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

    def test_a_commit_of_unknown_outcome(self, tmp_path: Path) -> None:
        """It took place, and told of an error: what is on the disk counts, not what we remember."""
        store = SqliteMending(tmp_path)
        told: list[int] = []
        store.unlock(KEY, told.append)
        put(store, dek("a"))
        real = store._conn.execute

        def unclear(sql: str, args: tuple[Any, ...] = ()) -> None:
            real(sql, args)
            if sql == "COMMIT":
                raise StoreUnavailable("disk I/O error")

        store._conn.execute = unclear  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailable):
            put(store, dek("b"))
        assert told == [0, 1] and store.state().change == 1  # nobody knows yet
        with pytest.raises(Stop), store.transaction():
            assert store.state().change == 2 and told[-1] == 2
            raise Stop
        put(store, dek("c"))
        assert told[-1] == 3 and keys(store.page("", 9)) == ["a", "b", "c"]
        with store.transaction():
            assert not store.recount()
        store.close()

    def test_it_can_be_read_until_it_can_be_opened_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After a COMMIT that failed, while the disk is still full."""
        store = opened(tmp_path)
        put(store, dek("a"))
        monkeypatch.setattr(store, "_reopening", Pause(0.0, 0.0))

        def full(*_: object) -> None:
            raise StoreUnavailable("database or disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(store._conn, "execute", full)
            with pytest.raises(StoreUnavailable, match="full"):
                put(store, dek("b"))
        store._suspect = True
        with monkeypatch.context() as patch:
            patch.setattr(store, "_prepare", full)
            for write in (lambda: put(store, dek("b")), store.checkpoint, store.compact):
                with pytest.raises(StoreUnavailable, match="full"):
                    write()
                assert keys(store.page("", 9)) == ["a"] and store.read("nothing") is None
                assert store.trouble() and store.heavy() == {} and store.keks()[OLD].deks == 1
        put(store, dek("c"))
        assert keys(store.page("", 9)) == ["a", "c"] and not store.trouble()
        store.close()

    def test_a_watch_that_could_not_be_had_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where no descriptor is left while the file is opened anew: a store that nobody watches took writes
        into a file that was gone."""
        store = opened(tmp_path)
        put(store, dek("a"))
        store.watch(*FILES)
        monkeypatch.setattr(store, "_reopening", Pause(0.0, 0.0))
        store._suspect = True
        real = os.open

        def no_descriptor(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_PATH:
                raise OSError(errno.EMFILE, "Too many open files", str(path))
            return real(path, flags, *more, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", no_descriptor)
            for _ in range(2):
                with pytest.raises(StoreUnavailable, match="can't be watched: Too many open files"):
                    put(store, dek("b"))
                assert keys(store.page("", 9)) == ["a"] and "can't be watched" in store.trouble()
        put(store, dek("c"))
        (tmp_path / FILE_NAME).rename(tmp_path / "elsewhere")
        with pytest.raises(StoreUnavailable, match="moved away"):
            put(store, dek("d"))
        store.close()

    def test_a_read_only_folder(self, tmp_path: Path) -> None:
        with pytest.raises(StoreUnavailable, match="unable to open"):
            SqliteReader(tmp_path / "nowhere")


class TestReleased:
    """Rows to the letter: no other test knows them but by the code that writes and reads them."""

    TOLD = load("store")

    def test_they_are_written_so(self, tmp_path: Path) -> None:
        key = secret(self.TOLD["row_key"])
        with contextlib.closing(opened(tmp_path, key)) as store, store.transaction():
            store.activate(OLD, 1, "2026-01-01T00:00:00.000000Z")
            store.put(dek("a"))
            store.write("kek:x", {"since": "2026"})
        with contextlib.closing(sqlite3.connect(tmp_path / "kms.db")) as db:
            for table in ("deks", "kms"):
                assert dict(db.execute(f"SELECT key, value FROM {table}")) == self.TOLD[table]
            for name in ("application_id", "user_version"):
                assert db.execute(f"PRAGMA {name}").fetchone()[0] == self.TOLD[name]
            made = {sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE type = 'table'")}
            assert made == set(self.TOLD["tables"])

    def test_a_mac_is_what_the_manual_says(self) -> None:
        """And the sums in the state row."""
        sums = {"deks": 0, "kms": 0}
        for table in sums:
            for name, text in self.TOLD[table].items():
                row, mac = re.fullmatch(r'(.+),"mac":"(.+)"}', text).groups()  # type: ignore[union-attr]
                signed = b"progressdb-kms row v1\0" + name.encode() + b"\0" + row.encode() + b"}"
                found = hmac.digest(bytes.fromhex(self.TOLD["row_key"]), signed, "sha256")
                assert base64.b64encode(found).decode() == mac, name
                sums[table] += int.from_bytes(found, "big") if name != STATE else 0
        assert f'"sum":"{sums["deks"]:064x}","own":"{sums["kms"]:064x}"' in self.TOLD["kms"][STATE]
