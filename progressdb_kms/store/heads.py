"""How far each chain of the audit log was when the store was last written: so a log whose end was cut off is
found.

A chain is named `<epoch>.<process>`. Of older runs nothing is kept: the first record of a run, its `start`,
names the heads that the run before it left, and these are forgotten when that record is on the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .sealed import Reader, Store

HEAD = "audit:head:"


class Head(NamedTuple):
    """The number and the signature of a chain's last record."""

    seq: int
    sig: str


def heads(reader: Reader) -> dict[str, Head]:
    """By the names of their chains."""
    return of_rows({name: reader.read(name) for name in reader.names(HEAD)})


def of_rows(rows: Mapping[str, Any]) -> dict[str, Head]:
    """Rows that are none of heads, and those that a writer beside us took away, are left out."""
    return {
        name[len(HEAD) :]: Head(row["seq"], row["sig"])
        for name, row in rows.items()
        if name.startswith(HEAD) and row is not None
    }


def anchor(store: Store, chain: str, head: Head) -> None:
    """Inside a transaction. What the store has is looked up: what is remembered may have been rolled back."""
    if store.read(HEAD + chain) != head._asdict():
        store.write(HEAD + chain, head._asdict())


def forget(store: Store, before: int) -> None:
    """Inside a transaction: the heads of epochs before this one."""
    for name in store.names(HEAD):
        if int(name[len(HEAD) :].partition(".")[0]) < before:
            store.erase(name)
