"""Every key of the configuration, once: type, what it takes, its limits, its default and the reason for it.

The loader, the manual's table, the man page and the sample file's check are made from these rows, or held
against them.
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
from .values import MAX_NEXT, MAX_POLICIES, MAX_PREVIOUS, MAX_UID, MAX_UIDS, Option

MIB = 1 << 20

MAX_SOCKET_PATH = 107
"""Bytes of a socket's path: `sun_path` has 108 with the closing NUL (unix(7))."""

MAX_WORKERS = 4
"""What `workers: auto` makes at most: the one writer is shared by all."""

# ---- where the keys are ------------------------------------------------------------------------------

_KEY_LIST = "a list of at most {high} mappings with hex, file or credential"

KEYS: tuple[Option, ...] = (
    Option(
        "master_key_hex", values.hex_key, values.KEY_FORMS["hex"].expects,
        "The master key itself. The file that holds it must have mode 0600 or 0400.",
        env="PROGRESSDB_KMS_MASTER_KEY_HEX", private=True,
    ),
    Option(
        "master_key_file", values.plain_text, values.KEY_FORMS["file"].expects,
        "A file with the master key: 64 hex digits, white space around them allowed, or exactly 32 raw "
        "bytes; mode 0600 or 0400.",
        env="PROGRESSDB_KMS_MASTER_KEY_FILE", private=True,
    ),
    Option(
        "master_key_credential", values.credential_name, values.KEY_FORMS["credential"].expects,
        "Name of a systemd credential (`LoadCredential=`, `LoadCredentialEncrypted=`) with the master key, "
        "read from `$CREDENTIALS_DIRECTORY`.",
        private=True,
    ),
    Option(
        "previous_master_keys", values.key_list, _KEY_LIST, private=True, high=MAX_PREVIOUS,
        doc="Keys that may unwrap and never wrap: a list of `hex: …`, `file: …` or `credential: …`.",
    ),
    Option(
        "next_master_keys", values.key_list, _KEY_LIST, private=True, high=MAX_NEXT,
        doc="Keys that a rotation of a fleet may move to, given like previous ones. SIGHUP reads them anew.",
    ),
)  # fmt: skip

KEY_LISTS = ("previous_master_keys", "next_master_keys")

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


def _group_id(group: str | None, folder: str, label: str) -> int | None:
    if group is None or group.isdecimal():
        return None if group is None else int(group)
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
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _set(value: Sequence[int] | None, folder: str, label: str) -> frozenset[int] | None:
    return None if value is None else frozenset(value)


def _tuple(value: Sequence[Any] | None, folder: str, label: str) -> tuple[Any, ...]:
    return tuple(value or ())


# ---- everything else ---------------------------------------------------------------------------------


def _row(*row: Any, **more: Any) -> Any:
    """The Option of a field, but for its name. It stands in the place of a default; the loader gives all."""
    return Option("", *row, **more)


class Settings(NamedTuple):
    """Checked and absolute: paths of the file are relative to its folder, others to the working directory.

    Sizes are in bytes, times in seconds. `None` for peer rules: whoever the socket's permissions let in.
    """

    # fmt: off
    allow_missing_keks: bool = _row(
        values.true_or_false, "true or false",
        "Start although DEKs need KEKs that are not configured: those are answered with 503, the others "
        "served. The active KEK is always needed.",
        default=False,
    )
    open_embedded_messages: bool = _row(
        values.true_or_false, "true or false",
        "Let decrypt and reencrypt open what ProgressDB's embedded mode sealed under a master key that is "
        "configured here; see the manual's page progressdb.",
        default=False,
    )
    socket: Path = _row(
        values.socket_path, "a path or unix://PATH",
        f"Where the daemon listens: a path of at most {MAX_SOCKET_PATH} bytes. `unix://PATH` is the same.",
        default="/tmp/progressdb-kms.sock",  # noqa: S108
        flag="--socket", env="PROGRESSDB_KMS_SOCKET",
        settle=_socket,
    )
    socket_mode: int = _row(
        values.file_mode, "an octal mode of at most 0666, such as 0660",
        "Mode of the socket. Write access lets a peer connect; to let everybody in needs allowed_peer_uids.",
        default=0o600,
    )
    socket_group: int | None = _row(
        values.group_name, "the name or number of a group",
        "Group of the socket: with socket_mode 0660 its members may connect.",
        settle=_group_id,
    )
    tcp_address: str | None = _row(
        values.loopback_address, "127.0.0.1:PORT or [::1]:PORT",
        "Also listen there. A peer is known by its UID as the kernel tells it; without allowed_peer_uids "
        "only the daemon's own UID, root and admin_peer_uids are served. Absent: no TCP.",
        flag="--addr",
    )
    data_dir: Path = _row(
        values.plain_text, "a path",
        "Where the store, the audit log and the snapshots are. Mode 0700; made where missing.",
        default="./kms-data", flag="--data-dir", env="PROGRESSDB_KMS_DATA_DIR",
        settle=_absolute,
    )
    store: str = _row(
        values.one_of("sqlite", "postgresql"), "sqlite or postgresql",
        "Where the DEKs are: `sqlite`, in the data_dir; `postgresql`, in a database that the hosts of a "
        "fleet share. See the manual's page fleet.",
        default="sqlite",
    )
    postgresql: Mapping[str, Any] | None = _row(
        values.text_block, "a mapping such as hosts: [db1:5432]",
        "How the fleet's database is reached: `hosts`, `database`, `user`, `password_file` or `tls_cert` "
        "with `tls_key_file`, `tls_ca`, `fence_seconds`.",
    )
    allowed_peer_uids: frozenset[int] | None = _row(
        values.uid_list, f"a list of at most {MAX_UIDS} user ids (numbers)",
        "Absent: every peer that the socket's permissions let in is served, and its UID is only logged. "
        "A list: others get 403.",
        high=MAX_UID, env="PROGRESSDB_KMS_ALLOWED_UIDS", private=True,
        settle=_set,
    )
    admin_peer_uids: frozenset[int] | None = _row(
        values.uid_list, f"a list of at most {MAX_UIDS} user ids (numbers)",
        "Absent: the same as callers. A list: unwrap, rewrap, rotate, disable, enable, delete and accepting "
        "the clock need one of these UIDs.",
        high=MAX_UID, private=True,
        settle=_set,
    )
    policies: tuple[Mapping[str, Any], ...] = _row(
        values.policy_list, f"a list of at most {MAX_POLICIES} mappings",
        "Each narrows what the `uid` or `gid` that it names may do: `operations`, `threads` and `keys` "
        "(patterns, `*` is any run of characters), `per_second`. All that name a peer must allow.",
        private=True,
        settle=_tuple,
    )
    kek_max_age_days: int | None = _row(
        values.whole_number, "a whole number of days from {low} to {high}",
        "After so many days under one KEK the journal reminds once a day of `rotate-kek`, and so do status, "
        "doctor and the metrics. Absent: nobody is reminded.",
        unit="days", low=1, high=36500,
    )
    workers: int = _row(
        values.worker_count, "auto or a whole number from {low} to {high}",
        "Processes that answer. `auto`: one for each core that this process may use, at most 4; "
        "more share the one writer and gain little.",
        default="auto", unit="", low=1, high=64,
        settle=_processes,
    )
    memory_lock: str = _row(
        values.one_of("require", "try", "off"), "require, try or off",
        "`require`: refuse to start where the pages of keys can't be locked. `try`: warn. `off`: don't lock.",
        default="try",
    )
    max_body_bytes: int = _row(
        values.whole_number, "a whole number of bytes from {low} to {high}",
        "Longest request body; a longer one gets 413. A batch of some thousand chat messages fits.",
        default=8 * MIB, unit="bytes", low=4096, high=256 * MIB,
    )
    max_connections: int = _row(
        values.whole_number, "a whole number from {low} to {high}",
        "Connections served at one time, in all workers; one more gets 503. Each costs a "
        "descriptor.",
        default=2048, unit="connections", low=1, high=65536,
    )
    idle_timeout: float = _row(
        values.seconds, "a number of seconds from {low} to {high}",
        "How long a connection may wait for its next request. Longer than a client's pool keeps one: Go's "
        "keeps it for 90.",
        default=120.0, unit="seconds", low=0.1, high=86400,
    )
    request_timeout: float = _row(
        values.seconds, "a number of seconds from {low} to {high}",
        "Deadline for the whole head of a request, and again for its whole body: a slow peer gets 408.",
        default=30.0, unit="seconds", low=0.1, high=3600,
    )
    # fmt: on

    config_file: str | None = None
    master_source: str = ""
    master_key_file: str | None = None

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
