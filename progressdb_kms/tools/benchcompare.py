"""Two runs of `bench --json`, held against each other figure by figure.

By ratios, and only where both runs measured the same on the same machine: a run shows its limits too (HTTP
alone, the cipher alone, a disk flush), and where these moved as much as a figure, it was the machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import OperatorError

TOLERANCE = 0.10
"""What two runs of the same tree differ by on a machine that does nothing else."""

LESS_IS_BETTER = ("us", "ms", "MiB")


class Pair(NamedTuple):
    """One figure of both runs. `ratio`: how much better the second is, above 1, or worse, below."""

    name: str
    before: float
    after: float
    unit: str

    @property
    def ratio(self) -> float:
        better, worse = (
            (self.before, self.after) if self.unit in LESS_IS_BETTER else (self.after, self.before)
        )
        return better / worse if worse else float(not better)

    @property
    def verdict(self) -> str:
        return "worse" if self.ratio < 1 - TOLERANCE else "better" if self.ratio > 1 / (1 - TOLERANCE) else ""


def compare(before: str, after: str) -> list[Pair]:
    """The figures that both files have. Raises OperatorError where a file is no output of bench, or where
    they have no figure in common."""
    first, second = (dict(_figures(path)) for path in (before, after))
    pairs = [
        Pair(name, value, second[name][0], unit) for name, (value, unit) in first.items() if name in second
    ]
    if not pairs:
        raise OperatorError(f"{before} and {after} have no figure in common", hint="run the same bench twice")
    return pairs


def show(before: str, after: str, *, as_json: bool) -> int:
    """Prints the pairs; returns 1 where a figure is worse, else 0."""
    pairs = compare(before, after)
    for pair in pairs:
        if as_json:
            print(json.dumps({**pair._asdict(), "ratio": round(pair.ratio, 4), "verdict": pair.verdict}))
        else:
            values = f"{pair.before:>12,.0f} {pair.after:>12,.0f} {pair.unit:<17} {pair.ratio:>6.2f}"
            print(f"{pair.name:<42} {values} {pair.verdict}".rstrip())
    return int(any(pair.verdict == "worse" for pair in pairs))


def _figures(path: str) -> Iterator[tuple[str, tuple[float, str]]]:
    try:
        lines = Path(path).read_text().splitlines()
        for row in map(json.loads, lines):
            yield str(row["name"]), (float(row["value"]), str(row["unit"]))
    except OSError as error:
        raise OperatorError(f"{path} can't be read: {error.strerror}", hint="name two files") from None
    except (ValueError, KeyError, TypeError):
        hint = f"make it with `progressdb-kms bench --json > {path}`"
        raise OperatorError(f"{path} is no output of `bench --json`", hint=hint) from None
