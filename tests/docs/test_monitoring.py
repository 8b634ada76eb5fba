"""Metrics, the manual's table of them, alerts and dashboard agree, and each alert rings for its fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from progressdb_kms.service import fleetgauges
from progressdb_kms.service.metrics import CLASSES, OPS, Metrics
from progressdb_kms.tools.commands.daemon import UP
from progressdb_kms.tools.manual import text_of
from progressdb_kms.wire.gauges import FAMILIES, LIMITS
from tests.harness import REPO, Daemon

RULES = REPO / "packaging" / "prometheus-rules.yml"
BOARD = json.loads((REPO / "packaging" / "grafana-dashboard.json").read_text())
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
]

NAMES = {
    *(name[len("progressdb_kms_") :] for name in re.findall("^# TYPE (\\w+)", Metrics(1).render(()), re.M)),
    *FAMILIES,
    *fleetgauges.FAMILIES,
    *re.findall("^# TYPE progressdb_kms_(\\w+)", UP, re.M),
}
"""All families that the daemon serves, and the one that `metrics` adds."""

PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
promtool = pytest.mark.skipif(shutil.which("promtool", path=PATH) is None, reason="promtool is not installed")


def run(*words: str) -> None:
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PATH": PATH}
    )
    assert done.returncode == 0, done.stdout


def expressions() -> dict[str, str]:
    found = {f"alert {rule['alert']}": rule["expr"] for rule in ALERTS}
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    return found


def asked(expression: str) -> set[str]:
    """The families that an expression asks for."""
    return {re.sub("_bucket$", "", name) for name in re.findall(r"\bprogressdb_kms_(\w+)", expression)}


@pytest.mark.parametrize("where", expressions())
def test_alerts_and_panels_ask_for_metrics_that_exist(where: str) -> None:
    expression = expressions()[where]
    assert asked(expression) and asked(expression) <= NAMES
    for classes in re.findall(r'status=~?"([^"]+)"', expression):
        assert set(classes.split("|")) <= set(CLASSES)
    for ops in re.findall(r'op=~?"([^"]+)"', expression):
        assert set(ops.split("|")) <= set(OPS)
    assert expression.count("(") == expression.count(")")


def rows() -> dict[str, str]:
    """The manual's table: each metric, and the alerts beside it."""
    cells = [line.split("|")[1:-1] for line in text_of("monitoring").splitlines() if line.startswith("| `")]
    return {name: alerts for names, _, alerts in cells for name in re.findall("`(\\w+)`", names)}


def test_the_manual_names_each_metric_and_each_alert_beside_its_metric() -> None:
    assert set(rows()) == NAMES
    beside = {name: set(re.findall("Kms\\w+", alerts)) for name, alerts in rows().items()}
    assert {alert for alerts in beside.values() for alert in alerts} == {rule["alert"] for rule in ALERTS}
    for rule in ALERTS:
        assert any(rule["alert"] in beside[name] for name in asked(rule["expr"])), rule["alert"]


def test_each_metric_is_in_an_alert_or_a_panel() -> None:
    assert {name for text in expressions().values() for name in asked(text)} == NAMES - {
        "embedded_messages_total"  # tells how far a migration is, for which nobody keeps a panel
    }


def test_each_alert_says_what_to_do() -> None:
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} == set(rule["annotations"])


def test_what_the_alert_of_old_keks_says_to_do_ends_it(daemon: Daemon) -> None:
    """It said `--resume`, which does nothing there: no rotation leaves DEKs under two KEKs."""
    (rule,) = (rule for rule in ALERTS if rule["alert"] == "KmsOldKekInUse")
    (line,) = re.findall("`progressdb-kms (rotate-kek [^`]+)`", rule["annotations"]["description"])

    def keks() -> list[str]:
        page = daemon.request("GET", "/metrics").body.decode()
        return re.findall(r'^progressdb_kms_deks{kek_id="(\w+)"} [1-9]', page, re.M)

    with daemon.session() as kms:
        one, _ = (kms.create_dek("t")["key_id"] for _ in range(2))
        kms.ok("POST", "/rewrap", {"key_id": one, "new_kek_hex": os.urandom(32).hex()})
    assert len(keks()) == 2
    done = daemon.cli(*line.replace("…", str(daemon.config_file)).split())
    assert done.returncode == 0, done.stderr
    assert len(keks()) == 1


def test_the_dashboard_is_in_order() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(cells)[0] < 24


# ---- each alert, tried -------------------------------------------------------------------------------

WELL = {
    'up{job="progressdb-kms"}': "1x{n}",
    "up": "1x{n}",
    'node_textfile_mtime_seconds{file="/run/progressdb-kms-metrics/progressdb-kms.prom"}': "1000000000x{n}",
    "uptime_seconds": "0+60x{n}",
    "ready": "1x{n}",
    "warnings": "0x{n}",
    "audit_writable": "1x{n}",
    "store_writable": "1x{n}",
    'requests_total{op="encrypt",status="2xx"}': "0+600x{n}",
    'requests_total{op="decrypt",status="4xx"}': "0x{n}",
    'requests_total{op="encrypt",status="5xx"}': "0x{n}",
    'request_seconds_bucket{op="encrypt",le="0.001"}': "0+600x{n}",
    'request_seconds_bucket{op="encrypt",le="1"}': "0+600x{n}",
    'request_seconds_bucket{op="encrypt",le="+Inf"}': "0+600x{n}",
    'deks{kek_id="aa"}': "9x{n}",
    "kek_age_seconds": "0+60x{n}",
    "kek_max_age_seconds": "31536000x{n}",
    "deletions_scheduled": "3x{n}",
    "deks_near_limit": "0x{n}",
    "deks_spent": "0x{n}",
    "kek_wraps": "2147483647x{n}",
    "erasures_due": "0x{n}",
    "erasures_held": "0x{n}",
    "rotation_deks": "0x{n}",
    "rotation_done": "0x{n}",
    "disk_free_bytes": "1000000000x{n}",
    "backup_age_seconds": "4000x{n}",
    "backup_checked_age_seconds": "4000x{n}",
    "worker_restarts_total": "0x{n}",
    "refused_connections_total": "0x{n}",
    "refused_peers_total": "0x{n}",
    "policy_denials_total": "0x{n}",
    "fleet_lease_seconds": "50x{n}",
    "fleet_placed": "1x{n}",
    "fleet_hosts_fenced": "0x{n}",
    "fleet_behind": "0x{n}",
    "fleet_changes_total": "0+60x{n}",
    "fleet_changes_unknown_total": "0x{n}",
    "fleet_changes_wait_seconds_total": "0+1x{n}",
    "fleet_engine_connections": "50x{n}",
    "fleet_engine_connections_limit": "100x{n}",
    "fleet_engine_synchronous": "1x{n}",
    "fleet_engine_standbys": "2x{n}",
    **dict.fromkeys(LIMITS, "50x{n}"),
    **{f"{name}_limit": "100x{n}" for name in LIMITS},
}
"""A daemon without a complaint, a sample a minute."""

FAULTS: dict[str, dict[str, str]] = {
    "KmsDown": {'up{job="progressdb-kms"}': "0x{n}"},
    "KmsMetricsOld": {
        'node_textfile_mtime_seconds{file="/run/progressdb-kms-metrics/progressdb-kms.prom"}': "0x{n}"
    },
    "KmsServerErrors": {'requests_total{op="encrypt",status="5xx"}': "0+1x{n}"},
    "KmsClientErrors": {'requests_total{op="encrypt",status="4xx"}': "0+60x{n}"},
    "KmsDecryptRefused": {'requests_total{op="decrypt",status="4xx"}': "0+3x{n}"},
    "KmsSlow": {'request_seconds_bucket{op="encrypt",le="0.001"}': "0+300x{n}"},
    "KmsConnectionsRefused": {"refused_connections_total": "0+1x{n}"},
    "KmsWorkerRestarts": {"worker_restarts_total": "0+1x{n}"},
    "KmsMemoryNotLocked": {"locked_bytes": "0x{n}"},
    "KmsErasuresHeld": {"erasures_held": "1x{n}"},
    "KmsOldKekInUse": {'deks{kek_id="bb"}': "1x{n}"},
    "KmsNotReady": {"ready": "0x{n}"},
    "KmsAuditNotWritable": {"audit_writable": "0x{n}"},
    "KmsStoreNotWritable": {"store_writable": "0x{n}"},
    "KmsDiskLow": {"disk_free_bytes": "1000000x{n}"},
    "KmsErasuresDue": {"erasures_due": "1x{n}"},
    "KmsManyDeletions": {"deletions_scheduled": "3+100x{n}"},
    "KmsDekWornOut": {"deks_near_limit": "1x{n}"},
    "KmsWarnings": {"warnings": "1x{n}"},
    "KmsKekWornOut": {"kek_wraps": "2147483648x{n}"},
    "KmsRotationStalled": {"rotation_deks": "100x{n}", "rotation_done": "7x{n}"},
    "KmsLimitNear": {"open_files": "81x{n}"},
    "KmsPolicyDenials": {"policy_denials_total": "0+3x{n}"},
    "KmsPeersRefused": {"refused_peers_total": "0+3x{n}"},
    "KmsBackupOld": {"backup_age_seconds": "130000x{n}"},
    "KmsBackupUnchecked": {"backup_checked_age_seconds": "_x{n}"},
    "KmsNeverBackedUp": {"backup_age_seconds": "_x{n}", "backup_checked_age_seconds": "_x{n}"},
    "KmsKekOld": {"kek_age_seconds": "31536001+60x{n}"},
    "KmsFleetNoLease": {"fleet_lease_seconds": "0x{n}"},
    "KmsFleetHostFenced": {"fleet_hosts_fenced": "1x{n}"},
    "KmsFleetBehind": {"fleet_behind": "1001x{n}"},
    "KmsFleetChangesSlow": {"fleet_changes_wait_seconds_total": "0+61x{n}"},
    "KmsFleetConnections": {"fleet_engine_connections": "91x{n}"},
    "KmsFleetNoStandby": {"fleet_engine_standbys": "0x{n}"},
}
"""What is otherwise where an alert must ring."""


def test_each_alert_is_tried() -> None:
    assert list(FAULTS) == [rule["alert"] for rule in ALERTS]


def minutes(rule: dict[str, Any]) -> int:
    """When it rings: its `for`, and what its ranges look back over."""
    spans = re.findall(r"\b(\d+)([mhd])\b", f"{rule.get('for', '')} {rule['expr']}")
    return 10 + sum(int(number) * {"m": 1, "h": 60, "d": 1440}[unit] for number, unit in spans)


WELL_HOST = "well"


def series(host: str, count: int) -> list[dict[str, str]]:
    """Of a host on which the alert of this name must ring."""
    found = []
    for name, values in {**WELL, **FAULTS.get(host, {})}.items():
        name = name if name.startswith(("up{", "node_")) else f"progressdb_kms_{name}"
        labels = f'{name[:-1]},instance="{host}"}}' if name.endswith("}") else f'{name}{{instance="{host}"}}'
        found.append({"series": labels, "values": values.format(n=count)})
    return found


def trials(every: int, rings: dict[str, int]) -> dict[str, Any]:
    """All hosts at once, each with another fault. `rings`: alerts, and the minute at which each must ring."""
    last = max(rings.values()) // every * every
    samples = [{"labels": f'{{alertname="{name}",instance="{name}"}}', "value": 1} for name in rings]
    one = {
        "interval": f"{every}m",
        "input_series": [line for host in (WELL_HOST, *rings) for line in series(host, last // every)],
        "promql_expr_test": [
            {
                "expr": 'group by (alertname, instance) (ALERTS{alertstate="firing"})',
                "eval_time": f"{last}m",
                "exp_samples": samples,
            }
        ],
    }
    return {"rule_files": [str(RULES)], "evaluation_interval": f"{every}m", "tests": [one]}


@promtool
def test_each_alert_rings_for_its_fault_alone(tmp_path: Path) -> None:
    run("promtool", "check", "rules", str(RULES))
    times = {rule["alert"]: minutes(rule) for rule in ALERTS}
    soon = {name: after for name, after in times.items() if after <= 60}
    late = {name: after for name, after in times.items() if after > 60}
    for every, rings in ((1, soon), (10, late)):
        file = tmp_path / f"{every}.yml"
        file.write_text(yaml.safe_dump(trials(every, rings)))
        run("promtool", "test", "rules", str(file))


@promtool
def test_a_daemon_that_is_down_beside_one_that_is_not(tmp_path: Path) -> None:
    """By the way of the packages: its file says no more than that, and the other host has all metrics."""
    trial = trials(1, {"KmsDown": 12})
    lines = [
        line for line in trial["tests"][0]["input_series"] if f'instance="{WELL_HOST}"' in line["series"]
    ]
    down = {"series": 'progressdb_kms_up{instance="KmsDown"}', "values": "0x12"}
    trial["tests"][0]["input_series"] = [*lines, down]
    file = tmp_path / "down.yml"
    file.write_text(yaml.safe_dump(trial))
    run("promtool", "test", "rules", str(file))
