"""`policy test`: what the rules of a configuration say to a call, without a daemon."""

from __future__ import annotations

import argparse

from ..config.options import Settings
from ..encoding import new_key_id
from ..errors import PeerRefused
from ..rules import CALLED, OPERATIONS, Peer, Policy, Rights, rights_of
from ..wire.routes import ROUTES
from .console import UsageError, show

NOBODY = 2**32 - 1
"""A gid that no process has: so a policy that names a gid is not meant, unless --gid is given."""


def test(args: argparse.Namespace, settings: Settings) -> int:
    """0: allowed, 1: refused. Raises UsageError."""
    op = operation(args.op)
    if op is None:
        raise UsageError(f"{args.op[:40]!r} is no operation (known: {', '.join(sorted(OPERATIONS))})")
    peer = Peer(args.uid, NOBODY if args.gid is None else args.gid, 0)
    policies = [Policy.of(number, entry) for number, entry in enumerate(settings.policies, 1)]
    named = [policy.number for policy in policies if policy.names(peer)]
    try:
        every = _ask(args, settings, peer, op, policies)
    except PeerRefused as error:
        show({"allowed": False, "why": error.message, "entries": named}, args.json)
        return 1
    why = "every policy that names this peer allows it" if named else "no policy names this peer"
    if not every:
        why += ", for the keys and threads that it names (--key-id and --thread-id ask about one)"
    show({"allowed": True, "why": why, "entries": named}, args.json)
    return 0


def operation(text: str) -> str | None:
    """As the audit log names it; a command, a route of the API or its operationId is as good."""
    routed = {route.op for route in ROUTES if text in (route.path, f"{route.method} {route.path}")}
    word = routed.pop() if len(routed) == 1 else text.lower().replace("-", "_").replace(" ", "_")
    op = CALLED.get(word, word)
    return op if op in OPERATIONS else None


def _ask(args: argparse.Namespace, settings: Settings, peer: Peer, op: str, policies: list[Policy]) -> bool:
    """True: for every DEK that was asked about; False: none was, and a policy names some."""
    settings.peer_rules.check(peer, False)
    rights = rights_of(peer, policies)
    if rights is not None:
        rights.check_operation(op)
    if any(route.admin for route in ROUTES if route.op == op):
        settings.peer_rules.check(peer, True)
    if rights is None:
        return True
    key_id, thread_id = args.key_id, args.thread_id
    if op == "create_dek" and (key_id, thread_id) != (None, None):  # as the daemon names them then
        key_id, thread_id = key_id or new_key_id(0, bytes(10)), thread_id or key_id or ""
    known = [_of_the_known(policy, key_id, thread_id) for policy in rights.policies]
    Rights(known).check_key(key_id or "", thread_id)
    open_ones = [policy for policy, rest in zip(rights.policies, known) if rest != policy]
    if open_ones and (key_id, thread_id) != (None, None):
        option, what = ("--key-id", "keys") if key_id is None else ("--thread-id", "threads")
        raise UsageError(f"entry {open_ones[0].number} of policies names {what}: give {option} too")
    return not open_ones or op in _WITHOUT_DEK


_WITHOUT_DEK = ("rotate_kek", "accept_clock")


def _of_the_known(policy: Policy, key_id: str | None, thread_id: str | None) -> Policy:
    """What can be said of it before the key_id, or the thread, is known."""
    keys, threads = (() if key_id is None else policy.keys, () if thread_id is None else policy.threads)
    return policy._replace(keys=keys, threads=threads)
