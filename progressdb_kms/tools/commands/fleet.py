"""The store of a fleet: made, brought up to date, looked at."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..command import CONFIG, DATA_DIR, JSON, OFFLINE, Arg, command, load
from ..console import CommandFailed, say, show, table

if TYPE_CHECKING:
    from ...fleet.engine import Link


@contextlib.contextmanager
def _link(args: argparse.Namespace) -> Iterator[Link]:
    from ..datadir import fleet_link

    with load(args, need_key=False, fleet=True) as loaded:
        settings = loaded.settings
        if settings.store != "postgresql":
            raise CommandFailed(
                "the configuration has no fleet: `store` is sqlite, whose file is made by the daemon itself",
                hint="write `store: postgresql` and a block `postgresql:`, see `progressdb-kms help fleet`",
            )
        with fleet_link(settings) as link:
            yield link


@command(
    "store init",
    OFFLINE,
    "make the tables of a new fleet",
    "In the database that the block postgresql of the configuration names. It must be there and belong to "
    "the user that is named there, too. Where a fleet is, nothing is changed.",
    (DATA_DIR, CONFIG, JSON),
    examples=("progressdb-kms store init --config /etc/progressdb-kms/progressdb-kms.yaml",),
)
def store_init(args: argparse.Namespace) -> None:
    from ...fleet import schema

    with _link(args) as link:
        made = schema.create(link)
    show({"fleet": made.fleet, "schema": made.schema, "database": str(link.where)}, args.json)


@command(
    "store migrate",
    OFFLINE,
    "bring a fleet's tables up to this release",
    "Run it once, with the newest release that any host has, before the daemons are upgraded one by one: "
    "the release before goes on beside it. Tables of a newer release are refused.",
    (DATA_DIR, CONFIG, JSON),
    examples=("progressdb-kms store migrate --config /etc/progressdb-kms/progressdb-kms.yaml",),
)
def store_migrate(args: argparse.Namespace) -> None:
    from ...fleet import schema

    with _link(args) as link:
        was, now = schema.migrate(link)
    show({"schema": now, "was": was}, args.json)


@command(
    "store status",
    OFFLINE,
    "show a fleet: its hosts, its KEKs, its engine",
    "Each host with its heartbeats, how far behind it is, its KEKs and whether it is fenced; DEKs by KEK; "
    "the engine's version, synchronous standbys and connections. What isn't as it should be is on stderr.",
    (DATA_DIR, CONFIG, JSON),
    examples=("progressdb-kms store status --config /etc/progressdb-kms/progressdb-kms.yaml",),
)
def store_status(args: argparse.Namespace) -> None:
    with _link(args) as link:
        from ...fleet.status import status

        found = status(link)
    for warning in found["warnings"]:
        say(warning)
    if args.json:
        show(found, True)
    else:
        _print(found)


@command(
    "store forget",
    OFFLINE,
    "take a host that is gone for good out of a fleet's list",
    "Only a host that is fenced goes, by its name or its id. What it wrote stays, and so do its audit heads. "
    "If its daemon starts again all the same, it registers anew.",
    (Arg(("host",), "the host", "text", "HOST"), DATA_DIR, CONFIG, JSON),
    examples=("progressdb-kms store forget chat-7 --config /etc/progressdb-kms/progressdb-kms.yaml",),
)
def store_forget(args: argparse.Namespace) -> None:
    from ...fleet.status import forget

    with _link(args) as link:
        gone = forget(link, args.host)
    if not gone:
        raise CommandFailed(f"the fleet knows no host {args.host}", hint="`store status` lists them")
    show({"host": args.host, "forgotten": gone}, args.json)


def _print(found: dict[str, Any]) -> None:
    fleet, engine = found["fleet"], found["engine"]
    show(
        {
            "fleet": fleet["fleet"],
            "epoch": fleet["epoch"],
            "schema": fleet["schema"],
            "change": fleet["gen"],
            "active_kek": f"{fleet['active_kek']} (version {fleet['version']})"
            if fleet["active_kek"]
            else "none",
            "rotating": fleet["owner"] if fleet["rotating"] else "no",
            "engine": f"PostgreSQL {engine['version']}, {engine['connections']} of "
            f"{engine['connections_limit']} connections",
            "standbys": engine["synchronous_standby_names"] or "none",
        },
        False,
    )
    rows = [(kek_id, str(count)) for kek_id, count in sorted(found["deks"].items())]
    sys.stdout.writelines(["\n", *table(("KEK_ID", "DEKS"), rows)])
    hosts = [
        (
            one["name"],
            one["host"],
            str(one["beats"]),
            str(one["behind"]),
            "fenced" if one["fenced"] else "",
            " ".join(one["keks"]),
        )
        for one in found["hosts"]
    ]
    sys.stdout.writelines(["\n", *table(("HOST", "ID", "BEATS", "BEHIND", "STATE", "KEKS"), hosts)])
