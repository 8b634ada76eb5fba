"""On the way to the disk."""

from __future__ import annotations

import os

import pytest

from progressdb_kms import disk


def test_all_is_written_where_each_call_takes_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, write = os.pipe(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    disk.write_all(ends[1], b"0123456789")
    assert os.read(ends[0], 100) == b"0123456789"
    for end in ends:
        os.close(end)
