"""Somebody with the role of the daemons writes rows by hand. Rows can be destroyed so; but no daemon takes
what decides about keys from a row that carries no MAC, and none ends for one that is of no use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fleet.test_daemons import PATIENCE, configured, until, use
from tests.fleet.test_rotation import Hosts, ok
from tests.harness import postgres
from tests.harness.daemon import Daemon, cli, write_secret
from tests.harness.fakekms import kek_id_of as kek_id
from tests.harness.wire import Reply

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())


@pytest.fixture
def hosts(fleet_database: postgres.Fleet) -> Iterator[Hosts]:
    with Hosts(fleet_database, (1, 2)) as made:
        yield made


def tell(database: postgres.Fleet, change: str, kind: str = "keks", key_id: str = "") -> None:
    """A change of the fleet's row, told as hosts tell each other."""
    database.sql(
        f"UPDATE kms.fleet SET {change}, gen = gen + 1",
        f"INSERT INTO kms.changes SELECT gen, '{kind}', '{key_id}' FROM kms.fleet",
        "NOTIFY kms",
    )


def ready(daemon: Daemon) -> Reply:
    with daemon.session(PATIENCE) as session:
        return session.request("GET", "/readyz")


def test_a_kek_that_was_rotated_out_comes_back_by_nobody_s_row(
    fleet_database: postgres.Fleet, hosts: Hosts
) -> None:
    """The old KEK is at hand on each host, to unwrap: who writes rows must not have them wrap under it."""
    old, new = kek_id(hosts.kek), kek_id(hosts.new)
    assert hosts.rotate().status == 200
    for daemon in hosts.all:
        daemon.stop()
        write_secret(daemon.home / "old", hosts.kek)
        daemon.write_kek(hosts.new)
        daemon.write_config({**configured(fleet_database), "previous_master_keys": [{"file": "old"}]})
        daemon.start()
    assert hosts.active() == {new}
    tell(fleet_database, f"active_kek = '{old}', version = version + 1")
    for daemon in hosts.all:
        until(lambda daemon=daemon: b"names" in ready(daemon).body)
        assert ready(daemon).status == 503
        with daemon.session(PATIENCE) as session:
            assert session.request("POST", "/deks", {"thread_id": "t"}).status == 503
            assert session.ok("GET", "/status")["kek_id"] == new
    assert old not in hosts.keks_of_rows()
    told = hosts.all[0].offline("verify")
    assert told.returncode == 1 and b"names" in told.stderr, told
    fleet_database.sql(f"UPDATE kms.fleet SET active_kek = '{new}'")  # as the hint says
    for daemon in hosts.all:
        until(lambda daemon=daemon: ready(daemon).status == 200)
        ok(daemon, "POST", "/deks", {"thread_id": "t"}, 201)
    assert hosts.keks_of_rows() == [new]


HOSTILE = "INSERT INTO kms.hosts VALUES ('x', 'y', E'\\x1b[31mred\\nline', 0, -5, ARRAY[NULL, 'ä'], false)"


def test_rows_that_are_none_of_ours_end_no_daemon(fleet_database: postgres.Fleet, hosts: Hosts) -> None:
    """A host's state that can't be trusted ended all daemons of the fleet at once."""
    key_id = ok(hosts.all[0], "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    pids = [daemon.process.pid for daemon in hosts.all if daemon.process]
    for name in ("kä", "k" * 3000):
        tell(fleet_database, "owner = ''", "key", name)
    fleet_database.sql(HOSTILE)
    for daemon in hosts.all:
        assert ready(daemon).status == 200
        with daemon.session(PATIENCE) as session:
            assert use(session, key_id) == 200
    told = cli("store", "status", "--config", str(hosts.all[0].config_file))
    assert told.returncode == 0 and b"?[31mred?line" in told.stdout, told
    fleet_database.sql(
        "DELETE FROM kms.hosts WHERE host = 'x'", "INSERT INTO kms.kms VALUES ('h', 'store:state', '7')"
    )
    for daemon in hosts.all:
        until(lambda daemon=daemon: b"store:state@h" in ready(daemon).body)
    fleet_database.sql("DELETE FROM kms.kms WHERE host = 'h'")
    for daemon in hosts.all:
        until(lambda daemon=daemon: ready(daemon).status == 200)
        ok(daemon, "POST", f"/deks/{key_id}/disable", {})
        ok(daemon, "POST", f"/deks/{key_id}/enable", {})
        assert "Traceback" not in daemon.stderr and "keeper (pid" not in daemon.stderr
    assert pids == [daemon.process.pid for daemon in hosts.all if daemon.process]
