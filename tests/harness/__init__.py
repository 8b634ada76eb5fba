"""What the tests stand on.

daemon     a real daemon in a folder of its own            `Daemon`, `cli`
wire       an HTTP client written from the API table       `Session`, `request`, `raw`
load       many connections at once                        `hammer`, `Load`
memscan    keys in the memory of other processes           `scan`, `Secret`
powerloss  what a disk may hold after the power went       `Recording`
faults     failing calls, full disks, death at any step    `inject`, `Shim`, `tmpfs`, `steps_of`
procs      processes seen through /proc
"""

from __future__ import annotations

from .daemon import REPO, Daemon, DaemonFailed, cli
from .load import Load, hammer
from .wire import Reply, Session, UnexpectedReply, raw, request

__all__ = [
    "REPO",
    "Daemon",
    "DaemonFailed",
    "Load",
    "Reply",
    "Session",
    "UnexpectedReply",
    "cli",
    "hammer",
    "raw",
    "request",
]
