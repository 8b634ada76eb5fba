"""At start: do the configured keys fit the store? A pure decision, so that every case is a row of a test.

The store is right, the configuration is to be held against it: a daemon that would serve a part of the
DEKs, or wrap new ones under a key that the operator did not mean, does not start. What the operator did mean
is said by a word of its own: `allow_missing_keks`, and `--allow-retired-kek` for a KEK that was rotated out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Callable, NamedTuple

from ..config.keysource import COMING, PENDING, Source
from ..config.load import Loaded
from ..config.options import KEY_LISTS, Settings
from ..errors import KeyMismatch
from ..store.seal import KekCount


class ConfiguredKey(NamedTuple):
    kek_id: str
    source: Source


class Configured(NamedTuple):
    """The keys that the configuration names, the master key first; the keys themselves are in the keyring by
    now."""

    settings: Settings
    keys: Sequence[ConfiguredKey]
    allow_retired: bool = False
    accept_older: bool = False

    @classmethod
    def of(cls, loaded: Loaded, name: Callable[[memoryview], str]) -> Configured:
        """`name` gives a key its kek_id: `Keyring.install`, or `fingerprint` where it stays where it is."""
        return cls(loaded.settings, [ConfiguredKey(name(key), source) for source, key in loaded.keys])

    @property
    def master(self) -> ConfiguredKey:
        return self.keys[0]

    @property
    def kek_ids(self) -> set[str]:
        return {key.kek_id for key in self.keys}

    def of_role(self, *roles: str) -> Mapping[str, Source]:
        """By kek_id."""
        return {key.kek_id: key.source for key in self.keys if key.source.role in roles}

    @property
    def previous(self) -> Mapping[str, Source]:
        """Those that only unwrap, coming ones too."""
        return self.of_role(*KEY_LISTS)

    @property
    def coming(self) -> Mapping[str, Source]:
        """Those that a rotation of a fleet may move to."""
        return self.of_role(COMING)


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

    `retired` tells when a KEK was rotated out. Raises KeyMismatch.
    """
    master = keys.master
    if stored is None:
        return Plan(master.kek_id, 1, True)
    active, version = stored
    absent = {kek_id: row for kek_id, row in keks.items() if kek_id not in keys.kek_ids}
    if active not in keys.kek_ids and active not in absent:
        absent[active] = KekCount(version, 0, "")
    if absent and (active in absent or not keys.settings.allow_missing_keks):
        raise KeyMismatch(_explain(absent, active, master), hint=_remedy(absent, active, master))
    chosen = _choose(active, version, keys, retired)
    if absent:
        left_out = f"{_explain(absent, active, master)}: these are answered with 503, by allow_missing_keks"
        chosen = chosen._replace(notice="; ".join(filter(None, (left_out, chosen.notice))))
    return chosen


def _choose(active: str, version: int, keys: Configured, retired: Mapping[str, str]) -> Plan:
    master, pending, coming = keys.master, keys.of_role(PENDING), keys.coming
    if active in pending:
        notice = f"using {pending[active].place}: finish with `progressdb-kms rotate-kek --resume`"
        return Plan(active, version, False, notice)
    if active in coming:
        return Plan(active, version, False, f"let {coming[active].label} be the master key: it is active")
    if active != master.kek_id:
        if master.kek_id in retired and not keys.allow_retired:
            raise KeyMismatch(
                f"{master.source.label} holds the KEK {master.kek_id}, which was rotated out on "
                f"{retired[master.kek_id][:10]}; the active one is {active}",
                hint=f"are two key files swapped? Let the master key be {active}; `serve "
                "--allow-retired-kek` takes the old one back; nothing was changed",
            )
        notice = f"the active KEK changes from {active} to {master.kek_id} by configuration; the DEKs stay"
        return Plan(master.kek_id, version + 1, True, notice)
    left = [f"{source.place} was left by a rotation that did not happen" for source in pending.values()]
    return Plan(active, version, False, "; ".join(left))


def _explain(absent: Mapping[str, KekCount], active: str, master: ConfiguredKey) -> str:
    parts = []
    for kek_id, row in sorted(absent.items(), key=lambda item: -item[1].deks):
        role = "the store's active KEK" if kek_id == active else "the KEK"
        need = f"{row.deks} DEKs need it since {row.since}" if row.deks else "the audit key needs it"
        parts.append(f"{role} {kek_id} is not configured ({need})")
    return f"{'; '.join(parts)}; {master.source.label} holds the KEK {master.kek_id}"


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
