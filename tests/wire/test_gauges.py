"""What /metrics makes of what the service tells, where all of it is known, and where little is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from progressdb_kms.encoding import timestamp, wall
from progressdb_kms.errors import StoreUnavailable
from progressdb_kms.service import fleetgauges
from progressdb_kms.service.metrics import Metrics
from progressdb_kms.service.service import Readiness
from progressdb_kms.wire.gauges import COUNTED, FAMILIES, LIMITS, families

ABOUT = {
    "workers": 2,
    "restarts": 3,
    "uptime_seconds": 1.5,
    "limits": {name: {"used": 5, "limit": 7} for name in LIMITS},
    "kek_max_age_days": 90,
    "disk_free_bytes": 11,
}
STORED = {
    "kek_version": "4",
    "kek_age_seconds": 2.5,
    "kek_wraps": 13,
    "deks": {"by_kek": {"aa": {"count": 2}, "bb": {"count": 1}}, "near_limit": 17, "spent": 19},
    "deletions": {"scheduled": 23},
}
FLEET = {name[len("fleet_") :]: 1.0 for name in fleetgauges.FAMILIES}
KEPT = {"rotation": {"done": 29, "total": 31}, "erasures_due": 37, "erasures_held": "a clock", "fleet": FLEET}


class Told:
    """A service that tells so much; what is None raises."""

    families = fleetgauges.FAMILIES
    audit = SimpleNamespace(reasons=lambda: [])

    def __init__(self, backup: Any, stored: Any, kept: Any) -> None:
        self._backup, self._stored, self._kept = backup, stored, kept
        self.asked = 0

    def about(self) -> dict[str, Any]:
        return {**ABOUT, "backup": self._backup}

    def stored(self) -> dict[str, Any]:
        return self._known(self._stored)

    def ask(self, op: str) -> dict[str, Any]:
        self.asked += 1
        return self._known(self._kept)

    def readiness(self) -> Readiness:
        self.asked += 1
        return Readiness(["a reason"], ["one", "two"], True, False)

    @staticmethod
    def _known(value: Any) -> dict[str, Any]:
        if value is None:
            raise StoreUnavailable("not now")
        return dict(value)


def found(service: Told) -> dict[str, dict[str, float]]:
    app: Any = SimpleNamespace(service=service, metrics=Metrics(1))
    return {name: dict(samples) for name, _, _, samples in families(app)}


def test_all_that_is_told_has_its_sample() -> None:
    backup = {"created_at": timestamp(wall() - 60), "checked_at": timestamp(wall() - 600)}
    told = found(Told(backup, STORED, KEPT))
    assert list(told) == [*FAMILIES, *fleetgauges.FAMILIES]
    assert told.pop("deks") == {'{kek_id="aa"}': 2, '{kek_id="bb"}': 1}
    values = {name: samples[""] for name, samples in told.items()}
    assert 60 <= values.pop("backup_age_seconds") < 300 and values.pop("backup_checked_age_seconds") >= 600
    assert values == {
        **dict.fromkeys(COUNTED, 0),
        **dict.fromkeys(LIMITS, 5),
        **{f"{name}_limit": 7 for name in LIMITS},
        **dict.fromkeys(fleetgauges.FAMILIES, 1),
        **{"workers": 2, "worker_restarts_total": 3, "uptime_seconds": 1.5, "disk_free_bytes": 11},
        **{"kek_max_age_seconds": 90 * 86400, "kek_version": 4, "kek_age_seconds": 2.5, "kek_wraps": 13},
        **{"deks_near_limit": 17, "deks_spent": 19, "deletions_scheduled": 23},
        **{"rotation_done": 29, "rotation_deks": 31, "erasures_due": 37, "erasures_held": 1},
        **{"ready": 0, "warnings": 2, "audit_writable": 1, "store_writable": 0},
    }


@pytest.mark.parametrize("stored", [None, STORED])
def test_a_keeper_that_is_silent_is_asked_once(stored: Any) -> None:
    service = Told(None, stored, None)
    told = found(service)
    assert service.asked == 1
    assert told["ready"] == told["store_writable"] == {"": 0} and told["audit_writable"] == {"": 1}
    gone = {"backup_age_seconds", "backup_checked_age_seconds", "warnings", "erasures_due", "erasures_held"}
    gone |= {"rotation_done", "rotation_deks"}
    if stored is None:
        gone |= {"deks", "deks_near_limit", "deks_spent", "deletions_scheduled"}
        gone |= {"kek_version", "kek_wraps", "kek_age_seconds"}
    assert {*FAMILIES} - {*told} == gone and not {*fleetgauges.FAMILIES} & {*told}


def test_no_rotation_is_none_of_none() -> None:
    told = found(Told(None, STORED, {**KEPT, "rotation": None, "erasures_held": ""}))
    assert told["rotation_done"] == told["rotation_deks"] == told["erasures_held"] == {"": 0}
