"""Commands that speak to the socket, as transcripts: command, status, stdout, stderr."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.daemon import COMMAND, REPO, base_environment, cli
from tests.harness.fakekms import FakeKms, kek_id_of


@pytest.fixture
def kms(short_tmp: Path) -> Iterator[FakeKms]:
    with FakeKms(short_tmp / "s") as fake:
        yield fake


class Result:
    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.raw, self.out, self.err = code, out, out.decode("utf-8", "replace"), err.decode()


@pytest.fixture
def run(kms: FakeKms, short_tmp: Path) -> Any:
    def call(*args: str, stdin: bytes = b"", env: Any = None) -> Result:
        done = cli(*args, "--socket", str(kms.path), stdin=stdin, env=env, cwd=short_tmp)
        return Result(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def key(kms: FakeKms) -> str:
    return str(kms.create("thread-1", None)["key_id"])


class TestKeys:
    def test_create_describe_list(self, run: Any, kms: FakeKms) -> None:
        made = run("create-dek", "--thread-id", "t1")
        assert (made.code, made.out, made.err) == (0, "k_0000\n", "")
        told = run("describe", "k_0000")
        assert (told.code, told.err) == (0, "")
        assert told.out == (
            "key_id       k_0000\n"
            "thread_id    t1\n"
            "state        enabled\n"
            f"kek_id       {kms.kek_id}\n"
            "kek_version  1\n"
            "created_at   2026-11-24T02:13:32.123456Z\n"
        )
        listed = run("list")
        assert listed.out == (
            "KEY_ID  STATE    KEK_ID            CREATED_AT                   LAST_USED  DUE  THREAD_ID\n"
            f"k_0000  enabled  {kms.kek_id}  2026-11-24T02:13:32.123456Z                  t1\n"
        )
        assert (
            json.loads(run("create-dek", "--thread-id", "t2", "--key-id", "mine", "--json").out)["key_id"]
            == "mine"
        )
        assert run("list", "--limit", "1").out.count("\n") == 2
        run("shred", "mine")
        assert "k_0000" not in (due := run("list", "--state", "pending_deletion").out) and "mine" in due
        run("enable", "mine")
        lines = run("list", "--thread-id", "t2", "--json").out.splitlines()
        assert [json.loads(line)["key_id"] for line in lines] == ["mine"]

    def test_usage(self, run: Any, kms: FakeKms, key: str) -> None:
        used = {"first_used_at": "2026-11-24T03:00:00.000000Z", "last_used_at": "2026-11-25T04:05:06.000000Z"}
        kms.deks[key]["usage"] = {"encrypts": 5, "decrypts": 0, **used, "last_uid": 0}
        told = run("describe", key).out
        assert (
            "usage.encrypts       5\nusage.decrypts       0\n" in told and "usage.last_uid       0\n" in told
        )
        assert json.loads(run("describe", key, "--json").out)["usage"] == kms.deks[key]["usage"]
        assert "  2026-11-25T04:05       thread-1\n" in run("list").out
        run("list", "--unused-for", "90d")
        assert "unused_for=7776000" in kms.seen[-1].path
        refused = run("list", "--unused-for", "90")
        assert refused.code == 2 and "'90' is no time: give 90d, 12h or 30m" in refused.err

    def test_states(self, run: Any, kms: FakeKms, key: str) -> None:
        assert "state        disabled\n" in run("disable", key).out
        refused = run("encrypt", "--key-id", key, stdin=b"x")
        assert (refused.code, refused.raw) == (1, b"")
        assert refused.err == f"progressdb-kms: the key {key} is disabled (enable it first)\n"
        assert "state        enabled\n" in run("enable", key).out
        assert "delete_at    in 7 days\n" in run("shred", key).out
        assert "delete_at    in 30 days\n" in run("shred", key, "--days", "30").out
        assert json.loads(run("shred", key, "--now", "--json").out)["state"] == "shredded"

    def test_a_thread_id_can_t_steer_the_terminal(self, run: Any, kms: FakeKms) -> None:
        kms.create("evil\x1b]0;title\x07\nKEY", None)
        assert "evil\\x1b]0;title\\x07\\nKEY" in run("list").out
        assert "\x1b" not in run("describe", "k_0000").out

    def test_unknown_key(self, run: Any) -> None:
        for command in (("describe", "k_x"), ("disable", "k_x"), ("shred", "k_x", "--now")):
            done = run(*command)
            assert (done.code, done.out, done.err) == (1, "", "progressdb-kms: there is no key k_x\n")

    def test_rewrap(self, run: Any, kms: FakeKms, key: str, short_tmp: Path) -> None:
        new = os.urandom(32)
        path = short_tmp / "new"
        path.write_text(new.hex())
        path.chmod(0o600)
        done = run("rewrap", key, "--new-key-file", str(path))
        assert done.code == 0 and f"kek_id       {kek_id_of(new)}\n" in done.out
        assert "previous_master_keys" in done.err and kms.deks[key]["kek_id"] == kek_id_of(new)
        path.write_text(kms.kek.hex())  # back to the active one, which each start has anyway
        done = run("rewrap", key, "--new-key-file", str(path))
        assert (done.code, done.err) == (0, "") and kms.deks[key]["kek_id"] == kms.kek_id
        path.chmod(0o644)
        done = run("rewrap", key, "--new-key-file", str(path))
        assert done.code == 1 and done.out == "" and "open to others" in done.err


class TestService:
    def test_status(self, run: Any, kms: FakeKms) -> None:
        done = run("status")
        assert done.code == 0 and done.err == ""
        first, kek, *_ = done.out.splitlines()
        assert first == "progressdb-kms 1.0.0: ready, up 12 seconds"
        assert kek == f"KEK        {kms.kek_id}, version 1, nobody can tell since when"
        assert "memory     memfd_secret, 16.0 KiB\n" in done.out and "\x1b" not in done.out
        assert json.loads(run("status", "--json").out)["memory"]["kind"] == "memfd_secret"

    def test_metrics(self, run: Any, kms: FakeKms, tmp_path: Path) -> None:
        done = run("metrics")
        assert done.code == 0 and done.out.endswith("\nprogressdb_kms_up 1\n")
        target = tmp_path / "kms.prom"
        assert run("metrics", "--textfile", str(target)).out == ""
        assert target.read_text() == done.out and target.stat().st_mode & 0o777 == 0o644

    def test_metrics_of_a_daemon_that_is_down(self, short_tmp: Path) -> None:
        target = short_tmp / "kms.prom"
        done = cli("metrics", "--textfile", str(target), "--socket", str(short_tmp / "none.sock"))
        assert done.returncode == 1 and b"is it running" in done.stderr
        assert target.read_text().endswith("\nprogressdb_kms_up 0\n")

    def test_ready(self, run: Any, kms: FakeKms) -> None:
        assert run("status", "--ready").out == "ready\n"
        kms.not_ready = ["the audit log was unlinked", "the disk is full"]
        done = run("status", "--ready")
        assert (done.code, done.out) == (1, "")
        assert done.err == "progressdb-kms: not ready: the audit log was unlinked; the disk is full\n"
        done = run("status", "--ready", "--json")
        assert done.code == 1 and json.loads(done.out) == {
            "ready": False,
            "reasons": kms.not_ready,
            "warnings": [],
        }

    def test_down(self, short_tmp: Path) -> None:
        done = cli("status", "--socket", str(short_tmp / "none"), cwd=short_tmp)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode() == (
            f"progressdb-kms: can't connect to {short_tmp}/none: there is no such socket "
            "(is it running? systemctl status progressdb-kms)\n"
        )

    def test_the_socket_of_the_environment(self, kms: FakeKms, short_tmp: Path) -> None:
        done = cli("status", "--ready", env={"PROGRESSDB_KMS_SOCKET": str(kms.path)}, cwd=short_tmp)
        assert (done.returncode, done.stdout) == (0, b"ready\n")
        done = cli("status", "--ready", "--socket", f"unix://{kms.path}", cwd=short_tmp)
        assert done.returncode == 0


class TestData:
    def test_stdin_to_stdout(self, run: Any, key: str) -> None:
        text = os.urandom(1000)
        box = run("encrypt", "--key-id", key, "--aad", "a", stdin=text)
        assert (box.code, box.err) == (0, "") and len(box.raw) == 1028
        assert run("decrypt", "--key-id", key, "--aad", "a", "-", "-", stdin=box.raw).raw == text

    def test_files(self, run: Any, key: str, short_tmp: Path) -> None:
        text = os.urandom(200_000)
        (short_tmp / "in").write_bytes(text)
        done = run("encrypt", "--key-id", key, "in", "box")
        assert (done.code, done.raw, done.err) == (0, b"", "")
        assert stat.S_IMODE((short_tmp / "box").stat().st_mode) == 0o600
        assert run("decrypt", "--key-id", key, "box", "back").code == 0
        assert (short_tmp / "back").read_bytes() == text
        assert run("decrypt", "--key-id", key, "box", "box").code == 0  # in place
        assert (short_tmp / "box").read_bytes() == text
        assert sorted(os.listdir(short_tmp)) == ["back", "box", "in", "s"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("decrypt", "--key-id", "KEY", "in", "out"), "the data does not open under this key"),
            (("encrypt", "--key-id", "nobody", "in", "out"), "there is no key nobody"),
            (("encrypt", "--key-id", "KEY", "missing", "out"), "missing: No such file or directory"),
            (("encrypt", "--key-id", "KEY", "in", "no/where/out"), "there is no folder no/where (make it"),
            (("encrypt", "--key-id", "KEY", "/", "out"), "/: Is a directory"),
        ],
    )
    def test_a_failure_leaves_no_file(
        self, run: Any, key: str, short_tmp: Path, arguments: tuple[str, ...], message: str
    ) -> None:
        (short_tmp / "in").write_bytes(os.urandom(100))
        done = run(*(key if word == "KEY" else word for word in arguments))
        assert done.code == 1 and done.raw == b""
        assert message in done.err and done.err.startswith("progressdb-kms: ") and done.err.count("\n") == 1
        assert sorted(os.listdir(short_tmp)) == ["in", "s"]

    def test_a_failure_leaves_the_file_that_was_there(self, run: Any, key: str, short_tmp: Path) -> None:
        (short_tmp / "in").write_bytes(os.urandom(100))
        (short_tmp / "out").write_text("precious")
        assert run("decrypt", "--key-id", key, "in", "out").code == 1
        assert (short_tmp / "out").read_text() == "precious"

    def test_a_full_disk_leaves_no_file(self, run: Any, key: str, short_tmp: Path) -> None:
        """RLIMIT_FSIZE stands for it: the write stops half-way."""
        (short_tmp / "in").write_bytes(bytes(100_000))
        limited = ("prlimit", "--fsize=50000")
        done = cli(
            "encrypt",
            "--key-id",
            key,
            "in",
            "out",
            "--socket",
            str(short_tmp / "s"),
            cwd=short_tmp,
            wrapper=limited,
        )
        assert done.returncode == 1 and b"File too large" in done.stderr
        assert sorted(os.listdir(short_tmp)) == ["in", "s"]

    def test_a_device_is_written_to_and_stays(self, run: Any, key: str, short_tmp: Path) -> None:
        os.mkfifo(short_tmp / "pipe")
        reader = subprocess.Popen(["cat", str(short_tmp / "pipe")], stdout=subprocess.PIPE)
        assert run("encrypt", "--key-id", key, "-", "pipe", stdin=b"x").code == 0
        assert len(reader.communicate()[0]) == 29 and stat.S_ISFIFO((short_tmp / "pipe").stat().st_mode)

    def test_binary_data_stays_off_the_terminal(self, kms: FakeKms, key: str, short_tmp: Path) -> None:
        box = kms.seal({"key_id": key}, "naïve\n".encode(), b"")
        escape = kms.seal({"key_id": key}, b"\x1b[2J", b"")
        base = ("--key-id", key, "--socket", str(kms.path))
        assert on_terminal("decrypt", *base, stdin=box) == (0, "naïve\r\n")
        for command, data in (("encrypt", b"x"), ("decrypt", escape)):
            code, text = on_terminal(command, *base, stdin=data)
            refusal = (
                "progressdb-kms: binary data is not written to a terminal (name a file or pipe it on)\r\n"
            )
            assert (code, text) == (1, refusal)

    def test_a_reader_that_has_seen_enough(self, kms: FakeKms, short_tmp: Path) -> None:
        for number in range(3000):
            kms.create(f"thread {number}", None)
        process = spawn(
            "list", "--json", "--socket", str(kms.path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 1 and process.stderr.read() == b""
        process.stderr.close()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_an_interrupt(self, kms: FakeKms, key: str, short_tmp: Path, number: int) -> None:
        """It ends by the signal, says nothing, and leaves no file."""
        out = short_tmp / "out"
        process = spawn(
            "encrypt", "--key-id", key, "--socket", str(kms.path), "-", str(out),
            stdin=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # the tests may run under nohup
        )  # fmt: skip
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(b"not the end")
        process.stdin.flush()
        wait_until_reading(process.pid)
        process.send_signal(number)
        assert process.wait(20) == -number
        assert process.stderr.read() == b"" and sorted(os.listdir(short_tmp)) == ["s"]
        process.stdin.close()
        process.stderr.close()


def wait_until_reading(pid: int) -> None:
    """Until the process waits in read(2) of its stdin: its handlers are in place by then."""
    deadline = time.monotonic() + 20
    while not Path(f"/proc/{pid}/syscall").read_text().startswith("0 0x0 "):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def spawn(*args: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*COMMAND, *args], env=base_environment(REPO), **options)


def on_terminal(*args: str, stdin: bytes = b"", typed: bytes | None = None) -> tuple[int, str]:
    """Run with stdout and stderr on a terminal: exit code, and what it shows. `typed`: stdin is the terminal
    too, and a person types that, or Ctrl-D where it is empty."""
    leader, follower = pty.openpty()
    given = subprocess.PIPE if typed is None else follower
    process = spawn(*args, stdin=given, stdout=follower, stderr=follower)
    os.close(follower)
    if typed is not None:
        os.write(leader, typed or b"\x04")
    else:
        assert process.stdin is not None
        process.stdin.write(stdin)
        process.stdin.close()
    shown = b""
    while select.select([leader], [], [], 30)[0]:
        try:
            shown += os.read(leader, 65536)
        except OSError:  # EIO: the other side is closed
            break
    os.close(leader)
    return process.wait(20), shown.decode()
