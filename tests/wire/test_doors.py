"""Who of the workers lets a peer in, and what happens at a door where nobody can be."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from progressdb_kms.rules import Peer
from progressdb_kms.wire import doors
from progressdb_kms.wire.doors import CALM_YIELDS, YIELDS, Door, Doors, peer_of

FAR = 1e12
"""A time by which every door has rested."""


class Site:
    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(16)
        self.listener.setblocking(False)
        self.fd = self.listener.fileno()
        self.poll = select.epoll()
        self.let_in: list[Peer] = []
        self.others_have_fewer = False
        self.served = True
        self.doors = self.opened(self.listener)

    def opened(self, listener: Any) -> Doors:
        shares: Any = SimpleNamespace(others_have_fewer=lambda: self.others_have_fewer)
        return Doors([Door(listener, peer_of)], self.poll, self.greet, shares)

    def greet(self, door: Door, request: socket.socket) -> bool:
        with request:
            assert not request.getblocking()
            self.let_in.append(door.identify(request))
        return self.served

    def knock(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(60)
        sock.connect(self.path)
        return sock

    @property
    def listening(self) -> bool:
        return bool(self.poll.poll(0))


@pytest.fixture
def site(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(doors, "ENTERING_SECONDS", 600.0)
    made = Site(short_tmp / "s")
    yield made
    made.listener.close()


def test_all_who_wait_come_in(site: Site) -> None:
    with site.knock(), site.knock():
        assert site.listening and site.fd in site.doors and -1 not in site.doors
        site.doors.let_in(site.fd)
    assert len(site.let_in) == 2 and not site.doors.resting


def test_nobody_waits_until_all_are_in(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "ENTERING_SECONDS", -1.0)  # it takes too long at once
    with site.knock(), site.knock():
        site.doors.let_in(site.fd)
        assert len(site.let_in) == 1 and site.listening
        site.doors.let_in(site.fd)
        assert len(site.let_in) == 2
    with site.knock(), site.knock():
        site.doors.close()
    assert len(site.let_in) == 4


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_as_long_as_others_were_served_new_ones_come_in(
    site: Site, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """But not where somebody was refused not long ago: who comes again and again would take half of it."""
    monkeypatch.setattr(doors, "ENTERING_SECONDS", -1.0)
    monkeypatch.setattr(doors, "CALM_SECONDS", seconds)
    with site.knock(), site.knock():
        site.doors.let_in(site.fd, served=600.0)
    assert len(site.let_in) == 2
    site.served = False
    with site.knock():
        site.doors.let_in(site.fd, served=600.0)
    site.served = True
    site.let_in.clear()
    with site.knock(), site.knock():
        site.doors.let_in(site.fd, served=600.0)
        assert len(site.let_in) == (1 if seconds else 2)


@pytest.mark.parametrize("calm", [True, False], ids=["calm", "somebody was refused"])
def test_where_another_worker_has_fewer_it_may_be_the_first_for_some_moments(
    site: Site, monkeypatch: pytest.MonkeyPatch, calm: bool
) -> None:
    """Then all come in who are there, since that worker has much to do; or one, where some are refused."""
    monkeypatch.setattr(doors, "ENTERING_SECONDS", 600.0)
    if not calm:
        monkeypatch.setattr(doors, "CALM_SECONDS", 600.0)
        site.served = False
        with site.knock():
            site.doors.let_in(site.fd)
        site.let_in.clear()
    site.others_have_fewer = True

    def patience() -> int:
        for n in range(2 * YIELDS):
            site.doors.let_in(site.fd)
            if site.let_in:
                return n
            assert not site.listening and site.doors.resting
            site.doors.go_on(FAR)
            assert site.listening and not site.doors.resting
        raise AssertionError("nobody was let in")

    with site.knock(), site.knock(), site.knock():
        assert patience() == (CALM_YIELDS if calm else YIELDS)
        assert len(site.let_in) == (3 if calm else 1)
        site.doors.go_on(FAR)
        site.let_in.clear()
        if not calm:
            assert patience() == YIELDS - 1  # it was asked for once already, right behind the first


def test_a_door_rests_as_long_as_it_was_told(site: Site) -> None:
    site.others_have_fewer = True
    with site.knock():
        site.doors.let_in(site.fd)
        site.doors.go_on(0.0)
        assert not site.listening


def test_the_end_lets_in_who_was_there_and_nobody_after(site: Site) -> None:
    site.others_have_fewer = True
    with site.knock(), site.knock():
        site.doors.let_in(site.fd)  # which rests, then
        site.doors.close()
        assert len(site.let_in) == 2
    with site.knock():
        assert not site.listening


def test_a_door_that_leads_elsewhere_is_listened_at_again(site: Site) -> None:
    """Its name was taken away: another socket stands under this descriptor, which epoll knows nothing of."""
    with socket.socket(socket.AF_UNIX) as other:
        site.path += "2"
        other.bind(site.path)
        other.listen(1)
        other.setblocking(False)
        os.dup2(other.fileno(), site.fd)
    with site.knock():
        site.doors.renew(site.listener)
        site.doors.go_on(time.monotonic())
        assert site.listening
        site.doors.let_in(site.fd)
    assert len(site.let_in) == 1


class Out:
    """A listener of a process that has no descriptor left but the one in reserve."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.tries = 0

    def fileno(self) -> int:
        return self.listener.fileno()

    def accept(self) -> Any:
        self.tries += 1
        if self.tries % 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return self.listener.accept()


def test_without_a_descriptor_one_hears_why(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.poll.unregister(site.fd)
    made = site.opened(Out(site.listener))
    with contextlib.ExitStack() as stack, caplog.at_level(logging.ERROR):
        waiting = [stack.enter_context(site.knock()) for _ in range(2)]
        for sock in waiting:
            made.let_in(site.fd)
            assert made.resting and site.let_in == []
            made.go_on(FAR)
            answer = sock.recv(4096)
            assert answer.startswith(b"HTTP/1.1 503 ") and b"Connection: close\r\n" in answer
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert "no descriptor is left" in error["message"]
    assert caplog.text.count("no connection can be accepted") == 1  # in a minute
    assert doors.TELL_SECONDS == 60.0


@pytest.mark.parametrize("rested", [True, False])
def test_the_end_comes_without_a_descriptor_too(site: Site, rested: bool) -> None:
    """Also while the door rests, as it does then most of the time."""
    site.poll.unregister(site.fd)
    made = site.opened(Out(site.listener))
    with site.knock() as first, site.knock() as second:
        if rested:
            made.let_in(site.fd)
            assert made.resting
        made.close()
        assert not made.resting and first.recv(4096).startswith(b"HTTP/1.1 503 ")
        assert not site.listening
        second.close()


def test_to_listen_again_takes_no_memory_of_the_kernels(site: Site) -> None:
    """Where there was none, it ended the thread that serves all."""
    site.doors._poll = SimpleNamespace(modify=site.poll.modify)  # no `register`
    site.others_have_fewer = True
    with site.knock():
        site.doors.let_in(site.fd)
        assert site.fd in site.doors.resting and not site.listening
        site.doors.go_on(FAR)
        assert not site.doors.resting and site.listening
