"""The audit log."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..command import CONFIG, DATA_DIR, JSON, OFFLINE, Arg, command, load
from ..console import Progress

if TYPE_CHECKING:
    pass


HOST = Arg(("--host",), "whose log it is: the id of another host of the fleet", "text", "ID")


@command(
    "audit verify",
    OFFLINE,
    "check the audit log",
    "Checks signatures, chains and heads, and prints the first fault with its file and line. "
    "Without LOG it takes the log of the data-dir.",
    (
        Arg(("log",), "audit logs, the oldest first", "file", "LOG", "*"),
        DATA_DIR,
        CONFIG,
        Arg(
            ("--receipts",),
            "a file of X-KMS-Audit receipts, one a line, to hold against the logs",
            "file",
            "FILE",
        ),
        HOST,
        Arg(("--partial",), "the logs don't reach back to the first record", "flag"),
        JSON,
    ),
    keys=True,
    exits=((1, "a fault was found, or the log can't be read"),),
    examples=("progressdb-kms audit verify --config /etc/progressdb-kms/progressdb-kms.yaml",),
)
def audit_verify(args: argparse.Namespace) -> int:
    from .. import auditcmd

    with load(args, need_key=True, fleet=True) as loaded, Progress("audit verify") as bar:
        return auditcmd.verify(args, loaded, bar)


@command(
    "audit search",
    OFFLINE,
    "find audit records",
    "By any number of conditions, over the log of the data-dir or the files that are named, .gz too. "
    "Each record that is shown is checked, and the chains with it: stderr says what was verified. A "
    "damaged line is named and is no end. Times are 2h, 7d, 2026-11-24 or RFC 3339, in UTC.",
    (
        Arg(("log",), "audit logs (default: those of the data-dir)", "file", "LOG", "*"),
        Arg(("--key",), "that name this key_id, in a batch too", "key_id", "ID"),
        Arg(("--thread",), "of this thread", "text", "ID"),
        Arg(("--uid",), "of callers with this UID", "uid", "N"),
        Arg(("--op",), "of this operation, such as decrypt", "event", "OP"),
        Arg(("--outcome",), "ok, refused or failed", "outcome", "WORD"),
        Arg(("--since",), "not before this time", "text", "TIME"),
        Arg(("--until",), "before this time", "text", "TIME"),
        Arg(("--embedded",), "that opened messages of ProgressDB's embedded mode", "flag"),
        Arg(("--csv",), "print CSV, for spreadsheets", "flag"),
        JSON,
        HOST,
        Arg(("--no-verify",), "without the keys: nothing is verified", "flag"),
        DATA_DIR,
        CONFIG,
    ),
    keys=True,
    exits=((1, "a fault was found, or the log can't be read"),),
    examples=(
        "progressdb-kms audit search --outcome refused --since 2h",
        "progressdb-kms audit search --key k_0123 --op decrypt --csv >decrypts.csv",
    ),
)
def audit_search(args: argparse.Namespace) -> int:
    from .. import auditcmd

    with load(args, need_key=not args.no_verify, fleet=True) as loaded, Progress("audit search") as bar:
        return auditcmd.search(args, loaded, bar)


@command(
    "audit report",
    OFFLINE,
    "make one HTML page of the audit log and the store",
    "Calls by hour and operation, refusals and failures by UID, keys used most and never, DEKs by KEK "
    "and state, rotations, deletions that are due, and whether the chains verify. The page needs no "
    "network and no script. It is written over nothing but an earlier page.",
    (
        Arg(("output",), "the page to write", "file", "FILE"),
        Arg(("log",), "audit logs (default: those of the data-dir)", "file", "LOG", "*"),
        Arg(("--since",), "only records not before this time", "text", "TIME"),
        Arg(("--until",), "only records before this time", "text", "TIME"),
        HOST,
        DATA_DIR,
        CONFIG,
    ),
    keys=True,
    exits=((1, "a fault was found (it stands in the page), or the log can't be read"),),
    examples=("progressdb-kms audit report november.html --since 30d",),
)
def audit_report(args: argparse.Namespace) -> int:
    from .. import auditcmd

    with load(args, need_key=True, fleet=True) as loaded, Progress("audit report") as bar:
        return auditcmd.report(args, loaded, bar)


@command(
    "audit tail",
    OFFLINE,
    "show the last audit records",
    "Shows records without checking their signatures.",
    (
        DATA_DIR,
        CONFIG,
        Arg(("-n", "--lines"), "how many (default 10)", "count", "N", default=10),
        Arg(("-f", "--follow"), "go on with new ones, also after the log was rotated", "flag"),
        Arg(("--json",), "print the lines as they stand in the log", "flag"),
    ),
    examples=("progressdb-kms audit tail -f --data-dir /var/lib/progressdb-kms",),
)
def audit_tail(args: argparse.Namespace) -> None:
    from .. import auditcmd

    with load(args, need_key=False, fleet=True) as loaded:
        auditcmd.tail(loaded.settings.data_dir, args.lines, follow=args.follow, as_json=args.json)
