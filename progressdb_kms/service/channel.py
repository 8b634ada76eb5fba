"""How a worker hands a job to the keeper: one datagram, and a socket for the answer beside it.

    to the keeper   {"op": "create", "args": {…}, "head": ["3.1", 17, "<sig>"]} and a descriptor (SCM_RIGHTS)
    to the worker   {"ok": {…}} or {"error": {"type", "message", "code", "hint"}}, then the end of the stream

Datagrams on a socket pair are whole or not there, so that any number of threads and processes may send at
once; a keeper that dies closes the answer sockets, and each caller knows at once. No key bytes pass here.
"""

from __future__ import annotations

import array
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

from .. import errors
from ..crypto.aead import KEY_SIZE
from ..crypto.memory import wipe
from ..encoding import json_dumps
from ..errors import Conflict, KMSError, StoreUnavailable

MAX_JOB = 32 * 1024
"""Bytes of one job: a thread_id of 512 escaped characters fits many times."""

_INT = array.array("i")

Head = tuple[str, int, str]
"""The head of an audit chain: its name, the last seq, the last signature."""


class Job(NamedTuple):
    op: str
    args: dict[str, Any]
    head: Optional[Head]
    reply: socket.socket


def channel() -> tuple[socket.socket, socket.socket]:
    """(the keeper's end, the workers' end), made before any fork and kept open by the parent."""
    kind = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM)
    try:
        return socket.socketpair(socket.AF_UNIX, kind)
    except OSError:  # macOS has no SOCK_SEQPACKET
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)


class KeeperClient:
    """The workers' end."""

    def __init__(self, outbox: socket.socket) -> None:
        self._outbox = outbox

    def call(
        self, op: str, args: dict[str, Any], head: Optional[Head] = None, timeout: Optional[float] = 30.0
    ) -> dict[str, Any]:
        """Have it done. Raises the error that the keeper answered, or StoreUnavailable where it is silent.

        `timeout` is in seconds, None for jobs that may take as long as they take.
        """
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                message = json_dumps({"op": op, "args": args, "head": head}).encode()
                try:
                    socket.send_fds(self._outbox, [message], [theirs.fileno()])
                except OSError as error:
                    raise StoreUnavailable(
                        f"the keeper process can't be reached: {error.strerror}"
                    ) from error
            ours.settimeout(timeout)
            return _unpack(_read(ours))


def _read(sock: socket.socket) -> bytes:
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except socket.timeout:  # TimeoutError since Python 3.10
        raise StoreUnavailable("the keeper process does not answer", hint="`progressdb-kms doctor`") from None
    return b"".join(parts)


def _unpack(answer: bytes) -> dict[str, Any]:
    if not answer:
        raise StoreUnavailable(
            "the keeper process ended before it answered: the change may or may not have been made",
            hint="ask again: every change may be repeated",
        )
    value = json.loads(answer)
    if "error" in value:
        raise _ERRORS[value["error"].pop("type")](**value["error"])
    result: dict[str, Any] = value["ok"]
    return result


def receive(inbox: socket.socket) -> Optional[Job]:
    """The next job, or None where none waits."""
    room = socket.CMSG_LEN(_INT.itemsize)
    try:  # not socket.recv_fds: before Python 3.13 it forgets its flags
        message, ancillary, _, _ = inbox.recvmsg(MAX_JOB, room, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % _INT.itemsize])
    if not descriptors:
        return None
    reply = socket.socket(fileno=descriptors[0])
    value = json.loads(message)
    head = value["head"]
    return Job(value["op"], value["args"], (head[0], head[1], head[2]) if head else None, reply)


def answer(job: Job, outcome: Any) -> None:
    """Send a result (a dict) or a KMSError. A caller that is gone is no error: the work is done."""
    if isinstance(outcome, KMSError):
        error = {
            "type": type(outcome).__name__,
            "message": outcome.message,
            "code": outcome.code,
            "hint": outcome.hint,
        }
        value: dict[str, Any] = {"error": error}
    else:
        value = {"ok": outcome}
    with job.reply:
        try:
            job.reply.sendall(json_dumps(value).encode())
        except (BrokenPipeError, ConnectionResetError):
            return


def _concrete(cls: type[KMSError]) -> dict[str, type[KMSError]]:
    found = {cls.__name__: cls} if cls.status else {}
    for child in cls.__subclasses__():
        found.update(_concrete(child))
    return found


_ERRORS = _concrete(errors.KMSError)


# ---- new KEKs on their way to the keeper -------------------------------------------------------------


class StagingSlots:
    """This worker's share of the slots in which a new KEK waits for the keeper."""

    def __init__(self, region: memoryview, first: int, count: int) -> None:
        self._region = region
        self._free = list(range(first, first + count))
        self._lock = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[tuple[int, memoryview]]:
        """(number, 32 bytes of locked memory), wiped in the end whoever used it."""
        with self._lock:
            if not self._free:
                raise Conflict("too many rotations at once", code="rotation_in_progress")
            slot = self._free.pop()
        view = self._region[slot * KEY_SIZE : (slot + 1) * KEY_SIZE]
        try:
            yield slot, view
        finally:
            wipe(view)
            with self._lock:
                self._free.append(slot)
