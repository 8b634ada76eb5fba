"""The state machine of a DEK and the peer rules: each row of the tables, from each state."""

from __future__ import annotations

import contextlib

import pytest

from progressdb_kms.errors import KMSError, PeerRefused
from progressdb_kms.rules import Peer, PeerRules
from progressdb_kms.store.policy import STATES, TRANSITIONS, need_enabled

ALLOWED = {
    "disable": {"enabled": "disabled", "disabled": "disabled"},
    "enable": {"enabled": "enabled", "disabled": "enabled", "pending_deletion": "enabled"},
    "schedule_deletion": dict.fromkeys(("enabled", "disabled", "pending_deletion"), "pending_deletion"),
    "shred": dict.fromkeys(STATES, "shredded"),
}


@pytest.mark.parametrize("action", TRANSITIONS)
@pytest.mark.parametrize("state", STATES)
def test_transitions(action: str, state: str) -> None:
    row = TRANSITIONS[action]
    assert (row.target if state in row.sources else None) == ALLOWED[action].get(state)


@pytest.mark.parametrize(
    ("state", "status"), [("enabled", None), ("disabled", 423), ("pending_deletion", 423), ("shredded", 410)]
)
def test_use(state: str, status: int | None) -> None:
    with contextlib.nullcontext() if status is None else pytest.raises(KMSError, match="k_1") as caught:
        need_enabled("k_1", state)
    assert (caught.value.status if caught else None) == status


@pytest.mark.parametrize(
    ("callers", "admins", "uid", "may_call", "may_administer"),
    [
        (None, None, 7, True, True),
        ([7], None, 7, True, True),
        ([7], None, 8, False, False),
        ([], None, 0, False, False),
        (None, [9], 7, True, False),
        (None, [9], 9, True, True),
        ([7], [9], 7, True, False),
        ([7], [9], 9, True, True),
        ([7], [9], 0, False, False),
        (None, [], 0, True, False),
    ],
)
def test_peers(
    callers: list[int] | None, admins: list[int] | None, uid: int, may_call: bool, may_administer: bool
) -> None:
    rules = PeerRules(
        None if callers is None else frozenset(callers), None if admins is None else frozenset(admins)
    )
    for admin, may in ((False, may_call), (True, may_administer)):
        try:
            rules.check(Peer(uid, 1, 2), admin)
        except PeerRefused as error:
            assert not may and str(uid) in error.message
        else:
            assert may
