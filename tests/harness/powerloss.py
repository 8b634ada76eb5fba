"""What may be on the disk when the power goes: a run is recorded, and its folder rebuilt as at any moment.

`kill -9` can't see a missing fsync: the kernel keeps what was written. This can.

    recording = Recording.of_daemon(daemon, driver)  # driver(daemon, mark) calls mark("k1") once acknowledged
    for point, mode, seed in recording.sample(200):
        recording.rebuild(point, mode, seed, into=folder)
        survivors = open_and_list(folder)
        assert set(recording.acknowledged(point)) <= survivors, recording.explain(point)

The run goes under strace, which sees every write with its bytes, every sync and every change of a name. A
*point* is the moment between two of these calls; ops[:point] had returned. What the disk then holds:

- Bytes and size of a file are safe once fsync or fdatasync of it (or syncfs, or O_DSYNC) returned which began
  after the write returned. Anything later may be there or not, in any order, by sectors of 512 bytes: each
  sector holds one of the versions it had since the last sync, and so does the size. A sector that was added
  but never reached the disk reads as zeros. A cut is the new size and nothing else: what it takes away is
  still there where the old size is. (ext4 and XFS write the size first, and free what it left after that.)
- A name (create, link, rename, unlink, mkdir) is safe once its *directory* was synced. Until then any number
  of the last changes of a directory may be missing, but in order: no later one without the earlier ones. A
  rename is never half done. That is POSIX plus a journal. `fs="journal"` is kinder, as ext4 and XFS are:
  any fsync, also of a file, makes all earlier changes of names safe.
- Both are independent: a name may be safe before the bytes that it names.

Modes: `dropped` (nothing unsynced is there), `kept` (all, as after kill -9), `prefix` (all up to some
moment), `names` (all names, no unsynced bytes), `data` (the reverse), `subset` (each unsynced call whole or
not at all), `torn` (sector by sector), `random` (one of these). The seed decides the rest.

Appends of several threads to one file are replayed in the order in which they returned; the kernel may have
taken them in another, so only the order within a thread is certain.

Not modelled, and refused with Unmodelled where it is seen: writable shared mappings (but SQLite's `-shm`,
which is dropped since SQLite rebuilds it), splice-like calls whose bytes strace doesn't show, io_uring.
Rebuilt files that the run created get mode 0600, folders 0700; others keep the mode they had.
"""

from __future__ import annotations

import bisect
import os
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

from . import procs, strace

if TYPE_CHECKING:
    from .daemon import Daemon

SECTOR = 512
MODES = ("dropped", "kept", "prefix", "names", "data", "subset", "torn")
ROOT = 0  # the folder's own number

_WRITES = ("write", "writev", "pwrite64", "pwritev", "pwritev2")
_SENDS = ("sendto", "sendmsg", "sendmmsg")
_SYNCS = ("fsync", "fdatasync", "syncfs", "sync", "sync_file_range")
_NAMES = (
    "unlink",
    "unlinkat",
    "rename",
    "renameat",
    "renameat2",
    "mkdir",
    "mkdirat",
    "rmdir",
    "link",
    "linkat",
)
_FILES = (
    "open",
    "openat",
    "creat",
    "ftruncate",
    "truncate",
    "lseek",
    "dup",
    "dup2",
    "dup3",
    "fcntl",
    "mmap",
    "chdir",
)
_OPAQUE = (
    "copy_file_range",
    "sendfile",
    "splice",
    "fallocate",
    "symlink",
    "symlinkat",
    "openat2",
    "io_uring_setup",
)
_FORKS = ("clone", "clone3", "fork", "vfork")
_TRACED = tuple("?" + name for name in (*_WRITES, *_SENDS, *_SYNCS, *_NAMES, *_FILES, *_OPAQUE, *_FORKS))

# read() is not followed: nobody here writes where a read has left the position.


class Unmodelled(Exception):
    """The run did something to the folder that this model can't replay."""


class Write(NamedTuple):
    file: int
    offset: int
    data: bytes


class Resize(NamedTuple):
    file: int
    size: int


class Name(NamedTuple):
    """A change of names in `folders`: `remove` goes and `add` comes, together."""

    folders: tuple[int, ...]
    remove: tuple[int, str] | None
    add: tuple[int, str, int] | None


class Sync(NamedTuple):
    """`target` (None: everything) is safe as of ops[:upto]."""

    target: int | None
    upto: int


Op = Union[Write, Resize, Name, Sync]
Sent = tuple[int, float, Optional[bytes]]  # point, time, bytes (None: strace couldn't read them)
Mark = Callable[[str], None]


class _Node(NamedTuple):
    """What stood in the folder at the beginning, or was made since (then empty)."""

    folder: bool
    mode: int
    data: bytes


class _Open:
    """An open file description: what fork and dup share."""

    def __init__(self, file: int, flags: str) -> None:
        self.file = file
        self.append = "O_APPEND" in flags
        self.sync = "O_SYNC" in flags or "O_DSYNC" in flags
        self.position = 0


class Recording:
    """A folder as it is now, and what a traced run then does to it.

    By hand: put `wrapper()` before a command, run it to its end, call `finish()`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.nodes: list[_Node] = []
        self.names: dict[tuple[int, str], int] = {}
        self.ops: list[Op] = []
        self.sent: list[Sent] = []
        self._marks: list[tuple[str, float]] = []
        self._acknowledged: list[tuple[int, str]] = []
        self._load(self.folder)
        handle, name = tempfile.mkstemp(prefix="kms-strace-", dir="/tmp")  # noqa: S108
        os.close(handle)
        self._log = Path(name)

    def _load(self, path: Path) -> int:
        info = path.lstat()
        number = len(self.nodes)
        folder = path.is_dir()
        self.nodes.append(_Node(folder, info.st_mode & 0o7777, b"" if folder else path.read_bytes()))
        if folder:
            for entry in sorted(path.iterdir()):
                if entry.is_dir() or entry.is_file():
                    self.names[number, entry.name] = self._load(entry)
        return number

    # ---- recording ---------------------------------------------------------------------------------

    @classmethod
    def record(
        cls,
        argv: Sequence[str],
        folder: Path,
        driver: Callable[[Mark, subprocess.Popen[bytes]], None] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
    ) -> Recording:
        """Run a command to its end, `driver(mark, process)` beside it. Its exit code is not looked at."""
        recording = cls(folder)
        process = subprocess.Popen(
            [*recording.wrapper(), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        try:
            if driver is not None:
                driver(recording.mark, process)
            process.communicate(timeout=timeout)
        finally:
            process.kill()
            process.communicate()
            procs.end(
                [
                    member
                    for member in procs.session_members(process.pid)
                    if not _traces(member, recording._log)
                ]
            )
            recording.finish()
        return recording

    @classmethod
    def of_daemon(
        cls, daemon: Daemon, driver: Callable[[Daemon, Mark], None], *, kill: bool = False
    ) -> Recording:
        """Start the (stopped) daemon, run `driver(daemon, mark)`, and stop it (or kill it)."""
        recording = cls(daemon.data_dir)
        before, daemon.wrapper = daemon.wrapper, recording.wrapper()
        try:
            daemon.start()
            driver(daemon, recording.mark)
            daemon.kill() if kill else daemon.stop()
        finally:
            daemon.wrapper = before
            if daemon.alive:
                daemon.process.kill()  # type: ignore[union-attr]
            recording.finish()
        return recording

    def wrapper(self) -> list[str]:
        """The words to put before a command."""
        return strace.wrapper(self._log, _TRACED, "-y", "-xx", "-ttt", "-s", "1000000")

    def mark(self, label: str) -> None:
        """Say that something has been acknowledged, at once after the answer was read. Thread-safe.

        It is dated back to the last bytes that the run sent before now.
        """
        self._marks.append((label, time.time()))

    def finish(self) -> Recording:
        """Wait for strace's last line, read its log, and delete it."""
        if self._log.exists():
            try:
                strace.finish(self._log)
                _Reader(self).read(self._log)
                self._date_marks()
            finally:
                self._log.unlink()
        return self

    def _date_marks(self) -> None:
        """What was sent is told in the order in which the calls returned. While strace has yet to see that an
        answer's has, its reader goes on, and what is sent after that may stand before it."""
        self.sent.sort(key=lambda one: one[1])
        times = [when for _, when, _ in self.sent]
        for label, when in self._marks:
            last = bisect.bisect_right(times, when) - 1
            self._acknowledged.append((self.sent[last][0] if last >= 0 else 0, label))
        self._acknowledged.sort()

    # ---- looking -----------------------------------------------------------------------------------

    def points(self) -> int:
        """How many points there are: 0 (nothing had happened) to points() - 1 (everything had)."""
        return len(self.ops) + 1

    def acknowledged(self, point: int) -> list[str]:
        """Labels that had been acknowledged at this point, by `mark` or `acknowledge`."""
        return [label for when, label in self._acknowledged if when <= point]

    def acknowledge(self, pattern: bytes) -> int:
        """Take acknowledgements from what the run itself sent (sockets, pipes, stdout): the first group of
        each match of this pattern is a label. Exact also with many callers. Returns how many there were.

        The processes of a run talk to each other, too: let the pattern fit only what a caller gets to see
        (beginning with the status line).
        """
        found = [
            (point, match[1].decode())
            for point, _, data in self.sent
            for match in re.finditer(pattern, data or b"", re.S)
        ]
        self._acknowledged = sorted({*self._acknowledged, *found})
        return len(found)

    def sample(self, count: int, seed: int = 1) -> list[tuple[int, str, int]]:
        """`count` triples (point, mode, seed) spread evenly over the points and over MODES."""
        rng = random.Random(seed)
        span = self.points()
        found = []
        for number in range(count):
            low, high = span * number // count, span * (number + 1) // count
            found.append(
                (rng.randrange(low, max(high, low + 1)), MODES[number % len(MODES)], rng.randrange(1 << 30))
            )
        return found

    def path_of(self, number: int) -> str:
        """Some name of a file, for messages."""
        changes = [op.add for op in self.ops if isinstance(op, Name) and op.add is not None]
        known = [(*place, node) for place, node in self.names.items()] + changes
        parts: list[str] = []
        while number != ROOT:
            parent, name, _ = next(
                (row for row in reversed(known) if row[2] == number), (ROOT, f"?{number}", 0)
            )
            parts.append(name)
            number = parent
        return "/".join(reversed(parts)) or "."

    def explain(self, point: int, before: int = 12) -> str:
        """The last calls before a point, for the message of a failing test."""
        start = max(0, point - before)
        return "\n".join(f"{n}: {self._describe(op)}" for n, op in enumerate(self.ops[start:point], start))

    def _describe(self, op: Op) -> str:
        if isinstance(op, Write):
            return f"write {self.path_of(op.file)} {op.offset}+{len(op.data)}"
        if isinstance(op, Resize):
            return f"resize {self.path_of(op.file)} to {op.size}"
        if isinstance(op, Sync):
            return f"sync {'everything' if op.target is None else self.path_of(op.target)} as of {op.upto}"
        gone = f" -{self.path_of(op.remove[0])}/{op.remove[1]}" if op.remove else ""
        come = f" +{self.path_of(op.add[0])}/{op.add[1]}" if op.add else ""
        return f"names{gone}{come}"

    # ---- rebuilding --------------------------------------------------------------------------------

    def rebuild(self, point: int, mode: str, seed: int, into: Path, *, fs: str = "posix") -> Path:
        """Write the folder as it may have survived into `into` (made; must be empty), and return it."""
        assert 0 <= point < self.points(), f"points are 0 to {self.points() - 1}"
        assert fs in ("posix", "journal")
        rng = random.Random(f"{seed}/{point}/{mode}")
        mode = rng.choice(MODES) if mode == "random" else mode
        disk = _Disk(self, point, mode, rng, fs)
        into.mkdir(mode=0o700, exist_ok=True)
        assert not any(into.iterdir()), f"{into} is not empty"
        disk.write_folder(ROOT, into)
        return into


def _traces(member: procs.Proc, log: Path) -> bool:
    return member in procs.with_argument(str(log))


# ---- from lines to operations ----------------------------------------------------------------------


class _Reader:
    """Follows the folder through the log: names, sizes and open files as the kernel saw them."""

    def __init__(self, recording: Recording) -> None:
        self.r = recording
        self.names = dict(recording.names)
        self.sizes = [len(node.data) for node in recording.nodes]
        self.left: list[int] = []  # for each op, the line at which its call returned
        self.tables: dict[int, dict[int, _Open]] = {}
        self.parents: dict[int, tuple[int, bool]] = {}
        self.cwd = os.getcwd()

    def read(self, log: Path) -> None:
        for call in strace.calls(log):
            if call.name in _FORKS and call.result > 0:
                self.parents[call.result] = (call.tid, "CLONE_FILES" in call.args)
        for call in strace.calls(log):
            if call.name in _SENDS or (call.name in _WRITES and not self._inside(call)):
                self._send(call)
            elif call.result >= 0:
                self._call(call)

    def _call(self, call: strace.Call) -> None:
        kind = next((kind for kind, group in _HANDLERS.items() if call.name in group), None)
        if kind is not None:
            getattr(self, kind)(call)

    def _op(self, call: strace.Call, op: Op) -> None:
        self.r.ops.append(op)
        self.left.append(call.left)

    def _upto(self, call: strace.Call) -> int:
        """How many operations had returned when this call began."""
        return bisect.bisect_left(self.left, call.entered)

    # ---- descriptors and paths ----

    def _table(self, tid: int) -> dict[int, _Open]:
        if tid not in self.tables:
            parent, shared = self.parents.get(tid, (None, False))
            table = self._table(parent) if parent is not None else {}
            self.tables[tid] = table if shared else dict(table)
        return self.tables[tid]

    def _inside(self, call: strace.Call) -> bool:
        path = _fd_path(call.args)
        return path is not None and self._relative(path) is not None

    def _relative(self, path: str) -> list[str] | None:
        """The parts of a path below the folder; None where it lies elsewhere."""
        path = os.path.normpath(os.path.join(self.cwd, path))
        below = os.path.relpath(path, self.r.folder)
        if below == "..":
            return None
        return None if below.startswith("../") else [part for part in below.split("/") if part != "."]

    def _find(self, path: str) -> int | None:
        parts = self._relative(path)
        node: int | None = ROOT if parts is not None else None
        for part in parts or ():
            node = self.names.get((node, part)) if node is not None else None
        return node

    def _place(self, path: str) -> tuple[int, str] | None:
        """(folder, name) of a path inside; None where it lies elsewhere or is the folder itself."""
        parts = self._relative(path)
        if not parts:
            return None
        folder = self._find(os.path.join(self.r.folder, *parts[:-1]))
        if folder is None:
            raise Unmodelled(f"{path} stands in a folder whose making was not seen")
        return folder, parts[-1]

    def _open_file(self, call: strace.Call) -> _Open | None:
        """What the first argument, a descriptor inside the folder, is open on; None: a file long unlinked."""
        number, path = int(call.args.split("<", 1)[0]), _fd_path(call.args) or ""
        known = self._table(call.tid).get(number)
        if _is_deleted(call.args):
            return known
        file = self._find(path)
        if file is None:
            raise Unmodelled(f"{call.name} to {path}, whose making was not seen")
        if known is None or known.file != file:
            known = self._table(call.tid)[number] = _Open(file, "O_APPEND" if number < 3 else "unknown")
            known.position = -1
        return known

    # ---- the calls ----

    def _on_open(self, call: strace.Call) -> None:
        path = _fd_path(str(call.result) + call.note)
        if path is None or self._relative(path) is None:
            self._table(call.tid).pop(call.result, None)
            return
        flags = "O_CREAT|O_WRONLY|O_TRUNC" if call.name == "creat" else call.args
        if "O_TMPFILE" in flags:
            raise Unmodelled(f"O_TMPFILE in {path}")
        file = self._find(path)
        if file is None:
            file = self._make(call, path, folder=False)
        elif "O_TRUNC" in flags and self.sizes[file]:
            self._resize(call, file, 0)
        if not self.r.nodes[file].folder:
            self._table(call.tid)[call.result] = _Open(file, flags)

    def _make(self, call: strace.Call, path: str, *, folder: bool) -> int:
        place = self._place(path)
        if place is None:
            raise Unmodelled(f"{call.name} of the recorded folder itself")
        number = len(self.r.nodes)
        self.r.nodes.append(_Node(folder, 0o700 if folder else 0o600, b""))
        self.sizes.append(0)
        self._name(call, None, (*place, number))
        return number

    def _name(
        self, call: strace.Call, remove: tuple[int, str] | None, add: tuple[int, str, int] | None
    ) -> None:
        folders = tuple(dict.fromkeys(place[0] for place in (remove, add) if place is not None))
        if remove is not None:
            self.names.pop(remove, None)
        if add is not None:
            self.names[add[0], add[1]] = add[2]
        self._op(call, Name(folders, remove, add))

    def _on_write(self, call: strace.Call) -> None:
        opened = self._open_file(call)
        if opened is None or call.result == 0:
            return
        data = _written(call)
        if call.name.startswith("pwrite"):
            offset = int(call.args.split(", ")[-2 if call.name == "pwritev2" else -1])
        else:
            offset = opened.position
        if opened.append:
            offset = self.sizes[opened.file]
        if offset < 0:
            raise Unmodelled(f"{call.name} at an unknown position of {self.r.path_of(opened.file)}")
        if not call.name.startswith("pwrite"):
            opened.position = offset + len(data)
        self.sizes[opened.file] = max(self.sizes[opened.file], offset + len(data))
        self._op(call, Write(opened.file, offset, data))
        if opened.sync:
            self._op(call, Sync(opened.file, len(self.r.ops)))

    def _resize(self, call: strace.Call, file: int, size: int) -> None:
        self.sizes[file] = size
        self._op(call, Resize(file, size))

    def _on_truncate(self, call: strace.Call) -> None:
        path = strace.strings(call.args)[0].decode() if call.name == "truncate" else _fd_path(call.args)
        file = self._find(path) if path is not None and not _is_deleted(call.args) else None
        if file is not None:
            self._resize(call, file, int(call.args.rsplit(", ", 1)[1]))

    def _on_sync(self, call: strace.Call) -> None:
        if call.name == "sync":
            self._op(call, Sync(None, self._upto(call)))
            return
        path = _fd_path(call.args)
        if call.name == "syncfs" and path is not None:
            if (
                os.stat(path if os.path.exists(path) else self.r.folder).st_dev
                == os.stat(self.r.folder).st_dev
            ):
                self._op(call, Sync(None, self._upto(call)))
        elif path is not None and call.name != "sync_file_range" and not _is_deleted(call.args):
            target = self._find(path)  # sync_file_range promises nothing
            if target is not None:
                self._op(call, Sync(target, self._upto(call)))

    def _on_names(self, call: strace.Call) -> None:
        paths = self._paths(call)
        if call.name in ("mkdir", "mkdirat"):
            if self._relative(paths[0]):
                self._make(call, paths[0], folder=True)
        elif call.name in ("unlink", "unlinkat", "rmdir"):
            place = self._place(paths[0])
            if place is not None:
                self._name(call, place, None)
        else:
            self._on_two_names(call, paths)

    def _on_two_names(self, call: strace.Call, paths: list[str]) -> None:
        old, new = self._place(paths[0]), self._place(paths[1])
        if old is None and new is None:
            return
        if old is None or "RENAME_EXCHANGE" in call.args:
            raise Unmodelled(f"{call.name} into the folder from elsewhere, or an exchange: {paths}")
        node = self._find(paths[0])
        if node is None:
            raise Unmodelled(f"{call.name} of {paths[0]}, whose making was not seen")
        self._name(call, None if call.name.startswith("link") else old, None if new is None else (*new, node))

    def _paths(self, call: strace.Call) -> list[str]:
        """The path arguments, each joined to the directory descriptor before it (where there is one)."""
        found = []
        for match in re.finditer(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>(?:\(deleted\))?, )?"([^"]*)"', call.args):
            base = strace.unescape(match[1]).decode() if match[1] else self.cwd
            found.append(os.path.join(base, strace.unescape(match[2]).decode()))
        return found

    def _on_seek(self, call: strace.Call) -> None:
        opened = self._open_file(call) if self._inside(call) else None
        if opened is not None:
            opened.position = call.result

    def _on_dup(self, call: strace.Call) -> None:
        if call.name == "fcntl" and "F_DUPFD" not in call.args:
            return
        table = self._table(call.tid)
        opened = table.get(int(call.args.split("<", 1)[0]))
        if opened is not None:
            table[call.result] = opened
        else:
            table.pop(call.result, None)

    def _on_mmap(self, call: strace.Call) -> None:
        parts = call.args.split(", ")
        path = _fd_path(parts[4]) if len(parts) > 4 else None
        if path is None or path.endswith("-shm") or self._relative(path) is None:
            return
        if "PROT_WRITE" in parts[2] and "MAP_SHARED" in parts[3]:
            raise Unmodelled(f"a writable shared mapping of {path}")

    def _on_chdir(self, call: strace.Call) -> None:
        self.cwd = os.path.join(self.cwd, strace.strings(call.args)[0].decode())

    def _on_opaque(self, call: strace.Call) -> None:
        touched = [path for text in re.findall(r"<([^>]*)>", call.args) if (path := _path(text)) is not None]
        touched += self._paths(call)
        if call.name == "io_uring_setup" or any(self._relative(path) is not None for path in touched):
            raise Unmodelled(f"{call.name}({strace.readable(call.args)[:200]})")

    def _send(self, call: strace.Call) -> None:
        """Bytes that leave by a socket, a pipe or stdout, dated at entry: from then on they may be read."""
        target = call.args.split(",", 1)[0]
        annotation = strace.readable(target)
        if call.result > 0 and (
            "socket:" in annotation or "pipe:" in annotation or target.startswith(("1<", "2<"))
        ):
            try:
                data: bytes | None = b"".join(strace.strings(call.args))
            except ValueError:
                data = None
            self.r.sent.append((self._upto(call), call.time, data))


_HANDLERS: dict[str, tuple[str, ...]] = {
    "_on_open": ("open", "openat", "creat"),
    "_on_write": _WRITES,
    "_on_truncate": ("ftruncate", "truncate"),
    "_on_sync": _SYNCS,
    "_on_names": _NAMES,
    "_on_seek": ("lseek",),
    "_on_dup": ("dup", "dup2", "dup3", "fcntl"),
    "_on_mmap": ("mmap",),
    "_on_chdir": ("chdir",),
    "_on_opaque": _OPAQUE,
}


def _path(text: str) -> str | None:
    """A path from between the brackets that strace -y prints; None for sockets and the like."""
    path = strace.unescape(text).decode("utf-8", "surrogateescape") if text.startswith("\\x") else text
    return path if path.startswith("/") else None


def _fd_path(args: str) -> str | None:
    """The path of the descriptor that the arguments begin with."""
    match = re.match(r"\s*-?\d+\s*<([^>]*)>", args)
    return _path(match[1]) if match else None


def _is_deleted(args: str) -> bool:
    return re.match(r"\s*\d+<[^>]*>\(deleted\)", args) is not None


def _written(call: strace.Call) -> bytes:
    data = b"".join(strace.strings(call.args))
    if len(data) < call.result:
        raise Unmodelled(f"{call.name} whose bytes strace couldn't read: {strace.readable(call.args)[:200]}")
    return data[: call.result]


# ---- from operations to a disk ---------------------------------------------------------------------


class _Disk:
    """One possible disk at one point."""

    def __init__(self, recording: Recording, point: int, mode: str, rng: random.Random, fs: str) -> None:
        self.r, self.mode, self.rng, self.fs = recording, mode, rng, fs
        self.ops = recording.ops[:point]
        self.cut = rng.randrange(point + 1)  # for `prefix`: the moment up to which everything arrived
        self.safe: dict[int | None, int] = {}  # target of a sync -> ops[:n] of it are safe
        for op in self.ops:
            if isinstance(op, Sync):
                self.safe[op.target] = max(self.safe.get(op.target, 0), op.upto)
        self.changes: dict[int, list[tuple[int, Write | Resize]]] = {}
        for number, change in enumerate(self.ops):
            if isinstance(change, (Write, Resize)):
                self.changes.setdefault(change.file, []).append((number, change))
        self.names = self._surviving_names()

    def _safe(self, target: int) -> int:
        return max(self.safe.get(target, 0), self.safe.get(None, 0))

    # ---- names ----

    def _surviving_names(self) -> dict[tuple[int, str], int]:
        survivors = self._arrived()
        names = dict(self.r.names)
        for number, op in enumerate(self.ops):
            if isinstance(op, Name) and number in survivors:
                if op.remove is not None:
                    names.pop(op.remove, None)
                if op.add is not None:
                    names[op.add[0], op.add[1]] = op.add[2]
        return names

    def _arrived(self) -> set[int]:
        """Numbers of the changes of names that are there: with each also the earlier ones of its folders."""
        upto = self._names_upto()
        arrived: set[int] = set()
        needed: set[int] = set()
        for number in range(len(self.ops) - 1, -1, -1):
            op = self.ops[number]
            if isinstance(op, Name) and (
                needed.intersection(op.folders) or any(number < upto[folder] for folder in op.folders)
            ):
                arrived.add(number)
                needed.update(op.folders)
        return arrived

    def _names_upto(self) -> dict[int, int]:
        """For each folder, ops[:n] of its changes are there: at least what was synced."""
        journal = max(self.safe.values(), default=0) if self.fs == "journal" else 0
        everything = len(self.ops)
        found = {}
        for folder in sorted({folder for op in self.ops if isinstance(op, Name) for folder in op.folders}):
            least = max(journal, self._safe(folder))
            most = {
                "dropped": least,
                "data": least,
                "kept": everything,
                "names": everything,
                "prefix": self.cut,
            }.get(self.mode)
            found[folder] = max(least, self.rng.randint(least, everything) if most is None else most)
        return found

    # ---- bytes ----

    def content(self, file: int) -> bytes:
        changes = self.changes.get(file, [])
        safe = self._safe(file)
        image = bytearray(self.r.nodes[file].data)
        for number, change in changes:
            if number < safe:
                _apply(image, change)
        late = [(number, change) for number, change in changes if number >= safe]
        if self.mode == "torn":
            return _torn(image, [change for _, change in late], self.rng)
        for number, change in late:
            if self._whole_arrived(number):
                _apply(image, change)
        return bytes(image)

    def _whole_arrived(self, number: int) -> bool:
        if self.mode == "subset":
            return self.rng.random() < 0.5
        return self.mode in ("kept", "data") or (self.mode == "prefix" and number < self.cut)

    def write_folder(self, number: int, path: Path) -> None:
        path.chmod(self.r.nodes[number].mode)
        for (folder, name), node in sorted(self.names.items()):
            if folder != number or name.endswith("-shm"):
                continue
            if self.r.nodes[node].folder:
                (path / name).mkdir()
                self.write_folder(node, path / name)
            else:
                (path / name).write_bytes(self.content(node))
                (path / name).chmod(self.r.nodes[node].mode)


def _apply(image: bytearray, change: Write | Resize) -> None:
    if isinstance(change, Resize):
        _fit(image, change.size)
    else:
        if len(image) < change.offset:
            _fit(image, change.offset)
        image[change.offset : change.offset + len(change.data)] = change.data


def _fit(image: bytearray, size: int) -> None:
    del image[size:]
    image.extend(bytes(size - len(image)))


def _torn(image: bytearray, late: list[Write | Resize], rng: random.Random) -> bytes:
    """Each sector, and the size, in one of the versions it had since it was last safe."""
    sizes = [len(image)]
    versions: dict[int, list[bytes]] = {}
    base = bytes(image)
    eager = rng.choice((0.1, 0.5, 0.9))  # how likely a sector, or the size, is in its latest version
    arrived = len(late) if rng.random() < eager else rng.randrange(len(late) + 1)  # the size is as of there
    for number, change in enumerate(late):
        size = len(image)
        _apply(image, change)
        sizes.append(len(image))
        if len(image) < size and number >= arrived:
            continue
        first, last = _span(change, size)
        for sector in range(first // SECTOR, (last + SECTOR - 1) // SECTOR):
            place = sector * SECTOR
            seen = versions.setdefault(sector, [base[place : place + SECTOR].ljust(SECTOR, b"\0")])
            seen.append(bytes(image[place : place + SECTOR]).ljust(SECTOR, b"\0"))
    found = bytearray(base)
    _fit(found, max(sizes))
    for sector, seen in sorted(versions.items()):
        chosen = seen[-1] if rng.random() < eager else rng.choice(seen)
        found[sector * SECTOR : (sector + 1) * SECTOR] = chosen
    _fit(found, sizes[arrived])
    return bytes(found)


def _span(change: Write | Resize, size: int) -> tuple[int, int]:
    """The bytes that a change touches, `size` being the size before."""
    if isinstance(change, Write):
        return min(change.offset, size), change.offset + len(change.data)
    return min(change.size, size), max(change.size, size)
