"""The keeper: the one process that writes.

A single loop, no locks. What it does to DEKs and KEKs is in `deks`, `keks`, `rotation` and `shredding`, what
it looks at beside that in `health` and `anchors`; here is when:

- All jobs that wait are done in one transaction, each in its own savepoint, with one COMMIT: concurrent
  creates share a disk flush. Answers are sent after the COMMIT, and after what the readers must notice
  (keyring, generation) was changed.
- Long jobs (rotation, emptying old tables) are generators: a step between two rounds of the loop, and a
  rest after it while others want the core.
- A job of which the answer can't be delivered was still done: every job may be repeated.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import resource
import select
import socket
import time
from collections.abc import Generator, Iterator
from typing import Any, Callable, Union

from ..errors import AuditUnavailable, InternalError, KMSError, StoreUnavailable, Unavailable
from .anchors import Anchors
from .channel import Job, answer, receive, taken
from .common import Common
from .deks import Deks
from .health import Health
from .keks import Keks
from .plan import Configured
from .rotation import Steps
from .shredding import Shredding

log = logging.getLogger(__name__)

MAX_BATCH = 256
"""Jobs of one transaction: bounds how long the first of them waits."""

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


Outcome = Union[dict[str, Any], KMSError, Steps]
"""Of a job: its answer; or it goes on in steps, and its caller is answered at the end."""

Operations = dict[str, Callable[..., Outcome]]

Done = tuple[Job, Outcome, list[Callable[[], None]]]
"""A job that was carried out, and what is due between its COMMIT and its answer."""


class Keeper:
    """Owns the store; see the module. `open_keeper` in `start` makes one."""

    _answer = staticmethod(answer)
    _kinds: tuple[type[Keks], type[Shredding], type[Deks], type[Health]] = Keks, Shredding, Deks, Health
    """What it is made of; in a fleet other ones are."""

    def __init__(self, common: Common, keys: Configured, staging: memoryview, inbox: socket.socket) -> None:
        keks, shredding, deks, health = self._kinds
        self._store, self._audit, self._effects = common.store, common.audit, common.effects
        self._clock, self._time = common.time.clock, common.time
        self._staging, self._inbox = staging, inbox
        self._task: tuple[Steps, Job] | None = None
        self._next_look = self._rest = 0.0
        self._anchors = Anchors(common)
        self._keks = keks(common, keys)
        self._shredding = shredding(common, self._keks, self._anchors)
        self._deks = deks(common, self._keks, self._shredding)
        self._health = health(common, self._keks, self._anchors)
        self._writes: Operations = {
            "hello": self._anchors.hello, "anchor": self._anchors.anchor, "accept_clock": self._accept_clock,
            "create": self._deks.create, "transition": self._deks.transition, "rewrap": self._deks.rewrap,
        }  # fmt: skip
        self._others: Operations = {
            "rotate": self._keks.rotate, "status": self._status, "ready": self._health.ready,
        }  # fmt: skip
        """What a job may be. Those that write are done in a transaction that all of a round share."""

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
            self._look()
        self._anchors.look()
        self._shredding.look()

    def _look(self) -> None:
        self._health.tell()
        self._shredding.tell()
        self._next_look = self._clock.monotonic() + LOOK_SECONDS
        self._health.look()

    def _due_work(self) -> Callable[[], object] | None:
        """What is to be done beside the jobs, of what isn't left alone for a while because it failed."""
        return self._shredding.later() or self._keks.later()

    def _waiting(self) -> Iterator[Job]:
        return itertools.islice(iter(lambda: receive(self._inbox), None), MAX_BATCH)

    def _perform(self, jobs: list[Job]) -> None:
        writes = [job for job in jobs if job.op in self._writes]
        try:
            done = self._commit(writes) if writes else []
        except KMSError as error:
            self._keks.forget()  # whether it is on the disk isn't known: nothing may be remembered
            self._health.failed(error)
            done = [(job, error, []) for job in writes]
        done += [self._attempt(job) for job in jobs if job.op not in self._writes]
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
                done.append(self._attempt(job, self._store.savepoint))
            self._anchors.write(any(job.op == "anchor" for job in jobs))
        self._keks.remove_unneeded()
        return done

    def _attempt(self, job: Job, part: Callable[[], Any] | None = None) -> Done:
        """Raises StoreUnavailable where it is a part of a transaction, which can't go on then."""
        self._effects.clear()
        try:
            with part() if part else contextlib.nullcontext():
                return job, self._do(job), [*self._effects]
        except KMSError as error:
            if part and isinstance(error, StoreUnavailable):
                raise
            return job, error, []

    def _do(self, job: Job) -> Outcome:
        try:
            work = self._writes.get(job.op) or self._others[job.op]
            return work(**(taken(job, self._staging) if "slot" in job.args else job.args))
        except KMSError:
            raise
        except OSError as error:  # of the system, not of the code: no descriptor is left, for one
            raise Unavailable(f"the keeper can't do that now: {error.strerror}", hint="ask again") from error
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

    # ---- long work -----------------------------------------------------------------------------

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
        self._task = None
        self._answer(job, outcome)

    # ---- small jobs ----------------------------------------------------------------------------

    def reopen(self) -> None:
        """SIGHUP. Raises AuditUnavailable."""
        self._audit.reopen()

    def _accept_clock(self) -> dict[str, Any]:
        """The operator says that the wall clock is right."""
        self._effects.append(self._time.reload)
        return self._time.accept()

    def _status(self) -> dict[str, Any]:
        rotation, due, held = self._keks.rotation, len(self._shredding.due), self._time.look().held
        return {"rotation": rotation and rotation.progress, "erasures_due": due, "erasures_held": held}

    def close(self) -> None:
        """The last transaction holds the last heads; where the disk takes none, the next start finds that."""
        try:
            self._audit.note("stop")
            self._anchors.close()
        except (StoreUnavailable, AuditUnavailable) as error:
            log.error("the end is not in the store or the audit log: %s", error.message)
        for part in (self._health, self._store, self._audit, self._deks):
            part.close()


def _shreds(job: Job) -> bool:
    return job.op == "transition" and job.args["action"] == "shred"


def _pushed_aside() -> int:
    """How often this process lost its core to another one that wanted it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
