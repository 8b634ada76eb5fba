"""Who is at the other end of a TCP connection on this host.

TCP has no peer credentials. The kernel's socket table has: NETLINK_SOCK_DIAG (sock_diag(7)) tells which UID
owns the socket at the other end, in one exact look-up, unprivileged. It answers for more than was asked, so
an answer counts only where

- the four-tuple is exactly the one that was asked: after a reset the kernel may name a *listener* there;
- the inode is not 0: a socket that its process has closed is told as uid 0, and what it sent before is still
  here to be read, and would be root's;
- the state is one of a connection that was made;
- our own end is still connected after the look-up: nobody else can have made the same four-tuple since.

Whoever forwards (ssh -L, a container's proxy) is the peer. pid and gid are not known here.
"""

from __future__ import annotations

import os
import socket
import struct

from ..errors import PeerRefused
from ..rules import TCP, Peer

_SOCK_DIAG, _BY_FAMILY = 4, 20
_REQUEST, _ERROR = 1, 2  # NLM_F_REQUEST, NLMSG_ERROR

_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _CLOSE_WAIT = 1, 4, 5, 8
_CONNECTED = (_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _CLOSE_WAIT)

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
_ASKED = struct.Struct("=BBBBI")  # family, protocol, extensions, padding, states
_TUPLE = struct.Struct(">HH16s16s")  # ports and addresses: of the socket that is meant, of its peer
_ANYWHERE = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # interface, cookie
_TOLD = struct.Struct("=BBBB36s12sIIIII")  # family, state, …, four-tuple, …, uid, inode

WAIT = 1.0
"""Seconds for the kernel's answer, which takes microseconds: it must not stop the accepting thread."""


class Peers:
    """`identify` tells whose connection it is. Raises PeerRefused wherever that is not certain. It
    is one thread's."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._sequence = 0

    def identify(self, sock: socket.socket) -> Peer:
        uid = None
        try:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                peer, own = sock.getpeername(), sock.getsockname()
                uid = self._ask(sock.family, _tuple(sock.family, peer, own))
                uid = uid if sock.getpeername() == peer else None
        except (OSError, struct.error):
            uid = None
            self.close()
        if uid is None:
            raise PeerRefused("the kernel does not tell who is at the other end of this connection")
        return Peer(uid, via=TCP)

    def _ask(self, family: int, wanted: bytes) -> int | None:
        """The UID, or None where the kernel knows no such connection. Raises OSError."""
        if self._socket is None:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG)
            self._socket.settimeout(WAIT)
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        body = _ASKED.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + wanted + _ANYWHERE
        head = _HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST, self._sequence, 0)
        self._socket.sendto(head + body, (0, 0))
        while True:
            answer, sender = self._socket.recvfrom(4096)
            _, kind, _, sequence, _ = _HEADER.unpack_from(answer)
            if sender[0] == 0 and sequence == self._sequence:  # else late, and for somebody who gave up
                return read_answer(kind, answer[_HEADER.size :], family, wanted)

    def close(self) -> None:
        """Late answers must not meet the next question."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _tuple(family: int, peer: tuple[str, int], own: tuple[str, int]) -> bytes:
    """The peer's socket: its own end first."""
    addresses = [socket.inet_pton(family, end[0]).ljust(16, b"\0") for end in (peer, own)]
    return _TUPLE.pack(peer[1], own[1], *addresses)


def read_answer(kind: int, answer: bytes, family: int, wanted: bytes) -> int | None:
    """The UID in an answer to a question for this four-tuple, or None."""
    if kind != _BY_FAMILY or len(answer) < _TOLD.size:
        return None
    told_family, state, _, _, told, _, _, _, _, uid, inode = _TOLD.unpack_from(answer)
    if told_family != family or told != wanted or state not in _CONNECTED or not inode:
        return None
    return int(uid)


def check(host: str) -> None:
    """Does the kernel tell of a connection of our own what is true? Raises PeerRefused, OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    peers = Peers()
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen(1)
        with socket.create_connection(listener.getsockname()[:2], WAIT):
            accepted, _ = listener.accept()
            with accepted:
                uid = peers.identify(accepted).uid
    peers.close()
    if uid != os.geteuid():
        raise PeerRefused("the kernel's socket table tells another UID than ours for a connection of ours")
