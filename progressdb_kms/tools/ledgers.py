"""The signed ledger of a rotation, as commands read it (`store/snapshots` writes it): by it the rows of a
snapshot are those that were there. Who may write to a snapshot may have had another DEK wrapped for a key_id
by the service itself (`/wrap`), and that one opens just as well; or may want the DEK in another thread.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable

from ..crypto.aead import mac, same
from ..disk import regular
from ..encoding import b64encode, json_dumps, json_loads

_TAIL = 4096
"""Bytes from the end of a ledger in which its last line stands."""


def last_line(ledger: Path) -> Mapping[str, Any]:
    """Its totals and their signature; empty where there is none, or none yet."""
    try:
        with open(regular(ledger), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            line = file.read().splitlines()[-1]
        value = json_loads(line)
        return value if isinstance(value, dict) and {"totals", "sig"} == set(value) else {}
    except (OSError, ValueError, IndexError):
        return {}


def signed(ledger: Path, key: memoryview, wanted: Callable[[bytes], bool]) -> dict[str, str] | None:
    """SHA-256 of each DEK's old row, of the lines that are `wanted`. None: this is not what was signed under
    the audit key. Raises OSError."""
    os.stat(ledger)
    last = last_line(ledger)
    totals = last.get("totals", {})
    sig = b64encode(mac(key, json_dumps(totals).encode()))
    if not last or not same(sig.encode(), str(last["sig"]).encode("utf-8", "replace")):
        return None
    digest, rows, held = hashlib.sha256(), list[bytes](), b""
    with open(regular(ledger), "rb") as file:
        for line in file:
            digest.update(held)
            if held and wanted(held):
                rows.append(held)
            held = line
    if not isinstance(totals, dict) or totals.get("sha256") != digest.hexdigest():
        return None
    return {row["key_id"]: row["old_sha256"] for row in map(json_loads, rows)}
