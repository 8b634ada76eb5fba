"""Somebody with the role of the daemons writes rows by hand. Rows can be destroyed so; but no daemon takes
what decides about keys from a row that carries no MAC, and none ends for one that is of no use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

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
from tests.store.test_contract import dek, put

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
    assert store.usage([KEK_ROW + "x"])[KEK_ROW + "x"].encrypts == 2**53 - 1


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


# ---- rows that carry no MAC, and columns beside those that do --------------------------------------------

MOST, LEAST = 2**63 - 1, -(2**63)


def loose(database: postgres.Fleet, table: str, *columns: str) -> None:
    """Let them be NULL, as nobody's tables do."""
    database.sql(*(f"ALTER TABLE kms.{table} ALTER {column} DROP NOT NULL" for column in columns))


def quiet(hosts: Hosts) -> None:
    for daemon in hosts.all:
        assert "Traceback" not in daemon.stderr, daemon.stderr


def test_a_change_that_is_still_to_come_stops_no_host(fleet_database: postgres.Fleet, hosts: Hosts) -> None:
    """Each host followed the next change, and then this one: it had seen what was not there yet, took the
    engine for an old primary's, and served no more, also once the row was gone."""
    one, two = hosts.all
    key_id = ok(one, "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    fleet_database.sql("INSERT INTO kms.changes SELECT gen + 2, 'key', 'x' FROM kms.fleet")
    ok(one, "POST", f"/deks/{key_id}/disable", {})
    ((gen,),) = fleet_database.sql("SELECT gen FROM kms.fleet")
    for daemon in hosts.all:
        with daemon.session(PATIENCE) as session:
            assert use(session, key_id) == 423
    until(lambda: fleet_database.sql("SELECT DISTINCT seen FROM kms.hosts") == [(gen,)])
    with two.session(PATIENCE) as session:
        told = session.request("POST", f"/deks/{key_id}/enable", {})
    assert told.status == 503 and b"a number that is still to come" in told.body, told.body
    assert b"DELETE FROM kms.changes WHERE gen >" in told.body
    assert any("no change can be made" in one for one in status(fleet_database.link())["warnings"])
    ok(two, "POST", "/deks", {"thread_id": "t"}, 201)
    fleet_database.sql("DELETE FROM kms.changes WHERE gen > (SELECT gen FROM kms.fleet)")
    ok(two, "POST", f"/deks/{key_id}/enable", {})
    assert not any("no change" in one for one in status(fleet_database.link())["warnings"])
    for daemon in hosts.all:
        ok(daemon, "GET", "/readyz")
        with daemon.session(PATIENCE) as session:
            assert use(session, key_id) == 200
    quiet(hosts)


def test_a_change_of_nobody_knows_what_is_of_all(altered: postgres.Fleet, hosts: Hosts) -> None:
    """A NULL ended the thread that keeps a host's place, with a traceback."""
    key_id = ok(hosts.all[0], "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    loose(altered, "changes", "kind", "key_id")
    before = altered.sql("SELECT host, inc FROM kms.hosts ORDER BY host")
    for kind, name in (("'key'", "NULL"), ("NULL", "NULL"), ("NULL", "'x'")):
        altered.sql(
            "UPDATE kms.fleet SET gen = gen + 1",
            f"INSERT INTO kms.changes SELECT gen, {kind}, {name} FROM kms.fleet",
            "NOTIFY kms",
        )
    ((gen,),) = altered.sql("SELECT gen FROM kms.fleet")
    until(lambda: altered.sql("SELECT DISTINCT seen FROM kms.hosts") == [(gen,)])
    assert altered.sql("SELECT host, inc FROM kms.hosts ORDER BY host") == before
    for daemon in hosts.all:
        with daemon.session(PATIENCE) as session:
            assert use(session, key_id) == 200
    quiet(hosts)


USAGE = ("encrypts", "decrypts", "first", "last", "uid")


@pytest.mark.parametrize("value", [str(MOST), str(LEAST), "NULL"])
def test_uses_that_can_t_be_are_told_as_what_can(altered: postgres.Fleet, hosts: Hosts, value: str) -> None:
    """They went into backups and exports, and `restore` and `import` refused all of it."""
    one = hosts.all[0]
    key_id = ok(one, "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    altered.sql(f"INSERT INTO kms.usage VALUES ('{key_id}', 0, 0, 0, 0, 0) ON CONFLICT DO NOTHING")
    loose(altered, "usage", *USAGE)
    altered.sql(f"UPDATE kms.usage SET {', '.join(f'{column} = {value}' for column in USAGE)}")
    (found,) = altered.reader().usage([key_id]).values()
    assert all(-(name == "uid") <= number < 1 << 53 for name, number in found._asdict().items())
    store = altered.store(host="other")
    with store.transaction():
        store.count([(key_id, Usage(1, 1, 1, 1, 1))])
    told = altered.sql(f"SELECT encrypts FROM kms.usage WHERE key_id = '{key_id}'")
    assert told == [(2**53 + 1 if value == str(MOST) else 1,)]
    with one.session(PATIENCE) as session:
        assert use(session, key_id) == (409 if value == str(MOST) else 200)
        session.ok("GET", f"/deks/{key_id}")
    assert one.cli("list", "--socket", str(one.socket)).returncode == 0
    quiet(hosts)


def test_a_name_that_is_no_key_s_is_warned_of_by_nobody(fleet_database: postgres.Fleet) -> None:
    """It went to the journal and to readyz as it stood, with what a terminal does of it."""
    fleet_database.sql(
        f"INSERT INTO kms.usage VALUES (E'\\x1b[31mx\\ny', {MOST}, 1, 1, 1, 1), (E'{KEK_ROW}x\\n', {MOST}, "
        f"1, 1, 1, 1), ('k_1', {MOST}, 1, 1, 1, 1), ('{KEK_ROW}00aa', {2**31}, 1, 1, 1, 1)"
    )
    assert fleet_database.reader().heavy() == {"k_1": 2**53 - 1, KEK_ROW + "00aa": 2**31}


@pytest.mark.parametrize("rev", [MOST, -1, LEAST, "NULL"])
def test_a_number_of_writes_that_can_t_be_holds_up_no_change(
    altered: postgres.Fleet, hosts: Hosts, rev: object
) -> None:
    """Such a DEK could be disabled and shredded no more: 503 of the engine, or a fault of ours."""
    one, two = hosts.all
    key_id = ok(one, "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    loose(altered, "deks", "rev")
    altered.sql(f"UPDATE kms.deks SET rev = {rev} WHERE key_id = '{key_id}'")
    ok(one, "POST", f"/deks/{key_id}/disable", {})
    ok(two, "POST", f"/deks/{key_id}/enable", {})
    ok(two, "DELETE", f"/deks/{key_id}", {"immediately": True})
    ((rev,),) = altered.sql(f"SELECT rev FROM kms.deks WHERE key_id = '{key_id}'")
    assert isinstance(rev, int) and rev < 2**62 + 4
    quiet(hosts)


def test_an_entry_of_an_erasure_that_is_none_stops_no_deletion(
    fleet_database: postgres.Fleet, hosts: Hosts
) -> None:
    """One that is no JSON made each look of each host at what is due fail: nothing scheduled was shredded."""
    one = hosts.all[0]
    key_id = ok(one, "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    fleet_database.sql("INSERT INTO kms.kms VALUES ('', 'erasure:x', 'junk'), ('', 'erasure:y', '[7]')")
    ok(one, "DELETE", f"/deks/{key_id}", {"immediately": True})
    assert hosts.rotate().status == 200
    until(lambda: fleet_database.sql("SELECT name FROM kms.kms WHERE name LIKE 'erasure:k%'") == [])
    assert "can't be looked at" not in one.stderr
    quiet(hosts)


def compared(fleet: postgres.Fleet) -> Any:
    """In a rotation whose comparison is at its end."""
    store = fleet.store(memoryview(bytes(32)))
    put(store, dek("a"), dek("b"))
    with store.transaction():
        store.staging(True)
        store.stage([dek("a"), dek("b")])
    assert store.check_staged("", 9) == "b"
    return store


def test_marks_that_are_none_end_no_rotation_with_a_fault_of_ours(altered: postgres.Fleet) -> None:
    loose(altered, "touched", "key_id", "was", "now")
    store = compared(altered)
    altered.sql("INSERT INTO kms.touched VALUES (NULL, NULL, NULL), ('k', NULL, 'x'), ('a', 'x', NULL)")
    assert store.touched(9) == [dek("a")]
    assert store.check_staged("b", 9) == ""
    with store.transaction():
        store.staging(False)


@pytest.mark.parametrize(("now", "names"), [("x", True), ("A" * 43 + "=", False)])
def test_a_forged_mark_that_stops_a_rotation(altered: postgres.Fleet, now: str, names: bool) -> None:
    """It was told as a row that was deleted, or put back, and `verify` then found nothing."""
    store = compared(altered)
    ((row,),) = altered.sql("SELECT value FROM kms.deks WHERE key_id = 'a'")
    altered.sql(f"INSERT INTO kms.touched VALUES ('a', '{json.loads(row)['mac']}', '{now}')")
    with pytest.raises(StoreDamaged, match="don't add up") as caught:
        store.check_staged("b", 9)
    assert ("no host made, of a" in caught.value.message) == names
    assert "wrote into `touched`: rotate again" in caught.value.hint
    with store.transaction():
        store.staging(False)
        store.staging(True)
        store.stage([dek("a"), dek("b")])
    assert store.check_staged(store.check_staged("", 9), 9) == ""
    with store.transaction():
        store.staging(False)


@pytest.mark.parametrize("junk", ["7", "", "no json"])
def test_a_row_that_is_none_keeps_nobody_from_the_others(
    fleet_database: postgres.Fleet, hosts: Hosts, junk: str
) -> None:
    one = hosts.all[0]
    bad, good = (ok(one, "POST", "/deks", {"thread_id": "t"}, 201)["key_id"] for _ in range(2))
    fleet_database.sql(f"UPDATE kms.deks SET value = '{junk}' WHERE key_id = '{bad}'")
    for path in ("/deks", "/deks?thread_id=t"):
        rows = ok(one, "GET", path)["deks"]
        assert [(row["key_id"], row["state"]) for row in rows] == [(bad, "damaged"), (good, "enabled")]
    reply = one.request("GET", f"/deks/{bad}")
    assert (reply.status, reply.code) == (500, "store_damaged") and bad.encode() in reply.body


def test_columns_that_say_something_else_than_the_row(fleet_database: postgres.Fleet, hosts: Hosts) -> None:
    """By them a thread's DEKs are found, to be shredded: one was missed, or another thread's was shredded."""
    one = hosts.all[0]
    mine, other = (ok(one, "POST", "/deks", {"thread_id": name}, 201)["key_id"] for name in ("t", "u"))
    fleet_database.sql(f"UPDATE kms.deks SET thread_id = 't' WHERE key_id = '{other}'")
    with one.session(PATIENCE) as session:
        told = session.request("GET", "/deks?thread_id=t")
        assert told.code == "store_damaged" and other.encode() in told.body
        assert [row["key_id"] for row in session.ok("GET", "/deks")["deks"]] == [mine, other]
    fleet_database.sql(f"UPDATE kms.deks SET kek_id = '' WHERE key_id = '{mine}'")
    verified = one.offline("verify")
    assert verified.returncode == 1 and verified.stderr.count(b"by which it is found") == 2, verified
    assert hosts.rotate().status == 200
    assert one.offline("verify").returncode == 0
    assert [row["key_id"] for row in ok(one, "GET", "/deks?thread_id=u")["deks"]] == [other]


@pytest.mark.parametrize("junk", ["7", "", "x" * 200])
def test_a_row_that_is_junk_after_it_was_staged(altered: postgres.Fleet, junk: str) -> None:
    store = altered.store(memoryview(bytes(32)))
    put(store, dek("a"), dek("b"))
    with store.transaction():
        store.staging(True)
        store.stage([dek("a"), dek("b")])
    altered.sql(f"UPDATE kms.deks SET value = '{junk}' WHERE key_id = 'b'")
    with pytest.raises(StoreDamaged, match="the DEK b was overwritten by hand"):
        store.check_staged(store.check_staged("", 9), 9)
    with store.transaction():
        store.staging(False)


def test_a_table_that_somebody_made_beside_ours_is_let_alone(altered: postgres.Fleet, hosts: Hosts) -> None:
    """Its name begins as those do that rotations leave: each rotation failed by a fault of ours, at its end,
    and each shred looked for its DEK there."""
    one = hosts.all[0]
    key_id = ok(one, "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    altered.sql(
        "CREATE TABLE kms.deks_old_copy (note text)",
        'CREATE TABLE kms."deks_old_1 x" (note text)',
        "ALTER TABLE kms.deks_old_copy OWNER TO kms",
        'ALTER TABLE kms."deks_old_1 x" OWNER TO kms',
    )
    ok(one, "DELETE", f"/deks/{key_id}", {"immediately": True})
    ok(one, "POST", "/deks", {"thread_id": "t"}, 201)
    reply = hosts.rotate()
    assert reply.status == 200 and reply.json()["backup"] == "deks_old_1", reply.body
    told = one.offline("backups", "list", "--json")
    assert told.returncode == 0 and told.stdout.count(b"deks_old") == 1, told
    assert one.offline("backups", "prune", "--keep", "1").returncode == 0
    ((left,),) = altered.sql("SELECT count(*) FROM pg_tables WHERE tablename LIKE 'deks_old%'")
    assert left == 3
    quiet(hosts)
