"""A handle for one DEK, receipts, and calls that are repeated within a budget."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.client import (
    AuthenticationFailed,
    Client,
    ClientError,
    ConnectionFailed,
    KeyShredded,
    Receipted,
    Unavailable,
    calls,
)
from progressdb_kms.client.handle import key_id_of_thread
from progressdb_kms.encoding import KEY_ID
from tests.harness import REPO, Daemon
from tests.harness.fakekms import FakeKms


@pytest.fixture(scope="module")
def kms(daemon: Daemon) -> Iterator[Client]:
    with Client(daemon.socket) as client:
        yield client


@pytest.mark.parametrize(
    "thread, expected",
    [
        ("room-42", "thread:room-42"),
        ("Küche", "thread:sha256:"),
        ("a b", "thread:sha256:"),
        ("x" * 121, "thread:" + "x" * 121),
        ("x" * 122, "thread:sha256:"),
        ("", "thread:"),
    ],
)
def test_the_key_id_of_a_thread(thread: str, expected: str) -> None:
    found = key_id_of_thread(thread)
    assert found.startswith(expected) and KEY_ID.fullmatch(found)


@pytest.mark.parametrize("thread", [None, 42, b"room"], ids=repr)
def test_what_is_no_text_names_no_thread(kms: Client, thread: Any) -> None:
    """A DEK was made for all threads that nobody had named."""
    with pytest.raises(TypeError, match="is a str"):
        kms.dek(thread)
    assert list(kms.list(str(thread))) == []


def test_a_thread_has_one_dek_whoever_asks(kms: Client) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(kms.dek("one").key_id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and set(found) == {"thread:one"}
    assert [dek.key_id for dek in kms.list("one")] == ["thread:one"]


def test_encrypt_and_decrypt(kms: Client) -> None:
    box, other = kms.dek("a"), kms.dek("b")
    sealed = box.encrypt(b"hello", b"message 7")
    assert box.decrypt(sealed, b"message 7") == b"hello"
    with pytest.raises(AuthenticationFailed):
        other.decrypt(sealed, b"message 7")
    assert kms.dek(key_id=box.key_id).decrypt(sealed, b"message 7") == b"hello"
    page = box.encrypt_many([b"1", (b"2", b"aad")])
    assert all(isinstance(item, bytes) for item in page)
    opened = box.decrypt_many([page[0], (page[1], b"aad"), page[1]])  # type: ignore[list-item]
    assert opened[:2] == [b"1", b"2"] and isinstance(opened[2], ClientError)
    assert box.describe().thread_id == "a" and repr(box) == "DekHandle('thread:a')"


def test_receipts(kms: Client, daemon: Daemon, tmp_path: Path) -> None:
    box = kms.dek("receipts").receipted
    kept = [box.encrypt(b"hello"), box.encrypt(b"again")]
    assert all(isinstance(one, Receipted) and one.receipt.count(":") == 2 for one in kept)
    kept.append(box.decrypt(kept[0].data))
    assert kept[2].data == b"hello" and len({one.receipt for one in kept}) == 3
    page = box.encrypt_many([b"1", (b"2", b"aad")] + [b"3"] * 1000)  # more than one request takes
    opened = box.decrypt_many([one.data for one in page if isinstance(one, Receipted)])
    assert isinstance(opened[1], ClientError)  # its AAD was left out
    for many in (page, opened):
        found = [one for one in many if isinstance(one, Receipted)]
        assert len(found) >= 1001 and len({one.receipt for one in found}) == 2
        kept += found[:1] + found[-1:]
    witness = tmp_path / "receipts"
    for text, code in (("\n".join(one.receipt for one in kept), 0), (kept[0].receipt[:-16] + "0" * 16, 1)):
        witness.write_text(text)
        done = daemon.offline("audit", "verify", "--receipts", str(witness), "--json")
        assert done.returncode == code, done


def test_what_was_shredded_stays_so(kms: Client) -> None:
    box = kms.dek("gone")
    kms.shred(box.key_id, immediately=True)
    with pytest.raises(KeyShredded):
        kms.dek("gone")


def test_the_readme_s_example_runs(daemon: Daemon) -> None:
    (block,) = re.findall(
        r"```python\n(from progressdb_kms.client.*?)```", (REPO / "README.md").read_text(), re.S
    )
    names: dict[str, Any] = {}
    exec(block.replace("/run/progressdb-kms/kms.sock", str(daemon.socket)), names)
    assert names["kept"].receipt and len(names["kept"].data) == 33


# ---- repeating -----------------------------------------------------------------------------------------


@pytest.fixture
def fake(short_tmp: Path) -> Iterator[FakeKms]:
    with FakeKms(short_tmp / "s") as one:
        yield one


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "FIRST_PAUSE", 0.005)


def test_a_busy_daemon_is_asked_again(fake: FakeKms, quick: None) -> None:
    key = fake.create("t", "k")["key_id"]
    fake.refuse["/encrypt"] = (503, "overloaded", "too many connections")
    threading.Timer(0.3, fake.refuse.clear).start()
    with Client(fake.path, retry_seconds=20) as client:
        assert len(client.encrypt(key, b"x")) == 29


def test_the_budget_ends(fake: FakeKms, quick: None) -> None:
    fake.refuse["/encrypt"] = (503, "audit_unavailable", "no room")
    with Client(fake.path, retry_seconds=0.3) as client, pytest.raises(Unavailable, match="no room"):
        client.encrypt("k", b"x")
    assert len(fake.seen) > 2


def test_without_a_budget_nothing_is_repeated(fake: FakeKms) -> None:
    fake.refuse["/encrypt"] = (503, "overloaded", "too many connections")
    with Client(fake.path) as client, pytest.raises(Unavailable):
        client.encrypt("k", b"x")
    assert len(fake.seen) == 1


def test_what_must_not_be_done_twice_is_not_repeated(fake: FakeKms, quick: None) -> None:
    fake.refuse["/deks"] = (503, "store_unavailable", "the disk is full")
    with Client(fake.path, retry_seconds=5) as client, pytest.raises(Unavailable):
        client.create_dek("t")
    assert len(fake.seen) == 1


def test_a_daemon_that_is_not_there_yet_is_waited_for(short_tmp: Path, quick: None) -> None:
    made: list[FakeKms] = []

    def come() -> None:
        time.sleep(0.3)
        made.append(FakeKms(short_tmp / "s").__enter__())

    thread = threading.Thread(target=come)
    thread.start()
    with Client(short_tmp / "s", retry_seconds=20) as client:
        assert client.create_dek("t").thread_id == "t"  # nothing was sent, so even a create may be repeated
    thread.join()
    made[0].__exit__()
    with Client(short_tmp / "s", retry_seconds=0.1) as client, pytest.raises(ConnectionFailed):
        client.status()
