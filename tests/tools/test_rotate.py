"""`rotate-kek` from the outside: what it prints, and which files are there afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.tools.rotatecmd import KEEP
from tests.harness.daemon import Daemon, cli, write_secret
from tests.harness.fakekms import FakeKms, kek_id_of
from tests.harness.faults import need_mount, need_strace
from tests.tools.test_online import on_terminal, spawn

OLD = bytes(range(32))
NEW = bytes(range(50, 82))


@pytest.fixture
def kms(short_tmp: Path) -> Iterator[FakeKms]:
    with FakeKms(short_tmp / "s", OLD) as fake:
        fake.create("t", None)
        yield fake


@pytest.fixture
def home(short_tmp: Path, kms: FakeKms) -> Path:
    """A folder with a config and key file F."""
    write_secret(short_tmp / "F", OLD.hex().encode())
    write_secret(short_tmp / "new", NEW.hex().encode())
    write_secret(short_tmp / "c.yaml", b"master_key_file: F\nsocket: s\ndata_dir: d\n")
    return short_tmp


def rotate(home: Path, *args: str, env: Any = None) -> subprocess.CompletedProcess[bytes]:
    return cli("rotate-kek", "--config", "c.yaml", *args, cwd=home, env=env)


def files(home: Path) -> set[str]:
    return set(os.listdir(home)) - {"s", "c.yaml", "new"}


A, B = kek_id_of(OLD), kek_id_of(NEW)


@pytest.mark.root
@pytest.mark.parametrize("how", ["--new-key-file", "--resume"])
def test_a_key_that_a_stranger_made(home: Path, kms: FakeKms, how: str) -> None:
    """He knows it. One of the daemon's user is as good as root's."""
    write_secret(home / "F.next", NEW.hex().encode())
    name = home / {"--resume": "F.next", "--new-key-file": "new"}[how]
    words = [how, *(["new"] if name.name == "new" else [])]
    (home / "d").mkdir()
    os.chown(home / "d", 12_001, 12_001)
    os.chown(name, 12_003, 12_003)
    if name.name == "new":
        (home / "F.next").unlink()
        done = cli("rewrap", "k", *words, "--config", "c.yaml", cwd=home)
        assert done.returncode == 1 and b"belongs to uid 12003" in done.stderr
    done = rotate(home, *words)
    assert done.returncode == 1 and b"belongs to uid 12003 (its owner knows the key" in done.stderr
    assert kms.kek == OLD
    home.chmod(0o755)
    os.chown(name, 12_001, 12_001)
    done = rotate(home, *words)
    assert (done.returncode, kms.kek) == (0, NEW), done.stderr


def test_new_key_file(home: Path, kms: FakeKms) -> None:
    done = rotate(home, "--new-key-file", "new")
    assert (done.returncode, done.stderr) == (0, KEEP.format(home / "F").encode())
    assert done.stdout.decode() == (
        "status        ok\n"
        f"kek_id        {B}\n"
        "kek_version   2\n"
        "rewrapped     1\n"
        "backup        /data/kms-deks-backup/x\n"
        f"key_file      {home}/F\n"
        f"old_key_file  {home}/F.old-{A}\n"
    )
    assert (home / "F").read_bytes() == NEW.hex().encode() + b"\n"
    assert (home / f"F.old-{A}").read_bytes() == OLD.hex().encode()
    assert files(home) == {"F", f"F.old-{A}"} and kms.kek == NEW


def test_generate(home: Path, kms: FakeKms) -> None:
    done = rotate(home, "--generate", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["kek_id"] == kms.kek_id != A
    assert bytes.fromhex((home / "F").read_text()) == kms.kek
    assert kms.kek.hex() not in done.stdout.decode() + done.stderr.decode()


def test_forget_old(home: Path, kms: FakeKms) -> None:
    assert rotate(home, "--generate", "--forget-old").returncode == 0
    assert files(home) == {"F"}


def test_dry_run_changes_nothing(home: Path, kms: FakeKms) -> None:
    done = rotate(home, "--generate", "--dry-run", "--json")
    found = json.loads(done.stdout)
    assert (found["status"], found["rewrapped"], found["by_kek"]) == ("dry_run", 1, {A: 1})
    assert done.stderr == b""
    assert files(home) == {"F"} and kms.kek == OLD
    assert f"by_kek.{A}  1\n" in rotate(home, "--new-key-file", "new", "--dry-run").stdout.decode()


def test_a_configuration_that_is_not_the_daemons(short_tmp: Path) -> None:
    """A copy of it, with a key file of its own: the daemon can't be started anew, and said so to itself."""
    with Daemon(workers=1) as daemon:
        write_secret(short_tmp / "kek", daemon.kek_file.read_bytes())
        write_secret(short_tmp / "c.yaml", b"master_key_file: kek\n")
        for config, other in ((daemon.config_file, False), (short_tmp / "c.yaml", True)):
            write_secret(short_tmp / "kek", daemon.kek_file.read_bytes())
            done = daemon.cli("rotate-kek", "--config", str(config), "--generate", "--json")
            assert done.returncode == 0, done.stderr
            kek_id = json.loads(done.stdout)["kek_id"]
            said = f"names another file than {short_tmp / 'kek'}: the next start needs the KEK {kek_id}"
            assert (said in done.stderr.decode()) == other


def test_a_lost_answer_is_resumed(home: Path, kms: FakeKms) -> None:
    """The daemon rotated, the answer was lost: the only copy of the active KEK is in F.next."""
    kms.drop.add("/rotate_kek")
    done = rotate(home, "--new-key-file", "new")
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.decode() == (
        f"progressdb-kms: the connection to {home}/s broke: it was closed before the answer; "
        f"the new key is kept in {home}/F.next (run `progressdb-kms rotate-kek --resume`)\n"
    )
    assert files(home) == {"F", "F.next"}
    assert b"unfinished rotation" in rotate(home, "--generate").stderr
    done = rotate(home, "--resume")
    assert done.returncode == 0 and f"kek_id        {B}\n" in done.stdout.decode()
    assert files(home) == {"F", f"F.old-{A}"}
    again = rotate(home, "--resume")
    assert again.returncode == 0 and f"kek_id    {B}\n" in again.stdout.decode()


def test_a_refusal_leaves_no_file(home: Path, kms: FakeKms) -> None:
    kms.refuse["/rotate_kek"] = (403, "peer_refused", "uid 0 may not make this call (admin_peer_uids)")
    done = rotate(home, "--generate")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"progressdb-kms: uid 0 may not make this call (admin_peer_uids)\n"
    assert files(home) == {"F"}


def test_what_the_daemon_proposes_comes_first(home: Path, kms: FakeKms) -> None:
    """It said `--resume` alone, which would have failed for the same reason for ever."""
    kms.refuse["/rotate_kek"] = (503, "kek_not_loaded", "a KEK is not loaded", "shred these DEKs")
    done = rotate(home, "--generate")
    assert done.stderr.decode() == (
        f"progressdb-kms: a KEK is not loaded; the new key is kept in {home}/F.next "
        "(shred these DEKs, then run `progressdb-kms rotate-kek --resume`)\n"
    )


def test_a_dry_run_of_somebody_else_is_no_rotation(home: Path, kms: FakeKms) -> None:
    kms.rotation = {"phase": "checking", "done": 1, "total": 4, "new_kek_id": "0011223344556677"}
    assert rotate(home, "--new-key-file", "new").returncode == 0 and kms.kek == NEW
    kms.rotation = {"phase": "rewrapping", "done": 1, "total": 4, "new_kek_id": "0011223344556677"}
    assert b"a rotation to 0011223344556677 is under way" in rotate(home, "--generate").stderr


def test_the_daemon_is_down(home: Path) -> None:
    write_secret(home / "c.yaml", b"master_key_file: F\nsocket: nowhere\ndata_dir: d\n")
    done = rotate(home, "--generate")
    assert done.returncode == 1 and b"systemctl status progressdb-kms" in done.stderr and files(home) == {"F"}


def test_a_weak_key(home: Path, kms: FakeKms) -> None:
    write_secret(home / "new", b"00" * 32)
    done = rotate(home, "--new-key-file", "new")
    assert done.returncode == 1 and b"fewer than 8 distinct bytes" in done.stderr and files(home) == {"F"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_while_the_daemon_works(home: Path, kms: FakeKms, number: int) -> None:
    ended: list[int] = []
    kms.may_rotate = lambda: bool(ended)
    command = ("rotate-kek", "--config", str(home / "c.yaml"), "--new-key-file", str(home / "new"))
    process = spawn(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it is ignored
    )  # fmt: skip
    while kms.rotation is None:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -number and kms.kek == OLD
    threading.Timer(0.5, ended.append, [number]).start()  # while the next command waits for it
    told = b"interrupted: run `progressdb-kms rotate-kek --resume` to finish\n"
    assert err == (b"" if number == signal.SIGKILL else told)
    assert files(home) == {"F", "F.next"}
    done = rotate(home, "--resume")  # waits for the end of the daemon's work
    assert done.returncode == 0 and kms.kek == NEW and files(home) == {"F", f"F.old-{A}"}


def test_interrupted_before_anything_was_begun(home: Path, kms: FakeKms) -> None:
    """It proposed --resume, which then said `ok` of a rotation that never was."""
    need_strace()
    words = ["strace", "-D", "-qq", "-o", os.devnull, "-e", "trace=fchmod", "-e"]
    words.append("inject=fchmod:signal=SIGTERM:when=1")
    done = cli("rotate-kek", "--config", "c.yaml", "--generate", cwd=home, wrapper=words)
    assert done.returncode == -signal.SIGTERM and files(home) == {"F"} and kms.kek == OLD
    assert done.stderr.startswith(b"interrupted, and no rotation is left to finish")


def test_a_bar_on_a_terminal(home: Path, kms: FakeKms) -> None:
    kms.may_rotate = lambda: sum(seen.path == "/status" for seen in kms.seen) > 4  # it was looked at
    code, shown = on_terminal("rotate-kek", "--config", str(home / "c.yaml"), "--generate")
    assert code == 0 and "\rrotate-kek [######                  ]  25% 1/4\x1b[K" in shown
    assert re.search(r"\r\x1b\[Kstatus +ok\r\n", shown), "the bar must be gone before the result"


class TestKeyInTheConfiguration:
    @pytest.fixture(autouse=True)
    def config(self, home: Path) -> None:
        write_secret(home / "c.yaml", f"master_key_hex: {OLD.hex()}\nsocket: s\ndata_dir: d\n".encode())
        (home / "F").unlink()

    def test_generate(self, home: Path, kms: FakeKms) -> None:
        done = rotate(home, "--generate")
        path = home / f"master-key-{kms.kek_id}"
        assert done.returncode == 0 and bytes.fromhex(path.read_text()) == kms.kek != OLD
        assert done.stderr.decode() == (
            f"{KEEP.format(path)}"
            f"Before the next start, in {home}/c.yaml, replace the line\n    master_key_hex: …\nby\n"
            f"    master_key_file: {path}\nThe daemon goes on until then, but can't be started anew.\n"
        )
        assert files(home) == {path.name}
        write_secret(home / "c.yaml", f"master_key_file: {path}\nsocket: s\ndata_dir: d\n".encode())
        assert rotate(home, "--generate").returncode == 0

    def test_new_key_file(self, home: Path, kms: FakeKms) -> None:
        done = rotate(home, "--new-key-file", "new")
        assert done.returncode == 0 and f"    master_key_file: {home}/new\n" in done.stderr.decode()
        assert kms.kek == NEW and (home / "new").exists() and files(home) == set()

    def test_a_refusal_leaves_no_file(self, home: Path, kms: FakeKms) -> None:
        kms.refuse["/rotate_kek"] = (409, "rotation_in_progress", "a rotation is under way")
        assert rotate(home, "--generate").returncode == 1 and files(home) == set()

    def test_resume_has_nothing_to_go_by(self, home: Path) -> None:
        assert b"names no master_key_file" in rotate(home, "--resume").stderr

    def test_a_credential(self, home: Path, kms: FakeKms) -> None:
        write_secret(home / "c.yaml", b"master_key_credential: kek\nsocket: s\ndata_dir: d\n")
        done = rotate(home, "--new-key-file", "new")
        assert done.returncode == 0 and f"    LoadCredential=kek:{home}/new\n" in done.stderr.decode()

    def test_the_environment(self, home: Path, kms: FakeKms) -> None:
        env = {
            "PROGRESSDB_KMS_MASTER_KEY_HEX": OLD.hex(),
            "PROGRESSDB_KMS_SOCKET": str(home / "s"),
            "PROGRESSDB_KMS_DATA_DIR": str(home / "d"),
        }
        done = cli("rotate-kek", "--generate", cwd=home, env=env)
        assert done.returncode == 2 and b"--generate needs --config" in done.stderr and kms.kek == OLD
        done = cli("rotate-kek", "--new-key-file", "new", cwd=home, env=env)
        assert done.returncode == 0 and f"PROGRESSDB_KMS_MASTER_KEY_FILE={home}/new" in done.stderr.decode()


# ---- a key file that can't be replaced, or is lost ---------------------------------------------------


@pytest.fixture
def mounted_alone(home: Path) -> Iterator[Path]:
    """F is a mount of its own, as `-v kek.key:/etc/…/kek.key` makes it."""
    need_mount()
    made = subprocess.run(["mount", "--bind", str(home / "F"), str(home / "F")], capture_output=True)
    if made.returncode:
        pytest.skip(f"no bind mount can be made here: {made.stderr.decode()}")
    yield home / "F"
    subprocess.run(["umount", str(home / "F")], check=True)


@pytest.mark.root
class TestMountedAlone:
    """The rename is proved before the daemon hears of the new KEK."""

    @pytest.mark.parametrize("how", [["--dry-run"], [], ["--forget-old"]])
    def test_refused_before_anything(
        self, home: Path, kms: FakeKms, mounted_alone: Path, how: list[str]
    ) -> None:
        done = rotate(home, "--generate", *how)
        assert done.returncode == 1 and kms.kek == OLD and files(home) == {"F"}
        assert done.stderr.decode() == (
            f"progressdb-kms: {home}/F can't be replaced by a new key file: it is mounted alone "
            f"(mount its folder {home}, not the file)\n"
        )

    def test_doctor_says_so_before(self, home: Path, mounted_alone: Path) -> None:
        done = cli("doctor", "--config", "c.yaml", cwd=home)
        assert f"{home}/F is mounted alone".encode() in done.stdout

    def test_resume_says_where_the_key_is(self, home: Path, kms: FakeKms, mounted_alone: Path) -> None:
        """An older release had the daemon rotate first: the only copy of the active KEK is in F.next."""
        write_secret(home / "F.next", NEW.hex().encode())
        kms.kek = NEW
        done = rotate(home, "--resume")
        assert done.returncode == 1 and files(home) == {"F", "F.next"}
        assert f"first copy {home}/F.next to a safe place".encode() in done.stderr
        assert b"mount its folder" in done.stderr


@pytest.mark.parametrize("how", ["--generate", "--new-key-file"])
class TestLost:
    """The daemon has the KEK in its memory; what is left of the file can't stand in the way."""

    def test_the_file_is_gone(self, home: Path, kms: FakeKms, how: str) -> None:
        (home / "F").unlink()
        assert rotate(home, how, *(["new"] if "new" in how else []), "--dry-run").returncode == 0
        assert kms.kek == OLD and files(home) == set()
        done = rotate(home, how, *(["new"] if "new" in how else []))
        assert (done.returncode, done.stderr) == (0, KEEP.format(home / "F").encode())
        assert kms.kek != OLD and bytes.fromhex((home / "F").read_text()) == kms.kek
        assert files(home) == {"F"} and "old_key_file" not in done.stdout.decode()

    def test_and_a_lost_answer_is_resumed(self, home: Path, kms: FakeKms, how: str) -> None:
        (home / "F").unlink()
        kms.drop.add("/rotate_kek")
        assert rotate(home, how, *(["new"] if "new" in how else [])).returncode == 1
        assert files(home) == {"F.next"}
        assert rotate(home, "--resume").returncode == 0
        assert files(home) == {"F"} and bytes.fromhex((home / "F").read_text()) == kms.kek

    def test_without_a_config(self, home: Path, kms: FakeKms, how: str) -> None:
        """The daemon was started with PROGRESSDB_KMS_MASTER_KEY_FILE; so is the command."""
        (home / "F").unlink()
        env = {"PROGRESSDB_KMS_MASTER_KEY_FILE": str(home / "F")}
        done = cli("rotate-kek", "--socket", "s", how, *(["new"] if "new" in how else []), cwd=home, env=env)
        assert (done.returncode, done.stderr) == (0, KEEP.format(home / "F").encode())
        assert bytes.fromhex((home / "F").read_text()) == kms.kek != OLD

    def test_another_key_in_its_place(self, home: Path, kms: FakeKms, how: str) -> None:
        """It may be the wrong configuration: nothing is done, and it is said how to go on."""
        write_secret(home / "F", os.urandom(32))
        done = rotate(home, how, *(["new"] if "new" in how else []))
        assert done.returncode == 1 and kms.kek == OLD and b"move the other one away" in done.stderr

    def test_what_is_left_is_no_key(self, home: Path, kms: FakeKms, how: str) -> None:
        write_secret(home / "F", b"")
        done = rotate(home, how, *(["new"] if "new" in how else []))
        assert done.returncode == 1 and kms.kek == OLD and b"Move it away" in done.stderr
        assert b"genkey" not in done.stderr


def test_without_any_file_named(home: Path, kms: FakeKms) -> None:
    """Neither --config nor a variable: the new key file is where the operator made it."""
    done = cli("rotate-kek", "--socket", "s", "--new-key-file", "new", cwd=home)
    assert done.returncode == 0 and kms.kek == NEW and f"{home}/new" in done.stdout.decode()
    assert b"PROGRESSDB_KMS_MASTER_KEY_FILE=" in done.stderr
    done = cli("rotate-kek", "--socket", "s", "--generate", cwd=home)
    assert done.returncode == 2 and kms.kek == NEW and b"--new-key-file" in done.stderr


def test_resume_with_neither_file(home: Path, kms: FakeKms) -> None:
    (home / "F").unlink()
    done = rotate(home, "--resume")
    assert done.returncode == 1 and b"--generate" in done.stderr and kms.kek == OLD


@pytest.mark.root
def test_a_new_file_for_a_lost_one_belongs_to_the_daemon(home: Path, kms: FakeKms) -> None:
    (home / "F").unlink()
    (home / "d").mkdir(mode=0o700)
    os.chown(home / "d", 12345, 12345)
    home.chmod(0o755)
    assert rotate(home, "--generate").returncode == 0
    assert (home / "F").stat().st_uid == 12345
