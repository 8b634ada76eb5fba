"""What a peer's buffer doesn't take of an answer waits for it, and nobody waits for that peer."""

from __future__ import annotations

import socket
import threading

from progressdb_kms.wire.sending import send_parts


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
