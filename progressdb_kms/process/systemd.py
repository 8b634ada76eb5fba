"""What systemd wants of a service: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3). Stdlib only.

Everything is a no-op outside of systemd. The variables come with the environment, which a second start of
the program (`hardening.prepare`) inherits: so each that names a pid counts for that process alone, and a
descriptor is taken only where it is what we asked the .socket unit for.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress

from ..errors import ConfigError

FIRST_FD = 3  # SD_LISTEN_FDS_START


def notify(state: str) -> bool:
    """Send lines of NAME=VALUE, such as `READY=1`. False: nobody listens, which is never an error of ours."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):  # the abstract name space
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        return sock.sendto(state.encode("utf-8"), address) > 0
    return False


def listen_socket() -> socket.socket | None:
    """The socket that systemd listens on for us, or None where we bind ourselves.

    Raises ConfigError where it hands over anything but one listening Unix stream socket.
    """
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise ConfigError("systemd hands over more than one socket", hint=_REMEDY)
    try:
        sock = socket.socket(fileno=FIRST_FD)  # asks the kernel for family and type
    except OSError:
        raise ConfigError(f"systemd hands over no socket (descriptor {FIRST_FD})", hint=_REMEDY) from None
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    stream = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM
    if not stream or not listening or sock.getsockname()[:1] != "/":  # an abstract one has no permissions
        sock.detach()  # it is not ours to close
        raise ConfigError("what systemd hands over is not a listening Unix stream socket", hint=_REMEDY)
    sock.set_inheritable(False)
    return sock


_REMEDY = "the .socket unit needs one ListenStream=/PATH, and Accept=no"


def watchdog_seconds() -> float | None:
    """Within how many seconds systemd wants to hear `WATCHDOG=1`; None where it does not watch."""
    micros = os.environ.get("WATCHDOG_USEC", "")
    ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(micros) / 1e6 if ours and re.fullmatch("0*[1-9][0-9]{0,17}", micros) else None
