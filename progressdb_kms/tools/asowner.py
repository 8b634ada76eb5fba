"""Commands of root's on files of the daemon's user: what they make must not lock the daemon out, and nothing
that this user prepared (a link in the place of a file) may lead root's hand elsewhere.

The daemon trusts a configuration and a key file only where they are root's or its own, and the files of its
data-dir belong to its user: the owner of the data-dir. So root reads such files as that user (`acting_as`),
and a command that works in the data-dir becomes that user for good (`become`), once it has opened what only
root may read. Nothing is given away afterwards: a file that root would chown may be linked elsewhere.

Before either, all modules are loaded: that user may not be able to read this program.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import importlib
import os
import pkgutil
import pwd
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..process.streams import DEPENDENCIES

if TYPE_CHECKING:
    from ..config.load import Loaded
    from ..config.options import Settings


def of(path: Path) -> int:
    """The uid that a file belongs to; that of this process where there is no such file."""
    try:
        return path.stat().st_uid
    except OSError:
        return os.geteuid()


def switches(folder: Path) -> bool:
    """Is this root, and the folder another user's?"""
    return os.geteuid() == 0 and of(folder) != 0


def become(folder: Path) -> None:
    """Let root be the owner of the folder from now on, without a way back. No effect for others."""
    if switches(folder):
        uid = of(folder)
        gid = _group(uid)
        _load_all()
        os.setgroups([gid])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


@contextlib.contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Let root look at files as this user does, and as the user's own group. No effect for others.

    Call it before threads are started.
    """
    if os.geteuid() != 0 or uid == 0:
        yield
        return
    _load_all()
    group, groups = os.getegid(), os.getgroups()
    os.setgroups([])
    os.setegid(_group(uid))
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def _group(uid: int) -> int:
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return uid


@functools.cache
def _load_all() -> None:
    """Every module of this package, and what they load later (PyYAML, in a child)."""
    package = importlib.import_module(__name__.partition(".")[0])
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        with contextlib.suppress(ImportError, ConfigError):  # of an extra that is not installed
            importlib.import_module(found.name)
    for name in DEPENDENCIES:
        with contextlib.suppress(ImportError):  # the child says so
            importlib.import_module(name)
    for name in ("ascii", "latin-1", "utf-8", "idna"):
        codecs.lookup(name)


# ---- the configuration -------------------------------------------------------------------------------


def load_config(
    flags: Mapping[str, str | None], *, need_key: bool = True, first: bool = False, fleet: bool = False
) -> Loaded:
    """`load` for commands: what only the daemon's user trusts, root reads as that user. Where both fail, and
    root for want of trust alone, what the user met is the fault: it is what the daemon's start would say."""
    from ..config.load import load

    flags = _or_packaged(flags)
    try:
        return load(flags, os.environ, need_key=need_key, first=first, fleet=fleet)
    except ConfigError as met:
        user = _daemon_user(flags) if os.geteuid() == 0 else 0
        if user == 0:
            raise
        try:
            with acting_as(user):
                return load(flags, os.environ, need_key=need_key, first=first, fleet=fleet)
        except ConfigError as theirs:
            raise (theirs if met.code == "distrust" else met) from None


def barred(flags: Mapping[str, str | None], settings: Settings) -> ConfigError | None:
    """What the daemon's user would hear of a file that root has read."""
    from ..config.load import load

    user = daemon_user(settings)
    if os.geteuid() != 0 or user == 0 or settings.config_file is None:
        return None
    try:
        with acting_as(user), load(_or_packaged(flags), os.environ, fleet=True):
            return None
    except ConfigError as error:
        return error


def _or_packaged(flags: Mapping[str, str | None]) -> Mapping[str, str | None]:
    """Where neither flag nor environment names anything: the packages' configuration, if there is one."""
    if (
        any(flags.values())
        or any(os.environ.get(name) for name in NAMING)
        or not os.path.exists(PACKAGED_CONFIG)
    ):
        return flags
    return {**flags, "config": PACKAGED_CONFIG}


NAMING = tuple(
    f"PROGRESSDB_KMS_{name}" for name in ("SOCKET", "DATA_DIR", "MASTER_KEY_FILE", "MASTER_KEY_HEX")
)

PACKAGED_CONFIG = "/etc/progressdb-kms/progressdb-kms.yaml"
PACKAGED_USER = "progressdb-kms"


def daemon_user(settings: Settings) -> int:
    """Whose the data-dir is. Before the first start there is none: then the packages' user for their
    configuration."""
    if not settings.data_dir.exists() and settings.config_file == PACKAGED_CONFIG:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(PACKAGED_USER).pw_uid
    return of(settings.data_dir)


def _daemon_user(flags: Mapping[str, str | None]) -> int:
    """Whose the configuration is, or else the data-dir that it names; 0 where that is not to be had."""
    from ..config.load import load

    path = flags.get("config")
    if path and of(Path(path)) != 0:
        return of(Path(path))
    with contextlib.suppress(ConfigError), load(flags, os.environ, need_key=False, fleet=True) as loaded:
        return daemon_user(loaded.settings)
    return 0
