"""What /metrics tells of the service beside what is counted: a table of families, and a value for each.

What isn't known has no sample: the age of a KEK whose beginning nobody noted, a limit that is none, and all
that the keeper is asked for while it doesn't answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Union

from ..encoding import wall
from ..errors import KMSError
from ..service.clock import age
from ..service.service import Service
from .call import App

Value = Union[float, Mapping[str, float], None]
"""One sample, one for each value of the label, or none."""

LABEL = "kek_id"

LIMITS = {
    "connections": "Open connections",
    "open_files": "Open files of the worker that has most",
    "threads": "Threads of the workers",
    "body_bytes": "Bytes of messages that are kept while they come and are worked on",
    "locked_bytes": "Bytes of locked memory",
}
"""What `status` tells of as used and limit; the first is counted already."""

COUNTED = {
    "connections": "Open connections.",
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
    **{name: f"{text}." for name, text in LIMITS.items() if name != "connections"},
    **{f"{name}_limit": f"{text}: what is allowed." for name, text in LIMITS.items()},
}


def families(app: App) -> list[tuple[str, str, str, list[tuple[str, float]]]]:
    """(name, type, help, [(labels, value)]), as `Metrics.render` takes them."""
    found = _values(app)
    return [
        (name, "counter" if name.endswith("_total") else "gauge", text, samples)
        for name, text in {**FAMILIES, **app.service.families}.items()
        if (samples := _samples(found.get(name))) is not None
    ]


def _samples(value: Value) -> list[tuple[str, float]] | None:
    if isinstance(value, Mapping):
        return [(f'{{{LABEL}="{label}"}}', number) for label, number in value.items()]
    return None if value is None else [("", value)]


def _values(app: App) -> dict[str, Value]:
    service = app.service
    about, now = service.about(), wall()
    counted = {name: sum(app.metrics.gauge(name.removesuffix("_total"))) for name in COUNTED}
    backup = about["backup"]
    values: dict[str, Value] = {
        "kek_max_age_seconds": days * 86400 if (days := about["kek_max_age_days"]) else None,
        "workers": about["workers"],
        "worker_restarts_total": about["restarts"],
        "backup_age_seconds": age(backup["created_at"], now) if backup else None,
        "backup_checked_age_seconds": age(backup["checked_at"], now) if backup else None,
        "disk_free_bytes": about["disk_free_bytes"],
        "uptime_seconds": about["uptime_seconds"],
    }
    for name, use in about["limits"].items():
        values.update({name: use["used"], f"{name}_limit": use["limit"]})
    return {**values, **counted, **_stored(service), **_told(app)}


def _stored(service: Service) -> dict[str, Value]:
    """By the store: nothing where it can't be read, which `ready` tells."""
    try:
        told = service.stored()
        return {
            "deks": {kek_id: row["count"] for kek_id, row in told["deks"]["by_kek"].items()},
            "deks_near_limit": told["deks"]["near_limit"],
            "deks_spent": told["deks"]["spent"],
            "kek_version": int(told["kek_version"]),
            "kek_wraps": told["kek_wraps"],
            "kek_age_seconds": told["kek_age_seconds"],
            "deletions_scheduled": told["deletions"]["scheduled"],
        }
    except KMSError:
        return {}


def _told(app: App) -> dict[str, Value]:
    """By the keeper. Where it doesn't answer it is not asked again: who scrapes waits for it once."""
    try:
        told: dict[str, Any] = app.service.ask("status")
    except KMSError:
        return {"ready": 0, "audit_writable": not app.service.audit.reasons(), "store_writable": 0}
    ready = app.service.readiness()
    rotation = told["rotation"] or {"done": 0, "total": 0}
    return {
        "ready": not ready.reasons,
        "warnings": len(ready.warnings),
        "audit_writable": ready.audit_writable,
        "store_writable": ready.store_writable,
        "erasures_due": told["erasures_due"],
        "erasures_held": bool(told["erasures_held"]),
        "rotation_done": rotation["done"],
        "rotation_deks": rotation["total"],
        **{f"fleet_{name}": value for name, value in told.get("fleet", {}).items()},
    }
