"""When may a change be answered? When no host can act on the state before it: each either says that it knows
of the change (`seen` is at least its `gen`), or is fenced, and its lease is over.

Decisions only: rows and times come in, what is to be done goes out. `Watch` is what one host knows of the
silence of the others. It is renewed at each look, so that a host that has been dead for long costs no wait;
and after a gap in which this host saw nothing itself (the engine was away, it was stopped) it begins anew,
because then all the others may be late for the same reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .lease import BEATS, silent
from .rows import HostRow, Point, Sight

Name = tuple[str, str]
"""(host, inc): one incarnation of a daemon."""


class Seen(NamedTuple):
    """The heartbeat that a row showed, and since when, by our steady clock."""

    beat: int
    since: float


class Watch(NamedTuple):
    """Of all incarnations; when the last look ended, and on which timeline it was."""

    rows: Mapping[Name, Seen]
    last: float
    timeline: int


FIRST = Watch({}, float("-inf"), 0)

KEPT_CHANGES = 10_000
"""Changes that are kept although every host knows them: for whoever looks at what happened."""


def name(row: HostRow) -> Name:
    return row.host, row.inc


def living(rows: Sequence[HostRow]) -> list[HostRow]:
    """Those that nobody has fenced: each of them may serve."""
    return [row for row in rows if not row.fenced]


def watched(watch: Watch, sight: Sight, asked: float, answered: float, span: float) -> Watch:
    """The watch after another look. `span` is fence_seconds; times by our steady clock, before the question
    and after the answer. On another timeline a beat of the same number may be another beat."""
    goes_on = sight.fleet.timeline == watch.timeline and asked - watch.last <= span * 2 / BEATS
    known = watch.rows if goes_on else {}
    now = {name(row): Seen(row.beat, answered) for row in living(sight.hosts)}
    for key, found in now.items():
        before = known.get(key)
        if before is not None and before.beat == found.beat:
            now[key] = before
    return Watch(now, answered, sight.fleet.timeline)


def everywhere(sight: Sight, me: Name, mine: Point, change: Point) -> bool:
    """Do all hosts know of this change? `mine`: up to where this one does; its own row may be behind.

    A look at an engine that doesn't know of the change yet, or not any more, tells nothing: a host may have
    come that isn't in it."""
    others = (row for row in living(sight.hosts) if name(row) != me)
    return (
        sight.fleet.point.covers(change)
        and mine.covers(change)
        and all(row.seen >= change.gen for row in others)
    )


def dead(watch: Watch, rows: Sequence[HostRow], me: Name, now: float, span: float) -> list[HostRow]:
    """Those that may be fenced, at `now` by our steady clock; each by compare-and-set of what is in its
    row."""
    return [
        row
        for row in living(rows)
        if name(row) != me
        and (found := watch.rows.get(name(row))) is not None
        and found.beat == row.beat
        and silent(found.since, now, span)
    ]


def behind(rows: Sequence[HostRow], gen: int) -> list[HostRow]:
    """Whom a change of this gen waits for."""
    return [row for row in living(rows) if row.seen < gen]


def rotating(sight: Sight) -> list[HostRow]:
    """The host that rotates. It is looked after though no change waits for it: whoever is dead leaves a table
    behind, and marks that every write adds to."""
    if not sight.fleet.rotating:
        return []
    return [row for row in living(sight.hosts) if row.host == sight.fleet.owner]


def prunable(sight: Sight, me: Name) -> int:
    """Changes below this gen may be forgotten: every host knows them, and one that finds a gap forgets all it
    remembers. 0: none, or it is for another host to do."""
    rows = living(sight.hosts)
    if me != min(map(name, rows), default=None):
        return 0
    return max(0, min(row.seen for row in rows) - KEPT_CHANGES)


def without_kek(rows: Sequence[HostRow], kek_id: str) -> list[str]:
    """The names of the hosts that a rotation to this KEK would lock out: they don't have it configured."""
    return sorted({row.name or row.host for row in living(rows) if kek_id not in row.keks})
