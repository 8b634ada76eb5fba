"""Backups of a fleet, in the file that every backup is, and back.

What is copied is one moment of the database (REPEATABLE READ), row by row, into a store of SQLite beside the
file that is to come: so it is of today's format, its sums are reckoned anew, and a row that was changed, lost
or put back is noticed before there is a backup. It has the DEKs and the fleet's own rows, and of the hosts'
rows those of the one that makes it: its audit key, how far its chains were, and its trusted time.

Such a file can be restored on a host with a store of its own, by `restore` as it is. Into a fleet it is taken
only where that is empty: rows of a fleet in use are others' too. There each DEK is opened and wrapped anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.load import Loaded
from ..config.options import Settings
from ..crypto.envelope import AUDIT_KEY, ROW_KEY
from ..encoding import timestamp, wall
from ..errors import AuditUnavailable, KeyMismatch, StoreDamaged, StoreUnavailable
from ..service.clock import ROW as TRUSTED_CLOCK
from ..service.ownkeys import ROWS
from ..service.rotation import RETIRED_KEK
from ..service.start import note_restore
from ..store.contract import KEK_ROW, DekRecord
from ..store.sealed import Reader
from ..store.sqlite import SqliteReader, SqliteStore
from . import asowner, backup, datadir
from .backup import Backup, Progress
from .console import CommandFailed
from .datadir import Work, beyond
from .imports import Entry, take
from .restore import plan_of, trusted
from .storecmd import line

if TYPE_CHECKING:
    from ..fleet.reader import FleetReader

PAGE = 1000

COPIED = ("audit:", "kek:", "clock:", "deletion:", "erasure:")
"""Rows of the service that come along, by how their names begin, beside the row key."""


def make(loaded: Loaded, file: Path, progress: Progress) -> dict[str, Any]:
    """Raises CommandFailed, KeyMismatch, StoreDamaged, StoreUnavailable; there is a whole file, or none."""
    settings = loaded.settings
    backup.check_target(settings.data_dir, file)
    with datadir.keys(loaded) as keys, datadir.reading(settings) as reader:
        assert not isinstance(reader, SqliteReader)
        row = reader.read(ROWS[ROW_KEY])
        if row is None or reader.read(ROWS[AUDIT_KEY]) is None:
            raise CommandFailed(
                "this host has never been one of the fleet, so its audit key is not there",
                hint="make the backup on a host whose daemon serves from the fleet, with its data-dir",
            )
        with datadir.own_key(keys.keyring, ROW_KEY, row) as key:
            if key is None:
                hint = "let the master key of this configuration be the fleet's"
                raise KeyMismatch("the fleet's row key opens under none of the configured KEKs", hint=hint)
            reader.unlock(key)
            reader.vouch()
            with asowner.acting_as(asowner.of(file.absolute().parent)), _folder(file) as folder:
                _build(folder, reader, key, progress)
                return backup.backup(folder, file, progress)


@contextlib.contextmanager
def _folder(file: Path) -> Iterator[Path]:
    """A private one beside the file. One that a killed backup left is taken over."""
    folder = file.with_name(f".{file.name}.fleet")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    descriptor = _locked(folder)
    try:
        os.fchmod(descriptor, 0o700)
        for name in os.listdir(folder):
            (folder / name).unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked(folder: Path) -> int:
    """A descriptor of a folder that is ours, and that nobody else works in. Raises CommandFailed, OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise CommandFailed(f"{folder} belongs to somebody else", hint="remove it, or name another file")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            file = folder.with_name(folder.name[1 : -len(".fleet")])
            raise CommandFailed(f"another backup to {file} is under way", hint="wait for it") from None
        raise
    return descriptor


def remove_all_left(folder: Path, names: str) -> None:
    """What killed backups to names of this pattern left; not what another one works in, or is not ours."""
    with asowner.acting_as(asowner.of(folder)):
        for left in folder.glob(f".{names}.fleet"):
            try:
                descriptor = _locked(left)
            except (CommandFailed, OSError):
                continue
            try:
                shutil.rmtree(left)
            finally:
                os.close(descriptor)


def _build(folder: Path, reader: FleetReader, key: memoryview, progress: Progress) -> None:
    state = reader.state()
    total = sum(row.deks for row in state.keks.values())
    if state.active is None:
        raise CommandFailed("the fleet was never used: there is nothing to copy")
    with contextlib.closing(SqliteStore(folder)) as out:
        out.unlock(key)
        with out.transaction():
            out.activate(*state.active)
            if reader.read(TRUSTED_CLOCK) is None and (known := reader.of_others(TRUSTED_CLOCK)):
                out.write(TRUSTED_CLOCK, max(known, key=lambda row: float(row["trusted"])))
            for name in [ROWS[ROW_KEY], *(name for prefix in COPIED for name in reader.names(prefix))]:
                out.write(name, reader.read(name) or {})
        done = 0
        for page in _pages(reader):
            with out.transaction():
                out.put_all(page)
                out.count(reader.usage([record.key_id for record in page]).items())
            done += len(page)
            progress(done, max(done, total))
        _finish(out, reader)


def _pages(reader: Reader) -> Iterator[list[DekRecord]]:
    after = ""
    while page := reader.page(after, PAGE):
        yield page
        after = page[-1].key_id


def _finish(out: SqliteStore, reader: Reader) -> None:
    """What it adds up to must be what the hosts say that it does."""
    state, found = reader.state(), out.state()
    counts = [{kek_id: row.deks for kek_id, row in one.keks.items()} for one in (state, found)]
    if state.total != found.total or counts[0] != counts[1]:
        raise StoreDamaged(
            "the rows of the fleet don't add up: one was deleted, or an older one was put back",
            hint="restore an older backup into an empty fleet",
        )
    kek_ids = {*state.keks, *([state.active.kek_id] if state.active else [])}
    wraps = reader.usage([KEK_ROW + kek_id for kek_id in kek_ids])
    kept = out.usage(list(wraps))
    with out.transaction():
        out.count((name, beyond(row, kept.get(name))) for name, row in wraps.items())
        out.advance(state.change)


# ---- into an empty fleet ---------------------------------------------------------------------------------


def restore(loaded: Loaded, file: Path, progress: Progress) -> dict[str, Any]:
    """Raises CommandFailed, KeyMismatch, AlreadyRunning, StoreUnavailable; nothing was changed then."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(backup.opened(file, progress))
        keys = stack.enter_context(datadir.keys(loaded))
        asowner.become(loaded.settings.data_dir)
        chosen = plan_of(source, keys)
        key = stack.enter_context(datadir.own_key(keys.keyring, ROW_KEY, source.row_key))
        trusted(source, key, force=False)
        stack.enter_context(datadir.held(loaded))
        _refuse_used(loaded.settings)
        work = stack.enter_context(datadir.working(loaded, keys, "restore"))
        _go_on(work, source, chosen.active, chosen.version)
        known = float(source.rows(TRUSTED_CLOCK).get(TRUSTED_CLOCK, {}).get("trusted", 0.0))
        event = {"backup": source.contents.created_at, "sha256": source.contents.sha256}
        result = take(work, "import", _entries(source), progress, skip_bad=False, known=known, restored=event)
        _record(work)
        return {
            "file": str(file),
            "created_at": source.contents.created_at,
            "deks": result.imported - source.contents.shredded,
            "shredded": source.contents.shredded,
            "kek_ids": source.contents.kek_ids,
            "audit_chain": work.audit.chain,
        }


def _record(work: Work) -> None:
    try:
        note_restore(work.store, work.audit)
    except (AuditUnavailable, StoreUnavailable) as error:
        raise CommandFailed(
            f"the backup was restored, but that is not in the audit log yet: {error.message}",
            hint="this host's daemon records it at its start",
        ) from None


def _refuse_used(settings: Settings) -> None:
    with datadir.reading(settings) as reader:
        if reader.page("", 1):
            raise CommandFailed(
                "the fleet is not empty, and what is in it is other hosts', too: nothing was changed",
                hint="`store init` another database, restore there, and let the hosts follow; where this is "
                "of a `restore` that was interrupted, it is whole: `verify`",
            )


def _go_on(work: Work, source: Backup, kek_id: str, version: int) -> None:
    """The KEK's version counts on from the backup's, what was rotated out stays so, and it is no earlier."""
    active = work.keyring.active.kek_id
    version += active != kek_id
    with work.store.transaction():
        for name, row in {**source.rows(RETIRED_KEK), **source.rows(TRUSTED_CLOCK)}.items():
            work.store.write(name, row)
        if active != kek_id:
            work.store.write(RETIRED_KEK + kek_id, {"since": timestamp(wall())})
        work.store.activate(active, version, timestamp(wall()))
    work.keyring.activate(active, version)


def _entries(source: Backup) -> Iterator[Entry]:
    total = source.contents.deks + source.contents.shredded
    for number, (record, _) in enumerate(source.records(), 1):
        data = line(record, source.usage([record.key_id]).get(record.key_id))
        yield Entry(f"{source.file}: {record.key_id}", record.key_id, data, number, total)
