"""What a worker of a fleet remembers, and when it refuses."""

from __future__ import annotations

import os
from typing import Any

import pytest

from progressdb_kms.crypto import envelope
from progressdb_kms.crypto.aead import KEY_SIZE, Aead
from progressdb_kms.crypto.keyring import REGION_SIZE, Keyring
from progressdb_kms.errors import (
    KeyDisabled,
    KeyNotFound,
    StoreUnavailable,
    Unavailable,
)
from progressdb_kms.fleet import lease
from progressdb_kms.fleet.board import SIZE, Board
from progressdb_kms.fleet.lease import Clock, Reading
from progressdb_kms.fleet.rows import KEY, ChangeRow, Point
from progressdb_kms.service.service import Readiness, Service
from progressdb_kms.store.contract import DekRecord
from tests.harness import postgres

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())


class Rows:
    """A reader."""

    def __init__(self) -> None:
        self.rows: dict[str, DekRecord] = {}
        self.point = Point(1, 0)
        self.reads = self.dropped = 0

    def at(self, key_id: str) -> tuple[DekRecord | None, Point]:
        self.reads += 1
        return self.rows.get(key_id), self.point

    def drop(self) -> None:
        self.dropped += 1

    def heavy(self) -> dict[str, int]:
        return {}


class Keeper:
    def __init__(self) -> None:
        self.there = False
        self.asked: list[str] = []

    def call(self, op: str, args: dict[str, Any], *more: Any) -> dict[str, Any]:
        self.asked.append(op)
        return {"there": self.there}


class Scene:
    def __init__(self) -> None:
        from progressdb_kms.service.fleetworker import FleetService

        self.rows, self.keeper = Rows(), Keeper()
        self.keyring = Keyring(memoryview(bytearray(REGION_SIZE)))
        self.kek_id = self.keyring.install(memoryview(bytearray(os.urandom(KEY_SIZE))), 1)
        self.keyring.activate(self.kek_id, 1)
        self.board = Board(memoryview(bytearray(SIZE)))
        self.board.flush(Point(1, 0))
        self.scratch = memoryview(bytearray(envelope.SCRATCH_SIZE))
        self.lend()
        rows: Any = self.rows
        self.sealed = b""
        args: Any = (self.keyring, None, self.keeper, None, None, dict)
        self.service = FleetService(self.board, 60.0, rows, *args, everywhere=lambda: self.board.knows(2))

    def lend(self, seconds: float = 3600.0) -> None:
        now = Clock().read()
        ahead = int((seconds - 57.0) * 1e9)
        self.board.grant(lease.granted(Reading(now.boot + ahead, now.wall + ahead, 0.0), 60.0))

    def make(self, key_id: str, state: str = "enabled") -> DekRecord:
        dek = memoryview(bytearray(os.urandom(KEY_SIZE)))
        with self.keyring.borrow(self.kek_id) as kek:
            blob = envelope.wrap(Aead(kek), self.kek_id, key_id, os.urandom(12), dek)
        self.rows.rows[key_id] = DekRecord(key_id, "t", blob, self.kek_id, 1, "2026-01-01T00:00:00Z", state)
        return self.rows.rows[key_id]

    def change(self, key_id: str, state: str) -> None:
        self.rows.rows[key_id] = self.rows.rows[key_id]._replace(state=state)
        self.rows.point = Point(1, self.rows.point.gen + 1)
        self.board.tell(ChangeRow(self.rows.point.gen, KEY, key_id))

    def encrypt(self, key_id: str) -> Any:
        return self.service.encrypt(self.service.entry(key_id), b"x", b"", self.scratch)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_it_is_ready_when_all_workers_of_the_host_are(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has asked one of them, and heard that it is, may get to the other with a key."""
    monkeypatch.setattr(Service, "readiness", lambda _: Readiness([], [], True, True))
    scene.board.met(1)
    assert "not every process" in scene.service.readiness().reasons[0]
    scene.board.met(2)
    assert scene.service.readiness().reasons == []


def test_a_dek_is_read_once(scene: Scene) -> None:
    scene.make("a")
    scene.encrypt("a")
    scene.encrypt("a")
    assert scene.rows.reads == 1


def test_a_change_of_it_is_seen_at_once_and_takes_no_other(scene: Scene) -> None:
    scene.make("a")
    scene.make("b")
    scene.encrypt("a")
    scene.encrypt("b")
    scene.change("a", "disabled")
    with pytest.raises(KeyDisabled):
        scene.encrypt("a")
    scene.encrypt("b")
    assert scene.rows.reads == 3


@pytest.mark.parametrize("left", [-1.0, 0.0])
def test_without_a_lease_all_is_refused(scene: Scene, left: float) -> None:
    wrapped = envelope.stored("a", scene.make("a").wrapped)
    scene.encrypt("a")
    scene.lend(left)
    dek = memoryview(bytearray(KEY_SIZE))
    for call in (
        lambda: scene.service.entry("a"),
        lambda: scene.service.record("a"),
        lambda: scene.service.thread_of("a"),
        lambda: scene.service.allow("a"),
        lambda: scene.service.dek(wrapped),
        lambda: scene.service.encrypt_many([("a", b"x", b"")], scene.scratch),
        lambda: scene.service.wrap(dek, None),
        lambda: scene.service.unwrap(wrapped, scene.scratch),
        lambda: scene.service.open_embedded(b"", scene.scratch),
        lambda: scene.service.page("", 1, None),
    ):
        with pytest.raises(Unavailable, match="no word of the database") as refused:
            call()
        assert refused.value.code == "store_unreachable"


def test_a_lease_that_ends_under_the_work_takes_its_answer(scene: Scene) -> None:
    scene.make("a")
    dek = scene.service.entry("a")
    scene.board.end()
    for work in (
        lambda: scene.service.encrypt(dek, b"x", b"", scene.scratch),
        lambda: scene.service.decrypt(dek, scene.sealed, b"", scene.scratch),
    ):
        scene.lend()
        scene.sealed = b"".join(scene.service.encrypt(dek, b"x", b"", scene.scratch))
        scene.board.end()
        with pytest.raises(Unavailable, match="no word"):
            work()


def test_a_server_that_is_behind_is_left(scene: Scene) -> None:
    scene.make("a")
    scene.board.flush(Point(1, 5))
    with pytest.raises(StoreUnavailable, match="behind"):
        scene.service.entry("a")
    assert scene.rows.dropped == 1
    scene.rows.point = Point(
        2, 5
    )  # a new primary, of which this host has not heard: good, but not remembered
    scene.encrypt("a")
    scene.encrypt("a")
    assert scene.rows.reads == 3


def test_that_there_is_none_is_asked_of_the_primary(scene: Scene) -> None:
    with pytest.raises(KeyNotFound):
        scene.service.entry("a")
    scene.keeper.there = True
    with pytest.raises(StoreUnavailable, match="behind"):
        scene.service.entry("a")
    assert scene.keeper.asked == ["confirm", "confirm"] and scene.rows.dropped == 1


def test_a_blob_of_the_caller_s_own_is_looked_up_once_until_it_is_changed(scene: Scene) -> None:
    wrapped = envelope.stored("a", scene.make("a").wrapped)
    row = scene.rows.rows.pop("a")
    scene.service.unwrap(wrapped, scene.scratch)
    scene.service.unwrap(wrapped, scene.scratch)
    assert scene.rows.reads == 1 and scene.keeper.asked == []
    scene.rows.rows["a"] = row
    scene.change("a", "disabled")
    with pytest.raises(KeyDisabled):
        scene.service.unwrap(wrapped, scene.scratch)
