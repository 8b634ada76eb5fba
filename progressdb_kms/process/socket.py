"""The name that clients connect to: bound, taken from systemd, taken away."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from ..config.options import Settings
from ..config.values import host_and_port
from ..errors import AlreadyRunning, ConfigError, KMSError
from ..journal import Chore
from ..wire import handed, loopback
from ..wire.doors import BACKLOG, peer_of
from . import systemd

log = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
"""How often it is looked whether the name still leads to our socket: an lstat."""

DYING_TRIES, DYING_SECONDS = 20, 0.1
"""So often, and after so long each time, it is looked whether the children of a killed daemon are gone."""

RETRY_SECONDS = 10.0
"""How often, while somebody else listens under the name."""

# ---- the socket ------------------------------------------------------------------------------------


def bind(settings: Settings) -> socket.socket:
    """A new socket, listening under its name."""
    try:
        _clear_stale(settings.socket)
        return _bound(settings)
    except OSError as error:
        raise ConfigError(
            f"the socket {settings.socket} can't be bound: {error.strerror}",
            hint="its folder must exist and be writable by the daemon's user, and socket_group be one of his",
        ) from error


def _bound(settings: Settings) -> socket.socket:
    """The umask (see `hardening`) lets nobody else connect; then comes the group, last the wider mode. By a
    descriptor: whoever else may write to the folder could put a link to a file of ours in its place."""
    with ExitStack() as failed:
        sock = failed.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        sock.bind(str(settings.socket))
        name = os.open(settings.socket, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            about = os.fstat(name)
            if not stat.S_ISSOCK(about.st_mode) or (about.st_uid, about.st_nlink) != (os.geteuid(), 1):
                raise OSError(errno.ESTALE, "it was replaced a moment ago")
            if settings.socket_group is not None:
                os.chown(f"/proc/self/fd/{name}", -1, settings.socket_group)
            os.chmod(f"/proc/self/fd/{name}", settings.socket_mode)
        finally:
            os.close(name)
        sock.listen(BACKLOG)
        failed.pop_all()
    return sock


def listen_tcp(settings: Settings) -> socket.socket | None:
    """The port of `tcp_address`; None where there is none, or where the kernel does not tell who connects.

    Accepted sockets inherit TCP_NODELAY. Raises ConfigError where the port can't be had.
    """
    if settings.tcp_address is None:
        return None
    host, port = host_and_port(settings.tcp_address)
    try:
        loopback.check(host)
    except (KMSError, OSError) as error:
        log.error(
            "no TCP: the kernel does not tell who connects to %s (%s); it needs tcp_diag, and the unit the "
            "drop-in tcp.conf", settings.tcp_address, error,
        )  # fmt: skip
        return None
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"tcp_address {settings.tcp_address} can't be bound: {error.strerror}",
            hint="another program listens there (`ss -ltnp`), or the unit lacks the drop-in tcp.conf",
        ) from error
    sock.setblocking(False)
    if settings.allowed_peer_uids is None:
        served = settings.peer_rules.own | (settings.admin_peer_uids or frozenset())
        log.warning(
            "over TCP only uid %s are served: a port has no file permissions (set allowed_peer_uids)",
            ", ".join(map(str, sorted(served))),
        )
    return sock


def hosts(settings: Settings) -> frozenset[str]:
    """What a Host header may say over TCP."""
    if settings.tcp_address is None:
        return frozenset()
    port = settings.tcp_address.rpartition(":")[2]
    return frozenset((settings.tcp_address, f"localhost:{port}"))


def _clear_stale(path: Path, tries: int = DYING_TRIES) -> None:
    """Remove a socket that nobody answers at; refuse anything else that stands there. Raises OSError."""
    with suppress(FileNotFoundError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(
                f"{path} is there and is no socket: it is not removed", hint="choose another `socket`"
            )
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except (BlockingIOError, socket.timeout):
            raise AlreadyRunning(f"the socket {path} is in use, and its server is busy") from None
        holder = peer_of(probe)
        if tries == 1 or os.path.exists(f"/proc/{holder.pid}"):
            raise AlreadyRunning(
                f"the socket {path} is in use by pid {holder.pid} (uid {holder.uid})",
                hint="stop that one first, or choose another --socket",
            )
        time.sleep(DYING_SECONDS)  # it was killed, a moment ago
        _clear_stale(path, tries - 1)


# ---- its name --------------------------------------------------------------------------------------


class Name:
    """The socket's file. A cleaner of /tmp may remove it, and nobody would find the daemon any more: it is
    noticed by device and inode, and a new socket is bound, which takes the old one's place in all processes.
    """

    def __init__(self, settings: Settings) -> None:
        """Listens: on the socket that systemd hands over, or on one that is bound at `socket`."""
        given = systemd.listen_socket()
        self._ours = given is None
        self.listener = bind(settings) if given is None else given
        handed.refuse(self.listener)
        self.listener.setblocking(False)  # all workers share it; a copy of a blocking one would set it back
        self._settings = settings
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK  # send_fds and recv_fds ignore flags
        self._handovers = [socket.socketpair(socket.AF_UNIX, kind) for _ in range(settings.workers)]
        self._path = Path(os.fsdecode(self.listener.getsockname()))
        self._seen = self._look()
        self._next = 0.0
        self._keeping = Chore(
            "the socket's name is gone, and can't be had again", (RETRY_SECONDS, RETRY_SECONDS)
        )

    def _look(self) -> tuple[int, int] | None:
        with suppress(OSError):
            about = self._path.lstat()
            return about.st_dev, about.st_ino
        return None

    def watch(self) -> None:
        """To be called often; looks once a second. A try connects to whoever is there: so there are fewer
        where they fail."""
        now = time.monotonic()
        if now >= self._next and self._keeping.over():
            self._next = now + WATCH_SECONDS
            self._keeping.attend(self._keep)

    def _keep(self) -> None:
        if self._look() == self._seen:
            return
        if not self._ours:
            raise ConfigError(f"`systemctl restart` the .socket unit of {self._path}")
        with bind(self._settings) as fresh:
            handed.refuse(fresh)
            log.warning("the socket's name %s was removed: bound again", self._path)
            os.dup2(fresh.fileno(), self.listener.fileno(), inheritable=False)
            for end, _ in self._handovers:
                with suppress(OSError):  # a worker that is gone, or has not taken the last one
                    socket.send_fds(end, [b"l"], [fresh.fileno()])
        self._seen = self._look()

    def remove(self) -> None:
        """From here on a connect fails at once instead of waiting for nobody. To repeat it does nothing: the
        next daemon may be there."""
        self._next = float("inf")
        if self._ours and self._look() == self._seen:
            self._ours = False
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:  # answers in flight, and the keys, are more
                log.error("the socket's name %s can't be removed: %s", self._path, error.strerror)

    def take_over(self, slot: int, listener: socket.socket) -> bool:
        """In a worker, now and then: where the socket was bound again, let `listener` be the new one."""
        taken = False
        with suppress(BlockingIOError):
            while True:
                _, fds, _, _ = socket.recv_fds(self._handovers[slot - 1][1], 1, 1)
                for fd in fds:
                    os.dup2(fd, listener.fileno(), inheritable=False)
                    os.close(fd)
                    taken = True
        if taken:
            listener.setblocking(False)
        return taken
