"""A start of the daemon on a copy of its data-dir: what the next start would refuse is found before it.

It runs the start's own code, with the configured keys, on a copy of the store and of the newest audit log, in
memory where the system has a place for that; the data-dir itself is only read. Beside it the audit log is
verified. Both only up to a size: `doctor` is to be quick, and says what it left out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..audit import tail
from ..audit import verify as auditverify
from ..config.load import Loaded
from ..crypto.envelope import AUDIT_KEY
from ..disk import regular
from ..errors import KMSError
from ..service import start
from ..service.clock import Clock, judge, kept
from ..service.lock import is_held
from ..service.ownkeys import ROWS
from ..store.heads import Head, heads
from ..store.sqlite import FILE_NAME as STORE
from ..store.sqlite import refuse_lost
from . import datadir

MAX_STORE = 256 << 20
MAX_LOG = 64 << 20
"""Bytes up to which a store is copied and a log is verified."""

MEMORY = Path("/dev/shm")  # noqa: S108


class Rehearsal(NamedTuple):
    """`refusal`: why the daemon would not start. `fault`: the first one of the audit log. `held`: why
    scheduled deletions are. `erasures`: shreds that may have left a copy. `left_out`: what was not looked at.
    """

    refusal: KMSError | None = None
    fault: str = ""
    held: str = ""
    erasures: int = 0
    left_out: tuple[tuple[str, str], ...] = ()


def rehearse(loaded: Loaded) -> Rehearsal:
    """Raises OSError and sqlite3.Error where the files can't be read."""
    data_dir = loaded.settings.data_dir
    size = sum(path.stat().st_size for path in data_dir.glob(STORE + "*"))
    if size > MAX_STORE:
        todo = "`progressdb-kms verify` looks at all of it"
        return Rehearsal(left_out=((f"the start was not tried: the store has {size >> 20:,} MiB", todo),))
    with _copy(data_dir) as copy, datadir.keys(loaded) as keys:
        try:
            store, book, _ = start.open_store(copy, *keys, command="doctor")
        except KMSError as error:
            return Rehearsal(refusal=error)
        with contextlib.closing(store), contextlib.closing(book):
            return _with_log(data_dir, keys.keyring.audit_key, heads(store))._replace(
                held=judge(kept(store), Clock().reading()).held, erasures=len(store.names("erasure:"))
            )


def of_fleet(loaded: Loaded) -> Rehearsal:
    """The audit log alone: a start would be another host's in the fleet."""
    data_dir = loaded.settings.data_dir
    why = "this host's audit key is not in the fleet, or opens under none of the configured KEKs"
    try:
        with (
            datadir.reading(loaded.settings) as reader,
            datadir.keys(loaded) as keys,
            datadir.own_key(keys.keyring, AUDIT_KEY, reader.read(ROWS[AUDIT_KEY])) as key,
        ):
            if key is not None:
                return _with_log(data_dir, key, heads(reader))
    except KMSError as error:
        why = error.message
    return Rehearsal(
        left_out=((f"the audit log was not verified: {why}", ""),) if tail.logs(data_dir) else ()
    )


def _with_log(data_dir: Path, key: memoryview, anchors: Mapping[str, Head]) -> Rehearsal:
    logs = tail.logs(data_dir)
    size = sum(path.stat().st_size for path in logs)
    if size > MAX_LOG:
        todo = "`progressdb-kms audit verify` does it"
        return Rehearsal(left_out=((f"the audit log was not verified: it has {size >> 20:,} MiB", todo),))
    report = auditverify.verify(logs, key, anchors, partial=True)
    return Rehearsal(fault=str(report.fault) if report.fault else "")


@contextlib.contextmanager
def _copy(data_dir: Path) -> Iterator[Path]:
    """The log first: then no record of the copy is newer than the store beside it."""
    where = str(MEMORY) if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="progressdb-kms-doctor-", dir=where) as name:
        copy = Path(name)
        for path in tail.in_order(tail.logs(data_dir))[-2:]:
            _copy_end(Path(path), copy / os.path.basename(path))
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(data_dir / start.HOST_FILE, copy / start.HOST_FILE)
        if (data_dir / STORE).exists():
            _copy_store(data_dir, copy)
        for made in copy.iterdir():
            made.chmod(0o600)
        yield copy


def _copy_end(source: Path, target: Path) -> None:
    """Whole lines from the end of a log; a packed one whole."""
    with open(regular(source), "rb") as file, open(target, "wb") as copy:
        if source.suffix != ".gz" and file.seek(0, os.SEEK_END) > MAX_LOG:
            file.seek(-MAX_LOG, os.SEEK_END)
            file.readline()
        else:
            file.seek(0)
        shutil.copyfileobj(file, copy)
    shutil.copystat(source, target)


def _copy_store(data_dir: Path, copy: Path) -> None:
    """While a daemon holds it, by SQLite; else the files, since SQLite would leave others beside them."""
    if is_held(data_dir):
        refuse_lost(data_dir / STORE)
        uri = f"{(data_dir / STORE).as_uri()}?mode=ro"
        with (
            contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5)) as source,
            contextlib.closing(sqlite3.connect(copy / STORE)) as target,
        ):
            source.backup(target)
        return
    for name in (STORE, STORE + "-wal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(data_dir / name, copy / name)
