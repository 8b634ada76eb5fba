"""What every start of the program needs: standard streams that are there, and one line for an error.

The daemon's streams never make it wait and never fail: where nobody reads them, or the other end is gone,
lines are dropped and counted, and the count is told as soon as somebody reads again. A command may wait for
whoever reads it, and tells where its output could not be written.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import stat
import sys
from pathlib import Path
from typing import Any

PROG = "progressdb-kms"

DEPENDENCIES = {"cryptography": "cryptography", "yaml": "pyyaml", "sqlitedict": "sqlitedict"}
"""Packages by the module that is imported; Debian's packages are named after the module."""


def open_standard_streams() -> None:
    """Where a caller closed one, a file or socket of ours would get its number, and our output with it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                if os.fstat(number):
                    continue
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the locale lacks is shown by its number
            stream.reconfigure(errors="backslashreplace")


class Unblocked(io.RawIOBase):
    """A standard stream of the daemon's: takes every line at once, and drops what can't be written now."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.dropped = 0
        self._pid = os.getpid()
        self._fd = _unblocked(number)
        self._lead = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.catch_up()
        if self.dropped or not self._put(bytes(data)):
            self.dropped += 1
        return len(data)

    def catch_up(self) -> None:
        """Tell how much was dropped, where that can be told again."""
        if self._pid != os.getpid():  # a child: the parent tells of what it dropped itself
            self._pid, self.dropped = os.getpid(), 0
        why = "lines of this log were dropped, since nobody read it"
        if self.dropped and self._put(f"{PROG}: WARNING: {self.dropped} {why}\n".encode()):
            self.dropped = 0

    def _put(self, line: bytes) -> bool:
        """In pieces that a pipe takes whole or not at all, whoever else writes to it."""
        line = self._lead + line
        for at in range(0, len(line), select.PIPE_BUF):
            piece = line[at : at + select.PIPE_BUF]
            if self._put_piece(piece) != len(piece):
                self._lead = b"\n" if at else self._lead
                return False
        self._lead = b""
        return True

    def _put_piece(self, piece: bytes) -> int:
        with contextlib.suppress(OSError):
            poll = select.poll()  # its own: no two threads may ask the same one at a time
            poll.register(self._fd, select.POLLOUT)
            if poll.poll(0):
                return os.write(self._fd, piece)
        return -1


def _unblocked(number: int) -> int:
    """A description of our own for a pipe or a terminal, that never blocks: a flag of the given one would
    hold for everybody who has it. The given one where that can't be had (a socket), and of a file, since the
    place in it counts. Either is asked first whether it takes a piece."""
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if not stat.S_ISREG(os.fstat(number).st_mode):
        with contextlib.suppress(OSError):
            number = os.open(f"/proc/self/fd/{number}", flags)
    return number


def unblock_standard_streams() -> None:
    """For the daemon. The bytes are UTF-8, whatever the locale says."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = io.TextIOWrapper(Unblocked(number), "utf-8", "backslashreplace", write_through=True)  # type: ignore[type-var]
        setattr(sys, name, stream)


def catch_up() -> None:
    """To be called now and then: tells what was dropped."""
    raw = getattr(sys.stderr, "buffer", None)
    if isinstance(raw, Unblocked):
        raw.catch_up()


def fail(text: str, code: int = 1) -> int:
    line = " ".join(text.split())
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{PROG}: {''.join(c if c.isprintable() else '?' for c in line)}\n")
        sys.stderr.flush()
    return code


def line_of(error: Exception) -> str:
    """One line for an error. An unexpected one may quote data, so only its type and place are told."""
    if (line := getattr(error, "line", None)) is not None:  # of ours, or of the client's
        return f"{line}"
    if (limit := ran_out(error)) is not None:
        return limit
    if isinstance(error, FileNotFoundError) and not error.filename and _homeless():
        return "the working directory is gone (give absolute paths, or start it in another folder)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if (
        isinstance(error, ModuleNotFoundError)
        and (module := str(error.name).partition(".")[0]) in DEPENDENCIES
    ):
        package = DEPENDENCIES[module]
        return f"{package} is not installed (pip install {package}, or apt install python3-{module})"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
    return f"internal error: {type(error).__name__} at {place} (please report it)"


def ran_out(error: BaseException) -> str | None:
    """The limit of the system that this error is about, and how it is raised."""
    if isinstance(error, BlockingIOError) or "can't start new thread" in str(error):  # EAGAIN of a fork
        return "no task can be started (raise TasksMax=, LimitNPROC= and LimitAS=, or `ulimit -u` and `-v`)"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "no file can be opened (raise LimitNOFILE=, or `ulimit -n`)"
    bare = "without setting an exception", "without exception"  # an import that runs out of it may say these
    memory = "failed to map segment", "annot allocate memory", *bare
    said = any(words in str(error) for words in memory)
    if isinstance(error, MemoryError) or (said and isinstance(error, (ImportError, OSError, SystemError))):
        return "memory ran out (raise LimitAS= and MemoryMax= in the unit, or `ulimit -v`)"
    return None


def _homeless() -> bool:
    try:
        return not os.getcwd()
    except FileNotFoundError:
        return True
