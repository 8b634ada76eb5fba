"""Commands on the data-dir, as transcripts; what they do to the store is tested in tests/process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.tools.storecmd import SnapshotFolder, backups_list
from tests.harness.daemon import Daemon, cli, write_secret
from tests.harness.fakekms import kek_id_of


@pytest.fixture(scope="module")
def stopped() -> Iterator[Daemon]:
    """A data-dir with two DEKs, one snapshot of a rotation, and nobody serving it."""
    with Daemon(workers=1) as daemon:
        with daemon.session() as session:
            for thread in ("a", "b\x1b[2J".replace("\x1b", "~")):
                session.create_dek(thread)
        done = daemon.cli("rotate-kek", "--config", str(daemon.config_file), "--generate")
        assert done.returncode == 0, done.stderr
        daemon.stop()
        yield daemon


def kek_id(daemon: Daemon) -> str:
    return kek_id_of(bytes.fromhex(daemon.kek_file.read_text()))


def test_verify(stopped: Daemon) -> None:
    done = stopped.offline("verify")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "result    ok\ndeks      2\nshredded  0\nledgers   1\n"
    assert json.loads(stopped.offline("verify", "--json").stdout)["deks"] == 2


def test_recount(stopped: Daemon) -> None:
    """Where counts and rows differ, and somebody knows why: they are made to agree, on the record."""
    with stopped.copy() as daemon:
        done = daemon.offline("verify", "--recount")
        assert done.returncode == 1 and b"offline" in done.stderr, "a daemon runs"
        daemon.stop()
        found = json.loads(daemon.offline("verify", "--recount", "--json").stdout)
        assert found["recounted"] is False, "its KEK was rotated, and all adds up"
        assert b'"op":"recount"' not in daemon.audit_log.read_bytes()
        with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db")) as db, db:
            db.execute("DELETE FROM deks WHERE key = (SELECT min(key) FROM deks)")
        done = daemon.offline("verify")
        assert done.returncode == 1 and b"are counted as" in done.stderr and b"--recount" in done.stderr
        done = daemon.offline("verify", "--recount", "--json")
        assert done.returncode == 0, done.stderr
        assert (found := json.loads(done.stdout))["recounted"] is True and found["deks"] == 1
        assert json.loads(daemon.offline("verify", "--recount", "--json").stdout)["recounted"] is False
        assert b'"op":"recount"' in daemon.audit_log.read_bytes()
        assert daemon.offline("audit", "verify").returncode == 0
        daemon.start()
        assert daemon.request("GET", "/readyz").status == 200


def test_backup_and_restore(stopped: Daemon, short_tmp: Path) -> None:
    path = short_tmp / "backup"
    done = stopped.offline("backup", str(path), "--json")
    assert done.returncode == 0 and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert kek_id(stopped) in done.stdout.decode()
    other = stopped.copy(data=False)
    try:
        write_secret(other.kek_file, stopped.kek_file.read_bytes())
        done = other.offline("restore", str(path))
        assert done.returncode == 0, done.stderr
        assert "deks      2\n" in other.offline("verify").stdout.decode()
        again = other.offline("restore", str(path))
        assert again.returncode in (0, 1) and again.stderr.count(b"\n") <= 1
    finally:
        other.close()


def test_a_failed_restore_changes_nothing(stopped: Daemon, short_tmp: Path) -> None:
    (short_tmp / "junk").write_bytes(b"no backup")
    before = sorted(path for path in stopped.data_dir.rglob("*") if path.name != "kms.lock")
    done = stopped.offline("restore", str(short_tmp / "junk"))
    assert (done.returncode, done.stdout) == (1, b"") and done.stderr.startswith(b"progressdb-kms: ")
    assert sorted(path for path in stopped.data_dir.rglob("*") if path.name != "kms.lock") == before


def test_export_and_import(stopped: Daemon, short_tmp: Path) -> None:
    out = short_tmp / "deks.jsonl"
    done = stopped.offline("export", str(out))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"2 DEKs exported\n")
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert stopped.offline("export").stdout == out.read_bytes()
    with open(out, "ab") as file:
        file.write(b"no json\n")
    other = stopped.copy(data=False)
    try:
        write_secret(other.kek_file, stopped.kek_file.read_bytes())
        done = other.offline("import", str(out))
        assert (done.returncode, done.stdout) == (1, b"") and b"--skip-bad" in done.stderr
        done = other.offline("import", str(out), "--skip-bad", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["imported"] == 2
        assert done.stderr.count(b"\n") == 1 and b"3" in done.stderr  # the bad line's number
    finally:
        other.close()


def test_an_export_holds_rows_against_their_macs(stopped: Daemon, short_tmp: Path) -> None:
    """Its lines have none: a row that somebody had edited was genuine where they were imported."""
    with stopped.copy() as daemon:
        first, second = (row["key_id"] for row in daemon.ok("GET", "/deks")["deks"])
        daemon.ok("POST", f"/deks/{first}/disable", {})
        daemon.stop()
        with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db")) as db, db:
            db.execute("UPDATE deks SET value = replace(value, '\"disabled\"', '\"enabled\"')")
        done = daemon.offline("export", str(short_tmp / "lines"))
        assert done.returncode == 1 and f"meta:{first} of the store is not as".encode() in done.stderr
        assert not (short_tmp / "lines").exists()
        done = daemon.offline("export", "--skip-bad")
        assert done.returncode == 0 and f"{first}: ".encode() in done.stderr
        assert [json.loads(line)["key_id"] for line in done.stdout.splitlines()] == [second]
        daemon.kek_file.unlink()
        done = daemon.offline("export")
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
        assert b"not held against their MACs" in done.stderr and b"can't be read" in done.stderr
        daemon.write_kek(os.urandom(32))
        assert b"not held against their MACs" in daemon.offline("export").stderr


def test_an_export_over_an_earlier_one(stopped: Daemon, short_tmp: Path) -> None:
    out = short_tmp / "deks.jsonl"
    out.touch()
    for _ in range(2):
        assert stopped.offline("export", str(out)).returncode == 0
    assert out.read_bytes().count(b"\n") == 2


def test_an_export_replaces_nothing_else(stopped: Daemon) -> None:
    """A slip of the hand: the store, the log, the key."""
    for file in (stopped.data_dir / "kms.db", stopped.audit_log, stopped.kek_file):
        before = file.read_bytes()
        done = stopped.offline("export", str(file))
        assert (done.returncode, done.stdout) == (1, b"") and file.read_bytes() == before
        done = stopped.offline("audit", "report", str(file))
        assert done.returncode == 1 and b"it is not replaced" in done.stderr and file.read_bytes() == before


def test_an_export_is_not_in_the_data_dir(stopped: Daemon, short_tmp: Path) -> None:
    """A shred could not reach it there."""
    (short_tmp / "link").symlink_to(stopped.data_dir)
    for out in (stopped.data_dir / "deks.jsonl", short_tmp / "link" / "deks.jsonl"):
        done = stopped.offline("export", str(out))
        assert done.returncode == 1 and b"is inside the data-dir" in done.stderr
        assert not out.exists()


def test_a_failed_export_leaves_no_file(short_tmp: Path) -> None:
    done = cli("export", "out", "--data-dir", "none", cwd=short_tmp)
    assert done.returncode == 1 and b"there is no store" in done.stderr and os.listdir(short_tmp) == []


def test_snapshots(stopped: Daemon) -> None:
    done = stopped.offline("backups", "list")
    head, row = done.stdout.decode().splitlines()
    assert head.split() == ["TIME", "KEK_ID", "DEKS", "STATE", "PATH"] and row.split()[2] == "2"
    path = Path(row.split()[3])
    copy = stopped.copy()
    try:
        ours = copy.data_dir / path.relative_to(stopped.data_dir)
        one = next(ours.glob("*.json")).stem
        # The snapshot opens under the KEK of before the rotation, which the configuration has to name.
        old = next(stopped.home.glob("kek.old-*"))
        copy.write_config({"previous_master_keys": [{"file": str(old)}]})
        done = copy.offline("restore", "--snapshot", str(ours), "--key", one, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(copy.offline("backups", "prune", "--keep", "1", "--json").stdout)["removed"] == 0
        assert copy.offline("backups", "prune", "--keep", "5", "--older-than", "1").stdout == b"removed  0\n"
        assert copy.offline("backups", "prune", "--older-than", "1").returncode == 0 and ours.exists()
    finally:
        copy.close()


def test_audit_verify(stopped: Daemon) -> None:
    done = stopped.offline("audit", "verify")
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(b"result      ok\n")
    copy = stopped.copy()
    try:
        lines = copy.audit_log.read_bytes().splitlines(keepends=True)
        copy.audit_log.write_bytes(b"".join(lines[:2] + lines[3:]))
        done = copy.offline("audit", "verify")
        assert done.returncode == 1 and b"fault" in done.stdout and b"kms-audit.log:3" in done.stdout
        assert b"recoveries" not in done.stdout  # they were not counted to the end
        found = json.loads(copy.offline("audit", "verify", "--json").stdout)
        assert found["result"] == "fault" and "kms-audit.log:3" in found["fault"]
        write_secret(copy.kek_file, os.urandom(32))
        done = copy.offline("audit", "verify")
        assert done.returncode == 1 and b"which is not configured" in done.stderr
        shutil.rmtree(copy.data_dir)
        for command in ("verify", "search"):
            done = copy.offline("audit", command, str(stopped.audit_log))
            assert done.returncode == 1 and b"there is no store" in done.stderr
    finally:
        copy.close()


@pytest.mark.root
def test_root_leaves_the_files_to_the_daemon(stopped: Daemon) -> None:
    """A command of root's on the data-dir of another user: no file of root's stays behind."""
    copy = stopped.copy()
    try:
        copy.home.chmod(0o755)
        for path in (copy.data_dir, *copy.data_dir.rglob("*"), copy.kek_file, copy.config_file):
            os.chown(path, 12345, 12345)
        for words in (
            ("verify",),
            ("export",),
            ("backup", str(copy.home / "b")),
            ("import", "-"),
            ("audit", "verify"),
        ):
            done = copy.offline(*words)
            assert done.returncode == 0, (words, done.stderr)
            assert {path.stat().st_uid for path in copy.data_dir.rglob("*")} == {12345}, words
    finally:
        copy.close()


def test_a_snapshot_that_goes_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prune, or the daemon, takes it away between a look and the next."""
    for look in ("is_dir", "is_file", "exists"):
        monkeypatch.setattr(Path, look, lambda self: True)
    gone = SnapshotFolder("n", tmp_path / "gone", "2026", "00" * 8, {})
    assert gone.deks == 0
    assert backups_list(tmp_path / "none") == []
