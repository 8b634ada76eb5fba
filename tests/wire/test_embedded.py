"""What ProgressDB's embedded mode sealed under the master key itself: opened where it is asked for, moved
under a DEK, and counted until nothing needs it any more."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.encoding import is_text
from tests.harness import Daemon, Session
from tests.harness.daemon import write_secret
from tests.harness.wire import b64

OLD = os.urandom(32)
MESSAGE = b'{"text":"from embedded mode"}'


def sealed(kek: bytes, text: bytes) -> str:
    """As a request carries it: base64 of the stored value."""
    nonce = os.urandom(12)
    box = nonce + AESGCM(kek).encrypt(nonce, text, None)
    return b64(json.dumps({"ciphertext": b64(box), "key_info": {}}, separators=(",", ":")).encode())


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    running = Daemon(workers=1)
    write_secret(running.home / "old", OLD.hex().encode())
    previous = [{"file": str(running.home / "old")}]
    running.write_config({"open_embedded_messages": True, "previous_master_keys": previous, "workers": 1})
    with running:
        yield running


@pytest.fixture
def key(kms: Session) -> str:
    return kms.create_dek("thread")["key_id"]


def opened(kms: Session, key_id: str, ciphertext: str, status: int = 200, **more: Any) -> Any:
    return kms.ok("POST", "/decrypt", {"key_id": key_id, "ciphertext": ciphertext, **more}, status)


def records(daemon: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line)["event"] for line in daemon.audit_log.read_text().splitlines()]


class TestDecrypt:
    @pytest.mark.parametrize(
        "text", [MESSAGE, b"null", b'"' + b"x" * 30 + b'"', b"[" + b"1," * 40_000 + b"1]"]
    )
    def test_under_either_key_as_raw_json(self, daemon: Daemon, kms: Session, key: str, text: bytes) -> None:
        for kek in (daemon.kek, OLD):
            fields = {"key_id": key, "ciphertext": sealed(kek, text)}
            reply = kms.request("POST", "/decrypt", fields)
            assert (reply.status, reply.body) == (200, b'{"plaintext":' + text + b"}")
        last = records(daemon)[-1]
        assert (last["op"], last["key_id"], last["embedded"]) == ("decrypt", key, 1)

    def test_a_wrapped_dek_looks_the_same_and_stays_closed(
        self, daemon: Daemon, kms: Session, key: str
    ) -> None:
        for dek in (os.urandom(32), bytes(32), b"\xff" * 32, b"not json, and of thirty-two bytes"[:32]):
            assert opened(kms, key, sealed(daemon.kek, dek), 422)["error"]["code"] == "authentication_failed"

    @pytest.mark.parametrize("text", [b"", b"plain text", b"\xef\xbb\xbf{}", b"NaN", bytes(100)])
    def test_only_json_leaves(self, daemon: Daemon, kms: Session, key: str, text: bytes) -> None:
        assert opened(kms, key, sealed(daemon.kek, text), 422)["error"]["code"] == "authentication_failed"

    def test_another_key_a_changed_bit_an_aad(self, daemon: Daemon, kms: Session, key: str) -> None:
        opened(kms, key, sealed(os.urandom(32), MESSAGE), 422)
        value = json.loads(base64.b64decode(sealed(OLD, MESSAGE)))
        box = bytearray(base64.b64decode(value["ciphertext"]))
        box[20] ^= 1
        opened(kms, key, b64(json.dumps({**value, "ciphertext": b64(box)}).encode()), 422)
        opened(kms, key, sealed(OLD, MESSAGE), 422, aad=b64(b"room"))

    @pytest.mark.parametrize(
        "value",
        [
            b"{}",
            b"{",
            b'{"ciphertext":""}',
            b'{"ciphertext":"@"}',
            b'{"ciphertext":7}',
            b'{"ciphertext":"AAAA","x":1}',
        ],
    )
    def test_other_objects_are_no_messages(self, kms: Session, key: str, value: bytes) -> None:
        assert opened(kms, key, b64(value), 422)["error"]["code"] == "authentication_failed"

    def test_a_thread_that_is_out_of_use_stays_closed(self, kms: Session, key: str) -> None:
        kms.ok("POST", f"/deks/{key}/disable")
        opened(kms, key, sealed(OLD, MESSAGE), 423)
        kms.ok("DELETE", f"/deks/{key}", {"immediately": True})
        opened(kms, key, sealed(OLD, MESSAGE), 410)
        opened(kms, "k_absent", sealed(OLD, MESSAGE), 404)

    def test_not_in_batches_and_raw_bodies(self, kms: Session, key: str) -> None:
        item = {"key_id": key, "ciphertext": sealed(OLD, MESSAGE)}
        assert "error" in kms.ok("POST", "/decrypt_batch", {"items": [item]})["items"][0]
        raw = base64.b64decode(item["ciphertext"])
        assert kms.request("POST", f"/decrypt?key_id={key}", raw).status == 422


class TestMoved:
    def test_one_under_its_dek(self, kms: Session, key: str) -> None:
        fields = {"key_id": key, "new_key_id": key, "ciphertext": sealed(OLD, MESSAGE)}
        moved = kms.ok("POST", "/reencrypt", fields)["ciphertext"]
        assert kms.decrypt(key, base64.b64decode(moved)) == MESSAGE
        token = b64(json.dumps(moved).encode())  # as the server stores it
        assert opened(kms, key, token) == {"plaintext": json.loads(MESSAGE)}

    def test_a_batch(self, daemon: Daemon, kms: Session, key: str) -> None:
        values = [
            sealed(OLD, MESSAGE),
            sealed(daemon.kek, b"7"),
            sealed(OLD, b"no json"),
            sealed(os.urandom(32), b"7"),
        ]
        values.append(b64(kms.encrypt(key, b"ours")))
        items = [{"key_id": key, "new_key_id": key, "ciphertext": value} for value in values]
        found = kms.ok("POST", "/reencrypt", {"items": items})["items"]
        assert ["error" in item for item in found] == [False, False, True, True, False]
        texts = [kms.decrypt(key, base64.b64decode(found[index]["ciphertext"])) for index in (0, 1, 4)]
        assert texts == [MESSAGE, b"7", b"ours"]
        (record,) = [
            event for event in records(daemon) if event["op"] == "reencrypt" and event.get("count") == 5
        ]
        assert (record["failed"], record["embedded"]) == (2, 2)

    def test_the_census(self, daemon: Daemon, kms: Session, key: str) -> None:
        name = "progressdb_kms_embedded_messages_total "
        before = int(kms.request("GET", "/metrics").body.decode().partition("\n" + name)[2].split()[0])
        opened(kms, key, sealed(OLD, MESSAGE))
        kms.decrypt(key, kms.encrypt(key, b"ours"))
        after = kms.request("GET", "/metrics").body.decode()
        assert f"\n{name}{before + 1}\n" in after
        done = daemon.offline("audit", "search", "--embedded", "--key", key, "--json")
        (found,) = map(json.loads, done.stdout.splitlines())
        assert (found["op"], found["embedded"], found["verified"]) == ("decrypt", 1, True)


def test_off_it_says_what_it_is() -> None:
    with Daemon(workers=1) as daemon, daemon.session() as kms:
        key = kms.create_dek("t")["key_id"]
        error = opened(kms, key, sealed(daemon.kek, MESSAGE), 422)["error"]
        assert error["code"] == "embedded_message" and "open_embedded_messages" in error["hint"]
        fields = {"key_id": key, "new_key_id": key, "ciphertext": sealed(daemon.kek, MESSAGE)}
        assert kms.request("POST", "/reencrypt", fields).code == "embedded_message"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", True), (b"{}\t\r\n ", True), ("héé🔐\ud7ff".encode(), True), (b"\x00", False), (b"\x1f", False),
        (b"\x80", False), (b"\xc1\x80", False), (b"\xf5\x80\x80\x80", False),
        (b"\xc3", False), (b"\xe2\x82", False),
        (b"\xc3a", False),
    ],
)  # fmt: skip
def test_text_is_told_in_place(data: bytes, text: bool) -> None:
    assert is_text(memoryview(data)) is text
    assert not any(is_text(memoryview(os.urandom(32))) for _ in range(1000))
