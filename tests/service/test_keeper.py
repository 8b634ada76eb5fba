"""The keeper's loop beside its jobs: when long work has its turn, and when it rests."""

from __future__ import annotations

import os
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from progressdb_kms.crypto.keyring import REGION_SIZE, Keyring
from progressdb_kms.crypto.memory import LockedBuffer
from progressdb_kms.service import keeper as keeper_module
from progressdb_kms.service.channel import channel
from progressdb_kms.service.keeper import REST, Keeper
from progressdb_kms.service.keks import RETIRE_ROWS
from progressdb_kms.service.lock import claim
from progressdb_kms.service.start import open_keeper
from progressdb_kms.store.seal import STATE
from progressdb_kms.store.sqlite import SqliteStore
from tests.harness.configured import configured, named
from tests.service.test_anchors import Site
from tests.service.test_anchors import site as site  # noqa: PLC0414
from tests.service.test_rotation import Worked, fill
from tests.service.test_rotation import worked as worked  # noqa: PLC0414


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.0, 1, 1), (0.4, 20, 1 << 30)])
def test_long_work_gets_its_share_beside_slow_jobs(
    site: Site, monkeypatch: pytest.MonkeyPatch, seconds: float, least: int, most: int
) -> None:
    done: list[int] = []

    def steps() -> Iterator[None]:
        while True:
            done.append(1)
            yield

    monkeypatch.setattr(site.keeper, "_waiting", lambda: [object()] if seconds else [])
    monkeypatch.setattr(site.keeper, "_perform", lambda jobs: time.sleep(seconds))
    site.keeper._task = (steps(), None)
    site.keeper.round(0.0)
    site.keeper._task = None
    assert least <= len(done) <= most


class Paced(NamedTuple):
    keeper: Keeper
    waits: list[float]  # the timeouts with which it waited for jobs
    others: list[int]  # how often it lost the core, a figure each look


@pytest.fixture
def paced(tmp_path: Path, worked: Worked, monkeypatch: pytest.MonkeyPatch) -> Iterator[Paced]:
    """A keeper that has rows to tidy up, for four rounds and more; each step takes it 7 ms."""
    store = SqliteStore(tmp_path)
    store.unlock(memoryview(bytearray(32)))
    fill(store, RETIRE_ROWS * 4)
    with store.transaction():
        store.staging(True)
        store._swap_tables()
        store.erase(STATE)
    store.close()
    waits: list[float] = []
    others: list[int] = []

    def wait(reading: list[int], writing: list[int], failing: list[int], timeout: float) -> Any:
        waits.append(timeout)
        return [], [], []

    def looked() -> int:
        worked.seconds += 0.0035
        return others.pop(0)

    monkeypatch.setattr(keeper_module, "select", types.SimpleNamespace(select=wait))
    monkeypatch.setattr(keeper_module, "_pushed_aside", looked)
    region = LockedBuffer(REGION_SIZE)
    staging = LockedBuffer(32)
    inbox, outbox = channel()
    lock = claim(tmp_path)
    keyring = Keyring(region.view)
    kek_id = keyring.install(memoryview(bytearray(os.urandom(32))), 1)
    keeper: Keeper | None = None
    try:
        keeper, _ = open_keeper(tmp_path, keyring, configured(named(kek_id)), staging.view, inbox, 0)
        yield Paced(keeper, waits, others)
    finally:
        if keeper is not None:
            keeper.close()
        lock.close()
        inbox.close()
        outbox.close()


def test_the_keeper_rests_while_others_want_its_core(paced: Paced) -> None:
    for before, after in ((0, 0), (0, 2), (2, 2), (2, 3)):
        paced.others[:] = before, after
        paced.keeper.round(60.0)
    assert paced.waits == [0.0, 0.0, pytest.approx(REST * 0.007), 0.0]


def test_a_keeper_with_nothing_to_do_waits(paced: Paced) -> None:
    while len(paced.waits) < 2 or paced.waits[-1] != 60.0:
        paced.others[:] = 0, 1
        paced.keeper.round(60.0)
        assert len(paced.waits) < 10
