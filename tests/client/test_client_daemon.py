"""The public client and the real daemon: every method once, and what only the two together can show."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator

import pytest

from progressdb_kms.client import (
    AuthenticationFailed,
    Client,
    Conflict,
    ConnectionFailed,
    KeyDisabled,
    KeyNotFound,
    KeyShredded,
    PeerRefused,
    RequestRefused,
    Usage,
)
from tests.conftest import MakeDaemon
from tests.harness.daemon import Daemon
from tests.harness.fakekms import kek_id_of


@pytest.fixture
def kms(shared_daemon: Daemon) -> Iterator[Client]:
    with Client(shared_daemon.socket) as client:
        yield client


def test_a_dek_s_life(kms: Client) -> None:
    dek = kms.create_dek("thread é")
    assert dek.thread_id == "thread é" and dek.state == "enabled" and dek.wrapped
    assert kms.describe(dek.key_id) == dek._replace(wrapped=b"", usage=Usage(0, 0))
    assert kms.get_wrapped(dek.key_id).wrapped == dek.wrapped
    box = kms.encrypt(dek.key_id, b"text", b"aad")
    assert kms.disable(dek.key_id).state == "disabled"
    with pytest.raises(KeyDisabled):
        kms.decrypt(dek.key_id, box, b"aad")
    kms.enable(dek.key_id)
    assert kms.decrypt(dek.key_id, box, b"aad") == b"text"
    assert kms.shred(dek.key_id, pending_days=1).delete_at
    assert kms.enable(dek.key_id).delete_at == ""
    assert kms.shred(dek.key_id).state == "pending_deletion"
    assert kms.shred(dek.key_id, immediately=True).shredded_at
    with pytest.raises(KeyShredded):
        kms.decrypt(dek.key_id, box, b"aad")


@pytest.mark.parametrize("key_id", ["a", "a:b.c_d-e", "x" * 128])
def test_key_ids_of_one_s_own(kms: Client, key_id: str) -> None:
    assert kms.create_dek("t", key_id).key_id == key_id
    blob = kms.get_wrapped(key_id).wrapped
    assert kms.create_dek("t", key_id) == kms.describe(key_id)._replace(wrapped=blob, usage=None)
    with pytest.raises(Conflict):
        kms.create_dek("u", key_id)
    box = kms.encrypt(key_id, bytes(100_000))  # in the query of a raw body
    assert kms.decrypt(key_id, box) == bytes(100_000)
    assert kms.describe(key_id).key_id == kms.disable(key_id).key_id == key_id


@pytest.mark.parametrize("key_id", ["", "a b", "a/b", "../x", "é", "?", "a%00", "x" * 129])
def test_what_is_no_key_id(kms: Client, key_id: str) -> None:
    for call in (kms.describe, kms.get_wrapped, kms.disable, kms.shred):
        with pytest.raises(RequestRefused):
            call(key_id)


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 3_000_000])
@pytest.mark.parametrize("aad", [b"", b"aad", bytes(3000)])
def test_data_of_any_size(kms: Client, size: int, aad: bytes) -> None:
    dek, other = kms.create_dek("t"), kms.create_dek("t")
    plaintext = os.urandom(size)
    box = kms.encrypt(dek.key_id, plaintext, aad)
    assert kms.decrypt(dek.key_id, box, aad) == kms.decrypt(dek.wrapped, box, aad) == plaintext
    for key, data, bound in (
        (other.key_id, box, aad),
        (dek.key_id, box, aad + b"."),
        (dek.key_id, box[:-1], aad),
    ):
        with pytest.raises(AuthenticationFailed):
            kms.decrypt(key, data, bound)


def test_more_than_the_daemon_takes(kms: Client) -> None:
    key = kms.create_dek("t").key_id
    with pytest.raises(RequestRefused) as caught:
        kms.encrypt(key, bytes(9 << 20))
    assert (caught.value.status, caught.value.code) == (413, "body_too_large")
    assert kms.describe(key).state == "enabled"


def test_batches(kms: Client) -> None:
    keys = [kms.create_dek(f"t{number}").key_id for number in range(3)]
    items = [(keys[number % 3], f"message {number}".encode(), b"aad") for number in range(2500)]
    boxes = kms.encrypt_batch([*items, ("nobody", b"x", b"")])
    assert isinstance(boxes[-1], KeyNotFound)
    good = [box for box in boxes[:-1] if isinstance(box, bytes)]
    assert len(good) == 2500
    back = kms.decrypt_batch([(item[0], box, item[2]) for item, box in zip(items, good)])
    assert back == [item[1] for item in items]
    assert isinstance(kms.decrypt_batch([(keys[0], good[1], b"aad")])[0], AuthenticationFailed)


def test_a_batch_of_large_items(kms: Client) -> None:
    key = kms.create_dek("t").key_id
    items = [(key, os.urandom(1 << 20)) for _ in range(12)]
    boxes = kms.encrypt_batch(items)
    back = kms.decrypt_batch([(key, box) for box in boxes if isinstance(box, bytes)])
    assert back == [data for _, data in items]


def test_reencrypt_wrap_and_unwrap(kms: Client) -> None:
    old, new = kms.create_dek("a"), kms.create_dek("b")
    box = kms.encrypt(old.key_id, b"text", b"one")
    moved = kms.reencrypt(old.key_id, new.key_id, box, b"one", b"two")
    assert kms.decrypt(new.key_id, moved, b"two") == b"text"
    assert kms.decrypt(new.key_id, kms.reencrypt(old.key_id, new.key_id, box, b"one"), b"one") == b"text"
    dek = os.urandom(32)
    assert kms.unwrap(kms.wrap(dek).wrapped) == kms.unwrap(kms.wrap(dek, "mine").wrapped) == dek
    assert len(kms.unwrap(old.wrapped)) == 32


def test_list(kms: Client) -> None:
    made = sorted(kms.create_dek("listed & found").key_id for _ in range(7))
    assert [dek.key_id for dek in kms.list("listed & found", page_size=3)] == made
    with pytest.raises(RequestRefused) as caught:  # an empty name meant all DEKs
        list(kms.list(""))
    assert caught.value.code == "invalid_thread_id"
    every = [dek.key_id for dek in kms.list(page_size=2)]
    assert set(made) <= set(every) and every == sorted(every)


def test_the_service(kms: Client, shared_daemon: Daemon) -> None:
    assert kms.healthy() and kms.ready() and "# TYPE " in kms.metrics()
    assert kms.status()["kek_id"] == kek_id_of(shared_daemon.kek)


def test_receipts_are_in_the_log(kms: Client, shared_daemon: Daemon) -> None:
    receipts = []
    for number in range(5):
        kms.create_dek(f"witness {number}")
        receipts.append(kms.last_receipt)
    (shared_daemon.home / "receipts").write_text("".join(f"{receipt}\n" for receipt in receipts))
    done = shared_daemon.offline("audit", "verify", "--receipts", "receipts", "--json")
    assert done.returncode == 0 and b'"receipts": 5' in done.stdout, done.stderr
    (shared_daemon.home / "receipts").write_text(
        receipts[0][:-1] + ("0" if receipts[0][-1] != "0" else "1") + "\n"
    )
    done = shared_daemon.offline("audit", "verify", "--receipts", "receipts")
    assert done.returncode == 1 and re.search(rb"^result +fault$", done.stdout, re.M)


def test_rotation_rewrap_and_many_threads(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(workers=2)
    errors: list[BaseException] = []
    done = threading.Event()
    with Client(daemon.socket) as kms:
        key = kms.create_dek("t").key_id
        box = kms.encrypt(key, b"text")

        def work() -> None:
            try:
                while not done.is_set():
                    assert kms.decrypt(key, box) == b"text"
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        new = os.urandom(32)
        old_id = kms.status()["kek_id"]
        dry = kms.rotate_kek(new, dry_run=True)
        assert (dry.kek_id, dry.rewrapped, dry.by_kek) == (kek_id_of(new), 1, {old_id: 1})
        result = kms.rotate_kek(new)
        assert (result.kek_id, result.kek_version, result.rewrapped) == (
            kek_id_of(new),
            "2",
            1,
        ) and result.backup
        other = os.urandom(32)
        assert kms.rewrap(key, other).kek_id == kms.describe(key).kek_id == kek_id_of(other)
        done.set()
        for thread in threads:
            thread.join()
        assert not errors
        with pytest.raises(Conflict) as caught:
            kms.rotate_kek(new)
        assert caught.value.code == "kek_in_use"


def test_a_restart_goes_unnoticed(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(workers=1)
    with Client(daemon.socket) as kms:
        key = kms.create_dek("t").key_id
        box = kms.encrypt(key, b"text")
        daemon.stop()
        with pytest.raises(ConnectionFailed):
            kms.status()
        daemon.start()
        assert kms.decrypt(key, box) == b"text"
        daemon.stop()
        daemon.start()
        assert kms.create_dek("t").key_id != key  # over a connection that went stale unseen


def test_a_peer_that_is_not_let_in(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon({"allowed_peer_uids": [os.getuid()], "admin_peer_uids": [4242]}, workers=1)
    with Client(daemon.socket) as kms:
        kms.create_dek("t")
        with pytest.raises(PeerRefused):
            kms.rotate_kek(os.urandom(32))
