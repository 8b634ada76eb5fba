"""Input, output and progress of the commands.

- Data goes to stdout, everything else to stderr.
- A file is written whole or not at all: a file without a name takes its place at the end, so that nothing is
  left behind, whatever ends the command; where there are no such files, the next run removes what is left.
- Text from the store is shown with its control characters escaped: a thread_id can't steer the terminal.
- Binary data never goes to a terminal.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..disk import regular, sync
from ..errors import OperatorError

STDIO = "-"

REDRAW = 0.1
"""Seconds between two pictures of a progress bar."""

PAGE = 500
"""Rows of a table that are looked at before they are shown."""

BAR = 24
"""Characters of a progress bar."""


class CommandFailed(OperatorError):
    """What a command could not do, for a reason that no other error names."""

    default_code = "command_failed"


class UsageError(Exception):
    """The command line is wrong: exit code 2."""


# ---- text ------------------------------------------------------------------------------------------


def safe(text: object) -> str:
    """One line without control characters."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)


def fields(values: Mapping[str, Any]) -> str:
    """`name  value` lines; what is empty is left out."""
    shown = {name: safe(_word(value)) for name, value in values.items() if value not in (None, "")}
    width = max(map(len, shown), default=0)
    return "".join(f"{name:{width}}  {value}\n" for name, value in shown.items())


def _word(value: object) -> object:
    return ("no", "yes")[value] if isinstance(value, bool) else value


_COLOURS = {"red": "31", "green": "32", "yellow": "33"}


def paint(text: str, colour: str) -> str:
    """For stdout: in colour where that is a terminal that knows any, and nobody asked for none
    (https://no-color.org)."""
    off = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return text if off or not sys.stdout.isatty() else f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Lines, as the rows come: columns are as wide as the widest cell so far, some hundred rows are looked at
    a time, so that a long table needs no memory. The last column is not padded."""
    cells: Iterator[list[str]] = itertools.chain([list(head)], ([safe(cell) for cell in row] for row in rows))
    widths = [0] * len(head)
    while page := list(itertools.islice(cells, PAGE)):
        widths = [max(width, *(len(row[i]) for row in page)) for i, width in enumerate(widths)]
        for row in page:
            yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() + "\n"


def show(values: Mapping[str, Any], as_json: bool) -> None:
    """One object to stdout: for people, or as a line of JSON."""
    sys.stdout.write(json.dumps(values) + "\n" if as_json else fields(flat(values)))


def error_detail(error: Exception, text: str = "") -> dict[str, str]:
    """`code`, `message` and `hint`, as the API names them. `text`: for an error that has no message."""
    code = str(getattr(error, "code", "") or "failed")
    message, hint = getattr(error, "message", None), getattr(error, "hint", "")
    detail = {"code": code, "message": text if message is None else str(message)}
    return {**detail, "hint": str(hint)} if message is not None and hint else detail


def plain(result: Any) -> dict[str, Any]:
    """What applies of a result of the client's, without what is empty."""
    values = {name: plain(one) if hasattr(one, "_asdict") else one for name, one in result._asdict().items()}
    return {name: value for name, value in values.items() if value not in ("", b"", None)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as names like `deks.total`; lists on one line."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{name}."))
        elif isinstance(value, list):
            result[prefix + name] = ", ".join(map(str, value))
        else:
            result[prefix + name] = value
    return result


def say(text: str) -> None:
    """A remark on stderr, in the place of a progress bar where there is one."""
    sys.stderr.write(("\r\x1b[K" if sys.stderr.isatty() else "") + safe(text) + "\n")


def ask(question: str) -> bool:
    """A question on the terminal; only `y` or `yes` means yes, and so the end of input means no."""
    sys.stderr.write(f"{safe(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# ---- files -----------------------------------------------------------------------------------------


def read_input(name: str) -> bytes:
    """All bytes of a file, or of stdin."""
    if name == STDIO:
        return sys.stdin.buffer.read()
    return Path(name).read_bytes()


@contextlib.contextmanager
def output(name: str) -> Iterator[IO[bytes]]:
    """A file to write to. It gets its name, mode 0600 and its bytes on the disk when the block ends well."""
    if name == STDIO:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    elif (descriptor := _special(name)) is not None:
        with os.fdopen(descriptor, "wb") as file:
            yield file
    else:
        with replaced(Path(name)) as file:
            yield file


def check_replaceable(name: str, begins: bytes) -> None:
    """Raises CommandFailed where a file of this name does not begin so: a store, a log or a key, which a
    slip of the hand named."""
    path = Path(name)
    if name == STDIO or not path.is_file():
        return
    with os.fdopen(regular(path), "rb") as file:
        found = file.read(len(begins))
    if found and found != begins:
        raise CommandFailed(
            f"{name} exists, and is none that this command wrote: it is not replaced",
            hint="name another file",
        )


def write_binary(name: str, data: bytes) -> None:
    if name == STDIO and sys.stdout.isatty() and not _is_text(data):
        raise CommandFailed("binary data is not written to a terminal", hint="name a file or pipe it on")
    with output(name) as file:
        file.write(data)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """The same, and whatever stands under this name is replaced: also a pipe, or a link to a device."""
    if not path.parent.is_dir():
        raise CommandFailed(f"there is no folder {path.parent}", hint="make it, or name another one")
    part = path.with_name(f".{path.name}.part")
    descriptor, named = nameless(path.parent), False
    if descriptor is None:
        descriptor, named = _part(part), True
    with naming(path):
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(descriptor)
                if not named:
                    part.unlink(missing_ok=True)  # of a run that was killed in this very moment
                    named = True
                    give_name(descriptor, part)
                os.replace(part, path)
        except BaseException:
            if named:
                part.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk: of which file? The kernel doesn't say."""
    try:
        yield
    except OSError as error:
        if not error.filename:
            error.filename = str(path)
        raise


def nameless(folder: Path) -> int | None:
    """A private file that vanishes unless it gets a name (open(2), O_TMPFILE); None where there are none."""
    with contextlib.suppress(OSError, AttributeError):
        os.stat("/proc/self/fd")
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    return None


def give_name(descriptor: int, path: Path) -> None:
    """Never that of another file. link(2) would link the symbolic link in /proc; with a folder's descriptor
    Python calls linkat(2)."""
    folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(str(descriptor), path, src_dir_fd=folder, follow_symlinks=True)
    except OSError as error:
        error.filename = str(path)  # not the number of the descriptor
        raise
    finally:
        os.close(folder)


def _part(part: Path) -> int:
    """A private file of a known name; what a killed run left of it is removed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with contextlib.suppress(FileNotFoundError):
        old = regular(part, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
        except BlockingIOError:
            raise CommandFailed(f"another command is writing {part}", hint="wait for it") from None
        finally:
            os.close(old)
    descriptor = os.open(part, flags | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _special(name: str) -> int | None:
    """A pipe or a device: it can't be replaced, only written to. What another user put under this name would
    lead root's hand to a disk, or let it wait for ever: it is refused. None for every other name."""
    try:
        here, there = os.lstat(name), os.stat(name)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(there.st_mode):
        return None
    if here.st_uid not in (0, os.geteuid()):
        raise CommandFailed(
            f"{name} is no regular file, and uid {here.st_uid} put it there", hint="name another file"
        )
    descriptor = os.open(name, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if (found.st_dev, found.st_ino) != (there.st_dev, there.st_ino):
        os.close(descriptor)
        raise CommandFailed(f"{name} was replaced a moment ago", hint="name another file")
    return descriptor


def _is_text(data: bytes) -> bool:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char in "\n\t" for char in text)


# ---- progress --------------------------------------------------------------------------------------


class Progress:
    """`with Progress("verify") as bar: bar(done, total)`: a bar on stderr, where that is a terminal."""

    def __init__(self, title: str, stream: IO[str] | None = None) -> None:
        self._title = title
        self._stream = sys.stderr if stream is None else stream
        self.on = self._stream.isatty()
        self._next = time.monotonic() + REDRAW
        self._drawn = False

    def __call__(self, done: int, total: int) -> None:
        """`total` 0: not known."""
        if self.on and time.monotonic() >= self._next:
            self._next = time.monotonic() + REDRAW
            self._drawn = True
            self._stream.write(f"\r{self._title} {picture(done, total)}\x1b[K")
            self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def picture(done: int, total: int) -> str:
    """`[######      ]  25 % 250/1,000`."""
    if total <= 0:
        return f"{done:,}"
    part = min(done / total, 1.0)
    return f"[{'#' * int(part * BAR):{BAR}}] {part:4.0%} {done:,}/{total:,}"
