"""The key file is gone. Where a store needs it, no message proposes a new one, which would lose all."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.harness.daemon import Daemon, cli, write_secret

COMMANDS = (
    ["serve"],
    ["doctor"],
    ["restore", "b"],
    ["restore", "--snapshot", "x"],
    ["verify"],
    ["audit", "verify"],
    ["import", "x"],
)

WRONG = {"gone": None, "empty": b"", "cut": b"00112233", "weak": b"01" * 32}


@pytest.fixture(scope="module")
def used() -> Iterator[Daemon]:
    with Daemon(workers=1) as one:
        one.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})
        one.stop()
        yield one


CASES = [
    *((command, "gone", "config") for command in COMMANDS),
    *((["serve"], wrong, "config") for wrong in WRONG),
    *((command, "gone", how) for command in (["serve"], ["doctor"]) for how in ("environment", "no key")),
]


@pytest.mark.parametrize(("command", "wrong", "how"), CASES)
def test_beside_a_store_nothing_proposes_genkey(
    used: Daemon, command: list[str], wrong: str, how: str
) -> None:
    used.kek_file.unlink(missing_ok=True)
    content = WRONG[wrong]
    if content is not None:
        write_secret(used.kek_file, content)
    env = {"PROGRESSDB_KMS_MASTER_KEY_FILE": str(used.kek_file)} if how == "environment" else {}
    flags = ["--config", str(used.config_file)] if how == "config" else []
    done = cli(*command, "--data-dir", str(used.data_dir), *flags, env=env, cwd=used.home)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 1, said
    assert "genkey" not in said and "internal error" not in said
    assert "kek-id FILE" in said and "Don't stop it" in said, said
    if how == "no key":  # most often it is no lost key, but a configuration that was not named
        assert "name its file: set PROGRESSDB_KMS_MASTER_KEY_FILE=FILE or use --config; where" in said
    else:
        assert "name its file" not in said


@pytest.mark.parametrize("command", [["serve"], ["doctor"]], ids=" ".join)
def test_where_there_is_no_store_it_does(command: list[str]) -> None:
    fresh = Daemon()
    try:
        fresh.kek_file.unlink()
        done = fresh.offline(*command)
        assert done.returncode == 1 and b"genkey FILE" in done.stdout + done.stderr
    finally:
        fresh.close()


def test_a_restore_to_a_new_host_wants_the_old_key(used: Daemon) -> None:
    fresh = Daemon()
    try:
        fresh.kek_file.unlink()
        done = fresh.offline("restore", "b")
        assert done.returncode == 1 and b"genkey" not in done.stderr and b"kek-id FILE" in done.stderr
    finally:
        fresh.close()


def by_nobody(daemon: Daemon, command: str) -> bytes:
    """Its stderr, for somebody who may read the configuration and nothing else."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody who may not look")
    daemon.home.chmod(0o755)
    daemon.config_file.chmod(0o644)
    done = cli(
        *(command, "--data-dir", str(daemon.data_dir), "--config", str(daemon.config_file)),
        wrapper=["setpriv", "--reuid=65534", "--clear-groups"],
    )
    if done.returncode == 127:
        pytest.skip("this Python's own library is in a folder that others may not enter")
    assert done.returncode == 1
    return done.stderr


def test_where_one_may_not_look_there_may_be_a_store(used: Daemon) -> None:
    used.kek_file.unlink(missing_ok=True)
    assert b"genkey" not in by_nobody(used, "serve")


def test_a_key_that_one_may_not_read_is_not_lost(used: Daemon) -> None:
    """Who was no more than a member of the group heard to put it back, or else to rotate."""
    write_secret(used.kek_file, used.kek)
    said = by_nobody(used, "verify")
    assert b"Permission denied" in said and b"as root, or as the daemon's user" in said
    assert b"rotate-kek" not in said and b"put it back" not in said
