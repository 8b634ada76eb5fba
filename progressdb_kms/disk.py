"""On the way to the disk: all of the bytes written; a file replaced; a file, or a folder's names, synced."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def write_all(descriptor: int, data: bytes) -> None:
    """A pipe, or a disk that fills up, may take less than it is given."""
    while data:
        data = data[os.write(descriptor, data) :]


def regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY, folder: int | None = None) -> int:
    """A descriptor of a file that is one: a pipe in its place would let us wait for ever. One that is made is
    its owner's alone. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600, dir_fd=folder)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "is no regular file", os.fspath(path))


def sync(path: str | os.PathLike[str]) -> None:
    """Of a file what stands in it, of a folder the names. Raises OSError. Not for a database that is open: to
    close any descriptor of it gives up the locks that this process has on it (POSIX)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(path: Path, data: bytes) -> None:
    """Let a small file (0600) hold this, whatever was there: after a crash it is the old one or the new.
    Raises OSError."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(part, flags, 0o600), "wb", buffering=0) as file:
        write_all(file.fileno(), data)
        os.fsync(file.fileno())
    os.replace(part, path)
    sync(path.parent)
