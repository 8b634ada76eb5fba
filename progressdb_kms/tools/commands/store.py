"""The store and its backups."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .. import asowner
from ..command import CONFIG, DATA_DIR, JSON, OFFLINE, OUTPUT, Arg, command, load, no_stream, own
from ..console import STDIO, Progress, UsageError, check_replaceable, output, say, show, table

if TYPE_CHECKING:
    pass


@command(
    "verify",
    OFFLINE,
    "open every DEK and check the store",
    "Checks SQLite's integrity and opens each DEK under the KEK it names. May run beside the daemon. "
    "--recount (the daemon is stopped) first counts and adds up the rows anew, each of which must be "
    "genuine, where the store's own figures differ: look why they do before you let them follow.",
    (Arg(("--recount",), "let the counts follow the rows", "flag"), DATA_DIR, CONFIG, JSON),
    keys=True,
)
def verify(args: argparse.Namespace) -> None:
    from .. import storecmd

    with own(args, fleet=True) as loaded, Progress("verify") as bar:
        result = storecmd.recount(loaded) if args.recount else {}
        if loaded.settings.store == "sqlite":
            result.update(storecmd.verify(loaded, progress=bar))
        else:
            from ..fleetverify import verify_fleet

            result.update(verify_fleet(loaded, progress=bar))
    show(result, args.json)


@command(
    "backup",
    OFFLINE,
    "copy the store to one file",
    "A consistent copy, taken while the daemon may run, with a checksum and the kek_ids that it "
    "needs; never over a file that exists. It holds wrapped DEKs only: keep the key files elsewhere. "
    "--check is a drill for the restore: it opens every DEK of FILE with the configured keys and says "
    "which keys it needs; it needs no store and changes nothing. Where FILE is a folder, the backup gets "
    "a name with the time there. With --keep it is checked at once, and then the oldest of those that "
    "were made there so go; one that fails the check is kept under another name, and none goes.",
    (
        Arg(("file",), "the backup to make, or a folder", "file", "FILE"),
        Arg(("--check",), "make none: open every DEK of FILE", "flag"),
        Arg(("--keep",), "check it, then keep the newest N of the folder", "count", "N"),
        DATA_DIR,
        CONFIG,
        JSON,
    ),
    keys=True,
    examples=(
        "progressdb-kms backup /backup/kms-$(date +%FT%T) --config /etc/progressdb-kms/progressdb-kms.yaml",
        "progressdb-kms backup --check /backup/kms-2026-11-24T02:00:00 "
        "--config /etc/progressdb-kms/progressdb-kms.yaml",
        "progressdb-kms backup /backup --keep 14 --config /etc/progressdb-kms/progressdb-kms.yaml",
    ),
)
def backup(args: argparse.Namespace) -> None:
    no_stream(args.file, "a backup is checked and synced in its place (`export -` writes to stdout)")
    from .. import dated, drill

    target = Path(args.file)
    if args.keep is not None and (args.check or not target.is_dir()):
        raise UsageError("--keep goes with a folder that is there, and checks what it makes")
    with load(args, need_key=False, fleet=True) as loaded:
        need_key = args.check or args.keep is not None or loaded.settings.store != "sqlite"
    with load(args, need_key=need_key, fleet=True) as loaded, Progress("backup") as bar:
        data_dir = loaded.settings.data_dir
        if args.check:
            result = drill.check(loaded, target, bar)
            dated.note_checked(data_dir, target)
        elif target.is_dir():
            result = dated.make(loaded, target, args.keep, bar)
        else:
            result = dated.made(loaded, target, bar)
            dated.note(data_dir, target)
    show(result, args.json)


@command(
    "restore",
    OFFLINE,
    "bring back a backup, or DEKs from a snapshot",
    "The daemon must be stopped. The file is checked before anything is changed; what was "
    "shredded since stays shredded. With --snapshot DEKs come from a folder under "
    "kms-deks-backup.",
    (
        Arg(("file",), "a file made by backup", "file", "FILE", "?"),
        DATA_DIR,
        CONFIG,
        Arg(("--snapshot",), "a snapshot folder, instead of FILE", "folder", "PATH"),
        Arg(("--key",), "this DEK only, with --snapshot", "key_id", "ID"),
        Arg(("--force",), "also over what is newer", "flag"),
        JSON,
    ),
    keys=True,
    examples=(
        "progressdb-kms restore /backup/kms-2026-11-24 --config /etc/progressdb-kms/progressdb-kms.yaml",
        "progressdb-kms restore --snapshot kms-data/kms-deks-backup/20261124T020000Z-… --key k_0190…",
    ),
)
def restore(args: argparse.Namespace) -> None:
    if (args.file is None) == (args.snapshot is None):
        raise UsageError("give either FILE or --snapshot PATH")
    if args.key is not None and args.snapshot is None:
        raise UsageError("--key goes with --snapshot")
    from .. import storecmd

    with load(args, need_key=True, fleet=args.snapshot is None) as loaded, Progress("restore") as bar:
        if loaded.settings.store != "sqlite":
            from .. import fleetbackup

            result = fleetbackup.restore(loaded, Path(args.file), bar)
        elif args.snapshot is None:
            result = storecmd.restore(loaded, Path(args.file), force=args.force, progress=bar)
        else:
            folder = Path(args.snapshot)
            result = storecmd.restore_snapshot(loaded, folder, args.key, force=args.force, progress=bar)
    show(result, args.json)


@command(
    "export",
    OFFLINE,
    "write all DEKs as JSON lines",
    "A line a DEK, wrapped: it opens under the same KEK only. Each row is held against its MAC, where the "
    "keys are to be had. OUT is written whole or not at all, not in the data-dir, and over nothing but an "
    "earlier export.",
    (
        OUTPUT,
        DATA_DIR,
        CONFIG,
        Arg(
            ("--skip-bad",), "name DEKs whose rows were changed or can't be read, and leave them out", "flag"
        ),
    ),
    keys=True,
    examples=("progressdb-kms export deks.jsonl --config /etc/progressdb-kms/progressdb-kms.yaml",),
)
def export(args: argparse.Namespace) -> None:
    from ...errors import KMSError
    from .. import datadir, storecmd
    from ..backup import check_outside

    why = "the row key opens under none of the configured KEKs"
    with contextlib.ExitStack() as stack:
        loaded, keyring = stack.enter_context(load(args, need_key=False, fleet=True)), None
        try:
            with_keys = stack.enter_context(load(args, need_key=True, fleet=True))
            keyring = stack.enter_context(datadir.keys(with_keys)).keyring
        except KMSError as error:  # what is wrapped can be copied all the same
            why = error.message
        bar = stack.enter_context(Progress("export"))
        data_dir = loaded.settings.data_dir
        if args.output != STDIO:
            check_outside(data_dir, Path(args.output))
            check_replaceable(args.output, storecmd.LINE)
        with output(args.output) as file, asowner.acting_as(asowner.of(data_dir)):
            count, bad, held = storecmd.export(loaded.settings, file, keyring, bar, args.skip_bad)
    for key_id in bad:
        say(f"{key_id}: its row is not as the daemon wrote it")
    if not held:
        say(f"the rows were not held against their MACs: {why}")
    say(f"{count} DEKs exported" + (f", {len(bad)} left out" if bad else ""))


@command(
    "import",
    OFFLINE,
    "take DEKs from JSON lines, or from ProgressDB's own stores",
    "Takes what export writes, lines of {key_id, thread_id, wrapped} or {key_id, wrapped_dek} as "
    "ProgressDB had them, its kms-deks and kms-deks-backup folders, and its Pebble folders (with "
    "rocksdict). The daemon must be stopped. Each DEK is opened under the KEK before it is stored.",
    (
        Arg(("input",), "a file, a folder, or `-` for stdin", "file", "IN"),
        DATA_DIR,
        CONFIG,
        Arg(("--skip-bad",), "list bad lines and go on with the others", "flag"),
        JSON,
    ),
    keys=True,
    examples=(
        "progressdb-kms import /var/lib/old-kms/kms-deks --config /etc/progressdb-kms/progressdb-kms.yaml",
    ),
)
def import_deks(args: argparse.Namespace) -> int:
    from .. import storecmd

    source = None if args.input == STDIO else Path(args.input)
    with load(args, need_key=True, fleet=True) as loaded, Progress("import") as bar:
        result = storecmd.import_deks(loaded, source, skip_bad=args.skip_bad, progress=bar)
    for bad in result.pop("bad"):
        say(f"{bad}")
    show(result, args.json)
    return 0


@command(
    "backups list",
    OFFLINE,
    "list the snapshots that rotations left",
    "Prints a line a snapshot folder, of a fleet a line a table: its time, the KEK it needs, its number of "
    "DEKs.",
    (DATA_DIR, CONFIG, JSON),
)
def backups_list(args: argparse.Namespace) -> None:
    from .. import storecmd

    with own(args, need_key=False, fleet=True) as loaded:
        settings = loaded.settings
        alone = settings.store == "sqlite"
        rows = storecmd.backups_list(settings.data_dir) if alone else storecmd.fleet_backups_list(settings)
    if args.json:
        for row in rows:
            show(row, True)
    else:
        cells = [
            (row["time"], row["kek_id"], row["deks"], "" if row["finished"] else "unfinished", row["path"])
            for row in rows
        ]
        sys.stdout.writelines(table(("TIME", "KEK_ID", "DEKS", "STATE", "PATH"), cells))


@command(
    "backups prune",
    OFFLINE,
    "remove old snapshots",
    "Give --keep, --older-than, or both: then a snapshot goes only where both say so.",
    (
        DATA_DIR,
        CONFIG,
        Arg(("--keep",), "keep the newest N", "count", "N"),
        Arg(("--older-than",), "remove those older than D days", "count", "D"),
        JSON,
    ),
    examples=("progressdb-kms backups prune --keep 3 --config /etc/progressdb-kms/progressdb-kms.yaml",),
)
def backups_prune(args: argparse.Namespace) -> None:
    if args.keep is None and args.older_than is None:
        raise UsageError("give --keep, --older-than or both")
    from .. import storecmd

    with own(args, need_key=False, fleet=True) as loaded:
        settings, words = loaded.settings, (args.keep, args.older_than)
        alone = settings.store == "sqlite"
        removed = (
            storecmd.backups_prune(settings.data_dir, *words)
            if alone
            else storecmd.fleet_backups_prune(settings, *words)
        )
    show({"removed": len(removed), "paths": removed} if args.json else {"removed": len(removed)}, args.json)
