"""The pace of a rotation: how large a page is, and when the keeper rests between two."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest

from progressdb_kms import keeper as keeper_module
from progressdb_kms import rotation
from progressdb_kms.jobs import channel
from progressdb_kms.keeper import RETIRE_ROWS, Keeper
from progressdb_kms.keyring import REGION_SIZE, Keyring
from progressdb_kms.lockedmem import LockedBuffer
from progressdb_kms.memstore import MemoryStore
from progressdb_kms.opening import Configured, claim, open_keeper
from progressdb_kms.rotation import APART, IDLE_STEP, LEAST, MOST, TOGETHER, Pace, Pages
from progressdb_kms.startup import ConfiguredKey
from progressdb_kms.store import DekRecord, SqliteStore


class Processor:
    """The clock of the processor, and how often it was taken away: a test moves both on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.lost = 0
        self.each = 0.0
        """Seconds that pass with each look."""

    def thread_time(self) -> float:
        self.seconds += self.each
        return self.seconds


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Processor:
    made = Processor()
    stand_in = types.SimpleNamespace(**vars(rotation.time))
    stand_in.thread_time = made.thread_time
    monkeypatch.setattr(rotation, "time", stand_in)
    monkeypatch.setattr(rotation, "_pushed_aside", lambda: made.lost)
    return made


def dek(number: int) -> DekRecord:
    return DekRecord(f"key-{number:06}", "t", b"blob", "00" * 8, 1, "2026-01-02T00:00:00.000000Z")


def filled(count: int) -> MemoryStore:
    store = MemoryStore()
    with store.transaction():
        for number in range(count):
            store.put(dek(number))
    return store


@pytest.mark.parametrize(
    "each, sizes",
    [
        (IDLE_STEP / 160, [10, 20, 40, 80, 160, 160, 160, 160, 160, 50]),
        (IDLE_STEP, [LEAST] * 100),
        (1e-9, [10, 20, 40, 80, 160, 320, 370]),
    ],
    ids=["as many as fit", "slow", "fast"],
)
def test_a_page_is_as_large_as_its_time(processor: Processor, each: float, sizes: list[int]) -> None:
    seen: list[DekRecord] = []
    found = []
    for page in (pages := Pages(filled(1000), APART.step)):
        processor.seconds += each * len(page)
        pages.done()
        processor.seconds += 1.0  # what comes between two steps is not theirs
        found.append(len(page))
        seen += page
    assert found == sizes
    assert [record.key_id for record in seen] == [dek(number).key_id for number in range(1000)]


def test_a_page_has_an_end_and_follows_what_it_costs(processor: Processor) -> None:
    found = []
    for page in (pages := Pages(filled(MOST * 4), APART.step)):
        found.append(len(page))
        processor.seconds += 1e-9 if len(found) < 9 else IDLE_STEP * 4
        pages.done()
    assert found[6:12] == [640, MOST, MOST, MOST // 4, MOST // 16, MOST // 64]


@pytest.mark.parametrize("pace, size", [(APART, 40), (TOGETHER, 100)])
def test_pages_are_smaller_while_others_want_the_core(processor: Processor, pace: Pace, size: int) -> None:
    found = []
    for page in (pages := Pages(filled(1000), pace.step)):
        found.append(len(page))
        processor.seconds += IDLE_STEP / 100 * len(page)
        processor.lost += 5 <= len(found) < 8
        pages.done()
    assert found[:10] == [10, 20, 40, 80, 100, size, size, size, min(2 * size, 100), 100]


class Paced(NamedTuple):
    keeper: Keeper
    waits: list[float]  # the timeouts with which it waited for jobs
    losses: list[int]  # times that it loses the core, a figure each round


@pytest.fixture
def paced(tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> Iterator[Paced]:
    """A keeper that has rows to tidy up, for four rounds and more; each step takes it 7 ms."""
    store = SqliteStore(tmp_path)
    with store.transaction():
        for number in range(RETIRE_ROWS * 4):
            store.put(dek(number))
        store.staging(True)
        store.swap({})
    store.close()
    waits: list[float] = []
    losses: list[int] = []
    processor.each = 0.007

    def wait(reading: list[int], writing: list[int], failing: list[int], timeout: float) -> Any:
        waits.append(timeout)
        return [], [], []

    tidied = SqliteStore.retire

    def retire(store: SqliteStore, limit: int) -> bool:
        processor.lost += losses.pop(0)
        return tidied(store, limit)

    monkeypatch.setattr(SqliteStore, "retire", retire)
    monkeypatch.setattr(keeper_module, "select", types.SimpleNamespace(select=wait))
    region = LockedBuffer(REGION_SIZE)
    staging = LockedBuffer(32)
    inbox, outbox = channel()
    lock = claim(tmp_path)
    keyring = Keyring(region.view)
    kek_id = keyring.install(memoryview(bytearray(os.urandom(32))), 1)
    keeper: Optional[Keeper] = None
    try:
        keeper, _ = open_keeper(
            tmp_path, keyring, Configured(ConfiguredKey(kek_id, "test")), staging.view, inbox
        )
        yield Paced(keeper, waits, losses)
    finally:
        if keeper is not None:
            keeper.close()
        os.close(lock)
        inbox.close()
        outbox.close()


@pytest.mark.parametrize("pace", [APART, TOGETHER])
def test_the_keeper_rests_while_others_want_its_core(paced: Paced, pace: Pace) -> None:
    paced.keeper.pace = pace
    for losses in (0, 2, 0, 1):
        paced.losses[:] = [losses]
        paced.keeper.round(60.0)
    assert paced.waits == [0.0, 0.0, pytest.approx(pace.rest * 0.007), 0.0]


def test_a_keeper_with_nothing_to_do_waits(paced: Paced) -> None:
    while len(paced.waits) < 2 or paced.waits[-1] != 60.0:
        paced.losses[:] = [1]
        paced.keeper.round(60.0)
        assert len(paced.waits) < 10
