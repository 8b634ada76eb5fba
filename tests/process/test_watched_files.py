"""Files of the store that are taken away, replaced or cut under the daemon: no change is acknowledged any
more, reads go on, and what was open is rescued to a file that `restore` takes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from tests.conftest import MakeDaemon
from tests.harness import Daemon, Session
from tests.harness.faults import Tmpfs
from tests.harness.kept import Kept
from tests.harness.procs import wait_until


def replaced(path: Path) -> None:
    """By a copy of itself, as a careless restore would do."""
    shutil.copyfile(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def moved(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(workers=2) as daemon:
        wait_until(lambda: len(daemon.pids()) == 4, 60, "all processes")  # one that comes later is refused
        yield daemon


def reasons(kms: Session) -> list[str]:
    reply = kms.request("GET", "/readyz")
    found: list[str] = reply.json()["reasons"]
    assert reply.status == (503 if found else 200)
    return found


def refused(kms: Session) -> str:
    reply = kms.request("POST", "/create_dek_for_thread", {"thread_id": "t"})
    assert reply.status == 503 and reply.code == "store_unavailable", reply
    message: str = reply.json()["error"]["message"]
    return message


def rescued(daemon: Daemon) -> list[Path]:
    return list(daemon.data_dir.glob("kms-rescue-*.db"))


@pytest.mark.parametrize("table", ["deks", "kms", "usage"])
def test_a_table_that_is_taken_away(make_daemon: MakeDaemon, table: str) -> None:
    """By another program. It stayed ready, while no call could be served."""
    daemon = make_daemon(workers=1)

    def rename(old: str, new: str) -> None:
        with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db", timeout=60)) as db, db:
            db.execute(f"ALTER TABLE {old} RENAME TO {new}")

    with daemon.session() as kms:
        kms.create_dek("t")
        rename(table, "taken")
        wait_until(lambda: any(f"no such table: {table}" in why for why in reasons(kms)), 60, "the reason")
        assert f"no such table: {table}" in refused(kms)
    if table == "deks":
        daemon.stop()
        daemon.start()
    with daemon.session() as kms:
        wait_until(lambda: any(f"no such table: {table}" in why for why in reasons(kms)), 60, "the reason")
        rename("taken", table)  # none was made in its place
        wait_until(lambda: reasons(kms) == [], 60, "readiness")
        kms.create_dek("t")


HARMS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "unlinked": ("kms.db", Path.unlink, "removed"),
    "moved away": ("kms.db", moved, "moved away"),
    "replaced": ("kms.db", replaced, "replaced"),
    "a link in its place": ("kms.db", linked, "symbolic link"),
    "the log unlinked": ("kms.db-wal", Path.unlink, "removed"),
    "the log replaced": ("kms.db-wal", replaced, "replaced"),
    "the index unlinked": ("kms.db-shm", Path.unlink, "removed"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_taken_away(daemon: Daemon, harm: str) -> None:
    file, do, says = HARMS[harm]
    kept = Kept()
    with daemon.session() as kms:
        kept.create(kms, 20)
        do(daemon.data_dir / file)
        assert file in (why := refused(kms)) and says in why
        wait_until(lambda: len(rescued(daemon)) == 1, 60, "the rescue")
        wait_until(lambda: "restore" in " ".join(reasons(kms)), 60, "the reason")
        assert file in reasons(kms)[0]
        kept.opens(kms)
        time.sleep(1.2)  # it looks each second
    (rescue,) = rescued(daemon)
    assert stat.S_IMODE(rescue.stat().st_mode) == 0o600
    assert f"progressdb-kms restore {rescue}" in daemon.stderr
    daemon.kill()
    (daemon.data_dir / "kms.db").unlink(missing_ok=True)
    done = daemon.offline("restore", str(rescue))
    assert done.returncode == 0, done.stderr
    daemon.start()
    with daemon.session() as kms:
        kept.opens(kms)
        assert reasons(kms) == []
        kept.create(kms, 2)
    kept.verifies(daemon)


@pytest.mark.root
@pytest.mark.parametrize("ends", [False, True])
def test_a_rescue_for_which_there_is_no_room_yet(make_daemon: MakeDaemon, ends: bool) -> None:
    """It was tried once, and at the end of the daemon all of it was gone."""
    with Tmpfs(4 << 20) as disk:
        daemon = make_daemon(home=disk.path, workers=2, start=False).start()
        kept = Kept()
        with daemon.session() as kms:
            kept.create(kms, 20)
            disk.fill()
            daemon.data_dir.joinpath("kms.db").unlink()
            wait_until(lambda: "full" in " ".join(reasons(kms)[1:]), 60, "it to be told")
            assert rescued(daemon) == []
        disk.drain()
        if ends:
            daemon.stop()
        wait_until(lambda: len(rescued(daemon)) == 1, 120, "the rescue")
        if not ends:
            daemon.stop()
        done = daemon.offline("restore", str(rescued(daemon)[0]))
        assert done.returncode == 0, done.stderr
        daemon.start()
        with daemon.session() as kms:
            kept.opens(kms)
        daemon.stop()


def test_a_shred_reaches_what_was_rescued(daemon: Daemon) -> None:
    with daemon.session() as kms:
        key, other = (kms.create_dek("t")["key_id"] for _ in range(2))
        piece = kms.get_wrapped(key)["wrapped"].encode()[-64:-4]
        daemon.data_dir.joinpath("kms.db").rename(daemon.data_dir / "elsewhere")
        wait_until(lambda: len(rescued(daemon)) == 1, 60, "the rescue")
        (rescue,) = rescued(daemon)
        assert piece in rescue.read_bytes()
        left = rescue.with_name("kms-rescue-20250101T000000Z.db.part")  # of one that was killed at its end
        left.write_bytes(rescue.read_bytes())
        daemon.data_dir.joinpath("elsewhere").rename(daemon.data_dir / "kms.db")
        wait_until(lambda: reasons(kms) == [], 60, "readiness")
        kms.ok("DELETE", f"/deks/{key}", {"immediately": True})
        assert piece not in rescue.read_bytes() and not left.exists()
        with contextlib.closing(sqlite3.connect(rescue)) as db:
            assert db.execute("SELECT key FROM deks").fetchall() == [(f"meta:{other}",)]


def test_put_back_in_time(daemon: Daemon) -> None:
    kept = Kept()
    with daemon.session() as kms:
        kept.create(kms, 2)
        moved(daemon.data_dir / "kms.db")
        refused(kms)
        wait_until(lambda: len(rescued(daemon)) == 1, 60, "the rescue")
        assert "put the store's files back" in " ".join(reasons(kms))
        (daemon.data_dir / "elsewhere").rename(daemon.data_dir / "kms.db")
        kept.create(kms, 2)
        assert reasons(kms) == []
        kept.opens(kms)
    wait_until(
        lambda: "again: remove what was rescued, it is behind now" in daemon.stderr, 60, "it to be told"
    )
    kept.verifies(daemon)


def test_an_empty_store_in_the_place_of_its_own(daemon: Daemon) -> None:
    """All of it is gone, and the keeper too: another one made new keys of its own, over those in memory."""
    with daemon.session() as kms:
        key = kms.create_dek("t")["key_id"]
        kept = daemon.home / "kept"
        kept.mkdir()
        for path in daemon.data_dir.iterdir():
            if path.name not in ("kms.lock", "kms.host"):
                path.rename(kept / path.name)
        os.kill(daemon.pids()[1], signal.SIGKILL)
        wait_until(lambda: "no change can be made" in daemon.stderr, 60, "it to be told")
        assert "empty store, and the daemon had another one" in daemon.stderr
        for path in daemon.data_dir.glob("kms[.-][da]*"):
            path.unlink()
        for path in kept.iterdir():
            path.rename(daemon.data_dir / path.name)
        wait_until(lambda: create_status(daemon) == 200, 60, "all to go on")
        kms.encrypt(key, b"")
    daemon.stop()
    assert daemon.offline("audit", "verify").returncode == 0


@pytest.mark.parametrize("file", ["kms.db", "kms.db-wal"])
def test_cut(daemon: Daemon, file: str) -> None:
    with daemon.session() as kms:
        for _ in range(30):
            kms.create_dek("t" * 100)
        if file == "kms.db":
            with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db")) as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            kms.create_dek("t")
        size = (daemon.data_dir / file).stat().st_size
        os.truncate(daemon.data_dir / file, size // 2)
        assert f"{file} was cut" in refused(kms)
        assert f"{file} was cut" in reasons(kms)[0]
        page = kms.request("GET", "/metrics")
        assert page.status == 200 and b"\nprogressdb_kms_ready 0\n" in page.body
        wait_until(lambda: "rescue" in daemon.stderr, 60, "to be told")
        assert daemon.alive


def test_the_folder_moved_away(daemon: Daemon) -> None:
    """What is told of it must not need it."""
    elsewhere = daemon.home / "elsewhere"
    with daemon.session() as kms:
        kms.create_dek("t")
        daemon.data_dir.rename(elsewhere)
        wait_until(lambda: kms.request("GET", "/readyz").status == 503, 20, "it to be noticed")
        page = kms.request("GET", "/metrics")
        assert page.status == 200 and b"\nprogressdb_kms_ready 0\n" in page.body
        assert b"disk_free_bytes" not in page.body
        refused(kms)
        wait_until(lambda: "can't be rescued now" in daemon.stderr, 60, "it to be told")
        elsewhere.rename(daemon.data_dir)
        wait_until(lambda: reasons(kms) == [], 60, "readiness")
        wait_until(lambda: "over: don't stop the daemon" in daemon.stderr, 60, "the advice to be taken back")
        kms.create_dek("t")
    daemon.stop()
    assert daemon.stderr.count("not ready: ") == 1, daemon.stderr
    assert rescued(daemon) == [] and "what the daemon held" not in daemon.stderr  # it is behind the store


@pytest.mark.root
@pytest.mark.parametrize("dies", [False, True], ids=["", "and its keeper dies"])
def test_a_folder_that_comes_late(daemon: Daemon, dies: bool) -> None:
    """The daemon was started before its disk was mounted, and began a store there. Then it came, and records
    went into the audit log of the other store, by another key: that one never verified again."""
    there, late, here = Kept(), daemon.home / "late", daemon.home / "here"
    with daemon.session() as kms:
        there.create(kms, 3)
    daemon.kill()
    daemon.data_dir.rename(late)
    log, wal = ((late / name).read_bytes() for name in ("kms-audit.log", "kms.db-wal"))
    daemon.start()
    begun = Kept()
    with daemon.session() as kms:
        begun.create(kms, 2)
        keeper = daemon.writer
        daemon.data_dir.rename(here)
        late.rename(daemon.data_dir)
        wait_until(lambda: len(rescued(daemon)) == 1 and "progressdb-kms restore" in daemon.stderr, 60, "it")
        begun.opens(kms)
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: "SIGHUP" in daemon.stderr, 60, "the reload")
        if dies:
            os.kill(keeper, signal.SIGKILL)
            wait_until(lambda: "mounted over: put it back" in daemon.stderr, 60, "another one to look")
        begun.opens(kms)
    daemon.stop()
    (rescue,) = rescued(daemon)
    assert daemon.audit_log.read_bytes() == log and (daemon.data_dir / "kms.db-wal").read_bytes() == wal
    assert dies or b'"op":"stop"' in (here / "kms-audit.log").read_bytes()
    daemon.start()
    with daemon.session() as kms:
        there.opens(kms)
    there.verifies(daemon)
    done = daemon.offline("restore", str(rescue))
    assert done.returncode == 1 and b"`import` of that export" in done.stderr
    lines = str(daemon.home / "lines")
    for words in (("export", lines), ("restore", "--force", str(rescue)), ("import", lines)):
        assert (done := daemon.offline(*words)).returncode == 0, done.stderr
    daemon.start()
    with daemon.session() as kms:
        there.opens(kms)
        begun.opens(kms)
    begun.verifies(daemon)


def create_status(daemon: Daemon) -> int:
    return daemon.request("POST", "/create_dek_for_thread", {"thread_id": "t"}).status


def test_another_folder_in_the_place_of_its_own(daemon: Daemon) -> None:
    """As where its file system is unmounted: below it is an empty one. A keeper that came there began a store
    with keys of its own, over those in memory, by which records were signed from then on; and a shred that
    was refused was told as one that is due."""
    elsewhere, below = daemon.home / "elsewhere", daemon.home / "below"
    with daemon.session() as kms:
        key = kms.create_dek("t")["key_id"]
        daemon.data_dir.rename(elsewhere)
        daemon.data_dir.mkdir(mode=0o700)
        kms.encrypt(key, b"")
        assert kms.request("DELETE", f"/deks/{key}", {"immediately": True}).status == 503
        daemon.signal(signal.SIGHUP)  # says nothing about which folder it is
        wait_until(lambda: len(rescued(daemon)) == 1 == len(os.listdir(daemon.data_dir)), 60, "the rescue")
        for pid in daemon.pids()[1:]:  # the keeper, and all workers
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "no change can be made" in daemon.stderr, 60, "it to be told")
        wait_until(lambda: create_status(daemon) == 503, 60, "callers to hear it")
        assert os.listdir(daemon.data_dir) == [rescued(daemon)[0].name]
        daemon.data_dir.rename(below)
        elsewhere.rename(daemon.data_dir)
    wait_until(lambda: create_status(daemon) == 200, 60, "all to go on")
    with daemon.session() as kms:
        kms.encrypt(key, b"")
    daemon.stop()
    said = daemon.stderr
    assert "copies of shredded DEKs" not in said and said.count("not ready: ") == 1, said
    assert said.count("no change can be made, and it is tried again: ") == 1, said
    assert said.count("ERROR: a worker is missing: ") == said.count("over: a worker is missing") <= 1, said
    assert daemon.offline("audit", "verify").returncode == 0


def test_the_lock_removed(daemon: Daemon) -> None:
    """Nobody else starts there, and the daemon says what happened."""
    with daemon.session() as kms:
        kms.create_dek("t")
        (daemon.data_dir / "kms.lock").unlink()
        assert "kms.lock" in refused(kms)
        assert "kms.lock was removed" in reasons(kms)[0]
        assert rescued(daemon) == []
    second = Daemon(kek=daemon.kek, args=["--data-dir", str(daemon.data_dir)])
    second.write_config({"data_dir": str(daemon.data_dir)})
    assert "is in use" in str(second.refusal())


def test_under_load(daemon: Daemon) -> None:
    """Whatever was acknowledged before or while the file went is in the rescue."""
    acknowledged: list[str] = []

    def work() -> None:
        with daemon.session() as kms:
            while True:
                reply = kms.request("POST", "/create_dek_for_thread", {"thread_id": "t"})
                if reply.status != 200:
                    return
                acknowledged.append(reply.json()["key_id"])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    (daemon.data_dir / "kms.db").unlink()
    for thread in threads:
        thread.join(30)
    wait_until(lambda: len(rescued(daemon)) == 1, 60, "the rescue")
    with contextlib.closing(sqlite3.connect(rescued(daemon)[0])) as db:
        found = {row[0][5:] for row in db.execute("SELECT key FROM deks")}
    assert len(acknowledged) > 50 and set(acknowledged) <= found


@pytest.mark.parametrize("harm", [replaced, Path.unlink])
@pytest.mark.parametrize("command", [("backup", "HOME/copy"), ("export", "HOME/exported"), ("verify",)])
def test_commands_beside_it_read_no_other_files(
    daemon: Daemon, command: tuple[str, ...], harm: Callable[[Path], object]
) -> None:
    words = [word.replace("HOME", str(daemon.home)) for word in command]
    with daemon.session() as kms:
        kms.create_dek("t")
        assert daemon.offline(*words).returncode == 0
        harm(daemon.data_dir / "kms.db")
        words = [word.replace("copy", "copy2").replace("exported", "exported2") for word in words]
        done = daemon.offline(*words)
        assert done.returncode == 1 and b"other file" in done.stderr, done.stderr
        assert not (daemon.home / "copy2").exists()


class TestWhatOthersMayDo:
    """A foreign checkpoint cuts the log to nothing, a VACUUM makes the file shorter: both are right."""

    @pytest.mark.parametrize(
        "mode",
        [
            "PASSIVE",
            pytest.param("FULL", marks=pytest.mark.long),
            pytest.param("RESTART", marks=pytest.mark.long),
            "TRUNCATE",
        ],
    )
    def test_a_checkpoint(self, daemon: Daemon, mode: str) -> None:
        self.look(daemon, f"PRAGMA wal_checkpoint({mode})")

    def test_a_vacuum(self, daemon: Daemon) -> None:
        self.look(daemon, "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)")

    def look(self, daemon: Daemon, *statements: str) -> None:
        kept = Kept()
        with daemon.session() as kms:
            kms.ok("GET", "/status")
            for _ in range(2):
                kept.create(kms, 3)
                for _ in range(60):
                    kms.create_dek("t" * 200)
                kms.rotate(os.urandom(32))  # and free pages for a VACUUM to cut off
                with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db", timeout=30)) as db:
                    for statement in statements:
                        db.execute(statement)
                kept.create(kms, 2)
                time.sleep(1.2)
                assert reasons(kms) == []
            kept.opens(kms)
        assert "under the daemon" not in daemon.stderr and rescued(daemon) == []
