"""Key files and their change-over: each row of the table in `keyfiles`, and a death after every step."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable

import pytest

from progressdb_kms.client import (
    Conflict,
    ConnectionFailed,
    RotationResult,
    Unavailable,
)
from progressdb_kms.errors import ConfigError, WeakKey
from progressdb_kms.tools import keyfiles
from progressdb_kms.tools.console import CommandFailed
from progressdb_kms.tools.keyfiles import (
    Active,
    ChangeOver,
    KeyFiles,
    decide,
    kek_id_of,
    write_key,
)
from tests.harness.daemon import REPO, base_environment
from tests.harness.fakekms import kek_id_of as fingerprint
from tests.harness.faults import killing, need_strace, steps_of

OLD, NEW, OTHER = (bytes([start]) + bytes(range(100, 131)) for start in (1, 2, 3))
A, B, C = (fingerprint(key) for key in (OLD, NEW, OTHER))


MAKER = """
import os, sys
if sys.argv[2:]:
    del os.O_TMPFILE
from pathlib import Path
from progressdb_kms.tools.keyfiles import write_key
write_key(Path(sys.argv[1]), memoryview(bytearray(range(100, 132))))
"""


class Died(BaseException):
    """Stands for kill -9: nobody catches it, nothing is cleaned up but what the language unwinds."""


class Service:
    """The daemon's side: an active KEK, and a rotation that may fail before or after its commit."""

    def __init__(self, kek_id: str = A) -> None:
        self.now = Active(kek_id)
        self.asked: list[bytes] = []
        self.before: BaseException | None = None
        self.after: BaseException | None = None

    def active(self) -> Active:
        return self.now

    def rotate(self, key: memoryview) -> RotationResult:
        self.asked.append(bytes(key))
        if self.before:
            raise self.before
        self.now = Active(fingerprint(bytes(key)))
        if self.after:
            raise self.after
        return RotationResult(self.now.kek_id, "2", 7, "/backup", {})


@pytest.fixture
def files(short_tmp: Path) -> KeyFiles:
    made = KeyFiles(short_tmp / "kek")
    put(made.current, OLD)
    return made


def put(path: Path, key: bytes) -> None:
    write_key(path, memoryview(bytearray(key)))


def rotate(
    files: KeyFiles, service: Service, key: bytes = NEW, step: Callable[[str], None] = lambda name: None
) -> RotationResult:
    return ChangeOver(files, service, step=step).rotate(memoryview(bytearray(key)))


def names(files: KeyFiles) -> set[str]:
    return set(os.listdir(files.current.parent))


def settled(files: KeyFiles) -> None:
    """The new key in place, the old one kept, nothing else."""
    assert kek_id_of(files.current) == B
    assert kek_id_of(files.kept(A)) == A
    assert names(files) == {"kek", f"kek.old-{A}"}


def daemon_starts(files: KeyFiles, service: Service) -> bool:
    """What the daemon does at its start: F or F.next must be the store's active KEK."""
    found = [kek_id_of(path) for path in (files.current, files.following) if path.exists()]
    return service.active().kek_id in found


# ---- one key file ------------------------------------------------------------------------------------


class TestWriteKey:
    def test_it_is_private_hex_and_whole(self, short_tmp: Path) -> None:
        path = short_tmp / "k"
        put(path, OLD)
        assert path.read_bytes() == OLD.hex().encode() + b"\n"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_nlink == 1

    def test_it_never_overwrites(self, short_tmp: Path) -> None:
        path = short_tmp / "k"
        for make in (lambda: path.write_text("mine"), lambda: path.symlink_to("nowhere"), path.mkdir):
            make()
            with pytest.raises(CommandFailed, match="exists"):
                put(path, OLD)
            assert os.listdir(short_tmp) == ["k"]
            path.rmdir() if path.is_dir() else path.unlink()

    def test_a_failure_leaves_nothing(self, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("write", "fsync", "link"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, _no_space)
                with pytest.raises(CommandFailed, match="No space"):
                    put(short_tmp / "k", OLD)
            assert os.listdir(short_tmp) == []

    @pytest.mark.parametrize("named", [False, True])
    def test_killed_at_any_step_it_leaves_no_half_and_no_second_name(
        self, short_tmp: Path, named: bool
    ) -> None:
        """A part stayed for ever: the half of a key, or the whole of one that came into use by its name."""
        need_strace()

        def make(words: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
            took = [*words, sys.executable, "-c", MAKER, str(short_tmp / "k"), *["named"] * named]
            return subprocess.run(took, env=base_environment(REPO), capture_output=True, check=False)

        steps = steps_of(make, short_tmp)
        assert len(steps) >= (3 if named else 1), [str(step) for step in steps]
        for step in steps:
            (short_tmp / "k").unlink(missing_ok=True)
            assert make(killing(step)).returncode == -signal.SIGKILL, f"not killed at {step}"
            assert named or set(os.listdir(short_tmp)) <= {"k"}, f"killed at {step}"
            done = make(())
            assert done.returncode == 0 or b"never overwritten" in done.stderr
            assert os.listdir(short_tmp) == ["k"], f"killed at {step}"
            assert kek_id_of(short_tmp / "k") and (short_tmp / "k").stat().st_nlink == 1

    def test_a_folder_that_can_t_be_synced(self, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keyfiles, "sync", _no_space)
        with pytest.raises(CommandFailed, match="k is there, but its folder"):
            put(short_tmp / "k", OLD)

    def test_a_short_write_is_a_failure(self, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        with pytest.raises(CommandFailed, match="No space"):
            put(short_tmp / "k", OLD)
        assert os.listdir(short_tmp) == []

    def test_the_file_is_synced_before_it_has_a_name_and_the_folder_after(
        self, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order = record(monkeypatch)
        put(short_tmp / "k", OLD)
        assert [name for name in order if name != "unlink"] == ["fsync file", "link", "fsync folder"]

    @pytest.mark.root
    def test_it_gets_the_owner_of_another(self, short_tmp: Path) -> None:
        put(short_tmp / "one", OLD)
        os.chown(short_tmp / "one", 12345, 23456)
        write_key(short_tmp / "two", memoryview(bytearray(NEW)), os.stat(short_tmp / "one"))
        about = os.stat(short_tmp / "two")
        assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (12345, 23456, 0o600)


def _no_space(*args: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


def record(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of what reaches the disk."""
    order: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **options: object) -> object:
            what = name
            if name == "fsync":
                assert isinstance(args[0], int)
                what += " folder" if stat.S_ISDIR(os.fstat(args[0]).st_mode) else " file"
            order.append(what)
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "link", "replace", "unlink"):
        wrap(name)
    return order


class TestReadKey:
    @pytest.mark.parametrize("text", [OLD.hex().encode(), b"\t " + OLD.hex().upper().encode() + b"\r\n", OLD])
    def test_the_shapes(self, short_tmp: Path, text: bytes) -> None:
        path = short_tmp / "k"
        path.write_bytes(text)
        path.chmod(0o600)
        assert kek_id_of(path) == A

    def test_it_refuses_what_is_open_to_others(self, short_tmp: Path) -> None:
        put(short_tmp / "k", OLD)
        (short_tmp / "k").chmod(0o640)
        with pytest.raises(ConfigError, match=r"open to others \(mode 0640\)"):
            kek_id_of(short_tmp / "k")

    def test_no_message_quotes_a_key(self, short_tmp: Path) -> None:
        path = short_tmp / "k"
        path.write_bytes(OLD.hex().encode()[:-1])
        path.chmod(0o600)
        with pytest.raises(ConfigError) as caught:
            kek_id_of(path)
        assert OLD.hex()[:8] not in f"{caught.value}{caught.value.hint}"

    def test_remove_overwrites_first(self, short_tmp: Path) -> None:
        path = short_tmp / "k"
        put(path, OLD)
        with open(path, "rb") as file:
            keyfiles.remove_key(path)
            assert file.read() == bytes(65) and not path.exists()


# ---- the table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("current", "following", "active", "step"),
    [
        (A, None, Active(A), "nothing"),
        (A, B, Active(A), "rotate"),
        (A, B, Active(A, B), "wait"),
        (A, B, Active(B), "replace"),
        (None, B, Active(A), "rotate"),
        (None, B, Active(A, B), "wait"),
        (None, B, Active(B), "replace"),
        (B, None, Active(B), "nothing"),
        (A, A, Active(A), "drop"),
    ],
)
def test_decide(current: str, following: str | None, active: Active, step: str) -> None:
    assert decide(current, following, active) == step


@pytest.mark.parametrize(
    ("current", "following", "active"),
    [
        (A, None, Active(B)),
        (A, None, Active(A, B)),
        (A, B, Active(A, C)),
        (A, B, Active(C)),
        (A, A, Active(C)),
        (A, B, Active(B, C)),
    ],
)
def test_decide_refuses(current: str, following: str | None, active: Active) -> None:
    with pytest.raises(CommandFailed) as caught:
        decide(current, following, active)
    assert (active.rotating_to or active.kek_id) in caught.value.message


# ---- the whole -----------------------------------------------------------------------------------------


class TestRotate:
    def test_in_order(self, files: KeyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
        service, seen = Service(), []

        def look(name: str) -> None:
            seen.append((name, service.now.kek_id, names(files)))

        result = rotate(files, service, step=look)
        assert result == RotationResult(B, "2", 7, "/backup", {})
        settled(files)
        assert service.asked == [NEW]
        assert seen == [
            ("next", A, {"kek", "kek.next"}),
            ("rotated", B, {"kek", "kek.next"}),
            ("kept", B, {"kek", "kek.next", f"kek.old-{A}"}),
            ("replaced", B, {"kek", f"kek.old-{A}"}),
        ]

    def test_every_name_is_synced(self, files: KeyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
        """No step depends on one that a power cut may take back."""
        order = record(monkeypatch)
        rotate(files, Service(), step=order.append)
        wanted = [
            "link",
            "replace",
            "fsync file",
            "link",
            "fsync folder",
            "next",
            "rotated",
            "link",
            "fsync folder",
            "kept",
        ]
        assert [name for name in order if name != "unlink"] == [
            *wanted,
            "replace",
            "fsync folder",
            "replaced",
        ]

    @pytest.mark.parametrize("step", ["next", "rotated", "kept", "replaced"])
    def test_death_after_each_step(self, files: KeyFiles, step: str) -> None:
        service = Service()

        def die(name: str) -> None:
            if name == step:
                raise Died

        with pytest.raises(Died):
            rotate(files, service, step=die)
        assert daemon_starts(files, service)
        result = ChangeOver(files, service).resume()
        assert result.kek_id == B
        settled(files)
        assert ChangeOver(files, service).resume().kek_id == B  # again: nothing left to do
        settled(files)

    @pytest.mark.parametrize("name", ["link", "replace", "fsync"])
    def test_an_error_after_the_rotation_says_that_it_was_done(
        self, files: KeyFiles, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`kek: No space left on device` was all that it said, and the new KEK is in F.next alone."""
        service = Service()

        def full(step: str) -> None:
            if step == "rotated":
                patch.setattr(os, name, _no_space)

        with monkeypatch.context() as patch, pytest.raises(CommandFailed) as caught:
            rotate(files, service, step=full)
        assert service.now == Active(B) and "rotated" in caught.value.message
        assert "kek.next" in caught.value.message and "--resume" in caught.value.hint
        ChangeOver(files, service).resume()
        settled(files)

    def test_resume_brings_to_the_disk_what_the_daemon_hears_of(
        self, files: KeyFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The earlier run was killed, or had an error, before it did: a power cut could take F.next away."""
        service = Service()
        put(files.following, NEW)
        order = record(monkeypatch)
        ChangeOver(files, service, step=order.append).resume()
        before = order[: order.index("rotated")]
        assert before[-2:] == ["fsync file", "fsync folder"]
        settled(files)

    @pytest.mark.parametrize("committed", [False, True])
    def test_death_during_the_rotation(self, files: KeyFiles, committed: bool) -> None:
        service = Service()
        service.before, service.after = (None, Died()) if committed else (Died(), None)
        with pytest.raises(Died):
            rotate(files, service)
        assert daemon_starts(files, service)
        service.before = service.after = None
        ChangeOver(files, service).resume()
        settled(files)
        assert len(service.asked) == (1 if committed else 2)

    def test_death_while_a_key_file_is_written(
        self, files: KeyFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """kill -9 leaves a part of F.next under a name of its own; the next run removes it."""
        part = files.following.with_name(f".{files.following.name}.0011aabb.part")
        part.write_bytes(NEW.hex().encode()[:40])
        service = Service()
        assert daemon_starts(files, service)
        ChangeOver(files, service).resume()
        assert names(files) == {"kek"} and kek_id_of(files.current) == A
        part.write_bytes(b"")
        rotate(files, service)
        settled(files)

    def test_death_between_the_two_names_of_a_new_file(self, files: KeyFiles) -> None:
        """kill -9 after link(2): the part and F.next are one file. To clean up must not harm it."""
        put(files.following, NEW)
        os.link(files.following, files.following.with_name(f".{files.following.name}.0011aabb.part"))
        service = Service()
        service.now = Active(B)
        ChangeOver(files, service).resume()
        settled(files)

    @pytest.mark.parametrize("committed", [False, True])
    @pytest.mark.parametrize("error", [Unavailable("no room", status=503), ConnectionFailed("it broke")])
    def test_an_unknown_outcome_keeps_the_new_key(
        self, files: KeyFiles, error: Exception, committed: bool
    ) -> None:
        service = Service()
        service.before, service.after = (None, error) if committed else (error, None)
        with pytest.raises(CommandFailed) as caught:
            rotate(files, service)
        assert "kek.next" in caught.value.message and "--resume" in caught.value.hint
        assert kek_id_of(files.following) == B and kek_id_of(files.current) == A
        with pytest.raises(CommandFailed, match="unfinished"):
            rotate(files, service, OTHER)
        service.before = service.after = None
        ChangeOver(files, service).resume()
        settled(files)

    def test_a_refusal_takes_the_new_key_back(self, files: KeyFiles) -> None:
        service = Service()
        service.before = Conflict("the KEK is in the keyring already", status=409)
        with pytest.raises(Conflict):
            rotate(files, service)
        assert names(files) == {"kek"} and kek_id_of(files.current) == A

    @pytest.mark.parametrize("now", [Active(B), Active(A, B)])
    def test_a_refusal_keeps_a_key_that_is_in_use(self, files: KeyFiles, now: Active) -> None:
        """The request was refused because the same key is already, or is just becoming, the active one."""
        service = Service()

        def refuse(key: memoryview) -> RotationResult:
            service.now = now
            raise Conflict("a rotation is under way", status=409)

        service.rotate = refuse  # type: ignore[method-assign]
        with pytest.raises(Conflict):
            rotate(files, service)
        assert kek_id_of(files.following) == B

    def test_resume_waits_for_a_rotation_under_way(self, files: KeyFiles) -> None:
        service = Service()
        service.now = Active(A, B)
        put(files.following, NEW)
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 3:
                service.now = Active(B)

        ChangeOver(files, service, sleep=sleep).resume()
        settled(files)
        assert len(slept) == 3 and service.asked == []

    def test_another_rotation(self, files: KeyFiles) -> None:
        service = Service()
        service.now = Active(A, C)
        with pytest.raises(CommandFailed, match=f"a rotation to {C} is under way"):
            rotate(files, service)
        assert names(files) == {"kek"}

    def test_the_config_of_another_daemon(self, files: KeyFiles) -> None:
        with pytest.raises(CommandFailed, match=f"active KEK is {C}"):
            rotate(files, Service(C))
        assert names(files) == {"kek"}

    def test_a_weak_key_goes_nowhere(self, files: KeyFiles) -> None:
        service = Service()
        with pytest.raises(WeakKey):
            rotate(files, service, bytes(32))
        assert names(files) == {"kek"} and not service.asked

    def test_forget_old(self, files: KeyFiles) -> None:
        with open(files.current, "rb") as old:
            ChangeOver(files, Service(), forget_old=True).rotate(memoryview(bytearray(NEW)))
            assert old.read() == bytes(65)
        assert names(files) == {"kek"} and kek_id_of(files.current) == B

    def test_forget_old_after_a_run_that_kept_it(self, files: KeyFiles) -> None:
        service = Service()

        def die(name: str) -> None:
            if name == "kept":
                raise Died

        with pytest.raises(Died):
            rotate(files, service, step=die)
        with open(files.current, "rb") as old:
            ChangeOver(files, service, forget_old=True).resume()
            assert old.read() == bytes(65)
        assert names(files) == {"kek"} and kek_id_of(files.current) == B

    @pytest.mark.parametrize("forget", [False, True])
    @pytest.mark.parametrize("other", ["another key", "half a key", "a folder", "a link to nowhere"])
    def test_the_name_of_the_old_key_is_taken(self, files: KeyFiles, other: str, forget: bool) -> None:
        """By what isn't that key: then nothing begins, and it comes to no harm."""
        kept, service = files.kept(A), Service()
        self.take(kept, other)
        with pytest.raises(CommandFailed, match=f"{kept} is there, and does not hold the KEK {A}"):
            ChangeOver(files, service, forget_old=forget).rotate(memoryview(bytearray(NEW)))
        assert not service.asked and names(files) == {"kek", f"kek.old-{A}"} and kek_id_of(files.current) == A

    @pytest.mark.parametrize("other", ["another key", "half a key", "a folder", "a link to nowhere"])
    def test_it_is_taken_while_the_daemon_rotates(self, files: KeyFiles, other: str) -> None:
        kept, service = files.kept(A), Service()

        def take(name: str) -> None:
            if name == "rotated":
                self.take(kept, other)

        with pytest.raises(CommandFailed, match="does not hold the KEK") as refused:
            rotate(files, service, step=take)
        assert "move it away" in refused.value.hint and kek_id_of(files.current) == A
        kept.rename(kept.with_name("away"))
        ChangeOver(files, service).resume()
        assert kek_id_of(files.current) == B and kek_id_of(kept) == A
        assert names(files) == {"kek", f"kek.old-{A}", "away"}

    @staticmethod
    def take(path: Path, other: str) -> None:
        if other == "another key":
            put(path, OTHER)
        elif other == "half a key":
            path.write_text(OLD.hex()[:30])
        elif other == "a folder":
            path.mkdir()
        else:
            path.symlink_to("nowhere")

    def test_forget_old_spares_a_file_with_another_name(self, files: KeyFiles) -> None:
        os.link(files.current, files.current.with_name("safe"))
        ChangeOver(files, Service(), forget_old=True).rotate(memoryview(bytearray(NEW)))
        assert kek_id_of(files.current) == B and kek_id_of(files.current.with_name("safe")) == A

    def test_a_copy_of_the_key_as_next_is_dropped(self, files: KeyFiles) -> None:
        put(files.following, OLD)
        assert ChangeOver(files, Service()).resume().kek_id == A
        assert names(files) == {"kek"}

    def test_one_at_a_time(self, files: KeyFiles) -> None:
        service = Service()

        def second(name: str) -> None:
            if name == "next":
                with pytest.raises(CommandFailed, match="another rotate-kek"):
                    ChangeOver(files, service).resume()

        rotate(files, service, step=second)
        settled(files)

    def test_a_symbolic_link_is_refused(self, files: KeyFiles) -> None:
        link = KeyFiles(files.current.with_name("link"))
        link.current.symlink_to("kek")
        with pytest.raises(CommandFailed, match="symbolic link"):
            rotate(link, Service())
        assert names(files) == {"kek", "link"}

    @pytest.mark.root
    def test_the_daemon_can_read_the_new_key(self, files: KeyFiles) -> None:
        """Root rotates for a daemon that is another user: both files stay readable for that one."""
        files.current.parent.chmod(0o755)
        os.chown(files.current, 12345, 23456)
        ChangeOver(files, Service(), owner=os.stat(files.current)).rotate(memoryview(bytearray(NEW)))
        settled(files)
        for path in (files.current, files.kept(A)):
            about = path.stat()
            assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (12345, 23456, 0o600)


class TestElsewhere:
    """The configuration holds the key itself."""

    @pytest.fixture
    def config(self, short_tmp: Path) -> Path:
        path = short_tmp / "kms.yaml"
        path.write_text("")
        return path

    @pytest.fixture
    def path(self, config: Path) -> Iterator[Path]:
        yield config.with_name("master-key")
        assert not list(config.parent.glob(".*"))

    def rotate(self, path: Path, service: Service, owner: Path | None) -> RotationResult:
        return keyfiles.rotate_elsewhere(path, memoryview(bytearray(NEW)), service, owner)

    def test_the_file_is_there_before_the_daemon_is_asked(self, path: Path, config: Path) -> None:
        service = Service()
        service.before = Died()
        with pytest.raises(Died):
            self.rotate(path, service, config)
        assert kek_id_of(path) == B

    def test_a_refusal_removes_what_was_made(self, path: Path, config: Path) -> None:
        service = Service()
        service.before = Conflict("no", status=409)
        with pytest.raises(Conflict):
            self.rotate(path, service, config)
        assert not path.exists()
        put(path, NEW)
        with pytest.raises(Conflict):
            self.rotate(path, service, None)
        assert kek_id_of(path) == B  # the operator's own file stays

    def test_an_unknown_outcome_names_the_file(self, path: Path, config: Path) -> None:
        service = Service()
        service.after = Unavailable("no room", status=503)
        with pytest.raises(CommandFailed) as caught:
            self.rotate(path, service, config)
        assert str(path) in caught.value.message and B in caught.value.hint and kek_id_of(path) == B


def test_the_states_of_the_theory_are_tested() -> None:
    """Each row of the module's table that names a step is one that `decide` returns."""
    text = keyfiles.__doc__ or ""
    steps = set(re.findall(r"  (nothing|rotate|wait|replace|drop|refuse)\b", text))
    assert steps == {"nothing", "rotate", "wait", "replace", "drop", "refuse"}
