"""What is looked at in the store's files from outside: by a child process that has no connection to it.

Closing *any* descriptor of kms.db, -wal or -shm drops every POSIX lock that its process holds on that file,
and with them all that keeps another program from removing the write-ahead log. So no process with the store
open opens these files otherwise than through SQLite, or with O_PATH. A child has no locks to lose.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

PATIENCE = 120.0
"""Seconds for a look; reading a file of 1 GB takes about one."""

_FIND = """
import mmap, sys
path, *pieces = sys.stdin.buffer.read().split(b"\\0")
with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
    print(any(content.find(piece) >= 0 for piece in pieces))
"""

_CUT = """
import os, struct, sys
path = sys.stdin.buffer.read()
def index():
    with open(path + b"-shm", "rb") as file:
        return file.read(48)
for _ in range(100):
    seen, size = index(), os.stat(path + b"-wal").st_size
    if index() == seen:
        page, frames = struct.unpack_from("=HI", seen, 14)
        print(frames > 0 and size < 32 + frames * (24 + (page if page > 1 else 65536)))
        break
"""


def holds(path: Path, pieces: Iterable[bytes]) -> bool | None:
    """Does any of these pieces of text stand in the file? None where that could not be found out."""
    return _look(_FIND, path, *pieces)


def cut(path: Path) -> bool | None:
    """Is the write-ahead log of this database shorter than the frames that its index (-shm) counts demand? A
    checkpoint that cuts it to nothing first sets the count to 0, so no program does that rightly. None as
    above.
    """
    return _look(_CUT, path)


def _look(program: str, path: Path, *more: bytes) -> bool | None:
    """What the program found; None where it failed. Nothing of it is on its command line."""
    command = [sys.executable, "-I", "-S", "-c", program]
    text = b"\0".join((bytes(path.absolute()), *more))
    try:
        done = subprocess.run(command, input=text, capture_output=True, timeout=PATIENCE)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return {b"True\n": True, b"False\n": False}.get(done.stdout) if not done.returncode else None
