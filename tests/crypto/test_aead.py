"""The cipher and the MAC: published answers, for this release of cryptography and as older ones do it."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.crypto import aead
from progressdb_kms.errors import AuthenticationFailed
from tests.harness.vectors import load, secret

GCM = load("aes256gcm")
KINDS = ["_Contexts"] + ["AESGCM"] * (aead.Aead is aead.AESGCM)

KEY = "07" * 32
NONCE = bytes(12)


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each of the two implementations, whichever this release of cryptography uses."""
    for name, value in (("Cipher", Cipher), ("algorithms", algorithms), ("modes", modes)):
        monkeypatch.setattr(aead, name, value, raising=False)
    return getattr(aead, request.param)


def data(row: dict[str, str]) -> tuple[memoryview, bytes, bytes, bytes, bytes]:
    nonce, plaintext, aad = (bytes.fromhex(row[name]) for name in ("nonce", "plaintext", "aad"))
    return secret(row["key"]), nonce, plaintext, aad, bytes.fromhex(row["ciphertext"] + row["tag"])


def room(size: int) -> memoryview:
    return memoryview(bytearray(b"\xee" * size))


@pytest.mark.parametrize("row", GCM["opens"], ids=lambda row: row["source"])
def test_known_answers(make: Any, row: dict[str, str]) -> None:
    key, nonce, plaintext, aad, sealed = data(row)
    assert aead.seal(make(key), nonce, plaintext, aad) == sealed
    assert aead.open(make(key), nonce + sealed, aad) == plaintext
    out = room(len(sealed) + aead.ROOM)
    assert (
        aead.seal_into(make(key), nonce, plaintext, aad, out) == len(sealed) and out[: len(sealed)] == sealed
    )
    out = room(len(sealed) + aead.ROOM)
    assert aead.open_into(make(key), nonce, sealed, aad, out) == len(plaintext)
    assert out[: len(plaintext)] == plaintext


@pytest.mark.parametrize("row", GCM["refused"], ids=lambda row: row["source"])
def test_whatever_was_changed_is_refused(make: Any, row: dict[str, str]) -> None:
    key, nonce, plaintext, aad, sealed = data(row)
    with pytest.raises(AuthenticationFailed):
        aead.open(make(key), nonce + sealed, aad)
    out = room(len(sealed) + aead.ROOM)
    with pytest.raises(AuthenticationFailed):
        aead.open_into(make(key), nonce, sealed, aad, out)
    written = max(0, len(sealed) - aead.TAG_SIZE)
    assert plaintext[:8] not in bytes(out) and out[:written] == bytes(written)


@pytest.mark.parametrize("size", range(aead.TAG_SIZE))
def test_what_is_shorter_than_a_tag_is_refused(make: Any, size: int) -> None:
    with pytest.raises(AuthenticationFailed):
        aead.open(make(secret(KEY)), NONCE + bytes(size), b"")
    with pytest.raises(AuthenticationFailed):
        aead.open_into(make(secret(KEY)), NONCE, bytes(size), b"", room(64))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_taken(make: Any, kind: Any) -> None:
    sealed = aead.seal(make(secret(KEY)), NONCE, kind(b"text"), b"aad")
    assert aead.open(make(secret(KEY)), kind(NONCE + sealed), b"aad") == b"text"


@given(
    plaintext=st.binary(max_size=100), aad=st.binary(max_size=40), nonce=st.binary(min_size=12, max_size=12)
)
def test_both_implementations_agree(plaintext: bytes, aad: bytes, nonce: bytes) -> None:
    aead.__dict__.setdefault("Cipher", Cipher)
    aead.__dict__.setdefault("algorithms", algorithms)
    aead.__dict__.setdefault("modes", modes)
    sealed = [aead.seal(getattr(aead, kind)(secret(KEY)), nonce, plaintext, aad) for kind in KINDS]
    assert len(set(sealed)) == 1 and len(sealed[0]) == len(plaintext) + aead.TAG_SIZE


@pytest.mark.parametrize("row", load("hmac")["rows"], ids=lambda row: row["source"])
@pytest.mark.parametrize("openssl", [True, False])
def test_hmac_known_answers(row: dict[str, str], openssl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not openssl:
        monkeypatch.setattr(aead, "hmac_new", None)
    mac = aead.mac(secret(row["key"]), bytes.fromhex(row["data"]))
    assert aead.same(mac, bytes.fromhex(row["mac"]))


@pytest.mark.parametrize(
    ("a", "b", "equal"), [(b"ab", b"ab", True), (b"ab", b"aB", False), (b"ab", b"a", False)]
)
def test_comparison(a: bytes, b: bytes, equal: bool) -> None:
    assert aead.same(a, b) is equal
