"""`bench`: every figure that it promises is there and is a number, and a wrong answer is no figure."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from progressdb_kms.config.options import cores
from progressdb_kms.store.sqlite import SqliteReader
from progressdb_kms.tools import bench
from tests.harness import Daemon, postgres
from tests.harness.daemon import cli
from tests.harness.wire import b64


def figures(*args: str) -> dict[str, dict[str, Any]]:
    done = cli("bench", *args, "--json", "--seconds", "1")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in rows}


@pytest.mark.long
def test_store() -> None:
    found = figures("store")
    assert list(found) == ["disk flushes alone", "durable creates, 1 callers", "durable creates, 64 callers"]
    assert all(row["value"] > 0 and row["unit"] == "a second" for row in found.values())


def test_an_engine_whose_backends_leave_its_session_is_counted_whole() -> None:
    """As PostgreSQL's do: each makes a session of its own."""
    busy = "import os, sys\nos.setsid()\nwhile sum(os.times()[:2]) < 0.5: pass\nprint(1)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == b"1\n"
        assert os.getsid(child.pid) != os.getpid()
        assert bench.processor_seconds(os.getpid()) >= 0.4
        child.stdin.close()


@pytest.mark.long
@pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())
def test_fleet(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from progressdb_kms.tools import fleetbench

    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp))
    monkeypatch.setattr(fleetbench, "HOSTS", (3,))
    short_tmp.chmod(0o755)  # the engine runs as nobody where we are root
    found = {figure.name: figure._asdict() for figure in fleetbench.fleet(0.5, 1500)}
    assert list(found) == [
        "disk flushes alone",
        "durable creates, 64 callers: SQLite",
        "durable creates, 64 callers: fleet",
        "processor time of a create: SQLite",
        "processor time of a create: fleet",
        "encrypt 200 B, one DEK, 16 connections: SQLite",
        "encrypt 200 B, one DEK, 16 connections: fleet",
        "a change holds on 3 hosts, p50",
        "a change holds on 3 hosts, p99",
        "rotation, 1500 DEKs",
        "its lock of the rows, 1500 DEKs",
    ]
    assert all(row["value"] > 0 for row in found.values())
    assert os.listdir(short_tmp) == []


@pytest.mark.long
def test_rotate_measures_each_store_and_what_callers_notice(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp))
    found = {figure.name: figure._asdict() for figure in bench.rotate(0.1, 1500)}
    assert {name: row["unit"] for name, row in found.items()} == {
        "start-up checks, 1000 DEKs": "ms",
        "rotation, 1000 DEKs": "DEKs a second",
        "its memory, 1000 DEKs": "MiB",
        "start-up checks, 1500 DEKs": "ms",
        "rotation, 1500 DEKs": "DEKs a second",
        "its memory, 1500 DEKs": "MiB",
        "encrypt 200 B, p99": "us",
        "create a DEK, p99": "us",
    }
    assert all(row["value"] > 0 for name, row in found.items() if "memory" not in name)
    assert os.listdir(short_tmp) == []


def test_rotate_asks_for_room_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "b"))
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=99 << 20))
    with pytest.raises(bench.BenchFailed, match=f"{tmp_path} has 99 MiB free, the stores to rotate take 986"):
        next(bench.rotate(1, 100_000))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("way", [bench._naive, bench._careful])
def test_what_memory_measures_is_an_encrypt(way: Any) -> None:
    body = json.dumps({"key_id": "bench", "plaintext": b64(b"hi")}).encode()
    assert len(json.loads(way(body)())["ciphertext"]) == 40  # of 12, 2 and 16 bytes


@pytest.mark.long
def test_memory() -> None:
    naive, careful = figures("memory").values()
    assert naive["value"] > 0 and careful["value"] > 0  # which of them is faster is no matter of a test
    assert careful["note"] == f"{naive['value'] / careful['value'] - 1:+.0%} time"


def test_audit(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp))
    monkeypatch.setenv(bench.WAY, "careful")
    found = list(bench.audit(0.01, 50))
    whats = ("verify", "search, nothing found", "report")
    ways = dict.fromkeys(("1 process", "1 process" if cores() == 1 else f"{cores()} processes"))
    assert [figure.name for figure in found] == [f"audit {what}, {way}" for way in ways for what in whats]
    assert all(figure.value > 0 and "; 1000 lines, " in figure.note for figure in found)
    assert os.listdir(short_tmp) == []


@pytest.mark.long
def test_usage(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp))
    found = {figure.name: figure for figure in bench.usage(1, 50)}
    cases = ("one DEK", "50 DEKs at random")
    assert list(found) == [
        f"{way}, {what}" for what in cases for way in ("uses counted", "the same counted twice")
    ]
    assert all(figure.value > 0 and figure.note.endswith("time, 4 turns") for figure in found.values())
    assert os.listdir(short_tmp) == []


@pytest.mark.parametrize(("before", "counted"), [("", 1), (bench._UNCOUNTED, 0)], ids=["counts", "does not"])
def test_what_usage_is_compared_with_counts_nothing(before: str, counted: int) -> None:
    """A worker that stops in order hands over what it has seen."""
    with Daemon(workers=1, command=bench._program(before)) as daemon:
        with daemon.session() as kms:
            key_id = kms.create_dek("t")["key_id"]
            kms.encrypt(key_id, b"hi")
        daemon.stop()
        with contextlib.closing(SqliteReader(daemon.data_dir)) as reader:
            assert sum(usage.encrypts for usage in reader.usage([key_id]).values()) == counted


def test_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CONNECTIONS", (1, 2))
    found = {figure.name: figure for figure in bench.calls(0.1, 0)}
    calls = ("encrypt 200 B", "decrypt 200 B", "decrypt a page of 100, messages", "create a DEK")
    each = ("socket alone", "http alone", *calls)
    large = ("encrypt 64 KiB raw, 1 connection", "encrypt 1024 KiB raw, 1 connection")
    ends = ("cipher alone: unwrap and encrypt 200 B", *large)
    assert set(found) == {*ends, *(f"{name}, {count} connections" for name in each for count in (1, 2))}
    assert all(figure.value > 0 for figure in found.values())


def test_many() -> None:
    found = {figure.name: figure for figure in bench.many(0.1, 300)}
    assert list(found) == [
        "encrypt 200 B, one DEK",
        "encrypt 200 B, 300 DEKs at random",
        "a page of 100 under one DEK",
        "a page of 100 under as many DEKs",
    ]
    assert all(figure.value > 0 for figure in found.values())


def written(path: Path, **values: tuple[float, str]) -> str:
    rows = [{"name": name, "value": value, "unit": unit} for name, (value, unit) in values.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_two_runs_are_compared(tmp_path: Path) -> None:
    rate, time = "a second", "us"
    before = written(tmp_path / "a", up=(100, rate), down=(100, rate), slow=(10, time), gone=(1, rate))
    after = written(tmp_path / "b", up=(120, rate), down=(95, rate), slow=(20, time), new=(1, rate))
    done = cli("bench", "--compare", before, after, "--json")
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert {name: (row["ratio"], row["verdict"]) for name, row in rows.items()} == {
        "up": (1.2, "better"),
        "down": (0.95, ""),
        "slow": (0.5, "worse"),
    }
    assert done.returncode == 1 and cli("bench", "--compare", before, before).returncode == 0


@pytest.mark.parametrize("text", ["", "no figures", '{"name": 1}', '{"name":"x","value":"?","unit":""}'])
def test_what_is_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "b").write_text(text)
    done = cli("bench", "--compare", written(tmp_path / "a", up=(1, "us")), str(tmp_path / "b"))
    assert done.returncode == 1 and (b"no output of" in done.stderr or b"in common" in done.stderr)


def test_progressdb() -> None:
    found = {figure.name: figure for figure in bench.progressdb(0.1, 0)}
    assert set(found) == {
        *(
            f"{op} {size} B, {way}"
            for op in ("encrypt", "decrypt")
            for size in bench.MESSAGES
            for way in WAYS
        ),
        *(f"page of 25, {way}" for way in WAYS),
    }
    assert all(figure.value > 0 for figure in found.values())


WAYS = ("socket", "tcp")


@contextmanager
def answering(path: Path, *answers: bytes) -> Iterator[str]:
    """A server that gives these answers to its first connection, and no more."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as sock:
                for answer in answers:
                    sock.recv(1024)
                    sock.sendall(answer)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1024)

        thread = threading.Thread(target=serve)
        thread.start()
        yield str(path)
        thread.join()


ASK = b"GET / HTTP/1.1\r\n\r\n"
FINE = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
GONE = "the daemon that is measured is gone: it closed the connection"


@pytest.mark.parametrize(
    "answers, seconds, message",
    [
        ((b"HTTP/1.1 503 Full\r\nContent-Length: 0\r\n\r\n",), 1.0, "the daemon answered HTTP/1.1 503 Full"),
        ((FINE,), 0.0, "no answer came"),
        ((FINE, FINE), 1.0, GONE),
        ((), 1.0, GONE),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",), 1.0, GONE),
    ],
    ids=["refused", "silent", "gone", "gone at once", "gone in a body"],
)
def test_what_is_no_figure(
    short_tmp: Path,
    answers: tuple[bytes, ...],
    seconds: float,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "PATIENCE", 0.0)
    with answering(short_tmp / "s", *answers) as path, pytest.raises(bench.BenchFailed, match=message):
        bench.load(path, ASK, 1, seconds)


def test_the_first_answer_is_waited_for(short_tmp: Path) -> None:
    """However short the measurement: a machine may be busy."""
    with answering(short_tmp / "s", FINE, FINE) as path:
        assert bench.load(path, ASK, 1, 0.0).p50 > 0
