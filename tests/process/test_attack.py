"""All attacks that stopped the service once, from several users at a time: what an allowed caller notices.

The figures are printed (`bin/test --long tests/process/test_attack.py -s`). Held is what a loaded machine
can't spoil: answers come, memory stays, and goes back.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import pytest

from tests.harness import REPO, Daemon
from tests.harness.procs import rss_kib, wait_until

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can connect as another user"),
]

CALLER, BATCHES, PAGES, STRANGER = 12_001, 12_002, 12_003, 12_004
SECONDS = 8
MOST = 64 << 10
"""KiB above what the daemon had before."""

KINDS = {"heads": STRANGER, "idle": STRANGER + 1, "batches": BATCHES, "pages": PAGES}


def started(daemon: Daemon, kind: str, uid: int, key_id: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "tests.harness.attack",
        kind,
        str(daemon.socket),
        str(uid),
        key_id,
        str(SECONDS),
    ]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True, start_new_session=True)


def call(daemon: Daemon, key_id: str) -> list[float]:
    """p50, p99 and the longest of a caller, in seconds; and how many."""
    with started(daemon, "caller", CALLER, key_id) as process:
        assert process.stdout is not None
        found: list[float] = json.loads(process.stdout.read())
        return found


@contextlib.contextmanager
def attacked(daemon: Daemon, kinds: Sequence[str], key_id: str) -> Iterator[None]:
    processes = [started(daemon, kind, KINDS[kind], key_id) for kind in kinds]
    try:
        time.sleep(2)  # until they are at it
        assert all(process.poll() is None for process in processes)
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def memory(daemon: Daemon) -> int:
    return sum(rss_kib(pid) for pid in daemon.pids())


@contextlib.contextmanager
def open_to_all() -> Iterator[tuple[Daemon, str]]:
    """And a DEK of it."""
    rules = {"allowed_peer_uids": [0, CALLER, BATCHES, PAGES], "max_connections": 1000}
    with Daemon(rules, workers=2) as daemon:
        daemon.home.chmod(0o755)
        daemon.socket.chmod(0o666)
        yield daemon, daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]


def beside_a_neighbour(daemon: Daemon, key_id: str, kinds: Sequence[str]) -> list[float]:
    """What the same attackers cost this caller by their work alone: another daemon has them."""
    with open_to_all() as (neighbour, other_id), attacked(neighbour, kinds, other_id):
        return call(daemon, key_id)


@pytest.mark.parametrize("kinds", [("heads", "idle"), ("batches",), ("pages",), tuple(KINDS)], ids="+".join)
def test_an_allowed_caller_is_served(kinds: Sequence[str]) -> None:
    with open_to_all() as (daemon, key_id):
        alone = call(daemon, key_id)
        machine = beside_a_neighbour(daemon, key_id, kinds)
        before, most = memory(daemon), 0
        with attacked(daemon, kinds, key_id), started(daemon, "caller", CALLER, key_id) as process:
            while process.poll() is None:
                most = max(most, memory(daemon))
                time.sleep(0.05)
            assert process.stdout is not None
            beside = json.loads(process.stdout.read())
        for name, (p50, p99, longest, calls) in (
            ("alone", alone),
            ("attacked is another daemon", machine),
            ("attacked", beside),
        ):
            took = f"p50 {p50 * 1e3:.2f} ms, p99 {p99 * 1e3:.2f}, longest {longest * 1e3:.2f}"
            print(f"\n{'+'.join(kinds)}, {name}: {calls} calls, {took}", end="")
        print(f"\np99 {beside[1] / alone[1]:.1f} times that alone, ", end="")
        print(f"{beside[1] / machine[1]:.1f} times that beside the other; ", end="")
        print(f"{before >> 10} MiB before, {most >> 10} at most")
        assert most - before < MOST
        wait_until(lambda: memory(daemon) - before < 16 << 10, 60, "the memory to go back")
        assert daemon.healthy()
