"""Per-key snapshots and the signed ledger that a rotation leaves behind.

    <data-dir>/kms-deks-backup/<UTC time>-<old kek_id>/<key_id>.json   one row each, as it was before
    <data-dir>/kms-deks-backup/<UTC time>-<old kek_id>.ledger          what was rewrapped, and proof of it

All files are 0600. They hold wrapped DEKs only. A snapshot opens with the KEK that its folder names.

The ledger has a JSON line a key: key_id, old and new kek_id, SHA-256 of the old and of the new blob. Its
last line holds the totals, the SHA-256 of all lines before it, and an HMAC of both under the audit key.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Optional

from ..crypto.aead import mac
from ..encoding import LATEST, b64encode, json_dumps
from ..errors import StoreUnavailable
from .contract import DekRecord

FOLDER = "kms-deks-backup"
_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{16}(?:-\d+)?")

_libc = ctypes.CDLL(None, use_errno=True)


class Snapshot:
    """The snapshot of one rotation while it is written. Raises StoreUnavailable on any write error."""

    def __init__(self, data_dir: Path, now: float, old_kek_id: str) -> None:
        root = data_dir / FOLDER
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(min(now, LATEST)))}-{old_kek_id}"
        with _write_errors(root):
            root.mkdir(mode=0o700, exist_ok=True)
            self.path = _fresh(root, name)
            self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            self._ledger = open(self.path.with_name(self.path.name + ".ledger"), "xb", opener=_private)  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._count = 0
        self._pool = ThreadPoolExecutor(max_workers=1)

    def save(self, old: DekRecord, new: DekRecord) -> None:
        """Write the row as it was, and a line of the ledger on how it was rewrapped."""
        row = json_dumps({"key_id": old.key_id, **old.to_row()}).encode() + b"\n"
        line = {
            "key_id": old.key_id,
            "old_kek_id": old.kek_id,
            "new_kek_id": new.kek_id,
            "old_sha256": hashlib.sha256(old.wrapped).hexdigest(),
            "new_sha256": hashlib.sha256(new.wrapped).hexdigest(),
        }
        text = json_dumps(line).encode() + b"\n"
        self._digest.update(text)
        self._count += 1
        with _write_errors(self.path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            fd = os.open(old.key_id + ".json", flags, 0o600, dir_fd=self._folder)
            try:
                _write_all(fd, row)
            finally:
                os.close(fd)
            self._ledger.write(text)

    def finish(self, audit_key: memoryview, new_kek_id: str) -> Iterator[None]:
        """Sign the ledger and bring everything to the disk with one syncfs. Yields while that takes."""
        totals = {"rewrapped": self._count, "new_kek_id": new_kek_id, "sha256": self._digest.hexdigest()}
        sig = b64encode(mac(audit_key, json_dumps(totals).encode()))
        with _write_errors(self.path):
            self._ledger.write(json_dumps({"totals": totals, "sig": sig}).encode() + b"\n")
            self._ledger.flush()
            synced = self._pool.submit(self._sync)
            while wait((synced,), timeout=0.002).not_done:
                yield
            synced.result()
        self.close()

    def _sync(self) -> None:
        os.fsync(self._ledger.fileno())
        if _libc.syncfs(self._folder):
            raise OSError(ctypes.get_errno(), "syncfs")

    def close(self) -> None:
        self._pool.shutdown()
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1
            with contextlib.suppress(OSError):  # `finish` has flushed it, or the rotation has failed anyway
                self._ledger.close()


def place(data_dir: Path, told: str) -> Optional[Path]:
    """The snapshot folder that a row of the store names: of ours, or None. Nothing else is ever removed."""
    name = os.path.basename(told)
    return data_dir / FOLDER / name if _NAME.fullmatch(name) else None


def discard(path: Path, limit: int) -> bool:
    """Remove up to `limit` files of a snapshot whose rotation did not happen. True: there are more."""
    path.with_name(path.name + ".ledger").unlink(missing_ok=True)
    if not path.is_dir():
        return False
    with os.scandir(path) as entries:
        some = [entry.path for entry in itertools.islice(entries, limit)]
    for name in some:
        os.unlink(name)
    if not some:
        path.rmdir()
    return bool(some)


def forget(data_dir: Path, key_id: str) -> None:
    """Remove every snapshot of a shredded key; its bytes are overwritten before they are unlinked."""
    root = data_dir / FOLDER
    with _write_errors(root):
        ours = [folder / f"{key_id}.json" for folder in folders(data_dir)]
        for path in (*ours, *_go_service(root, key_id)):
            if path.exists():
                _overwrite(path)
                path.unlink()


def folders(data_dir: Path) -> list[Path]:
    """The snapshot folders, oldest first."""
    root = data_dir / FOLDER
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _go_service(root: Path, key_id: str) -> Iterable[Path]:
    """The Go service's snapshots of a key: `<key_id>.<YYYYMMDDTHHMMSS>` in the same folder."""
    if not root.is_dir():
        return []
    return (path for path in root.iterdir() if path.name.rpartition(".")[0] == key_id and path.is_file())


def _overwrite(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        _write_all(fd, bytes(os.fstat(fd).st_size))
        os.fsync(fd)
    finally:
        os.close(fd)


def _fresh(root: Path, name: str) -> Path:
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        path = root / (name + suffix)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return path
    raise StoreUnavailable(f"{root} has a thousand snapshots of this second")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


class _write_errors:
    """OSError becomes the StoreUnavailable that the caller of a rotation hears."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if isinstance(value, OSError):
            raise StoreUnavailable(
                f"{self._path} can't be written: {value.strerror}",
                hint="make room, or look at the rights of the folder; nothing was changed",
            ) from value
