"""What is served at once, what is work for a thread, and how that lets others in between."""

from __future__ import annotations

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
