"""The edge: connections, deadlines, limits. `doors` lets in, `http1` judges the bytes, `routes` the requests.

One thread a worker waits for all of its connections, and serves by itself every request that is here whole
and can't take long. A connection is an entry in a table and a descriptor while nothing of a request is here;
no peer, idle or slow, holds a thread. What waits for the keeper, and long work, goes to a few threads, see
`lanes`; the connection comes back when it was answered.

    refused ──answered──▶ lingering ──▶ closed       who connects is judged at accept
    idle ─▶ head ─▶ body ─▶ busy ─▶ answering ─▶ idle
      │       └──────┴──────┴── a fault, or the last: answered ──▶ lingering
      └─ ahead: more requests are here than one turn serves

All bytes are received into the locked memory of the worker, and wiped from there after each turn of a
connection. A body that is not whole yet lies in a buffer that grows as bytes come, under one budget for all
workers; one that carries a key, in a spare piece of locked memory.

Time: `idle_timeout` while nothing of a request is here; from its first byte on, one deadline for the head and
one for the body, however slowly the bytes drip in; one deadline for taking the answer.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Callable, NamedTuple

from ..audit.log import Fragment, peer_fragment
from ..errors import KMSError, Overloaded, PeerRefused, RequestTimeout, told
from ..rules import Peer, Policy, rights_of
from ..service.metrics import Block, Metrics
from ..service.told import Scarcity
from . import dispatch, routes
from .admission import BODIES, Bodies, Refusals, Shares
from .answers import last_words, render, send_parts
from .call import App, Call, Reply, Route
from .connection import AHEAD, ANSWERING, BODY, BUSY, CLOSED, HEAD, IDLE, LINGERING, REFUSED, Connection
from .doors import EVENTS, STRANGER, Door, Doors, groups_of
from .fair import Fair
from .http1 import Head, Known, Reader, Request, Room
from .lanes import SLICE, Lane, trim
from .lone import LOOK, SOON, Lone
from .pace import Pace
from .slab import ANSWER, RECEIVED, ZEROS, Slab

log = logging.getLogger("progressdb_kms.server")

WAITING, WORKING = 64, 1
"""Threads of a worker that wait for the keeper, and that do long work: more of these would only take the
interpreter from the thread that waits for all connections."""

ASKING = 4
"""Threads for what is no key operation (readyz, status, metrics): changes wait 30 s for a keeper that hangs,
and who asks how it is must not stand behind them."""

THREADS = WAITING + WORKING + ASKING

INLINE, INLINE_ITEMS = 64 * 1024, 128
"""Bytes of a body that is served at once, and items of a batch: a message of 50 kB takes 150 us, a page of
100 messages (37 kB) 1 ms, the worst one 6 ms. What is longer goes to a working thread."""

ALONE = 2 << 20
"""Bytes of one message that is served at once where its connection is the worker's only one, and so holds
nobody up but who comes meanwhile: 1 MiB as it is takes 0.4 ms, 2 MiB of JSON some 5."""

TURN = 0.0005
"""Seconds of a turn, in all, for those that sent requests ahead, send long bodies, or were never answered: as
many of them come and go as like to. The others come first; of several UIDs, until one of them took so long,
or all ten times as long: shorter turns cost more than they are worth."""

LOOK_SECONDS = 0.1
"""So often it is seen whose short requests come."""

LINGER_SECONDS = 1.0
"""After the last answer the peer may still be sending: so long it is listened to, so that it reads that. A
socket that is closed while bytes lie there is reset, and with it goes what the peer has not read."""

TURNED_AWAY, MOST_TURNED_AWAY, AT_ONCE = 64, 1024, 16
"""Peers that are refused at accept and may read why at a time, and as many where descriptors are left; where
there are more, the oldest goes. Where so many are there, who is not served at all hears so after a second:
who comes again and again takes less of everybody's time that way."""

TOGETHER = 16
"""Answers that are sent together: the first of them waits half a millisecond."""

LARGE = 64 * 1024
"""Bytes of an answer from which on head and body are not joined before they are sent."""

SPARE_FILES = 64
"""Descriptors that a worker needs beside its connections: store, log, jobs for the keeper, a reserve."""

_NOTHING: list[memoryview] = []
_SOON = struct.pack("ll", 0, int(SOON * 1e6))
_CONTINUE = memoryview(b"HTTP/1.1 100 Continue\r\n\r\n")
_IN, _OUT = select.POLLIN, select.POLLOUT  # the same numbers as EPOLLIN and EPOLLOUT


NO_THREAD = Overloaded("no thread is left", hint="raise TasksMax= and LimitNPROC= in the unit")


class Limits(NamedTuple):
    max_connections: int
    idle_timeout: float
    request_timeout: float
    descriptors: int = 1 << 20
    """that this process may open"""
    cores: int = 1


def _more_lies_in(sock: socket.socket) -> bool:
    with suppress(OSError):  # nothing is there, or nobody; a first byte is no secret
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    return False


# ---- the waiter ----------------------------------------------------------------------------------------

MORE, NEXT, AWAY = range(3)
"""After a step: the request is not whole; it was answered; the connection is not the waiter's any more."""


class Server(socketserver.ThreadingUnixStreamServer):
    """Serves on listening sockets that other workers may share. `process_request` decides who serves."""

    def __init__(
        self, doors: Sequence[Door], app: App, limits: Limits, counters: Block, metrics: Metrics, slab: Slab
    ) -> None:
        super().__init__("", Connection, bind_and_activate=False)  # type: ignore[arg-type]
        self.socket.close()
        self._refusals = Refusals(app.service.audit, counters)
        self.app = app._replace(denied=self._refusals.add)
        self.limits = limits
        self.slab = slab
        self._view, self._map = slab.received, slab.map
        self.draining = False
        self._counters = counters
        self._metrics = metrics
        own = limits.descriptors - SPARE_FILES
        self._shares = Shares(metrics, counters, limits.max_connections, own)
        self._rooms: dict[Any, Room] = {}
        self._make_rooms()
        longest = max(room.limit for room in self._rooms.values())
        self.bodies = Bodies(metrics, counters, BODIES * longest)
        self._scarcity = Scarcity("no locked memory is free for what comes in pieces")
        self._policies: Sequence[Policy] = ()
        self._round = 0
        self._waiting = Lane("waiting", slab.threads[:WAITING])
        self._working = Lane("working", slab.threads[WAITING : WAITING + WORKING])
        self._asking = Lane("asking", slab.threads[WAITING + WORKING :])
        self._known: Known = {}
        self._reader = Reader(self._judge, self._known)  # of requests that are whole when they are read first
        self._current: Any = None  # the connection whose bytes are read now
        self._connections: dict[int, Connection] = {}
        self._uids: Counter[int] = Counter()
        self._fair = Fair()
        self._turned_away: OrderedDict[int, Connection] = OrderedDict()
        self._most_turned_away = max(TURNED_AWAY, min(own - limits.max_connections, MOST_TURNED_AWAY))
        self._ahead: deque[Connection] = deque()
        self._back: deque[tuple[Connection, bool, list[memoryview]]] = deque()
        self._out: list[tuple[Connection, bytes]] = []
        self._behind = False  # is more here behind the request?
        self._open_doors(doors)
        self._lone = Lone()
        self._sole: Connection | None = None  # whose socket blocks for a moment
        self._spare = False
        self._untrimmed = False
        self.turns = 0
        self._at_work = False
        self._now = time.monotonic()
        self._idle_until = self._now + limits.idle_timeout
        self._tick_seconds = min(1.0, max(0.02, min(limits.idle_timeout, limits.request_timeout) / 8))
        self._next_look = self._next_tick = 0.0
        self._drain_until = 0.0
        self._ended = threading.Event()

    def _open_doors(self, doors: Sequence[Door]) -> None:
        self._poll: Any = select.epoll() if hasattr(select, "epoll") else select.poll()
        self._come: Callable[..., list[tuple[int, int]]] = self._poll.poll
        if not hasattr(select, "epoll"):
            self._come = lambda seconds, most: self._poll.poll(seconds * 1000)
        self._pace = Pace(self._poll, self._metrics, self._counters)
        self._bell, self._ring = socket.socketpair()
        for end in (self._bell, self._ring):
            end.setblocking(False)
        self._poll.register(self._bell.fileno(), _IN)
        self._doors = Doors(doors, self._poll, self._greet, self._others_have_fewer)

    def narrow(self, policies: Sequence[Policy]) -> None:
        """From the next request on these policies hold, on connections that are open too."""
        self._policies = policies
        self._round += 1

    # ---- turn after turn -------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Until `drain`."""
        sys.setswitchinterval(SLICE)
        try:
            while not self._drain_until:
                self._turn()
            self._begin_drain()
            while self._connections and self._now < self._drain_until:
                self._turn()
            self._refusals.flush(everything=True)
        finally:
            self._ended.set()

    def _turn(self) -> None:
        if self._sole is not None:
            self._serve_sole(self._sole)
        self._at_work = False
        events = self._wait()
        self._at_work = True
        self.turns += 1
        self._now = time.monotonic()
        self._idle_until = self._now + self.limits.idle_timeout
        if self._doors.resting or self._doors.renewed:
            self._doors.go_on(self._now)
        if len(events) > 1:
            self.app.service.begin_turn(self.slab.waiter[0])
        connections = self._connections
        doors: list[int] = []
        known: list[Connection] = []
        others: list[Connection] = []
        slow: list[tuple[int, int]] = []
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
                with suppress(BlockingIOError):
                    self._bell.recv(4096)
        self._serve_known(known)
        self.app.service.end_turn()
        if self._out:
            self._flush()
        while self._back:
            self._take_back(*self._back.popleft())
        if others or self._ahead:
            self._serve_others(others)
        if slow:
            self._serve_slow([connections[fd] for fd, _ in slow if fd in connections])
        if self._out:
            self._flush()
        for fd in doors:
            self._doors.let_in(fd, time.monotonic() - self._now)
        if self._now >= self._next_look:
            self._next_look = self._now + LOOK_SECONDS
            self._pace.look(self._now)
        if self._now >= self._next_tick:
            self._tick()

    def _serve_known(self, known: list[Connection]) -> None:
        """Of one UID all, as they came. Of several until one takes long: then it is asked who has come
        meanwhile, and whoever is left is told of again."""
        if len(self._uids) < 2:
            for connection in known:
                self._receive(connection)
            return
        spent = 0.0
        for connection in self._fair.order(known):
            if self._out and self._out[-1][0].peer.uid != connection.peer.uid:
                self._flush()
            took = self._do(self._receive, connection)
            spent += took
            if took > TURN or spent > 10 * TURN:
                break

    def _serve_others(self, others: list[Connection]) -> None:
        """Each of them is the first at some time; whoever has no turn in this one is told of again. None of
        them lies in `_ahead` too: its next bytes, or its end, come when its answers are sent."""
        waiting, self._ahead = deque(self._fair.order(others)), deque(self._fair.order(self._ahead))
        spent = 0.0
        while (waiting or self._ahead) and spent <= TURN:
            if waiting:
                spent += self._do(self._comes, waiting.popleft())
            if self._ahead:
                spent += self._do(self._go_ahead, self._ahead.popleft())

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

    def _wait(self) -> list[tuple[int, int]]:
        seconds = self._tick_seconds if self._connections or self._pace.came else 5.0
        if resting := self._doors.resting:
            seconds = max(0.0, min(seconds, min(resting.values()) - time.monotonic()))
        if self._pace.resting:
            seconds = self._pace.left(seconds)
        if self._ahead or self._back or self._sole is not None:
            seconds = 0.0
        if len(self._connections) == 1:
            return self._wait_for_one(seconds)
        return self._come(seconds, EVENTS)

    def _wait_for_one(self, seconds: float) -> list[tuple[int, int]]:
        events: list[tuple[int, int]] = []
        begun = now = time.monotonic()
        while self._spare and self._lone.looks and not events and now - begun < LOOK:
            events = self._come(0.0, EVENTS)
            now = time.monotonic()
        events = events or self._come(seconds, EVENTS)
        if self._lone.waited(time.monotonic() - begun, self._spare) and self._sole is None:
            self._enter_sole(*self._connections.values())
        return events

    def _enter_sole(self, connection: Connection) -> None:
        if connection.phase == IDLE:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                connection.request.setsockopt(socket.SOL_SOCKET, option, _SOON)
            os.set_blocking(connection.request.fileno(), True)
            self._sole = connection

    def _serve_sole(self, connection: Connection) -> None:
        """Wait in recv for the only connection there is, and look at times who else has come."""
        served, came, until = 0, True, self._now + SOON
        while came and connection.phase == IDLE and self._now < until:
            came = self._receive(connection)
            if self._out:
                self._flush()
            self._now = time.monotonic()
            self._idle_until = self._now + self.limits.idle_timeout
            served += 1
        if self._lone.served(served, came) or connection.phase != IDLE or len(self._connections) != 1:
            self._sole = None
            if connection.phase != CLOSED:
                os.set_blocking(connection.request.fileno(), False)

    def _look_around(self) -> None:
        """Is there one connection in all the daemon, and a core to spare to wait for it? Who runs now, of all
        that want to."""
        self._spare = False
        if self.limits.cores > 1 and len(self._connections) == 1 == sum(self._metrics.gauge("connections")):
            with suppress(OSError, ValueError), open("/proc/loadavg", "rb") as file:
                self._spare = int(file.read().split()[3].partition(b"/")[0]) <= self.limits.cores

    def _tick(self) -> None:
        """Whose time is over?"""
        now = self._now
        self._next_tick = now + (0.1 if self._turned_away else self._tick_seconds)
        for connection in [c for c in self._connections.values() if c.deadline <= now]:
            self._late(connection)
        if self._out:
            self._flush()
        self._refusals.flush()
        self._scarcity.look(now)
        self._look_around()
        if self._untrimmed:
            with suppress(RuntimeError):  # no thread is left: at another time
                self._working.submit(0, lambda scratch, answer: trim())
                self._untrimmed = False

    def _late(self, connection: Connection) -> None:
        """What came in time counts, also where it is not read yet: this process may have stood still."""
        if connection.phase <= BODY and self._receive(connection) and connection.deadline > self._now:
            return
        phase = connection.phase
        if phase in (HEAD, BODY):
            what = "head" if phase == HEAD else "body"
            error = RequestTimeout(f"the {what} of the request did not come within the time limit")
            self._say(connection, dispatch.error_reply(error))
        elif phase == REFUSED:
            self._send_more(connection)
        elif phase not in (BUSY, AHEAD):
            self._close(connection)

    def _comes(self, connection: Connection) -> None:
        """Its socket can be read, or written, or is at its end."""
        phase = connection.phase
        if phase <= BODY:
            self._receive(connection)
        elif phase in (ANSWERING, REFUSED):
            self._send_more(connection)
        elif phase == LINGERING:
            self._drop(connection)

    # ---- bytes in --------------------------------------------------------------------------------

    def _take(self, connection: Connection, place: memoryview, flags: int = 0) -> int:
        """Receive: how many bytes came, or -1: none yet, or 0: it is closed, for the peer is gone."""
        try:
            size = connection.request.recv_into(place, 0, flags)
        except BlockingIOError:
            return -1
        except OSError:
            size = 0
        if not size:
            self._close(connection)
        return size

    def _receive(self, connection: Connection) -> bool:
        """Did anything come?"""
        if connection.phase == BODY and connection.kept is None and self._receive_long(connection):
            return True
        view, kept = self._view, connection.kept
        start = len(kept) if kept is not None else 0
        peek = socket.MSG_PEEK if self.slab.scarce else 0
        size = self._take(connection, view[start:] if start else view, peek)
        if size <= 0:
            return False
        if kept is not None:
            view[:start] = kept
            connection.kept = None
        self._work(connection, start + size, start if peek else start + size)
        if start + size == RECEIVED and connection.phase == BODY and connection.kept is None:
            self._receive_long(connection)
        return True

    def _receive_long(self, connection: Connection) -> bool:
        """The next bytes of a body straight to where they belong; where nobody else is here, as long as they
        fill each place, and for ten turns. False: they must be looked at."""
        reader = connection.reader
        assert reader is not None
        self._current = connection
        while True:
            try:
                place = reader.place()
                if place is None:
                    return False
                with place:
                    room, size = len(place), self._take(connection, place)
            except (KMSError, MemoryError) as error:
                self._refuse(connection, reader, told(error), 0)
                return True
            if size <= 0:
                return True
            self._behind = False
            request = reader.placed(size)
            if request is not None and self._carry_out(connection, request) == NEXT:
                self._rest(connection)
            alone = len(self._connections) == 1 and time.monotonic() < self._now + 10 * TURN
            if request is not None or size < room or not alone:
                return True

    def _work(self, connection: Connection, fill: int, ours: int) -> None:
        """Serve what lies in the first `fill` bytes of the received part. Those behind `ours` are in the
        socket too, and what is not used of them stays there."""
        self._current = connection
        reader = connection.reader or self._reader
        at, step, begun = 0, NEXT, 0.0
        while at < fill and step == NEXT:
            if at:
                begun = begun or self._now
                if time.monotonic() - begun > TURN:
                    break
            try:
                used, request = reader.feed(self._map, at, fill, self._view)
            except (KMSError, MemoryError) as error:
                used, step = self._refuse(connection, reader, told(error), fill - at)
            else:
                self._behind = at + used < fill
                step = MORE if request is None else self._carry_out(connection, request)
            at += used
        if step == MORE:
            self._expect_more(connection, reader, at, fill)
            at = fill
        else:
            if at < ours and connection.keep and connection.phase in (IDLE, BUSY, ANSWERING):
                self._keep_ahead(connection, at, fill)
            if step == NEXT:
                self._rest(connection)
        if ours < at and connection.phase < LINGERING:
            with suppress(OSError):  # it is told of again
                connection.request.recv_into(self._view, at - ours)
        self._view[:fill] = ZEROS[:fill]

    def _expect_more(self, connection: Connection, reader: Reader, at: int, fill: int) -> None:
        """What is left is no secret: part of a head, or of a line between chunks."""
        if at < fill:
            connection.kept = memoryview(bytes(self._view[at:fill]))
        if reader is self._reader:
            connection.reader = reader
            self._reader = Reader(self._judge, self._known)
        if reader.size > INLINE and connection.poll is self._poll:
            self._wait_in(connection, self._pace.slow, _IN)
        phase = HEAD if reader.head is None else BODY
        if phase != connection.phase:
            connection.phase = phase
            connection.deadline = self._now + self.limits.request_timeout
            if reader.head is not None and reader.head.expect_continue:
                with suppress(OSError):  # that is told of
                    if left := send_parts(connection.request, [_CONTINUE]):
                        self._answer_later(connection, True, left)

    def _wait_in(self, connection: Connection, poll: Any, events: int) -> None:
        fd = connection.request.fileno()
        if connection.poll is poll:
            poll.modify(fd, events)
        else:
            connection.poll.unregister(fd)
            poll.register(fd, events)
            connection.poll = poll

    def _keep_ahead(self, connection: Connection, at: int, fill: int) -> None:
        """Requests were sent ahead: they may hold a key."""
        piece = self.slab.take()
        assert piece is not None  # where they are scarce, nothing more is taken in
        connection.kept_piece, connection.kept = piece, piece[: fill - at]
        connection.kept[:] = self._view[at:fill]

    def _go_ahead(self, connection: Connection) -> None:
        kept, piece = connection.kept, connection.kept_piece
        assert kept is not None and piece is not None
        self._view[: len(kept)] = kept
        connection.kept = connection.kept_piece = None
        self.slab.give_back(piece)
        connection.phase = IDLE
        self._work(connection, len(kept), len(kept))

    def _rest(self, connection: Connection) -> None:
        """A request was answered: go on with what is here of the next."""
        if connection.kept_piece is not None:
            connection.phase = AHEAD
            self._ahead.append(connection)
            return
        connection.phase = IDLE
        if connection.poll is not self._poll:
            self._wait_in(connection, self._poll, _IN)
        connection.answered = True
        connection.deadline = self._idle_until
        connection.reader = None

    # ---- a request -------------------------------------------------------------------------------

    def _judge(self, head: Head) -> Room:
        connection = self._current
        room = self._rooms.get((head.method, head.path)) or self._rooms[routes.find(head)]
        connection.route = room.route
        if connection.round != self._round:
            groups = groups_of(connection.request) if self._policies else ()
            connection.rights = rights_of(connection.peer, self._policies, self._counters, groups)
            connection.round = self._round
        dispatch.admit(self.app, room.route, head, connection.peer, connection.rights)
        return room

    def _make_rooms(self) -> None:
        """For each route; and the commonest are found by what stands in the head."""
        for route in routes.ROUTES:
            place = self._secret_place if route.secret else None
            room = Room(route.body_limit(self.app), self._reserve_body, place, route)
            self._rooms[route] = self._rooms[route.method, route.path] = room

    def _reserve_body(self, size: int) -> None:
        self.bodies.take(size)
        self._current.reserved += size

    def _forget_body(self, connection: Connection) -> None:
        if connection.reserved:
            self.bodies.give_back(connection.reserved)
            connection.reserved = 0
            self._untrimmed = True

    def _secret_place(self, length: int, behind: bool = False) -> memoryview:
        """`behind`: a piece must be left for what is here behind it."""
        piece = self._current.body_piece = None if behind and self.slab.scarce else self.slab.take()
        if piece is None:
            self._scarcity.refused(self._now)
            raise Overloaded("no locked memory is free", hint="send the head and the body at once")
        return piece[:length]

    def _carry_out(self, connection: Connection, request: Request) -> int:
        """NEXT: it was answered, and the next may come; or AWAY."""
        head, body, room = request
        route: Route = room.route
        connection.phase = IDLE
        alone = len(self._connections) == 1 and not route.batch
        long = len(body) > (ALONE if alone else INLINE)
        # Each item is an object, and so is what they stand in.
        long = long or (route.batch and bytes(body).count(b"{") > 1 + INLINE_ITEMS)
        if not long and len(body) <= INLINE:
            self._pace.came[connection.peer.uid] = self._now
        if long or route.waits:
            lane = self._working if long else self._waiting if route.op else self._asking
            return self._hand_over(connection, route, request, lane)
        scratch, answer = self.slab.waiter
        call = Call(head, body, connection.peer, connection.fragment, scratch, answer, connection.rights)
        reply = dispatch.dispatch(self.app, route, call)
        if (
            self._behind
            or reply.size > LARGE
            or reply.close
            or reply.secret
            or self.draining
            or not head.keep_alive
            or head.method == "HEAD"
            or connection.reserved
            or connection.body_piece is not None
        ):
            return self._answer(connection, head, reply)
        out = self._out
        out.append((connection, render(reply, True, head.version, reply.body, *reply.rest)))
        if len(out) >= TOGETHER:
            self._flush()
        return NEXT if connection.phase == IDLE else AWAY

    def _flush(self) -> None:
        """Send answers that were made in this turn, at most one a connection, with nothing behind it.
        Together, since each alone would wake its peer, which takes the core."""
        out, self._out = self._out, []
        for connection, whole in out:
            try:
                sent = connection.request.send(whole)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._close(connection)
                continue
            if sent < len(whole):
                self._answer_later(connection, True, [memoryview(whole)[sent:]])

    def _answer(self, connection: Connection, head: Head, reply: Reply) -> int:
        keep = self._keeps(connection, head, reply, self._behind)
        try:
            left = self._send(connection.request, head, reply, keep)
        except OSError:
            left, keep = [], False
        if reply.secret:
            self.slab.waiter[1][:] = ZEROS[:ANSWER]
        return self._sent(connection, keep, left)

    def _keeps(self, connection: Connection, head: Head, reply: Reply, behind: bool) -> bool:
        """Shall it stay open? While all end, as long as more was sent. Any thread may ask this."""
        keep = head.keep_alive and not reply.close
        return keep and (behind or not self.draining or _more_lies_in(connection.request))

    def _send(self, sock: socket.socket, head: Head, reply: Reply, keep: bool) -> list[memoryview]:
        """Send as much as the peer's buffer takes; what is left. Any thread may call this."""
        body = [] if head.method == "HEAD" else [reply.body, *reply.rest]
        apart = reply.secret or reply.size > LARGE
        joined = render(reply, keep, head.version, *() if apart else body)
        parts = [memoryview(part) for part in ([joined, *body] if apart else [joined])]
        left = send_parts(sock, parts)
        if left and reply.secret:
            raise ConnectionResetError  # a peer that leaves its answers lying gets no key
        return left

    def _sent(self, connection: Connection, keep: bool, left: list[memoryview]) -> int:
        """After an answer, or the part of it that could be sent."""
        if connection.body_piece is not None:
            self.slab.give_back(connection.body_piece)
            connection.body_piece = None
        if left:
            return self._answer_later(connection, keep, left)
        self._forget_body(connection)
        if not keep:  # over TCP more may be on its way
            more = connection.peer.via or _more_lies_in(connection.request)
            (self._linger if more else self._close)(connection)
            return AWAY
        return NEXT

    def _answer_later(self, connection: Connection, keep: bool, left: list[memoryview]) -> int:
        size = sum(map(len, left))
        try:
            if size > connection.reserved:
                self.bodies.take(size - connection.reserved)
                connection.reserved = size
        except Overloaded:
            self._close(connection)
            return AWAY
        connection.pending, connection.keep = left, keep
        connection.phase = ANSWERING
        connection.deadline = self._now + self.limits.request_timeout
        self._wait_in(connection, self._pace.slow if size > LARGE else connection.poll, _OUT)
        return AWAY

    def _send_more(self, connection: Connection) -> None:
        try:
            left = connection.pending = send_parts(connection.request, connection.pending)
        except OSError:
            self._close(connection)
            return
        if left and connection.phase != ANSWERING:
            self._answer_later(connection, connection.keep, left)
        elif not left:
            self._wait_in(connection, connection.poll, _IN)
            if connection.reader is not None and connection.reader.head is not None:
                # its body was asked for; what is kept of that stays
                connection.phase, connection.deadline = BODY, self._now + self.limits.request_timeout
                return
            self._forget_body(connection)
            (self._rest if connection.keep else self._linger)(connection)

    # ---- threads -----------------------------------------------------------------------------------

    def _hand_over(self, connection: Connection, route: Route, request: Request, lane: Lane) -> int:
        """To a thread. The connection is its alone until it lies in `_back`."""
        try:
            body = self._own_body(connection, route, request.body)
            job = self._job(connection, route, request._replace(body=body), lane is self._working)
            lane.submit(connection.peer.uid, job)
        except (Overloaded, RuntimeError) as error:
            told = error if isinstance(error, Overloaded) else NO_THREAD
            return self._answer(connection, request.head, dispatch.error_reply(told))
        connection.phase = BUSY
        connection.poll.unregister(connection.request.fileno())
        return AWAY

    def _own_body(self, connection: Connection, route: Route, body: Any) -> Any:
        """A body that lies in the received part moves out of there: the next peer's bytes come there."""
        if connection.body_piece is not None or not body or body.obj is not self._map:
            return body
        if route.secret:
            place = self._secret_place(len(body), self._behind)
            place[:] = body
            return place
        self._reserve_body(len(body))
        return memoryview(bytes(body))

    def _job(
        self, connection: Connection, route: Route, request: Request, long: bool
    ) -> Callable[[memoryview, memoryview], None]:
        behind = self._behind

        def run(scratch: memoryview, answer: memoryview) -> None:
            nonlocal request
            peer, fragment = connection.peer, connection.fragment
            call = Call(request.head, request.body, peer, fragment, scratch, answer, connection.rights)
            del request
            if long:
                call.breathe = self._pace.breath(peer.uid, lambda: self._at_work)
            self._finish(self.app, connection, route, call, behind)
            answer[:] = ZEROS[:ANSWER]
            self._wake()
            if long:
                self._untrimmed = True
                call.breathe()

        return run

    def _finish(
        self, app: App, connection: Connection, route: Route, call: Call, behind: bool, begun: float = 0.0
    ) -> None:
        """In a thread: carry it out, and give the connection back."""
        keep, left = False, _NOTHING
        try:
            reply = dispatch.dispatch(app, route, call, begun)
            call.body = b""  # which may be long, and so may the answer
            keep = self._keeps(connection, call.head, reply, behind)
            left = self._send(connection.request, call.head, reply, keep)
        except OSError:
            keep = False  # the peer is gone
        except Exception:
            keep = False
            log.exception("a connection ended with an error")
        self._back.append((connection, keep, left))

    def _take_back(self, connection: Connection, keep: bool, left: list[memoryview]) -> None:
        connection.phase = IDLE
        connection.poll = self._poll
        self._poll.register(connection.request.fileno(), _IN)
        if self._sent(connection, keep, left) == NEXT:
            self._rest(connection)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it rings already
            self._ring.send(b"\0")

    # ---- faults ------------------------------------------------------------------------------------

    def _refuse(self, connection: Connection, reader: Reader, error: KMSError, here: int) -> tuple[int, int]:
        """Answer what can't be read, or may not be served; go on only where its body is here already.
        `here`: bytes from the start of its head."""
        head = reader.head
        used = reader.head_size + (head.content_length if head is not None else 0)
        self._behind = used < here
        reply = self._refusal(connection, head, error)
        reader.wipe()
        reader.reset()
        if head is None or not head.keep_alive or head.chunked or error.close or used > here:
            self._say(connection, reply, head)
            return 0, AWAY
        connection.phase = IDLE
        return used, self._answer(connection, head, reply)

    def _refusal(self, connection: Connection, head: Head | None, error: KMSError) -> Reply:
        route = connection.route
        if isinstance(error, PeerRefused) and head is not None and route is not None:
            call = Call(head, b"", connection.peer, connection.fragment, *self.slab.waiter)
            return dispatch.refuse(self.app, route, call, error)
        self._counters.request("service", error.status, 0.0)
        return dispatch.error_reply(error)

    def _say(self, connection: Connection, reply: Reply, head: Head | None = None) -> None:
        """A last word, behind the answers that the peer has not taken yet."""
        version, head_only = (head.version, head.method == "HEAD") if head else ("1.1", False)
        self._let_go(connection)
        connection.pending, connection.keep = [memoryview(last_words(reply, version, head_only))], False
        self._send_more(connection)

    def _linger(self, connection: Connection) -> None:
        """The peer has some time to read what it was told, whatever it still sends (RFC 9112, 9.6)."""
        self._let_go(connection)
        try:
            connection.request.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)
            return
        if connection.row >= 0:  # what it sends may be long
            self._wait_in(connection, self._pace.slow, _IN)
        connection.phase = LINGERING
        connection.deadline = self._now + LINGER_SECONDS

    def _drop(self, connection: Connection) -> None:
        if (size := self._take(connection, self._view)) > 0:
            self._view[:size] = ZEROS[:size]

    def _let_go(self, connection: Connection) -> None:
        """What it holds beside its descriptor."""
        if connection.reader is not None:
            connection.reader.wipe()
        for piece in (connection.kept_piece, connection.body_piece):
            if piece is not None:
                self.slab.give_back(piece)
        connection.reader = connection.kept = connection.kept_piece = connection.body_piece = None
        connection.pending = []
        self._forget_body(connection)

    def _close(self, connection: Connection) -> None:
        fd = connection.request.fileno()
        if fd < 0:
            return
        self._let_go(connection)
        connection.phase = CLOSED
        connection.poll.unregister(fd)
        del self._connections[fd]
        self._turned_away.pop(fd, None)
        connection.request.close()
        self._uids -= Counter((connection.peer.uid,))
        if connection.row >= 0:
            self._shares.leave(connection.row)

    # ---- coming in ---------------------------------------------------------------------------------

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
            request.close()  # it was gone before it was let in
        else:
            self.process_request(request, peer)
        return request.fileno() not in self._turned_away

    def process_request(self, request: Any, client_address: Any) -> None:
        """The waiter serves it from now on, and gives to threads what would hold it up."""
        if why := self._shares.refusal(client_address.uid):
            self._counters.add("refused_connections", 1)
            error = Overloaded(why, hint="raise max_connections, or close idle connections")
            self._show_out(request, client_address, error)
            return
        connection = Connection(request, client_address, peer_fragment(*client_address))
        connection.row = self._shares.enter(client_address.uid)
        connection.deadline = self._idle_until
        self._enter(connection)

    def _enter(self, connection: Connection, events: int = _IN) -> None:
        fd = connection.request.fileno()
        self._connections[fd] = connection
        self._uids[connection.peer.uid] += 1
        connection.poll = self._poll
        self._poll.register(fd, events)

    def _show_out(self, request: socket.socket, peer: Peer, error: KMSError) -> None:
        """It hears why when it has said something, or soon; there is room for few of these."""
        if len(self._turned_away) >= self._most_turned_away:
            _, oldest = self._turned_away.popitem(last=False)
            if oldest.phase == REFUSED:
                self._send_more(oldest)
            self._close(oldest)
        connection = Connection(request, peer, Fragment(""))
        connection.phase, connection.keep = REFUSED, False
        connection.deadline = self._now + LINGER_SECONDS
        connection.pending = [memoryview(last_words(dispatch.error_reply(error)))]
        later = len(self._turned_away) >= AT_ONCE and isinstance(error, PeerRefused)
        self._enter(connection, 0 if later else _IN)  # that it leaves is told in any case
        self._turned_away[request.fileno()] = connection

    def _others_have_fewer(self) -> bool:
        *workers, _ = self._metrics.gauge("connections")  # the last is the keeper's
        least = min(workers)
        return self._counters.get("connections") > least + least // 4

    def renew(self, listener: socket.socket) -> None:
        """The descriptor of this door leads to another socket now."""
        self._doors.renew(listener)
        self._wake()

    # ---- the end -----------------------------------------------------------------------------------

    def drain(self, seconds: float) -> bool:
        """Answer what was received in full, take nothing new. True: all connections are closed."""
        self._drain_until = time.monotonic() + seconds
        self._wake()
        self._ended.wait(seconds + 5.0)
        return not self._connections

    def _begin_drain(self) -> None:
        """Let in who was there, then end each connection behind what it has sent."""
        self._doors.close()
        self.draining = True
        for connection in self._connections.values():
            if connection.phase <= ANSWERING:
                with suppress(OSError):
                    connection.request.shutdown(socket.SHUT_RD)
