"""Things that go wrong: failing system calls, full and read-only disks, a wrong clock, death at any step.

Four tools, by what they need:

    Shim        an LD_PRELOAD library, built here with cc. No root; chosen calls on chosen paths fail,
                write short or set the clock off, switched on and off while the daemon runs.
    inject      strace -e inject, put before a command or attached to running processes: needs root.
    tmpfs       a small file system that fills up, and can be made read-only: needs root.
    steps       every system call that changes a folder, one by one: `trace_steps` and `steps_of` list those
                of an operation, `kill_at` and `killing` kill the process right before one of them.

`need_strace()`, `need_cc()` and `need_mount()` skip the calling test with the reason where a tool is missing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from . import procs, strace
from .folders import new_folder

# ---- what is needed --------------------------------------------------------------------------------


@functools.cache
def _strace_missing() -> str:
    return strace.missing()


def need_strace() -> None:
    if why := _strace_missing():
        pytest.skip(why)


def need_cc() -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (apt install gcc libc6-dev)")


def need_mount() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here (apt install mount)")


# ---- strace -e inject ------------------------------------------------------------------------------


def injecting(*rules: str, path: Path | None = None) -> list[str]:
    """The words to put before a command: `Daemon(wrapper=injecting("fdatasync:error=EIO:when=9"))`.

    A rule is that of strace: CALL[,CALL…]:error=E|retval=N|signal=S|delay_enter=US[:when=FIRST[+STEP]].
    Counts are kept for each thread and each call apart. `path`: only calls on that file count.
    """
    return strace.wrapper(Path(os.devnull), _calls_of(rules), *_options(rules, path))


class Injection(NamedTuple):
    log: Path

    def hits(self) -> int:
        """How often a rule struck so far."""
        return self.log.read_text(errors="replace").count("(INJECTED)")


@contextlib.contextmanager
def inject(pids: Sequence[int], *rules: str, path: Path | None = None) -> Iterator[Injection]:
    """The same for running processes (all their threads) until the block ends. `when` counts from here on.

    with inject(daemon.pids(), "fdatasync:error=EIO") as injection: ...
    """
    with _log_file() as log, _attached(log, pids, _calls_of(rules), *_options(rules, path)):
        yield Injection(log)


@contextlib.contextmanager
def watching(pids: Sequence[int], *calls: str, path: Path) -> Iterator[list[str]]:
    """The calls of these running processes on `path`, as strace shows them; filled in when the block ends.
    Children that they start are not looked at."""
    found: list[str] = []
    with _log_file() as log:
        with _attached(log, pids, [f"?{call}" for call in calls], "-P", str(path), "-y", forks=False):
            yield found
        found += [text for _, text in strace.names(log)]


def _calls_of(rules: Sequence[str]) -> list[str]:
    return [call for rule in rules for call in rule.split(":", 1)[0].split(",")]


def _options(rules: Sequence[str], path: Path | None) -> list[str]:
    found = [word for rule in rules for word in ("-e", f"inject={rule}")]
    return found + (["-P", str(path)] if path is not None else [])


@contextlib.contextmanager
def _attached(
    log: Path,
    pids: Sequence[int],
    calls: Sequence[str],
    *options: str,
    follow: bool = True,
    forks: bool = True,
    deadly: bool = False,
) -> Iterator[None]:
    """strace on running processes. `follow=False`: on the main thread of each alone; `forks=False`: on the
    threads that there are, and on nothing that is started later; `deadly`: strace may end at once, because
    what it does kills the process as soon as it is there."""
    words = ["strace", "-qq", *(["-f"] if follow and forks else []), *options, "-o", str(log)]
    wanted = [thread for pid in pids for thread in (procs.threads(pid) if follow else [pid])]
    targets = [word for pid in (pids if forks else wanted) for word in ("-p", str(pid))]
    with subprocess.Popen(
        [*words, "-e", "trace=" + ",".join(calls), *targets], stderr=subprocess.PIPE
    ) as tracer:
        try:
            procs.wait_until(lambda: _all_traced(wanted, tracer, deadly), 30, "strace to attach")
            yield
        finally:
            tracer.terminate()  # it detaches and ends
            tracer.communicate(timeout=30)


def _all_traced(threads: Sequence[int], tracer: subprocess.Popen[bytes], deadly: bool) -> bool:
    if tracer.poll() == 0 and deadly:
        return True
    if tracer.poll() is not None:
        raise AssertionError(f"strace ended: {tracer.communicate()[1].decode()}")
    return all(procs.status(thread, "TracerPid") in ("", str(tracer.pid)) for thread in threads)


@contextlib.contextmanager
def _log_file() -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix="kms-strace-", dir="/tmp")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        os.unlink(name)


# ---- death at any step -----------------------------------------------------------------------------

STEP_CALLS = (
    *("write", "writev", "pwrite64", "pwritev", "fsync", "fdatasync", "syncfs", "ftruncate", "fallocate"),
    *("?unlink", "unlinkat", "?rename", "renameat", "renameat2", "?link", "linkat", "?mkdir", "mkdirat"),
    *("?rmdir", "openat", "fchmod", "?chmod", "fchmodat"),
)


class Step(NamedTuple):
    """The `nth` call of `name` in the main thread; `text` is the call as strace shows it."""

    name: str
    nth: int
    text: str

    @property
    def rule(self) -> str:
        """strace delivers the signal at the entry of the call, which is not carried out any more."""
        return f"{self.name}:signal=SIGKILL:when={self.nth}"

    def __str__(self) -> str:
        return f"{self.name} #{self.nth}: {self.text[:160]}"


class Steps(list[Step]):
    """In the order in which they happened."""

    def spread(self, count: int) -> list[Step]:
        """At most `count` of them, evenly spread, the first and the last included."""
        if len(self) <= count:
            return list(self)
        return [self[round(i * (len(self) - 1) / max(1, count - 1))] for i in range(count)]


@contextlib.contextmanager
def trace_steps(pid: int, folder: Path) -> Iterator[Steps]:
    """The steps that the main thread of a process takes in `folder` during the block; filled in at its end.

    with trace_steps(daemon.writer, daemon.home) as steps:
        session.rotate(new_kek)
    """
    steps = Steps()
    with _log_file() as log:
        with _attached(log, [pid], STEP_CALLS, "-y", "-xx", "-s", "256", follow=False):
            yield steps
        steps += _steps_in(log, folder)


@contextlib.contextmanager
def kill_at(pid: int, step: Step) -> Iterator[None]:
    """SIGKILL for the process right before its main thread takes the step, counted from here.

    with kill_at(daemon.writer, step), contextlib.suppress(OSError, http.client.HTTPException):
        session.rotate(new_kek)
    daemon.kill()  # the supervisor starts another writer else
    """
    options = ("-e", f"inject={step.rule}")
    with _log_file() as log, _attached(log, [pid], [step.name], *options, follow=False, deadly=True):
        yield


def steps_of(run: Callable[[list[str]], object], folder: Path) -> Steps:
    """The steps that a command takes in `folder`: `run(wrapper)` must run it with these words before it.

    steps = steps_of(lambda wrapper: cli("rotate-kek", …, wrapper=wrapper), home)
    """
    with _log_file() as log:
        run(
            [
                "strace",
                "-D",
                "-qq",
                "-y",
                "-xx",
                "-s",
                "256",
                "-o",
                str(log),
                "-e",
                "trace=" + ",".join(STEP_CALLS),
            ]
        )
        strace.finish(log)
        return _steps_in(log, folder)


def killing(step: Step) -> list[str]:
    """The words to put before a command that shall die right before this step (return code -9)."""
    return ["strace", "-D", "-qq", "-o", os.devnull, "-e", f"trace={step.name}", "-e", f"inject={step.rule}"]


def failing(step: Step, error: str = "ENOSPC") -> list[str]:
    """The same for one that shall be told that this step failed."""
    rule = f"inject={step.name}:error={error}:when={step.nth}"
    return ["strace", "-D", "-qq", "-o", os.devnull, "-e", f"trace={step.name}", "-e", rule]


def _steps_in(log: Path, folder: Path) -> Steps:
    """Calls that concern the folder; reading it is no step. Counts are over all calls, as strace counts."""
    steps = Steps()
    counts: dict[str, int] = {}
    for name, text in strace.names(log):
        counts[name] = counts.get(name, 0) + 1
        if str(folder) in text and (name != "openat" or "O_CREAT" in text or "O_TRUNC" in text):
            steps.append(Step(name, counts[name], text))
    return steps


# ---- an LD_PRELOAD shim ----------------------------------------------------------------------------

# What a rule can name; each stands for a family of libc functions.
SHIM_CALLS = ("write", "sync", "truncate", "rename", "unlink", "open", "mkdir", "allocate")
_FOREVER = 0xFFFFFFFF
_RULE = struct.Struct("=IIiIIII228s")  # on, call, errno, bytes of a short write, skip, times, hits, path
_RULES = 15
_SHIM_SOURCE = Path(__file__).with_name("shim.c")


class Shim:
    """Faults in a process that runs with `env`, switched from outside while it runs.

        with Shim() as shim, Daemon(env=shim.env) as daemon:
            fault = shim.fail("sync", "kms.db-wal", "EIO", times=1)
            ...
            assert fault.hits == 1
            shim.clock(-3600)

    Rules are tried in the order in which they were made; the first that fits strikes. A process inherits the
    shim by its environment, so one that starts others with a fixed environment leaves it behind.
    """

    def __init__(self) -> None:
        need_cc()
        self.folder = new_folder("kms-shim-")
        self.library = self.folder / "shim.so"
        build = [
            "cc",
            "-shared",
            "-fPIC",
            "-O1",
            "-Wall",
            "-Werror",
            "-o",
            str(self.library),
            str(_SHIM_SOURCE),
        ]
        subprocess.run(build, check=True)
        control = self.folder / "control"
        control.write_bytes(bytes(4096))
        with open(control, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 4096)
        self.env = {"LD_PRELOAD": str(self.library), "TEST_FAULTS": str(control)}
        self._used = 0

    def fail(
        self, call: str, path: str = "", error: str = "EIO", *, skip: int = 0, times: int = _FOREVER
    ) -> Fault:
        """Calls on paths that contain `path` fail with this errno: after `skip` of them, `times` times."""
        return self._rule(call, path, getattr(errno, error), 0, skip, times)

    def short(self, path: str = "", length: int = 1, *, skip: int = 0, times: int = 1) -> Fault:
        """Writes to such paths take only `length` bytes, and say so."""
        return self._rule("write", path, 0, length, skip, times)

    def _rule(self, call: str, path: str, error: int, length: int, skip: int, times: int) -> Fault:
        assert self._used < _RULES, "clear() first"
        place = 256 * (1 + self._used)
        self._used += 1
        row = _RULE.pack(0, SHIM_CALLS.index(call), error, length, skip, times, 0, path.encode())
        self._map[place : place + 256] = row
        self._map[place : place + 4] = struct.pack("=I", 1)  # switched on when whole
        return Fault(self._map, place)

    def clock(self, seconds: float) -> None:
        """Let the wall clock of the process be wrong by so much from now on; the monotonic one stays."""
        self._map[0:8] = struct.pack("=q", round(seconds * 1e9))

    def clear(self) -> None:
        """No fault any more."""
        self._map[:] = bytes(4096)
        self._used = 0

    def close(self) -> None:
        self._map.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Shim:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Fault(NamedTuple):
    """One rule of a shim."""

    map: mmap.mmap
    place: int

    @property
    def hits(self) -> int:
        """How often it struck."""
        count: int = _RULE.unpack(self.map[self.place : self.place + 256])[6]
        return count

    def off(self) -> None:
        self.map[self.place : self.place + 4] = bytes(4)


# ---- a small disk ----------------------------------------------------------------------------------


class Tmpfs:
    """A file system of `size` bytes, mounted at `path` until `close()`.

    with Tmpfs(2 << 20) as disk:
        daemon = make_daemon(home=disk.path)
        disk.fill()                 # not one byte is left
        disk.drain()                # as before
        disk.readonly(True)
    """

    def __init__(self, size: int = 4 << 20) -> None:
        need_mount()
        self.path = new_folder()
        self._filler = self.path / ".filler"
        options = f"size={size},mode=0700"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)], capture_output=True
        )
        if done.returncode != 0:
            self.path.rmdir()
            pytest.skip(f"a tmpfs can't be mounted here: {done.stderr.decode().strip()}")

    def free(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Take up all room but `leave` bytes (a whole number of pages), whoever else writes meanwhile."""
        with open(self._filler, "ab") as file:
            while (room := self.free() - leave) > 0:
                try:
                    os.posix_fallocate(file.fileno(), 0, file.tell() + room)
                    return
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def drain(self) -> None:
        self._filler.unlink()

    def readonly(self, on: bool) -> None:
        """EBUSY while a file on it is open for writing."""
        subprocess.run(["mount", "-o", f"remount,{'ro' if on else 'rw'}", str(self.path)], check=True)

    def close(self) -> None:
        """Unmount. Lazily, so that a process which still runs doesn't keep the mount in place for ever."""
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)
        self.path.rmdir()

    def __enter__(self) -> Tmpfs:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def without_memfd_secret(*more: str) -> list[str]:
    """A wrapper of a daemon on a kernel that has none: root can read its keys then."""
    need_strace()
    return injecting("memfd_secret:error=ENOSYS", *more)
