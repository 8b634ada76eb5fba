"""What is served at once, what is work for a thread, and how that lets others in between."""

from __future__ import annotations

import time

import pytest

from progressdb_kms.wire import lanes
from progressdb_kms.wire.lanes import breathe
from tests.conftest import MakeDaemon
from tests.harness import Daemon
from tests.harness.procs import threads
from tests.harness.wire import b64


def started_for(daemon: Daemon, count: int, data: str) -> set[int]:
    """The threads that came with a batch of so many items."""
    before = {tid for pid in daemon.pids() for tid in threads(pid)}
    daemon.ok("POST", "/decrypt_batch", {"items": [{"key_id": "k", "ciphertext": data}] * count})
    return {tid for pid in daemon.pids() for tid in threads(pid)} - before


def test_a_page_of_chat_is_served_at_once(make_daemon: MakeDaemon) -> None:
    """100 messages of 200 bytes, or 128 of none, need no thread; what is longer, or more, does."""
    daemon = make_daemon(workers=1)
    message = b64(bytes(228))
    assert not started_for(daemon, 100, message)
    assert not started_for(daemon, 128, "")
    assert started_for(daemon, 129, "")
    assert not started_for(daemon, 800, message)  # it is there
    assert started_for(make_daemon(workers=1), 800, message)


class TestBreath:
    def test_it_is_none_where_the_waiter_has_nothing_to_do(self) -> None:
        asked: list[int] = []
        breathe(lambda: bool(asked.append(1)))
        assert asked == [1]

    def test_it_lasts_as_long_as_the_waiter_is_at_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lanes, "REST", 60.0)
        left = [True, True, True]
        breathe(lambda: bool(left) and left.pop())
        assert not left

    def test_it_ends_though_the_waiter_never_rests(self) -> None:
        begun = time.monotonic()
        breathe(lambda: True)
        assert time.monotonic() >= begun + lanes.REST
