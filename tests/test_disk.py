"""On the way to the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from progressdb_kms import disk


def test_all_is_written_where_each_call_takes_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, write = os.pipe(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    disk.write_all(ends[1], b"0123456789")
    assert os.read(ends[0], 100) == b"0123456789"
    for end in ends:
        os.close(end)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    for text in (b"first", b"second"):
        disk.put(file, text)
        assert file.read_bytes() == text and file.stat().st_mode & 0o777 == 0o600

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="full"):
            disk.put(file, b"third")
    assert file.read_bytes() == b"second"
    disk.put(file, b"fourth")  # over what that left
    assert os.listdir(tmp_path) == ["f"] and file.read_bytes() == b"fourth"
