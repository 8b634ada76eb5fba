"""The second start and the measures, mostly looked at from outside a process that took them."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import zipapp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.config import keysource
from progressdb_kms.process import hardening
from progressdb_kms.process.hardening import (
    BLOCKED,
    FD_VARIABLE,
    HEX_VARIABLE,
    MARKER,
    TUNABLES,
    Measure,
    has_config,
    merged_tunables,
    new_environment,
)
from tests.harness import Daemon, procs
from tests.harness.daemon import cli
from tests.harness.faults import injecting, need_strace

pytestmark = pytest.mark.fresh

REPO = Path(__file__).resolve().parents[2]
KEY = bytes(range(7, 39)).hex()
FAST = "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=4194304:glibc.malloc.trim_threshold=8388608"
UNCACHED = "glibc.malloc.tcache_count=0"
OURS = f"{UNCACHED}:glibc.malloc.perturb=165:{FAST}"
CPU = dict(hardening.CAPABILITY)
READY = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": OURS, "LD_BIND_NOW": "1", "PYTHONUTF8": "1", **CPU}

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
wiping = pytest.mark.skipif(not hardening._can_wipe_on_free(), reason="needs CPython on glibc")


# ---- what is decided -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "wipes", "expected"),
    [
        ({}, True, READY),
        ({"A": "1"}, True, {"A": "1", **READY}),
        ({"A": "1", **READY}, True, None),
        ({**READY, "LD_BIND_NOW": ""}, True, READY),
        ({**READY, "PYTHONMALLOC": "debug"}, True, READY),
        ({**READY, "GLIBC_TUNABLES": "a=1"}, True, {**READY, "GLIBC_TUNABLES": f"a=1:{OURS}"}),
        ({**READY, "GLIBC_TUNABLES": f"a=1:{OURS}"}, True, None),
        ({**READY, HEX_VARIABLE: KEY}, True, READY),
        ({**READY, HEX_VARIABLE: ""}, True, READY),
        ({**READY, FD_VARIABLE: "3"}, True, READY),
        ({**READY, MARKER: "12"}, True, None),
        ({MARKER: "99", HEX_VARIABLE: KEY}, True, None),
        (CPU, False, None),
        ({"A": "1", HEX_VARIABLE: KEY}, False, {"A": "1", **CPU}),
        ({**READY, "OPENSSL_ia32cap": ""}, True, READY),
        ({**READY, "OPENSSL_ia32cap": "0x1:0x2"}, True, READY),
        ({**READY, "OPENSSL_armcap": "0", "OPENSSL_s390xcap": ""}, True, READY),
        ({**READY, "OPENSSL_CONF": "/etc/f"}, True, None),
    ],
)
def test_new_environment(environ: dict[str, str], wipes: bool, expected: dict[str, str] | None) -> None:
    before = dict(environ)
    found = new_environment(environ, 99, wipes=wipes)
    assert found == (None if expected is None else {**expected, MARKER: "99"})
    assert environ == before


@pytest.mark.parametrize(
    ("present", "merged"),
    [
        ("", OURS),
        (OURS, OURS),
        ("glibc.malloc.perturb=165", f"glibc.malloc.perturb=165:{UNCACHED}:{FAST}"),
        ("glibc.malloc.perturb=0:a.b=4", f"glibc.malloc.perturb=165:a.b=4:{UNCACHED}:{FAST}"),
        ("nonsense::x=a=b", f"x=a=b:{OURS}"),
    ],
)  # fmt: skip
def test_merged_tunables(present: str, merged: str) -> None:
    assert merged_tunables(present) == merged
    assert merged_tunables(merged) == merged


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], False),
        (["--socket", "s"], False),
        (["--config", "c"], True),
        (["serve", "--socket", "s", "--config=c"], True),
        (["--configx", "c"], False),
        (["config"], False),
    ],
)
def test_has_config(argv: list[str], expected: bool) -> None:
    assert has_config(argv) is expected


def test_the_names_are_those_that_the_reader_knows() -> None:
    assert (HEX_VARIABLE, FD_VARIABLE) == (keysource.HEX_VARIABLE, keysource.FD_VARIABLE)
    assert len(KEY) < hardening.MAX_HANDED_OVER <= keysource.SCRATCH_SIZE


class _Executed(Exception):
    pass


@pytest.fixture
def executions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], dict[str, str]]]:
    found: list[tuple[str, list[str], dict[str, str]]] = []

    def execve(path: str, argv: list[str], environ: dict[str, str]) -> None:
        found.append((path, argv, environ))
        raise OSError

    monkeypatch.setattr(os, "execve", execve)
    return found


def test_where_it_can_not_be_started_anew_it_goes_on(executions: list[Any]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    hardening.prepare([], {HEX_VARIABLE: KEY})
    assert len(executions) == 1
    assert len(os.listdir("/proc/self/fd")) == before  # the pipe with the key is closed


def test_nothing_is_done_twice(executions: list[Any]) -> None:
    hardening.prepare([], {MARKER: str(os.getpid()), HEX_VARIABLE: KEY})
    assert executions == []
    hardening.prepare([], {MARKER: str(os.getpid() + 1), HEX_VARIABLE: KEY})  # inherited from a parent
    assert len(executions) == 1


def test_without_a_name_for_the_interpreter(executions: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    hardening.prepare([], {HEX_VARIABLE: KEY})
    assert executions == []


@pytest.mark.parametrize(
    "version", ["3.13.0 experimental free-threading build", "3.14.0 free-threading build"]
)
def test_the_free_threaded_build_is_left_alone(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """It ends with a fatal error at PYTHONMALLOC=malloc."""
    monkeypatch.setattr(sys, "version", version)
    assert not hardening._can_wipe_on_free()


@pytest.mark.parametrize("answer", [None, "", "musl 1.2", ValueError(), OSError()])
def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def confstr(name: str) -> str | None:
        if isinstance(answer, Exception):
            raise answer
        found: str | None = answer
        return found

    monkeypatch.setattr(os, "confstr", confstr)
    assert not hardening._can_wipe_on_free()


# ---- real second starts ----------------------------------------------------------------------------------

PROGRAM = f"""
import json, os, sys
sys.path.insert(0, {str(REPO)!r})
print("start", os.getpid(), flush=True)
from progressdb_kms.process import hardening
hardening.prepare(sys.argv[1:], os.environ)
initial = open("/proc/self/environ", "rb").read().decode("latin-1").split(chr(0))
key = None
if hardening.FD_VARIABLE in os.environ:
    key = os.read(int(os.environ[hardening.FD_VARIABLE]), 1000).decode()
print(json.dumps({{
    "pid": os.getpid(), "argv": sys.argv[1:], "environ": dict(os.environ), "initial": initial, "key": key,
    "flags": [sys.flags.isolated, sys.flags.ignore_environment, sys.flags.no_user_site, sys.flags.utf8_mode],
    "warnings": sys.warnoptions, "wipes": hardening.wipe_on_free_active(), "executable": sys.executable,
    "prefix": sys.prefix, "descriptors": sorted(os.listdir("/proc/self/fd")),
}}))
"""


def run(command: list[Any], environ: dict[str, str] | None = None, cwd: Path | None = None) -> Any:
    """The facts that the program told, with the number of its starts."""
    done = subprocess.run(
        [str(part) if isinstance(part, Path) else part for part in command],
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **(environ or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        check=True,
    )
    *starts, facts = done.stdout.decode().splitlines()
    found = json.loads(facts)
    assert set(starts) == {f"start {found['pid']}"}
    found["starts"] = len(starts)
    return found


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(f"#!{sys.executable}\n{PROGRAM}")
    (tmp_path / "program.py").chmod(0o755)
    return tmp_path / "program.py"


ARGUMENTS = ["--socket", "a b", "", "ä", "--", "-x"]


@linux
@wiping
@pytest.mark.parametrize("way", ["script", "shebang", "module", "zipapp", "-c", "relative"])
def test_each_way_to_start_a_program(tmp_path: Path, script: Path, way: str) -> None:
    python = sys.executable
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__main__.py").write_text(PROGRAM)
    zipapp.create_archive(tmp_path / "app", tmp_path / "app.pyz", interpreter=python)
    commands: dict[str, list[Any]] = {
        "script": [python, script],
        "shebang": [script],
        "module": [python, "-m", "app"],
        "zipapp": [tmp_path / "app.pyz"],
        "-c": [python, "-c", PROGRAM],
        "relative": ["./program.py"],
    }
    found = run([*commands[way], *ARGUMENTS], cwd=tmp_path)
    assert found["starts"] == 2
    assert found["argv"] == ARGUMENTS
    assert found["wipes"]
    assert (found["executable"], found["prefix"]) == (sys.executable, sys.prefix)
    environ = found["environ"]
    assert {name: environ[name] for name in READY} == READY
    assert environ[MARKER] == str(found["pid"])


@linux
@wiping
@pytest.mark.parametrize(
    ("options", "wipes"),
    [
        (["-s"], True),
        (["-W", "error", "-X", "utf8"], True),
        (["-E"], False),
        (["-I"], False),
    ],
)
def test_options_of_the_interpreter_are_kept(script: Path, options: list[str], wipes: bool) -> None:
    """-I and -E ignore PYTHONMALLOC: it goes on all the same, and never a third time."""
    found = run([sys.executable, *options, script])
    assert found["starts"] == 2
    assert found["wipes"] is wipes
    isolated, ignoring, no_user_site, utf8 = found["flags"]
    assert (isolated, ignoring) == ("-I" in options, "-I" in options or "-E" in options)
    assert no_user_site == ("-I" in options or "-s" in options)
    assert utf8 == (wipes or "utf8" in options)
    assert found["warnings"] == (["error"] if "-W" in options else [])


@linux
@wiping
def test_an_environment_that_is_right_needs_no_second_start(script: Path) -> None:
    found = run([sys.executable, script], dict(READY))
    assert found["starts"] == 1
    assert found["wipes"]


@linux
@wiping
def test_a_child_of_a_prepared_process_prepares_itself(script: Path) -> None:
    """The mark is good for one pid: with it alone nobody gets out of the second start."""
    found = run([sys.executable, script], {MARKER: str(os.getpid())})
    assert found["starts"] == 2


def test_without_proc_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(path: str, mode: str) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(hardening, "open", no_proc, raising=False)
    assert hardening._command_line() is None


@linux
@pytest.mark.parametrize("environ", [{}, READY], ids=["bare", "ready"])
def test_a_key_leaves_the_environment_by_a_pipe(script: Path, environ: dict[str, str]) -> None:
    found = run([sys.executable, script], {**environ, HEX_VARIABLE: KEY, "OTHER": "1"})
    assert found["starts"] == 2
    assert found["key"] == KEY
    assert KEY not in json.dumps([found["environ"], found["initial"]])
    assert HEX_VARIABLE not in found["environ"]
    assert "OTHER=1" in found["initial"]


@linux
@pytest.mark.parametrize("argv", [["--config", "c"], ["serve", "--config=c"]])
def test_with_a_file_the_key_is_dropped(script: Path, argv: list[str]) -> None:
    found = run([sys.executable, script, *argv], {**READY, HEX_VARIABLE: KEY})
    assert found["starts"] == 2
    assert found["key"] is None
    assert KEY not in json.dumps([found["environ"], found["initial"]])
    assert FD_VARIABLE not in found["environ"]


@linux
def test_a_number_of_a_pipe_from_elsewhere_is_dropped(script: Path) -> None:
    found = run([sys.executable, script], {**READY, FD_VARIABLE: "0"})
    assert found["key"] is None
    assert FD_VARIABLE not in found["environ"]


@linux
def test_a_value_of_any_length_and_bytes(script: Path) -> None:
    """What does not fit is cut to more than a key has, so that the reader refuses it; nothing hangs."""
    found = run([sys.executable, script], {HEX_VARIABLE: KEY * 1000})
    assert found["key"] == (KEY * 4)[: hardening.MAX_HANDED_OVER]


# ---- does free() wipe? -----------------------------------------------------------------------------------


@linux
@wiping
@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "0"),
        ({"PYTHONMALLOC": "malloc"}, "0"),
        ({"GLIBC_TUNABLES": OURS}, "0"),
        ({"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.perturb=165"}, "0"),
        ({"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}, "0"),
        ({"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": OURS}, "50"),
    ],
)
def test_wipe_on_free_is_tried_and_not_believed(environ: dict[str, str], expected: str) -> None:
    program = f"""if True:
        import os, sys
        sys.path.insert(0, {str(REPO)!r})
        from progressdb_kms.process import hardening
        before = len(os.listdir("/proc/self/fd"))
        print(sum(hardening.wipe_on_free_active() for _ in range(50)))
        assert len(os.listdir("/proc/self/fd")) == before
    """
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout.strip() == expected


# ---- the measures ------------------------------------------------------------------------------------------

HARDEN = f"""
import json, os, resource, sys
sys.path.insert(0, {str(REPO)!r})
from progressdb_kms.process import hardening
if "prepare" in sys.argv:
    hardening.prepare(sys.argv[1:], os.environ)
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
measures = hardening.harden() if "harden" in sys.argv else []
print(json.dumps(measures), flush=True)
if "abort" in sys.argv:
    os.abort()
sys.stdin.read()
"""


@pytest.fixture
def hardened() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HARDEN, "prepare", "harden"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.communicate()


@linux
@wiping
def test_all_measures_are_in_force(hardened: subprocess.Popen[str]) -> None:
    """What the process says of itself, and what the kernel says of it."""
    assert hardened.stdout is not None
    measures = [Measure(*row) for row in json.loads(hardened.stdout.readline())]
    names = ["no_core_files", "not_dumpable", "no_new_privs", "wipe_on_free"]
    assert [measure.name for measure in measures] == ["second_start", *names]
    assert [measure for measure in measures if not measure.ok] == []
    assert all(measure.detail for measure in measures)
    folder = Path(f"/proc/{hardened.pid}")
    status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines())
    assert status["NoNewPrivs"] == "1"
    assert status["Umask"] == "0077"
    core = next(line for line in (folder / "limits").read_text().splitlines() if "core file" in line)
    assert core.split()[4:6] == ["0", "0"]
    if os.geteuid():
        assert (folder / "mem").stat().st_uid == 0  # what is not dumpable belongs to root


@linux
def test_an_abort_leaves_no_core_file(tmp_path: Path) -> None:
    """With RLIMIT_CORE raised again by the program itself; the same without the measures leaves one."""
    outcomes = {}
    for words in ("harden abort", "abort"):
        (tmp_path / words).mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", HARDEN, *words.split()], cwd=tmp_path / words, stdout=subprocess.DEVNULL
        )
        _, status = os.waitpid(process.pid, 0)
        process.returncode = status
        assert os.WTERMSIG(status) == signal.SIGABRT
        outcomes[words] = os.WCOREDUMP(status), os.listdir(tmp_path / words)
    assert outcomes["harden abort"] == (False, [])
    if resource.getrlimit(resource.RLIMIT_CORE)[1] and _cores_are_files():
        assert outcomes["abort"][0]


def _cores_are_files() -> bool:
    return not Path("/proc/sys/kernel/core_pattern").read_text().startswith(("|", "/", "\n"))


class Prctl:
    """A kernel that says yes and does nothing, or says no."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.calls: list[tuple[int, int]] = []

    def prctl(self, option: Any, value: Any, *rest: Any) -> int:
        self.calls.append((option.value, value.value))
        return self.answer if option.value in (3, 39) else 0


@pytest.fixture
def unharmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The measures, without the effect that they would have on all tests that follow."""
    monkeypatch.setattr(hardening, "_libc", Prctl(0))
    monkeypatch.setattr(hardening, "wipe_on_free_active", lambda: True)
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: None)
    mask = os.umask(0o022)
    yield
    os.umask(mask)


@linux
@pytest.mark.parametrize("answer", [-1, 2])
def test_a_measure_that_did_not_take_is_told(
    unharmed: None, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    kernel = Prctl(answer)
    monkeypatch.setattr(hardening, "_libc", kernel)
    found = {measure.name: measure for measure in hardening.harden()}
    assert not found["not_dumpable"].ok and not found["no_new_privs"].ok
    assert sorted(kernel.calls) == [(3, 0), (4, 0), (38, 1), (39, 0)]
    assert all(f"is {answer}" in found[name].detail for name in ("not_dumpable", "no_new_privs"))


def test_a_limit_that_can_not_be_set_or_does_not_take(
    unharmed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (0, 5))
    for setrlimit in (resource.setrlimit, refuse):
        monkeypatch.setattr(resource, "setrlimit", setrlimit)
        (found,) = (measure for measure in hardening.harden() if measure.name == "no_core_files")
        assert found == Measure("no_core_files", False, "RLIMIT_CORE is 0 (soft), 5 (hard)")


def test_umask(unharmed: None, tmp_path: Path) -> None:
    hardening.harden()
    (tmp_path / "file").write_text("")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_why_free_does_not_wipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "wipe_on_free_active", lambda: False)
    found = hardening._wipe_on_free()
    assert not found.ok and "CPython on glibc" in found.detail
    assert dict(part.split("=") for part in OURS.split(":")) == TUNABLES
    monkeypatch.setattr(hardening, "wipe_on_free_active", lambda: True)
    assert hardening._wipe_on_free().ok


# ---- for workers ---------------------------------------------------------------------------------


@linux
def test_a_child_dies_with_its_parent() -> None:
    program = f"""if True:
        import os, sys, time
        sys.path.insert(0, {str(REPO)!r})
        from progressdb_kms.process import hardening
        parent = os.getpid()
        if not os.fork():
            hardening.die_with_parent(parent)
            print(os.getpid(), flush=True)
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = procs.proc(int(parent.stdout.readline()))
        assert child is not None
        assert child.alive()
        parent.kill()
        procs.wait_until(lambda: not child.alive(), what="the child to end")


@linux
def test_a_parent_that_is_gone_already() -> None:
    """The fork's time: the child's parent ends before the child can ask for the signal."""
    child = os.fork()
    if not child:
        try:
            hardening.die_with_parent(os.getppid() + 1)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def _mask() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def _mask_of_a_thread() -> set[int]:
    found: list[set[int]] = []
    thread = threading.Thread(target=lambda: found.append(_mask()))
    thread.start()
    thread.join()
    return found[0]


BLOCKABLE = {*BLOCKED} - {signal.SIGKILL, signal.SIGSTOP}


def test_threads_started_in_the_block_inherit_it() -> None:
    before = _mask()
    assert {signal.SIGTERM, signal.SIGALRM, signal.SIGPROF, signal.SIGINT, signal.SIGCHLD} < BLOCKABLE
    assert not BLOCKABLE & {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT}
    with pytest.raises(LookupError), hardening.signals_blocked():
        assert _mask_of_a_thread() == before | BLOCKABLE
        raise LookupError
    assert _mask() == before
    assert _mask_of_a_thread() == before


# ---- where execve is refused -------------------------------------------------------------

NO_EXEC = "execve:error=EACCES"  # that of strace itself comes before it looks


def test_a_second_start_that_is_refused_is_told() -> None:
    need_strace()
    with Daemon(source="env", wrapper=injecting(NO_EXEC)) as daemon:
        assert "could not be started anew" in daemon.stderr and "can be read in /proc" in daemon.stderr
        measures = {row["name"]: row for row in daemon.ok("GET", "/status")["hardening"]}
        assert not measures["second_start"]["ok"] and not measures["wipe_on_free"]["ok"]


def test_where_locked_memory_is_required_it_refuses() -> None:
    need_strace()
    text = str(Daemon({"memory_lock": "require"}, wrapper=injecting(NO_EXEC)).refusal())
    assert "memory_lock is 'require'" in text and "could not be started anew" in text
    assert "NoExecPaths" in text and "Traceback" not in text


def test_a_command_with_a_key_warns(tmp_path: Path) -> None:
    need_strace()
    done = cli("genkey", str(tmp_path / "key"), wrapper=injecting(NO_EXEC))
    assert done.returncode == 0 and b"warning: the program could not be started anew" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone reads what a daemon was started with")
@pytest.mark.parametrize("inherited", [{}, {"OPENSSL_ia32cap": ""}, {"OPENSSL_ia32cap": "0:0"}], ids=str)
def test_what_openssl_inherits_decides_nothing(inherited: dict[str, str]) -> None:
    with Daemon(env=inherited, workers=1) as daemon:
        lines = Path(f"/proc/{daemon.pid}/environ").read_text().split("\0")
        assert [line for line in lines if line.startswith("OPENSSL_")] == ["OPENSSL_ia32cap=:~0x40000000000"]
        measures = {row["name"]: row["ok"] for row in daemon.ok("GET", "/status")["hardening"]}
        assert measures["second_start"]


PROBE = """
import os, sys
from progressdb_kms.process.hardening import wipe_on_free_active
junk = [os.urandom(i % 700) for i in range(3000)]
print(sum(wipe_on_free_active() for _ in range(200) if junk.pop() is not None))
"""


@linux
@wiping
@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, 0),
        ({"PYTHONMALLOC": "malloc"}, 0),
        ({"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": UNCACHED}, 0),
        ({"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.perturb=165"}, 0),
        (READY, 200),
    ],
    ids=["plain", "malloc", "no cache", "cached", "ours"],
)
def test_the_look_at_freed_memory_is_never_wrong(environ: dict[str, str], said: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env={**os.environ, **environ}, capture_output=True, text=True, cwd=REPO
    )
    assert (done.stdout, done.stderr) == (f"{said}\n", "")
