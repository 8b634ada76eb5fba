"""Processes seen from outside, through /proc: trees, states, and ending those that are ours.

A pid can be given to another process once its owner is gone, so a process is named by pid *and* start
time (`Proc`). Nothing is ever signalled by name.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Proc(NamedTuple):
    """One process for good: `started` is in clock ticks since boot (field 22 of /proc/PID/stat)."""

    pid: int
    started: int

    def alive(self) -> bool:
        """False for a zombie too: it holds nothing any more."""
        fields = stat(self.pid)
        return fields is not None and int(fields[19]) == self.started and fields[0] not in ("Z", "X")

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.alive():
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass


def stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third (state) on; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()  # the name may hold blanks and brackets


def proc(pid: int) -> Proc | None:
    fields = stat(pid)
    return None if fields is None else Proc(pid, int(fields[19]))


def children(pid: int) -> list[int]:
    """Direct children, of every thread."""
    found = []
    for task in threads(pid):
        try:
            found += Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [int(child) for child in found]


def threads(pid: int) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return []


def tree(pid: int) -> list[int]:
    """The process and all that descend from it, parents first; [] where it is gone."""
    found = [pid] if (fields := stat(pid)) is not None and fields[0] != "Z" else []
    for parent in found:
        found += [child for child in children(parent) if child not in found]
    return found


def session_members(sid: int) -> list[Proc]:
    """Living processes of a session: also those whose parent is gone."""
    found = []
    for name in os.listdir("/proc"):
        fields = stat(int(name)) if name.isdigit() else None
        if fields is not None and int(fields[3]) == sid and fields[0] not in ("Z", "X"):
            found.append(Proc(int(name), int(fields[19])))
    return found


def with_argument(text: str) -> list[Proc]:
    """Processes that were started with exactly this argument, such as a path that is ours alone."""
    found = []
    for name in os.listdir("/proc"):
        if (
            name.isdigit()
            and text.encode() in _cmdline(int(name))
            and (member := proc(int(name))) is not None
        ):
            found.append(member)
    return [member for member in found if member.alive()]


def _cmdline(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def writes_to(pid: int, path: Path) -> bool:
    """Whether it has the file open for writing."""
    for fd in _descriptors(pid):
        try:
            flags = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
            if (
                os.readlink(f"/proc/{pid}/fd/{fd}") == str(path)
                and int(flags, 8) & os.O_ACCMODE != os.O_RDONLY
            ):
                return True
        except OSError:
            continue
    return False


def _descriptors(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError):
        return []


def status(pid: int, field: str) -> str:
    """One line of /proc/PID/status, such as `TracerPid` or `VmRSS`; "" where it can't be had."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field + ":")), "")


def rss_kib(pid: int) -> int:
    return int(status(pid, "VmRSS").split()[0])


def end(processes: Iterable[Proc], timeout: float = 10.0) -> None:
    """SIGKILL each, and wait until all are gone."""
    wanted = list(processes)
    for process in wanted:
        process.kill()
    wait_until(lambda: not any(process.alive() for process in wanted), timeout, "killed processes to be gone")


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    """As root: what this process opens and connects to is this user's, and its group's of that number."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def wait_until(condition: Callable[[], bool], timeout: float = 10.0, what: str = "") -> None:
    """Poll until true. AssertionError after `timeout` seconds: generous, since a test is not a clock."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:g} s in vain for {what or 'a condition'}")
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def quickest(tries: int, bound: float, work: Callable[[], object]) -> float:
    """Seconds of the quickest of so many tries; no more are made behind one within `bound`. A machine that
    stood still for a moment is no fault; what waits too long does so each time."""
    took = float("inf")
    for _ in range(tries):
        begun = time.monotonic()
        work()
        took = min(took, time.monotonic() - begun)
        if took < bound:
            break
    return took
