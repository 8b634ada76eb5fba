"""Policies: each narrows, all that name a peer must allow, and a pattern stands for what it shows."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.errors import PeerRefused
from progressdb_kms.rules import BATCHES, OPERATIONS, TCP, Peer, Policy, Rights, pattern
from progressdb_kms.wire.routes import ROUTES

PEER = Peer(20002, 100, 1)


def policies(*entries: dict[str, Any], peer: Peer = PEER) -> Rights:
    found = [Policy.of(number, entry) for number, entry in enumerate(entries, 1)]
    return Rights([policy for policy in found if policy.names(peer)])


def operation(found: Rights, op: str) -> str:
    """The entry that refuses, or ""."""
    try:
        found.check_operation(op)
    except PeerRefused as error:
        assert (error.status, error.code) == (403, "policy_refused")
        return error.message.rpartition("entry ")[2].rstrip(")")
    return ""


def key(found: Rights, key_id: str, thread_id: str | None) -> str:
    try:
        found.check_key(key_id, thread_id)
    except PeerRefused as error:
        return error.message.rpartition("entry ")[2].rstrip(")")
    return ""


def test_the_operations_are_those_of_the_routes() -> None:
    assert {BATCHES.get(route.op, route.op) for route in ROUTES if route.op} == OPERATIONS


def test_without_a_policy_nothing_is_refused() -> None:
    for found in (policies(), policies({"uid": 1, "operations": ["encrypt"]})):
        assert operation(found, "rotate_kek") == key(found, "k", None) == ""
        assert found.sees("k", "t")


def test_operations() -> None:
    found = policies({"uid": 20002, "operations": ["encrypt", "list_deks"]})
    assert (
        operation(found, "encrypt")
        == operation(found, "encrypt_batch")
        == operation(found, "list_deks")
        == ""
    )
    assert (
        operation(found, "decrypt") == operation(found, "decrypt_batch") == operation(found, "unwrap") == "1"
    )


def test_a_gid_is_named_too() -> None:
    found = policies({"gid": 100, "operations": ["encrypt"]}, {"gid": 7, "operations": ["decrypt"]})
    assert operation(found, "encrypt") == "" and operation(found, "decrypt") == "1"


def test_over_tcp_nobody_gets_around_a_gids_policy() -> None:
    """Which groups a peer has is not known there."""
    policy = Policy.of(1, {"gid": 7, "operations": ["decrypt"]})
    assert policy.names(Peer(20002, via=TCP)) and not policy.names(Peer(20002, 100, 1))
    assert not Policy.of(1, {"uid": 7}).names(Peer(20002, via=TCP))


def test_all_that_name_a_peer_must_allow() -> None:
    found = policies(
        {"uid": 1, "operations": ["unwrap"]},
        {"uid": 20002, "operations": ["encrypt", "decrypt"]},
        {"gid": 100, "threads": ["room-*"]},
        {"uid": 20002, "keys": ["k_*"]},
    )
    assert operation(found, "decrypt") == "" and operation(found, "unwrap") == "2"
    assert key(found, "k_1", "room-1") == ""
    assert key(found, "k_1", "hall") == "3"
    assert key(found, "x_1", "room-1") == "4"
    assert key(found, "k_1", None) == "3"  # an inline blob of a DEK that the store doesn't know
    assert found.sees("k_1", "room-") and not found.sees("k_1", "aroom-1")


def test_patterns_say_nothing_of_calls_that_are_for_no_dek() -> None:
    found = policies({"uid": 20002, "keys": ["k_*"], "threads": ["room-*"]})
    assert operation(found, "rotate_kek") == operation(found, "accept_clock") == ""


@pytest.mark.parametrize(
    "text, fits, fails",
    [
        ("room-*", ["room-", "room-1", "room-\nx"], ["room", "xroom-1", "Room-1"]),
        ("*", ["", "anything"], []),
        ("a.c", ["a.c"], ["abc"]),
        ("[a]?", ["[a]?"], ["a", "a?"]),
        ("*-b-*", ["a-b-c", "-b-"], ["ab", "b"]),
    ],
)
def test_a_pattern(text: str, fits: list[str], fails: list[str]) -> None:
    assert [bool(pattern(text).fullmatch(value)) for value in fits + fails] == [True] * len(fits) + [
        False
    ] * len(fails)


@given(st.text(), st.text(), st.text())
def test_a_star_is_any_run_and_all_else_is_itself(before: str, middle: str, after: str) -> None:
    before, after = before.replace("*", "?"), after.replace("*", "?")
    assert pattern(f"{before}*{after}").fullmatch(before + middle + after)
    assert pattern(before).fullmatch(after) is None or before == after


@given(st.text("ab*", max_size=12), st.text("ab", max_size=12))
def test_stars_fit_as_if_every_way_was_tried(text: str, value: str) -> None:
    expected = re.fullmatch(text.replace("*", ".*"), value) is not None
    assert (pattern(text).fullmatch(value) is not None) == expected


def test_no_text_keeps_a_pattern_busy() -> None:
    """Trying every way would take longer than anybody lives."""
    worst = pattern("*a" * 250 + "*b")
    assert worst.fullmatch("a" * 512) is None and worst.fullmatch("a" * 511 + "b")


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1), st.sampled_from(sorted(OPERATIONS)))
def test_one_more_policy_never_gives_more(ops: list[str], op: str) -> None:
    one = {"uid": 20002, "operations": ["encrypt", "decrypt"]}
    if operation(policies(one), op):
        assert operation(policies(one, {"uid": 20002, "operations": ops}), op)
