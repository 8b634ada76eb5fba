"""Bytes in, and the requests that they are: judged by the head, then carried out here or by a thread.

Bytes are received into the locked memory of the worker, and wiped from there after each turn of a connection.
A body that is not whole yet lies in a buffer that grows as bytes come, under one budget for all workers; one
that carries a key, in a spare piece of locked memory. What is still to come of it is received straight to
there. In a spare piece lies what was sent ahead, too: a turn serves some requests of a connection, and the
rest in the next.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..errors import KMSError, Overloaded, PeerRefused, for_peer
from ..journal import Scarcity
from ..rules import Policy, rights_of
from . import dispatch, routes
from .call import App, Call, Route
from .connection import ANSWERING, AWAY, BODY, BUSY, HEAD, IDLE, IN, LINGERING, MORE, NEXT, Connection
from .connections import Connections
from .doors import groups_of
from .handed import before
from .http1 import Head, Known, Reader, Request, Room
from .lanes import Lanes
from .pace import Pace
from .sending import Sender
from .slab import RECEIVED, ZEROS, Slab

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


class Receiver:
    """One worker's, for its waiter. `narrow` alone may be called by any thread."""

    def __init__(
        self, app: App, connections: Connections, sender: Sender, lanes: Lanes, pace: Pace, slab: Slab
    ) -> None:
        self._app = app
        self._connections = connections
        self._sender = sender
        self._lanes = lanes
        self._pace = pace
        self._slab = slab
        self._view, self._map = slab.received, slab.map
        self.scarcity = Scarcity("no locked memory is free for what comes in pieces")
        self._policies: Sequence[Policy] = ()
        self._round = 0
        self._known: Known = {}
        self._reader = Reader(self._judge, self._known)  # of requests that are whole when they are read first
        self._current: Any = None  # the connection whose bytes are read now
        self._route: Any = None  # of the head that was judged last
        self._rooms: dict[Any, Room] = {}
        for route in routes.ROUTES:  # and the commonest are found by what stands in the head
            place = self._secret_place if route.secret else None
            room = Room(route.body_limit(app), self._reserve_body, place, route)
            self._rooms[route] = self._rooms[route.method, route.path] = room

    def narrow(self, policies: Sequence[Policy]) -> None:
        """From the next request on these policies hold, on connections that are open too."""
        self._policies = policies
        self._round += 1

    # ---- bytes in --------------------------------------------------------------------------------

    def take(self, connection: Connection, place: memoryview, flags: int = 0) -> int:
        """Receive: how many bytes came, or -1: none yet, or 0: it is closed, for the peer is gone."""
        try:
            if self._connections.closer.wary:
                place = before(connection.request, place)
            size = connection.request.recv_into(place, 0, flags)
        except BlockingIOError:
            return -1
        except OSError:
            size = 0
        if not size:
            self._connections.close(connection)
        return size

    def drop(self, connection: Connection) -> None:
        """Nobody reads it any more."""
        if (size := self.take(connection, self._view)) > 0:
            self._view[:size] = ZEROS[:size]

    def receive(self, connection: Connection) -> bool:
        """Did anything come?"""
        if connection.phase == BODY and connection.kept is None and self._receive_long(connection):
            return True
        view, kept = self._view, connection.kept
        start = len(kept) if kept is not None else 0
        peek = socket.MSG_PEEK if self._slab.scarce else 0
        size = self.take(connection, view[start:] if start else view, peek)
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
                    room, size = len(place), self.take(connection, place)
            except (KMSError, MemoryError) as error:
                self._refuse(connection, reader, for_peer(error), 0)
                return True
            if size <= 0:
                return True
            connection.behind = False
            request = reader.placed(size)
            if request is not None and self.carry_out(connection, request) == NEXT:
                self._connections.rest(connection)
            alone = len(self._connections.all) == 1 and time.monotonic() < self._connections.now + 10 * TURN
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
                begun = begun or self._connections.now
                if time.monotonic() - begun > TURN:
                    break
            try:
                used, request = reader.feed(self._map, at, fill, self._view)
            except (KMSError, MemoryError) as error:
                used, step = self._refuse(connection, reader, for_peer(error), fill - at)
            else:
                connection.behind = at + used < fill
                step = MORE if request is None else self.carry_out(connection, request)
            at += used
        if step == MORE:
            self._expect_more(connection, reader, at, fill)
            at = fill
        else:
            if at < ours and connection.keep and connection.phase in (IDLE, BUSY, ANSWERING):
                self._keep_ahead(connection, at, fill)
            if step == NEXT:
                self._connections.rest(connection)
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
        if reader.size > INLINE and connection.poll is not self._connections.slow:
            self._connections.wait_in(connection, self._connections.slow, IN)
        phase = HEAD if reader.head is None else BODY
        if phase != connection.phase:
            self._connections.goes(connection, phase)
            if reader.head is not None and reader.head.expect_continue:
                self._sender.ask_for_body(connection)

    def _keep_ahead(self, connection: Connection, at: int, fill: int) -> None:
        """Requests were sent ahead: they may hold a key."""
        piece = self._slab.take()
        assert piece is not None  # where they are scarce, nothing more is taken in
        connection.kept_piece, connection.kept = piece, piece[: fill - at]
        connection.kept[:] = self._view[at:fill]

    def go_ahead(self, connection: Connection) -> None:
        """With what was sent ahead."""
        kept, piece = connection.kept, connection.kept_piece
        assert kept is not None and piece is not None
        self._view[: len(kept)] = kept
        connection.kept = connection.kept_piece = None
        self._slab.give_back(piece)
        connection.phase = IDLE
        self._work(connection, len(kept), len(kept))

    # ---- a request -------------------------------------------------------------------------------

    def _judge(self, head: Head) -> Room:
        connection = self._current
        room = self._rooms.get((head.method, head.path)) or self._rooms[routes.find(head)]
        self._route = room.route
        if connection.round != self._round:
            groups = groups_of(connection.request) if self._policies else ()
            counters = self._app.service.counters
            connection.rights = rights_of(connection.peer, self._policies, counters, groups)
            connection.round = self._round
        dispatch.admit(self._app, room.route, head, connection.peer, connection.rights)
        return room

    def _reserve_body(self, size: int) -> None:
        self._connections.reserve(self._current, size)

    def _secret_place(self, length: int, behind: bool = False) -> memoryview:
        """`behind`: a piece must be left for what is here behind it."""
        slab, uid = self._slab, self._current.peer.uid
        more = behind or any(one.body_piece and one.peer.uid == uid for one in self._connections.all.values())
        piece = self._current.body_piece = None if slab.scarce and more else slab.take()
        if piece is None:
            self.scarcity.refused(self._connections.now)
            raise Overloaded("no locked memory is free", hint="send the head and the body at once")
        return piece[:length]

    def carry_out(self, connection: Connection, request: Request) -> int:
        """NEXT: it was answered, and the next may come; or AWAY."""
        head, body, room = request
        route: Route = room.route
        connection.phase = IDLE
        alone = len(self._connections.all) == 1 and not route.batch
        long = route.long or len(body) > (ALONE if alone else INLINE)
        # Each item is an object, and so is what they stand in.
        long = long or (route.batch and bytes(body).count(b"{") > 1 + INLINE_ITEMS)
        if not long and len(body) <= INLINE:
            self._pace.came[connection.peer.uid] = self._connections.now
        scratch, answer = self._slab.waiter
        call = Call(head, body, connection.peer, connection.fragment, scratch, answer, connection.rights)
        if long or route.waits:
            return self._hand_over(connection, route, call, long)
        return self._sender.answer(connection, head, dispatch.dispatch(self._app, route, call))

    def _hand_over(self, connection: Connection, route: Route, call: Call, long: bool) -> int:
        try:
            call.body = self._own_body(connection, route, call.body)
            self._lanes.submit(connection, route, call, long)
        except Overloaded as error:
            return self._sender.answer_now(connection, call.head, dispatch.error_reply(error))
        self._connections.lend(connection)
        return AWAY

    def _own_body(self, connection: Connection, route: Route, body: Any) -> Any:
        """A body that lies in the received part moves out of there: the next peer's bytes come there."""
        if connection.body_piece is not None or not body or body.obj is not self._map:
            return body
        if route.secret:
            place = self._secret_place(len(body), connection.behind)
            place[:] = body
            return place
        self._reserve_body(len(body))
        return memoryview(bytes(body))

    # ---- faults ----------------------------------------------------------------------------------

    def _refuse(self, connection: Connection, reader: Reader, error: KMSError, here: int) -> tuple[int, int]:
        """Answer what can't be read, or may not be served; go on only where its body is here already.
        `here`: bytes from the start of its head."""
        head = reader.head
        used = reader.head_size + (head.content_length if head is not None else 0)
        connection.behind = used < here
        if isinstance(error, PeerRefused) and head is not None:  # by `_judge`, a moment ago
            call = Call(head, b"", connection.peer, connection.fragment, *self._slab.waiter)
            reply = dispatch.refuse(self._app, self._route, call, error)
        else:
            self._app.service.counters.request("service", error.status, 0.0)
            reply = dispatch.error_reply(error)
        reader.wipe()
        reader.reset()
        if head is None or not head.keep_alive or head.chunked or error.close or used > here:
            self._sender.say(connection, reply, head)
            return 0, AWAY
        connection.phase = IDLE
        return used, self._sender.answer_now(connection, head, reply)
