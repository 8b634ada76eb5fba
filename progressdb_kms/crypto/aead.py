"""All of the cipher: AES-256-GCM (NIST SP 800-38D) and HMAC-SHA256, through `cryptography` and OpenSSL.

Every key comes as a buffer and is read in place. An `Aead` lives for one call or one batch, under a KEK for
one turn of a worker or one offline command, and never longer than the buffer of its key: cryptography 38 to
41 reads that buffer at each use.

- 12-byte nonces from the OS, drawn anew for each seal. At 2**32 seals under one key the odds of a
  repeated nonce pass 2**-32 (SP 800-38D, 8.3): one DEK a thread keeps far below it.
- 16-byte tags, never shorter: a short tag is easier to guess.
- The AAD is always authenticated; what it holds is the caller's matter (`envelope` binds key_ids).
"""

from __future__ import annotations

import hmac
import sys
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..encoding import Buffer
from ..errors import AuthenticationFailed

KEY_SIZE = 32
NONCE_SIZE = 12
TAG_SIZE = 16
ROOM = TAG_SIZE + 15
"""Bytes that `out` must have beyond the plaintext's length: the tag, and the block that
cryptography 38's `update_into` asks for."""


hmac_new: Any = getattr(sys.modules.get("_hashlib"), "hmac_new", None)
"""What `hmac` itself is made of; None for a Python without OpenSSL."""


class _Contexts:
    """What we need of AESGCM, of releases where it can't write into the caller's buffer (before 47): a cipher
    context an operation, which copies the key into OpenSSL's memory only."""

    __slots__ = ("_key",)

    def __init__(self, key: memoryview) -> None:
        self._key = key

    def encrypt_into(self, nonce: bytes, data: Buffer, aad: bytes, out: memoryview) -> int:
        encryptor = Cipher(algorithms.AES(self._key), modes.GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(aad)
        size: int = encryptor.update_into(data, out)
        encryptor.finalize()
        out[size : size + TAG_SIZE] = encryptor.tag
        return size + TAG_SIZE

    def decrypt_into(self, nonce: Buffer, data: Buffer, aad: bytes, out: memoryview) -> int:
        body, size = memoryview(data), len(data) - TAG_SIZE
        gcm = modes.GCM(bytes(nonce), bytes(body[size:]))
        decryptor = Cipher(algorithms.AES(self._key), gcm).decryptor()
        decryptor.authenticate_additional_data(aad)
        decryptor.update_into(body[:size], out)
        decryptor.finalize()
        return size

    def encrypt(self, nonce: bytes, data: Buffer, aad: bytes) -> bytes:
        out = bytearray(len(data) + ROOM)
        return bytes(out[: self.encrypt_into(nonce, data, aad, memoryview(out))])

    def decrypt(self, nonce: Buffer, data: Buffer, aad: bytes | None) -> bytes:
        out = bytearray(len(data) + ROOM)
        return bytes(out[: open_into(self, nonce, data, aad or b"", memoryview(out))])  # type: ignore[arg-type]


if hasattr(AESGCM, "decrypt_into"):
    Aead = AESGCM
else:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    Aead = _Contexts  # type: ignore[assignment,misc]


def seal_into(cipher: Aead, nonce: bytes, plaintext: Buffer, aad: bytes, out: memoryview) -> int:
    """Write ciphertext and tag to `out`; returns their length, len(plaintext) + 16."""
    return cipher.encrypt_into(nonce, plaintext, aad, out[: len(plaintext) + TAG_SIZE])


def open_into(cipher: Aead, nonce: Buffer, sealed: Buffer, aad: bytes, out: memoryview) -> int:
    """Write the plaintext to `out`; returns its length. Raises AuthenticationFailed, `out` wiped."""
    size = len(sealed) - TAG_SIZE
    if size < 0:
        raise AuthenticationFailed
    try:
        cipher.decrypt_into(nonce, sealed, aad, out[:size] if type(cipher) is AESGCM else out)
    except InvalidTag:
        out[:size] = bytes(size)  # the unauthenticated plaintext is already there
        raise AuthenticationFailed from None
    return size


def seal(cipher: Aead, nonce: bytes, plaintext: Buffer, aad: bytes) -> bytes:
    """For data: ciphertext | tag. The message is the nonce and this, 28 bytes longer than the plaintext."""
    return cipher.encrypt(nonce, plaintext, aad)


def open(cipher: Aead, message: Buffer, aad: bytes) -> bytes:
    """For data: open nonce | ciphertext | tag. Raises AuthenticationFailed; a message too short is no
    exception."""
    if len(message) < NONCE_SIZE + TAG_SIZE:
        raise AuthenticationFailed
    try:
        return cipher.decrypt(message[:NONCE_SIZE], message[NONCE_SIZE:], aad or None)
    except InvalidTag:
        raise AuthenticationFailed from None


def mac(key: memoryview, data: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104): 32 bytes. No padded copy of the key is left, and no state outlives the call.

    `hmac.digest` has OpenSSL 3 look the algorithm up at each call, which takes as long as the MAC, and
    `hmac.new` wants the key on the heap.
    """
    if hmac_new is None:
        return hmac.digest(key, data, "sha256")
    return hmac_new(key, data, "sha256").digest()  # type: ignore[no-any-return]


def same(a: bytes, b: bytes) -> bool:
    """Compare two MACs or fingerprints in constant time."""
    return hmac.compare_digest(a, b)
