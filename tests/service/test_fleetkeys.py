"""Keys of next_master_keys that come at SIGHUP: read in one process, taken by another."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.config.load import load
from progressdb_kms.crypto.keyring import REGION_SIZE, Keyring
from progressdb_kms.service.fleetkeys import SIZE, Coming
from progressdb_kms.service.plan import Configured
from tests.harness.daemon import write_secret
from tests.harness.fakekms import kek_id_of as kek_id

MASTER, PREVIOUS, FIRST, SECOND = (bytes([n]) * 8 + os.urandom(24) for n in range(1, 5))


def never(kek_id: str) -> bool:
    return False


class Site:
    """A daemon whose configuration is changed."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "kms.yaml"
        write_secret(folder / "first", FIRST)
        self.write("[]")
        with load({"config": str(self.file)}, {}, fleet=True) as loaded:
            self.keyring = Keyring(memoryview(bytearray(REGION_SIZE)))
            self.keys = Configured.of(loaded, self.keyring.install)
            self.coming = Coming(loaded.settings)

    def write(self, listed: str) -> None:
        text = f"master_key_hex: {MASTER.hex()}\nprevious_master_keys: [{{hex: {PREVIOUS.hex()}}}]\n"
        text += "store: postgresql\npostgresql: {hosts: [/run/pg], database: d, user: u}\n"
        write_secret(self.file, f"{text}next_master_keys: {listed}\n".encode())

    def hangup(self, listed: str) -> None:
        self.write(listed)
        self.coming.renew()

    def take(self) -> list[str]:
        """Those that a rotation may move to, as the keeper has them then."""
        self.keys = self.coming.into(self.keyring, self.keys, never)
        return list(self.keys.coming)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.coming._memory.wipe()


def test_they_come_into_the_keyring_and_leave_no_copy_on_the_way(site: Site) -> None:
    before = set(site.keyring.kek_ids())
    assert before == {kek_id(MASTER), kek_id(PREVIOUS)} and site.take() == []
    site.hangup(f"[{{file: first}}, {{hex: {SECOND.hex()}}}]")
    assert site.take() == [kek_id(FIRST), kek_id(SECOND)]
    assert site.keys.coming[kek_id(SECOND)].label == "next_master_keys entry 2"
    assert set(site.keyring.kek_ids()) == before | {kek_id(FIRST), kek_id(SECOND)}
    with site.keyring.borrow(kek_id(SECOND)) as key:
        assert bytes(key) == SECOND
    held = bytes(site.coming._memory.view)
    assert len(held) == SIZE and not any(key in held for key in (MASTER, PREVIOUS, FIRST, SECOND))
    assert site.take() == [kek_id(FIRST), kek_id(SECOND)]  # of a keeper that comes later


def test_one_that_left_is_no_more_one_of_them(site: Site) -> None:
    site.hangup("[{file: first}]")
    assert site.take() == [kek_id(FIRST)]
    site.hangup("[]")
    assert site.take() == [] and list(site.keys.previous) == [kek_id(PREVIOUS)]


def test_what_is_configured_otherwise_stays_that(site: Site) -> None:
    site.hangup(f"[{{hex: {MASTER.hex()}}}, {{hex: {PREVIOUS.hex()}}}]")
    assert site.take() == [] and len(site.keyring.kek_ids()) == 2


def test_what_is_refused_is_not_taken(site: Site) -> None:
    site.hangup("[{file: first}]")
    site.coming.into(site.keyring, site.keys, lambda found: found == kek_id(FIRST))
    assert kek_id(FIRST) not in site.keyring.kek_ids()
    assert FIRST not in bytes(site.coming._memory.view)


@pytest.mark.parametrize(
    "listed", ["[{file: none}]", "[{file: first}, {file: none}]", "nonsense", "[{hex: ab}]"]
)
def test_a_wrong_configuration_changes_nothing(
    site: Site, listed: str, caplog: pytest.LogCaptureFixture
) -> None:
    site.hangup("[{file: first}]")
    site.take()
    with caplog.at_level(logging.ERROR):
        site.hangup(listed)
    assert "the next_master_keys stay as they were" in caplog.text
    assert site.take() == [kek_id(FIRST)]


def test_a_key_that_is_only_half_there_is_left_alone(site: Site) -> None:
    site.hangup("[{file: first}]")
    site.coming._memory.view[20] ^= 1
    site.take()
    assert kek_id(FIRST) not in site.keyring.kek_ids()
