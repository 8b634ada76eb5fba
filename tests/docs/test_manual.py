"""The manual pages and completions that packages ship say what the program's tables say, and work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest

from progressdb_kms.config.options import OPTIONS
from progressdb_kms.config.values import Option
from progressdb_kms.tools.command import CHOICES, ENVIRONMENT, EVENTS, OFFERED, Command
from progressdb_kms.tools.commands import COMMANDS
from progressdb_kms.tools.manual import TOPICS, default_text, text_of

ROOT = Path(__file__).resolve().parents[2]
GENERATE = ROOT / "packaging" / "generate"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a package's build makes."""
    folder = tmp_path_factory.mktemp("made")
    assert run(sys.executable, str(GENERATE), "--output", str(folder)) == ""
    return folder


PAGES = ("progressdb-kms.8", "progressdb-kms.yaml.5", *(f"progressdb-kms-{topic}.7" for topic in TOPICS))

each_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


def needs(program: str) -> str:
    if not shutil.which(program):
        pytest.skip(f"there is no {program} here")
    return program


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    return result.stdout


def option_names(command: Command) -> set[str]:
    return {name for arg in command.args for name in arg.names if name.startswith("--")} | {"--help"}


# ---- the manual


def plain(page: Path) -> str:
    """A page without roff's escapes, which is near enough to what a reader sees."""
    text = re.sub(r"\\f[BIR]|\\&", "", page.read_text())
    return text.replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\")


def section(text: str, start: str) -> str:
    """From a heading to the next one of its rank or a higher one."""
    at = text.index(f"\n{start}\n") + 1
    rank = r"\.S[HS] " if start.startswith(".SS") else r"\.SH "
    end = re.search(rank, text[at + 3 :])
    return text[at : at + 3 + end.start()] if end else text[at:]


@each_command
def test_the_page_has_each_command(made: Path, command: Command) -> None:
    part = section(plain(made / "progressdb-kms.8"), f".SS {command.name}")
    for arg in command.args:
        for word in (*arg.names, arg.metavar) if not arg.positional else (arg.metavar,):
            assert word in part
        assert " ".join(arg.help.split()[:3]).lower() in " ".join(part.split()).lower()
    for line in command.examples:
        assert line.encode("ascii", "ignore").decode().split()[0] in part
    assert command.about.split(". ")[0][:60] in " ".join(part.split())


@pytest.mark.parametrize("topic", TOPICS)
def test_a_topic_s_page_holds_its_text(made: Path, topic: str) -> None:
    """Word for word, but for what marks headings, tables and code."""
    shown = re.sub(
        r"\W+",
        " ",
        re.sub(
            r"\\\[u[0-9A-F]+\]|\\\((?:aq|ha|ti|bu)|\\f[BIR]|\\&|\\e",
            " ",
            plain(made / f"progressdb-kms-{topic}.7"),
        ),
    ).lower()
    for line in text_of(topic).splitlines()[1:]:
        for words in re.findall(r"[A-Za-z][A-Za-z ,]{20,}[a-z]", line.replace("*", "")):
            assert " ".join(re.findall(r"\w+", words.lower())) in shown, line


def test_the_page_has_the_environment_and_nothing_else(made: Path) -> None:
    part = section(plain(made / "progressdb-kms.8"), ".SH ENVIRONMENT")
    assert set(re.findall(r"PROGRESSDB_KMS_[A-Z_]+", part)) == {name for name, _ in ENVIRONMENT}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_page_has_each_key_of_the_configuration(made: Path, option: Option) -> None:
    part = section(plain(made / "progressdb-kms.yaml.5"), ".SH KEYS")
    assert option.name in re.findall(r"^\.TP\n(\S+)", part, re.M)
    at = part.index(f".TP\n{option.name}")
    own = " ".join(part[at : part.find(".TP\n", at + 1)].split())
    assert option.expects.format(low=option.low, high=option.high) in own
    assert default_text(option) == "(none)" or f"Default: {default_text(option)}." in own


@pytest.mark.parametrize("page", PAGES)
def test_groff_has_nothing_to_complain_about(made: Path, page: str) -> None:
    needs("groff")
    assert run("groff", "-man", "-Tutf8", "-ww", "-b", "-z", str(made / page)) == ""


@pytest.mark.parametrize("page", PAGES)
def test_mandoc_has_nothing_to_complain_about(made: Path, page: str) -> None:
    """But for the date: pages carry the version, so that a tree makes the same at any time."""
    command = [needs("mandoc"), "-Tlint", str(made / page)]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    assert [line for line in found.splitlines() if "missing date" not in line] == []


# ---- bash


Shell = Callable[..., set[str]]

BASH = """
source "$0"
compopt() { :; }  # works only while the shell completes a line that is typed
COMP_WORDS=(progressdb-kms "$@") COMP_CWORD=$#
_progressdb_kms
printf "%s\\n" "${COMPREPLY[@]}"
"""


@pytest.fixture
def bash(made: Path) -> Shell:
    """What TAB offers after the words; the last one is being written. Bash has taken `=` apart already."""
    file = str(made / "progressdb-kms.bash")
    return lambda *words: set(run("bash", "-uc", BASH, file, *words).split("\n")) - {""}


@each_command
def test_bash_offers_the_options_of_each_command(bash: Shell, command: Command) -> None:
    assert bash(*command.name.split(), "--") == option_names(command)


SERVE = option_names(next(command for command in COMMANDS if command.name == "serve"))


def test_bash_offers_commands(bash: Shell) -> None:
    assert bash("") >= {command.name.partition(" ")[0] for command in COMMANDS}
    assert bash("au") == {"audit"}
    assert bash("audit", "") == {"verify", "search", "report", "tail", "--help"}
    assert bash("--") == SERVE | {"--version"} >= {"--socket", "--data-dir", "--config", "--help"}


def test_bash_takes_an_option_first_for_serve(bash: Shell) -> None:
    assert bash("--socket", "/s", "") == SERVE


def test_bash_knows_what_takes_a_value(bash: Shell) -> None:
    assert bash("list", "--thread-id", "") == set()
    assert bash("list", "--thread-id", "status", "--j") == {"--json"}
    assert bash("list", "--thread-id=status", "--j") == {"--json"}
    assert bash("list", "--thread-id", "=", "status", "--j") == {"--json"}
    assert bash("bench", "") >= set(CHOICES["bench"])
    assert bash("policy", "test", "--op", "") == set(OFFERED["op"])
    assert bash("audit", "search", "--op", "") == set(EVENTS) > set(OFFERED["op"])
    assert bash("help", "") >= set(TOPICS) and bash("help", "thr") == {"threats"}


def test_bash_offers_files_and_folders(bash: Shell, short_tmp: Path) -> None:
    (short_tmp / "a folder").mkdir()
    (short_tmp / "a file").touch()
    start = f"{short_tmp}/a"
    both = {f"{short_tmp}/a folder", f"{short_tmp}/a file"}
    assert bash("status", "--socket", start) == both
    assert bash("status", "--socket", "=", start) == both
    assert bash("genkey", start) == both
    assert bash("verify", "--data-dir", start) == {f"{short_tmp}/a folder"}
    assert bash("describe", start) == set()


# ---- key_ids, which the daemon is asked for


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A `progressdb-kms` that writes down what it is asked, and answers, with noise on stderr."""
    stub, log = tmp_path / "progressdb-kms", tmp_path / "asked"
    stub.write_text(f'#!/bin/sh\necho "$*" >>{log}\necho noise >&2\nprintf "k_1\\nk_2\\nt:1\\n"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return log


ASKS = "list --ids --limit 100"


def test_bash_asks_the_daemon_that_is_named(bash: Shell, asked: Path) -> None:
    assert bash("describe", "k_") == {"k_1", "k_2", "t:1"}, "the daemon chose them by the prefix"
    bash("shred", "k_1", "--socket", "/run/a b", "")
    bash("restore", "--config=c.yaml", "--snapshot", "f", "--key", "k")
    assert asked.read_text().splitlines() == [
        f"{ASKS} --prefix k_",
        f"{ASKS} --socket /run/a b",
        f"{ASKS} --config=c.yaml --prefix k",
    ]


def test_bash_puts_in_what_follows_a_colon(bash: Shell, asked: Path) -> None:
    """It takes words apart at colons, which ProgressDB's key_ids have."""
    assert "1" in bash("describe", "t", ":")
    assert asked.read_text() == f"{ASKS} --prefix t:\n"


def test_bash_is_silent_where_no_daemon_answers(bash: Shell, asked: Path) -> None:
    (asked.parent / "progressdb-kms").write_text("#!/bin/sh\necho no daemon was found >&2\nexit 1\n")
    assert bash("describe", "k_") == set()  # and `run` asserts that stderr is empty


def test_fish_asks_the_daemon_that_is_named(fish: Shell, asked: Path) -> None:
    assert fish("progressdb-kms describe --socket /s k_") == {"k_1", "k_2"}
    assert fish("progressdb-kms encrypt --key-id ") == {"k_1", "k_2", "t:1"}
    assert asked.read_text().splitlines()[0] == f"{ASKS} --socket /s --prefix k_"


ZSH = """
_arguments() { :; }; _describe() { :; }; compadd() { print -rl -- $ids; }
words=(progressdb-kms -h) CURRENT=2
source $1
typeset -A opt_args=(--socket '/run/a\\:b')
PREFIX=k_ _progressdb_kms_keys
"""


def test_zsh_asks_the_daemon_that_is_named(made: Path, asked: Path) -> None:
    found = run(needs("zsh"), "-fc", ZSH, "zsh", str(made / "_progressdb-kms"))
    assert found.split() == ["k_1", "k_2", "t:1"]
    assert asked.read_text() == f"{ASKS} --socket /run/a:b --prefix=k_\n"
    assert ":OP:(accept_clock create_dek " in (made / "_progressdb-kms").read_text()
    assert ":KEY_ID:_progressdb_kms_keys'" in (made / "_progressdb-kms").read_text()


# ---- fish and zsh


@pytest.fixture
def fish(made: Path) -> Shell:
    needs("fish")

    def offers(line: str) -> set[str]:
        script = f"source {made}/progressdb-kms.fish; complete -C '{line}'"
        return {offer.split("\t")[0] for offer in run("fish", "--no-config", "-c", script).splitlines()}

    return offers


@each_command
def test_fish_offers_the_options_of_each_command(fish: Shell, command: Command) -> None:
    assert fish(f"progressdb-kms {command.name} --") == option_names(command)


def test_fish_offers_commands(fish: Shell) -> None:
    assert fish("progressdb-kms ") == {command.name.partition(" ")[0] for command in COMMANDS}
    assert fish("progressdb-kms backups ") == {"list", "prune"}
    assert fish("progressdb-kms bench ") == set(CHOICES["bench"])
    assert fish("progressdb-kms policy test --op ") == set(OFFERED["op"])
    assert fish("progressdb-kms audit search --op ") == set(EVENTS)
    assert fish("progressdb-kms help ") == set(TOPICS)
    assert fish("progressdb-kms list --state ") == set(CHOICES["state"])
    assert fish("progressdb-kms list --thread-id ") == set()


def test_zsh_can_read_it(made: Path) -> None:
    assert run(needs("zsh"), "-n", str(made / "_progressdb-kms")) == ""


@each_command
def test_zsh_has_the_options_of_each_command(made: Path, command: Command) -> None:
    first, _, second = command.name.partition(" ")
    text = (made / "_progressdb-kms").read_text()
    at = text.index(f"\n    {first})\n")
    part = text[at : text.index("\n        ;;\n", at)]
    if second:
        at = part.index(f"\n        {second})\n")
        part = part[at : part.index("\n            ;;\n", at)]
    specs = set(re.findall(r"'(?:\([^)]*\))?(?:-\w\|)?(--[a-z-]+)", part))
    assert specs - {"--version"} == option_names(command)
