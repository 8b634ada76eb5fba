"""`store init`, `store migrate`, `store status`: the commands of a fleet's tables."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import pwd
import re
import shutil
import sqlite3
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.errors import StoreUnavailable
from progressdb_kms.tools import asowner, backup, datadir
from tests.harness import Daemon, cli, postgres
from tests.harness.daemon import REPO, write_secret
from tests.harness.faults import Shim
from tests.harness.postgres import Fleet, Postgres
from tests.harness.procs import wait_until

needs = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing() or "")


class Place:
    """A host's configuration, and the fleet that it names."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        self.fleet = fleet
        self.file = folder / "kms.yaml"
        where = fleet.where
        self.text = (
            f"data_dir: {folder}/data\nstore: postgresql\npostgresql:\n  hosts: {where.folder}\n"
            f"  database: {where.database}\n  user: {where.user}\n"
        )
        self.write(self.text)

    def write(self, text: str) -> None:
        self.file.touch(0o600)
        self.file.write_text(text)

    def run(self, *words: str) -> Any:
        return cli("store", *words, "--config", str(self.file))

    def refused(self, *words: str) -> str:
        done = self.run(*words)
        assert done.returncode == 1 and done.stdout == b"" and done.stderr.count(b"\n") == 1
        return str(done.stderr.decode())


@pytest.fixture
def place(tmp_path: Path, fleet_database: Fleet) -> Iterator[Place]:
    yield Place(tmp_path, fleet_database)
    if not fleet_database.sql("SELECT 1 FROM pg_tables WHERE schemaname = 'kms'"):
        fleet_database.again()


@needs
class TestInit:
    def test_a_fresh_one(self, place: Place) -> None:
        place.fleet.sql("DROP SCHEMA kms CASCADE")
        assert "holds no fleet" in place.refused("status")
        done = place.run("init", "--json")
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        assert made["schema"] == 1 and len(made["fleet"]) == 32
        assert place.fleet.sql("SELECT fleet, gen, active_kek FROM kms.fleet") == [(made["fleet"], 0, "")]

    def test_one_that_is_there_stays(self, place: Place) -> None:
        before = place.fleet.sql("SELECT * FROM kms.fleet")
        assert "holds a fleet already: nothing was changed" in place.refused("init")
        assert place.fleet.sql("SELECT * FROM kms.fleet") == before

    def test_a_database_of_somebody_else(self, place: Place, postgres_server: Postgres) -> None:
        database = postgres_server.database()
        postgres_server.sql(f"ALTER DATABASE {database.name} OWNER TO postgres")
        place.write(
            place.text.replace(f"database: {place.fleet.where.database}", f"database: {database.name}")
        )
        text = place.refused("init")
        assert "does not let kms do that" in text and "must be kms's" in text


@needs
class TestMigrate:
    def test_there_is_nothing_to_do(self, place: Place) -> None:
        done = place.run("migrate", "--json")
        assert json.loads(done.stdout) == {"schema": 1, "was": 1}

    def test_a_newer_one_is_refused(self, place: Place) -> None:
        place.fleet.sql("UPDATE kms.fleet SET schema = 2, least = 2")
        text = place.refused("migrate")
        assert "has schema 2, and this release knows 1" in text and "install the release" in text

    def test_an_older_one_is_brought_up(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        """As the next release will do it: each step in turn, all in one transaction."""
        from progressdb_kms.errors import StoreDamaged
        from progressdb_kms.fleet import schema

        monkeypatch.setattr(schema, "VERSION", 3)
        steps = {1: ("ALTER TABLE hosts ADD COLUMN more text",), 2: ("ALTER TABLE hosts DROP COLUMN more",)}
        monkeypatch.setattr(schema, "MIGRATIONS", steps)
        link = place.fleet.link()
        with pytest.raises(StoreDamaged, match="has schema 1") as caught:
            schema.check(link)
        assert "store migrate" in caught.value.hint
        assert schema.migrate(link) == (1, 3)
        monkeypatch.setattr(schema, "VERSION", 2)
        assert schema.check(link).schema == 3  # the release before the newest goes on beside it
        monkeypatch.setattr(schema, "VERSION", 1)
        with pytest.raises(StoreDamaged, match="this release knows 1"):
            schema.check(link)
        monkeypatch.setattr(schema, "VERSION", 5)
        monkeypatch.setattr(schema, "MIGRATIONS", {3: steps[1], 4: ("SELECT nothing",)})
        with pytest.raises(StoreDamaged):
            schema.migrate(link)
        monkeypatch.setattr(schema, "VERSION", 3)
        assert schema.check(link).schema == 3
        columns = (
            "SELECT 1 FROM information_schema.columns WHERE table_name = 'hosts' AND column_name = 'more'"
        )
        assert place.fleet.sql(columns) == []

    def test_two_releases_side_by_side(
        self, place: Place, make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What comes after this release will add columns. This one goes on beside it, and starts anew."""
        from progressdb_kms.fleet import schema

        daemon = make_daemon(place.fleet.configured(), workers=1)
        tables = ("fleet", "deks", "kms", "usage", "hosts", "changes", "touched")
        steps = tuple(f"ALTER TABLE {name} ADD COLUMN later text DEFAULT 'x'" for name in tables)
        monkeypatch.setattr(schema, "MIGRATIONS", {schema.VERSION: steps})
        monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
        was, now = schema.migrate(place.fleet.link())
        assert now == was + 1
        for again in (False, True):
            if again:
                daemon.stop()
                daemon.start()
            with daemon.session() as kms:
                key_id = kms.create_dek("t")["key_id"]
                assert kms.decrypt(key_id, kms.encrypt(key_id, b"hello")) == b"hello"
                kms.ok("POST", f"/deks/{key_id}/disable", {})
                kms.ok("POST", f"/deks/{key_id}/enable", {})
                kms.ok("GET", "/deks")
                kms.ok("DELETE", f"/deks/{key_id}", {"immediately": True})
        daemon.stop()
        daemon.offline("verify")
        place.fleet.again()


@needs
class TestStatus:
    def test_of_an_empty_one(self, place: Place) -> None:
        done = place.run("status")
        assert done.returncode == 0 and b"PostgreSQL" in done.stdout and b"active_kek" in done.stdout
        assert b"waits for no standby" in done.stderr and b"fsync is off" in done.stderr

    def test_hosts_and_keks(self, place: Place) -> None:
        from progressdb_kms.store.seal import KekCount
        from tests.store.test_contract import KEY, OLD, dek, put

        one, two = place.fleet.store(KEY, "one"), place.fleet.store(KEY, "two")
        with one.transaction():
            one.activate(OLD, 1, "2026")
        two.acting = OLD
        put(one, dek("a"), dek("b"))
        put(two, dek("a", state="disabled"))
        assert one.keks() == {OLD: KekCount(1, 2, dek("a").created_at)}
        place.fleet.sql(
            f"UPDATE kms.hosts SET name = 'first', seen = 2, keks = '{{{OLD}}}' WHERE host = 'one'",
            "UPDATE kms.hosts SET name = 'second', fenced = true WHERE host = 'two'",
        )
        done = place.run("status", "--json")
        found = json.loads(done.stdout)
        assert (found["fleet"]["active_kek"], found["fleet"]["gen"], found["deks"]) == (OLD, 2, {OLD: 2})
        assert [(h["name"], h["behind"], h["fenced"], h["keks"]) for h in found["hosts"]] == [
            ("first", 0, False, [OLD]),
            ("second", 2, True, []),
        ]
        assert any("second (two) is fenced" in warning for warning in found["warnings"])
        text = place.run("status").stdout.decode()
        assert "first" in text and "fenced" in text and OLD in text

    def test_a_host_that_is_gone_is_forgotten(self, place: Place) -> None:
        place.fleet.sql(
            "INSERT INTO kms.hosts VALUES ('x', '1', 'gone', 0, 0, '{}', true)",
            "INSERT INTO kms.hosts VALUES ('x', '2', 'gone', 0, 0, '{}', true)",
            "INSERT INTO kms.hosts VALUES ('y', '1', 'here', 0, 0, '{}', false)",
        )
        assert "here is not fenced" in place.refused("forget", "here")
        assert "knows no host nobody" in place.refused("forget", "nobody")
        assert json.loads(place.run("forget", "gone", "--json").stdout) == {"host": "gone", "forgotten": 2}
        assert place.fleet.sql("SELECT name FROM kms.hosts") == [("here",)]

    def test_a_host_whose_name_another_took_over_is_forgotten(self, place: Place) -> None:
        """The machine was lost, and the one in its place has its name: what is to go is told, and goes."""
        lost, new = "1" * 32, "2" * 32
        place.fleet.sql(
            f"INSERT INTO kms.hosts VALUES ('{lost}', '1', 'chat-7', 0, 0, '{{}}', true)",
            f"INSERT INTO kms.hosts VALUES ('{new}', '1', 'chat-7', 0, 0, '{{}}', false)",
        )
        told = place.run("status")
        assert re.search(rf"^chat-7 +{lost} .* fenced", told.stdout.decode(), re.M)
        assert re.search(rf"^chat-7 +{new} ", told.stdout.decode(), re.M)
        assert f"chat-7 ({lost}) is fenced" in told.stderr.decode()
        assert json.loads(place.run("forget", "chat-7", "--json").stdout)["forgotten"] == 1
        assert place.fleet.sql("SELECT host FROM kms.hosts") == [(new,)]
        assert "chat-7 is not fenced" in place.refused("forget", "chat-7")

    def test_a_newer_schema_is_shown(self, place: Place) -> None:
        place.fleet.sql("UPDATE kms.fleet SET schema = 2, least = 2")
        assert json.loads(place.run("status", "--json").stdout)["fleet"]["schema"] == 2

    def test_nobody_there(self, place: Place, tmp_path: Path) -> None:
        place.write(place.text.replace(place.fleet.where.folder, str(tmp_path)))
        assert "can't be reached" in place.refused("status")


class TestConfiguration:
    """What needs no database."""

    def refused(self, folder: Path, text: str, *words: str) -> str:
        file = folder / "kms.yaml"
        file.touch(0o600)
        file.write_text(text)
        done = cli(*(words or ("store", "status")), "--config", str(file))
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1, done.stderr
        return done.stderr.decode()

    def test_no_fleet(self, tmp_path: Path) -> None:
        text = self.refused(tmp_path, f"data_dir: {tmp_path}/data\n")
        assert "the configuration has no fleet" in text and "store: postgresql" in text

    @needs
    def test_no_block(self, tmp_path: Path) -> None:
        assert "nothing says where" in self.refused(tmp_path, "store: postgresql\n")

    @needs
    def test_a_block_that_is_wrong(self, tmp_path: Path) -> None:
        block = "store: postgresql\npostgresql: {hosts: [db1], database: kms, user: kms, password_file: p}\n"
        assert "tls_ca is missing" in self.refused(tmp_path, block)

    @pytest.fixture
    def whole(self, tmp_path: Path) -> str:
        key = tmp_path / "kek"
        key.touch(0o600)
        key.write_bytes(bytes(range(100, 132)))
        block = "store: postgresql\npostgresql: {hosts: /run/postgresql, database: kms, user: kms}\n"
        return f"master_key_file: {key}\ndata_dir: {tmp_path}/data\nsocket: {tmp_path}/s\n{block}"

    def test_what_does_not_work_says_so(self, tmp_path: Path, whole: str) -> None:
        text = self.refused(tmp_path, whole, "restore", "--snapshot", "d", "--key", "k")
        assert "not this host's own" in text
        assert not (tmp_path / "data").exists()

    @pytest.mark.parametrize(
        "command",
        [
            "status",
            "metrics",
            "list",
            "shred k --now",
            "rewrap k --new-key-file {}/kek",
            "rotate-kek --kek-id 0",
        ],
    )
    def test_commands_for_the_socket_take_it(self, tmp_path: Path, whole: str, command: str) -> None:
        """They want nothing of it but the socket's path, and refused it as no host's own."""
        text = self.refused(tmp_path, whole, *command.format(tmp_path).split())
        assert f"can't connect to {tmp_path}/s: there is no such socket" in text

    def test_so_does_the_one_that_asks_the_rules(self, tmp_path: Path, whole: str) -> None:
        file = tmp_path / "kms.yaml"
        file.write_text(whole)
        done = cli("policy", "test", "--uid", "7", "--op", "list", "--config", str(file))
        assert done.returncode == 0, done.stderr

    @needs
    def test_before_the_first_start_root_comes_as_the_package_s_user(
        self, tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There is no data-dir yet that would tell: `store init` met the daemon's password file as root."""
        file, came = tmp_path / "kms.yaml", list[int]()
        file.write_text(whole.replace("/run/postgresql", str(tmp_path)))
        monkeypatch.setattr(asowner, "PACKAGED_CONFIG", str(file))
        monkeypatch.setattr(
            pwd, "getpwnam", lambda name: pwd.struct_passwd((name, "", 12345, 12345, "", "", ""))
        )
        with asowner.load_config({"config": str(file)}, need_key=False, fleet=True) as loaded:
            monkeypatch.setattr(asowner, "acting_as", lambda uid: contextlib.nullcontext(came.append(uid)))
            with pytest.raises(StoreUnavailable), datadir.fleet_link(loaded.settings):
                pytest.fail("nobody is there")
        assert came == [12345]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
    def test_root_reads_the_daemon_s_key_as_that_user(self, short_tmp: Path, whole: str) -> None:
        """As the packages make it: the configuration is root's, key and data-dir are the daemon's."""
        file, data = short_tmp / "kms.yaml", short_tmp / "data"
        short_tmp.chmod(0o755)
        data.mkdir(mode=0o700)
        write_secret(short_tmp / "kek", os.urandom(32))
        for path in (data, short_tmp / "kek"):
            os.chown(path, 12345, 12345)
        file.write_text(re.sub(r"(file|dir): \S+/", rf"\1: {short_tmp}/", whole))
        done = cli("doctor", "--json", "--config", str(file))
        (row,) = (row for row in json.loads(done.stdout)["checks"] if row["check"] == "config")
        assert row["level"] == "ok", row


class Host:
    """A host of the fleet, or one of its own: its folder, its key, its configuration."""

    def __init__(self, folder: Path, key: bytes, fleet: Fleet | None = None) -> None:
        folder.mkdir()
        self.folder, self.data = folder, folder / "data"
        self.file = folder / "kms.yaml"
        store = ""
        if fleet is not None:
            where = fleet.where
            store = (
                f"store: postgresql\npostgresql: {{hosts: {where.folder}, database: {where.database}, "
                f"user: {where.user}}}\n"
            )
        for path, text in (
            (folder / "kek", key),
            (self.file, f"master_key_file: kek\ndata_dir: data\nsocket: s\n{store}".encode()),
        ):
            path.touch(0o600)
            path.write_bytes(text)

    def run(self, *words: str, stdin: bytes = b"") -> bytes:
        done = cli(*words, "--config", str(self.file), stdin=stdin)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def refused(self, *words: str) -> bytes:
        done = cli(*words, "--config", str(self.file))
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1, done.stderr
        return done.stderr

    def refused_after_faults(self, *words: str) -> bytes:
        done = cli(*words, "--config", str(self.file))
        assert done.returncode == 1
        return done.stderr

    def doctor(self, check: str = "fleet") -> list[tuple[str, str]]:
        """What it finds of that: levels and texts."""
        done = cli("doctor", "--json", "--config", str(self.file))
        checks = json.loads(done.stdout)["checks"]
        return [(one["level"], one["text"]) for one in checks if one["check"] == check]

    def exported(self) -> dict[str, Any]:
        """By key_id: what a line says, but for what wraps it."""
        lines = [json.loads(line) for line in self.run("export").splitlines()]
        return {one.pop("key_id"): plain(one) for one in lines}


KEK = bytes(range(100, 132))


@needs
class TestThereAndBack:
    """From a host's own store into a fleet, and out of it: states, tombstones and uses come along."""

    def filled(self, daemon: Daemon) -> tuple[str, bytes]:
        """DEKs in every state, one of them used. Returns its id and a message."""
        with daemon.session() as kms:
            made = [kms.create_dek(f"room-{n % 3}")["key_id"] for n in range(9)]
            message = kms.encrypt(made[0], b"before")
            kms.ok("POST", f"/deks/{made[1]}/disable", {})
            kms.ok("DELETE", f"/deks/{made[2]}", {})
            kms.ok("DELETE", f"/deks/{made[3]}", {"immediately": True})
        return made[0], message

    def test_rehearsed(
        self, tmp_path: Path, fleet_database: Fleet, make_daemon: Callable[..., Daemon]
    ) -> None:
        daemon = make_daemon()
        key_id, message = self.filled(daemon)
        daemon.stop()
        kek = daemon.kek_file.read_bytes()
        lines = daemon.offline("export").stdout
        one, two = (Host(tmp_path / name, kek, fleet_database) for name in ("one", "two"))
        came = json.loads(one.run("import", "-", "--json", stdin=lines))
        assert (came["imported"], came["unchanged"], came["skipped"]) == (9, 0, 0)
        before = {found.pop("key_id"): found for found in map(json.loads, lines.splitlines())}
        assert one.exported() == two.exported() == {k: plain(row) for k, row in before.items()}
        again = json.loads(
            two.run("import", "-", "--json", stdin=lines)
        )  # another host: there is nothing to do
        assert (again["imported"], again["unchanged"]) == (0, 9)
        found = json.loads(one.run("store", "status", "--json"))
        assert sum(found["deks"].values()) == 8 and found["hosts"] == []
        back = make_daemon(start=False, kek=daemon.kek)
        back.offline("import", "-", stdin=two.run("export"))
        back.offline("verify")
        lines = back.offline("export").stdout
        assert {
            found.pop("key_id"): plain(found) for found in map(json.loads, lines.splitlines())
        } == one.exported()
        with back.start().session() as kms:
            assert kms.decrypt(key_id, message) == b"before"

    def test_a_backup_and_back(
        self, tmp_path: Path, fleet_database: Fleet, make_daemon: Callable[..., Daemon]
    ) -> None:
        """Of the fleet as it is at one moment: into a store of a host's own, and into another fleet."""
        daemon = make_daemon()
        key_id, message = self.filled(daemon)
        daemon.stop()
        kek = daemon.kek_file.read_bytes()
        one, two = (Host(tmp_path / name, kek, fleet_database) for name in ("one", "two"))
        one.run("import", "-", stdin=daemon.offline("export").stdout)
        file = tmp_path / "backup"
        made = json.loads(one.run("backup", str(file), "--json"))
        assert (made["deks"], made["shredded"]) == (8, 1)
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["backup"]
        assert not list(tmp_path.glob(".*"))
        one.run("backup", "--check", str(file))
        assert len(json.loads(one.run("backup", str(tmp_path), "--keep", "1", "--json"))["removed"]) == 0
        assert [level for level, text in one.doctor("backup") if "a drill passed" in text] == ["ok"]
        assert "of the fleet was ever made on this host" in two.doctor("backup")[0][1]
        assert b"never been one of the fleet" in two.refused("backup", str(tmp_path / "other"))
        before = one.exported()
        assert b"not empty" in one.refused("restore", str(file))
        fleet_database.again()
        for name in ("one", "two"):  # hosts that follow begin with a data-dir of their own
            shutil.rmtree(tmp_path / name / "data", ignore_errors=True)
        told = json.loads(two.run("restore", str(file), "--json"))
        assert (told["deks"], told["shredded"]) == (8, 1)
        assert one.exported() == before
        back = make_daemon(start=False, kek=daemon.kek)
        back.offline("restore", str(file))
        back.offline("verify")
        with back.start().session() as kms:
            assert kms.decrypt(key_id, message) == b"before"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
    def test_a_backup_by_root_into_the_daemon_s_folder(self, short_tmp: Path, fleet_database: Fleet) -> None:
        """Configuration root's, the rest the daemon's, as the packages make it: it was refused there."""
        host, folder = Host(short_tmp / "one", KEK, fleet_database), short_tmp / "backups"
        folder.mkdir(mode=0o700)
        host.run("import", "-", stdin=_wrapped(KEK, "k_1"))
        for path in (short_tmp, host.folder, host.file):
            path.chmod(0o755)
        for path in (folder, host.data, *host.data.rglob("*"), host.folder / "kek"):
            os.chown(path, 12345, 12345)
        server = fleet_database.server.folder
        server.chmod(0o755)  # for the daemon's user
        try:
            left = folder / f".kms-{(host.data / 'kms.host').read_text()[:8]}-1.backup.fleet"
            left.mkdir(0o700)
            os.chown(left, 12345, 12345)
            words = ((str(folder / "b"),), (str(folder), "--keep", "1"))
            made = [json.loads(host.run("backup", *one, "--json")) for one in words]
            assert {path.stat().st_uid for path in folder.iterdir()} == {12345}
            assert sorted(map(str, folder.iterdir())) == sorted(one["file"] for one in made)
            host.run("verify")
        finally:
            server.chmod(0o700)

    def test_what_a_restore_refuses_and_what_it_keeps(
        self, tmp_path: Path, fleet_database: Fleet, make_daemon: Callable[..., Daemon]
    ) -> None:
        """An edited backup comes into no fleet; what was rotated out before stays so; and it is on record."""
        daemon, new = make_daemon(workers=1), os.urandom(32)
        old = daemon.kek
        with daemon.session() as kms:
            kms.create_dek("t2")
            kms.rotate(new)
        file, edited = tmp_path / "backup", tmp_path / "edited"
        daemon.offline("backup", str(file))
        daemon.stop()
        edited.write_bytes(file.read_bytes()[: backup.last_line(file).size])
        with contextlib.closing(sqlite3.connect(edited)) as db, db:
            assert db.execute("UPDATE deks SET value = replace(value, '\"t2\"', '\"t3\"')").rowcount == 1
        with open(edited, "ab") as end:
            end.write(backup._describe(edited).line())
        host = Host(tmp_path / "one", new, fleet_database)
        assert b"was changed after it was made" in host.refused("restore", str(edited))
        assert fleet_database.sql("SELECT count(*) FROM kms.deks") == [(0,)]
        host.run("restore", str(file))
        assert b'"op":"restore"' in (host.data / "kms-audit.log").read_bytes()
        late = make_daemon(fleet_database.configured(), kek=old, start=False)
        write_secret(late.home / "new", new)
        late.write_config({**late.config, "previous_master_keys": [{"file": str(late.home / "new")}]})
        assert "was rotated out" in late.refusal().stderr

    @pytest.mark.parametrize("command", ["import", "restore"])
    def test_what_is_done_and_can_t_be_recorded_says_that_it_is_done(
        self, tmp_path: Path, fleet_database: Fleet, command: str
    ) -> None:
        """The disk of the audit log is full from some record on: behind the COMMIT it said what it says of an
        import of which nothing was stored. And no later start knew of a restore."""
        file, lines = tmp_path / "backup", _wrapped(KEK, "k_1") + _wrapped(KEK, "k_2")
        source = Host(tmp_path / "source", KEK, fleet_database)
        source.run("import", "-", stdin=lines)
        source.run("backup", str(file))
        words, found = ("import", "-") if command == "import" else ("restore", str(file)), set()
        for skip in itertools.count():
            fleet_database.again()
            host = Host(tmp_path / str(skip), KEK, fleet_database)
            with Shim() as shim:
                fault = shim.fail("write", "kms-audit.log", "ENOSPC", skip=skip)
                done = cli(*words, "--config", str(host.file), stdin=lines, env=shim.env)
                hits = fault.hits
            ((rows,),) = fleet_database.sql("SELECT count(*) FROM kms.deks")
            if not hits:
                break
            said = b"done, all of it" in done.stderr or b"was restored" in done.stderr
            assert (done.returncode, said) == (1, rows == 2), done
            found.add(rows)
            if rows:
                host.run("verify", "--recount")  # as any start
                events = (host.data / "kms-audit.log").read_text().count('"op":"restore"')
                assert events == (command == "restore")
        assert (done.returncode, rows, found) == (0, 2, {0, 2})

    def test_what_a_killed_backup_left_goes_with_the_next(
        self, tmp_path: Path, fleet_database: Fleet
    ) -> None:
        """Each night has a name of its own, so its folder stayed for ever, with all DEKs. One that another
        backup works in was emptied."""
        one = Host(tmp_path / "one", KEK, fleet_database)
        one.run("import", "-", stdin=_wrapped(KEK, "k_1"))
        nights = tmp_path / "nights"
        nights.mkdir(0o700)
        host = (tmp_path / "one" / "data" / "kms.host").read_text()[:8]
        names = (f"kms-{host}-20250101", f"kms-{host}-20250102", "kms-00000000-20250101")
        left, written, other = (nights / f".{name}T020000Z.backup.fleet" for name in names)
        for folder in (left, written, other):
            folder.mkdir(0o700)
            (folder / "kms.db").write_bytes(b"half done")
        held = os.open(written, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            made = Path(json.loads(one.run("backup", str(nights), "--json"))["file"])
            assert sorted(nights.iterdir()) == sorted((made, written, other))
            assert b"is under way" in one.refused("backup", str(nights / written.name[1:-6]))
            assert (written / "kms.db").read_bytes() == b"half done"
        finally:
            os.close(held)

    def test_what_a_command_could_not_do_nobody_does_for_it(
        self, tmp_path: Path, fleet_database: Fleet
    ) -> None:
        one = Host(tmp_path / "one", KEK, fleet_database)
        with fleet_database.away():
            said = one.refused("import", str(one.file))
        assert b"run the command again" in said and b"by itself" not in said

    def test_a_thread_id_that_the_engine_can_t_keep(self, tmp_path: Path, fleet_database: Fleet) -> None:
        """A host's own store takes any text: one line ended the import of all in a fault of ours."""
        one = Host(tmp_path / "one", KEK, fleet_database)
        lines = b""
        for number, thread_id in enumerate(("a\0b", "\ud800", "a\nb", "plain")):
            line = json.loads(_wrapped(KEK, f"k_{number}"))
            lines += json.dumps({**line, "thread_id": thread_id}).encode() + b"\n"
        one.run("import", "-", stdin=lines)
        exported = one.run("export").splitlines()
        assert [json.loads(line)["thread_id"] for line in exported] == ["a\0b", "\ud800", "a\nb", "plain"]
        one.run("verify")

    def test_a_fleet_that_was_changed_by_hand_is_not_backed_up(
        self, tmp_path: Path, fleet_database: Fleet, make_daemon: Callable[..., Daemon]
    ) -> None:
        host = Host(tmp_path / "one", KEK, fleet_database)
        host.run("import", "-")
        from tests.store.test_contract import dek

        row = json.dumps({**dek("k_1").to_row(), "mac": "A" * 43 + "="})
        fleet_database.sql(f"INSERT INTO kms.deks VALUES ('k_1', 't', '{row}', '', 1)")
        assert b"not as the daemon wrote it" in host.refused("backup", str(tmp_path / "backup"))
        fleet_database.sql("DELETE FROM kms.deks", "DELETE FROM kms.kms WHERE name = 'audit:epoch'")
        assert b"don't add up" in host.refused("backup", str(tmp_path / "backup"))
        assert not (tmp_path / "backup").exists() and not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize(
        ("harm", "says"),
        [
            ("DELETE FROM kms.deks WHERE key_id = 'k_1'", "don't add up"),
            (
                "UPDATE kms.deks SET value = replace(value, 'enabled', 'disabled')",
                "not as the daemon wrote it",
            ),
            ("UPDATE kms.deks SET value = '7' WHERE key_id = 'k_1'", "k_1: its row is not as"),
            ("DELETE FROM kms.kms WHERE name = 'audit:epoch'", "of the service's own don't add up"),
        ],
    )
    def test_verify(self, tmp_path: Path, fleet_database: Fleet, harm: str, says: str) -> None:
        host = Host(tmp_path / "one", KEK, fleet_database)
        host.run("import", "-", stdin=_wrapped(KEK, "k_1") + _wrapped(KEK, "k_2"))
        assert json.loads(host.run("verify", "--json")) == {"result": "ok", "deks": 2, "shredded": 0}
        fleet_database.sql(harm)
        done = cli("verify", "--config", str(host.file))
        assert done.returncode == 1 and says in done.stderr.decode() and b"faults were found" in done.stderr

    def test_recount(self, tmp_path: Path, fleet_database: Fleet) -> None:
        """After an accident that somebody knows of: the difference becomes this host's, the sum is right."""
        one, two = (Host(tmp_path / name, KEK, fleet_database) for name in ("one", "two"))
        one.run("import", "-", stdin=_wrapped(KEK, "k_1") + _wrapped(KEK, "k_2"))
        two.run("import", "-", stdin=_wrapped(KEK, "k_3") + _wrapped(KEK, "k_4"))
        assert json.loads(two.run("verify", "--recount", "--json"))["recounted"] is False
        fleet_database.sql("DELETE FROM kms.deks WHERE key_id = 'k_1'")
        assert b"verify --recount" in one.refused_after_faults("verify")
        told = json.loads(two.run("verify", "--recount", "--json"))
        (active,) = told["counted"]
        assert told["counted"] == {active: 4} and told["there"] == {active: 3} and told["deks"] == 3
        for host in (one, two):
            assert json.loads(host.run("verify", "--json"))["deks"] == 3
        assert b'"op":"recount"' in (two.data / "kms-audit.log").read_bytes()
        two.run("audit", "verify")

    def test_what_a_killed_command_left_goes_with_the_next(
        self, tmp_path: Path, fleet_database: Fleet
    ) -> None:
        """Its row stayed: the first change waited for it, and a rotation missed its KEK there for ever."""
        host = Host(tmp_path / "one", KEK, fleet_database)
        words = [sys.executable, "-m", "progressdb_kms", "import", "-", "--config", str(host.file)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, cwd=REPO) as command:
            try:
                wait_until(lambda: bool(fleet_database.sql("SELECT 1 FROM kms.hosts")), 60.0)
            finally:
                command.kill()
        assert fleet_database.sql("SELECT fenced FROM kms.hosts") == [(False,)]
        host.run("import", "-", stdin=_wrapped(KEK, "k_1"))
        assert fleet_database.sql("SELECT 1 FROM kms.hosts") == []

    def test_audit_logs_of_all_hosts(self, tmp_path: Path, fleet_database: Fleet) -> None:
        """Each host's log under its own key, which any host of the fleet opens."""
        one, two = (Host(tmp_path / name, KEK, fleet_database) for name in ("one", "two"))
        one.run("import", "-", stdin=_wrapped(KEK, "k_1"))
        two.run("import", "-", stdin=_wrapped(KEK, "k_2"))
        for host in (one, two):
            assert json.loads(host.run("audit", "verify", "--json"))["result"] == "ok"
            host.run("audit", "report", str(tmp_path / "page.html"))
            assert host.run("audit", "tail", "-n", "1")
        log, name = str(two.data / "kms-audit.log"), (two.data / "kms.host").read_text().strip()
        assert json.loads(one.run("audit", "verify", "--host", name, log, "--json"))["result"] == "ok"
        found = one.run("audit", "search", "--host", name, log, "--op", "import", "--json")
        assert b'"op":"import"' in found
        done = cli("audit", "verify", log, "--config", str(one.file))
        assert done.returncode == 1 and b"fault" in done.stdout  # it is not this host's
        done = cli("audit", "verify", "--host", "0" * 32, log, "--config", str(one.file))
        assert done.returncode == 1 and b"knows no host 000" in done.stderr

    def test_doctor_verifies_the_audit_log(self, tmp_path: Path, fleet_database: Fleet) -> None:
        """On a host of a fleet it was passed over, and nothing was said of that."""
        host = Host(tmp_path / "one", KEK, fleet_database)
        host.run("import", "-", stdin=_wrapped(KEK, "k_1"))
        ((level, text),) = host.doctor("start")
        assert level == "ok" and "the audit log verifies" in text and "not tried" in text
        log = host.data / "kms-audit.log"
        log.write_bytes(log.read_bytes().replace(b'"k_1"', b'"k_2"'))
        ((level, text),) = host.doctor("start")
        assert level == "fail" and "the audit log has a fault" in text
        other = Host(tmp_path / "two", KEK[::-1], fleet_database)
        other.data.mkdir(mode=0o700)
        shutil.copy(log, other.data)
        ((level, text),) = other.doctor("start")
        assert level == "warn" and "the audit log was not verified" in text
        host.file.write_text(host.file.read_text().replace(fleet_database.where.folder, str(tmp_path)))
        ((level, text),) = host.doctor("start")
        assert level == "warn" and "not verified: " in text and "can't be reached" in text

    def test_doctor(self, tmp_path: Path, fleet_database: Fleet) -> None:
        host = Host(tmp_path / "one", KEK, fleet_database)
        host.run("import", "-", stdin=_wrapped(KEK, "k_1"))
        found = host.doctor()
        assert [level for level, _ in found] == ["ok", "ok", "warn", "warn", "warn", "ok"]  # fsync is off
        texts = [text for _, text in found]
        assert "schema 1" in texts[0] and "1 DEKs" in texts[0] and "connections" in texts[0]
        assert "no standby is waited for" in texts[1] and "waits for no standby" in texts[2]
        assert "every host has the active KEK" in texts[-1]
        fleet_database.sql(
            "INSERT INTO kms.hosts VALUES ('x', '1', 'gone', 0, 0, '{}', true)",
            "INSERT INTO kms.hosts VALUES ('y', '1', 'bare', 0, 0, '{}', false)",
        )
        texts = [text for level, text in host.doctor() if level == "warn"]
        assert any("gone (x) is fenced" in text for text in texts)
        assert any("bare (y) doesn't have the active KEK" in text for text in texts)
        other = Host(tmp_path / "two", KEK[::-1], fleet_database)
        assert other.doctor()[-1][0] == "fail" and "is not configured here" in other.doctor()[-1][1]
        fleet_database.sql(
            'UPDATE kms.kms SET value = replace(value, \'"keks":{\', \'"keks":{"0a":[1,2,""],\')'
        )
        assert host.doctor()[-1] == ("fail", "DEKs need KEKs that are not configured here: 0a")
        host.file.write_text(host.file.read_text() + "allow_missing_keks: true\n")
        level, text = host.doctor()[-1]
        assert level == "warn" and text.endswith("0a: answered with 503, by allow_missing_keks")
        fleet_database.sql("UPDATE kms.fleet SET schema = 9, least = 8")
        ((level, text),) = host.doctor()
        assert level == "fail" and "schema 9" in text

    def test_doctor_beside_a_daemon(
        self, fleet_database: Fleet, make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from progressdb_kms.tools import asowner, fleetdoctor

        daemon = make_daemon(fleet_database.configured(), workers=1)

        def place() -> tuple[str, str]:
            flags = {"config": str(daemon.config_file), "data_dir": str(daemon.data_dir)}
            with asowner.load_config(flags, need_key=False, fleet=True) as loaded:
                (found,) = (one for one in fleetdoctor.look(loaded.settings, None) if "place" in one.text)
            return found.level, found.text

        level, text = place()
        assert level == "ok" and "this host has its place" in text
        daemon.stop()
        monkeypatch.setattr(fleetdoctor, "is_held", lambda data_dir: True)
        assert place()[0] == "fail"

    def test_what_is_bad_changes_nothing(self, tmp_path: Path, fleet_database: Fleet) -> None:
        host = Host(tmp_path / "one", KEK, fleet_database)
        done = cli("import", "-", "--config", str(host.file), stdin=b'{"key_id": "k_1", "wrapped": "AAAA"}\n')
        assert done.returncode == 1 and b"nothing was stored" in done.stderr
        assert host.exported() == {}

    def test_another_kek(self, tmp_path: Path, fleet_database: Fleet) -> None:
        """A host that has not the fleet's active KEK brings nothing in."""
        one, two = (
            Host(tmp_path / "one", KEK, fleet_database),
            Host(tmp_path / "two", KEK[::-1], fleet_database),
        )
        one.run("import", "-")
        done = cli("import", "-", "--config", str(two.file))
        assert done.returncode == 1 and b"active KEK" in done.stderr
        assert fleet_database.sql("SELECT count(*) FROM kms.hosts") == [(0,)]

    def test_more_than_wait_for_the_end(self, tmp_path: Path, fleet_database: Fleet) -> None:
        """They go out in pieces, and are there at once, or not at all."""
        from progressdb_kms.fleet import store
        from tests.store.test_contract import KEY, Stop, dek

        one = fleet_database.store(KEY)
        records = [dek(f"k{n:05}") for n in range(store.BULK + 100)]
        for stop in (True, False):
            with contextlib.suppress(Stop), one.transaction():
                one.put_all(records[: store.BULK])
                assert fleet_database.sql("SELECT count(*) FROM kms.deks") == [(0,)]
                one.put_all(records[store.BULK :])
                if stop:
                    raise Stop
            with one.transaction():
                assert not one.recount()
            assert len(one.page("", 9999)) == (0 if stop else len(records))


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in row if name not in ("wrapped", "kek_version")}


def _wrapped(kek: bytes, key_id: str) -> bytes:
    """A line as the Go service's stores have it: the DEK is bound to nothing."""
    blob = bytes(12) + AESGCM(kek).encrypt(bytes(12), key_id.encode().ljust(32, b"."), None)
    return (
        json.dumps({"key_id": key_id, "thread_id": "t", "wrapped": b64encode(blob).decode()}).encode() + b"\n"
    )
