"""Snapshots of rotations: a file a key, or above SMALL rows one file of lines; found, shredded, thrown
away."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.encoding import b64encode
from progressdb_kms.errors import StoreUnavailable
from progressdb_kms.store import snapshots
from progressdb_kms.store.contract import DekRecord
from progressdb_kms.store.policy import SHREDDED
from progressdb_kms.store.snapshots import LINES, Snapshot, find, forget, unfinished

OLD, NEW = "00" * 8, "11" * 8


def dek(key_id: str, kek_id: str = OLD) -> DekRecord:
    return DekRecord(key_id, "t" * (len(key_id) * 7 % 40), key_id.encode() * 3, kek_id, 1, "2026")


def made(folder: Path, names: list[str]) -> Snapshot:
    snapshot = Snapshot(folder, time.time(), OLD, len(names))
    for start in range(0, len(names), 7):
        snapshot.save((dek(name), dek(name, NEW)) for name in names[start : start + 7])
    return snapshot


NAMES = sorted([f"k_{n:x}" for n in range(0, 4000, 13)] + ["a", "Z", "0", "k_", "k_:1", "zz" * 60])


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(snapshots, "SMALL", 10)
    snapshot = made(tmp_path, NAMES)
    yield snapshot.path / LINES
    snapshot.close()


def test_each_line_is_found(lines: Path) -> None:
    assert os.listdir(lines.parent) == [LINES] and lines.stat().st_mode & 0o777 == 0o600
    for name in NAMES:
        found = find(lines, name)
        assert found is not None and f'"key_id":"{name}"'.encode() in found[1] and b'"wrapped":' in found[1]
    for name in ("", "k_zz", "b", "00", "zzz"):
        assert find(lines, name) is None


def test_the_longest_lines_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "SMALL", 1)
    names = [f"{letter}{'x' * 127}" for letter in "abcdefghij"]
    records = [dek(name)._replace(thread_id="\U0001f600" * 512, wrapped=bytes(300)) for name in names]
    snapshot = Snapshot(tmp_path, 0.0, "0" * 16, len(names))
    snapshot.save([(record, record) for record in records])
    for name in names:
        found = find(snapshot.path / LINES, name)
        assert found is not None and 6000 < len(found[1]) < snapshots.LONGEST - 500
    snapshot.close()


def test_a_shred_takes_all_but_the_name(lines: Path, tmp_path: Path) -> None:
    size = lines.stat().st_size
    gone = [NAMES[0], NAMES[-1], *NAMES[10:200:7]]
    blobs = {name: json_of(lines, name) for name in gone}
    for _ in range(2):  # repeating it does no harm
        for name in gone:
            forget(tmp_path, name)
    text = lines.read_bytes()
    assert len(text) == size and text.count(b"\n") == len(NAMES)
    for name in NAMES:
        found = find(lines, name)
        assert found is not None and (b'"wrapped":' in found[1]) == (name not in gone)
    assert not any(blob in text for blob in blobs.values())


def json_of(lines: Path, name: str) -> bytes:
    found = find(lines, name)
    assert found is not None
    return found[1].partition(b'"wrapped":"')[2].partition(b'"')[0]


@pytest.mark.parametrize("left", [1, 30, 90])
def test_a_torn_line_is_no_hindrance(lines: Path, tmp_path: Path, left: int) -> None:
    last = json_of(lines, NAMES[-1])[:16]
    whole = find(lines, NAMES[-1])
    assert whole is not None
    os.truncate(lines, whole[0] + left)
    forget(tmp_path, NAMES[3])
    forget(tmp_path, NAMES[-1])
    text = lines.read_bytes()
    assert last not in text and text.endswith(b"\n") and text.count(b"\n") == len(NAMES) - 1
    found = find(lines, NAMES[3])
    assert found is not None and b'"wrapped":' not in found[1]


def test_small_stores_have_a_file_a_key(tmp_path: Path) -> None:
    snapshot = made(tmp_path, NAMES)
    assert sorted(os.listdir(snapshot.path)) == sorted(f"{name}.json" for name in NAMES)
    assert snapshot.save([(dek("x")._replace(state=SHREDDED), dek("x"))]) == 0
    forget(tmp_path, NAMES[5])
    assert not (snapshot.path / f"{NAMES[5]}.json").exists()
    snapshot.close()


def test_a_key_of_a_ledger_s_name_takes_no_ledger_along(tmp_path: Path) -> None:
    """Callers choose key_ids, and the name of a ledger is known. What the Go service left of a key goes."""
    made = Snapshot(tmp_path, 0.0, "1" * 16, 1)
    mine, other = (made.path.with_name(name) for name in ("k.20250101T000000", "k.l.20250101T000000"))
    for path in (mine, other):
        path.write_bytes(b"wrapped")
    list(made.finish(memoryview(bytes(32)), "2" * 16))
    for key_id in (made.path.name, "k"):
        forget(tmp_path, key_id)
    assert snapshots.ledger(made.path).exists() and other.exists() and not mine.exists()


def test_one_that_was_left_is_told_from_one_that_is_written(tmp_path: Path) -> None:
    snapshot = made(tmp_path, NAMES)
    assert unfinished(tmp_path) == []
    snapshot.close()
    assert unfinished(tmp_path) == [snapshot.path]
    while snapshots.discard(snapshot.path, 50):
        assert unfinished(tmp_path) == [snapshot.path]
    assert os.listdir(tmp_path / snapshots.FOLDER) == []


def test_a_finished_one_is_kept(tmp_path: Path) -> None:
    snapshot = made(tmp_path, NAMES)
    for _ in snapshot.finish(memoryview(bytes(32)), NEW):
        pass
    assert unfinished(tmp_path) == []


def test_too_few_inodes_are_told_with_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)

    class Few:
        f_files, f_favail = real.f_files or 100, 20

    monkeypatch.setattr(os, "statvfs", lambda path: Few)
    with pytest.raises(StoreUnavailable, match=f"needs {len(NAMES) + 3} inodes.* has 20 free"):
        made(tmp_path, NAMES)
    monkeypatch.setattr(snapshots, "SMALL", 10)
    made(tmp_path, NAMES).close()


@pytest.mark.parametrize("small", [10, 10_000], ids=["lines", "files"])
def test_a_shred_beside_a_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    """The command takes away what the daemon is about to overwrite."""
    monkeypatch.setattr(snapshots, "SMALL", small)
    gone, kept = made(tmp_path, NAMES), made(tmp_path, NAMES)
    gone.close()
    kept.close()
    name = "_blank" if small == 10 else "destroy"
    real, taken = getattr(snapshots, name), []

    def late(path: Path, *more: str) -> None:
        if path.parent == gone.path:
            path.unlink()
            taken.append(path)
        real(path, *more)

    monkeypatch.setattr(snapshots, name, late)
    forget(tmp_path, NAMES[3])
    assert len(taken) == 1
    wrapped = b64encode(dek(NAMES[3]).wrapped).encode()
    assert all(wrapped not in path.read_bytes() for path in kept.path.iterdir())


def test_a_discard_beside_a_prune(tmp_path: Path) -> None:
    snapshot = made(tmp_path, NAMES)
    snapshot.close()
    for path in snapshot.path.iterdir():
        path.unlink()
    snapshot.path.rmdir()
    assert snapshots.discard(snapshot.path, 5) is False
    assert not snapshots.ledger(snapshot.path).exists()
