"""What the operator of a fleet wants to see, in one look: the fleet, its hosts, its engine.

It reads rows as they stand, without any key: what decides is checked by the daemons, by its MACs.
"""

from __future__ import annotations

from typing import Any

from ..errors import Conflict
from ..store.seal import STATE, StoreState
from .engine import FUTURE, FUTURE_HINT, Link, Session
from .reader import combined, row_of
from .rows import FleetRow, HostRow
from .schema import altered, fleet_row

_HOSTS = "SELECT host, inc, name, beat, seen, keks, fenced FROM hosts ORDER BY name, host, inc"
_STATES = "SELECT value FROM kms WHERE name = %s"
_ENGINE = (
    "SELECT current_setting('server_version'), current_setting('synchronous_standby_names'), "
    "current_setting('synchronous_commit'), current_setting('fsync'), current_setting('full_page_writes'), "
    "current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int, "
    "(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'), "
    "pg_has_role('pg_read_all_stats', 'MEMBER'), pg_database_size(current_database())"
)
_STANDBYS = (
    "SELECT application_name, state, sync_state, "
    "coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn), 0)::bigint "
    "FROM pg_stat_replication ORDER BY 1"
)


def status(link: Link) -> dict[str, Any]:
    """Raises StoreDamaged where there is no fleet, StoreUnavailable."""
    with link.session() as session:
        fleet = fleet_row(session)
        hosts = [_host(fleet, row) for row in session.execute(_HOSTS).fetchall()]
        states = [
            StoreState.from_row(row_of(row[0])) for row in session.execute(_STATES, (STATE,)).fetchall()
        ]
        found = {"fleet": fleet._asdict(), "hosts": hosts, "engine": _engine(session)}
        strange = [*altered(session), *_future(session)]
    whole = combined(states, StoreState())
    found["deks"] = {kek_id: row.deks for kek_id, row in whole.keks.items()}
    found["warnings"] = [*strange, *_warnings(found)]
    return found


def _future(session: Session) -> list[str]:
    """A row that stops each change, and no create."""
    found = session.execute("SELECT 1 FROM changes, fleet WHERE changes.gen > fleet.gen LIMIT 1").fetchall()
    return [f"{FUTURE}: no change can be made; {FUTURE_HINT}"] if found else []


def _host(fleet: FleetRow, row: tuple[Any, ...]) -> dict[str, Any]:
    found = HostRow.of(*row)
    return {
        "host": found.host,
        "incarnation": found.inc,
        "name": found.name,
        "beats": found.beat,
        "behind": fleet.gen - found.seen,
        "keks": sorted(found.keks),
        "fenced": found.fenced,
    }


def _engine(session: Session) -> dict[str, Any]:
    version, standbys, commit, fsync, pages, most, used, sees_all, size = session.execute(_ENGINE).fetchall()[
        0
    ]
    replicas = session.execute(_STANDBYS).fetchall()
    return {
        "version": version,
        "synchronous_standby_names": standbys,
        "synchronous_commit": commit,
        "fsync": fsync,
        "full_page_writes": pages,
        "connections": used,
        "connections_limit": most,
        "bytes": size,
        "standbys": [
            {"name": name, "state": state, "synchronous": sync, "bytes_behind": behind}
            for name, state, sync, behind in replicas
        ]
        if sees_all
        else None,
    }


_FORGET = "DELETE FROM hosts WHERE %s IN (host, name) AND fenced RETURNING host"
_SERVES = "SELECT count(*) FROM hosts WHERE %s IN (host, name)"


def forget(link: Link, name: str) -> int:
    """Delete the rows of a host, by its id or its name, that was given up: it is nobody's any more. What it
    wrote stays, and is reckoned with. Returns how many; raises Conflict where none was given up: another that
    serves may have taken the name over."""
    with link.session() as session:
        gone = len(session.execute(_FORGET, (name,)).fetchall())
        ((left,),) = session.execute(_SERVES, (name,)).fetchall()
    if left and not gone:
        raise Conflict(
            f"{name} is not fenced: it serves, or no change has waited for it since it fell silent",
            code="not_fenced",
            hint="stop its daemon; where that is dead, disable and enable any DEK, which fences it",
        )
    return gone


def counted(found: dict[str, Any]) -> dict[str, float]:
    """What `status` found, as figures."""
    hosts, engine = found["hosts"], found["engine"]
    standbys = engine["standbys"] or []
    told: dict[str, float] = {
        "hosts": sum(not one["fenced"] for one in hosts),
        "hosts_fenced": sum(one["fenced"] for one in hosts),
        "behind": max((one["behind"] for one in hosts if not one["fenced"]), default=0),
        "engine_connections": engine["connections"],
        "engine_connections_limit": engine["connections_limit"],
        "engine_synchronous": int(bool(engine["synchronous_standby_names"])),
    }
    if engine["standbys"] is not None:
        told["engine_standbys"] = sum(one["synchronous"] in ("sync", "quorum") for one in standbys)
    return told


def _warnings(found: dict[str, Any]) -> Any:
    """What isn't as it should be; each says what to do."""
    engine = found["engine"]
    if not engine["synchronous_standby_names"]:
        yield (
            "the engine waits for no standby: what is acknowledged is lost with its disk; set "
            "synchronous_standby_names, such as 'ANY 1 (db2, db3)'"
        )
    elif engine["standbys"] is not None and not any(
        one["synchronous"] in ("sync", "quorum") for one in engine["standbys"]
    ):
        yield "no synchronous standby is connected: each write waits until one is"
    for name in ("fsync", "full_page_writes"):
        if engine[name] != "on":
            yield f"{name} is off: a power cut may damage the engine's files; set it on"
    if engine["connections"] * 10 > engine["connections_limit"] * 9:
        yield (
            f"{engine['connections']} of {engine['connections_limit']} connections are in use: raise "
            "max_connections; a host takes two and one for each worker"
        )
    active = found["fleet"]["active_kek"]
    for host in found["hosts"]:
        if host["fenced"]:
            yield f"{host['name']} ({host['host']}) is fenced: it was silent; it registers anew when it can"
        elif active and active not in host["keks"]:
            yield f"{host['name']} ({host['host']}) doesn't have the active KEK {active}"
