"""The helpers that other tests stand on: each must see the fault that it is there to see."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    REPO,
    Daemon,
    DaemonFailed,
    Load,
    Session,
    UnexpectedReply,
    aeskeys,
    faults,
    hammer,
    memscan,
    procs,
    raw,
    warm,
)
from tests.harness.daemon import base_environment
from tests.harness.memscan import Secret, scan
from tests.harness.powerloss import MODES, Recording, Unmodelled

STANDIN = (sys.executable, "-m", "tests.harness.standin")


def standin(**env: str) -> Daemon:
    return Daemon(command=STANDIN, env=env)


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    with standin() as daemon:
        yield daemon


class TestDaemon:
    def test_starts_answers_and_stops(self) -> None:
        with standin() as daemon:
            home = daemon.home
            assert len(str(daemon.socket)) < 60
            parent, worker = daemon.pids()
            assert parent == daemon.pid
            assert daemon.ok("POST", "/echo", {})["pid"] == worker
            procs.wait_until(lambda: daemon.stderr == "standin: ready\n", 60, "what it says")
            daemon.stop()
            assert not daemon.alive
        assert not home.exists()

    def test_a_start_that_fails_tells_why_at_once(self) -> None:
        refused = standin(STANDIN_EXIT="3").refusal()
        assert refused.code == 3
        assert "the reason why" in refused.stderr
        assert "the reason why" in str(refused)

    def test_refusal_means_refusal(self) -> None:
        with pytest.raises(AssertionError, match="should have refused"):
            standin().refusal()

    def test_a_daemon_that_never_answers(self) -> None:
        daemon = standin(STANDIN_DEAF="1")
        daemon.ready_timeout = 0.5
        with pytest.raises(DaemonFailed, match="no answer"):
            daemon.start()
        process = procs.proc(daemon.pid)
        daemon.close()
        assert process is not None
        assert not process.alive()

    def test_a_wrong_exit_code_is_noticed(self) -> None:
        with (
            standin(STANDIN_CODE="1") as daemon,
            pytest.raises(DaemonFailed, match="exit code 1 instead of 0"),
        ):
            daemon.stop()

    def test_kill_takes_the_workers_with_it(self) -> None:
        with standin() as daemon:
            members = [procs.proc(pid) for pid in daemon.pids()]
            daemon.kill()
            assert not any(member is not None and member.alive() for member in members)
            daemon.start()  # the same folder again
            assert daemon.healthy()

    @pytest.mark.parametrize("way", ["stop", "kill"])
    def test_a_worker_that_outlives_its_parent_is_noticed_and_ended(self, way: str) -> None:
        with standin(STANDIN_ORPHAN="1") as daemon:
            daemon.linger = 0.3
            worker = procs.proc(daemon.pids()[1])
            with pytest.raises(AssertionError, match="other processes to end"):
                getattr(daemon, way)()
            assert worker is not None
            assert not worker.alive()

    def test_a_process_outside_the_tree_is_noticed_and_ended(self) -> None:
        with standin(STANDIN_LOST="1") as daemon:
            daemon.linger = 0.3
            assert len(daemon.pids()) == 2
            sid = daemon.pid
            with pytest.raises(AssertionError, match="other processes to end"):
                daemon.stop()
            assert procs.session_members(sid) == []

    @pytest.mark.parametrize("source", ["hexfile", "rawfile", "yaml", "credential", "env"])
    def test_the_kek_gets_there_by_each_source(self, source: str) -> None:
        daemon = Daemon({"workers": 3}, source=source)
        try:
            text = daemon.config_file.read_text() + str(daemon.environment())
            assert "workers: 3" in text
            assert (daemon.kek.hex() in text) == (source in ("yaml", "env"))
            assert daemon.kek_file.exists() == (source in ("hexfile", "rawfile", "credential"))
            assert ("--config" in daemon.argv) == (source != "env")
            for path in (daemon.config_file, *([daemon.kek_file] if daemon.kek_file.exists() else [])):
                assert path.stat().st_mode & 0o777 == 0o600
        finally:
            daemon.close()

    def test_nothing_of_the_callers_environment_gets_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PROGRESSDB_KMS_SOCKET", "/elsewhere")
        with standin() as daemon:
            found = Path(f"/proc/{daemon.pid}/environ").read_bytes()
        assert b"PROGRESSDB" not in found

    def test_a_copy_is_a_daemon_of_its_own(self) -> None:
        with standin() as daemon:
            (daemon.data_dir / "kms.db").write_bytes(b"rows")
            twin = daemon.copy()
            try:
                assert (twin.data_dir / "kms.db").read_bytes() == b"rows"
                assert str(twin.kek_file) in twin.config_file.read_text()
                assert str(daemon.home) not in twin.config_file.read_text()
                assert twin.kek_file.read_bytes() == daemon.kek_file.read_bytes()
                assert twin.start().pid != daemon.pid
            finally:
                twin.close()


class TestWire:
    def test_a_session_keeps_its_connection(self, shared: Daemon) -> None:
        with shared.session() as session:
            for _ in range(3):
                assert session.request("GET", "/healthz").body == b"ok"
            assert session.connections == 1

    def test_requests_look_like_those_of_the_go_client(self, shared: Daemon) -> None:
        seen = shared.ok("POST", "/echo", {"a": 1})
        assert seen["length"] == 7
        assert seen["headers"] == {
            "Host": "unix",
            "User-Agent": "Go-http-client/1.1",
            "Accept-Encoding": "gzip",
            "Content-Type": "application/json",
            "Content-Length": "7",
        }

    def test_headers_can_be_replaced_and_left_out(self, shared: Daemon) -> None:
        reply = shared.request("POST", "/echo", b"\x00", {"Content-Type": "text/x", "Accept-Encoding": ""})
        status, headers, _ = reply
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert reply.json()["headers"]["Content-Type"] == "text/x"
        assert "Accept-Encoding" not in reply.json()["headers"]

    def test_another_status_is_an_error_that_shows_the_answer(self, shared: Daemon) -> None:
        with pytest.raises(UnexpectedReply, match="404 instead of 200.*no such path") as caught:
            shared.ok("POST", "/nowhere", {})
        assert caught.value.reply.code == "not_found"

    def test_an_answer_given_before_all_was_read(self, shared: Daemon) -> None:
        assert shared.request("POST", "/echo", bytes(30 << 20)).status == 413

    def test_raw_bytes_in_pieces(self, shared: Daemon) -> None:
        pieces = [b"GET /healthz HT", b"TP/1.1\r\nHost: unix\r\n", b"Connection: close\r\n\r\n"]
        assert raw(shared.socket, pieces).endswith(b"\r\n\r\nok")

    def test_raw_tells_when_nobody_closes(self, shared: Daemon) -> None:
        with pytest.raises(TimeoutError, match="so far: b'HTTP/1.1 200 OK"):
            raw(shared.socket, b"GET /healthz HTTP/1.1\r\nHost: unix\r\n\r\n", end=False, timeout=0.5)

    def test_a_hung_answer_ends_the_call(self, shared: Daemon) -> None:
        with Session(shared.socket, timeout=0.2) as session, pytest.raises(OSError, match="timed out"):
            session.request("POST", "/slow", {})


class TestLoad:
    def test_hammer_makes_each_call_once(self, shared: Daemon) -> None:
        found = hammer(shared.socket, lambda kms, i: kms.create_dek(str(i))["key_id"], count=200, threads=8)
        assert sorted(found) == sorted(f"k_{i}" for i in range(200))

    def test_hammer_raises_what_a_call_raised(self, shared: Daemon) -> None:
        with pytest.raises(UnexpectedReply):
            hammer(shared.socket, lambda kms, i: kms.ok("POST", "/nowhere", {}), count=4)

    def test_load_up_to_a_kill(self) -> None:
        with (
            standin() as daemon,
            Load(daemon.socket, lambda kms, i: kms.create_dek(str(i)), threads=4) as load,
        ):
            load.wait_for(20)
            daemon.kill()
            load.join()
        assert len(load.results) >= 20
        assert len(load.errors) == 4

    def test_load_that_goes_on(self) -> None:
        with standin() as daemon:
            work = lambda kms, i: kms.create_dek(str(i))  # noqa: E731
            with Load(daemon.socket, work, threads=2, keep_going=True) as load:
                load.wait_for(1)
                daemon.kill()
                daemon.start()
                load.wait_for(len(load.results) + 10)
            assert load.errors


# ---- memscan -----------------------------------------------------------------------------------------

# Holds what it is told to: a line "OFFSET HEX" is unmasked and stands at that offset of 1 MiB of its own.
# Masked, so that what goes through its input buffers is not what is looked for.
HOLDER = textwrap.dedent(
    """
    import ctypes, mmap, os, sys
    area = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    fd = ctypes.CDLL(None).syscall(447, 0)
    if fd >= 0:
        os.ftruncate(fd, 8192)
        secret = mmap.mmap(fd, 8192)
        secret[:2] = b"xx"
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
    print(base, fd, flush=True)
    for line in sys.stdin:
        offset, masked = line.split()
        area[:] = bytes(len(area))
        for place, byte in enumerate(bytearray.fromhex(masked), int(offset)):
            area[place] = byte ^ 0xA5
        print("held", flush=True)
    """
)


class Holder:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", HOLDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.base, self.secret_fd = (int(word) for word in self._answer().split())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def hold(self, data: bytes, offset: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{offset} {bytes(byte ^ 0xA5 for byte in data).hex()}\n")
        self.process.stdin.flush()
        assert self._answer() == "held\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def holder() -> Iterator[Holder]:
    if why := memscan.cannot_scan():
        pytest.skip(why)
    one = Holder()
    yield one
    one.close()


KEY = Secret("KEK", bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"))
OTHER = Secret("DEK", bytes.fromhex("c1f3a9487b06ed5582904c1efa3377d2590e8bb06421fe9df8ac13475b60d98a"))
FORMS = memscan.forms(KEY)


class TestMemscan:
    def test_key_schedules_are_those_of_fips_197(self) -> None:
        assert aeskeys.expand(KEY.value)[-16:].hex() == "fe4890d1e6188d0b046df344706c631e"  # A.3, w[56..59]
        assert aeskeys.expand(KEY.value)[32:48].hex() == "9ba354118e6925afa51a8b5f2067fcde"  # A.3, w[8..11]
        schedule = aeskeys.expand(bytes(range(32)))
        assert aeskeys.decrypt_round_keys(schedule)[:16].hex() == "34f1d1ffbfceaa2ffce9e25f2558016e"  # C.3
        assert aeskeys.swapped(b"abcdefgh") == b"dcbahgfe"

    def test_the_states_of_a_mac_are_those_of_fips_180(self) -> None:
        padded = b"abc\x80" + bytes(59) + b"\x18"
        digest = b"".join(word.to_bytes(4, "big") for word in aeskeys.sha256_state(padded))
        assert digest == hashlib.sha256(b"abc").digest()

    @pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
    @pytest.mark.parametrize("shift", [0, 3])
    def test_each_form_is_found_wherever_it_stands(
        self, holder: Holder, form: memscan.Form, shift: int
    ) -> None:
        offset = 4096 + shift * form.step
        holder.hold(form.data, offset)
        report = scan([holder.process.pid], [OTHER, KEY])
        whole = [hit for hit in report.hits if hit.form == form.name]
        assert [(hit.label, hit.address, hit.length) for hit in whole] == [
            ("KEK", holder.base + offset, len(form.data))
        ], str(report)
        assert whole[0].mapping.name == "[anon]"
        with pytest.raises(AssertionError, match="KEK as"):
            report.assert_clean()

    def test_other_memory_is_clean(self, holder: Holder) -> None:
        holder.hold(KEY.value, 4096)
        report = scan([holder.process.pid], [OTHER])
        report.assert_clean()
        assert report.scanned > 1 << 20

    def test_a_part_is_enough(self, holder: Holder) -> None:
        """A 16-byte half, and the 8 bytes that one spilled register holds."""
        round_keys = aeskeys.expand(KEY.value)
        for part in (KEY.value[:16], KEY.value[16:], KEY.value[8:16], round_keys[200:208]):
            holder.hold(part, 8192)
            hits = scan([holder.process.pid], [KEY]).hits
            assert [(hit.address, hit.length) for hit in hits] == [(holder.base + 8192, len(part))]

    def test_less_than_that_is_chance(self, holder: Holder) -> None:
        for part in (KEY.value[:7], KEY.value.hex().encode()[:15]):
            holder.hold(part, 8192)
            scan([holder.process.pid], [KEY]).assert_clean()

    def test_across_the_border_of_two_blocks(self, holder: Holder) -> None:
        border = -holder.base % memscan.BLOCK + memscan.BLOCK
        for before in (1, 7, 16, 31):
            holder.hold(KEY.value, border - before)
            assert [hit.length for hit in scan([holder.process.pid], [KEY]).hits] == [32]

    def test_two_copies_are_two_hits(self, holder: Holder) -> None:
        holder.hold(KEY.value + bytes(100) + KEY.value, 123)
        assert len(scan([holder.process.pid], [KEY]).hits) == 2

    def test_the_same_pages_in_two_processes(self, holder: Holder) -> None:
        """A block that was found clean is not looked at again; one with a hit is reported each time."""
        holder.hold(KEY.value, 0)
        assert len(scan([holder.process.pid, holder.process.pid], [KEY], freeze=True).mappings()) == 1
        assert (procs.stat(holder.process.pid) or "?")[0] in ("S", "R")

    def test_memfd_secret_is_counted_and_not_read(self, holder: Holder) -> None:
        if holder.secret_fd < 0:
            pytest.skip("this kernel offers no memfd_secret")
        report = scan([holder.process.pid], [KEY])
        assert report.secret_pages == 2
        assert [row.pages for row in report.unreadable] == [2]
        assert "2 of them memfd_secret" in str(report)

    @pytest.mark.parametrize(
        ("kept", "forms"),
        [
            (
                "Cipher(algorithms.AES(key), modes.GCM(bytes(12))).encryptor()",
                {"raw", "AES round keys 2-14"},
            ),
            ("hmac.new(key, b'', 'sha256')", {"raw", "HMAC inner state", "HMAC outer state"}),
        ],
        ids=["cipher", "MAC"],
    )
    def test_what_an_object_leaves(self, kept: str, forms: set[str]) -> None:
        """Not a plant: a real context that is kept leaves the key and what was made of it."""
        code = f"""
            import hmac, sys
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
            key = bytes(b ^ 0xA5 for b in sys.stdin.buffer.read(32))
            kept = {kept}
            print("kept", flush=True)
            sys.stdin.buffer.read()
            """
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(bytes(byte ^ 0xA5 for byte in KEY.value))
            process.stdin.flush()
            assert process.stdout.readline() == b"kept\n"
            found = {hit.form for hit in scan([process.pid], [KEY]).hits}
            process.stdin.close()
        assert forms <= found

    def test_a_secret_that_chance_would_find_is_refused(self) -> None:
        for value in (b"short", b"\x01\x02" * 16):
            with pytest.raises(ValueError, match="at least 15 bytes"):
                memscan.forms(Secret("x", value))
        with pytest.raises(ValueError, match="32 bytes"):
            memscan.forms(Secret("x", os.urandom(24)))

    def test_a_process_that_is_gone(self) -> None:
        with pytest.raises(memscan.ScanRefused, match="gone"):
            scan([4_000_000], [KEY])

    @pytest.mark.long
    def test_the_command(self, holder: Holder, tmp_path: Path) -> None:
        (tmp_path / "raw").write_bytes(KEY.value)
        (tmp_path / "hex").write_text(OTHER.value.hex() + "\n")
        holder.hold(KEY.value, 64)
        for secret, code in (
            (f"A=@{tmp_path}/raw", 1),
            (f"B=@{tmp_path}/hex", 0),
            (f"B={OTHER.value.hex()}", 0),
        ):
            argv = [
                sys.executable,
                "-m",
                "tests.harness.memscan",
                str(holder.process.pid),
                "--secret",
                secret,
            ]
            done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True)
            assert done.returncode == code, done.stderr
        gone = [sys.executable, "-m", "tests.harness.memscan", "4000000", "--secret", f"A=@{tmp_path}/raw"]
        assert subprocess.run(gone, cwd=REPO, capture_output=True).returncode == 2


# ---- powerloss ---------------------------------------------------------------------------------------

SQLITE = """
import os, sqlite3, sys
folder, journal, synchronous = sys.argv[1:]
db = sqlite3.connect(folder + "/t.db", isolation_level=None)
db.execute("PRAGMA journal_mode=" + journal)
db.execute("PRAGMA synchronous=" + synchronous)
db.execute("CREATE TABLE t (k TEXT PRIMARY KEY, v BLOB)")
for name in (folder + "/t.db", folder):
    os.fsync(os.open(name, os.O_RDONLY))
for i in range(30):
    db.execute("INSERT INTO t VALUES (?, ?)", ("k%d" % i, os.urandom(300)))
    os.write(1, b"ack k%d.\\n" % i)
    if i == 20 and journal == "WAL":
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
"""


def run_recorded(code: str, folder: Path, *args: str) -> Recording:
    argv = [sys.executable, "-c", textwrap.dedent(code), str(folder), *args]
    return Recording.record(argv, folder)


def rows_in(folder: Path) -> set[str]:
    db = sqlite3.connect(folder / "t.db")
    try:
        if db.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
            return set()
        return {row[0] for row in db.execute("SELECT k FROM t")}
    except sqlite3.Error:
        return set()
    finally:
        db.close()


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if not path.name.endswith("-shm")]
    return {str(path.relative_to(folder)): b"/" if path.is_dir() else path.read_bytes() for path in paths}


@pytest.fixture
def strace_here() -> None:
    faults.need_strace()


@pytest.mark.long
@pytest.mark.usefixtures("strace_here")
class TestPowerLoss:
    @pytest.mark.parametrize(
        ("journal", "synchronous", "safe"),
        [
            ("WAL", "OFF", False),
            ("WAL", "NORMAL", False),
            ("WAL", "FULL", True),
            ("TRUNCATE", "FULL", True),
            ("DELETE", "FULL", False),  # SQLite's own documentation: the directory is synced with EXTRA only
            ("DELETE", "EXTRA", True),
        ],
    )
    def test_it_sees_the_missing_fsync(
        self, tmp_path: Path, journal: str, synchronous: str, safe: bool
    ) -> None:
        (tmp_path / "db").mkdir()
        recording = run_recorded(SQLITE, tmp_path / "db", journal, synchronous)
        assert recording.acknowledge(rb"ack (k\d+)\.") == 30
        assert len(recording.acknowledged(recording.points() - 1)) == 30
        lost = []
        for number, (point, mode, seed) in enumerate(recording.sample(70)):
            disk = recording.rebuild(point, mode, seed, tmp_path / str(number))
            if not set(recording.acknowledged(point)) <= rows_in(disk):
                lost.append((point, mode, seed))
        assert (not lost) if safe else len(lost) > 10, (lost, recording.explain(lost[0][0]) if lost else "")

    BUSY = """
        import os, sys, threading
        os.chdir(sys.argv[1])
        os.makedirs("a/b")
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        def say(text):
            for i in range(20):
                os.write(log, b"%s %d\\n" % (text, i))
        threads = [threading.Thread(target=say, args=(text,)) for text in (b"one", b"two")]
        [thread.start() for thread in threads]; [thread.join() for thread in threads]
        if os.fork() == 0:
            say(b"child"); os._exit(0)
        os.wait()
        with open("a/b/text", "wb") as file:
            file.write(b"x" * 3000); file.flush(); file.seek(100); file.write(b"middle"); file.truncate(2000)
        fd = os.dup(os.open("a/holes", os.O_RDWR | os.O_CREAT))
        os.pwrite(fd, b"end", 5000); os.writev(fd, [b"aa", b"bb"]); os.write(fd, b"cc")
        os.rename("a/b", "a/c"); os.replace("a/holes", "a/c/holes"); os.write(fd, b"dd")
        os.link("log", "log2"); os.unlink("kept"); os.mkdir("gone"); os.rmdir("gone")
        os.truncate("a/c/text", 150)
        there = os.open("a", os.O_RDONLY | os.O_DIRECTORY)
        os.close(os.open("late", os.O_WRONLY | os.O_CREAT, dir_fd=there))
        os.rename("late", "later", src_dir_fd=there, dst_dir_fd=there)
        os.write(os.open("old", os.O_WRONLY | os.O_TRUNC), b"new")
        os.write(os.open("more", os.O_WRONLY | os.O_APPEND), b" and more")
        open("a/shm-shm", "w").write("dropped")
        """

    def test_everything_kept_is_what_stands_there(self, tmp_path: Path) -> None:
        folder = tmp_path / "f"
        folder.mkdir()
        (folder / "kept").write_text("kept")
        (folder / "old").write_text("old text")
        (folder / "more").write_text("some")
        before = contents(folder)
        recording = run_recorded(self.BUSY, folder)
        last = recording.points() - 1
        after = contents(recording.rebuild(last, "kept", 1, tmp_path / "kept"))
        wanted = contents(folder)
        for found in (after, wanted):  # threads append in an order that only the kernel knows
            lines = found.pop("log")
            assert found.pop("log2") == lines
            found["lines"] = b"\n".join(sorted(lines.split(b"\n")))
            assert lines.count(b"\n") == 60
        assert after == wanted
        assert (after["old"], after["more"], len(after["a/c/text"])) == (b"new", b"some and more", 150)
        for mode in MODES:
            assert contents(recording.rebuild(0, mode, 1, tmp_path / f"0{mode}")) == before
        assert contents(recording.rebuild(last, "dropped", 1, tmp_path / "dropped")) == before

    def replace(self, tmp_path: Path, *steps: str) -> Recording:
        """A file `f` replaced by the usual dance, with the steps that are given."""
        folder = tmp_path / "f"
        folder.mkdir()
        (folder / "f").write_bytes(b"old")
        lines = {
            "write": "fd = os.open(d + '/t', os.O_WRONLY | os.O_CREAT); os.write(fd, b'new')",
            "sync": "os.fsync(fd)",
            "rename": "os.rename(d + '/t', d + '/f')",
            "syncdir": "os.fsync(os.open(d, os.O_RDONLY))",
            "syncfs": "import ctypes; ctypes.CDLL(None).syncfs(fd)",
        }
        return run_recorded(
            "\n".join(["import os, sys; d = sys.argv[1]", *(lines[step] for step in steps)]), folder
        )

    def survivors(self, tmp_path: Path, recording: Recording, fs: str = "posix") -> set[Any]:
        """What `f` may hold when all is done and the power goes."""
        found = set()
        for number, mode in enumerate(MODES * 6):
            into = tmp_path / f"{fs}{number}"
            recording.rebuild(recording.points() - 1, mode, number, into, fs=fs)
            found.add((into / "f").read_bytes() if (into / "f").exists() else None)
        return found

    def test_a_whole_replacement(self, tmp_path: Path) -> None:
        recording = self.replace(tmp_path, "write", "sync", "rename", "syncdir")
        assert self.survivors(tmp_path, recording) == {b"new"}

    def test_a_replacement_without_fsync_may_be_empty_or_zeros(self, tmp_path: Path) -> None:
        recording = self.replace(tmp_path, "write", "rename", "syncdir")
        assert self.survivors(tmp_path, recording) == {b"new", b"", bytes(3)}

    def test_a_replacement_whose_folder_is_not_synced_may_not_have_been(self, tmp_path: Path) -> None:
        recording = self.replace(tmp_path, "write", "sync", "rename")
        assert self.survivors(tmp_path, recording) == {b"new", b"old"}

    def test_what_a_journal_adds(self, tmp_path: Path) -> None:
        recording = self.replace(tmp_path, "write", "rename", "sync")
        assert self.survivors(tmp_path, recording) == {b"new", b"old"}
        assert self.survivors(tmp_path, recording, "journal") == {b"new"}

    def test_syncfs_covers_all(self, tmp_path: Path) -> None:
        recording = self.replace(tmp_path, "write", "rename", "syncfs")
        assert self.survivors(tmp_path, recording) == {b"new"}

    @pytest.mark.parametrize(
        ("mode", "wanted"),
        [
            ("dropped", {"f": b"f", "t": b"t"}),
            ("kept", {"f": b"new"}),
            ("names", {"f": b"t"}),
            ("data", {"f": b"f", "t": b"new"}),
        ],
    )
    def test_what_each_mode_keeps(self, tmp_path: Path, mode: str, wanted: dict[str, bytes]) -> None:
        folder = tmp_path / "f"
        folder.mkdir()
        (folder / "f").write_bytes(b"f")
        (folder / "t").write_bytes(b"t")
        code = """
            import os, sys; os.chdir(sys.argv[1])
            os.write(os.open("t", os.O_WRONLY | os.O_TRUNC), b"new"); os.rename("t", "f")
            """
        recording = run_recorded(code, folder)
        assert contents(recording.rebuild(recording.points() - 1, mode, 1, tmp_path / mode)) == wanted

    def test_prefix_keeps_the_order_over_all_files(self, tmp_path: Path) -> None:
        (tmp_path / "f").mkdir()
        code = """
            import os, sys; os.chdir(sys.argv[1])
            one, two = (os.open(name, os.O_WRONLY | os.O_CREAT) for name in ("1", "2"))
            os.fsync(os.open(".", os.O_RDONLY))
            for i in range(10): os.write(one, b"1"); os.write(two, b"2")
            """
        recording = run_recorded(code, tmp_path / "f")
        seen = set()
        for seed in range(60):
            disk = recording.rebuild(recording.points() - 1, "prefix", seed, tmp_path / str(seed))
            seen.add((len((disk / "1").read_bytes()), len((disk / "2").read_bytes())))
        assert all(one - two in (0, 1) for one, two in seen)
        assert len(seen) > 10

    def test_a_rename_across_folders_takes_what_came_before_with_it(self, tmp_path: Path) -> None:
        folder = tmp_path / "f"
        for name in ("a", "b"):
            (folder / name).mkdir(parents=True)
        for name in "xyz":
            (folder / "a" / name).write_text(name)
        code = """
            import os, sys; os.chdir(sys.argv[1])
            os.unlink("a/y"); os.rename("a/x", "b/x"); os.unlink("a/z"); os.fsync(os.open("b", os.O_RDONLY))
            """
        recording = run_recorded(code, folder)
        found = contents(recording.rebuild(recording.points() - 1, "dropped", 1, tmp_path / "d"))
        assert found == {"a": b"/", "b": b"/", "b/x": b"x", "a/z": b"z"}

    def test_torn_writes_are_torn_by_sectors(self, tmp_path: Path) -> None:
        folder = tmp_path / "f"
        folder.mkdir()
        (folder / "f").write_bytes(b"a" * 2048)
        code = "import os, sys; os.pwrite(os.open(sys.argv[1] + '/f', os.O_RDWR), b'b' * 1024, 256)"
        recording = run_recorded(code, folder)
        found = {
            (recording.rebuild(1, "torn", seed, tmp_path / str(seed)) / "f").read_bytes()
            for seed in range(60)
        }
        pieces = [
            (b"a" * 512, b"a" * 256 + b"b" * 256),
            (b"a" * 512, b"b" * 512),
            (b"a" * 512, b"b" * 256 + b"a" * 256),
        ]
        wanted = {
            one + two + three + b"a" * 512 for one in pieces[0] for two in pieces[1] for three in pieces[2]
        }
        assert found == wanted

    def test_a_torn_cut_takes_all_of_what_it_takes_or_nothing(self, tmp_path: Path) -> None:
        """SQLite's log is there after it, or not: a part of it would undo what followed that part."""
        folder = tmp_path / "f"
        folder.mkdir()
        (folder / "f").write_bytes(b"a" * 2048)
        recording = run_recorded("import os, sys; os.truncate(sys.argv[1] + '/f', 256)", folder)
        found = {
            (recording.rebuild(1, "torn", seed, tmp_path / str(seed)) / "f").read_bytes()
            for seed in range(60)
        }
        assert found == {b"a" * 2048, b"a" * 256}

    def test_a_rebuild_can_be_repeated(self, tmp_path: Path) -> None:
        (tmp_path / "db").mkdir()
        recording = run_recorded(SQLITE, tmp_path / "db", "WAL", "OFF")
        point = recording.points() // 2
        first, second = (recording.rebuild(point, "random", 7, tmp_path / name) for name in ("1", "2"))
        assert contents(first) == contents(second)

    def test_marks_are_dated_back_to_what_was_sent(self, tmp_path: Path) -> None:
        code = """
            import os, sys
            fd = os.open(sys.argv[1] + "/f", os.O_WRONLY | os.O_CREAT)
            for i in range(5):
                os.write(fd, b"x"); os.write(1, b"%d\\n" % i); sys.stdin.readline()
                os.write(fd, b"y")
            """

        def driver(mark: Any, process: subprocess.Popen[bytes]) -> None:
            assert process.stdout is not None
            for _ in range(5):
                mark(process.stdout.readline().decode().strip())
                process.stdin.write(b"\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]

        (tmp_path / "f").mkdir()
        argv = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "f")]
        recording = Recording.record(argv, tmp_path / "f", driver)
        assert [len(recording.acknowledged(point)) for point in range(recording.points())] == [
            *(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)
        ]

    def test_an_answer_that_strace_sees_late_is_dated_right(self, tmp_path: Path) -> None:
        """Its reader has gone on meanwhile, and something else was sent after that."""
        recording = Recording(tmp_path)
        recording.sent = [(1, 10.0, b"asked"), (9, 10.3, b"something else"), (5, 10.1, b"the answer")]
        recording._marks = [("it", 10.2)]
        recording._date_marks()
        assert [point for point in range(9) if recording.acknowledged(point)] == [5, 6, 7, 8]
        recording.finish()

    @pytest.mark.parametrize(
        "deed",
        [
            "import mmap; f = os.open('f', os.O_RDWR); mmap.mmap(f, 4096)",
            "os.sendfile(os.open('g', os.O_RDWR | os.O_CREAT), os.open('f', os.O_RDONLY), 0, 10)",
            "os.symlink('f', 'g')",
        ],
    )
    def test_what_it_cannot_replay_it_refuses(self, tmp_path: Path, deed: str) -> None:
        (tmp_path / "f").write_bytes(bytes(4096))
        with pytest.raises(Unmodelled):
            run_recorded(f"import os, sys; os.chdir(sys.argv[1]); {deed}", tmp_path)

    def test_a_daemon_is_recorded(self) -> None:
        """The tracer is not in the way: pid, readiness, SIGTERM and exit code are the daemon's own."""
        with_store = standin()
        try:
            recording = Recording.of_daemon(with_store, lambda daemon, mark: mark(str(daemon.pid > 0)))
            assert recording.acknowledged(0) == ["True"]  # it writes nothing into its data-dir
            assert recording.points() == 1
            assert any(b"200 OK" in (data or b"") for _, _, data in recording.sent)
        finally:
            with_store.close()


# ---- faults ------------------------------------------------------------------------------------------

# Does one deed a line of its input, and answers with its outcome. Another thread writes into its folder, too.
DOER = """
import os, sys, time, threading
os.chdir(sys.argv[1])
noise = os.open("noise", os.O_WRONLY | os.O_CREAT)
os.unlink("noise")
def make_noise():
    while True:
        os.write(noise, b"x"); time.sleep(0.002)
threading.Thread(target=make_noise, daemon=True).start()
print(os.getpid(), flush=True)
for line in sys.stdin:
    try:
        print("done", eval(line), flush=True)
    except OSError as error:
        print("error", error.errno, flush=True)
"""


class Doer:
    def __init__(self, folder: Path, env: Any = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DOER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, deed: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(deed + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def doer(tmp_path: Path) -> Iterator[Doer]:
    one = Doer(tmp_path)
    yield one
    one.close()


def made(name: str) -> str:
    return f"os.open('{name}', os.O_RDWR | os.O_CREAT)"


REPLACE = """
import os, sys
d = sys.argv[1]
fd = os.open(d + "/t", os.O_WRONLY | os.O_CREAT)
os.write(fd, b"n")
os.write(fd, b"ew")
os.fsync(fd)
os.rename(d + "/t", d + "/f")
os.unlink(d + "/g")
"""
REPLACE_STEPS = ["openat", "write", "write", "fsync", "rename", "unlink"]


@pytest.mark.usefixtures("strace_here")
class TestStrace:
    def test_a_call_of_a_running_process_fails(self, doer: Doer, tmp_path: Path) -> None:
        doer.do(made("a"))
        doer.do(made("b"))
        fsync = "os.fsync(os.open('{}', os.O_RDWR))"
        with faults.inject([doer.process.pid], "fsync:error=EIO:when=2", path=tmp_path / "a") as injection:
            answers = [doer.do(fsync.format(name)) for name in "abaa"]
            assert answers == ["done None", "done None", f"error {errno.EIO}", "done None"]
            assert injection.hits() == 1
        assert doer.do(fsync.format("a")) == "done None"

    def test_a_command_from_its_beginning(self, tmp_path: Path) -> None:
        code = "import os, sys; os.fsync(os.open(sys.argv[1], os.O_RDONLY))"
        argv = [*faults.injecting("fsync:error=EIO"), sys.executable, "-c", code, str(tmp_path)]
        assert b"Errno 5" in subprocess.run(argv, capture_output=True).stderr

    def prepared(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "f").write_text("old")
        (folder / "g").write_text("other")
        return folder

    def after(self, taken: int) -> dict[str, bytes]:
        """What stands there once so many of REPLACE_STEPS were taken."""
        found = {"f": b"old", "g": b"other"}
        if taken >= 1:
            found["t"] = b"new"[: (0, 1, 3)[min(taken - 1, 2)]]
        if taken >= 5:
            found["f"] = found.pop("t")
        if taken >= 6:
            del found["g"]
        return found

    def test_a_command_killed_at_each_step(self, tmp_path: Path) -> None:
        def run(folder: Path, wrapper: list[str]) -> int:
            argv = [*wrapper, sys.executable, "-c", REPLACE, str(folder)]
            return subprocess.run(argv).returncode

        first = self.prepared(tmp_path / "0")
        steps = faults.steps_of(lambda wrapper: run(first, wrapper), first)
        assert [step.name for step in steps] == REPLACE_STEPS
        for number, step in enumerate(steps):
            folder = self.prepared(tmp_path / str(number + 1))
            assert run(folder, faults.killing(step)) == -signal.SIGKILL
            assert contents(folder) == self.after(number), str(step)

    def test_a_running_process_killed_at_each_step(self, tmp_path: Path) -> None:
        deed = f"exec({REPLACE.replace('sys.argv[1]', 'os.getcwd()')!r})"
        first = self.prepared(tmp_path / "0")
        doer = Doer(first)
        try:
            with faults.trace_steps(doer.process.pid, first) as steps:
                doer.do(deed)
        finally:
            doer.close()
        assert [step.name for step in steps] == REPLACE_STEPS
        for number, step in enumerate(steps):
            folder = self.prepared(tmp_path / str(number + 1))
            doer = Doer(folder)
            try:
                with faults.kill_at(doer.process.pid, step):
                    assert doer.do(deed) == ""
                assert doer.process.wait(10) == -signal.SIGKILL
            finally:
                doer.close()
            assert contents(folder) == self.after(number), str(step)

    def test_steps_can_be_thinned(self) -> None:
        steps = faults.Steps(faults.Step("write", number, "") for number in range(100))
        assert [step.nth for step in steps.spread(4)] == [0, 33, 66, 99]
        assert steps.spread(1000) == list(steps)


@pytest.fixture
def shim() -> Iterator[faults.Shim]:
    with faults.Shim() as one:
        yield one


class TestShim:
    @pytest.fixture
    def shimmed(self, shim: faults.Shim, tmp_path: Path) -> Iterator[Doer]:
        (tmp_path / "dir").mkdir()
        one = Doer(tmp_path, shim.env)
        yield one
        one.close()

    @pytest.mark.parametrize(
        ("call", "deed"),
        [
            ("write", f"os.write({made('x')}, b'1')"),
            ("write", f"os.pwrite({made('x')}, b'1', 0)"),
            ("write", f"os.writev({made('x')}, [b'1'])"),
            ("sync", f"os.fsync({made('x')})"),
            ("sync", f"os.fdatasync({made('x')})"),
            ("truncate", f"os.ftruncate({made('x')}, 5)"),
            ("rename", f"({made('x0')}, os.rename('x0', 'x'))"),
            ("unlink", f"({made('x')}, os.unlink('x'))"),
            ("open", made("x")),
            ("mkdir", "os.mkdir('x')"),
            ("allocate", f"os.posix_fallocate({made('x')}, 0, 10)"),
        ],
    )
    def test_a_call_fails_where_it_should(
        self, shim: faults.Shim, shimmed: Doer, call: str, deed: str
    ) -> None:
        elsewhere = shim.fail(call, "elsewhere", "EIO")
        fault = shim.fail(call, "x", "ENOSPC", times=1)
        assert shimmed.do(deed) == f"error {errno.ENOSPC}"
        assert (fault.hits, elsewhere.hits) == (1, 0)
        assert shimmed.do(deed.replace("mkdir('x')", "mkdir('x2')")).startswith("done")

    def test_skip_times_and_off(self, shim: faults.Shim, shimmed: Doer) -> None:
        deed = f"os.fsync({made('x')})"
        fault = shim.fail("sync", "/x", skip=1, times=2)
        assert [shimmed.do(deed)[:4] for _ in range(4)] == ["done", "erro", "erro", "done"]
        always = shim.fail("sync")
        assert shimmed.do(deed)[:4] == "erro"
        always.off()
        assert shimmed.do(deed)[:4] == "done"
        assert (fault.hits, always.hits) == (2, 1)
        shim.fail("sync")
        shim.clear()
        assert shimmed.do(deed)[:4] == "done"

    def test_a_short_write(self, shim: faults.Shim, shimmed: Doer, tmp_path: Path) -> None:
        shim.short("/x", 3)
        assert shimmed.do(f"os.write({made('x')}, b'12345')") == "done 3"
        assert (tmp_path / "x").read_bytes() == b"123"
        assert shimmed.do(f"os.write({made('x')}, b'12345')") == "done 5"

    def test_sqlite_meets_it_too(self, shim: faults.Shim, tmp_path: Path) -> None:
        code = "import sqlite3, sys; sqlite3.connect(sys.argv[1] + '/t.db').execute('CREATE TABLE t (a)')"
        fault = shim.fail("write", "t.db", "ENOSPC")
        env = {**os.environ, **shim.env}
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True)
        assert b"database or disk is full" in done.stderr
        assert fault.hits

    def test_the_wall_clock_goes_wrong_and_the_other_not(self, shim: faults.Shim, shimmed: Doer) -> None:
        ask = "'%d %d' % (time.time(), time.monotonic())"
        shim.clock(-3600)
        _, wall, steady = shimmed.do(ask).split()
        assert abs(int(wall) - (time.time() - 3600)) < 60
        assert abs(int(steady) - time.monotonic()) < 60
        shim.clock(0)
        assert abs(int(shimmed.do(ask).split()[1]) - time.time()) < 60


class TestTmpfs:
    def test_it_fills_up_and_drains(self) -> None:
        with faults.Tmpfs(1 << 20) as disk:
            disk.fill(leave=8192)
            assert disk.free() == 8192
            (disk.path / "a").write_bytes(bytes(8192))
            with pytest.raises(OSError, match="No space"):
                (disk.path / "b").write_bytes(b"1")
            disk.drain()
            (disk.path / "b").write_bytes(b"1")
            disk.readonly(True)
            with pytest.raises(OSError, match="Read-only"):
                (disk.path / "c").write_bytes(b"1")
            disk.readonly(False)
            (disk.path / "c").write_bytes(b"1")
        assert not disk.path.exists()


class TestFixtures:
    def test_a_test_that_hangs_is_ended(self) -> None:
        handler: Any = signal.getsignal(signal.SIGALRM)
        assert signal.alarm(0) > 0
        with pytest.raises(TimeoutError, match="still running"):
            handler(signal.SIGALRM, None)

    def test_trees_are_seen_whole(self) -> None:
        code = "import os, time; os.fork(); os.fork(); print(flush=True); time.sleep(60)"
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
        ) as process:
            try:
                assert process.stdout is not None
                for _ in range(4):
                    process.stdout.readline()
                assert len(procs.tree(process.pid)) == 4
                assert {one.pid for one in procs.session_members(process.pid)} == set(procs.tree(process.pid))
            finally:
                procs.end(procs.session_members(process.pid))
        assert procs.tree(process.pid) == []

    def test_a_pid_that_was_given_away_is_another_process(self) -> None:
        me = procs.proc(os.getpid())
        assert me is not None
        assert me.alive()
        assert not me._replace(started=me.started - 1).alive()

    def test_threads_are_counted(self) -> None:
        release = threading.Event()
        before = len(procs.threads(os.getpid()))
        thread = threading.Thread(target=release.wait)
        thread.start()
        assert len(procs.threads(os.getpid())) == before + 1
        release.set()
        thread.join()


class TestOnTheDaemonItself:
    """That the tools fit the real thing: one look through each."""

    def test_the_writer_is_one_of_its_processes(self, make_daemon: Any) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root: the daemon is not dumpable")
        daemon = make_daemon(workers=2)
        assert daemon.writer in daemon.pids()[1:]

    def test_powerloss(self, make_daemon: Any, tmp_path: Path) -> None:
        """Every call is seen with its bytes, and the replay ends with what really stands there."""
        faults.need_strace()
        daemon = make_daemon(workers=2, start=False)

        def driver(daemon: Daemon, mark: Any) -> None:
            for key in hammer(
                daemon.socket, lambda kms, i: kms.create_dek(f"t{i}")["key_id"], count=12, threads=3
            ):
                mark(key)

        recording = Recording.of_daemon(daemon, driver, kill=True)
        last = recording.points() - 1
        assert len(recording.acknowledged(last)) == 12
        assert recording.acknowledge(rb'HTTP/1.1 200.*"key_id":"(k_\w+)"') == 12
        assert not [sent for sent in recording.sent if sent[2] is None]
        disk = recording.rebuild(last, "kept", 1, tmp_path / "disk")
        assert contents(disk)["kms.db"] == contents(daemon.data_dir)["kms.db"]
        assert contents(disk)["kms.db-wal"] == contents(daemon.data_dir)["kms.db-wal"]

    def test_steps(self, make_daemon: Any) -> None:
        faults.need_strace()
        daemon = make_daemon(workers=2)
        with daemon.session() as kms:
            with faults.trace_steps(daemon.writer, daemon.data_dir) as steps:
                kms.create_dek("one")
            assert {"pwrite64", "fdatasync"} <= {step.name for step in steps}
            writer = procs.proc(daemon.writer)
            sync = next(step for step in steps if step.name == "fdatasync")
            assert writer is not None
            with faults.kill_at(writer.pid, sync):
                try:
                    reply = kms.request("POST", "/create_dek_for_thread", {"thread_id": "two"})
                except (OSError, http.client.HTTPException):
                    reply = None
                procs.wait_until(lambda: not writer.alive(), what="the writer to die")
            assert reply is None or reply.status == 503

    def test_the_shim_reaches_the_store(self, make_daemon: Any, shim: faults.Shim) -> None:
        daemon = make_daemon(workers=2, env=shim.env)
        fault = shim.fail("sync", "kms.db-wal", "EIO")
        assert daemon.request("POST", "/create_dek_for_thread", {"thread_id": "t"}).status == 503
        assert fault.hits  # one, or with an anchor more

    def test_memscan(self, make_daemon: Any) -> None:
        """A key that never was in it: the time that a scan takes, and that all of it can be read."""
        if why := memscan.cannot_scan():
            pytest.skip(why)
        daemon = make_daemon(workers=2)
        report = scan(daemon.pids(), [OTHER])
        report.assert_clean()
        assert all("secretmem" in row.mapping.name for row in report.unreadable)
        assert report.scanned > 10 << 20


# ---- programs that start warm ---------------------------------------------------------------------------


class TestWarm:
    """Forked from a template instead of started by execve (`warm`): nobody sees a difference."""

    @pytest.mark.parametrize(
        "words",
        [["--version"], ["kek-id"], ["nonsense"], ["status", "--socket", "nowhere"], ["genkey"]],
        ids=str,
    )
    def test_a_command_is_the_same(self, words: list[str], short_tmp: Path) -> None:
        environment = base_environment(short_tmp)
        ends = []
        for starter in (warm.Warm, subprocess.Popen):
            with starter(
                [*warm.WORDS, *words], env=environment, cwd=short_tmp, stdin=-1, stdout=-1, stderr=-1
            ) as one:
                out, err = one.communicate(b"")
            ends.append((one.returncode, bool(out) if words == ["genkey"] else out, err))
        assert ends[0] == ends[1]

    def test_it_is_a_child_like_any_other(self, short_tmp: Path) -> None:
        daemon = Daemon(workers=2)
        daemon._starter = lambda: warm.Warm  # type: ignore[method-assign]
        with daemon:
            assert procs.stat(daemon.pid)[1] == str(os.getpid())  # type: ignore[index]
            assert procs.stat(daemon.pid)[3] == str(daemon.pid)  # type: ignore[index]
            assert len(daemon.pids()) >= 3
            daemon.kill()

    @pytest.mark.parametrize("name", ["LD_PRELOAD", "TZ", "PYTHONWARNINGS", "PROGRESSDB_KMS_MASTER_KEY_HEX"])
    def test_what_is_read_before_us_needs_a_start(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(warm, "enabled", True)
        assert warm.possible(warm.WORDS, {"NO_COLOR": "1"})
        assert not warm.possible(warm.WORDS, {name: "x"})
        assert not warm.possible(("strace", *warm.WORDS), {})
