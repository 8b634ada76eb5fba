"""What is served at once, what is work for a thread, and how that lets others in between."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from progressdb_kms.audit.log import Fragment
from progressdb_kms.errors import Overloaded
from progressdb_kms.rules import Peer
from progressdb_kms.wire import lanes
from progressdb_kms.wire.call import Call, Reply
from progressdb_kms.wire.connection import Connection
from progressdb_kms.wire.lanes import Lane, Lanes
from progressdb_kms.wire.sending import Sender
from progressdb_kms.wire.slab import ANSWER
from tests.conftest import MakeDaemon
from tests.harness import Daemon
from tests.harness.procs import threads
from tests.harness.wire import b64, connect


def started_for(daemon: Daemon, count: int, data: str) -> set[int]:
    """The threads that came with a batch of so many items."""
    before = {tid for pid in daemon.pids() for tid in threads(pid)}
    daemon.ok("POST", "/decrypt_batch", {"items": [{"key_id": "k", "ciphertext": data}] * count})
    return {tid for pid in daemon.pids() for tid in threads(pid)} - before


def test_a_page_of_chat_is_served_at_once(make_daemon: MakeDaemon) -> None:
    """100 messages of 200 bytes, or 128 of none, need no thread; what is longer, or more, does."""
    daemon = make_daemon(workers=1)
    message = b64(bytes(228))
    assert not started_for(daemon, 100, message)
    assert not started_for(daemon, 128, "")
    assert started_for(daemon, 129, "")
    assert not started_for(daemon, 800, message)  # it is there
    assert started_for(make_daemon(workers=1), 800, message)


def test_however_many_list_at_once_one_thread_does_it(make_daemon: MakeDaemon) -> None:
    """Each takes the interpreter from those who want little, and holds what it read."""
    daemon = make_daemon(workers=1)
    before = {tid for pid in daemon.pids() for tid in threads(pid)}
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(daemon.socket)) for _ in range(20)]
        for sock in socks:
            sock.sendall(b"GET /deks?limit=1000 HTTP/1.1\r\nHost: unix\r\n\r\n")
        assert all(sock.recv(4096).startswith(b"HTTP/1.1 200 ") for sock in socks)
        assert len({tid for pid in daemon.pids() for tid in threads(pid)} - before) == 1


def of_a_worker(slab: Any) -> tuple[Lanes, select.epoll]:
    pace: Any = SimpleNamespace(poll=select.epoll())
    return Lanes(mock.MagicMock(), pace, Sender(mock.MagicMock(), slab), slab), pace.poll


def test_an_answer_with_a_key_that_nobody_takes_is_wiped() -> None:
    made, poll = of_a_worker(mock.MagicMock())
    answer = memoryview(bytearray(b"key" * 10).ljust(ANSWER, b"x"))
    head: Any = mock.MagicMock(method="POST", version="1.1", keep_alive=True)
    call = Call(head, b"a body", Peer(7), Fragment(""), memoryview(b""), memoryview(b""))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                ours.send(bytes(1 << 16))
        one = Connection(ours, Peer(7), Fragment(""))
        with mock.patch.object(lanes.dispatch, "dispatch", return_value=Reply(200, answer, secret=True)):
            made._run(one, mock.MagicMock(), call, False, memoryview(b""), answer)
    assert list(made.back) == [one] and not one.keep and not one.pending
    assert bytes(answer) == bytes(ANSWER) and call.body == b""
    assert poll.poll(0.0)  # the waiter is woken
    made.heard()
    assert not poll.poll(0.0)
    made.heard()  # that is nothing


def test_a_fault_in_a_thread_ends_the_connection_alone(caplog: pytest.LogCaptureFixture) -> None:
    (made, _), one = of_a_worker(mock.MagicMock()), mock.MagicMock()
    with mock.patch.object(lanes.dispatch, "dispatch", side_effect=ValueError("a fault of ours")):
        made.finish(mock.MagicMock(), one, mock.MagicMock(), mock.MagicMock())
    assert list(made.back) == [one] and one.keep is False
    assert "a connection ended with an error" in caplog.text


def test_where_no_thread_can_be_had_it_is_said() -> None:
    """But a job waits where one is at work already."""
    lane = Lane("waiting", [(memoryview(b""), memoryview(b""))] * 2)
    none_left = mock.patch.object(
        threading.Thread, "start", side_effect=RuntimeError("can't start new thread")
    )
    with none_left, pytest.raises(Overloaded, match="no thread is left"):
        lane.submit(7, lambda *memory: None)
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()
    lane.submit(7, lambda *memory: begun.set() or go_on.wait(60) and None)
    assert begun.wait(60)
    with none_left:
        lane.submit(7, lambda *memory: done.set())
    go_on.set()
    assert done.wait(60)
