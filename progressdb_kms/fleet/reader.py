"""The reader's side of a fleet's store: the contract of `store.contract` over PostgreSQL.

Each question is one statement, and sees what was committed when it began. A worker has a reader of its own,
which connects when it first misses its cache: a hundred hosts with four workers each are more than an engine
takes by default.

The state row is one a host, so that none is hot: the store's is their sum (`combined`). What a row of a host
counts may be negative: it shredded what another had created. `change` is the host's own number, the one that
its audit log is held against; the active KEK is that of the newest version.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..encoding import KEY_ID, json_loads
from ..errors import StoreDamaged, StoreUnavailable
from ..store.contract import HEAVY, KEK_ROW, DekRecord, Usage
from ..store.policy import SHREDDED
from ..store.seal import MODULUS, OWN, STATE, ActiveKek, KekCount, Seal, StoreState, weight, without_mac
from ..store.sealed import OWN_DONT_ADD_UP, OWN_HINT, Reader, as_it_stands
from .engine import SCHEMA, TIMELINE, UNREACHABLE, Link, Session
from .rows import Point, first

HOSTS = ("store:", "audit:", "clock:", "snapshot:", "uses:", "probe")
"""Beginnings of the names of rows that each host has for itself. All others are the fleet's."""

AT_ONCE = 1.0
"""Seconds in which a connection that is dead says so."""

PAGE = 5000
"""Rows that are asked for at a time, to add up all of them."""

WRITES = "store:writes"
"""The row that counts a host's transactions: see `store`."""

_PREFIX = "host = ANY(%s) AND name >= %s AND name < %s"
_AT = f"SELECT {TIMELINE}, gen, (SELECT value FROM deks WHERE key_id = %s) FROM fleet"  # noqa: S608
_MOST = (1 << 53) - 1
_COUNTS = ", ".join(
    f"least(greatest({name}, {least}), {_MOST})"
    for name, least in (("encrypts", 0), ("decrypts", 0), ("first", 0), ("last", 0), ("uid", -1))
)
"""Of usage, as numbers that can be: the table has no MAC, and what stands in a backup must be taken back."""
_USAGE = f"SELECT key_id, {_COUNTS} FROM usage WHERE key_id = ANY(%s)"  # noqa: S608
STATES = "SELECT host, value FROM kms WHERE name = 'store:state'"
_SAID = "SELECT active_kek, host, value FROM fleet LEFT JOIN kms ON name = 'store:state'"


def row_of(value: Any) -> Any:
    """Of what stands in a column, which somebody may have altered."""
    try:
        if isinstance(value, str):
            return json_loads(value)
        raise ValueError
    except ValueError:
        raise StoreDamaged(
            "a row of the store is not JSON", hint="run `progressdb-kms verify`, then restore a backup"
        ) from None


def combined(rows: Iterable[StoreState], own: StoreState) -> StoreState:
    """The sum of all hosts' states, `own` among them."""
    keks: dict[str, KekCount] = {}
    active, total, owned = None, 0, 0
    for state in rows:
        total += state.total
        owned += state.own
        if state.active and (active is None or state.active.version > active.version):
            active = state.active
        for kek_id, row in state.keks.items():
            keks[kek_id] = plus(keks.get(kek_id), row)
    keks = {kek_id: row for kek_id, row in keks.items() if row.deks}
    return own._replace(active=active, keks=keks, total=total % MODULUS, own=owned % MODULUS)


def plus(one: KekCount | None, other: KekCount) -> KekCount:
    if one is None:
        return other
    return one._replace(deks=one.deks + other.deks, since=min(one.since, other.since))


def without(whole: StoreState, others: StoreState) -> StoreState:
    """What is left of the sum for one host."""
    keks = dict(whole.keks)
    for kek_id, row in others.keks.items():
        keks[kek_id] = plus(keks.get(kek_id, row._replace(deks=0)), row._replace(deks=-row.deks))
    left = {kek_id: row for kek_id, row in keks.items() if row.deks}
    total, own = (whole.total - others.total) % MODULUS, (whole.own - others.own) % MODULUS
    return whole._replace(keks=left, total=total, own=own)


def found_by(thread_id: Any) -> str:
    """By the API a thread_id is printable; what is imported may hold what PostgreSQL knows in no text."""
    if not isinstance(thread_id, str):
        return ""
    if thread_id.isprintable():
        return thread_id
    return thread_id.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


ANEW = "somebody wrote there by hand: put its column back, or rotate the KEK, which writes all of them anew"


def named(host: str, name: str) -> str:
    """A row's name as its MAC has it."""
    return f"{name}@{host}" if host else name


class FleetReader(Reader):
    """`host`: whose own rows are read; `key`: the row key."""

    def __init__(self, link: Link, host: str, key: memoryview | None = None) -> None:
        self._link = link
        self._open: Session | None = None  # all questions go there
        self.host = host
        self._seal = Seal(key) if key is not None else None

    def _select(self, sql: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """A connection that died since it was last used costs nobody an answer: a read is asked again. Not
        where the engine was silent: that was waited for already."""
        if self._open is not None:
            return self._open.execute(sql, args).fetchall()
        if self._link.connected:
            begun = time.monotonic()
            try:
                return self._once(sql, args)
            except StoreUnavailable as error:
                if error.code != UNREACHABLE or time.monotonic() - begun > AT_ONCE:
                    raise
        return self._once(sql, args)

    def _once(self, sql: str, args: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._link.session() as session:
            return session.execute(sql, args).fetchall()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """All questions within see the same moment. Only a rotation, at its end, waits for its lock: what a
        swap put in the place of `deks` has no rows that an older moment could see."""
        with self._link.session() as session, contextlib.ExitStack() as undo:
            session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            session.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            session.execute("LOCK TABLE deks IN ACCESS SHARE MODE")  # first: the moment begins after it
            self._open = session
            undo.callback(setattr, self, "_open", None)
            yield
            session.execute("COMMIT")

    def _owner(self, name: str) -> str:
        return self.host if name.startswith(HOSTS) else ""

    # ---- DEKs ----------------------------------------------------------------------------------

    def _text(self, key_id: str) -> Any:
        rows = self._select("SELECT value FROM deks WHERE key_id = %s", (key_id,))
        return rows[0][0] or "" if rows else None

    def at(self, key_id: str) -> tuple[DekRecord | None, Point]:
        """A row and the point of the snapshot in which it was read, for whoever remembers it."""
        timeline, gen, text = first(self._select(_AT, (key_id,)))
        return self._record(key_id, text) if text is not None else None, Point(timeline, gen)

    def there(self, key_ids: Sequence[str]) -> set[str]:
        rows = self._select("SELECT key_id FROM deks WHERE key_id = ANY(%s)", (list(key_ids),))
        return {row[0] for row in rows}

    def _texts(self, after: str, limit: int, thread_id: str | None) -> list[tuple[str, Any]]:
        thread = "" if thread_id is None else "AND thread_id = %s "
        args = (after, limit) if thread_id is None else (after, thread_id, limit)
        sql = f"SELECT key_id, value FROM deks WHERE key_id > %s {thread}ORDER BY key_id LIMIT %s"  # noqa: S608
        rows = [(key_id, text) for key_id, text in self._select(sql, args)]
        for key_id, text in rows if thread_id is not None else ():
            if isinstance(row := as_it_stands(text), dict) and found_by(row.get("thread_id")) != thread_id:
                raise StoreDamaged(f"the DEK {key_id} is found by a thread that it isn't of", hint=ANEW)
        return rows

    def misfiled(self) -> Iterator[str]:
        """DEKs beside which the columns, by which they are found, say something else than their rows."""
        after = ""
        sql = "SELECT key_id, thread_id, kek_id, value FROM deks WHERE key_id > %s ORDER BY key_id LIMIT %s"
        while rows := self._select(sql, (after, PAGE)):
            after = rows[-1][0]
            for key_id, thread_id, kek_id, text in rows:
                row = as_it_stands(text)
                if isinstance(row, dict):  # else it is named for that
                    needed = "" if row.get("state") == SHREDDED else row.get("kek_id")
                    if (found_by(row.get("thread_id")), needed) != (thread_id, kek_id):
                        yield key_id

    def added_up(self) -> tuple[dict[str, int], int]:
        """What the state has to say: DEKs by the KEK that they need, and the sum of all rows. Of a row that
        is none of ours nothing is added."""
        keks: dict[str, int] = {}
        total, after = 0, ""
        sql = "SELECT key_id, value FROM deks WHERE key_id > %s ORDER BY key_id LIMIT %s"
        while rows := self._select(sql, (after, PAGE)):
            after = rows[-1][0]
            for _, text in rows:
                with contextlib.suppress(StoreDamaged, KeyError, TypeError, ValueError):
                    row = row_of(text)
                    total += weight(row)
                    if row["state"] != SHREDDED:
                        keks[row["kek_id"]] = keks.get(row["kek_id"], 0) + 1
        return keks, total % MODULUS

    # ---- rows of the service -------------------------------------------------------------------

    def _signed(self, name: str) -> str:
        return named(self._owner(name), name)

    def _read(self, name: str) -> Any:
        rows = self._select("SELECT value FROM kms WHERE host = %s AND name = %s", (self._owner(name), name))
        return as_it_stands(rows[0][0]) if rows else None

    def names(self, prefix: str) -> list[str]:
        """In order."""
        sql = f"SELECT name FROM kms WHERE {_PREFIX} ORDER BY name"  # noqa: S608
        return [row[0] for row in self._select(sql, ([self.host, ""], prefix, prefix + "\uffff"))]

    def span(self, prefix: str) -> tuple[int, str]:
        sql = f"SELECT count(*), coalesce(min(name), '') FROM kms WHERE {_PREFIX}"  # noqa: S608
        ((count, first),) = self._select(sql, ([self.host, ""], prefix, prefix + "\uffff"))
        return count, first

    # ---- usage ---------------------------------------------------------------------------------

    def usage(self, key_ids: Sequence[str]) -> dict[str, Usage]:
        rows = self._select(_USAGE, (list(key_ids),))
        return {key_id: Usage(*counts) for key_id, *counts in rows}

    def heavy(self) -> dict[str, int]:
        """A name that can be neither a DEK's nor a KEK's is somebody else's, and is told to nobody."""
        rows = self._select(f"SELECT key_id, encrypts FROM usage WHERE encrypts >= {HEAVY}")  # noqa: S608
        return {
            name: min(count, _MOST) for name, count in rows if KEY_ID.fullmatch(name.removeprefix(KEK_ROW))
        }

    # ---- the state -----------------------------------------------------------------------------

    def state(self) -> StoreState:
        return self._combined(self._select(STATES))[0]

    def state_of(self, host: str) -> bool:
        """Has this host ever written?"""
        return any(row[0] == host for row in self._select(STATES))

    def of_others(self, name: str) -> list[Any]:
        """A row that each host has for itself, of all but this one. Raises StoreDamaged."""
        found = []
        for host, text in self._select("SELECT host, value FROM kms WHERE name = %s", (name,)):
            if host != self.host:
                row = row_of(text)
                self._check_of(host, name, row)
                found.append(without_mac(row))
        return found

    def _combined(self, rows: Sequence[tuple[Any, ...]]) -> tuple[StoreState, StoreState]:
        """The fleet's state, and that of all hosts but this one. Raises StoreDamaged."""
        states = {}
        for host, text in rows:
            row = as_it_stands(text)
            self._check_of(host, STATE, row)
            states[host] = StoreState.from_row(row)
        own = states.get(self.host, StoreState())
        others = [state for host, state in states.items() if host != self.host]
        return combined(states.values(), own), combined(others, StoreState())

    def _check_of(self, host: str, name: str, row: Any) -> None:
        """One host's row is no other's, though the sum would be the same."""
        if self._seal is not None:
            self._seal.check(named(host, name), row)

    def agreed(self) -> ActiveKek | None:
        """The active KEK, by the hosts' states. The fleet's row names it too, where each write asks, and has
        no MAC: by that alone whoever writes rows could have all hosts wrap under a KEK of before. Raises
        StoreDamaged where it names another."""
        rows = self._select(_SAID)
        active = self._combined([row[1:] for row in rows if row[1] is not None])[0].active
        said, true = first(rows)[0], active.kek_id if active else ""
        if said != true:
            raise StoreDamaged(
                f"the fleet's own row names {said[:32]!r} as the active KEK, which its hosts made {true!r}",
                hint=f"somebody wrote there by hand: UPDATE {SCHEMA}.fleet SET active_kek = '{true}'",  # noqa: S608
            )
        return active

    def vouch(self) -> None:
        """Of all hosts' rows and the fleet's, in one snapshot."""
        self.agreed()
        total = own = 0
        for host, name, text in self._select("SELECT host, name, value FROM kms ORDER BY host, name"):
            if name != STATE and not name.startswith(OWN):
                continue
            row = as_it_stands(text)
            self._check_of(host, name, row)
            if name == STATE:
                own += StoreState.from_row(row).own
            else:
                total += weight(row)
        if (total - own) % MODULUS:
            raise StoreDamaged(OWN_DONT_ADD_UP, hint=OWN_HINT)

    def keks(self) -> Mapping[str, KekCount]:
        return self.state().keks

    def drop(self) -> None:
        """The engine that answers is behind: find the primary anew."""
        self._link.drop()

    def close(self) -> None:
        self._link.close()
