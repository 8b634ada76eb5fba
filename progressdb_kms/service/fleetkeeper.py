"""The keeper of a host that is one of a fleet: loaded nowhere else.

What is different: a thread beside the keeper's loop keeps this host's place in the fleet (`fleet.host`), and
answers of changes wait for that thread to say that they hold on every host. The keyring has two writers then,
the loop and that thread, who adopts what other hosts have rotated to: `Place.ring` is held by whichever
works.

A change that was found done already waits as well: an earlier try may have done it and told nobody."""

from __future__ import annotations

import contextlib
import functools
import logging
import platform
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

from ..audit.log import FILE_NAME as AUDIT_LOG
from ..audit.tail import begun
from ..crypto.keyring import KekNotLoaded, Keyring, fingerprint
from ..crypto.memory import LockedBuffer
from ..errors import KeyMismatch, KMSError, OperatorError, StoreDamaged, StoreUnavailable
from ..fleet import schema
from ..fleet.board import Board
from ..fleet.engine import Link
from ..fleet.host import Host, run
from ..fleet.identity import Identity
from ..fleet.lease import BOOTTIME
from ..fleet.lease import Clock as FleetClock
from ..fleet.reader import FleetReader
from ..fleet.registry import EngineRegistry
from ..fleet.rows import Point, Sight
from ..fleet.settings import Where
from ..fleet.status import counted
from ..fleet.store import WRITER, Fenced, FleetStore
from ..journal import Matter
from ..store.seal import ActiveKek
from . import start
from .channel import Job, answer
from .clock import ROW as TRUSTED
from .clock import Clock, TrustedTime
from .common import Common
from .fleetdeks import FleetDeks
from .fleetkeks import FleetKeks
from .fleetkeys import Coming
from .fleetrotation import refuse_absent
from .fleetshredding import FleetShredding
from .fleetworker import patience
from .health import Health
from .keeper import MAX_BATCH, Done, Keeper, Outcome
from .plan import Configured
from .rotation import RETIRED_KEK, Steps

log = logging.getLogger("progressdb_kms")

EVERYWHERE = ("transition", "rewrap", "rotate")
"""Jobs whose answer means that all hosts act on it."""

TIDY_SECONDS = 10.0
"""How often a host looks for what a rotation left whose own host is dead."""

PROBE_SECONDS = 1.0
"""A try to write that failed sooner is made again before this host says that it isn't ready."""

SURVEY_SECONDS = 10.0
"""How old what readiness and metrics tell of the other hosts and of the engine may be."""

FIRST_SECONDS = 30.0
"""How long a start waits for its place in the fleet."""


class Place:
    """What the fleet does to this host; see `fleet.host.Local`."""

    def __init__(self, where: Where, host: str, keyring: Keyring, keys: Configured) -> None:
        self._where, self._host = where, host
        self._keyring, self.keys = keyring, keys
        self.ring = threading.RLock()
        self.inc = ""
        self.store: FleetStore | None = None

    def keks(self) -> frozenset[str]:
        """What was rotated out is in the memory no more, though a configuration may still name it; and the
        active one is there, though none may name it yet."""
        loaded = set(self._keyring.kek_ids())
        with contextlib.suppress(KekNotLoaded):
            return frozenset({self._keyring.active.kek_id, *self.keys.kek_ids} & loaded)
        return frozenset(self.keys.kek_ids & loaded)

    def registered(self, inc: str) -> None:
        self.inc = inc
        if self.store is not None:
            self.store.inc = inc

    def adopt(self, kek_id: str, version: int) -> None:
        with self.ring:
            if self.store is not None and self._keyring.active.kek_id != kek_id:
                active = self._agreed()
                kek_id, version = active.kek_id, active.version
            if kek_id and kek_id not in self._keyring.kek_ids():  # a new fleet has none yet
                raise KeyMismatch(
                    f"the fleet's active KEK {kek_id} is not configured on this host",
                    hint=f"the fleet was rotated: bring the key {kek_id} here from another host, let it be "
                    "the master key, and restart the daemon",
                )
            if self.store is not None:
                if self._keyring.active.kek_id != kek_id:
                    self._move(kek_id, version)
                self.store.acting = kek_id

    def _agreed(self) -> ActiveKek:
        """By a connection of its own: the store's may be at work for another thread."""
        link = Link(self._where, "progressdb-kms rotated")
        with contextlib.closing(FleetReader(link, self._host, self._keyring.row_key)) as reader:
            active = reader.agreed()
        if active is None:
            raise StoreDamaged(
                "the fleet's rows are gone", hint="restore a backup: `progressdb-kms help fleet`"
            )
        return active

    def _move(self, kek_id: str, version: int) -> None:
        """Another host has rotated: all DEKs are under this KEK now."""
        was = self._keyring.active.kek_id
        self._keyring.activate(kek_id, version)
        kept = {kek_id, *self.keys.previous} - {was}
        for other in self._keyring.kek_ids():
            if other not in kept:
                self._keyring.remove(other)
        log.info("another host has rotated the fleet's KEK to %s: it is the active one here, too", kek_id)


class FleetHealth(Health):
    _store: FleetStore

    def _probe(self) -> list[str]:
        """After a failover, or where another host was at the same rows, the first try finds that what it knew
        is old, and the second looks anew. Not where the engine was silent: that was waited for already. What
        was written a moment ago tells nothing here: others write, too."""
        self._next_probe = 0.0
        begun = time.monotonic()
        found = super()._probe()
        if found and not self._store.standing() and time.monotonic() - begun < PROBE_SECONDS:
            found = super()._probe()
        return found


class FleetKeeper(Keeper):
    """`open_keeper` makes one, and lets it `join`."""

    _kinds = FleetKeks, FleetShredding, FleetDeks, FleetHealth
    _store: FleetStore
    _keks: FleetKeks
    _deks: FleetDeks
    _shredding: FleetShredding

    def join(self, place: Place, member: Member, board: Board, coming: Coming, keyring: Keyring) -> None:
        self._place, self._member, self._board, self._coming = place, member, board, coming
        self._keyring = keyring
        self._beside = Matter(
            "what is done beside the calls waits: %s", "what is done beside the calls goes on"
        )
        self._survey: dict[str, Any] = {"warnings": []}
        self._next_survey = 0.0
        self._next_tidy = 0.0
        self._writes.update(create_many=self._deks.create_many, hello=self._hello)
        self._others.update(rotate=self._rotate, confirm=self._confirm, ready=self._ready)

    def reopen(self) -> None:
        with self._place.ring:
            self._place.keys = self._keks.renew(self._coming)
        self._member.host.tell_keks()
        super().reopen()

    # ---- the loop ------------------------------------------------------------------------------

    def _look(self) -> None:
        super()._look()
        self._keks.let_go(self._member.host.told, self._place.ring)
        if self._clock.monotonic() >= self._next_tidy and not self._store.trouble():
            self._next_tidy = self._clock.monotonic() + TIDY_SECONDS
            self._keks.look_for_abandoned()

    def round(self, timeout: float, wakeup: int = -1) -> None:
        """What is done beside the jobs asks the engine, too, which may be gone at any question; or somebody
        wrote there what is none of ours, which must not end the daemons of all hosts."""
        try:
            super().round(timeout, wakeup)
        except (StoreUnavailable, OperatorError) as error:
            self._beside.tell(error.line)
        else:
            self._beside.tell()

    def _waiting(self) -> Iterator[Job]:
        """One that makes many DEKs counts for as many jobs."""
        room = MAX_BATCH
        for job in super()._waiting():
            yield job
            room -= len(job.args.get("deks", (None,)))
            if room <= 0:
                return

    def _perform(self, jobs: list[Job]) -> None:
        with self._place.ring:
            super()._perform(jobs)

    def _advance(self) -> None:
        with self._place.ring:
            super()._advance()

    def _commit(self, jobs: list[Job]) -> list[Done]:
        """Where another host has rotated a moment ago, this one follows at once, and does them again: nothing
        took place. A KEK that came with one of them is gone by now."""
        named = [key_id for job in jobs for _, key_id in job.args.get("deks", ())]
        self._store.expect(filter(None, [*named, *(job.args.get("key_id") for job in jobs)]))
        try:
            return super()._commit(jobs)
        except Fenced as error:
            if not self._follow():
                raise
            brought = [job for job in jobs if "slot" in job.args]
            again = [job for job in jobs if "slot" not in job.args]
            return [*((job, error, []) for job in brought), *(super()._commit(again) if again else ())]

    def _follow(self) -> bool:
        """Has the fleet another active KEK? Of an old primary nothing is believed: versions grow."""
        found = self._store.fleet()
        if found.version <= self._keyring.active.version:
            return False
        try:
            self._place.adopt(found.active_kek, found.version)
        except OperatorError as error:
            raise StoreUnavailable(error.message, hint=error.hint) from None
        return True

    def _do(self, job: Job) -> Outcome:
        kek_id = job.args.get("new_kek_id") or job.args.get("kek_id")
        if kek_id:
            refuse_absent(self._member.sight().hosts, kek_id)
        return super()._do(job)

    def _hello(self, chain: str) -> dict[str, Any]:
        told = self._anchors.hello(chain)
        self._effects.append(functools.partial(self._board.met, int(chain.split(".")[1])))
        return told

    def _confirm(self, key_id: str) -> dict[str, Any]:
        """Is there really no such DEK? By a transaction that commits, which an old primary can't."""
        for _ in range(2):
            try:
                with self._store.transaction():
                    return {"there": self._store.get(key_id) is not None}
            except Fenced:
                if not self._follow():
                    raise
        raise StoreUnavailable("the fleet is rotated too often", hint="ask again")

    # ---- rotation ------------------------------------------------------------------------------

    def _rotate(
        self, new_kek: LockedBuffer | None = None, dry_run: bool = False, kek_id: str = ""
    ) -> Outcome:
        """To repeat it is no error: the answer of the first may have been that it is done, but not known
        everywhere."""
        active = self._keyring.active
        if not dry_run and active.kek_id == (kek_id or (new_kek and fingerprint(new_kek.view))):
            if new_kek is not None:
                new_kek.close()
            self._confirm("")  # so that the answer waits for all that has happened
            return {
                "status": "ok", "kek_id": active.kek_id, "kek_version": active.version, "rewrapped": 0,
                "backup": "",
            }  # fmt: skip
        return self._keks.rotate(new_kek, dry_run, kek_id)

    def _advance_task(self, steps: Steps, job: Job) -> None:
        super()._advance_task(steps, job)
        if self._task is None:
            self._shredding.hurry()

    def _answer(self, job: Job, outcome: Outcome) -> None:
        if job.op not in EVERYWHERE or not isinstance(outcome, dict):
            answer(job, outcome)
            return
        assert self._place.store is not None
        self._member.everywhere(self._place.store.point, functools.partial(_told, job, outcome))

    def _status(self) -> dict[str, Any]:
        due = self._store.span("erasure:")[0]  # until no host has their KEKs any more
        return {**super()._status(), "erasures_due": due, "fleet": self._told_of_fleet()}

    def _ready(self) -> dict[str, Any]:
        told = self._health.ready()
        reasons = filter(None, [self._member.host.why, *told["reasons"]])
        warnings = told["warnings"] + self._surveyed()["warnings"]
        return {**told, "reasons": list(dict.fromkeys(reasons)), "warnings": warnings}

    def _surveyed(self) -> dict[str, Any]:
        """Not asked for while the database is away: each question would only wait."""
        if time.monotonic() >= self._next_survey and not self._member.host.why:
            self._next_survey = time.monotonic() + SURVEY_SECONDS
            assert self._place.store is not None
            try:
                self._survey = self._place.store.survey()
            except KMSError as error:
                self._survey = {"warnings": [f"the fleet can't be looked at: {error.message}"]}
        return self._survey

    def _told_of_fleet(self) -> dict[str, float]:
        """The names are those of the metrics."""
        host, found = self._member.host, self._surveyed()
        lease = (self._board.lease.boot - time.clock_gettime_ns(BOOTTIME)) / 1e9
        told: dict[str, float] = {
            "lease_seconds": round(max(0.0, lease), 3),
            "placed": int(not host.why),
            "changes_total": host.waited.changes,
            "changes_unknown_total": host.waited.unknown,
            "changes_wait_seconds_total": round(host.waited.seconds, 6),
        }
        if "engine" in found:
            told.update(counted(found))
        return told

    def close(self) -> None:
        """The last transaction needs this host's place; nothing else does."""
        super().close()
        self._member.end()


def _told(job: Job, outcome: Outcome, error: KMSError | None) -> None:
    answer(job, error or outcome)


class Member:
    """The thread that keeps this host's place."""

    def __init__(self, where: Where, place: Place, board: Board, identity: Identity) -> None:
        self._where, self.span = where, where.fence_seconds
        engine = EngineRegistry(Link(where, "progressdb-kms host"), self.span)
        self.host = Host(identity, place, board, FleetClock(), engine.wake, self.span)
        self._thread = threading.Thread(target=run, args=(self.host, engine), name="fleet", daemon=True)
        self._thread.start()

    def sight(self) -> Sight:
        link = Link(self._where, "progressdb-kms census")
        with contextlib.closing(EngineRegistry(link, self.span)) as engine:
            return engine.sight()

    def everywhere(self, point: Point, then: Callable[[KMSError | None], None]) -> None:
        self.host.everywhere(point, time.monotonic() + patience(self.span), then)

    def wait_for(self, place: Place) -> None:
        """Raises what keeps this host out of the fleet, where no second try will mend it, or after a
        while."""
        deadline = time.monotonic() + FIRST_SECONDS
        while not place.inc or self.host.why:
            error = self.host.error
            if error is not None and (isinstance(error, OperatorError) or time.monotonic() > deadline):
                raise error
            time.sleep(0.01)

    def end(self) -> None:
        self.host.end()
        self._thread.join()


def open_keeper(
    where: Where,
    board: Board,
    coming: Coming,
    data_dir: Path,
    keyring: Keyring,
    keys: Configured,
    staging: memoryview,
    inbox: socket.socket,
    incarnation: int,
) -> tuple[Keeper, int]:
    """As `start.open_keeper`. Raises an OperatorError, StoreUnavailable."""
    clock = Clock()
    keys = coming.into(keyring, keys, lambda kek_id: False)
    schema.check(Link(where))
    host = start.host_id(data_dir)
    place = Place(where, host, keyring, keys)
    identity = Identity(data_dir, host, platform.node(), clock.reading().boot)
    member = Member(where, place, board, identity)
    with contextlib.ExitStack() as undo:
        undo.callback(member.end)
        member.wait_for(place)
        store = FleetStore(Link(where, WRITER + host), host, place.inc)
        if not store.state_of(host) and begun(data_dir / AUDIT_LOG):
            raise StoreDamaged(
                f"{where} knows nothing of this host, and {data_dir / AUDIT_LOG} tells of a fleet's store",
                hint="is it the right database? A host that goes to another fleet, or to one that was "
                "restored elsewhere, needs a data-dir of its own",
            )
        with place.ring:  # who rotates meanwhile is followed after it
            place.store = store
            _, book, epoch = start.open_store(data_dir, keyring, keys, incarnation, given=store, fleet=True)
            _drop_retired(store, keyring, keys)
            _take_time(store)
        store.standing = lambda: member.host.why
        common = Common(store, data_dir, keyring, book, TrustedTime(store, clock), [])
        keeper = FleetKeeper(common, keys, staging, inbox)
        keeper.join(place, member, board, coming, keyring)
        member.host.tell_keks()
        undo.pop_all()
    return keeper, epoch


def _take_time(store: FleetStore) -> None:
    """A host that is new has no trusted time, and its clock may be wrong: that of the others is its own, or
    it would shred at once what all of them have scheduled."""
    if store.read(TRUSTED) is None and (known := store.of_others(TRUSTED)):
        with store.transaction():
            store.write(TRUSTED, max(known, key=lambda row: float(row["trusted"])))


def _drop_retired(store: FleetStore, keyring: Keyring, keys: Configured) -> None:
    """A KEK that next_master_keys still names, and that was rotated out since."""
    needed = {keyring.active.kek_id, *store.keks()}
    for kek_id in keys.coming:
        if kek_id in keyring.kek_ids() and kek_id not in needed and store.read(RETIRED_KEK + kek_id):
            keyring.remove(kek_id)
