"""Backup and restore, with real daemons: nothing acknowledged is lost, nothing shredded comes back."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

from progressdb_kms.encoding import json_dumps
from progressdb_kms.errors import AlreadyRunning
from tests.conftest import MakeDaemon
from tests.harness.daemon import Daemon, write_secret
from tests.harness.faults import Step, Tmpfs, failing, killing, need_strace, steps_of
from tests.harness.load import Load

ROUNDS = 3

Done = subprocess.CompletedProcess[bytes]


class Site(NamedTuple):
    """A stopped daemon, a backup of it, and what was encrypted before that."""

    daemon: Daemon
    backup: Path
    boxes: dict[str, bytes]
    wrapped: dict[str, bytes]

    @property
    def keys(self) -> list[str]:
        return list(self.boxes)


def ok(done: Done) -> str:
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def refused(done: Done) -> str:
    assert done.returncode == 1, done.stdout.decode()
    assert b"internal error" not in done.stderr, done.stderr
    return done.stderr.decode()


def told(done: Done) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(ok(done))
    return result


def checked(daemon: Daemon) -> None:
    """The store and the audit log hold."""
    ok(daemon.offline("verify"))
    ok(daemon.offline("audit", "verify"))


def opens(daemon: Daemon, boxes: dict[str, bytes]) -> None:
    with daemon.session() as kms:
        for key_id, box in boxes.items():
            assert kms.decrypt(key_id, box) == key_id.encode()


def state(daemon: Daemon, key_id: str) -> str:
    reply = daemon.request("GET", f"/deks/{key_id}")
    return str(reply.json()["state"]) if reply.status == 200 else str(reply.status)


def shred(daemon: Daemon, key_id: str) -> None:
    daemon.ok("DELETE", f"/deks/{key_id}", {"immediately": True})


def events(daemon: Daemon, op: str) -> list[dict[str, Any]]:
    lines = daemon.audit_log.read_text().splitlines()
    return [event for line in lines if (event := json.loads(line)["event"])["op"] == op]


def traces(folder: Path, wrapped: bytes) -> list[str]:
    """Files under a folder that hold a wrapped DEK: raw, or any 20 characters of its own part in base64."""
    text = base64.b64encode(wrapped)[-96:]
    pieces = [wrapped[-48:], *(text[at : at + 20] for at in range(0, 76, 20))]
    files = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return [str(path) for path in files if any(piece in path.read_bytes() for piece in pieces)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def made() -> Iterator[Site]:
    with Daemon(workers=1) as daemon:
        boxes, wrapped = {}, {}
        with daemon.session() as kms:
            for number in range(4):
                dek = kms.create_dek(f"thread-{number}")
                key_id = dek["key_id"]
                boxes[key_id] = kms.encrypt(key_id, key_id.encode())
                wrapped[key_id] = base64.b64decode(dek["wrapped"])
        backup = daemon.home / "backup"
        ok(daemon.offline("backup", str(backup)))
        daemon.stop()
        yield Site(daemon, backup, boxes, wrapped)


@pytest.fixture
def site(made: Site, short_tmp: Path) -> Iterator[Site]:
    with contextlib.closing(made.daemon.copy()) as daemon:
        backup = Path(shutil.copy2(made.backup, short_tmp))
        yield made._replace(daemon=daemon.start(), backup=backup)


def restore(site: Site, *args: str, **options: Any) -> Done:
    return site.daemon.offline("restore", str(site.backup), *args, "--json", **options)


# ---- backup ----------------------------------------------------------------------------------------


class TestBackup:
    def test_beside_a_daemon_that_writes(self, make_daemon: MakeDaemon, short_tmp: Path) -> None:
        daemon, file = make_daemon(workers=2), short_tmp / "b"

        def create(kms: Any, number: int) -> tuple[str, bytes]:
            key_id = kms.create_dek(f"t{number}")["key_id"]
            return key_id, kms.encrypt(key_id, key_id.encode())

        with Load(daemon.socket, create, threads=4) as load:
            load.wait_for(100)
            before = dict(load.results)
            about = told(daemon.offline("backup", str(file), "--json"))
            load.wait_for(len(load.results) + 50)
        assert not load.errors
        assert about["deks"] >= len(before)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert os.listdir(short_tmp) == ["b"]
        twin = daemon.copy(data=False)
        try:
            assert told(twin.offline("restore", str(file), "--json"))["deks"] == about["deks"]
            checked(twin)
            opens(twin.start(), before)
            twin.stop()
            checked(twin)
        finally:
            twin.close()

    def test_any_sqlite_opens_it(self, site: Site) -> None:
        with contextlib.closing(sqlite3.connect(site.backup)) as db, db:
            assert db.execute("SELECT count(*) FROM deks").fetchone() == (4,)
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        db.close()
        assert os.listdir(site.backup.parent) == ["backup"]
        assert site.backup.read_bytes()[18:20] == b"\1\1", "a reader would have to make a write-ahead log"

    def test_not_into_the_data_dir(self, site: Site) -> None:
        inside = site.daemon.data_dir / "x" / ".." / "b"
        assert "inside the data-dir" in refused(site.daemon.offline("backup", str(inside)))
        link = site.daemon.home / "link"
        link.symlink_to(site.daemon.data_dir)
        assert "inside the data-dir" in refused(site.daemon.offline("backup", str(link / "b")))
        (deeper := site.daemon.data_dir / "x" / "y").mkdir(parents=True)
        assert "inside the data-dir" in refused(site.daemon.offline("backup", str(deeper / "b")))
        assert not (site.daemon.data_dir / "b").exists() and not list(deeper.iterdir())
        assert "there is no folder" in refused(site.daemon.offline("backup", str(site.daemon.home / "x/b")))

    def test_a_failure_leaves_the_old_one(self, site: Site) -> None:
        before = site.backup.read_bytes()
        (site.daemon.data_dir / "kms.db").rename(site.daemon.home / "kms.db")
        refused(site.daemon.offline("backup", str(site.backup)))
        write_secret(site.daemon.data_dir / "kms.db", b"SQLite format 3\0" + bytes(5000))
        refused(site.daemon.offline("backup", str(site.backup)))
        assert site.backup.read_bytes() == before
        assert os.listdir(site.backup.parent) == ["backup"]

    def test_it_never_overwrites(self, site: Site) -> None:
        before = site.backup.read_bytes()
        said = refused(site.daemon.offline("backup", str(site.backup)))
        assert f"{site.backup} exists, and a backup is never overwritten (name another file)" in said
        dangling = site.backup.with_name("dangling")
        dangling.symlink_to("nowhere")
        assert "never overwritten" in refused(site.daemon.offline("backup", str(dangling)))
        dangling.unlink()
        assert site.backup.read_bytes() == before and os.listdir(site.backup.parent) == ["backup"]

    @pytest.mark.parametrize("links", [True, False], ids=["links", "none, as on vfat"])
    def test_nor_what_came_meanwhile(self, site: Site, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        from progressdb_kms.tools import backup
        from progressdb_kms.tools.console import CommandFailed

        def late(done: int, total: int) -> None:
            (site.backup.parent / "late").write_text("mine")

        def no_links(source: Path, target: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

        if not links:
            monkeypatch.setattr(os, "link", no_links)
        with pytest.raises(CommandFailed, match="never overwritten"):
            backup.backup(site.daemon.data_dir, site.backup.parent / "late", late)
        assert (site.backup.parent / "late").read_text() == "mine"
        backup.backup(site.daemon.data_dir, site.backup.parent / "fine", lambda done, total: None)
        assert whole(site.backup.parent / "fine")
        assert sorted(os.listdir(site.backup.parent)) == ["backup", "fine", "late"]

    def test_no_daemon_starts_beside_one_that_reads_without_locks(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a full disk on which room is made meanwhile: a checkpoint would change what is copied."""
        from progressdb_kms.service.lock import claim
        from progressdb_kms.tools import backup, datadir

        started = []

        def start(done: int, total: int) -> None:
            with pytest.raises(AlreadyRunning):
                claim(site.daemon.data_dir)
            started.append(done)

        site.daemon.stop()
        monkeypatch.setattr(datadir, "access", lambda data_dir: "ro&immutable=1")
        backup.backup(site.daemon.data_dir, site.backup.parent / "alone", start)
        assert started and whole(site.backup.parent / "alone")
        with (
            contextlib.closing(claim(site.daemon.data_dir)),
            pytest.raises(AlreadyRunning, match="starts on"),
        ):
            backup.backup(site.daemon.data_dir, site.backup.parent / "late", start)

    def test_a_damaged_store_makes_none(self, site: Site) -> None:
        """It made one, and said so; what was wrong with it came out when it was needed."""
        site.daemon.stop()
        with open(site.daemon.data_dir / "kms.db", "r+b") as file:
            os.pwrite(file.fileno(), os.urandom(8), 8192)
        error = refused(site.daemon.offline("backup", str(site.backup.parent / "second")))
        assert "damaged" in error or "malformed" in error
        assert "copy the whole data-dir to another disk" in error
        assert os.listdir(site.backup.parent) == ["backup"]

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ("UPDATE kms SET value = '{' WHERE key = 'store:state'", "the row store:state can't be read"),
            ("UPDATE kms SET value = x'00' WHERE key = 'store:state'", "the row store:state can't be read"),
            ("DELETE FROM deks WHERE rowid = 1", "there are 3, its state tells of 4 DEKs"),
        ],
    )
    def test_nor_does_one_that_lost_what_it_tells_of(self, site: Site, change: str, what: str) -> None:
        """It was "internal error", and a backup with -1 shredded DEKs, which nobody looks at again."""
        site.daemon.stop()
        with contextlib.closing(sqlite3.connect(site.daemon.data_dir / "kms.db")) as db, db:
            db.execute(change)
        assert what in refused(site.daemon.offline("backup", str(site.backup.parent / "second")))
        assert os.listdir(site.backup.parent) == ["backup"]

    def test_a_row_that_is_lost_beside_a_tombstone_is_missed_too(self, site: Site) -> None:
        """There were as many rows as the state tells of DEKs."""
        shred(site.daemon, site.keys[0])
        site.daemon.stop()
        ok(site.daemon.offline("backup", str(site.backup.parent / "whole")))
        with contextlib.closing(sqlite3.connect(site.daemon.data_dir / "kms.db")) as db, db:
            db.execute("DELETE FROM deks WHERE key = ?", (f"meta:{site.keys[1]}",))
        error = refused(site.daemon.offline("backup", str(site.backup.parent / "second")))
        assert "there are 3, its state tells of 3 DEKs that are not shredded, and they don't add up" in error

    def test_a_stream_is_refused(self, site: Site) -> None:
        done = site.daemon.offline("backup", "-")
        assert (done.returncode, done.stdout) == (2, b"") and b"`export -`" in done.stderr
        assert not (site.daemon.home / "-").exists()

    def test_killed(self, site: Site) -> None:
        need_strace()
        folder = site.backup.parent
        target = folder / "second"

        def run(wrapper: Sequence[str]) -> Done:
            return site.daemon.offline("backup", str(target), wrapper=wrapper)

        steps = steps_of(run, folder)
        assert len(steps) >= 5, [str(step) for step in steps]
        for step in steps.spread(ROUNDS):
            target.unlink(missing_ok=True)
            done = run(killing(step))
            assert done.returncode == -signal.SIGKILL, f"not killed at {step}: {done.stderr!r}"
            if target.exists():
                assert whole(target)
                assert "never overwritten" in refused(run(()))
            else:
                ok(run(()))
            assert sorted(os.listdir(folder)) == ["backup", "second"], f"killed at {step}"

    def test_a_full_disk_is_told_with_the_name_of_the_file(self, site: Site) -> None:
        need_strace()
        target = site.backup.parent / "second"

        def run(wrapper: Sequence[str]) -> Done:
            return site.daemon.offline("backup", str(target), wrapper=wrapper)

        steps = steps_of(run, site.backup.parent)
        own = f"<{site.backup.parent}"
        last = [step for step in steps if step.name in ("write", "fsync") and own in step.text]
        assert len(last) == 3, [str(step) for step in steps]
        for step in last:
            target.unlink(missing_ok=True)
            assert f"{target}: No space left" in refused(run(failing(step))), f"at {step}"
            assert target.exists() == (step is last[-1]) and not list(target.parent.glob(".*"))


def whole(file: Path) -> bool:
    from progressdb_kms.tools import backup

    with backup.opened(file, lambda done, total: None):
        return True


# ---- restore ---------------------------------------------------------------------------------------


class TestRestore:
    def test_refuses_while_a_daemon_runs(self, site: Site) -> None:
        assert "in use" in refused(restore(site, "--force"))

    @pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, 0)], ids=["gone", "empty"])
    def test_over_a_lost_store(self, site: Site, harm: Callable[[Path], None]) -> None:
        """Two starts after the backup. Its write-ahead log is left and has what came since: SQLite removed it
        for whoever only looked, and a restore took it away unasked. It must not get into the new store."""
        site.daemon.stop()
        site.daemon.start().ok("POST", "/create_dek_for_thread", {"thread_id": "late"})
        site.daemon.kill()
        late = site.daemon.start().ok("POST", "/create_dek_for_thread", {"thread_id": "later"})["key_id"]
        site.daemon.kill()
        log = site.daemon.data_dir / "kms.db-wal"
        assert late.encode() in (before := log.read_bytes())
        harm(site.daemon.data_dir / "kms.db")
        assert "there was a store" in site.daemon.copy().refusal().stderr
        other = str(site.daemon.home / "other")
        for words in (["verify"], ["backup", other], ["export", other], ["audit", "verify"], ["doctor"]):
            done = site.daemon.offline(*words)
            assert done.returncode == 1 and b"kms.db" in done.stderr + done.stdout, words
            assert log.read_bytes() == before, words
        error = refused(restore(site))
        assert "kms.db-wal" in error and "copy the whole data-dir to another disk" in error
        assert log.read_bytes() == before
        found = told(restore(site, "--force"))
        assert (found["deks"], found["damaged"], found["lost"]) == (4, [], None)
        checked(site.daemon)
        opens(site.daemon.start(), site.boxes)
        assert state(site.daemon, late) == "404"
        site.daemon.stop()
        checked(site.daemon)

    def test_over_a_lost_store_of_which_the_backup_has_all(self, site: Site) -> None:
        site.daemon.kill()
        assert (site.daemon.data_dir / "kms.db-wal").stat().st_size
        (site.daemon.data_dir / "kms.db").unlink()
        log = site.daemon.audit_log.rename(site.daemon.home / "log")
        assert "kms.db-wal" in refused(restore(site)), "nothing tells whether it has"
        log.rename(site.daemon.audit_log)
        assert told(restore(site))["deks"] == 4
        opens(site.daemon.start(), site.boxes)

    def test_beside_a_journal_of_another_file(self, site: Site) -> None:
        """Of a first start that a power cut ended. SQLite would have undone the new store by it."""
        site.daemon.stop()
        for path in site.daemon.data_dir.glob("kms*"):
            path.unlink()
        journal = site.daemon.data_dir / "kms.db-journal"
        head = bytes.fromhex("d9d505f920a163d7") + struct.pack(">5I", 0, 7, 0, 512, 4096)
        journal.write_bytes(head.ljust(512, b"\0"))  # of no pages, of an empty file
        assert told(restore(site))["deks"] == 4 and not journal.exists()
        checked(site.daemon)
        opens(site.daemon.start(), site.boxes)

    def test_on_a_new_host(self, site: Site) -> None:
        twin = site.daemon.copy(data=False)
        shutil.rmtree(twin.data_dir)
        try:
            told(twin.offline("restore", str(site.backup), "--json"))
            assert stat.S_IMODE(twin.data_dir.stat().st_mode) == 0o700
            assert stat.S_IMODE((twin.data_dir / "kms.db").stat().st_mode) == 0o600
            opens(twin.start(), site.boxes)
            twin.stop()
            checked(twin)
            assert [event["deks"] for event in events(twin, "restore")] == [4]
            done = twin.offline("audit", "verify", "--partial", str(site.daemon.audit_log))
            assert done.returncode == 0, (done.stdout, done.stderr)  # a log that was shipped here
        finally:
            twin.close()

    def test_with_the_log_of_the_old_host(self, site: Site) -> None:
        """The chains go on, and what the log says was shredded stays so."""
        shred(site.daemon, site.keys[0])
        site.daemon.stop()
        twin = site.daemon.copy(data=False)
        try:
            shutil.copy(site.daemon.audit_log, twin.audit_log)
            found = told(twin.offline("restore", str(site.backup), "--json"))
            assert (found["deks"], found["shredded"], found["shredded_since"]) == (3, 1, 1)
            assert traces(twin.data_dir, site.wrapped[site.keys[0]]) == []
            checked(twin)
            twin.start()
            assert state(twin, site.keys[0]) == "shredded"
            assert twin.request("POST", "/create_dek_for_thread", {"thread_id": "t"}).status == 200
            twin.stop()
            checked(twin)
        finally:
            twin.close()

    @pytest.mark.root
    def test_a_log_that_root_copied_here(self, site: Site) -> None:
        """Without it the shredded would come back: no fault that is to be forced, but one to mend."""
        shred(site.daemon, site.keys[0])
        site.daemon.stop()
        twin = site.daemon.copy(data=False)
        try:
            twin.home.chmod(0o755)
            for path in (twin.data_dir, twin.kek_file, twin.config_file):
                os.chown(path, 12345, 12345)
            write_secret(twin.audit_log, site.daemon.audit_log.read_bytes())
            for force in ([], ["--force"]):
                done = twin.offline("restore", str(site.backup), *force)
                assert done.returncode == 1 and f"chown 12345 {twin.audit_log}".encode() in done.stderr
            os.chown(twin.audit_log, 12345, 12345)
            assert told(twin.offline("restore", str(site.backup), "--json"))["shredded_since"] == 1
        finally:
            twin.close()

    def test_the_shredded_stay_shredded(self, site: Site) -> None:
        dead, scheduled, *live = site.keys
        with site.daemon.session() as kms:
            late = kms.create_dek("late")["key_id"]
        site.daemon.ok("DELETE", f"/deks/{scheduled}", {"pending_days": 9})
        shred(site.daemon, dead)
        shred(site.daemon, late)
        assert traces(site.backup.parent, site.wrapped[dead]), (
            "the scan finds nothing where there is something"
        )
        site.daemon.stop()
        assert "newer" in refused(restore(site))
        found = told(restore(site, "--force"))
        assert (found["deks"], found["shredded"], found["shredded_since"], found["lost"]) == (3, 2, 1, 1)
        assert traces(site.daemon.data_dir, site.wrapped[dead]) == []
        site.daemon.start()
        assert state(site.daemon, dead) == state(site.daemon, late) == "shredded"
        assert state(site.daemon, scheduled) == "pending_deletion"  # what was closed since stays so
        assert site.daemon.request("POST", "/deks", {"thread_id": "t", "key_id": dead}).status == 410
        opens(site.daemon, {key_id: site.boxes[key_id] for key_id in live})
        site.daemon.stop()
        checked(site.daemon)

    def test_the_present_store_knows_its_dead(self, site: Site) -> None:
        """Also where the audit log was moved away."""
        shred(site.daemon, site.keys[0])
        site.daemon.stop()
        site.daemon.audit_log.rename(site.daemon.home / "moved")
        assert told(restore(site))["shredded_since"] == 1
        assert traces(site.daemon.data_dir, site.wrapped[site.keys[0]]) == []
        assert state(site.daemon.start(), site.keys[0]) == "shredded"
        site.daemon.stop()
        checked(site.daemon)

    def test_the_present_store_knows_what_is_closed(self, site: Site) -> None:
        """Likewise: what was disabled, or scheduled, since."""
        disabled, due, *_ = site.keys
        site.daemon.ok("POST", f"/deks/{disabled}/disable", {})
        when = site.daemon.ok("DELETE", f"/deks/{due}", {"pending_days": 9})["delete_at"]
        site.daemon.stop()
        site.daemon.audit_log.rename(site.daemon.home / "moved")
        told(restore(site, "--force"))
        site.daemon.start()
        assert state(site.daemon, disabled) == "disabled"
        found = site.daemon.ok("GET", f"/deks/{due}")
        assert (found["state"], found["delete_at"]) == ("pending_deletion", when)
        site.daemon.stop()
        checked(site.daemon)

    def test_a_scheduled_deletion_goes_on(self, site: Site) -> None:
        site.daemon.ok("DELETE", f"/deks/{site.keys[0]}", {"pending_days": 9})
        site.backup.unlink()
        ok(site.daemon.offline("backup", str(site.backup)))
        site.daemon.stop()
        told(restore(site))
        checked(site.daemon)  # `verify` misses the row of the janitor's list where there is none
        assert state(site.daemon.start(), site.keys[0]) == "pending_deletion"

    @pytest.mark.parametrize("known_by", ["store", "log"])
    def test_a_deletion_that_was_called_off_or_put_off_since_does_not_come_back(
        self, site: Site, known_by: str
    ) -> None:
        """When its time of then has passed, the next start would shred what is in use."""
        with site.daemon.session() as kms:
            for key_id in site.keys:
                kms.ok("DELETE", f"/deks/{key_id}", {"pending_days": 1})
            site.backup.unlink()
            ok(site.daemon.offline("backup", str(site.backup)))
            off, closed, later, kept = site.keys
            for key_id in (off, closed):
                kms.ok("POST", f"/deks/{key_id}/enable")
            kms.ok("POST", f"/deks/{closed}/disable")
            kms.ok("DELETE", f"/deks/{later}", {"pending_days": 300})
            due = {key_id: kms.ok("GET", f"/deks/{key_id}")["delete_at"] for key_id in (later, kept)}
        site.daemon.stop()
        if known_by == "log":
            for path in site.daemon.data_dir.glob("kms.db*"):
                path.unlink()
        told(restore(site, "--force"))
        checked(site.daemon)
        site.daemon.start()
        states = ["disabled", "disabled", "pending_deletion", "pending_deletion"]
        assert [state(site.daemon, key_id) for key_id in site.keys] == states
        assert {key_id: site.daemon.ok("GET", f"/deks/{key_id}")["delete_at"] for key_id in due} == due
        site.daemon.ok("POST", f"/deks/{off}/enable")
        opens(site.daemon, {off: site.boxes[off]})

    def test_a_log_that_ends_before_the_backup_changes_nothing_of_it(self, site: Site) -> None:
        """It was not copied as late as the backup was made: the rows know better."""
        scheduled, enabled = site.keys[:2]
        with site.daemon.session() as kms:
            for key_id in (scheduled, enabled):
                kms.ok("DELETE", f"/deks/{key_id}", {"pending_days": 1})
            kms.ok("POST", f"/deks/{scheduled}/enable")
            log = site.daemon.audit_log.read_bytes()
            kms.ok("DELETE", f"/deks/{scheduled}", {"pending_days": 9})
            kms.ok("POST", f"/deks/{enabled}/enable")
        site.backup.unlink()
        ok(site.daemon.offline("backup", str(site.backup)))
        with contextlib.closing(site.daemon.copy(data=False)) as twin:
            write_secret(twin.audit_log, log)
            told(twin.offline("restore", str(site.backup), "--force", "--json"))
            twin.start()
            assert (state(twin, scheduled), state(twin, enabled)) == ("pending_deletion", "enabled")

    def edit(self, site: Site, **fields: str) -> None:
        """A row of the stopped daemon's store, of which the backup is made anew."""
        name = f"meta:{site.keys[0]}"
        with contextlib.closing(sqlite3.connect(site.daemon.data_dir / "kms.db")) as db:
            ((text,),) = db.execute("SELECT value FROM deks WHERE key = ?", (name,))
            row = json.dumps({**json.loads(text), **fields})
            db.execute("UPDATE deks SET value = ? WHERE key = ?", (row, name))
            db.commit()
        site.backup.unlink()
        ok(site.daemon.offline("backup", str(site.backup)))

    def test_an_edited_row_comes_back_disabled_whatever_it_says(self, site: Site) -> None:
        """A deletion that somebody wrote into it would shred the DEK at the next start."""
        site.daemon.stop()
        before = (site.daemon.data_dir / "kms.db").stat().st_ino
        self.edit(site, state="pending_deletion", delete_at="2026-01-01T00:00:00.000000Z")
        assert "was changed after it was made" in refused(restore(site))
        assert (site.daemon.data_dir / "kms.db").stat().st_ino == before
        assert told(restore(site, "--force"))["damaged"] == site.keys[:1]
        checked(site.daemon)
        assert state(site.daemon.start(), site.keys[0]) == "disabled"

    def test_a_tombstone_that_somebody_wrote_shreds_nothing(self, site: Site, short_tmp: Path) -> None:
        """It would stay, whatever older backup is brought back after this one."""
        whole = Path(shutil.copy2(site.backup, short_tmp / "whole"))
        site.daemon.stop()
        self.edit(site, state="shredded", wrapped="", shredded_at="2026-01-01T00:00:00.000000Z")
        found = told(restore(site, "--force"))
        assert found["damaged"] == site.keys[:1] and (found["deks"], found["shredded"]) == (3, 0)
        checked(site.daemon)
        assert told(restore(site._replace(backup=whole)))["deks"] == 4
        opens(site.daemon.start(), site.boxes)

    @pytest.mark.parametrize(
        "change",
        [
            "value = replace(value, '\"state\"', '\"stote\"')",
            "value = replace(value, '\"format\":1', '\"format\":9')",
            "value = substr(value, 1, 40)",
            "value = NULL",
            "key = CAST(substr(CAST(key AS BLOB), 1, 30) || x'ff' AS TEXT)",
        ],
    )
    def test_a_row_that_cannot_be_read_keeps_no_other_away(self, site: Site, change: str) -> None:
        """The disk lost a byte of it, and no backup from then on could be restored, not even by --force."""
        site.daemon.stop()
        bad = site.keys[0]
        with contextlib.closing(sqlite3.connect(site.daemon.data_dir / "kms.db")) as db, db:
            db.execute(f"UPDATE deks SET {change} WHERE key = ?", (f"meta:{bad}",))
        site.backup.unlink()
        ok(site.daemon.offline("backup", str(site.backup)))
        checked = site.daemon.offline("backup", "--check", str(site.backup))
        assert f"{bad[:25]}" in refused(checked) and "its row can't be read" in checked.stderr.decode()
        with contextlib.closing(site.daemon.copy(data=False)) as twin:
            new = site._replace(daemon=twin)
            assert "--force takes it" in refused(restore(new))
            found = told(restore(new, "--force"))
            assert found["deks"] == 3 and [name[:25] for name in found["damaged"]] == [bad[:25]]
            opens(twin.start(), {key_id: site.boxes[key_id] for key_id in site.keys[1:]})
            twin.stop()
            ok(twin.offline("verify"))

    def test_a_row_that_names_a_kek_which_never_was(self, site: Site) -> None:
        """The next start asked for it."""
        site.daemon.stop()
        self.edit(site, kek_id="0" * 16)
        assert told(restore(site, "--force"))["damaged"] == site.keys[:1]
        checked(site.daemon)
        site.daemon.start().ok("POST", f"/deks/{site.keys[0]}/enable", {})
        opens(site.daemon, site.boxes)

    def test_a_master_key_that_was_rotated_out_since_the_backup(self, site: Site) -> None:
        """The backup knows nothing of that, the present store does: it was told when that was gone."""
        daemon, keks = site.daemon, [site.daemon.kek, os.urandom(32), os.urandom(32)]
        with daemon.session() as kms:
            kms.rotate(keks[1])
            kms.rotate(keks[2])
        daemon.stop()
        for name, kek in zip(("first", "last"), (keks[0], keks[2])):
            write_secret(daemon.home / name, kek.hex().encode())
        daemon.write_kek(keks[1])
        daemon.write_config({"previous_master_keys": [{"file": "first"}, {"file": "last"}]})
        before = contents(daemon.data_dir)["kms.db"]
        assert "was rotated out" in refused(restore(site, "--force"))
        assert contents(daemon.data_dir)["kms.db"] == before
        daemon.write_kek(keks[2])
        told(restore(site, "--force"))
        opens(daemon.start(), site.boxes)

    def test_a_row_that_stands_twice_is_one_dek(self, site: Site, short_tmp: Path) -> None:
        """A database of ours has no such row: somebody made it, who then has the store add up to too much."""
        site.daemon.stop()
        body, _, line = site.backup.read_bytes()[:-1].rpartition(b"\n")
        (short_tmp / "db").write_bytes(body)
        with contextlib.closing(sqlite3.connect(short_tmp / "db")) as db:
            db.execute("CREATE TABLE twice AS SELECT * FROM deks UNION ALL SELECT * FROM deks")
            db.execute("DROP TABLE deks")
            db.execute("ALTER TABLE twice RENAME TO deks")
            db.commit()
        body = (short_tmp / "db").read_bytes()
        site.backup.write_bytes(resealed(body + b"\n" + line + b"\n", size=len(body)))
        told(restore(site, "--force"))
        checked(site.daemon)
        opens(site.daemon.start(), site.boxes)

    def test_newer_deks_need_force(self, site: Site) -> None:
        with site.daemon.session() as kms:
            late = kms.create_dek("late")["key_id"]
        site.daemon.stop()
        before = contents(site.daemon.data_dir)
        assert late in (error := refused(restore(site))) and "`import` of that export" in error
        assert contents(site.daemon.data_dir)["kms.db"] == before["kms.db"]
        lines = str(site.daemon.home / "lines")
        ok(site.daemon.offline("export", lines))
        assert told(restore(site, "--force"))["lost"] == 1
        assert state(site.daemon.start(), late) == "404"
        site.daemon.stop()
        ok(site.daemon.offline("import", lines))
        checked(site.daemon)
        assert state(site.daemon.start(), late) == "enabled"
        opens(site.daemon, site.boxes)

    def test_from_before_a_rotation(self, site: Site) -> None:
        daemon, old = site.daemon, site.daemon.kek
        new = os.urandom(32)
        with daemon.session() as kms:
            kms.rotate(new)
        daemon.stop()
        daemon.write_kek(new)
        assert "needs other keys" in refused(restore(site, "--force"))
        write_secret(daemon.home / "old", old.hex().encode())
        daemon.write_config({"previous_master_keys": [{"file": str(daemon.home / "old")}]})
        told(restore(site, "--force"))
        checked(daemon)
        opens(daemon.start(), site.boxes)
        daemon.stop()
        checked(daemon)

    def test_what_was_rotated_out_stays_so_on_a_new_host(self, site: Site) -> None:
        """Only the backup knows it there."""
        daemon, old, new = site.daemon, site.daemon.kek, os.urandom(32)
        with daemon.session() as kms:
            kms.rotate(new)
        site.backup.unlink()
        ok(daemon.offline("backup", str(site.backup)))
        daemon.stop()
        with contextlib.closing(daemon.copy(data=False)) as twin:
            twin.write_kek(new)
            told(restore(site._replace(daemon=twin)))
            write_secret(twin.home / "new", new.hex().encode())
            twin.write_kek(old)
            twin.write_config({**twin.config, "previous_master_keys": [{"file": str(twin.home / "new")}]})
            assert "was rotated out on" in twin.refusal().stderr

    def test_a_dek_that_did_not_open_when_it_was_made_is_named(self, site: Site) -> None:
        daemon, lost = site.daemon, site.keys[0]
        daemon.ok("POST", "/rewrap", {"key_id": lost, "new_kek_hex": os.urandom(32).hex()})
        site.backup.unlink()
        ok(daemon.offline("backup", str(site.backup)))
        daemon.stop()
        daemon.write_config({**daemon.config, "allow_missing_keks": True})
        found = told(restore(site))
        assert (found["deks"], found["damaged"]) == (4, [lost])

    def test_after_the_new_kek_was_lost(self, site: Site) -> None:
        """The present store's audit key is wrapped under a KEK that nobody has; the backup holds it too."""
        with site.daemon.session() as kms:
            kms.rotate(os.urandom(32))
        site.daemon.stop()
        told(restore(site, "--force"))
        checked(site.daemon)
        opens(site.daemon.start(), site.boxes)

    @pytest.mark.parametrize("what", ["data-dir", "kms.db"])
    def test_an_immutable_folder_or_store(self, site: Site, what: str) -> None:
        site.daemon.stop()
        path = site.daemon.data_dir if what == "data-dir" else site.daemon.data_dir / what
        if subprocess.run(["chattr", "+i", str(path)], capture_output=True, check=False).returncode:
            pytest.skip("files can't be made immutable here")
        try:
            for more in ([], ["--force"]):
                error = refused(restore(site, *more))
                assert str(path) in error and "is it immutable?" in error
        finally:
            subprocess.run(["chattr", "-i", str(path)], check=True)
        told(restore(site))

    def test_a_folder_that_is_mounted_read_only(self, site: Site) -> None:
        site.daemon.stop()
        with Tmpfs() as disk:
            twin = Daemon(home=disk.path, workers=1, kek=site.daemon.kek)
            twin.data_dir.mkdir(0o700, exist_ok=True)
            disk.readonly(True)
            error = refused(twin.offline("restore", str(site.backup)))
            assert f"data_dir {twin.data_dir} can't be used: Read-only" in error and "findmnt -T" in error
            disk.readonly(False)
            twin.close()

    def test_other_keys_than_the_backup_needs(self, site: Site) -> None:
        twin = site.daemon.copy(data=False)
        try:
            twin.write_kek(os.urandom(32))
            error = refused(twin.offline("restore", str(site.backup)))
            assert site.daemon.ok("GET", "/status")["kek_id"] in error
            assert "4 DEKs need it" in error
            assert os.listdir(twin.data_dir) == []
        finally:
            twin.close()

    def test_an_unreadable_store_needs_force(self, site: Site) -> None:
        shred(site.daemon, site.keys[0])
        site.daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "late"})
        site.daemon.kill()
        assert (site.daemon.data_dir / "kms.db-wal").stat().st_size
        (site.daemon.data_dir / "kms.db-wal").write_bytes(bytes(40))
        write_secret(site.daemon.data_dir / "kms.db", bytes(24576))
        assert "can't be read" in refused(restore(site))
        assert told(restore(site, "--force"))["shredded_since"] == 1
        checked(site.daemon)
        assert state(site.daemon.start(), site.keys[0]) == "shredded"

    def test_a_store_whose_row_key_is_damaged(self, site: Site) -> None:
        """It was told to look for a KEK, and the one that it names was there."""
        site.daemon.stop()
        with contextlib.closing(sqlite3.connect(site.daemon.data_dir / "kms.db")) as db, db:
            ((text,),) = db.execute("SELECT value FROM kms WHERE key = 'row:key'")
            row = json.loads(text)
            row["wrapped"] = row["wrapped"][:-8] + row["wrapped"][-8:].swapcase()
            db.execute("UPDATE kms SET value = ? WHERE key = 'row:key'", (json.dumps(row),))
        error = refused(restore(site))
        assert "its row key does not open under the KEK that it names" in error
        assert "copy the whole data-dir to another disk" in error and "previous_master_keys" not in error
        assert told(restore(site, "--force"))["deks"] == 4
        opens(site.daemon.start(), site.boxes)

    def test_a_log_without_its_tombstone_needs_force(self, site: Site) -> None:
        shred(site.daemon, site.keys[0])
        site.daemon.stop()
        for path in site.daemon.data_dir.glob("kms.db*"):
            path.unlink()
        lines = site.daemon.audit_log.read_text().splitlines(keepends=True)
        site.daemon.audit_log.write_text("".join(line for line in lines if '"op":"shred"' not in line))
        error = refused(restore(site))
        assert "what was shredded is not sure" in error
        assert not (site.daemon.data_dir / "kms.db").exists()
        told(restore(site, "--force"))

    def test_it_is_in_the_audit_log(self, site: Site) -> None:
        site.daemon.stop()
        about = told(restore(site))
        (event,) = events(site.daemon, "restore")
        assert (event["deks"], event["created_at"]) == (4, about["created_at"])
        site.daemon.start()
        site.daemon.stop()
        assert len(events(site.daemon, "restore")) == 1


# ---- a file that is no backup of ours ----------------------------------------------------------------


def resealed(data: bytes, **fields: Any) -> bytes:
    """As somebody would make it who knows how: the sum fits what the line says."""
    body, _, line = data[:-1].rpartition(b"\n")
    values = {**json.loads(line), **fields}

    def end() -> bytes:
        return b"\n" + json_dumps(values).encode() + b"\n"

    values["sha256"] = ""
    values["sha256"] = hashlib.sha256(body + end()).hexdigest()
    return body + end()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def with_trailer(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    body, _, line = data[:-1].rpartition(b"\n")
    values = json.loads(line)
    change(values)
    return body + b"\n" + json.dumps(values, separators=(",", ":")).encode() + b"\n"


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-1],
    "longer": lambda data: data + b"\n",
    "a bit of the header": lambda data: flipped(data, 20),
    "a bit of a row": lambda data: flipped(data, data.index(b'"thread_id"') + 3),
    "a bit of the line": lambda data: flipped(data, len(data) - 40),
    "bytes put in": lambda data: data[:5000] + b"x" + data[5000:],
    "another schema": lambda data: with_trailer(data, lambda values: values.update(schema=99)),
    "another format": lambda data: with_trailer(data, lambda values: values.update(progressdb_kms_backup=2)),
    "no checksum": lambda data: with_trailer(data, lambda values: values.pop("sha256")),
    "a count that is none": lambda data: resealed(data, deks="1"),
    "a count of a KEK that is none": lambda data: resealed(data, keks={"0" * 16: True}),
    "a time that is none": lambda data: resealed(data, created_at=None),
    "text": lambda data: b"SQLite format 3\0 this is none\n{}\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_changes_nothing(site: Site, damage: str) -> None:
    site.daemon.stop()
    site.backup.write_bytes(DAMAGE[damage](site.backup.read_bytes()))
    before = contents(site.daemon.data_dir)
    refused(restore(site, "--force"))
    assert contents(site.daemon.data_dir) == before


def test_the_store_itself_is_no_backup(site: Site) -> None:
    site.daemon.stop()
    file = site.daemon.home / "copy.db"
    shutil.copy(site.daemon.data_dir / "kms.db", file)
    assert "no whole file" in refused(site.daemon.offline("restore", str(file), "--force"))


# ---- killed ------------------------------------------------------------------------------------------


def killed_restores(site: Site, pick: Callable[[Any], Sequence[Step]]) -> None:
    """Killed at a step, the data-dir holds the old store or the new one, and neither has the shredded DEK."""
    need_strace()
    daemon, dead = site.daemon, site.keys[0]
    shred(daemon, dead)
    with daemon.session() as kms:
        late = kms.create_dek("late")["key_id"]
        late_box = kms.encrypt(late, late.encode())
    daemon.stop()
    shutil.copytree(daemon.data_dir, daemon.home / "before")

    def again() -> None:
        shutil.rmtree(daemon.data_dir)
        shutil.copytree(daemon.home / "before", daemon.data_dir)

    steps = steps_of(lambda wrapper: restore(site, "--force", wrapper=wrapper), daemon.data_dir)
    assert len(steps) >= 10, [str(step) for step in steps]
    seen = set()
    for step in pick(steps):
        again()
        done = restore(site, "--force", wrapper=killing(step))
        assert done.returncode == -signal.SIGKILL, f"not killed at {step}: {done.stderr!r}"
        assert traces(daemon.data_dir, site.wrapped[dead]) == [], f"killed at {step}"
        daemon.start()
        assert state(daemon, dead) == "shredded", f"killed at {step}"
        opens(daemon, {key_id: box for key_id, box in site.boxes.items() if key_id != dead})
        new = state(daemon, late) == "404"
        if not new:
            opens(daemon, {late: late_box})
        daemon.stop()
        assert bool(events(daemon, "restore")) == new, f"killed at {step}"
        assert not (daemon.data_dir / ".kms-restore").exists()
        checked(daemon)
        seen.add(new)
    assert seen == {False, True}


def test_a_full_disk_is_told_with_what_was_done(site: Site) -> None:
    """`No space left on device`, of no file; `the store can't do that now`, where it was restored."""
    need_strace()
    daemon = site.daemon
    daemon.stop()
    steps = steps_of(lambda wrapper: restore(site, wrapper=wrapper), daemon.data_dir)
    swap = next(at for at, step in enumerate(steps) if step.name == "rename")

    def first(name: str, file: str, since: int = 0) -> Step:
        return next(step for step in steps[since:] if step.name == name and f"/{file}>" in step.text)

    lock = refused(restore(site, wrapper=failing(first("pwrite64", "kms.lock"))))
    assert f"data_dir {daemon.data_dir} can't be used: No space left" in lock
    built = refused(restore(site, wrapper=failing(first("fsync", ".kms-restore/kms.db"))))
    assert f"{daemon.data_dir}/kms.db: No space left" in built
    done = refused(restore(site, wrapper=failing(first("pwrite64", "kms.db-wal", swap))))
    assert (
        "the backup was restored, but that is not in the audit log yet: the store can't do that now" in done
    )
    daemon.start()
    assert len(events(daemon, "restore")) == 2
    opens(daemon, site.boxes)


def test_a_disk_that_is_full_when_the_new_store_goes_into_its_file(site: Site) -> None:
    """SQLite's own move, at a close, fails unheard: a part of a store took the place of a whole one."""
    need_strace()
    daemon = site.daemon
    daemon.stop()
    steps = steps_of(lambda wrapper: restore(site, wrapper=wrapper), daemon.data_dir)
    moved = [step for step in steps if step.name == "pwrite64" and "/.kms-restore/kms.db>" in step.text]
    assert "disk is full" in refused(restore(site, wrapper=failing(moved[-1])))
    daemon.start()
    opens(daemon, site.boxes)
    daemon.stop()
    told(restore(site))
    checked(daemon)


def test_a_present_store_whose_log_is_not_in_its_file_stays(site: Site) -> None:
    """It went before the new store was there, and with it what a rename that failed would have left."""
    daemon = site.daemon
    with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM deks LIMIT 1").fetchall()
        later = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "later"})["key_id"]
        daemon.stop()
        log = (daemon.data_dir / "kms.db-wal").read_bytes()
        for more in ([], ["--force"]):
            told_so = refused(restore(site, *more))
            assert "kms.db-wal could not be moved" in told_so and "restore again" in told_so
            assert (daemon.data_dir / "kms.db-wal").read_bytes() == log
    daemon.start()
    opens(daemon, site.boxes)
    assert daemon.ok("GET", f"/deks/{later}")["state"] == "enabled"
    daemon.stop()
    told(restore(site, "--force"))
    checked(daemon)


def test_killed_at_some_steps(site: Site) -> None:
    killed_restores(site, lambda steps: steps.spread(ROUNDS))


@pytest.mark.long
def test_killed_at_every_step(site: Site) -> None:
    killed_restores(site, lambda steps: steps)
