"""`progressdb-kms`, `python -m progressdb_kms` and the zipapp.

A plain `serve` is read and run here, so that the daemon holds nothing of the command line; every other word,
and a flag of serve that is not plain, is the command line's.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # `signal` loads more, where ^C is a traceback
import os
import sys

SERVE_FLAGS = {"--socket": "socket", "--data-dir": "data_dir", "--config": "config", "--addr": "tcp_address"}

HOLD_KEYS = frozenset(
    ("backup", "doctor", "export", "genkey", "import", "kek-id", "restore", "rewrap", "rotate-kek", "verify")
)
"""Commands that start anew, see `hardening`: at once, and not when all of the command line is loaded."""


def serve_flags(words: list[str]) -> dict[str, str | None] | None:
    """The flags of a plain `serve`, by the names of the configuration; None where it is something else."""
    if words and not words[0].startswith("-") and words[0] != "serve":
        return None
    found: dict[str, str | None] = dict.fromkeys(SERVE_FLAGS.values())
    rest = list(words[words[:1] == ["serve"] :])
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag not in SERVE_FLAGS or (not equals and (not rest or rest[0].startswith("-"))):
            return None
        found[SERVE_FLAGS[flag]] = value if equals else rest.pop(0)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while modules are loaded, see `cli`
    words = list(sys.argv[1:] if argv is None else argv)
    flags = serve_flags(words)
    from .process import inherited

    inherited.settle_signals()
    if flags is None:
        if words and words[0] in HOLD_KEYS and not {"-h", "--help"} & set(words):
            from .process import hardening, streams

            streams.open_standard_streams()
            hardening.prepare(words, os.environ)
        from .tools.cli import main as commands

        return commands(words)
    from .process.streams import fail, line_of, open_standard_streams, unblock_standard_streams

    open_standard_streams()
    unblock_standard_streams()
    inherited.settle(os.environ)
    try:
        return _serve(words, flags)
    except Exception as error:
        return fail(line_of(error))


def _serve(words: list[str], flags: dict[str, str | None]) -> int:
    from .process import hardening

    hardening.prepare(words, os.environ)  # first of all: it starts the program anew
    hardening.harden()
    from .config.load import load
    from .process.serve import serve

    with load(flags, os.environ, fleet=True) as loaded:
        return serve(loaded)


if __name__ == "__main__":
    sys.exit(main())
