"""What jobs do to DEKs, and how the API tells of one. Each function of `Deks` is a job, done inside the
transaction of its round. Every job may be repeated: who heard no answer asks again."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

from ..crypto import envelope
from ..crypto.aead import KEY_SIZE, NONCE_SIZE, Aead
from ..crypto.keyring import Active, fingerprint
from ..crypto.memory import LockedBuffer, random_into, wipe
from ..encoding import b64encode, new_key_id, timestamp
from ..errors import Conflict, KeyShredded
from ..store.contract import DekRecord
from ..store.policy import PENDING_DELETION, SHREDDED, TRANSITIONS, need_enabled
from .common import Common
from .keks import Keks, next_start
from .rotation import Rewrapper, refuse_retired, refuse_spent
from .shredding import Shredding

log = logging.getLogger(__name__)

_TOLD = "key_id", "thread_id", "state", "kek_id", "kek_version", "created_at"
"""Of each DEK, as texts; a time that is not set is left out."""


def describe(record: DekRecord) -> dict[str, Any]:
    """A DEK as the API tells of it: everything but the wrapped bytes."""
    times = {"delete_at": record.delete_at, "shredded_at": record.shredded_at}
    told = {name: str(getattr(record, name)) for name in _TOLD}
    return {**told, **{name: time for name, time in times.items() if time}}


def described(record: DekRecord) -> dict[str, Any]:
    return {**describe(record), "wrapped": b64encode(record.wrapped)}


def same(record: DekRecord, thread_id: str) -> DekRecord:
    """The DEK that is there already. Raises KeyShredded, Conflict (another thread's), KeyDisabled."""
    if record.state != SHREDDED and record.thread_id != thread_id:
        raise Conflict(f"the key_id {record.key_id} is taken by another thread", code="key_exists")
    need_enabled(record.key_id, record.state)
    return record


class Deks:
    """The keeper's."""

    def __init__(self, common: Common, keks: Keks, shredding: Shredding) -> None:
        self._store, self._keyring, self._effects = common.store, common.keyring, common.effects
        self._time, self._keks, self._shredding = common.time, keks, shredding
        self._memory = LockedBuffer(KEY_SIZE)

    def create(self, thread_id: str | None = None, key_id: str | None = None) -> dict[str, Any]:
        """Make a DEK, or give the one that this thread has under this key_id already: a caller that died
        between our answer and its own write asks again. Without a thread_id the DEK is its own thread."""
        now = self._time.clock.now()
        if key_id is not None and (old := self._store.get(key_id)) is not None:
            return {**described(same(old, thread_id or key_id)), "repeated": True}
        active = self._keyring.active
        refuse_spent(self._store, active.kek_id)
        with self._keyring.borrow(active.kek_id) as kek:
            record = self._new(active, Aead(kek), now, thread_id, key_id)
        self._store.put(record)
        return described(record)

    def _new(self, active: Active, kek: Aead, now: Any, thread_id: Any, key_id: Any) -> DekRecord:
        key_id = key_id or new_key_id(int(now * 1000), os.urandom(10))
        dek = self._memory.view
        try:
            random_into(dek)
            blob = envelope.wrap(kek, active.kek_id, key_id, os.urandom(NONCE_SIZE), dek)
        finally:
            wipe(dek)
        return DekRecord(key_id, thread_id or key_id, blob, active.kek_id, active.version, timestamp(now))

    def transition(self, key_id: str, action: str, days: int = 7) -> dict[str, Any]:
        """Disable, enable, schedule a deletion or shred; see policy.TRANSITIONS."""
        old = self._store.existing(key_id)
        if old.state == SHREDDED and action != "shred":
            raise KeyShredded(f"the key {key_id} was shredded: nothing brings it back")
        rule = TRANSITIONS[action]
        if old.state not in rule.sources:
            raise Conflict(f"the key {key_id} is {old.state}", code="wrong_state", hint="`enable` it first")
        if action == "shred":
            return self._shred(old, self._time.clock.now())
        delete_at = timestamp(self._time.later(days * 86400)) if rule.target == PENDING_DELETION else ""
        record = old._replace(state=rule.target, delete_at=delete_at)
        if record != old:
            self._change(old, record)
        return describe(record)

    def _change(self, old: DekRecord, record: DekRecord) -> None:
        self._store.put(record)
        self._shredding.index(old, record)
        self._effects.append(self._keks.forget)

    def _shred(self, old: DekRecord, now: float) -> dict[str, Any]:
        """Repeating it makes sure again: the caller may have been told that copies remained."""
        record = self._shredding.mark(old, now) if old.state != SHREDDED else old
        if record is not old or self._shredding.noted(old.key_id):
            self._effects += [self._keks.forget, lambda: self._shredding.soon({old.key_id: old.wrapped})]
        return describe(record)

    def rewrap(self, key_id: str, new_kek: LockedBuffer) -> dict[str, Any]:
        """Move one DEK, which may be used, to another KEK, which joins the keyring."""
        with new_kek:
            old = self._store.existing(key_id)
            need_enabled(key_id, old.state)  # who brings a KEK that he knows is handed the DEK
            self._keks.refuse_beside_rotation()
            active = self._keyring.active
            target = fingerprint(new_kek.view)
            refuse_retired(self._store, target)
            refuse_spent(self._store, target)
            row = self._store.keks().get(target)
            version = active.version if target == active.kek_id else row.version if row else 0
            self._keks.admit(new_kek.view, version)
            mover = Rewrapper(self._keyring, target, version)
        with contextlib.closing(mover):
            record = mover.records([old])[0]
        self._change(old, record)
        wrapped = b64encode(record.wrapped)
        result = {"key_id": key_id, "kek_id": target, "kek_version": version, "wrapped": wrapped}
        if target != active.kek_id and target not in self._keks.configured():
            result["warning"] = next_start(target)
            if old.kek_id != target and self._store.keks()[target].deks == 1:  # the first of them
                self._effects.append(lambda: log.warning("%s", result["warning"]))
        return result

    def close(self) -> None:
        self._memory.close()
