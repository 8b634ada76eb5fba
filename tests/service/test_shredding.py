"""What the janitor finds beside the rows decides nothing; what is shredded is due until no copy is left."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from progressdb_kms.crypto.keyring import REGION_SIZE, Keyring
from progressdb_kms.encoding import timestamp
from progressdb_kms.errors import StoreUnavailable
from progressdb_kms.service import shredding
from progressdb_kms.service.clock import Clock, TrustedTime
from progressdb_kms.service.common import Common
from progressdb_kms.service.shredding import Shredding
from progressdb_kms.store.contract import DekRecord
from progressdb_kms.store.policy import PENDING_DELETION, SHREDDED
from tests.harness.memstore import MemoryStore

NOW = Clock().now()
PAST, LATER = timestamp(NOW - 60), timestamp(NOW + 86400)


class Site:
    def __init__(self, folder: Path) -> None:
        self.store = MemoryStore(memoryview(bytearray(range(32))))
        self.noted: list[str] = []
        keyring, clock = Keyring(memoryview(bytearray(REGION_SIZE))), Clock()
        time = TrustedTime(self.store, clock)
        keks: Any = SimpleNamespace(forget=keyring.touch)
        audit: Any = SimpleNamespace(note=lambda op, key_id: self.noted.append(f"{op} {key_id}"))
        anchors: Any = SimpleNamespace(write=lambda: None)
        store: Any = self.store
        self.shredding = Shredding(Common(store, folder, keyring, audit, time, []), keks, anchors)

    def put(self, key_id: str, delete_at: str = "", *entries: str) -> None:
        """A DEK, with its own entry where it is scheduled, and with `entries` that others put there."""
        record = DekRecord(key_id, "t", b"blob", "00" * 8, 1, timestamp(NOW))
        with self.store.transaction():
            self.store.put(record)
            for name in entries:
                self.store.write(name, {})
            if delete_at:
                scheduled = record._replace(state=PENDING_DELETION, delete_at=delete_at)
                self.store.put(scheduled)
                self.shredding.index(record, scheduled)

    def state(self, key_id: str) -> str:
        record = self.store.get(key_id)
        assert record is not None
        return record.state

    @property
    def entries(self) -> list[str]:
        return [*self.store.names("deletion:"), *self.store.names("erasure:")]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(shredding, "JANITOR_SECONDS", 0.0)
    return Site(tmp_path)


@pytest.mark.parametrize(
    ("delete_at", "entry"),
    [
        pytest.param(LATER, f"deletion:{PAST}|k", id="it is due later"),
        pytest.param("", f"deletion:{PAST}|k", id="it is not scheduled"),
        pytest.param("", "erasure:k", id="it is not shredded"),
        pytest.param(LATER, "erasure:k", id="it is not shredded yet"),
        pytest.param("", f"deletion:{PAST}|gone", id="there is no such key"),
        pytest.param("", "erasure:gone", id="there is no such key to erase"),
        pytest.param("", "erasure:gone\nprogressdb-kms: INFO: witness", id="it would be a line of its own"),
    ],
)
def test_an_entry_that_the_row_does_not_bear_out(
    site: Site, delete_at: str, entry: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever put it there shreds nothing and erases nothing; it is removed, and told once."""
    site.put("k", delete_at, entry)
    before = site.state("k")
    with caplog.at_level(logging.ERROR):
        site.shredding.look()
        site.shredding.look()
    assert site.state("k") == before and not site.shredding.due
    assert site.entries == ([f"deletion:{LATER}|k"] if delete_at else [])
    assert caplog.text.count("is not borne out by the row of that key") == 1 == caplog.text.count("\n")


def test_what_is_due_is_shredded_and_erased(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note of the erasure goes last: while a copy can't be removed it stays, and the caller hears."""
    asked: list[dict[str, bytes]] = []

    def erase(store: Any, data_dir: Path, due: dict[str, bytes], patient: bool) -> None:
        asked.append(dict(due))
        if len(asked) == 1:
            raise StoreUnavailable("a reader holds the log")

    monkeypatch.setattr(shredding.erasure, "erase", erase)
    site.put("k", PAST)
    site.shredding.look()
    assert site.state("k") == SHREDDED and site.entries == ["erasure:k"]
    site.shredding.now()
    error = site.shredding.remains("k")
    assert error is not None and "a reader holds the log" in error.message and site.entries == ["erasure:k"]
    assert site.shredding.later() is None  # for some seconds
    site.shredding.now()
    assert asked == [{"k": b"blob"}] * 2 and site.noted == ["shred k"]
    assert site.entries == [] and site.shredding.remains("k") is None


def test_what_an_earlier_run_left_is_due_without_its_blob(site: Site) -> None:
    site.put("k")
    with site.store.transaction():
        site.shredding.mark(site.store.get("k"), NOW)  # type: ignore[arg-type]
    site.shredding.look()
    assert site.shredding.due == {"k": b""} and site.shredding.later() is not None
