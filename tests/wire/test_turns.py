"""Who is served first in a turn of the waiter, and how long the others have."""

from __future__ import annotations

import socket
import threading
from collections import OrderedDict, deque
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from progressdb_kms.errors import KMSError, Overloaded, PeerRefused
from progressdb_kms.rules import Peer
from progressdb_kms.wire import server
from progressdb_kms.wire.answers import send_parts
from progressdb_kms.wire.connection import AHEAD, BODY, HEAD, IDLE
from progressdb_kms.wire.fair import Fair
from progressdb_kms.wire.http1 import Reader, Request, Room
from progressdb_kms.wire.server import Limits, Server
from progressdb_kms.wire.slab import ANSWER

LIGHT, HEAVY = 7, 8


def connection(name: str, phase: int = IDLE, answered: bool = True, uid: int = LIGHT) -> Any:
    peer, request = SimpleNamespace(uid=uid), SimpleNamespace(fileno=lambda: 5)
    return SimpleNamespace(
        name=name, phase=phase, answered=answered, peer=peer, request=request, turn=0, poll=None
    )


def waiter() -> Any:
    """A Server's attributes, and of its methods those that a test calls by the class."""
    made = mock.MagicMock(
        _sole=None,
        turns=0,
        _back=deque(),
        _ahead=deque(),
        _poll=None,
        _out=[],
        _next_look=float("inf"),
        _next_tick=float("inf"),
        _uids={LIGHT: 9},
    )
    made._fair, made._now = Fair(), 0.0
    for name in ("_serve_known", "_serve_others", "_do", "_finish"):
        getattr(made, name).side_effect = partial(getattr(Server, name), made)
    made._doors.resting, made._doors.renewed = {}, ()
    made.limits.idle_timeout = 1.0
    return made


def test_who_was_answered_before_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = [
        connection("a long body", BODY, True),
        connection("new", IDLE, False),
        connection("known", IDLE, True),
        connection("slow", HEAD, True),
        connection("known, too", IDLE, True),
        connection("its requests lie here", AHEAD, True),  # it is asked for more when they are answered
    ]
    fake, served = of_two_uids(monkeypatch, {LIGHT: 0.0})
    turn(fake, *ready)
    assert served == ["known", "known, too", "a long body", "new", "slow"]


def test_the_others_have_so_long_and_each_is_the_first_at_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "TURN", 0.0)  # it is over as soon as it has begun: one of each kind
    fake, served = waiter(), []
    fake._comes.side_effect = fake._go_ahead.side_effect = lambda one: served.append(one.name)
    others = [connection(name) for name in "abc"]
    fake._ahead.extend([connection("ahead 1"), connection("ahead 2")])
    for fake.turns in range(1, 5):
        Server._serve_others(fake, others)
    assert served == ["a", "ahead 1", "b", "ahead 2", "c", "a"]
    monkeypatch.setattr(server, "TURN", 3600.0)
    served.clear()
    Server._serve_others(fake, others)
    assert served == ["b", "c", "a"]


class Clock:
    """Time passes where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for name in ("monotonic", "thread_time"):
            monkeypatch.setattr(f"progressdb_kms.wire.server.time.{name}", lambda: self.now)


def of_two_uids(
    monkeypatch: pytest.MonkeyPatch, needs: dict[int, float], answers: bool = False
) -> tuple[Any, list[str]]:
    """A waiter of two UIDs' connections, and the names of what it serves: a request takes what its UID needs.
    With `answers` it also says when these are sent."""
    clock, fake, served = Clock(monkeypatch), waiter(), []
    fake._uids = dict.fromkeys(needs, 1)

    def serve(one: Any) -> None:
        served.append(one.name)
        clock.now += needs[one.peer.uid]
        fake._out += [(one, b"an answer")] * answers

    def flush() -> None:
        served.append("sent")
        fake._out.clear()

    fake._receive.side_effect = fake._comes.side_effect = fake._go_ahead.side_effect = serve
    fake._flush.side_effect = flush
    return fake, served


def turn(fake: Any, *ready: Any) -> None:
    fake._connections = dict(enumerate(ready))
    fake._wait.return_value = [(fd, 1) for fd in fake._connections]
    Server._turn(fake)


def test_one_who_asks_for_little_waits_for_one_request_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, served = of_two_uids(monkeypatch, {LIGHT: 0.0001, HEAVY: 0.005})
    pages = [connection(f"page {number}", uid=HEAVY) for number in range(3)]
    light = connection("light")
    for _ in range(3):
        turn(fake, *pages)
        turn(fake, *pages, light)
    assert served == [
        *("page 0", "light", "page 1", "page 2", "light", "page 0", "page 1", "light", "page 2"),
    ]


def test_short_requests_are_served_as_long_as_they_are_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, served = of_two_uids(monkeypatch, {LIGHT: 0.0001, HEAVY: 0.0003})
    turn(fake, *(connection("light") for _ in range(30)), *(connection("page", uid=HEAVY) for _ in range(30)))
    assert served == ["light"] * 30 + ["page"] * 7


def test_what_was_made_for_one_uid_is_sent_before_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, served = of_two_uids(monkeypatch, {LIGHT: 0.0001, HEAVY: 0.005}, answers=True)
    turn(fake, connection("page", uid=HEAVY), connection("page, too", uid=HEAVY))
    turn(fake, connection("page", uid=HEAVY), connection("light"), connection("light, too"))
    assert served == ["page", "sent", "light", "light, too", "sent", "page", "sent"]


def test_whom_an_answer_leaves_with_nothing_more_is_known_from_then_on() -> None:
    fake, one = waiter(), connection("new", BODY, False)
    fake.draining, one.kept_piece = False, None
    Server._rest(fake, one)
    assert one.answered and one.phase == IDLE


def late(come: bool) -> Any:
    """Of one whose time is over, and of which something came at the last moment, or nothing."""
    fake, one = waiter(), connection("idle", IDLE, True)
    fake._now = one.deadline = 7.0

    def receive(one: Any) -> bool:
        one.deadline += 60.0 * come
        return come

    fake._receive.side_effect = receive
    Server._late(fake, one)
    return fake, one


def test_what_came_before_its_time_was_over_is_served() -> None:
    """A daemon that had stood still closed connections on which requests lay."""
    fake, one = late(come=True)
    fake._close.assert_not_called()
    fake, one = late(come=False)
    fake._close.assert_called_once_with(one)


def ticking() -> Any:
    made = waiter()
    made._connections, made._now, made._tick_seconds = {}, 0.0, 1.0
    return made


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "in company"])
@pytest.mark.parametrize("batch", [False, True], ids=["message", "batch"])
@pytest.mark.parametrize("size", [server.INLINE, server.INLINE + 1, server.ALONE, server.ALONE + 1])
def test_who_is_alone_holds_nobody_up_with_a_long_message(others: int, batch: bool, size: int) -> None:
    fake, one = waiter(), mock.MagicMock()
    fake._connections, fake.slab.waiter = dict.fromkeys(range(1 + others)), (b"", b"")
    route = mock.MagicMock(batch=batch, waits=False)
    with mock.patch.object(server.dispatch, "dispatch"), mock.patch.object(server, "render"):
        Server._carry_out(fake, one, Request(mock.MagicMock(), bytes(size), Room(0, route=route)))
    most = server.INLINE if others or batch else server.ALONE
    assert [call.args[3] for call in fake._hand_over.call_args_list] == [fake._working] * (size > most)


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "in company"])
def test_who_is_alone_is_listened_to_until_its_body_is_there(others: int) -> None:
    """In company, each has a piece at a time."""
    fake, reader = waiter(), Reader(lambda head: Room(1 << 20))
    fake._take.side_effect, fake._now = partial(Server._take, fake), float("inf")
    fake._connections = dict.fromkeys(range(1 + others))
    head = b"POST /encrypt HTTP/1.1\r\nHost: unix\r\nContent-Length: 60000\r\n\r\n"
    reader.feed(head + bytes(16000), 0, len(head) + 16000)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(bytes(44000))
        ours.setblocking(False)
        one = SimpleNamespace(reader=reader, request=ours)
        pieces = 0
        while not fake._carry_out.called:
            assert Server._receive_long(fake, one)  # type: ignore[arg-type]
            pieces += 1
    assert len(fake._carry_out.call_args.args[1].body) == 60000 and (pieces == 1) is (others == 0)


@pytest.mark.parametrize("error", [PeerRefused("no"), Overloaded("too many")], ids=["refused", "no room"])
def test_who_comes_to_be_refused_again_and_again_hears_so_later(error: KMSError) -> None:
    """Whoever then came at once again took a core. It is told when it leaves, and at the end of its time."""
    fake = waiter()
    fake._turned_away, fake._most_turned_away = OrderedDict(), server.AT_ONCE + 2
    for fd in range(server.AT_ONCE + 3):
        Server._show_out(fake, mock.MagicMock(fileno=lambda fd=fd: fd), Peer(LIGHT), error)
    later = [call.args[0].deadline for call in fake._enter.call_args_list if not call.args[1]]
    assert later == [server.LINGER_SECONDS] * (3 if isinstance(error, PeerRefused) else 0)
    fake._send_more.assert_called_once()  # the oldest, for the last, and before it goes
    fake._close.assert_called_once_with(fake._send_more.call_args.args[0])


@pytest.mark.parametrize("spare", [-40, 0, 100, 4000])
def test_so_many_may_wait_as_there_are_descriptors_left(spare: int) -> None:
    most = 1000
    limits = Limits(most, 60.0, 30.0, most + server.SPARE_FILES + spare)
    rooms = {"a route": Room(1)}
    make = mock.patch.object(Server, "_make_rooms", lambda made: made._rooms.update(rooms))
    with make, mock.patch.object(Server, "_open_doors"):
        made = Server([], mock.MagicMock(), limits, mock.MagicMock(), mock.MagicMock(), mock.MagicMock())
    assert made._most_turned_away == {-40: 64, 0: 64, 100: 100, 4000: 1024}[spare]


def test_a_long_answer_does_not_wait_for_who_takes_it_slowly() -> None:
    """The socket of the only connection blocks for a moment: it did so with each 32 KiB of an answer."""
    parts = [memoryview(bytes(100)), memoryview(bytes(8 << 20))]
    left: list[memoryview] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(True)  # for ever, since nobody takes anything
        thread = threading.Thread(target=lambda: left.extend(send_parts(ours, parts)), daemon=True)
        thread.start()
        thread.join(60)
        assert 0 < sum(map(len, left)) < 100 + (8 << 20)
        assert send_parts(ours, left) is left


def test_an_answer_may_have_more_pieces_than_a_system_call_takes() -> None:
    """A batch of 64 MiB has 1,500."""
    pieces = [b"%04d" % number for number in range(2500)]
    ours, theirs = socket.socketpair()
    with ours, theirs, theirs.makefile("rb") as reader:
        ours.setblocking(False)
        left = [memoryview(piece) for piece in pieces]
        while left:
            left = send_parts(ours, left)
        assert reader.read(4 * 2500) == b"".join(pieces)


def test_and_its_answer_is_sent() -> None:
    fake = ticking()
    fake._out = ["an answer"]
    Server._tick(fake)
    fake._flush.assert_called_once_with()


def test_where_no_thread_is_left_memory_is_trimmed_later() -> None:
    """It ended the worker."""
    fake = ticking()
    fake._untrimmed, fake._working.submit.side_effect = True, RuntimeError("can't start new thread")
    Server._tick(fake)
    assert fake._untrimmed
    fake._working.submit.side_effect = None
    Server._tick(fake)
    assert not fake._untrimmed


def test_an_answer_with_a_key_that_nobody_takes_is_wiped() -> None:
    fake, answer = waiter(), memoryview(bytearray(b"key" * 10).ljust(ANSWER, b"x"))
    fake._send.side_effect = ConnectionResetError
    request = mock.MagicMock()
    Server._job(fake, mock.MagicMock(), mock.MagicMock(), request, False)(memoryview(b""), answer)
    ((_, keep, left),) = fake._back
    assert bytes(answer) == bytes(ANSWER) and not keep and not left
