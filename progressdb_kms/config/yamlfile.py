"""The configuration file, read by a child process that lives for the time of it.

PyYAML copies what it reads (a key in hex stood in its heap three times), and nothing of that can be wiped. So
this process never sees the text: it opens the file, looks at its mode and forks. The child parses, checks and
ends; a pipe brings what is no secret, as a line of JSON, and after it the 32 bytes of each key. These
stay there until they are read straight into locked memory.

    parent   open, fstat, fork ────────────────────────── JSON <─┬─ values, or the message of an error
    child    read, parse, check every value, write, end          └─ keys: 32 bytes each, as OPTIONS has them

Only the tree of YAML is used, never its objects: no tag can make anything but text, a bare `off` or `0600` is
seen as it was written, a key that stands twice is noticed. A fault of syntax is told by line and column: the
text around it may be a key.

It forks: before any thread, at SIGHUP too, where the supervisor reads it. The child logs nothing, prints
nothing, opens no database, and ends by `_exit`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from io import FileIO
from typing import TYPE_CHECKING, Any, NoReturn

from ..disk import regular, write_all
from ..errors import ConfigError, KMSError
from .keysource import HEX, MASTER, NO_ACCESS, Source
from .options import ALIASES, BY_NAME, KEY_LISTS, MASTER_KEYS, OPTIONS
from .values import KEY_FORMS, Scalar, Value, shown, unknown

if TYPE_CHECKING:
    import yaml

MAX_FILE = 1 << 20
"""Bytes of a configuration file."""


class ConfigFile:
    """What a file says. `values` holds plain data by the names of OPTIONS.

    A key in hex is not in `values`: `master_key_hex` is None there, and an entry of a list of keys is
    ["hex", None]. Its bytes wait in a pipe, in the order of OPTIONS, for as long as this is open.
    """

    def __init__(self, path: str, values: dict[str, Any], keys: FileIO) -> None:
        self.path = path
        self.values = values
        self._keys = keys

    def sources(self) -> list[Source]:
        """Of all its keys: of a master key, more than one, too, then of the lists. Those in hex come through
        the pipe in this order."""
        masters = (row for row in zip(KEY_FORMS, MASTER_KEYS) if row[1] in self.values)
        found = [self._source(form, self.values[name], name, MASTER) for form, name in masters]
        for role in KEY_LISTS:
            for number, (form, value) in enumerate(self.values.get(role, ()), 1):
                found.append(self._source(form, value, f"{role} entry {number}", role))
        return found

    def _source(self, form: str, value: str, name: str, role: str) -> Source:
        if form == HEX:
            return Source(HEX, str(self._keys.fileno()), f"{name} in {self.path}", role)
        folder = os.path.dirname(self.path)
        place = os.path.abspath(os.path.join(folder, value)) if form == "file" else value
        return Source(form, place, f"{name} {place}", role)

    def close(self) -> None:
        self._keys.close()


def read(path: str) -> ConfigFile:
    """Parse and check a configuration file. Raises ConfigError, which names the key and the file."""
    with contextlib.ExitStack() as stack:
        source, mode = _open(path)
        stack.enter_context(source)
        answers, end = (stack.enter_context(FileIO(fd, way)) for fd, way in zip(os.pipe(), "rw"))
        child = os.fork()
        if not child:
            _child(path, source, end.fileno())
        end.close()
        file = ConfigFile(path, _hear(path, child, answers), FileIO(os.dup(answers.fileno())))
        secret = next((source.label for source in file.sources() if source.form == HEX), "")
        if secret and mode & 0o077:
            file.close()
            raise ConfigError(
                f"{secret}: a file with a key in it is open to others (mode {mode & 0o7777:04o})",
                hint=f"chmod 0600 {path}, and change the key if others may have read it",
            )
        return file


def _open(path: str) -> tuple[FileIO, int]:
    """Returns the open file and its mode."""
    try:
        descriptor = regular(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a path"
        hint = NO_ACCESS if isinstance(error, PermissionError) else "--config names a file of YAML"
        raise ConfigError(f"the configuration file {path} can't be read: {why}", hint=hint) from None
    about, trouble = os.fstat(descriptor), ""
    if about.st_uid not in (0, os.geteuid()):
        trouble = f"belongs to uid {about.st_uid}, who could put another key into it"
    elif about.st_mode & 0o022:
        trouble = f"may be written by others (mode {about.st_mode & 0o7777:04o})"
    if trouble:
        os.close(descriptor)
        hint = f"chown it to its user, chmod 0600 {path}"
        raise ConfigError(f"the configuration file {path} {trouble}", hint=hint, code="distrust")
    return FileIO(descriptor), about.st_mode


def _hear(path: str, child: int, answers: FileIO) -> dict[str, Any]:
    """What the child tells. What follows in the pipe is left there: a file without a buffer reads a line."""
    line = answers.readline()
    status = 0
    with contextlib.suppress(ChildProcessError):  # whoever ignores SIGCHLD has no children to wait for
        status = os.waitpid(child, 0)[1]
    if status or not line.endswith(b"\n"):
        raise ConfigError(
            f"the parser of {path} ended before it was done (status {status})", hint="out of memory?"
        )
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise ConfigError(answer["error"], hint=answer["hint"])
    return answer


# ---- the child -----------------------------------------------------------------------------------


def _child(path: str, source: FileIO, answers: int) -> NoReturn:
    """Never returns and never raises: the caller's frames belong to the parent. Prints nothing."""
    status = 1
    try:
        write_all(answers, _answer(path, source))
        status = 0
    finally:
        os._exit(status)


def _answer(path: str, source: FileIO) -> bytes:
    """The line of JSON for the parent, and the bytes of the keys (at most 109, so that a pipe holds all)."""
    keys: list[bytearray] = []
    try:
        values = _check(_parse(source.read(MAX_FILE + 1), path), path)
        text = json.dumps(values, default=keys.append)  # in the place of each, which is no JSON, stands null
        return b"\n".join((text.encode(), b"".join(keys)))
    except KMSError as error:
        wrong = {"error": error.message, "hint": error.hint}
    except ImportError:
        hint = "apt install python3-yaml, or pip install pyyaml"
        wrong = {"error": f"{path} can't be read without PyYAML", "hint": hint}
    except Exception as error:  # what it says may quote the file
        wrong = {"error": f"{path} can't be parsed ({type(error).__name__})", "hint": ""}
    return json.dumps(wrong).encode() + b"\n"


def _check(tree: Value, path: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `key: value` lines")
    values: dict[str, Any] = {}
    for name, value in tree.items():
        option = BY_NAME.get(ALIASES.get(name, name))
        if option is None:
            hint = "`progressdb-kms help configuration` lists all keys"
            raise ConfigError(f"{path}: {unknown(name, (*BY_NAME, *ALIASES))}", hint=hint)
        if option.name in values:
            other = next(alias for alias, target in ALIASES.items() if target == option.name)
            raise ConfigError(f"{path} has both {option.name} and its other spelling {other}: keep one")
        if isinstance(value, Scalar) and value.type == "null":
            raise ConfigError(f"{name} in {path} has no value", hint="leave the line out for the default")
        values[option.name] = option.read(value, f"{name} in {path}")
    return {option.name: values[option.name] for option in OPTIONS if option.name in values}


# ---- the tree of YAML ------------------------------------------------------------------------------


def _parse(text: bytes, path: str) -> Value:
    if len(text) > MAX_FILE:
        raise ConfigError(f"the configuration file {path} is larger than {MAX_FILE} bytes")
    import yaml  # here only: the parent never loads it

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them may stand for millions
                raise ConfigError(f"{path}: aliases (*name) are not taken")
            return super().compose_node(parent, index)

    try:
        node = yaml.compose(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path} is not YAML{place}", hint="what stands there is not shown: it may be a key"
        ) from None
    except yaml.YAMLError:
        raise ConfigError(f"{path} is not YAML: it holds bytes that are no text") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
    tree = _plain(node, path) if node else Scalar("", "null")
    return {} if isinstance(tree, Scalar) and tree.type == "null" else tree  # nothing but comments


def _plain(node: yaml.Node, path: str) -> Value:
    """Lists, mappings and scalars; a scalar's type is the last part of its tag."""
    kind = node.tag.rpartition(":")[2] if node.tag.startswith("tag:yaml.org,2002:") else "foreign"
    if kind == "map":
        return _mapping(node.value, path)
    if kind == "seq":
        return [_plain(item, path) for item in node.value]
    return Scalar(node.value if isinstance(node.value, str) else "", kind)


def _mapping(pairs: Iterable[tuple[yaml.Node, yaml.Node]], path: str) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for key, value in pairs:
        name = key.value if isinstance(key.value, str) else ""
        if name in found:
            raise ConfigError(
                f"{path}: {shown(name) or 'a key'} stands twice, again in line {key.start_mark.line + 1}"
            )
        found[name] = _plain(value, path)
    return found
