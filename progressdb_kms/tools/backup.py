"""One file that holds the store: how it is written beside a running daemon, and read without trust.

    SQLite database                          a copy of kms.db: the tables `deks`, `kms`, `usage`, nothing else
    0x0A "{" … "}" 0x0A                      one JSON line: what is in the copy, its length, and the SHA-256
                                             of the copy and of this line with "" in the place of that

The line is behind the database and not before it, so that any sqlite3 opens the file as it stands: SQLite
takes the length of a database from its header and doesn't look at what follows. There is no second file that
could get lost.

The checksum finds damage. It is no signature: who may write to the backup may also make it match. What such
a person can't make is a wrapped DEK, because each is bound to its key_id under the KEK.

Reading happens in place, without locks and without a copy (`immutable`): nothing of a backup, not even the
bytes of a DEK that was shredded since, comes to the data-dir but by a row that `restore` puts there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple
from urllib.parse import quote

from ..crypto.envelope import ROW_KEY
from ..disk import sync, write_all
from ..encoding import KEY_ID, json_dumps, json_loads, timestamp
from ..errors import StoreDamaged
from ..service.ownkeys import ROWS
from ..store.contract import DekRecord, Usage
from ..store.seal import MODULUS, OWN, STATE, Seal, StoreState, weight, without_mac
from ..store.sealed import as_it_stands
from ..store.sqlite import (
    APPLICATION_ID,
    DAMAGED,
    DEKS,
    FILE_NAME,
    SCHEMA_VERSION,
    USAGE_OF,
    check_schema,
    refuse_lost,
)
from . import asowner, datadir
from .console import CommandFailed, naming

Progress = Callable[[int, int], None]

MARK = "progressdb_kms_backup"
FORMAT = 1

MAX_LINE = 64 * 1024
"""Bytes of the last line: some 1,000 KEKs."""

PAGES = 2048
"""Database pages (8 MiB) copied between two pictures of the progress bar."""

BLOCK = 1 << 20

_TABLES = (DEKS, "kms", "usage")


class Contents(NamedTuple):
    """The last line of a backup. `keks`: DEKs by the KEK that they need."""

    created_at: str
    size: int
    sha256: str
    schema: int
    deks: int
    shredded: int
    active_kek_id: str
    keks: dict[str, int]

    @property
    def kek_ids(self) -> list[str]:
        return sorted({self.active_kek_id, *self.keks} - {""})

    def line(self) -> bytes:
        return b"\n" + json_dumps({MARK: FORMAT, **self._asdict()}).encode() + b"\n"

    def sealed(self, file: Path, progress: Progress) -> Contents:
        """With the checksum that fits the first `size` bytes of the file and the other fields."""
        digest, done = hashlib.sha256(), 0
        with open(file, "rb") as source:
            while done < self.size and (block := source.read(min(BLOCK, self.size - done))):
                digest.update(block)
                done += len(block)
                progress(done, self.size)
        digest.update(self._replace(sha256="").line())
        return self._replace(sha256=digest.hexdigest())


# ---- writing -----------------------------------------------------------------------------------------


def backup(data_dir: Path, file: Path, progress: Progress) -> dict[str, Any]:
    """Copy the store, which may be in use, to `file` (0600, whole or not at all). Returns what it holds.

    One read transaction over all of it: what is committed when it begins is in it, and no writer waits.
    """
    store = data_dir / FILE_NAME
    check_target(data_dir, file)
    try:
        with datadir.beside(data_dir), contextlib.ExitStack() as stack:
            if not store.is_file():
                hint = "--data-dir or --config says where it is"
                raise CommandFailed(f"there is no store {store}", hint=hint)
            contents = _write(_opened_as_owner(store, stack), file, progress)
    except sqlite3.Error as error:
        raise CommandFailed(
            f"the backup can't be made: {error}",
            hint=f"nothing was left behind; {_remedy(error, store, file)}",
        ) from None
    return {"file": str(file), **_shown(contents)}


def _remedy(error: sqlite3.Error, store: Path, file: Path) -> str:
    """SQLite calls a file beside the copy that finds no room an I/O error."""
    if not isinstance(error, sqlite3.OperationalError):
        return DAMAGED
    folder, size = file.absolute().parent, store.stat().st_size
    free = shutil.disk_usage(folder).free
    return (
        f"{folder} has {free} bytes free, and the store, which may be copied twice, {size}: make room there"
    )


def _write(source: sqlite3.Connection, file: Path, progress: Progress) -> Contents:
    """With the rights of the folder's owner, who could put a link in the place of the part meanwhile."""
    folder = file.absolute().parent
    with naming(file), asowner.acting_as(asowner.of(folder)), _part_file(file) as (descriptor, part):
        _copy(source, part, progress)
        with contextlib.closing(_connect(part, "mode=ro")) as db:
            answer = _integrity(db)
            if answer != "ok":
                raise CommandFailed(f"the store is damaged: {answer}; no backup was made", hint=DAMAGED)
            _refuse_lost(db)
        contents = _describe(part)
        os.lseek(descriptor, 0, os.SEEK_END)
        write_all(descriptor, contents.line())
        os.fsync(descriptor)
        _name(part, file)
        sync(folder)
    return contents


def _name(part: Path, file: Path) -> None:
    """Never over another file, also not one that came meanwhile."""
    try:
        try:
            os.link(part, file)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            os.replace(part, file)
    except FileExistsError:
        raise _exists(file) from None


_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""A file system without hard links: vfat, some shares."""


def _exists(file: Path) -> CommandFailed:
    return CommandFailed(f"{file} exists, and a backup is never overwritten", hint="name another file")


def check_outside(data_dir: Path, file: Path) -> Path:
    """The file without links. Raises CommandFailed."""
    home, target = data_dir.resolve(), file.resolve()
    if home == target or home in target.parents:
        raise CommandFailed(
            f"{file} is inside the data-dir: a shred could not reach it", hint="choose another folder"
        )
    return target


def check_target(data_dir: Path, file: Path) -> None:
    """Raises CommandFailed. In the data-dir a backup would keep what a later shred must remove, and be lost
    together with it."""
    target = check_outside(data_dir, file)
    if not target.parent.is_dir():
        raise CommandFailed(f"there is no folder {target.parent}", hint="make it first")
    if os.path.lexists(file):
        _remove_left(file)
        raise _exists(file)
    folder = target.parent.stat()
    if folder.st_uid not in (0, os.geteuid(), asowner.of(data_dir)):
        raise CommandFailed(
            f"{target.parent} belongs to uid {folder.st_uid}, who may replace files in it",
            hint="choose a folder of your own",
        )
    if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
        raise CommandFailed(
            f"others may replace files in {target.parent} (mode {folder.st_mode & 0o7777:04o})",
            hint="choose a folder of your own, or `chmod o-w` it",
        )


@contextlib.contextmanager
def _part_file(file: Path) -> Iterator[tuple[int, Path]]:
    """A private file beside the target, which takes its name at the end. Nobody foresees its own name: in a
    folder of all, another user could have made it, or a journal for it, before."""
    _remove_left(file)
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(part, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.fchmod(descriptor, 0o600)
        yield descriptor, part
    finally:
        os.close(descriptor)
        _remove_part(part)


def _remove_part(part: Path) -> None:
    """The part itself last: it leads to the others."""
    for end in ("-journal", "-wal", "-shm", ""):
        part.with_name(part.name + end).unlink(missing_ok=True)


def _remove_left(file: Path) -> None:
    """Parts of killed backups to this name: ours, and locked by nobody."""
    if not all(_removed(part) for part in _parts(file.parent, glob.escape(file.name))):
        raise CommandFailed(f"another backup to {file} is under way", hint="wait for it")


def remove_all_left(folder: Path, names: str) -> None:
    """The same for all names of this pattern; what another command is writing stays."""
    with asowner.acting_as(asowner.of(folder)):
        for part in _parts(folder, names):
            _removed(part)


def _parts(folder: Path, names: str) -> Iterator[Path]:
    return folder.glob(f".{names}.{'[0-9a-f]' * 16}.part")


def _removed(part: Path) -> bool:
    """False where it is being written; what is not ours is left."""
    try:
        descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_part(part)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _copy(source: sqlite3.Connection, part: Path, progress: Progress) -> None:
    with contextlib.closing(_connect(part, "mode=rw")) as target:
        source.backup(target, pages=PAGES, progress=lambda status, left, total: progress(total - left, total))
        source.execute("COMMIT")
        target.execute("PRAGMA journal_mode=DELETE")
        target.execute("PRAGMA secure_delete=ON")
        _keep_tables(target)


def _opened_as_owner(store: Path, stack: contextlib.ExitStack) -> sqlite3.Connection:
    """In a transaction that has begun: all of its files are open, and root has made none of them."""
    with asowner.acting_as(asowner.of(store.parent)):
        if (mode := datadir.access(store.parent)) != "ro":
            stack.enter_context(datadir.still(store.parent))
        refuse_lost(store)
        source = stack.enter_context(contextlib.closing(_connect(store, f"mode={mode}")))
        application, version = (
            source.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        check_schema(store, application, version)
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM sqlite_master").fetchone()  # pins what the copy sees
    return source


def _keep_tables(db: sqlite3.Connection) -> None:
    """A rotation under way has more tables, with rows of DEKs that may be shredded by now: leave them out."""
    names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    others = [name for name in names if name not in _TABLES and not name.startswith("sqlite_")]
    for name in others:
        db.execute(f'DROP TABLE "{name}"')
    if others:
        db.execute("VACUUM")


def _describe(part: Path) -> Contents:
    with contextlib.closing(_connect(part, "mode=ro")) as db:
        state = _state(db)
        keks = {kek_id: row.deks for kek_id, row in state.keks.items()}
        active = state.active.kek_id if state.active else ""
        rows = db.execute(f"SELECT count(*) FROM {DEKS}").fetchone()[0]  # noqa: S608
        deks = sum(keks.values())
    now, size = timestamp(time.time()), part.stat().st_size
    contents = Contents(now, size, "", SCHEMA_VERSION, deks, rows - deks, active, keks)
    return contents.sealed(part, lambda done, total: None)


def _state(db: sqlite3.Connection) -> StoreState:
    text = _value(db, STATE)
    return StoreState.from_row(None if text is None else as_it_stands(text))


def _refuse_lost(db: sqlite3.Connection) -> None:
    """Are these the rows that the state tells of? To see that takes no key. Raises StoreDamaged. Of rows that
    can't be read nobody knows; `restore` names them."""
    state = _state(db)
    mac = "CASE WHEN json_valid(value) THEN json_extract(value, '$.mac') END"
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        found = db.execute(f"SELECT {mac} FROM {DEKS}")  # noqa: S608
        if sum(weight({"mac": one}) for (one,) in found) % MODULUS != state.total:
            rows = db.execute(f"SELECT count(*) FROM {DEKS}").fetchone()[0]  # noqa: S608
            deks = sum(row.deks for row in state.keks.values())
            raise StoreDamaged(
                f"rows of the store are lost, or were put back: there are {rows}, its state tells of {deks} "
                "DEKs that are not shredded, and they don't add up; no backup was made",
                hint="`progressdb-kms verify` tells more; restore the last backup that has them",
            )


def _shown(contents: Contents) -> dict[str, Any]:
    return {
        "created_at": contents.created_at,
        "deks": contents.deks,
        "shredded": contents.shredded,
        "kek_ids": contents.kek_ids,
        "bytes": contents.size,
        "sha256": contents.sha256,
    }


# ---- reading -----------------------------------------------------------------------------------------


class Backup:
    """A backup that was checked: its contents, and its rows."""

    def __init__(self, file: Path, contents: Contents, db: sqlite3.Connection) -> None:
        self.file = file
        self.contents = contents
        self._seal: Seal | None = None
        self._db = db

    def read(self, name: str) -> Any:
        """A row of the service's own, or None."""
        text = _value(self._db, name)
        return None if text is None else self._plain(name, text)

    def rows(self, prefix: str) -> dict[str, Any]:
        """Those that can't be read are left out: `check_all` tells of them."""
        found = self._db.execute(
            "SELECT key, value FROM kms WHERE key >= ? AND key < ?", (prefix, prefix + "\uffff")
        )
        rows = {key: as_it_stands(value) for key, value in found}
        return {key: without_mac(row) for key, row in rows.items() if isinstance(row, dict)}

    def get(self, key_id: str) -> Any:
        """A DEK's row without its MAC, or None where there is none that can be read."""
        found = self._db.execute(f"SELECT value FROM {DEKS} WHERE key = ?", ("meta:" + key_id,)).fetchone()  # noqa: S608
        row = as_it_stands(found[0]) if found else None
        return without_mac(row) if isinstance(row, dict) else None

    def usage(self, key_ids: Sequence[str]) -> dict[str, Usage]:
        """What was done under these DEKs, as far as it was counted."""
        found = self._db.execute(USAGE_OF, (json_dumps(list(key_ids)),))
        return {key_id: Usage(*counts) for key_id, *counts in found}

    @property
    def row_key(self) -> Any:
        """The row with the key that its rows are signed with."""
        return self.read(ROWS[ROW_KEY])

    def state(self) -> StoreState:
        return StoreState.from_row(self.read(STATE))

    def unlock(self, key: memoryview) -> None:
        """From now on rows are held against their MACs. Raises StoreDamaged for a wrong state row."""
        self._seal = Seal(key)
        self._seal.check(STATE, self._json(STATE, _value(self._db, STATE)))

    def check_all(self) -> None:
        """Raises StoreDamaged for a row that isn't as it was written, and where one is missing or older."""
        rows = self._db.execute(f"SELECT key, value FROM {DEKS} ORDER BY key")  # noqa: S608
        if sum(weight(self._checked(*row)) for row in rows) % MODULUS != self.state().total:
            raise StoreDamaged("the rows don't add up: one was deleted, or an older one was put back")
        rows = self._db.execute("SELECT key, value FROM kms")
        if (
            sum(weight(self._checked(*row)) for row in rows if row[0].startswith(OWN)) % MODULUS
            != self.state().own
        ):
            raise StoreDamaged("the rows of the service's own don't add up: one was deleted or replaced")

    def records(self) -> Iterator[tuple[DekRecord, bool]]:
        """All DEKs whose rows can be read, in order of key_id, and whether each is as it was written."""
        for key, value in self._db.execute(f"SELECT key, value FROM {DEKS} ORDER BY key"):  # noqa: S608
            record, genuine = self._judged(key, value)
            if record is not None:
                yield record, genuine

    def unreadable(self) -> list[str]:
        """The key_ids of all others, as far as these can be read."""
        rows = self._db.execute(f"SELECT key, value FROM {DEKS} ORDER BY key")  # noqa: S608
        return [str(key).removeprefix("meta:") for key, value in rows if self._judged(key, value)[0] is None]

    def _judged(self, key: Any, value: Any) -> tuple[DekRecord | None, bool]:
        genuine = True
        try:
            row = self._checked(key, value)
        except StoreDamaged:
            genuine, row = False, as_it_stands(_as_text(value))
        try:
            record = DekRecord.from_row(str(key)[len("meta:") :], row)
        except StoreDamaged:
            return None, False
        return (record if KEY_ID.fullmatch(record.key_id) else None), genuine

    def _checked(self, name: str, text: Any) -> Any:
        """A row. Raises StoreDamaged where it is not as it was written, if that can be told."""
        text = _as_text(text)
        if self._seal is not None and isinstance(text, str) and self._seal.wrote(str(name), text):
            return json.loads(text)
        row = as_it_stands(text)
        if self._seal is not None:
            self._seal.check(str(name), row)
        return row

    def _plain(self, name: str, text: Any) -> Any:
        return without_mac(self._json(name, text))

    def _json(self, name: str, text: Any) -> Any:
        try:
            return json_loads(text)
        except (ValueError, TypeError, AttributeError):
            raise _damaged(self.file, f"the row {name} is no JSON") from None


def _as_text(value: Any) -> Any:
    """One bit of a record's head makes a blob of a text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


@contextlib.contextmanager
def opened(file: Path, progress: Progress) -> Iterator[Backup]:
    """Check a backup and open it. Raises CommandFailed, which says what is wrong, and OSError."""
    about = os.stat(file)
    if not stat.S_ISREG(about.st_mode):
        raise CommandFailed(f"{file} is no regular file", hint="name a file made by `backup`")
    contents = _rescued(file) or last_line(file)
    if contents.sealed(file, progress) != contents:
        raise _damaged(file, "its checksum does not fit")
    check_schema(file, APPLICATION_ID, contents.schema)
    with contextlib.closing(_connect(file, "mode=ro&immutable=1")) as db:
        db.text_factory = lambda raw: raw.decode("utf-8", "replace")  # of a row that lost a byte
        try:
            _check(file, db)
            yield Backup(file, contents, db)
        except sqlite3.Error as error:
            raise _damaged(file, str(error)) from None


def _damaged(file: Path, why: str) -> CommandFailed:
    return CommandFailed(f"{file} is damaged: {why}; nothing was changed", hint="take another backup")


def _rescued(file: Path) -> Contents | None:
    """A file that the daemon wrote when its own was taken away is a database without a last line. A store in
    use is none: its header says WAL."""
    with open(file, "rb") as source:
        head = source.read(100)
        size = source.seek(0, os.SEEK_END)
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        return None
    page, mode = struct.unpack_from(">HB", head, 16)
    pages, application = struct.unpack_from(">28xI36xI", head)
    if mode != 1 or application != APPLICATION_ID or pages * (page if page > 1 else 65536) != size:
        return None
    try:
        return _describe(file)
    except (sqlite3.Error, ValueError) as error:
        raise _damaged(file, str(error)) from None


def last_line(file: Path) -> Contents:
    """What a backup says of itself. Raises CommandFailed where it is no whole one."""
    with open(file, "rb") as source:
        size = source.seek(0, os.SEEK_END)
        source.seek(max(0, size - MAX_LINE))
        tail = source.read()
    line = tail[tail.rfind(b"\n{") + 1 :]
    try:
        values = json_loads(line)
        if values.pop(MARK) != FORMAT:
            raise ValueError("its format is of another release")
        contents = Contents(**values)
        counts = contents.size, contents.schema, contents.deks, contents.shredded, *contents.keks.values()
        texts = contents.created_at, contents.sha256, contents.active_kek_id
        if {type(count) for count in counts} != {int} or {type(text) for text in texts} != {str}:
            raise TypeError
        if contents.line() != b"\n" + line or contents.size + len(contents.line()) != size:
            raise ValueError("its last line does not fit")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CommandFailed(
            f"{file} is no whole file made by `progressdb-kms backup`; nothing was changed",
            hint="a copy of kms.db itself is made a backup by `backup`: put it, with its kms.db-wal, into an "
            "empty --data-dir",
        ) from None
    return contents


def _check(file: Path, db: sqlite3.Connection) -> None:
    db.execute("PRAGMA cell_size_check=ON")
    for pragma, wanted in (("application_id", APPLICATION_ID), ("user_version", SCHEMA_VERSION)):
        found = db.execute(f"PRAGMA {pragma}").fetchone()[0]
        if found != wanted:
            raise _damaged(file, f"its {pragma} is {found}")
    kinds = dict(db.execute("SELECT name, type FROM sqlite_master WHERE type <> 'index'"))
    if any(kinds.get(name) != "table" for name in _TABLES):
        raise _damaged(file, "a table is missing")
    if (answer := _integrity(db)) != "ok":
        raise _damaged(file, answer)


def _integrity(db: sqlite3.Connection) -> str:
    return str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])


def _value(db: sqlite3.Connection, name: str) -> Any:
    row = db.execute("SELECT value FROM kms WHERE key = ?", (name,)).fetchone()
    return None if row is None else row[0]


def _connect(path: Path, options: str) -> sqlite3.Connection:
    uri = f"file://{quote(os.fsencode(path.absolute()))}?{options}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=5)
