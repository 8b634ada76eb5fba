"""Crypto-shred: after it, the wrapped bytes of a DEK are nowhere under the data-dir.

A wrapped DEK may stand in the live table, in tables that a rotation is emptying, in the write-ahead log, in
free space of a database page (SQLite's secure_delete zeroes what it frees, but moving rows between pages can
leave a copy in the gap), in snapshots, and in what was rescued. The order below is safe against a crash at
any point: the tombstone and a note that the erasure is due are one transaction; the note goes last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..encoding import b64encode
from . import outside, snapshots
from .sealed import Store
from .sqlite import FILE_NAME, RESCUE, forget_rescued

_PIECE = 20
"""Characters of base64 (15 bytes) that are taken for a trace of a blob; chance does not make these."""


def erase(store: Store, data_dir: Path, due: Mapping[str, bytes], patient: bool = True) -> None:
    """Make sure of it, for all these keys at once. Their blobs are empty where they aren't known any more
    (after a restart): then the whole database is rewritten. Raises StoreUnavailable, OSError; call again.

    `patient`: wait a moment for those who read the write-ahead log. Nothing else is written meanwhile.
    """
    with store.transaction():  # our files are in their places, and from here on nothing is being rescued
        for key_id in due:
            store.forget(key_id)
    for key_id in due:
        snapshots.forget(data_dir, key_id)
    forget_rescued(data_dir, due)
    for part in data_dir.glob(RESCUE + "*.db.part*"):  # what a killed rescue left of a file is none
        snapshots.destroy(part)
    store.checkpoint(patient)
    if not all(due.values()) or outside.holds(data_dir / FILE_NAME, _pieces(due.values())) is not False:
        store.compact()
        store.checkpoint(patient)


def _pieces(blobs: Iterable[bytes]) -> list[bytes]:
    """Pieces of the stored form of these blobs, of which none may stand anywhere in the file."""
    # The start of every blob of a KEK is alike: only what follows the nonce is this DEK's own.
    own = [b64encode(blob).encode()[-96:] for blob in blobs]
    return [text[i : i + _PIECE] for text in own for i in range(0, len(text) - _PIECE + 1, _PIECE)]
