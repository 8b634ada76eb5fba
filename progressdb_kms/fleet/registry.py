"""The engine's side of `rows.Registry`, in PostgreSQL: each question is one statement, so one transaction.

One connection, used by the thread that keeps this host's place in the fleet; `wake` is for any thread. What
`rows` demands is held here so:

- A statement that changes something commits before it answers, and the session's `synchronous_commit` was
  looked at when it was made. A WARNING means that the COMMIT did not wait: the outcome is unknown.
- A beat names the timeline on which its `seen` was seen, a fence that on which the silence was, and neither
  changes anything on a server of another one.
- `register` reads the row of `fleet` FOR SHARE: that waits for a change which is under way, and then sees it.

Notices (LISTEN) come on this connection; one that was lost takes them along, so after each new connection
there is nothing to wait for: the caller looks at once."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg

from ..errors import StoreUnavailable
from .engine import ANSWER_SECONDS, TIMELINE, UNREACHABLE, Link, Session
from .lease import BEATS
from .rows import ALL, ChangeRow, FleetRow, HostRow, News, Sight, first
from .store import CHANNEL, WRITER

_FLEET = ", ".join([*FleetRow._fields[:-1], TIMELINE])
_WIDTH = len(FleetRow._fields)

_REGISTER = f"""
WITH f AS (SELECT * FROM fleet FOR SHARE),
gone AS (DELETE FROM hosts WHERE host = %(host)s AND (fenced OR inc = ANY(%(gone)s))),
made AS (INSERT INTO hosts SELECT %(host)s, %(inc)s, %(name)s, 0, gen, %(keks)s, false FROM f)
SELECT {_FLEET} FROM f"""  # noqa: S608  # our own columns
_BEAT = f"""
UPDATE hosts SET beat = beat + 1, seen = greatest(seen, %(seen)s), keks = %(keks)s
WHERE host = %(host)s AND inc = %(inc)s AND NOT fenced AND {TIMELINE} = %(timeline)s RETURNING 1"""  # noqa: S608
_FENCE = f"""
UPDATE hosts SET fenced = true WHERE host = %(host)s AND inc = %(inc)s AND beat = %(beat)s AND NOT fenced
AND {TIMELINE} = %(timeline)s RETURNING 1"""  # noqa: S608
_CUT = f"""
SELECT pg_terminate_backend(a.pid) FROM hosts AS h JOIN pg_stat_activity AS a
ON a.usename = current_user AND a.application_name = '{WRITER}' || h.host
WHERE h.host = %(host)s AND h.inc = %(inc)s AND h.beat = %(beat)s AND NOT h.fenced
AND {TIMELINE} = %(timeline)s"""  # noqa: S608
_LEAVE = "DELETE FROM hosts WHERE host = %(host)s AND inc = %(inc)s RETURNING 1"
_PRUNE = """
DELETE FROM changes WHERE gen IN (SELECT gen FROM changes WHERE gen < %(below)s ORDER BY gen LIMIT 20000)
RETURNING 1"""
_NEWS = f"""
SELECT f.*, c.* FROM (SELECT {_FLEET} FROM fleet) AS f LEFT JOIN
(SELECT gen, CASE WHEN key_id IS NULL THEN '{ALL}' ELSE kind END, coalesce(key_id, '')
FROM changes WHERE gen > %(after)s ORDER BY gen LIMIT %(limit)s) AS c ON c.gen <= f.gen
ORDER BY c.gen"""  # noqa: S608
"""What stands there of a number that is still to come is no change, and a row that can't be one is of all."""
_SIGHT = f"""
SELECT f.*, h.host, h.inc, h.name, h.beat, h.seen, h.keks, h.fenced
FROM (SELECT {_FLEET} FROM fleet) AS f LEFT JOIN hosts AS h ON true ORDER BY h.host, h.inc"""  # noqa: S608


class EngineRegistry:
    """`span`: fence_seconds. An answer that takes longer than a heartbeat is given up."""

    def __init__(self, link: Link, span: float) -> None:
        self._link = link
        self._limit = min(ANSWER_SECONDS, span / BEATS)
        self._listening: Session | None = None
        self._noticed = True
        self._waking = threading.Lock()
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)

    # ---- questions -----------------------------------------------------------------------------

    def register(
        self, host: str, inc: str, name: str, keks: frozenset[str], gone: Sequence[str] = ()
    ) -> FleetRow:
        about = {"host": host, "inc": inc, "name": name, "keks": sorted(keks), "gone": list(gone)}
        return FleetRow.of(first(self._committed(_REGISTER, about)))

    def beat(self, host: str, inc: str, seen: Any, keks: frozenset[str]) -> bool:
        about = {"host": host, "inc": inc, "keks": sorted(keks), "seen": seen.gen, "timeline": seen.timeline}
        return bool(self._committed(_BEAT, about))

    def fence(self, host: str, inc: str, beat: int, timeline: int) -> bool:
        """Its writer's session is ended first. A host that was stopped in the middle of a pipeline has sent
        half of a transaction: its backend waits for the rest, with all locks, and no timeout ends that."""
        about = {"host": host, "inc": inc, "beat": beat, "timeline": timeline}
        self._rows(_CUT, about)
        return bool(self._committed(_FENCE, about))

    def leave(self, host: str, inc: str) -> None:
        self._committed(_LEAVE, {"host": host, "inc": inc})

    def prune(self, below: int) -> None:
        self._committed(_PRUNE, {"below": below})

    def news(self, after: int, limit: int) -> News:
        rows = self._rows(_NEWS, {"after": after, "limit": limit})
        changes = [ChangeRow(*row[_WIDTH:]) for row in rows if row[_WIDTH] is not None]
        return News(FleetRow.of(first(rows)[:_WIDTH]), changes)

    def sight(self) -> Sight:
        rows = self._rows(_SIGHT, {})
        hosts = [HostRow.of(*row[_WIDTH:]) for row in rows if row[_WIDTH] is not None]
        return Sight(FleetRow.of(first(rows)[:_WIDTH]), hosts)

    def _committed(self, sql: str, about: dict[str, Any]) -> list[tuple[Any, ...]]:
        with self._session() as session:
            session.warning = ""
            rows = session.execute(sql, about).fetchall()
            if session.warning:
                raise StoreUnavailable(
                    f"{self._link.where} warns at COMMIT: {session.warning}",
                    code=UNREACHABLE,
                    hint="its standby has it or not: it is tried again",
                )
            return rows

    def _rows(self, sql: str, about: dict[str, Any]) -> list[tuple[Any, ...]]:
        with self._session() as session:
            return session.execute(sql, about).fetchall()

    @contextlib.contextmanager
    def _session(self) -> Iterator[Session]:
        with self._link.session() as session:
            if session is not self._listening:
                session.limit = self._limit
                session.add_notify_handler(self._notice)
                session.execute(f"LISTEN {CHANNEL}")
                self._listening, self._noticed = session, True
            yield session

    # ---- waiting -------------------------------------------------------------------------------

    def wait(self, seconds: float) -> bool:
        self._take_notices()
        poller = select.poll()
        poller.register(self._woken, select.POLLIN)
        if self._listening is not None and not self._listening.closed:
            poller.register(self._listening.fileno(), select.POLLIN)
        poller.poll(0 if self._noticed else max(0.0, seconds) * 1000)
        self._take_notices()
        noticed, self._noticed = self._noticed, False
        return noticed

    def _take_notices(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._woken, 4096):
                self._noticed = True
        session = self._listening
        if session is None or session.closed:
            return
        try:
            session.pgconn.consume_input()
            while session.pgconn.notifies() is not None:
                self._noticed = True
        except psycopg.Error:
            self.drop()
            self._noticed = True

    def _notice(self, _: Any) -> None:
        """One that came beside an answer."""
        self._noticed = True

    def wake(self) -> None:
        with self._waking, contextlib.suppress(BlockingIOError):  # full: it is as good as woken
            if self._waker >= 0:
                os.write(self._waker, b"!")

    def drop(self) -> None:
        self._listening = None
        self._link.drop()

    def close(self) -> None:
        """Whoever wakes it now, wakes nobody; and doesn't write to whatever has that number then."""
        self.drop()
        with self._waking:
            os.close(self._woken)
            os.close(self._waker)
            self._woken = self._waker = -1
