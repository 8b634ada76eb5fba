"""Somebody with the role of the daemons writes rows by hand. Rows can be destroyed so; but no daemon takes
what decides about keys from a row that carries no MAC, and none ends for one that is of no use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from progressdb_kms.errors import ConfigError, StoreDamaged
from progressdb_kms.fleet import schema
from progressdb_kms.fleet.status import status
from progressdb_kms.store.contract import KEK_ROW, Usage
from tests.conftest import MakeDaemon
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
        until(lambda daemon=daemon: ready(daemon).status == 200)
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


@pytest.mark.parametrize(
    "junk", ["[]", "7", "", "{}", '{"writes":null}', '{"writes":1e300}', '{"writes":-1}']
)
def test_a_count_that_is_none_ends_no_daemon(fleet_database: postgres.Fleet, hosts: Hosts, junk: str) -> None:
    """It ended each daemon of the fleet at its next write, and none could start."""
    daemon = hosts.all[0]
    fleet_database.sql(f"UPDATE kms.kms SET value = '{junk}' WHERE name = 'store:writes'")
    for each in hosts.all:
        with each.session(PATIENCE) as session:
            until(lambda session=session: session.request("POST", "/deks", {"thread_id": "t"}).status == 201)
        until(lambda each=each: ready(each).status == 200)
        assert "Traceback" not in each.stderr
    daemon.stop()
    fleet_database.sql(f"UPDATE kms.kms SET value = '{junk}' WHERE name = 'store:writes'")
    daemon.start()
    until(lambda: ready(daemon).status == 200)
    ok(daemon, "POST", "/deks", {"thread_id": "t"}, 201)
    rows = fleet_database.sql("SELECT value::jsonb -> 'writes' FROM kms.kms WHERE value LIKE '{\"writes\":%'")
    assert any(isinstance(count, int) and count > 0 for (count,) in rows)


@pytest.mark.parametrize(
    "junk",
    [
        '{"active":[1,2,3],"keks":{"a":["x","y",7]},"change":1,"sum":"0","own":"0"}',
        '{"active":["a","b","c"],"keks":{},"change":1,"sum":"0","own":"0"}',
        '{"active":[1],"keks":{},"change":1,"sum":"0","own":"0"}',
        '{"active":null,"keks":{},"change":1e400,"sum":"0","own":"0"}',
        '{"active":null,"keks":{"a":null},"change":1,"sum":"0","own":"0"}',
    ],
)
def test_a_state_that_is_none_is_told(fleet_database: postgres.Fleet, junk: str) -> None:
    """By who has no key, too: `store status`, `export`."""
    fleet_database.sql(f"INSERT INTO kms.kms VALUES ('h', 'store:state', '{junk}')")
    with pytest.raises(StoreDamaged, match="can't be read"):
        status(fleet_database.link())
    with pytest.raises(StoreDamaged, match="can't be read"):
        fleet_database.reader().keks()


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


@pytest.mark.parametrize("table", ["fleet", "changes"])
def test_a_change_that_nobody_would_hear_of_is_none(
    fleet_database: postgres.Fleet, hosts: Hosts, table: str
) -> None:
    """The engine wrote the row, dropped what tells the other hosts of it (a trigger can), and said that all
    is well: they went on to encrypt under a DEK that was answered to be disabled."""
    one, two = hosts.all
    key_id = ok(one, "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    fleet_database.sql(
        "CREATE FUNCTION kms.nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        f"CREATE TRIGGER t BEFORE INSERT OR UPDATE ON kms.{table} FOR EACH ROW "
        "EXECUTE FUNCTION kms.nothing()",
    )
    try:
        with one.session(PATIENCE) as a, two.session(PATIENCE) as b:
            assert use(b, key_id) == 200
            assert a.request("POST", f"/deks/{key_id}/disable", {}).code == "store_contended"
            assert use(b, key_id) == use(a, key_id) == 200
    finally:
        fleet_database.sql(f"DROP TRIGGER t ON kms.{table}", "DROP FUNCTION kms.nothing")
    with one.session(PATIENCE) as a, two.session(PATIENCE) as b:
        assert a.request("POST", f"/deks/{key_id}/disable", {}).status == 200
        assert use(b, key_id) == use(a, key_id) == 423


def test_a_count_of_uses_without_end_stops_no_write(fleet_database: postgres.Fleet) -> None:
    """Uses come with what else a host writes: one more than the engine's largest number failed all of it."""
    store = fleet_database.store(memoryview(bytes(32)))
    most, least = 2**63 - 1, -(2**63)
    fleet_database.sql(
        f"INSERT INTO kms.usage VALUES ('{KEK_ROW}x', {most}, {most}, {least}, {most}, {least})"
    )
    with store.transaction():
        store.count([(KEK_ROW + "x", Usage(1, 1, 1, 1, 1))])
        store.write("probe", {})
    assert store.usage([KEK_ROW + "x"])[KEK_ROW + "x"].encrypts == 2**53 + 1


@pytest.fixture
def altered(fleet_database: postgres.Fleet) -> Iterator[postgres.Fleet]:
    """What a test leaves of its tables is nobody's."""
    yield fleet_database
    fleet_database.again()


@pytest.mark.parametrize(
    ("done", "undone", "says"),
    [
        ("ALTER TABLE {} SET UNLOGGED", "ALTER TABLE {} SET LOGGED", "the table kms.deks is UNLOGGED"),
        (
            "ALTER TABLE {} ENABLE ROW LEVEL SECURITY",
            "ALTER TABLE {} DISABLE ROW LEVEL SECURITY",
            "the table kms.deks has row security",
        ),
        (
            "CREATE RULE r AS ON DELETE TO {} DO INSTEAD NOTHING",
            "DROP RULE r ON {}",
            "the table kms.deks has rules",
        ),
        (
            "ALTER TABLE {} DROP CONSTRAINT deks_pkey",
            "ALTER TABLE {} ADD PRIMARY KEY (key_id)",
            "primary key",
        ),
        (
            "ALTER TABLE {} ALTER value TYPE jsonb USING value::jsonb",
            "ALTER TABLE {} ALTER value TYPE text",
            "the column value of the table kms.deks is no more text NOT NULL",
        ),
        (
            "ALTER TABLE {} ALTER value DROP NOT NULL",
            "ALTER TABLE {} ALTER value SET NOT NULL",
            "the column value of the table kms.deks is no more text NOT NULL",
        ),
        (
            "ALTER TABLE {} ALTER kek_id TYPE text COLLATE pg_catalog.default",
            'ALTER TABLE {} ALTER kek_id TYPE text COLLATE "C"',
            'the column kek_id of the table kms.deks is no more text COLLATE "C" NOT NULL',
        ),
        (
            "ALTER TABLE {} RENAME rev TO ver",
            "ALTER TABLE {} RENAME ver TO rev",
            "the column rev of the table",
        ),
        (
            "ALTER TABLE {} RENAME TO real; CREATE VIEW {} AS TABLE kms.real; ALTER VIEW {} OWNER TO kms",
            "DROP VIEW {}; ALTER TABLE kms.real RENAME TO deks",
            "the table kms.deks is not there, or is no table",
        ),
    ],
    ids=["unlogged", "row security", "rule", "key", "type", "null", "collation", "renamed", "view"],
)
def test_a_table_that_was_altered_is_told(altered: postgres.Fleet, done: str, undone: str, says: str) -> None:
    """By a hand that meant well, or a restore that left something out. An unlogged table is empty after the
    engine's next crash; row security made a DEK that is there one that is absent; all else were faults of
    ours, deep within."""
    link = altered.link()
    altered.sql("ALTER TABLE kms.deks ADD later int DEFAULT 1")  # as the next release may do
    schema.check(link)
    assert not any("kms.deks" in one for one in status(link)["warnings"])
    for statement in done.replace("{}", "kms.deks").split("; "):
        altered.sql(statement)
    with pytest.raises(StoreDamaged) as caught:
        schema.check(link)
    assert says in caught.value.message and caught.value.hint
    assert any(says in one for one in status(link)["warnings"])
    for statement in undone.replace("{}", "kms.deks").split("; "):
        altered.sql(statement)
    schema.check(link)


def test_row_security_makes_no_dek_absent(altered: postgres.Fleet, make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(configured(altered), workers=1)
    key_id = ok(daemon, "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    altered.sql(
        "ALTER TABLE kms.deks ENABLE ROW LEVEL SECURITY", "ALTER TABLE kms.deks FORCE ROW LEVEL SECURITY"
    )
    with daemon.session(PATIENCE) as session:
        assert use(session, key_id) == 500
        assert session.request("GET", f"/deks/{key_id}").code == "config"
    altered.sql("ALTER TABLE kms.deks DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY")
    with daemon.session(PATIENCE) as session:
        assert use(session, key_id) == 200


def test_a_value_that_is_no_text_is_a_damaged_row(altered: postgres.Fleet) -> None:
    reader = altered.reader()
    altered.sql(
        "ALTER TABLE kms.deks ALTER value DROP NOT NULL",
        "INSERT INTO kms.deks VALUES ('k', 't', NULL, '', 1)",
    )
    for ask in (lambda: reader.get("k"), lambda: reader.page("", 9)):
        with pytest.raises(StoreDamaged, match="the row of key k can't be read"):
            ask()
    assert reader.added_up() == ({}, 0)
    altered.sql("DELETE FROM kms.deks", "ALTER TABLE kms.deks ALTER value SET NOT NULL")


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("gen", "-1", "its gen is -1"),
        ("fleet", "NULL", "its fleet is NULL"),
        ("version", "-1", "its version is"),
    ],
)
def test_a_fleet_s_row_that_can_t_be_is_told(
    altered: postgres.Fleet, hosts: Hosts, column: str, value: str, says: str
) -> None:
    """Each heartbeat of each host was a fault of ours, with its traceback."""
    if value == "NULL":
        altered.sql(f"ALTER TABLE kms.fleet ALTER {column} DROP NOT NULL")
    ((was,),) = altered.sql(f"SELECT {column} FROM kms.fleet")
    altered.sql(f"UPDATE kms.fleet SET {column} = {value}")
    for daemon in hosts.all:
        until(lambda daemon=daemon: says.encode() in ready(daemon).body)
    altered.sql(f"UPDATE kms.fleet SET {column} = '{was}'")
    for daemon in hosts.all:
        until(lambda daemon=daemon: ready(daemon).status == 200)
        ok(daemon, "POST", "/deks", {"thread_id": "t"}, 201)
        assert "Traceback" not in daemon.stderr


def test_a_host_s_row_that_can_t_be_is_told(altered: postgres.Fleet) -> None:
    altered.sql(
        "ALTER TABLE kms.hosts ALTER keks DROP NOT NULL",
        "INSERT INTO kms.hosts VALUES ('x', 'y', '', 0, 0, NULL, false)",
    )
    with pytest.raises(StoreDamaged, match="a row of kms.hosts has a NULL: x"):
        status(altered.link())
