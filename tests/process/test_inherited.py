"""What a parent leaves behind decides nothing: the daemon serves, replaces a worker and stops as ever."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Daemon, procs
from tests.harness.daemon import COMMAND, DaemonFailed, base_environment

pytestmark = pytest.mark.fresh

EXEC = "import os, signal, socket, sys, resource, time\n{}\nos.execvp(sys.argv[1], sys.argv[1:])"


def python(code: str) -> list[str]:
    """A wrapper that does this and becomes the daemon."""
    return [sys.executable, "-c", EXEC.format(code)]


def shell(code: str) -> list[str]:
    return ["sh", "-c", f'{code}\nexec "$@"', "sh"]


DEAD = "r, w = os.pipe(); os.close(r); os.dup2(w, {0})"
FULL = """
r, w = os.pipe()
os.set_blocking(w, False)
try:
    while os.write(w, b"x" * 4096): pass
except BlockingIOError: pass
os.set_blocking(w, True)
os.dup2(w, {0})
if not os.fork():
    [os.dup2(os.open(os.devnull, os.O_RDWR), n) for n in (0, 1, 2)]
    os.close(w)
    parent = os.getppid()
    while os.getppid() == parent: time.sleep(0.05)
    os._exit(0)
os.close(r)
"""
SOCKET = """
a, b = socket.socketpair()
a.setblocking(False)
try:
    while a.send(b"x" * 4096): pass
except BlockingIOError: pass
a.setblocking(True)
os.dup2(a.fileno(), 2)
os.set_inheritable(b.fileno(), True)
os.dup2(b.fileno(), 0)
"""

INHERITED: dict[str, Sequence[str]] = {
    "stdout is dead": python(DEAD.format(1)),
    "stdout is full": shell("exec >/dev/full"),
    "nobody reads stdout": python(FULL.format(1)),
    "stderr is dead": python(DEAD.format(2)),
    "stderr is full": shell("exec 2>/dev/full"),
    "nobody reads stderr": python(FULL.format(2)),
    "stderr is a socket that nobody reads": python(SOCKET),
    "stdin, stdout and stderr are closed": shell("exec <&- >&- 2>&-"),
    "signals are ignored": python(
        "[signal.signal(n, signal.SIG_IGN) for n in signal.valid_signals() - {9, 19}]"
    ),
    "signals are blocked": python("signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())"),
    "an alarm is set": python("signal.setitimer(signal.ITIMER_REAL, 1.5)"),
    "a profiling timer is set": python("signal.setitimer(signal.ITIMER_PROF, 0.3)"),
    "umask 0777": shell("umask 0777"),
    "umask 0": shell("umask 0"),
    "a second of processor time": shell("ulimit -S -t 1"),
    "files of 64 KiB": shell("ulimit -S -f 64"),
    "descriptors: 64": shell("ulimit -S -n 64"),
    "a small stack": shell("ulimit -S -s 192"),
    "no locked memory": shell("ulimit -S -l 0"),
    "an unlimited stack": python(
        "hard = resource.getrlimit(resource.RLIMIT_STACK)[1]\n"
        "resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))"
    ),
    "nice": ["nice", "-n", "5"],
    "one core": python("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"),
    "a working directory that is gone": python("os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"),
}

ENVIRONMENTS = {
    "warnings are errors": {"PYTHONWARNINGS": "error"},
    "a fixed seed of hashes": {"PYTHONHASHSEED": "0"},
    "python is verbose": {"PYTHONVERBOSE": "1", "PYTHONDEVMODE": "1", "PYTHONTRACEMALLOC": "9"},
    "python inspects": {"PYTHONINSPECT": "1", "PYTHONOPTIMIZE": "2"},
    "an old locale": {
        "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"
    },
    "a locale that is not there": {"LC_ALL": "xx_YY.utf7", "LANGUAGE": "tlh"},
    "a time zone that is none": {"TZ": "Nowhere/Never-99:99"},
    "malloc's own variables": {"MALLOC_ARENA_MAX": "7", "MALLOC_PERTURB_": "0"},
}  # fmt: skip


def lives(daemon: Daemon) -> None:
    """All that a daemon does by its processes and signals."""
    created = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "ünï \u2603"})
    about = daemon.ok("GET", f"/deks/{created['key_id']}")
    assert about["created_at"][:13] == time.strftime("%Y-%m-%dT%H", time.gmtime())
    assert {path.stat().st_mode & 0o777 for path in daemon.data_dir.iterdir()} == {0o600}
    worker = daemon.pids()[-1]
    os.kill(worker, signal.SIGKILL)
    procs.wait_until(lambda: worker not in daemon.pids() and len(daemon.pids()) == 4, 20, "a new worker")
    os.unlink(daemon.audit_log)
    daemon.signal(signal.SIGHUP)
    procs.wait_until(lambda: made(daemon) == 200, 20, "SIGHUP to be heard")
    time.sleep(0.6)  # the timers of the list would ring by now
    daemon.stop()


def every_third(choices: dict[str, Any], first: int) -> list[Any]:
    """The others only in the long run."""
    marks = [[] if n % 3 == first else [pytest.mark.long] for n in range(len(choices))]
    return [pytest.param(value, id=name, marks=mark) for mark, (name, value) in zip(marks, choices.items())]


@pytest.mark.parametrize("wrapper", every_third(INHERITED, 0))
def test_what_a_parent_did(wrapper: Sequence[str]) -> None:
    with Daemon(workers=2, wrapper=wrapper) as daemon:
        lives(daemon)


@pytest.mark.parametrize("environment", every_third(ENVIRONMENTS, 1))
def test_the_environment(environment: dict[str, str]) -> None:
    home = Path(subprocess.check_output(["mktemp", "-d", "/tmp/kms-ümläut-XXXXXX"], text=True).strip())
    with Daemon(workers=2, env=environment, home=home) as daemon:
        lives(daemon)
        assert "Traceback" not in daemon.stderr and "Warning" not in daemon.stderr


def test_a_serve_with_a_flag_that_is_not_plain() -> None:
    """The command line reads it, and left the soft limits and the streams as they were."""
    wrapper = ["prlimit", "--nofile=256:4096", *python(FULL.format(2))]
    with Daemon(workers=1, args=["--allow-retired-kek"], wrapper=wrapper) as daemon:
        assert daemon.ok("GET", "/status")["limits"]["open_files"]["limit"] == 4096
        os.unlink(daemon.audit_log)
        assert {made(daemon) for _ in range(3)} == {503}
        daemon.signal(signal.SIGHUP)
        procs.wait_until(lambda: made(daemon) == 200, 20, "SIGHUP to be heard")
        daemon.stop()


def made(daemon: Daemon) -> int:
    return daemon.request("POST", "/create_dek_for_thread", {"thread_id": "t"}).status


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    yield path, descriptor
    os.close(descriptor)


def drained(descriptor: int) -> bytes:
    found = b""
    with suppress(BlockingIOError):
        while part := os.read(descriptor, 65536):
            found += part
    return found


def test_what_was_dropped_is_told_when_it_can_be(fifo: tuple[Path, int]) -> None:
    path, descriptor = fifo
    with suppress(BlockingIOError):
        while os.write(descriptor, b"x" * 4096):
            pass
    with Daemon(workers=2, wrapper=["sh", "-c", f'exec 2>"{path}"; exec "$@"', "sh"]) as daemon:
        for _ in range(2):
            worker = daemon.pids()[-1]
            os.kill(worker, signal.SIGKILL)
            procs.wait_until(
                lambda gone=worker: gone not in daemon.pids() and len(daemon.pids()) == 4, 20, "a worker"
            )
        assert set(drained(descriptor)) == set(b"x")
        said = b""
        deadline = time.monotonic() + 20
        while b"dropped" not in said and time.monotonic() < deadline:
            select.select([descriptor], [], [], 0.2)
            said += drained(descriptor)
        first = said.decode().splitlines()[0]
        assert "lines of this log were dropped, since nobody read it" in first, first
        assert int(first.split()[2]) >= 2
        daemon.stop()


def test_no_descriptor_of_the_parent_is_kept(fifo: tuple[Path, int]) -> None:
    """A pipe's end that a parent forgot would keep its reader waiting for ever, a lock would stay held."""
    path, descriptor = fifo
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.close(descriptor)
    descriptor = os.open(os.devnull, os.O_RDWR)  # for the fixture
    wrapper = ["sh", "-c", f'exec 7>"{path}" 8>&7 9>&7; exec "$@"', "sh"]
    with Daemon(workers=2, wrapper=wrapper):
        assert os.read(reader, 1) == b""  # the end of the file: nobody has it open any more
    os.close(reader)


def test_limits_are_set_right() -> None:
    wrapper = shell(
        "ulimit -S -n 128; ulimit -S -s 256; ulimit -S -f 100; ulimit -S -c unlimited 2>/dev/null"
    )
    with Daemon(workers=2, wrapper=wrapper) as daemon:
        for pid in daemon.pids():
            rows = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
            limits = {row[:25].strip(): row[25:].split()[:2] for row in rows}
            for name in ("Max open files", "Max file size", "Max cpu time", "Max locked memory"):
                assert limits[name][0] == limits[name][1], (name, limits[name])
            assert limits["Max stack size"][0] == str(8 << 20)
            assert limits["Max core file size"] == ["0", "0"]


@pytest.mark.parametrize(
    ("wrapper", "told"),
    [
        (shell("ulimit -f 4000"), "files may have"),
        (shell("ulimit -t 500"), "500 s of processor time"),
    ],
)
def test_what_can_not_be_set_right_is_told(wrapper: Sequence[str], told: str) -> None:
    with Daemon(workers=2, wrapper=wrapper) as daemon:
        assert daemon.stderr.count(told) == 1


def test_too_few_open_files_are_refused() -> None:
    """It started, served no connection at all, and said nothing of that but a warning."""
    refused = Daemon(workers=2, wrapper=shell("ulimit -n 64"), ready_timeout=10).refusal()
    assert "64 open files are allowed" in refused.stderr and "LimitNOFILE=" in refused.stderr
    with Daemon(workers=2, wrapper=shell("ulimit -n 96")) as daemon:
        assert daemon.request("GET", "/readyz").status == 200
        done = daemon.offline("doctor", wrapper=shell("ulimit -n 64"))
        assert done.returncode == 1 and b"64 open files are allowed" in done.stdout


def test_a_relative_path_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); os.execv(sys.argv[1], sys.argv[1:])"
    words = [sys.executable, "-c", f"import sys; {code}", *COMMAND, "--config", "kms.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, env=base_environment(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "progressdb-kms: the working directory is gone (give absolute paths, or start it in another folder)"
    )


def test_commands_keep_what_nohup_asked_for(tmp_path: Path) -> None:
    """An ignored SIGHUP stays ignored: a long `verify` survives the end of its terminal."""
    code = (
        "import signal, os, time\nfrom progressdb_kms.tools import cli\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with cli._interrupts():\n    os.kill(os.getpid(), signal.SIGHUP)\n    print('alive')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "alive\n", done.stderr


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_too_little_address_space_is_one_line(workers: int) -> None:
    """From what is enough downwards: it serves, or says in one line what to raise."""
    refused = 0
    for size in (66_000, 56_000, 46_000, 36_000):
        daemon = Daemon(workers=workers, wrapper=["sh", "-c", f'ulimit -v {size}; exec "$@"', "sh"])
        with suppress(DaemonFailed):
            daemon.start().stop()
        said = daemon.stderr
        daemon.close()
        theirs = ("_run_module_as_main", "Fatal Python error", "memory allocation of")
        ended = any(words in said for words in theirs)  # the interpreter, or a library, had no room
        ours = [line for line in said.splitlines() if line.startswith("progressdb-kms")]
        if ended and not ours:
            continue
        assert "Traceback" not in said, said
        refused += "raise" in said and "LimitAS=" in said
        assert "internal error" not in said and len(ours if ended else said.splitlines()) <= 1, said
    assert refused
