"""The audit log: its format, how it is written, and what its verifier finds."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import re
import stat
import threading
import tracemalloc
from collections import namedtuple
from pathlib import Path
from typing import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.audit import log as audit
from progressdb_kms.audit import loose, tail
from progressdb_kms.audit import verify as auditverify
from progressdb_kms.audit.log import (
    AuditLog,
    Fragment,
    fragment,
    key_fragment,
    parse,
    peer_fragment,
    pieces,
    torn,
)
from progressdb_kms.audit.tail import begun, in_order, recover
from progressdb_kms.audit.verify import Fault, Report, history, verify
from progressdb_kms.crypto.aead import mac
from progressdb_kms.encoding import b64encode
from progressdb_kms.errors import AuditUnavailable
from tests.harness.auditlogs import (
    KEY,
    OTHER_KEY,
    PEER,
    Anchors,
    Clock,
    check,
    closed,
    encrypt,
    fault,
    fill,
    made,
    tearing,
)
from tests.harness.vectors import load, secret

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kms-audit.log"


@pytest.fixture
def log(path: Path) -> AuditLog:
    return made(path, ["1.0"])[0]


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def ops(path: Path) -> list[str]:
    return [parse(line)["op"] for line in lines(path) if line.strip()]


# ---- the format (no files) -------------------------------------------------------------------------

# Written by release 1. A change here is a change of the format: old logs must verify for ever.
FROZEN = (
    b'{"event":{"chain":"3.1","seq":1,"prev":"","ts":"2026-09-21T14:13:21.500Z","op":"encrypt","outcome":"ok",'
    b'"status":200,"change":0,"key_id":"k_1","thread_id":"thread-1","actor":"peer_uid:1000","uid":1000,"gid":1001,'
    b'"pid":4242,"request_id":"r-1"},"sig":"WnFzHDFhC87oWLZFGYN7AvYx4OvRlZPLvKb0/aCwwg0="}\n'
)


def test_the_fragments_make_the_fields_in_their_order() -> None:
    made_of = (
        key_fragment("k_1", "t") + peer_fragment(0, 1, 2) + fragment(request_id="r") + fragment(code="x", n=3)
    )
    assert made_of == (
        ',"key_id":"k_1","thread_id":"t","actor":"peer_uid:0","uid":0,"gid":1,"pid":2,"request_id":"r","code":"x","n":3'
    )
    assert key_fragment("k_1") == ',"key_id":"k_1"'
    assert fragment(a=None, b=[1], c={"d": "e"}) == ',"b":[1],"c":{"d":"e"}'


@given(st.text(), st.text(), st.dictionaries(st.sampled_from("abcdef"), st.text()))
def test_no_value_breaks_out_of_its_field(key_id: str, request_id: str, more: dict[str, str]) -> None:
    text = key_fragment(key_id, "é\n") + fragment(request_id=request_id) + fragment(**more)
    assert text.isascii()
    assert "\n" not in text
    assert json.loads("{" + text[1:] + "}") == {
        "key_id": key_id,
        "thread_id": "é\n",
        "request_id": request_id,
        **more,
    }


@pytest.mark.parametrize("name", ["chain", "seq", "prev", "ts", "op", "outcome", "status"])
def test_the_fixed_fields_are_not_given_twice(name: str) -> None:
    with pytest.raises(ValueError, match="given again"):
        fragment(**{name: 1})


@pytest.mark.parametrize("secret", [b"key", bytearray(32), memoryview(b"key"), float("nan")])
def test_bytes_and_with_them_keys_are_no_detail(secret: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        fragment(detail=secret)


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b'{"event":1,"sig":"x"}', b'{"event":{}}', b'{"event":{},"sig":"","x":1}', b"\xff"],
)
def test_what_is_no_record_does_not_parse(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse(text)


def record(chain: str, seq: int, prev: str = "", op: str = "encrypt", extra: str = "") -> bytes:
    event = (
        f'{{"chain":"{chain}","seq":{seq},"prev":"{prev}","ts":"2026-09-21T14:13:21.500Z","op":"{op}",'
        f'"outcome":"ok","status":200,"change":0{extra}}}'
    ).encode()
    return b'{"event":%b,"sig":"%b"}' % (event, b64encode(mac(KEY, event)).encode())


A, B = record("1.0", 1), record("1.1", 1)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (A, [(A, True)]),
        (A + B, [(A, True), (B, True)]),
        (A[:100] + B, [(A[:100], False), (B, True)]),
        (A[:3] + B, [(A[:3], False), (B, True)]),
        (A[:90] + B[:9], [(A[:90] + B[:9], False)]),
        (A + B[:3], [(A, True), (B[:3], False)]),
        (A[:-1] + B, [(A[:-1], False), (B, True)]),
        (A.replace(b"encrypt", b"decrypt"), [(A.replace(b"encrypt", b"decrypt"), False)]),
        (b"\0\0", [(b"\0\0", False)]),
        (b"", []),
    ],
    ids=[
        "record",
        "two",
        "torn+record",
        "short+record",
        "torn+torn",
        "record+torn",
        "all but 1",
        "edited",
        "0",
        "blank",
    ],
)
def test_a_line_is_split_into_records_and_the_rest(line: bytes, expected: list[tuple[bytes, bool]]) -> None:
    assert [(piece, match is not None) for piece, match in pieces(line, KEY)] == expected


def test_a_line_full_of_beginnings_takes_no_quadratic_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(audit, "genuine", lambda key, match: calls.append(1))
    line = A[:-3] * 1000 + A
    assert [piece for piece, _ in pieces(line, KEY)] == [line]
    assert len(calls) < 100


# ---- writing ---------------------------------------------------------------------------------------


def test_a_line_is_what_it_was_in_release_1(path: Path) -> None:
    log = AuditLog(path, KEY, "3.1", Clock())
    receipt = encrypt(log, 1)
    event = FROZEN[9 : FROZEN.index(b',"sig"')]
    digest = mac(KEY, event)
    assert b64encode(digest) == "WnFzHDFhC87oWLZFGYN7AvYx4OvRlZPLvKb0/aCwwg0="
    assert path.read_bytes() == FROZEN
    assert receipt == f"3.1:1:{digest.hex()[:16]}"
    assert log.head == ("3.1", 1, b64encode(digest))


def test_each_line_names_the_one_before(log: AuditLog, path: Path) -> None:
    assert log.head == ("1.0", 0, "")
    receipts = [encrypt(log, n) for n in range(3)]
    events = [parse(line) for line in lines(path)]
    assert [e["seq"] for e in events] == [1, 2, 3]
    assert [e["prev"] for e in events] == ["", events[0]["sig"], events[1]["sig"]]
    assert log.head == ("1.0", 3, events[2]["sig"])
    assert [r.rpartition(":")[0] for r in receipts] == ["1.0:1", "1.0:2", "1.0:3"]
    assert check(path, closed([log]), receipts=receipts).ok


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1.9999, "1970-01-01T00:00:01.999Z"),
        (1e9 + 0.05, "2001-09-09T01:46:40.050Z"),
    ],
)
def test_times_are_utc_with_milliseconds(path: Path, now: float, text: str) -> None:
    encrypt(AuditLog(path, KEY, "1.0", lambda: now))
    assert parse(lines(path)[0])["ts"] == text


@pytest.mark.parametrize(
    ("op", "outcome"), [("a b", "ok"), ('x"', "ok"), ("", "ok"), ("encrypt", "fine"), ("é", "ok")]
)
def test_an_operation_or_outcome_of_another_kind_is_refused(
    log: AuditLog, path: Path, op: str, outcome: str
) -> None:
    with pytest.raises(ValueError, match="not an audit operation"):
        log.record(op, outcome, 200)
    with pytest.raises(UnicodeEncodeError):
        log.record("encrypt", "ok", 200, Fragment(',"x":"é"'))
    assert path.read_bytes() == b""
    assert log.head[1] == 0


@pytest.mark.parametrize("chain", ["", "1", "1.", "1.2.3.4", "a.b", '1.1"', "1.1\n"])
def test_a_chain_is_numbers_joined_by_dots(path: Path, chain: str) -> None:
    with pytest.raises(ValueError):
        AuditLog(path, KEY, chain)
    with pytest.raises(ValueError):
        AuditLog(path, KEY[:31], "1.0")


def test_a_note_is_the_daemons_own(log: AuditLog, path: Path) -> None:
    log.note("start", previous={}, kek_id="00")
    log.note("rotation_failed", "failed")
    first, second = (parse(line) for line in lines(path))
    assert (first["op"], first["status"], first["kek_id"]) == ("start", 200, "00")
    assert (second["outcome"], second["status"]) == ("failed", 500)


def test_no_memory_leaves_the_chain_whole(log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that stood in the file already was not counted, and the next one had its number."""

    class Signature(bytes):
        def decode(self, *args: str) -> str:
            raise MemoryError

    encrypt(log)
    with monkeypatch.context() as patch:
        patch.setattr(audit, "b64encode_bytes", lambda digest: Signature(b64encode(digest).encode()))
        with pytest.raises(MemoryError):
            encrypt(log)
    encrypt(log)
    assert check(path, {}).ok and len(lines(path)) == 2


def test_the_file_is_for_its_owner_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        AuditLog(path, KEY, "1.0").close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)
        AuditLog(path, KEY, "1.1").close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def _link(path: Path) -> None:
    target = path.with_name("target")
    target.touch()
    path.symlink_to(target)


@pytest.mark.parametrize("make", [_link, os.mkfifo, os.mkdir], ids=["symbolic link", "fifo", "directory"])
def test_only_a_regular_file_is_a_log(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with pytest.raises(AuditUnavailable) as caught:
        AuditLog(path, KEY, "1.0")
    assert str(path) in caught.value.hint


def test_a_file_of_another_user_is_no_log(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(AuditUnavailable, match="own user"):
        AuditLog(path, KEY, "1.0")


def test_a_mode_that_can_not_be_changed_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """chattr +a, or a file system without modes: at a SIGHUP it ended worker and keeper again and again."""

    def refused(descriptor: int, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", refused)
    with contextlib.closing(AuditLog(path, KEY, "1.0")) as log:
        path.chmod(0o640)
        with pytest.raises(AuditUnavailable, match="Operation not permitted") as caught:
            log.reopen()
        assert "of mode 0600" in caught.value.hint
        path.chmod(0o600)
        log.reopen()
        encrypt(log)


def test_a_closed_log_records_nothing(log: AuditLog, path: Path) -> None:
    log.close()
    log.close()
    for act in (lambda: encrypt(log), log.check, log.reopen):
        with pytest.raises(AuditUnavailable, match="closed"):
            act()
    assert path.read_bytes() == b""


def test_an_error_of_the_disk_at_sync_is_told(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.sync()

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(AuditUnavailable, match="Input/output") as caught:
        log.sync()
    assert "kernel" in caught.value.hint


def test_threads_share_one_chain(log: AuditLog, path: Path) -> None:
    receipts: list[str] = []

    def run() -> None:
        for number in range(200):
            receipts.append(encrypt(log, number))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(receipts)) == 1600
    assert [parse(line)["seq"] for line in lines(path)] == list(range(1, 1601))
    assert check(path, closed([log]), receipts=receipts).ok


# ---- the log is renamed, unlinked, cut ---------------------------------------------------------------


def test_a_renamed_log_is_followed_by_a_new_one(log: AuditLog, path: Path) -> None:
    encrypt(log)
    old = path.rename(path.with_name("kms-audit.log.1"))
    encrypt(log)
    encrypt(log)
    assert ops(old) == ["encrypt"]
    assert ops(path) == ["audit_reopened", "encrypt", "encrypt"]
    assert parse(lines(path)[0])["reason"] == "renamed"
    anchors = closed([log])
    assert check([path, old], anchors).chains == {"1.0": (1, 4)}
    number, words = fault(path, anchors)
    assert number == 1
    assert words.startswith("chain 1.0 begins at its line 2: earlier log files were not given")


def test_another_file_in_its_place_is_gone_on_with(log: AuditLog, path: Path) -> None:
    """What logrotate's `create` does. The mode is put right."""
    encrypt(log)
    old = path.rename(path.with_name("kms-audit.log.1"))
    path.touch(mode=0o644)
    encrypt(log)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert check([old, path], closed([log])).ok


def test_a_link_in_its_place_is_not_followed(log: AuditLog, path: Path) -> None:
    encrypt(log)
    old = path.rename(path.with_name("elsewhere"))
    path.symlink_to(old)
    with pytest.raises(AuditUnavailable, match="can't be opened"):
        encrypt(log)
    assert ops(old) == ["encrypt"]


def test_a_log_that_comes_back_is_gone_on_with(log: AuditLog, path: Path) -> None:
    encrypt(log)
    moved = path.rename(path.with_name("elsewhere"))
    moved.rename(path)
    encrypt(log)
    assert ops(path) == ["encrypt", "encrypt"]


def test_a_log_that_is_held_while_its_folder_is_gone(tmp_path: Path) -> None:
    """It is asked again and again, until the folder is there."""
    (tmp_path / "here").mkdir()
    (log,) = made(tmp_path / "here" / "kms-audit.log", ["1.0"])
    log.hold(AuditUnavailable("not introduced"))
    (tmp_path / "here").rename(tmp_path / "aside")
    for _ in range(2):
        with pytest.raises(AuditUnavailable, match="No such file"):
            log.release()
    (tmp_path / "aside").rename(tmp_path / "here")
    log.release()
    encrypt(log)
    log.close()
    log.close()


@pytest.mark.parametrize("held", [False, True])
def test_a_folder_that_takes_the_place_of_another_has_a_log_of_its_own(tmp_path: Path, held: bool) -> None:
    """Mounted over it, or moved there. Who has recorded nothing yet goes by what is there in the end."""
    here, late, aside = (tmp_path / name for name in ("here", "late", "aside"))
    for folder in (here, late):
        folder.mkdir()
    (log,) = made(here / "kms-audit.log", ["1.0"])
    if held:
        log.hold(AuditUnavailable("not introduced"))
    else:
        encrypt(log)
    here.rename(aside)
    late.rename(here)
    (other,) = made(here / "kms-audit.log", ["1.0"])
    encrypt(other)
    before = (here / "kms-audit.log").read_bytes()
    if held:
        log.release()
        encrypt(log)
        assert (aside / "kms-audit.log").read_bytes() == b"" and len(lines(here / "kms-audit.log")) == 2
        return
    encrypt(log)
    log.reopen()
    encrypt(log)
    assert (here / "kms-audit.log").read_bytes() == before
    assert ops(aside / "kms-audit.log") == ["encrypt"] * 3
    (aside / "kms-audit.log").rename(aside / "kms-audit.log.1")  # logrotate, once it is back
    encrypt(log)
    assert ops(aside / "kms-audit.log") == ["audit_reopened", "encrypt"]


def test_an_unlinked_log_stops_everything_until_someone_says_so(log: AuditLog, path: Path) -> None:
    encrypt(log)
    path.unlink()
    for act in (lambda: encrypt(log), log.check, lambda: encrypt(log)):
        with pytest.raises(AuditUnavailable, match="unlinked") as caught:
            act()
        assert "SIGHUP" in caught.value.hint
    assert log.reasons() == ["the audit log was unlinked"]
    assert not path.exists()
    log.reopen()
    assert log.reasons() == []
    encrypt(log)
    assert ops(path) == ["audit_reopened", "encrypt"]
    assert parse(lines(path)[0])["reason"] == "unlinked"
    assert "begins at its line 2" in fault(path, closed([log]))[1]


def test_an_unlinked_log_is_noticed_where_another_stands_in_its_place(log: AuditLog, path: Path) -> None:
    encrypt(log)
    path.unlink()
    path.touch()
    with pytest.raises(AuditUnavailable, match="unlinked"):
        encrypt(log)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("size", [0, 10])
def test_a_log_cut_in_place_stops_everything_until_someone_says_so(
    log: AuditLog, path: Path, size: int
) -> None:
    encrypt(log)
    encrypt(log)
    os.truncate(path, len(lines(path)[0]) + size)
    with pytest.raises(AuditUnavailable, match="cut shorter"):
        encrypt(log)
    with pytest.raises(AuditUnavailable, match="cut shorter"):
        log.check()
    log.reopen()
    encrypt(log)
    assert b'"reason":"truncated"' in path.read_bytes()
    assert not check(path, closed([log])).ok


def test_a_log_that_others_made_longer_is_in_order(path: Path) -> None:
    logs = made(path, ["1.0", "1.1"])
    for number in range(6):
        encrypt(logs[number % 3 % 2], number)
    assert check(path, closed(logs)).ok


def test_reopening_an_unchanged_log_records_nothing(log: AuditLog, path: Path) -> None:
    encrypt(log)
    log.reopen()
    encrypt(log)
    assert ops(path) == ["encrypt", "encrypt"]


def test_reopening_after_logrotate_says_why(log: AuditLog, path: Path) -> None:
    encrypt(log)
    old = path.rename(path.with_name("kms-audit.log.1"))
    log.reopen()
    assert parse(lines(path)[0])["reason"] == "requested"
    assert check([old, path], closed([log])).ok


def test_why_a_log_was_reopened_is_recorded_later_if_it_can_not_be_now(log: AuditLog, path: Path) -> None:
    encrypt(log)
    old = path.rename(path.with_name("kms-audit.log.1"))
    with tearing(FULL), pytest.raises(AuditUnavailable):
        encrypt(log)
    encrypt(log)
    assert ops(path) == ["audit_reopened", "encrypt"]
    assert check([old, path], closed([log])).ok


# ---- a full disk -------------------------------------------------------------------------------------


def test_nothing_written_is_nothing_lost(log: AuditLog, path: Path) -> None:
    encrypt(log)
    head = log.head
    with tearing(FULL), pytest.raises(AuditUnavailable, match="No space left") as caught:
        encrypt(log)
    assert "free" in caught.value.hint
    assert log.head == head and log.failing
    with tearing(FULL), pytest.raises(AuditUnavailable, match="No space left"):
        log.check()  # it tries, since nothing else may tell
    log.check()
    assert not log.failing and log.reasons() == []
    encrypt(log)
    assert check(path, closed([log])).recoveries == 0
    assert ops(path) == ["encrypt", "audit_reopened", "encrypt"]  # when it went on, once
    assert parse(lines(path)[1])["reason"] == "failed"


# A record of the chain's first line, with its line end; and a few places where it may tear.
SIZE = len(record("1.0", 1, extra=key_fragment("k_0", "thread-1") + PEER + fragment(request_id="r-0"))) + 1

TEARS = [*range(1, 60, 7), *range(60, SIZE - 5, 31), *range(SIZE - 5, SIZE)]


@pytest.mark.parametrize("neighbour", [False, True], ids=["alone", "another process appends"])
@pytest.mark.parametrize("size", TEARS)
def test_a_torn_record_is_named_by_the_next(path: Path, size: int, neighbour: bool) -> None:
    first, second = made(path, ["1.0", "1.1"])
    with tearing(size), pytest.raises(AuditUnavailable, match=f"took only {size} bytes"):
        encrypt(first)
    part = path.read_bytes()
    assert len(part) == size
    if neighbour:
        encrypt(second)
    receipt = encrypt(first)
    event = next(parse(line) for line in lines(path) if b"audit_recovered" in line)
    assert (event["torn"], event["ends"]) == ([list(torn(part))], 1)
    # Whole but for its line end: the record is in, and its seq is taken.
    assert receipt.startswith("1.0:3:" if size == SIZE - 1 else "1.0:2:")
    report = check(path, closed([first, second]), receipts=[receipt])
    assert report.fault is None
    assert report.recoveries == 1


@pytest.mark.parametrize("size", range(0, 400, 7))
def test_a_torn_repair_is_named_too(log: AuditLog, path: Path, size: int) -> None:
    with tearing(100, size):
        for _ in range(2):
            with contextlib.suppress(AuditUnavailable):
                encrypt(log)
    encrypt(log)
    assert check(path, closed([log])).fault is None


def test_a_torn_record_in_a_file_that_was_rotated_is_named_in_the_next(log: AuditLog, path: Path) -> None:
    encrypt(log)
    with tearing(100), pytest.raises(AuditUnavailable):
        encrypt(log)
    old = path.rename(path.with_name("kms-audit.log.1"))
    encrypt(log)
    anchors = closed([log])
    assert check([old, path], anchors).recoveries == 1
    assert check(path, anchors, partial=True).ok
    assert "chain 1.0 begins at its line 2" in fault(path, anchors)[1]


def test_close_repairs_what_it_can(log: AuditLog, path: Path) -> None:
    with tearing(100), pytest.raises(AuditUnavailable):
        encrypt(log)
    log.close()
    assert check(path, {}).recoveries == 1


Disk = namedtuple("Disk", "f_bavail f_bfree f_frsize f_blocks")


def test_check_wants_room_for_what_is_begun(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda fd: Disk(15, 15, 4096, 100))
    with pytest.raises(AuditUnavailable, match="61440 bytes are free"):
        log.check()
    assert log.reasons() == ["the audit log can't be written (only 61440 bytes are free)"]
    monkeypatch.setattr(os, "statvfs", lambda fd: Disk(16, 16, 4096, 100))
    log.check()
    monkeypatch.setattr(os, "statvfs", lambda fd: Disk(0, 0, 4096, 0))  # a file system that doesn't tell
    log.check()


def test_room_kept_for_root_is_room_for_root_alone(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda fd: Disk(0, 100, 4096, 100))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    log.check()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(AuditUnavailable):
        log.check()


def test_no_repair_is_begun_without_room(log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tearing(100), pytest.raises(AuditUnavailable):
        encrypt(log)
    monkeypatch.setattr(os, "statvfs", lambda fd: Disk(1, 1, 4096, 100))
    for _ in range(3):
        with pytest.raises(AuditUnavailable, match="4096 bytes are free"):
            encrypt(log)
    assert path.stat().st_size == 100


# ---- the start after a crash ---------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the log has settled."""
    monkeypatch.setattr(tail, "SETTLE", 0)


@pytest.mark.parametrize("less", [1, 2, 3, 30, 90, 200, SIZE - 1, SIZE])
def test_what_a_dead_process_left_is_named_at_the_start(path: Path, less: int, at_once: None) -> None:
    dead = made(path, ["1.0"])[0]
    encrypt(dead)
    anchors = {"1.0": dead.head[1:]}
    encrypt(dead)
    os.close(dead._fd)
    dead._leave()
    os.truncate(path, path.stat().st_size - less)
    log = made(path, ["2.0"])[0]
    assert recover(log) == 1
    assert recover(log) == 0
    log.note("start", previous={c: list(head) for c, head in anchors.items()})
    report = check(path, {**anchors, **closed([log])})
    assert report.fault is None
    assert report.recoveries == 1
    assert report.chains == {"1.0": (1, 2 if less == 1 else 1), "2.0": (1, 2)}


def test_a_clean_log_needs_no_recovery(path: Path) -> None:
    anchors = fill(path)
    log = made(path, ["2.0"])[0]
    assert recover(log) == 0
    assert log.head[1] == 0
    assert check(path, anchors).ok


def test_a_torn_record_before_lines_of_others_is_named_at_the_start(path: Path) -> None:
    first, second = made(path, ["1.0", "1.1"])
    for _ in range(3):
        encrypt(second)
    with tearing(100), pytest.raises(AuditUnavailable):
        encrypt(first)
    for _ in range(3):
        encrypt(second)
    os.close(first._fd)  # it dies
    first._leave()
    log = made(path, ["2.0"])[0]
    assert recover(log) == 1
    assert check(path, {**closed([second]), **closed([log])}).fault is None


def test_the_start_hides_nothing_that_was_edited(path: Path) -> None:
    fill(path)
    edited = lines(path)
    edited[4] = b"junk\n"
    path.write_bytes(b"".join(edited) + b'{"event":{"cha')
    log = made(path, ["2.0"])[0]
    assert recover(log) == 1
    assert fault(path, closed([log]))[0] == 5


def test_zeros_at_the_end_are_named_like_a_torn_record(path: Path) -> None:
    """Some file systems show a grown file's unwritten end as zeros after a power cut."""
    anchors = fill(path)
    with open(path, "ab") as file:
        file.write(bytes(5000))
    log = made(path, ["2.0"])[0]
    assert recover(log) == 1
    assert check(path, {**anchors, **closed([log])}).fault is None


def test_only_the_end_of_a_long_log_is_searched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "SCAN", 2000)
    anchors = fill(path, 20)
    with open(path, "ab") as file:
        file.write(b'{"event":{"cha')
    log = made(path, ["2.0"])[0]
    assert recover(log) == 1
    assert check(path, {**anchors, **closed([log])}).fault is None


def test_a_log_that_was_begun_is_told_from_one_that_was_not(path: Path) -> None:
    assert not begun(path)
    path.touch()
    assert not begun(path)
    path.write_bytes(b'{"event":{"cha')
    assert not begun(path)
    fill(path, chains=["7.0", "7.1"])
    assert begun(path)


# ---- verifying: what is found --------------------------------------------------------------------------

Lines = list[bytes]
NAMES = ("1.0", "1.1", "1.2")


def _flip(n: int, old: bytes, new: bytes) -> Callable[[Lines], Lines]:
    return lambda log: [line.replace(old, new, 1) if i == n else line for i, line in enumerate(log)]


TAMPERED: dict[str, tuple[Callable[[Lines], Lines], int, str]] = {
    # The log has 12 lines, chains 1.0, 1.1 and 1.2 in turn.
    "a value": (_flip(4, b'"uid":1000', b'"uid":1001'), 5, "the signature does not fit: the line was edited"),
    "the seq": (_flip(4, b'"seq":2', b'"seq":3'), 5, "the signature does not fit"),
    "the prev": (_flip(4, b'"prev":"', b'"prev":"A'), 5, "a part of line 2 of chain 1.1, out of its place"),
    "the signature": (
        lambda log: [*log[:4], log[7][:-49] + log[4][-49:], *log[5:]],
        5,
        "signature does not fit",
    ),
    "the frame": (_flip(4, b'{"event"', b'{"evend"'), 5, "no audit record"),
    "the line end": (_flip(4, b"\n", b"\r\n"), 5, "a record runs on"),
    "a space": (_flip(4, b'"sig"', b' "sig"'), 5, "no audit record"),
    "deleted": (lambda log: log[:4] + log[5:], 7, "line 2 of chain 1.1 should stand before this one"),
    "many deleted": (
        lambda log: log[:3] + log[9:],
        4,
        "lines 2 to 3 of chain 1.0 should stand before this one",
    ),
    "the first deleted": (lambda log: log[1:], 3, "chain 1.0 begins at its line 2"),
    "repeated": (lambda log: [*log[:5], log[4], *log[5:]], 6, "line 2 of chain 1.1 stands after line 2"),
    "moved down": (
        lambda log: [*log[:3], *log[4:7], log[3], *log[7:]],
        6,
        "line 2 of chain 1.0 should stand",
    ),
    "swapped": (lambda log: [*log[:3], log[6], *log[4:6], log[3], *log[7:]], 4, "line 2 of chain 1.0 should"),
    "inserted junk": (lambda log: [*log[:5], b"junk\n", *log[5:]], 6, "4 bytes that are no audit record"),
    "inserted JSON": (lambda log: [*log[:5], b'{"event":{},"sig":""}\n', *log[5:]], 6, "no audit record"),
    "a foreign record": (
        lambda log: [*log[:5], record("9.0", 2, "A" * 43 + "=") + b"\n", *log[5:]],
        6,
        "begins at",
    ),
    "a blank line": (lambda log: [*log[:5], b"\n", *log[5:]], 6, "a blank line that no recovery event"),
    "two joined": (_flip(4, b"\n", b""), 5, "a record runs on without a line end"),
    "one split": (_flip(4, b'"pid"', b'\n"pid"'), 5, "no audit record"),
    "the tail cut": (lambda log: log[:-3], 9, "chain 1.0 ends with line 3, but the store names its line 4"),
    "one line's tail cut": (
        lambda log: log[:-1],
        11,
        "chain 1.2 ends with line 3, but the store names its line 4",
    ),
    "cut in a line": (lambda log: [*log[:-1], log[-1][:100]], 12, "100 bytes that are no audit record"),
    "cut by a byte": (lambda log: [*log[:-1], log[-1][:-1]], 12, "a record runs on without a line end"),
    "a chain removed": (lambda log: [x for x in log if b'"1.1"' not in x], 8, "chain 1.1 is missing whole"),
    "emptied": (lambda log: [], 0, "is missing whole"),
    "a huge line": (lambda log: [*log, b"x" * (2 << 20) + b"\n"], 13, "a line of 2097152 bytes"),
    "no end": (lambda log: [*log, b"x" * (5 << 20)], 13, "bytes is no audit record"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_found(path: Path, case: str) -> None:
    edit, number, words = TAMPERED[case]
    anchors = fill(path)
    path.write_bytes(b"".join(edit(lines(path))))
    found = check(path, anchors).fault
    assert found is not None
    assert found.line == number
    assert words in found.what
    assert found.file == str(path)
    assert str(found).startswith(f"{path}:{number}: " if number else f"{path}: ")


def test_a_log_as_it_was_written_has_no_fault(path: Path) -> None:
    report = check(path, fill(path))
    assert report.ok
    assert report.lines == 12
    assert report.chains == {"1.0": (1, 4), "1.1": (1, 4), "1.2": (1, 4)}


def test_what_was_cut_behind_the_last_anchor_is_not_found(path: Path) -> None:
    """Nothing outside the file knew of it; a receipt would have."""
    log = made(path, ["1.0"])[0]
    encrypt(log)
    anchors = {"1.0": log.head[1:]}
    receipt = encrypt(log)
    log.close()
    path.write_bytes(lines(path)[0])
    assert check(path, anchors).ok
    assert "ends with line 1, but the receipt in line 1" in fault(path, anchors, receipts=[receipt])[1]


def test_an_anchor_that_is_not_of_this_log_is_a_fault(path: Path) -> None:
    anchors = fill(path)
    seq, _ = anchors["1.1"]
    anchors["1.1"] = (seq, b64encode(bytes(32)))
    assert fault(path, anchors) == (11, "line 4 of chain 1.1 is not the one that the store names")


def test_an_anchor_in_the_middle_is_passed_by(path: Path) -> None:
    log = made(path, ["1.0"])[0]
    heads = [(encrypt(log, n), log.head)[1] for n in range(5)]
    log.close()
    assert check(path, {"1.0": heads[2][1:]}).ok
    assert check(path, {"1.0": (0, "")}).ok
    assert "line 3 of chain 1.0" in fault(path, {"1.0": (3, heads[3][2])})[1]


@pytest.mark.parametrize("rounds", [1, 4])
def test_another_key_is_told_from_an_edit(path: Path, rounds: int) -> None:
    anchors = fill(path, rounds)
    found = verify([path], OTHER_KEY, anchors).fault
    assert found == Fault(str(path), 1, "no signature fits: the audit key is not the one that wrote this log")
    path.write_bytes(lines(path)[0])
    found = verify([path], OTHER_KEY, anchors).fault
    assert found is not None
    assert found.what.endswith("or the audit key is another")


def test_an_edited_first_line_is_not_taken_for_another_key(path: Path) -> None:
    anchors = fill(path)
    path.write_bytes(path.read_bytes().replace(b'"uid":1000', b'"uid":1001', 1))
    assert fault(path, anchors)[1].startswith("the signature does not fit: the line was edited")


def test_a_chain_of_which_nobody_knows_a_line_may_be_empty(path: Path) -> None:
    log = made(path, ["1.0"])[0]
    log.note("chain_opened", opened="1.1")
    assert check(path, closed([log])).ok
    assert "1.1 is missing whole" in fault(path, {"1.1": (1, b64encode(bytes(32)))})[1]


def test_a_signed_line_of_another_form_is_a_fault(path: Path) -> None:
    path.write_bytes(record("1.0", 1, op="start", extra=',"previous":7') + b"\n")
    assert "not in a form that this version knows" in fault(path, {})[1]
    path.write_bytes(record("1.0", 1, op="audit_recovered", extra=',"torn":[[1]],"ends":1') + b"\n")
    assert "not in a form that this version knows" in fault(path, {})[1]


# ---- verifying: earlier runs and files -------------------------------------------------------------------


def two_runs(path: Path) -> tuple[Path, Anchors]:
    """Two files, a run of the daemon each."""
    heads = fill(path, chains=["1.0", "1.1"])
    old = path.rename(path.with_name("kms-audit.log.1"))
    log = AuditLog(path, KEY, "2.0", Clock(1_790_001_000.5))
    log.note("start", previous={chain: list(head) for chain, head in heads.items()})
    encrypt(log)
    return old, closed([log])


def test_a_start_tells_of_the_run_before_it(path: Path) -> None:
    old, anchors = two_runs(path)
    assert check([path, old], anchors).ok
    number, words = fault(path, anchors)
    assert number == 1
    assert words.startswith("this start follows on line 4 of chain 1.0, which is not in the log")
    assert check(path, anchors, partial=True).ok


@pytest.mark.parametrize("keep", [4, 7])
def test_a_run_that_was_cut_before_the_next_start_is_found(path: Path, keep: int) -> None:
    old, anchors = two_runs(path)
    old.write_bytes(b"".join(lines(old)[:keep]))
    assert "this start follows on line 4 of chain 1." in fault([old, path], anchors)[1]
    assert not check([old, path], anchors, partial=True).ok


def test_a_run_that_was_replaced_by_another_is_found(path: Path) -> None:
    old, anchors = two_runs(path)
    old.unlink()
    fill(old, chains=["1.0", "1.1"], rounds=4)
    assert check([old, path], anchors).ok  # the same clock, the same lines
    old.unlink()
    logs = made(old, ["1.0", "1.1"], Clock(1.0))
    for number in range(8):
        encrypt(logs[number % 2], number)
    closed(logs)
    assert "this start follows on line 4" in fault([old, path], anchors)[1]


def test_without_the_earlier_files_the_rest_still_verifies(path: Path) -> None:
    log = made(path, ["1.0"])[0]
    receipts = [encrypt(log, n) for n in range(3)]
    old = path.rename(path.with_name("kms-audit.log.1"))
    receipts += [encrypt(log, n) for n in range(3)]
    anchors = {**closed([log]), "0.9": (5, b64encode(bytes(32)))}
    report = check(path, anchors, receipts=receipts, partial=True)
    assert report.ok
    assert (report.receipts, report.unchecked) == (6, 4)
    path.write_bytes(b"".join(lines(path)[:-1]))
    assert "ends with line 6" in fault(path, anchors, partial=True)[1]
    old.unlink()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 1, 2, 1)])
def test_files_may_come_in_any_order(path: Path, order: tuple[int, ...]) -> None:
    log = made(path, ["9.0"])[0]
    files = []
    for number in range(2):
        encrypt(log, number)
        files.append(path.rename(path.with_name(f"kms-audit.log.{2 - number}")))
    packed = path.with_name("kms-audit.log.2.gz")
    packed.write_bytes(gzip.compress(files[0].read_bytes()))
    files[0] = packed
    log.close()
    later = AuditLog(path, KEY, "10.0", Clock(5.0))  # the clock was set back
    encrypt(later)
    later.close()
    files.append(path)
    given = [files[i] for i in order]
    assert in_order(given) == [str(file) for file in files]
    assert check(given, {"9.0": log.head[1:], "10.0": later.head[1:]}).ok
    assert not check(files[::-1], {}, sort=False).ok
    assert check(files, {}, sort=False).ok


@pytest.mark.parametrize("part", [20, -30, None])
def test_what_was_being_packed_when_the_power_went_is_no_fault(path: Path, part: int | None) -> None:
    """logrotate removes the original last: both lie there, and the one that is whole has all of the log."""
    log = made(path, ["9.0"])[0]
    for number in range(50):
        encrypt(log, number)
    old = path.rename(path.with_name("kms-audit.log.1"))
    encrypt(log)
    head = {"9.0": closed([log])["9.0"]}
    packed = path.with_name("kms-audit.log.1.gz")
    packed.write_bytes(gzip.compress(old.read_bytes())[:part])
    for files in ([old, packed, path], [packed, path, old]):
        assert check(files, head).ok
    another = path.with_name("kms-audit.log.2")
    old.rename(another)  # of another file it is no copy
    assert not check([another, packed, path], head).ok
    packed.rename(path.with_name("kms-audit.log.2.gz"))
    another.write_bytes(b"".join(lines(another)[1:]))  # it is no longer all of it
    assert not check([another, path.with_name("kms-audit.log.2.gz"), path], head).ok


def test_the_first_in_a_file_may_be_a_keeper_that_took_anothers_place(path: Path) -> None:
    """It has an epoch of its own, and the workers keep theirs."""
    worker, files = made(path, ["15.1"])[0], []
    for first, second in ((None, worker), (AuditLog(path, KEY, "16.0"), worker), (worker, None)):
        for log in filter(None, (first, second)):
            encrypt(log)
        files.append(path.rename(path.with_name(f"kms-audit.log.{len(files)}")))
    assert in_order(reversed(files)) == [str(file) for file in files]
    assert check(files, {}).ok


def test_an_empty_file_is_in_order(path: Path) -> None:
    anchors = fill(path)
    empty = path.with_name("empty")
    empty.touch()
    assert check([empty, path], anchors).lines == 12


def test_files_that_can_not_be_read_are_faults(path: Path, tmp_path: Path) -> None:
    anchors = fill(path)
    assert fault(tmp_path / "absent", anchors)[1].startswith("can't be read")
    assert fault(tmp_path, anchors)[1].startswith("can't be read")
    packed = gzip.compress(path.read_bytes())
    path.write_bytes(packed[:-20])
    assert "can't be read" in fault(path, anchors)[1]
    path.write_bytes(packed[:40] + b"xx" + packed[42:])
    assert not check(path, anchors).ok


def test_a_line_that_is_just_being_written_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    monkeypatch.setattr("time.sleep", lambda seconds: path.write_bytes(whole))
    assert check(path, anchors).ok


def test_progress_goes_up_to_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditverify, "BLOCK", 1000)
    anchors = fill(path, 20)
    old = path.with_name("old.gz")
    old.write_bytes(gzip.compress(path.read_bytes()))
    path.write_bytes(b"")
    seen: list[tuple[int, int]] = []
    assert check([old, path], anchors, progress=lambda done, total: seen.append((done, total))).ok
    assert seen == sorted(seen)
    assert seen[-1] == (old.stat().st_size, old.stat().st_size)


# ---- verifying: torn records -------------------------------------------------------------------------


def recovered(path: Path) -> tuple[Lines, Anchors]:
    """Lines: two records, a torn one with another process's record glued on, a blank one, its recovery,
    a record, a torn one, its recovery, a record."""
    first, second = made(path, ["1.0", "1.1"])
    encrypt(first)
    encrypt(second)
    with tearing(150), pytest.raises(AuditUnavailable):
        encrypt(first)
    encrypt(second)
    encrypt(first)
    with tearing(90), pytest.raises(AuditUnavailable):
        encrypt(first)
    encrypt(first)
    return lines(path), closed([first, second])


def test_torn_records_that_are_named_are_no_fault(path: Path) -> None:
    log, anchors = recovered(path)
    assert len(log) == 9
    assert log[3] == b"\n"
    report = check(path, anchors)
    assert report.ok
    assert report.recoveries == 2


RECOVERY_EDITS: dict[str, Callable[[Lines], Lines]] = {
    "the torn part of a glued line": lambda log: [*log[:2], log[2][150:], *log[3:]],
    "a byte of it": lambda log: [*log[:2], log[2][:149] + log[2][150:], *log[3:]],
    "another byte in it": lambda log: [*log[:2], log[2][:149] + b"?" + log[2][150:], *log[3:]],
    "the record of a glued line": lambda log: [*log[:2], log[2][:150] + b"\n", *log[3:]],
    "a glued line apart": lambda log: [*log[:2], log[2][:150] + b"\n", log[2][150:], *log[3:]],
    "the blank line": lambda log: log[:3] + log[4:],
    "a second blank line": lambda log: [*log[:3], b"\n", *log[3:]],
    "a blank line where none is": lambda log: [*log[:7], b"\n", *log[7:]],
    "the recovery": lambda log: log[:4] + log[5:],
    "the torn record": lambda log: log[:6] + log[7:],
    "a torn record's line end": lambda log: [*log[:6], log[6][:-1] + log[7], *log[8:]],
    "torn record and recovery swapped": lambda log: [*log[:6], log[7], log[6], *log[8:]],
    "a torn record moved up in its chain": lambda log: [*log[:5], log[6], log[5], *log[7:]],
    "a torn record twice": lambda log: [*log[:7], log[6], *log[7:]],
}


@pytest.mark.parametrize("case", RECOVERY_EDITS)
def test_edits_around_torn_records_are_found(path: Path, case: str) -> None:
    log, anchors = recovered(path)
    path.write_bytes(b"".join(RECOVERY_EDITS[case](log)))
    assert check(path, anchors).fault is not None


def test_a_torn_end_that_no_start_has_closed_yet_is_a_fault(path: Path) -> None:
    log = made(path, ["1.0"])[0]
    encrypt(log)
    with tearing(100), pytest.raises(AuditUnavailable):
        encrypt(log)
    number, words = fault(path, {"1.0": log.head[1:]})
    assert number == 2
    assert words.startswith("100 bytes that are no audit record; no recovery event accounts for it")


def test_what_two_processes_name_is_named_once(path: Path) -> None:
    """A keeper that is replaced while a worker lives names the worker's torn record; so does the worker."""
    worker = made(path, ["1.1"])[0]
    with tearing(100), pytest.raises(AuditUnavailable):
        encrypt(worker)
    keeper = made(path, ["2.0"])[0]
    assert recover(keeper) == 1
    encrypt(worker)
    encrypt(keeper)
    assert check(path, closed([worker, keeper])).recoveries == 2


# ---- receipts and tombstones -------------------------------------------------------------------------


def test_receipts_are_held_against_the_log(path: Path) -> None:
    log = made(path, ["1.0"])[0]
    kept = [encrypt(log, n) for n in range(5)]
    anchors = closed([log])
    text = ["# mine", "", f"{kept[1]}  # message 7", f"  {kept[4]}\tmessage 9\n", kept[1]]
    assert check(path, anchors, receipts=text).receipts == 3
    assert fault(path, anchors, receipts=[kept[1][:-1] + "x"])[1].startswith("not a receipt")
    wrong = kept[1][:-16] + kept[2][-16:]
    assert fault(path, anchors, receipts=["", wrong]) == (
        2,
        "line 2 of chain 1.0 is not the one that the receipt in line 2 names",
    )
    assert "chain 4.0 is missing whole" in fault(path, anchors, receipts=["4.0:1:0000000000000000"])[1]


@pytest.mark.parametrize(
    "text", ["x", "1.0:0:0000000000000000", "1.0:1:000000000000000", "1.0:1:000000000000000G", "1.0:1"]
)
def test_what_is_no_receipt_is_told_by_its_line(path: Path, text: str) -> None:
    found = check(path, fill(path), receipts=["# receipts", text]).fault
    assert found == Fault("receipts", 2, "not a receipt (<chain>:<seq>:<16 hex digits>)")


def shred(log: AuditLog, key_id: str, outcome: str = "ok") -> None:
    log.record("shred", outcome, 200 if outcome == "ok" else 409, key_fragment(key_id), PEER)


def test_tombstones_are_the_signed_shreds(path: Path) -> None:
    log = made(path, ["1.0"])[0]
    encrypt(log)
    shred(log, "k_1")
    shred(log, "k_2", "failed")
    old = path.rename(path.with_name("kms-audit.log.1"))
    log.record("delete_dek", "ok", 200, key_fragment("k_3"), fragment(op_="shred"))
    with tearing(200), pytest.raises(AuditUnavailable):
        shred(log, "k_4")
    other = made(path, ["1.1"])[0]
    shred(other, "k_5")  # glued to the torn one
    encrypt(log)
    anchors = closed([log, other])
    packed = path.with_name("kms-audit.log.1.gz")
    packed.write_bytes(gzip.compress(old.read_bytes()))
    found = history([path, packed], KEY).shredded
    assert set(found) == {"k_1", "k_5"}
    assert re.fullmatch(r"2026-09-21T14:13:\d\d\.500Z", found["k_1"])
    assert check([packed, path], anchors).shredded == found
    assert history([path, packed], OTHER_KEY).shredded == {}


def test_an_edited_tombstone_is_none(path: Path) -> None:
    log = made(path, ["1.0"])[0]
    shred(log, "k_1")
    shred(log, "k_2")
    log.close()
    path.write_bytes(path.read_bytes().replace(b'"k_1"', b'"k_7"'))
    assert set(history([path], KEY).shredded) == {"k_2"}


@pytest.mark.parametrize("size", [3, 8 << 20])
def test_a_line_however_long_hides_no_tombstone(path: Path, size: int) -> None:
    """Who would have a shredded DEK back could put one before its record; a verifier names it."""
    log = made(path, ["1.0"])[0]
    shred(log, "k_1")
    before = path.read_bytes()
    shred(log, "k_2")
    log.close()
    path.write_bytes(before + b"x" * size + b"\n" + path.read_bytes()[len(before) :])
    assert set(history([path], KEY).shredded) == {"k_1", "k_2"}
    assert fault(path, {})[0] == 2


def test_the_largest_line_is_looked_into(path: Path) -> None:
    log = made(path, ["1.0"])[0]
    log.note("start", previous={}, more="x" * (loose.LONGEST - 400))
    assert check(path, closed([log])).ok


class TestVectors:
    """A chain that release 1 wrote verifies for ever, and with its receipts; changed anywhere it does not."""

    VECTOR = load("audit")

    def verify(self, tmp_path: Path, lines: list[str]) -> Report:
        (tmp_path / "log").write_text("".join(line + "\n" for line in lines))
        chain, seq, _ = self.VECTOR["receipts"][-1].split(":")
        anchors = {chain: (int(seq), json.loads(self.VECTOR["lines"][-1])["sig"])}
        receipts = self.VECTOR["receipts"]
        return verify([tmp_path / "log"], secret(self.VECTOR["key"]), anchors, receipts=receipts)

    def test_verifies_for_ever(self, tmp_path: Path) -> None:
        report = self.verify(tmp_path, self.VECTOR["lines"])
        assert report.fault is None and report.receipts == len(self.VECTOR["lines"]) == 3

    @pytest.mark.parametrize("line", range(3))
    @pytest.mark.parametrize(
        ("old", "new"), [('"status":', '"status":1'), ('"uid":', '"uid":1'), ("3.1", "3.2")]
    )
    def test_changed(self, tmp_path: Path, line: int, old: str, new: str) -> None:
        lines = list(self.VECTOR["lines"])
        lines[line] = lines[line].replace(old, new, 1)
        assert lines != self.VECTOR["lines"] and self.verify(tmp_path, lines).fault is not None

    @pytest.mark.parametrize("line", range(3))
    def test_left_out(self, tmp_path: Path, line: int) -> None:
        lines = self.VECTOR["lines"][:line] + self.VECTOR["lines"][line + 1 :]
        assert self.verify(tmp_path, lines).fault is not None


# ---- how far the store was ---------------------------------------------------------------------------


def grown(path: Path) -> tuple[bytes, tail.Floor]:
    """A log in which the store's changes go from 1 to 7. Returns its first line."""
    changes = iter(range(1, 8))
    log = AuditLog(path, KEY, "3.1", Clock(), change=lambda: next(changes))
    for _ in range(7):
        encrypt(log)
    log.close()
    return path.read_bytes().splitlines(keepends=True)[0], tail.Floor(3, 7)


FORGED = b'{"event":{"chain":"99.1","seq":1,"prev":"","ts":"2999-01-01T00:00:00.000Z","op":"encrypt"'


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("head", [b"", b"x" * 99 + b"\n", FORGED + b"\n"], ids=["", "junk", "forged"])
def test_nothing_that_is_put_beside_the_log_lowers_the_floor(path: Path, head: bytes, packed: bool) -> None:
    """An older line of ours, in a file that claims to be the newest: by that an older store was let in."""
    first, floor = grown(path)
    other = path.with_name(path.name + ".zzz")
    content = head * (3000 if head else 0) + first
    other.write_bytes(gzip.compress(content) if packed else content)
    for order in ([path, other], [other, path]):
        assert tail.floor(order, KEY) == floor


def test_the_floor_where_the_newest_is_packed_already(path: Path) -> None:
    """And the file that goes on after it has no record yet."""
    first, floor = grown(path)
    older, packed = path.with_name(path.name + ".2"), path.with_name(path.name + ".1.gz")
    older.write_bytes(first)
    packed.write_bytes(gzip.compress(path.read_bytes()[len(first) :]))
    path.write_bytes(b"")
    assert tail.floor([path, older, packed], KEY) == floor


def test_what_unpacks_to_far_more_than_a_log_is_not_read_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a start takes as long as somebody likes, who may write into the data-dir."""
    first, floor = grown(path)
    bomb = path.with_name(path.name + ".1.gz")
    bomb.write_bytes(gzip.compress(first + bytes(16 << 20)))
    monkeypatch.setattr(tail, "SCAN", 1 << 20)
    done, read = [0], gzip.GzipFile.read

    def counted(file: gzip.GzipFile, size: int = -1) -> bytes:
        data = read(file, size)
        done[0] += len(data)
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    assert tail.floor([bomb], KEY) == tail.Floor(3, 1)
    assert done[0] < 4 * tail.SCAN
    assert tail.floor([bomb, path], KEY) == floor


def test_the_floor_behind_what_is_no_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins as a record everywhere; to look for the end of each would take hours."""
    _, floor = grown(path)
    monkeypatch.setattr(tail, "SCAN", 2 << 20)
    with open(path, "ab") as file:
        file.write((FORGED + b',"outcome":"') * (3 * tail.SCAN // 100))
        file.write(b"\n" + (FORGED + b',"outcome":"') * 10_000)
    assert tail.floor([path], KEY) == floor


def test_the_floor_behind_a_hole(path: Path) -> None:
    """Of any length: it costs nothing to make one, so it must cost nothing to look behind it."""
    _, floor = grown(path)
    os.truncate(path, path.stat().st_size + (1 << 42))
    assert tail.floor([path], KEY) == floor


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_the_floor_behind_a_long_tail_that_nobody_signed(path: Path, packed: bool) -> None:
    """It hides nothing, and not much of it is held at once."""
    log = AuditLog(path, KEY, "1.0", Clock(), change=lambda: 7)
    encrypt(log)
    log.close()
    floor = tail.floor([path], KEY)
    assert floor is not None and (floor.epoch, floor.change) == (1, 7)
    with open(path, "ab") as file:
        file.truncate(file.tell() + (96 << 20))
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes(), 1))
    tracemalloc.start()
    try:
        assert tail.floor([path], KEY) == floor
        assert tracemalloc.get_traced_memory()[1] < 72 << 20
    finally:
        tracemalloc.stop()
