"""How the fleet's database is reached: the block `postgresql:` of the configuration, checked.

`config` reads the block as plain texts and knows no more of it, so that whoever has no fleet loads none of
this. What is wrong is told by a ConfigError that names the key, and never shows a value.

Whatever may be given is in MEMBERS. There is no switch for less than a certificate that was checked, name and
all: between hosts the connection carries which DEK may be used.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple

from ..config.keysource import distrust
from ..config.options import Settings
from ..config.values import unknown
from ..errors import ConfigError

PORT = 5432

FENCE_SECONDS = 60.0, 10.0, 3600.0
"""Default and limits. A host that was silent for so long is put out of the fleet, and it stops by itself a
little earlier. It must be longer than the engine needs to fail over, or each failover stops all hosts."""

MAX_HOSTS = 16
MAX_PASSWORD = 1024  # bytes

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}")
_HOST = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])(?::(?P<port>[1-9][0-9]{0,4}))?"
)
_FOLDER = re.compile(r"(?P<name>/[^:]*)(?::(?P<port>[1-9][0-9]{0,4}))?")
_SECONDS = re.compile(r"[1-9][0-9]{0,4}(?:\.[0-9]{1,3})?")


class Host(NamedTuple):
    name: str
    port: int


class Where(NamedTuple):
    """A database, and who we are there. Either `hosts`, by TLS, or `folder`, that of a Unix socket."""

    hosts: tuple[Host, ...]
    folder: str
    database: str
    user: str
    password_file: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key_file: str = ""
    fence_seconds: float = FENCE_SECONDS[0]
    socket_port: int = PORT

    def __str__(self) -> str:
        """For messages."""
        there = self.folder or ", ".join(f"{host.name}:{host.port}" for host in self.hosts)
        return f"the database {self.database} at {there}"

    def password(self) -> str:
        """What stands in the file, without white space at its end; "" where none is named. ConfigError."""
        return (
            read_secret("password_file", self.password_file).rstrip("\r\n \t") if self.password_file else ""
        )


def where(settings: Settings) -> Where:
    """Raises ConfigError: the block `postgresql:` is not there, or something in it is wrong."""
    block, config_file = settings.postgresql, settings.config_file or ""
    place = f"postgresql in {config_file}"
    if block is None:
        raise ConfigError(
            f"`store: postgresql` in {config_file} says that there is a fleet, and nothing says where",
            hint="put a block `postgresql:` beside it: `progressdb-kms help fleet`",
        )
    for name in block:
        if name not in MEMBERS:
            raise ConfigError(f"{place}: {unknown(name, MEMBERS)}")
    found: dict[str, Any] = {}
    for name, (read, expects) in MEMBERS.items():
        try:
            if name in block:
                found[name] = read(block[name])
        except ValueError:
            raise ConfigError(f"{place}: {name} must be {expects}") from None
    folder = os.path.dirname(config_file)
    for name in _PATHS:
        if name in found:
            found[name] = os.path.join(folder, found[name])
    return _whole(found, place)


def _whole(found: dict[str, Any], place: str) -> Where:
    """What must be there together."""
    for name in ("hosts", "database", "user"):
        if name not in found:
            raise ConfigError(f"{place}: {name} is missing", hint=f"it must be {MEMBERS[name][1]}")
    hosts = found.pop("hosts")
    if isinstance(hosts, Host):
        result = Where((), hosts.name, socket_port=hosts.port, **found)
    else:
        result = Where(hosts, "", **found)
    if bool(result.tls_cert) != bool(result.tls_key_file):
        raise ConfigError(f"{place}: tls_cert and tls_key_file belong together", hint="give both or neither")
    if result.folder:
        if wrong := [name for name in ("tls_ca", "tls_cert") if found.get(name)]:
            raise ConfigError(f"{place}: {wrong[0]} is of no use over a Unix socket", hint="take it out")
        return result
    if not result.tls_ca:
        raise ConfigError(
            f"{place}: tls_ca is missing: the server must prove who it is",
            hint="name the file with the certificate of the CA that signed the server's",
        )
    if bool(result.password_file) == bool(result.tls_cert):
        raise ConfigError(
            f"{place}: either password_file or tls_cert must say who we are",
            hint="give password_file (SCRAM), or tls_cert with tls_key_file (a client's certificate)",
        )
    return result


def read_secret(name: str, path: str) -> str:
    """The text of a file that nobody else may read. Raises ConfigError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{name} {path} can't be read: {error.strerror}") from None
    try:
        about = os.fstat(descriptor)
        if trouble := distrust(path, about, os.geteuid(), path.startswith(_credentials())):
            todo = f"chown it to root or the daemon's user, chmod 0600 {path}"
            hint = todo if stat.S_ISREG(about.st_mode) else ""
            raise ConfigError(f"{name} {path} {trouble[0]}", hint=hint, code="distrust")
        text = os.read(descriptor, MAX_PASSWORD + 1)
        if len(text) > MAX_PASSWORD:
            raise ConfigError(f"{name} {path} holds more than {MAX_PASSWORD} bytes: is that a password?")
        return text.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{name} {path} holds no text") from None
    finally:
        os.close(descriptor)


def _credentials() -> tuple[str, ...]:
    """systemd lets a service's user in by an ACL, which shows as a mode for the group."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return (folder.rstrip("/") + "/",) if folder else ()


# ---- the members -------------------------------------------------------------------------------------


def _hosts(value: Any) -> Host | tuple[Host, ...]:
    """One Host: the folder of a Unix socket; its port is in the name of the socket."""
    items = value if isinstance(value, list) else [value]
    if not 1 <= len(items) <= MAX_HOSTS:
        raise ValueError
    if len(items) == 1 and _text(items[0]).startswith("/"):
        return _host(items[0], _FOLDER)
    return tuple(_host(item, _HOST) for item in items)


def _host(value: Any, pattern: re.Pattern[str]) -> Host:
    match = pattern.fullmatch(_text(value))
    if match is None or int(match["port"] or PORT) > 65535:
        raise ValueError
    return Host(match["name"].strip("[]"), int(match["port"] or PORT))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError
    return value


def _name(value: Any) -> str:
    if not _NAME.fullmatch(_text(value)):
        raise ValueError
    return _text(value)


def _fence(value: Any) -> float:
    _, low, high = FENCE_SECONDS
    if not _SECONDS.fullmatch(_text(value)) or not low <= float(value) <= high:
        raise ValueError
    return float(value)


MEMBERS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "hosts": (
        _hosts,
        f"a list of at most {MAX_HOSTS} HOST:PORT, or the path of a Unix socket's folder (and :PORT)",
    ),
    "database": (_name, "the name of a database (letters, digits, _ and -)"),
    "user": (_name, "the name of a role (letters, digits, _ and -)"),
    "password_file": (_text, "a path"),
    "tls_ca": (_text, "a path"),
    "tls_cert": (_text, "a path"),
    "tls_key_file": (_text, "a path"),
    "fence_seconds": (_fence, "a number of seconds from {:g} to {:g}".format(*FENCE_SECONDS[1:])),
}

_PATHS = ("password_file", "tls_ca", "tls_cert", "tls_key_file")
"""Relative to the folder of the configuration file."""
