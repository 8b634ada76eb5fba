"""Keys of our own: wrapped anew they are opened again before anybody relies on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

from progressdb_kms.crypto.envelope import AUDIT_KEY, ROW_KEY
from progressdb_kms.crypto.keyring import REGION_SIZE, KekNotLoaded, Keyring
from progressdb_kms.errors import StoreDamaged
from progressdb_kms.service import ownkeys

KEY = memoryview(bytearray(range(32)))


@pytest.fixture
def keyring() -> Keyring:
    ring = Keyring(memoryview(bytearray(REGION_SIZE)))
    ring.activate(ring.install(memoryview(bytearray(os.urandom(32)))), 1)
    return ring


def test_a_row_opens_as_its_own_key_alone(keyring: Keyring) -> None:
    row = ownkeys.wrap(keyring, keyring.active.kek_id, AUDIT_KEY, KEY)
    with ownkeys.opened(keyring, AUDIT_KEY, row) as key:
        assert key == KEY
    for wrong in (row, {}, {"wrapped": "?"}, {"wrapped": None}):
        with (
            pytest.raises(StoreDamaged, match="row:key does not open as that"),
            ownkeys.opened(keyring, ROW_KEY, wrong),
        ):
            pass
    with (
        pytest.raises(KekNotLoaded),
        ownkeys.opened(Keyring(memoryview(bytearray(REGION_SIZE))), AUDIT_KEY, row),
    ):
        pass


def test_one_that_came_out_wrong_is_not_given_out(keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def other(*args: Any) -> Iterator[memoryview]:
        yield memoryview(bytearray(32))

    monkeypatch.setattr(ownkeys, "opened", other)
    with pytest.raises(StoreDamaged, match="is not the same"):
        ownkeys.wrap(keyring, keyring.active.kek_id, AUDIT_KEY, KEY)
