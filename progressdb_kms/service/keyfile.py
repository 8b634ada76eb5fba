"""Which KEKs do the key file and its `.next` hold now? `rotate-kek` changes both under the running daemon.

A file is read again where it has changed; only the kek_id is remembered.
"""

from __future__ import annotations

import os

from ..config import keysource
from ..config.load import PENDING_SUFFIX
from ..crypto.aead import KEY_SIZE
from ..crypto.keyring import fingerprint
from ..crypto.memory import LockedBuffer
from ..errors import KMSError


class KeyFile:
    def __init__(self, path: str | None) -> None:
        self._paths = (path, path + PENDING_SUFFIX) if path else ()
        self._seen: dict[str, tuple[tuple[int, ...], str]] = {}

    def kek_ids(self) -> set[str]:
        return {self._kek_id(path) for path in self._paths} - {""}

    def _kek_id(self, path: str) -> str:
        try:
            about = os.stat(path)
        except OSError:
            return ""
        mark = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        if self._seen.get(path, ((), ""))[0] != mark:
            self._seen[path] = mark, _read(path)
        return self._seen[path][1]


def _read(path: str) -> str:
    """Empty where the start would not take it."""
    with LockedBuffer(KEY_SIZE + keysource.SCRATCH_SIZE) as memory:
        key, scratch = memory.view[:KEY_SIZE], memory.view[KEY_SIZE:]
        try:
            keysource.read(keysource.Source("file", path, path), {}, scratch, key)
            return fingerprint(key)
        except KMSError:
            return ""
        finally:
            key.release()
            scratch.release()
