"""Who is served first in a turn of the waiter, and how long the others have."""

from __future__ import annotations

from collections import OrderedDict, deque
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from progressdb_kms.errors import KMSError, Overloaded, PeerRefused
from progressdb_kms.rules import Peer
from progressdb_kms.wire import server
from progressdb_kms.wire.admission import SPARE_FILES, Limits
from progressdb_kms.wire.connection import AHEAD, BODY, HEAD, IDLE, REFUSED
from progressdb_kms.wire.fair import Fair
from progressdb_kms.wire.lanes import THREADS
from progressdb_kms.wire.server import Server
from progressdb_kms.wire.slab import Slab

LIGHT, HEAVY = 7, 8


def connection(name: str, phase: int = IDLE, answered: bool = True, uid: int = LIGHT) -> Any:
    peer, request = SimpleNamespace(uid=uid), SimpleNamespace(fileno=lambda: 5)
    return SimpleNamespace(
        name=name, phase=phase, answered=answered, peer=peer, request=request, turn=0, poll=None
    )


def waiter() -> Any:
    """A Server's attributes, and of its methods those that a test calls by the class."""
    made = mock.MagicMock(turns=0, _fair=Fair(), _next_look=float("inf"), _next_tick=float("inf"))
    made._connections = connections()
    made._lone.sole, made._lanes.back, made._sender.out = None, deque(), []
    for name in ("_serve_known", "_serve_others", "_do"):
        getattr(made, name).side_effect = partial(getattr(Server, name), made)
    made._doors.resting, made._doors.renewed = {}, ()
    return made


def connections() -> Any:
    """A table with methods that do nothing."""
    return mock.MagicMock(all={}, ahead=deque(), uids={LIGHT: 9}, turned_away=OrderedDict(), now=0.0)


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
    fake._comes.side_effect = fake._receiver.go_ahead.side_effect = lambda one: served.append(one.name)
    others = [connection(name) for name in "abc"]
    fake._connections.ahead.extend([connection("ahead 1"), connection("ahead 2")])
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
    fake._connections.uids = dict.fromkeys(needs, 1)

    def serve(one: Any) -> None:
        served.append(one.name)
        clock.now += needs[one.peer.uid]
        fake._sender.out += [(one, b"an answer")] * answers

    def flush() -> None:
        if fake._sender.out:
            served.append("sent")
        fake._sender.out.clear()

    receiver = fake._receiver
    receiver.receive.side_effect = fake._comes.side_effect = receiver.go_ahead.side_effect = serve
    fake._sender.flush.side_effect = flush
    return fake, served


def turn(fake: Any, *ready: Any) -> None:
    fake._connections.all = dict(enumerate(ready))
    fake._wait.return_value = [(fd, 1) for fd in fake._connections.all]
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


def late(come: bool) -> Any:
    """Of one whose time is over, and of which something came at the last moment, or nothing."""
    fake, one = waiter(), connection("idle", IDLE, True)
    fake._connections.now = one.deadline = 7.0

    def receive(one: Any) -> bool:
        one.deadline += 60.0 * come
        return come

    fake._receiver.receive.side_effect = receive
    Server._late(fake, one)
    return fake, one


def test_what_came_before_its_time_was_over_is_served() -> None:
    """A daemon that had stood still closed connections on which requests lay."""
    fake, one = late(come=True)
    fake._connections.close.assert_not_called()
    fake, one = late(come=False)
    fake._connections.close.assert_called_once_with(one)


def ticking() -> Any:
    made = waiter()
    made._tick_seconds = 1.0
    return made


@pytest.mark.parametrize("error", [PeerRefused("no"), Overloaded("too many")], ids=["refused", "no room"])
def test_who_comes_to_be_refused_again_and_again_hears_so_later(error: KMSError) -> None:
    """Whoever then came at once again took a core. It is told when it leaves, and at the end of its time."""
    fake = waiter()
    table, fake._most_turned_away = fake._connections.turned_away, server.AT_ONCE + 2
    fake._connections.enter.side_effect = lambda one, phase, events: table.update({len(waited_for): one})
    waited_for = []
    for _ in range(server.AT_ONCE + 3):
        Server._show_out(fake, mock.MagicMock(), Peer(LIGHT), error)
        waited_for.append(bool(fake._connections.enter.call_args.args[2]))
    later = 3 if isinstance(error, PeerRefused) else 0
    assert waited_for == [True] * (len(waited_for) - later) + [False] * later
    fake._connections.close.assert_called_once_with(table[0])  # the oldest, for the last
    assert [call.args[1] for call in fake._connections.enter.call_args_list] == [REFUSED] * len(waited_for)


@pytest.mark.parametrize("spare", [-40, 0, 100, 4000])
def test_so_many_may_wait_as_there_are_descriptors_left(spare: int) -> None:
    most = 1000
    limits = Limits(most, 60.0, 30.0, most + SPARE_FILES + spare)
    app: Any = mock.MagicMock()
    app.max_body_bytes = 1
    made = Server([], app, limits, Slab("off", THREADS))
    assert made._most_turned_away == {-40: 64, 0: 64, 100: 100, 4000: 1024}[spare]


def test_and_its_answer_is_sent() -> None:
    fake = ticking()
    Server._tick(fake, 0.0)
    fake._sender.flush.assert_called_once_with()


def test_where_no_thread_is_left_memory_is_trimmed_later() -> None:
    """It ended the worker."""
    fake = ticking()
    fake.shares.freed, fake._lanes.trim.side_effect = True, Overloaded("no thread is left")
    Server._tick(fake, 0.0)
    assert fake.shares.freed
    fake._lanes.trim.side_effect = None
    Server._tick(fake, 0.0)
    assert not fake.shares.freed
