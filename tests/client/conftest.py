"""The same daemon as for the wire."""

from __future__ import annotations

from tests.wire.conftest import daemon, kms

__all__ = ["daemon", "kms"]
