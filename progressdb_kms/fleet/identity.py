"""Which incarnations of this host surely run no more? They need not be waited for.

Each registration is written down in the data-dir before it is made. Whoever holds the data-dir's lock knows
that all of them are over, **if** they were of this very folder and of this boot: a daemon's processes die
with it. Over a reboot nothing is said: the folder may be a copy, whose original runs elsewhere. What isn't
known to be over is fenced like any dead host, when a change waits for it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from .. import disk
from ..encoding import json_dumps
from ..errors import StoreUnavailable

FILE_NAME = "fleet-incarnations.json"

KEPT = 64
"""Registrations that are remembered; older ones were fenced by anybody's change long ago."""


class Identity:
    """`host`: the random id of this data-dir; `name`: for people. The lock of the data-dir is held."""

    def __init__(self, data_dir: Path, host: str, name: str, boot: str) -> None:
        """`boot`: a name of the boot, "" where it has none."""
        self.host, self.name = host, name
        self._path = data_dir / FILE_NAME
        about = data_dir.stat()
        self._place = [boot, about.st_dev, about.st_ino]
        self._gone = self._read() if boot else []
        self._made: list[str] = []

    def _read(self) -> list[str]:
        """What can't be read, or is of another place, tells of none that is over."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found: dict[str, Any] = json.loads(self._path.read_bytes())
            if found["place"] == self._place:
                return [str(inc) for inc in found["incarnations"]]
        return []

    def fresh(self) -> str:
        """On the disk before it is used. Raises StoreUnavailable."""
        inc = os.urandom(8).hex()
        self._made = [*self._made, inc]
        try:
            incs = [*self._gone, *self._made][-KEPT:]
            disk.put(self._path, json_dumps({"place": self._place, "incarnations": incs}).encode())
        except OSError as error:
            raise StoreUnavailable(
                f"{self._path} can't be written: {error.strerror}",
                hint="this host registers in the fleet once it can",
            ) from error
        return inc

    def gone(self) -> list[str]:
        return self._gone
