"""Who may what: the credentials of a peer, and the rules that it is held against.

Two kinds of rule. `PeerRules` decides who is served at all, and who may make the calls of an administrator.
`Policy` narrows what a UID or GID that is served may do: every policy that names a peer must allow what it
asks for, so that one more policy never gives anybody more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from .errors import PeerRefused, PolicyRefused, RateLimited

# ---- peers ---------------------------------------------------------------------------------------


TCP = "tcp"


class Peer(NamedTuple):
    """Credentials of a connected process, as the kernel took them down at connect().

    A pid is told for the record only: it may belong to another process by now. Over TCP the kernel knows the
    UID alone, and `via` says so.
    """

    uid: int
    gid: int = -1
    pid: int = 0
    via: str = ""


class PeerRules(NamedTuple):
    """`None`: whoever the socket's permissions let in; over TCP, which has none, only `own`."""

    callers: frozenset[int] | None = None
    admins: frozenset[int] | None = None
    own: frozenset[int] = frozenset((0, os.geteuid()))

    def check(self, peer: Peer, admin: bool) -> None:
        """Raises PeerRefused. An admin UID is a caller too."""
        if admin and self.admins is not None and peer.uid not in self.admins:
            raise PeerRefused(f"uid {peer.uid} may not make this call (admin_peer_uids)")
        callers = self.own if self.callers is None and peer.via == TCP else self.callers
        if callers is not None and peer.uid not in callers | (self.admins or frozenset()):
            raise PeerRefused(f"uid {peer.uid} is not served (allowed_peer_uids)")


# ---- policies ------------------------------------------------------------------------------------

BATCHES: Mapping[str, str] = {"encrypt_batch": "encrypt", "decrypt_batch": "decrypt"}
"""A batch needs what its items need."""

CALLED: Mapping[str, str] = {
    **{"list": "list_deks", "describe": "describe_dek", "disable": "disable_dek", "enable": "enable_dek"},
    **{"shred": "delete_dek", "delete": "delete_dek", "clock_accept": "accept_clock", "rotate": "rotate_kek"},
    **{"create_dek_for_thread": "create_dek", **BATCHES},
}
"""Operations by the other words that people have for them: those of the commands and of the API."""

OPERATIONS = frozenset(("get_wrapped", "reencrypt", "wrap", "unwrap", "rewrap", *CALLED.values()))
"""What a policy may name: operations as the audit log has them, but for batches."""


def pattern(text: str) -> re.Pattern[str]:
    """`*` stands for any run of characters, and nothing else stands for anything but itself. Each piece
    between two of them is taken where it comes first, and no other place is tried: else some of them and a
    long text take for ever."""
    first, *pieces = map(re.escape, text.split("*"))
    steps = [f"(?=(?P<_{n}>.*?{piece}))(?P=_{n})" for n, piece in enumerate(pieces[:-1]) if piece]
    return re.compile("".join([first, *steps, *[".*" + piece for piece in pieces[-1:]]]), re.S)


class Policy(NamedTuple):
    """One entry of `policies`. What is empty or 0 narrows nothing. `number` counts from 1."""

    number: int
    uid: int | None = None
    gid: int | None = None
    operations: frozenset[str] = frozenset()
    threads: tuple[re.Pattern[str], ...] = ()
    keys: tuple[re.Pattern[str], ...] = ()
    per_second: int = 0

    @classmethod
    def of(cls, number: int, entry: Mapping[str, Any]) -> Policy:
        """From a checked entry of the configuration: plain numbers and lists of texts."""
        patterns = {name: tuple(map(pattern, entry[name])) for name in ("threads", "keys") if name in entry}
        operations = frozenset(entry.get("operations", ()))
        return cls(number, **{**entry, "operations": operations, **patterns})

    def names(self, peer: Peer, groups: Collection[int] | None = ()) -> bool:
        """`groups`: all that it is in beside `gid`. Where nobody knows them (None), as over TCP, each is
        meant: whoever is in one must not get around its policy so."""
        if self.uid is not None:
            return peer.uid == self.uid
        return groups is None or peer.via == TCP or self.gid == peer.gid or self.gid in groups

    def allows_operation(self, op: str) -> bool:
        return not self.operations or BATCHES.get(op, op) in self.operations

    def allows_key(self, key_id: str, thread_id: str | None) -> bool:
        """`thread_id` None: nobody knows it, and then no pattern of threads fits."""
        return _fits(self.keys, key_id) and _fits(self.threads, thread_id)


def _fits(patterns: Sequence[re.Pattern[str]], text: str | None) -> bool:
    return not patterns or (text is not None and any(pattern.fullmatch(text) for pattern in patterns))


class Meter(Protocol):
    """Counts what was done under a policy within this second, over all workers."""

    def spend(self, number: int, count: int, limit: int) -> int:
        """How many of `count` may be done."""
        ...


class Rights:
    """What the policies that name a peer leave it; made once a connection."""

    def __init__(self, policies: Sequence[Policy] = (), meter: Meter | None = None) -> None:
        self.policies = tuple(policies)
        self._meter = meter

    def check_operation(self, op: str) -> None:
        """Before a body is read. Raises PolicyRefused, which names the entry that decides."""
        for policy in self.policies:
            if not policy.allows_operation(op):
                raise PolicyRefused(_who(policy, f"may not {op}"), entry=policy.number)

    def check_key(self, key_id: str, thread_id: str | None) -> None:
        """As soon as it is known which DEK is meant. Raises PolicyRefused."""
        for policy in self.policies:
            if not policy.allows_key(key_id, thread_id):
                raise PolicyRefused(_who(policy, "may not use this key"), entry=policy.number)

    def sees(self, key_id: str, thread_id: str) -> bool:
        """What one may not use one does not see, either."""
        return all(policy.allows_key(key_id, thread_id) for policy in self.policies)

    def spend(self, count: int) -> tuple[int, RateLimited | None]:
        """(how many of `count` operations may be done, the error for the others)."""
        allowed, error = count, None
        for policy in self.policies:
            if policy.per_second and self._meter is not None:
                granted = self._meter.spend(policy.number, allowed, policy.per_second)
                if granted < allowed:
                    told = _who(policy, f"may do {policy.per_second} operations a second")
                    allowed, error = granted, RateLimited(told, entry=policy.number)
        return allowed, error


def rights_of(
    peer: Peer, policies: Sequence[Policy], meter: Meter | None = None, groups: Collection[int] | None = ()
) -> Rights | None:
    """None: no policy names this peer."""
    named = [policy for policy in policies if policy.names(peer, groups)]
    return Rights(named, meter) if named else None


def _who(policy: Policy, what: str) -> str:
    who = f"uid {policy.uid}" if policy.uid is not None else f"gid {policy.gid}"
    return f"{who} {what} (policies, entry {policy.number})"
