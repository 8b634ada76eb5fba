"""Who is served first in a turn of the waiter, and how long the others have."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from progressdb_kms.wire import server
from progressdb_kms.wire.connection import AHEAD, BODY, HEAD, IDLE
from progressdb_kms.wire.server import Server
from progressdb_kms.wire.slab import ANSWER


def connection(name: str, phase: int, answered: bool) -> Any:
    return SimpleNamespace(name=name, phase=phase, answered=answered)


def waiter() -> Any:
    """A Server's attributes, and of its methods those that a test calls by the class."""
    made = mock.MagicMock(
        _sole=None, _turns=0, _back=deque(), _ahead=deque(), _out=[], _next_tick=float("inf")
    )
    made._doors.resting, made._doors.renewed = {}, ()
    made.limits.idle_timeout = 1.0
    return made


def test_who_was_answered_before_comes_first() -> None:
    ready = [
        connection("a long body", BODY, True),
        connection("new", IDLE, False),
        connection("known", IDLE, True),
        connection("slow", HEAD, True),
        connection("known, too", IDLE, True),
        connection("its requests lie here", AHEAD, True),  # it is asked for more when they are answered
    ]
    served: list[str] = []
    fake = waiter()
    fake._connections = dict(enumerate(ready))
    fake._wait.return_value = [(fd, 1) for fd in range(len(ready))]
    fake._receive.side_effect = lambda one: served.append(one.name)
    fake._serve_others.side_effect = lambda others: served.extend(one.name for one in others)
    Server._turn(fake)
    assert served == ["known", "known, too", "a long body", "new", "slow"]


def test_the_others_have_so_long_and_each_is_the_first_at_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "TURN", -1.0)  # it is over before it has begun: one of each kind
    fake, served = waiter(), []
    fake._comes.side_effect = served.append
    fake._go_ahead.side_effect = served.append
    fake._ahead.extend(["ahead 1", "ahead 2"])
    for fake._turns in range(4):
        Server._serve_others(fake, ["a", "b", "c"])
    assert served == ["a", "ahead 1", "b", "ahead 2", "c", "a"]
    monkeypatch.setattr(server, "TURN", 3600.0)
    served.clear()
    fake._turns = 1
    Server._serve_others(fake, ["a", "b", "c"])
    assert served == ["b", "c", "a"]


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
