"""At start: do the configured keys fit the store? A pure decision, so that every case is a row of a test.

The store is right, the configuration is to be held against it: a daemon that would serve a part of the
DEKs, or wrap new ones under a key that the operator did not mean, does not start. What the operator did mean
is said by a word of its own: `allow_missing_keks`, and `--allow-retired-kek` for a KEK that was rotated out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Callable, NamedTuple

from ..config.load import Loaded
from ..errors import KeyMismatch
from ..store.seal import KekCount

COMING = "next_master_keys"


class ConfiguredKey(NamedTuple):
    kek_id: str
    source: str  # words for messages: "master_key_file /etc/kms.key"


class Configured(NamedTuple):
    """The keys that the configuration names; the keys themselves are in the keyring by now."""

    master: ConfiguredKey
    previous: Sequence[ConfiguredKey] = ()
    pending: ConfiguredKey | None = None
    allow_missing: bool = False
    allow_retired: bool = False
    accept_older: bool = False
    max_age_days: int | None = None
    key_file: str | None = None  # of the master key, where it has one

    @classmethod
    def of(cls, loaded: Loaded, name: Callable[[memoryview], str]) -> Configured:
        """`name` gives a key its kek_id: `Keyring.install`, or `fingerprint` where it stays where it is."""
        settings = loaded.settings
        previous = zip(loaded.previous, loaded.previous_sources)
        return cls(
            ConfiguredKey(name(loaded.master), settings.master_source),
            [ConfiguredKey(name(key), source) for key, source in previous],
            ConfiguredKey(name(loaded.pending), loaded.pending_source) if loaded.pending else None,
            settings.allow_missing_keks,
            max_age_days=settings.kek_max_age_days,
            key_file=settings.master_key_file,
        )

    @property
    def coming(self) -> Mapping[str, str]:
        """Those that a rotation of a fleet may move to, by kek_id: where they are configured."""
        return {key.kek_id: key.source for key in self.previous if key.source.startswith(COMING)}

    @property
    def kek_ids(self) -> set[str]:
        found = (self.master, *self.previous, *((self.pending,) if self.pending else ()))
        return {key.kek_id for key in found}


class Plan(NamedTuple):
    """What to do before serving."""

    active: str
    version: int
    adopt: bool  # write `active` and `version` to the store: a first start, or another master key
    notice: str = ""  # for the operator, in the log


def plan(
    stored: tuple[str, int] | None, keks: Mapping[str, KekCount], keys: Configured, retired: Mapping[str, str]
) -> Plan:
    """Choose the active KEK. `stored`: the store's active kek_id and version, None in a fresh one.

    `retired` tells when a KEK was rotated out; `keys.pending` is the key file that an unfinished `rotate-kek`
    left. Raises KeyMismatch.
    """
    master = keys.master
    if stored is None:
        return Plan(master.kek_id, 1, True)
    active, version = stored
    absent = {kek_id: row for kek_id, row in keks.items() if kek_id not in keys.kek_ids}
    if active not in keys.kek_ids and active not in absent:
        absent[active] = KekCount(version, 0, "")
    if absent and (active in absent or not keys.allow_missing):
        raise KeyMismatch(_explain(absent, active, master), hint=_remedy(absent, active, master))
    chosen = _choose(active, version, keys, retired)
    if absent:
        left_out = f"{_explain(absent, active, master)}: these are answered with 503, by allow_missing_keks"
        chosen = chosen._replace(notice="; ".join(filter(None, (left_out, chosen.notice))))
    return chosen


def _choose(active: str, version: int, keys: Configured, retired: Mapping[str, str]) -> Plan:
    master, pending = keys.master, keys.pending
    if pending is not None and active == pending.kek_id:
        return Plan(
            active,
            version,
            False,
            f"using {pending.source}: finish with `progressdb-kms rotate-kek --resume`",
        )
    if active in keys.coming:
        return Plan(active, version, False, f"let {keys.coming[active]} be the master key: it is active")
    if active != master.kek_id:
        if master.kek_id in retired and not keys.allow_retired:
            raise KeyMismatch(
                f"{master.source} holds the KEK {master.kek_id}, which was rotated out on "
                f"{retired[master.kek_id][:10]}; the active one is {active}",
                hint=f"are two key files swapped? Let the master key be {active}; `serve "
                "--allow-retired-kek` takes the old one back; nothing was changed",
            )
        notice = f"the active KEK changes from {active} to {master.kek_id} by configuration; the DEKs stay"
        return Plan(master.kek_id, version + 1, True, notice)
    notice = f"{pending.source} was left by a rotation that did not happen" if pending else ""
    return Plan(active, version, False, notice)


def _explain(absent: Mapping[str, KekCount], active: str, master: ConfiguredKey) -> str:
    parts = []
    for kek_id, row in sorted(absent.items(), key=lambda item: -item[1].deks):
        role = "the store's active KEK" if kek_id == active else "the KEK"
        need = f"{row.deks} DEKs need it since {row.since}" if row.deks else "the audit key needs it"
        parts.append(f"{role} {kek_id} is not configured ({need})")
    return f"{'; '.join(parts)}; {master.source} holds the KEK {master.kek_id}"


def _remedy(absent: Mapping[str, KekCount], active: str, master: ConfiguredKey) -> str:
    names = ", ".join(sorted(absent))
    where = "`progressdb-kms kek-id FILE` tells which file holds it, and rotate-kek names its files after it"
    if active in absent:
        return (
            f"let the master key be {active} again, or add {names} to previous_master_keys: {where}; "
            "nothing was changed"
        )
    return (
        f"add the keys {names} to previous_master_keys: {where}; where they are lost, "
        "`allow_missing_keks: true` serves the others; nothing was changed"
    )
