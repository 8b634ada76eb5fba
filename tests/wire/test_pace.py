"""Whoever sends or takes much rests while another UID asks for little."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from progressdb_kms.service.metrics import Metrics
from progressdb_kms.wire import pace
from progressdb_kms.wire.pace import Pace
from progressdb_kms.wire.receiving import TURN
from progressdb_kms.wire.server import Server
from tests.harness import Daemon
from tests.harness.attack import post
from tests.harness.procs import as_user, wait_until
from tests.harness.wire import b64, connect

from .test_fair import answered
from .test_peers import serving
from .test_turns import connection, of_two_uids

LIGHT, HEAVY, OTHER = 12_001, 12_002, 12_003


class Worker:
    """What a pace needs of one."""

    def __init__(self, metrics: Metrics, index: int) -> None:
        self.block = metrics.block(index)
        self.pace = Pace(metrics, self.block)
        self.ours, theirs = socket.socketpair()
        self.pace.slow.register(theirs.fileno(), select.POLLIN)
        self.ours.send(b"so that its set is ready")
        self.theirs = theirs

    def hears(self, *uids: int) -> None:
        """Short requests of these, and of nobody else."""
        self.pace.came = dict.fromkeys(uids, 100.0)
        self.pace.look(100.0)

    def is_told(self) -> bool:
        return self.pace.fd in [fd for fd, _ in self.pace.poll.poll(0.0)]

    def close(self) -> None:
        for one in (self.pace.poll, self.pace.slow, self.ours, self.theirs):
            one.close()


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    metrics = Metrics(2)
    made = [Worker(metrics, 0), Worker(metrics, 1)]
    yield made
    for worker in made:
        worker.close()


class TestWhoIsDisturbed:
    def test_nobody_where_nobody_asks(self, workers: list[Worker]) -> None:
        workers[0].hears()
        assert not workers[0].pace.disturbs(HEAVY)

    def test_one_does_not_disturb_oneself(self, workers: list[Worker]) -> None:
        workers[0].hears(HEAVY)
        assert not workers[0].pace.disturbs(HEAVY)
        assert workers[0].pace.disturbs(OTHER)

    def test_who_asks_for_little_in_another_worker(self, workers: list[Worker]) -> None:
        here, there = workers
        there.hears(LIGHT)
        here.hears()
        assert here.pace.disturbs(HEAVY)
        assert not here.pace.disturbs(LIGHT)
        there.hears()
        here.hears()
        assert not here.pace.disturbs(HEAVY)

    def test_of_several_each_is_disturbed_by_each(self, workers: list[Worker]) -> None:
        workers[0].hears(LIGHT, HEAVY)
        assert workers[0].pace.disturbs(HEAVY)
        assert workers[0].pace.disturbs(LIGHT)

    def test_root_is_somebody(self, workers: list[Worker]) -> None:
        workers[0].hears(0)
        assert workers[0].pace.disturbs(HEAVY)
        assert not workers[0].pace.disturbs(0)

    def test_for_a_second_also_where_the_connection_is_gone(self, workers: list[Worker]) -> None:
        workers[0].pace.came[LIGHT] = 100.0
        workers[0].pace.look(100.9)
        assert workers[0].pace.disturbs(HEAVY)
        workers[0].pace.look(101.1)
        assert not workers[0].pace.disturbs(HEAVY)

    def test_a_dead_worker_serves_nobody(self, workers: list[Worker]) -> None:
        here, there = workers
        there.hears(LIGHT)
        there.block.clear()
        here.hears()
        assert not here.pace.disturbs(HEAVY)


class TestRest:
    def test_a_set_that_rests_wakes_nobody(
        self, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pace, "LONGEST", 3600.0)
        worker = workers[0]
        assert worker.is_told()
        worker.pace.rest(60.0)
        assert not worker.is_told()
        assert 100.0 < worker.pace.left(3600.0) <= 180.0
        assert worker.pace.left(1.0) == 1.0
        assert not worker.is_told()

    def test_and_its_rest_has_an_end(self, workers: list[Worker]) -> None:
        worker = workers[0]
        worker.pace.rest(0.0)
        wait_until(lambda: worker.pace.left(5.0) == 5.0, 60, "the end of a rest")
        assert worker.is_told()

    def test_none_is_longer_than_that(self, workers: list[Worker]) -> None:
        workers[0].pace.rest(3600.0)
        assert workers[0].pace.left(3600.0) <= pace.LONGEST or workers[0].is_told()


class TestBreath:
    def test_it_is_none_where_the_waiter_has_nothing_to_do(self, workers: list[Worker]) -> None:
        asked: list[int] = []
        workers[0].pace.breath(HEAVY, lambda: bool(asked.append(1)))()
        assert asked == [1]

    def test_it_lasts_as_long_as_the_waiter_is_at_work(
        self, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pace, "BREATH", 60.0)
        left = [True, True, True]
        workers[0].pace.breath(HEAVY, lambda: bool(left) and left.pop())()
        assert not left

    def test_it_ends_though_the_waiter_never_rests(self, workers: list[Worker]) -> None:
        begun = time.monotonic()
        workers[0].pace.breath(HEAVY, lambda: True)()
        assert time.monotonic() >= begun + pace.BREATH

    @pytest.mark.parametrize(("uid", "sleeps"), [(HEAVY, [0.03, pace.LONGEST]), (LIGHT, [])])
    def test_it_is_a_rest_where_others_ask_for_little(
        self, workers: list[Worker], monkeypatch: pytest.MonkeyPatch, uid: int, sleeps: list[float]
    ) -> None:
        workers[0].hears(LIGHT)
        slept: list[float] = []
        now = [100.0]
        clock = SimpleNamespace(monotonic=lambda: now[0], sleep=slept.append)
        monkeypatch.setattr(pace, "time", clock)
        monkeypatch.setattr(pace, "LONGEST", max(sleeps, default=1.0))
        breathe = workers[0].pace.breath(uid, lambda: False)
        for took in (0.01, 3600.0):
            now[0] += took
            breathe()
        assert slept == pytest.approx([min(0.03, pace.LONGEST), pace.LONGEST] if sleeps else [])


# ---- the waiter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("disturbs", [True, False])
def test_one_of_those_that_disturb_others_has_its_turn(
    monkeypatch: pytest.MonkeyPatch, disturbs: bool
) -> None:
    fake, served = of_two_uids(monkeypatch, {HEAVY: TURN * 0.4})
    fake._pace.disturbs.return_value = disturbs
    Server._serve_slow(fake, [connection(str(number), uid=HEAVY) for number in range(9)])
    assert served == ["0", "1", "2"][: 1 if disturbs else 3]
    rests = [call.args[0] for call in fake._pace.rest.call_args_list]
    assert rests == ([pytest.approx(0.4 * TURN)] if disturbs else [])


@contextlib.contextmanager
def two_users() -> Iterator[tuple[Daemon, str]]:
    """A daemon that serves them, and a DEK of it."""
    with serving(allowed_peer_uids=[0, LIGHT, HEAVY]) as daemon:
        yield daemon, daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]


def sets(daemon: Daemon) -> tuple[int, bool]:
    """(connections in the set of the long ones, does the worker wait for that set)"""
    for pid in daemon.pids():
        polls = []
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it is closed by now
                polls += [int(fd.name)] * (os.readlink(fd) == "anon_inode:[eventpoll]")
        if len(polls) == 2:
            first, second = sorted(polls)
            return len(watched(pid, second)), second in watched(pid, first)
    raise AssertionError("no worker has two sets")


def watched(pid: int, fd: int) -> set[int]:
    """What this set waits for: a set that rests is still in the other, with no events."""
    lines = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
    found = [line.split() for line in lines if line.startswith("tfd:")]
    return {int(tfd) for _, tfd, _, events, *_ in found if int(events, 16) & (select.POLLIN | select.POLLOUT)}


def long_ones(daemon: Daemon) -> int:
    count, _ = sets(daemon)
    return count


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root sees what another process waits for")


@as_root
class TestTheSetOfTheLongOnes:
    """A connection is in it as long as its body comes or its answer goes."""

    def test_a_long_body(self) -> None:
        with two_users() as (daemon, key_id), connect(daemon.socket) as sock:
            body = json.dumps({"key_id": key_id, "plaintext": b64(bytes(300_000))}).encode()
            request = post(b"encrypt", body)
            for _ in range(2):
                sock.sendall(request[:150_000])
                wait_until(lambda: long_ones(daemon) == 1, 60, "a long body")
                sock.sendall(request[150_000:])
                answered(sock)
                assert daemon.healthy()
                wait_until(lambda: long_ones(daemon) == 0, 60, "an end of it")

    def test_a_long_body_behind_another_request(self) -> None:
        with two_users() as (daemon, key_id), connect(daemon.socket) as sock:
            body = json.dumps({"key_id": key_id, "plaintext": b64(bytes(300_000))}).encode()
            request = b"GET /readyz HTTP/1.1\r\nHost: unix\r\n\r\n" + post(b"encrypt", body)
            sock.sendall(request[:1000])
            answered(sock)
            sock.sendall(request[1000:150_000])
            wait_until(lambda: long_ones(daemon) == 1, 60, "a long body")
            sock.sendall(request[150_000:])
            answered(sock)
            wait_until(lambda: long_ones(daemon) == 0, 60, "an end of it")

    def test_a_short_one_that_comes_in_pieces_is_none(self) -> None:
        with two_users() as (daemon, key_id), connect(daemon.socket) as sock:
            request = post(b"encrypt", json.dumps({"key_id": key_id, "plaintext": b64(bytes(3000))}).encode())
            sock.sendall(request[:2000])
            wait_until(lambda: daemon.healthy(), 60, "another one's turn")
            assert long_ones(daemon) == 0
            sock.sendall(request[2000:])
            answered(sock)

    def test_a_long_answer(self) -> None:
        with two_users() as (daemon, key_id), connect(daemon.socket) as sock:
            item = {"key_id": key_id, "plaintext": b64(bytes(1500))}
            sock.sendall(post(b"encrypt_batch", json.dumps({"items": [item] * 1000}).encode()))
            wait_until(lambda: long_ones(daemon) == 1, 60, "a long answer")
            answered(sock)
            wait_until(lambda: long_ones(daemon) == 0, 60, "an end of it")

    def test_what_is_sent_to_nobody(self) -> None:
        def is_long() -> bool:
            with connect(daemon.socket) as sock:
                sock.sendall(post(b"encrypt", bytes(9 << 20))[:70_000])
                return sock.recv(4096).startswith(b"HTTP/1.1 413 ") and long_ones(daemon) == 1

        with two_users() as (daemon, _):
            wait_until(is_long, 60, "what is sent behind the last word to be long")
            wait_until(lambda: long_ones(daemon) == 0, 60, "its end")


@contextlib.contextmanager
def asking(daemon: Daemon, uid: int, request: bytes) -> Iterator[None]:
    """One request after another."""
    over = threading.Event()
    with as_user(uid):
        sock = connect(daemon.socket, 60)

    def ask() -> None:
        while not over.is_set():
            sock.sendall(request)
            answered(sock)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        sock.close()


@as_root
def test_it_rests_while_another_uid_asks_for_little() -> None:
    def rests() -> bool:
        _, waited_for = sets(daemon)
        return not waited_for

    def never_rests() -> bool:
        """For longer than a short request is remembered: root's, which made the DEK, was one."""
        until = time.monotonic() + 1.5 * pace.RECENT
        while time.monotonic() < until:
            if rests():
                return False
        return True

    with two_users() as (daemon, key_id):
        item = {"key_id": key_id, "plaintext": b64(b"x" * 1500)}
        little = post(b"encrypt", json.dumps(item).encode())
        much = post(b"encrypt_batch", json.dumps({"items": [item] * 1000}).encode())
        with asking(daemon, HEAVY, much):
            wait_until(never_rests, 60, "the end of root's second")
            with asking(daemon, HEAVY, little):  # oneself is nobody else
                assert never_rests()
            with asking(daemon, LIGHT, little):
                wait_until(rests, 60, "a rest")
        wait_until(lambda: not rests(), 60, "its end")
