"""Descriptors that a peer hands over with its bytes (unix(7), SCM_RIGHTS). Nobody takes them here.

Whoever reads past them, or closes a socket in which some lie, drops them, and to drop the last one of a TCP
socket with SO_LINGER waits for as long as its owner likes. From Linux 6.16 on a socket can refuse them.
Before that it is looked at what comes before it is read, by a peek, which drops none; and a socket with bytes
unread is closed by another process, which is killed where it waits: who is killed waits for nothing.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress

SO_PASSRIGHTS = 83  # socket(7)

_CLOSE = """
import os, socket
end = socket.socket(fileno=0)
while found := socket.recv_fds(end, 1, 1)[1]:
    end.recv(1)
    os.close(found[0])
"""
"""Is told of each when it is the last who has it."""


def refuse(listener: socket.socket) -> bool:
    """Let no peer hand over any; False where the kernel doesn't know how. Who is accepted inherits it."""
    with suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        return True
    return False


def before(request: socket.socket, place: memoryview) -> memoryview:
    """The part of the place that what is there fills. Raises OSError where descriptors are among it."""
    size, _, flags, _ = request.recvmsg_into([place], 0, socket.MSG_PEEK)
    if flags & socket.MSG_CTRUNC:
        place[:size] = bytes(size)  # nobody comes to read that
        raise OSError("descriptors were handed over")
    return place[:size]


class Closer:
    """One worker's. `wary`: one of its listening sockets can't refuse descriptors."""

    def __init__(self, listeners: Iterable[socket.socket]) -> None:
        self.wary = not all(refuse(one) for one in listeners if one.family == socket.AF_UNIX)
        self._process: subprocess.Popen[bytes] | None = None

    def close(self, request: socket.socket) -> None:
        with suppress(OSError):
            if self.wary:
                request.shutdown(socket.SHUT_RD)  # nothing comes any more
                if request.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    self._hand_on(request)
        request.close()

    def _hand_on(self, request: socket.socket) -> None:
        for _ in range(2):  # one that takes nothing holds nobody up for ever
            if self._process is None:
                self._end, theirs = socket.socketpair()
                self._end.setblocking(False)
                with theirs:
                    command = [sys.executable, "-I", "-S", "-c", _CLOSE]
                    self._process = subprocess.Popen(command, stdin=theirs.fileno())  # noqa: S603
            try:
                socket.send_fds(self._end, [b"\0"], [request.fileno()])
                request.close()
                self._end.send(b"\0")
                return
            except OSError:
                self._end.close()
                self._process.kill()
                self._process.wait()
                self._process = None
