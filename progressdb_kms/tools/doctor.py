"""`doctor`: what may keep the daemon from working or from keeping its promises, and what to do about it.

CHECKS is the table. A check looks and changes nothing; it returns findings: `ok`, `warn` (it works, but less
well or less safely) or `fail`. What a check can't see (no rights, no daemon) is a warning, never silence.

The process is hardened as the daemon would be, so what is found here is what a daemon started from here gets.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib
import json
import os
import pwd
import resource
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

from .. import __version__
from ..audit.chain import AT_THE_END
from ..audit.log import FILE_NAME as AUDIT_LOG
from ..client import Client, ClientError
from ..config import keysource
from ..config.load import Loaded
from ..config.options import Settings
from ..config.values import host_and_port
from ..crypto.keyring import fingerprint
from ..crypto.memory import PAGE, LockedBuffer
from ..errors import KMSError, PeerRefused, StoreDamaged
from ..process import hardening
from ..process.streams import DEPENDENCIES
from ..rules import Peer, Policy, rights_of
from ..service import lastbackup
from ..service.clock import RELEASED, REMEDY, age, overdue
from ..service.lock import is_held
from ..service.plan import Configured, plan
from ..service.rotation import RETIRED_KEK, retired
from ..service.usage import near
from ..store.contract import HEAVY
from ..store.seal import STATE, StoreState
from ..store.sqlite import DAMAGED, check_schema, refuse_lost
from ..store.sqlite import FILE_NAME as STORE
from ..wire import loopback
from ..wire.admission import SPARE_FILES
from ..wire.lanes import THREADS
from ..wire.routes import ROUTES
from ..wire.slab import size_of
from . import asowner, rehearsal
from .asowner import PACKAGED_CONFIG
from .checkup import FAIL, OK, WARN, Finding, failed
from .console import paint, safe
from .keyfiles import RESUME, KeyFiles

MIN_FREE = 16 << 20
"""Bytes: below this the store's log can't grow through a rotation of a few thousand DEKs."""

LOW_FREE = 256 << 20
"""Bytes from which there is nothing to say about the disk."""

LARGE_LOG = 2 << 30
"""Bytes of audit log from which logrotate seems to be missing."""

STALE_BACKUP, STALE_DRILL = 36 * 3600, 8 * 86400
"""Seconds from which the alerts ring, too."""

TOLERANCE = 120
"""Seconds by which files may seem to come from the future."""

ANSWER_SECONDS = 10.0
"""A daemon that is busy answers within this."""

MIN_CRYPTOGRAPHY = 38


class Patient:
    """What all checks look at. `settings` is None where the configuration is wrong."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.trouble: KMSError | None = None
        self.keys: Configured | None = None
        self.barred: KMSError | None = None
        """What the daemon's user meets where root met nothing."""
        self.server_uid: int | None = getattr(args, "server_uid", None)
        self.rehearsal: rehearsal.Rehearsal | None = None
        self.unrehearsed = "its keys are not to be had here"
        flags = {"socket": args.socket, "data_dir": args.data_dir, "config": args.config}
        self.settings = self._settings(flags)
        self.status: dict[str, Any] | None = None
        self.unreachable = ""

    def _settings(self, flags: dict[str, str | None]) -> Settings | None:
        try:
            with asowner.load_config(flags, first=True, fleet=True) as loaded:
                self.keys = Configured.of(loaded, fingerprint)
                self.barred = asowner.barred(flags, loaded.settings)
                self.rehearse(loaded)
                return loaded.settings
        except KMSError as error:
            self.trouble = error
        with contextlib.suppress(KMSError), asowner.load_config(flags, need_key=False, fleet=True) as loaded:
            return loaded.settings
        return None

    def rehearse(self, loaded: Loaded) -> None:
        """While the keys are here."""
        if not loaded.settings.data_dir.exists():
            self.unrehearsed = ""
            return
        try:
            alone = loaded.settings.store == "sqlite"
            self.rehearsal = rehearsal.rehearse(loaded) if alone else rehearsal.of_fleet(loaded)
        except (KMSError, OSError, sqlite3.Error) as error:
            self.unrehearsed = str(error)

    @property
    def data_dir(self) -> Path:
        assert self.settings is not None
        return self.settings.data_dir

    @property
    def owner(self) -> int:
        """The daemon runs as this user."""
        assert self.settings is not None
        return asowner.daemon_user(self.settings)


Findings = Iterable[Finding]


class Check(NamedTuple):
    """`settings`: it looks at what the configuration names, and is left out where that is wrong."""

    name: str
    look: Callable[[Patient], Findings]
    settings: bool = True


# ---- the process and the host ------------------------------------------------------------------------


def _versions(patient: Patient) -> Findings:
    found = {package: importlib.import_module(module).__version__ for module, package in DEPENDENCIES.items()}
    major = int(found["cryptography"].partition(".")[0])
    text = f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, "
    text += ", ".join(f"{package} {version}" for package, version in found.items())
    if major < MIN_CRYPTOGRAPHY:
        yield Finding(FAIL, text, f"cryptography {MIN_CRYPTOGRAPHY} or newer is needed")
    else:
        yield Finding(OK, text)
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        try:
            db.execute("SELECT json_extract('{}', '$.a')")
        except sqlite3.Error:
            yield Finding(
                FAIL, "SQLite has no JSON functions", "use SQLite 3.38 or newer, or one built with JSON1"
            )


def _hardening(patient: Patient) -> Findings:
    for measure in hardening.harden():
        yield Finding(OK if measure.ok else WARN, f"{measure.name}: {measure.detail}")


KEYS = 8
"""Pages of locked memory: 3 for the keyring and the staging slots, 5 for what the keeper opens at a time."""


def _memory(patient: Patient) -> Findings:
    limit, of_unit = _memory_limit(patient)
    shown = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
    shown += ", the unit's" if of_unit else ", this shell's"
    workers = patient.settings.workers if patient.settings is not None else 1
    need = PAGE * (KEYS + workers * (size_of(THREADS) // PAGE + 1))
    kind = _lockable(patient, need, limit)
    required = patient.settings is not None and patient.settings.memory_lock == "require"
    raise_it = "LimitMEMLOCK=infinity in the unit, or `ulimit -l unlimited` before the start"
    if kind == "memfd_secret":
        yield Finding(OK, f"keys live in memfd_secret pages, which not even root reads (limit {shown})")
    elif kind == "mlock":
        todo = "Linux 5.14 or newer offers memfd_secret; in a container the system call must be allowed"
        yield Finding(OK, f"keys live in locked pages; root could read them by ptrace (limit {shown})", todo)
    else:
        told = f"the {need >> 10} KiB that keys and connections need can't be locked (limit {shown})"
        yield Finding(FAIL if required else WARN, told, raise_it)


def _memory_limit(patient: Patient) -> tuple[int, bool]:
    """Bytes, and whether it is the unit's word."""
    found = _of_unit(patient, "LimitMEMLOCK")
    if found == "infinity" or found.isdigit():
        return resource.RLIM_INFINITY if found == "infinity" else int(found), True
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[1], False


def _of_unit(patient: Patient, name: str) -> str:
    """A property of the packages' unit, where it is what serves this configuration."""
    settings = patient.settings
    if settings is None or settings.config_file != PACKAGED_CONFIG or not shutil.which("systemctl"):
        return ""
    command = ["systemctl", "show", "--value", f"--property={name}", "progressdb-kms.service"]
    return subprocess.run(command, capture_output=True, timeout=10, check=False).stdout.decode().strip()


def _lockable(patient: Patient, need: int, limit: int) -> str:
    """What the daemon's memory would be, tried in a child: within the limit and as the daemon's user, since
    root may lock what others may not."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
            if os.geteuid() == 0 and patient.settings is not None:
                os.setresuid(*[patient.owner] * 3)
            with LockedBuffer(need) as memory:
                os.write(writer, memory.kind.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        kind = answer.read().decode()
    os.waitpid(child, 0)
    return kind or "unlocked"


def _ptrace(patient: Patient) -> Findings:
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        yield Finding(
            OK, "no Yama: processes of one user may trace each other, but not one that is not dumpable"
        )
        return
    if scope:
        yield Finding(OK, f"kernel.yama.ptrace_scope is {scope}")
    else:
        yield Finding(WARN, "kernel.yama.ptrace_scope is 0", "sysctl kernel.yama.ptrace_scope=1")


def _descriptors(patient: Patient) -> Findings:
    assert patient.settings is not None
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    need = patient.settings.max_connections + SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < need:
        level = FAIL if hard <= SPARE_FILES else WARN  # with so few no start gets by
        yield Finding(
            level, f"{hard} open files are allowed, max_connections needs {need}", "raise LimitNOFILE"
        )
    else:
        yield Finding(OK, f"enough open files are allowed for max_connections ({need})")


def _clock(patient: Patient) -> Findings:
    now = time.time()
    if now < RELEASED:
        yield Finding(FAIL, f"the clock shows {_day(now)}", "set it: records and deletion times come from it")
        return
    if patient.rehearsal is not None and patient.rehearsal.held:
        yield Finding(WARN, f"scheduled deletions are held: {patient.rehearsal.held}", REMEDY)
        return
    files = [patient.data_dir / name for name in (STORE, STORE + "-wal", AUDIT_LOG)]
    newest = max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
    if newest > now + TOLERANCE:
        yield Finding(
            WARN, f"the store was written on {_day(newest)}, which is yet to come", "was the clock set back?"
        )
    else:
        yield Finding(OK, f"the clock shows {_day(now)}")


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


# ---- configuration and keys ----------------------------------------------------------------------------


def _config(patient: Patient) -> Findings:
    trouble = patient.trouble
    if patient.barred is not None:
        todo = f"`chown {patient.owner}` it, and look at the folders above it"
        yield Finding(FAIL, f"the daemon's user, uid {patient.owner}: {patient.barred.message}", todo)
    elif trouble is None:
        assert patient.keys is not None
        yield Finding(OK, f"{patient.keys.master.source.label} holds the KEK {patient.keys.master.kek_id}")
    elif patient.settings and _only_systemd_knows(patient.settings):
        said = "the master key is a systemd credential, which is not to be had here"
        yield Finding(WARN, said, "run it by systemd-run: `progressdb-kms help install`")
    else:
        yield Finding(FAIL, trouble.message, trouble.hint)


def _only_systemd_knows(settings: Settings) -> bool:
    credential = settings.master is not None and settings.master.form == "credential"
    return credential and not os.environ.get("CREDENTIALS_DIRECTORY")


def _key_file(patient: Patient) -> Findings:
    assert patient.settings is not None
    yield from _beside_the_data(patient.settings)
    if patient.settings.master_key_file is None:
        yield Finding(OK, "the master key is not in a file of its own")
        return
    path = Path(patient.settings.master_key_file)
    try:
        about, folder = path.stat(), path.parent.stat()
    except OSError as error:
        yield Finding(
            FAIL, f"{path} can't be looked at: {error.strerror}", "name the key file in master_key_file"
        )
        return
    trouble = keysource.distrust(str(path), about, patient.owner, credential=False)
    if trouble:
        yield Finding(FAIL, f"{path} {trouble[0]}", trouble[1])
    elif folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
        yield Finding(
            FAIL, f"others may replace {path}: its folder is open to them", f"chmod go-w {path.parent}"
        )
    elif _is_mounted(path):
        todo = f"mount its folder {path.parent}: a rotation puts a new file in its place"
        yield Finding(WARN, f"{path} is mounted alone, so no rotation can replace it", todo)
    else:
        yield Finding(OK, f"{path} has mode {about.st_mode & 0o777:04o}")


def _beside_the_data(settings: Settings) -> Findings:
    """A copy of the data-dir is worth nothing without the key."""
    within = settings.master is not None and settings.master.form == keysource.HEX
    holder = settings.config_file if within else settings.master_key_file
    if holder and settings.data_dir.resolve() in Path(holder).resolve().parents:
        said = f"{holder} is in the data-dir: whoever has a copy of that has the key, and all DEKs"
        yield Finding(WARN, said, "move it to a folder of its own, and rotate the KEK if copies were made")


def _is_mounted(path: Path) -> bool:
    """Is the file itself a mount point? proc_pid_mountinfo(5): the fifth field, with octal escapes."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
        points = (line.split()[4].encode().decode("unicode_escape") for line in lines)
        return str(path) in points
    return False


def _rotation(patient: Patient) -> Findings:
    assert patient.settings is not None
    if patient.settings.master_key_file is None:
        return
    files = KeyFiles(Path(patient.settings.master_key_file))
    if files.following.exists():
        yield Finding(WARN, f"{files.following} is left of a rotation", f"start the daemon and {RESUME}")
    for part in files.parts():
        yield Finding(WARN, f"{part} is a part of a key file", "the next rotate-kek removes it")
    old = sorted(files.current.parent.glob(files.current.name + ".old-*"))
    if old:
        yield Finding(
            OK, f"{len(old)} old key files are kept for old backups: {', '.join(p.name for p in old)}"
        )


# ---- the data-dir --------------------------------------------------------------------------------------


def _folder(patient: Patient) -> Findings:
    path = patient.data_dir
    try:
        about = path.stat()
        names = sorted(os.listdir(path))
    except FileNotFoundError:
        yield Finding(OK, f"{path} is not there yet: the first start makes it")
        return
    except OSError as error:
        yield Finding(
            WARN, f"{path} can't be looked into: {error.strerror}", "run doctor as root or the daemon's user"
        )
        return
    if about.st_mode & 0o077:
        yield Finding(
            FAIL, f"{path} is open to others (mode {about.st_mode & 0o777:04o})", f"chmod 0700 {path}"
        )
    wrong = [name for name in names if _is_open(path / name, about.st_uid)]
    if wrong:
        yield Finding(
            FAIL,
            f"open to others, or not the owner's: {', '.join(wrong)}",
            f"chown and chmod 0600 them in {path}",
        )
    elif not about.st_mode & 0o077:
        yield Finding(OK, f"{path} belongs to uid {about.st_uid} alone")
    yield from _unwritable(path)


def _unwritable(folder: Path) -> Findings:
    """What no start gets by: a disk that was made read-only after an error, an immutable file."""
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        todo = "look at the kernel log: the disk may have failed; then mount it anew"
        yield Finding(FAIL, f"the file system of {folder} is read-only", todo)
        return
    for path in (folder, folder / STORE, folder / AUDIT_LOG):
        if not path.exists():
            continue
        about = path.stat()
        if not os.access(path, os.W_OK) or (about.st_uid and not about.st_mode & stat.S_IWUSR):
            todo = "look at its rights and its owner, and with `lsattr` whether it is immutable"
            yield Finding(FAIL, f"{path} can't be written", todo)


def _is_open(path: Path, owner: int) -> bool:
    about = path.lstat()
    return bool(about.st_mode & 0o077) or about.st_uid != owner


def _disk(patient: Patient) -> Findings:
    place = next(folder for folder in (patient.data_dir, *patient.data_dir.parents) if folder.exists())
    about = os.statvfs(place)
    free = about.f_bavail * about.f_frsize
    text = f"{free >> 20:,} MiB are free at {place}"
    todo = "make room: a rotation needs about three times the size of kms.db"
    if free < MIN_FREE or (about.f_files and not about.f_favail):
        yield Finding(
            FAIL, text if about.f_favail or not about.f_files else f"no inode is free at {place}", todo
        )
    else:
        yield Finding(OK, text) if free >= LOW_FREE else Finding(WARN, text, todo)


def _store(patient: Patient) -> Findings:
    path = patient.data_dir / STORE
    if not path.exists():
        if not (patient.data_dir / AUDIT_LOG).exists():
            yield Finding(OK, "there is no store yet: the first start makes it")
        return
    if not path.is_file():  # SQLite would wait for whoever writes to a pipe
        yield Finding(FAIL, f"{path} is no regular file", "find out who put it there; move it away")
        return
    try:
        refuse_lost(path)
        # Without a write-ahead log SQLite would make one, and root's would lock the daemon out.
        mode = "mode=ro" if path.with_name(STORE + "-wal").exists() else "mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, timeout=5)) as db:
            yield from _store_findings(patient, path, db)
    except StoreDamaged as error:
        yield Finding(FAIL, error.message, error.hint)
    except sqlite3.OperationalError as error:
        yield Finding(WARN, f"{path} can't be read: {error}", "run doctor as root or the daemon's user")
    except sqlite3.DatabaseError as error:
        yield Finding(FAIL, f"{path} is damaged: {error}", DAMAGED)


def _store_findings(patient: Patient, path: Path, db: sqlite3.Connection) -> Iterator[Finding]:
    application, version = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    try:
        check_schema(path, application, version)
    except KMSError as error:
        yield Finding(FAIL, error.message, error.hint)
        return
    answer = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if answer != "ok":
        yield Finding(FAIL, f"{path} is damaged: {answer}", DAMAGED)
        return
    state = StoreState.from_row(_row(db, STATE) or None)
    active = f"{state.active.kek_id} since {state.active.since[:10]}" if state.active else "none"
    yield Finding(
        OK, f"{path} is whole: {sum(row.deks for row in state.keks.values()):,} DEKs, active KEK {active}"
    )
    assert patient.settings is not None
    if old := overdue(state.active, time.time(), patient.settings.kek_max_age_days):
        yield Finding(WARN, old)
    if not is_held(patient.data_dir):  # else the daemon tells
        heavy = dict(db.execute(f"SELECT key_id, encrypts FROM usage WHERE encrypts >= {HEAVY}"))  # noqa: S608
        for line in near(heavy):
            yield Finding(WARN, *line.split(": ", 1))
    if patient.keys is not None and state.active is not None:
        yield from _keys_fit(patient.keys, db, state)


def _keys_fit(keys: Configured, db: sqlite3.Connection, state: StoreState) -> Iterator[Finding]:
    """The start's own decision."""
    names = db.execute("SELECT key FROM kms WHERE substr(key, 1, ?) = ?", (len(RETIRED_KEK), RETIRED_KEK))
    rows = {name: _row(db, name) for (name,) in names}
    assert state.active is not None
    try:
        chosen = plan((state.active.kek_id, state.active.version), state.keks, keys, retired(rows))
    except KMSError as error:
        yield Finding(FAIL, error.message, error.hint)
        return
    if chosen.notice:
        yield Finding(WARN, chosen.notice)


def _row(db: sqlite3.Connection, name: str) -> dict[str, Any]:
    row = db.execute("SELECT value FROM kms WHERE key = ?", (name,)).fetchone()
    found: dict[str, Any] = json.loads(row[0]) if row else {}
    return found


def _start(patient: Patient) -> Findings:
    """The start's own checks, run on a copy."""
    found = patient.rehearsal
    if found is None:
        if patient.unrehearsed:
            todo = "run doctor as root or the daemon's user, where the key is to be had"
            yield Finding(WARN, f"whether it starts was not tried: {patient.unrehearsed}", todo)
        return
    if found.refusal is not None:
        yield Finding(FAIL, f"it would not start: {found.refusal.message}", found.refusal.hint)
        return
    if found.fault:
        todo = "`progressdb-kms audit verify` shows it; find out who wrote there"
        if found.fault.endswith(f"{AT_THE_END})"):
            todo = (
                "a full disk or a killed process leaves that: its next start closes it; if it stays: " + todo
            )
        yield Finding(FAIL, f"the audit log has a fault: {found.fault}", todo)
    if found.erasures:
        todo = "something reads the store without a pause (Litestream?), or the disk is full: `status` counts"
        yield Finding(WARN, f"{found.erasures} shredded DEKs: a copy of their wrapped bytes may remain", todo)
    for text, todo in found.left_out:
        yield Finding(WARN, text, todo)
    if not (found.fault or found.erasures or found.left_out):
        assert patient.settings is not None
        alone = patient.settings.store == "sqlite"
        tried = "a start on a copy of the store worked, and" if alone else "a start is not tried in a fleet;"
        yield Finding(OK, f"{tried} the audit log verifies")


def _audit(patient: Patient) -> Findings:
    path = patient.data_dir / AUDIT_LOG
    if not path.exists():
        if (patient.data_dir / STORE).exists():
            yield Finding(
                WARN, f"{path} is gone", "where is it? `progressdb-kms audit verify` tells what is missing"
            )
        return
    size = path.stat().st_size
    if size > LARGE_LOG:
        yield Finding(
            WARN,
            f"{path} has {size >> 20:,} MiB",
            "set up logrotate (see packaging), with SIGHUP to the daemon",
        )
    else:
        yield Finding(OK, f"{path} has {size >> 10:,} KiB")


def _fleet(patient: Patient) -> Findings:
    assert patient.settings is not None
    if patient.settings.store == "sqlite":
        return ()
    from . import fleetdoctor

    return fleetdoctor.look(patient.settings, patient.keys)


def _backup(patient: Patient) -> Findings:
    assert patient.settings is not None
    alone = patient.settings.store == "sqlite"
    if alone and not (patient.data_dir / STORE).exists():
        return
    todo = "`systemctl enable --now progressdb-kms-backup.timer`, or see `progressdb-kms help runbook`"
    last = lastbackup.read(patient.data_dir)
    if last is None:
        of = "this store was ever made" if alone else "the fleet was ever made on this host"
        yield Finding(WARN, f"no backup of {of} by `progressdb-kms backup`", todo)
        return
    seconds, checked = (age(moment, time.time()) for moment in (last.created_at, last.checked_at))
    if seconds is None or seconds > STALE_BACKUP:
        yield Finding(WARN, f"the last backup is of {last.created_at[:16]}: {last.file}", todo)
    elif failed(last.file, last.created_at, last.checked_at):
        yield Finding(
            WARN, f"the last backup failed its drill: {last.file}",
            "`progressdb-kms backup --check` it: that tells what would not come back",
        )  # fmt: skip
    elif checked is None or checked > STALE_DRILL:
        yield Finding(
            WARN, f"no backup of the last days passed a drill; the last is {last.file}",
            "`progressdb-kms backup --check` it: that tells what would not come back",
        )  # fmt: skip
    else:
        told = f"the last backup is of {last.created_at[:16]}, and a drill passed: {last.file}"
        if _gone(last.file):
            yield Finding(WARN, f"{told}, where it is no more", "was it moved, or removed? Then make another")
        else:
            yield Finding(OK, told)


def _gone(file: str) -> bool:
    """False where nobody can tell, too."""
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


# ---- the daemon ----------------------------------------------------------------------------------------


def _socket(patient: Patient) -> Findings:
    assert patient.settings is not None
    path = patient.settings.socket
    folder = path.parent
    try:
        about, above = path.lstat(), folder.stat()
    except OSError as error:
        yield Finding(WARN, f"{path} can't be looked at: {error.strerror}", "is the daemon running?")
        return
    if not stat.S_ISSOCK(about.st_mode):
        yield Finding(FAIL, f"{path} is no socket", "remove it, or choose another path")
        return
    if about.st_uid not in (0, patient.owner):
        yield Finding(
            FAIL, f"{path} belongs to uid {about.st_uid}, not to the daemon", "somebody else listens there"
        )
    elif above.st_mode & 0o002:
        todo = "use a folder of its own, such as /run/progressdb-kms"
        level = WARN if above.st_mode & stat.S_ISVTX else FAIL
        yield Finding(level, f"{folder} is open to all: whoever is first may listen at {path}", todo)
    else:
        yield Finding(OK, f"{path} has mode {about.st_mode & 0o777:04o}")


def _peers(patient: Patient) -> Findings:
    """A list of callers that was written for the server alone leaves out who looks after the daemon."""
    assert patient.settings is not None
    rules = patient.settings.peer_rules
    if rules.callers is None:
        return
    served = rules.callers | (rules.admins or frozenset())
    asking = {0: "the commands of root", patient.owner: "the timer for metrics, and commands, of its user"}
    left_out = [(uid, who) for uid, who in asking.items() if uid not in served]
    for uid, who in left_out:
        todo = "add it to allowed_peer_uids, or to admin_peer_uids, if it may rotate and shred"
        yield Finding(WARN, f"uid {uid} is not served: {who} hear 403", todo)
    if not left_out:
        yield Finding(OK, f"{len(served)} UIDs are served")


def _policies(patient: Patient) -> Findings:
    """One for a whole group, or one too narrow, may leave nobody who rotates and shreds."""
    assert patient.settings is not None
    policies = [Policy.of(number, entry) for number, entry in enumerate(patient.settings.policies, 1)]
    if not policies:
        return
    asking = patient.settings.peer_rules.admins
    rights = [_rights(uid, policies) for uid in ({0, patient.owner} if asking is None else asking)]
    for op in sorted({route.op for route in ROUTES if route.admin}):
        barred = [next((one for one in each if not one.allows_operation(op)), None) for each in rights]
        if barred and None not in barred:
            entries = ", ".join(sorted({str(one.number) for one in barred if one is not None}))
            todo = f"let `operations` of entry {entries} have it, or name another in admin_peer_uids"
            yield Finding(WARN, f"of those who look after the daemon nobody may {op}", todo)
    if patient.settings.allowed_peer_uids is None and any(one.uid is not None for one in policies):
        todo = "list those who are served in allowed_peer_uids, and no UID of anybody's subuid range"
        text = "a user may have more UIDs than the one that an entry names (subuid(5)), and connect as those"
        yield Finding(WARN, text, todo)
    told = f"{len(policies)} in the configuration; `policy test` tells what they say to a call"
    yield Finding(OK, told)


def _rights(uid: int, policies: list[Policy]) -> tuple[Policy, ...]:
    """The policies that name a user, with the groups that the system has for it."""
    try:
        group = pwd.getpwuid(uid).pw_gid
        groups = os.getgrouplist(pwd.getpwuid(uid).pw_name, group)
    except KeyError:  # a UID without a name has what it was started with
        group, groups = -1, []
    rights = rights_of(Peer(uid, group), policies, groups=groups)
    return rights.policies if rights is not None else ()


def _tcp(patient: Patient) -> Findings:
    """Does the kernel tell who connects, does the daemon answer there, or could it, and whom?"""
    assert patient.settings is not None
    address, rules = patient.settings.tcp_address, patient.settings.peer_rules
    if address is None:
        return
    host, port = host_and_port(address)
    try:
        loopback.check(host)
    except (KMSError, OSError) as error:
        todo = "without tcp_diag in the kernel and AF_NETLINK it does not listen there"
        yield Finding(FAIL, f"the kernel does not tell who connects to {address}: {error}", todo)
        return
    families = _of_unit(patient, "RestrictAddressFamilies")
    if families and "AF_NETLINK" not in families:
        todo = (
            "copy tcp.conf from the packages' examples into progressdb-kms.service.d, daemon-reload, restart"
        )
        yield Finding(FAIL, f"the unit lets the daemon have no TCP: {families}", todo)
    if is_held(patient.data_dir):
        yield _answers(host, port, address, patient.owner)
    else:
        yield _bindable(host, port, address)
    served = {0, patient.owner} if rules.callers is None else rules.callers
    uids = ", ".join(map(str, sorted(served | (rules.admins or frozenset())))) or "none"
    level = WARN if rules.callers is None else OK
    yield Finding(
        level, f"served there are only the UIDs {uids}", "set allowed_peer_uids: [UID of the server]"
    )


def _answers(host: str, port: int, address: str, owner: int) -> Finding:
    """Also 403 is an answer: root may not be one of the callers. Anybody may listen where the daemon does
    not, and what answers is asked no more than who it is."""
    remote, peers, uid = http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS), loopback.Peers(), 0
    try:
        with contextlib.closing(remote), contextlib.closing(peers):
            remote.connect()
            sock = remote.sock
            remote.request("GET", "/healthz", headers={"Host": address})
            response = remote.getresponse()
            status = response.status
            with contextlib.suppress(PeerRefused):  # it has closed already
                uid = peers.identify(sock).uid
    except (OSError, http.client.HTTPException) as error:
        todo = "its log tells why; with a changed tcp_address, or a new drop-in tcp.conf, restart it"
        return Finding(FAIL, f"the daemon runs, and nothing answers at {address}: {error}", todo)
    if uid not in (0, owner):
        todo = "it gets what is sent there: find it (`ss -ltnp`), end it, and restart the daemon"
        return Finding(FAIL, f"uid {uid} answers at {address}, and the daemon's user is {owner}", todo)
    if status not in (200, 403):
        return Finding(FAIL, f"{address} answers /healthz with {status}", "is it another program? `ss -ltnp`")
    return Finding(OK, f"{address} answers" + ("" if status == 200 else f", and refuses uid {os.geteuid()}"))


def _bindable(host: str, port: int, address: str) -> Finding:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            sock.listen(1)
        except OSError as error:
            todo = "another program listens there: `ss -ltnp`"
            return Finding(FAIL, f"it would not start: {address} can't be bound: {error.strerror}", todo)
    return Finding(OK, f"{address} can be bound")


def _daemon(patient: Patient) -> Findings:
    assert patient.settings is not None
    with Client(patient.settings.socket, timeout=10.0, server_uid=patient.server_uid) as kms:
        try:
            ready, status = kms.ready(), kms.status()
        except ClientError as error:
            yield Finding(WARN if error.code == "connection_failed" else FAIL, error.message, error.hint)
            return
    if ready:
        yield Finding(OK, f"it answers and is ready, with the KEK {status.get('kek_id')}")
    for reason in ready.reasons:
        yield Finding(FAIL, f"it is not ready: {reason}")
    for warning in ready.warnings:
        yield Finding(WARN, warning)
    if status.get("version") != __version__:
        yield Finding(WARN, f"it runs release {status.get('version')}, this is {__version__}", "restart it")
    if dict(status.get("memory") or {}).get("kind") == "unlocked":
        yield Finding(WARN, "its keys are not in locked memory", "LimitMEMLOCK=infinity in the unit")


CHECKS: tuple[Check, ...] = (
    Check("versions", _versions, settings=False),
    Check("config", _config, settings=False),
    Check("key file", _key_file),
    Check("rotation", _rotation),
    Check("memory", _memory, settings=False),
    Check("hardening", _hardening, settings=False),
    Check("ptrace", _ptrace, settings=False),
    Check("open files", _descriptors),
    Check("data-dir", _folder),
    Check("disk", _disk),
    Check("store", _store),
    Check("fleet", _fleet),
    Check("audit log", _audit),
    Check("backup", _backup),
    Check("start", _start),
    Check("clock", _clock),
    Check("socket", _socket),
    Check("peers", _peers),
    Check("policies", _policies),
    Check("tcp", _tcp),
    Check("daemon", _daemon),
)


# ---- the report ----------------------------------------------------------------------------------------


def examine(patient: Patient) -> Iterator[tuple[str, Finding]]:
    """Run all checks. One that breaks is a failure of its own, and keeps no other from being run."""
    for check in CHECKS:
        if check.settings and patient.settings is None:
            continue
        try:
            yield from ((check.name, finding) for finding in check.look(patient))
        except Exception as error:
            yield (check.name, Finding(FAIL, f"the check itself failed: {type(error).__name__}: {error}"))


def run(args: argparse.Namespace) -> int:
    found = list(examine(Patient(args)))
    failed = sum(finding.level == FAIL for _, finding in found)
    warned = sum(finding.level == WARN for _, finding in found)
    if args.json:
        checks = [{"check": name, **finding._asdict()} for name, finding in found]
        sys.stdout.write(json.dumps({"failed": failed, "warned": warned, "checks": checks}) + "\n")
    else:
        for name, finding in found:
            level = paint(f"{finding.level:4}", {OK: "green", WARN: "yellow"}.get(finding.level, "red"))
            sys.stdout.write(f"{level}  {name:10}  {safe(finding.text)}\n")
            if finding.todo and finding.level != OK:
                sys.stdout.write(f"{'':18}{safe(finding.todo)}\n")
        sys.stdout.write(f"{failed} failed, {warned} warned, {len(found) - failed - warned} ok\n")
    return 1 if failed else 0
