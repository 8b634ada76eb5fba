"""Which incarnations of a host are known to be over."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from progressdb_kms.errors import StoreUnavailable
from progressdb_kms.fleet.identity import FILE_NAME, KEPT, Identity


def identity(folder: Path, boot: str = "boot-1") -> Identity:
    return Identity(folder, "h", "name", boot)


def test_those_of_this_boot_and_folder_are_over(tmp_path: Path) -> None:
    first = identity(tmp_path)
    made = [first.fresh(), first.fresh()]
    assert first.gone() == [] and len(set(made)) == 2
    second = identity(tmp_path)
    assert second.gone() == made
    third = second.fresh()
    assert identity(tmp_path).gone() == [*made, third]


def test_over_a_reboot_nobody_knows(tmp_path: Path) -> None:
    identity(tmp_path).fresh()
    assert identity(tmp_path, "boot-2").gone() == []
    assert identity(tmp_path, "").gone() == []


def test_a_copy_knows_nothing_of_the_original(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    copy.mkdir()
    identity(original).fresh()
    (copy / FILE_NAME).write_bytes((original / FILE_NAME).read_bytes())
    assert identity(copy).gone() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"place": 1}', '{"place": null, "incarnations": 3}'])
def test_what_cant_be_read_tells_of_none(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    one = identity(tmp_path)
    assert one.gone() == []
    assert one.fresh()


def test_the_file_stays_small_and_ours(tmp_path: Path) -> None:
    one = identity(tmp_path)
    made = [one.fresh() for _ in range(KEPT + 5)]
    assert identity(tmp_path).gone() == made[-KEPT:]
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


def test_without_a_note_no_registration(tmp_path: Path) -> None:
    one = identity(tmp_path)
    (tmp_path / (FILE_NAME + ".part")).mkdir()
    with pytest.raises(StoreUnavailable, match=FILE_NAME):
        one.fresh()
