"""What a check found: one of `doctor`, or the drill of a backup."""

from __future__ import annotations

from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    level: str
    text: str
    todo: str = ""


FAILED = ".failed"
"""Behind the name of a backup that did not pass its drill."""


def failed(file: str, created_at: str, checked_at: str) -> bool:
    """By the note of the last backup: it did not pass its drill, and has not since."""
    return file.endswith(FAILED) and checked_at != created_at
