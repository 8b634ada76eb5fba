"""The table of commands, the parser made of it, and what a wrong command line gets."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms import __version__
from progressdb_kms.__main__ import HOLD_KEYS
from progressdb_kms.client import KeyNotFound
from progressdb_kms.errors import ConfigError
from progressdb_kms.rules import BATCHES, OPERATIONS
from progressdb_kms.tools import cli
from progressdb_kms.tools.cli import COMMANDS, build_parser
from progressdb_kms.tools.command import CHOICES, EVENTS, EXITS, GROUP_TITLES, OFFERED, Arg, Command
from progressdb_kms.tools.console import CommandFailed, UsageError
from progressdb_kms.tools.openapi import document
from progressdb_kms.tools.policycmd import operation
from progressdb_kms.wire.routes import ROUTES
from tests.harness.daemon import COMMAND, REPO, base_environment
from tests.harness.daemon import cli as run

BY_NAME = {command.name: command for command in COMMANDS}


def test_what_holds_keys_is_known_before_the_command_line_is_loaded() -> None:
    words: dict[str, set[bool]] = {}
    for command in COMMANDS:
        words.setdefault(command.name.partition(" ")[0], set()).add(command.keys)
    assert {word for word, holds in words.items() if holds == {True}} == HOLD_KEYS | {"serve"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
class TestTable:
    def test_it_is_complete(self, command: Command) -> None:
        assert callable(command.run) and command.group in GROUP_TITLES
        assert command.help[0].islower() and not command.help.endswith(".")
        assert command.about.endswith(".") and len(command.name.split()) <= 2
        for example in command.examples:
            assert "progressdb-kms " in example

    def test_every_argument_says_what_it_is(self, command: Command) -> None:
        kinds = {"flag", "text", "count", "uid", "file", "folder", "key_id", "topic", *CHOICES, *OFFERED}
        for arg in command.args:
            assert arg.help and arg.kind in kinds and (arg.kind == "flag") == (not arg.metavar)
            assert arg.positional or all(name.startswith("-") for name in arg.names)

    def test_help(self, command: Command, capsys: Any) -> None:
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args([*command.name.split(), "--help"])
        text = capsys.readouterr().out
        assert caught.value.code == 0 and f"usage: progressdb-kms {command.name} " in text
        examples = {f"  {example}" for example in command.examples}
        assert all(len(line) <= 100 for line in text.splitlines() if line not in examples)
        for name in (
            name for arg in command.args for name in (arg.names if not arg.positional else (arg.metavar,))
        ):
            assert name in text
        assert "exit codes:\n  0  it was done\n  1  " in text and all(
            example in text for example in command.examples
        )

    def test_examples_are_command_lines(self, command: Command) -> None:
        """Each names only what the parser knows."""
        for example in command.examples:
            text = example.split("progressdb-kms ", 1)[1].replace("$(date +%FT%T)", "today").rstrip(")")
            words = text.split(" > ")[0].split(" | ")[0].split()
            args = build_parser().parse_args(cli._with_command(words))
            assert args.command is command


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(COMMANDS) >= 25
    for command in COMMANDS:
        names = [name for arg in command.args for name in arg.names]
        assert len(names) == len(set(names)), command.name


def test_every_operation_that_is_recorded_is_offered() -> None:
    """Where a shell completes --op: what the routes and the daemon itself write into the audit log."""
    written = {route.op for route in ROUTES} - {""}
    for path in (REPO / "progressdb_kms").rglob("*.py"):
        written |= set(re.findall(r'(?:note|_append|record)\(\s*"([a-z_]+)"', path.read_text()))
    assert {"shred", "chain_opened", "audit_reopened", "encrypt_batch"} <= written
    tabled = {"import", "connect"}  # a table has their names, of commands and of refusals
    assert written <= set(EVENTS) and set(EVENTS) - written == tabled
    assert set(OFFERED["op"]) == {route.op for route in ROUTES} - {""}


def test_operations_go_by_all_their_names() -> None:
    """In `policy test` and `audit search`: commands, routes, operationIds, what the log has."""
    assert all(operation(op) == op for op in OPERATIONS) and operation("crypt") is None
    paths = document()["paths"]
    for route in ROUTES:
        if route.op:
            op = BATCHES.get(route.op, route.op)
            its_id = paths[route.path][route.method.lower()]["operationId"]
            assert operation(its_id) == operation(f"{route.method} {route.path}") == op
    calls = {command.name for command in COMMANDS if command.group == "online"} - {"status", "metrics"}
    found = {name: operation(name) for name in calls}
    assert None not in found.values() and found["shred"] == "delete_dek", found
    assert found["clock accept"] == "accept_clock" and found["list"] == "list_deks"
    assert operation("/encrypt") == "encrypt" and operation("/deks") is None  # two calls


def test_the_design_s_options() -> None:
    """Online commands take --socket, offline ones on a store --data-dir and --config, serve all three."""

    def has(name: str) -> set[str]:
        return {word for arg in BY_NAME[name].args for word in arg.names}

    for command in COMMANDS:
        if command.group == "serve":
            assert has(command.name) >= {"--socket", "--data-dir", "--config"}
        elif command.group == "online":
            assert "--socket" in has(command.name)
        elif command.name not in ("genkey", "kek-id", "bench", "help"):
            assert {"--data-dir", "--config"} <= has(command.name)


def test_defaults_of_the_table_are_those_of_the_options() -> None:
    from progressdb_kms import client
    from progressdb_kms.config import options
    from progressdb_kms.tools import command

    assert command.DEFAULT_SOCKET == options.BY_NAME["socket"].default == client.DEFAULT_SOCKET
    assert options.BY_NAME["data_dir"].default == command.DEFAULT_DATA_DIR
    named = {option.env for option in options.OPTIONS if option.env}
    assert named == {name for name, _ in command.ENVIRONMENT}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bogus"], "there is no command 'bogus' (see `progressdb-kms --help`)"),
        (["encrpyt"], "there is no command 'encrpyt' (did you mean encrypt? see `progressdb-kms --help`)"),
        (["audit"], "the following arguments are required: COMMAND (see `progressdb-kms audit --help`)"),
        (["encrypt"], "the following arguments are required: --key-id (see `progressdb-kms encrypt --help`)"),
        (["describe"], "the following arguments are required: KEY_ID (see `progressdb-kms describe --help`)"),
        (["status", "--jso"], "unrecognized arguments: --jso (see `progressdb-kms status --help`)"),
        (["status", "x\ny"], "unrecognized arguments: x y (see `progressdb-kms status --help`)"),
        (["--socket"], "argument --socket: expected one argument (see `progressdb-kms serve --help`)"),
        (["shred", "k", "--days", "0"], "argument --days: '0' is no whole number above 0"),
        (["shred", "k", "--days", "1_0"], "argument --days: '1_0' is no whole number above 0"),
        (["shred", "k", "--days", "400"], "--days is a number from 1 to 365"),
        (["shred", "k", "--days", "4", "--now"], "--now and --days exclude each other"),
        (["restore"], "give either FILE or --snapshot PATH"),
        (["restore", "f", "--key", "k"], "--key goes with --snapshot"),
        (["rotate-kek"], "give one of --generate, --new-key-file, --kek-id and --resume"),
        (
            ["rotate-kek", "--generate", "--resume"],
            "give one of --generate, --new-key-file, --kek-id and --resume",
        ),
        (["rotate-kek", "--kek-id", "00", "--forget-old"], "--kek-id touches no file"),
        (["rotate-kek", "--resume", "--dry-run"], "--resume and --dry-run exclude each other"),
        (["backups", "prune"], "give --keep, --older-than or both"),
        (["backup", "/no/such/folder", "--keep", "3"], "--keep goes with a folder that is there"),
        (["backup", "/", "--keep", "3", "--check"], "--keep goes with a folder that is there"),
    ],
)
def test_usage_errors(words: list[str], message: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(cli, "_harden", lambda words: None)
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert (
        shown.out == "" and shown.err.startswith(f"progressdb-kms: {message}") and shown.err.count("\n") == 1
    )


def test_with_json_an_error_is_json(capsys: Any) -> None:
    assert cli.main(["status", "--json", "x"]) == 2
    found = json.loads(capsys.readouterr().err)
    assert found["error"]["code"] == "usage" and "unrecognized arguments: x" in found["error"]["message"]
    for words, code, hint in (
        (["status", "--json", "--socket", "/nonexistent/s"], "connection_failed", "is it running"),
        (["audit", "tail", "--json", "--config", "/nonexistent/c.yaml"], "config", None),
    ):
        assert cli.main(words) == 1
        shown = capsys.readouterr()
        error = json.loads(shown.err)["error"]
        assert shown.out == "" and shown.err.count("\n") == 1
        assert error["code"] == code and error["message"] and (hint is None or hint in error["hint"])


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_on_the_whole(word: str) -> None:
    done = run(word)
    assert done.returncode == 0 and done.stderr == b""
    if word == "--version":
        assert done.stdout == f"progressdb-kms {__version__}\n".encode()
    else:
        assert all(f"  {command.name} " in done.stdout.decode() for command in COMMANDS)


def test_no_command_serves() -> None:
    """A refusal that only the daemon utters."""
    for words in ((), ("--socket", "/tmp/x"), ("serve",)):
        done = run(*words)
        assert done.returncode == 1 and b"no master key is given" in done.stderr and done.stdout == b""


class TestErrors:
    @pytest.fixture
    def failing(self, monkeypatch: Any) -> Any:
        def make(error: BaseException) -> int:
            def status(args: argparse.Namespace) -> int:
                raise error

            rows = [c._replace(run=status) if c.name == "status" else c for c in COMMANDS]
            monkeypatch.setattr(cli, "COMMANDS", rows)
            return cli.main(["status"])

        return make

    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (CommandFailed("no", hint="do this"), 1, "no (do this)"),
            (ConfigError("bad\nline"), 1, "bad line"),
            (KeyNotFound("there is no key k", status=404), 1, "there is no key k"),
            (UsageError("wrong"), 2, "wrong"),
            (
                OSError(28, "No space left on device", "/x"),
                1,
                "/x: No space left on device (make room there, and run it again)",
            ),
            (OSError(5, "Input/output error"), 1, "Input/output error"),
        ],
    )
    def test_one_line(self, failing: Any, capsys: Any, error: Exception, code: int, line: str) -> None:
        assert failing(error) == code
        assert capsys.readouterr().err == f"progressdb-kms: {line}\n"

    def test_a_defect_shows_its_place_and_no_data(self, failing: Any, capsys: Any) -> None:
        assert failing(ValueError("the key is 00112233")) == 1
        line = capsys.readouterr().err
        assert line.startswith("progressdb-kms: internal error: ValueError at test_usage.py:")
        assert "0011" not in line and line.count("\n") == 1

    def test_no_escape_sequence_gets_through(self, failing: Any, capsys: Any) -> None:
        failing(CommandFailed("there is no key \x1b[31mk"))
        assert capsys.readouterr().err == "progressdb-kms: there is no key ?[31mk\n"

    @pytest.mark.parametrize(
        ("words", "closed", "code", "shown"),
        [
            (["genkey", "k"], ">&-", 0, ""),
            (["bogus"], "2>&-", 2, ""),
            (["bogus"], ">&- <&-", 2, "progressdb-kms: there is no command"),
            (["genkey", "k"], ">&- 2>&- <&-", 0, ""),
        ],
    )
    def test_closed_streams(
        self, words: list[str], closed: str, code: int, shown: str, short_tmp: Path
    ) -> None:
        """A file that is opened later must not become the stdout of a command."""
        command = f"{shlex.join([*COMMAND, *words])} {closed}"
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, env=base_environment(REPO), cwd=short_tmp
        )
        assert (done.returncode, done.stdout) == (code, b"")
        assert done.stderr.decode().startswith(shown) and bool(done.stderr) == bool(shown)
        if code == 0:
            assert len((short_tmp / "k").read_bytes()) == 65


def test_arguments_are_tuples_of_data() -> None:
    """So that other programs (man page, completions) can read them."""
    assert Arg(("--json",), "x", "flag").positional is False
    assert Arg(("file",), "x", "file", "FILE").positional is True
    assert [code for code, _ in EXITS] == [0, 1, 2]
