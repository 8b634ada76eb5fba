"""The service of a worker whose host is one of a fleet: loaded nowhere else.

What is different: other hosts change rows, too. So what is remembered follows the board of this host, change
by change; each call needs the host's lease, when it begins and when it ends; what the engine says counts as
long as the engine isn't behind; and that there is no such DEK is believed to a transaction that commits,
since an old primary doesn't know of the newest. See `fleet.lease` and `fleet.board` for why."""

from __future__ import annotations

from collections.abc import Sequence
from time import clock_gettime_ns, time_ns
from typing import Any, Callable, TypeVar

from ..crypto.envelope import Wrapped
from ..encoding import json_dumps
from ..errors import KeyNotFound, StoreUnavailable, Unavailable
from ..fleet.board import BOOT, FLUSHES, SEEN, WALL, Board, Follower
from ..fleet.lease import BOOTTIME, margin
from ..fleet.reader import FleetReader
from ..fleet.rows import Point, Wanted
from ..store.contract import DekRecord
from .channel import MAX_JOB, Staged, outcome
from .fleetgauges import FAMILIES
from .service import YOUNG, Batch, Entry, Readiness, Results, Service, usable
from .usage import NOBODY

BARRIER_SPARE = 20.0
"""Seconds that a change may take beside the wait for a host that is dead."""

T = TypeVar("T")

_worked = Service._with_dek  # found once: each call of a worker comes by here


class FleetService(Service):
    families = FAMILIES

    def __init__(
        self, board: Board, span: float, reader: FleetReader, *args: Any, everywhere: Callable[[], bool]
    ) -> None:
        """`span`: fence_seconds; `args`: as of Service; `everywhere`: do all workers of this host know that
        there is a store?"""
        unasked: Any = _Unasked()
        super().__init__(unasked, *args)
        self._reader, self._known, self._everywhere = reader, False, everywhere
        self._serves, self._words, self._span = board.serves, board.words, span
        self._rows = reader
        self._follower: Follower[Entry | None] = Follower(board, YOUNG)
        self._absent: Follower[bool] = Follower(board, YOUNG)

    def readiness(self) -> Readiness:
        """Who asks next may get to another worker, which hears a moment later that the database is there."""
        found = super().readiness()
        if found.reasons or self._everywhere():
            return found
        return found._replace(reasons=["not every process of this host has heard of the store yet"])

    def _serving(self) -> None:
        if not self._serves(clock_gettime_ns(BOOTTIME), time_ns()):
            raise Unavailable(
                "this host can't be sure of what other hosts have changed: it has no word of the database",
                code="store_unreachable",
                hint="it is tried again by itself: /readyz tells why",
            )

    def _know(self) -> None:
        """Which keys may do no more, before any is used: a worker may begin while the database is away."""
        if not self._known:
            self.uses.taken(self._rows.heavy())
            self._known = True

    # ---- finding a DEK -----------------------------------------------------------------------------

    def entry(self, key_id: str) -> Entry:
        words, follower = self._words, self._follower
        if clock_gettime_ns(BOOTTIME) >= words[BOOT] or time_ns() >= words[WALL]:
            self._serving()
        followed = words[SEEN] == follower.gen and words[FLUSHES] == follower.flushes
        found = follower.young.get(key_id) if followed else None
        if found is None:
            found = follower.get(key_id)
        if found is not None and found[0] == self.keyring.generation:
            return found
        return self._fetched(key_id)

    def _fetched(self, key_id: str) -> Entry:
        known, generation = self._follower.follow(), self.keyring.generation
        record, point = self._row(key_id, known)
        found = usable(generation, record)
        self._follower.remember(key_id, found, point)
        return found

    def record(self, key_id: str) -> DekRecord:
        self._serving()
        return self._row(key_id, self._follower.follow())[0]

    def _row(self, key_id: str, known: Point) -> tuple[DekRecord, Point]:
        """Raises KeyNotFound: the primary says so, by a transaction that it could commit."""
        record, point = self._read(key_id, known)
        if record is None:
            if self._keeper.call("confirm", {"key_id": key_id}, None, 10.0)["there"]:
                raise self._behind()
            raise KeyNotFound(f"there is no key {key_id}")
        return record, point

    def _read(self, key_id: str, known: Point) -> tuple[DekRecord | None, Point]:
        self._know()
        record, point = self._rows.at(key_id)
        if not point.covers(known):
            raise self._behind()
        return record, point

    def _behind(self) -> StoreUnavailable:
        self._rows.drop()
        return StoreUnavailable("a server of the database is behind, and was left", hint="ask again")

    def thread_of(self, key_id: str) -> str | None:
        self._serving()
        known = self._follower.follow()
        found = self._follower.get(key_id)
        if found is not None:
            return found.thread_id
        record, _ = self._read(key_id, known)
        return record.thread_id if record is not None else None

    def allow(self, key_id: str) -> None:
        """A DEK that was made since it was found absent is enabled: to a blob of the caller's own that makes
        no difference, until it is changed; and then the board says so."""
        self._serving()
        known = self._absent.follow()
        if self._absent.get(key_id):
            return
        record, point = self._read(key_id, known)
        if record is None:
            self._absent.remember(key_id, True, point)
        else:
            usable(0, record)

    # ---- the lease must hold at the end, too -----------------------------------------------------------

    def _with_dek(self, dek: Entry, scratch: memoryview, work: Callable[..., T], *args: Any) -> T:
        done = _worked(self, dek, scratch, work, *args)
        words = self._words
        if clock_gettime_ns(BOOTTIME) >= words[BOOT] or time_ns() >= words[WALL]:
            self._serving()
        return done

    def _many(self, items: Batch, *args: Any) -> Results:
        done = super()._many(items, *args)
        self._serving()
        return done

    def open_embedded(self, message: bytes, scratch: memoryview) -> bytes:
        self._serving()
        done = super().open_embedded(message, scratch)
        self._serving()
        return done

    def wrap(self, dek: memoryview, key_id: str | None, uid: int = NOBODY) -> tuple[bytes, str, int, str]:
        self._serving()
        self._know()
        done = super().wrap(dek, key_id, uid)
        self._serving()
        return done

    def unwrap(self, wrapped: Wrapped, scratch: memoryview, uid: int = NOBODY) -> memoryview:
        self._serving()
        done = super().unwrap(wrapped, scratch, uid)
        self._serving()
        return done

    def page(self, after: str, limit: int, thread_id: str | None) -> list[DekRecord]:
        self._serving()
        return super().page(after, limit, thread_id)

    # ---- changes -----------------------------------------------------------------------------------

    def anchor(self, last: bool = False) -> None:
        self.uses.chain = self.audit.chain  # of a worker that began without a store, it is known since then
        super().anchor(last)

    def create_many(self, deks: Sequence[Wanted]) -> list[dict[str, Any] | Exception]:
        """Make these DEKs: of each what was made, or why not."""
        if len(deks) > 1 and len(json_dumps(deks)) > MAX_JOB // 2:
            half = len(deks) // 2
            return self.create_many(deks[:half]) + self.create_many(deks[half:])
        try:
            return [outcome(one) for one in self.change("create_many", deks=deks)["made"]]
        except Exception as error:
            return [error] * len(deks)

    def change(
        self, op: str, timeout: float | None = 30.0, new_kek: Staged | None = None, **args: Any
    ) -> dict[str, Any]:
        """Waits for a host that is dead, where it must: that is so long, once."""
        if op == "create":
            (made,) = self.create_many([(args["thread_id"], args["key_id"])])
            if isinstance(made, Exception):
                raise made
            return made
        if timeout is not None:
            timeout = max(timeout, patience(self._span) + BARRIER_SPARE)
        return super().change(op, timeout, new_kek, **args)


class _Unasked:
    """In a reader's place while a worker is made."""

    def heavy(self) -> dict[str, int]:
        return {}


def patience(span: float) -> float:
    """Seconds that a change waits for other hosts: until the last of them was fenced."""
    return span + 2 * margin(span) + BARRIER_SPARE / 2
