"""Where a command for the socket finds the daemon.

    --socket, --config, PROGRESSDB_KMS_SOCKET      decide, in this order
    the packaged configuration file,
    the packages' socket, the development socket   are tried: the first that is a socket is taken

What was named is taken or fails; only what nobody named is looked for, and the error says where.
"""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from ..client import DEFAULT_SOCKET
from ..errors import ConfigError
from . import asowner
from .asowner import PACKAGED_CONFIG
from .console import CommandFailed

PACKAGED_SOCKET = "/run/progressdb-kms/kms.sock"


def socket_of(args: argparse.Namespace) -> str:
    """The socket's path. Raises ConfigError for a configuration that is wrong, CommandFailed where nothing
    was named and nothing is there."""
    if args.socket:
        return str(args.socket)
    if getattr(args, "config", None):
        return _configured(args.config)
    return os.environ.get("PROGRESSDB_KMS_SOCKET") or _found()


def _found() -> str:
    tried = []
    for path, why in _candidates():
        with suppress(OSError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                return path
        tried.append(f"{path}{why}")
    raise CommandFailed(
        f"no daemon was found; tried {', '.join(tried)}",
        hint="is it running? systemctl status progressdb-kms; else --socket PATH or --config FILE names it",
    )


def _candidates() -> Iterator[tuple[str, str]]:
    if os.path.exists(PACKAGED_CONFIG):
        try:
            yield _configured(PACKAGED_CONFIG), f" (from {PACKAGED_CONFIG})"
        except ConfigError:
            yield PACKAGED_CONFIG, " (which can't be read by this user)"
    yield PACKAGED_SOCKET, ""
    yield DEFAULT_SOCKET, ""


def _configured(config: str) -> str:
    with asowner.load_config({"config": config}, need_key=False, fleet=True) as loaded:
        return str(loaded.settings.socket)
