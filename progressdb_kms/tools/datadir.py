"""What the offline commands share: the configured keys in a keyring, the data-dir held, DEKs opened.

A command that writes is the daemon for a moment: it holds the lock of the data-dir, so none can run beside
it; it opens the store in the same way and with the same checks; and it writes an audit chain of its own, that
begins with a `start` event naming the command and ends with `stop`.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from ..audit import tail
from ..audit.log import AuditLog
from ..audit.verify import Left
from ..config.load import Loaded
from ..config.options import Settings
from ..crypto import envelope
from ..crypto.aead import NONCE_SIZE, Aead, same
from ..crypto.envelope import AUDIT_KEY, Wrapped
from ..crypto.keyring import REGION_SIZE, KekNotLoaded, Keyring
from ..crypto.memory import LockedBuffer
from ..errors import (
    AlreadyRunning,
    AuditUnavailable,
    AuthenticationFailed,
    KMSError,
    StoreDamaged,
    StoreUnavailable,
)
from ..service import ownkeys, start
from ..service.clock import Clock
from ..service.lock import LOCK_FILE, Files, claim, is_held
from ..service.plan import Configured
from ..store.contract import DekRecord, Usage
from ..store.heads import Head, anchor
from ..store.mending import SqliteMending
from ..store.policy import DISABLED, PENDING_DELETION, SHREDDED
from ..store.seal import STATE, StoreState
from ..store.sealed import Reader
from ..store.sqlite import FILE_NAME, SqliteReader
from . import asowner
from .console import CommandFailed

if TYPE_CHECKING:
    from ..fleet.engine import Link
    from ..fleet.mending import FleetMending
    from ..fleet.reader import FleetReader

SETTLED_SECONDS = 2.5
"""A daemon that opened its files again tells within a second."""


class Keys(NamedTuple):
    """The configured KEKs in locked memory, and what the configuration calls them."""

    keyring: Keyring
    configured: Configured


@contextlib.contextmanager
def keys(loaded: Loaded) -> Iterator[Keys]:
    region = LockedBuffer(REGION_SIZE, loaded.settings.memory_lock)
    try:
        keyring = Keyring(region.view)
        yield Keys(keyring, Configured.of(loaded, keyring.install))
    finally:
        region.wipe()  # unmapped with the process: views of it may be alive


@contextlib.contextmanager
def held(loaded: Loaded) -> Iterator[None]:
    """Hold the lock of the data-dir. Raises AlreadyRunning while a daemon or another command does."""
    data_dir = loaded.settings.data_dir
    try:
        lock = claim(data_dir)
    except AlreadyRunning as error:
        raise AlreadyRunning(
            error.message, hint="stop the daemon first: this command works offline"
        ) from None
    try:
        yield
    finally:
        lock.close()


@contextlib.contextmanager
def fleet_link(settings: Settings) -> Iterator[Link]:
    """To the database of the fleet that the configuration names; the driver is loaded for that alone."""
    from ..fleet.engine import Link
    from ..fleet.settings import where

    with _nobody_else(), asowner.acting_as(asowner.daemon_user(settings)):  # whose password file it is
        link = Link(where(settings), "progressdb-kms command")
        with link.session():
            """It is there from now on."""
    with contextlib.closing(link), _nobody_else():
        yield link


@contextlib.contextmanager
def _nobody_else() -> Iterator[None]:
    """A daemon tries again by itself what the engine could not do. A command is over."""
    try:
        yield
    except StoreUnavailable as error:
        if "by itself" in error.hint or "tried again" in error.hint:
            error.hint = "run the command again"
        raise


@contextlib.contextmanager
def reading(settings: Settings, host: str | None = None) -> Iterator[FleetReader | SqliteReader]:
    """The store, of this host or of its fleet, beside running daemons. A fleet's as it is at one moment, with
    the rows that this `host` of it has for itself; without one, those of this data-dir's."""
    if settings.store == "sqlite":
        with beside(settings.data_dir), contextlib.closing(reader_of(settings.data_dir)) as reader:
            yield reader
        return
    from ..fleet import schema
    from ..fleet.reader import FleetReader

    with fleet_link(settings) as link:
        schema.check(link)
        known = (settings.data_dir / start.HOST_FILE).exists()
        fleet = FleetReader(link, host or (start.host_id(settings.data_dir) if known else ""))
        with fleet.snapshot():
            if host and not fleet.state_of(host):
                raise CommandFailed(
                    f"the fleet knows no host {host}",
                    hint="its id is in kms.host of its data-dir, and in each `start` record of its log",
                )
            yield fleet


def reader_of(data_dir: Path) -> SqliteReader:
    """Raises CommandFailed where there is no store."""
    if not (data_dir / FILE_NAME).exists():
        raise CommandFailed(
            f"there is no store {data_dir / FILE_NAME}", hint="--data-dir or --config says where it is"
        )
    return SqliteReader(data_dir, mode=access(data_dir))


def access(data_dir: Path) -> str:
    """The mode in which SQLite can read kms.db. To read it SQLite makes an index (-shm) beside it, which it
    can't on a file system that is full, or read-only after an error of the disk. There kms.db is read alone
    where it is all: nobody has the store open, and it was closed in order, so that no log of it is left.
    Where one is left, of a daemon that was killed, and no index, a copy has to be made: CommandFailed."""
    log = data_dir / f"{FILE_NAME}-wal"
    alone = not log.exists() or not log.stat().st_size
    if not is_held(data_dir) and (alone or not (data_dir / f"{FILE_NAME}-shm").exists()):
        try:
            with contextlib.closing(SqliteReader(data_dir)) as reader:
                reader.names("")
        except StoreUnavailable as error:
            if alone:
                return "ro&immutable=1"
            raise CommandFailed(
                f"{data_dir / FILE_NAME} can't be read where it is: a part of it is in {log.name}, and "
                f"nothing can be written beside that ({error.message})",
                hint=f"`cp -a {data_dir}` to a disk with room, and name the copy by --data-dir",
            ) from None
    return "ro"


@contextlib.contextmanager
def still(data_dir: Path) -> Iterator[None]:
    """No daemon starts meanwhile: for what reads kms.db alone, which a checkpoint would change under it.

    Raises AlreadyRunning."""
    folder = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"a daemon starts on {data_dir} just now", hint="do it again") from None
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def beside(data_dir: Path) -> Iterator[None]:
    """For a command that only reads: the files that a running daemon has open are those at the paths, before
    and after. Raises CommandFailed."""
    _compare(data_dir)
    yield
    _compare(data_dir)


def _compare(data_dir: Path) -> None:
    deadline = time.monotonic() + SETTLED_SECONDS
    while (files := _published(data_dir)) is not None:
        there = {name: _identity(data_dir / name) for name in files}
        strange = [name for name in files if there[name] != files[name]]
        if not strange:
            return
        if time.monotonic() > deadline:
            raise CommandFailed(
                f"the running daemon has other files open than {', '.join(strange)} in {data_dir}",
                hint="don't stop it: `status --ready` says where it rescued what it holds",
            )
        time.sleep(0.1)


def _published(data_dir: Path) -> Files | None:
    """What a running daemon has open; None where none runs, or where it hasn't told yet."""
    if not is_held(data_dir):
        return None
    try:
        line = (data_dir / LOCK_FILE).read_bytes().split(b"\n")[1]
        return {name: (int(pair[0]), int(pair[1])) for name, pair in json.loads(line).items()}
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        about = os.lstat(path)
    except OSError:
        return None
    return about.st_dev, about.st_ino


def beyond(usage: Usage, kept: Usage | None) -> Usage:
    """What must be counted beside what is kept so that the larger numbers stand."""
    if kept is None:
        return usage
    return usage._replace(
        encrypts=max(0, usage.encrypts - kept.encrypts), decrypts=max(0, usage.decrypts - kept.decrypts)
    )


def as_left(record: DekRecord, left: Left) -> DekRecord:
    """A DEK of before, in no more open a state than it was left in. A deletion that was called off since does
    not come back, or the next start might shred it; whether it may be used then a person decides."""
    if record.state == SHREDDED or (left is None and record.state != PENDING_DELETION):
        return record
    return record._replace(state=PENDING_DELETION if left else DISABLED, delete_at=left or "")


class Work:
    """A store that is open for writing, and its audit chain."""

    def __init__(self, keyring: Keyring, store: SqliteMending | FleetMending, audit: AuditLog) -> None:
        self.keyring = keyring
        self.store = store
        self.audit = audit

    def anchor(self) -> None:
        """Inside a transaction: what was recorded is on the disk, and the store knows its end."""
        self.audit.sync()
        chain, seq, sig = self.audit.head
        anchor(self.store, chain, Head(seq, sig))

    def close(self) -> None:
        self.audit.note("stop")
        with self.store.transaction():
            self.anchor()


@contextlib.contextmanager
def working(loaded: Loaded, the_keys: Keys, command: str) -> Iterator[Work]:
    """Open the store as the daemon would, and note the end. The caller holds the lock."""
    data_dir = loaded.settings.data_dir
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(_fleet_store(loaded, the_keys))
        store = fleet or SqliteMending(data_dir)
        _, audit, _ = start.open_store(
            data_dir, *the_keys, command=command, given=store, fleet=fleet is not None
        )
        stack.enter_context(contextlib.closing(store))
        stack.enter_context(contextlib.closing(audit))
        work = Work(the_keys.keyring, store, audit)
        try:
            yield work
        except BaseException:
            with contextlib.suppress(KMSError):  # what went wrong first is what counts
                work.close()
            raise
        try:
            work.close()
        except (AuditUnavailable, StoreUnavailable) as error:
            raise CommandFailed(
                f"`{command}` is done, all of it; but its end is not on record: {error.message}",
                hint=error.hint,
            ) from None


@contextlib.contextmanager
def _fleet_store(loaded: Loaded, the_keys: Keys) -> Iterator[FleetMending | None]:
    """A fleet's store for a command, which is a host of it meanwhile. None where there is no fleet."""
    if loaded.settings.store == "sqlite":
        yield None
        return
    from ..fleet import schema
    from ..fleet.identity import Identity
    from ..fleet.mending import FleetMending
    from ..fleet.visitor import Visitor

    with fleet_link(loaded.settings) as link:
        schema.check(link)
        keks = frozenset(the_keys.keyring.kek_ids())
        data_dir = loaded.settings.data_dir
        who = Identity(data_dir, start.host_id(data_dir), platform.node(), Clock().reading().boot)
        with Visitor(link.where, who, keks) as visitor:
            yield FleetMending(link, visitor.host, visitor.inc)


@contextlib.contextmanager
def own_key(keyring: Keyring, name: str, row: Mapping[str, Any] | None) -> Iterator[memoryview | None]:
    """The key of our own that a row holds, in locked memory; None where it does not open."""
    with contextlib.ExitStack() as stack:
        key = None
        with contextlib.suppress(StoreDamaged, KekNotLoaded):
            if row is not None:
                key = stack.enter_context(ownkeys.opened(keyring, name, row))
        yield key


def put_back(data_dir: Path, reader: Reader, the_keys: Keys) -> str:
    """Why the store was put back: the audit log knows of changes that it has not. "" where all is well."""
    with own_key(the_keys.keyring, AUDIT_KEY, reader.read(ownkeys.ROWS[AUDIT_KEY])) as key:
        floor = tail.floor(tail.logs(data_dir), key) if key is not None else None
    epoch = reader.read(start.EPOCH) or {"epoch": 0}  # read after the log, which is never ahead
    state = StoreState.from_row(reader.read(STATE))
    return floor.above(int(epoch["epoch"]), state.change) if floor is not None else ""


# ---- DEKs --------------------------------------------------------------------------------------------


def foreign(blob: bytes) -> Wrapped:
    """As `parse`, but takes the Go service's form as well: nonce | ciphertext | tag, without AAD."""
    if len(blob) == envelope.LEGACY_SIZE:
        return Wrapped("", "", b"", blob[:NONCE_SIZE], blob[NONCE_SIZE:])
    return envelope.parse(blob)


class Opener:
    """Opens wrapped DEKs under any of the configured KEKs, and binds them anew."""

    def __init__(self, keyring: Keyring, foreign_too: bool = False) -> None:
        """`foreign_too`: what `rebind` and `same` are given may be in the Go service's form."""
        self._keyring = keyring
        self._parse = foreign if foreign_too else envelope.parse
        self._kek_ids = sorted(keyring.kek_ids(), key=lambda kek_id: kek_id != _active(keyring))
        self._ciphers: dict[str, Aead] = {}
        self._memory = LockedBuffer(2 * envelope.SCRATCH_SIZE)
        self._first = self._memory.view[: envelope.SCRATCH_SIZE]
        self._second = self._memory.view[envelope.SCRATCH_SIZE :]

    def check(self, key_id: str, blob: bytes) -> None:
        """Does it open as the DEK of this key? ValueError, with words that follow on a name, where not."""
        self._open(key_id, blob, self._first)

    def same(self, key_id: str, blob: bytes, other: bytes) -> bool:
        """Does `other` wrap the same DEK as the stored `blob`? ValueError where one of them doesn't open."""
        first = self._open(key_id, blob, self._first)
        return same(first, self._open(key_id, other, self._second, self._parse))  # type: ignore[arg-type]

    def rebind(self, kek_id: str, key_id: str, blob: bytes) -> bytes:
        """The same DEK under this KEK, bound to the key_id: as it is where it is that already, else wrapped
        anew, opened again and compared. ValueError."""
        dek = self._open(key_id, blob, self._first, self._parse)
        if blob.startswith(envelope.binding(kek_id, key_id)):
            return blob
        with self._keyring.borrow(kek_id) as kek:
            cipher = self._cipher(kek_id, kek)
            bound = envelope.wrap(cipher, kek_id, key_id, os.urandom(NONCE_SIZE), dek)
            again = envelope.unwrap(cipher, envelope.stored(key_id, bound), self._second)
        if not same(dek, again):  # type: ignore[arg-type]
            raise ValueError("does not open any more after it was wrapped anew")
        return bound

    def _open(
        self, key_id: str, blob: bytes, place: memoryview, parse: Callable[[bytes], Wrapped] = envelope.parse
    ) -> memoryview:
        wrapped = parse(blob)
        if wrapped.key_id not in ("", key_id):
            raise ValueError(f"holds the DEK of {wrapped.key_id}")
        candidates = [wrapped.kek_id] if wrapped.kek_id else self._kek_ids
        for kek_id in candidates:
            try:
                with self._keyring.borrow(kek_id) as kek:
                    return envelope.unwrap(self._cipher(kek_id, kek), wrapped, place)
            except KekNotLoaded:
                raise ValueError(f"needs the KEK {kek_id}, which is not configured") from None
            except AuthenticationFailed:
                continue
        if wrapped.kek_id:
            raise ValueError(f"does not open under the KEK {wrapped.kek_id} that it names")
        raise ValueError("does not open under any configured KEK (previous_master_keys may name more)")

    def _cipher(self, kek_id: str, kek: memoryview) -> Aead:
        """One for each KEK, as long as this lives: in an offline command a KEK stays where it is."""
        if kek_id not in self._ciphers:
            self._ciphers[kek_id] = Aead(kek)
        return self._ciphers[kek_id]

    def __enter__(self) -> Opener:
        return self

    def __exit__(self, *error: Any) -> None:
        self._ciphers.clear()
        self._memory.wipe()
        with contextlib.suppress(BufferError):  # a traceback may hold slices; the wipe is what counts
            self._first.release()
            self._second.release()
            self._memory.close()


def _active(keyring: Keyring) -> str | None:
    try:
        return keyring.active.kek_id
    except KekNotLoaded:
        return None


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Rows make no circles, and to look for some among so many takes a tenth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
