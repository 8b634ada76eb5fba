"""Where the tests have their files.

bin/test puts them into memory where the machine has some to spare: they bring a hundred thousand records to
the disk one by one, and would spend half of their time waiting for that. What a power cut leaves of a disk is
replayed (`powerloss`), what a full or failing one does is injected (`faults`), and `bin/test --long` runs on
the disk.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

ROOT = Path(os.environ.get("TESTS_FOLDER") or "/tmp")  # noqa: S108


def new_folder(prefix: str = "kms-") -> Path:
    """A folder with a name that is short enough for a socket in it."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=ROOT))
