"""An engine in memory, with the transactions of the simulation: for hosts in real threads, and step by
step."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from progressdb_kms.errors import StoreUnavailable
from progressdb_kms.fleet.board import SIZE, Board
from progressdb_kms.fleet.host import Host
from progressdb_kms.fleet.lease import Clock, Reading
from progressdb_kms.fleet.rows import FleetRow, News, Point, Sight
from tests.fleet.simulation import Db, Transactions

SPAN = 60.0


class Database:
    """What several registries share."""

    def __init__(self) -> None:
        self.db = Db(0, "k1", 1, 1, {}, (), {})
        self.lock = threading.Lock()
        self.asked: list[str] = []
        self.away = False
        self.transactions = Transactions(())

    def do(self, name: str, *args: Any) -> Any:
        with self.lock:
            self.asked.append(name)
            if self.away:
                raise StoreUnavailable("the engine is away")
            self.db, answer = getattr(self.transactions, name)(self.db, *args)
            return answer


class Twin:
    """A registry."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.dropped = 0
        self._woken = threading.Event()

    def register(
        self, host: str, inc: str, name: str, keks: frozenset[str], gone: Sequence[str] = ()
    ) -> FleetRow:
        row: FleetRow = self.database.do("register", host, inc, name, keks, list(gone))
        return row

    def beat(self, host: str, inc: str, seen: Point, keks: frozenset[str]) -> bool:
        return bool(self.database.do("beat", host, inc, seen, keks))

    def fence(self, host: str, inc: str, beat: int, timeline: int) -> bool:
        return bool(self.database.do("fence", host, inc, beat, timeline))

    def prune(self, below: int) -> None:
        self.database.do("prune", below)

    def leave(self, host: str, inc: str) -> None:
        self.database.do("leave", host, inc)

    def news(self, after: int, limit: int) -> News:
        found: News = self.database.do("news", after, limit)
        return found

    def sight(self) -> Sight:
        found: Sight = self.database.do("sight")
        return found

    def wait(self, seconds: float) -> bool:
        woken = self._woken.wait(seconds)
        self._woken.clear()
        return woken

    def wake(self) -> None:
        self._woken.set()

    def drop(self) -> None:
        self.dropped += 1

    def close(self) -> None:
        pass


class SetClock(Clock):
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def read(self) -> Reading:
        ns = int(self.seconds * 1e9)
        return Reading(ns, ns, self.seconds)

    def steady(self) -> float:
        return self.seconds


class Service:
    """Identity and Local of a host."""

    def __init__(self, host: str, keks: str = "k1 k2") -> None:
        self.host, self.name = host, f"host-{host}"
        self.made: list[str] = []
        self.before: list[str] = []
        self.configured = frozenset(keks.split())
        self.adopted: list[str] = []

    def fresh(self) -> str:
        self.made.append(f"{self.host}.{len(self.made)}")
        return self.made[-1]

    def gone(self) -> list[str]:
        return self.before

    def keks(self) -> frozenset[str]:
        return self.configured

    def registered(self, inc: str) -> None:
        self.written_as = inc

    def adopt(self, kek_id: str, version: int) -> None:
        if kek_id not in self.configured:
            raise StoreUnavailable(f"the KEK {kek_id} is not configured")
        self.adopted.append(kek_id)


class Stepped:
    """A host that goes on only when it is told to."""

    def __init__(self, database: Database, host: str = "a", keks: str = "k1 k2") -> None:
        self.service, self.registry, self.clock = Service(host, keks), Twin(database), SetClock()
        self.board = Board(memoryview(bytearray(SIZE)))
        self.host = Host(self.service, self.service, self.board, self.clock, self.registry.wake, SPAN)
        self.steps = self.host.life()
        self.question: Any = next(self.steps)
        self.waited = 0.0

    def turn(self) -> None:
        """To its next wait, or its end. What it asks is recorded by the database."""
        asked: list[str] = []
        while not asked:
            recorder = _Recorder(asked)
            try:
                self.question(recorder)
                answer = True if asked else self.question(self.registry)
            except Exception as error:
                self.question = self.steps.throw(error)
            else:
                self.waited = recorder.seconds
                self.question = self.steps.send(answer)

    @property
    def inc(self) -> str:
        return self.service.made[-1]


class _Recorder:
    """Tells a wait from all else."""

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked
        self.seconds = 0.0

    def wait(self, seconds: float) -> bool:
        self._asked.append("wait")
        self.seconds = seconds
        return True

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None
