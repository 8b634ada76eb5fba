"""All connections of a worker: until when each may go on, and where its socket is waited for.

A connection is an entry in a table and a descriptor while nothing of a request is here. What it holds of what
all share (a place, a spare piece of locked memory, a part of the budget of bodies) goes back here, whatever
becomes of it. A long one is waited for in a set of its own, see `pace`.

Time: `idle_timeout` while nothing of a request is here; from its first byte on, one deadline for the head and
one for the body, however slowly the bytes drip in; one deadline for taking the answer.
"""

from __future__ import annotations

import select
import time
from collections import Counter, OrderedDict, deque
from contextlib import suppress

from .admission import Limits, Shares
from .connection import AHEAD, ANSWERING, BODY, BUSY, CLOSED, HEAD, IDLE, IN, LINGERING, REFUSED, Connection
from .handed import Closer
from .pace import Pace
from .slab import Slab

LINGER_SECONDS = 1.0
"""After the last answer the peer may still be sending: so long it is listened to, so that it reads that. A
socket that is closed while bytes lie there is reset, and with it goes what the peer has not read."""


class Connections:
    """`all` of them, by descriptor; of these the ones that were `turned_away`, the oldest first; those that
    sent requests `ahead`; how many each UID has; and the time `now`, as it was when this turn began."""

    def __init__(self, pace: Pace, shares: Shares, slab: Slab, limits: Limits, closer: Closer) -> None:
        self._poll, self.slow = pace.poll, pace.slow
        self._shares = shares
        self._slab = slab
        self.closer = closer
        self._seconds = dict.fromkeys((HEAD, BODY, ANSWERING), limits.request_timeout)
        self._seconds.update({IDLE: limits.idle_timeout, LINGERING: LINGER_SECONDS, REFUSED: LINGER_SECONDS})
        self.all: dict[int, Connection] = {}
        self.uids: Counter[int] = Counter()
        self.turned_away: OrderedDict[int, Connection] = OrderedDict()
        self.ahead: deque[Connection] = deque()
        self.now = time.monotonic()

    def goes(self, connection: Connection, phase: int) -> None:
        """It is at this from now on, and has so long for it; one that is closed stays so."""
        if connection.phase != CLOSED:
            connection.phase = phase
            connection.deadline = self.now + self._seconds[phase]

    def enter(self, connection: Connection, phase: int, events: int = IN) -> None:
        """A refused one takes no share."""
        fd, uid = connection.request.fileno(), connection.peer.uid
        self.all[fd] = connection
        self.uids[uid] += 1
        if phase == REFUSED:
            self.turned_away[fd] = connection
        else:
            connection.row = self._shares.enter(uid)
        self.goes(connection, phase)
        self._register(connection, self._poll, events)

    def _register(self, connection: Connection, poll: select.epoll, events: int) -> None:
        """Where the kernel has no memory left to wait for it, it is closed."""
        connection.poll = poll
        try:
            poll.register(connection.request.fileno(), events)
        except OSError:
            self.close(connection)

    def wait_in(self, connection: Connection, poll: select.epoll, events: int) -> None:
        if connection.poll is poll:
            poll.modify(connection.request.fileno(), events)
        else:
            connection.poll.unregister(connection.request.fileno())
            self._register(connection, poll, events)

    def lend(self, connection: Connection) -> None:
        """To a thread: it is that one's alone until it is taken back."""
        connection.phase = BUSY
        connection.poll.unregister(connection.request.fileno())

    def take_back(self, connection: Connection) -> bool:
        """False: it is closed."""
        connection.phase = IDLE
        self._register(connection, self._poll, IN)
        return connection.phase == IDLE

    def rest(self, connection: Connection) -> None:
        """A request was answered: go on with what is here of the next."""
        if connection.kept_piece is not None:
            connection.phase = AHEAD
            self.ahead.append(connection)
            return
        self.goes(connection, IDLE)
        if connection.poll is not self._poll:
            self.wait_in(connection, self._poll, IN)
        connection.answered = True
        connection.reader = None

    def reserve(self, connection: Connection, size: int) -> None:
        """So many bytes of the budget of bodies. Raises Overloaded."""
        self._shares.take(size, connection.peer.uid, connection.row)
        connection.reserved += size

    def forget_body(self, connection: Connection) -> None:
        if connection.reserved:
            self._shares.give_back(connection.reserved, connection.row)
            connection.reserved = 0

    def make_room(self, uid: int) -> None:
        """For one of this UID, that will come again: of one that has too much, close who is idle longest."""
        uids = [other for other in self.uids if other != uid and self._shares.crowds(other, 0)]
        idle = [one for one in self.all.values() if one.phase == IDLE and one.peer.uid in uids]
        if idle:
            self.close(min(idle, key=lambda one: one.deadline))

    def forget_key(self, connection: Connection) -> None:
        """The body of a secret route, where it came in pieces."""
        if connection.body_piece is not None:
            self._slab.give_back(connection.body_piece)
            connection.body_piece = None

    def let_go(self, connection: Connection) -> None:
        """What it holds beside its descriptor."""
        if connection.reader is not None:
            connection.reader.wipe()
        if connection.kept_piece is not None:
            self._slab.give_back(connection.kept_piece)
        connection.reader = connection.kept = connection.kept_piece = None
        connection.pending = []
        self.forget_key(connection)
        self.forget_body(connection)

    def close(self, connection: Connection) -> None:
        fd = connection.request.fileno()
        if fd < 0:
            return
        self.let_go(connection)
        connection.phase = CLOSED
        del self.all[fd]
        self.turned_away.pop(fd, None)
        with suppress(OSError):  # it is lent, or no set took it
            connection.poll.unregister(fd)  # another process may have it for a moment
        self.closer.close(connection.request)
        self.uids -= Counter((connection.peer.uid,))
        if connection.row >= 0:
            self._shares.leave(connection.row)
