"""The audit log under several processes: a full disk, a file size limit, rotation, removal, sudden death.

What every test holds on to: a receipt that was given out is in the log, and the log verifies.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.audit.chain import Report
from progressdb_kms.audit.log import ROOM, AuditLog, parse
from progressdb_kms.audit.tail import recover
from progressdb_kms.errors import AuditUnavailable
from tests.harness import REPO
from tests.harness.auditlogs import KEY, Anchors, check, encrypt
from tests.harness.faults import Tmpfs

PATIENCE = 20.0  # seconds


class Appender:
    """One process that appends until it is told to stop."""

    def __init__(self, path: Path, chain: str, limit: int, pause: float) -> None:
        words = [sys.executable, "-m", "tests.harness.auditlogs", str(path), chain, str(limit), str(pause)]
        self.process = subprocess.Popen(
            words, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.receipts: list[str] = []
        self.refusals: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("!"):
                self.refusals.append(line)
            elif line.endswith("\n"):
                self.receipts.append(line)

    def wait(self, *, receipts: int = 0, refusals: int = 0) -> None:
        """Until so many more have come."""
        receipts += len(self.receipts) if receipts else 0
        refusals += len(self.refusals) if refusals else 0
        end = time.monotonic() + PATIENCE
        while len(self.receipts) < receipts or len(self.refusals) < refusals:
            assert time.monotonic() < end, f"{len(self.receipts)} receipts, {self.refusals[-3:]}"
            assert self.process.poll() is None
            time.sleep(0.005)

    def end(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def appending(
    path: Path, count: int, limit: int = 0, pause: float = 0.0, kill: bool = False
) -> Iterator[list[Appender]]:
    crowd = [Appender(path, f"1.{number}", limit, pause) for number in range(count)]
    try:
        yield crowd
    finally:
        for one in crowd:
            one.end(kill)


def receipts_of(crowd: list[Appender]) -> list[str]:
    return [receipt for one in crowd for receipt in one.receipts]


def anchors_of(files: list[Path], crowd: list[Appender]) -> Anchors:
    """The last receipts' lines, as the store would have them."""
    wanted = {one.receipts[-1].strip().rpartition(":")[0] for one in crowd if one.receipts}
    found: Anchors = {}
    for file in files:
        for line in file.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                event = parse(line[max(0, line.rfind(b'{"event":')) :])
                if f"{event['chain']}:{event['seq']}" in wanted:
                    found[event["chain"]] = (event["seq"], event["sig"])
    return found


def verified(files: list[Path], crowd: list[Appender]) -> Report:
    receipts = receipts_of(crowd)
    report = check(files, anchors_of(files, crowd), receipts=receipts)
    assert report.fault is None, str(report.fault)
    assert report.receipts == len(receipts) > 0
    return report


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kms-audit.log"


def test_several_processes_append_to_one_file(path: Path) -> None:
    with appending(path, 4) as crowd:
        for one in crowd:
            one.wait(receipts=300)
    report = verified([path], crowd)
    assert {chain: last for chain, (_, last) in report.chains.items()} == {
        f"1.{n}": len(one.receipts) for n, one in enumerate(crowd)
    }


@pytest.mark.root
def test_a_full_disk_gives_no_receipts_and_is_repaired() -> None:
    with Tmpfs(16 << 20) as disk:
        path = disk.path / "kms-audit.log"
        with appending(path, 3, pause=0.001) as crowd:
            for _ in range(4):
                for one in crowd:
                    one.wait(receipts=30)
                disk.fill(leave=64 << 10)  # the appenders take the rest, while this is going on
                for one in crowd:
                    one.wait(refusals=5)
                disk.drain()
            for one in crowd:
                one.wait(receipts=10)
        assert any("took only" in words for one in crowd for words in one.refusals)
        assert verified([path], crowd).recoveries > 0


@pytest.mark.root
def test_a_disk_that_fills_at_any_byte_is_repaired() -> None:
    """One process, the disk full from page to page: the tears come at all places of a record."""
    with Tmpfs(1 << 20) as disk:
        path = disk.path / "kms-audit.log"
        log = AuditLog(path, KEY, "1.0")
        receipts: list[str] = []
        for number in range(60):
            receipts.append(log.note("start", padding="x" * (number * 53 % 400)))
            disk.fill()
            with contextlib.suppress(AuditUnavailable):
                while True:
                    receipts.append(encrypt(log, number))
            with pytest.raises(AuditUnavailable, match="bytes are free|No space"):
                log.check()
            assert log.reasons()
            disk.drain()
            assert log.reasons() == []
        report = check(path, {"1.0": log.head[1:]}, receipts=receipts)
        assert report.fault is None, str(report.fault)
        assert report.recoveries > 50


@pytest.mark.root
def test_a_start_on_a_full_disk_waits_for_room() -> None:
    with Tmpfs(1 << 20) as disk:
        path = disk.path / "kms-audit.log"
        dead = AuditLog(path, KEY, "1.0")
        disk.fill(leave=4096)
        with contextlib.suppress(AuditUnavailable):
            while True:
                encrypt(dead)
        os.close(dead._fd)
        log = AuditLog(path, KEY, "2.0")
        with pytest.raises(AuditUnavailable):
            recover(log)
        disk.drain()
        encrypt(log)
        report = check(path, {"2.0": log.head[1:]})
        assert report.fault is None, str(report.fault)
        assert report.recoveries == 1


def test_a_file_size_limit_stops_the_log_until_it_is_rotated(path: Path) -> None:
    """Everywhere, without root: the kernel makes the write short, then refuses it (EFBIG)."""
    with appending(path, 3, limit=200_000, pause=0.002) as crowd:
        for one in crowd:
            one.wait(refusals=5)
        assert path.stat().st_size == 200_000
        old = path.rename(path.with_name("kms-audit.log.1"))
        for one in crowd:
            one.wait(receipts=5)
    report = verified([old, path], crowd)
    assert report.recoveries == 1


def test_check_tells_of_a_file_size_limit_beforehand(path: Path) -> None:
    log = AuditLog(path, KEY, "1.0")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM - 1, before[1]))
    try:
        with pytest.raises(AuditUnavailable, match="files may have 65535 bytes") as caught:
            log.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "LimitFSIZE" in caught.value.hint
    log.check()


def test_rotation_loses_nothing(path: Path) -> None:
    files = []
    with appending(path, 3) as crowd:
        for number in range(8):
            for one in crowd:
                one.wait(receipts=20)
            files.append(path.rename(path.with_name(f"kms-audit.log.{number}")))
            end = time.monotonic() + PATIENCE
            while not path.exists():
                assert time.monotonic() < end
                time.sleep(0.001)
        for one in crowd:
            one.wait(receipts=20)
    verified([*files, path], crowd)
    assert not any(one.refusals for one in crowd)


def test_removal_stops_every_process(path: Path) -> None:
    with appending(path, 3) as crowd:
        for one in crowd:
            one.wait(receipts=20)
        path.unlink()
        for one in crowd:
            one.wait(refusals=3)
            assert "unlinked" in one.refusals[-1]
        given = [len(one.receipts) for one in crowd]
        for one in crowd:
            one.wait(refusals=20)
        assert [len(one.receipts) for one in crowd] == given
    assert not path.exists()


def test_a_cut_in_place_stops_every_process(path: Path) -> None:
    with appending(path, 2) as crowd:
        for one in crowd:
            one.wait(receipts=50)
        os.truncate(path, 100)
        for one in crowd:
            one.wait(refusals=3)
            assert "cut shorter" in one.refusals[-1]


@pytest.mark.parametrize("turn", range(3))
def test_receipts_survive_sudden_death(path: Path, turn: int) -> None:
    with appending(path, 3, kill=True) as crowd:
        for one in crowd:
            one.wait(receipts=50)
    log = AuditLog(path, KEY, "2.0")
    recover(log)
    anchors = anchors_of([path], crowd)
    log.note("start", previous={chain: list(head) for chain, head in anchors.items()})
    verified([path], crowd)


def test_death_in_a_torn_state_is_recovered_at_the_start(path: Path) -> None:
    """Killed while the file could not grow: one torn record at its end, from nobody knows whom."""
    with appending(path, 3, limit=200_000, kill=True) as crowd:
        for one in crowd:
            one.wait(refusals=5)
    log = AuditLog(path, KEY, "2.0")
    assert recover(log) in (0, 1)
    log.note("start", previous={})
    verified([path], crowd)
