"""KEKs that a rotation may move to, on their way from the configuration into the keyring of a daemon.

At SIGHUP the supervisor reads `next_master_keys` anew, into a locked region that was made before the first
fork; the keeper takes them from there: a key leaves the region as soon as it is in the keyring. What stays is
which KEKs are listed, for a keeper that comes after this one. A configuration that is wrong changes nothing.

    count + 1 u64 (0: as at the start) | kek_id 8, key 32  for each entry | scratch

Nobody else writes there. A keeper that reads it while it is written finds a key that is not of the kek_id
beside it, leaves that alone, and hears of the next SIGHUP as soon as it is done.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Callable

from ..config import keysource, yamlfile
from ..config.keysource import COMING, MASTER, PREVIOUS
from ..config.options import Settings
from ..config.values import MAX_NEXT
from ..crypto.aead import KEY_SIZE
from ..crypto.keyring import Keyring, fingerprint
from ..crypto.memory import LockedBuffer, wipe
from ..errors import KMSError
from .plan import Configured, ConfiguredKey

log = logging.getLogger("progressdb_kms")

_ID = 8
_ENTRY = _ID + KEY_SIZE
_SCRATCH = 8 + MAX_NEXT * _ENTRY
SIZE = _SCRATCH + keysource.SCRATCH_SIZE


class Coming:
    """Made before the first fork."""

    def __init__(self, settings: Settings) -> None:
        self._file = settings.config_file
        self._memory = LockedBuffer(SIZE, settings.memory_lock)

    # ---- the supervisor ------------------------------------------------------------------------

    def renew(self) -> None:
        """Before the keeper hears of it."""
        if self._file is None:
            return
        try:
            with contextlib.closing(yamlfile.read(self._file)) as file:
                self._fill(file)
        except (KMSError, OSError) as error:  # no process can be had that reads them
            log.error("the %s stay as they were: %s", COMING, getattr(error, "line", error))

    def _fill(self, file: yamlfile.ConfigFile) -> None:
        """All or nothing. Those in hex before them are read out of the way."""
        with LockedBuffer(SIZE) as made, made.view[_SCRATCH:] as scratch:
            with made.view[8 : 8 + KEY_SIZE] as place:
                for source in file.sources():
                    if source.role != COMING and source.form == keysource.HEX:
                        keysource.read(source, {}, scratch, place)
            sources = [source for source in file.sources() if source.role == COMING]
            for number, source in enumerate(sources):
                start = 8 + number * _ENTRY
                with made.view[start + _ID : start + _ENTRY] as key:
                    keysource.read(source, os.environ, scratch, key)
                    made.view[start : start + _ID] = bytes.fromhex(fingerprint(key))
            self._memory.view[:8] = bytes(8)
            self._memory.view[8:_SCRATCH] = made.view[8:_SCRATCH]
            self._memory.view[:8] = (len(sources) + 1).to_bytes(8, "little")
        log.info("SIGHUP: KEKs that a rotation may move to: %s", ", ".join(self._kek_ids()) or "none")

    # ---- the keeper ----------------------------------------------------------------------------

    def into(self, keyring: Keyring, keys: Configured, refused: Callable[[str], bool]) -> Configured:
        """Take what came. Returns the keys as the configuration names them now. `refused`: a KEK that must
        not come back."""
        if not int.from_bytes(self._memory.view[:8], "little"):
            return keys
        for place in self._places():
            with place[_ID:] as key:
                if any(key) and (kek_id := fingerprint(key)) == place[:_ID].hex() and not refused(kek_id):
                    keyring.install(key)
                wipe(key)
        others = [key for key in keys.keys if key.source.role != COMING]
        coming = [
            ConfiguredKey(kek_id, keysource.Source("", "", f"{COMING} entry {number}", COMING))
            for number, kek_id in enumerate(self._kek_ids(), 1)
            if kek_id not in keys.of_role(MASTER, PREVIOUS)
        ]
        return keys._replace(keys=[*others, *coming])

    def _kek_ids(self) -> list[str]:
        return [place[:_ID].hex() for place in self._places()]

    def _places(self) -> Iterator[memoryview]:
        for number in range(max(0, int.from_bytes(self._memory.view[:8], "little") - 1)):
            with self._memory.view[8 + number * _ENTRY : 8 + (number + 1) * _ENTRY] as place:
                yield place
