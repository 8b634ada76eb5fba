"""A store that was put back, or edited with an SQL shell, is noticed: at the start, by verify, by doctor."""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from progressdb_kms.store.snapshots import UNFINISHED
from tests.conftest import MakeDaemon
from tests.harness.daemon import Daemon
from tests.harness.procs import wait_until

FILES = ("kms.db", "kms.db-wal", "kms.db-shm")


def sql(daemon: Daemon, statement: str, *args: Any) -> list[Any]:
    """The daemon being stopped."""
    with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db")) as db, db:
        return db.execute(statement, args).fetchall()


def keep(daemon: Daemon, folder: Path) -> None:
    folder.mkdir()
    for name in FILES:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(daemon.data_dir / name, folder / name)


def put_back(daemon: Daemon, folder: Path) -> None:
    for name in FILES:
        (daemon.data_dir / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        shutil.copy2(path, daemon.data_dir / path.name)


def events(daemon: Daemon) -> list[dict[str, Any]]:
    lines = daemon.audit_log.read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


def refused(daemon: Daemon) -> str:
    with pytest.raises(AssertionError) as caught:
        daemon.start()
    return str(caught.value)


def start_with(daemon: Daemon, *flags: str) -> None:
    daemon.args = list(flags)
    try:
        daemon.start()
    finally:
        daemon.args = []


def noticed(daemon: Daemon) -> None:
    """By all that look."""
    assert "older than the audit log" in refused(daemon) and "restore FILE" in daemon.stderr
    for command in ("verify", "doctor"):
        done = daemon.offline(command)
        assert done.returncode == 1 and b"older than the audit log" in done.stdout + done.stderr, command
        assert b"restore" in done.stdout + done.stderr


class Site:
    """A daemon whose store was kept; after that a key was shredded, another disabled, a third scheduled."""

    def __init__(self, daemon: Daemon, kept: Path) -> None:
        self.daemon, self.kept = daemon, kept
        with daemon.session() as kms:
            self.shredded, self.disabled, self.scheduled, self.other = (
                kms.create_dek("t")["key_id"] for _ in range(4)
            )
            self.box = kms.encrypt(self.other, b"text")
        backup = daemon.home / "backup"
        assert daemon.offline("backup", str(backup)).returncode == 0
        self.backup = backup
        daemon.kill()  # of the same run: no start is between
        keep(daemon, kept)
        daemon.start()
        with daemon.session() as kms:
            kms.ok("DELETE", f"/deks/{self.shredded}", {"immediately": True})
            kms.ok("POST", f"/deks/{self.disabled}/disable")
            kms.ok("DELETE", f"/deks/{self.scheduled}")
            for _ in range(200):  # far more than the last line tells of it
                kms.encrypt(self.other, b"text")
        daemon.stop()

    @contextlib.contextmanager
    def twin(self, kept: Path) -> Iterator[Site]:
        found = copy.copy(self)
        shutil.copytree(self.kept, kept)
        with contextlib.closing(self.daemon.copy()) as found.daemon:
            found.kept, found.backup = kept, Path(shutil.copy2(self.backup, found.daemon.home))
            yield found

    def states(self) -> list[str]:
        with self.daemon.session() as kms:
            keys = (self.shredded, self.disabled, self.scheduled, self.other)
            return [str(kms.ok("GET", f"/deks/{key_id}")["state"]) for key_id in keys]


CLOSED = ["shredded", "disabled", "pending_deletion", "enabled"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Daemon(workers=1) as daemon:
        yield Site(daemon, tmp_path_factory.mktemp("site") / "kept")


@pytest.fixture
def site(made: Site, tmp_path: Path) -> Iterator[Site]:
    with made.twin(tmp_path / "kept") as daemon:
        yield daemon


def test_a_write_ahead_log_that_was_left_behind(site: Site) -> None:
    """kms.db was copied alone, of a daemon that was killed. The start says so, and spoils nothing."""
    site.daemon.start()
    with site.daemon.session() as kms:
        made = [kms.create_dek("t")["key_id"] for _ in range(3)]
    site.daemon.kill()
    keep(site.daemon, site.daemon.home / "all")
    for end in ("-wal", "-shm"):
        (site.daemon.data_dir / f"kms.db{end}").unlink()
    for _ in range(2):
        assert "older than the audit log" in refused(site.daemon)
        assert "was its kms.db-wal left behind?" in site.daemon.stderr
    assert site.daemon.offline("verify").returncode == site.daemon.offline("doctor").returncode == 1
    shutil.copy2(site.daemon.home / "all" / "kms.db-wal", site.daemon.data_dir)
    site.daemon.start()
    with site.daemon.session() as kms:
        assert [kms.ok("GET", f"/deks/{key_id}")["state"] for key_id in made] == ["enabled"] * 3


def test_a_log_that_is_gone_is_told_by_the_start(site: Site) -> None:
    """Nothing else would, until somebody verifies. It is told once: then the store knows of a new log."""
    told = "no audit record of before"
    site.daemon.start()
    assert told not in site.daemon.stderr
    site.daemon.stop()
    log = site.daemon.audit_log.rename(site.daemon.home / "log")
    for expected in (True, False):
        site.daemon.start()
        assert (told in site.daemon.stderr) == expected
        site.daemon.stop()
    done = site.daemon.offline("audit", "verify")
    assert done.returncode == 1 and b"fault" in done.stdout
    assert site.daemon.offline("audit", "verify", str(log), str(site.daemon.audit_log)).returncode == 0


def rotate_away(site: Site) -> None:
    site.daemon.audit_log.rename(site.daemon.audit_log.with_name("kms-audit.log.1"))


def rotate_and_pack(site: Site) -> None:
    packed = site.daemon.audit_log.with_name("kms-audit.log-20260101.gz")
    packed.write_bytes(gzip.compress(site.daemon.audit_log.read_bytes()))
    packed.chmod(0o600)
    site.daemon.audit_log.unlink()


def rotate_and_make_new(site: Site) -> None:
    rotate_away(site)
    site.daemon.audit_log.touch(0o600)


def tear(site: Site) -> None:
    with open(site.daemon.audit_log, "ab") as log:
        log.write(site.daemon.audit_log.read_bytes().splitlines()[-1][:150])


def bury(site: Site) -> None:
    """Garbage that is longer than the end that is looked at first."""
    with open(site.daemon.audit_log, "ab") as log:
        log.write((b"x" * 99 + b"\n") * 2000)


class TestOlderStore:
    @pytest.mark.parametrize("then", [None, rotate_away, rotate_and_pack, rotate_and_make_new, tear, bury])
    def test_is_refused(self, site: Site, then: Callable[[Site], None]) -> None:
        if then is not None:
            then(site)
        put_back(site.daemon, site.kept)
        if then is not None:
            assert "older than the audit log" in refused(site.daemon)
        else:
            noticed(site.daemon)

    def test_of_the_same_run(self, make_daemon: MakeDaemon, tmp_path: Path) -> None:
        """No start is between: the numbers of changes are all that tells."""
        daemon = make_daemon(workers=1)
        with daemon.session() as kms:
            key_id = kms.create_dek("t")["key_id"]
            with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db")) as db:
                (tmp_path / "kept").mkdir()
                with contextlib.closing(sqlite3.connect(tmp_path / "kept" / "kms.db")) as copy:
                    db.backup(copy)
            kms.ok("DELETE", f"/deks/{key_id}", {"immediately": True})
        daemon.kill()
        put_back(daemon, tmp_path / "kept")
        noticed(daemon)

    def test_is_restored_with_what_was_closed(self, site: Site) -> None:
        """Also where neither the store nor its tombstones are there any more: the log tells."""
        for name in FILES:
            (site.daemon.data_dir / name).unlink(missing_ok=True)
        done = site.daemon.offline("restore", str(site.backup))
        assert done.returncode == 0, done.stderr
        site.daemon.start()
        assert site.states() == CLOSED
        with site.daemon.session() as kms:
            assert kms.decrypt(site.other, site.box) == b"text"

    def test_put_back_and_restored(self, site: Site) -> None:
        change = max(event["change"] for event in events(site.daemon))
        put_back(site.daemon, site.kept)
        done = site.daemon.offline("restore", str(site.backup))
        assert done.returncode == 0, done.stderr
        assert events(site.daemon)[-1]["change"] > change
        assert site.daemon.offline("verify").returncode == 0
        site.daemon.start()
        assert site.states() == CLOSED

    def test_is_taken_on_the_record(self, site: Site) -> None:
        change = max(event["change"] for event in events(site.daemon))
        put_back(site.daemon, site.kept)
        start_with(site.daemon, "--accept-older-store")
        assert site.states() == ["enabled"] * 4
        (event,) = (event for event in events(site.daemon) if event["op"] == "older_store_accepted")
        assert event["log"] == change > event["store"]
        with site.daemon.session() as kms:
            kms.create_dek("t")
        site.daemon.stop()
        assert max(event["change"] for event in events(site.daemon)) > change
        site.daemon.start()  # from now on it is the store


class TestHonestStore:
    """What crashes leave is no attack."""

    def test_commits_that_no_record_tells_of(self, site: Site) -> None:
        """The power took the end of the log, or the daemon died between COMMIT and record."""
        lines = site.daemon.audit_log.read_bytes().splitlines(keepends=True)
        site.daemon.audit_log.write_bytes(b"".join(lines[:-30]))
        site.daemon.start()
        assert site.states() == CLOSED

    @pytest.mark.parametrize("then", [tear, rotate_away, rotate_and_pack, rotate_and_make_new])
    def test_starts(self, site: Site, then: Callable[[Site], None]) -> None:
        then(site)
        site.daemon.start()
        assert site.states() == CLOSED

    def test_what_is_not_signed_does_not_count(self, site: Site) -> None:
        line = site.daemon.audit_log.read_bytes().splitlines()[-1]
        event = json.loads(line)["event"]
        forged = line.replace(b'"change":%d' % event["change"], b'"change":999999')
        forged += b"\n" + line.replace(b'"chain":"', b'"chain":"99')
        with open(site.daemon.audit_log, "ab") as log:
            log.write(forged + b"\n")
        site.daemon.start()
        assert site.states() == CLOSED


class TestEditedRows:
    def test_a_state(self, site: Site) -> None:
        edit = "UPDATE deks SET value = json_set(value, '$.state', 'enabled') WHERE key = ?"
        sql(site.daemon, edit, f"meta:{site.disabled}")
        done = site.daemon.offline("verify")
        assert done.returncode == 1 and site.disabled.encode() in done.stderr
        site.daemon.start()
        with site.daemon.session() as kms:
            for path in ("/encrypt", "/encrypt_batch"):
                item = {"key_id": site.disabled, "plaintext": ""}
                reply = kms.request("POST", path, item if path == "/encrypt" else {"items": [item]})
                assert "store_damaged" in reply.body.decode(), path
            assert kms.request("POST", f"/deks/{site.disabled}/enable").status == 500
            kms.encrypt(site.other, b"text")  # the others go on

    def test_an_older_row(self, site: Site) -> None:
        with contextlib.closing(sqlite3.connect(site.kept / "kms.db")) as old:
            (row,) = old.execute(
                "SELECT value FROM deks WHERE key = ?", (f"meta:{site.shredded}",)
            ).fetchone()
        sql(site.daemon, "UPDATE deks SET value = ? WHERE key = ?", row, f"meta:{site.shredded}")
        done = site.daemon.offline("verify")
        assert done.returncode == 1 and b"don't add up" in done.stderr
        site.daemon.start()
        with site.daemon.session() as kms:
            reply = kms.request("POST", "/rotate_kek", {"new_kek_hex": bytes(range(32)).hex()})
            assert reply.code == "store_damaged" and "add up" in reply.body.decode()

    def test_the_state_row(self, site: Site) -> None:
        old = sqlite3.connect(site.kept / "kms.db")
        (row,) = old.execute("SELECT value FROM kms WHERE key = 'store:state'").fetchone()
        old.close()
        was = sql(site.daemon, "SELECT value FROM kms WHERE key = 'store:state'")[0][0]
        change = json.loads(was)["change"]
        sql(site.daemon, "UPDATE kms SET value = ? WHERE key = 'store:state'", row)
        noticed(site.daemon)
        edited = json.dumps({**json.loads(row), "change": change})
        sql(site.daemon, "UPDATE kms SET value = ? WHERE key = 'store:state'", edited)
        assert "store:state of the store is not as the daemon wrote it" in refused(site.daemon)

    @pytest.mark.parametrize("name", ["row:key", "audit:key", "store:state"])
    def test_what_was_there_from_the_beginning(self, site: Site, name: str) -> None:
        sql(site.daemon, "DELETE FROM kms WHERE key = ?", name)
        assert "missing" in refused(site.daemon)

    def test_an_emptied_store(self, site: Site) -> None:
        for table in ("deks", "kms"):
            sql(site.daemon, f"DELETE FROM {table}")  # noqa: S608
        assert "kms.db is empty" in refused(site.daemon)


class TestOwnRows:
    """What the service keeps for itself: heads of the audit chains, retired KEKs, the trusted time."""

    def cut(self, site: Site) -> None:
        lines = site.daemon.audit_log.read_bytes().splitlines(keepends=True)
        site.daemon.audit_log.write_bytes(b"".join(lines[:-3]))

    def found(self, site: Site) -> None:
        """By whoever looks."""
        for words in (["verify"], ["audit", "verify"], ["doctor"]):
            done = site.daemon.offline(*words)
            assert done.returncode == 1 and b"the service's own" in done.stdout + done.stderr, words
        assert "the service's own don't add up" in refused(site.daemon)

    def test_no_head_can_be_removed_to_cut_the_log(self, site: Site) -> None:
        assert len(sql(site.daemon, "DELETE FROM kms WHERE key LIKE 'audit:head:%' RETURNING key")) > 1
        self.cut(site)
        self.found(site)

    def test_nor_one_of_them(self, site: Site) -> None:
        (last,) = sql(site.daemon, "SELECT key FROM kms WHERE key LIKE 'audit:head:%' ORDER BY key")[-1]
        sql(site.daemon, "DELETE FROM kms WHERE key = ?", last)
        self.cut(site)
        self.found(site)

    def test_nor_an_older_one_be_put_back(self, site: Site) -> None:
        with contextlib.closing(sqlite3.connect(site.kept / "kms.db")) as old:
            rows = old.execute("SELECT value, key FROM kms WHERE key LIKE 'audit:head:%'").fetchall()
        for value, key in rows:
            sql(site.daemon, "INSERT OR REPLACE INTO kms VALUES (?, ?)", key, value)
        assert rows
        self.found(site)

    @pytest.mark.parametrize("name", ["audit:head:1.0", "audit:epoch", "clock:trusted", "kek:retired:00"])
    def test_none_can_be_made_or_edited(self, site: Site, name: str) -> None:
        found = sql(site.daemon, "SELECT value FROM kms WHERE key = ?", name)
        row = json.loads(found[0][0]) if found else {}
        edited = json.dumps({**row, "since": "2020-01-01T00:00:00Z"})
        sql(site.daemon, "INSERT OR REPLACE INTO kms VALUES (?, ?)", name, edited)
        assert f"the row {name} of the store is not as the daemon wrote it" in refused(site.daemon)

    def test_a_backup_tells_too_and_is_the_way_out(self, site: Site, tmp_path: Path) -> None:
        sql(site.daemon, "DELETE FROM kms WHERE key LIKE 'audit:head:%'")
        copy = str(tmp_path / "copy.backup")
        assert site.daemon.offline("backup", copy).returncode == 0
        done = site.daemon.offline("restore", copy)
        assert done.returncode == 1 and b"the service's own" in done.stderr
        done = site.daemon.offline("restore", copy, "--force")
        assert done.returncode == 0, done.stderr
        site.daemon.start()
        assert site.states() == CLOSED
        with site.daemon.session() as kms:
            assert kms.decrypt(site.other, site.box) == b"text"

    def test_no_kek_is_taken_from_the_list_of_retired_ones(self, site: Site) -> None:
        old, new = site.daemon.kek, os.urandom(32)
        with site.daemon.start().session() as kms:
            site.daemon.write_kek(new)
            kms.rotate(new)
        site.daemon.stop()
        assert sql(site.daemon, "DELETE FROM kms WHERE key LIKE 'kek:retired:%' RETURNING key")
        site.daemon.write_kek(old)
        site.daemon.write_config({"workers": 1, "previous_master_keys": [{"hex": new.hex()}]})
        assert "the service's own don't add up" in refused(site.daemon)

    def test_heads_of_older_runs_are_forgotten(self, site: Site) -> None:
        for _ in range(3):
            site.daemon.start()
            site.daemon.stop()
        names = [name for (name,) in sql(site.daemon, "SELECT key FROM kms WHERE key LIKE 'audit:head:%'")]
        assert len({name.partition(".")[0] for name in names}) == 1
        assert site.daemon.offline("audit", "verify").returncode == 0


class TestLists:
    """What stands beside the rows shreds nothing."""

    def test_an_edited_list_of_deletions(self, site: Site) -> None:
        (name,) = sql(site.daemon, "SELECT key FROM kms WHERE key LIKE 'deletion:%'")[0]
        early = f"deletion:2020-01-01T00:00:00.000000Z|{site.scheduled}"
        sql(site.daemon, "UPDATE kms SET key = ? WHERE key = ?", early, name)
        for entry in (f"deletion:2020|{site.other}", "deletion:2020", "deletion:2020|nobody"):
            sql(site.daemon, "INSERT INTO kms VALUES (?, '{}')", entry)
        sql(site.daemon, "INSERT INTO kms VALUES (?, '{}')", f"erasure:{site.other}")
        site.daemon.start()
        with site.daemon.session() as kms:
            kms.ok("GET", "/status")  # the janitor has been there
            assert kms.decrypt(site.other, site.box) == b"text"
        assert site.states() == CLOSED
        site.daemon.stop()
        assert [e["key_id"] for e in events(site.daemon) if e["op"] == "shred"] == [site.shredded]
        assert (
            sql(site.daemon, "SELECT key FROM kms WHERE key LIKE 'deletion:2020%' OR key LIKE 'erasure:%'")
            == []
        )

    def test_a_snapshot_elsewhere_is_left_alone(self, site: Site, tmp_path: Path) -> None:
        treasure = tmp_path / "treasure"
        treasure.mkdir()
        (treasure / "map").write_text("here")
        names = [UNFINISHED + name for name in (str(treasure), "../../treasure", "..")]
        for name in names:
            sql(site.daemon, f"INSERT INTO kms VALUES ('{name}', ?)", "{}")
        site.daemon.start()
        with site.daemon.session() as kms:
            kms.create_dek("t")
        gone = f"SELECT * FROM kms WHERE key LIKE '{UNFINISHED}%'"
        wait_until(lambda: sql(site.daemon, gone) == [], 20, "what is tidied")
        site.daemon.stop()
        assert (treasure / "map").read_text() == "here"
