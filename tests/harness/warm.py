"""Programs of ours that start warm: forked from a process that holds all of their modules already.

The interpreter and the modules are two thirds of what a start of the daemon takes, and nearly all of what a
command does; a run of the tests starts thousands. So the plain run asks a template for most of them. One that
starts so is a child of the test like any other: `Warm` is a `subprocess.Popen`.

    test ── socket ──► template, started once: all modules, one thread, the environment of `hardening`
                           └─ fork ─ fork ─► main(), with the streams, folder, umask, variables it was given

The fork in between ends at once, so that its child becomes the test's (which adopts orphans meanwhile).

Only a start through execve shows what the start itself does. `bin/test --long` has no other; in the plain run
`possible` says no to what an interpreter or the C library reads before any line of ours, and the tests of the
start, of memory and of what is inherited, which are marked `fresh`, say no as well.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from progressdb_kms.process import hardening

REPO = Path(__file__).resolve().parents[2]
WORDS = (sys.executable, "-m", "progressdb_kms")
"""The command that can be started so, before its arguments."""

enabled = WANTED = bool(os.environ.get("TESTS_WARM"))
"""tests/conftest.py turns `enabled` off for the tests that are marked `fresh`."""

_EARLY = (
    "PYTHON",
    "LC_",
    "LANG",
    "LD_",
    "GLIBC",
    "MALLOC",
    "OPENSSL_",
    "TZ",
    "LISTEN_",
    "PROGRESSDB_KMS_MASTER",
)
"""What decides something before a line of ours runs, or says how it was started."""

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def possible(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether this command is the same when it starts warm, with these variables beside the harness's own."""
    return enabled and tuple(command) == WORDS and not any(name.startswith(_EARLY) for name in env)


class Warm(subprocess.Popen[bytes]):
    """`Popen([*WORDS, …], env=…)`, forked from a template. `env` holds all variables."""

    def _execute_child(self, args: Any, *rest: Any) -> None:  # what Popen calls between pipes and waiting
        _, _, _, _, cwd, env, _, _, _, *ends = rest
        words = list(args)[len(WORDS) :]
        request = {"words": words, "env": env, "cwd": str(cwd or os.getcwd()), "session": bool(ends[11])}
        template = _template(serves=not words or words[0].startswith("-"))
        self.pid = template.start(request, streams=(ends[0], ends[3], ends[5]))
        self._child_created = True
        self._close_pipe_fds(*ends[:6])  # type: ignore[attr-defined]


class Template:
    """The process that is forked, which runs `template`."""

    def __init__(self, serves: bool) -> None:
        from .daemon import base_environment

        plain = base_environment(Path("/nonexistent"))
        prepared = hardening.new_environment(plain, 0, wipes=hardening._can_wipe_on_free()) or plain
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kind = "serve" if serves else "command"
        words = [sys.executable, "-m", "tests.harness.template", str(theirs.fileno()), kind]
        with theirs:
            self.process = subprocess.Popen(
                words, cwd=REPO, env=prepared, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
        atexit.register(self.end)

    def end(self) -> None:
        self.socket.close()
        self.process.wait()

    def start(self, request: Mapping[str, Any], streams: Sequence[int]) -> int:
        umask = os.umask(0)
        os.umask(umask)
        text = json.dumps({**request, "umask": umask}).encode()
        with open(os.devnull, "r+b") as nothing:
            given = array.array("i", [nothing.fileno() if end < 0 else end for end in streams])
            _adopt_orphans(True)
            try:
                self.socket.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)])
                return int(self.socket.recv(64))
            finally:
                _adopt_orphans(False)


_templates: dict[bool, Template] = {}


def _template(serves: bool) -> Template:
    if serves not in _templates:
        _templates[serves] = Template(serves)
    return _templates[serves]


def _adopt_orphans(yes: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(yes), *[ctypes.c_ulong(0)] * 3)
