"""The frozen vectors in tests/vectors: what release 1 wrote, and known answers that others published."""

from __future__ import annotations

import json
from typing import Any

from tests.harness import REPO


def load(name: str) -> dict[str, Any]:
    vectors: dict[str, Any] = json.loads((REPO / "tests" / "vectors" / f"{name}.json").read_text())
    return vectors


def secret(digits: str) -> memoryview:
    """A key as the product takes it: a writable buffer."""
    return memoryview(bytearray.fromhex(digits))
