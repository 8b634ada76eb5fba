"""A log that several processes read is told as by one: each fault, each record, each count, each byte."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest

from progressdb_kms.audit import chain as auditchain
from progressdb_kms.audit import loose as auditloose
from progressdb_kms.audit import shared
from progressdb_kms.audit import verify as auditverify
from progressdb_kms.audit.chain import Report
from progressdb_kms.audit.log import AuditLog, fragment, key_fragment, peer_fragment
from progressdb_kms.audit.shared import HelperGone, Shared
from progressdb_kms.audit.tail import in_order
from progressdb_kms.audit.verify import Reading, verify
from progressdb_kms.config import load
from progressdb_kms.crypto.memory import LockedBuffer
from progressdb_kms.errors import AuditUnavailable
from progressdb_kms.service import ownkeys
from progressdb_kms.tools import auditcmd, auditsearch, datadir
from progressdb_kms.tools.auditcounts import Counts
from progressdb_kms.tools.auditsearch import Hits, Query
from progressdb_kms.tools.console import Progress
from tests.harness import Daemon
from tests.harness.auditlogs import KEY, OTHER_KEY, Anchors, Clock, tearing

BLOCK = 1000
LONGEST = 3 * BLOCK

Lines = list[bytes]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of some twelve lines, of which one in four hundred characters crosses a border."""
    monkeypatch.setattr(auditverify, "BLOCK", BLOCK)
    monkeypatch.setattr(shared, "PIECE", 4 * BLOCK)
    monkeypatch.setattr(shared, "LEAST", 0)
    for module in (auditverify, auditloose):
        monkeypatch.setattr(module, "LONGEST", LONGEST)


def written(path: Path, rounds: int = 40, starts: int = 3) -> tuple[Lines, Anchors]:
    """Runs of a daemon of three processes: starts that name the heads before them, shreds, batches, and torn
    records that a recovery names."""
    chance, clock, heads = random.Random(5), Clock(), {}
    for start in range(1, starts + 1):
        logs = [AuditLog(path, KEY, f"{start}.{place}", clock) for place in range(3)]
        previous = {name: list(head) for name, head in heads.items()}
        logs[0].note("start", previous=previous)
        for number in range(rounds):
            log = chance.choice(logs)
            if number == rounds // 2:
                with tearing(chance.randrange(1, 300)), pytest.raises(AuditUnavailable):
                    log.record("encrypt", "ok", 200, key_fragment("k_torn", "t"))
            elif number % 13 == 7:
                log.record("shred", "ok", 200, key_fragment(f"k_{number}", "gone"), peer_fragment(0, 0, 1))
            elif number % 11 == 5:
                log.record("decrypt_batch", "ok", 200, fragment(count=2, failed=1, keys=["k_1", "k_2"]))
            else:
                who, key_id = peer_fragment(chance.randrange(3), 0, 1), f"k_{chance.randrange(9)}"
                log.record("encrypt", chance.choice(("ok", "failed")), 200, key_fragment(key_id, "t{"), who)
        heads.update({log.chain: log.head[1:] for log in logs})
        for log in logs:
            log.close()
    return path.read_bytes().splitlines(keepends=True), heads


class Both:
    """Searches and counts in one pass."""

    def __init__(self, query: Query, key: memoryview | None, show: Callable[[], Any]) -> None:
        self.parts: tuple[Any, ...] = (Hits(query, key, show()), Counts())

    def __call__(self, block: bytes, verified: bool) -> None:
        for part in self.parts:
            part(block, verified)

    def apart(self) -> None:
        for part in self.parts:
            part.apart()

    def piece(self) -> Any:
        return [part.piece() for part in self.parts]

    def told_of(self, found: Any) -> None:
        for part, one in zip(self.parts, found):
            part.told_of(one)

    def rest(self) -> Any:
        return [part.rest() for part in self.parts]

    def add(self, rest: Any) -> None:
        for part, one in zip(self.parts, rest):
            part.add(one)


SHOWN: dict[str, Callable[[], Any]] = {
    "json": lambda: auditsearch.as_json,
    "csv": auditsearch.as_csv,
    "table": auditsearch.as_table,
}


def told(
    paths: list[Path],
    anchors: Anchors,
    processes: int,
    *,
    key: memoryview | None = KEY,
    form: str = "json",
    query: Query = Query(),  # noqa: B008  # a tuple
    observed: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Everything that can be said of a log."""
    seen: list[tuple[int, int]] = []
    reading: Any = partial(Shared, processes=processes) if processes else Reading
    with contextlib.redirect_stdout(io.StringIO()) as out:
        both = Both(query, key, SHOWN[form]) if observed else None
        if key is None:
            report = Report(in_order(paths))
            reading(report, lambda *at: seen.append(at)).through(None, both)
        else:
            report = verify(
                paths,
                key,
                anchors,
                observe=both,
                reading=reading,
                progress=lambda *at: seen.append(at),
                **options,
            )
    assert seen == sorted(seen) and (not seen or seen[-1][0] <= seen[-1][1])
    found = {"report": {**vars(report), "chains": list(report.chains.items())}, "out": out.getvalue()}
    if both is not None:
        hits, counts = both.parts
        found.update(hits=(hits.found, hits.unsigned), counts=dict(vars(counts)))
    return found


def alike(paths: list[Path], anchors: Anchors, **options: Any) -> dict[str, Any]:
    """What one process tells, and so do two and three."""
    alone = told(paths, anchors, 0, **options)
    for processes in (2, 3):
        assert told(paths, anchors, processes, **options) == alone
    return alone


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kms-audit.log"


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that were forked."""
    found, fork = [], os.fork

    def counted() -> int:
        child = fork()
        found.append(child)
        return child

    monkeypatch.setattr(os, "fork", counted)
    return found


@pytest.mark.parametrize("form", SHOWN)
def test_a_whole_log(path: Path, form: str, forks: list[int]) -> None:
    lines, anchors = written(path)
    assert path.stat().st_size > 8 * shared.PIECE
    found = alike([path], anchors, form=form)
    assert len(forks) == 5 and found["report"]["fault"] is None
    assert found["report"]["recoveries"] and found["report"]["shredded"] and found["counts"]["told"]
    assert found["hits"] == (sum(last for _, (_, last) in found["report"]["chains"]), 0)
    assert alike([path], anchors, observed=False)["report"]["lines"] == len(lines)
    alike([path], anchors, form=form, query=Query(key="k_1", outcome="ok"), partial=True)
    assert alike([path], {}, form=form, key=None)["counts"] == found["counts"]


def damaged(lines: Lines, chance: random.Random) -> Lines:
    """One of what may have happened to it, at one place or two."""
    lines = list(lines)
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(lines))
        line, other = lines[at], chance.randrange(len(lines))
        place = chance.randrange(len(line))
        lines[at : at + 1] = chance.choice(
            (
                [],  # taken out
                [line[:place] + b"?" + line[place + 1 :]],
                [line[:place] + line[place + 1 :]],
                [line.replace(b'"ok"', b'"failed"')],
                [line, line],
                [b"\n", line],
                [lines[other], line],
                [line[:place], line],  # the rest of it is gone
                [line[:place] + b"\n", line[place:]],
                [b"x" * chance.randrange(9 * BLOCK) + b"\n", line],
                [b"\xff" * chance.randrange(LONGEST - 10, LONGEST + 10) + line],
                [line[:-1] + lines[other]],
            )
        )
    return lines


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happened_to_it(path: Path, seed: int) -> None:
    lines, anchors = written(path, rounds=12)
    chance = random.Random(seed)
    data = b"".join(damaged(lines, chance))
    if chance.random() < 0.3:
        data = data[: chance.randrange(len(data))]  # torn, or an end that was cut off
    cut = sorted(chance.choices(range(len(data) + 1), k=2)) if chance.random() < 0.5 else [0, 0]
    parts = [data[: cut[0]], data[cut[0] : cut[1]], data[cut[1] :]]
    files = [path.with_name(f"kms-audit.log.{name}") for name in ("2.gz", "1", "0")]
    for file, part in zip(files, parts):
        file.write_bytes(gzip.compress(part) if file.suffix == ".gz" else part)
    given = [file for file, part in zip(files, parts) if part]
    form, partial_log = chance.choice(list(SHOWN)), chance.random() < 0.5
    options: dict[str, Any] = {"form": form, "partial": partial_log, "sort": False}
    query = chance.choice((Query(), Query(key="k_1"), Query(op="encrypt", uid=1), Query(thread="gone")))
    alone = told(given, anchors, 0, query=query, **options)
    assert told(given, anchors, chance.choice((2, 3)), query=query, **options) == alone


@pytest.mark.parametrize("border", range(-2, 3))
def test_a_fault_at_the_border_of_a_piece(path: Path, border: int) -> None:
    """The lines around the ninth border: each gone, edited, forged, twice."""
    lines, anchors = written(path, rounds=20)
    ends = [sum(map(len, lines[: number + 1])) for number in range(len(lines))]
    at = next(number for number, end in enumerate(ends) if end > 2 * shared.PIECE) + border
    forged = lines[at].replace(b'"status":200', b'"status":201')
    for there in ([], [forged], [lines[at], lines[at]], [lines[at], b"\n"], [lines[at][:-1]]):
        path.write_bytes(b"".join([*lines[:at], *there, *lines[at + 1 :]]))
        assert alike([path], anchors)["report"]["fault"] is not None


def test_the_end_of_each_chain_may_be_expected_anywhere(path: Path) -> None:
    """Anchors and receipts name lines within pieces; one of them names another line than there is."""
    lines, anchors = written(path)
    receipts = []
    for line in lines[5::7]:
        record = auditchain.RECORD.match(line)
        if record is not None:
            receipts.append(f"{record[2].decode()}:{record[3].decode()}:{sig_of(record[6])}")
    assert alike([path], anchors, receipts=receipts, observed=False)["report"]["fault"] is None
    receipts[len(receipts) // 2] = receipts[len(receipts) // 2][:-16] + "0" * 16
    assert "is not the one that the receipt" in str(
        alike([path], anchors, receipts=receipts, observed=False)["report"]["fault"]
    )


def sig_of(text: bytes) -> str:
    return auditverify.b64decode(text.decode())[:8].hex()


def test_another_key_fits_nowhere(path: Path) -> None:
    _, anchors = written(path)
    found = alike([path], anchors, key=OTHER_KEY)
    assert "no signature fits" in str(found["report"]["fault"]) and found["hits"][1] > 100


def test_packed_files_are_read_by_others_too(path: Path, forks: list[int]) -> None:
    lines, anchors = written(path)
    third = len(lines) // 3
    olds = [path.with_name(f"kms-audit.log.{age}.gz") for age in (2, 1)]
    for old, part in zip(olds, (lines[:third], lines[third : 2 * third])):
        old.write_bytes(gzip.compress(b"".join(part)))
    path.write_bytes(b"".join(lines[2 * third :]))
    found = alike([path, *olds], anchors)
    assert found["report"]["fault"] is None and found["report"]["lines"] == len(lines) and len(forks) == 5
    olds[1].write_bytes(olds[1].read_bytes()[:-200])  # its end is missing
    fault = alike([path, *olds], anchors)["report"]["fault"]
    assert fault.file == str(olds[1]) and "can't be read" in fault.what


def test_a_file_that_is_not_there(path: Path) -> None:
    _, anchors = written(path)
    missing = path.with_name("kms-audit.log.1")
    found = alike([missing, path], anchors, sort=False)
    assert "can't be read" in str(found["report"]["fault"]) and found["counts"]["lines"] > 100


def test_what_is_renamed_meanwhile_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, anchors = written(path)
    alone, fork = told([path], anchors, 0), os.fork

    def renamed() -> int:
        with contextlib.suppress(FileNotFoundError):
            path.rename(path.with_name("kms-audit.log.1"))
        return fork()

    monkeypatch.setattr(os, "fork", renamed)
    assert told([path], anchors, 2) == alone and not path.exists()


def test_a_small_log_is_read_alone(path: Path, monkeypatch: pytest.MonkeyPatch, forks: list[int]) -> None:
    _, anchors = written(path)
    monkeypatch.setattr(shared, "LEAST", 1 << 20)
    assert told([path], anchors, 3) == told([path], anchors, 0) and forks == []
    monkeypatch.setattr(shared, "LEAST", 0)
    assert told([path], anchors, 1) == told([path], anchors, 0) and forks == []


def gone(child: int) -> bool:
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        return True
    return False


def test_one_that_dies_is_told_and_none_is_left(path: Path, forks: list[int]) -> None:
    _, anchors = written(path)

    class Dying(Both):
        def apart(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    observe = Dying(Query(), KEY, lambda: auditsearch.as_json)
    with pytest.raises(HelperGone, match="a process that reads the log is gone"):
        verify([path], KEY, anchors, observe=observe, reading=partial(Shared, processes=2))
    assert len(forks) == 2 and all(map(gone, forks))


def test_one_that_fails_says_why(
    path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that takes a while: it was heard that it ended, and it was killed before it had said so."""

    def slowly(*error: Any) -> None:
        time.sleep(0.5)
        sys.__excepthook__(*error)

    monkeypatch.setattr(sys, "excepthook", slowly)
    _, anchors = written(path)

    class Failing(Both):
        def piece(self) -> Any:
            raise ValueError("what went wrong")

    observe = Failing(Query(key="k_none"), KEY, lambda: auditsearch.as_json)
    with pytest.raises(HelperGone):
        verify([path], KEY, anchors, observe=observe, reading=partial(Shared, processes=2))
    assert "ValueError: what went wrong" in capfd.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_who_stops_leaves_none_behind(path: Path, forks: list[int], error: type[BaseException]) -> None:
    """What fails here is no fault of the log."""
    _, anchors = written(path)

    class Stopped(Both):
        def told_of(self, found: Any) -> None:
            raise error

    observe = Stopped(Query(), KEY, lambda: auditsearch.as_json)
    with pytest.raises(error):
        verify([path], KEY, anchors, observe=observe, reading=partial(Shared, processes=2))
    assert len(forks) == 2 and all(map(gone, forks))


def test_a_pipe_that_nobody_reads_is_no_fault_of_the_log(path: Path) -> None:
    _, anchors = written(path)

    def broken(block: bytes, verified: bool) -> None:
        raise BrokenPipeError

    for reading in (Reading, Shared):
        with pytest.raises(BrokenPipeError):
            verify([path], KEY, anchors, observe=broken, reading=reading)


def test_what_goes_through_the_pipes_and_what_a_process_holds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines, numbers and signatures; the key's bytes in no form, and the key itself not wiped by who ends."""
    _, anchors = written(path)
    key = bytes(KEY)
    passed: list[dict[str, Any]] = []
    answer = shared._Helper.answer

    def noted(helper: Any) -> dict[str, Any]:
        passed.append(answer(helper))
        return passed[-1]

    monkeypatch.setattr(shared._Helper, "answer", noted)
    assert told([path], anchors, 2)["report"]["fault"] is None
    assert len(passed) > 10
    text = repr(passed).encode()
    for form in (key, key.hex().encode(), repr(key).encode()):
        assert form not in text
    assert bytes(KEY) == key


def test_a_kek_is_held_no_longer_than_for_the_audit_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the log, and each process that is forked for it, has the audit key alone."""
    buffers: list[Any] = []
    held: list[list[bytes]] = []

    class Noted(LockedBuffer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            buffers.append(self)

    class Reads(Shared):
        def through(self, machine: Any, observe: Any) -> None:
            held.append([bytes(buffer.view) for buffer in buffers if not buffer.map.closed])
            assert any(machine.key[:] in kept for kept in held[-1])
            super().through(machine, observe)

    for module in (datadir, ownkeys, load):
        monkeypatch.setattr(module, "LockedBuffer", Noted)
    monkeypatch.setattr(auditcmd, "Shared", Reads)
    with Daemon(workers=1) as daemon:
        daemon.ok("POST", "/deks", {"thread_id": "t"}, 201)
        daemon.stop()
        flags = {"config": str(daemon.config_file), "data_dir": str(daemon.data_dir)}
        with load.load(flags, {}) as loaded, Progress("") as bar:
            args = argparse.Namespace(log=[], host=None, receipts=None, partial=False, json=True)
            assert auditcmd.verify(args, loaded, bar) == 0
        assert len(held) == 1 and not any(daemon.kek in kept for kept in held[0])
