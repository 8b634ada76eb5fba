"""Connections to PostgreSQL, and what must be true of each before it is used.

The one importer of the driver, psycopg 3. Everything that the engine says when something goes wrong becomes
one of our errors here, with what to do next.

Why each of these is looked at, all of them tried:

- **Who is there.** TLS with the name checked (`verify-full`), always, but for a Unix socket, whose folder not
  everybody may write to. A password is given by SCRAM alone, bound to the TLS channel: an MD5 or clear-text
  request is refused before it hears anything. The environment (PG*), ~/.pgpass, ~/.postgresql and a service
  file decide nothing.
- **Is it the primary?** It says so itself, without a query (`in_hot_standby`, PostgreSQL 14). One that became
  a standby under an open connection answers 25006: such a connection is dropped.
- **Does COMMIT wait for the disk, and for a standby where there are any?** `synchronous_commit` may be off
  for one role or one database: such a session acknowledges what a failover loses. What was found good is kept
  for the session: else a change in postgresql.conf holds for those that are open, unseen.
- **Does it show all rows?** `row_security=off` makes an error of what a policy would hide, so that no DEK is
  found absent which is there.
- **Can it keep all texts?** In a database of LATIN1 one thread_id failed the writes of all callers beside it.
- **Is it one session?** A pooler in between that gives each transaction another one breaks prepared
  statements, settings and notifications: its backend's number differs from the one that was told at the
  start.
- **Will it ever answer?** A stopped server keeps its sockets open, and `statement_timeout` doesn't end the
  wait of a COMMIT for a standby. So each wait has a deadline here; past it the connection is closed and the
  outcome unknown.
- **Was it a COMMIT?** Cancelled in its wait for a standby it says OK, with a WARNING. Each WARNING is kept.
- **Can we be what stops others?** `idle_in_transaction_session_timeout` lets the locks go of a host that was
  stopped between two statements.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, KMSError, StoreDamaged, StoreUnavailable
from .settings import Where, read_secret

try:
    import psycopg
    from psycopg import errors as sqlstate
    from psycopg import pq
    from psycopg.adapt import Dumper
except ImportError as _error:
    raise ConfigError(
        f"`store: postgresql` needs psycopg 3, which can't be loaded ({_error})",
        hint="install progressdb-kms[postgresql], or Debian's python3-psycopg",
    ) from None

logging.getLogger("psycopg").setLevel(logging.ERROR)
"""It warns of each pipeline that is aborted, which is how a transaction finds that it may not be."""

LEAST_SERVER = 140000
"""PostgreSQL 14: `in_hot_standby`, `read-write` without a query, and what it keeps of a lost primary's
locks."""

CONNECT_SECONDS = 5
"""For each of the hosts: with three of them, and one that is gone, the next is tried well within a lease."""

ANSWER_SECONDS = 10.0
"""For the answer to whatever is waited for. A healthy COMMIT takes milliseconds; a standby that is lost is
waited for by the engine without an end."""

STATEMENT_SECONDS = 8
"""The engine itself gives up a little earlier, so that it tells why."""

SCHEMA = "kms"
"""Where the tables are. It is the whole search path: nothing in another schema can stand in for ours."""

UNREACHABLE = "store_unreachable"

TIMELINE = "('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int"
"""Of the server that answers, in SQL: it grows with each promotion. A standby answers with an error."""

_OPTIONS = (
    f"-c search_path={SCHEMA} -c idle_in_transaction_session_timeout=2s -c lock_timeout=2s "
    f"-c statement_timeout={STATEMENT_SECONDS}s -c default_transaction_isolation=read\\ committed "
    "-c idle_session_timeout=0 -c row_security=off -c client_min_messages=warning -c timezone=UTC"
)

SYNCHRONOUS = ("on", "remote_apply")
"""Values of synchronous_commit with which a standby's disk has what is acknowledged. (`local` and `off` don't
ask a standby, `remote_write` believes its memory.)"""


class Session(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose waits end. `limit`: seconds for each answer."""

    limit = ANSWER_SECONDS
    warning = ""
    """What the engine warned of since this was last emptied."""

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """Psycopg's own loop (a generator that says what its socket must be ready for), with a deadline."""
        deadline = time.monotonic() + self.limit
        poller = select.poll()
        try:
            wanted = next(gen)
            while True:
                poller.register(self.pgconn.socket, _EVENTS[int(wanted)])
                left = deadline - time.monotonic()
                ready = poller.poll(max(0.0, left) * 1000)
                if not ready:
                    raise self._silent()
                got = sum(bit for bit, events in _BITS if ready[0][1] & events) or int(wanted)
                wanted = gen.send(got)
        except StopIteration as done:
            return done.value
        except BaseException:
            with contextlib.suppress(psycopg.Error):
                gen.close()  # its own tidying asks the connection, too
            raise

    def _silent(self) -> psycopg.OperationalError:
        self.pgconn.finish()
        return psycopg.OperationalError(f"the engine gave no answer within {self.limit:g} seconds")

    def warned(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self.warning = f"{notice.sqlstate}: {notice.message_primary}"


class Texts:
    """Many texts for one parameter, of the type text[]. The driver's own way takes longer for a row than to
    wrap a DEK: here nothing is escaped, and no dumper is looked for."""

    __slots__ = ("data",)

    def __init__(self, texts: Collection[str]) -> None:
        """Without a NUL, which PostgreSQL knows in no text."""
        parts = [_ARRAY.pack(1, 0, _TEXT, len(texts), 1) if texts else _ARRAY.pack(0, 0, _TEXT, 0, 0)[:12]]
        for text in texts:
            data = text.encode()
            parts += (len(data).to_bytes(4, "big"), data)
        self.data = b"".join(parts)


_TEXT, _TEXTS = 25, 1009
"""Numbers of the types text and text[] (pg_type.dat): the same in all servers."""

_ARRAY = struct.Struct("!5i")
"""Before the elements of an array (array_send): dimensions, whether there are NULLs, the elements' type; of
each dimension how many, and the number of the first. Each element comes behind its length."""


class _TextsDumper(Dumper):
    format = pq.Format.BINARY
    oid = _TEXTS

    def dump(self, obj: Texts) -> bytes:
        return obj.data


psycopg.adapters.register_dumper(Texts, _TextsDumper)

_READ, _WRITE = select.POLLIN | select.POLLERR | select.POLLHUP | select.POLLNVAL, select.POLLOUT
_EVENTS = {1: select.POLLIN, 2: select.POLLOUT, 3: select.POLLIN | select.POLLOUT}  # psycopg.waiting.Wait
_BITS = ((1, _READ), (2, _WRITE))


# ---- connecting ----------------------------------------------------------------------------------------


def connect(where: Where, application: str = "progressdb-kms") -> Session:
    """A session that may be used: see the module. Raises ConfigError for what no second try will mend,
    StoreUnavailable."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    try:
        session: Session = Session.connect(**_parameters(where, application))
    except psycopg.Error as error:
        if (half_open := getattr(error, "pgconn", None)) is not None:
            half_open.finish()  # older releases leave that to the garbage collector
        raise _refused(where, error) from None
    with contextlib.ExitStack() as undo:
        undo.callback(session.close)
        session.add_notice_handler(session.warned)
        _look_who_listens(where, session)
        try:
            _check(where, session)
        except psycopg.Error as error:
            raise translated(where, error) from None
        undo.pop_all()
    return session


def _parameters(where: Where, application: str) -> dict[str, Any]:
    nowhere = "/nonexistent"  # names of files for which libpq would look at the home of whoever we run as
    return {
        "host": where.folder or ",".join(host.name for host in where.hosts),
        "port": ",".join(str(host.port) for host in where.hosts) or str(where.socket_port),
        "dbname": where.database,
        "user": where.user,
        "passfile": nowhere,
        "application_name": application,
        "options": _OPTIONS,
        "client_encoding": "UTF8",
        "connect_timeout": CONNECT_SECONDS,
        "target_session_attrs": "read-write",
        "gssencmode": "disable",
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "autocommit": True,
        **(_by_socket(where) if where.folder else _by_tls(where, nowhere)),
    }


def _by_socket(where: Where) -> dict[str, Any]:
    if not where.password_file:
        return {}  # `peer`, or `trust`: the server believes who may open the socket
    if pq.version() < 160000:
        raise ConfigError(
            f"a password over a Unix socket needs libpq 16, for SCRAM alone; this is {pq.version() // 10000}",
            hint="leave password_file out and let pg_hba.conf say `peer`",
        )
    return {"password": where.password(), "require_auth": "scram-sha-256"}


def _by_tls(where: Where, nowhere: str) -> dict[str, Any]:
    if not os.access(where.tls_ca, os.R_OK):
        raise ConfigError(f"tls_ca {where.tls_ca} can't be read", hint="it names the certificate of a CA")
    if (mode := os.stat(where.tls_ca).st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"others may write to tls_ca {where.tls_ca} (mode {mode & 0o7777:04o}), which says who answers",
            hint=f"chmod go-w {where.tls_ca}, where it holds what it should",
        )
    result = {
        "sslmode": "verify-full",
        "sslrootcert": where.tls_ca,
        "sslcrl": nowhere,
        "ssl_min_protocol_version": "TLSv1.2",
    }
    if where.tls_cert:
        read_secret("tls_key_file", where.tls_key_file)  # looked at alone: libpq reads it
        return {
            **result,
            "sslcert": where.tls_cert,
            "sslkey": where.tls_key_file,
            "channel_binding": "prefer",
        }
    # The channel can be bound by SCRAM alone: a request for MD5 or clear text is refused without an answer.
    return {
        **result,
        "sslcert": nowhere,
        "sslkey": nowhere,
        "password": where.password(),
        "channel_binding": "require",
    }


def _look_who_listens(where: Where, session: Session) -> None:
    """A server by a Unix socket proves nothing, where it asks for no password: whoever may write to the
    folder can be there while the engine is down. Raises ConfigError."""
    if not where.folder or where.password_file or not hasattr(socket, "SO_PEERCRED"):
        return
    with socket.socket(fileno=os.dup(session.fileno())) as sock:
        _, uid, _ = struct.unpack("3I", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    folder = Path(where.folder).resolve()
    for place in (folder, *folder.parents) if uid not in (0, os.geteuid()) else ():
        mode = place.stat().st_mode
        if mode & stat.S_IWOTH and (place == folder or not mode & stat.S_ISVTX):
            raise ConfigError(
                f"{where} may be anybody's: all users may write to {place}, and uid {uid} listens there",
                hint="let unix_socket_directories be a folder of the engine's own, such as /run/postgresql; "
                "or give a password_file, by which it proves itself",
            )


_LOOK = (
    "SELECT set_config('synchronous_commit', current_setting('synchronous_commit'), false), "
    "current_setting('in_hot_standby'), pg_backend_pid(), "
    "current_setting('default_transaction_read_only'), current_setting('search_path')"
)


def _check(where: Where, session: Session) -> None:
    version = session.info.server_version
    if version < LEAST_SERVER:
        raise ConfigError(
            f"{where} is PostgreSQL {version // 10000}, and a fleet needs 14 or newer",
            hint="upgrade the engine; `export` takes a host's own store there later",
        )
    encoding = session.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise ConfigError(
            f"{where} has the encoding {encoding}, in which not every thread_id can be written",
            hint=f"CREATE DATABASE {where.database} OWNER {where.user} ENCODING 'UTF8' TEMPLATE template0",
        )
    ((commit, standby, backend, read_only, path),) = session.execute(_LOOK).fetchall()
    if backend != session.info.backend_pid or path != SCHEMA:
        raise ConfigError(
            f"{where} is reached through a pooler that gives each transaction another session",
            hint="name the servers themselves in hosts, or a pool in session mode",
        )
    if standby == "on" or read_only == "on":
        raise StoreUnavailable(f"{where} is a standby now", code=UNREACHABLE, hint=_TRIED)
    if commit not in SYNCHRONOUS:
        raise ConfigError(
            f"{where} acknowledges what a failover loses: synchronous_commit is {commit} for {where.user}",
            hint=f"ALTER ROLE {where.user} SET synchronous_commit = on; see the database's setting, too",
        )


# ---- what the engine says ------------------------------------------------------------------------------

_TRIED = "it is tried again by itself"

_REFUSALS: tuple[tuple[str, str, str], ...] = (
    (
        r"certificate verify failed",
        "its certificate is not signed by the CA in tls_ca",
        "tls_ca must name the CA that signed the server's certificate",
    ),
    (
        r"server certificate for .* does not match host name",
        "its certificate is another host's",
        "name it in hosts as its certificate does",
    ),
    (
        r"does not support SSL",
        "it has no TLS",
        "set `ssl = on` with a certificate in postgresql.conf; without TLS only a Unix socket is used",
    ),
    (
        r"password authentication failed",
        "it does not take this user's password",
        "put the password into password_file, or set it anew: \\password in psql",
    ),
    (
        r"channel binding (is )?required|authentication method requirement|password-based auth.* require",
        "it asks for a password by another way than SCRAM",
        "password_encryption = scram-sha-256, set the password anew, and scram-sha-256 in pg_hba.conf",
    ),
    (
        r"no pg_hba.conf entry|Peer authentication failed|[Cc]ertificate authentication failed|"
        r"valid client certificate|fe_sendauth: no password",
        "its pg_hba.conf does not let this user in this way",
        "a line `hostssl DATABASE USER ADDRESS scram-sha-256` (or cert; over a Unix socket `local … peer`)",
    ),
    (
        r'(database|role) ".*" does not exist',
        "there is no such database or role",
        "CREATE ROLE and CREATE DATABASE … OWNER: see `progressdb-kms help fleet`",
    ),
    (
        r"could not load (private key|certificate) file|private key file",
        "tls_cert and tls_key_file can't be used",
        "they must be a certificate and its own key, in PEM",
    ),
)
"""What no second try will mend: found in libpq's words, what it means, what to do."""


def _refused(where: Where, error: psycopg.Error) -> KMSError:
    text = str(error)
    for pattern, meaning, hint in _REFUSALS:
        if re.search(pattern, text):
            return ConfigError(f"{where} can't be used: {meaning}", hint=hint)
    if "too many clients" in text or "remaining connection slots" in text:
        meaning, hint = (
            "it has no connection left",
            "raise max_connections; `store status` tells who has them",
        )
    elif "read-only" in text or "hot standby" in text or "recovery mode" in text:
        meaning, hint = "no server is the primary now, or default_transaction_read_only is on", _TRIED
    else:
        meaning, hint = _line(text) or "no answer", _TRIED
    return StoreUnavailable(f"{where} can't be reached: {meaning}", code=UNREACHABLE, hint=hint)


def _line(text: str) -> str:
    """libpq's words in one line, without what it is told of each address."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return last.rpartition("failed: ")[2].rpartition("FATAL: ")[2].strip()[:200]


FORGOTTEN = (
    sqlstate.InvalidSqlStatementName,
    sqlstate.DuplicatePreparedStatement,
    sqlstate.FeatureNotSupported,
)
"""The driver prepares what is asked often. Where a pipeline is aborted, it may take for prepared what is
not, or the other way round; and where a column was altered, "cached plan must not change result type": then
each later use fails, as long as the session lives. So that ends."""


FUTURE = f"{SCHEMA}.changes holds a change of a number that is still to come: somebody wrote there by hand"
FUTURE_HINT = f"DELETE FROM {SCHEMA}.changes WHERE gen > (SELECT gen FROM {SCHEMA}.fleet)"  # noqa: S608
"""To write over it would not do: the number may have been another change's, and the fleet's own row put back
by hand. Then hosts that have seen that change would not hear of this one."""


def translated(where: Where, error: psycopg.Error) -> KMSError:
    """What became of a statement. The words of the engine may quote a row, so only its kind is told."""
    if isinstance(error, (sqlstate.UndefinedTable, sqlstate.InvalidSchemaName, sqlstate.UndefinedColumn)):
        return StoreDamaged(
            f"{where} holds no fleet that {where.user} may see, or one of another release",
            hint="`progressdb-kms store init`, or `store migrate`; or GRANT USAGE ON SCHEMA kms",
        )
    if isinstance(error, sqlstate.InsufficientPrivilege):
        return ConfigError(
            f"{where} does not let {where.user} do that",
            hint=f"the schema {SCHEMA} and its tables must be {where.user}'s, without row security",
        )
    if isinstance(error, sqlstate.DiskFull):
        return StoreUnavailable(
            f"the disk of {where} is full", hint="make room there: nothing acknowledged is lost"
        )
    if isinstance(error, (sqlstate.QueryCanceled, sqlstate.LockNotAvailable)):
        return StoreUnavailable(f"{where} is too busy: it gave up waiting", hint=_TRIED)
    if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:
        return StoreUnavailable(f"the connection to {where} was lost", code=UNREACHABLE, hint=_TRIED)
    if (error.sqlstate or "")[:2] in ("08", "57", "25") or isinstance(error, FORGOTTEN):
        return StoreUnavailable(f"the connection to {where} was lost", code=UNREACHABLE, hint=_TRIED)
    if isinstance(error, sqlstate.UniqueViolation) and error.diag.table_name == "changes":
        return StoreUnavailable(FUTURE, hint=FUTURE_HINT)
    kind = type(error).__name__
    return StoreUnavailable(
        f"{where} can't do that now: {kind} ({error.sqlstate})", hint="its log tells more"
    )


# ---- one that is made again ------------------------------------------------------------------------------


class Link:
    """A session that is made when it is first needed, and again after it was lost. For one thread at a time:
    who comes meanwhile waits."""

    def __init__(self, where: Where, application: str = "progressdb-kms") -> None:
        self.where = where
        self._application = application
        self._session: Session | None = None
        self._lock = threading.RLock()

    @property
    def connected(self) -> bool:
        """Or it was, and nobody has noticed yet that it isn't any more."""
        return self._session is not None

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Raises StoreUnavailable, StoreDamaged, ConfigError. A session that failed in a way which says
        nothing of its state is dropped."""
        with self._lock:
            if self._session is None or self._session.closed:
                self._session = connect(self.where, self._application)
            session = self._session
            try:
                yield session
            except psycopg.Error as error:
                self._after(session, error)
                raise translated(self.where, error) from None
            except BaseException:
                self._after(session, None)
                raise

    def _after(self, session: Session, error: psycopg.Error | None) -> None:
        """Keep it only if it is known to be at rest. 25006: it became a standby's."""
        lost = error is not None and (
            error.sqlstate is None or isinstance(error, (sqlstate.ReadOnlySqlTransaction, *FORGOTTEN))
        )
        if lost or session.closed or session.info.transaction_status != pq.TransactionStatus.IDLE:
            self.drop()

    def drop(self) -> None:
        with self._lock:
            session, self._session = self._session, None
            if session is not None:
                with contextlib.suppress(psycopg.Error, OSError):
                    session.close()

    close = drop
