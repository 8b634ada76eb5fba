"""ProgressDB's own key stores: folders of Pebble, whose default format RocksDB reads.

    meta:<key_id>    {"wrapped", "thread_id"}              until November 2025
    dek:<key_id>     {"ciphertext", "key_info"}            since: the wrapped DEK itself

`rocksdict` opens them (the extra `pebble`), for reading only, and reads what was only ever written to the
write-ahead log too. It writes a file of its own beside what it opens: so it is shown a folder of links, and
the original stays as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .console import CommandFailed

ELSEWHERE = (
    "`pip install 'progressdb-kms[pebble]'` (it is rocksdict), or import on a host where it can be had, and "
    "bring what `export` writes there"
)


class Row(NamedTuple):
    """A DEK as JSON that `imports` reads; `done` of about `total`."""

    key_id: str
    data: bytes
    done: int
    total: int


def is_store(folder: Path) -> bool:
    return (folder / "CURRENT").is_file() and any(folder.glob("MANIFEST-*"))


def rows(folder: Path) -> Iterator[Row]:
    """Its DEKs, in order of key_id. Raises CommandFailed where it can't be read, or holds none."""
    number = 0
    with tempfile.TemporaryDirectory(prefix="progressdb-kms-") as place, _opened(folder, place) as store:
        total = store.property_int_value("rocksdb.estimate-num-keys") or 0
        for prefix, form in ((b"dek:", b'{"wrapped_dek":%b}'), (b"meta:", b"%b")):
            for key, value in _under(store, prefix):
                number += 1
                yield Row(key.decode("utf-8", "replace"), form % value, number, max(total, number))
    if not number:
        raise CommandFailed(
            f"the Pebble store {folder} holds no DEK",
            hint="ProgressDB's own data has such folders too: name the one of its KMS (kms, or kms.db)",
        )


def _under(store: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    for key, value in store.items(from_key=prefix):
        if not key.startswith(prefix):
            return
        yield key[len(prefix) :], value


@contextlib.contextmanager
def _opened(folder: Path, place: str) -> Iterator[Any]:
    try:
        rocksdict = importlib.import_module("rocksdict")
    except ImportError:
        raise CommandFailed(
            f"{folder} is a Pebble store, and rocksdict, which reads it, is not here", hint=ELSEWHERE
        ) from None
    for name in os.listdir(folder):
        if name not in ("LOG", "LOCK", "rocksdict-config.json"):
            os.symlink(os.path.abspath(folder / name), os.path.join(place, name))
    options = rocksdict.Options(raw_mode=True)
    try:
        store = rocksdict.Rdict(place, options, access_type=rocksdict.AccessType.read_only())
    except Exception as error:  # it knows no other
        why = str(error).partition("\n")[0].replace(place, str(folder))
        raise CommandFailed(
            f"the Pebble store {folder} can't be read: {why}",
            hint="stop the ProgressDB server or KMS that has it open, and try a copy of the whole folder",
        ) from None
    try:
        yield store
    finally:
        store.close()
