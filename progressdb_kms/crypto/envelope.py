"""The bytes of a wrapped DEK, which nothing else knows, and what is done with keys and data.

No file, no socket, no clock, no randomness of its own: nonces come in as arguments. A KEK is always a
borrowed view on locked memory, a DEK always a view on a locked scratch buffer; plaintext and ciphertext
are ordinary buffers.

    0x01 | kek_id 8 | n | key_id n | nonce 12 | ciphertext 32 | tag 16

Everything before the nonce is the AAD of the wrap, so a blob opens only under the key_id, the KEK and
the version that it names: two rows that were swapped are noticed. A blob of exactly 60 bytes is the Go
service's: nonce 12 | ciphertext 32 | tag 16, no AAD, bound to nothing.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from ..encoding import KEY_ID, Buffer
from ..errors import AuthenticationFailed
from .aead import KEY_SIZE, NONCE_SIZE, ROOM, TAG_SIZE, Aead

VERSION = 1
LEGACY_SIZE = NONCE_SIZE + KEY_SIZE + TAG_SIZE
KEK_ID_SIZE = 8
_FIXED = 1 + KEK_ID_SIZE + 1


# ---- the blob ----------------------------------------------------------------------------------------


class Wrapped(NamedTuple):
    """A parsed blob. `kek_id` and `key_id` are None in the Go service's form, which names neither."""

    kek_id: Optional[str]
    key_id: Optional[str]
    aad: bytes
    nonce: bytes
    sealed: bytes
    """The encrypted DEK and its tag, 48 bytes."""

    @property
    def blob(self) -> bytes:
        return self.aad + self.nonce + self.sealed


def binding(kek_id: str, key_id: str) -> bytes:
    """What stands before the nonce: the AAD of the wrap."""
    name = key_id.encode("ascii")
    return bytes([VERSION]) + bytes.fromhex(kek_id) + bytes([len(name)]) + name


def parse(blob: bytes) -> Wrapped:
    """Split a blob. Raises ValueError where it is no wrapped DEK; the tag is not looked at."""
    if len(blob) == LEGACY_SIZE:
        return Wrapped(None, None, b"", blob[:NONCE_SIZE], blob[NONCE_SIZE:])
    if len(blob) <= LEGACY_SIZE + _FIXED:
        raise ValueError("is too short to be a wrapped DEK")
    if blob[0] != VERSION:
        raise ValueError(f"has version {blob[0]}, and this release knows version {VERSION}")
    end = _FIXED + blob[_FIXED - 1]
    if len(blob) != end + LEGACY_SIZE:
        raise ValueError("has the wrong length for a wrapped DEK")
    key_id = blob[_FIXED:end].decode("ascii", "replace")
    if not KEY_ID.fullmatch(key_id):
        raise ValueError("names a malformed key_id")
    nonce = end + NONCE_SIZE
    return Wrapped(blob[1 : 1 + KEK_ID_SIZE].hex(), key_id, blob[:end], blob[end:nonce], blob[nonce:])


# ---- keys and data -----------------------------------------------------------------------------------

SCRATCH_SIZE = 64
"""Bytes of locked scratch that unwrapping a DEK needs: the DEK, the tag, and room for old ciphers."""


def stored(key_id: str, blob: bytes) -> Wrapped:
    """The blob of this key's row. Raises AuthenticationFailed where it is none, or bound to another key: two
    rows that were swapped would open, each as the other."""
    try:
        wrapped = parse(blob)
    except ValueError:
        raise AuthenticationFailed from None
    if wrapped.key_id not in (None, key_id):
        raise AuthenticationFailed
    return wrapped


def wrap(kek: memoryview, kek_id: str, key_id: str, nonce: bytes, dek: memoryview) -> bytes:
    """Wrap a 32-byte DEK, bound to its key_id. Returns the blob."""
    aad = binding(kek_id, key_id)
    sealed = bytearray(KEY_SIZE + ROOM)
    size = Aead(kek).seal_into(nonce, dek, aad, memoryview(sealed))
    return aad + nonce + bytes(sealed[:size])


def unwrap_into(kek: memoryview, wrapped: Wrapped, scratch: memoryview) -> memoryview:
    """Unwrap into `scratch` (SCRATCH_SIZE bytes of locked memory). Returns the part with the DEK.

    Raises AuthenticationFailed, with `scratch` wiped.
    """
    if Aead(kek).open_into(wrapped.nonce, wrapped.sealed, wrapped.aad, scratch) != KEY_SIZE:
        raise AuthenticationFailed
    return scratch[:KEY_SIZE]


def encrypt(cipher: Aead, nonce: bytes, plaintext: Buffer, aad: bytes) -> bytes:
    """ciphertext | tag; the message is the nonce and this, 28 bytes longer than the plaintext."""
    return cipher.seal(nonce, plaintext, aad)


def decrypt(cipher: Aead, message: Buffer, aad: bytes) -> bytes:
    """Open nonce | ciphertext | tag. Raises AuthenticationFailed; a message too short is no exception."""
    if len(message) < NONCE_SIZE + TAG_SIZE:
        raise AuthenticationFailed
    return cipher.open(message[:NONCE_SIZE], message[NONCE_SIZE:], aad)
