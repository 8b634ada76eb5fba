"""Keys of our own: random, made with the store, kept in it in a form of their own, moved at a rotation.

    audit:key   signs the records of the audit log
    row:key     signs the rows of the store

They are no DEKs: see `envelope` for why neither can be taken for the other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..crypto import envelope
from ..crypto.aead import KEY_SIZE, NONCE_SIZE, Aead, same
from ..crypto.envelope import AUDIT_KEY, ROW_KEY
from ..crypto.keyring import Keyring
from ..crypto.memory import LockedBuffer
from ..encoding import b64decode, b64encode
from ..errors import AuthenticationFailed, StoreDamaged

ROWS: Mapping[str, str] = {AUDIT_KEY: "audit:key", ROW_KEY: "row:key"}
"""In which row of the store each of them stands."""


def held(keyring: Keyring) -> dict[str, memoryview]:
    """Where the keyring has them."""
    return {AUDIT_KEY: keyring.audit_key, ROW_KEY: keyring.row_key}


def parse(name: str, row: Mapping[str, Any]) -> envelope.Wrapped:
    """Raises AuthenticationFailed where the row holds no key of this name."""
    try:
        return envelope.own(name, b64decode(row["wrapped"]))
    except (KeyError, TypeError, ValueError):
        raise AuthenticationFailed from None


@contextlib.contextmanager
def opened(keyring: Keyring, name: str, row: Mapping[str, Any]) -> Iterator[memoryview]:
    """The key that a row holds, in locked memory. Raises StoreDamaged where it doesn't open, KekNotLoaded."""
    with LockedBuffer(envelope.SCRATCH_SIZE) as memory:
        try:
            wrapped = parse(name, row)
            with keyring.borrow(wrapped.kek_id) as kek:
                key = envelope.unwrap(Aead(kek), wrapped, memory.view)
        except AuthenticationFailed:
            raise StoreDamaged(
                f"the store's {ROWS[name]} does not open as that under the KEK that it names",
                hint="restore a backup: `progressdb-kms restore FILE`",
            ) from None
        try:
            yield key
        finally:
            key.release()


def wrap(keyring: Keyring, kek_id: str, name: str, key: memoryview) -> dict[str, Any]:
    """The row of a key, under this KEK. It was opened again before it is given out."""
    with keyring.borrow(kek_id) as kek:
        blob = envelope.wrap_own(kek, kek_id, name, os.urandom(NONCE_SIZE), key)
    row = {"wrapped": b64encode(blob), "kek_id": kek_id}
    with opened(keyring, name, row) as again:
        if not same(again, key):  # type: ignore[arg-type]
            raise StoreDamaged(f"the rewrapped key {name} is not the same")
    return row


def load(
    keyring: Keyring, name: str, row: Mapping[str, Any], kek_id: str, into: memoryview
) -> Mapping[str, Any]:
    """Unwrap into locked memory. Returns the row under the KEK `kek_id`: the same one where it is so already.

    Raises StoreDamaged where it does not open, KekNotLoaded.
    """
    with opened(keyring, name, row) as key:
        into[:KEY_SIZE] = key
    return row if parse(name, row).kek_id == kek_id else wrap(keyring, kek_id, name, into)
