"""The KEKs of a daemon that runs: who joins its keyring and leaves it, and what the next start will miss.

- A KEK that a job brought (`channel` tells how) joins the keyring. One that no stored DEK is under when its
  transaction is over, because the job failed, leaves it again; after a COMMIT of unknown outcome, once the
  store was read again.
- A rotation moves all DEKs to one KEK, and the one before leaves. One at a time is under way. What it leaves
  in the store and beside it (rows from before the swap, all of one that didn't happen) is removed bit by bit.
- What is in the keyring by a job alone is gone with the daemon: whoever brings a KEK that no configured file
  holds is told, and the operator is until one does.
"""

from __future__ import annotations

import logging
from typing import Callable

from ..config import keysource, values
from ..config.load import PENDING_SUFFIX
from ..crypto.aead import KEY_SIZE
from ..crypto.keyring import SLOTS, fingerprint
from ..crypto.memory import LockedBuffer
from ..errors import Conflict, KMSError
from ..journal import Chore
from ..store import snapshots
from ..store.snapshots import UNFINISHED
from .clock import overdue
from .common import Common
from .plan import Configured
from .rotation import Rotation, Steps

log = logging.getLogger(__name__)

RETIRE_ROWS = 500
"""Old rows deleted a step after a rotation."""

REMOVE_PAUSES = 1.0, 60.0
"""What failed is tried again after so many seconds, and after twice as many each time; at most."""


class Keks:
    """The keeper's. `keys`: as the configuration names them now."""

    _rotations: Callable[..., Rotation] = Rotation

    def __init__(self, common: Common, keys: Configured) -> None:
        self._store, self._data_dir = common.store, common.data_dir
        self._keyring, self._audit, self.keys = common.keyring, common.audit, keys
        self._brought: set[str] = set()
        self.rotation: Rotation | None = None
        self._left = True  # an earlier run may have left rows
        self._removing = Chore("what a rotation left can't be removed now", REMOVE_PAUSES)

    def forget(self) -> None:
        """What the workers remember of the store is old. A fleet has another way to tell them."""
        self._keyring.touch()

    # ---- by a job --------------------------------------------------------------------------------

    def admit(self, kek: memoryview, version: int) -> None:
        """So many that a configuration can name them all, and a rotation has room."""
        if fingerprint(kek) not in self._keyring.kek_ids():
            self._brought.add(self._keyring.install(kek, version, SLOTS - values.MAX_PREVIOUS - 1))

    def remove_unneeded(self) -> None:
        """Those that jobs brought, but no stored DEK is under. The store was just read or written."""
        if self._brought:
            for kek_id in self._brought - set(self._store.keks()) - {self._keyring.active.kek_id}:
                self._keyring.remove(kek_id)
            self._brought.clear()

    # ---- rotation --------------------------------------------------------------------------------

    def rotate(self, new_kek: LockedBuffer | None = None, dry_run: bool = False, kek_id: str = "") -> Steps:
        """To a KEK that the job brought, or that is configured for it: `kek_id` names that."""
        if new_kek is None:
            raise Conflict(f"the KEK {kek_id} is not in next_master_keys here", code="kek_not_everywhere")
        try:
            self.refuse_beside_rotation()
        except Conflict:
            new_kek.close()
            raise
        rotation = self.rotation = self._rotations(self._store, self._keyring, self._data_dir)
        work = rotation.dry_run if dry_run else lambda kek: self._recorded(rotation, kek)
        return self._steps(new_kek, work)

    def refuse_beside_rotation(self) -> None:
        if self.rotation is not None:
            hint = "GET /status tells how far it is"
            raise Conflict("a rotation is under way", code="rotation_in_progress", hint=hint)

    def _steps(self, new_kek: LockedBuffer, work: Callable[[memoryview], Steps]) -> Steps:
        try:
            with new_kek:
                return (yield from work(new_kek.view))
        finally:
            self.rotation, self._left = None, True

    def _recorded(self, rotation: Rotation, new_kek: memoryview) -> Steps:
        target = fingerprint(new_kek)
        self._audit.note("rotation_started", new_kek_id=target)
        log.info("a rotation to the KEK %s begins", target)
        try:
            result = yield from rotation.run(new_kek)
        except KMSError as error:
            log.error("the rotation to the KEK %s failed, nothing was changed: %s", target, error.message)
            self._audit.note("rotation_failed", "failed", new_kek_id=target, code=error.code)
            raise
        log.info("the rotation to the KEK %s is done: %d DEKs", target, result["rewrapped"])
        self._audit.note("rotation_finished", new_kek_id=target, rewrapped=result["rewrapped"])
        if target not in self.configured():
            result["warning"] = next_start(target, master=True)
            log.warning("%s", result["warning"])
        return result

    # ---- what rotations left -----------------------------------------------------------------------

    def later(self) -> Callable[[], object] | None:
        """What is to be done beside the jobs."""
        if not self._left or not self._removing.over():
            return None
        return lambda: self._removing.attend(self._remove)

    def _remove(self) -> None:
        with self._store.transaction(durable=False):
            self._store.staging(False)
            more = self._store.retire(RETIRE_ROWS)
        self._left = more or self._discard_unfinished_snapshot()

    def _discard_unfinished_snapshot(self) -> bool:
        """Of rotations that did not happen: known by a row each, or by a ledger without an end. True: there
        is more to do."""
        rows = self._store.names(UNFINISHED)
        named = (snapshots.place(self._data_dir, name[len(UNFINISHED) :]) for name in rows)
        left = [path for path in named if path is not None]
        for path in left or snapshots.unfinished(self._data_dir):
            if snapshots.discard(path, RETIRE_ROWS):
                return True
        if rows:
            with self._store.transaction():
                for name in rows:
                    self._store.erase(name)
        return False

    # ---- what the operator should see to -----------------------------------------------------------

    def configured(self) -> set[str]:
        """The KEKs that the next start has, as far as can be known."""
        # `rotate-kek` changes it and its `.next` under the running daemon
        path = self.keys.settings.master_key_file
        files = (path, path + PENDING_SUFFIX) if path else ()
        return self.keys.kek_ids | {_kek_id(file) for file in files} - {""}

    def look(self, now: float) -> tuple[list[str], list[str]]:
        """Reasons why not all DEKs can be used, and warnings."""
        reasons, warnings = list[str](), list[str]()
        active, configured = self._keyring.active.kek_id, self.configured()
        loaded = {active, *self._keyring.kek_ids()}
        if active not in configured:
            warnings.append(next_start(active, master=True))
        for kek_id, row in self._store.keks().items():
            if kek_id not in loaded:
                absent = f"the KEK {kek_id} is not loaded, and {row.deks} stored DEKs need it"
                (warnings if self.keys.settings.allow_missing_keks else reasons).append(absent)
            elif kek_id not in configured and kek_id != active:
                warnings.append(f"{next_start(kek_id)} ({row.deks} DEKs)")
        return reasons, warnings + [*filter(None, [self.overdue(now)])]

    def overdue(self, now: float) -> str:
        """Why the active one should be rotated out by now, or ""."""
        return overdue(self._store.state().active, now, self.keys.settings.kek_max_age_days)


def _kek_id(path: str) -> str:
    """Of the key in a file, which the start would take. Empty where there is none."""
    size = KEY_SIZE + keysource.SCRATCH_SIZE
    with LockedBuffer(size) as memory, memory.view[:KEY_SIZE] as key, memory.view[KEY_SIZE:] as scratch:
        try:
            keysource.read(keysource.Source("file", path, path), {}, scratch, key)
            return fingerprint(key)
        except KMSError:
            return ""


def next_start(kek_id: str, master: bool = False) -> str:
    do = "no configured file holds it, make it the master key" if master else "add it to previous_master_keys"
    return f"the next start needs the KEK {kek_id}: {do}"
