"""The process that `warm` forks: it holds the modules of one kind of program and waits for what to become."""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

from progressdb_kms.__main__ import main
from progressdb_kms.process import hardening

from .daemon import REPO

NOT_SERVED = ("tools", "client", "fleet")
"""Beginnings of names that a plain daemon doesn't load."""


def _load(serves: bool) -> None:
    for path in sorted((REPO / "progressdb_kms").rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        if path.stem not in ("__init__", "__main__") and not (
            serves and any(part.startswith(NOT_SERVED) for part in parts)
        ):
            with contextlib.suppress(ImportError):  # what an extra is needed for
                importlib.import_module(".".join(parts))


def _serve_tests(control: socket.socket) -> None:
    while True:
        text, ancillary, _, _ = control.recvmsg(1 << 20, socket.CMSG_SPACE(3 * 4))
        if not text:
            return
        streams = array.array("i", ancillary[0][2]).tolist()
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            mine = os.getpid()
            child = os.fork()
            if child == 0:
                control.close()
                os.close(reader)
                os.close(writer)
                _become(json.loads(text), streams, mine)
            os.write(writer, b"%d" % child)
            os._exit(0)
        os.waitpid(between, 0)
        control.send(os.read(reader, 64))
        for end in (reader, writer, *streams):
            os.close(end)


def _become(request: dict[str, Any], streams: list[int], between: int) -> NoReturn:
    """The program itself. Never returns to the template's loop."""
    while os.getppid() == between:
        time.sleep(0.0002)
    code: Any = 1
    try:
        if request["session"]:
            os.setsid()
        for number, end in enumerate(streams):
            os.dup2(end, number)
        for end in streams:
            os.close(end)
        _new_streams()
        os.umask(request["umask"])
        os.chdir(request["cwd"])
        code = _main(request)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _new_streams() -> None:
    """As the interpreter makes them: whether they can seek, and how they are buffered, is looked up once."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def _main(request: dict[str, Any]) -> int:
    os.environ.clear()
    os.environ.update(request["env"])
    prepared = hardening.new_environment(os.environ, os.getpid(), wipes=hardening._can_wipe_on_free())
    os.environ.update(prepared or {})
    words = request["words"]
    sys.argv = [str(REPO / "progressdb_kms" / "__main__.py"), *words]
    sys.path[0] = request["cwd"]
    return main(words)


if __name__ == "__main__":
    _load(sys.argv[2] == "serve")
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as control:
        _serve_tests(control)
