"""What a caller, or whoever writes the store, must not get the daemon to do with a wrapped key."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.conftest import MakeDaemon
from tests.harness import Daemon, Session
from tests.harness.wire import b64


def row_of(daemon: Daemon, name: str, table: str = "kms") -> dict[str, Any]:
    db = sqlite3.connect(daemon.data_dir / "kms.db")
    try:
        value = db.execute(f"SELECT value FROM {table} WHERE key = ?", (name,)).fetchone()[0]  # noqa: S608
    finally:
        db.close()
    row: dict[str, Any] = json.loads(value)
    return row


def edit(daemon: Daemon, name: str, table: str = "kms", **fields: Any) -> None:
    """With an SQL shell, the daemon being stopped."""
    row = {**row_of(daemon, name, table), **fields}
    db = sqlite3.connect(daemon.data_dir / "kms.db")
    with db:
        db.execute(f"UPDATE {table} SET value = ? WHERE key = ?", (json.dumps(row), name))  # noqa: S608
    db.close()


def uses(wrapped: str, **more: str) -> list[tuple[str, dict[str, Any]]]:
    """Every call that takes a blob, or makes one under a name."""
    item = {"wrapped": wrapped, **more}
    return [
        ("/unwrap", item),
        ("/encrypt", {**item, "plaintext": ""}),
        ("/decrypt", {**item, "ciphertext": b64(bytes(28))}),
        ("/encrypt_batch", {"items": [{**item, "plaintext": ""}]}),
        ("/decrypt_batch", {"items": [{**item, "ciphertext": b64(bytes(28))}]}),
    ]


def outcome(kms: Session, path: str, fields: dict[str, Any]) -> str:
    """The code of the error, or ok; of a batch: of its item."""
    reply = kms.request("POST", path, fields)
    answer = reply.json()
    if "items" in answer:
        answer = answer["items"][0]
    return str(answer["error"]["code"]) if "error" in answer else "ok"


class TestKeysOfOurOwn:
    @pytest.mark.parametrize("name", ["audit:key"])
    def test_are_opened_for_nobody(self, make_daemon: MakeDaemon, name: str) -> None:
        daemon = make_daemon(workers=1)
        blob = row_of(daemon, name)["wrapped"]
        raw = bytearray(base64.b64decode(blob))
        with daemon.session() as kms:
            for wrapped in (blob, b64(bytes([1]) + raw[1:])):
                for path, fields in uses(wrapped):
                    assert outcome(kms, path, fields) == "invalid_wrapped", path

    @pytest.mark.parametrize("key_id", [":audit", ":rows"])
    def test_have_names_that_a_caller_can_not_give(self, make_daemon: MakeDaemon, key_id: str) -> None:
        with make_daemon(workers=1).session() as kms:
            for path, fields in (
                ("/wrap", {"dek": b64(os.urandom(32)), "key_id": key_id}),
                ("/deks", {"thread_id": "t", "key_id": key_id}),
            ):
                assert outcome(kms, path, fields) == "invalid_key_id"

    @pytest.mark.parametrize("name", ["audit:key"])
    @pytest.mark.parametrize("key_id", ["audit", "audit:key", "rows"])
    def test_are_not_replaced_by_what_a_caller_had_wrapped(
        self, make_daemon: MakeDaemon, name: str, key_id: str
    ) -> None:
        """Else a caller who writes the store would sign audit records."""
        daemon = make_daemon(workers=1)
        fields = {"dek": b64(os.urandom(32)), "key_id": key_id}
        forged = daemon.ok("POST", "/wrap", fields)["wrapped"]
        daemon.stop()
        raw = base64.b64decode(forged)
        for blob in (raw, bytes([2]) + raw[1:]):
            edit(daemon, name, wrapped=b64(blob))
            with pytest.raises(AssertionError) as caught:
                daemon.start()
            assert f"{name} does not open" in str(caught.value)


class TestInline:
    """A blob that a caller kept is held against the store's row like the key_id itself."""

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            (("POST", "/disable", None), "key_disabled"),
            (("DELETE", "", None), "key_disabled"),
            (("DELETE", "", {"immediately": True}), "key_shredded"),
        ],
        ids=["disabled", "scheduled", "shredded"],
    )
    def test_state_is_the_stores_word(
        self, make_daemon: MakeDaemon, change: tuple[str, str, Any], code: str
    ) -> None:
        daemon = make_daemon(workers=2)
        with daemon.session() as kms:
            made = kms.create_dek("t")
            blob, key_id = made["wrapped"], made["key_id"]
            sealed = kms.ok("POST", "/encrypt", {"wrapped": blob, "plaintext": b64(b"x")})["ciphertext"]
            method, path, body = change
            kms.ok(method, f"/deks/{key_id}{path}", body)
            for path, fields in [*uses(blob), *uses(blob, key_id=key_id)]:
                assert outcome(kms, path, fields) == code, path
            assert outcome(kms, "/decrypt", {"wrapped": blob, "ciphertext": sealed}) == code
            assert outcome(kms, "/wrap", {"dek": b64(os.urandom(32)), "key_id": key_id}) == code
            # Under a KEK that the caller knows it would be as good as unwrapped.
            assert outcome(kms, "/rewrap", {"key_id": key_id, "new_kek_hex": os.urandom(32).hex()}) == code
            if code == "key_disabled":
                kms.ok("POST", f"/deks/{key_id}/enable")
                assert outcome(kms, "/decrypt", {"wrapped": blob, "ciphertext": sealed}) == "ok"

    def test_what_the_store_does_not_know_is_the_callers(self, make_daemon: MakeDaemon) -> None:
        """And no longer, once the store has a row of that name."""
        with make_daemon(workers=1).session() as kms:
            blob = kms.ok("POST", "/wrap", {"dek": b64(os.urandom(32)), "key_id": "mine"})["wrapped"]
            for path, fields in uses(blob):
                assert outcome(kms, path, fields) in ("ok", "authentication_failed"), path
            kms.ok("POST", "/deks", {"thread_id": "t", "key_id": "mine"}, 201)
            kms.ok("POST", "/deks/mine/disable")
            for path, fields in uses(blob):
                assert outcome(kms, path, fields) == "key_disabled", path


class TestUnbound:
    """The Go service's form names no key: a message sealed under the KEK has it too."""

    def test_is_taken_by_import_alone(self, make_daemon: MakeDaemon) -> None:
        daemon = make_daemon(workers=1)
        nonce, chosen = os.urandom(12), os.urandom(32)
        blob = b64(nonce + AESGCM(daemon.kek).encrypt(nonce, chosen, None))
        with daemon.session() as kms:
            key_id = kms.create_dek("t")["key_id"]
            for path, fields in [*uses(blob), *uses(blob, key_id=key_id)]:
                assert outcome(kms, path, fields) == "invalid_wrapped", path
        daemon.stop()
        edit(daemon, f"meta:{key_id}", "deks", wrapped=blob)
        verified = daemon.offline("verify")
        assert verified.returncode == 1 and key_id.encode() in verified.stderr
        daemon.start()
        with daemon.session() as kms:
            assert kms.request("POST", "/encrypt", {"key_id": key_id, "plaintext": ""}).status >= 400
            assert outcome(kms, "/rotate_kek", {"new_kek_hex": os.urandom(32).hex()}) == "store_damaged"

    def test_a_forged_snapshot_is_no_import(self, make_daemon: MakeDaemon) -> None:
        daemon = make_daemon(workers=1)
        with daemon.session() as kms:
            key_id = kms.create_dek("t")["key_id"]
            folder = kms.rotate(os.urandom(32))["backup"]
        nonce = os.urandom(12)
        blob = nonce + AESGCM(daemon.kek).encrypt(nonce, os.urandom(32), None)
        daemon.stop()
        path = os.path.join(folder, f"{key_id}.json")
        with open(path) as file:
            row = json.load(file)
        with open(path, "w") as file:
            json.dump({**row, "wrapped": b64(blob)}, file)
        done = daemon.offline("restore", "--snapshot", folder, "--key", key_id)
        assert done.returncode == 1, done.stdout
