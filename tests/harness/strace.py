"""What powerloss and faults share of strace: finding it, running a command under it, reading its lines.

`wrapper()` uses -D: strace attaches itself as a grandchild, so that the process that the test starts is the
command and not strace; pid, signals and exit code are the command's own. `finish()` waits until that
strace has written its last line.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import procs


def missing() -> str:
    """Why strace can't be used here; "" where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed (apt install strace)"
    if os.geteuid() != 0:
        return "strace of a process that is not dumpable needs root (CAP_SYS_PTRACE)"
    probe = subprocess.run(
        ["strace", "-D", "-f", "--seccomp-bpf", "-qq", "-o", os.devnull, "-e", "trace=fsync", "true"],
        capture_output=True,
        check=False,
    )
    return "" if probe.returncode == 0 else f"strace doesn't work here: {probe.stderr.decode().strip()}"


def wrapper(log: Path, calls: Sequence[str], *options: str) -> list[str]:
    """The words to put before a command: trace these calls of all its threads and children into `log`.

    A name with a `?` before it may be unknown to this strace or this machine.
    """
    return [
        "strace",
        "-D",
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-e",
        "signal=none",
        *options,
        "-o",
        str(log),
        "-e",
        "trace=" + ",".join(calls),
    ]


def finish(log: Path, timeout: float = 30.0) -> None:
    """Wait for the end of the strace that writes `log`: it ends after the last process it follows."""
    procs.wait_until(lambda: not procs.with_argument(str(log)), timeout, "strace to write its last line")


# ---- lines ---------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One system call. `entered` and `left` number the lines where it began and ended."""

    tid: int
    time: float  # seconds since the epoch, at entry; 0.0 without -ttt
    name: str
    args: str  # as strace prints them
    result: int  # -1: failed; None is never here: calls that don't return are left out
    note: str  # what stands behind the result
    entered: int
    left: int


_LINE = re.compile(r"(?:(?P<tid>\d+) +)?(?:(?P<time>\d+\.\d+) )?(?P<rest>.*)", re.S)
_WHOLE = re.compile(r"(?P<name>\w+)\((?P<args>.*)\) += (?P<result>0x[0-9a-f]+|-?\d+|\?)(?P<note>.*)", re.S)
_BEGUN = re.compile(r"(?P<name>\w+)\((?P<args>.*?),? *<unfinished \.\.\.>$", re.S)
_RESUMED = re.compile(r"<\.\.\. (?P<name>\w+) resumed>(?P<rest>.*)", re.S)
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_HEX_NAME = re.compile(r"((?:\\x[0-9a-f]{2})+)")


def calls(log: Path) -> Iterator[Call]:
    """All calls that returned, in the order of their return; written with -xx."""
    begun: dict[int, tuple[int, float, str]] = {}
    with open(log, encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines):
            parts = _LINE.match(line.rstrip("\n"))
            if parts is None:
                continue
            tid, time, rest = int(parts["tid"] or 0), float(parts["time"] or 0), parts["rest"]
            entered = number
            if (half := _BEGUN.match(rest)) is not None:
                begun[tid] = (number, time, f"{half['name']}({half['args']}")
                continue
            if (half := _RESUMED.match(rest)) is not None and tid in begun:
                entered, time, head = begun.pop(tid)
                tail = half["rest"].lstrip()
                rest = head + (", " if tail[:1] not in (")", "") and not head.endswith("(") else "") + tail
            if (whole := _WHOLE.match(rest)) is not None and whole["result"] != "?":
                result = int(whole["result"], 0)
                yield Call(tid, time, whole["name"], whole["args"], result, whole["note"], entered, number)


def names(log: Path) -> list[tuple[str, str]]:
    """(name, text) of each call that was entered, in that order, also if it never returned."""
    found = []
    with open(log, encoding="ascii", errors="replace") as lines:
        for line in lines:
            parts = _LINE.match(line.rstrip("\n"))
            if parts is not None and (head := re.match(r"(\w+)\(", parts["rest"])) is not None:
                found.append((head[1], readable(parts["rest"])))
    return found


def strings(args: str) -> list[bytes]:
    """The quoted strings among the arguments, decoded. ValueError where strace cut one off."""
    found = []
    for match in _STRING.finditer(args):
        if match[2]:
            raise ValueError("strace cut a string off: raise its -s")
        found.append(unescape(match[1]))
    return found


def unescape(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def readable(text: str) -> str:
    """With strings and paths as letters again."""
    return _HEX_NAME.sub(lambda match: unescape(match[1]).decode("utf-8", "backslashreplace"), text)
