"""`policy test`: what the rules of a configuration say to a call, without a daemon."""

from __future__ import annotations

import argparse

from ..config.options import Settings
from ..errors import PeerRefused
from ..rules import CALLED, OPERATIONS, Peer, Policy, rights_of
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
        _ask(args, settings, peer, op, policies)
    except PeerRefused as error:
        show({"allowed": False, "why": error.message, "entries": named}, args.json)
        return 1
    why = "every policy that names this peer allows it" if named else "no policy names this peer"
    show({"allowed": True, "why": why, "entries": named}, args.json)
    return 0


def operation(text: str) -> str | None:
    """As the audit log names it; a command, a route of the API or its operationId is as good."""
    routed = {route.op for route in ROUTES if text in (route.path, f"{route.method} {route.path}")}
    word = routed.pop() if len(routed) == 1 else text.lower().replace("-", "_").replace(" ", "_")
    op = CALLED.get(word, word)
    return op if op in OPERATIONS else None


def _ask(args: argparse.Namespace, settings: Settings, peer: Peer, op: str, policies: list[Policy]) -> None:
    settings.peer_rules.check(peer, False)
    if any(route.admin for route in ROUTES if route.op == op):
        settings.peer_rules.check(peer, True)
    rights = rights_of(peer, policies)
    if rights is not None:
        rights.check_operation(op)
        if args.key_id is not None or args.thread_id is not None:
            rights.check_key(args.key_id or "", args.thread_id)
