"""`help`: every topic is a file of the package, and every file a topic."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from progressdb_kms.tools import manual
from tests.harness import REPO
from tests.harness.daemon import base_environment, cli

FOLDER = REPO / "progressdb_kms" / "manual"


def test_topics_are_the_files() -> None:
    assert set(manual.TOPICS) == {path.stem for path in FOLDER.glob("*.md")}


@pytest.mark.parametrize("topic", manual.TOPICS)
def test_a_topic_is_its_file(topic: str) -> None:
    assert manual.text_of(topic) == (FOLDER / f"{topic}.md").read_text("utf-8")
    assert manual.text_of(topic).startswith("# ") and topic in manual.overview()


def test_a_pager_is_started_without_a_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PAGER", "less -R '; touch /tmp/x'")
    assert manual.pager() == ["less", "-R", "; touch /tmp/x"]
    monkeypatch.setenv("PAGER", "it's")
    assert manual.pager() in ([], ["less"], ["more"])


def test_a_person_reads_it_through_the_pager(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("PAGER", "sed s/^/>/")
    manual.show("one\n\ntwo\n")
    assert capfd.readouterr().out == ">one\n>\n>two\n"
    monkeypatch.setenv("PAGER", "/no/such/pager")
    manual.show("one\n")
    assert capfd.readouterr().out == "one\n"


SHOWS = """
import signal, sys
from progressdb_kms.tools import manual
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.stdout.isatty = lambda: True
manual.show("one\\n")
"""


def test_an_interrupt_is_the_pager_s() -> None:
    """Ctrl-C killed `less`, and left a terminal without an echo."""
    env = {**base_environment(REPO), "PAGER": "sh -c 'trap : INT; kill -INT $PPID; sleep 0.2; cat'"}
    done = subprocess.run([sys.executable, "-c", SHOWS], capture_output=True, env=env, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"one\n", b"")


def test_a_dumb_terminal_has_no_pager_but_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """`less` shows a warning there, and waits for RETURN."""
    monkeypatch.delenv("PAGER", raising=False)
    monkeypatch.setattr(manual.shutil, "which", lambda name: f"/usr/bin/{name}")
    for term, found in (("xterm", ["less"]), ("dumb", [])):
        monkeypatch.setenv("TERM", term)
        assert manual.pager() == found
    monkeypatch.delenv("TERM")
    assert manual.pager() == []
    monkeypatch.setenv("PAGER", "cat")
    assert manual.pager() == ["cat"]


@pytest.mark.parametrize("topic", manual.TOPICS)
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_page_fits_the_terminal(topic: str, columns: int) -> None:
    """Word for word, and what is typed as it stands."""
    page = manual.text_of(topic)
    shown = manual.fitted(page, columns)
    assert shown.split() == page.split()
    for line in page.splitlines():
        if line.startswith("    "):
            assert f"\n{line}\n" in shown
    block = False
    for line in shown.splitlines():
        block ^= line.startswith("```")
        words = line.split()
        assert len(line) <= columns or len(words) <= 1 or block or line.startswith("    "), line


def test_what_goes_on_is_indented() -> None:
    assert manual.fitted("- one two three four\n", 12) == "- one two\n  three four\n"
    assert manual.fitted("one two three\nfour\n", 12) == "one two\nthree four\n"
    assert manual.fitted("- one\n- two\n  `three` four\n\n# five\nsix\n", 80) == (
        "- one\n- two `three` four\n\n# five\nsix\n"
    )
    assert manual.fitted("| one | two three |\n", 12) == "| one | two\n  three |\n"


def test_as_a_command() -> None:
    done = cli("help")
    assert done.returncode == 0 and all(topic.encode() in done.stdout for topic in manual.TOPICS)
    done = cli("help", "secrets")
    assert (done.returncode, done.stdout) == (0, (FOLDER / "secrets.md").read_bytes())
    done = cli("help", "elephants")
    assert done.returncode == 2 and b"topics: install, " in done.stderr
