"""Several workers as one service: what one of them changed holds in all before its answer leaves."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from progressdb_kms.crypto.keyring import fingerprint
from tests.conftest import MakeDaemon
from tests.harness import Daemon, Session
from tests.harness.kept import Kept
from tests.harness.load import Load, hammer
from tests.harness.procs import wait_until

TEXT = base64.b64encode(b"hello").decode()
SPREAD = 12
"""Connections: enough that each of two workers has several."""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(workers=2) as running:
        yield running


@pytest.fixture
def everywhere(daemon: Daemon) -> Iterator[list[Session]]:
    """Open connections to both workers. One that has no processor for so long gets none of them: again."""
    until = time.monotonic() + 60.0
    while True:
        with ExitStack() as stack:
            sessions = [stack.enter_context(daemon.session()) for _ in range(SPREAD)]
            if len(chains(sessions)) == 2 or time.monotonic() > until:
                yield sessions
                return


def chains(sessions: list[Session]) -> set[str]:
    """Each worker writes one of the audit log's."""
    return {s.request("GET", "/deks").headers["X-KMS-Audit"].split(":")[0] for s in sessions}


def statuses(sessions: list[Session], key: str) -> set[int]:
    fields = {"key_id": key, "plaintext": TEXT}
    return {session.request("POST", "/encrypt", fields).status for session in sessions}


def test_the_connections_are_shared(everywhere: list[Session]) -> None:
    assert len(chains(everywhere)) == 2


def test_no_two_requests_have_one_id(daemon: Daemon, everywhere: list[Session]) -> None:
    """Both workers had begun to count from the same one."""
    key = everywhere[0].create_dek("t")["key_id"]
    assert statuses(everywhere, key) == {200}
    events = [json.loads(line)["event"] for line in daemon.audit_log.read_bytes().splitlines()]
    found = [event["request_id"] for event in events if "request_id" in event]
    assert len(found) > SPREAD and len(set(found)) == len(found)


def test_a_change_holds_everywhere_before_its_answer(everywhere: list[Session]) -> None:
    first = everywhere[0]
    for turn in range(10):
        key = first.create_dek("t")["key_id"]
        assert statuses(everywhere, key) == {200}
        changer = everywhere[turn % SPREAD]
        changer.ok("POST", f"/deks/{key}/disable")
        assert statuses(everywhere, key) == {423}
        changer.ok("POST", f"/deks/{key}/enable")
        assert statuses(everywhere, key) == {200}
        changer.ok("DELETE", f"/deks/{key}", {"immediately": True})
        assert statuses(everywhere, key) == {410}


@pytest.mark.parametrize("how", ["rotate", "rewrap"])
def test_keys_move_while_all_are_at_work(daemon: Daemon, everywhere: list[Session], how: str) -> None:
    """No call fails meanwhile, and what any worker says after the answer is the new state."""
    kept = Kept()
    keys = kept.create(everywhere[0], 20)

    def work(session: Session, number: int) -> str:
        key = keys[number % len(keys)]
        assert session.decrypt(key, kept.sealed[key]).startswith(b"message")
        session.encrypt(key, b"x")
        return key

    with Load(daemon.socket, work, threads=8) as load:
        load.wait_for(50)
        for turn in range(5):
            changer = everywhere[turn % SPREAD]
            new = os.urandom(32)
            if how == "rotate":
                kek_id = changer.rotate(new)["kek_id"]
                moved = keys
            else:
                moved = [keys[turn]]
                kek_id = changer.ok("POST", "/rewrap", {"key_id": moved[0], "new_kek_hex": new.hex()})[
                    "kek_id"
                ]
            for session in everywhere:
                assert {session.get_wrapped(key)["kek_id"] for key in moved} == {kek_id}
        load.wait_for(len(load.results) + 50)
    assert not load.errors
    for session in everywhere:
        kept.opens(session)


def test_two_rotations_at_once(daemon: Daemon) -> None:
    """One is carried out, the other hears that it is under way."""
    hammer(daemon.socket, lambda kms, number: kms.create_dek("t"), count=1500, threads=16)
    together = threading.Barrier(2)
    replies: list[tuple[int, str]] = []

    def rotate() -> None:
        together.wait(10)
        reply = daemon.request("POST", "/rotate_kek", {"new_kek_hex": os.urandom(32).hex()})
        replies.append((reply.status, reply.code))

    threads = [threading.Thread(target=rotate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(replies) == [(200, ""), (409, "rotation_in_progress")]
    assert daemon.ok("GET", "/status")["kek_version"] == "2"


def test_the_progress_of_a_rotation(daemon: Daemon) -> None:
    """`/status` of any worker tells how far it is, and nothing of it afterwards."""
    hammer(daemon.socket, lambda kms, number: kms.create_dek("t"), count=1500, threads=16)
    new = os.urandom(32)
    with daemon.session() as asking, ThreadPoolExecutor(1) as pool, daemon.session() as changer:
        assert asking.ok("GET", "/status")["rotation"] is None
        rotated = pool.submit(changer.rotate, new)
        seen = []
        while not rotated.done():
            if (rotation := asking.ok("GET", "/status")["rotation"]) is not None:
                seen.append(rotation)
        assert rotated.result()["rewrapped"] == 1500
        assert asking.ok("GET", "/status")["rotation"] is None
    assert {(row["total"], row["new_kek_id"]) for row in seen} == {(1500, fingerprint(memoryview(new)))}
    done = [row["done"] for row in seen]
    assert done == sorted(done) and len(set(done)) > 5 and done[-1] <= 1500
    phases = list(dict.fromkeys(row["phase"] for row in seen))
    order = ["rewrapping", "comparing", "syncing", "swapping"]
    assert phases[0] == "rewrapping" and phases == [phase for phase in order if phase in phases]


def test_a_shred_while_all_are_at_work(daemon: Daemon, everywhere: list[Session]) -> None:
    key = everywhere[0].create_dek("t")["key_id"]
    shredded = threading.Event()
    late: list[int] = []

    def work(session: Session, number: int) -> None:
        began_after = shredded.is_set()
        status = session.request("POST", "/encrypt", {"key_id": key, "plaintext": TEXT}).status
        assert status in (200, 410)
        if began_after:
            late.append(status)

    with Load(daemon.socket, work, threads=8) as load:
        load.wait_for(50)
        everywhere[0].ok("DELETE", f"/deks/{key}", {"immediately": True})
        shredded.set()
        load.wait_for(len(load.results) + 100)
    assert not load.errors and set(late) == {410}


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone sees which process has the store open")
def test_a_killed_worker_costs_its_own_connections_only(daemon: Daemon, everywhere: list[Session]) -> None:
    key = everywhere[0].create_dek("t")["key_id"]
    chains = [s.request("GET", f"/deks/{key}").headers["X-KMS-Audit"].split(":")[0] for s in everywhere]
    workers = [pid for pid in daemon.pids() if pid not in (daemon.pid, daemon.writer)]
    os.kill(workers[0], signal.SIGKILL)
    lost = []
    for session, chain in zip(everywhere, chains):
        try:
            assert session.request("POST", "/encrypt", {"key_id": key, "plaintext": TEXT}).status == 200
        except OSError:
            lost.append(chain)
    assert lost == [chain for chain in chains if chain in lost[:1]]  # all those of one worker
    wait_until(lambda: len(daemon.pids()) == 4, 20, "a new worker")

    def all_wrote() -> bool:
        assert daemon.request("POST", "/encrypt", {"key_id": key, "plaintext": TEXT}).status == 200
        return len({line.split(b'"')[5] for line in daemon.audit_log.read_bytes().splitlines()}) >= 4

    wait_until(all_wrote, 20, "a chain of the keeper, two workers and the new one")
    daemon.stop()
    assert daemon.offline("audit", "verify").returncode == 0


HANGS = """
import os, sys, time
from progressdb_kms.service import start
real = start.open_keeper
def hangs(data_dir, *args):
    while args[-1] and os.path.exists(data_dir.parent / "hang"):
        time.sleep(0.05)
    return real(data_dir, *args)
start.open_keeper = hangs
from progressdb_kms.__main__ import main
sys.exit(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone sees which process has the store open")
def test_a_keeper_that_hangs_when_it_comes_again_holds_up_nobody_else(make_daemon: MakeDaemon) -> None:
    """The supervisor waited for it: no worker was replaced then, no caller answered, no SIGTERM heard."""
    daemon = make_daemon(workers=2, command=[sys.executable, "-c", HANGS])
    (daemon.home / "hang").touch()
    with daemon.session() as kms:
        key = kms.create_dek("t")["key_id"]
        keeper, before = daemon.writer, daemon.pids()
        os.kill(keeper, signal.SIGKILL)
        reply = kms.request("POST", "/deks", {"thread_id": "t"})
        assert reply.status == 503 and b"starting" in reply.body
        worker = max(pid for pid in before if pid not in (keeper, daemon.process and daemon.process.pid))
        os.kill(worker, signal.SIGKILL)
    wait_until(lambda: len(daemon.pids()) == 4 and worker not in daemon.pids(), 60, "another worker")
    body = {
        "key_id": key,
        "plaintext": TEXT,
    }  # the worker that was there before serves; the new one must wait
    wait_until(lambda: daemon.request("POST", "/encrypt", body).status == 200, 60, "an answer")
    (daemon.home / "hang").unlink()

    def made() -> bool:
        """The worker that came meanwhile asks the keeper for its place again, now and then."""
        return daemon.request("POST", "/deks", {"thread_id": "t"}).status == 201

    wait_until(lambda: all(made() for _ in range(10)), 60, "a new keeper")


IMPATIENT = """
import sys
from progressdb_kms.process import supervisor
supervisor.DRAIN_SECONDS = -3.0
from progressdb_kms.__main__ import main
sys.exit(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone sees which process has the store open")
def test_a_keeper_that_does_not_end_is_told_once(make_daemon: MakeDaemon) -> None:
    """It was killed at the end of a stop that took most of a minute, and the journal had no word of it."""
    daemon = make_daemon(workers=1, command=[sys.executable, "-c", IMPATIENT])
    keeper = daemon.writer
    os.kill(keeper, signal.SIGSTOP)
    daemon.stop()
    assert daemon.stderr.count(f"pid {keeper}: no end within 2 s, it hangs, or its disk: it is killed") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone sees which process has the store open")
def test_a_keeper_that_dies_while_all_end_leaves_nobody_waiting(make_daemon: MakeDaemon) -> None:
    """Its workers waited for it until they were killed, and who had asked for a change heard nothing."""
    daemon = make_daemon(workers=2)
    with daemon.session() as kms:
        kms.create_dek("t")
        keeper = daemon.writer
        os.kill(keeper, signal.SIGSTOP)  # so that the job waits for it
        kms.begin("POST", "/deks", {"thread_id": "t"})
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: not daemon.socket.exists(), 60, "the end's begin")
        os.kill(keeper, signal.SIGKILL)
        reply = kms.reply()
        assert reply.status == 503 and b"the keeper process ended" in reply.body
    daemon.wait()
    assert "were cut" not in daemon.stderr
    daemon.start().stop()
    assert daemon.offline("audit", "verify").returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone sees which process has the store open")
def test_a_killed_keeper_is_replaced(daemon: Daemon) -> None:
    kept = Kept()
    with daemon.session() as kms:
        kept.create(kms, 5)
        keeper = daemon.writer
        os.kill(keeper, signal.SIGKILL)
        kept.opens(kms)  # reading needs no keeper
        wait_until(lambda: kms.request("GET", "/readyz").status == 200, 20, "a new keeper")
        kept.create(kms, 5)
        kms.rotate(os.urandom(32))
        kept.opens(kms)
        assert daemon.writer != keeper
