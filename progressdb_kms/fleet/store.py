"""The writer's side of a fleet's store. Each host has one: its keeper.

**A transaction is gathered first, and sent at its end.** What is written waits here; a read looks there
first, then asks the engine, and remembers which `rev` it saw. At the end all goes out in one pipeline with
one Sync, which makes it one implicit transaction, READ COMMITTED. In this order:

    guard     this host's count of transactions goes from n to n + 1, and nobody else's did meanwhile
    deks      new rows; changed ones, each as long as its `rev` is the one that was seen
    touched   SELECT … FROM fleet WHERE rotating: after the rows, whose table lock a rotation's beginning
              waits for
    kms       rows of the service, this host's state row among them, as long as it is the one that was read
    changes   of rows that were there before: a number from the fleet's row, which is held to the COMMIT, so
              that the order of numbers is the order of commits; a NOTIFY, which is a hint. Creates make no
              change
    fence     the active KEK is ours, and this incarnation of this host is registered and not fenced. Its
              row is held to the COMMIT, so that who fences us either comes before this, or waits for it

Each condition is an error of its own where it doesn't hold (a division by zero, a logarithm, a root), because
an error is what aborts the rest. Nothing is locked while this host thinks, so one that is stopped stops
nobody.

**Rotation works inside**: its statements depend on each other, so the first of them opens a real transaction
(`_inside`), and what waited is sent into it. COMMIT is then looked at: it answers ROLLBACK, without an error,
where the transaction had failed.

    staging   `deks` in SHARE mode: who writes now is done before `rotating` is seen
    each page `deks_next`, as long as this rotation is the fleet's: another host may have thrown it away
    settle    `kms` first, which every transaction of every host writes to from its beginning: when it is had,
              none is under way, and those that come will find another active KEK. Then `deks`, whose readers
              wait from here on; the fleet's row; the hosts' rows, so that the census stays true

**Unknown outcomes.** The connection may be lost at the end, or the engine warns that it has not waited for
its standby. Then the same is sent again. The guard decides: if it fails and the count is what we were about
to make it, the first try took place. An old one that is still under way holds the guard's row, so the second
waits for it, or gives up and says so; before the next transaction all is read anew.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union

import psycopg
from psycopg import errors as sqlstate

from ..encoding import b64decode, b64encode, json_dumps
from ..errors import Conflict, StoreDamaged, StoreUnavailable
from ..store.contract import KEK_ROW, DekRecord, Usage
from ..store.policy import SHREDDED
from ..store.seal import MODULUS, STATE, KekCount, Seal, StoreState, Tally, weight, without_mac
from ..store.sealed import Store, Written, as_it_stands, nobody
from .engine import FORGOTTEN, TIMELINE, UNREACHABLE, Link, Session, Texts, translated
from .reader import STATES, WRITES, FleetReader, combined, found_by, named, row_of, without
from .rows import ALL, KEKS, KEY, FleetRow, HostRow, Point, added, first, plain
from .schema import FLEET
from .status import status

log = logging.getLogger(__name__)

MAC_SIZE = 32

NAMED = 5
"""Key ids that a message names at most."""

MANY = 64
"""Changes of one transaction that are told one by one; of more the hosts hear that all may have changed."""

HEAVY_SECONDS = 1.0
"""How old may be what a create goes by of how much its KEK has wrapped."""

BULK = 2000
"""Rows of one transaction that wait for its end."""

LOCK_MILLISECONDS = 200
"""How long a rotation waits for the tables at its beginning and its end: meanwhile others wait for it. Then
it is tried again later."""

CHANNEL = "kms"

WRITER = "progressdb-kms "
"""Before a host's id: the name of its writer's session, by which whoever fences it ends that."""

RETIRED = "deks_old_"  # and a number: what rotations left, which is their snapshot


class Contended(StoreUnavailable):
    """503: another host changed the same rows meanwhile. Nothing took place; to begin anew is safe."""

    default_code = "store_contended"


class Taken(Contended):
    """503: likewise, and it was this host's count of transactions that changed."""


class Locked(Contended):
    """503: a table could not be had soon, since somebody reads or writes it for long. Nothing took place."""


class Fenced(StoreUnavailable):
    """503: this host is no longer in the fleet, or the fleet has another active KEK. Nothing took place."""

    default_code = "fenced"


class Unknown(Exception):
    """It may have taken place."""


# ---- statements ----------------------------------------------------------------------------------------

_GUARD = (
    "WITH done AS (INSERT INTO kms AS k VALUES (%s, 'store:writes', %s) ON CONFLICT (host, name) "
    "DO UPDATE SET value = excluded.value WHERE k.value = %s RETURNING 1) SELECT ln(count(*)) FROM done"
)
_STATE = (
    "WITH done AS (INSERT INTO kms AS k VALUES (%s, 'store:state', %s) ON CONFLICT (host, name) "
    "DO UPDATE SET value = excluded.value WHERE k.value = %s RETURNING 1) SELECT sqrt(count(*) - 1) FROM done"
)
_INSERT = (
    "WITH done AS (INSERT INTO deks SELECT *, 1 FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[]) "
    "ON CONFLICT (key_id) DO NOTHING RETURNING 1) SELECT sqrt((count(*) = %s)::int - 1) FROM done"
)
_UPDATE = (
    "WITH done AS (UPDATE deks AS d SET thread_id = n.thread_id, value = n.value, kek_id = n.kek_id, "
    "rev = mod(n.rev, 1::bigint << 62) + 1 "
    "FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::bigint[]) "
    "AS n (key_id, thread_id, value, kek_id, rev) "
    "WHERE d.key_id = n.key_id AND coalesce(d.rev, 0) = n.rev RETURNING 1) "
    "SELECT sqrt((count(*) = %s)::int - 1) FROM done"
)
_TOUCHED = (
    "INSERT INTO touched SELECT n.key_id, CASE WHEN owner = %s THEN '' ELSE n.was END, "
    "CASE WHEN owner = %s THEN '' ELSE n.now END FROM fleet, "
    "unnest(%s::text[], %s::text[], %s::text[]) AS n (key_id, was, now) WHERE rotating"
)
_WRITE = (
    "INSERT INTO kms SELECT * FROM unnest(%s::text[], %s::text[], %s::text[]) "
    "ON CONFLICT (host, name) DO UPDATE SET value = excluded.value"
)
_ERASE = (
    "DELETE FROM kms USING unnest(%s::text[], %s::text[]) AS n (host, name) "
    "WHERE kms.host = n.host AND kms.name = n.name"
)
_COUNT = (
    "INSERT INTO usage AS u SELECT n.* FROM "  # noqa: S608
    "unnest(%s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[]) "
    "AS n (key_id, encrypts, decrypts, first, last, uid) "
    "LEFT JOIN deks AS d ON d.key_id = n.key_id "
    f"WHERE d.kek_id <> '' OR starts_with(n.key_id, '{KEK_ROW}') "
    "ON CONFLICT (key_id) DO UPDATE SET "
    "encrypts = least(greatest(u.encrypts, 0), 1::bigint << 53) + excluded.encrypts, "
    "decrypts = least(greatest(u.decrypts, 0), 1::bigint << 53) + excluded.decrypts, "
    "first = coalesce(least(nullif(u.first, 0), nullif(excluded.first, 0)), 0), "
    "uid = CASE WHEN excluded.last >= u.last THEN excluded.uid ELSE u.uid END, "
    "last = greatest(u.last, excluded.last)"
)  # noqa: S608  # a constant of ours
_FORGET_USAGE = "DELETE FROM usage WHERE key_id = ANY(%s)"
_ACTIVATE = (
    "WITH done AS (UPDATE fleet SET active_kek = %s, version = %s WHERE active_kek = %s RETURNING 1) "
    "SELECT sqrt(count(*) - 1) FROM done"
)
_CHANGES = (
    "WITH next AS (UPDATE fleet SET gen = gen + %s RETURNING gen), done AS (INSERT INTO changes "  # noqa: S608
    "SELECT gen - %s + n.at, n.kind, n.key_id FROM next, "
    "unnest(%s::text[], %s::text[]) WITH ORDINALITY AS n (kind, key_id, at) RETURNING 1) "
    "SELECT sqrt((count(*) = %s)::int - 1) FROM done"
)
_NOTIFY = "SELECT pg_notify(%s, '')"
_FENCE = (  # and at which point this is
    f"SELECT {TIMELINE}, (SELECT gen FROM fleet), 1 / count(*) FROM (SELECT 1 FROM hosts AS h, fleet AS f "  # noqa: S608
    "WHERE h.host = %s AND h.inc = %s AND NOT h.fenced AND f.active_kek = %s FOR SHARE OF h) AS mine"
)

_STAGED = (
    "INSERT INTO deks_next SELECT n.*, 1 FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[]) AS n "
    "ON CONFLICT (key_id) DO UPDATE SET thread_id = excluded.thread_id, value = excluded.value, "
    "kek_id = excluded.kek_id"
)
# Of a row that is spelled as we write it, the MAC is the last member; that it is was seen when it was staged.
_PAIRS = (
    "SELECT live.key_id, left(right(live.value, 46), 44), left(right(staged.value, 46), 44) FROM "
    "(SELECT key_id, value FROM deks WHERE key_id > %s ORDER BY key_id LIMIT %s) AS live "
    "LEFT JOIN deks_next AS staged USING (key_id) ORDER BY live.key_id"
)
TABLES = (
    "SELECT tablename FROM pg_tables WHERE schemaname = 'kms' AND tablename ~ ('^' || %s || '[0-9]{1,18}$')"
)
"""Of this beginning, with a number: any other is of somebody else's making, whatever stands in it."""

Statement = tuple[str, Sequence[Any]]
Mark = tuple[StoreState, StoreState, Union[Tally, None], frozenset[str]]


# ---- what waits to be sent -------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of `deks` to be written. `rev`: the one that was seen, None for a new row; `was`: its MAC."""

    thread_id: str
    text: str
    kek_id: str
    mac: str
    rev: int | None
    was: str


def _writes(row: str | None) -> int:
    """Of a row that has no MAC: where it is none of ours, a number that was never there."""
    try:
        found = row_of(row)["writes"] if row is not None else 0
    except (StoreDamaged, KeyError, TypeError):
        found = None
    return found if type(found) is int and 0 <= found < 1 << 62 else time.time_ns()


class Gathered:
    """The writes of a transaction, as far as they are not sent."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[str, int] | None] = {}  # of deks: the text and its rev, as they were read
        self.rows: dict[str, Row] = {}
        self.kms: dict[str, str | None] = {}  # None: erased
        self.staged: dict[str, Row] = {}
        self.usage: dict[str, Usage] = {}
        self.unused: set[str] = set()  # their usage goes
        self.retired: set[str] = set()  # taken out of what rotations left
        self.activated: tuple[str, str, int] | None = None  # the KEK before, the new one and its version

    def copy(self) -> Gathered:
        other = Gathered()
        other.seen, other.activated = self.seen, self.activated
        for name in ("rows", "kms", "staged", "usage", "unused", "retired"):
            setattr(other, name, getattr(self, name).copy())
        return other


class FleetStore(Store, FleetReader):
    """One incarnation `inc` of a host, which must be registered (`Registry`) before it writes.

    `_book` is the state of the whole fleet as far as this host knows it, `_others` the part of it that it
    read: the difference is its own, and exact."""

    def __init__(self, link: Link, host: str, inc: str, key: memoryview | None = None) -> None:
        FleetReader.__init__(self, link, host)
        self.inc = inc
        self.point = Point(0, 0)
        """Of the last change that a transaction of ours made: its answer waits until all have seen this."""
        self.standing: Callable[[], str] = str
        """Why this host has no place in the fleet just now; "" where it has."""
        self._acknowledged = 0
        self._unclear = ""
        self._stale = False
        self._now: Gathered | None = None
        self._changed: list[tuple[str, str]] = []
        self._heavy: dict[str, int] = {}
        self._heavy_until = 0.0
        self._renames: list[Statement] = []
        self._ahead: dict[str, str | None] = {}  # rows of kms, as they are under the lock of a swap
        self._staged_ahead: dict[str, str] = {}
        self._owed: set[str] = set()
        self._strange: set[str] = set()  # of marks that no host made
        self._expected: set[str] = set()
        self._parts = 0
        self.left = ""
        """The table that the last swap left: a snapshot of the rows as they were."""
        self.locked_at = 0.0
        self._free = ""
        self._settled = False  # in this transaction nobody else writes any more
        self.paired = 0
        """Rows of the last look at both tables."""
        self._look()
        self.acting = self._active
        """The KEK that this host holds for the active one: the fence compares it with the fleet's. It follows
        a change of our own; after another host's the keeper sets it, who has to have the key."""
        if key is not None:
            self.unlock(key)

    # ---- the state ---------------------------------------------------------------------------

    def _look(self) -> None:
        """Take from the disk what a transaction goes by. What nobody knew of is waited for, and a standby has
        it, before it counts as a fact."""
        if self._unclear:
            self._confirmed()
        mine = self._select(_ROW, (self.host, WRITES))
        rows = self._select(STATES)
        self._count_row: str | None = mine[0][0] if mine else None
        self._stored: str | None = dict(rows).get(self.host)
        self._book, self._others = self._combined(rows)
        self._used = bool(rows)
        self._tally, self._owed, self._strange = None, set(), set()
        self._unclear, self._stale = "", False
        self._publish(self._book.change)

    def _look_again(self) -> None:
        """Raises StoreUnavailable where the engine has lost what it had acknowledged."""
        known = self._acknowledged
        try:
            self._look()
        except Unknown as error:
            raise StoreUnavailable(str(error), code=UNREACHABLE, hint="to repeat it is safe") from None
        if self._book.change < known:
            self._stale = True
            raise StoreUnavailable(
                f"{self._link.where} is older than what was acknowledged: it has change {self._book.change} "
                f"of this host, and {known} took place",
                hint="a failover lost it, or an older database was put back: `progressdb-kms help fleet`",
            )

    def unlock(self, key: memoryview, publish: Callable[[int], None] = nobody) -> None:
        """As of any store; but a host that joins has no state yet, though there are DEKs."""
        self._seal, self._publish = Seal(key), publish
        self._look()
        if not self._used and self._texts("", 1, None):
            raise StoreDamaged(
                f"all rows {STATE} of the store are missing",
                hint="restore a backup: `progressdb-kms restore FILE`",
            )

    def state(self) -> StoreState:
        """With what other hosts did since; inside a transaction as of its beginning, and while the engine is
        away as it was last."""
        if self._now is None and not self._unclear and not self.standing():
            self._refresh()
        return self._book

    def _refresh(self) -> None:
        """Read the others' part again. Ours stays: it may be on no disk yet."""
        own = self._own()
        _, self._others = self._combined(self._select(STATES))
        self._book = combined([own, self._others], own)

    @property
    def _active(self) -> str:
        return self._book.active.kek_id if self._book.active else ""

    def activate(self, kek_id: str, version: int, since: str) -> None:
        was = self._gathered.activated[0] if self._gathered.activated else self._active
        super().activate(kek_id, version, since)
        self._gathered.activated = (was, kek_id, version)

    # ---- transactions ------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self, durable: bool = True) -> Iterator[None]:
        """All are durable. Raises Contended, Fenced, StoreUnavailable."""
        if self._now is not None:
            raise StoreUnavailable("a transaction is under way")
        if why := self.standing():  # known already: to try it would only make the caller wait
            raise StoreUnavailable(why, code=UNREACHABLE, hint="it is tried again by itself")
        if self._unclear or self._stale:
            self._look_again()
        before, acting = self._mark(), self.acting
        stored = self._stored
        self._now, self._changed, self._fenced_by = Gathered(), [], self.acting
        self._renames, self._ahead = [], {}
        with contextlib.ExitStack() as self._until_end:
            try:
                yield
                self._settle(before[0])
                self._finish()
            except BaseException:
                self._go_back(before)
                self._stored = stored
                raise
            finally:
                self._now = self._open = None
                self._settled = False
        self._acknowledged = self._book.change
        if self._fenced_by != acting:  # else it may have been set meanwhile, to another host's
            self.acting = self._fenced_by
        self._committed(before[0])

    def _own(self) -> StoreState:
        return without(self._book, self._others)

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        """A part that leaves nothing of what waits. Rotation's own statements have no place in one."""
        saved, before = self._gathered.copy(), self._mark()
        self._parts += 1
        try:
            yield
        except BaseException:
            self._now = saved
            self._go_back(before)
            raise
        finally:
            self._parts -= 1

    def _mark(self) -> Mark:
        return self._book, self._others, self._tally, frozenset(self._owed)

    def _go_back(self, mark: Mark) -> None:
        """What was to be staged again is so again, where that failed."""
        self._book, self._others, self._tally, owed = mark
        self._owed = set(owed)

    @property
    def _gathered(self) -> Gathered:
        if self._now is None:
            raise StoreUnavailable("a write outside of a transaction")
        return self._now

    def _finish(self) -> None:
        """Who has only looked whether all is as it should be writes its count, too: its COMMIT then waits for
        the standby that has what it saw."""
        statements = self._statements()
        if not statements and not self._gathered.seen and self._open is None:
            return
        count = json_dumps({"writes": _writes(self._count_row) + 1, "inc": self.inc})
        guard = (_GUARD, (self.host, count, self._count_row or ""))
        stored = self._gathered.kms.get(STATE, self._stored)
        everything = [guard, *statements, *self._renames, *self._told()]
        try:
            if self._open is not None:
                self._end_inside(self._open, everything)
            else:
                self._end(everything, count)
        except Unknown as error:
            self._unclear = f"nobody knows yet what became of a transaction: {error}"
            raise StoreUnavailable(self._unclear, code=UNREACHABLE, hint="to repeat it is safe") from None
        except StoreUnavailable:
            self._stale = True
            raise
        self._count_row, self._stored = count, stored

    def _told(self) -> list[Statement]:
        """The last statements of a transaction: its changes, and the fence."""
        result: list[Statement] = []
        told = self._changed if len(self._changed) <= MANY else [(ALL, "")]
        if told:
            kinds, names = [kind for kind, _ in told], [key_id for _, key_id in told]
            result += [(_CHANGES, (len(told), len(told), kinds, names, len(told))), (_NOTIFY, (CHANNEL,))]
        return [*result, (_FENCE, (self.host, self.inc, self._fenced_by))]

    def _end(self, statements: list[Statement], count: str) -> None:
        """Send it; and again, where nobody knows what became of the first."""
        try:
            self._send(statements)
        except Unknown as error:
            log.warning("%s: the transaction is sent again", error)
            try:
                self._send(statements)
            except Taken:
                if self._confirmed() != count:
                    raise
                # The first try took place, at no point above the fleet's.
                self.point = Point(*self._select(_POINT)[0])

    def _confirmed(self) -> str | None:
        """Our count, as a standby has it, too: to be there is not enough, where the wait for one was
        cancelled. It is written over itself, so this also waits for a transaction of ours that is under
        way."""
        with self._link.session() as session:
            session.warning = ""
            rows = session.execute(_CONFIRM, (self.host, WRITES)).fetchall()
            if session.warning:
                raise Unknown(f"{self._link.where} warns: {session.warning}")
        return rows[0][0] if rows else None

    def _send(self, statements: list[Statement]) -> None:
        with self._link.session() as session:
            session.warning = ""
            try:
                with session.pipeline():
                    cursors = self._all(session, statements)
            except psycopg.Error as error:
                raise self._meant(error) from None
            self._ended(session, statements, cursors)

    def _all(self, session: Session, statements: list[Statement]) -> list[Any]:
        """Where it fails on our side, the engine must not see the Sync: it would commit the first half."""
        try:
            return [session.execute(sql, args) for sql, args in statements]
        except BaseException as error:
            if getattr(error, "sqlstate", None) is None:
                with contextlib.suppress(psycopg.Error):
                    session.execute("SELECT 1 / 0")
            raise

    def _end_inside(self, session: Session, statements: list[Statement]) -> None:
        """Not sent twice: the caller looks what became of it."""
        try:
            with session.pipeline():
                cursors = self._all(session, statements)
        except psycopg.Error as error:
            raise self._failed(error) from None
        try:
            said = session.execute("COMMIT").statusmessage
        except psycopg.Error as error:
            raise self._meant(error) from None
        if said != "COMMIT":
            raise StoreUnavailable(f"{self._link.where} answered {said} to COMMIT: nothing took place")
        self._ended(session, statements, cursors)

    def _ended(self, session: Session, statements: list[Statement], cursors: list[Any]) -> None:
        if session.warning:
            raise Unknown(f"{self._link.where} warns: {session.warning}")
        for (sql, _), cursor in zip(statements, cursors):
            if sql is _FENCE:
                self.point = Point(*cursor.fetchone()[:2])

    def _meant(self, error: psycopg.Error) -> Exception:
        """What an error at the end says."""
        if isinstance(error, sqlstate.DivisionByZero):
            return Fenced("this host was put out of the fleet", hint="it registers anew by itself")
        if isinstance(error, sqlstate.InvalidArgumentForLogarithm):
            return Taken("another daemon writes as this host, or did", hint="it is tried again")
        if isinstance(error, _CROSSED):
            return Contended("another host changed the same meanwhile", hint="to repeat it is safe")
        lost = isinstance(error, psycopg.OperationalError) and (error.sqlstate or "08")[:2] in ("08", "57")
        if lost or isinstance(error, FORGOTTEN):
            self._link.drop()
            return Unknown(translated(self._link.where, error).message)
        return translated(self._link.where, error)

    def _failed(self, error: psycopg.Error) -> Exception:
        """What an error before the COMMIT says: a connection that was lost then took all of it along."""
        meant = self._meant(error)
        if not isinstance(meant, Unknown):
            return meant
        return StoreUnavailable(str(meant), code=UNREACHABLE, hint="nothing took place: it may be repeated")

    # ---- what is sent --------------------------------------------------------------------------

    def _statements(self) -> list[Statement]:
        """Of what waits, in the order of the module's list, short of guard, changes and fence."""
        now = self._gathered
        new = {key_id: row for key_id, row in now.rows.items() if row.rev is None}
        old = {key_id: row for key_id, row in now.rows.items() if row.rev is not None}
        result: list[Statement] = []
        if new:
            result.append((_INSERT, (*_columns(new), len(new))))
        if old:
            result.append((_UPDATE, (*_columns(old), [row.rev for row in old.values()], len(old))))
            self._changed += [(KEY, key_id) for key_id in old]
        if marks := [(k, row.was, row.mac) for k, row in now.rows.items() if k not in now.staged]:
            result.append((_TOUCHED, (self.host, self.host, *map(Texts, zip(*marks)))))
        if now.staged:
            result += [(_OWNED, (self.host,)), (_STAGED, _columns(now.staged))]
        return result + self._statements_of_kms(now) + self._statements_of_usage(now)

    def _statements_of_kms(self, now: Gathered) -> list[Statement]:
        result: list[Statement] = []
        written = {name: text for name, text in now.kms.items() if text is not None}
        erased = [name for name, text in now.kms.items() if text is None]
        if STATE in written:
            result.append((_STATE, (self.host, written.pop(STATE), self._stored or "")))
        if written:
            hosts = [self._owner(name) for name in written]
            result.append((_WRITE, tuple(map(Texts, (hosts, written, written.values())))))
        if erased:
            result.append((_ERASE, ([self._owner(name) for name in erased], erased)))
        if now.activated is not None:
            was, active, version = now.activated
            result.append((_ACTIVATE, (active, version, was)))
            self._changed.append((KEKS, ""))
            self._fenced_by = active
        return result

    def _statements_of_usage(self, now: Gathered) -> list[Statement]:
        result: list[Statement] = []
        if now.usage:
            counts = [list(column) for column in zip(*now.usage.values())]
            result.append((_COUNT, (Texts(now.usage), *counts)))
        if now.unused:
            result.append((_FORGET_USAGE, (list(now.unused),)))
        if now.retired:
            for table in self._left():
                sql = f"DELETE FROM {table} WHERE key_id = ANY(%s)"  # noqa: S608  # a name of ours
                result.append((sql, (list(now.retired),)))
        return result

    # ---- reads, with what waits ----------------------------------------------------------------

    def _text(self, key_id: str) -> str | None:
        now = self._now
        if now is not None and key_id in now.rows:
            return now.rows[key_id].text
        if now is None:
            rows = self._select("SELECT value FROM deks WHERE key_id = %s", (key_id,))
            return str(rows[0][0]) if rows else None
        if key_id not in now.seen:
            names, self._expected = {key_id, *self._expected} - now.seen.keys(), set()
            now.seen.update(dict.fromkeys(names))
            for name, text, rev in self._select(_WITH_REV, (list(names),)):
                now.seen[name] = (str(text), int(rev))
        seen = now.seen[key_id]
        return seen[0] if seen else None

    def expect(self, key_ids: Iterable[str]) -> None:
        """These will be asked for in the next transaction: they are read at once, with the first of them."""
        self._expected = set(key_ids)

    def fresh(self, key_id: str) -> None:
        """Inside a transaction: nobody can have this id, which was drawn just now. Where somebody does have
        it all the same, the transaction fails at its end."""
        self._gathered.seen[key_id] = None

    def heavy(self) -> dict[str, int]:
        """Inside transactions it is asked for now and then: the wraps of a second are nothing to 2**32."""
        if self._now is None:
            return super().heavy()
        if time.monotonic() >= self._heavy_until:
            self._heavy = super().heavy()
            self._heavy_until = time.monotonic() + HEAVY_SECONDS
        return self._heavy

    def there(self, key_ids: Sequence[str]) -> set[str]:
        """What isn't there is remembered as that: `put_all` asks, and then writes new rows."""
        if self._now is None:
            return super().there(key_ids)
        seen, rows = self._now.seen, self._now.rows
        unknown = [key_id for key_id in key_ids if key_id not in seen and key_id not in rows]
        found = super().there(unknown) if unknown else set()
        seen.update({key_id: None for key_id in unknown if key_id not in found})
        return found | {key_id for key_id in key_ids if seen.get(key_id) or key_id in rows}

    def _texts(self, after: str, limit: int, thread_id: str | None) -> list[tuple[str, Any]]:
        page = super()._texts(after, limit, thread_id)
        waiting = {k: row.text for k, row in self._now.rows.items() if k > after} if self._now else {}
        if not waiting:
            return page
        merged = sorted({**dict(page), **waiting}.items())
        return [(k, t) for k, t in merged if thread_id is None or row_of(t)["thread_id"] == thread_id][:limit]

    def _read(self, name: str) -> Any:
        if self._now is not None and name in self._now.kms:
            text = self._now.kms[name]
            return None if text is None else as_it_stands(text)
        if name in self._ahead:
            text = self._ahead[name]
            return None if text is None else as_it_stands(text)
        return super()._read(name)

    def names(self, prefix: str) -> list[str]:
        found = set(super().names(prefix))
        for name, text in (self._now.kms if self._now else {}).items():
            if name.startswith(prefix):
                found = found | {name} if text is not None else found - {name}
        return sorted(found)

    def due(self, now: str, limit: int) -> list[str]:
        """Rows `deletion:<time>|<key_id>` of a time that has come: a hint, no more."""
        rows = self._select(
            "SELECT name FROM kms WHERE host = '' AND name >= 'deletion:' AND name < %s "
            "ORDER BY name LIMIT %s",
            (f"deletion:{now}", limit),
        )
        return [row[0] for row in rows]

    # ---- writes, inside a transaction ----------------------------------------------------------

    def _set_all(self, rows: list[Written]) -> None:
        """An import writes as many as it likes: they don't wait here for its end."""
        now = self._gathered
        for key_id, text, _, record in rows:
            self._text(key_id)
            before, seen = now.rows.get(key_id), now.seen.get(key_id)
            was = before.was if before else _mac(row_of(seen[0])) if seen else ""
            rev = before.rev if before else seen[1] if seen else None
            now.rows[key_id] = Row(record.thread_id, text, _needed(record), _tail(text), rev, was)
        if len(self._gathered.rows) >= BULK and not self._parts:
            self._unhurried()

    def _unhurried(self) -> None:
        """A command's transaction, which may think between two statements."""
        self._inside().execute("SET LOCAL idle_in_transaction_session_timeout = '60s'")

    def _write(self, name: str, row: dict[str, Any]) -> None:
        self._gathered.kms[name] = json_dumps(row)
        self._ahead.pop(name, None)

    def _erase(self, name: str) -> None:
        self._gathered.kms[name] = None
        self._ahead.pop(name, None)

    def count(self, rows: Iterable[tuple[str, Usage]]) -> None:
        usage = self._gathered.usage
        for key_id, more in rows:
            usage[key_id] = added(usage.get(key_id, Usage()), more)

    def _forget_usage(self, key_id: str) -> None:
        self._gathered.unused.add(key_id)

    # ---- rotation ------------------------------------------------------------------------------

    def _inside(self) -> Session:
        """In a real transaction from now on, which has all that waited."""
        if self._open is None:
            session = self._until_end.enter_context(self._link.session())
            session.warning = ""
            session.execute("BEGIN")
            session.execute("LOCK TABLE kms IN ROW EXCLUSIVE MODE")  # as all do, with the guard
            self._open = session
        if statements := self._statements():
            try:
                with self._open.pipeline():
                    self._all(self._open, statements)
            except psycopg.Error as error:
                raise self._failed(error) from None
        kept = self._gathered.kms.get(STATE)
        self._now = Gathered()
        self._stored = kept or self._stored
        return self._open

    def staging(self, on: bool) -> None:
        """Make the empty table that rewrapped rows are built in; drop what an earlier try left of one. Of two
        hosts one rotates: the other is told so, and leaves its table alone."""
        session = self._inside()
        if on:
            self._lock("SHARE")  # who writes now is done before `rotating` is seen
        (owner,) = first(session.execute("SELECT owner FROM fleet FOR UPDATE").fetchall())
        if owner not in ("", self.host) and session.execute(_LIVES, (owner,)).fetchall()[0][0]:
            if on:
                told = "another host rotates the fleet's KEK"
                hint = "`progressdb-kms store status` tells which"
                raise Conflict(told, code="rotation_in_progress", hint=hint)
            return
        session.execute("DROP TABLE IF EXISTS deks_next")
        session.execute("DELETE FROM touched")
        session.execute("UPDATE fleet SET rotating = %s, owner = %s", (on, self.host if on else ""))
        if on:
            session.execute("CREATE TABLE deks_next (LIKE deks INCLUDING ALL)")
        self._tally, self._owed, self._strange = None, set(), set()

    def _set_staged(self, rows: list[Written]) -> None:
        staged = self._gathered.staged
        for row in rows:
            staged[row.key_id] = Row(row.record.thread_id, row.text, _needed(row.record), "", None, "")
            self._owed.discard(row.key_id)

    def stage(self, records: Iterable[DekRecord]) -> None:
        """What is replaced is asked for at once: under the lock of a swap each question would count."""
        records = list(records)
        if self._tally is not None:
            sql = "SELECT key_id, value FROM deks_next WHERE key_id = ANY(%s)"
            self._staged_ahead = dict(self._select(sql, ([one.key_id for one in records],)))
        super().stage(records)

    def _staged(self, key_id: str) -> dict[str, Any] | None:
        if self._now and key_id in self._now.staged:
            return dict(row_of(self._now.staged[key_id].text))
        text = self._staged_ahead.get(key_id)
        return None if text is None else row_of(text)

    def _pairs(self, after: str, limit: int) -> list[tuple[str, dict[str, Any], dict[str, Any] | None]]:
        """In one snapshot with what other hosts touched, and with what their rows add up to: a change is
        either in the page, or reckoned in by `_drain`. What is to be staged again is not missing, and weighs
        nothing until then."""
        with self._snapshot() as session:
            if not self._settled:
                if not session.execute("SELECT to_regclass('deks_next')::text").fetchall()[0][0]:
                    raise StoreUnavailable("no table for rewrapped rows was made")
                self._drain(session)
                self._refresh()
            rows = session.execute(_PAIRS, (after, limit)).fetchall()
        result = []
        for key_id, live, staged in rows:
            if not (live and _is_mark(live) and _is_mark(staged or "")):
                raise StoreDamaged(
                    f"the row of the DEK {key_id} was overwritten by hand since it was staged",
                    hint="run `progressdb-kms verify`, then restore a backup: `progressdb-kms help fleet`",
                )
            other = {"mac": staged} if staged else {"mac": _WEIGHTLESS} if key_id in self._owed else None
            result.append((key_id, {"mac": live}, other))
        self.paired = len(result)
        return result

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[Session]:
        """The transaction that is open, or one of its own."""
        if self._now is not None:
            yield self._inside()
            return
        with self._link.session() as session, contextlib.ExitStack() as undo:
            session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            self._open = session
            undo.callback(setattr, self, "_open", None)
            yield session
            session.execute("COMMIT")

    def _drain(self, session: Session) -> None:
        """What other hosts wrote since the last time: it is to be staged again. Behind the place that the
        comparison has reached it is in no page any more, so its weight is moved here."""
        for key_id, was, now in session.execute(_DRAIN).fetchall():
            self._owed.add(key_id)
            if not (_is_mark(was) and _is_mark(now)):
                self._strange.add(key_id)
            if self._tally is not None:
                self._tally = self._tally.moved(key_id, live=_weight(now) - _weight(was))

    def _check_sum(self, live: int) -> None:
        """What hosts note of each other's writes carries no MAC, and ends with the rotation."""
        try:
            super()._check_sum(live)
        except StoreDamaged as error:
            names = ", ".join(sorted(self._strange)[:NAMED])
            told = (
                f"; `touched`, which is reckoned in, has marks that no host made, of {names}" if names else ""
            )
            hint = "run `progressdb-kms verify`; if all is well, somebody wrote into `touched`: rotate again"
            raise StoreDamaged(f"{error.message}{told}", hint=hint) from None

    def touched(self, limit: int) -> list[DekRecord]:
        """Up to `limit` rows, as they are now, which other hosts wrote since they were staged."""
        with self._snapshot() as session:
            self._drain(session)
            return self._owing(session, limit)

    def _owing(self, session: Session, limit: int) -> list[DekRecord]:
        if not (owed := sorted(self._owed)[:limit]):
            return []
        sql = "SELECT key_id, value FROM deks WHERE key_id = ANY(%s) ORDER BY key_id"
        return [self._record(*row) for row in session.execute(sql, (owed,)).fetchall()]

    def settle(self, restage: Callable[[list[DekRecord]], None], reads: Sequence[str] = ()) -> None:
        """From now to the end of the transaction no host writes, and all wait: so each question from here on
        is asked for many things at once. What was touched meanwhile is staged again. `reads`: rows of the
        service that the swap reads. Raises Locked, Contended: nothing was changed."""
        self._free = self._free_name()
        self._lock("SHARE ROW EXCLUSIVE", "kms")
        self._lock("ACCESS EXCLUSIVE")
        self.locked_at = time.monotonic()
        self._asked(_MINE, self.host)
        self._drain(self._inside())
        if records := self._owing(self._inside(), len(self._owed)):
            restage(records)
        hosts = [self._owner(name) for name in reads]
        self._ahead = {**dict.fromkeys(reads), **dict(self._asked(_READS, hosts, list(reads)))}
        self._refresh()
        self._settled = True

    def swap(self, keks: Mapping[str, KekCount]) -> None:
        if not self._settled:
            self.settle(_too_late)
        super().swap(keks)

    def census(self) -> Sequence[HostRow]:
        """All hosts. To the end of the transaction none of them comes, goes, or says otherwise."""
        rows = self._asked(_CENSUS)
        return [HostRow.of(*row) for row in rows]

    def _lock(self, mode: str, table: str = "deks") -> None:
        """While this waits for one host, it holds up all others."""
        self._inside().execute(f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS}")
        try:
            self._inside().execute(f"LOCK TABLE {table} IN {mode} MODE")
        except sqlstate.LockNotAvailable:
            told = "somebody reads or writes the fleet's rows for long, such as a backup"
            raise Locked(told, hint="it is tried again by itself") from None

    def _asked(self, sql: str, *args: Any) -> list[tuple[Any, ...]]:
        """Of the transaction that is open, where an error may be one of our conditions."""
        try:
            return self._inside().execute(sql, args).fetchall()
        except psycopg.Error as error:
            raise self._failed(error) from None

    def foreign(self, name: str) -> dict[str, str]:
        """Other hosts' rows of this name, by host, as they are written."""
        sql = "SELECT host, value FROM kms WHERE name = %s AND host NOT IN ('', %s)"
        return dict(self._select(sql, (name, self.host)))

    def opened(self, host: str, name: str, text: str) -> dict[str, Any]:
        """Raises StoreDamaged where it isn't that host's."""
        row = row_of(text)
        self._check_of(host, name, row)
        return without_mac(row)

    def write_foreign(self, name: str, values: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        """Rows that other hosts have, by host: as each is now, and what it becomes. Raises Contended where
        one isn't that any more. The sum of a fleet's own rows is whoever's who writes."""
        new = {host: self._key.sealed(named(host, name), value) for host, (_, value) in values.items()}
        rows = [(host, text, json_dumps(new[host])) for host, (text, _) in values.items()]
        if rows:
            columns = [list(column) for column in zip(*rows)]
            self._asked(_FOREIGN, *columns, name, len(rows))
        more = sum(weight(new[host]) - weight(row_of(text)) for host, (text, _) in values.items())
        self._book = self._book._replace(own=(self._book.own + more) % MODULUS)

    def spread(self, name: str, value: dict[str, Any]) -> None:
        """Each other host that has a row of this name has this one from now on."""
        self._unhurried()
        self.write_foreign(name, {host: (text, value) for host, text in self.foreign(name).items()})

    def others(self) -> list[str]:
        """The hosts that aren't fenced, but for this one, for people."""
        sql = "SELECT host, name FROM hosts WHERE host <> %s AND NOT fenced ORDER BY name, host"
        return [f"{plain(name)} ({plain(host)})" for host, name in self._select(sql, (self.host,))]

    def _swap_tables(self) -> None:
        self.left = self._free
        self._renames = [
            (f"ALTER TABLE deks RENAME TO {self.left}", ()),
            ("ALTER TABLE deks_next RENAME TO deks", ()),
            ("UPDATE fleet SET rotating = false, owner = ''", ()),
        ]
        self._changed.append((KEKS, ""))

    def _left(self) -> list[str]:
        return sorted(row[0] for row in self._select(TABLES, (RETIRED,)))

    def _free_name(self) -> str:
        return f"{RETIRED}{max((int(name[len(RETIRED) :]) for name in self._left()), default=0) + 1}"

    def retire(self, limit: int) -> bool:
        """Delete up to `limit` rows that a swap left behind. True: there are more."""
        session = self._inside()
        if not (left := self._left()):
            return False
        table = left[0]
        rows = f"SELECT ctid FROM {table} LIMIT %s"  # noqa: S608  # a name of ours
        session.execute(f"DELETE FROM {table} WHERE ctid = ANY(ARRAY({rows}))", (limit,))  # noqa: S608
        if not session.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchall():  # noqa: S608
            session.execute(f"DROP TABLE {table}")
        return True

    def fleet(self) -> FleetRow:
        """As it is now."""
        return FleetRow.of(first(self._select(FLEET)))

    def abandoned(self) -> bool:
        """Is there a rotation whose host is dead?"""
        found = self.fleet()
        return found.rotating and not self._select(_LIVES, (found.owner,))[0][0]

    def erasures(self, needed: Collection[str], limit: int) -> list[str]:
        """Up to `limit` DEKs that were shredded, and of whose KEK no host has a copy in its memory any more.
        `needed`: KEKs that don't count for gone."""
        return [row[0] for row in self._select(_ERASURES, (list(needed), limit))]

    def taken(self, key_ids: Sequence[str]) -> list[str]:
        """Of these shredded DEKs, those whose entry this transaction erases: another host's may have."""
        if not key_ids:
            return []
        names = ["erasure:" + key_id for key_id in key_ids]
        return [row[0] for row in self._asked(_TAKEN, names)]

    def forget(self, key_id: str) -> None:
        """Delete a key's row from what a swap left behind: it was shredded."""
        self._gathered.retired.add(key_id)

    def survey(self) -> dict[str, Any]:
        """The fleet and its engine, for people. Raises StoreUnavailable, StoreDamaged, ConfigError."""
        return status(self._link)

    # ---- what only a file needs ------------------------------------------------------------------

    def trouble(self) -> str:
        """Why no transaction can be begun now, as far as is known; "" where nothing is."""
        return self._unclear or self.standing()

    def lost(self) -> str:
        """No file can be taken away."""
        return ""

    def files(self) -> dict[str, tuple[int, int]]:
        return {}

    def rescue(self, now: float) -> Path:
        raise StoreUnavailable("the store of a fleet is no file")

    def compact(self) -> None:
        """The engine's own work (VACUUM)."""

    def checkpoint(self, patient: bool = True) -> None:
        """Likewise: what was overwritten stays in its log, see the manual's page on fleets."""


_WITH_REV = "SELECT key_id, value, coalesce(rev, 0) FROM deks WHERE key_id = ANY(%s)"
_ROW = "SELECT value FROM kms WHERE host = %s AND name = %s"
_DRAIN = "DELETE FROM touched RETURNING coalesce(key_id, ''), coalesce(was, ''), coalesce(now, '')"
_POINT = f"SELECT {TIMELINE}, gen FROM fleet"  # noqa: S608
_CONFIRM = "UPDATE kms SET value = value WHERE host = %s AND name = %s RETURNING value"
_CENSUS = "SELECT host, inc, name, beat, seen, keks, fenced FROM hosts FOR SHARE"
_MINE = (
    "SELECT sqrt(count(*) - 1) FROM (SELECT 1 FROM fleet WHERE rotating AND owner = %s FOR UPDATE) AS mine"
)
_READS = (
    "SELECT kms.name, value FROM kms, unnest(%s::text[], %s::text[]) AS n (host, name) "
    "WHERE kms.host = n.host AND kms.name = n.name"
)
_OWNED = "SELECT sqrt(count(*) - 1) FROM fleet WHERE rotating AND owner = %s"
_FOREIGN = (
    "WITH done AS (UPDATE kms SET value = n.now FROM unnest(%s::text[], %s::text[], %s::text[]) "
    "AS n (host, was, now) WHERE kms.host = n.host AND kms.name = %s AND kms.value = n.was RETURNING 1) "
    "SELECT sqrt((count(*) = %s)::int - 1) FROM done"
)
_LIVES = "SELECT EXISTS (SELECT 1 FROM hosts WHERE host = %s AND NOT fenced)"
_KEK = """coalesce(substring(value from '"kek_id":"([^"]*)"'), '')"""
"""Of an entry of an erasure, which has no MAC: one that is no JSON at all must not stop what is due."""

_ERASURES = (
    "SELECT substr(name, 9) FROM kms WHERE host = '' AND name >= 'erasure:' AND name < 'erasure;' "  # noqa: S608
    f"AND {_KEK} <> '' AND {_KEK} <> ALL(%s) "
    f"AND NOT EXISTS (SELECT 1 FROM hosts WHERE NOT fenced AND {_KEK} = ANY(keks)) ORDER BY name LIMIT %s"
)
_TAKEN = "DELETE FROM kms WHERE host = '' AND name = ANY(%s) RETURNING substr(name, 9)"
_WEIGHTLESS = b64encode(bytes(32))
_CROSSED = (
    sqlstate.InvalidArgumentForPowerFunction,
    sqlstate.SerializationFailure,
    sqlstate.DeadlockDetected,
)


def _too_late(records: list[DekRecord]) -> None:
    raise Contended(f"{len(records)} rows were written meanwhile, and not staged again", hint="begin anew")


def _mac(row: Any) -> str:
    found = row.get("mac") if isinstance(row, dict) else None
    return found if isinstance(found, str) else ""


def _tail(text: str) -> str:
    """The MAC of a row that is spelled as we write it."""
    return text[-46:-2]


def _needed(record: DekRecord) -> str:
    return "" if record.state == SHREDDED else record.kek_id


def _is_mark(mac: str) -> bool:
    """As hosts write them: "" for no row, and by the host that rotates."""
    try:
        return not mac or len(b64decode(mac)) == MAC_SIZE
    except ValueError:
        return False


def _weight(mac: str) -> int:
    try:
        return weight({"mac": mac})
    except ValueError:
        return 0


def _columns(rows: Mapping[str, Row]) -> list[Texts]:
    values = rows.values()
    return [
        Texts(rows),
        *map(Texts, zip(*((found_by(row.thread_id), row.text, row.kek_id) for row in values))),
    ]
