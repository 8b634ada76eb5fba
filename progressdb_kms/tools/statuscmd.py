"""`status`: how the daemon is, for a person who has ten seconds. For programs `--json` gives all that
GET /status tells, as it stands.

What is well takes a line; what needs somebody says so, and what to do. A daemon of another release may tell
less: what it doesn't tell is left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from ..client import Client, Readiness
from ..service.usage import SPENT
from ..store.contract import HEAVY
from .checkup import failed
from .console import paint, picture, safe, say

NEAR = 0.8
"""Use of a limit from which it is marked."""

LIMITS = {
    "connections": "connections",
    "open_files": "open files",
    "threads": "threads",
    "body_bytes": "messages under way",
    "locked_bytes": "locked memory",
    "kek_wraps": "wraps by the KEK",
}

Told = Mapping[str, Any]


def run(kms: Client) -> None:
    told, ready = kms.status(), kms.ready()
    for line in lines(told, ready, time.time()):
        sys.stdout.write(line + "\n")
    for warning in ready.warnings:
        say(f"warning: {warning}")


def lines(told: Told, ready: Readiness, now: float) -> Iterator[str]:
    """`now`: seconds since 1970."""
    state = paint("ready", "green") if ready else paint("NOT READY", "red")
    up = span(told.get("uptime_seconds", 0))
    yield f"progressdb-kms {safe(told.get('version', '?'))}: {state}, up {up}"
    for reason in ready.reasons:
        yield _row("", paint(safe(reason), "red"))
    for parts in (_kek, _deks, _deletions, _backup, _rotation, _memory, _limits, _rest):
        yield from parts(told, now)


def _row(title: str, text: str) -> str:
    return f"{title:11}{text}".rstrip()


def _kek(told: Told, now: float) -> Iterator[str]:
    yield from _age(told)
    wraps = told.get("kek_wraps", 0)
    if wraps >= HEAVY:
        of = f"it has wrapped {wraps:,} DEKs of {SPENT:,} that it may: `progressdb-kms rotate-kek --generate`"
        yield _row("", paint(of, "yellow"))


def _age(told: Told) -> Iterator[str]:
    seconds, most = told.get("kek_age_seconds"), told.get("kek_max_age_days")
    text = f"{safe(told.get('kek_id', '?'))}, version {safe(told.get('kek_version', '?'))}"
    if seconds is None:
        yield _row("KEK", f"{text}, nobody can tell since when")
        return
    since = f"the active one for {span(seconds)}, since {safe(told['kek_since'])[:10]}"
    if most and seconds > most * 86400:
        since = paint(f"{since}; kek_max_age_days is {most}: `progressdb-kms rotate-kek`", "yellow")
    yield _row("KEK", f"{text}, {since}")


def _deks(told: Told, now: float) -> Iterator[str]:
    deks = told.get("deks", {})
    yield _row("DEKs", f"{deks.get('total', 0):,}")
    for kek_id, row in deks.get("by_kek", {}).items():
        if kek_id != told.get("kek_id"):
            yield _row("", paint(f"{row['count']:,} of them under the KEK {safe(kek_id)}", "yellow"))
    for name, text in (
        ("near_limit", "near to what one may encrypt"),
        ("spent", "that only decrypt any more"),
    ):
        if deks.get(name):
            yield _row("", paint(f"{deks[name]:,} {text}: `list`, then `reencrypt` to a new one", "yellow"))


def _deletions(told: Told, now: float) -> Iterator[str]:
    found = told.get("deletions", {})
    text = f"{found.get('scheduled', 0):,} scheduled"
    if found.get("next_at"):
        text += f", the next {_when(found['next_at'], now)} (`enable` takes one back)"
    if told.get("erasures_held"):
        text += "; " + paint(f"held: {safe(told['erasures_held'])}", "yellow")
    yield _row("deletions", text)
    due = told.get("erasures_due", 0)
    left = f"{due:,} due: " + (
        "until the KEK is rotated, and the old one gone (`progressdb-kms help fleet`)"
        if "fleet" in told
        else "a copy of what was shredded may remain, it is tried again"
    )
    yield _row("erasures", paint(left, "yellow") if due else "0 due")


def _backup(told: Told, now: float) -> Iterator[str]:
    last = told.get("backup")
    if last is None:
        yield _row("backup", paint("none was ever made by `progressdb-kms backup`", "yellow"))
        return
    if last["checked_at"] == last["created_at"]:
        passed = "passed its drill"
    elif failed(last["file"], last["created_at"], last["checked_at"]):
        passed = paint("failed its drill (`backup --check`)", "red")
    else:
        passed = paint("not checked (`backup --check`)", "yellow")
    yield _row("backup", f"{_when(last['created_at'], now)}, {passed}: {safe(last['file'])}")


def _rotation(told: Told, now: float) -> Iterator[str]:
    step = told.get("rotation")
    if step:
        to = f"to the KEK {safe(step['new_kek_id'])}: {safe(step['phase'])}"
        yield _row("rotation", f"{to} {picture(step['done'], step['total'])}")


def _memory(told: Told, now: float) -> Iterator[str]:
    memory = told.get("memory", {})
    kind, locked = safe(memory.get("kind", "?")), size(memory.get("locked_bytes", 0))
    yield _row(
        "memory", paint("keys are not in locked memory", "red") if kind == "unlocked" else f"{kind}, {locked}"
    )


def _limits(told: Told, now: float) -> Iterator[str]:
    title = "limits"
    wraps = {"kek_wraps": {"used": told["kek_wraps"], "limit": SPENT}} if "kek_wraps" in told else {}
    for name, use in {**told.get("limits", {}), **wraps}.items():
        shown = size if name.endswith("bytes") else "{:,}".format
        text = f"{LIMITS.get(name, safe(name)):18}  {shown(use['used'])}"
        if use["limit"]:
            part = use["used"] / use["limit"]
            text = f"{text} of {shown(use['limit'])} ({part:.0%})"
            text = paint(text, "yellow") if part > NEAR else text
        yield _row(title, text)
        title = ""
    if told.get("disk_free_bytes") is not None:
        yield _row("disk", f"{size(told['disk_free_bytes'])} free for the data-dir")


def _rest(told: Told, now: float) -> Iterator[str]:
    dead = told.get("restarts", 0)
    workers = f"{told.get('workers', 0)}, " + (paint(f"{dead} died", "yellow") if dead else "none died")
    yield _row("workers", workers)
    audit = told.get("audit", {})
    yield _row("audit", f"chain {safe(audit.get('chain', '?'))}, record {audit.get('seq', 0):,}")
    measures = told.get("hardening", [])
    if measures:
        missing = [safe(measure["name"]) for measure in measures if not measure["ok"]]
        text = paint("without " + ", ".join(missing), "yellow") if missing else "all measures are in force"
        yield _row("hardening", text)


# ---- words ---------------------------------------------------------------------------------------------

_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def span(seconds: float) -> str:
    """`3 days`, in the largest unit of which there are two, or one."""
    for unit, name in _UNITS:
        if seconds >= 2 * unit or (seconds >= unit and unit == 1):
            count = int(seconds // unit)
            return f"{count:,} {name}" + "s" * (count != 1)
    return "less than a second"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _when(text: str, now: float) -> str:
    """`in 2 days, at 2026-11-28 10:00 UTC`; what is no time is shown as it stands."""
    moment = _moment(text)
    if moment is None:
        return safe(text)
    away = f"in {span(moment - now)}" if moment > now else f"{span(now - moment)} ago"
    return f"{away}, at {text[:10]} {text[11:16]} UTC"


def _moment(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None
