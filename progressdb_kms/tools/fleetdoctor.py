"""What `doctor` has to say of a fleet: its database, its hosts, its KEKs, this host's place among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..config.options import Settings
from ..errors import KMSError
from ..fleet import schema
from ..fleet.status import status
from ..service import start
from ..service.lock import is_held
from ..service.plan import Configured
from . import datadir
from .checkup import FAIL, OK, WARN, Finding

Findings = Iterator[Finding]


def look(settings: Settings, keys: Configured | None) -> Findings:
    """`keys`: the configured KEKs, where they are to be had here."""
    try:
        with datadir.fleet_link(settings) as link:
            schema.check(link)
            found = status(link)
    except KMSError as error:
        yield Finding(FAIL, error.message, error.hint)
        return
    fleet, engine = found["fleet"], found["engine"]
    yield Finding(
        OK,
        f"{link.where}: schema {fleet['schema']}, PostgreSQL {engine['version']}, "
        f"{engine['connections']} of {engine['connections_limit']} connections, "
        f"{sum(found['deks'].values()):,} DEKs, {len(found['hosts'])} hosts",
    )
    yield _standbys(engine)
    for warning in found["warnings"]:
        yield Finding(WARN, warning)
    yield from _place(settings, found)
    if keys is not None and fleet["active_kek"]:
        yield from _census(keys, found)


def _standbys(engine: dict[str, Any]) -> Finding:
    wanted = engine["synchronous_standby_names"]
    if not wanted:
        return Finding(OK, f"synchronous_commit is {engine['synchronous_commit']}; no standby is waited for")
    if engine["standbys"] is None:
        todo = "GRANT pg_read_all_stats to the role, then `store status` shows them"
        return Finding(WARN, f"each write waits for {wanted}; this role may not see which are there", todo)
    there = [f"{one['name']} ({one['synchronous']})" for one in engine["standbys"]]
    return Finding(OK, f"each write waits for {wanted}; connected: {', '.join(there) or 'none'}")


def _place(settings: Settings, found: dict[str, Any]) -> Findings:
    if not is_held(settings.data_dir):
        return
    host = start.host_id(settings.data_dir)
    mine = [one for one in found["hosts"] if one["host"] == host and not one["fenced"]]
    if mine:
        beats, behind = mine[0]["beats"], mine[0]["behind"]
        yield Finding(OK, f"this host has its place: {beats} heartbeats, {behind} changes behind")
    else:
        todo = "`status --ready` tells why; it registers anew by itself once it can"
        yield Finding(FAIL, "the daemon of this host runs, and has no place in the fleet", todo)


def _census(keys: Configured, found: dict[str, Any]) -> Findings:
    active, master = found["fleet"]["active_kek"], keys.master.kek_id
    if active not in keys.kek_ids:
        todo = f"let the master key of this host be {active}"
        yield Finding(
            FAIL, f"the fleet's active KEK {active} is not configured here; master is {master}", todo
        )
        return
    if absent := sorted(kek_id for kek_id in found["deks"] if kek_id not in keys.kek_ids):
        said = f"DEKs need KEKs that are not configured here: {', '.join(absent)}"
        if keys.settings.allow_missing_keks:
            yield Finding(WARN, f"{said}: answered with 503, by allow_missing_keks")
        else:
            yield Finding(FAIL, said, "add them to previous_master_keys")
    lacking = [one["name"] or one["host"] for one in found["hosts"] if active not in one["keks"]]
    if not lacking and not absent:
        yield Finding(OK, f"every host has the active KEK {active}")
