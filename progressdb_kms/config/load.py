"""The configuration: from flags, a file, the environment and defaults to checked settings and loaded keys.

    flag  >  configuration file  >  environment  >  default

With a configuration file, secrets and rules about peers come from it alone: their environment variables are
not even read, so that whoever can set a variable can't slip in a key or open the door to another user.

`load` gives a `Loaded`: the settings, which hold nothing secret, and the keys in one locked buffer. What is
wrong is told by a ConfigError that names the key and the file, says what to do, and never shows a value.
"""

from __future__ import annotations

import contextlib
import grp
import hmac
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Union

from ..crypto.memory import LockedBuffer, wipe
from ..errors import ConfigError, WeakKey
from ..rules import PeerRules
from . import keysource, yamlfile
from .keysource import FD_VARIABLE, HEX, HEX_VARIABLE, Source
from .options import (
    ANY,
    KEY_SIZE,
    MASTER_KEYS,
    MAX_SOCKET_PATH,
    OPTIONS,
    Option,
    Scalar,
)
from .yamlfile import ConfigFile

FILE_VARIABLE = "PROGRESSDB_KMS_MASTER_KEY_FILE"

PENDING_SUFFIX = ".next"
"""Where `rotate-kek` puts the new key before the daemon hears of it."""

MAX_WORKERS = 4
"""What `workers: auto` makes at most: the one writer is shared by all."""

_MAKE_A_KEY = "make a key with `progressdb-kms genkey FILE`"

_FIND_THE_KEY = f"put the key back from its copy: {keysource.WHICH_FILE}"
_KEEP_IT_RUNNING = "; does the daemon still run? Don't stop it: `rotate-kek` moves the store to a new key"

_AT_RANDOM = "a key is 32 bytes that were drawn at random"


@dataclass(frozen=True)
class Settings:
    """Checked and absolute: paths of the file are relative to its folder, others to the working directory.

    Sizes are in bytes, times in seconds. `None` for peer rules: whoever the socket's permissions let in.
    """

    config_file: str | None
    socket: Path
    socket_mode: int
    socket_group: int | None
    tcp_address: str | None
    data_dir: Path
    allowed_peer_uids: frozenset[int] | None
    admin_peer_uids: frozenset[int] | None
    workers: int
    memory_lock: str
    allow_missing_keks: bool
    open_embedded_messages: bool
    max_body_bytes: int
    max_connections: int
    idle_timeout: float
    request_timeout: float
    master_source: str
    master_key_file: str | None
    pending_key_file: str | None = None
    kek_max_age_days: int | None = None
    policies: tuple[Mapping[str, Any], ...] = ()
    """Checked entries, as plain data: see `rules.Policy.of`."""

    @property
    def peer_rules(self) -> PeerRules:
        return PeerRules(self.allowed_peer_uids, self.admin_peer_uids)


class Loaded:
    """Settings, and the keys that they name: 32-byte views of one LockedBuffer, in a `with` block.

    `close` wipes and unmaps; it raises BufferError (after the wipe) while slices of the views are alive.
    `pending` is the key of an unfinished `rotate-kek`. Without keys (`need_key=False`) `master` is empty.
    """

    def __init__(self, settings: Settings, keys: _Keys | None = None) -> None:
        self.settings = settings
        self._keys = keys
        self.master = keys.master if keys else memoryview(b"")
        self.previous = tuple(view for view, _ in keys.previous) if keys else ()
        self.previous_sources = tuple(label for _, label in keys.previous) if keys else ()
        self.pending = keys.pending if keys else None
        self.pending_source = settings.pending_key_file or ""

    @property
    def memory_kind(self) -> str:
        """`memfd_secret`, `mlock` or `unlocked`; empty where no key was loaded or all is closed."""
        return self._keys.memory.kind if self._keys else ""

    def close(self) -> None:
        if self._keys:
            self._keys.close()
            self._keys = None

    def __enter__(self) -> Loaded:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # While an exception travels, its frames may still hold slices: the wipe is what counts then.
        with contextlib.suppress(BufferError) if kind else contextlib.nullcontext():
            self.close()

    def __repr__(self) -> str:
        return f"<Loaded {self.settings.master_source}>"


def load(
    flags: Mapping[str, str | None],
    environ: Mapping[str, str],
    *,
    need_key: bool = True,
    first: bool = True,
) -> Loaded:
    """Read the configuration and the keys. Raises ConfigError, WeakKey, LockRefused.

    `flags`: by the names of OPTIONS, and `config`; None for what was not given.
    `need_key=False`: the settings alone; no key is read and none needs to be there.
    `first`: a new key may be the answer where there is none, unless the data-dir holds a store already.

    Forks a child where there is a configuration file: call it before any thread is started.
    """
    path = flags.get("config")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(yamlfile.read(os.path.abspath(path))) if path else None
        values = _merge(flags, file, environ)
        stack.enter_context(_advising(values["data_dir"], first))
        master, previous = _sources(file, environ)
        settings = _settings(values, file, _one(master, file, need_key))
        if not need_key:
            return Loaded(settings)
        keys = _Keys(settings.memory_lock, len(previous), file, environ)
        undo = stack.enter_context(contextlib.ExitStack())
        undo.callback(keys.close)
        keys.load_master(master[0])
        keys.load_previous(previous)
        settings = replace(settings, pending_key_file=keys.load_pending(settings.master_key_file))
        undo.pop_all()
        return Loaded(settings, keys)


@contextlib.contextmanager
def _advising(data_dir: str, first: bool) -> Iterator[None]:
    """What to do about a key that is not there. A new one beside a store would lose all that is in it."""
    try:
        yield
    except ConfigError as error:
        if error.hint not in (keysource.WHICH_FILE, _AT_RANDOM) and _MAKE_A_KEY not in error.hint:
            raise
        used = _is_used(data_dir)
        if not first or used:
            hint = _FIND_THE_KEY + (_KEEP_IT_RUNNING if used else "")
        else:
            hint = error.hint if _MAKE_A_KEY in error.hint else _MAKE_A_KEY
        raise type(error)(error.message, code=error.code, hint=hint) from None


def _is_used(data_dir: str) -> bool:
    """Is there a store, or what a lost one left? Where we may not look, there is."""
    from ..store.sqlite import FILE_NAME, TRACES

    try:
        return not {FILE_NAME, *TRACES}.isdisjoint(os.listdir(data_dir))
    except OSError as error:
        return not isinstance(error, (FileNotFoundError, NotADirectoryError))


def read_policies(path: str) -> Sequence[Mapping[str, Any]]:
    """The policies that a configuration file has now. Raises ConfigError where anything in it is wrong."""
    with yamlfile.read(path) as file:
        return file.values.get("policies") or ()


# ---- weak keys -----------------------------------------------------------------------------------

PUBLISHED_KEYS: Sequence[bytes] = tuple(
    map(
        bytes.fromhex,
        (
            "00112233445566778899aabbccddeeff" * 2,
            "f3c9a7df8b0e52c4a14ea2d0b38ef615f739482decdb0e8c7701435a4bfd98c2",
            "60324e8965b4ee7188d2cc0dfcb7928d53851aa8fcd1044884e30c9af28413c1",
            "0123456789abcdef" * 4,
            "b748dbd094c8da033bb830f52963c051f2c41387c27c89bcf507736da944f337",
            "d899a1b62c16e8a97f804f8c317c8c09eb758d2e231a4faf63dc882bc5f5ec3f",
            "a7e484d3f2ab9e1058c47dae6b9c1f2afb123b02c4de98ae7f615c099d5c621f",
            "f721ff8758c05e78b9361cff8d13e738d1e5069cf4ff03b7cbc9bf5fce0e3341",
            "f45cc3ba20183ed884dbc639f018f66fd5112792c7d07987ac1084c867441367",
            "7d2d7bd0f14a52e270b5cf39821c68eea09bcc50809d670a9ee27a6f49fd0160",
            "64fbe498eb2a2cea151e4491941b4de9c5a309852660c4979cf32a199bb7baf7",
        ),
    )
)
"""Keys of sample files, scripts and tests of ProgressDB's repository: whoever copied one has the key that
everybody has. As previous keys they open: to move away from one is what that is for."""

MIN_DISTINCT = 8
"""Fewest distinct bytes. 32 random bytes have about 30; fewer than 8 come once in 10**27 keys."""


def check_master_key(key: memoryview) -> None:
    """Raises WeakKey for a key that is no secret or was not drawn at random.

    Compares in place and in constant time, and makes no copy.
    """
    if len(key) != KEY_SIZE:
        raise WeakKey(f"it has {len(key)} bytes instead of {KEY_SIZE}", hint=_AT_RANDOM)
    for published in PUBLISHED_KEYS:
        if hmac.compare_digest(key, published):
            raise WeakKey("it is published in a file of ProgressDB, so everybody knows it", hint=_AT_RANDOM)
    seen = bytearray(256)
    for byte in key:
        seen[byte] = 1
    distinct = sum(seen)
    with memoryview(seen) as view:
        wipe(view)
    if distinct < MIN_DISTINCT:
        raise WeakKey(
            f"it has fewer than {MIN_DISTINCT} distinct bytes: it was not drawn at random", hint=_AT_RANDOM
        )


# ---- settings --------------------------------------------------------------------------------------

_Setting = Union[str, int, float, list[int], None]


def _merge(
    flags: Mapping[str, str | None], file: ConfigFile | None, environ: Mapping[str, str]
) -> dict[str, Any]:
    """The value of each option that names no key."""
    keys = (*MASTER_KEYS, "previous_master_keys")
    return {o.name: _choose(o, flags, file, environ) for o in OPTIONS if o.name not in keys}


def _choose(
    option: Option, flags: Mapping[str, str | None], file: ConfigFile | None, environ: Mapping[str, str]
) -> _Setting:
    given = flags.get(option.name) if option.flag else None
    if given is not None:
        return _resolve(option, option.read(Scalar(given, ANY), option.flag), "", option.flag)
    if file and option.name in file.values:
        label = f"{option.name} in {file.path}"
        return _resolve(option, file.values[option.name], os.path.dirname(file.path), label)
    if option.env and not (option.private and file):
        text = environ.get(option.env)
        if text is not None and (text or option.private):  # SOCKET= is as good as unset, ALLOWED_UIDS= is not
            return _resolve(option, option.read(_from_environment(option, text), option.env), "", option.env)
    return _resolve(option, option.default, "", option.name)


def _from_environment(option: Option, text: str) -> Any:
    """A comma list for what is a list."""
    if option.name != "allowed_peer_uids":
        return Scalar(text, ANY)
    return [Scalar(part.strip(), ANY) for part in text.split(",")]


def _resolve(option: Option, value: Any, folder: str, label: str) -> _Setting:
    """What needs the host: absolute paths, the number of a group, how many cores there are."""
    if option.path:
        value = os.path.abspath(os.path.join(folder, value))
        if option.name == "socket" and len(os.fsencode(value)) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"{label} is {len(os.fsencode(value))} bytes long as an absolute path; "
                f"a socket's path has at most {MAX_SOCKET_PATH}",
                hint="choose a shorter one, such as /run/progressdb-kms/kms.sock",
            )
    elif option.name == "socket_group" and value is not None:
        return _group_id(value, label)
    elif value == "auto":
        return min(_cores(), MAX_WORKERS)
    result: _Setting = value
    return result


def _cores() -> int:
    """Cores that this process may use: a container or `taskset` may give it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _group_id(group: str, label: str) -> int:
    if group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(
            f"{label} names no group of this host", hint=f"groupadd {group}, or give a number"
        ) from None


def _settings(values: Mapping[str, Any], file: ConfigFile | None, master: Source | None) -> Settings:
    everybody = values["socket_mode"] & stat.S_IRWXO
    if everybody and values["allowed_peer_uids"] is None:
        raise ConfigError(
            f"socket_mode {values['socket_mode']:04o} lets every user of this host in",
            hint="use 0660 with socket_group, or list the users in allowed_peer_uids",
        )
    rest = {name: values[name] for name in values if name not in ("socket", "data_dir", "policies", *_UIDS)}
    return Settings(
        config_file=file.path if file else None,
        socket=Path(values["socket"]),
        data_dir=Path(values["data_dir"]),
        allowed_peer_uids=_set(values["allowed_peer_uids"]),
        admin_peer_uids=_set(values["admin_peer_uids"]),
        policies=tuple(values["policies"] or ()),
        master_source=master.label if master else "",
        master_key_file=master.place if master and master.form == "file" else None,
        **rest,
    )


_UIDS = ("allowed_peer_uids", "admin_peer_uids")


def _set(uids: list[int] | None) -> frozenset[int] | None:
    return None if uids is None else frozenset(uids)


# ---- where the keys are ----------------------------------------------------------------------------


def _sources(file: ConfigFile | None, environ: Mapping[str, str]) -> tuple[list[Source], list[Source]]:
    """All places of a master key that are given, and those of previous keys."""
    if file is None:
        return _environment_sources(environ), []
    master = [
        _source(name.rpartition("_")[2], file.values[name], name, file)
        for name in MASTER_KEYS
        if name in file.values
    ]
    entries = file.values.get("previous_master_keys", ())
    labels = (f"previous_master_keys entry {number}" for number in range(1, len(entries) + 1))
    return master, [_source(form, value, label, file) for label, (form, value) in zip(labels, entries)]


def _source(form: str, value: str | None, name: str, file: ConfigFile) -> Source:
    if form == HEX or value is None:
        return Source(HEX, "", f"{name} in {file.path}")
    place = os.path.abspath(os.path.join(os.path.dirname(file.path), value)) if form == "file" else value
    return Source(form, place, f"{name} {place}")


def _environment_sources(environ: Mapping[str, str]) -> list[Source]:
    found = []
    if environ.get(FD_VARIABLE):
        found.append(Source("pipe", environ[FD_VARIABLE], HEX_VARIABLE))
    elif environ.get(HEX_VARIABLE):
        found.append(Source("variable", HEX_VARIABLE, HEX_VARIABLE))
    path = environ.get(FILE_VARIABLE)
    if path:
        found.append(Source("file", os.path.abspath(path), f"{FILE_VARIABLE} {os.path.abspath(path)}"))
    return found


def _one(master: Sequence[Source], file: ConfigFile | None, need_key: bool) -> Source | None:
    """The master key's source. Raises ConfigError unless there is exactly one."""
    if len(master) > 1:
        names = " and ".join(source.label for source in master)
        raise ConfigError(f"more than one master key is given: {names}", hint="keep one of them")
    if master:
        return master[0]
    if not need_key:
        return None
    if file:
        raise ConfigError(
            f"{file.path} names no master key (the environment is not asked where there is a file)",
            hint=f"{_MAKE_A_KEY} and put `master_key_file: FILE` into it",
        )
    raise ConfigError(
        f"no master key is given, by --config nor by {FILE_VARIABLE}",
        hint=f"{_MAKE_A_KEY}, then set {FILE_VARIABLE}=FILE or use --config",
    )


# ---- the keys --------------------------------------------------------------------------------------


class _Keys:
    """The locked buffer: master | pending | previous … | scratch."""

    def __init__(self, lock: str, previous: int, file: ConfigFile | None, environ: Mapping[str, str]) -> None:
        start = (2 + previous) * KEY_SIZE
        self.memory = LockedBuffer(start + keysource.SCRATCH_SIZE, lock)
        self.master = self.memory.view[:KEY_SIZE]
        self._next = self.memory.view[KEY_SIZE : 2 * KEY_SIZE]
        self._slots = [self.memory.view[at : at + KEY_SIZE] for at in range(2 * KEY_SIZE, start, KEY_SIZE)]
        self._scratch = self.memory.view[start:]
        self.pending: memoryview | None = None
        self.previous: list[tuple[memoryview, str]] = []
        self._file = file
        self._environ = environ

    def load_master(self, source: Source) -> None:
        self._read(source, self.master)
        _refuse_weak(self.master, source.label)

    def load_previous(self, sources: Sequence[Source]) -> None:
        """A key that is there already is no error, and kept once. A weak one is taken: it only unwraps, and
        to move away from it is what it is here for."""
        for slot, source in zip(self._slots, sources):
            self._read(source, slot)
            known = [self.master, *(view for view, _ in self.previous)]
            if any(hmac.compare_digest(slot, other) for other in known):
                wipe(slot)
            else:
                self.previous.append((slot, source.label))

    def load_pending(self, key_file: str | None) -> str | None:
        """The file `F.next` beside the master_key_file F, where there is one. Returns its path."""
        path = f"{key_file}{PENDING_SUFFIX}"
        if key_file is None or not os.path.lexists(path):
            return None
        source = Source("file", path, f"{path} (of a rotation that was not finished)")
        self._read(source, self._next)
        _refuse_weak(self._next, source.label)
        self.pending = self._next
        return path

    def _read(self, source: Source, out: memoryview) -> None:
        if source.form == HEX and self._file:
            self._file.read_key(out)
        else:
            keysource.read(source, self._environ, self._scratch, out)

    def close(self) -> None:
        for view in (self.master, self._next, self._scratch, *self._slots):
            view.release()
        self.memory.close()


def _refuse_weak(key: memoryview, label: str) -> None:
    try:
        check_master_key(key)
    except WeakKey as weak:
        raise WeakKey(f"{label}: {weak.message}", hint=weak.hint) from None
