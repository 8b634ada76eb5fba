"""The place of one host in the fleet: it registers, beats, follows the changes, and answers for its own.

`Host.life` says what is done in which order, as a generator: it yields what is to be asked of the engine, and
is sent the answer. `run` does that in a thread of the daemon, with the engine; the simulation of tests/fleet
does it with one of its own, in which requests are late, lost, or done and not answered. Nothing here waits,
sends or reads a clock but through what it is given.

What must hold:

- The lease counts from before the heartbeat was sent, and begins only when the engine has said that it is
  committed.
- `seen` is told to the engine after the board of this host shows it, never before.
- A host that finds itself fenced ends its lease, forgets everything, and registers under a fresh `inc`; so
  does one that starts, or that doesn't know whether its registration was done.
- A host is of one fleet for life: where another's database answers, it does nothing there.
- A change of this host's own is answered when all others know of it, and this one does: `everywhere`."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from typing import Any, Callable, NamedTuple, Protocol, TypeVar

from ..errors import InternalError, KMSError, StoreUnavailable, Unavailable
from ..journal import Matter
from . import barrier, lease
from .barrier import Watch
from .board import Board
from .lease import Clock
from .rows import ChangeRow, FleetRow, HostRow, News, Point, Registry, Sight, plain

log = logging.getLogger("progressdb_kms")

PAGE = 500
"""Changes that are asked for at once."""

RETRY = 0.02
"""After a failure, the part of fence_seconds until the next try."""

POLL = 1.0
"""Seconds after which changes are looked for, where no notice of one came."""

IMPATIENT = 0.002, 0.1
"""Seconds between two looks at the others while a change waits for them: first, and at most."""

NEW = "this host has not yet found its place in the fleet"

T = TypeVar("T")
Ask = Callable[[Registry], Any]
Steps = Generator[Ask, Any, T]


def ask(question: Callable[[Registry], T]) -> Steps[T]:
    """One transaction. Raises StoreUnavailable: it was done, or wasn't, or will be."""
    answer: T = yield question
    return answer


class Identity(Protocol):
    """Who this host is; kept in its data-dir."""

    host: str
    name: str

    def fresh(self) -> str:
        """A new `inc`, on the disk before it is used."""
        ...

    def gone(self) -> Sequence[str]:
        """Incarnations of this host that surely run no more."""
        ...


class Local(Protocol):
    """What the fleet does to the service of its own host."""

    def keks(self) -> frozenset[str]:
        """Those that are configured, next ones too."""
        ...

    def registered(self, inc: str) -> None:
        """As what this host writes from now on."""
        ...

    def adopt(self, kek_id: str, version: int) -> None:
        """This is the fleet's active KEK from now on; any other is wiped that isn't needed. Raises KMSError
        where it isn't configured."""
        ...


class Pending(NamedTuple):
    """A change that is committed, and whom to tell when it holds everywhere, or why it doesn't yet."""

    point: Point
    since: float  # by the steady clock
    deadline: float  # likewise
    then: Callable[[KMSError | None], None]


class Waited(NamedTuple):
    """For the metrics: changes that were answered, how many of them without knowing that they hold
    everywhere, and the seconds for which all of them waited."""

    changes: int
    unknown: int
    seconds: float

    def plus(self, error: KMSError | None, seconds: float) -> Waited:
        return Waited(self.changes + 1, self.unknown + (error is not None), self.seconds + seconds)


class Host:
    """See the module. `everywhere` and `end` may be called by any thread, all else is `life`'s own."""

    poll, impatience = POLL, IMPATIENT

    def __init__(
        self,
        who: Identity,
        local: Local,
        board: Board,
        clock: Clock,
        wake: Callable[[], None],
        span: float,
    ) -> None:
        """`wake` ends the registry's wait; `span`: fence_seconds."""
        self._who, self._local, self._board, self._clock = who, local, board, clock
        self._wake = wake
        self._span = span
        self._inc = ""
        self._given_up: list[str] = []
        self._active = ""
        self._fleet = ""  # the one that this host is of
        self._watch: Watch = barrier.FIRST
        self._next_beat = self._next_look = 0.0
        self._pause = self.impatience[0]
        self._pruned = 0
        self._pending: list[Pending] = []
        self._ending = False
        self.why = NEW
        """Why it has no lease, or is about to lose it; empty where all is well."""
        self._outage = Matter("the fleet: %s; it is tried again", "the fleet is there again")
        self.told: frozenset[str] = frozenset()
        """The KEKs that the others believe this host to have."""
        self.error: KMSError | None = None
        """What the last turn failed with."""
        self.waited = Waited(0, 0, 0.0)

    # ---- from other threads ----------------------------------------------------------------------

    def everywhere(self, point: Point, deadline: float, then: Callable[[KMSError | None], None]) -> None:
        """Call `then` once no host acts on what was before this change, which is committed."""
        self._pending.append(Pending(point, self._now(), deadline, then))
        self._wake()

    def tell_keks(self) -> None:
        """Those that are configured have changed."""
        self._next_beat = 0.0
        self._wake()

    def end(self) -> None:
        self._ending = True
        self._wake()

    # ---- what is done, in order ------------------------------------------------------------------

    def life(self) -> Steps[None]:
        self._board.end()
        while not self._ending:
            try:
                yield from self._turn()
                self._well()
                pause = self._rest()
            except KMSError as error:
                self._failed(error)
                pause = self._span * RETRY
            except Exception:  # a fault of ours must not end this thread, unnoticed until the lease is over
                log.exception("this host's place in the fleet could not be kept")
                self._step_down()
                self._failed(InternalError("a fault in what keeps this host's place; the log tells more"))
                pause = self._span * RETRY
            self._give_up_late()
            yield from self._wait(pause)
        yield from self._leave()

    def _wait(self, seconds: float) -> Steps[None]:
        yield from ask(lambda registry: registry.wait(seconds))

    def _turn(self) -> Steps[None]:
        if not self._inc:
            yield from self._register()
        yield from self._follow()
        if self._inc and self._now() >= self._next_beat:
            yield from self._beat()
        if self._inc and (self._pending or self._now() >= self._next_look):
            yield from self._look()

    def _register(self) -> Steps[None]:
        self._board.end()
        news: News = yield from ask(lambda registry: registry.news(0, 0))
        yield from self._of_ours(news.fleet)
        self._adopt(news.fleet)  # first: who can't serve must not be waited for
        before, inc, gone = self._clock.read(), self._who.fresh(), [*self._who.gone(), *self._given_up]
        self._given_up.append(inc)  # until it is known that it is ours
        host, name, keks = self._who.host, self._who.name, self._local.keks()
        fleet = yield from ask(lambda registry: registry.register(host, inc, name, keks, gone))
        yield from self._of_ours(fleet)
        self._given_up, self._inc, self.told, self._fleet = [], inc, keks, fleet.fleet
        self._local.registered(inc)
        yield from self._move_to(fleet)
        self._board.flush(fleet.point)
        self._renew(before)
        log.info("this host has its place in the fleet: %s, incarnation %s", host, inc)

    def _of_ours(self, fleet: FleetRow) -> Steps[None]:
        """An address may come to lead to another fleet's database, which has the same KEK perhaps: this host
        has no place there. What it registers there is fenced in time; nothing is written as that."""
        if self._fleet not in ("", fleet.fleet):
            yield from ask(lambda registry: registry.drop())
            raise StoreUnavailable(
                f"the database that answers is of the fleet {plain(fleet.fleet)}, and this host's is "
                f"{self._fleet}",
                hint="where do the names in `hosts` lead to now? `store status` shows the fleet",
            )

    def _beat(self) -> Steps[None]:
        before, inc, seen = self._clock.read(), self._inc, self._board.seen
        host, keks = self._who.host, self._local.keks()
        if (yield from ask(lambda registry: registry.beat(host, inc, seen, keks))):
            self.told = keks
            self._renew(before)
        else:
            self._fenced()

    def _renew(self, before: lease.Reading) -> None:
        self._board.grant(lease.granted(before, self._span))
        self._next_beat = before.steady + self._span / lease.BEATS

    def _fenced(self) -> None:
        self._step_down()
        self.why = "this host was given up by another, since it was silent for too long"
        log.error("%s: it forgets what it knows, and registers anew", self.why)

    def _step_down(self) -> None:
        self._board.end()
        self._given_up += filter(None, [self._inc])
        self._inc = self._active = ""

    def _follow(self) -> Steps[None]:
        """All changes up to now; then the others are told how far this host is."""
        begun = seen = self._board.seen
        while True:
            news: News = yield from ask(lambda registry: registry.news(self._board.seen.gen, PAGE))
            yield from self._of_ours(news.fleet)
            if news.fleet.point < seen:
                yield from ask(lambda registry: registry.drop())
                raise StoreUnavailable(
                    f"the database is at {news.fleet.point}, and this host has seen {seen}",
                    hint="is it an old primary, or was it put back? `store status`",
                )
            yield from self._apply(news)
            if (seen := self._board.seen) == news.fleet.point:
                break
        if seen != begun:
            yield from self._beat()

    def _apply(self, news: News) -> Steps[None]:
        seen, now, changes = self._board.seen, news.fleet.point, news.changes
        if now == seen:
            return
        yield from self._move_to(news.fleet)
        if now.timeline != seen.timeline or not follows(seen.gen, changes):
            self._board.flush(now)
            return
        for change in changes:
            self._board.tell(change)

    def _move_to(self, fleet: FleetRow) -> Steps[None]:
        """To its active KEK. A host that doesn't have that serves no more, and nobody waits for it."""
        try:
            self._adopt(fleet)
        except KMSError:
            inc = self._inc
            self._step_down()
            yield from ask(lambda registry: registry.leave(self._who.host, inc))
            raise

    def _adopt(self, fleet: FleetRow) -> None:
        if fleet.active_kek != self._active:
            self._local.adopt(fleet.active_kek, fleet.version)
            self._active = fleet.active_kek

    def _look(self) -> Steps[None]:
        """How far are the others? Who is silent for too long is fenced, where a change waits for it."""
        pending, asked = list(self._pending), self._now()
        sight: Sight = yield from ask(lambda registry: registry.sight())
        yield from self._of_ours(sight.fleet)
        me, now = (self._who.host, self._inc), self._now()
        self._watch = barrier.watched(self._watch, sight, asked, now, self._span)
        self._next_look = now + self._span / lease.BEATS
        mine = self._board.seen
        self._done([each for each in pending if barrier.everywhere(sight, me, mine, each.point)])
        late = [change.point.gen for change in self._pending]
        self._pause = min(2 * self._pause, self.impatience[1]) if late else self.impatience[0]
        slow = [*barrier.behind(sight.hosts, max(late, default=0)), *barrier.rotating(sight)]
        for row in barrier.dead(self._watch, slow, me, self._now(), self._span):
            yield from self._fence(row, sight.fleet.timeline)
        if not late and (below := barrier.prunable(sight, me)) > self._pruned:
            self._pruned = below
            yield from ask(lambda registry: registry.prune(below))

    def _fence(self, row: HostRow, timeline: int) -> Steps[None]:
        if (yield from ask(lambda registry: registry.fence(row.host, row.inc, row.beat, timeline))):
            log.warning(
                "the host %s was silent for %.0f s: it is fenced, and changes wait for it no more",
                *(row, self._span),
            )

    def _done(self, changes: Sequence[Pending]) -> None:
        for change in changes:
            self._tell(change, None)

    def _give_up_late(self) -> None:
        now = self._now()
        for change in [change for change in self._pending if now >= change.deadline]:
            self._tell(change, not_everywhere(self.why))

    def _tell(self, change: Pending, error: KMSError | None) -> None:
        self._pending.remove(change)
        self.waited = self.waited.plus(error, self._now() - change.since)
        try:
            change.then(error)
        except Exception:  # of one caller; all others wait for this thread
            log.exception("who waits for change %d could not be told", change.point.gen)

    def _well(self) -> None:
        self.error = None
        if self._inc:
            self.why = ""
            self._outage.tell()

    def _failed(self, error: KMSError) -> None:
        self.error, self.why = error, error.message
        self._outage.tell(error.line)

    def _leave(self) -> Steps[None]:
        self._board.end()
        if self._inc:
            try:
                yield from ask(lambda registry: registry.leave(self._who.host, self._inc))
            except StoreUnavailable as error:
                log.warning("this host could not sign off from the fleet: %s", error.message)

    # ---- times -----------------------------------------------------------------------------------

    def _now(self) -> float:
        return self._clock.steady()

    def _rest(self) -> float:
        if not self._inc:
            return 0.0
        if self._pending:
            return self._pause
        return max(0.0, min(self.poll, self._next_beat - self._now()))


def follows(seen: int, changes: Sequence[ChangeRow]) -> bool:
    """Are these the next changes, without a gap?"""
    return bool(changes) and all(change.gen == seen + n for n, change in enumerate(changes, 1))


def not_everywhere(why: str) -> Unavailable:
    return Unavailable(
        f"the change is made, but not every host is known to act on it yet{f' ({why})' if why else ''}",
        code="done_not_everywhere",
        hint="ask again: every change may be repeated, and is answered when it holds everywhere",
    )


def run(host: Host, registry: Registry) -> None:
    """To its end, in this thread."""
    steps = host.life()
    try:
        question = next(steps)
        while True:
            try:
                answer = question(registry)
            except Exception as error:
                question = steps.throw(error)
            else:
                question = steps.send(answer)
    except StopIteration:
        registry.close()
