"""Wrapped DEKs and messages: what release 1 wrote opens for ever, and what was changed never does."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.crypto import aead, envelope, keyring
from progressdb_kms.crypto.aead import Aead
from progressdb_kms.errors import AuthenticationFailed
from progressdb_kms.tools.datadir import foreign
from tests.harness.vectors import load, secret

WRAPPED, MESSAGES = load("wrapped"), load("messages")
KEK_ID = WRAPPED["kek_ids"][0]["kek_id"]


def scratch() -> memoryview:
    return memoryview(bytearray(envelope.SCRATCH_SIZE))


def joined(wrapped: envelope.Wrapped) -> bytes:
    return wrapped.aad + wrapped.nonce + wrapped.sealed


def unwrap(digits: str, into: memoryview, kek: str = WRAPPED["kek"]) -> bytes:
    return bytes(envelope.unwrap(Aead(secret(kek)), foreign(bytes.fromhex(digits)), into))


class TestWrapped:
    @pytest.mark.parametrize("row", WRAPPED["opens"], ids=lambda row: str(row["key_id"])[:20])
    def test_opens_for_ever(self, row: dict[str, Any]) -> None:
        wrapped = foreign(bytes.fromhex(row["wrapped"]))
        assert wrapped.key_id == (row["key_id"] or "") and joined(wrapped).hex() == row["wrapped"]
        assert wrapped.kek_id == (KEK_ID if row["key_id"] else "")
        assert unwrap(row["wrapped"], scratch()).hex() == WRAPPED["dek"]

    @pytest.mark.parametrize("row", WRAPPED["refused"], ids=lambda row: row["why"])
    def test_what_was_changed_is_refused(self, row: dict[str, str]) -> None:
        into = scratch()
        with pytest.raises(AuthenticationFailed):
            unwrap(row["wrapped"], into)
        assert not any(into[:32])

    @pytest.mark.parametrize("row", WRAPPED["opens"], ids=lambda row: str(row["key_id"])[:20])
    def test_not_under_another_kek(self, row: dict[str, str]) -> None:
        into = scratch()
        with pytest.raises(AuthenticationFailed):
            unwrap(row["wrapped"], into, WRAPPED["kek_ids"][1]["key"])
        assert not any(into[:32])

    @pytest.mark.parametrize("row", WRAPPED["malformed"], ids=lambda row: row["why"])
    def test_what_is_no_wrapped_dek(self, row: dict[str, str]) -> None:
        with pytest.raises(ValueError, match="has|is|names"):
            envelope.parse(bytes.fromhex(row["wrapped"]))

    def test_each_bit_counts(self) -> None:
        blob = bytes.fromhex(WRAPPED["opens"][0]["wrapped"])
        for bit in range(8 * len(blob)):
            changed = bytearray(blob)
            changed[bit // 8] ^= 1 << bit % 8
            with pytest.raises((AuthenticationFailed, ValueError)):
                unwrap(changed.hex(), scratch())

    @given(st.from_regex(envelope.KEY_ID, fullmatch=True))
    def test_round_trip(self, key_id: str) -> None:
        dek = os.urandom(32)
        kek = secret(WRAPPED["kek"])
        blob = envelope.wrap(Aead(kek), KEK_ID, key_id, os.urandom(12), memoryview(bytearray(dek)))
        wrapped = envelope.parse(blob)
        assert (wrapped.kek_id, wrapped.key_id) == (KEK_ID, key_id)
        assert bytes(envelope.unwrap(Aead(kek), wrapped, scratch())) == dek

    @given(st.binary(max_size=220))
    def test_any_bytes_are_parsed_or_refused(self, blob: bytes) -> None:
        try:
            assert joined(foreign(blob)) == blob
        except ValueError:
            pass


class TestThreeForms:
    """None is taken for another, whatever reads it."""

    def blobs(self) -> dict[str, bytes]:
        kek, key, nonce = secret(WRAPPED["kek"]), memoryview(bytearray(os.urandom(32))), os.urandom(12)
        return {
            "a DEK": envelope.wrap(Aead(kek), KEK_ID, "audit", nonce, key),
            "our own": envelope.wrap_own(kek, KEK_ID, envelope.AUDIT_KEY, nonce, key),
            "the Go service's": nonce + aead.seal(Aead(kek), nonce, bytes(key), b""),
        }

    @pytest.mark.parametrize(
        ("read", "takes"),
        [
            (envelope.parse, {"a DEK"}),
            (foreign, {"a DEK", "the Go service's"}),
            (lambda blob: envelope.own(envelope.AUDIT_KEY, blob), {"our own"}),
            (lambda blob: envelope.own(envelope.ROW_KEY, blob), set()),
        ],
        ids=["parse", "foreign", "own", "own, of another name"],
    )
    def test_each_reader_takes_its_own(self, read: Any, takes: set[str]) -> None:
        taken = set()
        for name, blob in self.blobs().items():
            try:
                envelope.unwrap(Aead(secret(WRAPPED["kek"])), read(blob), scratch())
                taken.add(name)
            except ValueError:
                pass
        assert taken == takes

    @pytest.mark.parametrize(("form", "version"), [("our own", 1), ("a DEK", 2)])
    def test_another_version_byte_makes_no_other_form(self, form: str, version: int) -> None:
        blob = bytes([version]) + self.blobs()[form][1:]
        with pytest.raises((ValueError, AuthenticationFailed)):
            wrapped = envelope.own("audit", blob) if version == 2 else envelope.parse(blob)
            envelope.unwrap(Aead(secret(WRAPPED["kek"])), wrapped, scratch())

    @pytest.mark.parametrize("name", [envelope.AUDIT_KEY, envelope.ROW_KEY])
    def test_no_caller_can_name_one(self, name: str) -> None:
        assert not envelope.KEY_ID.fullmatch(name)


class TestKekId:
    @pytest.mark.parametrize("row", WRAPPED["kek_ids"], ids=lambda row: row["kek_id"])
    def test_stays_what_it_was(self, row: dict[str, str]) -> None:
        assert keyring.fingerprint(secret(row["key"])) == row["kek_id"]


class TestMessages:
    @pytest.mark.parametrize("row", MESSAGES["opens"], ids=lambda row: f"{len(row['plaintext']) // 2} bytes")
    def test_opens_for_ever(self, row: dict[str, str]) -> None:
        message, plaintext, aad = (bytes.fromhex(row[name]) for name in ("message", "plaintext", "aad"))
        cipher = Aead(secret(MESSAGES["dek"]))
        assert aead.open(cipher, message, aad) == plaintext
        assert message[:12] + aead.seal(cipher, message[:12], plaintext, aad) == message

    @pytest.mark.parametrize("row", MESSAGES["refused"], ids=lambda row: row["why"])
    def test_what_was_changed_is_refused(self, row: dict[str, str]) -> None:
        with pytest.raises(AuthenticationFailed):
            aead.open(Aead(secret(MESSAGES["dek"])), bytes.fromhex(row["message"]), bytes.fromhex(row["aad"]))

    @given(st.binary(max_size=200), st.binary(max_size=20))
    def test_any_bytes_are_refused(self, message: bytes, aad: bytes) -> None:
        with pytest.raises(AuthenticationFailed):
            aead.open(Aead(secret(MESSAGES["dek"])), message, aad)
