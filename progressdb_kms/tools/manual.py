"""`help [TOPIC]`: the manual, which is part of the package, so that it is there without a network."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping

from ..config.values import Option, file_mode
from .console import UsageError

TOPICS: Mapping[str, str] = {
    "install": "zipapp, packages, container, systemd",
    "configuration": "every key of the configuration file",
    "api": "every call, its fields and its answers",
    "commands": "what each command does",
    "runbook": "what to do, from a backup to a lost key",
    "fleet": "many hosts, one PostgreSQL",
    "monitoring": "metrics, alerts, and how to scrape a Unix socket",
    "troubleshooting": "what it says, and what to do",
    "threats": "what is promised, and what is not",
    "formats": "wrapped DEKs, messages, store, audit log",
    "structure": "folders, processes, where to begin reading",
    "speed": "how to measure, and what was measured",
    "secrets": "where each secret may be, and until when",
    "decisions": "why it is as it is",
    "progressdb": "its releases, and how its data comes over",
}
"""Each is `manual/<topic>.md` in the package."""

PAGERS = ("less", "more")


def text_of(topic: str) -> str:
    """Raises UsageError where there is no such topic."""
    if topic not in TOPICS:
        raise UsageError(f"the manual has no topic {topic[:40]!r} (topics: {', '.join(TOPICS)})")
    data = pkgutil.get_data("progressdb_kms", f"manual/{topic}.md")
    assert data is not None, topic
    return data.decode("utf-8")


def overview() -> str:
    width = max(map(len, TOPICS))
    lines = [f"  {topic:{width}}  {about}" for topic, about in TOPICS.items()]
    return "\n".join(
        [
            "The manual, topic by topic: `progressdb-kms help TOPIC`",
            "",
            *lines,
            "",
            "`progressdb-kms --help` lists the commands.",
            "",
        ]
    )


def fitted(text: str, columns: int) -> str:
    """A page for a terminal: paragraphs, and rows of tables, are broken between words. What is typed stays as
    it is, and what goes on of a list or of a row is indented."""
    lines, block = [], False
    for line in text.splitlines():
        typed = line.startswith("```")
        block ^= typed
        if typed or block or line.startswith("    "):
            lines.append(line)
        elif lines and _GOES_ON.match(line) and _PROSE.match(lines[-1]):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return "".join(_broken(line, min(columns, WIDEST)) + "\n" for line in lines)


WIDEST = 100
"""Columns: nobody likes to read longer lines."""

_MARK = re.compile(r"(?:\|? *(?:- |\d+\. )?)")
_GOES_ON = re.compile(r" {0,3}(?!- |\d+\. )[^ |#`]|  ?`|`(?!``)")
_PROSE = re.compile(r" {0,3}[^ |#]")


def _broken(line: str, columns: int) -> str:
    if line.startswith("    ") or len(line) <= columns:
        return line
    hang = " " * len(_MARK.match(line)[0])  # type: ignore[index]  # it may be empty
    return textwrap.fill(
        line, columns, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False
    )


def show(text: str) -> None:
    """Through a pager where a person reads it on a terminal; as it stands into a pipe or file."""
    command = pager()
    if sys.stdout.isatty():
        text = fitted(text, shutil.get_terminal_size().columns)
        with contextlib.suppress(OSError):  # it can't be started: the text itself is what was asked for
            if command:
                with _interrupts_are_the_pager_s():
                    subprocess.run(command, input=text.encode("utf-8"), check=False)
                return
    sys.stdout.write(text)


@contextlib.contextmanager
def _interrupts_are_the_pager_s() -> Iterator[None]:
    """It takes Ctrl-C as the end of a search or of a wait; ended meanwhile, it would leave a terminal that
    shows nothing of what is typed. A handler, which the pager does not inherit, as it would `ignore`."""
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def pager() -> list[str]:
    """The words of $PAGER, or the first usual one that is here, where the terminal can do what these want;
    none of them goes through a shell."""
    try:
        wanted = shlex.split(os.environ.get("PAGER", ""))
    except ValueError:
        wanted = []
    usual = () if os.environ.get("TERM", "dumb") == "dumb" else PAGERS
    return wanted or next(([name] for name in usual if shutil.which(name)), [])


def default_text(option: Option) -> str:
    """For tables of the configuration: `8388608`, `0600`, `(none)`."""
    if option.default in (None, ()):
        return "(none)"
    if option.parse is file_mode:
        return f"{option.default:04o}"
    if isinstance(option.default, bool):
        return str(option.default).lower()
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
