"""Commands that anything of ours tells somebody to type exist, with their options: in the README, the manual,
the messages of the program, the alerts and the units. What stands in for a value (FILE, …) needs be none."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.tools import cli
from progressdb_kms.tools.commands import COMMANDS
from progressdb_kms.tools.console import UsageError
from tests.docs.test_troubleshooting import ANY, texts
from tests.harness import REPO

FIRST = {command.name.partition(" ")[0] for command in COMMANDS}
UNFINISHED = ("are required", "expected one argument")
"""What the parser says of a command that is only named, without its arguments."""

PROSE = ("row v1", "COMMAND --help", "ready: socket= kek_id=")
"""What only looks so."""


def sources() -> Iterator[tuple[Path, str]]:
    for path in sorted((REPO / "progressdb_kms").rglob("*.py")):
        yield path, "\n".join(texts(ast.parse(path.read_text("utf-8")))).replace(ANY, "X")
    others = [*(REPO / "progressdb_kms" / "manual").glob("*.md"), *(REPO / ".github").glob("*.md")]
    kinds = (".yml", ".yaml", ".service", ".timer", ".conf", ".json")
    packaged = [path for path in (REPO / "packaging").rglob("*") if path.suffix in kinds]
    for path in sorted([REPO / "README.md", *others, *packaged]):
        yield path, path.read_text("utf-8")


def commands(text: str) -> Iterator[list[str]]:
    """In backticks, and where a line of a block begins with us; up to a redirection or another command."""
    for quoted, typed in re.findall(r"`([^`\n]+)`|^ {4}(progressdb-kms .*)$", text, re.M):
        line = re.split(r" [|>;]|\s+#", quoted or typed)[0].replace("[", "").replace("]", "").replace("…", "")
        line = re.sub(r"\$\([^)]*\)", "X", line)
        words = line.split()
        if words[1:] and (words[0] == "progressdb-kms" or words[0] in FIRST):
            yield shlex.split(line)[words[0] == "progressdb-kms" :]


@functools.cache
def named() -> list[tuple[tuple[str, ...], str]]:
    return sorted({(tuple(words), path.name) for path, text in sources() for words in commands(text)})


def test_there_are_many() -> None:
    assert len(named()) > 150


def test_each_is_one() -> None:
    wrong, parser = [], cli.build_parser()
    for words, where in named():
        if {"--help", "--version"} & {*words}:
            continue
        try:
            parser.parse_args(list(words))
        except UsageError as error:
            if not any(told in str(error) for told in UNFINISHED) and " ".join(words) not in PROSE:
                wrong.append(f"{where}: {' '.join(words)}: {str(error)}")
    assert wrong == []


@pytest.mark.parametrize("line", ["`progressdb-kms rotate-keks --generate`", "`backups prune --most 3`"])
def test_one_that_is_none_would_be_seen(line: str) -> None:
    (words,) = commands(line)
    with pytest.raises(UsageError):
        cli.build_parser().parse_args(words)
