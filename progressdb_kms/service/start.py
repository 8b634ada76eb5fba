"""From a data-dir and a loaded keyring to a keeper that may serve. Nothing is served before all of it holds.

Everything here is O(1) in the number of DEKs: what each KEK is needed for is kept in the store as a count.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from socket import socket
from typing import Any, NamedTuple

from ..audit import tail
from ..audit.log import FILE_NAME as AUDIT_LOG
from ..audit.log import AuditLog
from ..crypto.keyring import Keyring
from ..crypto.memory import random_into
from ..disk import put, regular
from ..encoding import timestamp, wall
from ..errors import ConfigError, KeyMismatch, StoreDamaged, StoreUnavailable
from ..journal import Chore
from ..store.heads import forget, heads
from ..store.seal import ActiveKek
from ..store.sealed import Store
from ..store.sqlite import DAMAGED, FILES, SqliteStore
from . import ownkeys
from .clock import Clock, TrustedTime
from .common import Common
from .keeper import Keeper
from .lock import LOCK_FILE, is_held
from .plan import Configured, Plan, plan
from .rotation import RETIRED_KEK, retired

log = logging.getLogger("progressdb_kms")

HOST_FILE = "kms.host"

RESTORE_FOLDER = ".kms-restore"
"""Where `restore` builds the store that is to come. What a crash leaves of one is thrown away."""

EPOCH = "audit:epoch"
"""The row that numbers the runs of the daemon, and of the commands that write."""

RESTORED = "audit:restore"
"""The row of a restored store that owes the audit log its `restore` event."""


class Opened(NamedTuple):
    """A store that was checked and its audit chain, which has begun."""

    store: SqliteStore
    audit: AuditLog
    epoch: int


def open_keeper(
    data_dir: Path, keyring: Keyring, keys: Configured, staging: memoryview, inbox: socket, incarnation: int
) -> tuple[Keeper, int]:
    """Open and check the store. Returns the keeper and the epoch of its audit chain.

    `incarnation` counts the keepers of this daemon: above 0 it replaces one that died, and the keyring may be
    newer than the configuration. Raises an OperatorError that says what to do.
    """
    if not is_held(data_dir):  # one that nobody holds is not the one that was locked, nor its store ours
        raise ConfigError(f"{data_dir / LOCK_FILE} was replaced under the daemon", hint="restart the daemon")
    store, book, epoch = open_store(data_dir, keyring, keys, incarnation)
    store.watch(*FILES, LOCK_FILE)
    common = Common(store, data_dir, keyring, book, TrustedTime(store, Clock()), [])
    return Keeper(common, keys, staging, inbox), epoch


def open_store(
    data_dir: Path,
    keyring: Keyring,
    keys: Configured,
    incarnation: int = 0,
    command: str | None = None,
    given: Store | None = None,
    fleet: bool = False,
) -> Opened:
    """What `open_keeper` does short of the keeper, for whoever holds the lock: an offline `command` too.
    `given`: the store, where it is open; `fleet`: this host shares it with others."""
    shutil.rmtree(data_dir / RESTORE_FOLDER, ignore_errors=True)
    store: Any = given or SqliteStore(data_dir)
    with contextlib.ExitStack() as undo:
        undo.callback(store.close)
        was = store.state().active  # not held against its MAC yet: the key for that is in the store
        if incarnation and not (was or fleet):  # other keys than those in memory would come of it
            raise StoreDamaged(f"{data_dir} has an empty store, and the daemon had another one", hint=DAMAGED)
        chosen = _choose(store, was, keyring, keys, incarnation)
        if fleet and was and chosen.adopt:
            master = keys.master.source.label
            told = f"the fleet's active KEK is {was.kek_id}, and {master} holds {chosen.active}"
            hint = f"no other host has that: let this one's master key be {was.kek_id}"
            raise KeyMismatch(told, hint=hint)
        if chosen.notice:
            log.warning("%s", chosen.notice)
        ours = _load_keys(store, keyring, chosen, joins=fleet)
        store.unlock(keyring.row_key, keyring.publish)
        keyring.activate(chosen.active, chosen.version)
        _drop_unneeded(keyring, store, keys)
        epoch, change = int((store.read(EPOCH) or {"epoch": 0})["epoch"]) + 1, store.state().change
        log_path = data_dir / AUDIT_LOG
        floor = _floor(store, log_path, keyring)
        older = floor.above(epoch - 1, change, "the fleet's database" if fleet else "kms.db")
        if older and (fleet or incarnation or not keys.accept_older):
            raise StoreDamaged(older, hint="see `progressdb-kms help fleet`" if fleet else tail.OLDER_HINT)
        store.vouch()
        epoch, previous = max(epoch, floor.epoch + 1), heads(store)
        if previous and not floor.epoch:
            log.warning("no audit record of before is in %s, and the store knows of some", data_dir)
        with store.transaction():
            if older or (fleet and not change):  # from now on this host of a fleet has begun
                store.advance(floor.change)
            if chosen.adopt:
                _adopt(store, chosen, was)
            for name, key in ours.items():
                store.write(ownkeys.ROWS[name], key)
            store.write(EPOCH, {"epoch": epoch})
        book = AuditLog(log_path, keyring.audit_key, f"{epoch}.0", change=keyring.change)
        tail.recover(book)
        kek: dict[str, Any] = {"kek_id": chosen.active, "kek_version": chosen.version}
        book.note("start", previous=previous, host=host_id(data_dir), **kek, command=command)
        if older:
            log.warning("%s: taken as it is, as --accept-older-store says", older)
            book.note("older_store_accepted", store=change, log=floor.change)
        note_restore(store, book)
        if not incarnation:
            _begin_run(store, book, epoch)
        undo.pop_all()
    return Opened(store, book, epoch)


def _begin_run(store: Store, book: AuditLog, epoch: int) -> None:
    """Once the record that names the heads of the run before is on the disk, it vouches for them. Where it
    can't be brought there they stay, and the next start names them again."""
    if Chore("the start can't be brought to the disk").attend(book.sync):
        with store.transaction():
            forget(store, epoch)


def note_restore(store: Store, book: AuditLog) -> None:
    """The event of a restore follows the swap of the files: here, even if the command was killed between."""
    due = store.read(RESTORED)
    if due is not None:
        book.note("restore", **due)
        with store.transaction():
            store.erase(RESTORED)


def _choose(
    store: Store, was: ActiveKek | None, keyring: Keyring, keys: Configured, incarnation: int
) -> Plan:
    """Which KEK is the active one from now on? A keeper that takes another's place goes on with its."""
    if incarnation and was:
        if was.kek_id not in keyring.kek_ids():
            told = f"the store's active KEK {was.kek_id} is not in memory"
            raise StoreDamaged(told, hint="restart the daemon")
        return Plan(was.kek_id, was.version, False)
    rows = {name: store.read(name) for name in store.names(RETIRED_KEK)}
    return plan((was.kek_id, was.version) if was else None, store.keks(), keys, retired(rows))


def _adopt(store: Store, chosen: Plan, was: ActiveKek | None) -> None:
    """Inside a transaction: another KEK becomes the active one."""
    now = timestamp(wall())
    if was:
        store.write(RETIRED_KEK + was.kek_id, {"since": now})
        store.erase(RETIRED_KEK + chosen.active)
    store.activate(chosen.active, chosen.version, now)


def _drop_unneeded(keyring: Keyring, store: Store, keys: Configured) -> None:
    """A KEK that wraps nothing and is not configured to unwrap: the key of a rotation that did not happen, or
    the old key of one that did."""
    needed = {keyring.active.kek_id, *store.keks(), *keys.previous}
    for kek_id in keyring.kek_ids():
        if kek_id not in needed:
            keyring.remove(kek_id)


def _load_keys(store: Store, keyring: Keyring, chosen: Plan, joins: bool) -> dict[str, dict[str, Any]]:
    """The keys of our own into the keyring; a fresh store gets new ones. Returns their rows, under the KEK
    that is chosen. They are made together with the state: where only some are there, others were removed.
    `joins`: it may be a host's first start in a fleet, whose row key is there, and nothing of this host."""
    rows = {name: store.read(row) for name, row in ownkeys.ROWS.items()}
    there = [row is not None for row in rows.values()] + [store.state().change > 0]
    if any(there) and not all(there) and not (joins and there == [False, True, False]):
        raise StoreDamaged(
            "a row is missing that the store had from its beginning",
            hint="restore a backup: `progressdb-kms restore FILE`",
        )
    result = {}
    for name, into in ownkeys.held(keyring).items():
        row = rows[name]
        if row is None:
            random_into(into)
            result[name] = ownkeys.wrap(keyring, chosen.active, name, into)
        else:
            result[name] = dict(ownkeys.load(keyring, name, row, chosen.active, into))
    return result


def _floor(store: Store, log_path: Path, keyring: Keyring) -> tail.Floor:
    """How far the store was, by the audit log: whatever is before that was put back."""
    if not store.state().change and tail.begun(log_path):
        told = f"kms.db is empty, but {log_path} beside it tells that there was a store"
        raise StoreDamaged(told, hint="put it back with its kms.db-wal, or `progressdb-kms restore FILE`")
    return tail.floor(tail.logs(log_path.parent), keyring.audit_key) or tail.Floor(0, 0)


def host_id(data_dir: Path) -> str:
    """32 hex digits, random, made once for each data-dir: what tells it from every other."""
    path = data_dir / HOST_FILE
    for _ in range(2):
        with contextlib.suppress(OSError), open(regular(path), "rb") as file:
            if found := re.fullmatch(rb"([0-9a-f]{32})\s*", file.read(99)):
                return found[1].decode()
        with contextlib.suppress(OSError):
            put(path, os.urandom(16).hex().encode() + b"\n")
    raise StoreUnavailable(f"{path} can't be made, or read", hint="what is there, and is room left?")
