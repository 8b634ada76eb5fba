"""Which KEKs do the key file and its `.next` hold now? `rotate-kek` changes both under the running daemon."""

from __future__ import annotations

from ..config import keysource
from ..config.load import PENDING_SUFFIX
from ..crypto.aead import KEY_SIZE
from ..crypto.keyring import fingerprint
from ..crypto.memory import LockedBuffer
from ..errors import KMSError

_SIZE = KEY_SIZE + keysource.SCRATCH_SIZE


def kek_ids(path: str | None) -> set[str]:
    """Of those that the start would take."""
    return {_kek_id(path), _kek_id(path + PENDING_SUFFIX)} - {""} if path else set()


def _kek_id(path: str) -> str:
    """Empty where there is none."""
    with LockedBuffer(_SIZE) as memory, memory.view[:KEY_SIZE] as key, memory.view[KEY_SIZE:] as scratch:
        try:
            keysource.read(keysource.Source("file", path, path), {}, scratch, key)
            return fingerprint(key)
        except KMSError:
            return ""
