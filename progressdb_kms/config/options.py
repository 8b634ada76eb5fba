"""Every key of the configuration, once: type, what it takes, its limits and its default.

What each means stands in the manual's page `configuration`, of which the man page is made; tests hold both
and the sample file against these rows.
"""

from __future__ import annotations

import grp
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..rules import PeerRules
from . import values
from .keysource import COMING, PREVIOUS, Source
from .values import MAX_NEXT, MAX_POLICIES, MAX_PREVIOUS, MAX_UID, MAX_UIDS, Option

MIB = 1 << 20

MAX_SOCKET_PATH = 107
"""Bytes of a socket's path: `sun_path` has 108 with the closing NUL (unix(7))."""

MAX_WORKERS = 4
"""What `workers: auto` makes at most: the one writer is shared by all."""

# ---- where the keys are ------------------------------------------------------------------------------

_KEY_LIST = "a list of at most {high} mappings with hex, file or credential"

KEYS: tuple[Option, ...] = (
    *(form._replace(name=f"master_key_{name}") for name, form in values.KEY_FORMS.items()),
    Option(PREVIOUS, values.key_list, _KEY_LIST, private=True, high=MAX_PREVIOUS),
    Option(COMING, values.key_list, _KEY_LIST, private=True, high=MAX_NEXT),
)

KEY_LISTS = (PREVIOUS, COMING)

MASTER_KEYS = tuple(f"master_key_{form}" for form in values.KEY_FORMS)
"""Exactly one of them is given."""


# ---- what needs the host -----------------------------------------------------------------------------


def _absolute(value: str, folder: str, label: str) -> Path:
    return Path(os.path.abspath(os.path.join(folder, value)))


def _socket(value: str, folder: str, label: str) -> Path:
    path = _absolute(value, folder, label)
    if (size := len(os.fsencode(path))) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"{label} is {size} bytes long as an absolute path; "
            f"a socket's path has at most {MAX_SOCKET_PATH}",
            hint="choose a shorter one, such as /run/progressdb-kms/kms.sock",
        )
    return path


def _group_id(group: str, folder: str, label: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(
            f"{label} names no group of this host", hint=f"groupadd {group}, or give a number"
        ) from None


def _processes(value: int | str, folder: str, label: str) -> int:
    return min(cores(), MAX_WORKERS) if isinstance(value, str) else value


def cores() -> int:
    """Cores that this process may use: a container or `taskset` may give it fewer than there are."""
    return len(os.sched_getaffinity(0))


def _set(value: Sequence[int], folder: str, label: str) -> frozenset[int]:
    return frozenset(value)


# ---- everything else ---------------------------------------------------------------------------------


def _row(*row: Any, **more: Any) -> Any:
    """The Option of a field, but for its name. It stands in the place of a default; the loader gives all."""
    return Option("", *row, **more)


class Settings(NamedTuple):
    """Checked and absolute: paths of the file are relative to its folder, others to the working directory.

    Sizes are in bytes, times in seconds. `None` for peer rules: whoever the socket's permissions let in.
    """

    # fmt: off
    allow_missing_keks: bool = _row(values.true_or_false, "true or false", default=False)
    open_embedded_messages: bool = _row(values.true_or_false, "true or false", default=False)
    socket: Path = _row(
        values.socket_path, "a path or unix://PATH",
        default="/tmp/progressdb-kms.sock",  # noqa: S108
        flag="--socket", env="PROGRESSDB_KMS_SOCKET",
        settle=_socket,
    )
    socket_mode: int = _row(
        values.file_mode, "an octal mode of at most 0666, such as 0660",
        default=0o600,
    )
    socket_group: int | None = _row(
        values.group_name, "the name or number of a group", settle=_group_id,
    )
    tcp_address: str | None = _row(
        values.loopback_address, "127.0.0.1:PORT or [::1]:PORT",
        flag="--addr",
    )
    data_dir: Path = _row(
        values.plain_text, "a path",
        default="./kms-data", flag="--data-dir", env="PROGRESSDB_KMS_DATA_DIR",
        settle=_absolute,
    )
    store: str = _row(values.one_of("sqlite", "postgresql"), "sqlite or postgresql", default="sqlite")
    postgresql: Mapping[str, Any] | None = _row(values.text_block, "a mapping such as hosts: [db1:5432]")
    allowed_peer_uids: frozenset[int] | None = _row(
        values.uid_list, f"a list of at most {MAX_UIDS} user ids (numbers)",
        high=MAX_UID, env="PROGRESSDB_KMS_ALLOWED_UIDS", private=True,
        settle=_set,
    )
    admin_peer_uids: frozenset[int] | None = _row(
        values.uid_list, f"a list of at most {MAX_UIDS} user ids (numbers)",
        high=MAX_UID, private=True,
        settle=_set,
    )
    policies: Sequence[Mapping[str, Any]] = _row(
        values.policy_list, "a list of at most {high} mappings",
        default=(), high=MAX_POLICIES, private=True,
    )
    kek_max_age_days: int | None = _row(
        values.whole_number, "a whole number of days from {low} to {high}",
        low=1, high=36500,
    )
    workers: int = _row(  # more than 4 share the one writer and gain little
        values.worker_count, "auto or a whole number from {low} to {high}",
        default="auto", low=1, high=64,
        settle=_processes,
    )
    memory_lock: str = _row(
        values.one_of("require", "try", "off"), "require, try or off",
        default="try",
    )
    max_body_bytes: int = _row(  # a batch of some thousand chat messages fits
        values.whole_number, "a whole number of bytes from {low} to {high}",
        default=8 * MIB, low=4096, high=256 * MIB,
    )
    max_connections: int = _row(
        values.whole_number, "a whole number from {low} to {high}",
        default=2048, low=1, high=65536,
    )
    idle_timeout: float = _row(  # longer than a client's pool keeps one: Go's keeps it for 90
        values.seconds, "a number of seconds from {low} to {high}",
        default=120.0, low=0.1, high=86400,
    )
    request_timeout: float = _row(
        values.seconds, "a number of seconds from {low} to {high}",
        default=30.0, low=0.1, high=3600,
    )
    # fmt: on

    config_file: str | None = None
    master: Source | None = None  # where its key is, even if no key was read

    @property
    def master_key_file(self) -> str | None:
        """Of its own, which `rotate-kek` replaces."""
        return self.master.place if self.master and self.master.form == "file" else None

    @property
    def peer_rules(self) -> PeerRules:
        return PeerRules(self.allowed_peer_uids, self.admin_peer_uids)


SETTINGS: tuple[Option, ...] = tuple(
    row._replace(name=name) for name, row in Settings._field_defaults.items() if isinstance(row, Option)
)

OPTIONS = (*KEYS, *SETTINGS)

BY_NAME: Mapping[str, Option] = {option.name: option for option in OPTIONS}

ALIASES: Mapping[str, str] = {"master_key": "master_key_hex"}
"""Other spellings, from the Go service's sample files."""
