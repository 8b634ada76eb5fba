"""`backup FOLDER --keep N`: what it makes, what it removes and what never, and what the daemon is told."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.service import lastbackup
from tests.harness.daemon import Daemon
from tests.harness.faults import killing, need_strace, steps_of


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(workers=1) as running:
        running.ok("POST", "/deks", {"thread_id": "t"}, 201)
        yield running


@pytest.fixture
def folder(short_tmp: Path) -> Path:
    path = short_tmp / "backups"
    path.mkdir(mode=0o700)
    return path


def run(daemon: Daemon, *words: str) -> Any:
    done = daemon.offline("backup", *words, "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    return json.loads(done.stdout)


def gauge(daemon: Daemon, name: str) -> float:
    page = daemon.request("GET", "/metrics").body.decode()
    found = re.search(rf"^progressdb_kms_{name} (\S+)$", page, re.M)
    assert found is not None, name
    return float(found[1])


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_newest_stay_and_what_was_not_made_here(daemon: Daemon, folder: Path) -> None:
    first = Path(run(daemon, str(folder))["file"])
    host = (daemon.data_dir / "kms.host").read_text()[:8]
    assert re.fullmatch(f"kms-{host}-[0-9]{{8}}T[0-9]{{6}}Z[.]backup", first.name)
    older = [f"kms-{host}-2025010{day}T020000Z.backup" for day in (1, 2, 3)]
    other = "kms-00000000-20250101T020000Z.backup"
    failed, mine = f"{older[0]}.failed", "kms-before-the-migration.backup"
    for name in (*older, other, failed, mine):
        shutil.copy(first, folder / name)
    damaged, link = f"kms-{host}-20240101T000000Z.backup", f"kms-{host}-20240102T000000Z.backup"
    (folder / damaged).write_bytes(first.read_bytes()[:-1])
    (folder / link).symlink_to(first)
    stays = {other, failed, mine, damaged, link}
    if os.geteuid() == 0:
        stays.add(strange := f"kms-{host}-20240103T000000Z.backup")
        os.chown(shutil.copy(first, folder / strange), 1, -1)
    first.rename(folder / f"kms-{host}-20250104T020000Z.backup")
    done = daemon.offline("backup", str(folder), "--keep", "3", "--json")
    assert done.returncode == 0 and done.stderr.decode().startswith(f"{folder / damaged} is no whole backup")
    found = json.loads(done.stdout)
    assert found["checked"] is True
    assert found["removed"] == [str(folder / name) for name in (older[1], older[0])]
    kept = {Path(found["file"]).name, f"kms-{host}-20250104T020000Z.backup", older[2]}
    assert set(names(folder)) == kept | stays


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_root_removes_what_belongs_to_the_folder_s_owner(daemon: Daemon, folder: Path) -> None:
    """As the new one does: root made one a night in the daemon's folder, and removed none of them."""
    first = Path(run(daemon, str(folder))["file"])
    host = (daemon.data_dir / "kms.host").read_text()[:8]
    older, root_s = (f"kms-{host}-2025010{day}T020000Z.backup" for day in (1, 2))
    first.rename(folder / older)
    shutil.copy(folder / older, folder / root_s)
    copy = daemon.copy()
    try:
        for above in (copy.home, folder.parent):
            above.chmod(0o755)
        mine = (copy.data_dir, *copy.data_dir.rglob("*"), copy.kek_file, copy.config_file)
        for path in (*mine, folder, folder / older):
            os.chown(path, 12345, 12345)
        found = run(copy, str(folder), "--keep", "1")
        assert found["removed"] == [str(folder / older)]
        assert names(folder) == sorted([root_s, new := Path(found["file"]).name])
        assert (folder / new).stat().st_uid == 12345
    finally:
        copy.close()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_was_made_while_the_clock_was_wrong_takes_no_other_s_place(
    daemon: Daemon, folder: Path, keep: int
) -> None:
    """The new one was removed as the oldest, at once and each night, and told as made and checked."""
    first = Path(run(daemon, str(folder))["file"])
    host = (daemon.data_dir / "kms.host").read_text()[:8]
    later = [f"kms-{host}-209{year}0101T020000Z.backup" for year in range(4)]
    older = [f"kms-{host}-1970010{day}T020000Z.backup" for day in (1, 2, 3)]
    for name in (*later, *older):
        shutil.copy(first, folder / name)
    first.unlink()
    done = daemon.offline("backup", str(folder), "--keep", str(keep), "--json")
    assert done.returncode == 0
    assert done.stderr.decode() == (
        f"4 in {folder} dated later than the new one, up to {later[-1]}: left, and not counted\n"
    )
    new = Path(json.loads(done.stdout)["file"]).name
    assert names(folder) == sorted([*older[len(older) - keep + 1 :], new, *later])
    assert json.loads(done.stdout)["removed"] == [str(folder / name) for name in older[: 4 - keep][::-1]]


def test_what_a_killed_one_left_goes_with_the_next(daemon: Daemon, folder: Path) -> None:
    """No later one has its name, and so it stayed for ever, with the DEKs that were shredded since in it."""
    need_strace()
    steps = steps_of(lambda words: daemon.offline("backup", str(folder), wrapper=words), folder)
    (step,) = [step for step in steps if step.name == "link"]
    (first,) = folder.iterdir()
    host = (daemon.data_dir / "kms.host").read_text()[:8]
    whole = first.rename(folder / f"kms-{host}-20250101T020000Z.backup").name
    done = daemon.offline("backup", str(folder), wrapper=killing(step))
    assert done.returncode == -signal.SIGKILL
    (left,) = [name for name in names(folder) if name != whole]
    assert left.startswith(f".kms-{host}-") and left.endswith(".part")
    other = folder / ".kms-00000000-20250101T020000Z.backup.0123456789abcdef.part"
    other.write_bytes(b"of another data-dir")
    written = folder / f".kms-{host}-20250102T020000Z.backup.0123456789abcdef.part"
    with open(written, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = Path(run(daemon, str(folder))["file"])
        assert names(folder) == sorted({whole, second.name, other.name, written.name})
    second.unlink()
    folder.chmod(0o777)
    refused = daemon.offline("backup", str(folder))
    assert refused.returncode == 1 and b"others may replace files" in refused.stderr and written.exists()
    folder.chmod(0o700)
    third = Path(run(daemon, str(folder), "--keep", "1")["file"])
    assert names(folder) == sorted([other.name, third.name])


def test_one_that_fails_its_drill_removes_none(daemon: Daemon, folder: Path) -> None:
    """The key that the daemon has is not the one of the configuration any more."""
    host = (daemon.data_dir / "kms.host").read_text()[:8]
    old = folder / f"kms-{host}-20250101T020000Z.backup"
    run(daemon, str(old))
    right = daemon.kek_file.read_bytes()
    try:
        daemon.kek_file.write_text(os.urandom(32).hex())
        done = daemon.offline("backup", str(folder), "--keep", "1")
    finally:
        daemon.kek_file.write_bytes(right)
    assert done.returncode == 1 and b"is not configured" in done.stderr and b"no older one" in done.stderr
    assert old.exists()
    (failed,) = set(names(folder)) - {old.name}
    assert failed.endswith(".backup.failed") and failed.encode() in done.stderr
    told = daemon.ok("GET", "/status")["backup"]
    assert told["file"] == str(folder / failed) and told["checked_at"] < told["created_at"]
    assert b"failed its drill" in daemon.cli("status").stdout
    assert run(daemon, "--check", str(folder / failed))["opened"] == 1, "it is a whole backup all the same"
    assert b"passed its drill" in daemon.cli("status").stdout


def test_a_kek_that_is_given_up_fails_no_drill(folder: Path) -> None:
    """Each night ended as `.failed`, none of which ever goes; with allow_missing_keks the daemon does without
    such a KEK, and so does a restore."""
    with Daemon(workers=1) as daemon:
        with daemon.session() as kms:
            lost, other = (kms.create_dek(f"t{number}")["key_id"] for number in range(2))
            kms.ok("POST", "/rewrap", {"key_id": lost, "new_kek_hex": os.urandom(32).hex()})
        host = (daemon.data_dir / "kms.host").read_text()[:8]
        old = folder / f"kms-{host}-20250101T020000Z.backup"
        assert daemon.offline("backup", str(old)).returncode == 0
        strict = daemon.offline("backup", str(folder), "--keep", "1")
        assert strict.returncode == 1 and b"is not configured" in strict.stderr and old.exists()
        daemon.write_config({**daemon.config, "allow_missing_keks": True})
        for failed in folder.glob("*.failed"):
            failed.unlink()
        done = daemon.offline("backup", str(folder), "--keep", "1", "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith(b"1 DEKs need the KEK ") and b"allow_missing_keks" in done.stderr
        found = json.loads(done.stdout)
        assert found["removed"] == [str(old)] and names(folder) == [Path(found["file"]).name]
        checked = daemon.offline("backup", "--check", found["file"], "--json")
        shown = json.loads(checked.stdout)
        assert (shown["deks"], shown["opened"], shown["left_out"]) == (2, 1, 1)
        assert daemon.ok("GET", "/status")["backup"]["checked_at"] == found["created_at"]
        right = daemon.kek_file.read_bytes()
        daemon.kek_file.write_text(os.urandom(32).hex())  # the active KEK is needed whatever is allowed
        done = daemon.offline("backup", "--check", found["file"])
        assert done.returncode == 1 and b"which is not configured, for 1 DEKs" in done.stderr
        daemon.kek_file.write_bytes(right)
        daemon.stop()
        assert daemon.offline("restore", found["file"]).returncode == 0, "it brings back what it has"
        with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db")) as db, db:
            edited = "UPDATE deks SET value = replace(value, 'enabled', 'disabled') WHERE key = ?"
            db.execute(edited, (f"meta:{other}",))
        torn = str(folder / "torn")
        assert daemon.offline("backup", torn).returncode == 0
        done = daemon.offline("backup", "--check", torn)
        assert done.returncode == 1 and b"(run `progressdb-kms verify` on the store" in done.stderr
        assert b"not configured" not in done.stderr, "what was given up is not what fails it"


def test_the_daemon_knows_the_last_and_the_last_that_was_checked(daemon: Daemon, folder: Path) -> None:
    file = folder / "b"
    run(daemon, str(file))
    told = daemon.ok("GET", "/status")["backup"]
    assert told["file"] == str(file) and told["created_at"] != told["checked_at"]
    assert 0 <= gauge(daemon, "backup_age_seconds") < 3600
    run(daemon, "--check", str(file))
    told = daemon.ok("GET", "/status")["backup"]
    assert told["created_at"] == told["checked_at"]
    assert 0 <= gauge(daemon, "backup_checked_age_seconds") < 3600
    assert (daemon.data_dir / lastbackup.FILE_NAME).stat().st_mode & 0o777 == 0o600
    run(daemon, str(folder / "c"))
    run(daemon, "--check", str(file))
    assert daemon.ok("GET", "/status")["backup"]["checked_at"] == told["checked_at"], "an older one passed"


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"file":1}', b'{"file":"f","created_at":1,"sha256":""}']
)
def test_a_note_that_is_none_is_no_backup(tmp_path: Path, text: bytes) -> None:
    assert lastbackup.read(tmp_path) is None
    (tmp_path / lastbackup.FILE_NAME).write_bytes(text)
    assert lastbackup.read(tmp_path) is None
