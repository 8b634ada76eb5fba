"""How a command for the socket finds the daemon: what is named decides, what is not is looked for."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.errors import ConfigError
from progressdb_kms.tools import asowner, finding
from progressdb_kms.tools.command import ONLINE, Command
from progressdb_kms.tools.commands import COMMANDS
from progressdb_kms.tools.console import CommandFailed
from tests.harness import Daemon
from tests.harness.daemon import cli


class Place:
    """The three places that are looked at, in a folder of the test's."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.sockets: list[socket.socket] = []
        self.config, self.packaged, self.development = (
            folder / n for n in ("kms.yaml", "run.sock", "dev.sock")
        )
        patch.setattr(finding, "PACKAGED_CONFIG", str(self.config))
        patch.setattr(finding, "PACKAGED_SOCKET", str(self.packaged))
        patch.setattr(finding, "DEFAULT_SOCKET", str(self.development))
        patch.delenv("PROGRESSDB_KMS_SOCKET", raising=False)

    def listen(self, path: Path) -> str:
        self.sockets.append(socket.socket(socket.AF_UNIX))
        self.sockets[-1].bind(str(path))
        return str(path)

    def configure(self, text: str, name: str = "kms.yaml") -> str:
        path = self.folder / name
        path.touch(0o600)
        path.write_text(text)
        return str(path)


@pytest.fixture
def place(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    made = Place(short_tmp, monkeypatch)
    yield made
    for one in made.sockets:
        one.close()


def found(**given: str) -> str:
    return finding.socket_of(argparse.Namespace(**{"socket": None, "config": None, **given}))


def test_the_order(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    development = place.listen(place.development)
    assert found() == development
    packaged = place.listen(place.packaged)
    assert found() == packaged
    place.configure("socket: other.sock\nmaster_key_file: nowhere\n")
    assert found() == packaged  # other.sock is not there
    other = place.listen(place.folder / "other.sock")
    assert found() == other
    monkeypatch.setenv("PROGRESSDB_KMS_SOCKET", "/env.sock")
    assert found() == "/env.sock"
    mine = place.configure("socket: mine.sock\n", "mine.yaml")
    assert found(config=mine) == str(place.folder / "mine.sock")
    assert found(config=mine, socket="flag.sock") == "flag.sock"


def test_the_message_names_what_was_tried(place: Place) -> None:
    place.configure("socket: gone.sock\n")
    with pytest.raises(CommandFailed) as caught:
        found()
    assert caught.value.message == (
        f"no daemon was found; tried {place.folder}/gone.sock (from {place.config}), {place.packaged}, "
        f"{place.development}"
    )
    assert "--socket PATH or --config FILE" in caught.value.hint
    os.chmod(place.config, 0o666)
    with pytest.raises(CommandFailed, match="kms.yaml .which can't be read by this user., "):
        found()


def test_metrics_of_a_daemon_that_is_not_found(place: Place) -> None:
    """A daemon that stops takes its socket's name away: the file went on to say that it is up."""
    target = place.folder / "kms.prom"
    (command,) = (command for command in COMMANDS if command.name == "metrics")
    given = {"socket": None, "server_uid": None, "textfile": str(target)}
    for config, fault in ((None, CommandFailed), ("none.yaml", ConfigError)):
        target.write_text("progressdb_kms_up 1\n")
        with pytest.raises(fault):
            command.run(argparse.Namespace(config=config, **given))
        assert target.read_text().endswith("\nprogressdb_kms_up 0\n")


def test_a_configuration_that_was_named_must_be_right(place: Place) -> None:
    place.listen(place.development)
    with pytest.raises(ConfigError, match="can't be read"):
        found(config=str(place.folder / "none.yaml"))


def test_offline_commands_take_the_packages_configuration(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody names anything else, and it is there."""

    def data_dir(**flags: str) -> str:
        with asowner.load_config({"data_dir": None, "config": None, **flags}, need_key=False) as loaded:
            return str(loaded.settings.data_dir)

    monkeypatch.setattr(asowner, "PACKAGED_CONFIG", str(place.config))
    for name in asowner.NAMING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(place.folder)
    own = str(place.folder / "kms-data")
    assert data_dir() == own
    place.configure("data_dir: packaged\n")
    assert data_dir() == str(place.folder / "packaged")
    assert data_dir(data_dir="mine") == str(place.folder / "mine")
    mine = place.configure("data_dir: other\n", "mine.yaml")
    assert data_dir(config=mine) == str(place.folder / "other")
    for name, value in (("DATA_DIR", own), ("MASTER_KEY_FILE", "F")):
        with monkeypatch.context() as patch:
            patch.setenv(f"PROGRESSDB_KMS_{name}", value)
            assert data_dir() == own


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_every_command_takes_a_configuration(command: Command) -> None:
    names = {name for arg in command.args for name in arg.names}
    assert "--config" in names and ("--socket" in names or command.group != ONLINE)


def test_by_the_configuration(daemon: Daemon) -> None:
    done = cli("status", "--ready", "--config", str(daemon.config_file), "--socket", str(daemon.socket))
    assert (done.returncode, done.stderr) == (0, b"")
    with daemon.config_file.open("a") as file:
        file.write(f"socket: {daemon.socket}\n")
    config = ("--config", str(daemon.config_file))
    made = cli("create-dek", "--thread-id", "t", *config)
    assert made.returncode == 0
    key = made.stdout.decode().strip()
    for words in (["describe", key], ["list"], ["disable", key], ["metrics"], ["shred", key, "--now"]):
        assert cli(*words, *config).returncode == 0, words
