"""Policies on their way from the supervisor, who reads the configuration anew at SIGHUP, to the workers.

Shared memory, written before the workers are told to look. What stands there is no secret; it is all that of
a configuration can change while the daemon runs. A configuration that is wrong changes nothing. SIGHUP may
come again while a worker looks: a checksum tells it that it saw half of each.
"""

from __future__ import annotations

import json
import logging
import mmap
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.load import read_policies
from ..config.options import Settings
from ..config.yamlfile import MAX_FILE
from ..encoding import json_dumps
from ..errors import ConfigError
from ..rules import Policy

log = logging.getLogger(__name__)

ROOM = 8 * MAX_FILE
"""Bytes for all policies as JSON, where a character takes six times as many as in the file at most. What is
never written takes no memory."""


class Policies:
    """Made before the first fork; the supervisor writes, the workers read."""

    def __init__(self, settings: Settings) -> None:
        self._map = mmap.mmap(-1, ROOM)
        self._file = settings.config_file
        self._write(settings.policies)

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        text = json_dumps(list(entries)).encode("ascii")
        self._map[: 16 + len(text)] = b"%08x%08x%b" % (len(text), zlib.crc32(text), text)

    def read(self) -> list[Policy]:
        while zlib.crc32(text := self._map[16 : 16 + int(self._map[:8], 16)]) != int(self._map[8:16], 16):
            pass  # it is being written, in a hundredth of a millisecond
        return [Policy.of(number, entry) for number, entry in enumerate(json.loads(text), 1)]

    def renew(self) -> None:
        """SIGHUP, before the workers hear of it. All or nothing."""
        if self._file is None:
            return
        try:
            entries = read_policies(self._file)
            self._write(entries)
        except (ConfigError, OSError) as error:  # no process can be had that reads them
            log.error("the policies stay as they were: %s", getattr(error, "line", error))
            return
        log.info("SIGHUP: policies in force: %d; peer rules and limits are those of the start", len(entries))
