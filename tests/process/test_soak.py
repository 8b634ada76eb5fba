"""All at once, for as long as is asked: callers, rotations, shreds, renamed logs, killed processes.

What must hold at the end: every acknowledged DEK opens what was sealed under it, every shred stays one, both
verifies are clean, and nothing has grown: open files, threads, memory, what lies in the data-dir.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import pytest

from tests.harness import Daemon, Session
from tests.harness.procs import rss_kib, status, wait_until
from tests.harness.wire import UnexpectedReply

CALLERS = 6
LIVING = 400
"""DEKs that each caller keeps; for each one more, one is shredded."""

WHAT = ("rotations", "deaths", "logs", "backups")

GONE = (OSError, EOFError, http.client.HTTPException)
"""What a caller sees of a process that is killed."""


class Size(NamedTuple):
    """What a leak would show in, of all processes."""

    open_files: int
    threads: int
    resident_kib: int

    @classmethod
    def of(cls, daemon: Daemon) -> Size:
        while True:
            pids = daemon.pids()
            with contextlib.suppress(FileNotFoundError, ValueError):  # one of them was soon over
                return cls(
                    sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
                    sum(int(status(pid, "Threads")) for pid in pids),
                    sum(rss_kib(pid) for pid in pids),
                )


class Caller:
    """One thread with DEKs of its own. `faults`: answers that nothing excuses."""

    def __init__(self, soak: Soak, number: int) -> None:
        self.soak = soak
        self.random = random.Random(number)
        self.sealed: dict[str, tuple[bytes, bytes]] = {}
        self.shredded: list[str] = []
        self.thread = threading.Thread(target=self.run, name=f"caller {number}")

    def run(self) -> None:
        with self.soak.daemon.session() as kms:
            while not self.soak.over.is_set():
                try:
                    self.call(kms)
                    self.soak.done["calls"] += 1
                except GONE:
                    kms.close()
                    self.soak.done["cut calls"] += 1
                    time.sleep(0.2)
                except UnexpectedReply as unexpected:
                    if unexpected.reply.status != 503:  # a keeper that is being replaced
                        self.soak.faults.append(str(unexpected))
                    self.soak.done["503"] += 1
                    time.sleep(0.05)
                time.sleep(0.002)

    def call(self, kms: Session) -> None:
        if len(self.sealed) >= LIVING:
            self.shred(kms)
        elif not self.sealed or self.random.random() < 0.1:
            key_id, text = kms.create_dek("t")["key_id"], os.urandom(self.random.randrange(300))
            self.sealed[key_id] = kms.encrypt(key_id, text), text
        else:
            key_id, (sealed, text) = self.random.choice(list(self.sealed.items()))
            if kms.decrypt(key_id, sealed) != text:
                self.soak.faults.append(f"{key_id} opened to something else")

    def shred(self, kms: Session) -> None:
        """Out of `sealed` before it is asked for: without an answer it may be done or not."""
        key_id = self.random.choice(list(self.sealed))
        del self.sealed[key_id]
        kms.ok("DELETE", f"/deks/{key_id}", {"immediately": True})
        self.shredded.append(key_id)
        self.soak.done["shreds"] += 1

    def finds_all(self, kms: Session) -> None:
        for key_id, (sealed, text) in self.sealed.items():
            assert kms.decrypt(key_id, sealed) == text
        for key_id in self.shredded:
            assert kms.request("GET", f"/get_wrapped?key_id={key_id}").status == 410


class Soak:
    def __init__(self, daemon: Daemon, seconds: float) -> None:
        self.daemon, self.seconds = daemon, seconds
        self.over = threading.Event()
        self.living = threading.Lock()  # held by whoever needs the daemon to be there, or not
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []
        self.logs: list[Path] = []
        self.callers = [Caller(self, number) for number in range(CALLERS)]

    def run(self) -> None:
        threads = [caller.thread for caller in self.callers]
        for what in (self.changes, self.deaths):
            threads.append(threading.Thread(target=self.tell, args=(what,)))
        for thread in threads:
            thread.start()
        time.sleep(self.seconds / 4)
        with self.living:
            early = Size.of(self.daemon)
        time.sleep(self.seconds * 3 / 4)
        wait_until(
            lambda: all(self.done[name] for name in WHAT) or bool(self.faults), 90, f"one each of {WHAT}"
        )
        self.over.set()
        print(dict(self.done))
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), f"{thread.name} hangs"
        assert self.faults == [], "\n".join(self.faults)
        self.has_not_grown(early)

    def tell(self, what: Callable[[], None]) -> None:
        try:
            what()
        except BaseException as error:
            self.faults.append(f"{what.__name__}: {error!r}")

    # ---- what happens ------------------------------------------------------------------------------

    def changes(self) -> None:
        chance = random.Random(1)
        for turn in range(1 << 30):
            for change in (self.rotate, self.rename_the_log, self.back_up, self.prune):
                if self.over.wait(chance.random() * min(4, self.seconds / 20)):
                    return
                change()
            self.done["turns"] = turn + 1

    def rotate(self) -> None:
        """By the command, whose key files lead on from wherever it was killed. Where the machine is so busy
        that a rotation takes longer than anybody lives, the deaths wait from the sixth try on."""
        words = ["rotate-kek", "--config", str(self.daemon.config_file), "--generate"]
        for tries in range(40):
            with self.living if tries > 5 else contextlib.nullcontext():
                done = self.daemon.cli(*words)
            if not done.returncode:
                self.done["rotations"] += 1
                self.done["killed rotations"] += tries
                return
            assert done.returncode == 1, done.stderr
            words[-1] = "--resume"
            time.sleep(0.5)
        raise AssertionError(f"no rotation can be ended: {done.stderr!r}")

    def rename_the_log(self) -> None:
        with self.living:
            self.logs.append(self.daemon.audit_log.rename(f"{self.daemon.audit_log}.{len(self.logs)}"))
            self.daemon.signal(signal.SIGHUP)
            wait_until(self.daemon.audit_log.exists, 20, "the new log")
        self.done["logs"] += 1

    def back_up(self) -> None:
        target = self.daemon.home / "backup"
        target.unlink(missing_ok=True)
        done = self.daemon.offline("backup", str(target))
        assert done.returncode == 0, done.stderr
        self.done["backups"] += 1

    def prune(self) -> None:
        done = self.daemon.offline("backups", "prune", "--keep", "2")
        assert done.returncode == 0, done.stderr
        for old in sorted(self.daemon.home.glob("kek.old-*"), key=os.path.getmtime)[:-3]:
            old.unlink()

    def deaths(self) -> None:
        """Of a worker, of the keeper, or of the whole daemon."""
        chance = random.Random(2)
        while not self.over.wait((0.5 + chance.random()) * min(6, self.seconds / 10)):
            with self.living:
                children = self.daemon.pids()[1:]
                if chance.random() < 0.8:
                    victim = chance.choice(children)
                    with contextlib.suppress(ProcessLookupError):  # who reads the configuration soon ends
                        os.kill(victim, signal.SIGKILL)
                    wait_until(lambda: self.is_whole(victim), 40, "another process")  # noqa: B023
                else:
                    self.daemon.kill()
                    self.daemon.start()
            self.done["deaths"] += 1

    def is_whole(self, victim: int) -> bool:
        """A keeper and its workers; a child that reads the configuration may be there for a moment."""
        pids = self.daemon.pids()[1:]
        return victim not in pids and len(pids) > self.daemon.config["workers"]

    # ---- what must hold ----------------------------------------------------------------------------

    def has_not_grown(self, early: Size) -> None:
        """Some files and threads come and go; a leak of one a turn is more than these."""
        wait_until(lambda: Size.of(self.daemon).threads <= early.threads + 4, 30, "idle threads to end")
        late = Size.of(self.daemon)
        print(f"{early}\n{late}")
        assert late.open_files <= early.open_files + 12
        assert late.resident_kib <= early.resident_kib + (32 << 10)
        left = [path for path in self.daemon.data_dir.rglob("*") if "part" in path.name or "tmp" in path.name]
        assert left == []
        root = self.daemon.data_dir / "kms-deks-backup"
        few = "what killed rotations left to be tidied up"
        wait_until(lambda: sum(path.is_dir() for path in root.glob("*")) <= 4, 60, few)

    def verify(self) -> None:
        with self.daemon.session() as kms:
            for caller in self.callers:
                caller.finds_all(kms)
        self.daemon.stop()
        done = self.daemon.offline("verify")
        assert done.returncode == 0, done.stderr
        done = self.daemon.offline("audit", "verify", *map(str, self.logs), str(self.daemon.audit_log))
        assert done.returncode == 0, done.stdout
        print(done.stdout.decode())


@pytest.mark.root
@pytest.mark.long
@pytest.mark.parametrize(("workers", "seconds"), [(2, 12), (1, 300), (2, 1200)])
def test_all_at_once(workers: int, seconds: int) -> None:
    with Daemon(workers=workers) as daemon:
        soak = Soak(daemon, seconds)
        soak.run()
        soak.verify()
