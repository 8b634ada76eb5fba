"""DEKs that come from elsewhere: JSON lines, the Go service's folders, our own snapshots.

    {"key_id", "thread_id", "wrapped", …}    a line of `export`, or of the Go service ("thread_key" will do)
    kms-deks/<key_id>.json                   {"id", "created_at", "wrapped", "thread_id"}: the Go service
    kms-deks-backup/<key_id>[.json].<YYYYMMDDTHHMMSS>     {"wrapped", "thread_id"}: its snapshots
    a folder of Pebble                       the Go service's later stores, see `pebble`
    {"key_id", "wrapped_dek", …}             what it answered, and keeps in its records of threads
    kms-deks-backup/<UTC time>-<kek_id>/<key_id>.json     a snapshot of a rotation of ours

Each DEK is opened under a configured KEK, and stored in the present form: wrapped under the active KEK and
bound to its key_id. What is there already stays: the same DEK once more is no fault, another one under a
key_id that is taken is, and so is a key_id that was shredded. All of it is one transaction, with an audit
record a DEK: the whole of a source comes in, or, where something is wrong with it, nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import re
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Callable, NamedTuple

from ..audit.log import key_fragment
from ..audit.tail import logs
from ..audit.verify import History, history
from ..config.load import Loaded
from ..config.options import Settings
from ..disk import regular
from ..encoding import KEK_ID, KEY_ID, MAX_THREAD_ID, b64decode, json_loads, moment, timestamp
from ..errors import KMSError, StoreDamaged
from ..service.clock import REMEDY, Anchor, Clock, judge, kept
from ..service.clock import ROW as TRUSTED_CLOCK
from ..service.start import RESTORED
from ..service.usage import SPENT, refusal
from ..store import snapshots
from ..store.contract import KEK_ROW, DekRecord, Usage
from ..store.policy import ENABLED, PENDING_DELETION, SHREDDED, STATES
from ..store.snapshots import LINES
from ..store.sqlite import FILE_NAME, THREAD, THREADS, Connection, SqliteStore, check_schema
from . import asowner, datadir, ledgers, pebble
from .console import CommandFailed, say
from .datadir import Opener, Work, as_left, beyond, uncollected

if TYPE_CHECKING:
    from ..fleet.store import FleetStore

Progress = Callable[[int, int], None]

MAX_LINE = 64 * 1024
"""Bytes of one line or file: a row has some 500."""

AT_ONCE = 500
"""Entries that go to the store together: a query and a statement for all instead of three for each."""

MAX_GARBAGE = 16 * 1024 * 1024
"""Bytes without an end of line after which a source is none of lines. A device might go on for ever."""

TOLD = 1000
"""Bad lines that are listed; beyond that they are counted."""

TOLD_HOSTS = 10
"""Other hosts of a fleet that a message names at most."""

_FIELDS = frozenset(
    (
        "key_id", "id", "thread_id", "thread_key", "wrapped", "kek_id", "kek_version", "created_at", "state",
        "delete_at", "shredded_at", "format", "wrapped_dek", "version", "usage",
    )
)  # fmt: skip

_USAGE = frozenset(Usage._fields)

_SNAPSHOT = re.compile(r"(.+?)(?:\.json)?\.(\d{8}T\d{6}Z?|\d{10,19})")
_NANOSECONDS = re.compile(r"(?:k_|dek_|t:)(1\d{18})")
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)", re.ASCII)
_FIRST = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)


class Entry(NamedTuple):
    """One piece of a source. `key_id` is what a file's name says; `done` of `total` is for the bar."""

    where: str
    key_id: str | None
    data: bytes
    done: int
    total: int


class Result(NamedTuple):
    """`bad`: the first TOLD of those that were `skipped`."""

    imported: int
    unchanged: int
    skipped: int
    bad: list[str]


class Bad:
    """Entries that can't be taken, and why."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, text: str) -> None:
        self.count += 1
        if self.count <= TOLD:
            self.first.append(text)


# ---- reading one entry: pure -----------------------------------------------------------------------------


def read_entry(data: bytes, key_id: str | None, now: float) -> tuple[DekRecord, Usage | None]:
    """A line or file as a record, whose `kek_id` counts for nothing yet, and how much the DEK was used, where
    that is told. ValueError, with words that follow on a place, for everything that is not exactly one of the
    known forms."""
    if len(data) > MAX_LINE:
        raise ValueError(f"has more than {MAX_LINE} bytes")
    try:
        row = json_loads(data)
    except ValueError:
        raise ValueError("is not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    if not row.keys() <= _FIELDS:
        unknown = next(name for name in row if name not in _FIELDS)
        raise ValueError(f"has the unknown field {unknown[:40]!r}")
    found = _either(row, "key_id", "id") or key_id
    if found is None:
        raise ValueError("has no key_id")
    if not KEY_ID.fullmatch(found):
        raise ValueError("has a malformed key_id")
    if key_id not in (None, found):
        raise ValueError(f"holds the key {found}")
    thread_id = _either(row, "thread_id", "thread_key") or found  # else it is its own thread
    if len(thread_id) > MAX_THREAD_ID:
        raise ValueError(f"has a thread_id of more than {MAX_THREAD_ID} characters")
    return _record(row, found, thread_id, now), _usage(row["usage"]) if "usage" in row else None


def _tried(entry: Entry, now: float) -> tuple[DekRecord, Usage | None] | ValueError:
    try:
        return read_entry(entry.data, entry.key_id, now)
    except ValueError as error:
        return error.with_traceback(None)


def _record(row: dict[str, Any], key_id: str, thread_id: str, now: float) -> DekRecord:
    state = row.get("state", ENABLED)
    if state not in STATES:
        raise ValueError("has an unknown state")
    blob = _blob(row)
    if bool(blob) == (state == SHREDDED):
        raise ValueError("is shredded, but has a wrapped DEK" if blob else "has an empty `wrapped`")
    kek_id = _text(row, "kek_id") if row.get("wrapped_dek") is None else ""
    if kek_id and not KEK_ID.fullmatch(kek_id):
        raise ValueError("has a malformed kek_id")
    times = {name: _time(row[name]) for name in ("delete_at", "shredded_at") if row.get(name)}
    if (state == PENDING_DELETION) != ("delete_at" in times) or (state == SHREDDED) != (
        "shredded_at" in times
    ):
        raise ValueError(f"is {state}, and its times don't fit that")
    created = _time(row["created_at"]) if row.get("created_at") else _born(key_id, now)
    return DekRecord(key_id, thread_id, blob, kek_id, 0, created, state, **times)


def _usage(value: object) -> Usage:
    """Where a DEK was used elsewhere, its nonces are used up here too."""
    if not isinstance(value, dict) or (value and value.keys() != _USAGE):
        raise ValueError("has a `usage` of an unknown form")
    if not all(type(one) is int and -(name == "uid") <= one < 1 << 53 for name, one in value.items()):
        raise ValueError("has numbers in `usage` that can't be")
    return Usage(**value)


def _blob(row: dict[str, Any]) -> bytes:
    """`wrapped`; or ProgressDB's `wrapped_dek`, an object, base64 of that, or what stands in it."""
    value = row.get("wrapped_dek")
    if value is None:
        return _base64(row, "wrapped")
    if row.get("wrapped") is not None:
        raise ValueError("has both wrapped and wrapped_dek")
    if isinstance(value, str):
        inner = _base64(row, "wrapped_dek")
        try:
            value = json_loads(inner)
        except ValueError:
            return inner
    if not isinstance(value, dict) or not {"ciphertext"} <= set(value) <= {"ciphertext", "key_info"}:
        raise ValueError("has a wrapped_dek of an unknown form")
    return _base64(value, "ciphertext")


def _base64(row: dict[str, Any], name: str) -> bytes:
    try:
        return b64decode(_text(row, name))
    except ValueError:
        raise ValueError(f"has no strict base64 in `{name}`") from None


def _either(row: dict[str, Any], name: str, other: str) -> str | None:
    """The value that stands under one of two names; both may stand there if they say the same."""
    if row.get(other) is None:
        return None if row.get(name) is None else _text(row, name)
    found = _text(row, other)
    if row.get(name) is not None and _text(row, name) != found:
        raise ValueError(f"has {name} and {other}, and they differ")
    return found


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"has no text in {name}")
    return value


def _time(value: object) -> str:
    """RFC 3339, or seconds since 1970: as we write it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1 << 33:
        return timestamp(value)
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("has a malformed time")
    zone = "+00:00" if match[3] == "Z" else match[3]
    try:
        moment = datetime.datetime.fromisoformat(match[1] + zone).astimezone(datetime.timezone.utc)
        return f"{max(moment, _FIRST).isoformat()[:19]}.{(match[2] or '')[:6]:0<6}Z"
    except (ValueError, OverflowError):
        raise ValueError("has a malformed time") from None


def _born(key_id: str, now: float) -> str:
    """The Go service's ids hold the time in nanoseconds."""
    match = _NANOSECONDS.fullmatch(key_id)
    return timestamp(int(match[1]) / 1e9 if match else now)


# ---- sources -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def entries(source: Path | None, loaded: Loaded) -> Iterator[Iterable[Entry]]:
    """What a file, a folder, or stdin (None) holds. From here on this process is the data-dir's owner; what
    only root may read is open by then, or, of a folder, read. Raises OSError, CommandFailed."""
    if source is None:
        yield _lines_as_owner(sys.stdin.buffer, "stdin", loaded)
    elif source.is_dir():
        inside = next((folder for folder in (source, source / "kms.db") if pebble.is_store(folder)), None)
        yield _read_as_owner(_files(source) if inside is None else _pebble(inside), loaded)
    else:
        with _opened(source) as file:
            yield _lines_as_owner(file, str(source), loaded)


def _lines_as_owner(file: IO[bytes], name: str, loaded: Loaded) -> Iterator[Entry]:
    asowner.become(loaded.settings.data_dir)
    return _lines(file, name, os.fstat(file.fileno()).st_size)


def _read_as_owner(found: Iterable[Entry], loaded: Loaded) -> Iterable[Entry]:
    if asowner.switches(loaded.settings.data_dir):
        found = list(found)
        asowner.become(loaded.settings.data_dir)
    return found


def _pebble(folder: Path) -> Iterator[Entry]:
    for row in pebble.rows(folder):
        yield Entry(f"{folder}:{row.key_id}", row.key_id, row.data, row.done, row.total)


def _opened(path: Path) -> IO[bytes]:
    """A file, or what a shell opened and names so: `<(zcat lines.gz)`. The data-dir is held meanwhile, so
    nobody may let us wait: a pipe that nobody writes to never begins, and a device may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    opened_before = stat.S_ISFIFO(mode) and os.path.realpath(path).startswith("/proc/")
    if not stat.S_ISREG(mode) and not opened_before:
        os.close(descriptor)
        raise CommandFailed(f"{path} is no regular file", hint=f"`import -` reads stdin: <{path}")
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb")


def _lines(file: IO[bytes], name: str, total: int) -> Iterator[Entry]:
    number = done = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        done += len(line)
        whole, begun = line, done
        while not whole.endswith(b"\n") and (whole := file.readline(MAX_LINE)):
            done += len(whole)
            if done - begun > MAX_GARBAGE:
                raise CommandFailed(f"{name}:{number}: goes on and on: this is no file of lines")
        if line.strip():
            yield Entry(f"{name}:{number}", None, line, done, total)


def _files(folder: Path) -> Iterator[Entry]:
    """The files of a folder, the newest of several snapshots of a key first. A ledger is none of them."""
    with os.scandir(folder) as inside:
        found = [(*_told_by(one.name), one.path) for one in inside if not _is_none(one)]
    found.sort(reverse=True)
    if not found or not found[0][0]:
        raise CommandFailed(
            f"there is no DEK in {folder}",
            hint="name the folder kms-deks or kms-deks-backup itself, or a snapshot folder in it",
        )
    for number, (key_id, _, path) in enumerate(found, 1):
        yield Entry(path, key_id, _read(path), number, len(found))


def _read(path: str) -> bytes:
    """No more than a byte too many. Python's files take four times as long for one so small."""
    descriptor = regular(path)
    try:
        data = b""
        while len(data) <= MAX_LINE and (part := os.read(descriptor, MAX_LINE + 1 - len(data))):
            data += part
        return data
    finally:
        os.close(descriptor)


def _is_none(one: os.DirEntry[str]) -> bool:
    return one.name.endswith(".ledger") or one.is_dir()


def _told_by(name: str) -> tuple[str, str]:
    """Of a file's name: the key_id, "" where it has none, and when it was taken; "~" is the present."""
    key_id, taken = "", "~"
    if name.endswith(".json"):
        key_id = name[: -len(".json")]
    elif match := _SNAPSHOT.fullmatch(name):
        key_id, taken = match[1], match[2]
    return (key_id if KEY_ID.fullmatch(key_id) else ""), taken


# ---- storing ---------------------------------------------------------------------------------------------


class Importer:
    """Takes records into the store, inside its transaction."""

    def __init__(
        self,
        work: Work,
        opener: Opener,
        history: History,
        now: float,
        force: bool = False,
        ledger: Mapping[str, str] | None = None,
    ) -> None:
        """`now`: the time of a row that tells none. `ledger`: the SHA-256 that each DEK's row must have;
        `force` takes another one, disabled."""
        self._store = work.store
        self._history = history
        self._alone = isinstance(work.store, SqliteStore)  # in a fleet the last word may be in another's log
        self._active = work.keyring.active
        if self._store.heavy().get(name := KEK_ROW + self._active.kek_id, 0) >= SPENT:
            raise refusal(name)
        self._opener = opener
        self._force = force
        self._ledger = ledger
        self._there: set[str] = set()
        self._new: dict[str, DekRecord] = {}
        self.taken: list[tuple[str, str]] = []
        self.unchanged = 0
        self.bad = Bad()
        self._now, self._begun = now, timestamp(now)
        self.deletions: list[str] = []
        """When those that came along are due."""
        self.newest = ""
        """The last time that the rows themselves tell of."""
        self.distrusted: set[str] = set()
        """Keys whose row was not as the daemon wrote it: their state is not known."""

    def add(self, found: Sequence[Entry]) -> None:
        """Some entries: the store is asked for all at once, and gets all at once."""
        read = [_tried(entry, self._now) for entry in found]
        used: dict[str, Usage] = {}
        self._there = self._store.there([one[0].key_id for one in read if not isinstance(one, ValueError)])
        for entry, one in zip(found, read):
            try:
                if isinstance(one, ValueError):
                    raise one
                record, usage = one
                self._vouch(record.key_id, entry.data)
                self._add(record)
                if usage is not None:
                    used[record.key_id] = usage
            except (ValueError, StoreDamaged) as error:
                self.bad.add(f"{entry.where}: {error}")
        self._store.put_all(list(self._new.values()))
        kept = self._store.usage(list(used))
        self._store.count((key_id, beyond(one, kept.get(key_id))) for key_id, one in used.items())
        self._new.clear()

    def _vouch(self, key_id: str, row: bytes) -> None:
        if self._ledger is not None and self._ledger.get(key_id) != sha256(row).hexdigest():
            if not self._force:
                raise ValueError("is not as the rotation found it, says its ledger (--force takes it)")
            self.distrusted.add(key_id)

    def _add(self, new: DekRecord) -> None:
        old = self._present_row(new.key_id)
        if old is not None and old.state == SHREDDED:
            if new.state != SHREDDED:
                raise ValueError(f"the key {new.key_id} was shredded: nothing brings it back")
            self.unchanged += 1
        elif new.state == SHREDDED:
            if old is not None:
                raise ValueError(f"the key {new.key_id} is shredded there, but in use here")
            self._put(new._replace(kek_id=self._active.kek_id))
        elif old is None:
            self._put(self._bound(self._closed(new)))
        elif self._present(old, new):
            self.unchanged += 1
        else:  # what belongs to the key stays as it is here: its thread, its state
            bound = self._bound(new)
            row = old._replace(wrapped=bound.wrapped, kek_id=bound.kek_id, kek_version=bound.kek_version)
            distrusted = row.key_id in self.distrusted
            self._put(self._alive(as_left(row, row.delete_at)) if distrusted else row)

    def _present_row(self, key_id: str) -> DekRecord | None:
        if key_id in self._new or key_id not in self._there:
            return self._new.get(key_id)
        try:
            return self._store.get(key_id)
        except StoreDamaged:
            if not self._store.mending:
                raise
            self.distrusted.add(key_id)
            return None

    def _closed(self, new: DekRecord) -> DekRecord:
        """What the audit log says of a DEK that the store does not know (any more)."""
        self._alive(new)
        if new.key_id in self.distrusted:
            new = as_left(new, "")
        if new.key_id in self._history.left and (self._alone or new.state == ENABLED):
            _, left = self._history.left[new.key_id]
            new = as_left(new, left)
        return new

    def _alive(self, new: DekRecord) -> DekRecord:
        if new.key_id in self._history.shredded:
            raise ValueError(f"the key {new.key_id} was shredded, says the audit log: nothing brings it back")
        return new

    def _present(self, old: DekRecord, new: DekRecord) -> bool:
        """Is it the same DEK? False where it may be replaced. ValueError where there is another one."""
        try:
            self._opener.check(old.key_id, old.wrapped)
        except ValueError:
            return False  # what is stored is damaged
        if self._opener.same(old.key_id, old.wrapped, new.wrapped):
            return True
        if not self._force:
            raise ValueError(f"the key_id {old.key_id} is taken by another DEK")
        return False

    def _bound(self, new: DekRecord) -> DekRecord:
        blob = self._opener.rebind(self._active.kek_id, new.key_id, new.wrapped)
        return new._replace(wrapped=blob, kek_id=self._active.kek_id, kek_version=self._active.version)

    def _put(self, record: DekRecord) -> None:
        self._new[record.key_id] = record
        if record.delete_at:
            self._store.write(f"deletion:{record.delete_at}|{record.key_id}", {})
        self.taken.append((record.key_id, record.thread_id))
        self._note_times(record)

    def _note_times(self, record: DekRecord) -> None:
        if record.delete_at:
            self.deletions.append(record.delete_at)
        for told in (record.created_at, record.shredded_at):
            if self.newest < told < self._begun:  # this host's own clock is no witness
                self.newest = told


def take(
    work: Work,
    op: str,
    found: Iterable[Entry],
    progress: Progress,
    *,
    skip_bad: bool,
    force: bool = False,
    ledger: Mapping[str, str] | None = None,
    known: float = 0.0,
    restored: Mapping[str, Any] | None = None,
) -> Result:
    """Store what the entries hold, in one transaction with its audit records. `known`: it is no earlier, as
    who made them knew. `restored`: the event that the store owes the log from then on. Raises CommandFailed
    where something is bad and `skip_bad` is False: then nothing is stored."""
    with Opener(work.keyring, foreign_too=op == "import") as opener:
        work.store.mending = op != "import"
        importer = Importer(work, opener, _history(work), time.time(), force, ledger)
        unused = op == "import" and not work.store.keks()
        try:
            with work.store.transaction():
                with uncollected():
                    rest = iter(found)
                    while some := list(itertools.islice(rest, AT_ONCE)):
                        importer.add(some)
                        progress(some[-1].done, some[-1].total)
                if importer.bad.count and not skip_bad:
                    raise _refused(importer.bad, op)
                if work.store.mending and importer.taken:
                    _recount(work)
                if importer.deletions:
                    _hold(work, importer, unused, known)
                if restored is not None:
                    work.store.write(RESTORED, dict(restored))
                for key_id, thread_id in importer.taken:
                    work.audit.record(op, "ok", 200, key_fragment(key_id, thread_id))
                work.anchor()
        except BaseException as error:
            _note_failure(work, op, error)
            raise
    return Result(len(importer.taken), importer.unchanged, importer.bad.count, importer.bad.first)


def _hold(work: Work, importer: Importer, unused: bool, known: float) -> None:
    """A new host's clock may be ahead, and nothing here tells the time: the rows do, to a moment at which it
    was not later than it is. Beyond the usual gap all that is due is held until a person accepts the clock;
    within it the clock is trusted as it stands, or each deletion would come late by that for ever.

    In a store that was `unused`, what is kept as the trusted time is the word of clocks alone. And what it is
    now is kept whatever is due: by a later start the clock may be wrong, or another host's is."""
    store, now, mine = work.store, Clock().reading(), kept(work.store)
    others = [] if isinstance(store, SqliteStore) else store.of_others(TRUSTED_CLOCK)
    if (mine or others) and not unused:
        return
    latest = max([now.wall, *(float(row["wall"]) for row in others)])
    due = sum(when <= timestamp(latest) for when in importer.deletions)
    told = max(known, moment(importer.newest) if importer.newest else 0.0)
    anchor = Anchor(min(told, now.wall), *now)
    held = judge(anchor, now._replace(wall=latest)).held if due else ""
    if not held:
        if not mine and not others:
            store.write(TRUSTED_CLOCK, Anchor(now.wall, *now)._asdict())
        return
    if mine and judge(mine, now).held:  # that goes on by itself once the clock is right
        anchor = mine
    whose = "this" if latest == now.wall else "another"
    said = f"{due} of the deletions are due by {whose} host's clock"
    if not isinstance(store, SqliteStore):
        _hold_others(store, anchor, f"{said}, which nothing bears out: {held}")
    store.write(TRUSTED_CLOCK, anchor._asdict())
    say(f"{said}, and held: {held} ({REMEDY})")


def _hold_others(store: FleetStore, anchor: Anchor, why: str) -> None:
    """A daemon that runs goes by what it knows, and looks twice a minute: it would not hear of it."""
    if running := store.others():
        raise CommandFailed(
            f"{why}; nothing was stored",
            hint=f"set the clock; where it is right, stop the daemon of {', '.join(running[:TOLD_HOSTS])}, "
            "which would shred them at once, and import again",
        )
    store.spread(TRUSTED_CLOCK, anchor._asdict())


def _history(work: Work) -> History:
    return history(logs(Path(work.audit.path).parent), work.audit.key)


def _recount(work: Work) -> None:
    """Where a row that was lost or could not be trusted is here again, all of them add up to another sum."""
    try:
        if work.store.recount():
            work.audit.note("recount")
    except StoreDamaged as error:
        say(f"{error.message}: `progressdb-kms verify` tells which rows are left to bring back")


def _note_failure(work: Work, op: str, error: BaseException) -> None:
    code = error.code if isinstance(error, KMSError) else type(error).__name__
    with contextlib.suppress(KMSError):
        work.audit.note(op, "failed", code=code)


def _refused(bad: Bad, op: str) -> CommandFailed:
    for line in bad.first:
        say(line)
    return CommandFailed(
        f"{bad.count} of the entries can't be taken; nothing was stored",
        hint="mend them, or leave them out with --skip-bad"
        if op == "import"
        else "take those that open, one by one, with --key ID",
    )


def import_deks(loaded: Loaded, source: Path | None, skip_bad: bool, progress: Progress) -> dict[str, Any]:
    """Take the DEKs of a file, a folder or stdin. Raises CommandFailed, AlreadyRunning, OSError."""
    with (
        entries(source, loaded) as found,
        datadir.keys(loaded) as keys,
        datadir.held(loaded),
        datadir.working(loaded, keys, "import") as work,
    ):
        result = take(work, "import", found, progress, skip_bad=skip_bad)
    return result._asdict()


def restore_snapshot(
    loaded: Loaded, folder: Path, key: str | None, force: bool, progress: Progress
) -> dict[str, Any]:
    """Bring one DEK, or all, back from a snapshot folder; over another DEK that opens only with `force`."""
    if not folder.is_dir():
        raise CommandFailed(f"there is no folder {folder}", hint="`backups list` tells which there are")
    with _snapshot(folder, key, loaded) as found, datadir.keys(loaded) as keys, datadir.held(loaded):
        _index_anew(loaded.settings)
        with datadir.working(loaded, keys, "restore") as work:
            ledger = _ledger(snapshots.ledger(folder.absolute()), work.audit.key, key, force)
            result = take(work, "restore_key", found, progress, skip_bad=False, force=force, ledger=ledger)
    return {"path": str(folder), "restored": result.imported, "unchanged": result.unchanged}


def _index_anew(settings: Settings) -> None:
    """What an index has of a row that lost a byte since is not what the row says now: SQLite would call the
    file malformed where that row is replaced. Nobody else has it open."""
    path = settings.data_dir / FILE_NAME
    if settings.store != "sqlite" or not path.exists():
        return
    with contextlib.closing(Connection(path, "rw")) as db:
        application, version = (
            db.select_one(f"PRAGMA {name}")[0] for name in ("application_id", "user_version")
        )
        check_schema(path, application, version)
        db.execute("BEGIN IMMEDIATE")
        for name in db.named("index", THREADS):
            (table,) = db.select_one("SELECT tbl_name FROM sqlite_master WHERE name = ?", (name,))
            db.execute(f'DROP INDEX "{name}"')
            db.execute(f'CREATE INDEX "{name}" ON "{table}" ({THREAD}, key)')
        db.execute("COMMIT")


def _ledger(path: Path, key: memoryview, only: str | None, force: bool) -> Mapping[str, str]:
    """Raises CommandFailed."""
    why = "is not the one that was signed"
    try:
        found = ledgers.signed(path, key, lambda line: only is None or only.encode() in line)
    except OSError as error:
        found, why = None, f"can't be read: {error.strerror}"
    if found is None and not force:
        raise CommandFailed(
            f"{path} {why}: nothing tells whether the snapshot is as the rotation wrote it",
            hint="take another snapshot, or a backup; --force takes it, and its DEKs come back disabled",
        )
    return found or {}


@contextlib.contextmanager
def _snapshot(folder: Path, key: str | None, loaded: Loaded) -> Iterator[Iterable[Entry]]:
    """All of a folder, a file a key or one of lines, or one key of it; of a shredded key the line has nothing
    but its name. As `entries` otherwise."""
    if key is not None or not (folder / LINES).is_file():
        yield _read_as_owner(_files(folder) if key is None else _one(folder, key), loaded)
        return
    with entries(folder / LINES, loaded) as found:
        yield (entry for entry in found if b'"wrapped":' in entry.data)


def _line(lines: Path, key_id: str) -> bytes:
    """Of this key; empty where there is none. All are looked at: who searches by halves, as a shred does,
    finds none behind one that is damaged."""
    begin = b'{"key_id":"%b"' % key_id.encode()
    with open(regular(lines), "rb") as file:
        return next((line for line in file if line.startswith(begin)), b"")


def _one(folder: Path, key_id: str) -> list[Entry]:
    path, lines = folder / f"{key_id}.json", folder / LINES
    known = KEY_ID.fullmatch(key_id) is not None
    if known and lines.is_file() and b'"wrapped":' in (line := _line(lines, key_id)):
        return [Entry(f"{lines}:{key_id}", key_id, line, 1, 1)]
    if not known or not path.is_file():
        raise CommandFailed(f"there is no snapshot of {key_id} in {folder}", hint="it may have been shredded")
    return [Entry(str(path), key_id, _read(str(path)), 1, 1)]
