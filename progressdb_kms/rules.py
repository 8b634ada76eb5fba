"""Who may what: the credentials of a peer, and the rules that it is held against.

Two kinds of rule. `PeerRules` decides who is served at all, and who may make the calls of an administrator.
`Policy` narrows what a UID or GID that is served may do: every policy that names a peer must allow what it
asks for, so that one more policy never gives anybody more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

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


# ---- policies ------------------------------------------------------------------------------------

BATCHES: Mapping[str, str] = {"encrypt_batch": "encrypt", "decrypt_batch": "decrypt"}
"""A batch needs what its items need."""

OPERATIONS = frozenset(
    (
        *("create_dek", "get_wrapped", "encrypt", "decrypt", "reencrypt", "wrap", "unwrap", "rewrap"),
        *("rotate_kek", "list_deks", "describe_dek", "disable_dek", "enable_dek", "delete_dek"),
    )
)
"""What a policy may name: operations as the audit log has them, but for batches."""


def pattern(text: str) -> re.Pattern[str]:
    """`*` stands for any run of characters, and nothing else stands for anything but itself."""
    return re.compile(".*".join(map(re.escape, text.split("*"))), re.S)


class Policy(NamedTuple):
    """One entry of `policies`. What is empty or 0 narrows nothing. `number` counts from 1."""

    number: int
    uid: Optional[int] = None
    gid: Optional[int] = None
    operations: frozenset[str] = frozenset()
    threads: tuple[re.Pattern[str], ...] = ()
    keys: tuple[re.Pattern[str], ...] = ()
    per_second: int = 0

    @classmethod
    def of(cls, number: int, entry: Mapping[str, Any]) -> Policy:
        """From a checked entry of the configuration: plain numbers and lists of texts."""
        return cls(
            number,
            entry.get("uid"),
            entry.get("gid"),
            frozenset(entry.get("operations", ())),
            tuple(map(pattern, entry.get("threads", ()))),
            tuple(map(pattern, entry.get("keys", ()))),
            entry.get("per_second", 0),
        )

    def names(self, peer: Peer) -> bool:
        return peer.uid == self.uid if self.uid is not None else peer.gid == self.gid

    def allows_operation(self, op: str) -> bool:
        return not self.operations or BATCHES.get(op, op) in self.operations

    def allows_key(self, key_id: str, thread_id: Optional[str]) -> bool:
        """`thread_id` None: nobody knows it, and then no pattern of threads fits."""
        return _fits(self.keys, key_id) and _fits(self.threads, thread_id)


def _fits(patterns: Sequence[re.Pattern[str]], text: Optional[str]) -> bool:
    return not patterns or (text is not None and any(pattern.fullmatch(text) for pattern in patterns))


class Policies(NamedTuple):
    """Those that name one peer, in the order of the configuration."""

    applicable: tuple[Policy, ...] = ()

    @classmethod
    def of(cls, everything: Sequence[Policy], peer: Peer) -> Policies:
        return cls(tuple(policy for policy in everything if policy.names(peer)))

    def check_operation(self, op: str) -> None:
        """Before a body is read. Raises PeerRefused, which names the policy that decides."""
        for policy in self.applicable:
            if not policy.allows_operation(op):
                raise _refused(policy, f"may not {op}")

    def check_key(self, key_id: str, thread_id: Optional[str]) -> None:
        """As soon as it is known which DEK is meant. Raises PeerRefused."""
        for policy in self.applicable:
            if not policy.allows_key(key_id, thread_id):
                raise _refused(policy, "may not use this key")

    def sees(self, key_id: str, thread_id: str) -> bool:
        """What one may not use one does not see, either."""
        return all(policy.allows_key(key_id, thread_id) for policy in self.applicable)


def _refused(policy: Policy, what: str) -> PeerRefused:
    who = f"uid {policy.uid}" if policy.uid is not None else f"gid {policy.gid}"
    return PeerRefused(f"{who} {what} (policies, entry {policy.number})", code="policy_refused")
