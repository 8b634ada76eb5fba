"""Descriptors that come with what a peer sends, on a kernel that can't refuse them: nobody waits for them."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator

import pytest

from progressdb_kms.wire.handed import Closer, before
from tests.conftest import MakeDaemon
from tests.harness.wire import connect, raw


@contextlib.contextmanager
def slow_to_close() -> Iterator[socket.socket]:
    """A socket whose last close waits for ten minutes, unless its peer takes what it sent, or is gone."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sock,
    ):
        peer, _ = listener.accept()
        with peer:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(1 << 16))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
            yield sock


UNABLE = """
import sys
from progressdb_kms.wire import handed
handed.refuse = lambda listener: False
from progressdb_kms.__main__ import main
sys.exit(main())
"""
"""A daemon on Linux before 6.16."""

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: unix\r\n\r\n"


@pytest.mark.parametrize("workers", [1])
@pytest.mark.parametrize(
    "before, beside",
    [
        (b"", HEALTH),
        (HEALTH, HEALTH),
        (HEALTH[:9], HEALTH[9:]),
        (b"no HTTP\r\n\r\n", HEALTH),
    ],
    ids=["at once", "behind a request", "in a request", "behind nonsense"],
)
def test_descriptors_that_are_handed_over_hold_nobody_up(
    make_daemon: MakeDaemon, before: bytes, beside: bytes, workers: int
) -> None:
    daemon = make_daemon(workers=workers, command=(sys.executable, "-c", UNABLE))
    for _ in range(3):
        with slow_to_close() as slow, connect(daemon.socket) as sock:
            sock.settimeout(60)
            with contextlib.suppress(BlockingIOError):
                sock.send(before, socket.MSG_DONTWAIT)
            with contextlib.suppress(BrokenPipeError):
                socket.send_fds(sock, [beside], [slow.fileno()])
            threading.Thread(
                target=slow.close, daemon=True
            ).start()  # it may be the last who has it, and wait
            assert daemon.healthy()
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(1 << 16):
                    pass
        assert daemon.healthy()
    daemon.stop()


def test_what_is_looked_at_before_it_is_read_is_all_there(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(workers=1, command=(sys.executable, "-c", UNABLE))
    with daemon.session() as kms:
        key_id = kms.create_dek("t")["key_id"]
        for size in (0, 1, 200, 16_000, 17_000, 100_000, 3_000_000):
            text = base64.b64encode(os.urandom(size)).decode()
            sealed = kms.ok("POST", "/encrypt", {"key_id": key_id, "plaintext": text})["ciphertext"]
            opened = kms.ok("POST", "/decrypt", {"key_id": key_id, "ciphertext": sealed})["plaintext"]
            assert opened == text
    answers = raw(daemon.socket, HEALTH * 2000, timeout=60)
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 2000
    daemon.stop()


def test_where_the_process_that_closes_waits_another_takes_its_place() -> None:
    closer, ends = Closer(()), []
    closer.wary = True

    def close(*handed_over: int) -> None:
        ours, theirs = socket.socketpair()
        socket.send_fds(theirs, [b"x"], handed_over)
        closer.close(ours)
        ends.append(theirs)

    with slow_to_close() as slow:
        close(slow.fileno())
        threading.Thread(target=slow.close, daemon=True).start()
        first = closer._process
        assert first is not None
        while closer._process is first and len(ends) < 5000:
            close()
        close()
        assert closer._process is not first and first.returncode is not None
        for end in ends:
            end.settimeout(60)
            with contextlib.suppress(ConnectionResetError):
                assert end.recv(1) == b""
            end.close()
    closer._end.close()
    assert closer._process is not None and closer._process.wait(60) == 0


def test_a_process_that_takes_nothing_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        started.append(closer._process)
        raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")

    closer, started = Closer(()), []
    closer.wary = True
    monkeypatch.setattr(socket, "send_fds", refused)
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.send(b"x")
        closer.close(ours)
    assert ours.fileno() < 0 and len(started) == 2 and closer._process is None


def test_a_look_before_they_are_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"abc")
        place = memoryview(bytearray(16))
        assert len(before(ours, place)) == 3 and bytes(place[:3]) == b"abc"
        socket.send_fds(theirs, [b"def"], [theirs.fileno()])
        for _ in range(2):  # it drops none
            with pytest.raises(OSError, match="handed over"):
                before(ours, place)
            assert not any(place)  # nobody comes to read and to wipe that
