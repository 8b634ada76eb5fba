"""Key_ids that begin so: found from one cursor, however many others there are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.client import Client
from progressdb_kms.encoding import KEY_ID
from progressdb_kms.tools.keyids import before, beginning
from tests.harness.daemon import cli
from tests.harness.fakekms import FakeKms

IDS = st.from_regex("[0Aaz][-.0:A_az]{0,4}", fullmatch=True)


@given(IDS, st.lists(IDS, max_size=20))
def test_the_cursor_stands_before_all_that_begin_so_and_behind_all_that_are_less(
    prefix: str, others: list[str]
) -> None:
    cursor = before(prefix)
    assert cursor is not None and (not cursor or KEY_ID.fullmatch(cursor))
    found = sorted(name for name in {prefix, *others} if name > cursor)
    wanted = sorted(name for name in {prefix, *others} if name.startswith(prefix))
    assert found[: len(wanted)] == wanted


@pytest.mark.parametrize("prefix", ["-a", " ", "ä", "a b", "a" * 129])
def test_what_no_key_id_begins_with(prefix: str) -> None:
    assert before(prefix) is None


def test_a_prefix_is_one_page(short_tmp: Path) -> None:
    with FakeKms(short_tmp / "s") as kms, Client(short_tmp / "s") as client:
        for number in range(30):
            kms.create("t", f"k_{number:02d}")
        kms.create("t", "t:17")
        del kms.seen[:]
        assert [dek.key_id for dek in beginning(client, "k_07", None, 5)] == ["k_07"]
        assert len(kms.seen) == 1
        assert list(beginning(client, "x", None, 5)) == list(beginning(client, "-", None, 5)) == []
        done = cli("list", "--ids", "--prefix", "k_1", "--limit", "3", "--socket", str(kms.path))
        assert (done.returncode, done.stdout, done.stderr) == (0, b"k_10\nk_11\nk_12\n", b"")
        done = cli("list", "--ids", "--prefix", "t:", "--socket", str(kms.path))
        assert done.stdout == b"t:17\n"
