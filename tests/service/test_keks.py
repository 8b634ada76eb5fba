"""New KEKs on their way to a keeper that is moved by hand: whose they are, and when they are gone."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.config.values import MAX_PREVIOUS
from progressdb_kms.crypto import keyring as keyring_module
from progressdb_kms.crypto.aead import KEY_SIZE
from progressdb_kms.crypto.keyring import REGION_SIZE, Keyring, fingerprint
from progressdb_kms.crypto.memory import LockedBuffer
from progressdb_kms.errors import Conflict, KMSError, StoreDamaged, StoreUnavailable
from progressdb_kms.service.channel import KeeperClient, StagingSlots, channel
from progressdb_kms.service.keeper import Keeper
from progressdb_kms.service.lock import claim
from progressdb_kms.service.rotation import RETIRED_KEK
from progressdb_kms.service.start import open_keeper
from progressdb_kms.store.sqlite import Connection
from tests.harness.configured import configured, named
from tests.harness.procs import quickest

SLOTS = 2


class Site:
    """A keeper without a loop of its own, two slots, and a worker's end of the channel."""

    def __init__(self, folder: Path) -> None:
        self.region = LockedBuffer(REGION_SIZE + SLOTS * KEY_SIZE)
        self.staging = self.region.view[REGION_SIZE:]
        self.inbox, self.outbox = channel()
        self.keyring = Keyring(self.region.view)
        self.lock = claim(folder)
        self.kek_id = self.keyring.install(secret(), 1)
        keys = configured(named(self.kek_id))
        self.keeper: Keeper = open_keeper(folder, self.keyring, keys, self.staging, self.inbox, 0)[0]
        self.client = KeeperClient(self.outbox)
        self.slots = StagingSlots(self.staging, 0, SLOTS)

    def call(self, op: str, timeout: float = 20.0, **args: Any) -> dict[str, Any]:
        return self.client.call(op, args, None, timeout)

    def rewrap(self, key_id: str, kek: memoryview, timeout: float = 20.0) -> dict[str, Any]:
        with self.slots.take() as staged:
            staged.view[:] = kek
            return self.client.call("rewrap", {"key_id": key_id}, None, timeout, staged)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The keeper works meanwhile."""
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                self.keeper.round(0.01)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def create(self) -> str:
        with self.running():
            return str(self.call("create", thread_id="t")["key_id"])

    def kek_of(self, key_id: str) -> str:
        record = self.keeper._store.get(key_id)
        assert record is not None
        return record.kek_id


def secret() -> memoryview:
    return memoryview(bytearray(os.urandom(KEY_SIZE)))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    with made.slots.take():  # what callers left is collected
        pass
    made.keeper.close()
    made.lock.close()
    made.inbox.close()
    made.outbox.close()


def test_a_slot_is_its_jobs_until_the_keeper_has_answered(site: Site) -> None:
    keys = [site.create(), site.create()]
    first, second = secret(), secret()
    with pytest.raises(StoreUnavailable, match="may or may not"):
        site.rewrap(keys[0], first, timeout=0.05)
    with site.slots.take() as other:  # the second slot; there is no third
        assert bytes(site.staging[(1 - other.slot) * KEY_SIZE :][:KEY_SIZE]) == bytes(first)
        with pytest.raises(Conflict, match="at once"), site.slots.take():
            pass
    with site.running():
        assert site.rewrap(keys[1], second)["kek_id"] == fingerprint(second)
    assert [site.kek_of(key) for key in keys] == [site.kek_id, fingerprint(second)]
    assert sorted(site.keyring.kek_ids()) == sorted([site.kek_id, fingerprint(second)])
    with site.slots.take(), site.slots.take():
        assert not any(site.staging)


def test_a_job_at_work_is_finished_though_its_caller_gave_up(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, kek = site.create(), secret()
    real = site.keeper._writes["rewrap"]

    def slow(*args: Any, **more: Any) -> Any:
        time.sleep(0.5)
        return real(*args, **more)

    monkeypatch.setitem(site.keeper._writes, "rewrap", slow)
    with site.running(), pytest.raises(StoreUnavailable, match="may or may not"):
        site.rewrap(key, kek, timeout=0.2)
    assert site.kek_of(key) == fingerprint(kek) and fingerprint(kek) in site.keyring.kek_ids()


@pytest.mark.parametrize("op", ["rewrap", "rotate"])
def test_another_key_in_the_slot_is_not_used(site: Site, op: str) -> None:
    """As when a worker died, and the one that took its place uses the slot again."""
    key, kek, other = site.create(), secret(), secret()
    args = {"rewrap": {"key_id": key}, "rotate": {}}[op]
    with site.slots.take() as staged, contextlib.ExitStack() as later:
        staged.view[:] = kek

        def replaced() -> None:
            staged.view[:] = other
            later.enter_context(site.running())

        timer = threading.Timer(0.2, replaced)
        timer.start()
        with pytest.raises(Conflict, match="not there any more"):
            site.client.call(op, args, None, 20.0, staged)
        timer.join()  # else the keeper's thread may outlive what ends it
        assert staged.view == other  # nor wiped: it waits for its own job
    assert site.kek_of(key) == site.kek_id and site.keyring.kek_ids() == [site.kek_id]


def test_a_rewrap_that_fails_leaves_no_kek(site: Site) -> None:
    key = site.create()
    record = site.keeper._store.get(key)
    assert record is not None
    blob = bytearray(record.wrapped)
    blob[-1] ^= 1
    with site.keeper._store.transaction():
        site.keeper._store.put(record._replace(wrapped=bytes(blob)))
    for bad, error in ((key, StoreDamaged), ("k_absent", KMSError)):
        with site.running(), pytest.raises(error):
            site.rewrap(bad, secret())
    assert site.keyring.kek_ids() == [site.kek_id] and not any(site.staging)


def test_no_rewrap_to_a_kek_that_was_rotated_out(site: Site) -> None:
    key, kek = site.create(), secret()
    with site.keeper._store.transaction():
        site.keeper._store.write(RETIRED_KEK + fingerprint(kek), {"since": "2026-11-24T00:00:00Z"})
    with site.running(), pytest.raises(Conflict, match="rotated out"):
        site.rewrap(key, kek)
    assert site.kek_of(key) == site.kek_id and site.keyring.kek_ids() == [site.kek_id]


def test_rewraps_leave_room_for_a_rotation_and_no_more_keks_than_can_be_configured(site: Site) -> None:
    key = site.create()
    with site.running():
        for _ in range(MAX_PREVIOUS):
            site.rewrap(key, secret())
        with pytest.raises(Conflict, match=str(1 + MAX_PREVIOUS)) as full:
            site.rewrap(key, secret())
        assert full.value.code == "keyring_full" and len(site.keyring.kek_ids()) == 1 + MAX_PREVIOUS
        with site.slots.take() as staged:
            staged.view[:] = kek = secret()
            done = site.client.call("rotate", {}, None, 60.0, staged)
    assert done["kek_id"] == site.kek_of(key) == fingerprint(kek)


@pytest.mark.parametrize("kept", [False, True], ids=["it was not made", "it was made after all"])
def test_a_commit_of_unknown_outcome(site: Site, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """The KEK stays until the store was read again, and for good where a DEK is under it."""
    key, kek = site.create(), secret()
    real = Connection.execute

    def failing(self: Connection, sql: str, args: tuple[Any, ...] = ()) -> None:
        if sql == "COMMIT":
            if kept:
                real(self, sql, args)
            raise StoreUnavailable("disk I/O error") from sqlite3.OperationalError()
        real(self, sql, args)

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "execute", failing)
        with site.running(), pytest.raises(StoreUnavailable, match="I/O"):
            site.rewrap(key, kek)
    assert fingerprint(kek) in site.keyring.kek_ids()
    site.create()
    assert (fingerprint(kek) in site.keyring.kek_ids()) is kept
    assert site.kek_of(key) == (fingerprint(kek) if kept else site.kek_id)


def test_the_keyring_names_what_it_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source changes while it is looked at: what is installed still bears its own name."""
    ring = Keyring(memoryview(bytearray(REGION_SIZE)))
    source = secret()

    def changing(view: memoryview) -> str:
        found = fingerprint(view)
        source[:] = secret()
        return found

    monkeypatch.setattr(keyring_module, "fingerprint", changing)
    kek_id = ring.install(source, 1)
    with ring.borrow(kek_id) as key:
        assert fingerprint(key) == kek_id


def test_a_full_queue_is_waited_for_no_longer_than_an_answer() -> None:
    """Whoever asks a keeper that takes no jobs at all is told so in time."""
    inbox, outbox = channel()
    client = KeeperClient(outbox)
    with inbox, outbox:
        begun = time.monotonic()
        while True:
            with pytest.raises(StoreUnavailable) as caught:
                client.call("create", {"thread_id": "x" * 8000}, None, 0.01)
            if "queue is full" in caught.value.message:
                break
            assert time.monotonic() - begun < 20

        def ask() -> None:
            with pytest.raises(StoreUnavailable, match="queue is full"):
                client.call("ready", {}, None, 0.3)

        assert quickest(3, 1.0, ask) < 1


def test_what_changes_beside_a_rotation_is_in_what_it_leaves(site: Site) -> None:
    """Rows that it has passed already: one is disabled, one shredded, one made."""
    with site.keeper._store.transaction():
        for number in range(50):
            site.keeper._writes["create"]("t", f"k{number:02}")
    kek, answers = secret(), list[Any]()

    def rotate() -> None:
        with site.slots.take() as staged:
            staged.view[:] = kek
            answers.append(site.client.call("rotate", {}, None, 60.0, staged))

    thread = threading.Thread(target=rotate)
    thread.start()
    while (rotation := site.keeper._keks.rotation) is None:
        site.keeper.round(0.01)
    while not (rotation.progress and rotation.progress["done"]):  # then the first ten are staged
        site.keeper.round(0.0)
    assert rotation.progress["phase"] == "rewrapping" and rotation.progress["done"] < 50
    with site.keeper._store.transaction():
        site.keeper._writes["transition"]("k00", "disable")
        site.keeper._writes["transition"]("k01", "shred")
        site.keeper._writes["create"]("t", "a")
    while thread.is_alive():
        site.keeper.round(0.01)
    found = {one.key_id: (one.state, one.kek_id) for one in site.keeper._store.page("", 100)}
    assert found["k01"][0] == "shredded" and len(found) == 51
    assert {kek_id for state, kek_id in found.values() if state != "shredded"} == {fingerprint(kek)}
    assert (found["k00"][0], found["a"][0], found["k02"][0]) == ("disabled", "enabled", "enabled")
    assert answers[0]["kek_id"] == fingerprint(kek)
    assert site.keeper._keks.rotation is None and site.keyring.kek_ids() == [fingerprint(kek)]
