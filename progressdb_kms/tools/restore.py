"""Bringing back a backup, so that neither a crash nor a shred is undone by it.

The store that is to come is built beside the present one, row by row, and takes its place by one rename. It
is never a copy of the backup file: so no byte of a DEK that was shredded since the backup comes back, no
trigger, no free page, no half of a rotation. What is taken from where:

    DEKs                 the backup; shredded ones as tombstones
    tombstones           the present store, the signed `shred` events of the audit log, the backup
    disabled, scheduled  likewise: what was closed since the backup stays closed; a deletion that was called
                         off since is none any more, and the DEK disabled
    active KEK           the backup: its DEKs need it
    audit key, row key   the present store where they open, else the backup: they stay over rotations
    audit epoch, heads   the present store, else the backup, and above whatever the log knows of
    trusted time         the present store, else the backup: a new host's clock may be wrong
    usage                the larger numbers of the present store and the backup
    number of changes    one above the present store, the backup and the log
    deletions            made anew from the DEKs

Rows are taken from nobody but ourselves: each, of the backup and of the present store, is held against its
MAC, and all of them against the sum. With `--force` a row that doesn't fit comes back disabled, and is named.

The audit chain goes on: the next start, which this command does itself, names the heads that were there
before. The `restore` event is owed by a row of the new store, so that a crash after the rename can't lose it.

The present store is not kept. In the data-dir it would hold what a later shred must remove; whoever wants it
makes a backup first. DEKs that only the present store has are lost with it, so that takes `--force`. So does
a present store that can't be read, and an audit log with a fault, because tombstones may be missing from it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, NamedTuple

from ..audit import tail, verify
from ..audit.verify import Left
from ..config.load import Loaded
from ..crypto.envelope import AUDIT_KEY, ROW_KEY
from ..disk import sync
from ..encoding import timestamp
from ..errors import AuditUnavailable, KeyMismatch, KMSError, OtherSchema, StoreDamaged, StoreUnavailable
from ..service.clock import ROW as TRUSTED_CLOCK
from ..service.ownkeys import ROWS, held, wrap
from ..service.plan import Plan, plan
from ..service.rotation import RETIRED_KEK, retired
from ..service.start import EPOCH, RESTORE_FOLDER, RESTORED
from ..store import heads
from ..store.contract import KEK_ROW, DekRecord, Usage
from ..store.policy import DISABLED, PENDING_DELETION, SHREDDED
from ..store.sqlite import DAMAGED, FILE_NAME, FILES, SqliteReader, SqliteStore
from . import asowner, backup, datadir
from .backup import Backup, Progress
from .console import CommandFailed, naming
from .datadir import Keys, Opener, as_left, beyond, uncollected

BATCH = 2000
"""Rows of one transaction while the new store is built."""

ITS_KEK = "add the KEK that it needs to previous_master_keys; `progressdb-kms kek-id FILES` finds it"

NAMED = 10
"""Key ids that a message names at most."""

_LOG = FILE_NAME + "-wal"
_SIDE_FILES = (*FILES[1:], FILE_NAME + "-journal")
"""What SQLite would play into the new file, or read it by."""


class Present(NamedTuple):
    """What the store that will be replaced tells. All empty where there is none."""

    audit: dict[str, Any]
    erasures: list[str]
    tombstones: dict[str, DekRecord]
    left: dict[str, Left]
    """How DEKs are that are closed, or not as in the backup."""
    newer: list[str]
    """DEKs that the backup lacks, or has another row of."""
    change: int


class Past(NamedTuple):
    """What the new store needs to know of the time before it."""

    rows: dict[str, Any]
    """Of the audit log, and the keys of our own, wrapped under the KEK that the backup calls active."""
    tombstones: dict[str, DekRecord]
    left: dict[str, Left]
    erasures: list[str]
    change: int


class Built(NamedTuple):
    deks: int
    shredded: int
    again: int  # live in the backup, but shredded since
    damaged: list[str]


def restore(loaded: Loaded, file: Path, force: bool, progress: Progress) -> dict[str, Any]:
    """Replace the store by the backup. Everything is checked before anything is changed.

    Raises CommandFailed, KeyMismatch, AlreadyRunning, StoreUnavailable.
    """
    data_dir = loaded.settings.data_dir
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(backup.opened(file, progress))
        keys = stack.enter_context(datadir.keys(loaded))
        asowner.become(data_dir)
        chosen = plan_of(source, keys)
        stack.enter_context(uncollected())
        trusted(source, stack.enter_context(datadir.own_key(keys.keyring, ROW_KEY, source.row_key)), force)
        with datadir.held(loaded), _staging(data_dir) as folder:
            present = _look(data_dir, source, keys, force)
            past = _past(data_dir, source, present, chosen, keys, force, progress)
            plan_of(source, keys, past.rows)
            built = _build(folder, source, chosen, past, keys, progress)
            with naming(data_dir / FILE_NAME):
                _swap(data_dir, folder)
            chain = _record(loaded, keys)
        return _told(source, present, built, chain)


def _record(loaded: Loaded, keys: Keys) -> str:
    """Have the event that the new store owes written. Returns the name of the audit chain."""
    try:
        with datadir.working(loaded, keys, "restore") as work:
            return work.audit.chain
    except (AuditUnavailable, StoreUnavailable) as error:
        raise CommandFailed(
            f"the backup was restored, but that is not in the audit log yet: {error.message}",
            hint="the daemon records it at its start",
        ) from None


def _told(source: Backup, present: Present | None, built: Built, chain: str) -> dict[str, Any]:
    return {
        "file": str(source.file),
        "created_at": source.contents.created_at,
        "deks": built.deks,
        "shredded": built.shredded,
        "shredded_since": built.again,
        "lost": len(present.newer) if present else None,
        "damaged": built.damaged[:NAMED],
        "kek_ids": source.contents.kek_ids,
        "audit_chain": chain,
    }


# ---- checks, before anything is changed ------------------------------------------------------------------


def plan_of(source: Backup, keys: Keys, since: Mapping[str, Any] = MappingProxyType({})) -> Plan:
    """Do the configured keys fit the backup? The same decision as at a start of the daemon. `since`: rows of
    what was rotated out since."""
    state = source.state()
    if state.active is None:
        raise CommandFailed(f"{source.file} is of a store that was never used")
    stored = (state.active.kek_id, state.active.version)
    try:
        rows = {name: row for name, row in since.items() if name.startswith(RETIRED_KEK)}
        plan(stored, state.keks, keys.configured, retired({**source.rows(RETIRED_KEK), **rows}))
    except KeyMismatch as error:
        raise KeyMismatch(f"{source.file} needs other keys: {error.message}", hint=error.hint) from None
    return Plan(*stored, adopt=False)


def trusted(source: Backup, key: memoryview | None, force: bool) -> None:
    """Are the rows of the backup ours, and all of them? `key`: its row key."""
    if key is None:
        hint = "add the KEK to previous_master_keys"
        raise KeyMismatch("the backup's row key opens under none of the configured KEKs", hint=hint)
    try:
        source.unlock(key)
        source.check_all()
    except StoreDamaged as error:
        if not force:
            raise CommandFailed(
                f"{source.file} was changed after it was made: {error.message}",
                hint="take another backup; --force takes it, and what doesn't fit comes back disabled, or "
                "stays out where it can't be read",
            ) from None


def _look(data_dir: Path, source: Backup, keys: Keys, force: bool) -> Present | None:
    """Read the present store; None where there is none, or, with `force`, none that can be read."""
    path = data_dir / FILE_NAME
    if not path.exists() or not path.stat().st_size:
        if not _newer_log(data_dir, source, keys):
            return Present({}, [], {}, {}, [], 0)
        if force:
            return None
        raise CommandFailed(
            f"{path} is missing or empty, and what it had beyond the backup may be in {_LOG} beside it",
            hint=f"put it back; else {DAMAGED}",
        )
    try:
        with (
            contextlib.closing(SqliteStore(data_dir)) as store,
            datadir.own_key(keys.keyring, ROW_KEY, row := store.read(ROWS[ROW_KEY]) or {}) as key,
        ):
            if key is not None:
                store.unlock(key)
                store.vouch()
            elif row.get("kek_id") in keys.keyring.kek_ids():
                raise StoreDamaged("its row key does not open under the KEK that it names")
            elif store.state().change:
                raise StoreUnavailable("its row key opens under none of the configured KEKs", hint=ITS_KEK)
            present = _read(store, source)
    except KMSError as error:
        if force:
            return None
        raise CommandFailed(
            f"the present store can't be read, so what it has beyond the backup is unknown: {error.message}",
            hint=error.hint if isinstance(error, (StoreUnavailable, OtherSchema)) else DAMAGED,
        ) from None
    if (log := data_dir / _LOG).exists() and log.stat().st_size:
        raise CommandFailed(
            f"{log} could not be moved into the present store's file, so what it has would be lost",
            hint="end what else reads that store, and see that the disk has room; then restore again",
        )
    if present.newer and not force:
        names = ", ".join(present.newer[:NAMED]) + (", …" if len(present.newer) > NAMED else "")
        raise CommandFailed(
            f"{len(present.newer)} DEKs of the store are newer than the backup, or not in it ({names})",
            hint="make a backup of the present store first, or an `export`, then restore with --force; "
            "`import` of that export brings in what is not in the backup",
        )
    return present


def _newer_log(data_dir: Path, source: Backup, keys: Keys) -> bool:
    """Is a write-ahead log left of a store whose file is gone, and was there more than the backup has? The
    audit log knows; where it doesn't, there may have been."""
    log = data_dir / _LOG
    if not log.exists() or not log.stat().st_size:
        return False
    with datadir.own_key(keys.keyring, AUDIT_KEY, source.rows(ROWS[AUDIT_KEY]).get(ROWS[AUDIT_KEY])) as key:
        floor = tail.floor(tail.logs(data_dir), key) if key is not None else None
    return floor is None or floor.change > source.state().change


def _read(store: SqliteStore, source: Backup) -> Present:
    tombstones: dict[str, DekRecord] = {}
    left: dict[str, Left] = {}
    newer, after = [], ""
    while page := store.page(after, BATCH):
        for record in page:
            if record.state == SHREDDED:
                tombstones[record.key_id] = record
            elif source.get(record.key_id) != record.to_row():
                newer.append(record.key_id)
                left[record.key_id] = None
            if record.state in (DISABLED, PENDING_DELETION):
                left[record.key_id] = record.delete_at
        after = page[-1].key_id
    prefixes = ("audit:", RETIRED_KEK, TRUSTED_CLOCK)
    names = [name for prefix in prefixes for name in store.names(prefix)]
    rows = {name: store.read(name) for name in [*names, *ROWS.values()]}
    erasures = [name.partition(":")[2] for name in store.names("erasure:")]
    return Present(rows, erasures, tombstones, left, newer, store.state().change)


# ---- what the new store must know of the time before ----------------------------------------------------


def _past(
    data_dir: Path,
    source: Backup,
    present: Present | None,
    chosen: Plan,
    keys: Keys,
    force: bool,
    progress: Progress,
) -> Past:
    theirs = {
        **source.rows("audit:"),
        **source.rows(TRUSTED_CLOCK),
        ROWS[ROW_KEY]: source.read(ROWS[ROW_KEY]),
    }
    rows = dict(present.audit) if present and present.audit else dict(theirs)
    rows = {**source.rows(RETIRED_KEK), **rows}
    rows.pop(RESTORED, None)
    logs = tail.logs(data_dir)
    _owned(logs)
    history, floor = verify.History({}, {}), None
    checked = False
    for holder in (rows, theirs):
        with datadir.own_key(keys.keyring, AUDIT_KEY, holder.get(ROWS[AUDIT_KEY])) as key:
            if key is None:  # the present store's may be wrapped under a KEK that is lost
                continue
            if not checked:
                _verify(logs, key, rows, force, progress)
                checked, floor = True, tail.floor(logs, key)
            told = _history(logs, key)
            history.shredded.update(told.shredded)
            history.left.update(told.left)
    rows.update(_own_keys(keys, chosen, (rows, theirs)))
    dead = history.shredded.items()
    tombstones = {key_id: _tombstone(key_id, when, source, chosen) for key_id, when in dead}
    tombstones.update(present.tombstones if present else {})
    _begin_anew(rows, logs, floor)
    pending = {name.partition(":")[2] for name in source.rows("erasure:")}
    erasures = sorted(pending.union(present.erasures if present else ()))
    then = source.state().change  # of what was before, its rows tell
    left = {key_id: how for key_id, (change, how) in history.left.items() if change > then}
    left.update(present.left if present else {})
    change = max(then, present.change if present else 0, floor.change if floor else 0)
    return Past(rows, tombstones, left, erasures, change)


def _own_keys(keys: Keys, chosen: Plan, holders: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of the keys of our own, from the first holder whose key opens; the keys go to the keyring."""
    result = {}
    for name, into in held(keys.keyring).items():
        for holder in holders:
            with datadir.own_key(keys.keyring, name, holder.get(ROWS[name])) as key:
                if key is not None:
                    into[:] = key
                    result[ROWS[name]] = wrap(keys.keyring, chosen.active, name, into)
                    break
        else:
            raise KeyMismatch(
                f"the key {ROWS[name]} opens under none of the configured KEKs",
                hint="add the KEK to previous_master_keys",
            )
    return result


def _owned(logs: list[Path]) -> None:
    """Most often root copied them here. Who can't read them doesn't know what was shredded, and the daemon
    would not go on with the newest: not even `--force` helps."""
    ours = os.geteuid()
    for path in logs:
        if (uid := asowner.of(path)) != ours:
            raise CommandFailed(
                f"{path} belongs to uid {uid}, and the daemon's user is uid {ours}",
                hint=f"chown {ours} {path}: it tells what was shredded since the backup; nothing was changed",
            )


def _verify(
    logs: list[Path], key: memoryview, rows: Mapping[str, Any], force: bool, progress: Progress
) -> None:
    """A line that was taken out of the log might be the one that says that a key was shredded."""
    report = verify.verify(logs, key, heads.of_rows(rows), partial=True, progress=progress)
    if logs and report.fault is not None and not force:
        raise CommandFailed(
            f"the audit log has a fault, so what was shredded is not sure: {report.fault}",
            hint="find out why; --force restores nonetheless, and keeps shredded what the log still tells",
        )


def _history(logs: list[Path], key: memoryview) -> verify.History:
    try:
        return verify.history(logs, key)
    except (OSError, EOFError, zlib.error) as error:
        raise CommandFailed(f"the audit log can't be read: {error}") from None


def _tombstone(key_id: str, when: str, source: Backup, chosen: Plan) -> DekRecord:
    old = DekRecord(key_id, "", b"", chosen.active, 1, when)
    with contextlib.suppress(StoreDamaged):
        old = DekRecord.from_row(key_id, source.get(key_id) or old.to_row())
    return old._replace(wrapped=b"", state=SHREDDED, delete_at="", shredded_at=old.shredded_at or when)


def _begin_anew(rows: dict[str, Any], logs: list[Path], floor: tail.Floor | None) -> None:
    """The next chain's epoch is above all that the logs know. Without a log there is nothing to follow on:
    the heads would only say that it is missing, which the operator knows."""
    epoch = dict(rows.get(EPOCH) or {"epoch": 0})
    epoch["epoch"] = max(int(epoch["epoch"]), floor.epoch if floor else 0)
    if not logs:
        for chain in heads.of_rows(rows):
            del rows[heads.HEAD + chain]
    rows[EPOCH] = epoch


# ---- building and swapping -------------------------------------------------------------------------------


@contextlib.contextmanager
def _staging(data_dir: Path) -> Iterator[Path]:
    folder = data_dir / RESTORE_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build(folder: Path, source: Backup, chosen: Plan, past: Past, keys: Keys, progress: Progress) -> Built:
    """Write the new store. A DEK of the backup that does not open is taken as it is, and named. So is one
    whose row can't be read, which is not taken; nor is a tombstone that nobody vouches for: it would stay,
    whatever is brought back after it."""
    again, damaged, done, forged = 0, source.unreadable(), 0, 0
    total = source.contents.deks + source.contents.shredded
    left, keks = dict(past.tombstones), source.state().keks
    records = source.records()
    with (
        contextlib.closing(SqliteStore(folder)) as store,
        _present_usage(folder.parent) as present,
        Opener(keys.keyring) as opener,
    ):
        store.unlock(keys.keyring.row_key)
        while batch := list(itertools.islice(records, BATCH)):
            kept: dict[str, DekRecord] = {}  # a forged backup may have a row twice
            with store.transaction():
                for record, genuine in batch:
                    dead = left.pop(record.key_id, None)
                    again += dead is not None and record.state != SHREDDED
                    if dead is None and not genuine and record.state == SHREDDED:
                        forged += 1
                    else:
                        record = record if genuine else _doubted(record, chosen, keks)
                        kept[record.key_id] = dead or _closed(record, past)
                    whole = genuine and (record.state == SHREDDED or _opens(opener, record))
                    if dead is None and not whole:
                        damaged.append(record.key_id)
                _put(store, list(kept.values()))
                names = [record.key_id for record, _ in batch]
                told = source.usage(names)
                store.count(told.items())
                store.count((name, beyond(used, told.get(name))) for name, used in present(names).items())
            done += len(batch)
            progress(done, total)
        with store.transaction():
            _put(store, list(left.values()))
            _carry_wraps(store, chosen.active, source.usage, present)
            deks = sum(row.deks for row in store.keks().values())
            built = Built(deks, done - forged + len(left) - deks, again, damaged)
            _put_rows(store, source, chosen, past, built)
        store.checkpoint()  # its file alone is swapped, and SQLite's own at a close fails unheard
    return built


@contextlib.contextmanager
def _present_usage(data_dir: Path) -> Iterator[Callable[[Sequence[str]], dict[str, Usage]]]:
    """Asks the store that will be replaced; one that can't be read tells of none."""
    try:
        reader = SqliteReader(data_dir)
    except KMSError:
        yield lambda key_ids: {}
        return

    def usage(key_ids: Sequence[str]) -> dict[str, Usage]:
        with contextlib.suppress(KMSError):
            return reader.usage(key_ids)
        return {}

    with contextlib.closing(reader):
        yield usage


def _carry_wraps(store: SqliteStore, active: str, *kept: Callable[[Sequence[str]], dict[str, Usage]]) -> None:
    """What KEKs had wrapped before, of which this store counted a part as it was written."""
    names = [KEK_ROW + kek_id for kek_id in {*store.keks(), active}]
    for usage in kept:
        more = [(name, beyond(used, store.usage([name]).get(name))) for name, used in usage(names).items()]
        store.count(more)


def _doubted(record: DekRecord, chosen: Plan, keks: Mapping[str, Any]) -> DekRecord:
    """What nobody can vouch for comes back closed, and no start asks for a KEK that there never was."""
    if record.kek_id not in keks:
        record = record._replace(kek_id=chosen.active, kek_version=chosen.version)
    return as_left(record, "")


def _closed(record: DekRecord, past: Past) -> DekRecord:
    """What was closed since the backup stays so."""
    return as_left(record, past.left[record.key_id]) if record.key_id in past.left else record


def _opens(opener: Opener, record: DekRecord) -> bool:
    try:
        opener.check(record.key_id, record.wrapped)
    except ValueError:
        return False
    return True


def _put(store: SqliteStore, records: Sequence[DekRecord]) -> None:
    store.put_all(records)
    for record in records:
        if record.delete_at:
            store.write(f"deletion:{record.delete_at}|{record.key_id}", {})


def _put_rows(store: SqliteStore, source: Backup, chosen: Plan, past: Past, built: Built) -> None:
    active = source.state().active
    assert active is not None  # or there would be no plan
    store.activate(*active)
    store.advance(past.change)
    for name, row in past.rows.items():
        store.write(name, row)
    for key_id in past.erasures:
        store.write(f"erasure:{key_id}", {"since": timestamp(time.time())})
    event = {
        "created_at": source.contents.created_at,
        "sha256": source.contents.sha256,
        "deks": built.deks,
        "shredded": built.shredded,
        "shredded_since": built.again,
    }
    store.write(RESTORED, event)


def _swap(data_dir: Path, folder: Path) -> None:
    """From one store to the other by one rename. The old one's log is in its file by now, see `_look`, or
    given up."""
    sync(folder / FILE_NAME)
    for name in _SIDE_FILES:
        (data_dir / name).unlink(missing_ok=True)
    sync(data_dir)
    try:
        os.replace(folder / FILE_NAME, data_dir / FILE_NAME)
    except OSError as error:
        error.filename = str(data_dir / FILE_NAME)  # what it is that can't be replaced
        raise
    sync(data_dir)
