"""The tables of a fleet, and the rule of releases: one knows its own schema, and says what to do about
another's.

All of it stands in the schema `kms`, which belongs to the role that the daemons log in as: a rotation makes a
table and renames it, which only an owner may. Nothing in it is secret: DEKs are wrapped, and rows are
authentic by their MACs, not by who may write here. Who writes here can destroy rows, and can't make or change
one unnoticed.

    deks      one row a DEK. `value` is the row of every store, JSON with its MAC, as text. The columns
              beside it are for finding it, and decide nothing: `thread_id`; `kek_id`, empty once shredded;
              `rev`, which counts the row's writes: a change names the one that it saw, so that none is lost
    kms       rows of the service: of the fleet (host ''), and of each host (its state row, audit heads,
              clock)
    usage     what was done under each DEK: no MAC, untouched by rotation
    fleet     one row: who is the fleet, the number of its last change, the active KEK, who rotates
    hosts     a row for each daemon that runs; see `rows`
    changes   what the hosts must hear of, by number
    touched   while a rotation is under way: which DEKs were written since it began, and how much the sum
              moved

Two releases run side by side while hosts are upgraded one by one. So a step of the schema must leave what the
release before it needs: it adds, and what it makes useless goes with the step after it. `fleet.least` says so
in the database: the oldest schema of which a release may go on, or start anew, beside this one. One that is
older than that is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError, StoreDamaged
from .engine import SCHEMA, TIMELINE, Link, Session
from .rows import FleetRow, first, plain

VERSION = 1
"""The schema that this release writes, and the only one that it knows yet."""

HEAVY_INDEX = "usage_heavy"

TABLES = (
    """CREATE TABLE fleet (
        one boolean PRIMARY KEY DEFAULT true CHECK (one),
        fleet text NOT NULL, epoch bigint NOT NULL, schema integer NOT NULL,
        gen bigint NOT NULL, active_kek text NOT NULL, version integer NOT NULL,
        rotating boolean NOT NULL, owner text NOT NULL, least integer NOT NULL)""",
    """CREATE TABLE deks (
        key_id text COLLATE "C" PRIMARY KEY, thread_id text COLLATE "C" NOT NULL, value text NOT NULL,
        kek_id text COLLATE "C" NOT NULL, rev bigint NOT NULL)""",
    "CREATE INDEX ON deks (thread_id, key_id)",
    """CREATE TABLE kms (
        host text COLLATE "C" NOT NULL, name text COLLATE "C" NOT NULL, value text NOT NULL,
        PRIMARY KEY (host, name))""",
    """CREATE TABLE usage (
        key_id text COLLATE "C" PRIMARY KEY, encrypts bigint NOT NULL, decrypts bigint NOT NULL,
        first bigint NOT NULL, last bigint NOT NULL, uid bigint NOT NULL)""",
    f"CREATE INDEX {HEAVY_INDEX} ON usage (encrypts) WHERE encrypts >= 2147483648",
    """CREATE TABLE hosts (
        host text COLLATE "C" NOT NULL, inc text COLLATE "C" NOT NULL, name text NOT NULL,
        beat bigint NOT NULL, seen bigint NOT NULL, keks text[] NOT NULL, fenced boolean NOT NULL,
        PRIMARY KEY (host, inc))""",
    "CREATE TABLE changes (gen bigint PRIMARY KEY, kind text NOT NULL, key_id text NOT NULL)",
    'CREATE TABLE touched (key_id text COLLATE "C" NOT NULL, was text NOT NULL, now text NOT NULL)',
)

_KEYLESS = ("touched",)

MIGRATIONS: dict[int, tuple[str, ...]] = {}
"""From each older version: what leads to the next one."""

_THERE = "SELECT count(*) FROM pg_tables WHERE schemaname = %s AND tablename = 'fleet'"
FLEET = f"SELECT fleet, epoch, schema, gen, active_kek, version, rotating, owner, {TIMELINE} FROM fleet"  # noqa: S608
"""The columns of a FleetRow."""

_MAKE = "INSERT INTO fleet VALUES (true, %s, 1, %s, 0, '', 0, false, '', %s)"
_OURS = f"'{SCHEMA}'::regnamespace::oid"
_INSIDE = f"""
SELECT 'the relation ' || relname::text FROM pg_class WHERE relnamespace = {_OURS} UNION ALL
SELECT 'the function ' || proname::text FROM pg_proc WHERE pronamespace = {_OURS} LIMIT 1"""  # noqa: S608
_OTHERS = f"""
SELECT what, pg_get_userbyid(owner) FROM (
SELECT 'it', nspowner FROM pg_namespace WHERE oid = {_OURS} UNION ALL
SELECT 'the table ' || relname::text, relowner FROM pg_class WHERE relnamespace = {_OURS}
AND relname IN ('fleet', 'deks', 'kms', 'usage', 'hosts', 'changes', 'touched') UNION ALL
SELECT 'the operator ' || oprname::text, oprowner FROM pg_operator WHERE oprnamespace = {_OURS} UNION ALL
SELECT 'the function ' || proname::text, proowner FROM pg_proc WHERE pronamespace = {_OURS}
) AS found (what, owner) JOIN pg_roles ON oid = owner
WHERE NOT rolsuper AND NOT pg_has_role(owner, 'MEMBER') LIMIT 1"""  # noqa: S608
"""What belongs to a role that is neither ours nor the engine's administrator. Whose the schema is may drop
and replace each table; and a function there that fits a question of ours better than the engine's own is run
in our name. (So this question casts each argument to what the engine's own takes.)"""

_COLUMN = re.compile(r'\b(\w+) (text\[\]|text|bigint|integer|boolean)(?!\w)( COLLATE "C")?')
_RELATIONS = f"""
SELECT relname::text, relkind = 'r', relpersistence = 'p', relrowsecurity,
EXISTS (SELECT FROM pg_rewrite WHERE ev_class = c.oid),
EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND indisprimary) FROM pg_class AS c
WHERE relnamespace = {_OURS}"""  # noqa: S608
_COLUMNS = f"""
SELECT relname::text, attname::text, format_type(atttypid, atttypmod), collname::text, attnotnull
FROM pg_class AS c JOIN pg_attribute ON attrelid = c.oid LEFT JOIN pg_collation AS l ON l.oid = attcollation
WHERE relnamespace = {_OURS} AND attnum > 0 AND NOT attisdropped"""  # noqa: S608

_LOCK = "SELECT pg_advisory_xact_lock(hashtext('progressdb-kms schema'))"


def fleet_row(session: Session) -> FleetRow:
    """As it is, whatever its schema."""
    return FleetRow.of(first(session.execute(FLEET).fetchall()))


def check(link: Link) -> FleetRow:
    """Raises StoreDamaged where there is no fleet, or one that this release doesn't know: of another schema,
    or altered."""
    with link.session() as session:
        found = fleet_row(session)
        _refuse_others(link, session)
        (least,) = first(session.execute("SELECT least FROM fleet").fetchall())
        strange = list(altered(session))
    if found.schema > VERSION and least > VERSION:  # else what one after this has added need not be known
        raise StoreDamaged(
            f"{link.where} has schema {found.schema}, and this release knows {VERSION}",
            hint="install the release that the other hosts have",
        )
    if found.schema < VERSION:
        raise StoreDamaged(
            f"{link.where} has schema {found.schema}, and this release writes {VERSION}",
            hint="run `progressdb-kms store migrate`: the release before this one goes on beside it",
        )
    if strange:
        raise StoreDamaged(f"{link.where}: {strange[0]}", hint=_UNDO)
    return found


def create(link: Link) -> FleetRow:
    """Make the tables of a new fleet. Raises ConfigError where there is one already."""
    with link.session() as session, session.transaction():
        session.execute(_LOCK)
        if _is_there(session):
            raise ConfigError(
                f"{link.where} holds a fleet already: nothing was changed",
                hint="`progressdb-kms store status` shows it; another fleet needs another database",
            )
        session.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        _refuse_others(link, session)
        for (inside,) in session.execute(_INSIDE).fetchall():
            raise ConfigError(
                f"the schema {SCHEMA} of {link.where} holds {inside} already: nothing was changed",
                hint="a fleet needs that schema for itself: give it another database",
            )
        for statement in TABLES:
            _execute(session, statement)
        session.execute(_MAKE, (os.urandom(16).hex(), VERSION, VERSION))
    return check(link)


def migrate(link: Link) -> tuple[int, int]:
    """Bring an older schema up to this release's. Returns the versions before and after. Raises StoreDamaged
    for a newer one."""
    with link.session() as session, session.transaction():
        session.execute(_LOCK)
        was = fleet_row(session).schema
        for version in range(was, VERSION):
            for statement in MIGRATIONS[version]:
                _execute(session, statement)
            session.execute("UPDATE fleet SET schema = %s, least = %s", (version + 1, version))
    return was, check(link).schema


_UNDO = (
    "somebody altered it, or a restore left that out: undo it, or `restore` a backup into another database"
)


def altered(session: Session) -> Iterator[str]:
    """What is no more as `create` made it, and what it does to us. A release after this one may have added
    columns."""
    there = {name: facts for name, *facts in session.execute(_RELATIONS).fetchall()}
    columns = {(table, name): facts for table, name, *facts in session.execute(_COLUMNS).fetchall()}
    for statement in TABLES:
        if not (made := re.match(r"CREATE TABLE (\w+) (.*)", statement, re.DOTALL)):
            continue
        table, text = made.groups()
        told = f"the table {SCHEMA}.{table}"
        is_table, lasts, hides, rules, keyed = there.get(table, [False] * 5)
        if not is_table:
            yield f"{told} is not there, or is no table"
            continue
        if not lasts:
            yield f"{told} is UNLOGGED: a crash of the engine, or a failover, empties it (SET LOGGED)"
        if hides or rules:
            yield f"{told} has {'row security' if hides else 'rules'}: rows are hidden, or not written"
        if not keyed and table not in _KEYLESS:
            yield f"{told} has no primary key"
        for column, kind, collation in _COLUMN.findall(text):
            is_now = columns.get((table, column))
            if is_now is None or is_now[0] != kind or (collation and is_now[1] != "C") or not is_now[2]:
                was = f"{kind}{collation} NOT NULL"
                yield f"the column {column} of {told} is no more {was}"


def _refuse_others(link: Link, session: Session) -> None:
    for what, owner in session.execute(_OTHERS).fetchall():
        raise ConfigError(
            f"the schema {SCHEMA} of {link.where} is not {link.where.user}'s alone: {plain(what)} belongs to "
            f"{plain(owner)}, who can have the daemons' questions answered otherwise",
            hint=f"ALTER … OWNER TO {link.where.user}, or drop it, if it is none of the fleet's",
        )


def _is_there(session: Session) -> bool:
    return bool(session.execute(_THERE, (SCHEMA,)).fetchall()[0][0])


def _execute(session: Session, statement: str) -> Any:
    return session.execute(statement.encode())  # bytes: no placeholders are looked for
