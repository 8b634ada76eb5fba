"""The bytes of a wrapped DEK, and nothing else knows them.

    0x01 | kek_id 8 | n | key_id n | nonce 12 | ciphertext 32 | tag 16

Everything before the nonce is the AAD of the wrap, so a blob opens only under the key_id, the KEK and
the version that it names: two rows that were swapped are noticed. A blob of exactly 60 bytes is the Go
service's: nonce 12 | ciphertext 32 | tag 16, no AAD, bound to nothing.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from ..encoding import KEY_ID
from .aead import KEY_SIZE, NONCE_SIZE, TAG_SIZE

VERSION = 1
LEGACY_SIZE = NONCE_SIZE + KEY_SIZE + TAG_SIZE
KEK_ID_SIZE = 8
_FIXED = 1 + KEK_ID_SIZE + 1


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
