"""The disk lost a byte of one row, and SQLite has no checksums: that row is named, its bytes are told to
nobody, all others are served, and it can be brought back."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing

import pytest

from tests.conftest import MakeDaemon
from tests.harness.daemon import Daemon, DaemonFailed, write_secret
from tests.harness.wire import b64

LOST = pytest.mark.parametrize(
    ("at", "byte"),
    [(0, b"x"), (1, b"z"), (60, b"\xff"), (80, b"\0"), (80, b"\x01"), (-2, b"x"), (-1, b"]")],
    ids=["brace", "quote", "not UTF-8", "NUL", "control", "last quote", "last brace"],
)


def lose(daemon: Daemon, key_id: str, at: int, byte: bytes) -> None:
    path = daemon.data_dir / "kms.db"
    assert not (daemon.data_dir / "kms.db-wal").exists()
    data, row = bytearray(path.read_bytes()), f"meta:{key_id}{{".encode()
    places = [n for n in range(len(data)) if data.startswith(row, n)]
    assert places
    for place in places:
        start = (place + len(row) - 1 if at >= 0 else data.index(b'"}', place) + 2) + at
        data[start : start + 1] = byte
    path.write_bytes(data)


@LOST
def test_a_row_that_lost_a_byte(make_daemon: MakeDaemon, at: int, byte: bytes) -> None:
    daemon = make_daemon(workers=1)
    with daemon.session() as session:
        good, bad = (session.create_dek(f"thread-{number}")["key_id"] for number in range(2))
        sealed = session.encrypt(bad, b"hello")
        write_secret(daemon.home / "old", daemon.kek)
        daemon.write_kek(new := os.urandom(32))
        daemon.write_config({"workers": 1, "previous_master_keys": [{"file": "old"}]})
        session.ok("POST", "/rotate_kek", {"new_kek_hex": new.hex()})
        blob = session.ok("GET", f"/get_wrapped?key_id={bad}")["wrapped"]
    daemon.stop()
    (snapshot,) = (path for path in (daemon.data_dir / "kms-deks-backup").iterdir() if path.is_dir())
    lose(daemon, bad, at, byte)
    daemon.start()
    told = f"the row meta:{bad} of the store is not as the daemon wrote it"
    with daemon.session() as session:
        for method, path, body in (
            ("GET", f"/deks/{bad}", None),
            ("POST", "/encrypt", {"key_id": bad, "plaintext": b64(b"x")}),
            ("POST", f"/deks/{bad}/disable", {}),
            ("POST", "/rotate_kek", {"new_kek_hex": os.urandom(32).hex()}),
        ):
            reply = session.request(method, path, body)
            assert (reply.status, reply.code) == (500, "store_damaged"), path
            assert told.encode() in reply.body and blob[8:40].encode() not in reply.body
        session.encrypt(good, b"x")
        another = session.create_dek("another")["key_id"]
        rows = {row["key_id"]: row for row in session.ok("GET", "/deks")["deks"]}
        assert rows.keys() == {good, bad, another} and rows[good]["state"] == "enabled"
        assert {name for name, value in rows[bad].items() if value} == {
            "key_id",
            "state",
            "kek_version",
            "usage",
        }
        assert (rows[bad]["state"], rows[bad]["kek_version"]) == ("damaged", "0")
    listed = daemon.cli("list", "--state", "damaged", "--ids", "--socket", str(daemon.socket))
    assert (listed.returncode, listed.stdout.decode().split()) == (0, [bad]), listed.stderr
    assert "Traceback" not in daemon.stderr and blob[8:40] not in daemon.stderr
    daemon.stop()
    verified = daemon.offline("verify")
    assert verified.returncode == 1 and f"{bad}: its row is not as the daemon" in verified.stderr.decode()
    assert f"{good}:" not in verified.stderr.decode()
    exported = daemon.offline("export", str(daemon.home / "lines"))
    assert exported.returncode == 1 and f"meta:{bad} of the store is not as" in exported.stderr.decode()
    skipped = daemon.offline("export", "--skip-bad", str(daemon.home / "lines"))
    assert (
        skipped.returncode == 0 and f"{bad}: its row is not as the daemon wrote it" in skipped.stderr.decode()
    )
    lines = (daemon.home / "lines").read_text()
    assert f'"{good}"' in lines and f'"{bad}"' not in lines
    with closing(daemon.copy(data=False)) as twin:  # where there is no copy of it, all others go elsewhere
        shutil.copy(daemon.home / "old", twin.home / "old")
        assert twin.offline("import", str(daemon.home / "lines")).returncode == 0
        twin.start()
        with twin.session() as session:
            session.encrypt(good, b"x")
            session.ok("POST", "/rotate_kek", {"new_kek_hex": os.urandom(32).hex()})
    restored = daemon.offline("restore", "--snapshot", str(snapshot), "--key", bad)
    assert restored.returncode == 0, restored.stderr
    assert daemon.offline("verify").returncode == 0
    daemon.start()
    with daemon.session() as session:
        session.ok("POST", f"/deks/{bad}/enable", {})
        assert session.decrypt(bad, sealed) == b"hello"


def test_a_row_of_the_service_that_lost_a_byte_is_named(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(workers=1)
    daemon.ok("POST", "/deks", {"thread_id": "t"}, 201)
    daemon.stop()
    path = daemon.data_dir / "kms.db"
    data = path.read_bytes()
    assert b'store:state{"' in data
    path.write_bytes(data.replace(b'store:state{"', b"store:state{\xff"))
    with pytest.raises(DaemonFailed) as refused:
        daemon.start()
    assert "the row store:state" in refused.value.stderr
    verified = daemon.offline("verify")
    assert verified.returncode == 1 and b"the row store:state" in verified.stderr


OWN = ["store:state", "row:key", "audit:key", "audit:epoch"]


@pytest.mark.parametrize("harm", ["substr(value, 2)", "NULL"])
@pytest.mark.parametrize("name", OWN)
def test_all_deks_come_back_where_a_row_of_the_service_is_lost(
    make_daemon: MakeDaemon, name: str, harm: str
) -> None:
    """Those that no backup has, too. An export asked for the state row, to show how far it is."""
    daemon = make_daemon(workers=1)
    backup, lines = str(daemon.home / "backup"), str(daemon.home / "lines")
    with daemon.session() as session:
        keys = [session.create_dek("t")["key_id"]]
        assert daemon.offline("backup", backup).returncode == 0
        keys.append(session.create_dek("t")["key_id"])
        boxes = [session.encrypt(key_id, b"text") for key_id in keys]
        execute(daemon, f"UPDATE kms SET value = {harm} WHERE key = ?", name)
    daemon.kill()
    with pytest.raises(DaemonFailed) as refused:
        daemon.start()
    assert "Traceback" not in refused.value.stderr and name in refused.value.stderr
    for words in (
        ("export", "--skip-bad", lines),
        ("restore", "--force", backup),
        ("import", "--skip-bad", lines),
        ("verify",),
    ):
        done = daemon.offline(*words)
        assert done.returncode == 0, (words, done.stderr)
    daemon.start()
    with daemon.session() as session:
        assert [session.decrypt(*pair) for pair in zip(keys, boxes)] == [b"text"] * 2


RENAMED = pytest.mark.parametrize(
    "byte", ["ff", "0a", "5c", "27"], ids=["not UTF-8", "control", "\\", "quote"]
)


@RENAMED
@pytest.mark.parametrize("victim", [0, 2], ids=["the first", "the last"])
def test_a_row_that_lost_a_byte_of_its_name(make_daemon: MakeDaemon, byte: str, victim: int) -> None:
    """It hides none that come after it, however short the pages are, and nobody looks at it for ever."""
    daemon = make_daemon(workers=1)
    with daemon.session() as session:
        names = sorted(session.create_dek("t")["key_id"] for _ in range(3))
        bad = names.pop(victim)
        sql = (
            f"UPDATE deks SET key = CAST(substr(CAST(key AS BLOB), 1, 30) || x'{byte}' AS TEXT) WHERE key = ?"
        )
        execute(daemon, sql, f"meta:{bad}")
        rows, cursor = [], ""
        for _ in range(3):
            page = session.ok("GET", f"/deks?limit=1&cursor={cursor}")
            rows, cursor = rows + page["deks"], page["next_cursor"]
        assert cursor is None and [row["key_id"] for row in rows if row["state"] == "enabled"] == names
        assert [row["key_id"][:25] for row in rows if row["state"] == "damaged"] == [bad[:25]]
        rotated = session.request("POST", "/rotate_kek", {"new_kek_hex": os.urandom(32).hex()})
        assert (rotated.status, rotated.code) == (500, "store_damaged")
        session.ok("GET", "/deks?unused_for=0")
    assert "Traceback" not in daemon.stderr
    assert all(line.startswith("progressdb-kms: ") for line in daemon.stderr.splitlines())
    daemon.stop()
    verified = daemon.offline("verify")
    assert verified.returncode == 1 and verified.stderr.count(b": its row is not as the daemon wrote it") == 1


def test_a_name_that_is_no_text_any_more(make_daemon: MakeDaemon) -> None:
    """One bit of the record's head tells SQLite that it is a blob, which stands behind all texts."""
    daemon = make_daemon(workers=1)
    with daemon.session() as session:
        bad, good = (session.create_dek("t")["key_id"] for _ in range(2))
        execute(daemon, "UPDATE deks SET key = CAST(key AS BLOB) WHERE key = ?", f"meta:{bad}")
        for method, path, body in (
            ("GET", "/deks", None),
            ("POST", "/rotate_kek", {"new_kek_hex": os.urandom(32).hex()}),
        ):
            reply = session.request(method, path, body)
            assert (reply.status, reply.code) == (500, "store_damaged") and bad.encode() in reply.body
        session.encrypt(good, b"x")
    assert "Traceback" not in daemon.stderr
    daemon.stop()
    for command in (["verify"], ["export", str(daemon.home / "lines")]):
        told = daemon.offline(*command)
        assert told.returncode == 1 and bad in told.stderr.decode() and b"internal" not in told.stderr


def test_nobody_knows_whether_a_damaged_dek_is_unused(make_daemon: MakeDaemon) -> None:
    """Who shreds what is unused must not be shown one whose times can't be read."""
    daemon = make_daemon(workers=1)
    with daemon.session() as session:
        bad = session.create_dek("t")["key_id"]
        execute(
            daemon,
            "UPDATE deks SET value = replace(value, 'enabled', 'unabled') WHERE key = ?",
            f"meta:{bad}",
        )
        assert [row["state"] for row in session.ok("GET", "/deks")["deks"]] == ["damaged"]
        assert session.ok("GET", "/deks?unused_for=3600")["deks"] == []


def execute(daemon: Daemon, sql: str, name: str) -> None:
    with closing(sqlite3.connect(daemon.data_dir / "kms.db")) as db, db:
        assert db.execute(sql, (name,)).rowcount == 1
