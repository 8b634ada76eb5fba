"""The pace of a rotation: how large a page is."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from progressdb_kms.crypto.keyring import REGION_SIZE, Keyring
from progressdb_kms.service import keeper, rotation
from progressdb_kms.service.rotation import LEAST, MOST, STEP_SECONDS, Rotation
from progressdb_kms.store.contract import DekRecord
from progressdb_kms.store.sqlite import SqliteStore
from tests.harness.memstore import MemoryStore


class Worked:
    """A processor clock that a test moves on."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def thread_time(self) -> float:
        return self.seconds


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> Worked:
    clock = Worked()
    for module in (rotation, keeper):
        stand_in = types.SimpleNamespace(**vars(module.time))
        stand_in.thread_time = clock.thread_time
        monkeypatch.setattr(module, "time", stand_in)
    return clock


def dek(number: int) -> DekRecord:
    return DekRecord(f"key-{number:06}", "t", b"blob", "00" * 8, 1, "2026-01-02T00:00:00.000000Z")


def fill(store: MemoryStore | SqliteStore, count: int) -> None:
    with store.transaction():
        for number in range(count):
            store.put(dek(number))


def through(store: MemoryStore, work: Callable[[list[DekRecord]], int]) -> Iterator[None]:
    """All pages of a rotation."""
    keyring = Keyring(memoryview(bytearray(REGION_SIZE)))
    return Rotation(store, keyring, Path())._through("rewrapping", 0, "00" * 8, work)


@pytest.mark.parametrize(
    "each, sizes",
    [
        (STEP_SECONDS / 160, [10, 20, 40, 80, 160, 160, 160, 160, 160, 50]),
        (STEP_SECONDS, [LEAST] * 100),
        (1e-9, [10, 20, 40, 80, 160, 320, 370]),
    ],
    ids=["as many as fit", "slow", "fast"],
)
def test_a_page_is_as_large_as_its_time(worked: Worked, each: float, sizes: list[int]) -> None:
    store = MemoryStore(memoryview(bytearray(32)))
    fill(store, 1000)
    seen: list[DekRecord] = []
    found = []

    def work(page: list[DekRecord]) -> int:
        worked.seconds += each * len(page)
        found.append(len(page))
        seen.extend(page)
        return len(page)

    for _ in through(store, work):
        worked.seconds += 1.0  # what comes between two steps is not theirs
    assert found == sizes
    assert [record.key_id for record in seen] == [dek(number).key_id for number in range(1000)]


def test_a_page_has_an_end_and_follows_what_it_costs(worked: Worked) -> None:
    store = MemoryStore(memoryview(bytearray(32)))
    fill(store, MOST * 4)
    found = []

    def work(page: list[DekRecord]) -> int:
        found.append(len(page))
        worked.seconds += 1e-9 if len(found) < 9 else STEP_SECONDS * 4
        return len(page)

    for _ in through(store, work):
        pass
    assert found[6:12] == [640, MOST, MOST, MOST // 4, MOST // 16, MOST // 64]
