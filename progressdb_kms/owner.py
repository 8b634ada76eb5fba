"""Commands of root's on files of the daemon's user: nothing that they make may lock the daemon out.

The daemon trusts a key file only where it is root's or its own, and the files of its data-dir belong to its
user: the owner of the data-dir. So root reads such a key file as that user, and gives away what it made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def of(path: Path) -> int:
    """The uid that a file belongs to; that of this process where there is no such file."""
    try:
        return path.stat().st_uid
    except OSError:
        return os.geteuid()


@contextlib.contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Let root look at files as this user does. No effect for others. Call it before threads are started."""
    if os.geteuid() != 0 or uid == 0:
        yield
        return
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def kept(folder: Path) -> Iterator[None]:
    """What root made in the folder meanwhile belongs to its owner in the end, also after an error."""
    try:
        yield
    finally:
        uid = of(folder)
        if os.geteuid() == 0 and uid != 0 and folder.is_dir():
            _give_away(folder, folder.stat())


def _give_away(folder: Path, about: os.stat_result) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.stat(follow_symlinks=False).st_uid == 0:
                os.chown(entry.path, about.st_uid, about.st_gid, follow_symlinks=False)
