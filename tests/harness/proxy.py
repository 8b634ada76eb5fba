"""A network between a daemon and its engine, which the test owns: bytes are forwarded, held back, or lost.

proxy = Proxy(("127.0.0.1", 0), ("127.0.0.1", 5432))      # or paths of Unix sockets
proxy.stall()    a network that is gone: no byte passes, no connection ends, new ones get no answer
proxy.cut()      everything is closed, and what comes is closed at once
proxy.open()     as before; what was held back goes on
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from typing import Union

Address = Union[str, "tuple[str, int]"]

STALLED, CUT, OPEN = "stalled", "cut", "open"


class Proxy:
    def __init__(self, listen: Address, target: Address) -> None:
        self._target = target
        self._listener = _socket(listen)
        if not isinstance(listen, str):
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(listen)
        self._listener.listen(128)
        self.address: Address = self._listener.getsockname()
        self._others: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._mode = OPEN
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def open(self) -> None:
        self._mode = OPEN

    def stall(self) -> None:
        self._mode = STALLED

    def cut(self) -> None:
        self._mode = CUT

    def close(self) -> None:
        self._over = True
        self._thread.join()

    def _run(self) -> None:
        while not self._over:
            if self._mode == STALLED:
                time.sleep(0.01)
                continue
            if self._mode == CUT:
                for one in list(self._others):
                    self._end(one)
            for key, _ in self._selector.select(0.05):
                if self._mode == STALLED:
                    break
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._listener:
                    self._accept()
                elif sock in self._others:
                    self._forward(sock)
        for one in list(self._others):
            self._end(one)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self._mode == CUT:
            near.close()
            return
        far = _socket(self._target)
        try:
            far.settimeout(5)
            far.connect(self._target)
        except OSError:
            near.close()
            far.close()
            return
        near.settimeout(5)
        self._others.update({near: far, far: near})
        for sock in (near, far):
            self._selector.register(sock, selectors.EVENT_READ)

    def _forward(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(65536)
            if data:
                self._others[sock].sendall(data)
                return
        except OSError:
            data = b""  # it is broken: so are both of its ends
        self._end(sock)

    def _end(self, sock: socket.socket) -> None:
        for one in (sock, self._others.get(sock)):
            if one is not None and self._others.pop(one, None) is not None:
                self._selector.unregister(one)
                with contextlib.suppress(OSError):
                    one.close()


def _socket(address: Address) -> socket.socket:
    return socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_STREAM)
