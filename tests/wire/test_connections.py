"""What a connection holds of what all share goes back with it, whatever it was at."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from progressdb_kms.audit.log import Fragment
from progressdb_kms.errors import Overloaded
from progressdb_kms.rules import Peer
from progressdb_kms.service.metrics import SECONDS, Metrics
from progressdb_kms.wire import admission
from progressdb_kms.wire.admission import Limits, Shares
from progressdb_kms.wire.connection import AHEAD, ANSWERING, BODY, BUSY, CLOSED, IDLE, IN, REFUSED, Connection
from progressdb_kms.wire.connections import LINGER_SECONDS, Connections
from progressdb_kms.wire.handed import Closer
from progressdb_kms.wire.pace import Pace
from progressdb_kms.wire.slab import SPARES, Slab

UID = 7


class Worker:
    """What a table of connections stands on."""

    def __init__(self) -> None:
        self.metrics = Metrics(1)
        self.block = self.metrics.block(0)
        self.slab = Slab("off", 0)
        self.pace = Pace(self.metrics, self.block)
        self.shares = Shares(self.metrics, self.block, Limits(9, 60.0, 30.0), 1000)
        self.table = Connections(self.pace, self.shares, self.slab, Limits(9, 60.0, 30.0), Closer(()))
        self.ends: list[socket.socket] = []

    def one(self, phase: int = IDLE, uid: int = UID) -> Connection:
        ours, theirs = socket.socketpair()
        self.ends += [ours, theirs]
        made = Connection(ours, Peer(uid), Fragment(""))
        self.table.enter(made, phase)
        return made

    def told_of(self, one: Connection) -> bool:
        return one.request.fileno() in [fd for fd, _ in self.pace.poll.poll(0.0)]

    def pieces(self) -> int:
        """Spare ones of the slab that are free."""
        taken = []
        while (piece := self.slab.take()) is not None:
            taken.append(piece)
        for piece in taken:
            self.slab.give_back(piece)
        return len(taken)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    for end in made.ends:
        end.close()
    made.pace.poll.close()
    made.pace.slow.close()


def test_whom_an_answer_leaves_with_nothing_more_is_known_from_then_on(worker: Worker) -> None:
    one = worker.one()
    worker.table.goes(one, BODY)
    worker.table.now += 5.0
    worker.table.rest(one)
    assert one.answered and one.phase == IDLE and one.deadline == worker.table.now + 60.0


def test_who_sent_more_has_its_next_turn(worker: Worker) -> None:
    one = worker.one()
    one.kept_piece = worker.slab.take()
    worker.table.rest(one)
    assert one.phase == AHEAD and list(worker.table.ahead) == [one] and not one.answered


@pytest.mark.parametrize(("phase", "seconds"), [(BODY, 30.0), (ANSWERING, 30.0), (REFUSED, LINGER_SECONDS)])
def test_each_thing_has_its_time(worker: Worker, phase: int, seconds: float) -> None:
    one = worker.one()
    worker.table.now += 100.0
    worker.table.goes(one, phase)
    assert one.phase == phase and one.deadline == worker.table.now + seconds


def test_all_that_it_holds_goes_back(worker: Worker) -> None:
    one = worker.one()
    one.kept_piece, one.body_piece = worker.slab.take(), worker.slab.take()
    worker.table.reserve(one, 1500)
    assert (worker.block.get("body_bytes"), worker.block.get("connections")) == (1500, 1)
    assert worker.pieces() == SPARES - 2 and not worker.shares.freed
    worker.table.close(one)
    assert (worker.block.get("body_bytes"), worker.block.get("connections")) == (0, 0)
    assert worker.pieces() == SPARES and worker.shares.freed
    assert one.phase == CLOSED and not worker.table.all and not worker.table.uids
    worker.table.close(one)  # that is nothing


def test_what_there_is_no_room_for_is_not_reserved(worker: Worker) -> None:
    one = worker.one()
    with pytest.raises(Overloaded):
        worker.table.reserve(one, worker.shares.most + 1)
    worker.table.close(one)
    assert worker.block.get("body_bytes") == 0


def test_who_is_turned_away_takes_no_share(worker: Worker) -> None:
    one = worker.one(REFUSED)
    assert list(worker.table.turned_away.values()) == [one] and worker.block.get("connections") == 0
    worker.table.close(one)
    assert not worker.table.turned_away and worker.block.get("connections") == 0


def test_nobody_hears_of_one_that_is_lent(worker: Worker) -> None:
    one = worker.one()
    worker.ends[1].send(b"the next request")
    assert worker.told_of(one)
    worker.table.lend(one)
    assert one.phase == BUSY and not worker.told_of(one)
    assert worker.table.take_back(one)
    assert worker.told_of(one)


class NoMemory:
    """A set for which the kernel has none."""

    def register(self, fd: int, events: int) -> None:
        raise OSError(28, "No space left on device")

    def unregister(self, fd: int) -> None:
        raise FileNotFoundError


@pytest.mark.parametrize("when", ["it is long", "it comes back", "it comes"])
def test_one_that_can_not_be_waited_for_is_closed(worker: Worker, when: str) -> None:
    """It ended the thread that serves all."""
    none: Any = NoMemory()
    one = worker.one()
    worker.table.reserve(one, 1500)
    if when == "it is long":
        worker.table.wait_in(one, none, IN)
    elif when == "it comes back":
        worker.table.lend(one)
        worker.table._poll = none
        assert not worker.table.take_back(one)
    else:
        worker.table.close(one)
        worker.table._poll = none
        one = worker.one()
    worker.table.goes(one, BODY)
    assert one.phase == CLOSED and one.request.fileno() == -1 and not worker.table.all
    assert worker.block.get("connections") == 0 and worker.block.get("body_bytes") == 0


# ---- shares of one UID ----------------------------------------------------------------------------------

OTHER = 8


def test_who_comes_late_gets_room_of_who_has_all(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else was here while one UID took all: who is idle for longest goes, and nobody of who is at
    work."""
    busy, *idle = [worker.one(phase) for phase in (BODY, *[IDLE] * 8)]
    worker.table.now += 5.0
    worker.table.goes(idle[0], IDLE)  # the first that came, and the last that was at work
    now = time.monotonic() + 2 * SECONDS
    monkeypatch.setattr(admission.time, "monotonic", lambda: now)
    worker.table.make_room(OTHER)
    assert len(worker.table.all) == 9  # nobody asked yet
    assert worker.shares.refusal(OTHER) == "too many connections"
    worker.table.make_room(OTHER)
    assert idle[1].phase == CLOSED and len(worker.table.all) == 8 and busy.phase == BODY
    assert worker.shares.refusal(UID) and not worker.shares.refusal(OTHER)
    worker.one(uid=OTHER)
    worker.table.make_room(OTHER)
    worker.table.make_room(OTHER)
    worker.table.make_room(OTHER)
    assert worker.table.uids[UID] == 6  # it has no more than its share now


def test_bodies_of_one_uid_leave_a_quarter_to_others(worker: Worker) -> None:
    mine, more = worker.one(), worker.one()
    worker.table.reserve(mine, 2500)  # alone it may have all of the 3000
    worker.table.forget_body(mine)
    theirs = worker.one(uid=OTHER)
    worker.table.reserve(mine, 2000)
    with pytest.raises(Overloaded):
        worker.table.reserve(more, 251)
    worker.table.reserve(more, 250)
    worker.table.reserve(theirs, 750)
    with pytest.raises(Overloaded):
        worker.table.reserve(theirs, 1)
    for one in (mine, more, theirs):
        worker.table.close(one)
    assert [row.body_bytes for row in worker.metrics.holdings()] == [0, 0]


def test_what_is_kept_for_who_is_turned_away_is_no_share(worker: Worker) -> None:
    gone = worker.one(REFUSED)
    worker.table.reserve(gone, 100)
    assert worker.block.get("body_bytes") == 100 and not worker.block.get("items")
    worker.table.close(gone)
    assert worker.block.get("body_bytes") == 0
