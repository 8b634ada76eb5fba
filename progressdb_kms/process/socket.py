"""The name that clients connect to: bound, taken from systemd, taken away."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from ..config.load import Settings
from ..errors import AlreadyRunning, ConfigError
from ..wire.server import BACKLOG
from . import systemd

# ---- the socket ------------------------------------------------------------------------------------


def listen(settings: Settings) -> tuple[socket.socket, bool]:
    """(listening socket, whether its name is ours to remove): systemd's, or bound at `socket`."""
    given = systemd.listen_socket()
    if given is not None:
        return given, False
    _clear_stale(settings.socket)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o777 & ~(0o600 if settings.socket_group is not None else settings.socket_mode))
    try:
        sock.bind(str(settings.socket))
    except OSError as error:
        raise ConfigError(
            f"the socket {settings.socket} can't be bound: {error.strerror}",
            hint="its folder must exist and be writable by the daemon's user",
        ) from error
    finally:
        os.umask(old)
    if settings.socket_group is not None:
        _hand_to_group(settings)
    sock.listen(BACKLOG)
    return sock, True


def _hand_to_group(settings: Settings) -> None:
    """Group first, then the wider mode: there is no moment in which others could connect."""
    assert settings.socket_group is not None
    try:
        os.chown(settings.socket, -1, settings.socket_group)
        os.chmod(settings.socket, settings.socket_mode)
    except OSError as error:
        raise ConfigError(
            f"the socket can't be given to the group {settings.socket_group}: {error.strerror}",
            hint="the daemon's user must be a member of it",
        ) from error


def _clear_stale(path: Path) -> None:
    """Remove a socket that nobody answers at; refuse anything else that stands there."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"the socket {path} can't be looked at: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{path} is there and is no socket: it is not removed", hint="choose another `socket`"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EAGAIN and not isinstance(error, socket.timeout):
                raise ConfigError(f"the socket {path} can't be tried: {error.strerror}") from error
            raise AlreadyRunning(f"the socket {path} is in use, and its server is busy") from None
        from ..wire.server import peer_of

        holder = peer_of(probe)
        raise AlreadyRunning(
            f"the socket {path} is in use by pid {holder.pid} (uid {holder.uid})",
            hint="stop that one first, or choose another --socket",
        )


def remove_name(settings: Settings, ours: bool) -> None:
    """From here on a connect fails at once instead of waiting for nobody."""
    if ours:
        settings.socket.unlink(missing_ok=True)
