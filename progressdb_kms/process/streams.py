"""What every start of the program needs: standard streams that are there, and one line for an error."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from ..errors import KMSError

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


def fail(text: str, code: int = 1) -> int:
    line = " ".join(text.split())
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{PROG}: {''.join(c if c.isprintable() else '?' for c in line)}\n")
        sys.stderr.flush()
    return code


def told(error: Exception) -> str:
    """One line for an error. An unexpected one may quote data, so only its type and place are told."""
    message = getattr(error, "message", None)
    if isinstance(error, KMSError) or message is not None:
        hint = getattr(error, "hint", "")
        return f"{message} ({hint})" if hint else f"{message}"
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


def die(number: int) -> int:
    """End as the signal would have ended the process."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number
