"""The tables that rotations left: each holds the rows as they were before one, under the KEK of then.

They are looked at and dropped without any key. A shred takes its DEK's row out of each of them."""

from __future__ import annotations

import json
from typing import Any

from .engine import Link
from .store import RETIRED, TABLES

_RETIRED = "SELECT value FROM kms WHERE host = '' AND name = 'kek:retired:' || %s"


def left(link: Link) -> list[dict[str, Any]]:
    """Oldest first. `kek_id` is the KEK of most of its DEKs, "" where there is none left; `time` when that
    was rotated out."""
    with link.session() as session:
        names = [row[0] for row in session.execute(TABLES, (RETIRED,)).fetchall()]
        found = []
        for name in sorted(names, key=lambda name: int(name[len(RETIRED) :])):
            query = f"SELECT kek_id, count(*) FROM {name} WHERE kek_id <> '' GROUP BY 1 ORDER BY 2 DESC"  # noqa: S608
            counts = session.execute(query.encode()).fetchall()
            kek_id = counts[0][0] if counts else ""
            rows = session.execute(_RETIRED, (kek_id,)).fetchall()
            time = json.loads(rows[0][0])["since"] if rows else ""
            found.append(
                {"time": time, "kek_id": kek_id, "deks": sum(row[1] for row in counts), "path": name}
            )
    return found


def drop(link: Link, name: str) -> None:
    """One that `left` named."""
    with link.session() as session:
        session.execute(f"DROP TABLE IF EXISTS {name}".encode())
