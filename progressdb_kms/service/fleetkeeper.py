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
from pathlib import Path
from typing import Any, Callable

from ..crypto.keyring import Keyring
from ..errors import Conflict, KeyMismatch, KMSError, OperatorError
from ..fleet import barrier, schema
from ..fleet.board import Board
from ..fleet.engine import Link
from ..fleet.host import Host, run
from ..fleet.identity import Identity
from ..fleet.lease import Clock as FleetClock
from ..fleet.registry import Engine
from ..fleet.rows import Point, Sight
from ..fleet.settings import Where
from ..fleet.store import FleetStore
from . import start
from .channel import Job, answer
from .clock import Clock
from .fleetworker import patience
from .keeper import Keeper, Long, Outcome
from .plan import Configured

log = logging.getLogger("progressdb_kms")

EVERYWHERE = ("transition", "rewrap", "rotate")
"""Jobs whose answer means that all hosts act on it."""

FIRST_SECONDS = 30.0
"""How long a start waits for its place in the fleet."""


class Place:
    """What the fleet does to this host; see `fleet.host.Local`."""

    def __init__(self, keyring: Keyring, keys: Configured) -> None:
        self._keyring, self._keys = keyring, keys
        self.ring = threading.RLock()
        self.inc = ""
        self.store: FleetStore | None = None

    def keks(self) -> frozenset[str]:
        return frozenset(self._keys.kek_ids)

    def registered(self, inc: str) -> None:
        self.inc = inc
        if self.store is not None:
            self.store.inc = inc

    def adopt(self, kek_id: str, version: int) -> None:
        if not kek_id:
            return  # a fleet that has none yet
        with self.ring:
            if kek_id not in self._keyring.kek_ids():
                raise KeyMismatch(
                    f"the fleet's active KEK {kek_id} is not configured on this host",
                    hint=f"let its master key be {kek_id}, and restart the daemon",
                )
            if self.store is not None and self._keyring.active.kek_id != kek_id:
                self._move(self.store, kek_id, version)

    def _move(self, store: FleetStore, kek_id: str, version: int) -> None:
        """Another host has rotated: all DEKs are under this KEK now."""
        self._keyring.activate(kek_id, version)
        store.acting = kek_id
        for other in self._keyring.kek_ids():
            if other not in {kek_id, *(key.kek_id for key in self._keys.previous)}:
                self._keyring.remove(other)
        log.info("another host has rotated the fleet's KEK to %s: it is the active one here, too", kek_id)


class FleetKeeper(Keeper):
    """`open_keeper` makes one, and lets it `join`."""

    def join(self, place: Place, member: Member) -> None:
        self._place, self._member = place, member

    def _perform(self, jobs: list[Job]) -> None:
        with self._place.ring:
            super()._perform(jobs)

    def _advance(self) -> None:
        with self._place.ring:
            super()._advance()

    def _do(self, job: Job) -> Outcome:
        if job.op == "confirm":
            return self._confirm(**job.args)
        if "new_kek_id" in job.args:
            self._census(job.args["new_kek_id"])
        if job.op == "rotate":
            raise Conflict("the KEK of a fleet can't be rotated by this release", code="not_in_a_fleet")
        return super()._do(job)

    def _confirm(self, key_id: str) -> dict[str, Any]:
        """Is there really no such DEK? By a transaction that commits, which an old primary can't."""
        with self._store.transaction():
            return {"there": self._store.get(key_id) is not None}

    def _census(self, kek_id: str) -> None:
        """A KEK that another host doesn't have would close DEKs there."""
        absent = barrier.without_kek(self._member.sight().hosts, kek_id)
        if absent:
            raise Conflict(
                f"the KEK {kek_id} is not configured on every host of the fleet: {', '.join(absent)}",
                code="kek_not_everywhere",
                hint="add it to previous_master_keys there, and restart these daemons",
            )

    def _answer(self, job: Job, outcome: Outcome) -> None:
        if job.op not in EVERYWHERE or isinstance(outcome, (KMSError, Long)):
            answer(job, outcome)
            return
        assert self._place.store is not None
        self._member.everywhere(self._place.store.point, functools.partial(_told, job, outcome))

    def ready(self) -> dict[str, Any]:
        told = super().ready()
        reasons = filter(None, [self._member.host.why, *told["reasons"]])
        return {**told, "reasons": list(dict.fromkeys(reasons))}

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
        engine = Engine(Link(where, "progressdb-kms host"), self.span)
        self.host = Host(identity, place, board, FleetClock(), engine.wake, self.span)
        self._thread = threading.Thread(target=run, args=(self.host, engine), name="fleet", daemon=True)
        self._thread.start()

    def sight(self) -> Sight:
        with contextlib.closing(Engine(Link(self._where, "progressdb-kms census"), self.span)) as engine:
            return engine.sight()

    def everywhere(self, point: Point, then: Callable[[KMSError | None], None]) -> None:
        self.host.everywhere(point, time.monotonic() + patience(self.span), then)

    def wait_for(self, place: Place) -> None:
        """Raises what keeps this host out of the fleet, where no second try will mend it, or after a
        while."""
        deadline = time.monotonic() + FIRST_SECONDS
        while not place.inc:
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
    data_dir: Path,
    keyring: Keyring,
    keys: Configured,
    staging: memoryview,
    inbox: socket.socket,
    incarnation: int,
) -> tuple[Keeper, int]:
    """As `start.open_keeper`. Raises an OperatorError, StoreUnavailable."""
    clock = Clock()
    schema.check(Link(where))
    host = start.host_id(data_dir)
    place = Place(keyring, keys)
    identity = Identity(data_dir, host, platform.node(), clock.reading().boot)
    member = Member(where, place, board, identity)
    with contextlib.ExitStack() as undo:
        undo.callback(member.end)
        member.wait_for(place)
        store = FleetStore(Link(where), host, place.inc)
        store.standing = lambda: member.host.why
        place.store = store
        _, book, epoch = start.open_store(data_dir, keyring, keys, incarnation, fleet=store)
        keeper = FleetKeeper(store, data_dir, keyring, keys, staging, book, inbox, clock)
        keeper.join(place, member)
        undo.pop_all()
    return keeper, epoch
