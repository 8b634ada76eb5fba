"""What the page on troubleshooting quotes is what the program says, and what it names is there.

Each quotation is held against all texts in the program: `…` in it, and whatever a text puts in at run time,
stands for any words. What would fit nearly everything (a text that is made at run time but for a few letters)
is no witness.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.tools.manual import text_of

PACKAGE = Path(__file__).resolve().parents[2] / "progressdb_kms"
ANY = "\0"
LETTERS = 6
"""that a text must have of its own"""

PUT_TOGETHER = {
    "the store's active KEK … is not configured": ["the store's active KEK", "is not configured"],
    "the store can't do that now: … full": ["the store can't do that now:"],  # the rest is SQLite's
    "kms.db … was cut": ["kms.db", "was cut: it has"],
    "ready again, after …": ["ready again"],
    "Fatal Python error: _PyTime_GetSystemClock": [],  # Python's
}
"""What a run makes of more than one text."""


def rows() -> list[tuple[str, str]]:
    """What it says, and what to do."""
    lines = [line for line in text_of("troubleshooting").splitlines() if line.startswith("| `")]
    return [(quotes, do) for _, quotes, do, _ in (re.split(r"(?<!\\)\|", line) for line in lines)]


def quotations() -> list[str]:
    """Of `kms.db was removed` (`moved away`, …) `under the daemon` each part for itself."""
    return [quoted for quotes, _ in rows() for quoted in re.findall("`([^`]+)`", quotes)]


def texts(node: ast.AST) -> Iterator[str]:
    """All that the source makes of letters; what a run puts in is ANY."""
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            yield "".join(piece.value if isinstance(piece, ast.Constant) else ANY for piece in part.values)  # type: ignore[misc]
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield re.sub(r"%[-\d.]*[sdgfr]", ANY, part.value)


def words_of(text: str) -> list[str]:
    return [word.strip(":;,.()") for word in text.split()]


@functools.cache
def said() -> list[list[str]]:
    return [
        words_of(text)
        for path in sorted(PACKAGE.rglob("*.py"))
        for text in texts(ast.parse(path.read_text("utf-8")))
        if len(re.findall("[A-Za-z]", text)) >= LETTERS
    ]


def says(quotation: str, words: list[str]) -> bool:
    """The parts of what the page quotes, in the order of the text."""
    for part in (words_of(part) for part in quotation.split("…") if part.strip()):
        ends = (at + len(part) for at in range(len(words) - len(part) + 1) if _alike(part, words, at))
        end = next(ends, None)
        if end is None:
            return False
        words = words[end:]
    return True


def _alike(part: list[str], words: list[str], at: int) -> bool:
    """Word for word, but that a run puts in less than half of them."""
    literal = 0
    for wanted, word in zip(part, words[at : at + len(part)]):
        if wanted == word:
            literal += 1
        elif ANY not in word:
            return False
    return 2 * literal > len(part)


@pytest.mark.parametrize("quotation", quotations())
def test_what_is_quoted_is_said(quotation: str) -> None:
    for part in PUT_TOGETHER.get(quotation, [quotation]):
        assert any(says(part, text) for text in said()), f"no text of the program says {part}"


def test_a_quotation_that_nobody_says_would_be_seen() -> None:
    assert PUT_TOGETHER.keys() <= set(quotations())
    assert not any(says("the keeper went for a walk", text) for text in said())
    assert not any(says("the socket … is in use by uid …", text) for text in said())
