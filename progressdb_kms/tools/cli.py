"""The command line: makes a parser of the table of commands, and runs one.

- Exit codes: 0 it was done, 1 it failed, 2 the command line is wrong. An interrupt ends the process by its
  signal, as shells expect.
- An error is one line on stderr: `progressdb-kms: what is wrong (what to do)`. There is never a traceback.
- What a command does stands below its row in `commands`; what it needs is imported once the arguments are
  known to be right.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import json
import os
import select
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from .. import __version__
from ..process.streams import PROG, fail, line_of, open_standard_streams
from .command import CHOICES, EXITS, GROUP_TITLES, SERVE, Arg, Command
from .commands import COMMANDS
from .console import UsageError, error_detail, say

__all__ = ["COMMANDS", "PROG", "build_parser", "main"]

# ---- the parser --------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for an error."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, **options)
        self.color = False  # Python 3.14 colours help; the documentation is made from it

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=28, width=100, **options)


def build_parser(word: str = "") -> argparse.ArgumentParser:
    """The parser for all of COMMANDS, or in a sixth of the time for those that begin with this word.

    `parse_args` gives a namespace with `command` (a Command).
    """
    parser = _Parser(
        prog=PROG, description=_overview(), epilog=_exit_codes(EXITS), usage=f"{PROG} [COMMAND] [OPTION…]"
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    places: dict[str, Any] = {
        "": parser.add_subparsers(dest="word", metavar="COMMAND", help=argparse.SUPPRESS)
    }
    for command in COMMANDS:
        first, _, second = command.name.partition(" ")
        if word not in ("", first):
            continue
        if second and first not in places:
            outer = places[""].add_parser(first, prog=f"{PROG} {first}", description=_overview(first))
            places[first] = outer.add_subparsers(
                dest="word2", metavar="COMMAND", required=True, help=argparse.SUPPRESS
            )
        _add(places[first if second else ""], second or first, command)
    return parser


def _add(place: Any, word: str, command: Command) -> None:
    parser = place.add_parser(
        word,
        prog=f"{PROG} {command.name}",
        description=f"{_sentence(command.help)}\n\n{textwrap.fill(command.about, 96)}",
        epilog=_examples(command) + _exit_codes(exits_of(command)),
    )
    for arg in command.args:
        parser.add_argument(*arg.names, **_options(arg))
    parser.set_defaults(command=command)


def _options(arg: Arg) -> dict[str, Any]:
    options: dict[str, Any] = {"help": arg.help.replace("%", "%%")}
    if arg.kind == "flag":
        return {**options, "action": "store_true"}
    options.update(metavar=arg.metavar, default=arg.default)
    if arg.kind not in CHOICES and not arg.empty:
        options["type"] = _TYPES.get(arg.kind, _given)
    if arg.kind in CHOICES:
        options["choices"] = CHOICES[arg.kind]
    if arg.nargs:
        options["nargs"] = int(arg.nargs) if arg.nargs.isdigit() else arg.nargs
    if arg.required:
        options["required"] = True
    return options


def _given(text: str) -> str:
    """`--thread-id "$UNSET"` must not mean all threads, nor `--config "$UNSET"` that of this host."""
    if not text:
        raise argparse.ArgumentTypeError("what is given is empty")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _uid(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no UID")
    return int(text)


_TYPES = {"count": _count, "uid": _uid}


def exits_of(command: Command) -> tuple[tuple[int, str], ...]:
    """Every exit code of a command and what it means there."""
    return tuple((code, dict(command.exits).get(code, text)) for code, text in EXITS)


def _overview(first: str = "") -> str:
    lines = ["A local key-management daemon: envelope encryption over a Unix socket." if not first else ""]
    for group, title in GROUP_TITLES.items():
        rows = [c for c in COMMANDS if c.group == group and (not first or c.name.startswith(first + " "))]
        if rows:
            lines += ["", f"{title}:", *(f"  {c.name:14}  {c.help}" for c in rows)]
    return "\n".join(lines).strip()


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _examples(command: Command) -> str:
    return (
        "".join(["examples:\n", *(f"  {line}\n" for line in command.examples), "\n"])
        if command.examples
        else ""
    )


def _exit_codes(exits: Sequence[tuple[int, str]]) -> str:
    return "exit codes:\n" + "".join(f"  {code}  {text}\n" for code, text in exits)


# ---- running -----------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP came: clean up, then end as the signal would have ended the process."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit code; ends the process by its signal after an interrupt."""
    words = list(sys.argv[1:] if argv is None else argv)
    open_standard_streams()
    _own_streams()
    try:
        return _flushed(_run(_with_command(words)))
    except UsageError as error:
        return _failed(words, error, str(error), 2)
    except KeyboardInterrupt:
        return _die(signal.SIGINT)
    except Interrupted as interrupt:
        return _die(interrupt.number)
    except BrokenPipeError:  # whoever read our output has seen enough
        _give_up_stdout()
        return 1
    except UnicodeEncodeError as error:
        return _failed(words, error, "an argument is no text in this locale (set LC_ALL=C.UTF-8)", 2)
    except Exception as error:
        try:
            sys.stdout.flush()
        except OSError:
            _give_up_stdout()
        return _failed(words, error, _told(error), 1)


_DISK = {
    errno.ENOSPC: "make room there, and run it again",
    errno.EDQUOT: "make room there, or raise the quota, and run it again",
    errno.EFBIG: "raise the limit of a file's size (`ulimit -f`), and run it again",
    errno.EROFS: "mount it for writing (`findmnt -T` tells what is mounted there), and run it again",
    errno.EPERM: "is it immutable? `lsattr -d` of it and of its folder tells, `chattr -i` changes it",
}
"""What to do about an error of the file system that no code of ours knows more of."""


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename not in (None, _STDOUT) and error.errno in _DISK:
        return f"{line_of(error)} ({_DISK[error.errno]})"
    return line_of(error)


def _give_up_stdout() -> None:
    """It goes nowhere, or the interpreter would try again what failed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


_STDOUT = "standard output"


class _Whole(io.FileIO):
    """stdin or stdout, which gives and takes all, and is waited for where somebody else made it not block.
    Where stdout can't be written the error says so: by itself it would name no file."""

    def readinto(self, buffer: Any) -> int:
        while (size := super().readinto(buffer)) is None:
            select.select((self,), (), ())
        return size

    def readall(self) -> bytes:
        parts, piece = [], bytearray(1 << 16)
        while size := self.readinto(piece):
            parts.append(bytes(piece[:size]))
        return b"".join(parts)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        try:
            while left:
                taken: int | None = super().write(left)
                if taken is None:
                    select.select((), (self,), ())
                else:
                    left = left[taken:]
        except OSError as error:
            error.filename = _STDOUT
            raise
        return len(data)


def _own_streams() -> None:
    """Where they are the interpreter's, and nobody put another in its place. PYTHONUNBUFFERED leaves out what
    writes the rest behind a part: a full disk then cut what a command gave, and it ended with 0."""
    for name, number, mode in (("stdin", 0, "rb"), ("stdout", 1, "wb")):
        old = getattr(sys, name)
        raw = getattr(getattr(old, "buffer", None), "raw", getattr(old, "buffer", None))
        if type(raw) is io.FileIO and raw.fileno() == number and isinstance(old, io.TextIOWrapper):
            whole = _Whole(number, mode, closefd=False)
            by_line = old.line_buffering or old.write_through
            buffer = io.BufferedWriter(whole) if number else io.BufferedReader(whole)
            setattr(sys, name, io.TextIOWrapper(buffer, old.encoding, old.errors, line_buffering=by_line))


def _failed(words: Sequence[str], error: Exception, text: str, code: int) -> int:
    """One line on stderr, and with --json one of JSON, in the form of the API's errors."""
    if "--json" not in words:
        return fail(text, code)
    detail = {"code": "usage", "message": text} if code == 2 else error_detail(error, text)
    with contextlib.suppress(OSError):
        sys.stderr.write(json.dumps({"error": detail}) + "\n")
        sys.stderr.flush()
    return code


def _die(number: int) -> int:
    """End as the signal would have ended the process."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


def _with_command(words: list[str]) -> list[str]:
    """No command means serve; --help and --version are for the program."""
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        return ["serve", *words]
    known = {command.name.partition(" ")[0] for command in COMMANDS}
    if not words[0].startswith("-") and words[0] not in known:
        near = difflib.get_close_matches(words[0], known, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no command {words[0]!r} ({meant}see `{PROG} --help`)")
    return words


def _run(words: list[str]) -> int:
    args, unknown = build_parser("" if words[0].startswith("-") else words[0]).parse_known_args(words)
    if not hasattr(args, "command"):
        raise UsageError(f"no command is given (see `{PROG} --help`)")
    command: Command = args.command
    if unknown:
        more = " ".join(unknown)
        raise UsageError(f"unrecognized arguments: {more} (see `{PROG} {command.name} --help`)")
    if command.group == SERVE:
        _settle()
    if command.keys:
        _harden(words)
    with contextlib.nullcontext() if command.group == SERVE else _interrupts():
        return command.run(args) or 0


def _settle() -> None:
    """As `__main__` does for a plain `serve`: nothing that was inherited makes a daemon wait, or small."""
    from ..process import inherited, streams

    streams.unblock_standard_streams()
    inherited.settle(os.environ)


def _harden(words: Sequence[str]) -> None:
    """First of all, because it may start the process anew."""
    from ..process import hardening

    hardening.prepare(words, os.environ)
    hardening.harden()
    if not (measure := hardening.second_start()).ok:
        say(f"{PROG}: warning: {measure.detail} ({hardening.REMEDY})")


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Let signals that end the process unwind the stack first: temporary files are removed, keys wiped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    ends = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    heard = [
        number for number in ends if signal.getsignal(number) != signal.SIG_IGN
    ]  # nohup, `&` in a script
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _flushed(code: int) -> int:
    sys.stdout.flush()
    return code
