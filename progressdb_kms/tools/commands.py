"""What the commands do: one function for each row of the table, from parsed arguments to output.

A function returns the exit code (None is 0) or raises an error with a message for the operator. Only what a
command needs is imported, in the function, so that `status` is quick and `serve` holds nothing of the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import asowner
from .console import (
    STDIO,
    CommandFailed,
    Progress,
    UsageError,
    output,
    read_input,
    safe,
    say,
    show,
    table,
    told,
    write_binary,
)

if TYPE_CHECKING:
    from ..client import Client, Dek
    from ..config.load import Loaded


# ---- configuration -----------------------------------------------------------------------------------


def _load(args: argparse.Namespace, *, need_key: bool) -> Loaded:
    """The settings, with the keys or without."""
    flags = {name: getattr(args, name, None) for name in ("socket", "data_dir", "config")}
    return asowner.load_config(flags, need_key=need_key)


@contextlib.contextmanager
def _own(args: argparse.Namespace, *, need_key: bool = True) -> Iterator[Loaded]:
    """For commands that need nothing but the data-dir: root is its owner from here on."""
    with _load(args, need_key=need_key) as loaded:
        asowner.become(loaded.settings.data_dir)
        yield loaded


def serve(args: argparse.Namespace) -> int:
    from ..config.load import load
    from ..process import serve

    flags = {
        "socket": args.socket,
        "data_dir": args.data_dir,
        "config": args.config,
        "tcp_address": args.addr,
    }
    with load(flags, os.environ) as loaded:
        forced = {"allow_retired": args.allow_retired_kek, "accept_older": args.accept_older_store}
        return serve.serve(loaded, forced)


# ---- through the socket ------------------------------------------------------------------------------


def _client(args: argparse.Namespace) -> Client:
    from ..client import Client
    from .finding import socket_of

    return Client(socket_of(args), server_uid=args.server_uid)


def status(args: argparse.Namespace) -> int:
    with _client(args) as kms:
        if args.ready:
            return _check_ready(kms, args.json)
        if args.json:
            show(kms.status(), True)
        else:
            from . import statuscmd

            statuscmd.run(kms)
    return 0


def _check_ready(kms: Client, as_json: bool) -> int:
    found = kms.ready()
    if as_json:
        show({"ready": found.ready, "reasons": list(found.reasons), "warnings": list(found.warnings)}, True)
    if not found:
        raise CommandFailed("not ready: " + ("; ".join(found.reasons) or "the daemon doesn't say why"))
    if not as_json:
        sys.stdout.write("ready\n")
        for warning in found.warnings:
            say(warning)
    return 0


def metrics(args: argparse.Namespace) -> None:
    from ..client import ClientError

    with _client(args) as kms:
        try:
            text = kms.metrics() + UP.format(1)
        except ClientError:
            if args.textfile:
                _publish(args.textfile, UP.format(0))
            raise
    if args.textfile:
        _publish(args.textfile, text)
    else:
        sys.stdout.write(text)


UP = (
    "# HELP progressdb_kms_up Whether the daemon answered.\n# TYPE progressdb_kms_up gauge\n"
    "progressdb_kms_up {}\n"
)


def _publish(name: str, text: str) -> None:
    """Whole or not at all, and for the collector's user to read: nothing in it is secret."""
    with output(name) as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text.encode("utf-8"))


def create_dek(args: argparse.Namespace) -> None:
    with _client(args) as kms:
        dek = kms.create_dek(args.thread_id, args.key_id)
    if args.json:
        _show_dek(dek, True)
    else:
        sys.stdout.write(dek.key_id + "\n")


def list_deks(args: argparse.Namespace) -> None:
    from .keyids import beginning

    unused_for = None
    if args.unused_for is not None:
        from .auditsearch import seconds_of

        unused_for = seconds_of(args.unused_for)
        if unused_for is None:
            raise UsageError(f"{args.unused_for[:40]!r} is no time: give 90d, 12h or 30m")
    page = min(args.limit or 1000, 1000) if args.state is None else 1000
    with _client(args) as kms:
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
    used = dek.usage.last_used_at[:16] if dek.usage else ""
    start = (dek.key_id, dek.state, dek.kek_id, dek.created_at)
    return (*start, used, dek.delete_at[:16], dek.thread_id)


def describe(args: argparse.Namespace) -> None:
    with _client(args) as kms:
        _show_dek(kms.describe(args.key_id), args.json)


def disable(args: argparse.Namespace) -> None:
    with _client(args) as kms:
        _show_dek(kms.disable(args.key_id), args.json)


def enable(args: argparse.Namespace) -> None:
    with _client(args) as kms:
        _show_dek(kms.enable(args.key_id), args.json)


def shred(args: argparse.Namespace) -> None:
    from . import shredcmd

    shredcmd.check(args)
    with _client(args) as kms:
        shredcmd.run(args, kms)


def _show_dek(dek: Dek, as_json: bool) -> None:
    values = told(dek)
    if "wrapped" in values:
        import base64

        values["wrapped"] = base64.b64encode(dek.wrapped).decode("ascii")
    show(values, as_json)


def encrypt(args: argparse.Namespace) -> None:
    data = read_input(args.input)
    with _client(args) as kms:
        result = kms.encrypt(args.key_id, data, _aad(args))
    write_binary(args.output, result)


def decrypt(args: argparse.Namespace) -> None:
    data = read_input(args.input)
    with _client(args) as kms:
        result = kms.decrypt(args.key_id, data, _aad(args))
    write_binary(args.output, result)


def _aad(args: argparse.Namespace) -> bytes:
    return os.fsencode(args.aad or "")


def rewrap(args: argparse.Namespace) -> None:
    from ..crypto.aead import KEY_SIZE
    from ..crypto.memory import LockedBuffer
    from .keyfiles import read_key

    with LockedBuffer(KEY_SIZE) as memory, _client(args) as kms:
        read_key(Path(args.new_key_file), memory.view)
        result = kms.rewrap(args.key_id, memory.view)
    show({"key_id": args.key_id, "kek_id": result.kek_id, "kek_version": result.kek_version}, args.json)
    say(f"keep {args.new_key_file} in previous_master_keys: the next start asks for the KEK {result.kek_id}")


def clock_accept(args: argparse.Namespace) -> None:
    with _client(args) as kms:
        show(kms.accept_clock(), args.json)


def rotate_kek(args: argparse.Namespace) -> None:
    if [args.generate, args.new_key_file is not None, args.resume].count(True) != 1:
        raise UsageError("give one of --generate, --new-key-file and --resume")
    if args.resume and args.dry_run:
        raise UsageError("--resume and --dry-run exclude each other")
    from . import rotatecmd
    from .finding import socket_of

    if not args.config:
        args.socket = socket_of(args)
    with _load(args, need_key=False) as loaded:
        rotatecmd.run(args, loaded.settings)


# ---- key files ---------------------------------------------------------------------------------------


def genkey(args: argparse.Namespace) -> None:
    _no_stream(args.file, "a key goes to a file of its own, never through a pipe or a terminal")
    from ..crypto.aead import KEY_SIZE
    from ..crypto.memory import LockedBuffer
    from . import keyfiles

    with LockedBuffer(KEY_SIZE) as memory:
        kek_id = keyfiles.random_key(memory.view)
        keyfiles.write_key(Path(args.file), memory.view)
    show({"file": args.file, "kek_id": kek_id}, args.json)


def _no_stream(name: str, why: str) -> None:
    """`-` means stdout elsewhere: nobody who types it means a file of that name."""
    if name == STDIO:
        raise UsageError(f"`-` is refused here: {why}; a file that is so named is ./-")


def kek_id(args: argparse.Namespace) -> None:
    from . import keyfiles

    for name in args.file:
        found = keyfiles.kek_id_of(Path(name))
        if args.json:
            show({"file": name, "kek_id": found}, True)
        else:
            sys.stdout.write(f"{found}  {safe(name)}\n")


# ---- the store and its backups ----------------------------------------------------------------------


def verify(args: argparse.Namespace) -> None:
    from . import storecmd

    with _own(args) as loaded, Progress("verify") as bar:
        result = {"recounted": storecmd.recount(loaded)} if args.recount else {}
        result.update(storecmd.verify(loaded, progress=bar))
    show(result, args.json)


def backup(args: argparse.Namespace) -> None:
    _no_stream(args.file, "a backup is checked and synced in its place (`export -` writes to stdout)")
    from . import dated, drill, storecmd

    target = Path(args.file)
    if args.keep is not None and (args.check or not target.is_dir()):
        raise UsageError("--keep goes with a folder that is there, and checks what it makes")
    with _load(args, need_key=args.check or args.keep is not None) as loaded, Progress("backup") as bar:
        data_dir = loaded.settings.data_dir
        if args.check:
            result = drill.check(loaded, target, bar)
            dated.note_checked(data_dir, target)
        elif target.is_dir():
            result = dated.make(loaded, target, args.keep, bar)
        else:
            result = storecmd.backup(data_dir, target, progress=bar)
            dated.note(data_dir, target)
    show(result, args.json)


def restore(args: argparse.Namespace) -> None:
    if (args.file is None) == (args.snapshot is None):
        raise UsageError("give either FILE or --snapshot PATH")
    if args.key is not None and args.snapshot is None:
        raise UsageError("--key goes with --snapshot")
    from . import storecmd

    with _load(args, need_key=True) as loaded, Progress("restore") as bar:
        if args.snapshot is None:
            result = storecmd.restore(loaded, Path(args.file), force=args.force, progress=bar)
        else:
            folder = Path(args.snapshot)
            result = storecmd.restore_snapshot(loaded, folder, args.key, force=args.force, progress=bar)
    show(result, args.json)


def export(args: argparse.Namespace) -> None:
    from . import storecmd

    with _load(args, need_key=False) as loaded, Progress("export") as bar, output(args.output) as file:
        data_dir = loaded.settings.data_dir
        with asowner.acting_as(asowner.of(data_dir)):
            count = storecmd.export(data_dir, file, progress=bar)
    say(f"{count} DEKs exported")


def import_deks(args: argparse.Namespace) -> int:
    from . import storecmd

    source = None if args.input == STDIO else Path(args.input)
    with _load(args, need_key=True) as loaded, Progress("import") as bar:
        result = storecmd.import_deks(loaded, source, skip_bad=args.skip_bad, progress=bar)
    for bad in result.pop("bad"):
        say(f"{bad}")
    show(result, args.json)
    return 0


def backups_list(args: argparse.Namespace) -> None:
    from . import storecmd

    with _own(args, need_key=False) as loaded:
        rows = storecmd.backups_list(loaded.settings.data_dir)
    if args.json:
        for row in rows:
            show(row, True)
    else:
        cells = [
            (row["time"], row["kek_id"], row["deks"], "" if row["finished"] else "unfinished", row["path"])
            for row in rows
        ]
        sys.stdout.writelines(table(("TIME", "KEK_ID", "DEKS", "STATE", "PATH"), cells))


def backups_prune(args: argparse.Namespace) -> None:
    if args.keep is None and args.older_than is None:
        raise UsageError("give --keep, --older-than or both")
    from . import storecmd

    with _own(args, need_key=False) as loaded:
        data_dir = loaded.settings.data_dir
        removed = storecmd.backups_prune(data_dir, keep=args.keep, older_than_days=args.older_than)
    show({"removed": len(removed), "paths": removed} if args.json else {"removed": len(removed)}, args.json)


# ---- the audit log -----------------------------------------------------------------------------------


def audit_verify(args: argparse.Namespace) -> int:
    from . import auditcmd

    with _load(args, need_key=True) as loaded, Progress("audit verify") as bar:
        return auditcmd.verify(args, loaded, bar)


def audit_search(args: argparse.Namespace) -> int:
    from . import auditcmd

    with _load(args, need_key=not args.no_verify) as loaded, Progress("audit search") as bar:
        return auditcmd.search(args, loaded, bar)


def audit_report(args: argparse.Namespace) -> int:
    from . import auditcmd

    with _load(args, need_key=True) as loaded, Progress("audit report") as bar:
        return auditcmd.report(args, loaded, bar)


def audit_tail(args: argparse.Namespace) -> None:
    from . import auditcmd

    with _load(args, need_key=False) as loaded:
        auditcmd.tail(loaded.settings.data_dir, args.lines, follow=args.follow, as_json=args.json)


# ---- the rest ----------------------------------------------------------------------------------------


def doctor(args: argparse.Namespace) -> int:
    from . import doctor as clinic

    return clinic.run(args)


def policy_test(args: argparse.Namespace) -> int:
    from . import policycmd

    with _load(args, need_key=False) as loaded:
        return policycmd.test(args, loaded.settings)


def manual(args: argparse.Namespace) -> None:
    from . import manual as book

    book.show(book.text_of(args.topic) if args.topic else book.overview())


def bench(args: argparse.Namespace) -> int:
    from . import bench as measure
    from . import benchcompare

    if args.compare:
        return benchcompare.show(*args.compare, as_json=args.json)
    return measure.run(args.what, seconds=args.seconds, deks=args.deks, as_json=args.json)
