"""The manual's page on fleets: what it says to do when something fails is done here; its examples are taken
by those for whom they are."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
import yaml

from progressdb_kms.tools.manual import text_of
from tests.conftest import MakeDaemon
from tests.docs.test_runbook import not_in_the_manual
from tests.harness import REPO, postgres
from tests.harness.postgres import Fleet
from tests.harness.quickfence import QUICK

needs = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())

PATRONI = yaml.safe_load((REPO / "packaging" / "patroni" / "fleet.yml").read_text())["bootstrap"]["dcs"]


def test_the_page_names_the_examples() -> None:
    for name in re.findall("packaging/[a-z]+/[a-z.]+[a-z]", text_of("fleet")):
        assert (REPO / name).is_file()
        assert name in (REPO / "packaging/debian/progressdb-kms.examples").read_text().split()
        assert name in (REPO / "packaging/rpm/progressdb-kms.spec").read_text().split()


@needs
def test_a_failover_by_patroni_is_shorter_than_a_lease() -> None:
    from progressdb_kms.fleet.lease import margin
    from progressdb_kms.fleet.settings import FENCE_SECONDS

    longest = PATRONI["ttl"] + PATRONI["loop_wait"] + PATRONI["retry_timeout"]
    assert longest < (FENCE_SECONDS[0] - margin(FENCE_SECONDS[0])) * 3 / 4  # less a heartbeat
    assert PATRONI["synchronous_mode"] and PATRONI["synchronous_mode_strict"]


@needs
def test_the_engine_takes_the_parameters(postgres_server: postgres.Postgres) -> None:
    """They are written, and taken back, and none is made use of."""
    for name, value in PATRONI["postgresql"]["parameters"].items():
        postgres_server.sql(f"ALTER SYSTEM SET {name} = '{value}'", f"ALTER SYSTEM RESET {name}")


@needs
def test_the_engine_takes_the_lines_of_pg_hba(postgres_server: postgres.Postgres) -> None:
    file = postgres_server.data / "pg_hba.conf"
    before = file.read_text()
    try:
        lines = [line.replace("hostssl", "host") for line in PATRONI["postgresql"]["pg_hba"]]  # no TLS here
        file.write_text("\n".join(lines) + "\n")
        assert postgres_server.sql("SELECT line_number, error FROM pg_hba_file_rules WHERE error <> ''") == []
        known = postgres_server.sql("SELECT type, database[1], user_name[1] FROM pg_hba_file_rules")
        assert set(known) == {  # Patroni itself, its standbys, an old primary that comes back, and hosts
            ("local", "all", "postgres"),
            ("host", "replication", "replicator"),
            ("host", "postgres", "rewind"),
            ("host", "kms", "kms"),
        }
    finally:
        file.write_text(before)


@needs
def test_a_host_is_dead(fleet_database: Fleet, make_daemon: MakeDaemon) -> None:
    kek = os.urandom(32)

    def host() -> Any:
        return make_daemon(fleet_database.configured(2), kek=kek, command=QUICK, workers=1)

    one, lost = host(), host()
    name = (lost.data_dir / "kms.host").read_text().strip()
    key_id = one.ok("POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    lost.ok("POST", f"/deks/{key_id}/disable", {})
    lost.kill()
    assert one.ok("POST", f"/deks/{key_id}/enable", {})["state"] == "enabled"
    block = {**one.config["postgresql"], "fence_seconds": "60"}  # one that commands take
    one.write_config({**one.config, "postgresql": block})
    status = json.loads(one.offline("store", "status", "--json").stdout)
    assert [found["host"] for found in status["hosts"] if found["fenced"]] == [name]
    another = host()
    assert another.ok("GET", f"/deks/{key_id}")["state"] == "enabled"
    assert json.loads(one.offline("store", "forget", name, "--json").stdout)["forgotten"] == 1
    done = one.offline("audit", "verify", "--host", name, str(lost.audit_log), "--json")
    assert json.loads(done.stdout)["result"] == "ok"
    assert not not_in_the_manual(one.data_dir)
