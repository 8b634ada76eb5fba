"""The configuration: from flags, a file, the environment and defaults to checked settings and loaded keys.

    flag  >  configuration file  >  environment  >  default

With a configuration file, secrets and rules about peers come from it alone: their environment variables are
not even read, so that whoever can set a variable can't slip in a key or open the door to another user.

`load` gives a `Loaded`: the settings, which hold nothing secret, and the keys in one locked buffer. What is
wrong is told by a ConfigError that names the key and the file, says what to do, and never shows a value.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..crypto.memory import LockedBuffer, wipe
from ..errors import ConfigError, UnusableKey
from . import keysource, yamlfile
from .keysource import FD_VARIABLE, FILE_VARIABLE, HEX_VARIABLE, KEY_SIZE, MASTER, PENDING, Source
from .options import KEY_LISTS, SETTINGS, Settings
from .values import ANY, Option, Scalar
from .weakkeys import check_master_key
from .yamlfile import ConfigFile

PENDING_SUFFIX = ".next"
"""Where `rotate-kek` puts the new key before the daemon hears of it."""

_MAKE_A_KEY = "`progressdb-kms genkey FILE` makes one"
_FIND_THE_KEY = "where the key is lost, put it back from its copy: `progressdb-kms kek-id FILE…` finds it"
_KEEP_IT_RUNNING = "does the daemon still run? Don't stop it: `rotate-kek` moves the store to a new key"


class Loaded:
    """Settings, and the keys that they name: 32-byte views of one LockedBuffer, in a `with` block.

        master | previous … | coming … | pending | scratch

    `close` wipes and unmaps; it raises BufferError (after the wipe) while slices of the views are alive.
    `keys` are in this order, the master key first; there is none without keys (`need_key=False`).
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.memory: LockedBuffer | None = None
        self.keys: list[tuple[Source, memoryview]] = []
        self._views: list[memoryview] = []

    def read_keys(self, sources: Sequence[Source], environ: Mapping[str, str]) -> None:
        """Raises ConfigError, WeakKey, LockRefused; `close` wipes what was read by then. A key of a list that
        is there already is no error, and kept once. A weak one is taken there: it only unwraps, and to move
        away from it is what it is here for."""
        end = len(sources) * KEY_SIZE
        self.memory = LockedBuffer(end + keysource.SCRATCH_SIZE, self.settings.memory_lock)
        view = self.memory.view
        self._views = [view[at : at + KEY_SIZE] for at in range(0, end, KEY_SIZE)]
        with view[end:] as scratch:
            for source, slot in zip(sources, self._views):
                keysource.read(source, environ, scratch, slot)
                if source.role not in KEY_LISTS:
                    check_master_key(slot, f"{source.label}: it")
                elif any(hmac.compare_digest(slot, other) for _, other in self.keys):
                    wipe(slot)
                    continue
                self.keys.append((source, slot))

    def close(self) -> None:
        for view in self._views:
            view.release()
        memory, self.memory = self.memory, None
        if memory is not None:
            memory.close()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        # While an exception travels, its frames may still hold slices: the wipe is what counts then.
        with contextlib.suppress(BufferError) if kind else contextlib.nullcontext():
            self.close()


def load(
    flags: Mapping[str, str | None],
    environ: Mapping[str, str],
    *,
    need_key: bool = True,
    first: bool = True,
    fleet: bool = False,
) -> Loaded:
    """Read the configuration and the keys. Raises ConfigError, WeakKey, LockRefused.

    `flags`: by the names of OPTIONS, and `config`; None for what was not given.
    `need_key=False`: the settings alone; no key is read and none needs to be there.
    `fleet`: the caller knows what to do with `store: postgresql`.
    `first`: a new key may be the answer where there is none, unless the data-dir holds a store already.

    Forks a child where there is a configuration file: call it before any thread is started.
    """
    path = None if (named := flags.get("config")) is None else os.path.abspath(named)  # "" is the folder
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(contextlib.closing(yamlfile.read(path))) if path else None
        values = {option.name: _choose(option, flags, file, environ) for option in SETTINGS}
        stack.enter_context(_advising(values["data_dir"], first))
        sources = file.sources() if file else _in_environment(environ)
        loaded = Loaded(_settings(values, file, _one(sources, file, need_key)))
        _check_store(loaded.settings, file, fleet)
        if need_key:
            undo = stack.enter_context(contextlib.ExitStack())
            undo.callback(loaded.close)
            loaded.read_keys([*sources, *_pending(loaded.settings.master_key_file)], environ)
            undo.pop_all()
        return loaded


@contextlib.contextmanager
def _advising(data_dir: Path, first: bool) -> Iterator[None]:
    """What to do about a key that is not there. A new one beside a store would lose all that is in it."""
    try:
        yield
    except UnusableKey as error:
        used = _is_used(data_dir)
        own = error.hint if error.hint != error.default_hint else ""
        hints = own, _MAKE_A_KEY if first and not used else _FIND_THE_KEY, _KEEP_IT_RUNNING if used else ""
        error.hint = "; ".join(filter(None, hints))
        raise


def _is_used(data_dir: Path) -> bool:
    """Is there a store, or what a lost one left? Where we may not look, there is."""
    from ..store.sqlite import FILE_NAME, TRACES

    try:
        return not {FILE_NAME, *TRACES}.isdisjoint(os.listdir(data_dir))
    except OSError as error:
        return not isinstance(error, (FileNotFoundError, NotADirectoryError))


def read_policies(path: str) -> Sequence[Mapping[str, Any]]:
    """The policies that a configuration file has now. Raises ConfigError where anything in it is wrong."""
    with contextlib.closing(yamlfile.read(path)) as file:
        return file.values.get("policies") or ()


# ---- settings --------------------------------------------------------------------------------------


def _choose(
    option: Option, flags: Mapping[str, str | None], file: ConfigFile | None, environ: Mapping[str, str]
) -> Any:
    value, folder, label = option.default, "", option.name
    if (given := flags.get(option.name)) is not None:
        value, label = option.read(Scalar(given, ANY), option.flag), option.flag
    elif file and option.name in file.values:
        value, folder, label = file.values[option.name], os.path.dirname(file.path), f"{label} in {file.path}"
    elif option.env and not (option.private and file):
        text = environ.get(option.env)
        if text is not None and (text or option.private):  # SOCKET= is as good as unset, ALLOWED_UIDS= is not
            value, label = option.read(Scalar(text, ANY), option.env), option.env
    return None if value is None else option.settle(value, folder, label)


def _settings(values: Mapping[str, Any], file: ConfigFile | None, master: Source | None) -> Settings:
    everybody = values["socket_mode"] & stat.S_IRWXO
    if everybody and values["allowed_peer_uids"] is None:
        raise ConfigError(
            f"socket_mode {values['socket_mode']:04o} lets every user of this host in",
            hint="use 0660 with socket_group, or list the users in allowed_peer_uids",
        )
    return Settings(**values, config_file=file.path if file else None, master=master)


def _check_store(settings: Settings, file: ConfigFile | None, fleet: bool) -> None:
    useless = [name for name in ("postgresql", "next_master_keys") if file and name in file.values]
    if useless and settings.store == "sqlite":
        hint = "write `store: postgresql`, or take it out"
        place = f"{useless[0]} in {settings.config_file}"
        raise ConfigError(f"{place} is of no use for `store: sqlite`", hint=hint)
    if settings.store == "postgresql" and not fleet:
        hint = "`progressdb-kms help fleet` tells what there is for a fleet's"
        raise ConfigError(f"`store: postgresql` in {settings.config_file}: not this host's own", hint=hint)


# ---- where the keys are ----------------------------------------------------------------------------


def _in_environment(environ: Mapping[str, str]) -> list[Source]:
    found = []
    if environ.get(FD_VARIABLE):
        found.append(Source("pipe", environ[FD_VARIABLE], HEX_VARIABLE))
    elif environ.get(HEX_VARIABLE):
        found.append(Source("variable", HEX_VARIABLE, HEX_VARIABLE))
    path = environ.get(FILE_VARIABLE)
    if path:
        found.append(Source("file", os.path.abspath(path), f"{FILE_VARIABLE} {os.path.abspath(path)}"))
    return found


def _pending(key_file: str | None) -> list[Source]:
    """What an unfinished `rotate-kek` left beside the key file."""
    path = f"{key_file}{PENDING_SUFFIX}"
    if key_file is None or not os.path.lexists(path):
        return []
    return [Source("file", path, f"{path} of a rotation that was not finished", PENDING)]


def _one(sources: Sequence[Source], file: ConfigFile | None, need_key: bool) -> Source | None:
    """The master key's source. Raises ConfigError unless there is exactly one."""
    master = [source for source in sources if source.role == MASTER]
    if len(master) > 1:
        names = " and ".join(source.label for source in master)
        raise ConfigError(f"more than one master key is given: {names}", hint="keep one of them")
    if master:
        return master[0]
    if not need_key:
        return None
    what = f"no master key is given, by --config nor by {FILE_VARIABLE}"
    how = f"name its file: set {FILE_VARIABLE}=FILE or use --config"
    if file:
        what = f"{file.path} names no master key (the environment is not asked where there is a file)"
        how = "put `master_key_file: FILE` into it"
    raise UnusableKey(what, hint=how)
