"""A fleet in one thread and in simulated time: hosts, their clocks, a network, an engine that fails over.

The hosts run the very code of the daemon: `Host.life` with leases, barrier and board, and a worker's way
through a call, held together by `use`, `create`, `change` and `rotate` below. Simulated are the engine (an
old primary may live on, alone), the network (late, lost, done but not answered) and time (each host has
clocks of its own rate; a host may be stopped, its hypervisor may pause it, it may be killed and start again).

A schedule is a number. What must hold in each:

- No stale answer: what a call does that begins after a change was answered is what the change made of the
  DEK, on every host; a DEK that was made is known everywhere.
- No acknowledged DEK is lost: it is there in the end, under a KEK that was not rotated out.
- Nobody serves who is fenced.
- A rotation locks nobody out: whoever serves at its swap has the new KEK.
- A change is done once: what was answered isn't undone by an older try that arrives late.

    python -m tests.fleet.simulation 4711                    what happens in this schedule, line by line
    python -m tests.fleet.simulation 4711 --without lease    the same without a safeguard
    python -m tests.fleet.simulation 0 --schedules 1000000 --seconds 600
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import heapq
import logging
import random
import sys
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Any, Callable, NamedTuple

from progressdb_kms.errors import KMSError, StoreUnavailable
from progressdb_kms.fleet import barrier
from progressdb_kms.fleet.board import SIZE, Board, Follower
from progressdb_kms.fleet.host import Host
from progressdb_kms.fleet.lease import Reading
from progressdb_kms.fleet.rows import KEKS, KEY, ChangeRow, FleetRow, HostRow, News, Point, Sight

SPAN = 60.0
"""fence_seconds of the simulated fleet."""

TIMEOUT = 10.0
"""Seconds after which a host gives an answer up for lost."""

SAFEGUARDS = {
    "barrier": "a change is answered when it is committed",
    "lease": "a host serves whether it has a lease or not",
    "fence": "a write commits whatever became of its host and its KEK meanwhile",
    "insert": "a heartbeat makes the row anew where it is gone or fenced",
    "synchronous": "a heartbeat is acknowledged before a standby has it",
    "warning": "a COMMIT that came with a WARNING counts as one",
    "written": "a transaction that finds nothing to do writes nothing, so its COMMIT waits for nobody",
    "snapshot": "a read of an old primary counts, though its gen is behind",
    "timeline": "a gen counts whichever server it was seen on",
    "sure": "that a DEK isn't there is believed to any server",
    "census": "a rotation begins and ends whether all hosts have the new KEK or not",
    "touched": "what other hosts write while one rotates is staged as it was before",
    "owner": "who stages and swaps doesn't look whether the rotation is still its own",
}
"""What a test may take out, and what is done then."""


Without = Collection[str]


class Violation(AssertionError):
    pass


# ---- the engine --------------------------------------------------------------------------------------


class Dek(NamedTuple):
    state: str
    rev: int  # the gen of its last change
    kek: str


class Db(NamedTuple):
    """A database; each transaction makes another one of it."""

    gen: int
    kek: str
    version: int
    timeline: int
    hosts: dict[tuple[str, str], HostRow]
    changes: tuple[ChangeRow, ...]
    deks: dict[str, Dek]
    owner: str = ""  # who rotates
    staged: dict[str, Dek] | None = None
    touched: frozenset[str] = frozenset()
    name: str = "f"  # of the fleet

    @property
    def fleet(self) -> FleetRow:
        rotating = self.staged is not None
        about = self.gen, self.kek, self.version, rotating, self.owner, self.timeline
        return FleetRow(self.name, 1, 1, *about)

    def with_dek(self, key_id: str, dek: Dek) -> Db:
        """Another host's, or this one's: whoever rotates has it to stage again."""
        touched = self.touched | {key_id} if self.staged is not None else self.touched
        return self._replace(deks={**self.deks, key_id: dek}, touched=touched)


Done = tuple[Db, Any]


class Refused(KMSError):
    """The fence of a write: nothing was done."""

    status = 503
    code = "fenced"


class Transactions:
    """What the engine does on a Db. Names that are in READS write nothing and need no standby."""

    READS = frozenset(["news", "sight", "read", "page"])

    def __init__(self, without: Without) -> None:
        self._without = without

    def register(self, db: Db, host: str, inc: str, name: str, keks: frozenset[str], gone: list[str]) -> Done:
        hosts = {
            key: row
            for key, row in db.hosts.items()
            if key[0] != host or (key[1] not in gone and not row.fenced)
        }
        hosts[host, inc] = HostRow(host, inc, name, 0, db.gen, keks, False)
        return db._replace(hosts=hosts), db.fleet

    def beat(self, db: Db, host: str, inc: str, seen: Point, keks: frozenset[str]) -> Done:
        row = db.hosts.get((host, inc))
        if row is None or row.fenced:
            if "insert" not in self._without:
                return db, False
            row = HostRow(host, inc, host, 0, 0, keks, False)
        if seen.timeline != db.timeline:
            return db, False
        row = row._replace(beat=row.beat + 1, seen=max(seen.gen, row.seen), keks=keks, fenced=False)
        return db._replace(hosts={**db.hosts, (host, inc): row}), True

    def fence(self, db: Db, host: str, inc: str, beat: int, timeline: int) -> Done:
        row = db.hosts.get((host, inc))
        if row is None or row.fenced or (row.beat, db.timeline) != (beat, timeline):
            return db, False
        return db._replace(hosts={**db.hosts, (host, inc): row._replace(fenced=True)}), True

    def prune(self, db: Db, below: int) -> Done:
        return db._replace(changes=tuple(row for row in db.changes if row.gen >= below)), None

    def leave(self, db: Db, host: str, inc: str) -> Done:
        return db._replace(hosts={key: row for key, row in db.hosts.items() if key != (host, inc)}), None

    def news(self, db: Db, after: int, limit: int) -> Done:
        return db, News(db.fleet, [row for row in db.changes if row.gen > after][:limit])

    def sight(self, db: Db) -> Done:
        return db, Sight(db.fleet, list(db.hosts.values()))

    def read(self, db: Db, key_id: str) -> Done:
        return db, (db.deks.get(key_id), db.fleet.point)

    def sure(self, db: Db, key_id: str) -> Done:
        """The same as a transaction that commits: only the primary can."""
        return db, (db.deks.get(key_id), db.fleet.point)

    def _fence(self, db: Db, host: str, inc: str, kek: str) -> None:
        row = db.hosts.get((host, inc))
        if "fence" not in self._without and (db.kek != kek or row is None or row.fenced):
            raise Refused("fenced")

    def create(self, db: Db, host: str, inc: str, key_id: str, kek: str) -> Done:
        self._fence(db, host, inc, kek)
        if key_id in db.deks:
            return db, None
        return db.with_dek(key_id, Dek("enabled", 0, kek)), None

    def change(self, db: Db, host: str, inc: str, kek: str, key_id: str, rev: int, state: str) -> Done:
        """By compare-and-set of `rev`, so that a try which comes late does nothing. What is so already was
        done by an earlier try, maybe, and isn't known everywhere: its gen is waited for."""
        self._fence(db, host, inc, kek)
        dek = db.deks[key_id]
        if dek.rev != rev:
            return db, None
        if dek.state == state:
            return db, db.fleet.point
        gen = db.gen + 1
        changes = (*db.changes, ChangeRow(gen, KEY, key_id))
        db = db.with_dek(key_id, Dek(state, gen, dek.kek))._replace(gen=gen, changes=changes)
        return db, Point(db.timeline, gen)

    # a rotation: see service.fleetrotation and fleet.store

    def begin(self, db: Db, host: str, inc: str, kek: str, new: str) -> Done:
        self._fence(db, host, inc, kek)
        self._census(db, new)
        if db.staged is not None and db.owner != host and self._lives(db, db.owner):
            raise Refused("rotation_in_progress")
        return db._replace(owner=host, staged={}, touched=frozenset()), None

    def page(self, db: Db) -> Done:
        return db, dict(db.deks)

    def stage(self, db: Db, host: str, inc: str, kek: str, rows: dict[str, Dek]) -> Done:
        self._fence(db, host, inc, kek)
        self._own(db, host)
        return db._replace(staged={**(db.staged or {}), **rows}), None

    def drain(self, db: Db, host: str, inc: str, kek: str) -> Done:
        """What was touched, as it is now."""
        self._fence(db, host, inc, kek)
        self._own(db, host)
        return db._replace(touched=frozenset()), {key_id: db.deks[key_id] for key_id in sorted(db.touched)}

    def swap(self, db: Db, host: str, inc: str, kek: str, new: str, rest: bool) -> Done:
        self._fence(db, host, inc, kek)
        self._own(db, host)
        self._census(db, new)
        staged = dict(db.staged or {})
        if rest:
            staged.update({key_id: db.deks[key_id] for key_id in sorted(db.touched)})
        gen = db.gen + 1
        deks = {key_id: Dek(dek.state, dek.rev, new) for key_id, dek in staged.items()}
        changes = (*db.changes, ChangeRow(gen, KEKS, ""))
        db = db._replace(gen=gen, kek=new, version=db.version + 1, deks=deks, changes=changes)
        return self._forgotten(db), Point(db.timeline, gen)

    def discard(self, db: Db, host: str) -> Done:
        """What this host staged, or one that is dead."""
        if db.staged is None or (db.owner != host and self._lives(db, db.owner)):
            return db, None
        return self._forgotten(db), None

    def _forgotten(self, db: Db) -> Db:
        return db._replace(owner="", staged=None, touched=frozenset())

    def _lives(self, db: Db, host: str) -> bool:
        return any(row.host == host and not row.fenced for row in db.hosts.values())

    def _own(self, db: Db, host: str) -> None:
        if "owner" not in self._without and (db.staged is None or db.owner != host):
            raise Refused("store_contended")

    def _census(self, db: Db, new: str) -> None:
        if "census" not in self._without and barrier.without_kek(list(db.hosts.values()), new):
            raise Refused("kek_not_everywhere")


Reply = Callable[[Any, "KMSError | None"], None]


class Write(NamedTuple):
    """A transaction that is done, but waits for its standby."""

    work: Callable[[Db], Done]
    reply: Reply


class Node:
    """A server. `db` is what it shows; `standby` what would be left of it after a failover."""

    def __init__(self, db: Db) -> None:
        self.db = self.standby = db
        self.waiting: list[Write] = []
        self.dead = False
        self.alone = (
            False  # its standby doesn't answer: either that is gone for a while, or it is the primary
        )


class Call(NamedTuple):
    name: str
    args: tuple[Any, ...]


class Recorder:
    """A registry that does nothing but say what was asked of it."""

    def __getattr__(self, name: str) -> Callable[..., Call]:
        def record(*args: Any) -> Call:
            return Call(name, args)

        self.__dict__[name] = record  # so that it is made once
        return record


RECORDER: Any = Recorder()


# ---- a host ------------------------------------------------------------------------------------------


class Machine:
    """One host: clocks, a place in the network, a daemon that may be killed and started again."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.fleet = fleet
        self.name = f"h{number}"
        self.rate = 1.0 + fleet.between(-0.02, 0.02)
        self.started = fleet.between(0.0, 1000.0)
        self.asleep = 0.0  # seconds for which its hypervisor held it
        self.wall_offset = 0.0
        self.guest = fleet.chance(0.5)  # of a hypervisor; its wall clock is set by nobody else
        self.stopped_until = self.cut_until = self.stuck_until = self.slow_until = 0.0
        self.life = 0  # of its daemon; what belongs to an earlier one is dead
        self.running = False
        self.incs: list[str] = []
        self.known_gone: list[str] = []
        self.keks = frozenset(["k1", "k2"] if fleet.chance(0.8) else ["k1"])
        self.kek, self.version = "", 0
        self.rotating = False

    # what Host asks for: Clock, Identity, Local

    def read(self) -> Reading:
        now = self.fleet.now
        run = (now - self.asleep + self.started) * self.rate
        return Reading(int(run * 1e9), int((now + 1e9 + self.wall_offset) * 1e9), run)

    def steady(self) -> float:
        return (self.fleet.now - self.asleep + self.started) * self.rate

    @property
    def host(self) -> str:
        return self.name

    def fresh(self) -> str:
        self.incs.append(f"{self.name}.{len(self.incs)}")
        return self.incs[-1]

    def gone(self) -> list[str]:
        return self.known_gone

    class Keks(NamedTuple):
        machine: Machine

        def keks(self) -> frozenset[str]:
            return self.machine.keks

        def registered(self, inc: str) -> None:
            pass

        def adopt(self, kek_id: str, version: int) -> None:
            if kek_id not in self.machine.keks:
                raise StoreUnavailable(f"the KEK {kek_id} is not configured")
            self.machine.kek, self.machine.version = kek_id, version

    def configure(self) -> None:
        """The new KEK comes to it, and a SIGHUP."""
        self.keks = frozenset(["k1", "k2"])
        if self.running:
            self.keeper.tell_keks()

    # the daemon

    def start(self, clean_boot: bool) -> None:
        """`clean_boot`: the same machine goes on, so its file knows which incarnations are dead."""
        self.life += 1
        self.running = True
        self.rotating = False
        self.known_gone = list(self.incs) if clean_boot else []
        self.board = Board(memoryview(bytearray(SIZE)))
        self.follower: Follower[Dek] = Follower(self.board, 100)
        self.waiter: Callable[[], None] | None = None
        self.keeper = Patient(self, Machine.Keks(self), self.board, self, self.wake, SPAN)  # type: ignore[arg-type]
        self.connections: dict[str, Node | None] = {}
        self.fleet.spawn(self, "life", self.keeper.life())

    def kill(self) -> None:
        self.life += 1
        self.running = False
        self.stopped_until = 0.0

    def wake(self) -> None:
        if self.waiter is not None:
            waiter, self.waiter = self.waiter, None
            self.fleet.after(0.0, waiter)

    @property
    def inc(self) -> str:
        return self.keeper._inc

    def serves(self) -> bool:
        if "lease" in self.fleet.without:
            return True
        clock = self.read()
        return self.board.serves(clock.boot, clock.wall)


class Patient(Host):
    """Notices are lost now and then, but to look each second would be most of what is simulated."""

    poll, impatience = SPAN / 4, (0.002, SPAN / 20)


class Task:
    """A thread of a daemon, as a generator of questions to the engine. `kind`: it has a connection of its own
    for each."""

    def __init__(self, machine: Machine, kind: str, steps: Generator[Any, Any, Any]) -> None:
        self.machine, self.kind, self.steps = machine, kind, steps
        self.life = machine.life
        self.turn = 0

    def once(self, answer: Any = None, error: KMSError | None = None) -> Callable[[], None]:
        """Goes on with this answer, if it is still waited for then."""
        return functools.partial(self.resume, self.turn, answer, error)

    def resume(self, turn: int, answer: Any, error: KMSError | None) -> None:
        machine = self.machine
        if turn != self.turn or self.life != machine.life:
            return
        if machine.stopped_until > machine.fleet.now:
            machine.fleet.at(machine.stopped_until, functools.partial(self.resume, turn, answer, error))
            return
        self.turn += 1
        try:
            question = self.steps.throw(error) if error is not None else self.steps.send(answer)
        except StopIteration:
            return
        machine.fleet.ask(self, question(RECORDER))


class Late(NamedTuple):
    """A question that is given up at a moment. To look then is an event of its own, so only where that may
    come: a third of all events were such looks."""

    fleet: Fleet
    task: Task
    turn: int
    moment: float

    def look(self) -> None:
        fleet = self.fleet
        fleet.at(max(fleet.now, self.moment), functools.partial(fleet.give_up, self.task, self.turn))


# ---- everything --------------------------------------------------------------------------------------


class Fleet:
    def __init__(
        self, seed: int, without: Without = (), troubles: Sequence[str] = (), trace: bool = False
    ) -> None:
        self.troubles = [TROUBLES[name] for name in troubles or TROUBLES]
        self.random = random.Random(seed).random
        self.without = without
        self.trace = trace
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.transactions = Transactions(without)
        deks = {"a": Dek("enabled", 0, "k1"), "b": Dek("enabled", 0, "k1")}
        self.primary = Node(Db(0, "k1", 1, 1, {}, (), deks))
        self.old: Node | None = None
        self.machines = [Machine(self, n) for n in range(2 + int(self.random() * 2))]
        self.answered: dict[str, list[tuple[float, int]]] = {"a": [], "b": []}  # (when, rev) of changes
        self.made: dict[str, float] = {"a": -1.0, "b": -1.0}
        self.rotated: list[tuple[float, int]] = [(-1.0, 1)]
        self.calls = self.refusals = 0

    # chance: `random()` alone, whose values are the same in every release of Python

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def chance(self, part: float) -> bool:
        return self.random() < part

    def one_of(self, items: Any) -> Any:
        return items[int(self.random() * len(items))]

    # time

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, what))

    def run(self, until: float) -> None:
        events, pop = self._events, heapq.heappop
        while events and events[0][0] <= until:
            self.now, _, what = pop(events)
            what()
        self.now = until

    def say(self, text: str, *args: Any) -> None:
        if self.trace:
            print(f"{self.now:9.3f}  {text % args}")

    def spawn(self, machine: Machine, kind: str, steps: Generator[Any, Any, Any]) -> None:
        task = Task(machine, kind, steps)
        self.after(0.0, task.once())

    # the network

    def latency(self, machine: Machine) -> float:
        if machine.slow_until > self.now or self.random() < 0.03:
            return 4.0 * self.random()
        return 0.0005 + 0.0095 * self.random()

    def ask(self, task: Task, call: Call) -> None:
        machine = task.machine
        if call.name == "wait":
            if task.kind == "life":
                machine.waiter = task.once(True)
            self.after(call.args[0], task.once(False))
        elif call.name == "everywhere":
            point, deadline = call.args
            machine.keeper.everywhere(point, deadline, functools.partial(self.told, task, task.turn))
        elif call.name == "drop":
            machine.connections[task.kind] = None
            self.after(0.0, task.once())
        else:
            self.send(task, call)

    def send(self, task: Task, call: Call) -> None:
        machine = task.machine
        node = machine.connections.get(task.kind)
        if node is None or node.dead:
            stuck = machine.stuck_until > self.now and self.old is not None and not self.old.dead
            node = self.old if stuck else self.primary
            assert node is not None
            machine.connections[task.kind] = node
        turn = task.turn
        late = Late(self, task, turn, self.now + TIMEOUT)

        def reply(answer: Any, error: KMSError | None) -> None:
            def arrive() -> None:
                if error is not None and isinstance(error, StoreUnavailable) and task.turn == turn:
                    self.lose(task, node)
                task.resume(turn, answer, error)

            self.deliver(machine, arrive, late)

        self.deliver(machine, lambda: self.execute(node, call, reply, late), late)

    def told(self, task: Task, turn: int, error: KMSError | None) -> None:
        self.after(0.0, functools.partial(task.resume, turn, None, error))

    def give_up(self, task: Task, turn: int) -> None:
        if task.turn == turn:
            task.resume(turn, None, StoreUnavailable("no answer"))

    def lose(self, task: Task, node: Node) -> None:
        if task.machine.connections.get(task.kind) is node:
            task.machine.connections[task.kind] = None

    def deliver(self, machine: Machine, what: Callable[[], None], late: Late | None = None) -> None:
        """Through a network that may be cut: then it comes late, or never. Of a question somebody gives up,
        whose way there and back takes too long; not when it waits for nothing but two slow ways."""
        delay = self.latency(machine)
        if machine.cut_until > self.now:
            if late is not None:
                late.look()
            if self.chance(0.7):
                return
            delay += machine.cut_until - self.now
        self.after(delay, what)

    # the engine

    def execute(self, node: Node, call: Call, reply: Reply, late: Late) -> None:
        if node.dead:
            reply(None, StoreUnavailable("the connection was lost"))
            return
        if call.name in Transactions.READS:
            reply(self._work(call, node.db)[1], None)
            return
        work = functools.partial(self._work, call)
        if call.name == "beat" and "synchronous" in self.without:
            self.publish(node, Write(work, reply), False)
            self.after(0.05, lambda: self.replicate(node))
        elif "written" in self.without and self._idle(work, node.db):
            reply(work(node.db)[1], None)
        else:
            write = Write(work, reply)
            node.waiting.append(write)
            if node.alone:
                late.look()
            else:
                self.after(self.between(0.0005, 0.005), lambda: self.commit(node, write, late))

    def _work(self, call: Call, db: Db) -> Done:
        done: Done = getattr(self.transactions, call.name)(db, *call.args)
        return done

    def _idle(self, work: Callable[[Db], Done], db: Db) -> bool:
        try:
            return work(db)[0] is db
        except KMSError:
            return False

    def commit(self, node: Node, write: Write, late: Late | None = None) -> None:
        """Its standby has it now, and all before it."""
        if late is not None and node.alone:
            late.look()
        if write in node.waiting and not node.alone and not node.dead:
            node.waiting.remove(write)
            self.publish(node, write, False)
            node.standby = node.db

    def replicate(self, node: Node) -> None:
        if not node.alone and not node.dead:
            node.standby = node.db

    def publish(self, node: Node, write: Write, warned: bool) -> None:
        before = node.db
        try:
            node.db, answer = write.work(before)
        except KMSError as error:
            write.reply(None, error)
            return
        if warned and "warning" not in self.without:
            write.reply(None, StoreUnavailable("COMMIT came with a WARNING"))
        else:
            write.reply(answer, None)
        if node is self.primary:
            if node.db.hosts is not before.hosts:
                self.look_at_fences(before, node.db)
            self.look_at_swap(before, node.db)
            if node.db.gen != before.gen:
                self.notify(node)

    def notify(self, node: Node) -> None:
        for machine in self.machines:
            if machine.running and machine.connections.get("life") is node and self.chance(0.9):
                self.deliver(machine, functools.partial(self.hint, machine, machine.life))

    def hint(self, machine: Machine, life: int) -> None:
        if machine.life == life:
            machine.wake()

    def cancel(self, node: Node) -> None:
        """Somebody ends what waits for a standby: COMMIT says OK, with a WARNING."""
        while node.waiting:
            self.publish(node, node.waiting.pop(0), True)

    def join(self, node: Node) -> None:
        """Its standby is back."""
        if node is self.primary and not node.dead:
            self.say("the standby is back")
            node.alone = False
            for write in list(node.waiting):
                self.commit(node, write)
            node.standby = node.db

    def promote(self) -> None:
        """The standby takes over. What still waited for it has arrived there, or not."""
        old = self.primary
        db = old.standby
        for write in [] if old.alone else list(old.waiting):
            if self.chance(0.5):
                break
            try:
                db, _ = write.work(db)
            except KMSError:
                pass
        self.look_at_fences(old.standby, db)
        if self.old is not None:
            self.die(self.old)
        if "timeline" not in self.without:
            db = db._replace(timeline=db.timeline + 1)
        self.primary, self.old = Node(db), old
        old.alone = True
        if self.chance(0.4):
            self.say("the primary dies, its standby takes over at gen %d", db.gen)
            self.die(old)
            return
        self.say("the standby takes over at gen %d, the old primary lives on", db.gen)
        for machine in self.machines:
            if self.chance(0.5):
                machine.stuck_until = self.now + self.between(0.0, 3 * SPAN)
        for _ in range(3):
            self.after(self.between(0.0, SPAN), lambda: self.cancel(old))
        self.after(self.between(0.0, 3 * SPAN), lambda: self.die(old))

    def die(self, node: Node) -> None:
        node.dead = True
        for write in node.waiting:
            write.reply(None, StoreUnavailable("the connection was lost"))
        node.waiting = []

    # what must hold

    def violated(self, text: str) -> None:
        self.say("VIOLATION: %s", text)
        raise Violation(f"at {self.now:.3f}: {text}")

    def look_at_fences(self, before: Db, after: Db) -> None:
        for machine in self.machines:
            if machine.running and machine.inc:
                row = after.hosts.get((machine.name, machine.inc))
                if row is not None and row.fenced and before.hosts.get((machine.name, machine.inc)) != row:
                    self.say("%s is fenced", machine.inc)
                    if "lease" not in self.without and machine.serves() and machine.stopped_until <= self.now:
                        self.violated(f"{machine.inc} is fenced, and its lease runs on")

    def look_at_swap(self, before: Db, after: Db) -> None:
        for machine in self.machines if before.kek != after.kek else ():
            row = before.hosts.get((machine.name, machine.inc)) if machine.running else None
            if row is not None and not row.fenced and after.kek not in machine.keks:
                self.violated(f"{machine.inc} is locked out: it has no {after.kek}")

    def answer(self, machine: Machine, begun: float, key_id: str, dek: Dek | None) -> None:
        """A call that began then is answered by what this says of the DEK."""
        self.calls += 1
        if dek is None:
            if self.made[key_id] <= begun:
                self.violated(
                    f"{machine.name} doesn't know {key_id}, which was made at {self.made[key_id]:.3f}"
                )
            return
        for when, rev in self.answered[key_id]:
            if when <= begun and dek.rev < rev:
                self.violated(
                    f"{machine.name} answers {key_id} by change {dek.rev}; {rev} holds since {when:.3f}"
                )
        for when, version in self.rotated:
            if when <= begun and machine.version < version:
                self.violated(f"{machine.name} uses KEK {machine.version}; rotated at {when:.3f}")

    def look_at_end(self) -> None:
        db = self.primary.db
        for key_id in self.made:
            dek = db.deks.get(key_id)
            if dek is None:
                self.violated(f"{key_id} was acknowledged, and is not there")
            elif dek.kek != db.kek:
                self.violated(f"{key_id} is under {dek.kek}, which was rotated out")
            elif self.answered.get(key_id) and dek.rev < max(rev for _, rev in self.answered[key_id]):
                self.violated(f"{key_id} is at change {dek.rev}: one that was answered is undone")


# ---- what callers do ---------------------------------------------------------------------------------

Work = Generator[Any, Any, None]


def use(machine: Machine, key_id: str) -> Work:
    """A worker's way through a call: encrypt or decrypt under a DEK."""
    fleet, begun = machine.fleet, machine.fleet.now
    if not machine.serves() or not machine.inc:
        fleet.refusals += 1
        return
    known = machine.follower.follow()
    dek = machine.follower.get(key_id)
    if dek is None:
        try:
            dek, point = yield lambda registry: registry.read(key_id)
            if dek is None and "sure" not in fleet.without:
                dek, point = yield lambda registry: registry.sure(key_id)
        except KMSError:
            fleet.refusals += 1
            return
        if not point.covers(known) and "snapshot" not in fleet.without:
            yield lambda registry: registry.drop()
            fleet.refusals += 1
            return
        if dek is not None:
            machine.follower.remember(key_id, dek, point)
    if fleet.chance(0.1):
        yield lambda registry: registry.wait(fleet.between(0.0, 0.1))
    if machine.serves():
        fleet.answer(machine, begun, key_id, dek)


def everywhere(machine: Machine, point: Point) -> Work:
    """Wait until a change holds everywhere. Raises KMSError: it isn't known to."""
    if "barrier" in machine.fleet.without:
        return
    deadline = machine.read().steady + 3 * SPAN
    yield lambda registry: registry.everywhere(point, deadline)


def tried(machine: Machine, question: Callable[[Any], Any]) -> Generator[Any, Any, Any]:
    """A write, repeated as it is while its outcome isn't known."""
    for _ in range(3):
        try:
            return (yield question)
        except StoreUnavailable:
            yield lambda registry: registry.wait(machine.fleet.between(0.0, 1.0))
    raise StoreUnavailable("the outcome is not known")


def create(machine: Machine, key_id: str) -> Work:
    fleet = machine.fleet
    if not machine.serves() or not machine.inc:
        return
    inc, kek = machine.inc, machine.kek  # the DEK is wrapped now
    try:
        yield from tried(machine, lambda registry: registry.create(machine.name, inc, key_id, kek))
    except KMSError:
        return
    if machine.serves():
        fleet.say("%s has made %s under %s", machine.name, key_id, kek)
        fleet.made[key_id] = fleet.now
        fleet.answered.setdefault(key_id, [])


def change(machine: Machine, key_id: str, state: str) -> Work:
    """Disable, enable: committed, everywhere, answered."""
    fleet = machine.fleet
    try:
        for _ in range(2):
            if not machine.serves() or not machine.inc:
                return
            inc, kek = machine.inc, machine.kek
            dek, _ = yield from tried(machine, lambda registry: registry.sure(key_id))
            args = (machine.name, inc, kek, key_id, dek.rev, state)
            point = yield from tried(machine, functools.partial(_change, args))
            if point is None:  # another one's change came in between, or our own of an earlier try
                continue
            yield from everywhere(machine, point)
            rev = point.gen if dek.state != state else dek.rev
            fleet.say("%s answers: %s is %s since change %d", machine.name, key_id, state, rev)
            fleet.answered[key_id].append((fleet.now, rev))
            return
    except KMSError as error:
        fleet.say("%s: %s of %s is not answered: %s", machine.name, state, key_id, error.message)


def _change(args: tuple[Any, ...], registry: Any) -> Any:
    return registry.change(*args)


def rotate(machine: Machine, new: str) -> Work:
    """What fails at any step but the swap is given up, and thrown away. Each step is written as the host that
    this one is then, under the KEK that it holds for the active one then, as the store does."""
    fleet = machine.fleet
    if not machine.serves() or not machine.inc or machine.kek == new or machine.rotating:
        return
    version, machine.rotating = machine.version, True
    try:
        point = yield from rotated(machine, new)
        yield from everywhere(machine, point)
    except KMSError as error:
        fleet.say("%s: the rotation is not answered: %s", machine.name, error.message)
        with contextlib.suppress(KMSError):
            yield lambda registry: registry.discard(machine.name)
        return
    finally:
        machine.rotating = False
    fleet.say("%s answers: rotated to %s", machine.name, new)
    fleet.rotated.append((fleet.now, version + 1))


def rotated(machine: Machine, new: str) -> Generator[Any, Any, Point]:
    fleet, rest = machine.fleet, "touched" not in machine.fleet.without
    yield lambda registry: registry.begin(machine.name, machine.inc, machine.kek, new)
    rows = yield lambda registry: registry.page()
    for _ in range(2):
        yield lambda registry: registry.wait(fleet.between(0.0, 2.0))
        page = rows
        yield lambda registry: registry.stage(machine.name, machine.inc, machine.kek, page)  # noqa: B023
        rows = (yield lambda registry: registry.drain(machine.name, machine.inc, machine.kek)) if rest else {}
    yield lambda registry: registry.stage(machine.name, machine.inc, machine.kek, rows)
    try:
        return (yield lambda registry: registry.swap(machine.name, machine.inc, machine.kek, new, rest))
    except StoreUnavailable:
        found = yield from tried(machine, lambda registry: registry.sure("a"))
        if found[0] is None or found[0].kek != new:
            raise
        return found[1]  # type: ignore[no-any-return]


# ---- what befalls them -------------------------------------------------------------------------------


def stop(fleet: Fleet, machine: Machine, seconds: float) -> None:
    fleet.say("%s is stopped for %.1f s", machine.name, seconds)
    machine.stopped_until = max(machine.stopped_until, fleet.now + seconds)
    uses_after(fleet, machine, seconds)


def hold(fleet: Fleet, machine: Machine, seconds: float) -> None:
    """Its hypervisor: boot time and the steady clock stand still, the wall clock is right afterwards: where
    it isn't, nothing protects (see `lease`)."""
    stop(fleet, machine, seconds)
    if machine.guest:
        machine.asleep += seconds


def cut(fleet: Fleet, machine: Machine, seconds: float) -> None:
    fleet.say("%s is cut off for %.1f s", machine.name, seconds)
    machine.cut_until = fleet.now + seconds
    uses_after(fleet, machine, seconds)


def come_back(fleet: Fleet, machine: Machine, _: float) -> None:
    """Stopped until it is fenced; back over a slow network, while much is changed."""
    seconds = SPAN * fleet.between(1.1, 1.5)
    others = [other for other in fleet.machines if other is not machine]
    fleet.after(0.1, lambda: call(fleet, fleet.one_of(others), "change"))
    stop(fleet, machine, seconds)
    machine.slow_until = fleet.now + seconds + 10.0
    for _n in range(6):
        fleet.after(seconds + fleet.between(0.0, 8.0), lambda: call(fleet, fleet.one_of(others), "change"))
        fleet.after(seconds + fleet.between(0.0, 12.0), lambda: call(fleet, machine, "use"))


def slow(fleet: Fleet, machine: Machine, seconds: float) -> None:
    fleet.say("the network of %s is slow for %.1f s", machine.name, seconds)
    machine.slow_until = fleet.now + seconds
    for _ in range(3):
        fleet.after(fleet.between(0.0, seconds), lambda: call(fleet, machine, "create"))


def pause(fleet: Fleet, machine: Machine, _: float) -> None:
    """It is stopped in the middle of a rotation until it is fenced, or nearly; others change things, and
    rotate themselves."""
    seconds = SPAN * fleet.between(0.9, 1.6)
    others = [other for other in fleet.machines if other is not machine]
    fleet.after(0.0, lambda: call(fleet, machine, "rotate"))
    fleet.after(fleet.between(0.0, 4.0), lambda: stop(fleet, machine, seconds))
    for _n in range(4):
        fleet.after(fleet.between(0.0, 5.0), lambda: call(fleet, fleet.one_of(others), "change"))
        fleet.after(seconds + fleet.between(-4.0, 4.0), lambda: call(fleet, fleet.one_of(others), "rotate"))
        fleet.after(seconds + fleet.between(0.0, 8.0), lambda: call(fleet, fleet.one_of(others), "change"))


def kill(fleet: Fleet, machine: Machine, seconds: float) -> None:
    if machine.running:
        same = fleet.chance(0.5)
        fleet.say("%s is killed for %.1f s, %s", machine.name, seconds, "same boot" if same else "boots anew")
        machine.kill()
        fleet.after(seconds, lambda: machine.start(same))


def set_clock(fleet: Fleet, machine: Machine, seconds: float) -> None:
    if machine.guest:
        return
    machine.wall_offset += seconds if fleet.chance(0.5) else -seconds
    fleet.say("the wall clock of %s is set by %.1f s", machine.name, machine.wall_offset)


def lonely(fleet: Fleet, machine: Machine, seconds: float) -> None:
    fleet.say("the primary has no standby for %.1f s", seconds)
    node = fleet.primary
    node.alone = True
    fleet.after(seconds * fleet.random(), lambda: fleet.cancel(node))
    fleet.after(seconds, lambda: fleet.join(node))


def fail_over(fleet: Fleet, machine: Machine, seconds: float) -> None:
    fleet.promote()


def split(fleet: Fleet, machine: Machine, seconds: float) -> None:
    """A change that is shown, and that nobody acknowledged: its wait is cancelled, and then it is lost."""
    node = fleet.primary
    node.alone = True
    for _ in range(3):
        fleet.after(fleet.between(0.0, 2.0), lambda: call(fleet, machine, "change"))
        fleet.after(fleet.between(2.0, 4.0), lambda: fleet.cancel(node))
        fleet.after(fleet.between(0.0, 6.0), lambda: call(fleet, fleet.one_of(fleet.machines), "use"))
        fleet.after(fleet.between(8.0, 30.0), lambda: call(fleet, fleet.one_of(fleet.machines), "change"))
    fleet.after(6.0, lambda: fleet.promote() if fleet.primary is node else None)


TROUBLES: dict[str, tuple[Callable[[Fleet, Machine, float], None], float]] = {
    "stop": (stop, 1.0),
    "come_back": (come_back, 1.0),
    "hold": (hold, 1.0),
    "cut": (cut, 2.0),
    "slow": (slow, 2.0),
    "pause": (pause, 1.0),
    "kill": (kill, 1.0),
    "set_clock": (set_clock, 1.0),
    "lonely": (lonely, 2.0),
    "fail_over": (fail_over, 2.0),
    "split": (split, 1.0),
}
"""What may happen, and how often in proportion."""


def trouble(fleet: Fleet) -> None:
    length = fleet.one_of((0.3, 3.0, SPAN * 0.8, SPAN * 1.1, SPAN * 1.4))
    left = fleet.between(0.0, sum(weight for _, weight in fleet.troubles))
    for befall, weight in fleet.troubles:  # noqa: B007
        left -= weight
        if left < 0:
            break
    befall(fleet, fleet.one_of(fleet.machines), length * fleet.between(0.5, 1.5))


def uses_after(fleet: Fleet, machine: Machine, seconds: float) -> None:
    """What a host does when it comes back is what counts."""
    for _ in range(6):
        fleet.after(seconds + fleet.between(0.0, 3.0), lambda: call(fleet, machine, "use"))


def call(fleet: Fleet, machine: Machine, what: str = "") -> None:
    if not machine.running or machine.stopped_until > fleet.now:
        return
    what = what or fleet.one_of(("use",) * 12 + ("create", "change", "change", "change", "rotate"))
    if what == "create":
        fleet._count += 1
        fleet.spawn(machine, "keeper", create(machine, f"d{fleet._count}"))
    elif what == "change":
        key_id = fleet.one_of("ab")
        state = fleet.one_of(("enabled", "disabled"))
        fleet.spawn(machine, "keeper", change(machine, key_id, state))
    elif what == "rotate":
        fleet.spawn(machine, "keeper", rotate(machine, "k2"))
        for other in fleet.machines:
            fleet.after(fleet.between(0.0, 2.0), functools.partial(call, fleet, other, "create"))
    else:
        fleet.spawn(machine, "worker", use(machine, fleet.one_of(list(fleet.made)[-4:])))


def play(seed: int, without: Without = (), troubles: Sequence[str] = (), trace: bool = False) -> Fleet:
    """One schedule. Raises Violation."""
    fleet = Fleet(seed, without, troubles, trace)
    for machine in fleet.machines:
        machine.start(True)
        fleet.at(fleet.between(0.0, SPAN), machine.configure)
    length = SPAN * fleet.between(2.0, 5.0)
    for _ in range(2 + int(fleet.random() * 5)):
        fleet.at(fleet.between(1.0, length), lambda: trouble(fleet))
    for _ in range(40):
        machine = fleet.one_of(fleet.machines)
        fleet.at(fleet.between(1.0, length), functools.partial(call, fleet, machine))
    fleet.run(length)
    fleet.look_at_end()
    return fleet


# ---- from the command line ---------------------------------------------------------------------------


class Tally(NamedTuple):
    """What happened in schedules without a violation, and the first violation."""

    schedules: int
    calls: int
    refusals: int
    changes: int
    made: int
    rotations: int
    found: str = ""

    @classmethod
    def of(cls, fleet: Fleet) -> Tally:
        changes = sum(map(len, fleet.answered.values()))
        return cls(1, fleet.calls, fleet.refusals, changes, len(fleet.made) - 2, len(fleet.rotated) - 1)

    def plus(self, more: Tally) -> Tally:
        counts = [mine + theirs for mine, theirs in zip(self[:6], more[:6])]
        values: list[Any] = [*counts, self.found or more.found]
        return Tally(*values)


NOTHING = Tally(0, 0, 0, 0, 0, 0)


def search(
    first: int,
    count: int,
    seconds: float = float("inf"),
    without: Without = (),
    troubles: Sequence[str] = (),
) -> Tally:
    """Schedules from `first` on, until so many were played, so long, or one was violated."""
    deadline = time.monotonic() + seconds
    total = NOTHING
    with unheard():
        for seed in range(first, first + count):
            try:
                total = total.plus(Tally.of(play(seed, without, troubles)))
            except Violation as violation:
                words = [f"--without {name}" for name in without] + [f"--trouble {name}" for name in troubles]
                again = " ".join(["python -m tests.fleet.simulation", str(seed), *words])
                return total._replace(found=f"schedule {seed}, {violation}; again: {again}")
            if time.monotonic() >= deadline:
                break
    return total


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """What the hosts log is of no use here."""
    logger = logging.getLogger("progressdb_kms")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("schedule", type=int)
    parser.add_argument("--without", action="append", default=[], choices=SAFEGUARDS)
    parser.add_argument("--trouble", action="append", default=[], choices=TROUBLES)
    parser.add_argument("--schedules", type=int, default=0, help="so many, from that one on")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    words = parser.parse_args()
    if words.schedules:
        tally = search(words.schedule, words.schedules, words.seconds, words.without, words.trouble)
        print(tally)
        return bool(tally.found)
    try:
        play(words.schedule, words.without, words.trouble, trace=True)
    except Violation:
        return 1
    print("nothing was violated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
