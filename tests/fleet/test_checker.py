"""The checker of histories: what it must find, in histories of a few calls that are made by hand; and what it
must let pass, since nobody can tell."""

from __future__ import annotations

import random

import pytest

from tests.fleet.checker import ABSENT, DISABLED, ENABLED, OTHER, SHREDDED, Op, check

CREATE = Op("k", 0, 1, ENABLED, writes=True)


def makes(state: str, sent: float, answered: float, known: bool = True) -> Op:
    return Op("k", sent, answered, state, writes=True, known=known)


def finds(state: str, sent: float, answered: float) -> Op:
    return Op("k", sent, answered, state)


BAD = {
    "it is lost": [CREATE, finds(ABSENT, 2, 3)],
    "it is lost, long after": [CREATE, finds(ENABLED, 2, 3), makes(DISABLED, 4, 5), finds(ABSENT, 9, 10)],
    "it is another": [CREATE, finds(OTHER, 2, 3)],
    "it was never made": [finds(ENABLED, 2, 3)],
    "it is used before it is asked for": [makes(ENABLED, 5, 6), finds(ENABLED, 2, 3)],
    "stale: used after it was disabled": [CREATE, makes(DISABLED, 2, 3), finds(ENABLED, 4, 5)],
    "stale: refused after it was enabled": [
        CREATE,
        makes(DISABLED, 2, 3),
        makes(ENABLED, 4, 5),
        finds(DISABLED, 6, 7),
    ],
    "an enable that came before the disable is no excuse": [
        CREATE,
        makes(ENABLED, 2, 3),
        makes(DISABLED, 4, 5),
        finds(ENABLED, 6, 7),
    ],
    "what nobody acknowledged was seen, and is gone": [
        CREATE,
        makes(DISABLED, 2, 3, known=False),
        finds(DISABLED, 4, 5),
        finds(ENABLED, 6, 7),
    ],
    "undead": [CREATE, makes(SHREDDED, 2, 3), finds(ENABLED, 4, 5)],
    "undead, by an enable that nobody acknowledged": [
        CREATE,
        makes(ENABLED, 1, 2, known=False),
        makes(SHREDDED, 3, 4),
        makes(ENABLED, 5, 6, known=False),
        finds(ENABLED, 7, 8),
    ],
    "an enable is acknowledged after the shred": [CREATE, makes(SHREDDED, 2, 3), makes(ENABLED, 4, 5)],
    "a shred that nobody acknowledged was seen": [
        CREATE,
        makes(SHREDDED, 2, 3, known=False),
        finds(SHREDDED, 4, 5),
        finds(ENABLED, 6, 7),
    ],
    "shredded, though nobody asked for it": [CREATE, finds(SHREDDED, 2, 3)],
    "shredded, and then it is absent": [CREATE, makes(SHREDDED, 2, 3), finds(ABSENT, 4, 5)],
}

GOOD = {
    "in order": [
        finds(ABSENT, -2, -1),
        CREATE,
        finds(ENABLED, 2, 3),
        makes(DISABLED, 4, 5),
        finds(DISABLED, 6, 7),
        makes(ENABLED, 8, 9),
        finds(ENABLED, 10, 11),
        makes(SHREDDED, 12, 13),
        finds(SHREDDED, 14, 15),
    ],
    "at the same time": [CREATE, makes(DISABLED, 2, 5), finds(ENABLED, 3, 4), finds(DISABLED, 3, 4)],
    "two changes at once": [
        CREATE,
        makes(DISABLED, 2, 5),
        makes(ENABLED, 3, 6),
        finds(DISABLED, 7, 8),
        finds(DISABLED, 9, 10),
    ],
    "it may have been made": [makes(ENABLED, 0, 1, known=False), finds(ENABLED, 2, 3)],
    "it may not have been made": [makes(ENABLED, 0, 1, known=False), finds(ABSENT, 2, 3)],
    "it is made late": [
        makes(ENABLED, 0, 1, known=False),
        finds(ABSENT, 2, 3),
        finds(ENABLED, 4, 5),
    ],
    "a change of which nobody heard takes place later": [
        CREATE,
        makes(DISABLED, 2, 3, known=False),
        finds(ENABLED, 4, 5),
        finds(DISABLED, 6, 7),
    ],
    "a shred of which nobody heard": [
        CREATE,
        makes(SHREDDED, 2, 3, known=False),
        makes(DISABLED, 4, 5),
        finds(SHREDDED, 6, 7),
    ],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history_is_found(name: str) -> None:
    for history in (BAD[name], BAD[name][::-1]):
        found = check([*history, Op("other", 0, 1, ENABLED, writes=True)])
        assert len(found) == 1 and "k " in found[0]


def test_what_was_seen_and_never_acknowledged_may_be_lost_where_an_engine_fails_over() -> None:
    names = {name for name, history in BAD.items() if not check(history, seen=False)}
    assert names == {
        "what nobody acknowledged was seen, and is gone",
        "a shred that nobody acknowledged was seen",
    }


@pytest.mark.parametrize("name", GOOD)
def test_a_good_history_passes(name: str) -> None:
    assert check(GOOD[name]) == check(GOOD[name][::-1]) == []


def test_nothing_is_found_in_what_did_happen_one_after_another() -> None:
    """Histories of a register that works: each call takes effect at a moment in its interval, or never where
    nobody was told. And each is found out once a read of it is turned round."""
    rng = random.Random(20)
    turned = 0
    for _ in range(300):
        history = _played(rng)
        assert check(history) == []
        reads = [n for n, op in enumerate(history) if not op.writes and op.state == ENABLED]
        if reads:
            n = rng.choice(reads)
            turned += bool(check([*history[:n], history[n]._replace(state=OTHER), *history[n + 1 :]]))
    assert turned > 100


def _played(rng: random.Random) -> list[Op]:
    moments = sorted(rng.uniform(0, 100) for _ in range(30))
    state, history = ABSENT, []
    for moment in moments:
        sent, answered = moment - rng.uniform(0, 10), moment + rng.uniform(0, 10)
        wanted = rng.choice((ENABLED, DISABLED, SHREDDED, "", "", "", ""))
        known, done = rng.random() < 0.8, rng.random() < 0.5
        if wanted == SHREDDED and rng.random() < 0.7:
            wanted = ""
        refused = state == SHREDDED and wanted != SHREDDED
        if not wanted or (known and refused):
            history.append(Op("k", sent, answered, state))
            continue
        history.append(Op("k", sent, answered, wanted, writes=True, known=known))
        if (known or done) and not refused:
            state = wanted
    return history
