"""Who may be the fleet's engine: each refusal says what to do, and what a connection may not do is seen."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.errors import ConfigError, KMSError, StoreDamaged, StoreUnavailable
from progressdb_kms.fleet.settings import Host, Where
from tests.fleet.test_daemons import until
from tests.harness import postgres
from tests.harness.postgres import Authority, Database, Postgres

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing() or "")

PASSWORD = "open sesame"


class Place:
    """A server with TLS and every way to say who one is: the role is named after the way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.other = Authority(folder, "other-ca")
        self.server = Postgres(
            tls=self.authority.issue("localhost"),
            hba="\n".join(
                f"hostssl all {role} 127.0.0.1/32 {way}"
                for role, way in (
                    ("scram", "scram-sha-256"),
                    ("md5", "md5"),
                    ("clear", "password"),
                    ("cert", "cert"),
                    ("trusted", "trust"),
                )
            )
            + "\nlocal all local trust\nlocal all nobody trust\nlocal all scram scram-sha-256",
        )

    def start(self) -> Place:
        self.server.make()
        (self.server.data / "ca.pem").write_bytes(self.authority.file.read_bytes())
        self.server._settings["ssl_ca_file"] = "ca.pem"
        self.server.start()
        self.server.sql(
            *(
                f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'"
                for role in ("scram", "clear", "cert", "local", "trusted")
            )
        )
        with self.server.connect() as db:
            db.execute("SET password_encryption = md5")
            db.execute(f"CREATE ROLE md5 LOGIN PASSWORD '{PASSWORD}'")
        self.server.sql("CREATE DATABASE kms OWNER scram")
        return self

    def secret(self, text: str = PASSWORD + "\n") -> str:
        path = self.folder / "pg.password"
        path.touch(0o600)
        path.write_text(text)
        return str(path)

    def by_password(self, user: str = "scram", host: str = "localhost", **more: str) -> Where:
        options = {"password_file": self.secret(), "tls_ca": str(self.authority.file), **more}
        return Where((Host(host, self.server.port),), "", "kms", user, **options)  # type: ignore[arg-type]

    def by_certificate(self, files: tuple[Path, Path]) -> Where:
        more = {"tls_cert": str(files[0]), "tls_key_file": str(files[1])}
        return Where(
            (Host("localhost", self.server.port),), "", "kms", "cert", tls_ca=str(self.authority.file), **more
        )

    def by_socket(self, user: str = "local", **more: str) -> Where:
        return Where((), str(self.server.folder), "kms", user, socket_port=self.server.port, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    one = Place(tmp_path_factory.mktemp("tls"))
    try:
        yield one.start()
    finally:
        one.server.close()


def refused(where: Where, kind: type[KMSError] = ConfigError) -> KMSError:
    from progressdb_kms.fleet.engine import connect

    with pytest.raises(kind) as caught:
        connect(where).close()
    assert type(caught.value) is kind and caught.value.hint and PASSWORD not in str(caught.value)
    return caught.value


class TestWhoIsThere:
    def test_scram_over_tls(self, place: Place) -> None:
        from progressdb_kms.fleet.engine import connect

        with connect(place.by_password()) as session:
            ((ssl, user),) = session.execute(
                "SELECT ssl, current_user FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            )
            assert (ssl, user) == (True, "scram")

    def test_a_certificate(self, place: Place) -> None:
        from progressdb_kms.fleet.engine import connect

        with connect(place.by_certificate(place.authority.issue("cert", client=True))) as session:
            assert session.execute("SELECT current_user").fetchall() == [("cert",)]

    def test_another_name(self, place: Place) -> None:
        """The server's certificate is for localhost, and 127.0.0.1 is where it listens."""
        assert "another host's" in refused(place.by_password(host="127.0.0.1")).message

    def test_another_authority(self, place: Place) -> None:
        error = refused(place.by_password(tls_ca=str(place.other.file)))
        assert "not signed by the CA" in error.message and "tls_ca" in error.hint

    def test_an_authority_that_is_not_there(self, place: Place) -> None:
        assert "can't be read" in refused(place.by_password(tls_ca="/nonexistent/ca.pem")).message

    def test_a_client_certificate_of_another_authority(self, place: Place) -> None:
        error = refused(place.by_certificate(place.other.issue("cert", client=True)), StoreUnavailable)
        assert error.code == "store_unreachable"  # the alert of the server tells no more

    def test_another_role_s_certificate(self, place: Place) -> None:
        assert (
            "pg_hba.conf"
            in refused(place.by_certificate(place.authority.issue("scram", client=True))).message
        )

    def test_the_wrong_password(self, place: Place) -> None:
        where = place.by_password()
        place.secret("something else")
        assert "password" in refused(where).message

    @pytest.mark.parametrize("user", ["md5", "clear", "trusted"])
    def test_a_password_goes_out_by_scram_alone(self, place: Place, user: str) -> None:
        error = refused(place.by_password(user))
        assert "another way than SCRAM" in error.message and "scram-sha-256" in error.hint

    def test_a_server_without_tls(self, place: Place) -> None:
        """It answers `N` to the request for TLS: nothing more is said to it."""
        heard: list[bytes] = []

        def answer(listener: socket.socket) -> None:
            with listener.accept()[0] as peer:
                peer.recv(8)
                peer.sendall(b"N")
                heard.append(peer.recv(1000))

        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(60)
            thread = threading.Thread(target=answer, args=(listener,))
            thread.start()
            error = refused(
                place.by_password()._replace(hosts=(Host("localhost", listener.getsockname()[1]),))
            )
            thread.join()
        assert "it has no TLS" in error.message and heard == [b""]

    @pytest.mark.parametrize("mode", [0o640, 0o604])
    def test_a_secret_that_others_can_read(self, place: Place, mode: int) -> None:
        where = place.by_password()
        os.chmod(where.password_file, mode)
        error = refused(where)
        assert f"mode {mode:04o}" in error.message and "chmod 0600" in error.hint
        os.chmod(where.password_file, 0o600)
        certificate, key = place.authority.issue("cert", client=True)
        key.chmod(mode)
        assert "tls_key_file" in refused(place.by_certificate((certificate, key))).message

    def test_by_the_socket(self, place: Place) -> None:
        from progressdb_kms.fleet.engine import connect

        connect(place.by_socket()).close()
        assert "pg_hba.conf" in refused(place.by_socket("scram")).message

    @pytest.mark.root
    def test_a_folder_in_which_anybody_may_listen(self, place: Place) -> None:
        """As /tmp is: who is there while the engine is down answers in its place."""
        from progressdb_kms.fleet.engine import connect

        place.server.folder.chmod(0o1777)
        try:
            error = refused(place.by_socket())
            assert "anybody's" in error.message and "unix_socket_directories" in error.hint
        finally:
            place.server.folder.chmod(0o775)
        connect(place.by_socket()).close()
        place.server.folder.chmod(0o700)

    def test_an_authority_that_others_may_replace(self, place: Place) -> None:
        """Who writes there says who is the engine."""
        for mode in (0o664, 0o646):
            place.authority.file.chmod(mode)
            error = refused(place.by_password())
            assert f"mode {mode:04o}" in error.message and "chmod" in error.hint
        place.authority.file.chmod(0o644)

    def test_a_password_over_the_socket_is_scram_s_too(self, place: Place) -> None:
        from psycopg import pq

        from progressdb_kms.fleet.engine import connect

        where = place.by_socket("scram", password_file=place.secret())
        if pq.version() < 160000:
            assert "libpq 16" in refused(where).message
            return
        connect(where).close()
        assert "SCRAM" in refused(place.by_socket("local", password_file=place.secret())).message

    def test_what_is_not_there(self, place: Place) -> None:
        assert "no such database" in refused(place.by_socket()._replace(database="nowhere")).message
        assert "no such database or role" in refused(place.by_socket("nobody")).message

    def test_the_environment_decides_nothing(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        from progressdb_kms.fleet.engine import connect

        monkeypatch.setenv("PGSSLMODE", "disable")
        monkeypatch.setenv("PGOPTIONS", "-c synchronous_commit=off")
        monkeypatch.setenv("PGSERVICE", "nowhere")
        monkeypatch.setenv("HOME", str(place.folder))
        (place.folder / ".postgresql").mkdir()
        (place.folder / ".postgresql" / "root.crl").write_bytes(place.other.revoked())
        with connect(place.by_password()) as session:
            assert session.execute("SHOW synchronous_commit").fetchall() == [("on",)]


class TestWhatItMustBe:
    """As the administrator of one database or one role may have set it."""

    @pytest.fixture
    def database(self, postgres_server: Postgres) -> Database:
        return postgres_server.database()

    @pytest.fixture
    def where(self, database: Database) -> Where:
        return Where((), database.hosts[0], database.name, database.user)

    @pytest.mark.parametrize("value", ["off", "local", "remote_write"])
    def test_asynchronous(self, postgres_server: Postgres, where: Where, value: str) -> None:
        postgres_server.sql(f"ALTER DATABASE {where.database} SET synchronous_commit = {value}")
        error = refused(where)
        assert f"synchronous_commit is {value}" in error.message and "ALTER ROLE kms" in error.hint

    def test_read_only(self, postgres_server: Postgres, where: Where) -> None:
        postgres_server.sql(f"ALTER DATABASE {where.database} SET default_transaction_read_only = on")
        error = refused(where, StoreUnavailable)
        assert error.code == "store_unreachable" and "no server is the primary now" in error.message
        assert "or default_transaction_read_only is on" in error.message

    @pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
    def test_another_encoding(self, postgres_server: Postgres, where: Where, encoding: str) -> None:
        """One thread_id that could not be written failed all creates that came with it."""
        name = f"{where.database}_other"
        postgres_server.sql(
            f"CREATE DATABASE {name} OWNER kms ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'"
        )
        error = refused(where._replace(database=name))
        assert f"has the encoding {encoding}" in error.message and "ENCODING 'UTF8'" in error.hint

    def test_older(self, where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
        from progressdb_kms.fleet import engine

        monkeypatch.setattr(engine, "LEAST_SERVER", 990000)
        assert "needs 14 or newer" in refused(where).message

    def test_a_pooler(self, where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another backend answers than the one that was told of at the start."""
        from progressdb_kms.fleet import engine

        monkeypatch.setattr(engine, "_LOOK", engine._LOOK.replace("pg_backend_pid()", "pg_backend_pid() + 1"))
        assert "pooler" in refused(where).message

    def test_nobody_there(self, tmp_path: Path) -> None:
        error = refused(Where((), str(tmp_path), "kms", "kms"), StoreUnavailable)
        assert error.code == "store_unreachable"

    def test_no_driver(self) -> None:
        import subprocess
        import sys

        program = (
            "import sys; sys.modules['psycopg'] = None\n"
            "from progressdb_kms.errors import ConfigError\n"
            "try:\n import progressdb_kms.fleet.engine\n"
            "except ConfigError as error: print(error.hint)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert "progressdb-kms[postgresql]" in done.stdout and "python3-psycopg" in done.stdout


class TestLink:
    """One connection, that is made again."""

    @pytest.fixture
    def where(self, postgres_server: Postgres) -> Where:
        database = postgres_server.database()
        return Where((), database.hosts[0], database.name, database.user)

    def test_it_comes_back(self, postgres_server: Postgres, where: Where) -> None:
        from progressdb_kms.fleet.engine import Link

        link = Link(where)
        with link.session() as session:
            pid = session.info.backend_pid
            postgres_server.sql(f"SELECT pg_terminate_backend({pid}, 60000)")
        with pytest.raises(StoreUnavailable) as caught, link.session() as session:
            session.execute("SELECT 1")
        assert caught.value.code == "store_unreachable"
        with link.session() as session:
            assert session.info.backend_pid != pid and session.execute("SELECT 1").fetchall() == [(1,)]
        link.close()

    def test_what_was_found_good_holds_for_the_session(self, postgres_server: Postgres, where: Where) -> None:
        """postgresql.conf is changed, and read again: a session that was open acknowledged what a failover
        loses, and nobody looked again. Nor does a role's own setting end sessions that are at rest."""
        from progressdb_kms.fleet.engine import Link

        postgres_server.sql("ALTER ROLE kms SET idle_session_timeout = '1s'")
        link = Link(where)
        try:
            with link.session() as session:
                pid = session.info.backend_pid
            postgres_server.sql("ALTER SYSTEM SET synchronous_commit = off", "SELECT pg_reload_conf()")
            others = "SELECT current_setting('synchronous_commit')"
            until(lambda: postgres_server.sql(others) == [("off",)])
            with link.session() as session:
                assert session.execute("SHOW synchronous_commit").fetchall() == [("on",)]
                assert session.execute("SHOW idle_session_timeout").fetchall() == [("0",)]
                assert session.info.backend_pid == pid
        finally:
            link.close()
            postgres_server.sql(
                "ALTER ROLE kms RESET ALL", "ALTER SYSTEM RESET synchronous_commit", "SELECT pg_reload_conf()"
            )
            until(lambda: postgres_server.sql(others) == [("on",)])

    def test_a_column_that_was_altered_spoils_no_session(
        self, postgres_server: Postgres, where: Where
    ) -> None:
        """What was prepared fails then, as long as its session lives."""
        from progressdb_kms.fleet.engine import Link

        link = Link(where)
        with link.session() as session:
            session.execute("CREATE SCHEMA kms")
            session.execute("CREATE TABLE kms.x (a int)")
            for _ in range(10):
                session.execute("SELECT a FROM x")
        postgres_server.sql("ALTER TABLE kms.x ALTER a TYPE bigint", database=where.database)
        with pytest.raises(StoreUnavailable), link.session() as session:
            session.execute("SELECT a FROM x")
        with link.session() as session:
            assert session.execute("SELECT a FROM x").fetchall() == []
        link.close()

    def test_one_that_became_a_standby_s_is_dropped(self, where: Where) -> None:
        from progressdb_kms.fleet.engine import Link

        link = Link(where)
        with link.session() as first:
            first.execute("CREATE SCHEMA kms")
            first.execute("SET default_transaction_read_only = on")
        with pytest.raises(StoreUnavailable), link.session() as session:
            session.execute("CREATE TABLE x ()")
        assert first.closed
        link.close()

    def test_a_transaction_that_was_left_open_is_not_used_again(self, where: Where) -> None:
        from progressdb_kms.fleet.engine import Link

        link = Link(where)
        with pytest.raises(RuntimeError), link.session() as first:
            first.execute("BEGIN")
            raise RuntimeError
        assert first.closed
        link.close()

    def test_a_server_that_is_stopped_ends_no_thread(self, postgres_server: Postgres, where: Where) -> None:
        from progressdb_kms.fleet.engine import Link

        link = Link(where)
        with link.session() as session:
            session.limit = 0.2
            pid = session.info.backend_pid
            os.kill(pid, signal.SIGSTOP)
            try:
                with pytest.raises(StoreUnavailable, match="lost"), link.session() as again:
                    again.execute("SELECT 1")
            finally:
                os.kill(pid, signal.SIGCONT)
        assert session.closed

    def test_a_warning_is_kept(self, where: Where) -> None:
        from progressdb_kms.fleet.engine import Link

        link = Link(where)
        with link.session() as session:
            session.execute("DO $$ BEGIN RAISE NOTICE 'n'; END $$")
            assert session.warning == ""
            session.execute("DO $$ BEGIN RAISE WARNING 'canceling wait'; END $$")
            assert session.warning.startswith("01000: ")
        link.close()

    def test_no_fleet_there(self, where: Where) -> None:
        from progressdb_kms.fleet.engine import Link

        link = Link(where)
        with pytest.raises(StoreDamaged, match="no fleet") as caught, link.session() as session:
            session.execute("SELECT * FROM fleet")
        assert "store init" in caught.value.hint
        link.close()

    def test_threads_take_turns(self, where: Where) -> None:
        from progressdb_kms.fleet.engine import Link

        link = Link(where)
        seen: list[int] = []

        def ask(number: int) -> None:
            with link.session() as session:
                seen.append(session.execute("SELECT %s::int, pg_sleep(0.01)", (number,)).fetchall()[0][0])

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(seen) == [0, 1, 2, 3]
        link.close()
