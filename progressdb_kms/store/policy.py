"""States of a DEK: which action leads from which to which, and why one that isn't enabled can't be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import KeyDisabled, KeyShredded

ENABLED = "enabled"
DISABLED = "disabled"
PENDING_DELETION = "pending_deletion"
SHREDDED = "shredded"

DAMAGED = "damaged"
"""In a list alone, of a row that is not as it was written: what it says counts for nothing."""

STATES = (ENABLED, DISABLED, PENDING_DELETION, SHREDDED)


class Transition(NamedTuple):
    """One row of the state machine: from which states an action leads to which."""

    sources: frozenset[str]
    target: str


# `enable` cancels a scheduled deletion. Each action may be repeated: a caller that lost the answer
# asks again.
TRANSITIONS: Mapping[str, Transition] = {
    "disable": Transition(frozenset((ENABLED, DISABLED)), DISABLED),
    "enable": Transition(frozenset((ENABLED, DISABLED, PENDING_DELETION)), ENABLED),
    "schedule_deletion": Transition(frozenset((ENABLED, DISABLED, PENDING_DELETION)), PENDING_DELETION),
    "shred": Transition(frozenset(STATES), SHREDDED),
}


def need_enabled(key_id: str, state: str) -> None:
    """Raises KeyDisabled, KeyShredded: why a DEK in this state can't be used."""
    if state == DISABLED:
        raise KeyDisabled(f"the key {key_id} is disabled", hint="enable it first")
    if state == PENDING_DELETION:
        raise KeyDisabled(f"the key {key_id} is scheduled for deletion", hint="`enable` cancels that")
    if state != ENABLED:
        raise KeyShredded(
            f"the key {key_id} was shredded: what was encrypted under it can't be read any more"
        )
