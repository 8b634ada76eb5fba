"""`backup --check`: would this file bring everything back, with the keys that are configured?

Nothing is written, and no store is needed: it can be done on another host, from a timer, at any time.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..config.load import Loaded
from ..crypto.envelope import AUDIT_KEY, ROW_KEY
from ..errors import StoreDamaged
from ..service.ownkeys import ROWS
from ..service.plan import Configured
from ..store.policy import SHREDDED
from . import backup, datadir
from .backup import Backup, Progress
from .console import CommandFailed, say
from .datadir import Keys, Opener

TOLD = 20
"""Faults that are listed; all are counted."""


def check(loaded: Loaded, file: Path, progress: Progress) -> dict[str, Any]:
    """Open every DEK of a backup. Returns what it holds and needs. Raises CommandFailed after it listed what
    is wrong."""
    with (
        backup.opened(file, progress) as source,
        datadir.keys(loaded) as keys,
        datadir.own_key(keys.keyring, ROW_KEY, source.row_key) as key,
    ):
        missing = _missing(source, keys.configured)
        lost = _given_up(source, keys.configured, missing)
        faults = _authentic(source, key) if source.contents.active_kek_id not in missing else []
        more, opened = _faults(source, keys, missing, progress)
        faults += more
        for text in faults[:TOLD]:
            say(text)
        for kek_id, count in lost.items():
            say(f"{count} DEKs need the KEK {kek_id}, which is not there: left out, by allow_missing_keks")
        needed = {} if lost else missing
        if faults or needed:
            raise CommandFailed(_verdict(file, source, needed, faults), hint=_remedy(needed))
        return {
            "file": str(file),
            "created_at": source.contents.created_at,
            "deks": source.contents.deks,
            "opened": opened,
            **({"left_out": sum(lost.values())} if lost else {}),
            "shredded": source.contents.shredded,
            "needs": _needs(source, keys.configured),
        }


def _authentic(source: Backup, key: memoryview | None) -> list[str]:
    """Was it changed after it was made? `key`: its row key."""
    if key is None:
        return ["the row key does not open: nothing tells whether the rows are genuine"]
    try:
        source.unlock(key)
        source.check_all()
    except StoreDamaged as error:
        return [error.message]
    return []


def _faults(source: Backup, keys: Keys, missing: dict[str, int], progress: Progress) -> tuple[list[str], int]:
    """What does not open although its KEK is here; and how many did."""
    faults = [f"{key_id}: its row can't be read" for key_id in source.unreadable()]
    opened = done = 0
    with Opener(keys.keyring) as opener:
        for record, _ in source.records():
            if record.state == SHREDDED or record.kek_id in missing:
                continue
            try:
                opener.check(record.key_id, record.wrapped)
                opened += 1
            except ValueError as error:
                faults.append(f"{record.key_id}: {error}")
            done += 1
            progress(done, source.contents.deks)
    if source.contents.active_kek_id not in missing:
        with datadir.own_key(keys.keyring, AUDIT_KEY, source.read(ROWS[AUDIT_KEY])) as key:
            if key is None:
                faults.append("the audit key does not open: the chain of the audit log could not go on")
    return faults, opened


def _missing(source: Backup, keys: Configured) -> dict[str, int]:
    """KEKs that the backup needs and the configuration has not, and how many DEKs need each."""
    needs: Counter[str] = Counter(source.contents.keks)
    return {kek_id: needs[kek_id] for kek_id in source.contents.kek_ids if kek_id not in keys.kek_ids}


def _given_up(source: Backup, keys: Configured, missing: dict[str, int]) -> dict[str, int]:
    """Of these, what the daemon starts without: a KEK that is lost would fail each drill, for ever."""
    allowed = keys.settings.allow_missing_keks and source.contents.active_kek_id not in missing
    return missing if allowed else {}


def _needs(source: Backup, keys: Configured) -> list[str]:
    """Which key, from where, for how much."""
    places = {key.kek_id: key.source.label for key in reversed(keys.keys)}
    active = source.contents.active_kek_id
    return [
        f"{kek_id} ({places[kek_id]}): {source.contents.keks.get(kek_id, 0)} DEKs"
        + (", the active one" if kek_id == active else "")
        for kek_id in source.contents.kek_ids
        if kek_id in places
    ]


def _verdict(file: Path, source: Backup, missing: dict[str, int], faults: list[str]) -> str:
    parts = [
        f"needs the KEK {kek_id}, which is not configured, for "
        + (f"{count} DEKs" if count else "its audit key")
        for kek_id, count in missing.items()
    ]
    if faults:
        parts.append(f"has {len(faults)} keys that do not open")
    return f"{file} (of {source.contents.created_at[:10]}) {' and '.join(parts)}"


def _remedy(missing: dict[str, int]) -> str:
    if missing:
        return "`progressdb-kms kek-id FILE…` finds the key files: name them in previous_master_keys"
    return "run `progressdb-kms verify` on the store, then make another backup"
