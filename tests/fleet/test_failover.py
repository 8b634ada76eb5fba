"""Three servers, of which a standby has what is acknowledged: killed, stopped or cancelled, no DEK that was
acknowledged is lost, and what a store says of itself adds up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.errors import StoreUnavailable
from tests.harness import postgres
from tests.harness.postgres import Cluster
from tests.store.test_contract import KEY, dek, put

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing() or ""),
]

PATIENCE = 120.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    from progressdb_kms.fleet import schema
    from progressdb_kms.fleet.engine import Link

    with Cluster(tmp_path) as one:
        link = Link(one.where)
        schema.create(link)
        link.close()
        yield one


def store_of(cluster: Cluster, host: str) -> Any:
    from progressdb_kms.fleet.engine import Link
    from progressdb_kms.fleet.mending import FleetMending

    cluster.sql(f"INSERT INTO kms.hosts VALUES ('{host}', '1', '', 0, 0, '{{}}', false)")
    return FleetMending(Link(cluster.where), host, "1", KEY)


class Writer(threading.Thread):
    """A host that makes DEKs, changes each once, and remembers what it was told."""

    def __init__(self, cluster: Cluster, host: str) -> None:
        super().__init__(daemon=True)
        self.host, self.store = host, store_of(cluster, host)
        self.acknowledged: dict[str, str] = {}
        self.refused = 0
        self.error: BaseException | None = None
        self._over = threading.Event()

    def run(self) -> None:
        number = 0
        try:
            while not self._over.is_set():
                number += 1
                self.write([f"{self.host}_{number}_{n}" for n in range(4)], f"{self.host}_{number - 1}_0")
        except BaseException as error:  # told by `settled`
            self.error = error

    def write(self, names: list[str], older: str) -> None:
        """Until it is acknowledged: to repeat it is safe."""
        while not self._over.is_set():
            try:
                with self.store.transaction():
                    for name in names:
                        if self.store.get(name) is None:
                            self.store.put(dek(name))
                    if older in self.acknowledged and self.store.get(older).state == "enabled":
                        self.store.put(dek(older, state="disabled"))
            except StoreUnavailable:
                self.refused += 1
                time.sleep(0.05)
                continue
            self.acknowledged.update(dict.fromkeys(names, "enabled"))
            if older in self.acknowledged:
                self.acknowledged[older] = "disabled"
            return

    def more(self, count: int) -> None:
        """Wait until so many more were acknowledged."""
        wanted, deadline = len(self.acknowledged) + count, time.monotonic() + PATIENCE
        while len(self.acknowledged) < wanted:
            assert self.error is None and time.monotonic() < deadline, (self.error, self.refused)
            time.sleep(0.02)

    def settled(self) -> None:
        self._over.set()
        self.join(PATIENCE)
        assert not self.is_alive() and self.error is None, self.error


@pytest.fixture
def writers(cluster: Cluster) -> Iterator[list[Writer]]:
    made = [Writer(cluster, host) for host in ("a", "b")]
    for writer in made:
        writer.start()
    yield made
    for writer in made:
        writer.settled()
        writer.store.close()


def more(writers: list[Writer], count: int) -> None:
    for writer in writers:
        writer.more(count)


def check(cluster: Cluster, writers: list[Writer]) -> None:
    """What was acknowledged is there, as it was acknowledged; and all of it adds up."""
    for writer in writers:
        writer.settled()
    fresh = store_of(cluster, "fresh")
    with fresh.transaction():
        assert not fresh.recount()
    for writer in writers:
        for name, state in writer.acknowledged.items():
            record = fresh.get(name)
            assert record is not None, f"{name} was acknowledged, and is lost"
            assert state == "enabled" or record.state == "disabled", f"{name} came back"
    fresh.close()


def test_the_primary_is_killed(cluster: Cluster, writers: list[Writer]) -> None:
    more(writers, 200)
    for _ in range(2):
        old = cluster.primary
        old.stop("kill")
        cluster.fail_over()
        more(writers, 200)
        cluster.join(old)
        more(writers, 50)
    check(cluster, writers)
    assert cluster.sql("SELECT pg_walfile_name(pg_current_wal_lsn())")[0][0].startswith("00000003")


def test_the_primary_is_stopped_and_comes_back(cluster: Cluster, writers: list[Writer]) -> None:
    """It doesn't know that it is none any more: what it is told then, nobody acknowledges."""
    more(writers, 100)
    old = cluster.primary
    group = [old.pid, *_children(old.pid)]
    for pid in group:
        os.kill(pid, signal.SIGSTOP)
    cluster.fail_over()
    more(writers, 100)
    for pid in group:
        os.kill(pid, signal.SIGCONT)
    more(writers, 100)
    old.stop("kill")
    check(cluster, writers)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_cancel_while_a_standby_is_waited_for(cluster: Cluster) -> None:
    """The engine says OK, with a WARNING. It is sent again, and acknowledged when a standby has it."""
    store = store_of(cluster, "a")
    put(store, dek("a"))
    others = [node for node in cluster.nodes if node is not cluster.primary]
    for node in others:
        node.stop()
    done: list[str] = []

    def write() -> None:
        while not done:
            try:
                put(store, dek("b"))
                done.append("acknowledged")
            except StoreUnavailable:
                continue

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    cancelled, deadline = 0, time.monotonic() + PATIENCE
    while cancelled < 3:
        assert time.monotonic() < deadline
        waiting = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        cancelled += len(cluster.primary.sql(waiting))
        time.sleep(0.05)
        assert not done
    others[0].start()
    thread.join(PATIENCE)
    assert done == ["acknowledged"]
    cluster.primary.stop("kill")
    cluster.fail_over()
    cluster.join(others[1])  # so that there is a standby again
    fresh = store_of(cluster, "fresh")
    with fresh.transaction():
        assert not fresh.recount()
    assert fresh.get("b") == dek("b")
    store.close()
    fresh.close()
