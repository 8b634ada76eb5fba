"""What a Unix socket alone can do: a daemon's shape without its work, as a limit beside its figures.

Processes that are pinned to a core each, a thread a connection: recv until the request is there, sendall of
one answer that is always the same. No HTTP is judged, nobody is identified, nothing is sealed or recorded.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LENGTH = b"Content-Length: "


@contextmanager
def alone(answer: int, processes: int) -> Iterator[str]:
    """In a session of its own, with answers of so many bytes; yields the path of its socket."""
    folder = tempfile.mkdtemp(prefix="kmsbench")
    path, root = f"{folder}/s", str(Path(__file__).parents[2])
    start = f"from {__name__} import serve\nserve({path!r}, {answer}, {processes})"
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {root!r})\n{start}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield path
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(folder)


def serve(path: str, answer: int, processes: int) -> None:
    """Until it is killed. A line to standard output says that it listens."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % answer
    whole = head + bytes(answer)
    places = sorted(os.sched_getaffinity(0))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1024)
        print("ready", flush=True)
        own = next((i for i in range(1, processes) if not os.fork()), 0)
        os.sched_setaffinity(0, {places[own % len(places)]})
        while True:
            threading.Thread(target=_answer, args=(listener.accept()[0], whole), daemon=True).start()


def _answer(sock: socket.socket, whole: bytes) -> None:
    received = bytearray(1 << 16)
    with sock, suppress(ConnectionError):  # the caller is done
        while size := sock.recv_into(received):
            head = received.find(b"\r\n\r\n", 0, size) + 4
            at = received.find(_LENGTH, 0, head)
            length = int(received[at + len(_LENGTH) : received.find(b"\r\n", at)]) if at > 0 else 0
            size -= head
            while size < length:
                size += sock.recv_into(received)
            sock.sendall(whole)
