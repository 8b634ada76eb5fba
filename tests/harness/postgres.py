"""A PostgreSQL server of the tests' own, in a temporary folder.

    with Postgres() as server:
        server.sql("CREATE ROLE …")
        database = server.database()      # fresh, of the role `kms`, over the Unix socket

It runs as an unprivileged user where the tests are root, listens on a Unix socket, and on 127.0.0.1 alone
where `tls` names a certificate. It doesn't wait for the disk unless told to (`durable`): what is tried is
what a killed process leaves, not what a power cut does. `missing()` says why there can't be one here.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .folders import new_folder
from .wire import free_port

LEAST = 14
STARTED_SECONDS = 60


@functools.cache
def binaries() -> Path | None:
    """The folder of the newest server that is installed."""
    found = [Path(path).parent for path in glob.glob("/usr/lib/postgresql/*/bin/initdb")]
    found += [Path(os.path.realpath(path)).parent for path in [shutil.which("initdb")] if path]
    known = [(version, folder) for folder in found if (version := _version(folder)) >= LEAST]
    return max(known)[1] if known else None


def _version(folder: Path) -> int:
    answer = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=False)
    digits = answer.stdout.split()[2].split(".")[0] if answer.stdout else ""
    return int(digits) if digits.isdigit() else 0


def missing() -> str:
    """Why no server can be started here; "" where one can."""
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"needs psycopg 3 ({error})"
    if binaries() is None:
        return f"needs PostgreSQL {LEAST} or newer (initdb)"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "needs setpriv: no server runs as root"
    return ""


class Database(NamedTuple):
    """Where a database is, as the configuration says it."""

    hosts: list[str]
    name: str
    user: str

    def block(self, **more: Any) -> dict[str, Any]:
        return {"hosts": self.hosts, "database": self.name, "user": self.user, **more}


class Postgres:
    """One server. `hba`: the lines of pg_hba.conf; by default everybody is believed over the socket."""

    def __init__(
        self,
        settings: dict[str, str] | None = None,
        hba: str = "local all all trust",
        tls: tuple[Path, Path] | None = None,
        initdb: tuple[str, ...] = (),
        durable: bool = False,
    ) -> None:
        self.folder = new_folder("kms-pg-")
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        self.port = free_port()[1] if tls else 5432
        self.user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        self.hba = hba
        self._made = 0
        self.fleets: Database | None = None
        self.emptied = False
        self._durable = durable
        self._settings = {
            "unix_socket_directories": str(self.folder),
            "listen_addresses": "127.0.0.1" if tls else "",
            "port": str(self.port),
            "max_connections": "40",
            "shared_buffers": "16MB",
            "autovacuum": "off",
            "logging_collector": "off",
            **({} if durable else {"fsync": "off", "full_page_writes": "off"}),
            **(settings or {}),
        }
        self._initdb = initdb
        self._tls = tls

    # ---- its life -------------------------------------------------------------------------------

    def run(self, program: str, *words: str | Path) -> None:
        """One of the server's own programs, as the user that the server runs as."""
        done = subprocess.run(self.words(program, *words), capture_output=True, text=True, check=False)
        if done.returncode:
            log = self.log.read_text()[-2000:] if self.log.exists() else ""
            raise RuntimeError(f"{program}: {done.stderr or done.stdout}\n{log}")

    def words(self, program: str, *words: str | Path) -> list[str]:
        folder = binaries()
        assert folder is not None, missing()
        line = [str(folder / program), *map(str, words)]
        if os.geteuid():
            return line
        about = pwd.getpwnam(self.user)
        return ["setpriv", f"--reuid={about.pw_uid}", f"--regid={about.pw_gid}", "--clear-groups", *line]

    def make(self) -> Postgres:
        _sweep()
        (self.folder / "owner").write_text(str(os.getpid()))
        self.own(self.folder)
        self.run("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C",
                 "--no-sync", "--no-instructions", *self._initdb)  # fmt: skip
        return self

    def start(self) -> Postgres:
        if not self.data.exists():
            self.make()
        if self._tls:
            for source, name in zip(self._tls, ("server.crt", "server.key")):
                shutil.copy(source, self.data / name)
                (self.data / name).chmod(0o600)
                self.own(self.data / name)
            self._settings["ssl"] = "on"
        (self.data / "pg_hba.conf").write_text("local all postgres trust\n" + self.hba + "\n")
        options = " ".join(f"-c {name}='{value}'" for name, value in self._settings.items())
        # By pg_ctl, so that it is no child of ours: some tests look whether they have any left.
        self.run(
            "pg_ctl",
            "start",
            "-w",
            "-t",
            str(STARTED_SECONDS),
            "-s",
            "-D",
            self.data,
            "-l",
            self.log,
            "-o",
            options,
        )
        return self

    def own(self, path: Path) -> None:
        if os.geteuid() == 0:
            about = pwd.getpwnam(self.user)
            os.chown(path, about.pw_uid, about.pw_gid)

    @property
    def pid(self) -> int:
        """Of the server; 0 where none runs."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split()[0])
        except FileNotFoundError:
            return 0
        return pid if Path(f"/proc/{pid}").exists() else 0

    def stop(self, how: str = "fast") -> None:
        """`immediate`: without a checkpoint. `kill`: SIGKILL; its children end by themselves."""
        if not (pid := self.pid):
            return
        if how != "kill":
            self.run("pg_ctl", "stop", "-w", "-s", "-m", how, "-D", self.data)
            return
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + STARTED_SECONDS
        while Path(f"/proc/{pid}").exists():
            if time.monotonic() > deadline:
                raise RuntimeError("PostgreSQL was killed, and is still there")
            time.sleep(0.01)

    def close(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Postgres:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- as its administrator ---------------------------------------------------------------------

    def connect(self, database: str = "postgres", user: str = "postgres") -> Any:
        import psycopg

        return psycopg.connect(
            host=str(self.folder),
            port=self.port,
            dbname=database,
            user=user,
            autocommit=True,
            connect_timeout=10,
        )

    def sql(self, *statements: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Each a transaction of its own. Returns the rows of the last."""
        rows: list[tuple[Any, ...]] = []
        with self.connect(database) as db:
            for statement in statements:
                cursor = db.execute(statement)
                rows = cursor.fetchall() if cursor.description else []
        return rows

    def database(self) -> Database:
        """A fresh one, that belongs to the role `kms`."""
        self._made += 1
        name = f"kms{self._made}"
        if self._made == 1:
            self.sql("CREATE ROLE kms LOGIN PASSWORD 'open sesame'")
        self.sql(f"CREATE DATABASE {name} OWNER kms")
        return Database([str(self.folder)], name, "kms")


class Cluster:
    """Three servers with TLS on loopback: a primary, and two standbys of which one must have what it
    acknowledges. No server decides by itself who is the primary: `fail_over` does, as Patroni would."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        files = self.authority.issue("localhost")
        settings = {
            "wal_level": "replica",
            "synchronous_standby_names": "ANY 1 (*)",
            "wal_keep_size": "256MB",
        }
        hba = "local replication postgres trust\nhostssl all all 127.0.0.1/32 scram-sha-256"
        self.nodes = [Postgres(settings, hba, files) for _ in range(3)]
        self.primary = self.nodes[0]
        self.password = folder / "pg.password"
        self.password.touch(0o600)
        self.password.write_text("open sesame")

    def __enter__(self) -> Cluster:
        try:
            self.primary.start()
            for node in self.nodes[1:]:
                self.join(node)
            self.database = self.primary.database()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            node.close()

    @property
    def where(self) -> Any:
        from progressdb_kms.fleet.settings import Host, Where

        hosts = tuple(Host("localhost", node.port) for node in self.nodes)
        password, authority = str(self.password), str(self.authority.file)
        return Where(hosts, "", self.database.name, self.database.user, password, authority)

    def join(self, node: Postgres) -> None:
        """As a new standby of the primary."""
        shutil.rmtree(node.data, ignore_errors=True)
        node.own(node.folder)
        node.run("pg_basebackup", "-D", node.data, "-R", "-X", "stream", "-c", "fast", "--no-sync",
                 "-d", self._source(node))  # fmt: skip
        node.start()

    def _source(self, node: Postgres) -> str:
        name = f"n{self.nodes.index(node)}"
        return f"host={self.primary.folder} port={self.primary.port} user=postgres application_name={name}"

    def fail_over(self) -> None:
        """The standby that has most becomes the primary, and the other one follows it."""
        standbys = [node for node in self.nodes if node is not self.primary and node.pid]
        received = {node: node.sql("SELECT pg_last_wal_receive_lsn() - '0/0'")[0][0] for node in standbys}
        self.primary = max(standbys, key=lambda node: received[node] or 0)
        self.primary.sql("SELECT pg_promote(true, 60)")
        for node in standbys:
            if node is not self.primary:
                source = self._source(node)
                node.sql(f"ALTER SYSTEM SET primary_conninfo = '{source}'", "SELECT pg_reload_conf()")

    def sql(self, *statements: str) -> list[tuple[Any, ...]]:
        return self.primary.sql(*statements, database=self.database.name)


class Fleet:
    """An empty fleet in a database of the server, the same one for all tests of a process, made anew each
    time. Its stores belong to hosts that are registered."""

    def __init__(self, server: Postgres) -> None:
        from progressdb_kms.fleet.engine import Link
        from progressdb_kms.fleet.settings import Where

        self.server = server
        if server.fleets is None:
            server.fleets = server.database()
        self.where = Where((), server.fleets.hosts[0], server.fleets.name, server.fleets.user)
        self._links: list[Link] = []
        self._admin = server.connect(self.where.database)
        if not server.emptied:
            self.again()

    def again(self) -> None:
        """Make the tables anew."""
        from progressdb_kms.fleet import schema

        self.sql("DROP SCHEMA IF EXISTS kms CASCADE")
        schema.create(self.link())

    def link(self) -> Any:
        from progressdb_kms.fleet.engine import Link

        self._links.append(Link(self.where))
        return self._links[-1]

    def store(self, key: memoryview | None = None, host: str = "one", inc: str = "1") -> Any:
        from progressdb_kms.fleet.mending import FleetMending

        self.sql(f"INSERT INTO kms.hosts VALUES ('{host}', '{inc}', '', 0, 0, '{{}}', false)")
        return FleetMending(self.link(), host, inc, key)

    def reader(self, key: memoryview | None = None, host: str = "one") -> Any:
        from progressdb_kms.fleet.reader import FleetReader

        return FleetReader(self.link(), host, key)

    def sql(self, *statements: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        for statement in statements:
            cursor = self._admin.execute(statement)
            rows = cursor.fetchall() if cursor.description else []
        return rows

    @contextlib.contextmanager
    def away(self, how: str = "fast") -> Iterator[None]:
        """The server is stopped meanwhile."""
        self._admin.close()
        self.server.stop(how)
        try:
            yield
        finally:
            self.server.start()
            self.reconnect()

    def reconnect(self) -> None:
        """The server may have been started anew."""
        self._admin.close()
        self._admin = self.server.connect(self.where.database)

    def configured(self, fence_seconds: float = 10, **more: Any) -> dict[str, Any]:
        """A daemon's configuration."""
        block = {"hosts": [self.where.folder], "database": self.where.database, "user": self.where.user}
        block["fence_seconds"] = f"{fence_seconds:g}"
        return {"store": "postgresql", "postgresql": block, **more}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        """Where the tables are those that `schema` made, emptying them is quicker than to make them again."""
        for link in self._links:
            link.close()
        tables = {row[0] for row in self.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'kms'")}
        self.server.emptied = tables == {"fleet", "deks", "kms", "usage", "hosts", "changes", "touched"}
        self.server.emptied &= not self.sql("SELECT 1 FROM pg_class WHERE relname = 'deks_next_pkey'")
        if self.server.emptied:
            self.sql(
                "DELETE FROM kms.deks; DELETE FROM kms.kms; DELETE FROM kms.usage; DELETE FROM kms.hosts; "
                "DELETE FROM kms.changes; DELETE FROM kms.touched; "
                "UPDATE kms.fleet SET fleet = md5(random()::text), epoch = 1, schema = 1, least = 1, "
                "gen = 0, active_kek = '', version = 0, rotating = false, owner = ''"
            )
        self._admin.close()


def _sweep() -> None:
    """End what a run left that was killed: its servers are no children of it."""
    for note in Path("/tmp").glob("kms-pg-*/owner"):
        with contextlib.suppress(OSError, ValueError):
            if note.stat().st_uid == os.geteuid() and not Path(f"/proc/{int(note.read_text())}").exists():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    pid = int((note.parent / "data" / "postmaster.pid").read_text().split()[0])
                    if str(note.parent) in Path(f"/proc/{pid}/cmdline").read_text():
                        os.kill(pid, signal.SIGQUIT)
                shutil.rmtree(note.parent, ignore_errors=True)


# ---- certificates ----------------------------------------------------------------------------------


class Authority:
    """A CA that is made for a test: `issue` writes a certificate and its key."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        from cryptography.hazmat.primitives.asymmetric import ec

        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = name
        self._number = 0
        self._certificate = self._sign(name, self._key.public_key(), authority=True)
        self.file = self._write(f"{name}.pem", self._certificate)

    def _sign(self, name: str, public: Any, authority: bool = False, client: bool = False) -> Any:
        import datetime
        import ipaddress

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.x509.oid import NameOID

        now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self._name)])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._number += 1
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(self._number)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority and not client:
            try:
                names: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
            except ValueError:
                names = x509.DNSName(name)
            built = built.add_extension(x509.SubjectAlternativeName([names]), critical=False)
        return built.sign(self._key, hashes.SHA256())

    def issue(self, name: str, client: bool = False) -> tuple[Path, Path]:
        """The files of a certificate for a server's name or address, or for a role, and of its key."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._write(f"{name}.crt", self._sign(name, key.public_key(), client=client))
        text = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file = self.folder / f"{name}.key"
        file.touch(0o600)
        file.write_bytes(text)
        return certificate, file

    def revoked(self) -> bytes:
        """Its list of revoked certificates: none."""
        import datetime

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        day = datetime.timedelta(days=1)
        now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
        listed = x509.CertificateRevocationListBuilder().issuer_name(self._certificate.subject)
        listed = listed.last_update(now - day).next_update(now + 2 * day)
        return listed.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, certificate: Any) -> Path:
        from cryptography.hazmat.primitives import serialization

        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        path.chmod(0o644)  # whatever the umask: an authority that others may replace is none
        return path
