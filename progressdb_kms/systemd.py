"""What systemd wants of a service: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3). Stdlib only.

Everything is a no-op outside of systemd. The variables are read, never trusted further than that: a
descriptor is taken only where it is a listening Unix stream socket.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from typing import Optional

from .errors import ConfigError

_FIRST_FD = 3  # SD_LISTEN_FDS_START


def notify(state: str) -> bool:
    """Send `READY=1` and the like. False: nobody listens; that is never an error of ours."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.sendto(state.encode("utf-8"), address)
        return True
    return False


def listen_socket() -> Optional[socket.socket]:
    """The socket that systemd listens on for us, or None where we bind ourselves.

    Raises ConfigError where it hands over anything but one Unix stream socket.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    if count == "0" or not count:
        return None
    if count != "1":
        raise ConfigError(
            f"systemd hands over {count} sockets", hint="let the .socket unit have one ListenStream="
        )
    if not stat.S_ISSOCK(os.fstat(_FIRST_FD).st_mode):
        raise ConfigError("the descriptor that systemd hands over is no socket")
    os.set_inheritable(_FIRST_FD, False)
    sock = socket.socket(fileno=_FIRST_FD)
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listening:
        raise ConfigError("the socket that systemd hands over is not a listening Unix stream socket")
    return sock


def watchdog_seconds() -> Optional[float]:
    """Within how many seconds systemd wants to hear `WATCHDOG=1`; None where it does not watch."""
    for_pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    micros = os.environ.get("WATCHDOG_USEC", "")
    if for_pid != str(os.getpid()) or not (micros.isascii() and micros.isdigit()) or int(micros) == 0:
        return None
    return int(micros) / 1e6
