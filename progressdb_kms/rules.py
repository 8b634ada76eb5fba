"""Who may what: the credentials of a peer, and the rules that it is held against."""

from __future__ import annotations

from typing import NamedTuple, Optional

from .errors import PeerRefused

# ---- peers ---------------------------------------------------------------------------------------


class Peer(NamedTuple):
    """Credentials of a connected process, as the kernel took them down at connect().

    A pid is told for the record only: it may belong to another process by now.
    """

    uid: int
    gid: int
    pid: int


class PeerRules(NamedTuple):
    """`None`: whoever the socket's permissions let in."""

    callers: Optional[frozenset[int]] = None
    admins: Optional[frozenset[int]] = None

    def check(self, peer: Peer, admin: bool) -> None:
        """Raises PeerRefused. An admin UID is a caller too."""
        if admin and self.admins is not None:
            if peer.uid not in self.admins:
                raise PeerRefused(f"uid {peer.uid} may not make this call (admin_peer_uids)")
        elif self.callers is not None and peer.uid not in self.callers | (self.admins or frozenset()):
            raise PeerRefused(f"uid {peer.uid} is not served (allowed_peer_uids)")
