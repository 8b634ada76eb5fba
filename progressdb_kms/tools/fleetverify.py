"""`verify` of a fleet: what it says of itself, held against all of its rows, in one moment of the database.

Of the files of this host nothing is looked at: each daemon holds its own log against the fleet at its start.
"""

from __future__ import annotations

from typing import Any

from ..config.load import Loaded
from ..crypto.envelope import ROW_KEY
from ..errors import KeyMismatch, StoreDamaged
from ..fleet.reader import ANEW, FleetReader
from ..service.ownkeys import ROWS
from . import datadir
from .backup import Progress
from .console import CommandFailed
from .datadir import Opener
from .storecmd import Faults, check_deks


def verify_fleet(loaded: Loaded, progress: Progress) -> dict[str, Any]:
    """Raises CommandFailed after it listed what is wrong, KeyMismatch, StoreDamaged, StoreUnavailable."""
    faults = Faults()
    with (
        datadir.keys(loaded) as keys,
        datadir.reading(loaded.settings) as reader,
        datadir.own_key(keys.keyring, ROW_KEY, reader.read(ROWS[ROW_KEY])) as key,
        Opener(keys.keyring) as opener,
    ):
        assert isinstance(reader, FleetReader)
        if key is None:
            hint = "let the master key of this configuration be the fleet's"
            raise KeyMismatch("the fleet's row key opens under none of the configured KEKs", hint=hint)
        reader.unlock(key)
        _check_sums(reader, faults)
        total = sum(row.deks for row in reader.keks().values())
        live, shredded = check_deks(reader, opener, total, faults, progress)
    if faults.count:
        raise CommandFailed(
            f"{faults.count} faults were found in the fleet",
            hint="`restore` a backup into an empty fleet, or bring keys back by `export` and `import`; where "
            "only the counts are wrong, and you know why, `verify --recount`",
        )
    return {"result": "ok", "deks": live, "shredded": shredded}


def _check_sums(reader: FleetReader, faults: Faults) -> None:
    try:
        reader.vouch()
    except StoreDamaged as error:
        faults.add(error.message)
    state, (found, total) = reader.state(), reader.added_up()
    kept = {kek_id: row.deks for kek_id, row in state.keks.items()}
    if kept != found:
        faults.add(f"DEKs by KEK are counted as {kept}, and there are {found}")
    if state.total != total:
        faults.add("a row was deleted, or an older one was put back: they don't add up")
    for key_id in reader.misfiled():
        faults.add(f"{key_id}: the columns by which it is found aren't what its row says; {ANEW}")
