"""What the commands on files do. A table of contents: the work is in the modules that are named here.

backup               backup             beside a running daemon
restore              restore, and imports for --snapshot      the daemon is stopped
import               imports                                  the daemon is stopped
export, verify, backups list|prune      here; they read, or touch the snapshots alone
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Optional

from ..config.load import Loaded
from ..config.options import Settings
from ..crypto.envelope import AUDIT_KEY, ROW_KEY
from ..crypto.keyring import Keyring
from ..disk import regular
from ..encoding import json_dumps, json_loads
from ..errors import StoreDamaged, StoreUnavailable
from ..service.ownkeys import ROWS
from ..store import snapshots
from ..store.contract import DekRecord, Usage
from ..store.policy import PENDING_DELETION, SHREDDED
from ..store.seal import MODULUS, STATE, StoreState, weight
from ..store.sealed import Reader
from ..store.snapshots import FOLDER, LINES
from ..store.sqlite import DEKS, FILE_NAME, Connection, SqliteReader
from . import datadir, ledgers
from .backup import Progress, backup
from .console import CommandFailed, say
from .datadir import Keys, Opener
from .imports import import_deks, restore_snapshot
from .restore import restore

__all__ = (
    "backup",
    "backups_list",
    "backups_prune",
    "export",
    "import_deks",
    "restore",
    "restore_snapshot",
    "verify",
)

PAGE = 500
"""Rows a read: no lock of SQLite is held between two, so that a shred beside it need not wait."""

TOLD = 100
"""Faults that are listed; all are counted."""


Judged = list[tuple[str, Optional[DekRecord]]]


def _pages(reader: Reader) -> Iterator[Judged]:
    after = ""
    while page := reader.page(after, PAGE):
        yield [(record.key_id, record) for record in page]
        after = page[-1].key_id


def _judged(reader: Reader) -> Iterator[Judged]:
    after = ""
    while page := reader.judged(after, PAGE):
        yield page
        after = page[-1][0]


# ---- export --------------------------------------------------------------------------------------------


def export(
    settings: Settings, file: IO[bytes], keyring: Keyring | None, progress: Progress, skip_bad: bool
) -> tuple[int, list[str], bool]:
    """Write a JSON line a DEK, tombstones too; each as it stood when it was read. Returns how many, the
    key_ids whose rows are not as the daemon wrote them or can't be read (none of these without `skip_bad`,
    which raises StoreDamaged), and whether they were held against their MACs, which takes the `keyring`."""
    done, bad = 0, list[str]()
    with contextlib.ExitStack() as stack:
        reader, key, total = stack.enter_context(datadir.reading(settings)), None, 0
        with contextlib.suppress(StoreDamaged):  # of the service's own rows: the DEKs are there without these
            if keyring is not None:
                key = stack.enter_context(datadir.own_key(keyring, ROW_KEY, reader.read(ROWS[ROW_KEY])))
            if key is not None:
                reader.unlock(key)
            total = sum(row.deks for row in reader.keks().values())
        for page in _judged(reader) if skip_bad else _pages(reader):
            bad += [key_id for key_id, record in page if record is None]
            whole = [record for _, record in page if record is not None]
            usage = reader.usage([record.key_id for record in whole])
            file.writelines(line(record, usage.get(record.key_id)) for record in whole)
            done += len(whole)
            progress(done, max(done, total))
    return done, bad, key is not None


LINE = b'{"key_id":'
"""So each line begins."""


def line(record: DekRecord, usage: Usage | None) -> bytes:
    """A DEK as `export` writes it."""
    used = {"usage": usage._asdict()} if usage else {}
    return json_dumps({"key_id": record.key_id, **record.to_row(), **used}).encode() + b"\n"


# ---- verify --------------------------------------------------------------------------------------------


class Faults:
    """Told on stderr as they are found, and counted."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, text: str) -> None:
        self.count += 1
        if self.count <= TOLD:
            say(text)


def recount(loaded: Loaded) -> dict[str, Any]:
    """Let the counts and the sum follow the rows, on the record. Returns whether they differed, and then the
    DEKs by KEK as they were counted and as they are. Of a fleet the difference becomes this host's, so that
    the sum over all hosts is right; others go on meanwhile. Raises AlreadyRunning beside a daemon,
    StoreDamaged where a row isn't genuine."""
    with (
        datadir.keys(loaded) as keys,
        datadir.held(loaded),
        datadir.working(loaded, keys, "verify") as work,
        work.store.transaction(),
    ):
        before = _by_kek(work.store)
        if differed := work.store.recount():
            work.audit.note("recount")
        after = _by_kek(work.store)
        work.anchor()
    return {"recounted": differed, **({"counted": before, "there": after} if differed else {})}


def _by_kek(store: Reader) -> dict[str, int]:
    return {kek_id: row.deks for kek_id, row in store.keks().items()}


def verify(loaded: Loaded, progress: Progress) -> dict[str, Any]:
    """Open every DEK, and hold the store and the ledgers of rotations against themselves.

    May run beside the daemon. Raises CommandFailed after it listed what is wrong.
    """
    data_dir = loaded.settings.data_dir
    faults = Faults()
    with contextlib.ExitStack() as stack:
        stack.enter_context(datadir.beside(data_dir))
        reader = stack.enter_context(contextlib.closing(datadir.reader_of(data_dir)))
        keys = stack.enter_context(datadir.keys(loaded))
        key = stack.enter_context(datadir.own_key(keys.keyring, ROW_KEY, reader.read(ROWS[ROW_KEY])))
        if key is None:
            faults.add("the row key does not open under any configured KEK: no row can be checked")
        else:
            reader.unlock(key)
        _check_file(data_dir, reader, faults)
        if older := datadir.put_back(data_dir, reader, keys):
            faults.add(f"{older}: it was put back; use `progressdb-kms restore FILE`")
        total = sum(row.deks for row in reader.keks().values())
        with Opener(keys.keyring) as opener:
            live, shredded = check_deks(reader, opener, total, faults, progress)
        checked = _check_ledgers(data_dir, reader, keys, faults)
        _check_shredded(data_dir, faults)
    if faults.count:
        raise CommandFailed(
            f"{faults.count} faults were found in {data_dir}",
            hint="bring keys back with `restore --snapshot DIR --key ID`, or the whole with `restore FILE`; "
            "where only the counts are wrong, and you know why, `verify --recount`",
        )
    return {"result": "ok", "deks": live, "shredded": shredded, "ledgers": checked}


def _check_file(data_dir: Path, reader: SqliteReader, faults: Faults) -> None:
    """SQLite's integrity, and what the state row says of all rows together: in one snapshot."""
    db = Connection(data_dir / FILE_NAME, datadir.access(data_dir))
    with contextlib.closing(db):
        db.execute("BEGIN")
        try:
            for row in db.select("PRAGMA integrity_check(20)"):
                if row[0] != "ok":
                    faults.add(f"{FILE_NAME}: {row[0]}")
        except StoreUnavailable as error:  # of an index over a row that is damaged, which is named below
            faults.add(f"{FILE_NAME}: {error.message}")
        text = db.select_one("SELECT value FROM kms WHERE key = ?", (STATE,))
        state = _state(reader, text[0] if text else None, faults)
        kept = {kek_id: row.deks for kek_id, row in state.keks.items()}
        found = {row[0]: row[1] for row in db.select(_CENSUS, (SHREDDED,))}
        if kept != found:
            faults.add(f"{FILE_NAME}: DEKs by KEK are counted as {kept}, and there are {found}")
        rows = db.select(f"SELECT json_extract(value, '$.mac') FROM {_JSON}")  # noqa: S608
        if sum(_weight(row[0]) for row in rows) % MODULUS != state.total:
            faults.add(f"{FILE_NAME}: a row was deleted, or an older one was put back: they don't add up")
        try:
            reader.vouch()
        except StoreDamaged as error:
            faults.add(f"{FILE_NAME}: {error.message}")
        for row in db.select(_UNINDEXED, (PENDING_DELETION,)):
            faults.add(f"{row[0][5:]}: is to be deleted, but the janitor's list does not have it")
        db.execute("COMMIT")


def _weight(mac_of_row: Any) -> int:
    try:
        return weight({"mac": mac_of_row})
    except (ValueError, TypeError):
        return 0  # the row itself is a fault, which the look at each row finds


def _state(reader: SqliteReader, text: str | None, faults: Faults) -> StoreState:
    row = None
    try:
        with contextlib.suppress(ValueError):  # then the row is text, and none of ours
            row = text
            row = json_loads(text) if text is not None else None
        reader.check(STATE, row)
    except StoreDamaged as error:
        faults.add(error.message)
    return StoreState.from_row(row)


_JSON = f"(SELECT key, CASE WHEN json_valid(value) THEN value ELSE '{{}}' END AS value FROM {DEKS})"  # noqa: S608
"""The rows, with nothing in those that are damaged: each of them is named by whoever looks at all."""

_CENSUS = (
    "SELECT json_extract(value, '$.kek_id'), count(*) FROM "  # noqa: S608
    f"{_JSON} WHERE json_extract(value, '$.state') <> ? GROUP BY 1"
)
_GONE = (
    f"SELECT substr(key, 6) FROM {_JSON} AS d WHERE json_extract(value, '$.state') = ? AND NOT EXISTS ("  # noqa: S608
    "SELECT 1 FROM kms WHERE key = 'erasure:' || substr(d.key, 6))"
)
_UNINDEXED = (
    f"SELECT key FROM {_JSON} AS d WHERE json_extract(value, '$.state') = ? AND NOT EXISTS ("  # noqa: S608
    "SELECT 1 FROM kms WHERE key = "
    "'deletion:' || json_extract(d.value, '$.delete_at') || '|' || substr(d.key, 6))"
)


def check_deks(
    reader: Reader, opener: Opener, total: int, faults: Faults, progress: Progress
) -> tuple[int, int]:
    live = shredded = 0
    after = ""
    while page := reader.judged(after, PAGE):
        after = page[-1][0]
        for key_id, record in page:
            if record is None:
                live += 1
                faults.add(f"{key_id}: its row is not as the daemon wrote it")
                continue
            if record.state == SHREDDED:
                shredded += 1
                if record.wrapped:
                    faults.add(f"{record.key_id}: is shredded, but its wrapped DEK is still there")
                continue
            live += 1
            try:
                opener.check(record.key_id, record.wrapped)
            except ValueError as error:
                faults.add(f"{record.key_id}: {error}")
        progress(live, max(live, total))
    return live, shredded


# ---- snapshots and ledgers --------------------------------------------------------------------------------

_NAMED = re.compile(rb'"key_id":"([A-Za-z0-9._:-]{1,128})"').search
_NAME = re.compile(r"(\d{8}T\d{6}Z)-([0-9a-f]{16})(?:-\d+)?")


class SnapshotFolder(NamedTuple):
    """A snapshot of a rotation. `totals` is the ledger's last line; empty while it is being written."""

    name: str
    path: Path
    time: str
    kek_id: str
    totals: Mapping[str, Any]

    @property
    def ledger(self) -> Path:
        return self.path.with_name(self.name + ".ledger")

    @property
    def finished(self) -> bool:
        return bool(self.totals)

    @property
    def deks(self) -> int:
        """How many are there: shredded ones are gone."""
        with contextlib.suppress(FileNotFoundError), open(regular(self.path / LINES), "rb") as file:
            return sum(b'"wrapped":' in line for line in file)
        return sum(name.endswith(".json") for name in _names(self.path))

    def key_ids(self) -> Iterator[str]:
        """Of these."""
        with contextlib.suppress(FileNotFoundError), open(regular(self.path / LINES), "rb") as file:
            held = (_NAMED(line) for line in file if b'"wrapped":' in line)
            yield from (match[1].decode() for match in held if match)
        yield from (name[:-5] for name in _names(self.path) if name.endswith(".json"))


def _snapshots(data_dir: Path) -> list[SnapshotFolder]:
    """Oldest first. A ledger whose folder is gone counts too: pruning was interrupted."""
    root = data_dir / FOLDER
    names = {name[: -len(".ledger")] if name.endswith(".ledger") else name for name in _names(root)}
    found = [(name, match) for name in names if (match := _NAME.fullmatch(name))]
    found.sort(key=lambda pair: (pair[1][1], _age(root / pair[0])))
    return [
        SnapshotFolder(
            name, root / name, _spelled(match[1]), match[2], ledgers.last_line(root / f"{name}.ledger")
        )
        for name, match in found
        if not (root / name).is_symlink()
    ]


def _age(folder: Path) -> int:
    """When a snapshot was finished: for two of the same second."""
    for path in (folder.with_name(folder.name + ".ledger"), folder):
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_mtime_ns
    return 0


def _names(root: Path) -> list[str]:
    """None where it is no folder, or was taken away a moment ago: by the daemon, or by another prune."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.listdir(root)
    return []


def _spelled(time_of_name: str) -> str:
    t = time_of_name
    return f"{t[:4]}-{t[4:6]}-{t[6:8]}T{t[9:11]}:{t[11:13]}:{t[13:15]}Z"


def backups_list(data_dir: Path) -> list[dict[str, Any]]:
    """The snapshots of rotations, oldest first. `deks` is how many are there: shredded ones are gone."""
    return [
        {
            "time": found.time,
            "kek_id": found.kek_id,
            "deks": found.deks,
            "rewrapped": found.totals["totals"].get("rewrapped") if found.totals else None,
            "finished": found.finished,
            "path": str(found.path),
        }
        for found in _snapshots(data_dir)
    ]


def backups_prune(data_dir: Path, keep: int | None, older_than_days: int | None) -> list[str]:
    """Remove snapshots with their ledgers, and what rotations left that did not happen, however new; one
    that is being written is left alone. Returns their paths."""
    left = {path.name for path in snapshots.unfinished(data_dir)}
    found = [one for one in _snapshots(data_dir) if one.finished or not one.ledger.exists()]
    if keep is not None:
        found = found[: max(0, len(found) - keep)]
    if older_than_days is not None:
        limit = _days_ago(older_than_days)
        found = [one for one in found if one.time < limit]
    found += [one for one in _snapshots(data_dir) if one.name in left]
    for one in found:
        _remove(one)
    return [str(one.path) for one in found]


def fleet_backups_list(settings: Settings) -> list[dict[str, Any]]:
    """As `backups_list`, of the tables that rotations of the fleet left."""
    from ..fleet import tables

    with datadir.fleet_link(settings) as link:
        return [{**one, "rewrapped": None, "finished": True} for one in tables.left(link)]


def fleet_backups_prune(settings: Settings, keep: int | None, older_than_days: int | None) -> list[str]:
    """Drop such tables. One whose time nobody knows is old."""
    from ..fleet import tables

    with datadir.fleet_link(settings) as link:
        found = tables.left(link)
        if keep is not None:
            found = found[: max(0, len(found) - keep)]
        if older_than_days is not None:
            limit = _days_ago(older_than_days)
            found = [one for one in found if one["time"] < limit]
        for one in found:
            tables.drop(link, one["path"])
        return [one["path"] for one in found]


def _days_ago(days: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * 86400))


def _remove(snapshot: SnapshotFolder) -> None:
    """The ledger goes last: while it is there, an interrupted removal is found and finished. A daemon may be
    at work: what it removed meanwhile (the file of a key that is shredded) is gone already."""
    for name in _names(snapshot.path):
        (snapshot.path / name).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        snapshot.path.rmdir()
    snapshot.ledger.unlink(missing_ok=True)


def _check_shredded(data_dir: Path, faults: Faults) -> None:
    """Does a snapshot hold a DEK that was shredded? It was put back since, or was not there then: another
    folder was mounted over it. One whose erasure is under way is left to that."""
    with contextlib.closing(Connection(data_dir / FILE_NAME, datadir.access(data_dir))) as db:
        gone = {row[0] for row in db.select(_GONE, (SHREDDED,))}
    for one in _snapshots(data_dir) if gone else ():
        for key_id in sorted(gone.intersection(one.key_ids())):
            faults.add(f"{key_id}: was shredded, and {one.path} has it still: see `backups prune`")


def _check_ledgers(data_dir: Path, reader: SqliteReader, keys: Keys, faults: Faults) -> int:
    """Is each ledger the one that was signed?"""
    finished = [one for one in _snapshots(data_dir) if one.totals]
    with datadir.own_key(keys.keyring, AUDIT_KEY, reader.read(ROWS[AUDIT_KEY])) as key:
        if key is None:
            faults.add("the audit key does not open under any configured KEK")
            return 0
        for one in finished:
            with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
                if ledgers.signed(one.ledger, key, lambda line: False) is None:
                    faults.add(f"{one.ledger}: the ledger is not the one that was signed")
    return len(finished)
