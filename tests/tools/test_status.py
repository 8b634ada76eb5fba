"""`status` for people: what is well takes a line, what needs somebody is marked and says what to do."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from progressdb_kms.client import Readiness
from progressdb_kms.encoding import timestamp
from progressdb_kms.tools.console import paint
from progressdb_kms.tools.statuscmd import lines, size, span
from tests.conftest import MakeDaemon

NOW = 1_795_000_000.0
DAY = 86400.0
WELL = Readiness(True, [])


def told(**changes: Any) -> dict[str, Any]:
    """What GET /status says of a daemon that is well, but for `changes`."""
    made = timestamp(NOW - 6 * 3600)
    return {
        "version": "1.0.0",
        "uptime_seconds": 3.5 * DAY,
        "kek_id": "aa",
        "kek_version": "3",
        "kek_since": timestamp(NOW - 41 * DAY),
        "kek_age_seconds": 41 * DAY,
        "kek_max_age_days": 365,
        "deks": {"total": 12345, "by_kek": {"aa": {"count": 12345}}, "near_limit": 0, "spent": 0},
        "deletions": {"scheduled": 3, "next_at": timestamp(NOW + 2.5 * DAY)},
        "erasures_due": 0,
        "erasures_held": "",
        "backup": {"file": "/b/x", "created_at": made, "sha256": "00", "checked_at": made},
        "rotation": None,
        "memory": {"kind": "memfd_secret", "locked_bytes": 1258291},
        "limits": {
            "connections": {"used": 12, "limit": 2048},
            "threads": {"used": 31, "limit": None},
            "body_bytes": {"used": 0, "limit": 33 << 20},
        },
        "disk_free_bytes": 13 << 30,
        "workers": 2,
        "restarts": 0,
        "audit": {"chain": "3.1", "seq": 1234},
        "hardening": [{"name": "no core dumps", "ok": True, "detail": ""}],
        **changes,
    }


def test_a_daemon_that_is_well() -> None:
    assert "\n".join(lines(told(), WELL, NOW)) == (
        "progressdb-kms 1.0.0: ready, up 3 days\n"
        "KEK        aa, version 3, the active one for 41 days, since 2026-10-08\n"
        "DEKs       12,345\n"
        "deletions  3 scheduled, the next in 2 days, at 2026-11-20 23:06 UTC (`enable` takes one back)\n"
        "erasures   0 due\n"
        "backup     6 hours ago, at 2026-11-18 05:06 UTC, passed its drill: /b/x\n"
        "memory     memfd_secret, 1.2 MiB\n"
        "limits     connections         12 of 2,048 (1%)\n"
        "           threads             31\n"
        "           messages under way  0 B of 33.0 MiB (0%)\n"
        "disk       13.0 GiB free for the data-dir\n"
        "workers    2, none died\n"
        "audit      chain 3.1, record 1,234\n"
        "hardening  all measures are in force"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"kek_age_seconds": None}, "KEK        aa, version 3, nobody can tell since when"),
        ({"kek_max_age_days": 40}, "kek_max_age_days is 40: `progressdb-kms rotate-kek`"),
        (
            {"deks": {"total": 5, "by_kek": {"aa": {"count": 3}, "bb": {"count": 2}}}},
            "           2 of them under the KEK bb",
        ),
        ({"deks": {"total": 5, "by_kek": {}, "spent": 1}}, "           1 that only decrypt any more"),
        ({"erasures_held": "the clock went back"}, "held: the clock went back"),
        ({"erasures_due": 2}, "erasures   2 due: a copy of what was shredded may remain"),
        (
            {"erasures_due": 2, "fleet": {}},
            "erasures   2 due: until the KEK is rotated, and the old one gone",
        ),
        ({"backup": None}, "backup     none was ever made"),
        (
            {"backup": {"file": "/b", "created_at": timestamp(NOW), "sha256": "", "checked_at": ""}},
            "not checked (`backup --check`): /b",
        ),
        (
            {"rotation": {"phase": "rewrapping", "done": 250, "total": 1000, "new_kek_id": "cc"}},
            "rotation   to the KEK cc: rewrapping [######                  ]  25% 250/1,000",
        ),
        ({"memory": {"kind": "unlocked", "locked_bytes": 0}}, "memory     keys are not in locked memory"),
        ({"restarts": 2}, "workers    2, 2 died"),
        ({"hardening": [{"name": "no core dumps", "ok": False}]}, "hardening  without no core dumps"),
        ({"kek_id": "a\x1b[2J"}, "KEK        a\\x1b[2J, version 3"),
    ],
)
def test_what_needs_somebody(changes: dict[str, Any], line: str) -> None:
    assert line in "\n".join(lines(told(**changes), WELL, NOW))


def test_reasons_stand_first() -> None:
    found = list(lines(told(), Readiness(False, ["the disk is full"]), NOW))
    assert found[:2] == ["progressdb-kms 1.0.0: NOT READY, up 3 days", "           the disk is full"]


def test_a_daemon_that_tells_less() -> None:
    assert list(lines({"version": "0.9"}, WELL, NOW))[0].startswith("progressdb-kms 0.9: ready")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "less than a second"),
        (1, "1 second"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (47 * 3600, "47 hours"),
    ],
)
def test_spans(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1024, 5 << 30, 3 << 42)] == [
        "0 B", "1023 B", "1.0 KiB", "5.0 GiB", "12.0 TiB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("terminal", "env", "painted"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, True),  # as the convention has it: empty is not set
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {}, False),
        (False, {"TERM": "xterm"}, False),
    ],
)
def test_colour_only_on_a_terminal_and_never_against_no_color(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, env: dict[str, str], painted: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert paint("ready", "green") == ("\x1b[32mready\x1b[0m" if painted else "ready")


def test_of_a_real_daemon(make_daemon: MakeDaemon) -> None:
    """Nothing of what it tells is left out for want of knowing it."""
    daemon = make_daemon({"kek_max_age_days": 30}, workers=1)
    done = daemon.cli("status")
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode()
    assert re.match(r"progressdb-kms \S+: ready, up ", out)
    titles = [line.split()[0] for line in out.splitlines()[1:] if line[0] != " "]
    assert titles == [
        "KEK", "DEKs", "deletions", "erasures", "backup", "memory", "limits", "disk", "workers", "audit",
        "hardening",
    ]  # fmt: skip
    assert "the active one for " in out and " ?" not in out
