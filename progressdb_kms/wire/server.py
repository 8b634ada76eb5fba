"""The edge: connections, deadlines, limits. `doors` lets in, `http1` judges the bytes, `routes` the requests.

One thread a worker waits for all of its connections, and serves by itself every request that is here whole
and can't take long. No peer, idle or slow, holds a thread. What waits for the keeper, and long work, goes to
a few threads; the connection comes back when it was answered.

    connections  until when each may go on, and where its socket is waited for
    receiving    bytes in, and the requests that they are
    sending      answers on their way out
    lanes        to threads, and back
    fair, pace   who comes first, and who rests
    lone         how to wait where there is one connection

Here is the turn: who has something to be done, in which order, and for how long; and who comes in at all.
"""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Callable

from ..audit.log import Fragment, peer_fragment
from ..errors import KMSError, Overloaded, PeerRefused, RequestTimeout
from ..rules import Peer
from . import dispatch, routes
from .admission import SPARE_FILES, Limits, Refusals, Shares
from .answers import last_words
from .call import App
from .connection import AHEAD, ANSWERING, BODY, BUSY, HEAD, IDLE, IN, LINGERING, NEXT, REFUSED, Connection
from .connections import Connections
from .doors import EVENTS, STRANGER, Door, Doors
from .fair import Fair
from .handed import Closer
from .lanes import SLICE, Lanes
from .lone import SOON, Events, Lone
from .pace import Pace
from .receiving import TURN, Receiver
from .sending import Sender
from .slab import Slab

LOOK_SECONDS = 0.1
"""So often it is seen whose short requests come."""

TURNED_AWAY, MOST_TURNED_AWAY, AT_ONCE = 64, 1024, 16
"""Peers that are refused at accept and may read why at a time, and as many where descriptors are left; where
there are more, the oldest goes. Where so many are there, who is not served at all hears so after a second:
who comes again and again takes less of everybody's time that way."""


class Server(socketserver.ThreadingUnixStreamServer):
    """Serves on listening sockets that other workers may share. `process_request` decides who serves."""

    receives: type[Receiver] = Receiver

    def __init__(self, doors: Sequence[Door], app: App, limits: Limits, slab: Slab) -> None:
        super().__init__("", Connection, bind_and_activate=False)  # type: ignore[arg-type]
        self.socket.close()
        self._counters = app.service.counters
        self._metrics = app.metrics
        self._refusals = Refusals(app.service.audit, self._counters)
        self.app = app._replace(denied=self._refusals.add)
        self.limits = limits
        self.slab = slab
        left = limits.descriptors - SPARE_FILES - limits.max_connections
        self._most_turned_away = max(TURNED_AWAY, min(left, MOST_TURNED_AWAY))
        longest = max(route.body_limit(app) for route in routes.ROUTES)
        self.shares = Shares(self._metrics, self._counters, limits, longest)
        self._pace = Pace(self._metrics, self._counters)
        closer = Closer(door.listener for door in doors)
        self._connections = Connections(self._pace, self.shares, slab, limits, closer)
        self._sender = Sender(self._connections, slab)
        self._lanes = Lanes(self.app, self._pace, self._sender, slab)
        self._receiver = self.receives(
            self.app, self._connections, self._sender, self._lanes, self._pace, slab
        )
        self.narrow = self._receiver.narrow
        self._doors = Doors(doors, self._pace.poll, self._greet, self.shares)
        self._fair = Fair()
        self._lone = Lone()
        self.turns = 0
        self._tick_seconds = min(1.0, max(0.02, min(limits.idle_timeout, limits.request_timeout) / 8))
        self._next_look = self._next_tick = 0.0
        self._drain_until = 0.0
        self._ended = threading.Event()

    # ---- turn after turn -------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Until `drain`."""
        sys.setswitchinterval(SLICE)
        try:
            while not self._drain_until:
                self._turn()
            self._doors.close()  # who was there is let in
            self._sender.draining = True
            for connection in self._connections.all.values():  # each ends behind what it has sent
                if connection.phase <= ANSWERING:
                    with suppress(OSError):
                        connection.request.shutdown(socket.SHUT_RD)
            while self._connections.all and self._connections.now < self._drain_until:
                self._turn()
            self._refusals.flush(everything=True)
        finally:
            self._ended.set()

    def _turn(self) -> None:
        if self._lone.sole is not None:
            self._serve_sole(self._lone.sole)
        self._lanes.at_work = False
        events = self._wait()
        self._lanes.at_work = True
        self.turns += 1
        now = self._connections.now = time.monotonic()
        if self._doors.resting or self._doors.renewed:
            self._doors.go_on(now)
        if len(events) > 1:
            self.app.service.begin_turn(self.slab.waiter[0])
        connections = self._connections.all
        doors: list[int] = []
        known: list[Connection] = []
        others: list[Connection] = []
        slow: Events = []
        for fd, _ in events:
            connection = connections.get(fd)
            if connection is not None:
                if connection.phase == IDLE and connection.answered:
                    known.append(connection)
                elif connection.phase != AHEAD:
                    others.append(connection)
            elif fd in self._doors:
                doors.append(fd)
            elif fd == self._pace.fd:
                slow = self._pace.slow.poll(0.0, EVENTS)
            else:
                self._lanes.heard()
        self._serve_known(known)
        self.app.service.end_turn()
        self._sender.flush()
        while self._lanes.back:
            connection = self._lanes.back.popleft()
            if self._connections.take_back(connection) and self._sender.sent(connection) == NEXT:
                self._connections.rest(connection)
        if others or self._connections.ahead:
            self._serve_others(others)
        if slow:
            self._serve_slow([connections[fd] for fd, _ in slow if fd in connections])
        self._sender.flush()
        for fd in doors:
            self._doors.let_in(fd, time.monotonic() - now)
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._pace.look(now)
        if now >= self._next_tick:
            self._tick(now)

    def _serve_known(self, known: list[Connection]) -> None:
        """Of one UID all, as they came. Of several until one takes long: then it is asked who has come
        meanwhile, and whoever is left is told of again."""
        receive, sender = self._receiver.receive, self._sender
        if len(self._connections.uids) < 2:
            for connection in known:
                receive(connection)
            return
        spent = 0.0
        for connection in self._fair.order(known):
            if sender.out and sender.out[-1][0].peer.uid != connection.peer.uid:
                sender.flush()
            took = self._do(receive, connection)
            spent += took
            if took > TURN or spent > 10 * TURN:
                break

    def _serve_others(self, others: list[Connection]) -> None:
        """Each of them is the first at some time; whoever has no turn in this one is told of again. None of
        them lies in `ahead` too: its next bytes, or its end, come when its answers are sent."""
        waiting, ahead = deque(self._fair.order(others)), deque(self._fair.order(self._connections.ahead))
        self._connections.ahead = ahead
        spent = 0.0
        while (waiting or ahead) and spent <= TURN:
            if waiting:
                spent += self._do(self._comes, waiting.popleft())
            if ahead:
                spent += self._do(self._receiver.go_ahead, ahead.popleft())

    def _serve_slow(self, ready: list[Connection]) -> None:
        """One of those that disturb others, and a rest follows; or as many as a turn has time for."""
        spent = 0.0
        for connection in self._fair.order(ready):
            spent += self._do(self._comes, connection)
            if self._pace.disturbs(connection.peer.uid):
                self._pace.rest(spent)
                break
            if spent > TURN:
                break

    def _do(self, work: Callable[[Connection], object], connection: Connection) -> float:
        """Charge it to its UID; returns the seconds."""
        begun = time.monotonic()
        connection.turn = self.turns
        work(connection)
        seconds = time.monotonic() - begun
        self._fair.took(connection.peer.uid, seconds)
        return seconds

    def _serve_sole(self, connection: Connection) -> None:
        """Wait in recv for the only connection there is, and look at times who else has come."""
        served, came, until = 0, True, self._connections.now + SOON
        while came and connection.phase == IDLE and self._connections.now < until:
            came = self._receiver.receive(connection)
            self._sender.flush()
            self._connections.now = time.monotonic()
            served += 1
        if self._lone.served(served, came) or connection.phase != IDLE or len(self._connections.all) != 1:
            self._lone.leave(connection)

    def _wait(self) -> Events:
        connections = self._connections.all
        seconds = self._tick_seconds if connections or self._pace.came else 5.0
        if resting := self._doors.resting:
            seconds = max(0.0, min(seconds, min(resting.values()) - time.monotonic()))
        if self._pace.resting:
            seconds = self._pace.left(seconds)
        if self._connections.ahead or self._lanes.back or self._lone.sole is not None:
            seconds = 0.0
        if len(connections) == 1:
            return self._lone.wait(self._pace.poll, seconds, *connections.values())
        return self._pace.poll.poll(seconds, EVENTS)

    def _tick(self, now: float) -> None:
        """Whose time is over?"""
        self._next_tick = now + (0.1 if self._connections.turned_away else self._tick_seconds)
        for connection in [c for c in self._connections.all.values() if c.deadline <= now]:
            self._late(connection)
        self._sender.flush()
        self._refusals.flush()
        self._receiver.scarcity.look(now)
        alone = len(self._connections.all) == 1 == sum(self._metrics.gauge("connections"))
        self._lone.look_around(self.limits.cores, alone)
        if self.shares.freed:
            with suppress(Overloaded):  # no thread is left: at another time
                self._lanes.trim()
                self.shares.freed = False

    def _late(self, connection: Connection) -> None:
        """What came in time counts, also where it is not read yet: this process may have stood still."""
        came = connection.phase <= BODY and self._receiver.receive(connection)
        if came and connection.deadline > self._connections.now:
            return
        phase = connection.phase
        if phase in (HEAD, BODY):
            what = "head" if phase == HEAD else "body"
            error = RequestTimeout(f"the {what} of the request did not come within the time limit")
            self._sender.say(connection, dispatch.error_reply(error))
        elif phase == REFUSED:
            self._sender.go_on(connection)
        elif phase not in (BUSY, AHEAD):
            self._connections.close(connection)

    def _comes(self, connection: Connection) -> None:
        """Its socket can be read, or written, or is at its end."""
        phase = connection.phase
        if phase <= BODY:
            self._receiver.receive(connection)
        elif phase in (ANSWERING, REFUSED):
            self._sender.go_on(connection)
        elif phase == LINGERING:
            self._receiver.drop(connection)

    # ---- coming in -------------------------------------------------------------------------------

    def _greet(self, door: Door, request: socket.socket) -> bool:
        """Who is it, and is this UID served at all? It is answered here if not: False."""
        peer = STRANGER
        try:
            peer = door.identify(request)
            self.app.service.rules.check(peer, False)
        except PeerRefused as error:
            self._counters.request("service", error.status, 0.0)
            self._refusals.add(peer, error)
            self._show_out(request, peer, error)
        except OSError:
            self._connections.closer.close(request)  # it was gone before it was let in
        else:
            self.process_request(request, peer)
        return request.fileno() not in self._connections.turned_away

    def process_request(self, request: Any, client_address: Any) -> None:
        """The waiter serves it from now on, and gives to threads what would hold it up."""
        if why := self.shares.refusal(client_address.uid):
            self._counters.add("refused_connections", 1)
            self._connections.make_room(client_address.uid)
            error = Overloaded(why, hint="raise max_connections, or close idle connections")
            self._show_out(request, client_address, error)
            return
        self._connections.enter(Connection(request, client_address, peer_fragment(*client_address)), IDLE)

    def _show_out(self, request: socket.socket, peer: Peer, error: KMSError) -> None:
        """It hears why when it has said something, or soon; there is room for few of these."""
        turned_away = self._connections.turned_away
        if len(turned_away) >= self._most_turned_away:
            oldest = next(iter(turned_away.values()))
            if oldest.phase == REFUSED:
                self._sender.go_on(oldest)
            self._connections.close(oldest)
        connection = Connection(request, peer, Fragment(""))
        connection.keep = False
        connection.pending = [memoryview(last_words(dispatch.error_reply(error)))]
        later = len(turned_away) >= AT_ONCE and isinstance(error, PeerRefused)
        self._connections.enter(connection, REFUSED, 0 if later else IN)  # that it leaves is told in any case

    def renew(self, listener: socket.socket) -> None:
        """The descriptor of this door leads to another socket now."""
        self._doors.renew(listener)
        self._lanes.wake()

    # ---- the end ---------------------------------------------------------------------------------

    def drain(self, seconds: float) -> bool:
        """Answer what was received in full, take nothing new. True: all connections are closed."""
        self._drain_until = time.monotonic() + seconds
        self._lanes.wake()
        self._ended.wait(seconds + 5.0)
        return not self._connections.all
