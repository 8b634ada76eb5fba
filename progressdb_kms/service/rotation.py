"""Rotation: every DEK is rewrapped under a new KEK while the service goes on.

A rotation is a generator: each `next` does one paced batch and returns, so that the keeper serves others
between two batches. The steps, and what a crash leaves at each:

1. The new KEK enters the keyring, unused. A fresh table and a fresh snapshot folder are made.
2. Batch by batch: a page of live rows is unwrapped and wrapped under the new KEK, each new blob is opened
   again and compared, the rows go into the second table, the old rows into the snapshot. Whatever is
   written to the store meanwhile is mirrored into the second table in the same transaction. These batches
   wait for no disk: a crash undoes the rotation anyway, and the COMMIT of step 4 brings all to the disk.
   A crash here: the old state is whole; the next start throws the second table away.
   A failure: likewise; what is left is removed a bit at a time: see `keks`.
3. Each live row is looked for in the second table, and both are added up: see `seal`. The snapshot and its
   signed ledger are synced.
4. One short transaction swaps the tables, the active kek_id and the wrapped keys of our own.
   A crash before its COMMIT: the old state whole. After it: the new one.
5. The new KEK becomes active in memory, the old one is wiped, the old rows are deleted bit by bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

from ..crypto import envelope
from ..crypto.aead import NONCE_SIZE, Aead, same
from ..crypto.keyring import Keyring, fingerprint
from ..crypto.memory import LockedBuffer
from ..encoding import timestamp, wall
from ..errors import AuthenticationFailed, Conflict, StoreDamaged, StoreUnavailable, Unavailable
from ..store.contract import KEK_ROW, DekRecord
from ..store.policy import SHREDDED
from ..store.seal import KekCount
from ..store.sealed import Store
from ..store.snapshots import UNFINISHED, Snapshot
from . import ownkeys
from .usage import SPENT, refusal

STEP_SECONDS = 0.005
"""Work of one step, as near as can be foreseen: so long a create waits for it. It is time of the processor:
by the wall clock, a busy machine would see smaller and smaller steps, and a rotation that never ends."""

LEAST, MOST = 10, 1000
"""DEKs of one step."""

CHECK = 1000
"""Staged rows that are looked for in one step; each takes about a microsecond."""

RETIRED_KEK = "kek:retired:"
"""The rows, one a KEK that was rotated out, that keep it from becoming the active one again."""


def retired(rows: Mapping[str, Any]) -> dict[str, str]:
    """When each KEK was rotated out, from rows of RETIRED_KEK by their names."""
    return {name[len(RETIRED_KEK) :]: str(row["since"]) for name, row in rows.items()}


Steps = Generator[None, None, dict[str, Any]]
"""A long job: each step does a bounded piece of work, and the last one returns the answer."""


class Rewrapper:
    """Moves DEKs from whichever KEK wraps them to one target, and proves each move."""

    def __init__(self, keyring: Keyring, target: str, version: int) -> None:
        self._keyring = keyring
        self.target = target
        self.version = version
        self._memory = LockedBuffer(2 * envelope.SCRATCH_SIZE)
        self._first = self._memory.view[: envelope.SCRATCH_SIZE]
        self._second = self._memory.view[envelope.SCRATCH_SIZE :]

    def records(self, olds: Sequence[DekRecord]) -> list[DekRecord]:
        """The rows with their DEKs under the target; a shredded one stays as it is. Raises StoreDamaged or
        KekNotLoaded."""
        nonces = os.urandom(NONCE_SIZE * len(olds))
        news = []
        try:
            for place, old in enumerate(olds):
                if old.state != SHREDDED:
                    nonce = nonces[place * NONCE_SIZE : (place + 1) * NONCE_SIZE]
                    moved = self._moved(old, nonce)
                    old = old._replace(wrapped=moved, kek_id=self.target, kek_version=self.version)
                news.append(old)
        finally:
            self._memory.wipe()
        return news

    def _moved(self, old: DekRecord, nonce: bytes) -> bytes:
        dek = _open_stored(self._keyring, old, self._first)
        with self._keyring.borrow(self.target) as kek:
            moved = envelope.wrap(Aead(kek), self.target, old.key_id, nonce, dek)
            again = envelope.unwrap(Aead(kek), envelope.parse(moved), self._second)
        if not same(dek, again):  # type: ignore[arg-type]
            raise StoreDamaged(f"the rewrapped DEK of {old.key_id} is not the same")
        return moved

    def close(self) -> None:
        self._first.release()
        self._second.release()
        self._memory.close()


class Rotation:
    """One run. `run()` is the generator; its return value is the answer to the caller."""

    coming: Collection[str] = ()
    """KEKs that are in the keyring so that a rotation may move to them."""
    step = STEP_SECONDS

    def __init__(self, store: Store, keyring: Keyring, data_dir: Path) -> None:
        self._store = store
        self._keyring = keyring
        self._data_dir = data_dir
        self.progress: dict[str, Any] | None = None
        self._snapshot: Any = None
        self._rewrapper: Rewrapper | None = None

    def _tell(self, phase: str, done: int, total: int, new_id: str) -> None:
        """`phase`: rewrapping, comparing, syncing, swapping; checking in a dry run."""
        self.progress = {"phase": phase, "done": done, "total": total, "new_kek_id": new_id}

    def _check(self, new_kek: memoryview) -> str:
        """May it begin? Returns the kek_id of the new KEK."""
        new_id = fingerprint(new_kek)
        if new_id == self._keyring.active.kek_id:
            raise _in_use(new_id, "is the active one already")
        if new_id in self._keyring.kek_ids() and new_id not in self.coming:
            raise _in_use(new_id, "is in the keyring already: it must not become the active one again")
        refuse_retired(self._store, new_id)
        refuse_spent(self._store, new_id)
        absent = sorted(set(self._store.keks()) - set(self._keyring.kek_ids()))
        if absent:
            raise Unavailable(
                f"DEKs under the KEK {', '.join(absent)}, which is not loaded, can't be rewrapped",
                code="kek_not_loaded",
                hint="add it to previous_master_keys and start anew, or shred these DEKs",
            )
        return new_id

    def _through(
        self, phase: str, total: int, new_id: str, work: Callable[[list[DekRecord]], int]
    ) -> Generator[None, None, int]:
        """`work` on all rows, in pages of such a size that one takes it about a step. It tells with how many
        DEKs it was done, and so does this in the end."""
        done, size, after = 0, LEAST, ""
        while True:
            self._tell(phase, done, total, new_id)
            begun = time.thread_time()
            page = self._store.page(after, size)
            if not page:
                return done
            done, after = done + work(page), page[-1].key_id
            took = max(time.thread_time() - begun, 1e-6)
            size = min(max(LEAST, round(size * min(2.0, self.step / took))), MOST)
            yield

    def _total(self) -> int:
        return sum(row.deks for row in self._store.keks().values())

    def dry_run(self, new_kek: memoryview) -> Steps:
        """Open every DEK under the KEK that it names, change nothing, and tell what would be done."""
        new_id = self._check(new_kek)
        with LockedBuffer(envelope.SCRATCH_SIZE) as memory:

            def opened(page: list[DekRecord]) -> int:
                there = [record for record in page if record.state != SHREDDED]
                for record in there:
                    _open_stored(self._keyring, record, memory.view)
                return len(there)

            done = yield from self._through("checking", self._total(), new_id, opened)
        return {
            "status": "dry_run",
            "kek_id": new_id,
            "kek_version": self._keyring.active.version + 1,
            "rewrapped": done,
            "by_kek": {kek_id: row.deks for kek_id, row in self._store.keks().items()},
        }

    def run(self, new_kek: memoryview) -> Steps:
        new_id = self._check(new_kek)
        old = self._keyring.active
        version = old.version + 1
        total = self._total()
        now = wall()
        self._keyring.install(new_kek, version)
        committed = False
        try:
            snapshot = self._begin(now, old.kek_id, new_id, total)
            self._rewrapper = mover = Rewrapper(self._keyring, new_id, version)
            self._store.mirror = lambda records: self._store.stage(mover.records(records))

            def move(page: list[DekRecord]) -> int:
                moved = mover.records(page)
                saved: int = snapshot.save(zip(page, moved))
                with self._store.transaction(durable=False):
                    self._store.stage(moved)
                return saved

            done = yield from self._through("rewrapping", total, new_id, move)
            self._tell("comparing", done, total, new_id)
            yield from self._compare()
            self._tell("syncing", done, total, new_id)
            yield from snapshot.finish(self._keyring.audit_key, new_id)
            self._tell("swapping", done, total, new_id)
            yield from self._change_over(new_id, version, now)
            committed = True
        finally:
            self._end(new_id, committed)
        self._take_over(new_id, version, old.kek_id)
        return {
            "status": "ok",
            "kek_id": new_id,
            "kek_version": version,
            "rewrapped": done,
            "backup": str(snapshot.path),
        }

    def _begin(self, now: float, old_id: str, new_id: str, total: int) -> Any:
        self._snapshot = Snapshot(self._data_dir, now, old_id, total)
        with self._store.transaction():
            self._store.staging(True)
            self._store.write(UNFINISHED + self._snapshot.path.name, {"new_kek_id": new_id})
        return self._snapshot

    def _compare(self) -> Iterator[None]:
        seen = ""
        while seen := self._store.check_staged(seen, CHECK):
            yield

    def _change_over(self, new_id: str, version: int, now: float) -> Iterator[None]:
        try:
            with self._store.transaction():
                self._swap(new_id, version, now)
        except StoreUnavailable:
            # Whether the COMMIT took place is only known once the file could be opened again.
            while (active := self._active_on_disk()) is None:
                yield
            if active != new_id:
                raise

    def _swap(self, new_id: str, version: int, now: float) -> None:
        count = self._total()
        for name, key in ownkeys.held(self._keyring).items():
            self._store.write(ownkeys.ROWS[name], ownkeys.wrap(self._keyring, new_id, name, key))
        self._store.erase(UNFINISHED + self._snapshot.path.name)
        self._store.write(RETIRED_KEK + self._keyring.active.kek_id, {"since": timestamp(now)})
        self._store.activate(new_id, version, timestamp(now))
        self._store.swap({new_id: KekCount(version, count, timestamp(now))} if count else {})

    def _active_on_disk(self) -> str | None:
        try:
            with self._store.transaction():
                active = self._store.state().active
        except StoreUnavailable:
            return None
        return active.kek_id if active else ""

    def _take_over(self, new_id: str, version: int, old_id: str) -> None:
        self._keyring.activate(new_id, version)
        self._keyring.remove(old_id)

    def _end(self, new_id: str, committed: bool) -> None:
        if self._rewrapper is not None:
            self._rewrapper.close()
        self._store.mirror = self._rewrapper = self.progress = None
        if not committed and new_id not in self.coming:
            self._keyring.remove(new_id)
        if self._snapshot is not None:
            self._snapshot.close()


def refuse_retired(store: Store, kek_id: str) -> None:
    """Conflict where it was rotated out: whoever it was taken from may have lost it for that."""
    if store.read(RETIRED_KEK + kek_id) is not None:
        raise _in_use(kek_id, "was rotated out: no key must come under it again")


def refuse_spent(store: Store, kek_id: str) -> None:
    """Conflict where it has wrapped all it may."""
    if store.heavy().get(KEK_ROW + kek_id, 0) >= SPENT:
        raise refusal(KEK_ROW + kek_id)


def _in_use(kek_id: str, why: str) -> Conflict:
    fresh = "rotate to a fresh key: `progressdb-kms rotate-kek --generate`"
    return Conflict(f"the KEK {kek_id} {why}", code="kek_in_use", hint=fresh)


def _open_stored(keyring: Keyring, record: DekRecord, scratch: memoryview) -> memoryview:
    """The DEK, in `scratch`. Raises StoreDamaged, KekNotLoaded."""
    try:
        wrapped = envelope.stored(record.key_id, record.wrapped)
        with keyring.borrow(wrapped.kek_id) as kek:
            return envelope.unwrap(Aead(kek), wrapped, scratch)
    except AuthenticationFailed:
        raise StoreDamaged(
            f"the DEK of key {record.key_id} does not open under the KEK {record.kek_id} that it names",
            hint="run `progressdb-kms verify`; bring the key back with `restore --snapshot DIR --key ID`",
        ) from None
