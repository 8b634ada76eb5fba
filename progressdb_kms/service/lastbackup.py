"""The last backup, as `backup` notes it in the data-dir, where the daemon sees it and tells its age.

The note decides nothing. A backup is made by a command that may be another user's, on files; it can't ask the
daemon to remember.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from ..disk import regular
from ..encoding import json_loads

FILE_NAME = "kms-backup.json"

LONGEST = 16 * 1024


class LastBackup(NamedTuple):
    """Times are RFC 3339 in UTC; `checked_at` is when the newest that passed a drill was made."""

    file: str
    created_at: str
    sha256: str
    checked_at: str = ""


def read(data_dir: Path) -> LastBackup | None:
    """None: none was noted, or the note can't be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        with open(regular(data_dir / FILE_NAME, os.O_NOFOLLOW), "rb") as source:
            found = LastBackup(**json_loads(source.read(LONGEST)))
        if all(isinstance(value, str) for value in found):
            return found
    return None
