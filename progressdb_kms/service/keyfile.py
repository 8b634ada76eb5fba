"""Which KEKs do the key file and its `.next` hold now? `rotate-kek` changes both under the running daemon."""

from __future__ import annotations

from ..config import keysource
from ..config.load import PENDING_SUFFIX
from ..crypto.aead import KEY_SIZE
from ..crypto.keyring import fingerprint
from ..crypto.memory import LockedBuffer
from ..errors import KMSError


def kek_ids(path: str | None) -> set[str]:
    """Of those that the start would take."""
    return {_kek_id(path), _kek_id(path + PENDING_SUFFIX)} - {""} if path else set()


def _kek_id(path: str) -> str:
    """Empty where there is none."""
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
