"""Keys as a configuration names them, for what is tested without one."""

from __future__ import annotations

from typing import Any

from progressdb_kms.config.keysource import MASTER, Source
from progressdb_kms.config.load import load
from progressdb_kms.service.plan import Configured, ConfiguredKey


def named(kek_id: str, label: str = "test", role: str = MASTER) -> ConfiguredKey:
    return ConfiguredKey(kek_id, Source("file", label, label, role))


def configured(*keys: ConfiguredKey, **settings: Any) -> Configured:
    """The master key first. `settings`: those that are not the defaults."""
    with load({}, {}, need_key=False) as loaded:
        return Configured(loaded.settings._replace(**settings), keys)
