"""Who holds a data-dir: one daemon, or one offline command.

Two locks (flock) are held: on kms.lock, which also tells who holds it, and on the folder itself, which
nobody can take away and still reach the store. A daemon publishes device and inode of the files that it has
open in the second line of kms.lock: a command beside it must not read others."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..audit.log import FILE_NAME as AUDIT_LOG
from ..disk import regular
from ..encoding import json_dumps, timestamp, wall
from ..errors import AlreadyRunning, ConfigError, StoreUnavailable
from ..store.snapshots import FOLDER as SNAPSHOTS
from ..store.sqlite import FILE_NAME, FILES

LOCK_FILE = "kms.lock"

_PATIENCE = 0.5
"""Seconds: a command that looks whether a daemon runs holds the lock for a moment."""

_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW

Files = Mapping[str, tuple[int, int]]
"""Device and inode by the file's name."""


class Claim(NamedTuple):
    """The descriptors that hold the locks; inherited over fork, so a child closes its own."""

    folder: int
    file: int

    def insist(self, data_dir: Path) -> None:
        """Raises StoreUnavailable where another folder is there by now: a process of the daemon that came
        there would begin a store of its own."""
        why = "was moved away, unmounted, or mounted over: put it back"
        try:
            if os.path.samestat(os.stat(f"{data_dir}/."), os.fstat(self.folder)):
                return
        except OSError as error:
            if isinstance(error, PermissionError):
                why = "is closed to the daemon: let it belong to the daemon's user, with mode 0700"
        raise StoreUnavailable(f"{data_dir} {why}")

    def close(self) -> None:
        os.close(self.folder)
        os.close(self.file)


def claim(data_dir: Path) -> Claim:
    """Make the data-dir if need be and lock it.

    Raises ConfigError for a folder that isn't ours alone, AlreadyRunning where it is taken.
    """
    with contextlib.ExitStack() as undo:
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check(data_dir)
            folder = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, folder)
            file = os.open(data_dir / LOCK_FILE, _FLAGS | os.O_CREAT, 0o600)
            undo.callback(os.close, file)
            for descriptor, name in ((folder, data_dir), (file, data_dir / LOCK_FILE)):
                _lock(descriptor, name, data_dir, file)
            line = f"pid {os.getpid()} since {timestamp(wall())}\n".encode()
            os.ftruncate(file, os.pwrite(file, line, 0))  # a full disk takes what is written over
        except OSError as error:
            hint = "it must be writable and have room: `findmnt -T` and `lsattr -d` of it tell more"
            raise ConfigError(f"data_dir {data_dir} can't be used: {error.strerror}", hint=hint) from error
        undo.pop_all()
    return Claim(folder, file)


def _check(data_dir: Path) -> None:
    about = data_dir.stat()
    if about.st_uid != os.geteuid():
        raise ConfigError(
            f"{data_dir} belongs to uid {about.st_uid}, and this is uid {os.geteuid()}",
            hint="run it as the owner of the data-dir",
        )
    if about.st_mode & 0o077 and not os.listdir(data_dir):
        data_dir.chmod(0o700)  # just made by somebody with a wide umask, and still empty
        about = data_dir.stat()
    if about.st_mode & 0o077:
        raise ConfigError(
            f"{data_dir} is open to others (mode {about.st_mode & 0o777:04o})", hint="chmod 0700 it"
        )
    if (data_dir / SNAPSHOTS).is_symlink():
        raise ConfigError(f"{data_dir / SNAPSHOTS} is a symbolic link", hint="move the folder itself there")
    for name in (*FILES, f"{FILE_NAME}-journal", AUDIT_LOG, LOCK_FILE):
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(data_dir / name).st_mode):
                raise ConfigError(
                    f"{data_dir / name} is no regular file", hint="find out who put it there; move it away"
                )


def _lock(descriptor: int, name: Path, data_dir: Path, file: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise ConfigError(f"{name} can't be locked: {error.strerror}") from error
        if time.monotonic() > deadline:
            holder = os.pread(file, 100, 0).partition(b"\n")[0].decode("ascii", "replace")
            raise AlreadyRunning(f"the data-dir {data_dir} is in use ({holder or 'by another process'})")
        time.sleep(0.02)


def is_held(data_dir: Path) -> bool:
    """Does somebody hold the kms.lock that is at the path now?"""
    with contextlib.suppress(OSError), open(regular(data_dir / LOCK_FILE, os.O_NOFOLLOW), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def publish(data_dir: Path, files: Files) -> None:
    """Raises OSError."""
    with open(regular(data_dir / LOCK_FILE, _FLAGS), "r+b", buffering=0) as file:
        first = file.read(200).partition(b"\n")[0]
        text = first + b"\n" + json_dumps(files).encode() + b"\n"
        os.pwrite(file.fileno(), text, 0)
        os.ftruncate(file.fileno(), len(text))
