"""What /metrics tells of the service beside operations: a table of families, and where each has its value.

What isn't known has no sample: the age of a KEK whose beginning nobody noted, a limit that is none, and all
that the keeper is asked for while it doesn't answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Callable

from ..encoding import wall
from ..errors import KMSError
from ..service.clock import age
from .call import App

LABEL = "kek_id"

LIMITS = {
    "connections": "Open connections",
    "open_files": "Open files of the worker that has most",
    "threads": "Threads of the workers",
    "body_bytes": "Bytes of messages that are kept while they come and are worked on",
    "locked_bytes": "Bytes of locked memory",
}
"""What `status` tells of as used and limit."""

COUNTED = {
    "audit_lines_total": "Audit records written by the workers.",
    "items_total": "Messages encrypted or decrypted, those of batches one by one.",
    "embedded_messages_total": "Messages of ProgressDB's embedded mode that were opened.",
    "refused_connections_total": "Connections refused at max_connections or at a UID's share of them.",
    "policy_denials_total": "Calls and items of batches that a policy refused.",
    "refused_peers_total": "Connections and calls of peers that are not served.",
}
"""Summed over all processes."""

FAMILIES = {
    **COUNTED,
    "deks": "Stored DEKs, by the KEK that wraps them.",
    "deks_near_limit": "DEKs with more than 2**31 encrypts of 2**32.",
    "deks_spent": "DEKs with 2**32 encrypts: they only decrypt.",
    "kek_version": "Rotations of the KEK so far, plus one.",
    "kek_wraps": "DEKs that the active KEK has wrapped, again and again too: 2**32 are allowed.",
    "kek_age_seconds": "Since the active KEK became that.",
    "kek_max_age_seconds": "What kek_max_age_days allows.",
    "workers": "Worker processes.",
    "worker_restarts_total": "Workers that died and were replaced.",
    "ready": "1 while all work can be done, as /readyz says.",
    "warnings": "What /readyz warns of: how many.",
    "audit_writable": "1 while the audit log can be written.",
    "store_writable": "1 while the store can be written.",
    "erasures_due": "Shredded DEKs of which a copy of the wrapped bytes may remain.",
    "erasures_held": "1 while scheduled deletions wait for the clock.",
    "deletions_scheduled": "DEKs that are due to be shredded.",
    "rotation_done": "DEKs that the rotation under way has rewrapped.",
    "rotation_deks": "All DEKs of the rotation under way; 0 where there is none.",
    "backup_age_seconds": "Since `backup` made one last.",
    "backup_checked_age_seconds": "Since the newest that passed its drill was made.",
    "disk_free_bytes": "Free for the data-dir.",
    "uptime_seconds": "Since the daemon started.",
    **{name: f"{text}." for name, text in LIMITS.items()},
    **{f"{name}_limit": f"{text}: what is allowed." for name, text in LIMITS.items()},
}


MADE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "deks": ("deks_by_kek", lambda rows: {kek_id: row["count"] for kek_id, row in rows.items()}),
    "kek_version": ("kek_version", int),
    "kek_max_age_seconds": ("kek_max_age_days", lambda days: days * 86400),
    "worker_restarts_total": ("restarts", int),
    "warnings": ("warnings", len),
    "erasures_held": ("erasures_held", bool),
    "rotation_deks": ("rotation_total", int),
    "backup_age_seconds": ("backup_created_at", lambda created: age(created, wall())),
    "backup_checked_age_seconds": ("backup_checked_at", lambda created: age(created, wall())),
    **{name: (f"limits_{name}_used", int) for name in LIMITS},
    **{f"{name}_limit": (f"limits_{name}_limit", int) for name in LIMITS},
}
"""A family is called as the member of `status` that it shows: `deks_spent` is `deks.spent`. Of these it is
another, or what is made of it: a number, or one for each value of the label."""


def families(app: App) -> list[tuple[str, str, str, list[tuple[str, float]]]]:
    """(name, type, help, [(labels, value)]), as `Metrics.render` takes them."""
    told = dict(_flat(_told(app)))
    return [
        (name, "counter" if name.endswith("_total") else "gauge", text, samples)
        for name, text in {**FAMILIES, **app.service.families}.items()
        if (samples := _samples(name, told)) is not None
    ]


def _samples(name: str, told: Mapping[str, Any]) -> list[tuple[str, float]] | None:
    member, made = MADE.get(name, (name, lambda value: value))
    value = told.get(member)
    if value is None or (value := made(value)) is None:
        return None
    if isinstance(value, Mapping):
        return [(f'{{{LABEL}="{label}"}}', number) for label, number in value.items()]
    return [("", value)]


def _flat(told: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Each member, and those within it, by its path."""
    for name, value in told.items():
        yield before + name, value
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}_")


def _told(app: App) -> dict[str, Any]:
    """What is counted, and what `status` and `readiness` tell, as far as it is known now."""
    service, told = app.service, app.service.about()
    told.update((name, sum(app.metrics.gauge(name.removesuffix("_total")))) for name in COUNTED)
    with contextlib.suppress(KMSError):  # the store can't be read, which `ready` tells
        told.update(service.stored())
    try:
        told.update(service.ask("status"))
        ready = service.readiness()
        told.update(ready._asdict(), ready=not ready.reasons)
        told["rotation"] = told["rotation"] or {"done": 0, "total": 0}
    except KMSError:  # the keeper doesn't answer: it is not asked again, who scrapes waits for it once
        told.update(ready=False, audit_writable=not service.audit.reasons(), store_writable=False)
    return told
