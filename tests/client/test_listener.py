"""Who listens: nothing is sent to anybody but the daemon, whoever holds the socket's name."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.client import Client, ConnectionFailed, ListenerRefused, listener
from progressdb_kms.tools import keyfiles
from tests.harness import REPO, folders
from tests.harness.daemon import cli, write_secret
from tests.harness.fakekms import FakeKms
from tests.harness.procs import as_user

DAEMON, APP, STRANGER = 12_001, 12_002, 12_003
ROOT = 0
OPEN = f"others may write to {folders.ROOT}"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not hasattr(socket, "SO_PEERCRED"), reason="only root can listen as another user"
)


@contextlib.contextmanager
def serving(path: Path, uid: int) -> Iterator[FakeKms]:
    """A daemon that this user started, or one that only says so; everybody may connect."""
    with as_user(uid):
        fake = FakeKms(path)
    with fake:
        path.chmod(0o666)
        yield fake


@pytest.fixture
def safe() -> Iterator[Path]:
    """A folder on a way that belongs to root."""
    folder = Path(tempfile.mkdtemp(prefix="kms-", dir="/run"))
    folder.chmod(0o755)
    if listener.distrust(DAEMON, str(folder / "x" / "s"), None).startswith("others"):
        pytest.skip("/run is open to others here")
    yield folder
    shutil.rmtree(folder)


def folder_of(parent: Path, uid: int, mode: int) -> Path:
    path = parent / "d"
    path.mkdir()
    os.chown(path, uid, uid)
    path.chmod(mode)
    return path


def ask(path: Path, uid: int = ROOT, server_uid: int | None = None) -> str:
    with as_user(uid), Client(path, timeout=10, server_uid=server_uid) as kms:
        return str(kms.status()["kek_id"])


GOOD = [
    pytest.param(ROOT, ROOT, 0o755, APP, None, id="systemd's socket in root's folder"),
    pytest.param(ROOT, DAEMON, 0o755, APP, None, id="systemd's socket in the daemon's folder"),
    pytest.param(ROOT, ROOT, 0o1777, APP, None, id="root in a folder of all"),
    pytest.param(DAEMON, DAEMON, 0o755, APP, None, id="the daemon in its folder, an application"),
    pytest.param(DAEMON, DAEMON, 0o755, ROOT, None, id="the daemon in its folder, root"),
    pytest.param(APP, ROOT, 0o1777, APP, None, id="our own in a folder of all"),
    pytest.param(DAEMON, ROOT, 0o1777, ROOT, DAEMON, id="the daemon in a folder of all, named"),
]

BAD = [
    pytest.param(STRANGER, ROOT, 0o1777, ROOT, None, id="a stranger was first in a sticky folder"),
    pytest.param(STRANGER, ROOT, 0o1777, APP, None, id="the same, and an application asks"),
    pytest.param(STRANGER, ROOT, 0o1777, ROOT, DAEMON, id="the same, and the daemon is named"),
    pytest.param(STRANGER, DAEMON, 0o777, ROOT, None, id="a stranger in the daemon's open folder"),
    pytest.param(DAEMON, DAEMON, 0o777, ROOT, None, id="the daemon, where others may write"),
    pytest.param(DAEMON, DAEMON, 0o775, ROOT, None, id="the daemon, where its group may write"),
    pytest.param(DAEMON, APP, 0o777, ROOT, None, id="the daemon in another's folder"),
]


@pytest.mark.parametrize(("uid", "owner", "mode", "caller", "named"), GOOD)
def test_good_ones(safe: Path, uid: int, owner: int, mode: int, caller: int, named: int | None) -> None:
    path = folder_of(safe, owner, mode) / "s"
    with serving_anywhere(path, uid) as fake:
        assert ask(path, caller, named) == fake.kek_id


@pytest.mark.parametrize(("uid", "owner", "mode", "caller", "named"), BAD)
def test_bad_ones(safe: Path, uid: int, owner: int, mode: int, caller: int, named: int | None) -> None:
    path = folder_of(safe, owner, mode) / "s"
    with serving_anywhere(path, uid) as fake:
        with pytest.raises(ListenerRefused, match=f"uid {uid} listens") as caught:
            ask(path, caller, named)
        assert caught.value.code == "listener_refused" and "nothing was sent" in caught.value.hint
        assert isinstance(caught.value, ConnectionFailed) and fake.seen == []


@contextlib.contextmanager
def serving_anywhere(path: Path, uid: int) -> Iterator[FakeKms]:
    """As if this user could write there just now."""
    mode = stat.S_IMODE(path.parent.stat().st_mode)
    path.parent.chmod(0o777)
    with serving(path, uid) as fake:
        path.parent.chmod(mode)
        yield fake


class TestTheWay:
    def test_a_folder_above_that_is_open_to_all(self, short_tmp: Path) -> None:
        """Below a folder of all whoever is first may make the folder, too."""
        short_tmp.chmod(0o755)
        path = folder_of(short_tmp, STRANGER, 0o755) / "s"
        with serving(path, STRANGER), pytest.raises(ListenerRefused, match=OPEN):
            ask(path)

    def test_a_folder_above_of_somebody_else(self, safe: Path) -> None:
        os.chown(safe, APP, APP)
        path = folder_of(safe, DAEMON, 0o755) / "s"
        with serving(path, DAEMON), pytest.raises(ListenerRefused, match=f"belongs to uid {APP}"):
            ask(path)

    def test_links_are_followed_and_their_folders_looked_at(self, safe: Path, short_tmp: Path) -> None:
        path = folder_of(safe, DAEMON, 0o755) / "s"
        (safe / "good").symlink_to("d")
        (safe / "again").symlink_to(f"{safe}/good/../d")
        bad = short_tmp / "bad"
        bad.symlink_to(path.parent)
        (safe / "round").symlink_to("round")
        with serving(path, DAEMON) as fake:
            assert ask(safe / "good" / "s") == ask(safe / "again" / "s") == fake.kek_id
            short_tmp.chmod(0o755)
            with pytest.raises(ListenerRefused, match=OPEN):
                ask(bad / "s")
        assert "links" in listener.distrust(DAEMON, str(safe / "round" / "s"), None)

    def test_a_relative_path(self, safe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = folder_of(safe, DAEMON, 0o755) / "s"
        monkeypatch.chdir(path.parent)
        with serving(path, DAEMON) as fake:
            assert ask(Path("s")) == ask(Path("../d/./s")) == fake.kek_id


IN_NAMESPACE = """
import ctypes, os, socket, sys
from progressdb_kms.client import Client, ClientError
path, uid, named = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
libc = ctypes.CDLL(None)
libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else /proc/self is root's after the change of UID
if libc.unshare(0x10000000):  # CLONE_NEWUSER
    sys.exit("no user namespaces")
with open("/proc/self/uid_map", "w") as file:
    file.write(f"0 {uid} 1")
try:
    print(Client(path, timeout=10, server_uid=named).status()["kek_id"])
except ClientError as error:
    print(error.code, error.message, error.hint)
"""


def in_namespace(path: Path, named: int = 0) -> str:
    """Ask as APP, who is root in a user namespace of its own."""
    done = subprocess.run(
        [sys.executable, "-c", IN_NAMESPACE, str(path), str(APP), str(named)],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    if "no user namespaces" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestInAUserNamespace:
    @pytest.mark.parametrize("uid", [ROOT, DAEMON, STRANGER])
    def test_who_is_not_known_there_must_be_named(self, safe: Path, uid: int) -> None:
        path = folder_of(safe, uid, 0o755) / "s"
        with serving(path, uid) as fake:
            told = in_namespace(path)
            assert told.startswith("listener_refused uid 65534") and "--server-uid 65534" in told
            assert fake.seen == []
            assert in_namespace(path, 65534).strip() == fake.kek_id

    def test_its_own(self, safe: Path) -> None:
        path = folder_of(safe, APP, 0o755) / "s"
        with serving(path, APP) as fake:
            assert in_namespace(path).strip() == fake.kek_id


# ---- commands -----------------------------------------------------------------------------------------


def test_rotate_kek_gives_a_stranger_nothing(short_tmp: Path) -> None:
    """He knows the active kek_id and says yes to everything; the new key must not reach him."""
    short_tmp.chmod(0o755)
    squat = folder_of(short_tmp, ROOT, 0o1777)
    home = short_tmp / "home"
    home.mkdir(0o700)
    key = bytes(range(100, 132))
    write_secret(home / "kek", key.hex().encode())
    write_secret(home / "c.yaml", f"master_key_file: kek\nsocket: {squat / 's'}\ndata_dir: data\n".encode())
    with as_user(STRANGER):
        fake = FakeKms(squat / "s", key)
    with fake:
        done = cli("rotate-kek", "--config", str(home / "c.yaml"), "--generate", timeout=30)
    assert done.returncode == 1 and f"uid {STRANGER} listens".encode() in done.stderr
    assert fake.seen == [] and sorted(os.listdir(home)) == ["c.yaml", "kek"]


def test_encrypt_takes_the_name_of_the_daemon(short_tmp: Path) -> None:
    short_tmp.chmod(0o755)
    squat = folder_of(short_tmp, ROOT, 0o1777)
    with serving(squat / "s", DAEMON) as fake:
        fake.create("t", "k")
        words = ["encrypt", "--key-id", "k", "--socket", str(squat / "s")]
        refused = cli(*words, stdin=b"a secret")
        assert refused.returncode == 1 and b"--server-uid 12001" in refused.stderr and fake.seen == []
        assert cli(*words, "--server-uid", "12001", stdin=b"a secret").returncode == 0


def test_a_daemon_that_says_yes_and_stays(short_tmp: Path) -> None:
    """Tries have an end, and pauses between them."""
    old, new = (bytes([n]) + bytes(range(100, 131)) for n in (1, 2))
    keyfiles.write_key(short_tmp / "kek", memoryview(bytearray(old)))
    waits: list[float] = []
    sent = 0

    class Liar:
        def active(self) -> keyfiles.Active:
            return keyfiles.Active(keyfiles.kek_id_of(short_tmp / "kek"))

        def rotate(self, key: memoryview) -> keyfiles.RotationResult:
            nonlocal sent
            sent += 1
            return keyfiles.RotationResult("", "2", 7, "", {})

    change = keyfiles.ChangeOver(keyfiles.KeyFiles(short_tmp / "kek"), Liar(), sleep=waits.append)
    with pytest.raises(keyfiles.CommandFailed, match="stays"):
        change.rotate(memoryview(bytearray(new)))
    assert sent == keyfiles.TRIES and waits == [keyfiles.POLL * n for n in range(keyfiles.TRIES)]
    assert (short_tmp / "kek.next").exists()  # the key is kept: it may have been used


def test_a_name_that_is_in_no_folder(safe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Abstract names have no owner: that of the working directory says nothing."""
    os.chown(safe, STRANGER, STRANGER)
    monkeypatch.chdir(safe)
    assert listener.distrust(STRANGER, "s", None) == ""
    assert listener.distrust(STRANGER, "\0s", None).startswith("anybody may bind")
    assert listener.distrust(STRANGER, "\0s", STRANGER) == listener.distrust(ROOT, "\0s", None) == ""
