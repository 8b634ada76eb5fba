"""Commands of root's on files of the daemon's user: nothing that they make may lock the daemon out.

The daemon trusts a configuration and a key file only where they are root's or its own, and the files of its
data-dir belong to its user: the owner of the data-dir. So root reads such files as that user, and gives away
what it made.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config.load import Loaded


def of(path: Path) -> int:
    """The uid that a file belongs to; that of this process where there is no such file."""
    try:
        return path.stat().st_uid
    except OSError:
        return os.geteuid()


@contextlib.contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Let root look at files as this user does, and as the user's own group. No effect for others.

    Call it before threads are started.
    """
    if os.geteuid() != 0 or uid == 0:
        yield
        return
    group = os.getegid()
    with contextlib.suppress(KeyError):
        os.setegid(pwd.getpwuid(uid).pw_gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


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


# ---- the configuration -------------------------------------------------------------------------------


def load_config(flags: Mapping[str, Optional[str]], *, need_key: bool = True, first: bool = False) -> Loaded:
    """`load` for commands: what only the daemon's user trusts, root reads as that user."""
    from ..config.load import load
    from ..config.yamlfile import preload

    try:
        return load(flags, os.environ, need_key=need_key, first=first)
    except ConfigError:
        user = _daemon_user(flags) if os.geteuid() == 0 else 0
        if user == 0:
            raise
        preload()
        with contextlib.suppress(ConfigError), acting_as(user):
            return load(flags, os.environ, need_key=need_key, first=first)
        raise


def _daemon_user(flags: Mapping[str, Optional[str]]) -> int:
    """Whose the configuration is, or else the data-dir that it names; 0 where that is not to be had."""
    from ..config.load import load

    path = flags.get("config")
    if path and of(Path(path)) != 0:
        return of(Path(path))
    with contextlib.suppress(ConfigError), load(flags, os.environ, need_key=False) as loaded:
        return of(loaded.settings.data_dir)
    return 0
