"""What an operator reads in the journal: a line where something begins, one where it is over."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import select
import shutil
import signal
import socket
import sqlite3
import time
from contextlib import closing

import pytest

from progressdb_kms import journal, pause
from progressdb_kms.wire.slab import LAST, SPARES
from tests.conftest import MakeDaemon
from tests.harness import Daemon
from tests.harness.faults import Shim
from tests.harness.procs import wait_until


def lines(daemon: Daemon, words: str) -> list[str]:
    return [line for line in daemon.stderr.splitlines() if words in line]


def create(daemon: Daemon) -> int:
    return daemon.request("POST", "/create_dek_for_thread", {"thread_id": "t"}).status


def test_a_log_that_was_unlinked(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(workers=2)
    assert create(daemon) == 200 and daemon.stderr == ""
    daemon.audit_log.unlink()
    wait_until(lambda: bool(lines(daemon, "not ready: the audit log was unlinked")), 60, "it to be told")
    assert {create(daemon) for _ in range(20)} == {503}
    assert daemon.request("GET", "/readyz").status == 503
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: bool(lines(daemon, "ready again, after ")), 60, "it to be over")
    wait_until(lambda: create(daemon) == 200, 60, "all processes to go on")
    daemon.stop()
    said = [
        line for line in daemon.stderr.splitlines() if " witness: " not in line
    ]  # at the stop, and hourly
    assert len(said) <= 4, "\n".join(said)
    assert [
        sum(words in line for line in said) for words in ("not ready", "SIGHUP: the audit log", "ready again")
    ] == [
        1,
        1,
        1,
    ]
    assert "SIGHUP or a restart" in said[0]


@pytest.mark.parametrize("error", ["EDQUOT", "EROFS"])
def test_a_log_that_takes_nothing_though_there_is_room(make_daemon: MakeDaemon, error: str) -> None:
    """A quota, a file system that became read-only: only a write finds that. All calls were 503, and the
    daemon was ready, by its own account, and the journal silent."""
    with Shim() as shim:
        daemon = make_daemon(workers=2, env=shim.env)
        assert {create(daemon) for _ in range(20)} == {200}
        fault = shim.fail("write", "kms-audit.log", error)
        assert {create(daemon) for _ in range(20)} == {503}
        words = f"not ready: the audit log can't be written ({os.strerror(getattr(errno, error))})"
        wait_until(lambda: bool(lines(daemon, words)), 60, "it to be told")
        reply = daemon.request("GET", "/readyz")
        assert reply.status == 503 and "can't be written" in reply.json()["reasons"][0]
        fault.off()
        wait_until(lambda: bool(lines(daemon, "ready again, after ")), 60, "it to be over, of itself")
        assert {create(daemon) for _ in range(20)} == {200}
        assert daemon.request("GET", "/readyz").status == 200
        daemon.stop()
    assert len(lines(daemon, "ready")) == 2, daemon.stderr
    assert daemon.offline("audit", "verify").returncode == 0


def test_what_to_do_is_told_with_it(make_daemon: MakeDaemon) -> None:
    """Of a store that can't be written, and of a keeper that can't come."""
    with Shim() as shim:
        daemon = make_daemon(workers=1, env=shim.env)
        fault = shim.fail("write", "kms.db", "ENOSPC")
        assert create(daemon) == 503
        wait_until(lambda: bool(lines(daemon, "not ready: the store can't do that now")), 60, "it to be told")
        assert "make room on the file system of the data-dir" in lines(daemon, "not ready: ")[0]
        fault.off()
        wait_until(lambda: bool(lines(daemon, "ready again, after ")), 60, "it to be over")
        soft, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        keeper = daemon.pids()[1]  # the first that is forked
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (8, hard))
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: bool(lines(daemon, "no change can be made")), 60, "it to be told")
        assert "no file can be opened (raise LimitNOFILE=" in lines(daemon, "no change can be made")[0]
        time.sleep(2.5)  # it is tried some times
        assert len(lines(daemon, "no change can be made")) == 1
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (soft, hard))
        wait_until(lambda: create(daemon) == 200, 60, "all to go on")


@pytest.mark.root
def test_a_worker_that_can_not_come_is_told_once(make_daemon: MakeDaemon) -> None:
    """Each try was two lines, for as long as the file was away; and who may not even look ended with a
    traceback."""
    daemon = make_daemon(workers=1)
    assert create(daemon) == 200
    kept = daemon.home / "kept"
    (daemon.data_dir / "kms.db").rename(kept)
    os.kill(daemon.pids()[-1], signal.SIGKILL)
    wait_until(lambda: bool(lines(daemon, "a worker can't come")), 60, "it to be told")
    time.sleep(4)  # it is tried some times
    kept.rename(daemon.data_dir / "kms.db")
    wait_until(lambda: bool(lines(daemon, "all workers are up again, after ")), 60, "it to be over")
    assert create(daemon) == 200
    daemon.stop()
    assert len(lines(daemon, "kms.db is missing")) == 2, daemon.stderr  # where it begins and where it is over
    assert len(lines(daemon, "is replaced")) == 1 and "Traceback" not in daemon.stderr, daemon.stderr


@pytest.mark.root
def test_a_data_dir_that_is_closed_to_the_daemon(make_daemon: MakeDaemon) -> None:
    """By a chown gone wrong. It was told as a lock that was replaced, with the advice to restart the daemon,
    which would not have come again."""
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv")
    uid = 65533
    daemon = make_daemon(
        workers=1, wrapper=["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"], start=False
    )
    for path in (daemon.home, *daemon.home.iterdir()):
        os.chown(path, uid, uid)
    daemon.start()
    assert create(daemon) == 200
    os.chown(daemon.data_dir, 0, 0)
    for pid in daemon.pids()[1:]:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: bool(lines(daemon, "is closed to the daemon")), 60, "it to be told")
    wait_until(lambda: create(daemon) == 503, 60, "callers to hear it")
    os.chown(daemon.data_dir, uid, uid)
    wait_until(lambda: create(daemon) == 200, 60, "all to go on")
    daemon.stop()
    said = daemon.stderr
    assert "restart the daemon" not in said and "Traceback" not in said and "moved away" not in said, said


@pytest.mark.root
def test_a_keeper_without_a_free_descriptor(make_daemon: MakeDaemon) -> None:
    """Each create was a fault of the daemon's, and seven lines of a traceback."""
    daemon = make_daemon(workers=1)
    assert create(daemon) == 200
    keeper = daemon.writer
    soft, hard = resource.prlimit(keeper, resource.RLIMIT_NOFILE)
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, (3, hard))
    for _ in range(5):
        assert create(daemon) in (200, 503)  # 503: how to answer comes with the job, as a descriptor
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: create(daemon) == 200, 60, "all to go on")
    taken = set(map(int, os.listdir(f"/proc/{keeper}/fd")))
    room = [number for number in range(1024) if number not in taken][1]  # for that one alone
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, (room, hard))
    assert create(daemon) == 200
    assert "Traceback" not in daemon.stderr, daemon.stderr


def replaced(daemon: Daemon) -> None:
    """Kill the newest worker, and wait until another is in its place and has lived for some turns."""
    victim = daemon.pids()[-1]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: victim not in daemon.pids() and len(daemon.pids()) == 4, 20, "another worker")
    time.sleep(2)


def test_a_worker_that_comes_while_the_log_is_unlinked(make_daemon: MakeDaemon) -> None:
    """It is up, refuses what can't be recorded, and goes on with the others: none comes and ends for ever."""
    daemon = make_daemon(workers=2)
    assert create(daemon) == 200
    daemon.audit_log.unlink()
    wait_until(lambda: bool(lines(daemon, "not ready: the audit log was unlinked")), 60, "it to be told")
    replaced(daemon)
    assert {create(daemon) for _ in range(20)} == {503}
    assert len(lines(daemon, "is replaced")) == 1 and len(daemon.stderr.splitlines()) == 2
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: bool(lines(daemon, "ready again, after ")), 60, "it to be over")
    wait_until(lambda: {create(daemon) for _ in range(20)} == {200}, 20, "all processes to go on")
    daemon.stop()
    assert daemon.offline("verify").returncode == 0


def test_a_rotation(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(workers=2)
    for _ in range(3):
        create(daemon)
    new = os.urandom(32).hex()
    kek_id = daemon.ok("POST", "/rotate_kek", {"new_kek_hex": new})["kek_id"]
    assert len(lines(daemon, f"a rotation to the KEK {kek_id} begins")) == 1
    assert len(lines(daemon, f"the rotation to the KEK {kek_id} is done: 3 DEKs")) == 1
    assert daemon.request("POST", "/rotate_kek", {"new_kek_hex": new}).status == 409
    assert len(lines(daemon, "failed")) == 1
    assert new not in daemon.stderr


def test_a_file_that_may_not_grow(make_daemon: MakeDaemon) -> None:
    """As a full disk, but for every file: the audit log is the first to be full."""
    wrapper = ["sh", "-c", 'ulimit -f 400; exec "$@"', "sh"]
    daemon = make_daemon({"workers": 2}, wrapper=wrapper)
    with daemon.session() as kms:
        for _ in range(4000):
            if kms.request("GET", "/get_wrapped?key_id=none").status == 503:
                break
        for _ in range(50):
            kms.request("GET", "/get_wrapped?key_id=none")
            kms.request("POST", "/create_dek_for_thread", {"thread_id": "t"})
    wait_until(lambda: bool(lines(daemon, "not ready: ")), 60, "it to be told")
    assert len(lines(daemon, "not ready: ")) <= 2, daemon.stderr  # the store may be full, too
    assert "LimitFSIZE" in lines(daemon, "not ready: ")[0]
    daemon.audit_log.rename(daemon.audit_log.with_name("kms-audit.log.1"))
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: bool(lines(daemon, "ready again")), 60, "it to be over")
    wait_until(lambda: create(daemon) == 200, 60, "it to serve")
    assert len(daemon.stderr.splitlines()) <= 8, daemon.stderr


@pytest.mark.parametrize("mode", ["try", "require"])
def test_memory_that_can_not_be_locked_any_more(make_daemon: MakeDaemon, mode: str) -> None:
    """A limit that was lowered under the daemon, or that others use up: told once, and when it's over."""
    wrapper: list[str] = []
    if os.geteuid() == 0:  # whom no limit holds
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv, to be a root whom limits hold")
        wrapper = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    daemon = make_daemon({"memory_lock": mode}, workers=2, wrapper=wrapper)
    key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]

    def rewrap() -> int:
        kek = os.urandom(32).hex()
        return daemon.request("POST", "/rewrap", {"key_id": key, "new_kek_hex": kek}).status

    def allow(limit: int) -> None:
        for pid in daemon.pids():
            hard = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)[1]
            resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (limit, hard))

    limit = resource.prlimit(daemon.pids()[0], resource.RLIMIT_MEMLOCK)[0]
    allow(0)
    assert {rewrap() for _ in range(5)} == ({200} if mode == "try" else {503})
    assert len(lines(daemon, "no memory can be locked any more")) == 1
    told = "is refused" if mode == "require" else "may be swapped out"
    assert told in lines(daemon, "no memory can be locked")[0]
    allow(limit)
    assert {rewrap() for _ in range(5)} == {200}
    assert len(lines(daemon, "memory can be locked again")) == 1
    assert len(lines(daemon, "be locked")) == 2


def test_no_locked_memory_is_free_for_a_body_in_pieces(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(workers=1)
    body = b'{"dek":"' + b"A" * 60
    head = b"POST /wrap HTTP/1.1\r\nHost: u\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n"
    answers = []
    with contextlib.ExitStack() as held:
        for _ in range(SPARES - LAST + 1 + 5):  # the last few are for others
            peer = held.enter_context(socket.socket(socket.AF_UNIX))
            peer.settimeout(30)
            peer.connect(str(daemon.socket))
            peer.sendall(head + body)
            answers.append(peer)
        wait_until(lambda: len(select.select(answers, [], [], 0.1)[0]) >= 5, 60, "five refusals")
        refused = [peer.recv(100) for peer in select.select(answers, [], [], 0)[0]]
        assert [reply.split(b" ")[1] for reply in refused] == [b"503"] * 5
        assert len(lines(daemon, "no locked memory is free")) == 1
    assert daemon.request("GET", "/healthz").status == 200


def test_what_is_scarce_is_told_once_and_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    scarcity = journal.Scarcity("none is left")
    with caplog.at_level(logging.INFO):
        for second in range(1000):
            if 100 <= second < 400 and second % 30 == 0:
                scarcity.refused(float(second))
            scarcity.look(float(second))
    assert [record.getMessage() for record in caplog.records] == [
        "none is left: such calls are refused",
        "over: none is left (10 calls were refused)",
    ]


def test_a_shred_beside_a_reader(make_daemon: MakeDaemon) -> None:
    """Exit 1, since a copy remains; but it says that the DEK is shredded, and what happens next."""
    daemon = make_daemon(workers=2)
    key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
    with closing(sqlite3.connect(daemon.data_dir / "kms.db")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM deks").fetchall()
        done = daemon.cli("shred", key, "--now")
        assert done.returncode == 1
        said = done.stderr.decode()
        assert f"the key {key} is shredded" in said and "copy" in said and "remains" in said
        assert "it is tried again by itself, after 5 s, and with growing pauses at least every 60 s" in said
        assert daemon.request("GET", f"/get_wrapped?key_id={key}").status == 410
        assert len(lines(daemon, "copies of shredded DEKs remain")) == 1
    wait_until(lambda: daemon.ok("GET", "/status")["erasures_due"] == 0, 60, "the copy to go")
    assert len(lines(daemon, "over: copies of shredded DEKs remain")) == 1


def test_a_shred_that_is_due_for_long_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    overdue = journal.Overdue()
    with caplog.at_level(logging.WARNING):
        for second in range(200):
            now[0] = 100.0 + second
            overdue.tell({"a": b"", "b": b""} if second < 120 else {"c": b""}, "it is read")
    assert [record.getMessage() for record in caplog.records] == [
        "2 shreds are still due after 60 s: a, b (it is read)",
        "1 shred is still due after 60 s: c (it is read)",
    ]


def test_a_reason_that_comes_and_goes_beside_another_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    outage = journal.Matter("not ready: %s", "ready again")
    with caplog.at_level(logging.INFO):
        for second in range(50):
            outage.tell("the log is full", "the store is full" if second % 2 else "")
        outage.tell()
        outage.tell("the store is full")
    assert [record.getMessage() for record in caplog.records] == [
        "not ready: the log is full",
        "not ready: the log is full; the store is full",
        "ready again, after 0 s: the log is full; the store is full",
        "not ready: the store is full",
    ]


def test_a_reason_with_another_number_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    outage = journal.Matter("not ready: %s", "ready again")
    with caplog.at_level(logging.INFO):
        for free in range(50):
            outage.tell(f"only {free} bytes are free")
        outage.tell("only 1 bytes are free", "the store is cut")
        outage.tell()
        outage.tell("")
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0].split(",")[0] for line in said] == ["not ready", "not ready", "ready again"]


def test_reasons_without_end_are_not_all_remembered(caplog: pytest.LogCaptureFixture) -> None:
    """As where each try fails at another file."""
    matter = journal.Matter("it fails: %s", "over")
    with caplog.at_level(logging.INFO):
        for number in range(0x100, 0x200):
            matter.tell("at file " + f"{number:b}".translate({48: "o", 49: "l"}), "at all files")
        matter.tell()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 257
    assert said[-1].count("; ") == journal.REMEMBERED - 1 and "at all files" in said[-1]
    assert "at file lllllllll" in said[-1]


def test_work_beside_the_jobs_fails_and_works_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A line where it begins, one where it is over, and pauses that grow between; another error is news."""
    now = [100.0]
    monkeypatch.setattr(pause.time, "monotonic", lambda: now[0])
    chore, tries = journal.Chore("it can't be done", (1.0, 8.0)), []

    def fail() -> None:
        tries.append(now[0] - 100.0)
        raise OSError("the disk is full" if now[0] < 150.0 else "the disk is gone")

    with caplog.at_level(logging.INFO):
        for _ in range(100):
            assert not chore.over() or not chore.attend(fail)
            now[0] += 1.0
        assert "gone" in chore.why
        assert chore.attend(lambda: None) and chore.attend(lambda: None)
        assert chore.over() and not chore.why
    assert tries[:6] == [0.0, 1.0, 3.0, 7.0, 15.0, 23.0]
    assert [record.getMessage() for record in caplog.records] == [
        "it can't be done: the disk is full; it is tried again",
        "it can't be done: the disk is gone; it is tried again",
        "over: it can't be done, after 100 s: the disk is gone; the disk is full",
    ]
    with pytest.raises(ValueError):
        chore.attend(lambda: int(""))  # nobody foresaw that: it is no failure of the disk's
