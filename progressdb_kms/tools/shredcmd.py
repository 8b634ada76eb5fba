"""`shred`: which DEKs are meant, whether the person means it, and what became of each.

Nobody is asked where nobody is there: off a terminal `--now` is taken at its word, and more than one DEK
needs `--yes`. A DEK that fails leaves the others to be done; the command ends with 1 then.
"""

from __future__ import annotations

import argparse
import calendar
import sys
import time
from collections.abc import Sequence

from ..client import Client, ClientError, Dek
from .console import CommandFailed, UsageError, ask, error_detail, plain, say, show, table

SHOWN = 10
"""DEKs that are listed before the question; of more, the number is told."""


def run(args: argparse.Namespace, kms: Client) -> None:
    """Raises UsageError, CommandFailed where one of several failed, and what the client raises for one."""
    deks = _meant(args, kms)
    if args.dry_run:
        _list(deks)
        say(f"{_count(_left(deks))} would be {_how(args)}; nothing was done")
        return
    if not deks:
        say("there is nothing to shred")
        return
    _confirm(args, _left(deks))
    if len(deks) == 1 and args.key_id:
        _show(kms.shred(deks[0].key_id, args.now, args.days), args.json)
        return
    _all(args, kms, deks)


def check(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    if args.now and args.days is not None:
        raise UsageError("--now and --days exclude each other")
    if args.days is not None and args.days > 365:
        raise UsageError("--days is a number from 1 to 365")
    if bool(args.key_id) == (args.thread_id is not None):
        raise UsageError("name either DEKs or --thread-id")


def _meant(args: argparse.Namespace, kms: Client) -> Sequence[Dek]:
    """Those that are named, each once; or those of the thread that are not shredded yet."""
    if args.thread_id is not None:
        return _left(list(kms.list(args.thread_id)))
    return [kms.describe(key_id) for key_id in dict.fromkeys(args.key_id)]


def _left(deks: Sequence[Dek]) -> Sequence[Dek]:
    """To be shredded once more does no harm to a DEK, and nothing else."""
    return [dek for dek in deks if dek.state != "shredded"]


def _confirm(args: argparse.Namespace, deks: Sequence[Dek]) -> None:
    if args.yes or not deks or (len(deks) == 1 and not args.now):
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        if len(deks) > 1:
            raise UsageError(f"{_count(deks)} would be {_how(args)}: give --yes, or --dry-run to see them")
        return
    for dek in deks[:SHOWN]:
        say(f"  {dek.key_id}  {dek.thread_id}  ({dek.state}{_used(dek)})")
    if len(deks) > SHOWN:
        say(f"  and {len(deks) - SHOWN} more")
    them = "it" if len(deks) == 1 else "them"
    lost = (
        f"What was encrypted under {them} is gone for ever."
        if args.now
        else "Until then `enable` cancels it."
    )
    if not ask(f"{_count(deks)} will be {_how(args)}. {lost} Go on?"):
        raise CommandFailed("nothing was shredded")


def _all(args: argparse.Namespace, kms: Client, deks: Sequence[Dek]) -> None:
    failed = 0
    for dek in deks:
        try:
            _show(kms.shred(dek.key_id, args.now, args.days), True if args.json else None)
        except ClientError as error:
            failed += 1
            if args.json:
                show({"key_id": dek.key_id, "error": error_detail(error)}, True)
            else:
                say(f"{dek.key_id}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    if failed:
        raise CommandFailed(f"{failed} of {len(deks)} failed", hint="repeating it is safe")


def _show(dek: Dek, form: object) -> None:
    """`form`: True for JSON, False for people, None for a line among others."""
    if form is None:
        sys.stdout.write(f"{dek.key_id}  {dek.state}  {dek.delete_at or dek.shredded_at}\n")
    else:
        show(plain(dek), bool(form))


def _list(deks: Sequence[Dek]) -> None:
    head = ("KEY_ID", "STATE", "CREATED_AT", "USED", "THREAD_ID")
    rows = ((dek.key_id, dek.state, dek.created_at, _used(dek)[2:], dek.thread_id) for dek in deks)
    sys.stdout.writelines(table(head, rows))


def _used(dek: Dek) -> str:
    """What the person should know who shreds it."""
    if dek.usage is None:
        return ""
    if not dek.usage.last_used_at:
        return ", never used"
    by = f" by uid {dek.usage.last_uid}" if dek.usage.last_uid is not None else ""
    return f", last used {ago(dek.usage.last_used_at, time.time())} ago{by}"


def ago(when: str, now: float) -> str:
    """How long ago a time of the API is, in the largest unit that fits."""
    past = max(0, int(now) - calendar.timegm(time.strptime(when[:19], "%Y-%m-%dT%H:%M:%S")))
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if past >= seconds:
            return f"{past // seconds} {unit}"
    return f"{past} s"


def _count(deks: Sequence[Dek]) -> str:
    return f"{len(deks)} DEK" + "s" * (len(deks) != 1)


def _how(args: argparse.Namespace) -> str:
    return "shredded at once" if args.now else f"shredded in {args.days or 7} days"
