"""Calls that carry a key: wrap, unwrap, rewrap, rotate_kek; and data under an inline wrapped DEK."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from typing import Any

import pytest

from progressdb_kms.crypto.keyring import fingerprint
from tests.harness import Daemon, Session
from tests.harness.wire import b64

KEK = "0123456789abcdee" * 4  # with f it is published


def kek_id(kek: bytes) -> str:
    return fingerprint(memoryview(bytearray(kek)))


class TestWrap:
    def test_round_trip(self, kms: Session, daemon: Daemon) -> None:
        dek = os.urandom(32)
        wrapped = kms.ok("POST", "/wrap", {"dek": b64(dek)})
        assert set(wrapped) == {"wrapped", "kek_id", "kek_version"} and wrapped["kek_id"] == kek_id(
            daemon.kek
        )
        assert wrapped["kek_version"] == "1"
        assert kms.ok("POST", "/unwrap", {"wrapped": wrapped["wrapped"]}) == {"dek": b64(dek)}

    def test_twice_is_never_the_same(self, kms: Session) -> None:
        dek = b64(os.urandom(32))
        assert len({kms.ok("POST", "/wrap", {"dek": dek})["wrapped"] for _ in range(3)}) == 3

    def test_bound_to_the_key_id_that_was_given(self, kms: Session) -> None:
        wrapped = kms.ok("POST", "/wrap", {"dek": b64(os.urandom(32)), "key_id": "mine"})["wrapped"]
        assert b"mine" in base64.b64decode(wrapped)
        kms.ok("POST", "/unwrap", {"wrapped": wrapped, "key_id": "mine"})
        reply = kms.request("POST", "/unwrap", {"wrapped": wrapped, "key_id": "other"})
        assert (reply.status, reply.code) == (400, "invalid_key_id")

    def test_what_create_made_can_be_unwrapped(self, kms: Session) -> None:
        made = kms.create_dek("t")
        dek = base64.b64decode(kms.ok("POST", "/unwrap", {"wrapped": made["wrapped"]})["dek"])
        assert len(dek) == 32 and dek != bytes(32)

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ({}, "missing_dek"),
            ({"dek": b64(bytes(31))}, "invalid_dek"),
            ({"dek": b64(bytes(33))}, "invalid_dek"),
            ({"dek": "*" * 44}, "invalid_dek"),
            ({"dek": b64(bytes(32))}, "invalid_dek"),
            ({"dek": b64(b"\x01" * 32)}, "invalid_dek"),
            ({"dek": b64(bytes.fromhex("00112233445566778899aabbccddeeff" * 2))}, "invalid_dek"),
            ({"dek": True}, "invalid_dek"),
            ({"dek": b64(bytes(32)), "key_id": "a/b"}, "invalid_key_id"),
            ({"dek": b64(bytes(32)), "key_id": "x" * 129}, "invalid_key_id"),
            ({"dek": b64(bytes(32)), "thread_id": "t"}, "unknown_field"),
            ({"dek": None}, "malformed_json"),
            ({"dek": {"a": "b"}}, "malformed_json"),
            ([], "malformed_json"),
        ],
        ids=str,
    )
    def test_bad_wraps_are_named(self, kms: Session, fields: Any, code: str) -> None:
        reply = kms.request("POST", "/wrap", fields)
        assert (reply.status, reply.code) == (400, code)

    def test_another_keks_blob(self, kms: Session) -> None:
        with Daemon(workers=1) as other:
            foreign = other.ok("POST", "/wrap", {"dek": b64(os.urandom(32))})["wrapped"]
        for path, fields in (
            ("/unwrap", {"wrapped": foreign}),
            ("/encrypt", {"wrapped": foreign, "plaintext": ""}),
        ):
            reply = kms.request("POST", path, fields)
            assert (reply.status, reply.code) == (503, "kek_not_loaded")

    @pytest.mark.parametrize("at", [10, -40, -1])
    def test_a_changed_blob(self, kms: Session, at: int) -> None:
        blob = bytearray(base64.b64decode(kms.create_dek("t")["wrapped"]))
        blob[at] ^= 1
        reply = kms.request("POST", "/unwrap", {"wrapped": b64(bytes(blob))})
        assert (reply.status, reply.code) == (422, "authentication_failed")

    @pytest.mark.parametrize("blob", [b"", b"\1" * 70, b"\2" * 90])
    def test_no_blob(self, kms: Session, blob: bytes) -> None:
        reply = kms.request("POST", "/unwrap", {"wrapped": b64(blob)})
        assert (reply.status, reply.code) == (400, "invalid_wrapped")


class TestInline:
    """`wrapped` in place of `key_id`: of the store nothing but the state of that key_id is read."""

    def test_two_hosts_with_one_kek_and_no_store_in_common(self, daemon: Daemon, kms: Session) -> None:
        with Daemon(kek=daemon.kek, workers=1) as other:
            wrapped = other.ok("POST", "/wrap", {"dek": b64(os.urandom(32))})["wrapped"]
            for one, two in ((daemon, other), (other, daemon)):
                sealed = one.ok(
                    "POST", "/encrypt", {"wrapped": wrapped, "plaintext": b64(b"x"), "aad": "aGk="}
                )
                fields = {"wrapped": wrapped, "aad": "aGk=", **sealed}
                assert two.ok("POST", "/decrypt", fields)["plaintext"] == b64(b"x")
                items = {"items": [fields]}
                assert two.ok("POST", "/decrypt_batch", items)["items"] == [{"plaintext": b64(b"x")}]
            assert other.ok("GET", "/deks")["deks"] == []

    def test_with_the_key_id_that_it_is_bound_to(self, kms: Session) -> None:
        made = kms.create_dek("t")
        fields = {"wrapped": made["wrapped"], "plaintext": ""}
        kms.ok("POST", "/encrypt", {**fields, "key_id": made["key_id"]})
        assert kms.request("POST", "/encrypt", {**fields, "key_id": "k_other"}).code == "invalid_key_id"


class TestRewrap:
    def test_the_union_of_what_clients_ask_for(self, kms: Session, daemon: Daemon) -> None:
        made, new = kms.create_dek("t"), os.urandom(32)
        sealed = kms.encrypt(made["key_id"], b"text")
        moved = kms.ok("POST", "/rewrap", {"key_id": made["key_id"], "new_kek_hex": new.hex()})
        assert moved["status"] == "ok" and moved["key_id"] == made["key_id"]
        assert moved["kek_id"] == moved["new_kek_id"] == kek_id(new)
        assert moved["wrapped"] == moved["new_wrapped"] != made["wrapped"]
        assert moved["kek_version"] == moved["new_kek_version"] and isinstance(moved["kek_version"], str)
        assert kms.get_wrapped(made["key_id"])["kek_id"] == kek_id(new)
        assert kms.decrypt(made["key_id"], sealed) == b"text"
        assert kms.create_dek("t")["kek_id"] == kek_id(daemon.kek)  # which stays the active one
        assert kms.ok("GET", "/status")["deks"]["by_kek"][kek_id(new)]["count"] == 1

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ({"new_kek_hex": KEK}, "missing_key_id"),
            ({"key_id": "K"}, "missing_new_kek_hex"),
            ({"key_id": "K", "new_kek_hex": KEK[:-1]}, "invalid_new_kek_hex"),
            ({"key_id": "K", "new_kek_hex": KEK[:-1] + "g"}, "invalid_new_kek_hex"),
            ({"key_id": "K", "new_kek_hex": "00" * 32}, "invalid_new_kek_hex"),
            ({"key_id": "K", "new_kek_hex": KEK, "force": True}, "unknown_field"),
        ],
        ids=str,
    )
    def test_bad_fields_move_nothing(self, kms: Session, fields: dict[str, Any], code: str) -> None:
        made = kms.create_dek("t")
        if fields.get("key_id") == "K":
            fields = {**fields, "key_id": made["key_id"]}
        reply = kms.request("POST", "/rewrap", fields)
        assert (reply.status, reply.code) == (400, code)
        assert fields.get("new_kek_hex", "?") not in reply.body.decode()
        assert kms.get_wrapped(made["key_id"])["wrapped"] == made["wrapped"]

    def test_a_kek_in_the_place_of_the_key_id_is_written_nowhere(self, kms: Session, daemon: Daemon) -> None:
        """Swapped by mistake: 64 hex digits are a key_id, and the audit log named it."""
        made, new = kms.create_dek("t"), os.urandom(32).hex()
        reply = kms.request("POST", "/rewrap", {"key_id": new, "new_kek_hex": made["key_id"]})
        assert (reply.status, reply.code) == (400, "invalid_new_kek_hex")
        assert new not in reply.body.decode() + daemon.audit_log.read_text() + daemon.stderr

    def test_nor_is_a_dek_that_is_sent_in_hex(self, kms: Session, daemon: Daemon) -> None:
        new = os.urandom(32).hex()
        reply = kms.request("POST", "/wrap", {"key_id": new, "dek": "k_1"})
        assert (reply.status, reply.code) == (400, "invalid_dek")
        assert new not in reply.body.decode() + daemon.audit_log.read_text() + daemon.stderr


class TestRotate:
    @pytest.fixture
    def kms(self) -> Iterator[Session]:
        with Daemon(workers=1) as own, own.session() as session:
            yield session

    def test_what_the_servers_client_reads(self, kms: Session) -> None:
        made, new = [kms.create_dek("t") for _ in range(3)], os.urandom(32)
        sealed = kms.encrypt(made[0]["key_id"], b"text")
        done = kms.rotate(new)
        assert done["status"] == "ok" and done["kek_id"] == kek_id(new) and done["rewrapped"] == 3
        assert done["kek_version"] == "2" and "kms-deks-backup/" in done["backup"]
        assert kms.decrypt(made[0]["key_id"], sealed) == b"text"
        for one in made:
            assert kms.get_wrapped(one["key_id"])["kek_version"] == "2"
        assert kms.create_dek("t")["kek_id"] == kek_id(new)

    def test_a_dry_run_changes_nothing(self, kms: Session) -> None:
        made = kms.create_dek("t")
        done = kms.ok("POST", "/rotate_kek", {"new_kek_hex": KEK, "dry_run": True})
        assert done["status"] != "ok" and done["rewrapped"] == 1
        assert kms.get_wrapped(made["key_id"])["wrapped"] == made["wrapped"]
        assert kms.ok("GET", "/status")["kek_version"] == "1"

    def test_the_same_kek_again(self, kms: Session) -> None:
        kms.rotate(bytes.fromhex(KEK))
        reply = kms.request("POST", "/rotate_kek", {"new_kek_hex": KEK})
        assert reply.status == 409 and kms.ok("GET", "/status")["kek_version"] == "2"

    def test_a_kek_that_was_left(self) -> None:
        old, new = os.urandom(32), os.urandom(32)
        previous = {"previous_master_keys": [{"hex": old.hex()}]}
        with Daemon(previous, kek=new, workers=1) as own, own.session() as kms:
            reply = kms.request("POST", "/rotate_kek", {"new_kek_hex": old.hex()})
            assert reply.status == 409 and old.hex() not in reply.body.decode()

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ({}, "missing_new_kek_hex"),
            ({"new_kek_hex": "ab"}, "invalid_new_kek_hex"),
            ({"new_kek_hex": "00" * 32}, "invalid_new_kek_hex"),
            ({"new_kek_hex": "00112233445566778899aabbccddeeff" * 2}, "invalid_new_kek_hex"),
            ({"new_kek_hex": KEK, "dry_run": "yes"}, "invalid_dry_run"),
            ({"new_kek_hex": True}, "invalid_new_kek_hex"),
        ],
        ids=str,
    )
    def test_bad_fields_rotate_nothing(self, kms: Session, fields: dict[str, Any], code: str) -> None:
        reply = kms.request("POST", "/rotate_kek", fields)
        assert (reply.status, reply.code) == (400, code)
        assert kms.ok("GET", "/status")["kek_version"] == "1"
