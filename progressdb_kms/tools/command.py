"""A command: its row, and what the rows and functions of all commands share.

`@command(...)` above a function makes a row of it, which the parser, the man page, the shell completions and
the manual's check are made from; the folder `commands` has them all. A function gets the parsed arguments and
returns the exit code (None is 0), or raises an error with a message for the operator. Only what a command
needs is imported, in the function, so that `status` is quick and `serve` holds nothing of the rest.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from ..rules import BATCHES, OPERATIONS
from . import asowner
from .console import STDIO, UsageError

if TYPE_CHECKING:
    from ..client import Client
    from ..config.load import Loaded

SERVE, ONLINE, OFFLINE = "serve", "online", "offline"

DEFAULT_SOCKET = "/tmp/progressdb-kms.sock"  # noqa: S108
DEFAULT_DATA_DIR = "./kms-data"


class Arg(NamedTuple):
    """One argument. `kind`: flag, text, count (from 1), uid, file, folder, key_id, topic (of the manual), or
    a key of CHOICES or OFFERED."""

    names: tuple[str, ...]
    help: str
    kind: str = "text"
    metavar: str = ""
    nargs: str = ""  # as argparse has it: ? * + or a number
    required: bool = False
    default: Any = None
    empty: bool = False  # may it be ""?

    @property
    def positional(self) -> bool:
        return not self.names[0].startswith("-")


Run = Callable[[argparse.Namespace], Optional[int]]


class Command(NamedTuple):
    """One command. `run`: its function. `keys`: it handles key bytes, so its process is hardened before
    anything else."""

    name: str  # one or two words
    group: str
    help: str
    about: str
    args: tuple[Arg, ...]
    run: Run
    examples: tuple[str, ...] = ()
    keys: bool = False
    exits: tuple[tuple[int, str], ...] = ()


CHOICES: dict[str, tuple[str, ...]] = {
    "bench": ("calls", "many", "usage", "progressdb", "store", "rotate", "audit", "memory", "fleet"),
    "outcome": ("ok", "refused", "failed"),
    "state": ("enabled", "disabled", "pending_deletion", "shredded", "damaged"),
}

EVENTS = tuple(
    sorted(
        {
            *(*OPERATIONS, *BATCHES, "connect", "start", "stop", "shred", "restore", "import", "recount"),
            *("rotation_started", "rotation_finished", "rotation_failed", "chain_opened"),
            *("older_store_accepted", "audit_recovered", "audit_reopened", "shred_complete"),
        }
    )
)
"""Operations as the audit log has them."""

OFFERED: dict[str, tuple[str, ...]] = {"op": tuple(sorted({*OPERATIONS, *BATCHES})), "event": EVENTS}
"""Words that the shells complete; others are taken too, and judged by the command."""

GROUP_TITLES = {
    SERVE: "the daemon",
    ONLINE: "through the socket",
    OFFLINE: "on files",
}

EXITS = ((0, "it was done"), (1, "it failed; stderr says why"), (2, "the command line is wrong"))

ENVIRONMENT = (
    ("PROGRESSDB_KMS_SOCKET", "the socket, where neither --socket nor a --config names one"),
    ("PROGRESSDB_KMS_DATA_DIR", "the data-dir, likewise"),
    ("PROGRESSDB_KMS_MASTER_KEY_FILE", "the master key file; not read with --config"),
    ("PROGRESSDB_KMS_MASTER_KEY_HEX", "the master key; not read with --config"),
    ("PROGRESSDB_KMS_ALLOWED_UIDS", "UIDs that are served, with commas between; not read with --config"),
)

SOCKET = Arg(("--socket",), f"the daemon's Unix socket (default {DEFAULT_SOCKET})", "file", "PATH")
SERVER_UID = Arg(
    ("--server-uid",), "the daemon's UID, where others may write to its socket's folder", "uid", "UID"
)
DATA_DIR = Arg(
    ("--data-dir",), f"where the store and the audit log are (default {DEFAULT_DATA_DIR})", "folder", "DIR"
)
CONFIG = Arg(("--config",), "the YAML configuration", "file", "FILE")
JSON = Arg(("--json",), "print JSON, for programs", "flag")
KEY = Arg(("key_id",), "the DEK", "key_id", "KEY_ID")
KEY_OPTION = Arg(("--key-id",), "the DEK to use", "key_id", "ID", required=True)
AAD = Arg(
    ("--aad",),
    "text that is bound to the data and must be given again to decrypt it",
    "text",
    "TEXT",
    empty=True,
)
INPUT = Arg(("input",), "what to read (default and `-`: stdin)", "file", "IN", "?", default="-")
OUTPUT = Arg(("output",), "what to write (default and `-`: stdout)", "file", "OUT", "?", default="-")
NEW_KEY_FILE = Arg(("--new-key-file",), "a key file with the new KEK (see genkey)", "file", "FILE")


def command(
    name: str,
    group: str,
    help: str,
    about: str,
    args: tuple[Arg, ...],
    *,
    examples: tuple[str, ...] = (),
    keys: bool = False,
    exits: tuple[tuple[int, str], ...] = (),
) -> Callable[[Run], Command]:
    """Make a row of a function. Whatever sends something through the socket takes --server-uid behind
    --socket; all take --config, so that a script can give the same words to each."""
    if SOCKET in args and group != SERVE:
        at = args.index(SOCKET) + 1
        args = (*args[:at], SERVER_UID, *args[at:])
    if CONFIG not in args:
        args = (*args, CONFIG)
    return lambda run: Command(name, group, help, about, args, run, examples, keys, exits)


# ---- what the functions share ------------------------------------------------------------------------


def load(args: argparse.Namespace, *, need_key: bool, fleet: bool = False) -> Loaded:
    """The settings, with the keys or without. `fleet`: the command knows what to do with a fleet's store."""
    flags = {name: getattr(args, name, None) for name in ("socket", "data_dir", "config")}
    return asowner.load_config(flags, need_key=need_key, fleet=fleet)


@contextlib.contextmanager
def own(args: argparse.Namespace, *, need_key: bool = True, fleet: bool = False) -> Iterator[Loaded]:
    """For commands that need nothing but the data-dir: root is its owner from here on."""
    with load(args, need_key=need_key, fleet=fleet) as loaded:
        asowner.become(loaded.settings.data_dir)
        yield loaded


def client(args: argparse.Namespace) -> Client:
    from ..client import Client
    from .finding import socket_of

    return Client(socket_of(args), server_uid=args.server_uid, patient=True)


def no_stream(name: str, why: str) -> None:
    """`-` means stdout elsewhere: nobody who types it means a file of that name."""
    if name == STDIO:
        raise UsageError(f"`-` is refused here: {why}; a file that is so named is ./-")
