"""What the parts of the keeper share. Each has state of its own beside that, and takes of this what it works
with where it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, NamedTuple

from ..audit.log import AuditLog
from ..crypto.keyring import Keyring
from ..store.sealed import Store
from .clock import TrustedTime


class Common(NamedTuple):
    store: Store
    data_dir: Path
    keyring: Keyring
    audit: AuditLog
    time: TrustedTime
    effects: list[Callable[[], None]]
    """Of the job that is at work: what is due between its COMMIT and its answer."""
