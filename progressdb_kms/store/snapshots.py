"""Snapshots and the signed ledger that a rotation leaves behind.

    <data-dir>/kms-deks-backup/<UTC time>-<old kek_id>/<key_id>.json   one row each, as it was before
    <data-dir>/kms-deks-backup/<UTC time>-<old kek_id>/all.lines       the same as lines, above SMALL rows
    <data-dir>/kms-deks-backup/<UTC time>-<old kek_id>.ledger          what was rewrapped, and proof of it

All files are 0600. They hold wrapped DEKs only. A snapshot opens with the KEK that its folder names.

A file a key is easy to look at, but takes an inode and a block of 4 KiB each. The lines stand in the order of
their key_ids, so that one is found by bisection; a shred overwrites all of its line but the key_id, in place.

The ledger has a JSON line a key: key_id, old and new kek_id, SHA-256 of the old row as it stands in the
snapshot, with thread and state, and of the new blob. Its last line holds the totals, the SHA-256 of all lines
before it, and an HMAC of both under the audit key. While a rotation writes it, it is locked (flock): a ledger
without totals that nobody holds was left by a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

from ..crypto.aead import mac
from ..disk import regular, write_all
from ..encoding import LATEST, b64encode, json_dumps
from ..errors import StoreUnavailable
from .contract import DekRecord
from .policy import SHREDDED

FOLDER = "kms-deks-backup"
_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{16}(?:-\d+)?")

LINES = "all.lines"
"""No key_id's file: those end in .json."""

UNFINISHED = "snapshot:"
"""Rows of the store with the name of a folder whose rotation has not taken place."""

GO_SERVICE = f".{'[0-9]' * 8}T{'[0-9]' * 6}"
"""What the Go service's snapshots of a key have behind its key_id, in the same folder. Nothing of ours ends
so: a key_id may be that of a ledger without its end."""

SMALL = 5_000
"""Rows up to which a snapshot is a file a key."""

LONGEST = 8192
"""Bytes of a line at most: a thread_id has up to 512 characters, of twelve bytes each in JSON."""

_KEY = re.compile(rb'\{"key_id":"([^"]{1,128})"')

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class Snapshot:
    """The snapshot of one rotation while it is written. Raises StoreUnavailable on any write error."""

    def __init__(self, data_dir: Path, now: float, old_kek_id: str, rows: int) -> None:
        root = data_dir / FOLDER
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(min(now, LATEST)))}-{old_kek_id}"
        with _write_errors(root):
            root.mkdir(mode=0o700, exist_ok=True)
            _need_inodes(root, rows + 3 if rows <= SMALL else 3)
            self.path = _fresh(root, name)
            self._ledger = os.fdopen(os.open(ledger(self.path), _NEW, 0o600), "wb")
            fcntl.flock(self._ledger, fcntl.LOCK_EX)
            self.path.mkdir(mode=0o700)
            self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            self._lines = self._create(LINES) if rows > SMALL else -1
        self._digest = hashlib.sha256()
        self._count = 0
        self._pool = ThreadPoolExecutor(max_workers=1)

    def save(self, pairs: Iterable[tuple[DekRecord, DekRecord]]) -> int:
        """Write rows as they were, in the order of their key_ids, and a line of the ledger on how each was
        rewrapped. Shredded ones are left out. Returns how many were written: all are in the files then."""
        pairs = [(old, new) for old, new in pairs if old.state != SHREDDED]
        rows = [json_dumps({"key_id": old.key_id, **old.to_row()}).encode() + b"\n" for old, _ in pairs]
        with _write_errors(self.path):
            if self._lines >= 0:
                write_all(self._lines, b"".join(rows))
            else:
                for (old, _), row in zip(pairs, rows):
                    self._save_file(old.key_id, row)
            for (old, new), row in zip(pairs, rows):
                self._note(old, new, row)
        return len(pairs)

    def _create(self, name: str) -> int:
        return os.open(name, _NEW, 0o600, dir_fd=self._folder)

    def _save_file(self, key_id: str, row: bytes) -> None:
        fd = self._create(key_id + ".json")
        try:
            write_all(fd, row)
        finally:
            os.close(fd)

    def _note(self, old: DekRecord, new: DekRecord, row: bytes) -> None:
        line = {
            "key_id": old.key_id,
            "old_kek_id": old.kek_id,
            "new_kek_id": new.kek_id,
            "old_sha256": hashlib.sha256(row).hexdigest(),
            "new_sha256": hashlib.sha256(new.wrapped).hexdigest(),
        }
        text = json_dumps(line).encode() + b"\n"
        self._digest.update(text)
        self._count += 1
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
            if self._lines >= 0:
                os.close(self._lines)
            self._folder = -1
            with contextlib.suppress(OSError):  # `finish` has flushed it, or the rotation has failed anyway
                self._ledger.close()


def place(data_dir: Path, told: str) -> Path | None:
    """The snapshot folder that a row of the store names: of ours, or None. Nothing else is ever removed."""
    name = os.path.basename(told)
    return data_dir / FOLDER / name if _NAME.fullmatch(name) else None


def ledger(path: Path) -> Path:
    return path.with_name(path.name + ".ledger")


def _need_inodes(root: Path, needed: int) -> None:
    found = os.statvfs(root)
    if found.f_files and found.f_favail < needed:
        raise StoreUnavailable(
            f"the snapshot of this rotation needs {needed} inodes, and {root} has {found.f_favail} free",
            hint="remove files there: `backups prune` takes old snapshots; nothing was changed",
        )


def unfinished(data_dir: Path) -> list[Path]:
    """The folders of rotations that did not end. Of none that is being written, nor of whatever lost its
    ledger otherwise."""
    root = data_dir / FOLDER
    found = (path for path in root.glob("*.ledger") if _abandoned(path)) if root.is_dir() else ()
    return sorted(path for one in found if (path := place(data_dir, one.stem)) is not None)


def _abandoned(path: Path) -> bool:
    """Is this ledger without its last line, and nobody writes it?"""
    with contextlib.suppress(OSError), open(regular(path), "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        if not file.read().rpartition(b"\n")[0].rpartition(b"\n")[2].startswith(b'{"totals":'):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    return False


def discard(path: Path, limit: int) -> bool:
    """Remove up to `limit` files of a snapshot whose rotation did not happen. True: there are more. The
    ledger goes last: by it an interrupted removal is known."""
    with _write_errors(path):
        with contextlib.suppress(FileNotFoundError):  # the folder, which `backups prune` has taken
            with os.scandir(path) as entries:
                some = [Path(entry) for entry in itertools.islice(entries, limit)]
            for file in some:
                file.unlink(missing_ok=True)
            if some:
                return True
            path.rmdir()
        ledger(path).unlink(missing_ok=True)
    return False


def forget(data_dir: Path, key_id: str) -> None:
    """Remove every snapshot of a shredded key; its bytes are overwritten before they are unlinked. What
    `backups prune` removes meanwhile is gone as well."""
    root = data_dir / FOLDER
    with _write_errors(root):
        ours = folders(data_dir)
        for path in (*(folder / f"{key_id}.json" for folder in ours), *root.glob(key_id + GO_SERVICE)):
            with contextlib.suppress(FileNotFoundError):
                destroy(path)
        for folder in ours:
            with contextlib.suppress(FileNotFoundError):
                _blank(folder / LINES, key_id)


def folders(data_dir: Path) -> list[Path]:
    """The snapshot folders, oldest first."""
    root = data_dir / FOLDER
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def find(lines: Path, key_id: str) -> tuple[int, bytes] | None:
    """Where the line of this key begins, and what it holds; by bisection."""
    wanted = key_id.encode()
    with open(regular(lines), "rb") as file:
        low, high = 0, file.seek(0, os.SEEK_END)
        while low < high:  # the line that is looked for begins in low..high
            start, line = _line_around(file, (low + high) // 2)
            if not line.endswith(b"\n"):  # a crash tore it
                high = start
                continue
            match = _KEY.match(line)
            if match is None:
                raise StoreUnavailable(f"{lines}: bad at byte {start}", hint="`backups prune`, if unneeded")
            if match[1] == wanted:
                return start, line
            low, high = (start + len(line), high) if match[1] < wanted else (low, start)
    return None


def _line_around(file: BinaryIO, place: int) -> tuple[int, bytes]:
    """Where the line that this byte belongs to begins, and the line with its end."""
    begin = max(0, place - LONGEST)
    file.seek(begin)
    around = file.read(place - begin + LONGEST)
    start = around.rfind(b"\n", 0, place - begin) + 1
    return begin + start, around[start : around.find(b"\n", place - begin) + 1 or len(around)]


def _cut_torn(lines: Path) -> None:
    """The last line without an end, of a rotation that a crash ended: it may hold any key's bytes."""
    with open(regular(lines, os.O_RDWR), "r+b") as file:
        start, line = _line_around(file, file.seek(0, os.SEEK_END))
        if line:
            os.pwrite(file.fileno(), bytes(len(line)), start)
            os.fsync(file.fileno())
            os.ftruncate(file.fileno(), start)


def _blank(lines: Path, key_id: str) -> None:
    """The key_id stays, so that the order does, and what was half done is found again."""
    _cut_torn(lines)
    found = find(lines, key_id)
    if found is None:
        return
    start, line = found
    head = json_dumps({"key_id": key_id}).encode()
    with open(regular(lines, os.O_RDWR), "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), head[:-1] + b"}".rjust(len(line) - len(head)) + b"\n", start)
        os.fsync(file.fileno())


def destroy(path: Path) -> None:
    """Overwrite a file, and take it away. Raises OSError."""
    with open(regular(path, os.O_WRONLY | os.O_NOFOLLOW), "wb", buffering=0) as file:
        write_all(file.fileno(), bytes(os.fstat(file.fileno()).st_size))
        os.fsync(file.fileno())
    path.unlink()


def _fresh(root: Path, name: str) -> Path:
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        path = root / (name + suffix)
        if not path.exists() and not ledger(path).exists():
            return path
    raise StoreUnavailable(f"{root} has a thousand snapshots of this second")


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """OSError becomes the StoreUnavailable that the caller of a rotation hears."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"{path} can't be written: {error.strerror}",
            hint="make room, or look at the rights of the folder; nothing was changed",
        ) from error
