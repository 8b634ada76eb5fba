"""Any run of the writers verifies; any single edit of a log is found; no bytes crash the verifier."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from progressdb_kms.audit import tail
from progressdb_kms.audit.log import AuditLog, parse
from progressdb_kms.audit.tail import begun, recover
from progressdb_kms.audit.verify import history, verify
from progressdb_kms.errors import AuditUnavailable, StoreDamaged
from tests.harness.auditlogs import (
    KEY,
    Anchors,
    Clock,
    check,
    closed,
    encrypt,
    fill,
    made,
    tearing,
)

QUICK = settings(max_examples=100, deadline=None)
LONG = settings(max_examples=20_000, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def _settled() -> Iterator[None]:
    """No other process is writing: nothing to wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "SETTLE", 0)
        yield


# ---- whatever the writers meet, what they leave behind verifies ------------------------------------

_LIMIT = st.one_of(st.none(), st.none(), st.integers(0, 700), st.just(OSError(28, "full")))
_STEP = st.one_of(
    st.tuples(st.integers(0, 2), st.just("record"), _LIMIT),
    st.tuples(st.integers(0, 2), st.just("record"), _LIMIT),
    st.tuples(st.integers(0, 2), st.just("record"), st.integers(-3, -1)),  # so many bytes short of the whole
    st.tuples(st.integers(0, 2), st.just("check"), _LIMIT),
    st.tuples(st.just(0), st.sampled_from(("rotate", "crash", "reopen")), st.none()),
)


def _limited(limit: object, size: int) -> int | None:
    if isinstance(limit, int):
        return max(0, size + limit) if limit < 0 else limit
    return None


class _World:
    """Three processes' logs on one path, and what their callers were told."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "kms-audit.log"
        self.clock = Clock()
        self.epoch = 1
        self.logs: list[AuditLog] = []
        self.receipts: list[str] = []
        self.anchors: Anchors = {}
        self.files = 0
        self.straddles = False
        self.start()

    def start(self) -> None:
        self.logs = made(self.path, [f"{self.epoch}.{n}" for n in range(3)], self.clock)
        recover(self.logs[0])
        previous = {chain: list(head) for chain, head in self.anchors.items()}
        self.receipts.append(self.logs[0].note("start", previous=previous))

    def crash(self) -> None:
        """All processes die. Not modelled: a rotation between a torn record and its repair, and then this."""
        if self.straddles:
            return
        for log in self.logs:
            self.anchors[log.chain] = log.head[1:]
            os.close(log._fd)
            log._leave()
        self.epoch += 1
        self.start()

    def reopen(self) -> None:
        for log in self.logs:
            with contextlib.suppress(AuditUnavailable):
                log.reopen()

    def rotate(self) -> None:
        if not self.path.exists():
            return
        self.files += 1
        self.straddles = any(log._torn for log in self.logs)
        self.path.rename(self.path.with_name(f"kms-audit.log.{self.files}"))

    def record(self, who: int, limit: object) -> None:
        limits = [limit] if isinstance(limit, OSError) else [_limited(limit, 300)]
        with tearing(*limits), contextlib.suppress(AuditUnavailable):
            self.receipts.append(encrypt(self.logs[who], who))

    def check(self, who: int, limit: object) -> None:
        with tearing(_limited(limit, 300)), contextlib.suppress(AuditUnavailable):
            self.logs[who].check()

    def end(self) -> list[Path]:
        for log in self.logs:
            log.check()
        self.anchors.update(closed(self.logs))
        return [*(self.path.with_name(f"kms-audit.log.{n}") for n in range(1, self.files + 1)), self.path]


def _run(steps: list[tuple[int, str, object]]) -> None:
    with tempfile.TemporaryDirectory(prefix="kms-") as folder:
        world = _World(Path(folder))
        for who, what, limit in steps:
            if what in ("record", "check"):
                getattr(world, what)(who, limit)
            else:
                getattr(world, what)()
        files = world.end()
        placed = all(b'Z","op"' in file.read_bytes() for file in files)  # a file with less can't be sorted in
        report = check(files[::-1] if placed else files, world.anchors, receipts=world.receipts, sort=placed)
        assert report.fault is None, report.fault
        assert report.receipts == len(world.receipts)


@QUICK
@given(st.lists(_STEP, max_size=25))
@example([(0, "record", None), (0, "record", -1), (1, "record", None), (0, "record", None)])
@example([(0, "record", -1), (0, "record", None)])
@example([(0, "record", -1), (0, "crash", None), (0, "record", None)])
@example([(0, "record", -1), (1, "record", None), (0, "crash", None)])
@example([(0, "record", -1), (1, "record", 1), (2, "record", 1)])
@example([(2, "record", None), (2, "record", -1), (0, "record", 9)])
@example([(0, "record", 5), (1, "record", 3), (2, "record", None), (1, "record", 1), (0, "record", 1)])
@example([(0, "record", 1), (1, "record", 10), (0, "record", 2)])  # the second ends as the first begins
@example([(0, "record", 7), (0, "record", 1), (0, "record", 8), (0, "rotate", None), (0, "record", None)])
def test_whatever_happens_the_log_verifies(steps: list[tuple[int, str, object]]) -> None:
    _run(steps)


def test_a_record_that_was_torn_at_the_beginning_of_a_file() -> None:
    """What was found by the long run: no line of that file is whole."""
    _run([(0, "rotate", None), (0, "record", 1), (0, "crash", None)])


_ALIKE = (1, 2, 9, 10, 11)
"""Bytes after which a record that is cut may look like others: `{"event":{"chain"` begins so twice."""


def _cut_alike(records: int) -> Iterator[list[tuple[int, str, object]]]:
    """All ways in which two or three processes leave so many records of these lengths; that a repair was cut
    is one byte longer for its line end."""
    for steps in itertools.product(range(3), _ALIKE, repeat=records):
        who = list(dict.fromkeys(steps[::2]))
        if who == sorted(who) and who[0] == 0:
            yield [(process, "record", size) for process, size in zip(steps[::2], steps[1::2])]


@pytest.mark.parametrize("records", [3, pytest.param(4, marks=pytest.mark.long)])
def test_records_that_are_cut_alike_verify(records: int) -> None:
    for steps in _cut_alike(records):
        _run(steps)


@example([(0, "record", 1), (1, "record", 10), (0, "record", 10), (2, "record", 10)])
@pytest.mark.long
@LONG
@given(st.lists(_STEP, max_size=40))
def test_whatever_happens_for_long_the_log_verifies(steps: list[tuple[int, str, object]]) -> None:
    _run(steps)


# ---- any single edit is found ------------------------------------------------------------------------


class _Log(NamedTuple):
    data: bytes
    anchors: Anchors


def _plain() -> _Log:
    with tempfile.TemporaryDirectory(prefix="kms-") as folder:
        path = Path(folder) / "log"
        anchors = fill(path, 5)
        return _Log(path.read_bytes(), anchors)


def _repaired() -> _Log:
    """Torn records alone, side by side and with a record glued on, and two runs of the daemon."""
    with tempfile.TemporaryDirectory(prefix="kms-") as folder:
        world = _World(Path(folder))
        for who, limit in ((0, None), (1, 150), (2, 90), (0, None), (1, None), (2, None), (0, 120), (0, -1)):
            world.record(who, limit)
        world.crash()
        for who, limit in ((1, None), (0, 60), (0, None), (2, None)):
            world.record(who, limit)
        (path,) = world.end()
        return _Log(path.read_bytes(), world.anchors)


PLAIN, REPAIRED = _plain(), _repaired()

_ORDER = re.compile(
    rb'\{"event":\{"chain":"([0-9.]+)","seq":[0-9]+,[^{}]*(?:\{[^{}]*\}[^{}]*)?\},"sig":"[^"]*"\}'
)


def _story(data: bytes) -> tuple[dict[bytes, list[bytes]], list[bytes]]:
    """What a log says: the lines of each chain in their order, and all other lines in any.

    Edits that leave it as it was need not be found: processes have no order between them.
    """
    chains: dict[bytes, list[bytes]] = {}
    others: list[bytes] = []
    for line in data.split(b"\n"):
        record = _ORDER.fullmatch(line)
        (chains.setdefault(record[1], []) if record else others).append(line)
    return chains, sorted(others)


@st.composite
def _edited(draw: st.DrawFn, data: bytes) -> bytes:
    """One edit: of bytes, or of lines."""
    at = draw(st.integers(0, len(data) - 1))
    to = draw(st.integers(at + 1, min(len(data), at + draw(st.sampled_from([1, 3, 500])))))
    lines = data.splitlines(keepends=True)
    one, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
    kind = draw(
        st.sampled_from(["flip", "cut", "insert", "repeat", "end", "delete", "double", "swap", "move"])
    )
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at] + data[to:]
    if kind == "insert":
        return data[:at] + draw(st.sampled_from([b"\n", b" ", b"\0", b"{", b"x\n", b"\n\n"])) + data[at:]
    if kind == "repeat":
        return data[:to] + data[at:]
    if kind == "end":
        return data[:at]
    line = lines[one]
    if kind == "swap":
        lines[one], lines[other] = lines[other], line
    else:
        del lines[one]
        lines[other:other] = {"delete": [], "double": [line, line], "move": [line]}[kind]
    return b"".join(lines)


def _found(log: _Log, data: bytes) -> bool:
    with tempfile.NamedTemporaryFile(prefix="kms-") as file:
        file.write(data)
        file.flush()
        return check(Path(file.name), log.anchors).fault is not None


def test_the_logs_to_edit_are_in_order() -> None:
    assert not _found(PLAIN, PLAIN.data)
    assert not _found(REPAIRED, REPAIRED.data)
    assert REPAIRED.data.count(b"audit_recovered") == 5
    assert b"\n\n" in REPAIRED.data


@settings(QUICK, max_examples=250)
@given(_edited(PLAIN.data))
def test_any_edit_is_found(data: bytes) -> None:
    assert _story(data) == _story(PLAIN.data) or _found(PLAIN, data)


@settings(QUICK, max_examples=250)
@given(_edited(REPAIRED.data))
def test_any_edit_around_torn_records_is_found(data: bytes) -> None:
    assert _story(data) == _story(REPAIRED.data) or _found(REPAIRED, data)


@pytest.mark.long
@LONG
@given(st.sampled_from([PLAIN, REPAIRED]).flatmap(lambda log: st.tuples(st.just(log), _edited(log.data))))
def test_any_of_many_edits_is_found(case: tuple[_Log, bytes]) -> None:
    log, data = case
    assert _story(data) == _story(log.data) or _found(log, data)


@QUICK
@given(st.integers(0, len(PLAIN.data) - 1), st.integers(1, 15))
def test_a_cut_is_found_unless_it_takes_whole_lines_behind_the_last_anchor(size: int, anchored: int) -> None:
    """The one cut that nobody can see: nothing outside the file knew of these lines yet."""
    lines = PLAIN.data.splitlines(keepends=True)
    anchors: Anchors = {}
    for line in lines[:anchored]:
        event = parse(line)
        anchors[event["chain"]] = (event["seq"], event["sig"])
    kept = PLAIN.data[:size]
    unseen = kept.endswith(b"\n") and kept.count(b"\n") >= anchored
    assert _found(PLAIN._replace(anchors=anchors), kept) != unseen


# ---- any bytes ---------------------------------------------------------------------------------------------

_PARTS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [*PLAIN.data.splitlines(True), *REPAIRED.data.splitlines(True), b"\n", b'"}', b"\x1f\x8b"]
    ),
    st.tuples(st.integers(0, len(REPAIRED.data)), st.integers(0, 400)).map(
        lambda cut: REPAIRED.data[cut[0] : cut[0] + cut[1]]
    ),
)


@QUICK
@given(st.lists(_PARTS, max_size=12).map(b"".join), st.booleans(), st.lists(st.text(max_size=40), max_size=3))
def test_any_bytes_give_a_report(data: bytes, partial: bool, receipts: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="kms-") as folder:
        path = Path(folder) / "kms-audit.log"
        path.write_bytes(data)
        verify([path], KEY, PLAIN.anchors, partial=partial, receipts=receipts)
        begun(path)
        with contextlib.suppress(StoreDamaged):
            history([path], KEY)
        for line in data.splitlines():
            with contextlib.suppress(ValueError):
                parse(line)


@settings(QUICK, max_examples=50)
@given(st.lists(_PARTS, max_size=6).map(b"".join))
def test_any_log_can_be_gone_on_with(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="kms-") as folder:
        path = Path(folder) / "kms-audit.log"
        path.write_bytes(data)
        log = AuditLog(path, KEY, "99.0")
        recover(log)
        encrypt(log)
        log.close()
        whole = path.read_bytes()
        assert whole.startswith(data)
        assert whole[len(data) :].lstrip(b"\n").startswith(b'{"event":{"chain":"99.0","seq":1,')
