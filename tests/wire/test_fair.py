"""The order in which several UIDs are served."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from progressdb_kms.wire.fair import KNOWN, Fair
from tests.harness import Daemon, procs
from tests.harness.attack import length, post
from tests.harness.wire import b64, connect

from .test_peers import as_user, serving

LIGHT, HEAVY = 12_001, 12_002


def of(uid: int, turn: int = 0) -> Any:
    return SimpleNamespace(peer=SimpleNamespace(uid=uid), turn=turn)


def uids(fair: Fair, *asked: int) -> list[int]:
    return [one.peer.uid for one in fair.order([of(uid) for uid in asked])]


def test_whoever_took_least_comes_first() -> None:
    fair = Fair()
    for uid, seconds in ((1, 0.003), (2, 0.001), (3, 0.002)):
        fair.took(uid, seconds)
    assert uids(fair, 1, 2, 3, 4) == [4, 2, 3, 1]
    fair.took(2, 0.005)
    assert uids(fair, 1, 2, 3, 4) == [4, 3, 1, 2]


def test_of_one_uid_whoever_waits_longest() -> None:
    one, two, three = of(1, turn=7), of(1, turn=5), of(1, turn=6)
    assert Fair().order([one, two, three]) == [two, three, one]


def test_as_they_came_where_nobody_took_anything() -> None:
    assert uids(Fair(), 3, 1, 2) == [3, 1, 2]


def test_whoever_was_away_has_saved_nothing() -> None:
    """It comes first once, and is one of several from then on."""
    fair = Fair()
    for _ in range(1000):
        fair.took(1, 0.001)
    assert uids(fair, 1, 2) == [2, 1]
    fair.took(2, 0.0015)
    assert uids(fair, 1, 2) == [1, 2]


def test_two_that_take_alike_take_turns_beside_one_that_takes_much() -> None:
    fair, cost, served = Fair(), {1: 0.001, 2: 0.001, 3: 0.01}, []
    for _ in range(120):
        uid = uids(fair, 1, 2, 3)[0]
        served.append(uid)
        fair.took(uid, cost[uid])
    shares = [served.count(uid) * cost[uid] for uid in cost]
    assert max(shares) - min(shares) <= 0.01


def test_so_many_uids_are_told_from_each_other() -> None:
    fair = Fair()
    for uid in range(3 * KNOWN):
        fair.took(uid, 1.0)
    assert len(fair._marks) <= KNOWN
    assert uids(fair, 3 * KNOWN - 1, 3 * KNOWN) == [3 * KNOWN, 3 * KNOWN - 1]


@contextlib.contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    pids = daemon.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        procs.wait_until(lambda: all(procs.status(pid, "State")[:1] == "T" for pid in pids), 60, "a stop")
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def answered(sock: socket.socket) -> None:
    answer = sock.recv(1 << 16)
    while len(answer) < length(answer):
        answer += sock.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 200 ")


def order_of(daemon: Daemon, uids: int) -> list[int]:
    """Of the last so many calls, as they were recorded."""
    events = [json.loads(line)["event"] for line in daemon.audit_log.read_text().splitlines()]
    return [event["uid"] for event in events if event["op"].startswith("encrypt")][-uids:]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can connect as another user")
def test_one_message_comes_before_the_pages_of_another_uid_that_came_before_it() -> None:
    """It was the last of them all. A machine that stood still meanwhile may spoil some rounds."""
    with serving(allowed_peer_uids=[0, LIGHT, HEAVY]) as daemon, contextlib.ExitStack() as open_sockets:
        key_id = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        item = {"key_id": key_id, "plaintext": b64(b"x" * 30)}
        with as_user(HEAVY):
            pages = [open_sockets.enter_context(connect(daemon.socket)) for _ in range(8)]
        with as_user(LIGHT):
            light = open_sockets.enter_context(connect(daemon.socket))
        page = post(b"encrypt_batch", json.dumps({"items": [item] * 100}).encode())
        rounds = [*((sock, page) for sock in pages), (light, post(b"encrypt", json.dumps(item).encode()))]
        places = []
        for _ in range(15):
            with stopped(daemon):
                for sock, request in rounds:
                    sock.sendall(request)
            for sock, _ in rounds:
                answered(sock)
            uids = order_of(daemon, len(rounds))
            assert sorted(uids) == [LIGHT] + [HEAVY] * len(pages)
            places.append(uids.index(LIGHT))
        assert sorted(places)[len(places) // 2] <= 1, places
