"""What a parent leaves to the programs that it starts: set right before anything else, or told once.

Everything here outlives execve, so none of it may decide what the daemon does:

    signals      ignored (SIGCHLD: no child could be waited for), blocked, or due from a timer of the parent's
    limits       soft ones; the hard ones are the operator's word, and told where they will bite
    descriptors  a lock or a pipe's end that the parent forgot to close
    streams      closed, dead, full, never read: see `streams`
    environment  PYTHON* variables: see `hardening.new_environment`

The umask is `hardening`'s; nothing is taken from the time zone, and of the working directory only relative
paths that are given by hand.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress

from .hardening import FD_VARIABLE
from .systemd import FIRST_FD

STACK = 8 << 20
"""Bytes of stack: glibc gives as much to each thread. `unlimited` would also turn the memory map around."""

_RAISED = ("AS", "CPU", "DATA", "FSIZE", "MEMLOCK", "NOFILE", "NPROC")
_BITING = {
    "CPU": "each process is killed after {} s of processor time: raise LimitCPU",
    "FSIZE": "files may have {} bytes, the store and the audit log too: raise LimitFSIZE",
}


def settle_signals() -> None:
    """For every program of ours: children can be waited for, nothing is blocked, no old alarm rings."""
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
        signal.setitimer(timer, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def settle(environ: Mapping[str, str]) -> None:
    """For the daemon, before it starts itself anew: glibc reads the limit of the stack at that moment."""
    _raise_limits()
    _close_inherited(environ)


def _raise_limits() -> None:
    for name in _RAISED:
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        with suppress(OSError, ValueError):  # what can't be raised is told by `remarks`
            resource.setrlimit(number, (hard, hard))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    with suppress(OSError, ValueError):
        size = STACK if hard == resource.RLIM_INFINITY else min(STACK, hard)
        resource.setrlimit(resource.RLIMIT_STACK, (size, hard))


def _close_inherited(environ: Mapping[str, str]) -> None:
    """All but the standard streams, systemd's socket and the key's pipe. Our own are closed at an execve, so
    that those without the flag came with one."""
    kept = {environ.get(FD_VARIABLE, "")}
    if environ.get("LISTEN_PID") == str(os.getpid()):
        kept.add(str(FIRST_FD))  # more than one is refused later
    for name in os.listdir("/dev/fd"):
        if name.isdigit() and int(name) > 2 and name not in kept:
            with suppress(OSError):
                if os.get_inheritable(int(name)):
                    os.close(int(name))


def remarks() -> Iterator[str]:
    """What can't be set right, and how it will show."""
    for name, effect in _BITING.items():
        soft = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0]
        if soft != resource.RLIM_INFINITY:
            yield effect.format(soft)
