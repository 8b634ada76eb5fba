"""Where wrapped DEKs live: `<data-dir>/kms.db`. The tests have a twin in memory that keeps the same contract.

The contract, for every store:

- `transaction()`: what is written inside is on disk when the block ends, or nothing of it is. An error is
  raised by the call that caused it, as StoreUnavailable. `durable=False`, for work that a crash may undo:
  it is on disk, whole or not at all, when the next durable transaction ends.
- `savepoint()`: a part of a transaction that can fail alone.
- Readers see committed state only, and never wait for a writer.
- `deks` rows are keyed `meta:<key_id>`; the service's own rows (`store:state`, `audit:…`) stand in `kms`.
- Rows and the state row carry MACs: see `seal`. `unlock` brings the key.
- What was done under each DEK stands in a table of its own, without MACs, untouched by rotation; it goes with
  the DEK where that is shredded. It is no change of the store, and decides nothing but that it is too much.
- `state()` tells the number of the last change, and how many DEKs need each KEK, without counting: it is kept
  with every write. After a COMMIT that failed it is read again from the disk.

How SQLite is held to it. The mapping is sqlitedict's; its connection (`_new_conn`) is ours, because the
original runs a thread that dies at a failing COMMIT, sets synchronous=OFF and reports errors elsewhere.
One connection in one process writes and checkpoints, all others are read-only: SQLite before 3.51.3 can
damage a WAL that two connections reset. After a COMMIT that failed nobody knows what is on disk, so the
file is closed, opened again and checked before the next write.

What the writer remembers of the disk, and until when that holds:

    _book, _tally         the state row and a comparison under way: put back where a transaction, or a part
                          of one, fails; read anew (no comparison) whenever the file is opened
    _suspect              from before each COMMIT until it has worked: while it stands, the next write first
                          opens the file anew, with growing pauses (`_reopening`)
    _watch                which files are open, and the least that they must have: from the last look that
                          found nothing wrong, and from each BEGIN and checkpoint of ours
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlitedict import SqliteDict

from .. import disk
from ..encoding import json_dumps
from ..errors import OtherSchema, StoreDamaged, StoreUnavailable
from ..pause import Pause
from .contract import HEAVY, KEK_ROW, Usage
from .policy import SHREDDED
from .seal import Seal, StoreState, Tally
from .sealed import Reader, Store, Written, as_it_stands
from .watch import Watch

FILE_NAME = "kms.db"
SCHEMA_VERSION = 2
APPLICATION_ID = 0x4B4D5331  # "KMS1", in the header of our database files

TRACES = (FILE_NAME + "-wal", "kms-audit.log", "kms-deks-backup")
"""Files that only a data-dir in use has: beside them, a missing database is a lost one."""

BUSY_WAIT = 5000
"""Milliseconds that a write waits for another writer's lock: there is none but a foreign program's."""

CHECKPOINT_WAIT = 1000
"""Milliseconds that a checkpoint waits for readers. Ours take one; a program that keeps a read transaction
open (Litestream does) would otherwise stop all writes for as long as it likes."""

CHECKPOINT_TRY = 50
"""The same where nobody waits for it: it is tried again, and creates shall not wait for that."""

REOPEN_PAUSES = 0.1, 5.0
"""Seconds between two tries to open the file again after a COMMIT that failed; each reads the whole file."""

DAMAGED = (
    "look at the disk and the kernel log, and copy the whole data-dir to another disk before you restore a "
    "backup: see `progressdb-kms help runbook`, The store's file is damaged"
)
"""What is wrong with a file that is no database any more, a backup alone may not bring back."""

FULL = "FULL"  # each COMMIT waits for the disk
NORMAL = "NORMAL"  # in WAL mode: a COMMIT is ordered before the next one, and waits for nothing

FILES = (FILE_NAME, FILE_NAME + "-wal", FILE_NAME + "-shm")
RESCUE = "kms-rescue-"  # and a time: what was open when its file was taken away

DEKS = "deks"
STAGED = "deks_next"
RETIRED = "deks_old_"  # and a number: tables that are emptied bit by bit
THREADS = "deks_thread_"  # and a number: the indexes of these tables


# ---- SQLite --------------------------------------------------------------------------------------


class Malformed(StoreUnavailable):
    """What is no database any more: for who has it open a trouble as others are, at a start no store."""


def _unavailable(error: sqlite3.Error) -> StoreUnavailable:
    text = f"the store can't do that now: {error}"
    if "malformed" in text or "not a database" in text:
        return Malformed(text, hint=DAMAGED)
    if "full" in text:
        hint = "make room on the file system of the data-dir; nothing that was acknowledged is lost"
    elif "readonly" in text or "unable to open" in text:
        hint = "the data-dir must be writable by the daemon's user, and a descriptor be left (LimitNOFILE=)"
    elif "locked" in text:
        hint = "another program writes to it: `fuser -v` of kms.db tells which"
    else:
        hint = "look at the disk and the kernel log, then run `progressdb-kms doctor`"
    return StoreUnavailable(text, hint=hint)


class Connection:
    """One sqlite3 connection with the interface that SqliteDict wants of its own, and nothing hidden.

    Statements run in the calling thread, under a lock; errors leave as StoreUnavailable.
    """

    autocommit = False

    def __init__(self, path: Path, mode: str) -> None:
        """`mode`: ro, rw, or rwc, which makes the file where there is none."""
        self.lock = threading.RLock()
        try:
            if path.exists() and not path.is_file():  # SQLite would wait for whoever writes to a pipe
                raise StoreUnavailable(f"{path} is no regular file", hint="find out who put it there")
            refuse_lost(path)
        except OSError as error:
            told = f"{path} can't be looked at: {error.strerror}"
            raise StoreUnavailable(told, hint="the data-dir must be the daemon's user's") from error
        uri = f"file://{quote(os.fsencode(path.absolute()))}?mode={mode}"
        try:
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
            self._db.text_factory = lambda raw: raw.decode("utf-8", "replace")  # its own error quotes the row
            self._db.execute("PRAGMA cell_size_check=ON")
        except sqlite3.Error as error:
            raise _unavailable(error) from error

    def execute(self, sql: str, args: tuple[Any, ...] = ()) -> None:
        self.select(sql, args)

    def executemany(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        with self.lock:
            try:
                self._db.executemany(sql, rows)
            except sqlite3.Error as error:
                raise _unavailable(error) from error

    def select(self, sql: str, args: tuple[Any, ...] = ()) -> list[Any]:
        with self.lock:
            try:
                return self._db.execute(sql, args).fetchall()
            except sqlite3.Error as error:
                raise _unavailable(error) from error

    def select_one(self, sql: str, args: tuple[Any, ...] = ()) -> Any:
        rows = self.select(sql, args)
        return rows[0] if rows else None

    def named(self, kind: str, prefix: str) -> list[str]:
        """Tables, or indexes, whose names begin so."""
        sql = "SELECT name FROM sqlite_master WHERE type = ? AND substr(name, 1, ?) = ?"
        return [row[0] for row in self.select(sql, (kind, len(prefix), prefix))]

    def commit(self, blocking: bool = True) -> None:
        """SqliteDict calls this after its own CREATE TABLE; transactions are begun and ended by the store."""

    def in_transaction(self) -> bool:
        return self._db.in_transaction

    def close(self, do_log: bool = True, force: bool = False) -> None:
        with self.lock:
            self._db.close()


class Table(SqliteDict):  # type: ignore[misc]
    """A sqlitedict over a connection that several tables share; JSON in, JSON out, never pickle."""

    def __init__(self, path: Path, name: str, conn: Connection) -> None:
        self._shared = conn
        super().__init__(str(path), tablename=name, encode=json_dumps, decode=as_it_stands, outer_stack=False)

    def _new_conn(self) -> Connection:
        return self._shared

    def close(self, do_log: bool = True, force: bool = False) -> None:
        self.conn = None  # the store closes the connection, once


_VALUE = f'SELECT value FROM "{DEKS}" WHERE key = ?'  # noqa: S608
_ROWS = f'SELECT typeof(key), CAST(key AS BLOB), value FROM "{DEKS}" WHERE '  # noqa: S608
_PAGE = _ROWS + "key > CAST(? AS TEXT) ORDER BY key LIMIT ?"
THREAD = "CASE WHEN json_valid(value) THEN json_extract(value, '$.thread_id') END"
"""By this a thread's DEKs are found. Of a row that lost a byte it is NULL, not an error that would keep the
row from being replaced."""
_PAGE_OF_THREAD = f"{_ROWS}{THREAD} = ? AND key > CAST(? AS TEXT) ORDER BY key LIMIT ?"
_THERE = f'SELECT key FROM "{DEKS}" WHERE key IN (SELECT value FROM json_each(?))'  # noqa: S608
_SEEN = f'SELECT 1 FROM "{DEKS}", kms, usage LIMIT 0'  # noqa: S608
_PAIRS = (
    f"SELECT live.key, json_extract(live.value, '$.mac'), json_extract(staged.value, '$.mac') "  # noqa: S608
    f'FROM (SELECT key, value FROM "{DEKS}" WHERE key > ? ORDER BY key LIMIT ?) AS live '
    f'LEFT JOIN "{STAGED}" AS staged ON staged.key = live.key ORDER BY live.key'
)

USAGE_TABLE = (
    "CREATE TABLE IF NOT EXISTS usage (key_id TEXT PRIMARY KEY, encrypts INTEGER NOT NULL, decrypts INTEGER "
    "NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, uid INTEGER NOT NULL) WITHOUT ROWID"
)
USAGE_OF = "SELECT * FROM usage WHERE key_id IN (SELECT value FROM json_each(?))"
_HEAVY_INDEX = f"CREATE INDEX IF NOT EXISTS usage_heavy ON usage (encrypts) WHERE encrypts >= {HEAVY}"
_COUNT = (
    f"INSERT INTO usage SELECT ?1, ?2, ?3, ?4, ?5, ?6 WHERE substr(?1, 1, {len(KEK_ROW)}) = '{KEK_ROW}' OR "  # noqa: S608
    f"EXISTS (SELECT 1 FROM \"{DEKS}\" WHERE key = ?7 AND json_extract(value, '$.state') <> '{SHREDDED}') "
    "ON CONFLICT (key_id) DO UPDATE SET encrypts = encrypts + excluded.encrypts, "
    "decrypts = decrypts + excluded.decrypts, "
    "first = coalesce(min(nullif(first, 0), nullif(excluded.first, 0)), first + excluded.first), "
    "uid = CASE WHEN excluded.last >= last THEN excluded.uid ELSE uid END, last = max(last, excluded.last)"
)


def check_schema(path: Path, application: int, version: int) -> None:
    """The rule of upgrades and downgrades: a release opens the schema that it writes, and no other; the way
    from one to the next is `export` and `import`. 0: its first transaction was not finished. Raises
    OtherSchema."""
    if application != APPLICATION_ID:
        raise OtherSchema(f"{path} is a database of something else", hint="is data_dir the right folder?")
    if version in (0, SCHEMA_VERSION):
        return
    known = f"has schema version {version}, and this release knows {SCHEMA_VERSION}: nothing was changed"
    hint = "`export` with the older release that wrote it, and `import` here"
    if version > SCHEMA_VERSION:
        hint = "run the newer release that wrote it; to go back, `export` with that one and `import` here"
    raise OtherSchema(f"{path} {known}", hint=hint)


def refuse_lost(path: Path, *traces: str) -> None:
    """Where there is no database: was there one? To be asked before SQLite is, which removes the write-ahead
    log beside an empty file, whoever only wants to read. Raises StoreDamaged."""
    there = [name for name in traces or (path.name + "-wal",) if path.with_name(name).exists()]
    if there and not (path.exists() and path.stat().st_size):
        raise StoreDamaged(
            f"{path} is missing or empty, but {there[0]} beside it tells that there was a store",
            hint=f"put it back, with its {path.name}-wal; else {DAMAGED}",
        )


def _name(kind: str, key: bytes) -> str:
    """A row's name, in ASCII that can be shown; of a damaged one such that `_raw` finds where it stands."""
    if kind != "text":
        raise StoreDamaged(f"the name of a row of the store is no text: {key[:200]!r}", hint=DAMAGED)
    return re.sub(rb"[^ -\[\]-~]", lambda found: b"\\x%02x" % found[0][0], key).decode()


def _raw(name: str) -> bytes:
    return re.sub(rb"\\x(..)", lambda found: bytes.fromhex(found[1].decode()), name.encode())


class SqliteReader(Reader):
    """Read-only: for the workers, and for commands beside a running daemon; `key` is the row key."""

    def __init__(self, data_dir: Path, key: memoryview | None = None, mode: str = "ro") -> None:
        self.path = data_dir / FILE_NAME
        self._seal = Seal(key) if key is not None else None
        self._conn = Connection(self.path, mode)
        with contextlib.ExitStack() as undo:
            undo.callback(self._conn.close)
            self._check_schema()
            self._bind()
            undo.pop_all()

    def _check_schema(self) -> int:
        """Returns the schema version, 0 for a store that is not made yet."""
        select = self._conn.select_one
        application, version = select("PRAGMA application_id")[0], select("PRAGMA user_version")[0]
        # After a crash in its first transaction a database is rolled back to nothing when it is first read.
        if select("PRAGMA page_count")[0]:
            check_schema(self.path, application, version)
        return int(version)

    def _bind(self) -> None:
        self._kms = Table(self.path, "kms", self._conn)

    def _text(self, key_id: str) -> Any:
        found = self._conn.select_one(_VALUE, ("meta:" + key_id,))
        return found[0] or "" if found else None

    def there(self, key_ids: Sequence[str]) -> set[str]:
        names = json_dumps(["meta:" + key_id for key_id in key_ids])
        return {row[0][5:] for row in self._conn.select(_THERE, (names,))}

    def _texts(self, after: str, limit: int, thread_id: str | None) -> list[tuple[str, Any]]:
        sql, args = (_PAGE, ()) if thread_id is None else (_PAGE_OF_THREAD, (thread_id,))
        rows = self._conn.select(sql, (*args, _raw("meta:" + after), limit))
        return [(_name(kind, key)[5:], text) for kind, key, text in rows]

    def _read(self, name: str) -> Any:
        return self._kms.get(name)

    def names(self, prefix: str) -> list[str]:
        rows = self._conn.select(
            "SELECT key FROM kms WHERE key >= ? AND key < ?", (prefix, prefix + "\uffff")
        )
        return [row[0] for row in rows]

    def span(self, prefix: str) -> tuple[int, str]:
        """How many names there are, and the first of them."""
        query = "SELECT count(*), ifnull(min(key), '') FROM kms WHERE key >= ? AND key < ?"
        count, first = self._conn.select_one(query, (prefix, prefix + "\uffff"))
        return count, first

    def usage(self, key_ids: Sequence[str]) -> dict[str, Usage]:
        """Of these DEKs those that were used."""
        rows = self._conn.select(USAGE_OF, (json_dumps(list(key_ids)),))
        return {key_id: Usage(*counts) for key_id, *counts in rows}

    def heavy(self) -> dict[str, int]:
        """Encrypts under the DEKs that have HEAVY of them or more. For SQLite each text is more than that."""
        where = f"encrypts >= {HEAVY} AND typeof(key_id) || typeof(encrypts) = 'textinteger'"
        return dict(self._conn.select(f"SELECT key_id, encrypts FROM usage WHERE {where}"))  # noqa: S608

    def close(self) -> None:
        self._conn.close()


class SqliteStore(Store, SqliteReader):
    """The one writer of a data-dir. Raises StoreDamaged where the file is not a store that we know."""

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / FILE_NAME
        self._reopening = Pause(*REOPEN_PAUSES)
        self._watch = Watch(self.path, (), self._committed_size)
        self._open("rwc")

    def _open(self, mode: str) -> None:
        refuse_lost(self.path, *TRACES)
        self._suspect = True  # until all of this has worked
        self._conn = Connection(self.path, mode)
        with contextlib.ExitStack() as undo:
            undo.callback(self._conn.close)
            try:
                self._prepare()
            except Malformed as error:
                told = f"{self.path} is damaged or no database: {error.__cause__}"
                raise StoreDamaged(told, hint=DAMAGED) from error
            undo.pop_all()

    def _prepare(self) -> None:
        select = self._conn.select_one
        version = self._check_schema()
        if not select("PRAGMA page_count")[0]:
            refuse_lost(self.path, *TRACES)
            # First of all, so that a crash right after leaves a file that is known as ours.
            select(f"PRAGMA application_id={APPLICATION_ID}")
        for pragma, value, wanted in (
            ("journal_mode", "WAL", "wal"),
            ("synchronous", FULL, 2),
            ("secure_delete", "ON", 1),
            ("busy_timeout", str(BUSY_WAIT), BUSY_WAIT),
        ):
            select(f"PRAGMA {pragma}={value}")
            if (found := select(f"PRAGMA {pragma}")[0]) != wanted:
                raise StoreUnavailable(
                    f"SQLite refuses {pragma}={value} for {self.path} (it stays {found})",
                    hint="the data-dir must be on a local file system with locks and shared memory",
                )
        self._synchronous = FULL
        self._bind()
        if not version:
            Table(self.path, DEKS, self._conn)
            self._index(DEKS)
            for sql in (USAGE_TABLE, _HEAVY_INDEX):
                self._conn.execute(sql)
            select(f"PRAGMA user_version={SCHEMA_VERSION}")
        whole = self._checkpointed()  # if not, pages may stand in the log only
        pages, size = select("PRAGMA page_count")[0], select("PRAGMA page_size")[0]
        if whole and self.path.stat().st_size < pages * size:
            told = f"{self.path} was cut: it has {self.path.stat().st_size} of {pages * size} bytes"
            raise StoreDamaged(told, hint=DAMAGED)
        self._look()
        self._suspect = False

    def _index(self, table: str) -> None:
        """Find the DEKs of a thread without a scan; the name is free, as renamed tables keep theirs."""
        name = self._free_name("index", THREADS)
        self._conn.execute(f'CREATE INDEX "{name}" ON "{table}" ({THREAD}, key)')

    def _free_name(self, kind: str, prefix: str) -> str:
        numbers = (int(name[len(prefix) :]) for name in self._conn.named(kind, prefix))
        return f"{prefix}{max(numbers, default=0) + 1}"

    def _reopen(self) -> None:
        """After a COMMIT of unknown outcome: a new connection, and a look at the whole file."""
        if not self._reopening.over():
            raise StoreUnavailable(self._reopening.why, hint="it is tried again every few seconds")
        self._watch.release(*FILES[1:])  # who closes the last connection removes them
        try:
            self._conn.close()
            self._open("rw")
            self._suspect = True
            answer = self._conn.select_one("PRAGMA quick_check(1)")[0]
            if answer != "ok":
                raise StoreUnavailable(f"the store is damaged: {answer}", hint=DAMAGED)
            self.watch(*self._watch.names)
        except (StoreUnavailable, StoreDamaged) as error:
            self._reopening.failed(error.message)
            self._open_to_read()
            raise StoreUnavailable(error.message, hint=error.hint) from error
        self._reopening.worked()
        self._suspect = False

    def _open_to_read(self) -> None:
        """Until it can be written again: what needs no more than that goes on."""
        self._conn.close()
        with contextlib.suppress(StoreUnavailable):  # each read tells by itself that it can't be done
            self._conn = Connection(self.path, "ro")
            self._bind()

    # ---- the files are watched -----------------------------------------------------------------

    def watch(self, *names: str) -> None:
        """From now on refuse to write where these, ours and others beside them, aren't in their places, or
        ours were cut. Raises StoreUnavailable."""
        self._watch.close()
        try:
            self._watch = Watch(self.path, names, self._committed_size)
        except OSError as error:
            raise StoreUnavailable(f"{error.filename} can't be watched: {error.strerror}") from error

    def _committed_size(self) -> int:
        """Raises StoreUnavailable where a table of ours is not in it."""
        select = self._conn.select_one
        select(_SEEN)
        return int(select("PRAGMA page_count")[0]) * int(select("PRAGMA page_size")[0])

    def files(self) -> dict[str, tuple[int, int]]:
        """Device and inode of what is open, where it is watched."""
        return self._watch.files

    def lost(self) -> str:
        """Why what is open must not be written to: it isn't what the next start would find. Empty where all
        is well."""
        return self._watch.look(unsure=self._suspect)

    def _insist(self) -> None:
        if why := self.lost():
            raise StoreUnavailable(
                f"{why}: no change is made",
                hint="put it back, or mount its file system, and the daemon goes on; else don't stop it "
                "before you know what it rescued: `status --ready` tells",
            )

    def _insist_on_writing(self) -> None:
        self._insist()
        if self._suspect:
            self._reopen()

    def rescue(self, now: float) -> Path:
        """Write what is open to a new file beside our own. Raises StoreUnavailable."""
        name = f"{RESCUE}{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}.db"
        file, part = self.path.with_name(name), self.path.with_name(name + ".part")
        try:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            with contextlib.ExitStack() as undo:
                undo.callback(part.unlink)
                self._conn.execute("VACUUM INTO ?", (str(part),))
                disk.sync(part)
                os.link(part, file)  # never over another
            disk.sync(self.path.parent)
        except OSError as error:
            raise StoreUnavailable(f"{file} can't be written: {error.strerror}") from error
        return file

    def close(self) -> None:
        super().close()
        self._watch.close()

    def trouble(self) -> str:
        """Why nothing can be written now, as far as it is known; empty where nothing is."""
        return self.lost() or self._reopening.why

    # ---- transactions ------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self, durable: bool = True) -> Iterator[None]:
        self._insist_on_writing()
        if self._synchronous != (wanted := FULL if durable else NORMAL):
            self._conn.execute(f"PRAGMA synchronous={wanted}")
            self._synchronous = wanted
        before = self._book, self._tally
        self._conn.execute("BEGIN IMMEDIATE")
        try:
            self._watch.begun()
            yield
            self._settle(before[0])
            self._suspect = True  # whether it is on the disk is known once COMMIT has worked
            self._conn.execute("COMMIT")
            self._suspect = False
        except BaseException:
            self._rollback(before)
            raise
        self._insist()
        self._committed(before[0])

    def _rollback(self, before: tuple[StoreState, Tally | None]) -> None:
        self._book, self._tally = before
        if self._conn.in_transaction():
            try:
                self._conn.execute("ROLLBACK")
            except StoreUnavailable:  # the error under way tells the cause
                self._suspect = True

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        before = self._book, self._tally
        self._conn.execute("SAVEPOINT part")
        try:
            yield
        except BaseException:
            self._book, self._tally = before
            if self._conn.in_transaction():  # SQLite ends it by itself at some errors
                self._conn.execute("ROLLBACK TO part")
                self._conn.execute("RELEASE part")
            raise
        self._conn.execute("RELEASE part")

    # ---- writes, inside a transaction ----------------------------------------------------------

    def _set_all(self, rows: list[Written], table: str = DEKS) -> None:
        values = [("meta:" + row.key_id, row.text) for row in rows]
        self._conn.executemany(f'REPLACE INTO "{table}" (key, value) VALUES (?, ?)', values)  # noqa: S608

    def _write(self, name: str, row: dict[str, Any]) -> None:
        self._kms[name] = row

    def _erase(self, name: str) -> None:
        self._kms.pop(name, None)

    def count(self, rows: Iterable[tuple[str, Usage]]) -> None:
        self._conn.executemany(_COUNT, ((key_id, *more, "meta:" + key_id) for key_id, more in rows))

    def _forget_usage(self, key_id: str) -> None:
        self._conn.execute("DELETE FROM usage WHERE key_id = ?", (key_id,))

    def due(self, now: str, limit: int) -> list[str]:
        """Rows `deletion:<time>|<key_id>` of a time that has come: a hint where to look, no more."""
        rows = self._conn.select(
            "SELECT key FROM kms WHERE key >= 'deletion:' AND key < ? ORDER BY key LIMIT ?",
            (f"deletion:{now}", limit),
        )
        return [row[0] for row in rows]

    # ---- a second table for rotation -----------------------------------------------------------

    def staging(self, on: bool) -> None:
        """Make the empty table that rewrapped rows are built in; drop what an earlier try left of one."""
        if self._conn.named("table", STAGED):
            self._conn.execute(f'ALTER TABLE "{STAGED}" RENAME TO "{self._free_name("table", RETIRED)}"')
        if on:
            Table(self.path, STAGED, self._conn)
            self._index(STAGED)
        self._tally = None

    def _set_staged(self, rows: list[Written]) -> None:
        self._set_all(rows, STAGED)

    def _staged(self, key_id: str) -> dict[str, Any] | None:
        row = self._conn.select_one(f'SELECT value FROM "{STAGED}" WHERE key = ?', ("meta:" + key_id,))  # noqa: S608
        return as_it_stands(row[0]) if row else None

    def _pairs(self, after: str, limit: int) -> list[tuple[str, dict[str, Any], dict[str, Any] | None]]:
        found = self._conn.select(_PAIRS, ("meta:" + after, limit))
        return [(key[5:], {"mac": live}, {"mac": other} if other else None) for key, live, other in found]

    def _swap_tables(self) -> None:
        self._conn.execute(f'ALTER TABLE "{DEKS}" RENAME TO "{self._free_name("table", RETIRED)}"')
        self._conn.execute(f'ALTER TABLE "{STAGED}" RENAME TO "{DEKS}"')

    def retire(self, limit: int) -> bool:
        """Delete up to `limit` rows that a swap left behind. True: there are more."""
        if not (left := self._conn.named("table", RETIRED)):
            return False
        rows = f'SELECT rowid FROM "{left[0]}" LIMIT ?'  # noqa: S608
        self._conn.execute(f'DELETE FROM "{left[0]}" WHERE rowid IN ({rows})', (limit,))  # noqa: S608
        if not self._conn.select(rows, (1,)):
            self._conn.execute(f'DROP TABLE "{left[0]}"')
        return True

    def forget(self, key_id: str) -> None:
        """Delete a key's row from the tables that are being emptied: it was shredded."""
        _take_out(self._conn, RETIRED, (key_id,))

    def compact(self) -> None:
        """Write the whole database anew: free space and gaps between rows are left behind."""
        self._insist_on_writing()
        self._conn.execute("VACUUM")

    def checkpoint(self, patient: bool = True) -> None:
        """Move the write-ahead log into the file and cut it to nothing: no old page image stays behind."""
        self._insist_on_writing()
        if not self._checkpointed(CHECKPOINT_WAIT if patient else CHECKPOINT_TRY):
            raise StoreUnavailable(
                "the write-ahead log is being read by another program and can't be cut now",
                hint="it is tried again; a backup or Litestream may be at work",
            )

    def _checkpointed(self, wait: int = CHECKPOINT_WAIT) -> bool:
        self._conn.select(f"PRAGMA busy_timeout={wait}")
        try:
            return not self._conn.select_one("PRAGMA wal_checkpoint(TRUNCATE)")[0]
        finally:
            self._watch.checkpointed()
            self._conn.select(f"PRAGMA busy_timeout={BUSY_WAIT}")


def _take_out(db: Connection, prefix: str, key_ids: Iterable[str]) -> None:
    """The rows of these keys, of all tables of DEKs whose names begin so."""
    for name in db.named("table", prefix):
        sql = f'DELETE FROM "{name}" WHERE key = ?'  # noqa: S608
        db.executemany(sql, [("meta:" + key_id,) for key_id in key_ids])


def forget_rescued(data_dir: Path, key_ids: Iterable[str]) -> None:
    """Take rows out of the files that `rescue` left: a shred must reach them. Raises StoreUnavailable."""
    for path in data_dir.glob(RESCUE + "*.db"):
        with contextlib.closing(Connection(path, "rw")) as db:
            db.execute("PRAGMA secure_delete=ON")
            _take_out(db, DEKS, key_ids)
            db.execute("VACUUM")
