"""What the hosts of a fleet share: a few rows, and what is asked of the engine that keeps them.

No daemon talks to another. What one must know of another is in three tables: `fleet` (one row), `hosts` (a
row for each daemon that runs), `changes` (a row for each number of `fleet.gen`). The decisions (`lease`,
`barrier`, `ring`) take these rows and a clock, and return what to do; the engine's side (`Registry`) does it.
So the same decisions run against PostgreSQL and in the simulation of tests/fleet.

What the engine's side must hold, each for a reason that the simulation shows where it is taken away:

- Each call is one transaction that is committed **synchronously** when it returns. Where that isn't known
  (the connection was lost, or COMMIT came with a WARNING, as it does when the wait for a standby is
  cancelled), it raises StoreUnavailable: it may have happened, or may happen yet.
- The key of `hosts` is **(host, inc)**, not host: a daemon that starts again, or a copy of its data-dir, must
  not take away the row of an incarnation that may still serve. Such a row is fenced in time, like that of any
  dead host.
- `beat` changes a row that is there and not fenced, and never makes one: else a host that was fenced while it
  was stopped would come back with a cache from before.
- What a call returns was read from **one** snapshot, its `Point` included. An old primary that nobody told of
  its end goes on to answer reads, and may show commits that nobody acknowledged (their wait for a standby was
  cancelled, or it was started anew): its gens are no prefix of ours. So a gen counts with the engine's
  **timeline**, which grows with each promotion, and what a host remembers goes with it.
- A transaction that finds everything as it should be already (a create or a change that is repeated) **writes
  something** all the same: one that wrote nothing commits without waiting for a standby, and would
  acknowledge what a failover loses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, Union

from ..errors import StoreDamaged
from ..store.contract import Usage

Wanted = tuple[Union[str, None], Union[str, None]]
"""A DEK to be made: its thread_id, its key_id; None: see `Deks.create`."""

KEY = "key"
KEKS = "keks"
ALL = "all"
"""Kinds of a change: one DEK (disable, enable, shred, rewrap); another active KEK, after a rotation; and
anything that touches more than one DEK. What a host remembers of a DEK must go with the first, and all that
it remembers with the others."""


class Point(NamedTuple):
    """A place in the history of a database. `timeline` is the engine's: with it, `gen` is the number of a
    change, without it only one of two changes that a split brain may have made."""

    timeline: int
    gen: int

    def covers(self, other: Point) -> bool:
        """Is all that was acknowledged up to there known here? The order of tuples would not do: a gen of an
        earlier timeline that was never acknowledged may be higher than one of a later."""
        return self.timeline >= other.timeline and self.gen >= other.gen

    def __str__(self) -> str:
        """For people."""
        return f"change {self.gen} of timeline {self.timeline}"


class FleetRow(NamedTuple):
    """The one row of the table `fleet`, and the timeline on which it was read."""

    fleet: str  # a random id, for life
    epoch: int  # grows with each restore
    schema: int
    gen: int  # the number of the last change; creates don't move it
    active_kek: str
    version: int  # of the active KEK
    rotating: bool
    owner: str  # the host that rotates, "" for none
    timeline: int  # no column: of the server that answered

    @classmethod
    def of(cls, columns: Sequence[Any]) -> FleetRow:
        """From the columns, whoever wrote them. Raises StoreDamaged."""
        for name, value in zip(cls._fields, columns):
            if value is not None and (name not in _NUMBERS or value >= 0):
                continue
            raise StoreDamaged(
                f"the fleet's own row can't be: its {name} is {'NULL' if value is None else value}",
                hint="somebody wrote there by hand: put back what it was, or restore a backup into another "
                "database: `progressdb-kms help fleet`",
            )
        return cls(*columns)

    @property
    def point(self) -> Point:
        return Point(self.timeline, self.gen)


_NUMBERS = ("epoch", "schema", "gen", "version", "timeline")


def first(rows: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Of an answer that has the fleet's row in it. Raises StoreDamaged where that was deleted."""
    if not rows:
        raise StoreDamaged(
            "the fleet's own row is gone: somebody deleted it",
            hint="restore a backup into another database: `progressdb-kms help fleet`",
        )
    return rows[0]


class HostRow(NamedTuple):
    """A daemon that runs, or did. `name` is for people, and decides nothing."""

    host: str  # a random id, kept in its data-dir
    inc: str  # fresh at each registration
    name: str
    beat: int  # counts its heartbeats
    seen: int  # every change up to this number is known to all of its processes
    keks: frozenset[str]  # the KEKs that it has configured, next ones too
    fenced: bool

    @classmethod
    def of(
        cls, host: str, inc: str, name: str, beat: int, seen: int, keks: Iterable[str | None], fenced: bool
    ) -> HostRow:
        """From the columns, whoever wrote them. Raises StoreDamaged."""
        if None in (host, inc, name, beat, seen, keks, fenced):
            raise StoreDamaged(
                f"a row of kms.hosts has a NULL: {plain(host or '?')}",
                hint="somebody altered that table: delete the row; a daemon that runs registers anew",
            )
        return cls(host, inc, plain(name), beat, seen, frozenset(filter(None, keks)), fenced)

    def __str__(self) -> str:
        """For people."""
        return f"{self.name} ({plain(self.host)})"


def plain(text: str) -> str:
    """A name that stands in a row, for a line of the journal: it may hold whatever somebody wrote there."""
    return "".join(char if char.isprintable() else "?" for char in text[:64])


def added(kept: Usage, more: Usage) -> Usage:
    """What was done under a DEK, with what was done since."""
    late = more if more.last >= kept.last else kept
    first_use = min(filter(None, (kept.first, more.first)), default=0)
    return Usage(kept.encrypts + more.encrypts, kept.decrypts + more.decrypts, first_use, late.last, late.uid)


class ChangeRow(NamedTuple):
    """A change that the hosts must hear of. `key_id` is empty but for the kind `key`."""

    gen: int
    kind: str
    key_id: str


class News(NamedTuple):
    """What happened after a gen. `changes` in order of gen, at most as many as were asked for: where they
    don't begin with the next one, they were pruned meanwhile."""

    fleet: FleetRow
    changes: Sequence[ChangeRow]


class Sight(NamedTuple):
    """The fleet and all of its hosts, fenced ones too, in one snapshot."""

    fleet: FleetRow
    hosts: Sequence[HostRow]


class Registry(Protocol):
    """The engine, as leases and barriers see it. One connection, one caller at a time; each method raises
    StoreUnavailable, see the module, and connects again where it must."""

    def register(
        self, host: str, inc: str, name: str, keks: frozenset[str], gone: Sequence[str] = ()
    ) -> FleetRow:
        """A new row with beat 0 and seen = gen. `gone`: incarnations of this host that surely run no more;
        their rows are deleted, and this host's fenced ones.

        The row of `fleet` is read FOR SHARE first: a change holds that row to its COMMIT, so its gen is
        either in what is returned, or its barrier sees the new row."""
        ...

    def beat(self, host: str, inc: str, seen: Point, keks: frozenset[str]) -> bool:
        """In the row of (host, inc) that is not fenced, and only if this server is on that timeline: beat +
        1, greatest(seen, …), these keks. False: nothing was changed, so this incarnation is fenced, or has
        seen what isn't the history here. (`greatest`: a beat that was given up for lost may arrive after its
        successor.)"""
        ...

    def news(self, after: int, limit: int) -> News: ...

    def sight(self) -> Sight: ...

    def fence(self, host: str, inc: str, beat: int, timeline: int) -> bool:
        """Compare and set: only where (inc, beat) are these and it is not fenced, and this server is on that
        timeline: on another one a beat of that number may be another beat. False: it lives, or somebody else
        did it, or the look was at another server."""
        ...

    def prune(self, below: int) -> None:
        """Delete changes below this gen, not necessarily all at once."""
        ...

    def leave(self, host: str, inc: str) -> None:
        """Delete the row: this daemon serves no more."""
        ...

    def wait(self, seconds: float) -> bool:
        """Until something was notified, or so long. A hint and no more: it may be wrong both ways. Also ends
        at once when `wake` is called by another thread, or was since the last wait. Never raises: without a
        connection it only waits."""
        ...

    def wake(self) -> None: ...

    def drop(self) -> None:
        """This connection leads to an engine that is behind: find the primary anew at the next call."""
        ...

    def close(self) -> None: ...
