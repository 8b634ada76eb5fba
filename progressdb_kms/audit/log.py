"""The audit log: one signed line an event, chained, appended by several processes to one file.

A line is `{"event":E,"sig":"S"}`, S = base64(HMAC-SHA256(audit key, the bytes of E as they stand there).
E is ASCII JSON whose first fields have a fixed order: chain, seq, prev, ts, op, outcome, status, change.
`prev` is the S of the chain's line before: nothing can be edited, taken out, put in or moved within a chain
without the key. `change` is the number of the store's last change, so that the end of a log tells how far the
store was. Each process writes a chain of its own, so that no lock is shared between processes.

What must hold:

- No line, no answer: `record` returns after the whole line is in the file, or raises AuditUnavailable.
- seq and prev advance exactly when the line of that seq stands whole in the file.
- The log is only ever appended to. A full disk leaves a torn record behind: a later `audit_recovered` event
  names its length and SHA-256, and the number of line ends that the repair itself wrote. Others may have
  appended straight after the torn part, so a line of the file can hold several pieces: see `pieces`.
- A log that was unlinked, replaced or cut is noticed before the next append. Renamed is what logrotate
  does: go on in a new file. Unlinked or cut: nothing is recorded until an operator says so (`reopen`).

Not covered: lines written between the last look at the path and its removal, and lines that a power cut
takes because nobody called `sync`. `verify` finds both, by seq and by the heads kept in the store.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import resource
import stat
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Callable, NewType, NoReturn

from .. import disk
from ..crypto.aead import mac, same
from ..encoding import b64encode, b64encode_bytes, json_dumps, json_loads, timestamp, wall
from ..errors import AuditUnavailable, KMSError

FILE_NAME = "kms-audit.log"

ROOM = 64 * 1024
"""Bytes that the file system must have free before a change is begun or a torn record repaired: about 150
records, so that what was begun can be recorded, and repairs don't tear themselves again and again."""

OUTCOMES = ("ok", "refused", "failed")
CHAIN = re.compile(r"[0-9]{1,10}(?:\.[0-9]{1,10}){1,2}")  # <start epoch>.<slot>[.<nth process in the slot>]

Torn = tuple[int, str]
"""What a recovery event says of a torn record: its length in bytes and its SHA-256 in hex."""

# ---- the format ----------------------------------------------------------------------------------

MISSES = 64
"""Torn records in one line that are looked through for what follows: each process leaves one at most."""

MARK = b'{"event":{"chain":"'
EVENT = (
    rb'\{"chain":"([0-9.]{3,32})","seq":([1-9][0-9]{0,18}),"prev":"((?:[A-Za-z0-9+/]{43}=)?)",'
    rb'"ts":"[0-9T:.Z-]{20,32}","op":"([a-z_]{1,40})","outcome":"[^\n]*%b\}'
)
SIG = rb"([A-Za-z0-9+/]{43}=)"
RECORD = re.compile(rb'\{"event":(' + EVENT % b"?" + rb'),"sig":"' + SIG + rb'"\}')
"""A record up to the first thing that looks like its end. Groups: event, chain, seq, prev, op, sig."""

_FIXED = frozenset(("chain", "seq", "prev", "ts", "op", "outcome", "status", "change"))

Fragment = NewType("Fragment", str)
"""A part of E, rendered and escaped, with a comma before each field: made by the functions here only."""

# For strings alone this is one call into C; json.dumps would build an encoder each time.
_quote = json.JSONEncoder().encode


def fragment(**fields: Any) -> Fragment:
    """Render fields for `record`. None leaves a field out. Bytes, and with them keys, are a TypeError."""
    if not _FIXED.isdisjoint(fields):
        raise ValueError("a field of the fixed part of an audit record can't be given again")
    return Fragment("".join(f',"{name}":{json_dumps(v)}' for name, v in fields.items() if v is not None))


def key_fragment(key_id: str, thread_id: str = "") -> Fragment:
    """To be cached per key."""
    thread = f',"thread_id":{_quote(thread_id)}' if thread_id else ""
    return Fragment(f',"key_id":{_quote(key_id)}{thread}')


def peer_fragment(uid: int, gid: int, pid: int, via: str = "") -> Fragment:
    """To be cached per connection. The credentials are those at connect(): a pid is no identity. `via`: by
    another way than the socket, where gid and pid are not known, and of a stranger not even the UID (-1)."""
    if via:
        who = f',"actor":"peer_uid:{uid:d}","uid":{uid:d}' if uid >= 0 else ',"actor":"unknown"'
        return Fragment(f'{who},"via":{_quote(via)}')
    return Fragment(f',"actor":"peer_uid:{uid:d}","uid":{uid:d},"gid":{gid:d},"pid":{pid:d}')


@functools.lru_cache(maxsize=1024)
def _head(op: str, outcome: str, status: int) -> str:
    """The last three fields of the fixed part: the same few, again and again."""
    if not re.fullmatch("[a-z_]{1,40}", op) or outcome not in OUTCOMES:
        raise ValueError(f"not an audit operation and outcome: {op!r}, {outcome!r}")
    return f'"op":"{op}","outcome":"{outcome}","status":{status:d}'


def parse(line: str | bytes) -> dict[str, Any]:
    """A line as a dict: the event's fields and `sig`. Not verified. Raises ValueError if it is none."""
    outer = json_loads(line)
    if not isinstance(outer, dict) or set(outer) != {"event", "sig"} or not isinstance(outer["event"], dict):
        raise ValueError("not an audit record")
    return {**outer["event"], "sig": outer["sig"]}


def torn(piece: bytes) -> Torn:
    return len(piece), hashlib.sha256(piece).hexdigest()


def genuine(key: memoryview, record: re.Match[bytes]) -> bool:
    return same(b64encode(mac(key, record[1])).encode(), record[6])


def pieces(line: bytes, key: memoryview) -> Iterator[tuple[bytes, re.Match[bytes] | None]]:
    """Split a line of the file: whole records that verify, each with its match, and what stands between."""
    done = at = misses = 0
    while (at := line.find(MARK, at)) >= 0 and misses < MISSES:
        record = RECORD.match(line, at)
        if record is None or not genuine(key, record):
            at += 1
            misses += 1
            continue
        if at > done:
            yield line[done:at], None
        yield record[0], record
        done = at = record.end()
    if done < len(line):
        yield line[done:], None


# ---- the file ------------------------------------------------------------------------------------

_write = os.write


# ---- the writer ----------------------------------------------------------------------------------

_STOPPED = {
    "unlinked": "the audit log was unlinked",
    "truncated": "the audit log was cut shorter in place",
    "closed": "the audit log is closed",
}
_FAILED = "failed"  # nothing may tell that but a write: a quota, a file system that became read-only


class AuditLog:
    """One process's chain in the log. Safe for threads; a process that forks makes its own, of its own chain.

    `key` is the audit key, 32 bytes of locked memory that must outlive the object.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        key: memoryview,
        chain: str,
        clock: Callable[[], float] = wall,
        change: Callable[[], int] = lambda: 0,
    ) -> None:
        """Opens the log, makes it where absent. Raises AuditUnavailable. Writes nothing yet.

        `change` tells the number of the store's last change: each record carries it.
        """
        if not CHAIN.fullmatch(chain) or len(key) != 32:
            raise ValueError("an audit chain is numbers joined by dots, its key has 32 bytes")
        self.path = os.path.abspath(os.fspath(path))
        self._name = os.path.basename(self.path)
        self.chain = chain
        self.key = key
        self._clock = clock
        self._change = change
        self._lock = threading.Lock()
        self._last = (0, "")  # seq and sig of the chain's last line
        self._tick, self._ts = (-1, "")  # the clock's last millisecond, and how it is written
        self._second = ""  # of it, written down to the point
        self._number, self._mark = -1, ""  # the last change, and how it is written
        self._torn: list[Torn] = []  # torn records of ours that no recovery event names yet
        self._ends = 0  # line ends that torn repairs wrote
        self._note = ""  # why the log was reopened, or that it is failing, until that is recorded
        self._stopped = ""  # why nothing may be recorded before `reopen`
        self._held: KMSError | None = None  # why nothing may be recorded before `release`
        self._fd = self._home = -1
        self._take(*self._open())
        with contextlib.suppress(OSError):  # a file system that can't sync directories
            os.fsync(self._home)

    def _open(self) -> tuple[int, os.stat_result]:
        """For appending, 0600; made where absent. Raises AuditUnavailable unless it is a file of ours. It is
        in the folder that was there at first: one that is mounted over that has a log of its own."""
        try:
            if self._home < 0:
                self._home = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            with contextlib.ExitStack() as undo:
                undo.callback(os.close, fd := disk.regular(self._name, flags, self._home))
                status = os.fstat(fd)
                if status.st_uid != os.geteuid():
                    raise PermissionError(errno.EPERM, "is not of the daemon's own user")
                if stat.S_IMODE(status.st_mode) != 0o600:
                    os.fchmod(fd, 0o600)
                undo.pop_all()
            return fd, status
        except OSError as error:
            hint = (
                f"{self.path} must be a regular file of the daemon's own user, of mode 0600, in a directory "
                "that it may write to: mend that or move it away; then SIGHUP, or a start"
            )
            raise AuditUnavailable(f"the audit log can't be opened ({error.strerror})", hint=hint) from None

    def _take(self, fd: int, status: os.stat_result) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._fd)  # `sync` reaches the new file only
            os.close(self._fd)
        self._fd = fd
        self._inode, self._device, self._size = (status.st_ino, status.st_dev, status.st_size)

    # -- what others call

    def record(self, op: str, outcome: str, status: int, *fragments: Fragment) -> str:
        """Append one event; returns its receipt, `<chain>:<seq>:<first 16 hex digits of the HMAC>`.

        Raises AuditUnavailable where the line is not whole in the file: then give no answer.
        """
        with self._lock:
            self._look()
            if self._stopped or self._torn or self._note or self._held:
                self._mend()
            return self._append(op, outcome, status, "".join(fragments))

    def note(self, op: str, outcome: str = "ok", **details: Any) -> str:
        """Append an event of the daemon's own, which no peer asked for. Otherwise as `record`."""
        return self.record(op, outcome, 200 if outcome == "ok" else 500, fragment(**details))

    def check(self) -> None:
        """Raise AuditUnavailable if a record could not be written now. Call it before a change is begun."""
        with self._lock:
            self._look()
            self._mend()
            self._need_room()

    def reasons(self) -> list[str]:
        """Why the service is not ready: empty where `check` passes."""
        try:
            self.check()
        except AuditUnavailable as error:
            return [error.message]
        return []

    @property
    def head(self) -> tuple[str, int, str]:
        """(chain, seq, sig) of the last line, for the store to keep; seq 0 where there is none yet."""
        return (self.chain, *self._last)

    @property
    def failing(self) -> bool:
        """Could the last record not be written, though there was room?"""
        return self._note == _FAILED

    def doubt(self) -> None:
        """Another process of the daemon is failing: let `check` try whether this one does, too."""
        with self._lock:
            self._note = self._note or _FAILED

    def sync(self) -> None:
        """Make the file durable, whichever process wrote it. Before a commit that carries a head: else a
        power cut leaves the store ahead of the log."""
        with self._lock:
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._fail(error)

    def reopen(self) -> None:
        """SIGHUP: open the path anew and go on with the same chain, also after the log was unlinked or cut.
        An `audit_reopened` event says why, unless nothing has changed."""
        with self._lock:
            if self._stopped == "closed":
                self._mend()
            fd, status = self._open()
            if self._stopped or (status.st_ino, status.st_dev) != (self._inode, self._device):
                self._note = self._stopped or self._note or "requested"
            self._stopped = ""
            self._take(fd, status)
            self._mend()

    def adopt(self, left: Sequence[Torn], ends: int) -> None:
        """Name what dead processes left torn, and how many line ends of theirs no record accounts for."""
        with self._lock:
            self._torn, self._ends = [*self._torn, *left], self._ends + ends
            self._mend()

    def hold(self, why: KMSError) -> None:
        """Nothing is recorded until `release`: this chain could not be introduced yet."""
        self._held = why

    def release(self) -> None:
        """Raises AuditUnavailable. What lies under the path now is the log, whatever was there before."""
        with self._lock:
            if self._held:
                self._leave()
                self._take(*self._open())
                self._held, self._stopped = None, ""

    def close(self) -> None:
        """Idempotent. Whatever is recorded later raises AuditUnavailable."""
        with self._lock:
            if self._torn and not self._stopped:
                with contextlib.suppress(AuditUnavailable):
                    self._mend()
            self._stopped = "closed"
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._leave()

    def _leave(self) -> None:
        """The folder."""
        if self._home >= 0:
            os.close(self._home)
            self._home = -1

    # -- under the lock

    def _append(self, op: str, outcome: str, status: int, extra: str, lead: bytes = b"") -> str:
        seq, prev = self._last
        seq += 1
        tick = int(self._clock() * 1000)
        if tick != self._tick:
            self._set_time(tick)
        if (number := self._change()) != self._number:
            self._number, self._mark = number, f',"change":{number:d}'
        event = (
            f'{{"chain":"{self.chain}","seq":{seq},"prev":"{prev}","ts":"{self._ts}",'
            f"{_head(op, outcome, status)}{self._mark}{extra}}}"
        ).encode("ascii")  # an error for what never went through `fragment`
        digest = mac(self.key, event)
        sig = b64encode_bytes(digest)
        line = b"".join((lead, b'{"event":', event, b',"sig":"', sig, b'"}\n'))
        last = seq, sig.decode()  # before it is written: memory may run out
        size = self._put(line)
        if size >= len(line) - 1:  # whole, perhaps without its line end
            self._last = last
        self._size += size
        if size < len(line):
            self._tear(line[:size], lead)
        return f"{self.chain}:{seq}:{digest[:8].hex()}"

    def _set_time(self, tick: int) -> None:
        second, thousandths = divmod(tick, 1000)
        if second != self._tick // 1000:
            self._second = timestamp(second)[:20]
        self._tick, self._ts = tick, f"{self._second}{thousandths:03d}Z"

    def _put(self, data: bytes) -> int:
        """One write of all the data: with O_APPEND, the lines of several processes don't mix."""
        try:
            return _write(self._fd, data)
        except OSError as error:
            self._note = self._note or _FAILED
            self._fail(error)

    def _fail(self, error: OSError) -> NoReturn:
        raise AuditUnavailable(
            f"the audit log can't be written ({error.strerror})", hint=self._hint(error)
        ) from None

    def _hint(self, error: OSError) -> str:
        if error.errno == errno.EFBIG:
            return f"rotate {self.path}, or raise the file size limit (LimitFSIZE): the daemon then goes on"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"free {ROOM} bytes on the file system of {self.path}: the daemon then goes on by itself"
        return f"look for errors of the file system of {self.path} in the kernel's log"

    def _tear(self, written: bytes, lead: bytes) -> NoReturn:
        """A short write: remember what of the line stands in the file."""
        self._ends += bool(lead and written)
        if piece := written[len(lead) :]:
            self._torn.append(torn(piece))
        self._fail(OSError(errno.ENOSPC, f"it took only {len(written)} bytes of a record"))

    def _look(self) -> None:
        """Does the path still lead to our file, and is the file no shorter than it was?"""
        try:
            seen = os.lstat(self._name, dir_fd=self._home)
        except OSError:
            return self._follow()
        if seen.st_ino != self._inode or seen.st_size < self._size or seen.st_dev != self._device:
            return self._follow()
        self._size = seen.st_size
        return None

    def _follow(self) -> None:
        """The log was renamed: go on in a new file. Unlinked or cut: stop."""
        if self._stopped:
            return
        mine = os.fstat(self._fd)
        if mine.st_nlink == 0:
            self._stopped = "unlinked"
        elif mine.st_size < self._size:
            self._stopped = "truncated"
        else:
            self._take(*self._open())
            self._note = "renamed"

    def _mend(self) -> None:
        """Bring the log into order, or raise AuditUnavailable."""
        if self._held:
            raise AuditUnavailable(self._held.message, code=self._held.code, hint=self._held.hint)
        if self._stopped:
            raise AuditUnavailable(
                _STOPPED[self._stopped],
                hint=f"find out who changed {self.path}; SIGHUP or a restart then goes on in a new file, "
                "and `progressdb-kms audit verify` shows what is missing",
            )
        if self._torn:
            self._need_room()
            self._repair()
        if self._note:
            self._append("audit_reopened", "ok", 200, fragment(reason=self._note))
            self._note = ""

    def _repair(self) -> None:
        """End the torn line and name what stands there, in one write. The repair may itself be torn: then
        the next one names that part too."""
        named, ends, seq = self._torn, self._ends, self._last[0]
        self._torn, self._ends = [], 0
        try:
            self._append("audit_recovered", "ok", 200, fragment(torn=named, ends=ends + 1), b"\n")
        except AuditUnavailable:
            if self._last[0] == seq:
                self._torn, self._ends = named + self._torn, ends + self._ends
            else:  # all of the event is there but its own line end
                self._ends = 0
            raise

    def _need_room(self) -> None:
        try:
            disk = os.statvfs(self._fd)
        except OSError as error:
            self._fail(error)
        free = (disk.f_bavail if os.geteuid() else disk.f_bfree) * disk.f_frsize
        if disk.f_blocks and free < ROOM:
            self._fail(OSError(errno.ENOSPC, f"only {free} bytes are free"))
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and self._size + ROOM > limit:
            self._fail(OSError(errno.EFBIG, f"files may have {limit} bytes"))
