"""Keys and data, through the socket."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .. import asowner
from ..command import (
    AAD,
    CONFIG,
    INPUT,
    JSON,
    KEY,
    KEY_OPTION,
    NEW_KEY_FILE,
    ONLINE,
    OUTPUT,
    SOCKET,
    Arg,
    client,
    command,
    load,
)
from ..console import UsageError, plain, read_input, say, show, table, write_binary

if TYPE_CHECKING:
    from ...client import Dek

_OUT_RULES = (
    "OUT is written whole or not at all, with mode 0600: a command that fails leaves no file, and one"
    " that was there before stays. Binary data is not written to a terminal."
)


@command(
    "create-dek",
    ONLINE,
    "make a DEK for a thread",
    "Prints the key_id of a new DEK. Each call makes another one, but for a --key-id that the thread has.",
    (
        SOCKET,
        CONFIG,
        Arg(("--thread-id",), "the chat thread that it is for", "text", "ID", required=True),
        Arg(("--key-id",), "its key_id (default: a generated one)", "key_id", "ID"),
        JSON,
    ),
    examples=("KEY=$(progressdb-kms create-dek --thread-id t1)",),
)
def create_dek(args: argparse.Namespace) -> None:
    with client(args) as kms:
        dek = kms.create_dek(args.thread_id, args.key_id)
    if args.json:
        _show_dek(dek, True)
    else:
        sys.stdout.write(dek.key_id + "\n")


def _show_dek(dek: Dek, as_json: bool) -> None:
    values = plain(dek)
    if "wrapped" in values:
        import base64

        values["wrapped"] = base64.b64encode(dek.wrapped).decode("ascii")
    show(values, as_json)


@command(
    "list",
    ONLINE,
    "list the DEKs",
    "Prints a line a DEK, in order of key_id.",
    (
        SOCKET,
        CONFIG,
        Arg(("--thread-id",), "those of this thread only", "text", "ID"),
        Arg(("--state",), "those in this state only", "state", "STATE"),
        Arg(("--prefix",), "those whose key_id begins so", "text", "TEXT", empty=True),
        Arg(("--unused-for",), "those older than this and not used since: 90d, 12h", "text", "TIME"),
        Arg(("--limit",), "the first N only", "count", "N"),
        Arg(("--ids",), "print key_ids alone, a line each", "flag"),
        JSON,
    ),
    examples=(
        "progressdb-kms list --thread-id t1",
        "progressdb-kms list --ids --prefix k_0190",
        "progressdb-kms list --unused-for 90d",
    ),
)
def list_deks(args: argparse.Namespace) -> None:
    from ..keyids import beginning

    unused_for = None
    if args.unused_for is not None:
        from ..auditsearch import seconds_of

        unused_for = seconds_of(args.unused_for)
        if unused_for is None or unused_for >= 10**10:
            raise UsageError(f"{args.unused_for[:40]!r} is no time: give 90d, 12h or 30m")
    page = min(args.limit or 1000, 1000) if args.state is None else 1000
    with client(args) as kms:
        named = beginning(kms, args.prefix or "", args.thread_id, page, unused_for)
        deks = itertools.islice((dek for dek in named if args.state in (None, dek.state)), args.limit)
        if args.ids:
            sys.stdout.writelines(dek.key_id + "\n" for dek in deks)
        elif args.json:
            for dek in deks:
                _show_dek(dek, True)
        else:
            head = ("KEY_ID", "STATE", "KEK_ID", "CREATED_AT", "LAST_USED", "DUE", "THREAD_ID")
            sys.stdout.writelines(table(head, map(_row, deks)))


def _row(dek: Dek) -> tuple[str, ...]:
    used = (dek.usage.last_used_at[:16] or "never") if dek.usage else ""
    start = (dek.key_id, dek.state, dek.kek_id, dek.created_at)
    return (*start, used, dek.delete_at[:16], dek.thread_id)


@command(
    "describe",
    ONLINE,
    "tell about a DEK",
    "Prints state, thread, KEK and times of one DEK, and what was done under it; never its bytes.",
    (SOCKET, CONFIG, KEY, JSON),
)
def describe(args: argparse.Namespace) -> None:
    with client(args) as kms:
        _show_dek(kms.describe(args.key_id), args.json)


@command(
    "encrypt",
    ONLINE,
    "encrypt a file or stdin under a DEK",
    "AES-256-GCM inside the daemon; the DEK never leaves it. " + _OUT_RULES,
    (SOCKET, CONFIG, KEY_OPTION, AAD, INPUT, OUTPUT),
    examples=(
        "progressdb-kms encrypt --key-id $KEY --aad backup notes.txt notes.enc",
        "… | progressdb-kms encrypt --key-id $KEY > f",
    ),
)
def encrypt(args: argparse.Namespace) -> None:
    data = read_input(args.input)
    with client(args) as kms:
        result = kms.encrypt(args.key_id, data, _aad(args))
    write_binary(args.output, result)


@command(
    "decrypt",
    ONLINE,
    "decrypt a file or stdin",
    "The opposite of encrypt: takes the same key_id and the same AAD. " + _OUT_RULES,
    (SOCKET, CONFIG, KEY_OPTION, AAD, INPUT, OUTPUT),
    examples=("progressdb-kms decrypt --key-id $KEY --aad backup notes.enc notes.txt",),
)
def decrypt(args: argparse.Namespace) -> None:
    data = read_input(args.input)
    with client(args) as kms:
        result = kms.decrypt(args.key_id, data, _aad(args))
    write_binary(args.output, result)


def _aad(args: argparse.Namespace) -> bytes:
    return os.fsencode(args.aad or "")


@command(
    "disable",
    ONLINE,
    "take a DEK out of use",
    "What was encrypted under it can't be read until enable.",
    (SOCKET, CONFIG, KEY, JSON),
)
def disable(args: argparse.Namespace) -> None:
    with client(args) as kms:
        _show_dek(kms.disable(args.key_id), args.json)


@command(
    "enable",
    ONLINE,
    "take a DEK into use again",
    "Undoes disable, and cancels a scheduled shred.",
    (SOCKET, CONFIG, KEY, JSON),
)
def enable(args: argparse.Namespace) -> None:
    with client(args) as kms:
        _show_dek(kms.enable(args.key_id), args.json)


@command(
    "shred",
    ONLINE,
    "schedule the erasure of a DEK, or erase it at once",
    "Once a DEK is shredded nothing can bring back what was encrypted under it: its wrapped bytes"
    " are removed from the store, its log and the snapshots. Backups made before hold it still, "
    "but restore refuses it. Without --now it is due in 7 days, until then `enable` cancels it. On a "
    "terminal it asks before it shreds at once, or more than one DEK; elsewhere more than one needs --yes.",
    (
        SOCKET,
        CONFIG,
        Arg(("key_id",), "the DEKs", "key_id", "KEY_ID", "*"),
        Arg(("--thread-id",), "all DEKs of this thread", "text", "ID"),
        Arg(("--now",), "at once; it can't be undone", "flag"),
        Arg(("--days",), "when it is due: 1 to 365 days (default 7)", "count", "N"),
        Arg(("--dry-run",), "only list what would be shredded", "flag"),
        Arg(("--yes",), "don't ask", "flag"),
        JSON,
    ),
    examples=("progressdb-kms shred k_0190… --days 30", "progressdb-kms shred --thread-id room-42 --now"),
)
def shred(args: argparse.Namespace) -> None:
    from .. import shredcmd

    shredcmd.check(args)
    with client(args) as kms:
        shredcmd.run(args, kms)


@command(
    "rewrap",
    ONLINE,
    "move one DEK to another KEK",
    "The other KEK stays in the daemon's memory, and must be in previous_master_keys at its next start.",
    (SOCKET, CONFIG, KEY, NEW_KEY_FILE._replace(required=True), JSON),
    keys=True,
)
def rewrap(args: argparse.Namespace) -> None:
    from ...crypto.aead import KEY_SIZE
    from ...crypto.memory import LockedBuffer
    from ..keyfiles import read_key

    user = os.geteuid()
    if user == 0:
        with load(args, need_key=False, fleet=True) as loaded:
            user = asowner.daemon_user(loaded.settings)
    with LockedBuffer(KEY_SIZE) as memory, client(args) as kms:
        read_key(Path(args.new_key_file), memory.view, user)
        active = kms.status()["kek_id"]
        result = kms.rewrap(args.key_id, memory.view)
    show({"key_id": args.key_id, "kek_id": result.kek_id, "kek_version": result.kek_version}, args.json)
    if result.kek_id != active:
        again = f"the next start asks for the KEK {result.kek_id}"
        say(f"keep {args.new_key_file} in previous_master_keys: {again}")


@command(
    "clock accept",
    ONLINE,
    "say that the wall clock is right, after it moved",
    "A scheduled deletion is due when the wall clock and a trusted one have passed its time. Where the "
    "two contradict each other (the clock went back by more than 5 minutes or ahead by more than a week, "
    "or a reboot took longer), deletions are held. This command goes on by the clock as it stands.",
    (SOCKET, JSON),
)
def clock_accept(args: argparse.Namespace) -> None:
    with client(args) as kms:
        show(kms.accept_clock(), args.json)


@command(
    "rotate-kek",
    ONLINE,
    "move all DEKs to a new KEK, while the daemon serves",
    "The new key is in a file and synced before the daemon hears of it: FILE.next beside the "
    "master_key_file FILE, which may be lost as long as the daemon runs. After the rotation it takes "
    "the place of FILE, and the old key stays "
    "as FILE.old-<kek_id>: backups and snapshots made before need it. Whatever is interrupted, "
    "the daemon starts, and --resume finishes. Where the key is not in a master_key_file, the new"
    " key file stays where it is and the lines to change in the configuration are printed. "
    "In a fleet the new key comes to each host first, in next_master_keys: --kek-id names it, and then no "
    "file is touched.",
    (
        SOCKET,
        CONFIG,
        Arg(("--generate",), "make a new random key", "flag"),
        NEW_KEY_FILE,
        Arg(("--kek-id",), "in a fleet: to this KEK of next_master_keys", "text", "ID"),
        Arg(("--resume",), "finish a rotation that was interrupted", "flag"),
        Arg(("--dry-run",), "open every DEK and change nothing", "flag"),
        Arg(("--forget-old",), "overwrite the old key instead of keeping it", "flag"),
        JSON,
    ),
    keys=True,
    examples=(
        "progressdb-kms rotate-kek --config /etc/progressdb-kms/progressdb-kms.yaml --generate --dry-run",
        "progressdb-kms rotate-kek --config /etc/progressdb-kms/progressdb-kms.yaml --generate",
    ),
)
def rotate_kek(args: argparse.Namespace) -> None:
    ways = (args.generate, args.new_key_file is not None, args.kek_id is not None, args.resume)
    if ways.count(True) != 1:
        raise UsageError("give one of --generate, --new-key-file, --kek-id and --resume")
    if args.kek_id is not None and args.forget_old:
        raise UsageError("--kek-id touches no file: what --forget-old would overwrite is yours to destroy")
    if args.resume and args.dry_run:
        raise UsageError("--resume and --dry-run exclude each other")
    from .. import rotatecmd
    from ..finding import socket_of

    if not args.config:
        args.socket = socket_of(args)
    with load(args, need_key=False, fleet=True) as loaded:
        rotatecmd.run(args, loaded.settings)
