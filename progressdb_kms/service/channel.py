"""How a worker hands a job to the keeper: one datagram, and a socket for the answer beside it.

    to the keeper   {"op": "create", "args": {…}, "head": ["3.1", 17, "<sig>"]} and a descriptor (SCM_RIGHTS)
    to the worker   {"ok": {…}} or {"error": {"type", "message", "code", "hint"}}, then the end of the stream

Datagrams on a socket pair are whole or not there, so that any number of threads and processes may send at
once; a keeper that dies closes the answer sockets, and each caller knows at once.

No key bytes pass here. A new KEK waits in a slot of the shared locked region, and the job names the slot and
the kek_id: the keeper copies the key, wipes the slot, compares the copy with the kek_id, and uses nothing but
the copy. A slot belongs to its job until the keeper has answered or died, not until the caller has given up:
a job that still waits would find another request's KEK there. Nor is such a job begun then: who was told "no
answer" may have thrown that key away.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from .. import errors
from ..config.weakkeys import check_master_key
from ..crypto.aead import KEY_SIZE
from ..crypto.keyring import fingerprint
from ..crypto.memory import LockedBuffer, wipe
from ..encoding import json_dumps
from ..errors import BadRequest, Conflict, KMSError, StoreUnavailable, WeakKey

MAX_JOB = 32 * 1024
"""Bytes of one job: a thread_id of 512 escaped characters fits many times."""

Head = Sequence[Any]
"""The head of an audit chain: its name, the last seq, the last signature."""


class Job(NamedTuple):
    op: str
    args: dict[str, Any]
    head: Head | None
    reply: socket.socket

    @property
    def abandoned(self) -> bool:
        """The caller gave up, or is gone: it has said that nothing more will come."""
        try:
            return not self.reply.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False


def channel() -> tuple[socket.socket, socket.socket]:
    """(the keeper's end, the workers' end), made before any fork and kept open by the parent. Nobody waits in
    the kernel: a queue that nobody empties must not hold a caller, nor one that is empty the keeper."""
    inbox, outbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inbox.setblocking(False)
    outbox.setblocking(False)
    return inbox, outbox


class KeeperClient:
    """The workers' end."""

    def __init__(self, outbox: socket.socket) -> None:
        self._outbox = outbox

    def call(
        self,
        op: str,
        args: dict[str, Any],
        head: Head | None = None,
        timeout: float | None = 30.0,
        new_kek: Staged | None = None,
    ) -> dict[str, Any]:
        """Have it done. Raises the error that the keeper answered, or StoreUnavailable where it is silent.

        `timeout`: seconds for all of it, None for jobs that may take as long as they take once they are sent.
        """
        deadline = time.monotonic() + (SEND_SECONDS if timeout is None else timeout)
        if new_kek is not None:
            args = {**args, "slot": new_kek.slot, "new_kek_id": fingerprint(new_kek.view)}
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise StoreUnavailable(f"the keeper process can't be reached: {error.strerror}") from error
        try:
            with theirs:
                message = json_dumps({"op": op, "args": args, "head": head}).encode()
                self._send(message, theirs, deadline)
            try:
                answer = _read(ours, None if timeout is None else deadline, (head or new_kek) is None)
            except BaseException:
                if new_kek is not None:
                    new_kek.leave(ours)
                raise
            return _unpack(answer)
        finally:
            if new_kek is None or new_kek.waiting is None:
                ours.close()

    def _send(self, message: bytes, reply: socket.socket, deadline: float) -> None:
        while True:
            try:
                socket.send_fds(self._outbox, [message], [reply.fileno()])
                return
            except BlockingIOError:
                if not _ready(self._outbox, select.POLLOUT, deadline):
                    raise StoreUnavailable(
                        "the keeper process takes no jobs: its queue is full", hint="`progressdb-kms doctor`"
                    ) from None
            except OSError as error:
                raise StoreUnavailable(f"the keeper process can't be reached: {error.strerror}") from error


SEND_SECONDS = 30.0
"""How long a job of no limited time may wait for room in the queue."""


def _ready(sock: socket.socket, event: int, deadline: float | None) -> bool:
    """Wait until the socket is ready for it; False after the deadline."""
    poller = select.poll()
    poller.register(sock, event)
    return bool(poller.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000))


def _read(sock: socket.socket, deadline: float | None = None, asked: bool = False) -> bytes:
    """`asked`: nothing was to be changed."""
    parts: list[bytes] = []
    while _ready(sock, select.POLLIN, deadline):
        if not (part := sock.recv(65536)):
            return b"".join(parts)
        parts.append(part)
    made = ": a change may or may not be made"
    hint = "ask again: every change may be repeated; `progressdb-kms doctor`"
    if asked:
        made, hint = "", "it hangs, or its disk: `progressdb-kms help troubleshooting`"
    raise StoreUnavailable(f"the keeper process does not answer{made}", hint=hint)


def _unpack(answer: bytes) -> dict[str, Any]:
    if not answer:
        raise StoreUnavailable(
            "the keeper process ended before it answered: the change may or may not have been made",
            hint="ask again: every change may be repeated",
        )
    found = outcome(json.loads(answer))
    if isinstance(found, KMSError):
        raise found
    return found


def outcome(told: dict[str, Any]) -> dict[str, Any] | KMSError:
    """What `telling` was told."""
    if (error := told.get("error")) is not None:
        return _ERRORS[error.pop("type")](**error)
    return told["ok"]  # type: ignore[no-any-return]


def telling(outcome: dict[str, Any] | KMSError) -> dict[str, Any]:
    if not isinstance(outcome, KMSError):
        return {"ok": outcome}
    kind = next(cls.__name__ for cls in type(outcome).__mro__ if cls.__name__ in _ERRORS)
    return {"error": {"type": kind, "message": outcome.message, "code": outcome.code, "hint": outcome.hint}}


def receive(inbox: socket.socket) -> Job | None:
    """The next job, or None where none waits."""
    try:
        message, descriptors, _, _ = socket.recv_fds(inbox, MAX_JOB, 1)
    except BlockingIOError:
        return None
    if not descriptors:
        return None
    reply = socket.socket(fileno=descriptors[0])
    return Job(**json.loads(message), reply=reply)


def answer(job: Job, outcome: Any) -> None:
    """Send a result (a dict) or a KMSError. A caller that is gone is no error: the work is done."""
    with job.reply, suppress(BrokenPipeError, ConnectionResetError):
        job.reply.sendall(json_dumps(telling(outcome)).encode())


_ERRORS: dict[str, type[KMSError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, KMSError)
}


# ---- new KEKs on their way to the keeper -------------------------------------------------------------


def taken(job: Job, region: memoryview) -> dict[str, Any]:
    """The arguments of a job that brings a KEK, with a copy of it in place of its slot's number."""
    args = dict(job.args)
    slot, kek_id = args.pop("slot"), args.pop("new_kek_id")
    staged = region[slot * KEY_SIZE : (slot + 1) * KEY_SIZE]
    copy = LockedBuffer(KEY_SIZE)
    copy.view[:] = staged
    try:
        if fingerprint(copy.view) != kek_id:  # of another job by now: its worker died
            raise Conflict("the new KEK is not there any more: nothing was changed", hint="send it again")
        wipe(staged)
        if job.abandoned:
            raise Conflict("the caller has given up: nothing was changed")
        check_master_key(copy.view)
    except KMSError as error:
        copy.close()
        if isinstance(error, WeakKey):
            raise BadRequest.invalid("new_kek_hex", f"can't be a KEK: {error.message}") from None
        raise
    return {**args, "new_kek": copy}


STAGING_SLOTS = 64
"""New KEKs under way at once, over all workers."""


class Staged:
    """A slot and its 32 bytes of locked memory. `waiting`: where the answer will come to a job that still
    holds the slot, though its caller gave up."""

    def __init__(self, slot: int, view: memoryview) -> None:
        self.slot = slot
        self.view = view
        self.waiting: socket.socket | None = None

    def leave(self, reply: socket.socket) -> None:
        """Give up on the answer: the keeper sees it, and won't begin any more; the slot stays the job's."""
        self.waiting = reply
        reply.shutdown(socket.SHUT_WR)

    def answered(self) -> bool:
        """Has the keeper answered, or died?"""
        if self.waiting is None:
            return True
        if not _ready(self.waiting, select.POLLIN, 0.0):
            return False
        self.waiting.close()
        return True


class StagingSlots:
    """This worker's share of the slots in which a new KEK waits for the keeper."""

    def __init__(self, region: memoryview, first: int, count: int) -> None:
        self._region = region
        self._free = list(range(first, first + count))
        self._left: list[Staged] = []
        self._lock = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[Staged]:
        """A free slot, wiped in the end, or once the keeper has answered to a caller that gave up."""
        with self._lock:
            self._collect()
            if not self._free:
                raise Conflict("too many rotations at once", code="rotation_in_progress")
            slot = self._free.pop()
        staged = Staged(slot, self._region[slot * KEY_SIZE : (slot + 1) * KEY_SIZE])
        try:
            yield staged
        finally:
            with self._lock:
                self._left.append(staged)
                self._collect()

    def _collect(self) -> None:
        left, self._left = self._left, []
        for staged in left:
            if staged.answered():
                wipe(staged.view)
                self._free.append(staged.slot)
            else:
                self._left.append(staged)
