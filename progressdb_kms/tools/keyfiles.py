"""Key files: making one, and changing one over while the KEK rotates.

The rule: an active KEK is in a file, synced to the disk, before the daemon hears of it, and until the daemon
has another. So the new key goes to `F.next` first (F is the master_key_file), then the daemon rotates, then
`F.next` takes the place of F. The store knows which of the two is right: its active kek_id. A is the old key,
B the new one; a crash or a lost connection leaves one of these states, and `decide` names the step that leads
on. The daemon starts in each of them, because it reads F and F.next and takes the one the store names.

    F  F.next  store's active  rotation to   left by a crash …           step
    A  -       A               -             before F.next was in place  nothing (a part of F.next is removed)
    A  B       A               -             before the daemon began     rotate
    A  B       A               B             while the daemon works      wait, then look again
    A  B       B               -             before the files changed    replace: F -> F.old-<A>, F.next -> F
    B  -       B               -             after that                  nothing
    A  A       A               -             (a copy made by hand)       drop F.next
    -  B       A               - or B        (F was lost)                rotate, or wait
    -  B       B               -             (F was lost)                replace: F.next -> F
    A  B       A               C             another rotation runs       refuse
    any other                                another key was configured  refuse, naming the kek_ids

Before F.next is written it is proved that a file of this folder can take the place of F: one that is mounted
alone can't be replaced. A lost F is no obstacle, as long as the daemon has the KEK in its memory.

`F.next` is removed only where the store's active KEK and the rotation under way are both known to be others:
after a 4xx answer. A request of unknown outcome leaves it for `rotate-kek --resume`.

Where the configuration holds the key itself (master_key_hex, a credential) there is no F: the new key stays
in a file of its own, and the operator is told which lines to change.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple, Protocol

from ..client import ClientError, RequestRefused, RotationResult
from ..client.calls import hex_into
from ..config import keysource
from ..config.load import PENDING_SUFFIX
from ..config.weakkeys import check_master_key
from ..crypto.aead import KEY_SIZE
from ..crypto.keyring import fingerprint
from ..crypto.memory import LockedBuffer
from ..disk import regular, sync
from ..errors import ConfigError
from . import asowner
from .console import CommandFailed, give_name, nameless, naming

POLL = 0.5
"""Seconds between two looks at a rotation that somebody else began."""

TRIES = 3
"""How often a new key is sent to a daemon that says yes and goes on with the old one."""

RESUME = "run `progressdb-kms rotate-kek --resume`"

LOST = "while the daemon runs, `rotate-kek --generate` or `--new-key-file NEW` brings a new key"


class KeyFiles(NamedTuple):
    """The files around a master_key_file F."""

    current: Path

    @property
    def following(self) -> Path:
        return self.current.with_name(self.current.name + PENDING_SUFFIX)

    def kept(self, kek_id: str) -> Path:
        return self.current.with_name(f"{self.current.name}.old-{kek_id}")

    def parts(self) -> list[Path]:
        """What a crash left of files that were never complete."""
        return _parts(self.following)


class Active(NamedTuple):
    """The store's active kek_id, and that which a rotation under way leads to (None: no rotation)."""

    kek_id: str
    rotating_to: str | None = None


class Service(Protocol):
    """What the daemon is asked. `rotate` raises RequestRefused only where nothing was begun."""

    def active(self) -> Active: ...
    def rotate(self, key: memoryview) -> RotationResult: ...


Step = Callable[[str], None]
"""Called after each step with its name: tests stop there."""


# ---- one key file ------------------------------------------------------------------------------------


def read_key(path: Path, key: memoryview, user: int) -> str:
    """Read a key file into 32 bytes of locked memory. Returns the kek_id. Raises ConfigError.

    `user`: the daemon's. It may be his, root's or our own: whoever else has it knows the key.
    """
    owner = asowner.of(path)
    if owner not in (0, os.geteuid(), user):
        hint = "its owner knows the key: only one of root's, of the daemon's user's, or your own is taken"
        raise ConfigError(f"{path} belongs to uid {owner}", hint=hint)
    with (
        LockedBuffer(keysource.SCRATCH_SIZE) as scratch,
        asowner.acting_as(user if owner == user else os.geteuid()),
    ):
        keysource.read(keysource.Source("file", str(path), str(path)), {}, scratch.view, key)
    return fingerprint(key)


def kek_id_of(path: Path, user: int | None = None) -> str:
    """Whose key it is does no harm where it is only named."""
    with LockedBuffer(KEY_SIZE) as memory:
        return read_key(path, memory.view, asowner.of(path) if user is None else user)


def kek_id_if_there(path: Path, user: int) -> str | None:
    """None where there is no such file. Raises ConfigError for one that holds no key."""
    try:
        return kek_id_of(path, user) if path.exists() else None
    except ConfigError as error:
        hints = error.hint, "is its key lost? Move it away and do this again"
        raise ConfigError(error.message, hint="; or ".join(filter(None, hints))) from None


def random_key(key: memoryview) -> str:
    """Fill with random bytes of the OS, which pass through no other object. Returns the kek_id."""
    with open("/dev/urandom", "rb", buffering=0) as source:
        if os.readv(source.fileno(), [key]) != len(key):
            raise CommandFailed("the OS gave too few random bytes")
    return fingerprint(key)


def write_key(path: Path, key: memoryview, like: os.stat_result | None = None) -> None:
    """Make a key file (0600, hex, synced with its folder), whole or not at all; never over another file.

    `like`: a file whose owner and group it gets.
    """
    for left in _parts(path):
        remove_key(left)
    try:
        with _new_file(path) as (descriptor, part):
            _write(descriptor, key, like)
            os.link(part, path) if part else give_name(descriptor, path)
    except FileExistsError:
        raise CommandFailed(
            f"{path} exists, and a key is never overwritten", hint="name another file"
        ) from None
    except OSError as error:
        raise CommandFailed(
            f"{path} can't be made: {error.strerror}",
            hint=f"nothing was changed: the folder {path.parent} must exist, be writable and have room",
        ) from error
    try:
        sync(path.parent)
    except OSError as error:
        raise CommandFailed(
            f"{path} is there, but its folder can't be brought to the disk: {error.strerror}",
            hint="mend that first: a power cut may take the key away",
        ) from error


def prove_replaceable(path: Path, probe: Path) -> None:
    """A file that is renamed to `path` will get there. Raises CommandFailed; nothing is changed.

    The kernel is asked: `probe` is made a second name of the file and renamed onto it, which does nothing
    where both are one file, but is refused where the true rename will be (EXDEV or EBUSY for a file that is
    mounted alone, EROFS, EACCES).
    """
    try:
        if path.exists():
            os.link(path, probe)
            os.replace(probe, path)
        else:
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        alone = error.errno in (errno.EXDEV, errno.EBUSY)
        why = "it is mounted alone" if alone else str(error.strerror)
        todo = f"mount its folder {path.parent}, not the file" if alone else f"make {path.parent} writable"
        raise CommandFailed(f"{path} can't be replaced by a new key file: {why}", hint=todo) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(probe)


def remove_key(path: Path) -> None:
    """Unlink a key file, and overwrite it unless it has another name. On a journal or flash, old blocks may
    live on all the same."""
    descriptor = regular(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.unlink(path)
        _overwrite(descriptor)
    finally:
        os.close(descriptor)
    sync(path.parent)


def sync_file(path: Path) -> None:
    """Bring a file and its name to the disk."""
    sync(path)
    sync(path.parent)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.part"))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[tuple[int, Path | None]]:
    """A file that has no name yet, so that no half of a key, and no second name of one, outlives us. Where
    there are no such files a part, which the next run removes."""
    descriptor, part = nameless(path.parent), None
    if descriptor is None:
        part = _part_of(path)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor, part
    finally:
        os.close(descriptor)
        if part:
            part.unlink(missing_ok=True)


def _write(descriptor: int, key: memoryview, like: os.stat_result | None) -> None:
    if like is not None and (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(descriptor, like.st_uid, like.st_gid)
    os.fchmod(descriptor, 0o600)
    with LockedBuffer(2 * KEY_SIZE + 1) as memory:
        hex_into(key, memory.view)
        memory.view[2 * KEY_SIZE] = 0x0A
        if os.write(descriptor, memory.view) != 2 * KEY_SIZE + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def _overwrite(descriptor: int) -> None:
    """Only what has no name left: a part that was linked into its place is that file."""
    about = os.fstat(descriptor)
    if about.st_nlink == 0:
        os.pwrite(descriptor, bytes(about.st_size), 0)
        os.fsync(descriptor)


# ---- changing over -----------------------------------------------------------------------------------


def decide(current: str | None, following: str | None, active: Active) -> str:
    """The step that leads on: nothing, rotate, wait, replace or drop. See the table above.

    Takes kek_ids: of F, of F.next (None: there is none), of the store. Raises CommandFailed.
    """
    if active.rotating_to is not None and active.rotating_to != following:
        raise CommandFailed(
            f"a rotation to {active.rotating_to} is under way", hint="`progressdb-kms status` tells how far"
        )
    if following is None and active.kek_id == current:
        return "nothing"
    if following is not None and active.rotating_to == following:
        return "wait"
    if following is not None and active.kek_id == current:
        return "drop" if following == current else "rotate"
    if following is not None and active.kek_id == following:
        return "replace"
    if current is None and following is not None:
        return "rotate"
    if current is None:
        raise CommandFailed("the master_key_file is not there, nor is its .next", hint=LOST)
    files = f"master_key_file holds {current}" + (f", its .next {following}" if following else "")
    raise CommandFailed(
        f"the daemon's active KEK is {active.kek_id}, but {files}",
        hint="is this the daemon's config? put the key file of that kek_id in place, or, if it is lost, move "
        "the other one away; nothing was changed",
    )


def _take_back(path: Path, new_kek_id: str, service: Service) -> None:
    """The daemon refused: the new file goes, unless something else made its key the right one meanwhile."""
    active = service.active()
    if new_kek_id not in (active.kek_id, active.rotating_to):
        remove_key(path)


def rotate_elsewhere(path: Path, key: memoryview, service: Service, beside: Path | None) -> RotationResult:
    """Rotate where the configuration holds the key itself: the new one is, and stays, in the file `path`.

    With `beside` the file is made first, and belongs to whom that file belongs; without, it is there already.
    """
    check_master_key(key)
    if beside is not None:
        write_key(path, key, os.stat(beside))
    else:
        sync_file(path)
    try:
        return service.rotate(key)
    except RequestRefused:
        if beside is not None:
            _take_back(path, fingerprint(key), service)
        raise
    except ClientError as error:
        raise CommandFailed(
            f"{error.message}; the new key is in {path}",
            hint=f"if `progressdb-kms status` tells kek_id {fingerprint(key)}, the rotation was done with it",
        ) from error


class ChangeOver:
    """One run of `rotate-kek` over a master_key_file."""

    def __init__(
        self,
        files: KeyFiles,
        service: Service,
        *,
        forget_old: bool = False,
        owner: os.stat_result | None = None,
        step: Step = lambda name: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._files = files
        self._service = service
        self._forget_old = forget_old
        self._owner = owner  # whose a new key file is where the old one is lost: the daemon's user's
        self._user = os.geteuid() if owner is None else owner.st_uid
        self._step = step
        self._sleep = sleep

    def rotate(self, new_key: memoryview) -> RotationResult:
        """Bring in a new key. Raises CommandFailed where an earlier run is unfinished."""
        check_master_key(new_key)
        with self._locked():
            self._check()
            self._remove_parts()
            current = self._files.current
            owner = os.stat(current) if current.exists() else self._owner
            write_key(self._files.following, new_key, owner)
            self._step("next")
            try:
                return self._lead_on()
            except RequestRefused:
                _take_back(self._files.following, fingerprint(new_key), self._service)
                raise
            except ClientError as error:
                raise CommandFailed(
                    f"{error.message}; the new key is kept in {self._files.following}",
                    hint=f"{error.hint}, then {RESUME}" if error.status and error.hint else RESUME,
                ) from error

    def resume(self) -> RotationResult:
        """Finish what an earlier run began. `kek_version` is empty where it was done before."""
        with self._locked():
            self._remove_parts()
            with naming(self._files.following):  # what the earlier run may have been kept from
                if self._files.following.exists():
                    self._prove()
                    sync(self._files.following)
                sync(self._files.current.parent)
            return self._lead_on()

    def rehearse(self) -> None:
        """All that `rotate` looks at before the daemon hears of a key. Raises CommandFailed."""
        with self._locked():
            self._check()

    def _check(self) -> None:
        if self._files.following.exists():
            raise CommandFailed(f"{self._files.following} is left of an unfinished rotation", hint=RESUME)
        current, active = kek_id_if_there(self._files.current, self._user), self._service.active()
        if current is not None or active.rotating_to is not None:
            decide(current, None, active)
        if current is not None:
            self._check_kept(current, "move it away, and do this again")
        self._prove()

    def _prove(self) -> None:
        try:
            prove_replaceable(self._files.current, _part_of(self._files.following))
        except CommandFailed as error:
            if not self._files.following.exists():
                raise
            keep = f"first copy {self._files.following} to a safe place, it may hold the only key; then "
            raise CommandFailed(error.message, hint=keep + error.hint) from None

    def _lead_on(self) -> RotationResult:
        result = RotationResult("", "", 0, "", {})
        tries = 0
        while True:
            current, following = (
                kek_id_if_there(path, self._user) for path in (self._files.current, self._files.following)
            )
            step = decide(current, following, self._service.active())
            if step == "nothing":
                return result._replace(kek_id=current or "")
            if step == "rotate":
                if tries == TRIES:
                    raise CommandFailed(
                        f"the daemon answers that it rotated, but its active KEK stays {current}",
                        hint=f"is it the daemon that answers? The new key is kept in {self._files.following}",
                    )
                self._sleep(POLL * tries)
                result = self._rotate()
                tries += 1
            elif step == "wait":
                self._sleep(POLL)
            elif step == "replace":
                self._change_names(current)
            else:
                remove_key(self._files.following)

    def _rotate(self) -> RotationResult:
        with LockedBuffer(KEY_SIZE) as memory:
            read_key(self._files.following, memory.view, self._user)
            result = self._service.rotate(memory.view)
        self._step("rotated")
        return result

    def _change_names(self, old_kek_id: str | None) -> None:
        """The daemon has the new KEK by now: whoever reads of an error must know that."""
        files = self._files
        try:
            self._replace(old_kek_id)
        except OSError as error:
            raise CommandFailed(
                f"the DEKs are rotated, but {files.following} could not take the place of {files.current} "
                f"for sure: {error.strerror}",
                hint=f"keep both files, see to the disk, then {RESUME}",
            ) from error

    def _replace(self, old_kek_id: str | None) -> None:
        files = self._files
        if old_kek_id is not None:
            self._check_kept(old_kek_id, f"move it away, then {RESUME}")
        if old_kek_id is None:
            os.replace(files.following, files.current)
            sync(files.current.parent)
        elif self._forget_old:
            with open(files.current, "r+b", buffering=0) as old:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(files.kept(old_kek_id))  # an interrupted run without --forget-old
                os.replace(files.following, files.current)
                sync(files.current.parent)
                _overwrite(old.fileno())
        else:
            with contextlib.suppress(FileExistsError):
                os.link(files.current, files.kept(old_kek_id))
            sync(files.current.parent)
            self._step("kept")
            os.replace(files.following, files.current)
            sync(files.current.parent)
        self._step("replaced")

    def _check_kept(self, kek_id: str, hint: str) -> None:
        """What has the name under which the old key is kept must be that key: an earlier run's."""
        kept = self._files.kept(kek_id)
        if not os.path.lexists(kept):
            return
        with contextlib.suppress(ConfigError):
            if kek_id_of(kept, self._user) == kek_id:
                return
        raise CommandFailed(f"{kept} is there, and does not hold the KEK {kek_id}", hint=hint)

    def _remove_parts(self) -> None:
        for part in self._files.parts():
            remove_key(part)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One change-over at a time; the lock is on the folder, so it leaves no file behind."""
        if self._files.current.is_symlink():
            raise CommandFailed(
                f"{self._files.current} is a symbolic link, which a rename would replace",
                hint="let master_key_file name the file itself",
            )
        folder = os.open(self._files.current.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(folder)
            yield
        finally:
            os.close(folder)


def _lock(folder: int) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CommandFailed("another rotate-kek is at work on these files", hint="wait for its end") from None
