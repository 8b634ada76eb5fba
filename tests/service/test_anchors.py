"""The heads of the audit chains in the store: none is dropped, and none is ahead of what the disk has."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

from progressdb_kms.crypto.keyring import REGION_SIZE, Keyring
from progressdb_kms.crypto.memory import LockedBuffer
from progressdb_kms.encoding import b64encode
from progressdb_kms.errors import AuditUnavailable, KMSError, StoreUnavailable
from progressdb_kms.service import anchors
from progressdb_kms.service.channel import KeeperClient, channel
from progressdb_kms.service.keeper import Keeper
from progressdb_kms.service.lock import claim
from progressdb_kms.service.plan import Configured, ConfiguredKey
from progressdb_kms.service.start import open_keeper

SIG = b64encode(bytes(32))


class Site(NamedTuple):
    keeper: Keeper
    client: KeeperClient
    store: Any

    def says(self, chain: str, seq: int) -> KMSError | None:
        """A worker tells how far it is. What the keeper answers, at once."""
        answer: list[KMSError | None] = []

        def call() -> None:
            try:
                self.client.call("anchor", {}, (chain, seq, SIG), 5.0)
                answer.append(None)
            except KMSError as error:
                answer.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        while thread.is_alive():
            self.keeper.round(0.01)
        return answer[0]

    def kept(self, chain: str) -> int:
        row = self.store.read(f"audit:head:{chain}")
        return row["seq"] if row else 0


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(anchors, "SYNC_SECONDS", 3600.0)  # a sync a moment ago is one an hour ago
    region, staging = LockedBuffer(REGION_SIZE), LockedBuffer(32)
    inbox, outbox = channel()
    lock = claim(tmp_path)
    keyring = Keyring(region.view)
    kek_id = keyring.install(memoryview(bytearray(os.urandom(32))), 1)
    configured = Configured(ConfiguredKey(kek_id, "test"))
    keeper, _ = open_keeper(tmp_path, keyring, configured, staging.view, inbox, 0)
    while keeper._retiring:  # it tidies up at its start
        keeper.round(0.0)
    yield Site(keeper, KeeperClient(outbox), keeper._store)
    keeper.close()
    lock.close()
    inbox.close()
    outbox.close()


def test_none_is_dropped_because_another_synced_a_moment_ago(site: Site) -> None:
    for number in range(1, 4):
        for chain in ("1.1", "1.2"):
            assert site.says(chain, number) is None
            assert site.kept(chain) == number


def test_none_is_dropped_where_a_commit_failed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., None] = site.store._conn.execute

    def failing(sql: str, args: tuple[Any, ...] = ()) -> None:
        if sql == "COMMIT":
            raise StoreUnavailable("disk I/O error")
        real(sql, args)

    with monkeypatch.context() as patch:
        patch.setattr(site.store._conn, "execute", failing)
        assert isinstance(site.says("1.1", 7), StoreUnavailable)
    monkeypatch.setattr(site.store, "_reopening", type(site.store._reopening)(0.0, 0.0))
    assert site.says("1.1", 7) is None  # the worker says it again, and it has not moved
    assert site.kept("1.1") == 7


def test_none_is_ahead_of_the_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AuditUnavailable("the audit log can't be synced")

    with monkeypatch.context() as patch:
        patch.setattr(site.keeper._audit, "sync", refuse)
        site.says("1.1", 7)
        assert site.kept("1.1") == 0
    site.says("1.1", 7)
    assert site.kept("1.1") == 7


def test_the_keepers_own_end_is_kept_where_nobody_asks(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.keeper._audit.note("shred", key_id="k")
    site.keeper.round(0.0)
    monkeypatch.setattr(anchors, "SYNC_SECONDS", 0.0)
    site.keeper.round(0.0)
    chain, seq, _ = site.keeper._audit.head
    assert site.kept(chain) == seq > 1


def test_what_could_not_be_synced_is_kept_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper's own end: a sync that failed leaves it as unkept as it was."""

    def refuse() -> None:
        raise AuditUnavailable("the audit log can't be synced")

    site.keeper._audit.note("shred", key_id="k")
    monkeypatch.setattr(anchors, "SYNC_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(site.keeper._audit, "sync", refuse)
        site.keeper.round(0.0)
    site.keeper.round(0.0)
    chain, seq, _ = site.keeper._audit.head
    assert site.kept(chain) == seq


def test_the_journal_is_a_witness(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.says("1.1", 7)
    with caplog.at_level(logging.INFO):
        site.keeper._anchors.witness()
    chain, seq, _ = site.keeper._audit.head
    change = site.store.state().change
    assert (
        f"witness: change {change} of the store, audit 1.1:7:0000000000000000 {chain}:{seq}:" in caplog.text
    )


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
