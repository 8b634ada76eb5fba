"""What commands write: as it comes, in whatever the terminal can show, and with no file left behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.process.streams import line_of
from progressdb_kms.tools import console
from progressdb_kms.tools.console import PAGE, table
from tests.harness import Daemon
from tests.harness.daemon import REPO, base_environment, cli
from tests.harness.faults import Tmpfs

ODD = "ünï ☃ \ud7ff \U0001f511"
LOCALES = {
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "posix": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize(
    "env",
    [pytest.param(env, marks=[pytest.mark.long] * (name == "latin-1")) for name, env in LOCALES.items()],
    ids=LOCALES,
)
def test_a_name_in_another_script(shared_daemon: Daemon, env: dict[str, str]) -> None:
    """Never an internal error after the deed is done."""
    key = shared_daemon.ok("POST", "/create_dek_for_thread", {"thread_id": ODD})["key_id"]
    for words in (["list"], ["describe", key], ["disable", key], ["enable", key], ["shred", key]):
        done = shared_daemon.cli(*words, env=env)
        assert (done.returncode, done.stderr) == (0, b""), words
        assert b"\\u2603" in done.stdout or "☃".encode() in done.stdout
    done = shared_daemon.offline("audit", "tail", env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    done = shared_daemon.cli("describe", ODD, env=env)
    assert done.returncode in (1, 2) and b"internal" not in done.stderr


def test_a_full_disk_behind_stdout(shared_daemon: Daemon) -> None:
    """It is named, and the interpreter doesn't try again at its end (exit code 120)."""
    said = b"progressdb-kms: standard output: No space left on device\n"
    full = ["sh", "-c", 'exec "$@" >/dev/full', "sh"]
    key = shared_daemon.home / "new.key"
    assert cli("genkey", str(key)).returncode == 0
    for done in (
        shared_daemon.cli("list", wrapper=full),
        shared_daemon.offline("verify", wrapper=full),
        cli("kek-id", str(key), wrapper=full),
        cli("help", "runbook", wrapper=full),
    ):
        assert (done.returncode, done.stderr) == (1, said), done.args


@pytest.mark.parametrize("env", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["as it is", "unbuffered"])
class TestAPart:
    """Of what is written a pipe or disk may take a part. Where the interpreter does not buffer, the rest was
    lost, and the command ended with 0."""

    @pytest.mark.root
    def test_a_disk_that_fills_up(self, env: dict[str, str]) -> None:
        with Tmpfs(8 << 10) as disk:
            full = ["sh", "-c", f'exec "$@" >{disk.path}/out', "sh"]
            done = cli("help", "runbook", wrapper=full, env=env)
        assert done.returncode == 1 and b"standard output: No space left on device" in done.stderr

    def test_a_pipe_that_does_not_block(self, env: dict[str, str]) -> None:
        """Another program that has it too may have made it so."""
        text = (REPO / "progressdb_kms/manual/runbook.md").read_bytes()
        reader, writer = os.pipe()
        fcntl.fcntl(writer, 1031, 4096)  # F_SETPIPE_SZ
        os.set_blocking(writer, False)
        variables = {**base_environment(Path("/nonexistent")), **env}
        with (
            open(reader, "rb") as source,
            subprocess.Popen(
                [sys.executable, "-m", "progressdb_kms", "help", "runbook"],
                stdout=writer,
                env=variables,
                cwd=REPO,
            ) as process,
        ):
            os.close(writer)
            assert source.read() == text and process.wait(60) == 0

    def test_what_comes_in_parts(self, shared_daemon: Daemon, env: dict[str, str]) -> None:
        """Of a stdin that does not block only what was there at once was encrypted."""
        key = shared_daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        words = ["-m", "progressdb_kms", "encrypt", "--key-id", key, "--socket", str(shared_daemon.socket)]
        variables = {**base_environment(Path("/nonexistent")), **env}
        with (
            open(writer, "wb", buffering=0) as text,
            subprocess.Popen(
                [sys.executable, *words], stdin=reader, stdout=subprocess.PIPE, env=variables, cwd=REPO
            ) as process,
        ):
            os.close(reader)
            text.write(b"the first part")
            time.sleep(2)
            with contextlib.suppress(BrokenPipeError):
                text.write(b", and the rest")
            text.close()
            sealed = process.communicate(timeout=60)[0]
        done = shared_daemon.cli("decrypt", "--key-id", key, stdin=sealed)
        assert done.stdout == b"the first part, and the rest"


def test_what_can_t_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError) as caught, console.output(str(tmp_path / "out")) as file:
        file.write(b"x")
    assert line_of(caught.value) == f"{tmp_path}/out: No space left on device"
    assert os.listdir(tmp_path) == []


def test_a_long_table_is_shown_as_it_comes() -> None:
    asked = 0

    def rows() -> Iterator[tuple[object, ...]]:
        nonlocal asked
        for number in range(40_000):
            asked = number
            yield f"k_{number}", "active" if number < 30_000 else "pending_deletion", "t"

    tracemalloc.start()
    lines = table(("KEY_ID", "STATE", "THREAD_ID"), rows())
    assert next(lines) == "KEY_ID  STATE   THREAD_ID\n" and asked <= PAGE
    shown = sum(1 for _ in lines)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shown == 40_000 and peak < 2 << 20


WRITER = """
import os, sys, time
if sys.argv[2:]:
    del os.O_TMPFILE
from progressdb_kms.tools.console import output
with output(sys.argv[1]) as file:
    file.write(b"half of it")
    file.flush()
    print("here", flush=True)
    time.sleep(float(os.environ["PAUSE"]))
"""


def writer(path: Path, pause: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**base_environment(REPO), "PAUSE": pause},
    )


def killed(path: Path, *words: str) -> None:
    with writer(path, "60", *words) as process:
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGKILL)


def test_a_killed_command_leaves_no_part_file(tmp_path: Path) -> None:
    killed(tmp_path / "out")
    assert os.listdir(tmp_path) == []
    with writer(tmp_path / "out", "0") as process:
        assert process.wait(30) == 0
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out").stat().st_mode & 0o777 == 0o600


def test_without_nameless_files_the_next_run_removes_it(tmp_path: Path) -> None:
    killed(tmp_path / "out", "named")
    assert os.listdir(tmp_path) == [".out.part"]
    with writer(tmp_path / "out", "0", "named") as process:
        assert process.wait(30) == 0
    assert os.listdir(tmp_path) == ["out"]


def test_without_nameless_files_two_at_once_don_t_mix(tmp_path: Path) -> None:
    with writer(tmp_path / "out", "60", "named") as first:
        assert first.stdout is not None and first.stdout.readline() == b"here\n"
        with writer(tmp_path / "out", "0", "named") as second:
            _, said = second.communicate(timeout=30)
        assert b"another command is writing" in said
        first.send_signal(signal.SIGKILL)


def test_a_pipe_under_the_name_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file can't be without a name, what a killed run left is opened: that waited for a reader."""
    monkeypatch.setattr(console, "nameless", lambda folder: None)
    part = tmp_path / ".out.part"
    os.mkfifo(part)
    with pytest.raises(OSError, match=r"\.out\.part"):
        console.write_binary(str(tmp_path / "out"), b"x")
    assert os.listdir(tmp_path) == [part.name]


def test_where_the_name_can_t_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*names: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(names[0]), None, str(names[1]))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError) as caught:
        console.write_binary(str(tmp_path / "out"), b"x")
    assert str(caught.value.filename) == str(tmp_path / ".out.part") and os.listdir(tmp_path) == []


AGAIN = """
import os, signal
if os.environ.get("PROGRESSDB_KMS_PREPARED") == str(os.getpid()):
    os.kill(os.getpid(), signal.SIGINT)
"""


def test_an_interrupt_while_it_starts_anew(tmp_path: Path) -> None:
    """The interpreter's own imports, the second time: nobody hears a signal as it should be heard there."""
    (tmp_path / "sitecustomize.py").write_text(AGAIN)
    words = [sys.executable, "-m", "progressdb_kms", "verify", "--data-dir", str(tmp_path)]
    env = {**base_environment(REPO), "PYTHONPATH": f"{tmp_path}:{REPO}"}
    done = subprocess.run(
        words, capture_output=True, env=env, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_nothing_is_loaded_before_an_interrupt_is_the_kernel_s() -> None:
    script = "import os, sys; sys.path.insert(0, sys.argv[1]); before = {*sys.modules, '__future__'}; "
    script += "import progressdb_kms.__main__; print(sorted(set(sys.modules) - before))"
    words = [sys.executable, "-I", "-S", "-c", script, str(REPO)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout == "['progressdb_kms', 'progressdb_kms.__main__']\n", done.stderr


LOADS = """
import builtins, os, signal, sys
from progressdb_kms.__main__ import main
real = builtins.__import__
def load(name, *more):
    if name == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *more)
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests ignores
builtins.__import__ = load
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("words", [["argparse", "list"], ["mmap", "serve"]], ids=" ".join)
def test_an_interrupt_while_modules_are_loaded(words: list[str]) -> None:
    """Half of the time of a short command goes there, and it was a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *words], capture_output=True, env=base_environment(REPO), check=False
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
