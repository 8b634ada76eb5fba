"""What is done with keys and data: bytes in, bytes out.

No file, no socket, no clock, no randomness of its own: nonces come in as arguments. A KEK is always a
borrowed view on locked memory, a DEK always a view on a locked scratch buffer; plaintext and ciphertext
are ordinary buffers.
"""

from __future__ import annotations

from ..encoding import Buffer
from ..errors import AuthenticationFailed
from . import envelope
from .aead import KEY_SIZE, NONCE_SIZE, ROOM, TAG_SIZE, Aead
from .envelope import Wrapped

SCRATCH_SIZE = 64
"""Bytes of locked scratch that unwrapping a DEK needs: the DEK, the tag, and room for old ciphers."""


def stored(key_id: str, blob: bytes) -> Wrapped:
    """The blob of this key's row. Raises AuthenticationFailed where it is none, or bound to another key: two
    rows that were swapped would open, each as the other."""
    try:
        wrapped = envelope.parse(blob)
    except ValueError:
        raise AuthenticationFailed from None
    if wrapped.key_id not in (None, key_id):
        raise AuthenticationFailed
    return wrapped


def wrap(kek: memoryview, kek_id: str, key_id: str, nonce: bytes, dek: memoryview) -> bytes:
    """Wrap a 32-byte DEK, bound to its key_id. Returns the blob."""
    aad = envelope.binding(kek_id, key_id)
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
