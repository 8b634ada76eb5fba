"""A new KEK on its way to the keeper: it wraps the DEK of the request that brought it, or none."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from progressdb_kms.crypto.keyring import fingerprint
from tests.harness import Daemon
from tests.harness.procs import quickest
from tests.harness.wire import connect


def kek_id_of(key: bytes) -> str:
    return fingerprint(memoryview(bytearray(key)))


@pytest.mark.long
@pytest.mark.root
def test_a_stopped_keeper_and_two_rewraps() -> None:
    """The first caller gives up after 30 s, while its job waits; then a second one brings its own KEK."""
    with Daemon(workers=2) as daemon, daemon.session(60.0) as kms:
        keys = [kms.create_dek("t")["key_id"] for _ in range(2)]
        first, second = os.urandom(32), os.urandom(32)
        keeper = daemon.writer
        os.kill(keeper, signal.SIGSTOP)
        try:
            body = {"key_id": keys[0], "new_kek_hex": first.hex()}
            refused = kms.request("POST", "/rewrap", body)
            assert refused.status == 503
            body = {"key_id": keys[1], "new_kek_hex": second.hex()}
            answers: list[int] = []

            def send() -> None:
                answers.append(kms.request("POST", "/rewrap", body).status)

            done = threading.Thread(target=send)
            done.start()
            time.sleep(1.0)
        finally:
            os.kill(keeper, signal.SIGCONT)
        done.join(40)
        assert answers == [200]
        assert daemon.ok("GET", f"/deks/{keys[1]}")["kek_id"] == kek_id_of(second)
        before = daemon.ok("GET", "/status")["kek_id"]
        assert daemon.ok("GET", f"/deks/{keys[0]}")["kek_id"] in (before, kek_id_of(first))


@pytest.mark.root
def test_a_hanging_keeper_with_a_full_queue_is_told_in_time() -> None:
    """400 creates that nobody takes fill the queue; health checks must not wait behind them."""
    create = b'{"thread_id":"%b"}' % (b"t" * 500)
    head = b"POST /deks HTTP/1.1\r\nHost: u\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with Daemon(workers=2) as daemon, contextlib.ExitStack() as open_:
        keeper = daemon.writer
        os.kill(keeper, signal.SIGSTOP)
        open_.callback(os.kill, keeper, signal.SIGCONT)
        for _ in range(400):
            open_.enter_context(connect(daemon.socket)).sendall(head % len(create) + create)
        time.sleep(1.0)
        with ThreadPoolExecutor() as pool:
            waited = [
                pool.submit(quickest, 3, 9.0, functools.partial(told_of_the_keeper, daemon, path))
                for path in ("/readyz", "/status", "/metrics")
            ]
        assert [one.result() < 9 for one in waited] == [True] * 3


def told_of_the_keeper(daemon: Daemon, path: str) -> None:
    with daemon.session(20.0) as kms:
        reply = kms.request("GET", path)
        assert kms.request("GET", "/healthz").status == 200
    assert path == "/metrics" or (reply.status == 503 and b"keeper process" in reply.body)
