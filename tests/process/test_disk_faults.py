"""A full disk, failing writes and syncs, a read-only or damaged data-dir, a clock set back: the caller that
was hit hears of it, nobody waits for ever, nothing acknowledged is lost, and it goes on when it can."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from progressdb_kms.audit.log import ROOM
from progressdb_kms.service.anchors import SYNC_SECONDS
from progressdb_kms.service.shredding import JANITOR_SECONDS
from tests.harness import Daemon
from tests.harness.daemon import DaemonFailed, cli, write_secret
from tests.harness.faults import Shim, Tmpfs
from tests.harness.kept import Kept
from tests.harness.procs import wait_until
from tests.harness.wire import Reply, b64


def changes(key: str) -> list[tuple[str, str, Any]]:
    """A call of each kind that writes to the store."""
    return [
        ("POST", "/create_dek_for_thread", {"thread_id": "t"}),
        ("POST", f"/deks/{key}/disable", None),
        ("DELETE", f"/deks/{key}", None),
        ("POST", "/rewrap", {"key_id": key, "new_kek_hex": os.urandom(32).hex()}),
        ("POST", "/rotate_kek", {"new_kek_hex": os.urandom(32).hex()}),
    ]


def refused(reply: Reply) -> None:
    assert reply.status == 503 and reply.code in ("store_unavailable", "audit_unavailable"), reply
    assert reply.json()["error"]["hint"]


class TestFullDisk:
    @pytest.fixture
    def disk(self) -> Iterator[Tmpfs]:
        with Tmpfs(8 << 20) as disk:
            yield disk

    def test_503_until_there_is_room(self, disk: Tmpfs) -> None:
        kept = Kept()
        with Daemon(home=disk.path, workers=2) as daemon, daemon.session() as kms:
            (key, *_) = kept.create(kms, 5)
            disk.fill()
            for call in changes(key):
                refused(kms.request(*call))
            for _ in range(64):  # the last page of the log takes a few records yet, and those may be answered
                reply = kms.request("POST", "/encrypt", {"key_id": key, "plaintext": "aGk="})
                if reply.status != 200:
                    break
            refused(reply)
            assert kms.request("GET", "/healthz").status == 200
            ready = kms.request("GET", "/readyz")
            assert ready.status == 503 and any("free" in reason for reason in ready.json()["reasons"])
            disk.drain()
            kept.opens(kms)
            kept.create(kms, 3)
            kms.rotate(os.urandom(32))
            kept.opens(kms)
            assert kms.request("GET", "/readyz").status == 200
            assert kms.ok("GET", f"/deks/{key}")["state"] == "enabled"  # no refused change was made

    def test_a_worker_that_comes_while_the_disk_is_full(self, disk: Tmpfs) -> None:
        kept = Kept()
        with Daemon(home=disk.path, workers=2) as daemon:
            with daemon.session() as kms:
                kept.create(kms, 5)
            disk.fill()
            victim = daemon.pids()[-1]
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: victim not in daemon.pids() and len(daemon.pids()) == 4, 20, "another worker")
            time.sleep(2)
            with daemon.session() as kms:
                for _ in range(64):  # the write-ahead log may have been cut
                    disk.fill()
                    reply = kms.request("POST", "/deks", {"thread_id": "t"})
                    if reply.status != 201:
                        break
                refused(reply)
                assert "Traceback" not in daemon.stderr and len(daemon.stderr.splitlines()) < 6
                disk.drain()
                wait_until(lambda: kms.request("GET", "/readyz").status == 200, 30, "readiness")
            for _ in range(10):
                with daemon.session() as kms:
                    kept.opens(kms)
            kept.verifies(daemon)

    @pytest.mark.long
    def test_however_long_it_lasts(self, disk: Tmpfs) -> None:
        """The janitor and the tidying go on failing; and it is well again by itself."""
        kept = Kept()
        with Daemon(home=disk.path, workers=2) as daemon, daemon.session() as kms:
            kept.create(kms, 5)
            other = kms.create_dek("t")["key_id"]
            full, replies = time.monotonic(), []
            while time.monotonic() < full + JANITOR_SECONDS + 6:
                if disk.free():  # the write-ahead log was cut
                    disk.fill()
                replies += [kms.request(*call) for call in changes(other)]
                time.sleep(1)
            assert {reply.status for reply in replies} <= {200, 409, 503}
            assert any(reply.status == 503 for reply in replies[-10:])
            assert daemon.alive and "Traceback" not in daemon.stderr and len(daemon.stderr) < 5000
            disk.drain()
            wait_until(lambda: kms.request("GET", "/readyz").status == 200, 30, "readiness")
            kept.create(kms, 2)
            kept.opens(kms)

    def test_it_ends_in_order_while_the_disk_is_full(self, disk: Tmpfs) -> None:
        with Daemon(home=disk.path, workers=1) as daemon, daemon.session() as kms:
            kms.create_dek("t")
            disk.fill()
            refused(kms.request("POST", "/create_dek_for_thread", {"thread_id": "t"}))
            daemon.stop()

    @pytest.mark.parametrize("state", ["full", "read-only"])
    def test_what_only_reads_needs_no_room(self, disk: Tmpfs, short_tmp: Path, state: str) -> None:
        """SQLite makes an index beside the store to read it: no backup could be taken to another disk."""
        daemon, home = Daemon(home=disk.path, workers=1), short_tmp / "home"
        with daemon:
            daemon.ok("POST", "/deks", {"thread_id": "t"}, status=201)
            daemon.stop()
            home.mkdir(0o700)
            if state == "full":
                disk.fill()
            else:
                disk.readonly(True)
            for words in (
                ("backup", str(home / "b")), ("export", str(home / "e")), ("verify",), ("audit", "verify"),
            ):  # fmt: skip
                done = daemon.offline(*words)
                assert done.returncode == 0, (words, done.stderr)
            if state == "read-only":
                disk.readonly(False)
            else:
                disk.drain()
            assert daemon.offline("backup", "--check", str(home / "b")).returncode == 0

    @pytest.mark.parametrize("command", ["export", "backup"])
    def test_where_a_copy_finds_too_little_room(self, disk: Tmpfs, command: str) -> None:
        """SQLite called it an I/O error, once the copy itself was there."""
        (folder := disk.path / "out").mkdir(0o700)
        file, seen = folder / "copy", set()
        with Daemon(workers=1) as daemon, daemon.session() as kms:
            for _ in range(60):
                kms.create_dek("t")
            for pages in (0, 1, 4, 5, 10, 16, 20, 40, 60):
                disk.fill(pages * 4096)
                done = daemon.offline(command, str(file))
                seen.add(done.returncode)
                assert os.listdir(folder) == ["copy"] * (not done.returncode), pages
                disk.drain()
                if done.returncode:
                    told = {"export": "make room there", "backup": " bytes free, and the store"}[command]
                    assert done.returncode == 1 and told in done.stderr.decode(), (pages, done.stderr)
                    continue
                if command == "backup":
                    assert daemon.offline("backup", "--check", str(file)).returncode == 0
                else:
                    assert len(file.read_text().splitlines()) == 60
                file.unlink()
        assert seen == {0, 1}

    def test_a_new_key_file_finds_no_room(self, disk: Tmpfs) -> None:
        (folder := disk.path / "keys").mkdir(0o700)
        with Daemon(workers=1) as daemon:
            write_secret(folder / "kek", daemon.kek)
            config = daemon.config_file.read_text().replace(str(daemon.kek_file), str(folder / "kek"))
            write_secret(daemon.config_file, config.encode())
            words = ("rotate-kek", "--generate", "--config", str(daemon.config_file))
            disk.fill()
            done = daemon.cli(*words)
            assert (done.returncode, os.listdir(folder)) == (1, ["kek"])
            assert b"be writable and have room" in done.stderr
            disk.drain()
            assert daemon.cli(*words).returncode == 0

    def test_full_in_the_middle_of_a_rotation(self, disk: Tmpfs) -> None:
        """Room for a part of the second table and the snapshots."""
        kept = Kept()
        with Daemon(home=disk.path, workers=1) as daemon, daemon.session() as kms:
            kept.create(kms, 300)
            disk.fill(leave=512 << 10)
            before = kms.ok("GET", "/status")["kek_id"]
            refused(kms.request("POST", "/rotate_kek", {"new_kek_hex": os.urandom(32).hex()}))
            assert kms.ok("GET", "/status")["kek_id"] == before
            disk.drain()
            kept.opens(kms)
            wait_until(lambda: kms.request("GET", "/readyz").status == 200, 60, "readiness")
            assert kms.rotate(os.urandom(32))["rewrapped"] == 300
            kept.opens(kms)


class TestFailingCalls:
    """Each call into the disk fails once, then works again."""

    @pytest.fixture
    def shim(self) -> Iterator[Shim]:
        with Shim() as shim:
            yield shim

    @pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
    @pytest.mark.parametrize(
        ("call", "file"),
        [
            ("write", "kms.db-wal"),
            ("sync", "kms.db-wal"),
            ("write", "kms-deks-backup"),
            ("sync", "kms-deks-backup"),
            ("write", "kms-audit.log"),
            ("write", "/data"),
            ("sync", "/data"),
        ],
    )
    def test_the_caller_that_was_hit_hears_of_it(self, shim: Shim, call: str, file: str, error: str) -> None:
        kept, struck = Kept(), 0
        with Daemon(env=shim.env, workers=1) as daemon, daemon.session() as kms:
            kept.create(kms, 4)
            for skip in range(3):
                for path in ("/create_dek_for_thread", "/rotate_kek"):
                    for _ in range(3):  # an anchor of the audit log may come in between, and take the blow
                        fault = shim.fail(call, file, error, skip=skip, times=1)
                        new = os.urandom(32).hex()
                        fields = (
                            {"thread_id": "t"} if path == "/create_dek_for_thread" else {"new_kek_hex": new}
                        )
                        reply = kms.request("POST", path, fields)
                        fault.off()
                        struck += fault.hits
                        if skip or reply.status != 200 or not fault.hits:
                            break
                    assert reply.status == 200 or fault.hits, (reply, skip)
                    # The first call that is hit is the request's own; a later one may be tidying after it.
                    if reply.status != 200 or (fault.hits and not skip):
                        refused(reply)
                    kept.opens(kms)
                    kept.create(kms)
                    shim.clear()
            assert struck, "no call was hit: this case shows nothing"
            active = kms.ok("GET", "/status")["kek_id"]
            assert kms.create_dek("t")["kek_id"] == active

    @pytest.mark.parametrize("call", ["write", "sync"])
    def test_after_a_rotation_that_was_refused(self, shim: Shim, call: str) -> None:
        """What it left can't be tidied up either, for a while."""
        kept = Kept()
        error = {"sync": "EIO", "write": "ENOSPC"}[call]
        with Daemon(env=shim.env, workers=2) as daemon, daemon.session() as kms:
            kept.create(kms, 20)
            fault = shim.fail(call, "kms.db-wal", error)
            refused(kms.request("POST", "/rotate_kek", {"new_kek_hex": os.urandom(32).hex()}))
            for _ in range(40):
                refused(kms.request("POST", "/create_dek_for_thread", {"thread_id": "t"}))
                time.sleep(0.1)
            assert fault.hits and daemon.alive
            shim.clear()
            wait_until(lambda: kms.request("GET", "/readyz").status == 200, 60, "readiness")
            kept.create(kms, 2)
            daemon.write_kek(os.urandom(32))
            kms.rotate(daemon.kek)
            kept.opens(kms)
            kept.verifies(daemon)

    @pytest.mark.skipif(os.geteuid() != 0, reason="root alone sees which process has the store open")
    def test_a_keeper_that_cant_open_the_store(self, shim: Shim) -> None:
        """The supervisor waits and tries; calls that only read are served, others are told at once."""
        kept = Kept()
        with Daemon(env=shim.env, workers=2) as daemon, daemon.session() as kms:
            kept.create(kms, 5)
            shim.fail("open", "kms.db", "EIO")
            os.kill(daemon.writer, signal.SIGKILL)
            wait_until(lambda: "no change can be made" in daemon.stderr, 30, "the supervisor to tell")
            begun = time.monotonic()
            for _ in range(5):
                refused(kms.request("POST", "/create_dek_for_thread", {"thread_id": "t"}))
                assert kms.request("GET", "/readyz").status == 503
                kept.opens(kms)
            assert time.monotonic() - begun < 10 and daemon.alive
            shim.clear()
            wait_until(lambda: kms.request("GET", "/readyz").status == 200, 60, "readiness")
            kept.create(kms, 2)
            kept.opens(kms)
            kept.verifies(daemon)

    def test_a_start_while_the_audit_log_cant_be_synced(self, shim: Shim) -> None:
        """It serves, and keeps the heads of the run before: the next start names them again."""
        with Daemon(env=shim.env, workers=1) as daemon:
            daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})
            daemon.stop()
            fault = shim.fail("sync", "kms-audit.log", "EIO", times=1)
            daemon.start()
            assert fault.hits == 1 and "the audit log can't be written" in daemon.stderr
            shim.clear()
            daemon.stop()
            daemon.start()
            daemon.stop()
            assert daemon.offline("audit", "verify").returncode == 0

    def test_an_audit_log_that_cant_be_synced(self, shim: Shim) -> None:
        """The record stands, so the call is answered; the operator is told, and the store's anchor waits."""
        kept = Kept()
        with Daemon(env=shim.env, workers=1) as daemon, daemon.session() as kms:
            kept.create(kms)
            time.sleep(SYNC_SECONDS)  # it is synced no more often than that
            fault = shim.fail("sync", "kms-audit.log", "EIO", times=1)
            wait_until(lambda: bool(kept.create(kms)) and fault.hits == 1, 30, "a sync")
            assert "the audit log can't be written" in daemon.stderr
            shim.clear()
            kept.create(kms)
            kept.opens(kms)
            kept.verifies(daemon)

    def test_a_commit_of_unknown_outcome(self, shim: Shim) -> None:
        """The sync of the log fails again and again: no write is acknowledged, reads go on."""
        kept = Kept()
        with Daemon(env=shim.env, workers=1) as daemon, daemon.session() as kms:
            (key, *_) = kept.create(kms, 3)
            fault = shim.fail("sync", "kms.db-wal", "EIO")
            for _ in range(5):
                refused(kms.request("POST", "/create_dek_for_thread", {"thread_id": "t"}))
                kept.opens(kms)
            assert fault.hits
            shim.clear()
            wait_until(lambda: kms.request("GET", "/readyz").status == 200, 30, "readiness")
            kept.create(kms, 3)
            kept.opens(kms)
            kept.verifies(daemon)


class TestSizeLimit:
    """`ulimit -f` and quotas strike the store alone where the audit log is the shorter file."""

    def test_not_ready_where_the_store_cant_grow(self) -> None:
        kept = Kept()
        with Daemon(workers=2) as daemon, daemon.session() as kms:
            for _ in range(600):
                kms.create_dek("t" * 200)
            daemon.write_kek(os.urandom(32))
            kms.rotate(daemon.kek)  # the file is large now
            kept.create(kms, 2)
            daemon.audit_log.rename(daemon.audit_log.with_suffix(".1"))
            daemon.signal(signal.SIGHUP)
            wait_until(lambda: "policies in force" in daemon.stderr, 60, "the configuration to be read anew")
            before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in daemon.pids()}
            limit = 3 * ROOM
            assert (daemon.data_dir / "kms.db").stat().st_size > 2 * limit
            for pid, (_, hard) in before.items():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))
            for _ in range(100):  # the write-ahead log may be cut, and then takes a few
                reply = kms.request("POST", "/create_dek_for_thread", {"thread_id": "t"})
                if reply.status != 200:
                    break
            refused(reply)
            ready = kms.request("GET", "/readyz")
            assert ready.status == 503
            assert all(reason.startswith("the store") for reason in ready.json()["reasons"]), ready
            kept.opens(kms)
            for pid, limits in before.items():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
            wait_until(lambda: kms.request("GET", "/readyz").status == 200, 30, "readiness")
            kept.create(kms, 2)
            kept.opens(kms)
            daemon.stop()
            assert daemon.offline("verify").returncode == 0


class TestReadOnly:
    def test_a_data_dir_that_cant_be_written(self, short_tmp: Path) -> None:
        with Tmpfs(8 << 20) as disk:
            daemon = Daemon(home=disk.path, workers=1)
            kept = Kept()
            with daemon, daemon.session() as kms:
                kept.create(kms, 2)
                daemon.stop()
                disk.readonly(True)
                folders = ("--data-dir", str(daemon.data_dir), "--config", str(daemon.config_file))
                done = cli("--socket", str(short_tmp / "s"), *folders, cwd=short_tmp)
                assert done.returncode == 1 and b"Traceback" not in done.stderr
                assert str(daemon.data_dir).encode() in done.stderr and b"ead-only" in done.stderr
                disk.readonly(False)
                daemon.start()
                with daemon.session() as again:
                    kept.opens(again)

    def test_one_that_was_killed_there_and_has_no_index(self, short_tmp: Path) -> None:
        """It can't be read in place; what the commands say leads to a copy that can be."""
        with Tmpfs(8 << 20) as disk:
            daemon = Daemon(home=disk.path, workers=1)
            with daemon:
                with daemon.session() as kms:
                    Kept().create(kms, 2)
                daemon.kill()
                (daemon.data_dir / "kms.db-shm").unlink()
                disk.readonly(True)
                for command in (["verify"], ["backup", str(short_tmp / "backup")], ["export", "-"]):
                    done = daemon.offline(*command)
                    assert done.returncode == 1 and b"can't be read where it is" in done.stderr, done
                    assert f"`cp -a {daemon.data_dir}`".encode() in done.stderr
                subprocess.run(["cp", "-a", str(daemon.data_dir), str(short_tmp / "copy")], check=True)
                folders = ("--data-dir", str(short_tmp / "copy"), "--config", str(daemon.config_file))
                done = cli("verify", *folders, "--json", cwd=short_tmp)
                assert done.returncode == 0 and json.loads(done.stdout)["deks"] == 2, done
                disk.readonly(False)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def torn(path: Path) -> None:
    """Pages of zeros in the middle."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(bytes(size - 8192))


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[Daemon, Kept]]:
    """A stopped daemon with DEKs and a backup."""
    kept = Kept()
    with Daemon(workers=1) as daemon:
        with daemon.session() as kms:
            kept.create(kms, 20)
        daemon.stop()
        done = daemon.offline("backup", str(daemon.home / "good.backup"))
        assert done.returncode == 0, done.stderr
        yield daemon, kept


class TestDamagedStore:
    """Refused at start, in one line that says what is wrong and what to do; a backup then brings it back."""

    @pytest.mark.parametrize(
        ("harm", "says"),
        [
            (Path.unlink, "missing"),
            pytest.param(lambda path: path.write_bytes(b""), "empty", marks=pytest.mark.long),
            pytest.param(zeroed, "database", marks=pytest.mark.long),
            (cut, "cut|damaged|malformed"),
            (lambda path: path.write_bytes(os.urandom(path.stat().st_size)), "database"),
        ],
        ids=["missing", "empty", "zeroed", "cut", "garbage"],
    )
    def test_refused(self, site: tuple[Daemon, Kept], harm: Callable[[Path], None], says: str) -> None:
        whole, kept = site
        daemon = whole.copy()
        try:
            harm(daemon.data_dir / "kms.db")
            with pytest.raises(DaemonFailed) as caught:
                daemon.start()
            text = str(caught.value)
            assert re.search(says, text) and "restore" in text and "Traceback" not in text
            backup = str(whole.home / "good.backup")
            done = daemon.offline("restore", backup)
            if done.returncode:  # what the damaged one has beyond the backup can't be known
                assert b"copy the whole data-dir" in done.stderr and b"--force" not in done.stderr
                done = daemon.offline("restore", backup, "--force")
            assert done.returncode == 0, done.stderr
            daemon.start()
            with daemon.session() as kms:
                kept.opens(kms)
            kept.verifies(daemon)
        finally:
            daemon.close()

    def test_swapped_with_another_daemons(self, site: tuple[Daemon, Kept]) -> None:
        whole, _ = site
        with Daemon(workers=1) as other:
            other.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})
            other.stop()
            daemon = whole.copy()
            shutil.copyfile(other.data_dir / "kms.db", daemon.data_dir / "kms.db")
            text = str(daemon.refusal())
            assert "is not configured" in text and "nothing was changed" in text

    def test_two_rows_that_were_swapped(self, site: tuple[Daemon, Kept]) -> None:
        """A thread's messages never open, and nothing is sealed, under the DEK of another thread."""
        whole, kept = site
        one, two, *_ = kept.keys
        daemon = whole.copy()
        with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db")) as db, db:
            blob = "SELECT json_extract(value, '$.wrapped') FROM deks WHERE key = ?"
            blobs = [db.execute(blob, ("meta:" + key,)).fetchone()[0] for key in (one, two)]
            for key, swapped in zip((one, two), reversed(blobs)):
                change = "UPDATE deks SET value = json_set(value, '$.wrapped', ?) WHERE key = ?"
                assert db.execute(change, (swapped, "meta:" + key)).rowcount == 1
        with daemon, daemon.session() as kms:
            for key, sealed in ((one, two), (two, one)):
                fields = {"key_id": key, "ciphertext": b64(kept.sealed[sealed])}
                for reply in (
                    kms.request("POST", "/decrypt", fields),
                    kms.request("POST", "/encrypt", {"key_id": key, "plaintext": "aGk="}),
                    kms.request("GET", f"/get_wrapped?key_id={key}"),
                ):
                    assert (reply.status, reply.code) == (500, "store_damaged")
            for dry_run in (True, False):
                fields = {"new_kek_hex": os.urandom(32).hex(), "dry_run": dry_run}
                reply = kms.request("POST", "/rotate_kek", fields)
                assert (reply.status, reply.code) == (500, "store_damaged")
            assert kms.ok("GET", "/status")["kek_version"] == "1"
            daemon.stop()
            done = daemon.offline("verify")
            assert (
                done.returncode == 1
                and f"{two}: its row is not as the daemon wrote it".encode() in done.stderr + done.stdout
            )

    def test_an_older_copy_put_back(self, site: tuple[Daemon, Kept]) -> None:
        whole, _ = site
        daemon = whole.copy()
        with daemon:
            daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})
            daemon.stop()
            shutil.copyfile(whole.data_dir / "kms.db", daemon.data_dir / "kms.db")
            text = str(daemon.refusal())
            assert "older than the audit log" in text and "restore" in text

    def test_a_page_that_is_torn_is_found_by_verify(self, site: tuple[Daemon, Kept]) -> None:
        whole, _ = site
        daemon = whole.copy()
        try:
            torn(daemon.data_dir / "kms.db")
            done = daemon.offline("verify")
            assert done.returncode == 1 and b"Traceback" not in done.stderr
        finally:
            daemon.close()


class TestClock:
    def test_set_back_an_hour(self) -> None:
        """Nothing is lost or mixed up: ids stay unique, pages complete, the chain whole, dates as told."""
        kept = Kept()
        with Shim() as shim, Daemon(env=shim.env, workers=2) as daemon, daemon.session() as kms:
            before = kept.create(kms, 20)
            shim.clock(-3600)
            after = kept.create(kms, 20)
            kms.ok("DELETE", f"/deks/{after[0]}")
            shim.clock(+3600)
            later = kept.create(kms, 5)
            assert len({*before, *after, *later}) == 45
            listed = [row["key_id"] for row in kms.ok("GET", "/deks?limit=100")["deks"]]
            assert sorted(listed) == listed and set(listed) == {*before, *after, *later}
            assert kms.ok("GET", f"/deks/{after[0]}")["state"] == "pending_deletion"
            kms.ok("POST", f"/deks/{after[0]}/enable")
            daemon.write_kek(os.urandom(32))
            kms.rotate(daemon.kek)
            shim.clock(-3600)
            kept.opens(kms)
            kept.create(kms, 2)
            kept.verifies(daemon)


def test_a_daemon_whose_socket_was_removed_can_be_found(daemon: Daemon) -> None:
    """The next start says who holds the data-dir."""
    daemon.socket.unlink()
    second = Daemon(kek=daemon.kek)
    try:
        second.write_config({"data_dir": str(daemon.data_dir)})
        second.args = ["--data-dir", str(daemon.data_dir)]
        assert f"pid {daemon.pid}" in str(second.refusal())
    finally:
        second.close()
    wait_until(daemon.healthy, 60, "its name to come back")


class TestReaderOfTheLog:
    """A program that keeps a read transaction open (Litestream): the log can't be cut meanwhile."""

    def test_due_erasures_cost_the_others_nothing(self) -> None:
        """One try for all, each pause longer; and the caller hears what is done and what is not."""
        kept = Kept()
        with Daemon(workers=1) as daemon, daemon.session() as kms:
            doomed = [kms.create_dek("t")["key_id"] for _ in range(20)]
            with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db")) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM deks").fetchone()
                begun = time.monotonic()
                for key in doomed:
                    reply = kms.request("DELETE", f"/deks/{key}", {"immediately": True})
                    refused(reply)
                    assert "is shredded" in reply.json()["error"]["message"]
                    assert kms.request("GET", f"/get_wrapped?key_id={key}").status == 410
                assert time.monotonic() - begun < 15, "each of them waited for the reader"
                assert kms.ok("GET", "/status")["erasures_due"] == 20
                slow = 0
                for _ in range(30):
                    begun = time.monotonic()
                    kept.create(kms)
                    slow += time.monotonic() - begun > 0.5
                    time.sleep(0.05)
                assert slow < 10, "each waited a second, for as long as the reader was there"
                reader.execute("COMMIT")
            wait_until(lambda: kms.ok("GET", "/status")["erasures_due"] == 0, 30, "the erasures")
            assert (
                daemon.stderr.count("copies of shredded DEKs remain") == 2
            )  # when it began and when it was over
            kept.opens(kms)
            kept.verifies(daemon)
