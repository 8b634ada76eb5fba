"""What the waiter serves itself, and for how long it listens to one connection."""

from __future__ import annotations

import socket
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from progressdb_kms.wire import receiving
from progressdb_kms.wire.http1 import Reader, Request, Room
from progressdb_kms.wire.receiving import ALONE, INLINE, Receiver

from .test_turns import LIGHT, connections


def receiver(held: int) -> Any:
    """A Receiver's attributes, beside so many connections."""
    made = mock.MagicMock(_connections=connections())
    made._connections.all = dict.fromkeys(range(held))
    made._slab.waiter = memoryview(b""), memoryview(b"")
    return made


def carried_out(made: Any, size: int, batch: bool = False) -> None:
    one = mock.MagicMock(peer=SimpleNamespace(uid=LIGHT))
    room = Room(size, route=mock.MagicMock(batch=batch, long=False, waits=False))
    with mock.patch.object(receiving, "dispatch"):
        Receiver.carry_out(made, one, Request(mock.MagicMock(), bytes(size), room))


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "in company"])
@pytest.mark.parametrize("batch", [False, True], ids=["message", "batch"])
@pytest.mark.parametrize("size", [INLINE, INLINE + 1, ALONE, ALONE + 1])
def test_who_is_alone_holds_nobody_up_with_a_long_message(others: int, batch: bool, size: int) -> None:
    made = receiver(1 + others)
    carried_out(made, size, batch)
    most = INLINE if others or batch else ALONE
    assert [call.args[3] for call in made._hand_over.call_args_list] == [True] * (size > most)
    assert made._sender.answer.called == (size <= most)


@pytest.mark.parametrize(("size", "came"), [(INLINE, {LIGHT: 7.0}), (INLINE + 1, {})])
def test_a_request_is_short_by_its_body(size: int, came: dict[int, float]) -> None:
    made = receiver(1)
    made._pace.came, made._connections.now = {}, 7.0
    carried_out(made, size)
    assert made._pace.came == came


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "in company"])
def test_who_is_alone_is_listened_to_until_its_body_is_there(others: int) -> None:
    """In company, each has a piece at a time."""
    made, reader = receiver(1 + others), Reader(lambda head: Room(1 << 20))
    made.take.side_effect, made._connections.now = partial(Receiver.take, made), float("inf")
    head = b"POST /encrypt HTTP/1.1\r\nHost: unix\r\nContent-Length: 60000\r\n\r\n"
    begun = head + bytes(16000)
    reader.feed(begun, 0, len(begun), memoryview(begun))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(bytes(44000))
        ours.setblocking(False)
        one: Any = SimpleNamespace(reader=reader, request=ours)
        pieces = 0
        while not made.carry_out.called:
            assert Receiver._receive_long(made, one)
            pieces += 1
    assert len(made.carry_out.call_args.args[1].body) == 60000 and (pieces == 1) is (others == 0)
