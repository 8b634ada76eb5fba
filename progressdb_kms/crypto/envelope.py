"""The bytes of a wrapped DEK, which nothing else knows, and what is done with keys and data.

No file, no socket, no clock, no randomness of its own: nonces come in as arguments. A KEK is always a
borrowed view on locked memory, a DEK always a view on a locked scratch buffer; plaintext and ciphertext
are ordinary buffers.

    0x01 | kek_id 8 | n | key_id n | nonce 12 | ciphertext 32 | tag 16      a DEK
    0x02 | kek_id 8 | n | name n   | nonce 12 | ciphertext 32 | tag 16      a key of our own

Everything before the nonce is the AAD of the wrap, so a blob opens only under the key_id, the KEK and
the version that it names: two rows that were swapped are noticed.

Two forms, and a reader for each, so that none is taken for the other:

- `parse`: a DEK. Whatever came from a caller, or stands in a DEK's row, goes through it and no other.
- `own`: the audit key and the row key. Their AAD has a label of its own, and their names are no key_ids. Who
  could have one opened as a DEK, or one of a DEK's blobs taken in its place, could sign audit records.
A third, the Go service's of 60 bytes (nonce | ciphertext | tag, no AAD, bound to nothing), is no concern of
the daemon's: a message that was sealed under that service's KEK looks the same, so that whoever puts it in a
row chooses the DEK. `import` alone reads it.
"""

from __future__ import annotations

from typing import NamedTuple

from ..encoding import KEY_ID, is_json, is_text
from ..errors import AuthenticationFailed
from . import aead
from .aead import KEY_SIZE, NONCE_SIZE, ROOM, TAG_SIZE, Aead

VERSION = 1
OWN_VERSION = 2
OWN_LABEL = b"progressdb-kms key of its own v1"
AUDIT_KEY, ROW_KEY = ":audit", ":rows"  # names of our own keys: a key_id begins with a letter or digit
LEGACY_SIZE = NONCE_SIZE + KEY_SIZE + TAG_SIZE
KEK_ID_SIZE = 8
_FIXED = 1 + KEK_ID_SIZE + 1


# ---- the blob ----------------------------------------------------------------------------------------


class Wrapped(NamedTuple):
    """A parsed blob. `kek_id` and `key_id` are "" in the Go service's form, which names neither: see
    `tools.datadir`."""

    kek_id: str
    key_id: str
    aad: bytes
    nonce: bytes
    sealed: bytes
    """The encrypted DEK and its tag, 48 bytes."""

    @property
    def blob(self) -> bytes:
        return self.aad + self.nonce + self.sealed


def binding(kek_id: str, key_id: str) -> bytes:
    """What stands before the nonce: the AAD of the wrap."""
    return _head(VERSION, kek_id, key_id)


def parse(blob: bytes) -> Wrapped:
    """Split the blob of a DEK. Raises ValueError where it is none; the tag is not looked at."""
    wrapped = _split(VERSION, blob)
    if not KEY_ID.fullmatch(wrapped.key_id):
        raise ValueError("names a malformed key_id")
    return wrapped


def own(name: str, blob: bytes) -> Wrapped:
    """Split the blob of the key of ours that has this name. Raises ValueError where it is another's."""
    wrapped = _split(OWN_VERSION, blob)
    if wrapped.key_id != name:
        raise ValueError("is of another key")
    return wrapped._replace(aad=OWN_LABEL + wrapped.aad)


def _head(version: int, kek_id: str, name: str) -> bytes:
    raw = name.encode("ascii")
    return bytes([version]) + bytes.fromhex(kek_id) + bytes([len(raw)]) + raw


def _split(version: int, blob: bytes) -> Wrapped:
    if len(blob) <= LEGACY_SIZE + _FIXED:
        raise ValueError("is too short to be a wrapped DEK")
    if blob[0] != version:
        raise ValueError(f"has version {blob[0]}, and version {version} is needed here")
    end = _FIXED + blob[_FIXED - 1]
    if len(blob) != end + LEGACY_SIZE:
        raise ValueError("has the wrong length for a wrapped DEK")
    name, nonce = blob[_FIXED:end].decode("ascii", "replace"), end + NONCE_SIZE
    return Wrapped(blob[1 : 1 + KEK_ID_SIZE].hex(), name, blob[:end], blob[end:nonce], blob[nonce:])


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
    if wrapped.key_id != key_id:
        raise AuthenticationFailed
    return wrapped


def wrap(cipher: Aead, kek_id: str, key_id: str, nonce: bytes, dek: memoryview) -> bytes:
    """Wrap a 32-byte DEK with a cipher under this KEK, bound to its key_id. Returns the blob."""
    return _wrap(cipher, binding(kek_id, key_id), b"", nonce, dek)


def wrap_own(kek: memoryview, kek_id: str, name: str, nonce: bytes, key: memoryview) -> bytes:
    """Wrap a key of our own; `own` reads it."""
    return _wrap(Aead(kek), _head(OWN_VERSION, kek_id, name), OWN_LABEL, nonce, key)


def _wrap(cipher: Aead, head: bytes, label: bytes, nonce: bytes, key: memoryview) -> bytes:
    sealed = bytearray(KEY_SIZE + ROOM)
    size = aead.seal_into(cipher, nonce, key, label + head, memoryview(sealed))
    return head + nonce + bytes(sealed[:size])


def unwrap(cipher: Aead, wrapped: Wrapped, scratch: memoryview) -> memoryview:
    """Unwrap with a cipher under the KEK into `scratch` (SCRATCH_SIZE bytes of locked memory). Returns the
    part with the DEK. Raises AuthenticationFailed, with `scratch` wiped."""
    if aead.open_into(cipher, wrapped.nonce, wrapped.sealed, wrapped.aad, scratch) != KEY_SIZE:
        raise AuthenticationFailed
    return scratch[:KEY_SIZE]


def open_embedded(kek: memoryview, message: bytes, scratch: memoryview) -> bytes:
    """A message that ProgressDB's embedded mode sealed under the KEK itself, without AAD: JSON text, always.
    A wrapped DEK of its third generation looks the same, so that what has its size is opened into `scratch`,
    which the caller wipes, and only text leaves. Raises AuthenticationFailed for whatever is none."""
    size = len(message) - NONCE_SIZE - TAG_SIZE
    place = scratch if size == KEY_SIZE else memoryview(bytearray(max(0, size) + ROOM))
    aead.open_into(Aead(kek), message[:NONCE_SIZE], message[NONCE_SIZE:], b"", place)
    opened = place[:size]
    if (size == KEY_SIZE and not is_text(opened)) or not is_json(opened):
        opened[:] = bytes(size)
        raise AuthenticationFailed
    return bytes(opened)
