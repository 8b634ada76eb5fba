"""The keeper: the one process that writes.

A single loop, no locks:

- All jobs that wait are done in one transaction, each in its own savepoint, with one COMMIT: concurrent
  creates share a disk flush. Answers are sent after the COMMIT, and after what the readers must notice
  (keyring, generation) was changed.
- Long jobs (rotation, emptying old tables) are generators: a step between two rounds of the loop, and a
  rest after it while others want the core.
- A new KEK waits in a staging slot of the shared locked region, and the job names the slot and the kek_id.
  The keeper copies it, wipes the slot, compares the copy with the kek_id, and uses nothing but the copy.
- A job of which the answer can't be delivered was still done: every job may be repeated. Only one that brings
  a KEK isn't begun where its caller has given up: who was told "no answer" may have thrown that key away.
- A KEK that a failed job brought leaves the keyring; after a COMMIT of unknown outcome, once the store was
  read again and nothing in it needs that KEK.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union

from ..audit.log import AuditLog
from ..config.weakkeys import check_master_key
from ..crypto import envelope
from ..crypto.aead import KEY_SIZE, NONCE_SIZE, Aead
from ..crypto.keyring import Active, Keyring, fingerprint
from ..crypto.memory import LockedBuffer, random_into, wipe
from ..encoding import b64encode, new_key_id, timestamp
from ..errors import (
    AuditUnavailable,
    BadRequest,
    Conflict,
    InternalError,
    KeyShredded,
    KMSError,
    StoreUnavailable,
    WeakKey,
)
from ..store import snapshots
from ..store.contract import DekRecord, Usage
from ..store.pause import Pause
from ..store.policy import PENDING_DELETION, SHREDDED, TRANSITIONS, need_enabled
from ..store.sealed import Store
from ..store.sqlite import FILE_NAME
from . import keyfile
from .anchors import Anchors
from .channel import Job, answer, receive
from .clock import REMEDY, Clock, TrustedTime, overdue
from .lock import Files, publish
from .plan import Configured
from .rotation import Rewrapper, Rotation, Steps, refuse_retired, refuse_spent
from .shredding import Shredding
from .told import NAMED, Outage, attend
from .usage import LOST, SPENT, USING, dead, near

log = logging.getLogger(__name__)

MAX_BATCH = 256
"""Jobs of one transaction, and DEKs that are made in it: bounds how long the first of them waits."""

STAGING_SLOTS = 64
"""New KEKs under way at once, over all workers."""

TIDY_PAUSES = 1.0, 60.0
"""Tidying that failed is tried again after so many seconds, and after twice as many each time; at most."""

WRITE_PAUSES = 1.0, 30.0
"""How often a row is tried after writing one failed."""

REMIND_SECONDS = 86400.0
"""How often the journal is told of a KEK that is older than kek_max_age_days."""

REST = 8
"""After a step of long work during which others wanted this core: the pause, in times of what the step took
of it. It keeps the p99 of an encrypt beside a rotation within three times of its p99 alone; an idle machine
never waits."""

SHARE = 0.25
"""Of the time that a round's jobs took, for steps of long work beside them: else shreds, which wait for the
disk for each snapshot, would leave a rotation a step a second."""

LOOK_SECONDS = 1.0
"""How often the files are looked at beside what each COMMIT does; and whether all of the service's work can
be done, which is told where it changed."""

TROUBLED_SECONDS = 0.1
"""The least rest while the store can't be written: a step would only find that out again."""

RETIRE_ROWS = 500
"""Old rows deleted a step after a rotation."""


Outcome = Union[dict[str, Any], KMSError, Steps]
"""Of a job: its answer; or it goes on in steps, and its caller is answered at the end."""


class Done(NamedTuple):
    """A job that was carried out, and what is due between its COMMIT and its answer."""

    job: Job
    outcome: Outcome
    effects: list[Callable[[], None]]


class Keeper:
    """Owns the store; see the module. `open_keeper` in `start` makes one."""

    _answer = staticmethod(answer)
    _rotations: Any = Rotation
    _shreddings = Shredding

    def __init__(
        self,
        store: Store,
        data_dir: Path,
        keyring: Keyring,
        keys: Configured,
        staging: memoryview,
        audit: AuditLog,
        inbox: socket.socket,
        clock: Clock,
    ) -> None:
        self._store = store
        self._data_dir = data_dir
        self._keyring = keyring
        self._keys = keys
        self._staging = staging
        self._audit = audit
        self._inbox = inbox
        self._clock = clock
        self._time = TrustedTime(store, clock)
        self._memory = LockedBuffer(envelope.SCRATCH_SIZE)
        self._effects: list[Callable[[], None]] = []
        self._brought: set[str] = set()
        self._rotation: Rotation | None = None
        self._task: tuple[Steps, Job] | None = None
        self._retiring = True  # an earlier run may have left rows
        self._tidying = Pause(*TIDY_PAUSES)
        self._anchors = Anchors(store, audit, self._time)
        self._shredding = self._shreddings(
            store, data_dir, self._forget, self._time, audit.note, self._anchors.write
        )
        self._writing = Pause(*WRITE_PAUSES)
        self._outage = Outage()
        self._next_look = self._next_reminder = self._rest = 0.0
        self._lost = self._rescued = ""
        self._rescuing = Pause(*WRITE_PAUSES)
        self._rescuer: threading.Thread | None = None
        self._published: Files = {}
        self._counted: dict[str, int] = {}  # of each worker, by its chain: the last batch of uses
        self._told_near: dict[str, bool] = {}

    # ---- the loop ------------------------------------------------------------------------------

    def round(self, timeout: float, wakeup: int = -1) -> None:
        """One round: wait up to `timeout` seconds for jobs, do all that wait, and a step of the long work.

        `wakeup`: a descriptor that ends the wait (signals).
        """
        busy = self._task is not None or self._due_work() is not None
        watched = [self._inbox.fileno()] + ([wakeup] if wakeup >= 0 else [])
        select.select(watched, [], [], self._rest if busy else timeout)
        jobs, begun = list(self._waiting()), time.monotonic()
        if jobs:
            self._perform(jobs)
        if busy:
            self._advance_politely(SHARE * (time.monotonic() - begun))
        if self._clock.monotonic() >= self._next_look:
            self._watch()
            self._look()
        self._anchors.look()
        self._shredding.look()

    def _look(self) -> None:
        """Are the files that are open those that the next start would find? If not, rescue what is open."""
        self._next_look = self._clock.monotonic() + LOOK_SECONDS
        self._remind()
        why = self._store.lost()
        if why and not self._lost:
            log.error("%s: no change is made", why)
            self._rescued = ""
        elif self._lost and not why:
            log.info("the files of the store are in their places again")
        self._lost, alone = why, self._rescuer is None or not self._rescuer.is_alive()
        if why.startswith(FILE_NAME) and not self._rescued and alone and self._rescuing.over():
            self._rescuer = threading.Thread(target=self._save)
            self._rescuer.start()
        if not why and self._published != self._store.files():
            with contextlib.suppress(OSError):  # commands beside the daemon are not told, then
                publish(self._data_dir, self._store.files())
                self._published = self._store.files()

    def _save(self) -> None:
        """In a thread, since it may be long: meanwhile no transaction is begun. Tried until it is done: with
        the end of the daemon all is gone that no backup has."""
        attend("don't stop the daemon: what it holds can't be rescued now", self._rescue, self._rescuing)

    def _rescue(self) -> None:
        file = self._store.rescue(self._clock.now())
        self._rescued = f"what the daemon held is in {file}: stop it, then `progressdb-kms restore {file}`"
        log.error("%s", self._rescued)

    def _due_work(self) -> Callable[[], object] | None:
        """What is to be done beside the jobs, of what isn't left alone for a while because it failed."""
        tidy = self._tidy_later if self._retiring and self._tidying.over() else None
        return self._shredding.later() or tidy

    def _waiting(self) -> Iterator[Job]:
        room = MAX_BATCH
        while room > 0 and (job := receive(self._inbox)) is not None:
            room -= len(job.args.get("deks", "1"))
            yield job

    def _perform(self, jobs: list[Job]) -> None:
        writes = [job for job in jobs if job.op in _WRITES]
        done: list[Done] = []
        if writes:
            try:
                done = self._commit(writes)
            except KMSError as error:
                self._forget()  # whether it is on the disk isn't known: nothing may be remembered
                self._writing.failed(error.message)
                done = [Done(job, error, []) for job in writes]
        done += [Done(job, self._attempt(job), []) for job in jobs if job.op not in _WRITES]
        followed = [(job, self._follow_up(outcome, effects)) for job, outcome, effects in done]
        if any(_shreds(job) for job, _ in followed):
            self._shredding.now()
        for job, outcome in followed:
            if isinstance(outcome, Generator):
                self._task = (outcome, job)
            else:
                self._answer(job, self._erased(job, outcome))

    def _commit(self, jobs: list[Job]) -> list[Done]:
        done: list[Done] = []
        with self._store.transaction():
            for job in jobs:
                if job.head:
                    self._anchors.heard(job.head)
                self._effects = []
                try:
                    with self._store.savepoint():
                        outcome = self._do(job)
                    done.append(Done(job, outcome, self._effects))
                except StoreUnavailable:
                    raise
                except KMSError as error:
                    done.append(Done(job, error, []))
            self._anchors.write(any(job.op == "anchor" for job in jobs))
        if self._brought:
            self._remove_unneeded()
        return done

    def _attempt(self, job: Job) -> Outcome:
        try:
            return self._do(job)
        except KMSError as error:
            return error

    def _do(self, job: Job) -> Outcome:
        try:
            handler: Callable[..., Outcome] = getattr(self, job.op if job.op in _OPERATIONS else "")
            return handler(**(self._with_new_kek(job) if "slot" in job.args else job.args))
        except KMSError:
            raise
        except Exception:
            log.exception("the job %s failed", job.op)
            raise InternalError("the keeper failed; its log tells more") from None

    def _follow_up(self, outcome: Outcome, effects: list[Callable[[], None]]) -> Outcome:
        """What must hold before the answer leaves. It is committed: an error here is told, not undone."""
        for effect in effects:
            try:
                effect()
            except KMSError as error:
                outcome = error
        return outcome

    def _erased(self, job: Job, outcome: Outcome) -> Outcome:
        """The answer to a job: of a shred, whether every copy is gone."""
        if not _shreds(job) or isinstance(outcome, KMSError):
            return outcome
        return self._shredding.remains(job.args["key_id"]) or outcome

    def _advance_politely(self, share: float) -> None:
        """A step, or as many as fit into `share` seconds, and a rest where others wanted the core."""
        end, begun, pushed = time.monotonic() + share, time.thread_time(), _pushed_aside()
        self._advance()
        while self._task is not None and time.monotonic() < end and not self._store.trouble():
            self._advance()
        self._rest = REST * (time.thread_time() - begun) if _pushed_aside() != pushed else 0.0
        if self._store.trouble():
            self._rest = max(self._rest, TROUBLED_SECONDS)

    def _advance(self) -> None:
        """A step of the rotation; where there is none, of the tidying up."""
        if self._task is not None:
            self._advance_task(*self._task)
        elif (work := self._due_work()) is not None:
            work()

    def _advance_task(self, steps: Steps, job: Job) -> None:
        outcome: Outcome
        try:
            next(steps)
            return
        except StopIteration as stop:
            outcome = stop.value
        except KMSError as error:
            outcome = error
        except Exception:
            log.exception("the job %s failed", job.op)
            outcome = InternalError("the keeper failed; its log tells more")
        self._task = self._rotation = None
        self._retiring = True
        self._answer(job, outcome)

    def _tidy_later(self) -> None:
        attend("what a rotation left can't be removed now", self._tidy, self._tidying)

    def _tidy(self) -> None:
        with self._store.transaction(durable=False):
            self._store.staging(False)
            more = self._store.retire(RETIRE_ROWS)
        self._retiring = more or self._discard_unfinished_snapshot()

    def _discard_unfinished_snapshot(self) -> bool:
        """What rotations left that did not happen: known by a row each, or by a ledger without an end. True:
        there is more to do."""
        prefix = snapshots.UNFINISHED
        rows = self._store.names(prefix)
        named = (snapshots.place(self._data_dir, name[len(prefix) :]) for name in rows)
        left = [path for path in named if path is not None]
        for path in left or snapshots.unfinished(self._data_dir):
            if snapshots.discard(path, RETIRE_ROWS):
                return True
        if rows:
            with self._store.transaction():
                for name in rows:
                    self._store.erase(name)
        return False

    # ---- small jobs -------------------------------------------------------------------------------

    def reopen(self) -> None:
        """SIGHUP. Raises AuditUnavailable."""
        self._audit.reopen()

    def hello(self, chain: str) -> dict[str, Any]:
        """A worker introduces its audit chain, and gets to know that the keeper is up."""
        self._audit.note("chain_opened", opened=chain)
        lost = dead(chain, [name[len(USING) :] for name in self._store.names(USING)])
        self._store.count([(name, Usage(LOST * len(lost))) for name in self._store.heavy() if lost])
        for name in lost:
            self._store.erase(USING + name)
        self._store.write(USING + chain, {})
        self._effects.append(self._tell_near)
        return {}

    def accept_clock(self) -> dict[str, Any]:
        """The operator says that the wall clock is right."""
        self._effects.append(self._time.reload)
        return self._time.accept()

    def anchor(self, uses: dict[str, Any] | None = None, closed: str = "") -> dict[str, Any]:
        """The head that came with the job, and uses of keys, each batch once. `closed`: the chain of a worker
        that has none left."""
        if closed:
            self._store.erase(USING + closed)
        if uses and self._counted.get(uses["chain"]) != uses["number"]:
            self._store.count((key_id, Usage(*counts)) for key_id, *counts in uses["rows"])
            self._effects += [lambda: self._counted.update({uses["chain"]: uses["number"]}), self._tell_near]
        return {}

    def _tell_near(self) -> None:
        """Each key that comes near its limit, or is there, is a line of the journal once."""
        for key_id, count in self._store.heavy().items():
            if self._told_near.get(key_id) != (end := count >= SPENT):
                self._told_near[key_id] = end
                log.warning("%s", *near({key_id: count}))

    # ---- DEKs ------------------------------------------------------------------------------------

    def create(self, thread_id: str | None = None, key_id: str | None = None) -> dict[str, Any]:
        """Make a DEK, or give the one that this thread has under this key_id already: a caller that died
        between our answer and its own write asks again. Without a thread_id the DEK is its own thread."""
        now = self._clock.now()
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
        dek = self._memory.view[:KEY_SIZE]
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
        now = self._clock.now()
        if action == "shred":
            return self._shred(old, now)
        delete_at = timestamp(self._time.later(days * 86400)) if rule.target == PENDING_DELETION else ""
        record = old._replace(state=rule.target, delete_at=delete_at)
        if record != old:
            self._change(old, record)
        return describe(record)

    def _change(self, old: DekRecord, record: DekRecord) -> None:
        self._store.put(record)
        self._shredding.index(old, record)
        self._effects.append(self._forget)

    def _shred(self, old: DekRecord, now: float) -> dict[str, Any]:
        """Repeating it makes sure again: the caller may have been told that copies remained."""
        record = self._shredding.mark(old, now) if old.state != SHREDDED else old
        if record is not old or self._shredding.noted(old.key_id):
            self._effects.append(self._forget)
            self._effects.append(lambda: self._shredding.soon({old.key_id: old.wrapped}))
        return describe(record)

    def rewrap(self, key_id: str, new_kek: LockedBuffer) -> dict[str, Any]:
        """Move one DEK, which may be used, to another KEK, which joins the keyring."""
        with new_kek:
            old = self._store.existing(key_id)
            need_enabled(key_id, old.state)  # who brings a KEK that he knows is handed the DEK
            self._refuse_beside_rotation()
            active = self._keyring.active
            target = fingerprint(new_kek.view)
            refuse_retired(self._store, target)
            refuse_spent(self._store, target)
            row = self._store.keks().get(target)
            version = active.version if target == active.kek_id else row.version if row else 0
            if target not in self._keyring.kek_ids():
                self._brought.add(self._keyring.install(new_kek.view, version))
            mover = Rewrapper(self._keyring, target, version)
        with contextlib.closing(mover):
            record = mover.records([old])[0]
        self._change(old, record)
        wrapped = b64encode(record.wrapped)
        result = {"key_id": key_id, "kek_id": target, "kek_version": version, "wrapped": wrapped}
        if target != active.kek_id and target not in self._configured():
            result["warning"] = _next_start(target)
            if old.kek_id != target and self._store.keks()[target].deks == 1:  # the first of them
                self._effects.append(lambda: log.warning("%s", result["warning"]))
        return result

    def _configured(self) -> set[str]:
        """The KEKs that the next start has, as far as can be known."""
        return self._keys.kek_ids | keyfile.kek_ids(self._keys.key_file)

    def _forget(self) -> None:
        """What the workers remember of the store is old."""
        self._keyring.touch()

    # ---- rotation ----------------------------------------------------------------------------------

    def rotate(self, new_kek: LockedBuffer | None = None, dry_run: bool = False, kek_id: str = "") -> Outcome:
        """To a KEK that the job brought, or that is configured for it: `kek_id` names that."""
        new_kek = new_kek or self._coming(kek_id)
        try:
            self._refuse_beside_rotation()
        except Conflict:
            new_kek.close()
            raise
        self._rotation = self._rotations(self._store, self._keyring, self._data_dir)
        return self._rotate(self._rotation, new_kek, dry_run)

    def _refuse_beside_rotation(self) -> None:
        if self._rotation is not None:
            hint = "GET /status tells how far it is"
            raise Conflict("a rotation is under way", code="rotation_in_progress", hint=hint)

    def _coming(self, kek_id: str) -> LockedBuffer:
        """A copy of it."""
        raise Conflict(f"the KEK {kek_id} is not in next_master_keys here", code="kek_not_everywhere")

    def _rotate(self, rotation: Rotation, new_kek: LockedBuffer, dry_run: bool) -> Steps:
        with new_kek:
            if dry_run:
                return (yield from rotation.dry_run(new_kek.view))
            target = fingerprint(new_kek.view)
            self._audit.note("rotation_started", new_kek_id=target)
            log.info("a rotation to the KEK %s begins", target)
            try:
                result = yield from rotation.run(new_kek.view)
            except KMSError as error:
                log.error("the rotation to the KEK %s failed, nothing was changed: %s", target, error.message)
                self._audit.note("rotation_failed", "failed", new_kek_id=target, code=error.code)
                raise
            log.info("the rotation to the KEK %s is done: %d DEKs", target, result["rewrapped"])
            self._audit.note("rotation_finished", new_kek_id=target, rewrapped=result["rewrapped"])
            if target not in self._configured():
                result["warning"] = _next_start(target, master=True)
                log.warning("%s", result["warning"])
            return result

    def _with_new_kek(self, job: Job) -> dict[str, Any]:
        """The arguments of a job that brings a KEK, with a copy of it in place of its slot's number."""
        args = dict(job.args)
        slot, kek_id = args.pop("slot"), args.pop("new_kek_id")
        staged = self._staging[slot * KEY_SIZE : (slot + 1) * KEY_SIZE]
        copy = LockedBuffer(KEY_SIZE)
        copy.view[:] = staged
        try:
            if fingerprint(copy.view) != kek_id:  # of another job by now: its worker died
                raise Conflict("the new KEK is not there any more: nothing was changed", hint="send it again")
            wipe(staged)
            if job.abandoned:
                raise Conflict("the caller has given up: nothing was changed")
            check_master_key(copy.view)
        except KMSError as error:
            copy.close()
            if isinstance(error, WeakKey):
                raise BadRequest.invalid("new_kek_hex", f"can't be a KEK: {error.message}") from None
            raise
        return {**args, "new_kek": copy}

    def _remove_unneeded(self) -> None:
        """KEKs that jobs brought, but no stored DEK is under. The store was just read or written."""
        for kek_id in self._brought - set(self._store.keks()) - {self._keyring.active.kek_id}:
            self._keyring.remove(kek_id)
        self._brought.clear()

    # ---- what others ask -------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        progress = self._rotation.progress if self._rotation else None
        return {
            "rotation": progress._asdict() if progress else None,
            "erasures_due": self._shredding.count(),
            "erasures_held": self._time.look().held,
        }

    def ready(self) -> dict[str, Any]:
        """What keeps the service from doing all of its work, in words."""
        audit = list(self._audit.reasons())
        reasons: list[str] = list(audit)
        warnings: list[str] = []
        active, configured = self._keyring.active.kek_id, self._configured()
        loaded = {active, *self._keyring.kek_ids()}
        if active not in configured:
            warnings.append(_next_start(active, master=True))
        for kek_id, row in self._store.keks().items():
            if kek_id not in loaded:
                absent = f"the KEK {kek_id} is not loaded, and {row.deks} stored DEKs need it"
                (warnings if self._keys.allow_missing else reasons).append(absent)
            elif kek_id not in configured and kek_id != active:
                warnings.append(f"{_next_start(kek_id)} ({row.deks} DEKs)")
        if old := self._overdue_kek():
            warnings.append(old)
        if held := self._time.look().held:
            warnings.append(f"scheduled deletions are held: {held} ({REMEDY})")
        if not (store := self._probe()):  # else it may not be readable either
            warnings += near(self._store.heavy())[:NAMED]
        told = {"reasons": reasons + store, "warnings": warnings}
        return {**told, "audit_writable": not audit, "store_writable": not store}

    def _probe(self) -> list[str]:
        """Why no row can be written: a full disk lets an empty transaction pass."""
        try:
            with self._store.transaction():
                self._store.write("probe", {"at": timestamp(self._clock.now())})
                self._anchors.write()
        except StoreUnavailable as error:
            self._writing.failed(error.message)
            return [error.message, *filter(None, [self._lost and (self._rescued or self._rescuing.why)])]
        self._writing.worked()
        return []

    # ---- what the journal is told ----------------------------------------------------------------------

    def _watch(self) -> None:
        """One line where the service stops being ready, and one where it is again; never one a call."""
        reasons = []
        try:
            self._audit.check()
        except AuditUnavailable as error:
            reasons.append(error.told)
        if self._writing.why and self._writing.over():
            self._probe()
        if why := self._lost or self._writing.why or self._store.trouble():
            reasons.append(why)
        self._outage.tell(reasons)
        self._shredding.tell()

    def _overdue_kek(self) -> str:
        return overdue(self._store.state().active, self._clock.now(), self._keys.max_age_days)

    def _remind(self) -> None:
        """Of a KEK that is too old: when it has become that, and each day after."""
        why, now = self._overdue_kek(), self._clock.monotonic()
        if not why:
            self._next_reminder = now
        elif now >= self._next_reminder:
            self._next_reminder = now + REMIND_SECONDS
            log.warning("%s", why)

    def close(self) -> None:
        """The last transaction holds the last heads; where the disk takes none, the next start finds that."""
        try:
            self._audit.note("stop")
            self._anchors.close()
        except (StoreUnavailable, AuditUnavailable) as error:
            log.error("the end is not in the store or the audit log: %s", error.message)
        if self._store.lost():
            self._look()
        if self._rescuer is not None:
            self._rescuer.join()
            if self._rescuing.why:
                self._save()
        self._store.close()
        self._audit.close()
        self._memory.close()


_WRITES = frozenset(("hello", "accept_clock", "anchor", "create", "create_many", "transition", "rewrap"))
_OPERATIONS = _WRITES | {"rotate", "status", "ready", "confirm"}
"""What a job may be, each a method of this name; the first in a transaction that all of a round share."""


def _next_start(kek_id: str, master: bool = False) -> str:
    do = "no configured file holds it, make it the master key" if master else "add it to previous_master_keys"
    return f"the next start needs the KEK {kek_id}: {do}"


def describe(record: DekRecord) -> dict[str, Any]:
    """A DEK as the API tells of it: everything but the wrapped bytes."""
    result: dict[str, Any] = {
        "key_id": record.key_id,
        "thread_id": record.thread_id,
        "state": record.state,
        "kek_id": record.kek_id,
        "kek_version": str(record.kek_version),
        "created_at": record.created_at,
    }
    times = ("delete_at", record.delete_at), ("shredded_at", record.shredded_at)
    return {**result, **{name: time for name, time in times if time}}


def described(record: DekRecord) -> dict[str, Any]:
    return {**describe(record), "wrapped": b64encode(record.wrapped)}


def same(record: DekRecord, thread_id: str) -> DekRecord:
    """The DEK that is there already. Raises KeyShredded, Conflict (another thread's), KeyDisabled."""
    if record.state != SHREDDED and record.thread_id != thread_id:
        raise Conflict(f"the key_id {record.key_id} is taken by another thread", code="key_exists")
    need_enabled(record.key_id, record.state)
    return record


def _shreds(job: Job) -> bool:
    return job.op == "transition" and job.args["action"] == "shred"


def _pushed_aside() -> int:
    """How often this process lost its core to another one that wanted it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
