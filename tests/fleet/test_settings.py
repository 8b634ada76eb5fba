"""The block `postgresql:`: what may stand in it, and what is said of what may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from progressdb_kms.errors import ConfigError
from progressdb_kms.fleet.settings import Host, Where, read_secret, where

TLS = {"hosts": ["db1:5433", "db2"], "database": "kms", "user": "kms", "tls_ca": "ca.pem"}
SOCKET = {"hosts": "/run/postgresql", "database": "kms", "user": "kms"}


class Given(NamedTuple):
    """Of Settings, what is looked at."""

    postgresql: dict[str, Any] | None
    config_file: str = "/etc/kms/kms.yaml"


def read(**block: Any) -> Where:
    return where(Given({name: value for name, value in block.items() if value is not None}))  # type: ignore[arg-type]


def test_no_block() -> None:
    with pytest.raises(ConfigError, match="nothing says where") as caught:
        where(Given(None))  # type: ignore[arg-type]
    assert "postgresql:" in caught.value.hint


def test_by_password() -> None:
    found = read(**TLS, password_file="secrets/pg", fence_seconds="30")
    assert found.hosts == (Host("db1", 5433), Host("db2", 5432)) and found.folder == ""
    assert found.password_file == "/etc/kms/secrets/pg" and found.tls_ca == "/etc/kms/ca.pem"
    assert found.fence_seconds == 30 and str(found) == "the database kms at db1:5433, db2:5432"


def test_by_certificate() -> None:
    found = read(**TLS, tls_cert="/a.crt", tls_key_file="a.key")
    assert (found.tls_cert, found.tls_key_file) == ("/a.crt", "/etc/kms/a.key")


@pytest.mark.parametrize(
    ("hosts", "port"),
    [("/run/postgresql", 5432), (["/run/postgresql"], 5432), ("/run/postgresql:5433", 5433)],
)
def test_by_a_socket(hosts: Any, port: int) -> None:
    found = read(**{**SOCKET, "hosts": hosts})
    assert (found.hosts, found.folder, found.socket_port) == ((), "/run/postgresql", port)
    assert found.fence_seconds == 60 and str(found) == "the database kms at /run/postgresql"


def test_addresses() -> None:
    found = read(**{**TLS, "hosts": ["[::1]:6000", "10.0.0.1"]}, password_file="p")
    assert found.hosts == (Host("::1", 6000), Host("10.0.0.1", 5432))


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({**TLS}, "either password_file or tls_cert"),
        ({**TLS, "password_file": "p", "tls_cert": "c", "tls_key_file": "k"}, "either password_file or"),
        ({**TLS, "password_file": "p", "tls_ca": None}, "tls_ca is missing"),
        ({**TLS, "tls_cert": "c"}, "belong together"),
        ({**TLS, "tls_key_file": "c", "password_file": "p"}, "belong together"),
        ({**SOCKET, "tls_ca": "ca.pem"}, "tls_ca is of no use over a Unix socket"),
        ({**SOCKET, "hosts": None}, "hosts is missing"),
        ({**SOCKET, "database": None}, "database is missing"),
        ({**SOCKET, "user": None}, "user is missing"),
        ({**SOCKET, "databse": "x"}, "unknown key 'databse', did you mean 'database'"),
        ({**SOCKET, "password": "x"}, "unknown key 'password', did you mean 'password_file'"),
        ({**SOCKET, "hosts": []}, "hosts must be a list of at most 16"),
        ({**SOCKET, "hosts": ["db"] * 17}, "hosts must be"),
        ({**SOCKET, "hosts": ["/run/a", "/run/b"]}, "hosts must be"),
        ({**SOCKET, "hosts": ["db:0"]}, "hosts must be"),
        ({**SOCKET, "hosts": ["db:65536"]}, "hosts must be"),
        ({**SOCKET, "hosts": ["postgresql://db"]}, "hosts must be"),
        ({**SOCKET, "hosts": "db1,db2"}, "hosts must be"),
        ({**SOCKET, "hosts": {"db": "x"}}, "hosts must be"),
        ({**SOCKET, "database": "kms sslmode=disable"}, "database must be"),
        ({**SOCKET, "user": ["kms"]}, "user must be"),
        ({**SOCKET, "fence_seconds": "9"}, "fence_seconds must be a number of seconds from 10 to 3600"),
        ({**SOCKET, "fence_seconds": "3601"}, "fence_seconds must be"),
        ({**SOCKET, "fence_seconds": "1e2"}, "fence_seconds must be"),
    ],
)
def test_refused(block: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read(**block)
    assert "postgresql in /etc/kms/kms.yaml" in caught.value.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"\xff", "holds no text"),
        (b"x" * 1025, "holds more than 1024 bytes"),
        (b"x" * 1024 + b"\n", "more than"),
    ],
    ids=["no text", "too long", "too long by its end"],
)
def test_a_password_file_is_read_whole_or_not_at_all(tmp_path: Path, text: bytes, says: str) -> None:
    file = tmp_path / "password"
    file.touch(0o600)
    for good in (b"secret\n", b"x" * 1024):
        file.write_bytes(good)
        assert read_secret("password_file", str(file)).encode() == good
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=says):
        read_secret("password_file", str(file))
