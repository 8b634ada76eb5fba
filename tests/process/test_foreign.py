"""What another user prepared: links and files in our way, in folders of all and in the daemon's own."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.config import keysource
from progressdb_kms.config.options import Settings
from progressdb_kms.errors import ConfigError
from progressdb_kms.process import socket
from progressdb_kms.service.lock import claim
from progressdb_kms.tools import console
from tests.client.test_listener import as_user
from tests.harness import REPO, Daemon
from tests.harness.daemon import COMMAND

OWNER, STRANGER = 12_001, 12_003
OURS = [f"kms.db{end}" for end in ("", "-wal", "-shm", "-journal")]
OURS += ["kms-audit.log", "kms.lock", "kms-deks-backup"]

pytestmark = [
    pytest.mark.fresh,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user"),
]


@pytest.fixture(scope="module")
def stopped() -> Iterator[Daemon]:
    with Daemon(workers=1) as daemon:
        with daemon.session() as kms:
            kms.create_dek("t")
        daemon.stop()
        yield daemon


@pytest.fixture
def theirs(stopped: Daemon) -> Iterator[Daemon]:
    """A data-dir of the user OWNER, who may be up to something; the commands are root's."""
    copy = stopped.copy()
    copy.home.chmod(0o755)
    for path in (copy.data_dir, *copy.data_dir.rglob("*")):
        os.lchown(path, OWNER, OWNER)
    yield copy
    copy.close()


@pytest.fixture
def stranger(short_tmp: Path) -> Iterator[Path]:
    short_tmp.chmod(0o755)
    folder = short_tmp / "theirs"
    folder.mkdir()
    os.chown(folder, STRANGER, STRANGER)
    yield folder


# ---- at the start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_a_link_in_the_place_of_our_file(stopped: Daemon, name: str) -> None:
    copy = stopped.copy()
    path = copy.data_dir / name
    if path.exists() and not path.is_dir():
        path.rename(copy.home / "elsewhere")
    path.symlink_to(copy.home / "elsewhere")
    said = str(copy.refusal())
    assert f"{path} is a symbolic link" in said or f"{path} is no regular file" in said
    assert "Traceback" not in said


def test_a_folder_in_the_place_of_the_id_is_told_in_a_line(stopped: Daemon) -> None:
    copy = stopped.copy()
    path = copy.data_dir / "kms.host"
    path.unlink(missing_ok=True)
    (path / "kept").mkdir(parents=True)
    said = str(copy.refusal())
    assert f"{path} can't be made, or read" in said and "Traceback" not in said


WAITING = ("kms-audit.log.1", "kms.host", "kms-deks-backup/20261124T020000Z-0123456789abcdef.ledger")


def test_pipes_among_our_files(stopped: Daemon) -> None:
    """Nobody waits for who would write to them: not the start, and not the command beside it."""
    copy = stopped.copy()
    (copy.data_dir / "kms-deks-backup").mkdir()
    for name in WAITING:
        (copy.data_dir / name).unlink(missing_ok=True)
        os.mkfifo(copy.data_dir / name)
    with copy:
        assert copy.ok("GET", "/readyz")["ready"] is True
        assert (copy.data_dir / "kms.host").is_file()
        assert copy.offline("verify").returncode == 0
        assert b"is no regular file" in copy.offline("doctor").stdout
        with copy.session() as kms:
            key = kms.create_dek("t")["key_id"]
            snapshot = copy.data_dir / "kms-deks-backup" / "20261124T020000Z-0123456789abcdef"
            snapshot.mkdir()
            os.mkfifo(snapshot / f"{key}.json")
            done = kms.request("DELETE", f"/deks/{key}", {"immediately": True})
            assert done.status == 503
            os.unlink(snapshot / f"{key}.json")
        copy.stop()


@pytest.mark.parametrize(
    ("name", "words"),
    [("kms.db", ("doctor",)), ("kms.db", ("audit", "verify")), ("kms-audit.log", ("audit", "tail"))],
)
def test_a_command_that_would_wait_for_a_pipe(stopped: Daemon, name: str, words: tuple[str, ...]) -> None:
    copy = stopped.copy()
    (copy.data_dir / name).unlink()
    os.mkfifo(copy.data_dir / name)
    done = copy.offline(*words)
    assert done.returncode == 1 and b"is no regular file" in done.stdout + done.stderr
    copy.close()


def test_a_data_dir_of_another_owner(theirs: Daemon) -> None:
    said = str(theirs.refusal())
    assert f"belongs to uid {OWNER}, and this is uid 0" in said


def test_the_lock_of_another_owners_data_dir(theirs: Daemon) -> None:
    with as_user(STRANGER), pytest.raises(ConfigError):
        claim(theirs.data_dir)
    with as_user(OWNER):
        claim(theirs.data_dir).close()


def test_a_key_file_that_is_anothers_link(short_tmp: Path) -> None:
    short_tmp.chmod(0o1777)
    real = short_tmp / "real"
    real.write_bytes(os.urandom(32))
    real.chmod(0o600)
    with as_user(STRANGER):
        (short_tmp / "link").symlink_to(real)
    scratch, out = memoryview(bytearray(keysource.SCRATCH_SIZE)), memoryview(bytearray(32))
    source = keysource.Source("file", str(short_tmp / "link"), "the key")
    with pytest.raises(ConfigError, match=f"a symbolic link that belongs to uid {STRANGER}"):
        keysource.read(source, {}, scratch, out)
    os.lchown(short_tmp / "link", 0, 0)
    keysource.read(source, {}, scratch, out)


def test_a_link_in_the_place_of_the_socket(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put there by the owner of its folder, between bind() and the gift to the group."""
    victim = short_tmp / "victim"
    victim.write_bytes(b"root's")
    victim.chmod(0o600)
    settings = Settings(socket=short_tmp / "s", socket_group=STRANGER, socket_mode=0o666)
    made = socket.bind(settings)
    about = (short_tmp / "s").lstat()
    assert (about.st_gid, about.st_mode & 0o777) == (STRANGER, 0o666)
    made.close()
    (short_tmp / "s").unlink()
    open_it = os.open

    def swap(path: Path, flags: int) -> int:
        path.unlink()
        path.symlink_to(victim)
        return open_it(path, flags)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(ConfigError, match="it was replaced a moment ago"):
        socket.bind(settings)
    assert (victim.stat().st_gid, victim.stat().st_mode & 0o777) == (0, 0o600)


# ---- backup in a folder of all ----------------------------------------------------------------------------


def test_a_prepared_part_file(stopped: Daemon, short_tmp: Path) -> None:
    """A stranger makes all names that he can foresee; the backup is root's all the same."""
    short_tmp.chmod(0o1777)
    with as_user(STRANGER):
        for name in (".b.part", ".b.part-journal", ".b.0123456789abcdef.part"):
            (short_tmp / name).write_bytes(b"")
            (short_tmp / name).chmod(0o666)
    done = stopped.offline("backup", str(short_tmp / "b"))
    assert done.returncode == 0, done.stderr
    about = (short_tmp / "b").stat()
    assert (about.st_uid, about.st_mode & 0o777, about.st_nlink) == (0, 0o600, 1)
    with contextlib.closing(sqlite3.connect(short_tmp / "b")) as db, db:
        assert db.execute("SELECT count(*) FROM deks").fetchone() == (1,)
    db.close()


def test_a_folder_in_which_all_may_replace_files(stopped: Daemon, short_tmp: Path) -> None:
    short_tmp.chmod(0o777)
    done = stopped.offline("backup", str(short_tmp / "b"))
    assert done.returncode == 1 and b"others may replace files" in done.stderr and os.listdir(short_tmp) == []


def test_a_folder_of_another_user(stopped: Daemon, stranger: Path) -> None:
    """He could put a file of his in the place of the part, or a link to another database of root's."""
    done = stopped.offline("backup", str(stranger / "b"))
    assert done.returncode == 1 and f"belongs to uid {STRANGER}".encode() in done.stderr
    assert os.listdir(stranger) == []


RACED = """
import sys
from pathlib import Path
from progressdb_kms.tools import backup
real = backup._copy
def raced(source, part, progress):
    part.unlink()
    part.symlink_to(sys.argv[3])
    real(source, part, progress)
backup._copy = raced
backup.backup(Path(sys.argv[1]), Path(sys.argv[2]), lambda done, total: None)
"""


def test_a_folder_of_the_daemons_user(theirs: Daemon, stranger: Path) -> None:
    """Who owns it may put a link in the place of the part while it is written: root's hand doesn't follow."""
    os.chown(stranger, OWNER, OWNER)
    assert theirs.offline("backup", str(stranger / "b")).returncode == 0
    assert ((stranger / "b").stat().st_uid, (stranger / "b").stat().st_mode & 0o777) == (OWNER, 0o600)
    victim = theirs.home / "victim"
    victim.touch(0o600)
    words = [sys.executable, "-c", RACED, str(theirs.data_dir), str(stranger / "c"), str(victim)]
    done = subprocess.run(words, cwd=REPO, capture_output=True, check=False)
    assert done.returncode == 1 and victim.stat().st_size == 0, done.stderr
    assert os.listdir(stranger) == ["b"]


def test_what_a_killed_backup_left_goes(stopped: Daemon, short_tmp: Path) -> None:
    (short_tmp / ".b.0123456789abcdef.part").write_bytes(b"x")
    (short_tmp / ".bb.0123456789abcdef.part").write_bytes(b"x")
    assert stopped.offline("backup", str(short_tmp / "b")).returncode == 0
    assert sorted(os.listdir(short_tmp)) == [".bb.0123456789abcdef.part", "b"]


# ---- output in a folder of another user ------------------------------------------------------------------


def write(name: Path) -> None:
    with console.output(str(name)) as file:
        file.write(b"x")


def test_a_link_that_leads_root_to_a_device(stranger: Path) -> None:
    """A pipe stands for the disk."""
    device = stranger.parent / "device"
    os.mkfifo(device, 0o600)
    reader = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with as_user(STRANGER):
            (stranger / "kms.prom").symlink_to(device)
        with pytest.raises(console.CommandFailed, match=f"uid {STRANGER} put it there"):
            write(stranger / "kms.prom")
        assert os.read(reader, 9) == b""
        os.lchown(stranger / "kms.prom", 0, 0)
        write(stranger / "kms.prom")
        assert os.read(reader, 9) == b"x"
    finally:
        os.close(reader)


def test_a_pipe_for_which_root_would_wait(stranger: Path) -> None:
    with as_user(STRANGER):
        os.mkfifo(stranger / "kms.prom")
    with pytest.raises(console.CommandFailed, match=f"uid {STRANGER} put it there"):
        write(stranger / "kms.prom")


def test_a_pipe_in_the_place_of_the_note_of_a_backup(stopped: Daemon, short_tmp: Path) -> None:
    (stopped.data_dir / "kms-backup.json").unlink(missing_ok=True)
    os.mkfifo(stopped.data_dir / "kms-backup.json")
    done = stopped.offline("backup", str(short_tmp / "b"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert (stopped.data_dir / "kms-backup.json").is_file()
    (stopped.data_dir / "kms-backup.json").unlink()


# ---- root's commands in the daemon's folder ---------------------------------------------------


def commands(daemon: Daemon, some: str) -> list[tuple[str, ...]]:
    backup = str(daemon.home / "backup")
    every: list[tuple[str, ...]] = [
        ("verify",),
        ("export", str(daemon.home / "export")),
        ("backup", backup),
        ("import", str(daemon.home / "export")),
        ("audit", "verify"),
        ("audit", "search"),
        ("backups", "list"),
        ("backups", "prune", "--keep", "1"),
        ("restore", backup),
    ]
    return [words for words in every if words[0] in some.split()]


WRITING = "export backup restore"
SOME = WRITING, pytest.param("verify import audit backups " + WRITING, marks=pytest.mark.long)
"""Of the commands: those that make files outside the data-dir and in it, and all of them."""


@pytest.mark.parametrize("some", SOME)
def test_root_gives_nothing_away(theirs: Daemon, some: str) -> None:
    """A file of root's that its owner has linked into the data-dir stays root's."""
    victim = theirs.home / "victim"
    victim.write_bytes(b"root's")
    os.link(victim, theirs.data_dir / "x")
    for words in commands(theirs, some):
        assert theirs.offline(*words).returncode == 0, words
        assert victim.stat().st_uid == 0, words
    found = {path: path.stat().st_uid for path in theirs.data_dir.rglob("*") if path.name != "x"}
    assert set(found.values()) == {OWNER}, found
    assert (theirs.home / "export").stat().st_uid == (theirs.home / "backup").stat().st_uid == 0


@pytest.mark.parametrize("some", SOME)
def test_a_link_in_the_place_of_a_file_that_sqlite_makes(theirs: Daemon, some: str) -> None:
    """root's hand makes nothing at the other end."""
    links = {theirs.data_dir / f"kms.db-{end}": theirs.home / end for end in ("shm", "wal", "journal")}
    for words in commands(theirs, some):
        for name, target in links.items():
            name.unlink(missing_ok=True)
            name.symlink_to(target)
        theirs.offline(*words)
        assert not any(target.exists() for target in links.values()), words


@pytest.mark.parametrize("some", SOME)
def test_a_program_that_the_owner_can_not_read(theirs: Daemon, some: str) -> None:
    """Modules are loaded before the switch."""
    tree = theirs.home / "tree"
    shutil.copytree(REPO / "progressdb_kms", tree / "progressdb_kms")
    tree.chmod(0o700)
    secret = theirs.home / "secret"
    secret.mkdir(0o700)
    for words in commands(theirs, some):
        words = tuple(word.replace(str(theirs.home / "b"), str(secret / "b")) for word in words)
        done = subprocess.run(
            [*COMMAND, *words, "--data-dir", theirs.data_dir, "--config", theirs.config_file],
            env={**theirs.environment(), "PYTHONPATH": str(tree)},
            cwd=theirs.home,
            capture_output=True,
        )
        assert done.returncode == 0, (words, done.stderr)
