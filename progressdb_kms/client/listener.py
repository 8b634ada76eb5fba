"""Who listens? The kernel is asked after each connect, before a byte is sent: a plaintext or a new KEK goes
to the daemon, and to nobody who merely holds the socket's name.

SO_PEERCRED names whoever called listen(). Good are

- root: systemd's socket, or a daemon of root's;
- our own UID;
- the UID that the caller names (`Client(server_uid=)`, `--server-uid`);
- the owner of the socket's folder, where that folder and all on the way to it belong to root or to that UID
  and nobody else may write there: nobody else can then have put a socket at this name. (/tmp is no such
  folder: whoever is first may bind there.)

In a user namespace all UIDs of outside look alike, as the overflow UID (65534): it owns such a folder by no
means that could be checked, and is good only where it is named.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

MAX_LINKS = 40  # as the kernel has it


def of(sock: socket.socket) -> int | None:
    """The UID of the process that listens; None where the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    _, uid, _ = struct.unpack("3I", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def distrust(uid: int | None, path: str, server_uid: int | None) -> str:
    """Why nothing is sent to this UID at this path; "" where it is good."""
    if uid is None or uid in (0, os.geteuid(), server_uid):
        return ""
    if uid == _overflow_uid():
        return "it is a user whom this namespace doesn't know"
    if path.startswith("\0"):
        return "anybody may bind a name that is in no folder"
    try:
        *above, folder = [(name, os.stat(name)) for name in folders(path)]
    except (OSError, ValueError) as error:
        return f"the way to it can't be looked at: {getattr(error, 'strerror', None) or error}"
    if folder[1].st_uid != uid:
        return f"{folder[0]} is not that user's"
    for name, about in (*above, folder):
        if about.st_uid not in (0, uid):
            return f"{name} belongs to uid {about.st_uid}"
        if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write to {name}"
    return ""


def folders(path: str) -> Iterator[str]:
    """Every folder in which a name is looked up on the way to `path`, also by way of symbolic links."""
    here, links = "/", 0
    parts = os.path.join(os.getcwd(), path).split("/")[::-1]
    while parts:
        part = parts.pop()
        if part in ("", "."):
            continue
        if part == "..":
            here = os.path.dirname(here)
            continue
        yield here
        there = os.path.join(here, part)
        if not os.path.islink(there):
            here = there
            continue
        links += 1
        if links > MAX_LINKS:
            raise ValueError("too many symbolic links")
        target = os.readlink(there)
        here = "/" if target.startswith("/") else here
        parts += target.split("/")[::-1]


def _overflow_uid() -> int:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 65534
