"""Somebody with the role of the daemons writes rows by hand. Rows can be destroyed so; but no daemon takes
what decides about keys from a row that carries no MAC, and none ends for one that is of no use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from progressdb_kms.errors import ConfigError
from progressdb_kms.fleet import schema
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


def test_a_host_of_another_fleet_is_told_so(fleet_database: postgres.Fleet, hosts: Hosts) -> None:
    """Its configuration names another database, or another one stands under that name."""
    daemon = hosts.all[0]
    ok(daemon, "POST", "/deks", {"thread_id": "t"}, 201)
    for each in hosts.all:
        each.stop()
    fleet_database.again()
    told = daemon.refusal().stderr
    assert "knows nothing of this host" in told and "data-dir of its own" in told


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


MALLORY = (
    "DO $$ BEGIN CREATE ROLE mallory; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
    "DROP SCHEMA kms CASCADE",
)
BETTER = "FUNCTION kms.starts_with(name, text) RETURNS boolean LANGUAGE sql AS 'SELECT true'"


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (
            ["CREATE SCHEMA kms AUTHORIZATION mallory", "GRANT ALL ON SCHEMA kms TO kms"],
            "it belongs to mallory",
        ),
        (["CREATE SCHEMA kms AUTHORIZATION kms", "CREATE TABLE kms.deks (x int)"], "the relation deks"),
        (["CREATE SCHEMA kms AUTHORIZATION kms", f"CREATE {BETTER}"], "the function starts_with"),
    ],
    ids=["another's", "a table", "a function"],
)
def test_no_fleet_is_made_where_another_had_a_hand(
    fleet_database: postgres.Fleet, made: list[str], says: str
) -> None:
    """Whose the schema was could drop each table of the fleet, and have functions of his run in its name."""
    fleet_database.sql(*MALLORY, *made)
    with pytest.raises(ConfigError, match=says):
        schema.create(fleet_database.link())
    assert not fleet_database.sql("SELECT 1 FROM pg_tables WHERE schemaname = 'kms' AND tablename = 'fleet'")


@pytest.mark.parametrize(
    ("done", "undone", "says"),
    [
        ("ALTER SCHEMA kms OWNER TO mallory", "ALTER SCHEMA kms OWNER TO kms", "it belongs to mallory"),
        ("ALTER TABLE kms.hosts OWNER TO mallory", "ALTER TABLE kms.hosts OWNER TO kms", "the table hosts"),
        (
            f"CREATE {BETTER}; ALTER FUNCTION kms.starts_with OWNER TO mallory",
            "DROP FUNCTION kms.starts_with",
            "the function starts_with belongs to mallory",
        ),
    ],
    ids=["the schema", "a table", "a function"],
)
def test_what_became_another_s_is_refused(
    fleet_database: postgres.Fleet, done: str, undone: str, says: str
) -> None:
    fleet_database.sql(MALLORY[0], "GRANT USAGE ON SCHEMA kms TO kms", done)
    fleet_database.sql("GRANT USAGE ON SCHEMA kms TO kms", "GRANT ALL ON ALL TABLES IN SCHEMA kms TO kms")
    link = fleet_database.link()
    with pytest.raises(ConfigError, match=says):
        schema.check(link)
    fleet_database.sql(undone)
    schema.check(link)


def test_the_engine_s_administrator_may_own_it(fleet_database: postgres.Fleet) -> None:
    fleet_database.sql("ALTER SCHEMA kms OWNER TO postgres", "GRANT ALL ON SCHEMA kms TO kms")
    schema.check(fleet_database.link())
    fleet_database.sql("ALTER SCHEMA kms OWNER TO kms")
