"""The power goes at any moment: what was acknowledged is on the disk, and what was shredded stays shredded.

One run of the real daemon is recorded (every kind of change, each marked when its answer was read), and its
data-dir rebuilt as it may stand at many moments. Each is opened as the daemon opens it at its next start.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.audit import verify
from progressdb_kms.audit.log import FILE_NAME as AUDIT_LOG
from progressdb_kms.config.keysource import PREVIOUS
from progressdb_kms.crypto import aead, envelope
from progressdb_kms.crypto.aead import Aead
from progressdb_kms.crypto.envelope import parse
from progressdb_kms.crypto.keyring import REGION_SIZE, Keyring
from progressdb_kms.crypto.memory import LockedBuffer
from progressdb_kms.errors import KMSError
from progressdb_kms.service import start
from progressdb_kms.store.heads import heads
from progressdb_kms.store.sqlite import SqliteStore
from tests.harness import Daemon
from tests.harness.configured import configured, named
from tests.harness.faults import need_strace
from tests.harness.powerloss import Mark, Recording, Sync

TEXT = b"a message"


class Run:
    """A recorded run. Labels are `dek <key_id>`, `<change> <key_id>` and `rotated`."""

    def __init__(self) -> None:
        self.keks = {name: os.urandom(32) for name in ("first", "second", "third")}
        self.sealed: dict[str, bytes] = {}  # a message under each DEK
        self.rotated: dict[str, str] = {}  # wrapped DEKs as the rotation found them, as base64
        self.shredded: list[str] = []  # the wrapped DEK that is shredded, as base64, in each form that it had
        self.recording: Recording


def drive(daemon: Daemon, mark: Mark, run: Run) -> None:
    with daemon.session() as kms:
        wrapped: dict[str, str] = {}

        def create(count: int) -> list[str]:
            made = []
            for _ in range(count):
                dek = kms.create_dek("thread")
                mark(f"dek {dek['key_id']}")
                run.sealed[dek["key_id"]] = kms.encrypt(dek["key_id"], TEXT)
                wrapped[dek["key_id"]] = dek["wrapped"]
                made.append(dek["key_id"])
            return made

        keys = create(6)
        kms.ok("POST", f"/deks/{keys[0]}/disable")
        mark(f"disabled {keys[0]}")
        run.rotated = dict(wrapped)
        kms.rotate(run.keks["second"])
        mark("rotated")
        run.shredded += [wrapped[keys[1]], kms.get_wrapped(keys[1])["wrapped"]]
        kms.ok("POST", "/rewrap", {"key_id": keys[2], "new_kek_hex": run.keks["third"].hex()})
        mark(f"rewrapped {keys[2]}")
        keys += create(2)
        mark(f"begun {keys[1]}")
        kms.ok("DELETE", f"/deks/{keys[1]}", {"immediately": True})
        mark(f"shredded {keys[1]}")
        kms.ok("DELETE", f"/deks/{keys[3]}")
        mark(f"pending {keys[3]}")
        create(2)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    need_strace()
    made = Run()
    daemon = Daemon(kek=made.keks["first"], workers=2)
    try:
        made.recording = Recording.of_daemon(daemon, lambda daemon, mark: drive(daemon, mark, made))
        yield made
    finally:
        daemon.close()


@contextlib.contextmanager
def rebuilt(run: Run, point: int, mode: str, seed: int) -> Iterator[Path]:
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108
    folder = Path(tempfile.mkdtemp(prefix="kms-power-", dir=base))
    try:
        yield run.recording.rebuild(point, mode, seed, into=folder)
    finally:
        shutil.rmtree(folder)


IN_ORDER = ("dropped", "kept", "prefix", "names", "data")
"""Modes in which a file that is only appended to loses its end and never its middle, as on ext4 and XFS. In
the others, which POSIX allows, unsynced audit records may be missing between others, and are reported."""


def recover(run: Run, folder: Path, acknowledged: list[str], mode: str) -> None:
    """Start on it, with a configuration that names all the keys; once the rotation was acknowledged, without
    the one that it left."""
    region = LockedBuffer(REGION_SIZE)
    keyring = Keyring(region.view)
    names = ("second", "third") if "rotated" in acknowledged else ("second", "third", "first")
    keks = [keyring.install(memoryview(bytearray(run.keks[name])), 0) for name in names]
    second, *others = keks
    keys = configured(named(second), *(named(kek_id, "test", PREVIOUS) for kek_id in others))
    store, book, _ = start.open_store(folder, keyring, keys)
    with contextlib.closing(store), contextlib.closing(book):
        report = verify.verify([folder / AUDIT_LOG], keyring.audit_key, heads(store))
        assert report.fault is None or mode not in IN_ORDER, report.fault
        if "rotated" in acknowledged:
            begun = {label.split(" ")[1] for label in acknowledged if label.startswith("begun")}
            saved(folder, {key_id: blob for key_id, blob in run.rotated.items() if key_id not in begun})
        for label in acknowledged:
            held(run, store, keyring, label.split(" "), acknowledged)
    region.wipe()


def held(run: Run, store: SqliteStore, keyring: Keyring, label: list[str], others: list[str]) -> None:
    """Is what was acknowledged still so?"""
    if label == ["rotated"]:
        return  # the start without the old key was the test, and `saved`
    what, key_id = label
    record = store.get(key_id)
    assert record is not None, f"{key_id} is lost"
    states = {"disabled": "disabled", "pending": "pending_deletion", "shredded": "shredded"}
    if what in states:
        assert record.state == states[what]
    if record.state == "shredded":
        assert f"begun {key_id}" in others and record.wrapped == b""
        return
    wrapped = parse(record.wrapped)
    with keyring.borrow(str(wrapped.kek_id)) as kek:
        dek = envelope.unwrap(Aead(kek), wrapped, memoryview(bytearray(envelope.SCRATCH_SIZE)))
    if key_id in run.sealed:
        assert aead.open(Aead(dek), run.sealed[key_id], b"") == TEXT


def saved(folder: Path, wrapped: dict[str, str]) -> None:
    """The snapshot of an acknowledged rotation is whole, but for a DEK that is being shredded."""
    for key_id, blob in wrapped.items():
        (row,) = folder.glob(f"kms-deks-backup/*/{key_id}.json")
        assert json.loads(row.read_text())["wrapped"] == blob


def traces(folder: Path, wrapped: list[str]) -> list[Path]:
    """The files in which a piece of a wrapped DEK stands: what follows its nonce is its own."""
    pieces = [text[-64:-4].encode() for text in wrapped]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(piece in path.read_bytes() for piece in pieces)]


def survive(run: Run, count: int, seed: int) -> None:
    assert run.recording.points() > 100 and len(run.recording.acknowledged(run.recording.points())) == 16
    for point, mode, own in run.recording.sample(count, seed):
        with rebuilt(run, point, mode, own) as folder:
            try:
                acknowledged = run.recording.acknowledged(point)
                if any(label.startswith("shredded") for label in acknowledged):
                    assert traces(folder, run.shredded) == []
                recover(run, folder, acknowledged, mode)
            except BaseException:
                print(f"point {point}, {mode}, seed {own}:\n{run.recording.explain(point)}")
                raise


def test_at_400_moments(run: Run) -> None:
    survive(run, 400, seed=1)


@pytest.mark.long
def test_at_10000_moments(run: Run) -> None:
    survive(run, 10_000, seed=int.from_bytes(os.urandom(4), "big"))


def test_a_missing_sync_would_be_seen(run: Run) -> None:
    """The replay finds what it is for: without the run's syncs of files, keys are lost."""
    ops = run.recording.ops
    try:
        run.recording.ops = [op._replace(target=-1) if isinstance(op, Sync) else op for op in ops]
        with pytest.raises((AssertionError, KMSError)):
            survive(run, 40, seed=1)
    finally:
        run.recording.ops = ops
