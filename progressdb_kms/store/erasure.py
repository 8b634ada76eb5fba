"""Crypto-shred: after it, the wrapped bytes of a DEK are nowhere under the data-dir.

A wrapped DEK may stand in the live table, in tables that a rotation is emptying, in the write-ahead log, in
free space of a database page (SQLite's secure_delete zeroes what it frees, but moving rows between pages
can leave a copy in the gap), and in snapshots. The order below is safe against a crash at any point: the
tombstone and a note that the erasure is due are one transaction; the note goes last.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from ..encoding import b64encode
from . import snapshots
from .contract import Store
from .sqlite import FILE_NAME

_PIECE = 20
"""Characters of base64 (15 bytes) that are taken for a trace of a blob; chance does not make these."""


def erase(store: Store, data_dir: Path, key_id: str, blob: bytes) -> None:
    """Make sure of it. `blob` is empty where it isn't known any more (after a restart): then the whole
    database is rewritten. Raises StoreUnavailable; call again later."""
    snapshots.forget(data_dir, key_id)
    with store.transaction():
        store.forget(key_id)
    store.checkpoint()
    if not blob or _traces(data_dir / FILE_NAME, blob):
        store.compact()
        store.checkpoint()


def _traces(path: Path, blob: bytes) -> bool:
    """Does any piece of the stored form of this blob stand anywhere in the file?"""
    text = b64encode(blob).encode()
    # The start of every blob of this KEK is alike: only what follows the nonce is this DEK's own.
    own = text[-96:]
    pieces = [own[i : i + _PIECE] for i in range(0, len(own) - _PIECE + 1, _PIECE)]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(piece) >= 0 for piece in pieces)
