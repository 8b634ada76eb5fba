"""The README and the manual as one text, whose chapters are found by their titles wherever they stand."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def book() -> str:
    """The README, then the manual's pages, their headings one rank lower."""
    parts = [(ROOT / "README.md").read_text(encoding="utf-8")]
    for path in sorted((ROOT / "progressdb_kms" / "manual").glob("*.md")):
        parts.append(_lower(path.read_text(encoding="utf-8")))
    return "\n".join(parts)


def _lower(text: str) -> str:
    """A fence holds code, in which # is no heading."""
    pieces = re.split(r"(?ms)(^```.*?^```$)", text)
    return "".join(piece if i % 2 else re.sub(r"(?m)^#", "##", piece) for i, piece in enumerate(pieces))
