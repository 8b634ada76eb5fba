"""Creates of many callers, done together: loaded nowhere but on a host of a fleet.

There a transaction costs the keeper and the engine about as much whether it makes one DEK or fifty; and a
thread for each create, which is woken and waits, costs a worker more than all else. So a create has two
halves. The waiter does the first, up to what is asked of the keeper. What all asked in a turn goes there as
one job, and one thread does the second halves, each with what was made for it. While two jobs are under way,
what comes meanwhile gathers: the more callers, the larger the jobs.

A route's function knows nothing of that. It is run twice, with what stands in for the service: in the first
half that takes down what it is asked for, in the second it gives what was made. What goes wrong before that
question is answered at once. Each create has its own record in the audit log, answer, and error."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from ..errors import Overloaded, Unavailable
from ..fleet.rows import Wanted
from ..service.service import Service
from . import deks, dispatch
from .call import App, Call, Route
from .connection import AWAY, IDLE, Connection
from .http1 import Request
from .lone import Events
from .receiving import Receiver
from .server import Server

SMALL = 4096
"""Bytes of a body that waits here; a longer one goes its own way, and counts to the budget of bodies."""

UNDER_WAY = 2
"""Jobs of a UID beside which others gather: the keeper is at one, and has the next at hand."""

HELD_UP = 0.1
"""Seconds after which a job counts no more: the keeper may hang, and who waits should hear so in time."""

_CREATES = deks.create_dek_for_thread, deks.create_dek


class _Asked(BaseException):
    """What a route's function asks of the keeper. No Exception: nothing on its way takes it for a fault."""


class _Asking:
    """In the service's place, in the first half."""

    def change(self, op: str, thread_id: str | None, key_id: str | None) -> Any:
        raise _Asked(thread_id, key_id)


class _Told:
    """And in the second."""

    def __init__(self, service: Service) -> None:
        self.audit, self.counters = service.audit, service.counters
        self.made: dict[str, Any] | Exception = Unavailable("nothing was made")

    def change(self, op: str, **args: Any) -> dict[str, Any]:
        if isinstance(self.made, Exception):
            raise self.made
        return self.made


class Half(NamedTuple):
    """A create whose other half waits for the keeper."""

    connection: Connection
    route: Route
    call: Call
    begun: float
    wanted: Wanted


class TogetherReceiver(Receiver):
    """See the module. All but `_see_to` is the waiter's."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        asking: Any = _Asking()
        self._first: App = self._app._replace(service=asking)
        self._gathered: dict[int, list[Half]] = {}  # by UID
        self._under_way: defaultdict[int, deque[float]] = defaultdict(deque)  # since when

    def carry_out(self, connection: Connection, request: Request) -> int:
        route: Route = request.room.route
        if route.handler not in _CREATES or len(request.body) > SMALL:
            return super().carry_out(connection, request)
        connection.phase = IDLE
        begun, peer, body = time.perf_counter(), connection.peer, bytes(request.body)
        call = Call(request.head, body, peer, connection.fragment, *self._slab.waiter, connection.rights)
        try:
            route.handler(self._first, call)
            raise RuntimeError("a create that asks for no DEK")
        except _Asked as asked:
            half = Half(connection, route, call, begun, asked.args)
            self._gathered.setdefault(peer.uid, []).append(half)
        except Exception as error:
            told, app = self._telling()
            told.made = error
            reply = dispatch.dispatch(app, route, call, begun)
            return self._sender.answer_now(connection, request.head, reply)
        self._connections.lend(connection)
        return AWAY

    def _telling(self) -> tuple[_Told, App]:
        told: Any = _Told(self._app.service)
        return told, self._app._replace(service=told)

    def go(self) -> None:
        """A turn is over, and what was asked in it goes."""
        now = self._connections.now
        for uid in list(self._gathered):
            went = self._under_way[uid]
            if sum(now - since < HELD_UP for since in list(went)) < UNDER_WAY:
                halves = self._gathered.pop(uid)
                went.append(now)
                try:
                    self._lanes.waiting.submit(uid, partial(self._see_to, halves, went))
                except Overloaded as error:
                    went.pop()
                    self._finish_all(halves, [error] * len(halves))

    def _see_to(self, halves: list[Half], went: deque[float], *memory: memoryview) -> None:
        service: Any = self._app.service
        self._finish_all(halves, service.create_many([half.wanted for half in halves]))
        went.popleft()  # another's time, it may be: how many there are is what counts
        self._lanes.wake()

    def _finish_all(self, halves: list[Half], made: Sequence[dict[str, Any] | Exception]) -> None:
        told, app = self._telling()
        for (connection, route, call, begun, _), told.made in zip(halves, made):
            self._lanes.finish(app, connection, route, call, begun)


class TogetherServer(Server):
    _receiver: TogetherReceiver
    receives = TogetherReceiver

    def _wait(self) -> Events:
        self._receiver.go()
        return super()._wait()
