"""What workers say of themselves. The heads of the audit chains: none is dropped, and none is ahead of what
the disk has. Uses of keys: each is counted once."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

from progressdb_kms.crypto.keyring import REGION_SIZE, Keyring
from progressdb_kms.crypto.memory import LockedBuffer
from progressdb_kms.encoding import b64encode
from progressdb_kms.errors import AuditUnavailable, Conflict, KMSError, StoreUnavailable
from progressdb_kms.service import anchors, usage
from progressdb_kms.service.channel import KeeperClient, channel
from progressdb_kms.service.keeper import Keeper
from progressdb_kms.service.lock import claim
from progressdb_kms.service.start import open_keeper
from progressdb_kms.store.contract import HEAVY, KEK_ROW, Usage
from tests.harness.configured import configured, named

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

    @property
    def warnings(self) -> list[str]:
        ready: Any = self.keeper._others["ready"]
        return list(ready()["warnings"])

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
    keys = configured(named(kek_id))
    keeper, _ = open_keeper(tmp_path, keyring, keys, staging.view, inbox, 0)
    while keeper._keks.later():  # it tidies up at its start
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


class TestUses:
    """What is handed over is in the store once, whatever happens between."""

    @pytest.fixture
    def site(self, site: Site) -> Site:
        with site.store.transaction():
            site.keeper._writes["create"]("t", "k")
        return site

    def hand_over(self, site: Site, *args: Any, op: str = "anchor", **fields: Any) -> Any:
        result: list[Any] = []

        def call() -> None:
            try:
                result.append(site.client.call(op, fields, None, 30.0))
            except (StoreUnavailable, Conflict) as error:
                result.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        while thread.is_alive():
            site.keeper.round(0.01)
        return result[0]

    def batch(self, number: int, *counts: int, chain: str = "1.1", key_id: str = "k") -> dict[str, Any]:
        return {"chain": chain, "number": number, "rows": [[key_id, *counts]]}

    def kept(self, site: Site) -> Usage:
        return site.store.usage(["k"]).get("k", Usage())  # type: ignore[no-any-return]

    def test_a_batch_that_comes_again_is_counted_once(self, site: Site) -> None:
        for _ in range(2):
            self.hand_over(site, uses=self.batch(1, 3, 1, 50, 60, 7))
        assert self.kept(site) == Usage(3, 1, 50, 60, 7)
        self.hand_over(site, uses=self.batch(1, 1, 0, 55, 58, 8, chain="1.2"))
        assert self.kept(site) == Usage(4, 1, 50, 60, 7)
        self.hand_over(site, uses=self.batch(2, 1, 0, 70, 70, 9))
        assert self.kept(site) == Usage(5, 1, 50, 70, 9)

    def test_one_whose_commit_failed_is_counted_when_it_comes_again(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:

            def fail(*args: object) -> None:
                raise StoreUnavailable("the disk is full")

            patch.setattr(site.store, "_settle", fail)
            assert isinstance(self.hand_over(site, uses=self.batch(1, 3, 1, 50, 60, 7)), StoreUnavailable)
        assert self.kept(site) == Usage()
        self.hand_over(site, uses=self.batch(1, 3, 1, 50, 60, 7))
        assert self.kept(site) == Usage(3, 1, 50, 60, 7)

    def test_the_journal_has_a_line_at_each_limit(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        self.hand_over(site, uses=self.batch(1, HEAVY - 1, 0, 1, 1, 1))
        assert "the DEK k" not in caplog.text and site.warnings == []
        for number in (2, 3):
            self.hand_over(site, uses=self.batch(number, 1, 0, 1, 1, 1))
        assert caplog.text.count("the DEK k has 2,147,483,648 encrypts of 4,294,967,296") == 1
        (warning,) = site.warnings
        assert "the DEK k has 2,147,483,649 encrypts of" in warning
        self.hand_over(site, uses=self.batch(4, HEAVY, 0, 1, 1, 1))
        assert caplog.text.count("the DEK k has") == 2 and "which is the end" in caplog.text

    def test_a_worker_that_starts_adds_what_a_dead_one_may_have_lost(self, site: Site) -> None:
        self.hand_over(site, op="hello", chain="1.1")
        self.hand_over(site, op="hello", chain="1.2")
        self.hand_over(site, uses=self.batch(1, HEAVY - 1, 2, 50, 60, 7))
        self.hand_over(site, op="hello", chain="1.1.1")
        assert self.kept(site).encrypts == HEAVY - 1
        self.hand_over(site, uses=self.batch(2, 1, 0, 60, 60, 7))
        self.hand_over(site, op="hello", chain="1.1.2")
        assert self.kept(site) == Usage(HEAVY + usage.LOST, 2, 50, 60, 7)
        self.hand_over(site, closed="1.1.2")
        self.hand_over(site, op="hello", chain="2.1")  # 1.2 didn't stop in order
        assert self.kept(site).encrypts == HEAVY + 2 * usage.LOST
        self.hand_over(site, closed="2.1")
        self.hand_over(site, op="hello", chain="3.1")
        assert self.kept(site).encrypts == HEAVY + 2 * usage.LOST

    def wraps(self, site: Site) -> int:
        name = KEK_ROW + site.store.state().active.kek_id
        return site.store.usage([name]).get(name, Usage()).encrypts  # type: ignore[no-any-return]

    def test_wraps_are_counted_as_they_are_made(self, site: Site) -> None:
        assert self.wraps(site) == 1
        self.hand_over(site, op="create", thread_id="t", key_id="other")
        self.hand_over(site, op="create", thread_id="t", key_id="other")  # is there: wraps nothing
        self.hand_over(site, op="transition", key_id="k", action="disable")
        self.hand_over(site, op="transition", key_id="k", action="shred")
        assert self.wraps(site) == 2
        name = KEK_ROW + site.store.state().active.kek_id
        self.hand_over(site, uses=self.batch(1, 5, 0, 50, 60, 7, key_id=name))
        assert self.wraps(site) == 7

    def test_a_kek_that_is_spent_wraps_no_more(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        name = KEK_ROW + site.store.state().active.kek_id
        with site.store.transaction():
            site.store.count([(name, Usage(HEAVY))])
        self.hand_over(site, op="create", thread_id="t")
        (warning,) = site.warnings
        assert "has wrapped 2,147,483,650 DEKs of" in warning and "rotate-kek --generate" in warning
        with site.store.transaction():
            site.store.count([(name, Usage(HEAVY))])
        refused = self.hand_over(site, op="create", thread_id="t")
        assert isinstance(refused, Conflict) and refused.code == "kek_spent"
        self.hand_over(site, uses=self.batch(1, 1, 0, 50, 60, 7))
        assert "which is the end: it only unwraps" in caplog.text

    def test_a_key_that_is_not_stored_gets_no_row(self, site: Site) -> None:
        self.hand_over(site, uses=self.batch(1, 3, 1, 50, 60, 7, key_id="of a caller's blob"))
        assert site.store.usage(["of a caller's blob"]) == {}
