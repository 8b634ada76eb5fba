"""`audit search` and `audit report`: what they find, what they say, and what no text does to the page."""

from __future__ import annotations

import collections
import csv
import gzip
import io
import json
import random
import re
from argparse import Namespace
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.audit.chain import Fault, Report
from progressdb_kms.audit.log import (
    MARK,
    AuditLog,
    fragment,
    key_fragment,
    peer_fragment,
)
from progressdb_kms.audit.shared import Shared
from progressdb_kms.audit.tail import in_order
from progressdb_kms.audit.verify import Reading, verify
from progressdb_kms.errors import AuditUnavailable, PolicyRefused
from progressdb_kms.rules import Peer
from progressdb_kms.service.metrics import Metrics
from progressdb_kms.store.contract import HEAVY, DekRecord, Usage
from progressdb_kms.tools import auditcmd, auditcounts, auditreport, auditsearch
from progressdb_kms.tools.auditsearch import Hits, Query, moment
from progressdb_kms.tools.console import UsageError
from progressdb_kms.wire.admission import Refusals
from tests.harness import Daemon
from tests.harness.auditlogs import KEY, Anchors, Clock, fill, tearing
from tests.harness.browser import CHROMIUM, Browser
from tests.harness.memstore import MemoryStore

EVIL = '"><script>alert(1)</script>,"uid":0,\\"key_id\\":\\"k_1\\"'


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """Eight records, a second apart."""
    path = tmp_path / "kms-audit.log"
    book = AuditLog(path, KEY, "1.1", Clock())
    me, other = peer_fragment(1000, 1000, 1), peer_fragment(2000, 2000, 2)
    book.record("encrypt", "ok", 200, key_fragment("k_1", "general"), me, fragment(request_id="r-1"))
    book.record("encrypt", "ok", 200, key_fragment("k_2", EVIL), me)
    book.record("decrypt", "failed", 422, key_fragment("k_1"), other, fragment(code="authentication_failed"))
    book.record("decrypt", "refused", 403, other, fragment(code="peer_refused"))
    book.record("encrypt_batch", "ok", 200, me, fragment(count=3, failed=2, keys=["k_1", "k_3"]))
    book.record("reencrypt", "ok", 200, key_fragment("k_2"), me, fragment(new_key_id="k_9"))
    book.note("rotation_finished", new_kek_id="0" * 16, rewrapped=3)
    book.record("decrypt", "ok", 200, key_fragment("k_10"), peer_fragment(10000, 1, 1))
    book.close()
    yield path


def found(path: Path, **wanted: Any) -> list[int]:
    """The seqs that a query finds, as the command reads them."""
    seqs: list[int] = []
    hits = Hits(Query(**wanted), KEY, lambda event: seqs.append(event["seq"]))
    report = verify([path], KEY, {}, partial=True, observe=hits)
    assert report.ok and hits.unsigned == 0 and hits.found == len(seqs)
    return seqs


def test_each_condition(log: Path) -> None:
    assert found(log) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found(log, key="k_1") == [1, 3, 5]  # in a batch too, and k_10 is another
    assert found(log, key="k_9") == [6]  # the target of a reencrypt
    assert found(log, thread="general") == [1]
    assert found(log, thread=EVIL) == [2]
    assert found(log, uid=2000) == [3, 4]
    assert found(log, uid=1000) == [1, 2, 5, 6]  # 10000 is another
    assert found(log, uid=0) == []  # whatever a thread is called
    assert found(log, op="decrypt") == [3, 4, 8]
    assert found(log, outcome="refused") == [4]
    assert found(log, op="decrypt", uid=2000, outcome="failed") == [3]


def test_times(log: Path) -> None:
    stamps = [json.loads(line)["event"]["ts"] for line in log.read_bytes().splitlines()]
    assert found(log, since=stamps[2], until=stamps[4]) == [3, 4]
    assert found(log, since=stamps[7]) == [8]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("2h", "2026-09-21T12:13:20.000000Z"),
        ("7d", "2026-09-14T14:13:20.000000Z"),
        ("2026-11-24", "2026-11-24T00:00:00.000000Z"),
        ("2026-11-24T10:00", "2026-11-24T10:00:00.000000Z"),
        ("2026-11-24T10:00:00Z", "2026-11-24T10:00:00.000000Z"),
        ("2026-11-24T10:00:00+02:00", "2026-11-24T08:00:00.000000Z"),
    ],
)
def test_spellings_of_a_time(text: str, expected: str) -> None:
    assert moment(text, 1_790_000_000) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "2", "h", "2026-13-01", "2 h", "-1h", "1y"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="is no time"):
        moment(text, 1_790_000_000)


WORDS = [
    "k_1",
    "k_10",
    "general",
    '"',
    "\\",
    '\\"',
    ',"uid":0',
    '"thread_id":"general"',
    "{",
    "}",
    "]",
    "[k_1",
    "\n",
    "é",
]


def test_the_short_way_finds_what_the_long_way_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a text holds: a verified block, and the same with nobody who vouches for it."""
    chance, path = random.Random(7), tmp_path / "kms-audit.log"
    book = AuditLog(path, KEY, "1.1", Clock())
    for number in range(400):
        thread = "".join(chance.choices(WORDS, k=chance.randrange(1, 4)))
        keys = chance.sample(["k_1", "k_10", "k_1.x"], 2)
        peer = peer_fragment(chance.choice((0, 1, 10)), 0, number)
        more = [
            fragment(keys=keys),
            fragment(embedded=1),
            fragment(new_key_id=keys[1]),
            fragment(request_id=thread.replace("\n", "")),
        ]
        op, outcome = chance.choice(("encrypt", "decrypt")), chance.choice(("ok", "failed"))
        book.record(op, outcome, 200, key_fragment(keys[0], thread), peer, chance.choice(more))
        if number % 50 == 0:
            book.note("rotation_finished", nested={"a": 1, "uid": 10, "key_id": "k_1"})
    book.close()
    block, stamps = path.read_bytes(), re.findall('"ts":"([^"]+)"', path.read_text())
    wanted: list[dict[str, Any]] = [{}, {"op": "encrypt"}, {"outcome": "failed"}, {"embedded": True}]
    wanted += [{"key": key} for key in ("k_1", "k_10", "k_1.", "general")]
    wanted += [{"thread": thread} for thread in (*WORDS, "general{", "k")]
    wanted += [{"uid": uid} for uid in (0, 1, 10)] + [
        {"uid": 1, "op": "decrypt", "key": "k_1", "outcome": "ok"}
    ]
    wanted += [{"since": stamps[9]}, {"until": stamps[9]}, {"since": stamps[3], "until": stamps[7], "uid": 1}]
    for one in wanted:
        ways = []
        for verified in (True, False):
            hits = Hits(Query(**one), KEY, auditsearch.as_json)
            hits(block, verified)
            ways.append((hits.found, capsys.readouterr().out))
        assert ways[0] == ways[1], one
        assert ways[0][0] or "thread" in one or one in ({"key": "k_1."}, {"key": "general"}), one


def test_a_damaged_line_is_named_and_is_no_end(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"status":422', b'"status":200')
    log.write_bytes(b"".join(lines))
    events: list[dict[str, Any]] = []
    hits = Hits(Query(key="k_1"), KEY, events.append)
    report = verify([log], KEY, {}, partial=True, observe=hits)
    assert report.fault is not None and report.fault.line == 3
    assert [(event["seq"], event["verified"]) for event in events] == [(1, True), (3, False), (5, True)]
    assert hits.unsigned == 1
    assert "NOT SIGNED" in auditsearch.summary(report, hits, True, 0.0) and ":3:" in str(report.fault)


def test_a_file_that_is_no_log_or_no_gzip_is_named(log: Path, tmp_path: Path) -> None:
    packed = tmp_path / "kms-audit.log.1.gz"
    packed.write_bytes(gzip.compress(b"not a log\n")[:-4])
    seen: list[bytes] = []
    report = Report(in_order([log, packed]))
    Reading(report, None).through(None, lambda block, verified: seen.append(block))
    assert isinstance(report.fault, Fault) and report.fault.file == str(packed)
    assert log.read_bytes() in seen


def test_without_a_key_nothing_is_said_to_be_verified(log: Path) -> None:
    events: list[dict[str, Any]] = []
    hits = Hits(Query(), None, events.append)
    report = Report([str(log)])
    Reading(report, None).through(None, hits)
    assert len(events) == 8 and {event["verified"] for event in events} == {None}
    assert "not verified" in auditsearch.summary(report, hits, False, 0.0)


def test_csv_holds_no_formula(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = AuditLog(log, KEY, "2.1", Clock())
    book.record("encrypt", "ok", 200, key_fragment("k_1", '=HYPERLINK("x")'))
    book.close()
    hits = Hits(Query(), KEY, auditsearch.as_csv())
    assert verify([log], KEY, {}, partial=True, observe=hits).ok
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows[-1]["thread_id"] == '\'=HYPERLINK("x")' and rows[1]["thread_id"] == EVIL
    assert {row["verified"] for row in rows} == {"yes"}


def test_a_record_behind_a_torn_one_in_its_line_is_found(log: Path) -> None:
    torn, other = (AuditLog(log, KEY, chain, Clock()) for chain in ("2.1", "2.2"))
    with tearing(180), pytest.raises(AuditUnavailable):
        torn.record("encrypt", "ok", 200, key_fragment("k_5", "general"), fragment(request_id="torn"))
    other.record("shred", "ok", 200, key_fragment("k_6"), fragment(request_id="behind it"))
    torn.record("encrypt", "ok", 200, key_fragment("k_5"), fragment(request_id="after it"))
    for book in (torn, other):
        book.close()
    assert any(line.count(MARK) == 2 for line in log.read_bytes().splitlines())
    assert found(log, key="k_6") == [1] and found(log, op="shred") == [1] and found(log, key="k_5") == [2]
    assert "k_6" in page_of(log).split("Rotations, shreds")[1]


# What somebody may put into a log: another encoding, other types, depth, length, half a letter.
FORGED = [
    "{}\n".encode("utf-16"),
    b'{"event":{"ts":5,"op":["x"],"outcome":{},"keys":7,"key_id":"k_1"},"sig":"x"}\n',
    b'{"event":{"ts":"2026-09-21T14","op":"shred","outcome":"ok","keys":[[]],"key_id":7},"sig":{}}\n',
    b'{"event":%b,"sig":"x"}\n' % (b"[" * 100_000),
    b"x" * (5 << 20) + b"\n",
    b'{"event":{"chain":"1.1","seq":9,"prev":"","ts":"0001-01-01T00:00:00Z","op":"encrypt","outcome":"ok",'
    b'"status":200,"key_id":"k_\xff\xfe"},"sig":"x"}\n',
    b'{"event":{"ts":"2026-09-21T14:00:00Z","op":"shred","outcome":"ok","status":200,"key_id":"k_1",'
    b'"thread_id":"\\ud800\\u202e<script>%b"},"sig":"x"}\n' % (b"long " * 1000),
    b'{"event":{"ts":"2026-09-21T14:00:00Z","op":"encrypt","outcome":"ok","status":200,"key_id":"%b"},"sig":"x"}\n'
    % (b"k" * 500_000),
    b'"ts":"' * 1000 + b"\n",
]


@pytest.mark.parametrize("form", ["json", "csv", "table"])
def test_nothing_that_others_wrote_ends_a_search(
    log: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:6], *FORGED, *lines[6:]]))
    show = {"json": lambda: auditsearch.as_json, "csv": auditsearch.as_csv, "table": auditsearch.as_table}
    for key in (KEY, None):
        hits = Hits(Query(), key, show[form]())
        report = verify([log], KEY, {}, partial=True, observe=hits)
        assert report.fault is not None and report.fault.line == 7
        assert hits.unsigned == (3 if key else 0) and hits.found == 8 + 3
        shown = capsys.readouterr().out
        assert shown.encode() and "rotation_finished" in shown and "k_10" in shown
    seen: list[Any] = []
    hits = Hits(Query(key="k_10"), KEY, seen.append)
    verify([log], KEY, {}, partial=True, observe=hits)
    assert [(event["seq"], event["verified"]) for event in seen] == [(8, True)]


def test_nothing_that_others_wrote_spoils_the_page(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    many = [
        b'{"event":{"chain":"1.1","seq":%d,"prev":"","ts":"20%02d-01-01T00:00:00Z","op":"op_%b","outcome":"ok",'
        b'"status":200,"actor":"peer_uid:%d"},"sig":"x"}\n' % (i, i % 100, b"a" * (i % 30), i)
        for i in range(1000)
    ]
    log.write_bytes(b"".join([*lines[:6], *FORGED, *many, *lines[6:]]))
    text = page_of(log)
    assert len(text.encode()) < 500_000 and "The log has a fault." in text
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and "script" not in {tag for tag, _ in tags.tags}
    assert "\u202e" not in text and "\\u202e" in text and "and 803 more" in text
    assert "<title>2026-09-21: 8 ok, 2 refused or failed</title>" in text


# ---- the page ------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


NOW = 1795515000.0  # 2026-11-24


def page_of(log: Path, anchors: Anchors | None = None) -> str:
    store = MemoryStore(memoryview(bytearray(32)))
    with store.transaction():
        for name, state in (("k_1", "enabled"), ("k_7", "enabled"), ("k_8", "pending_deletion")):
            store.put(
                DekRecord(name, EVIL, b"w", "a" * 16, 1, "2026-01-01T00:00:00.000000Z", state, "2026-12-01")
            )
    with store.transaction():
        store.count(
            [("k_1", Usage(5_000_000, 17, 1, int(NOW) - 86400, 1000)), ("k_7", Usage(HEAVY, 0, 1, 1))]
        )
    counts = auditcounts.Counts()
    report = verify([log], KEY, anchors or {}, partial=True, observe=counts)
    return auditreport.page(
        counts, auditreport.holdings(store, counts.keys, NOW), report, "/data", "2026-11-24T10:00:00Z"
    )


def test_what_the_store_names_and_no_file_has_is_told(tmp_path: Path) -> None:
    """A log that was emptied was said to verify, and to agree with the store."""
    path = tmp_path / "kms-audit.log"
    anchors = fill(path)
    assert "the heads kept in the store agree" in page_of(path, anchors)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[6:]))
    assert "(3 of the chains begin in older files that were not read)" in page_of(path, anchors)
    path.write_bytes(b"")
    text = page_of(path, anchors)
    assert "something is not here" in text and "3 heads of chains that the store names, in none" in text
    assert "agree with" not in text and "The chains verify" not in text
    hits = Hits(Query(), KEY, lambda event: None)
    report = verify([path], KEY, anchors, partial=True, observe=hits)
    assert "0 chains verified; 3 heads of chains" in auditsearch.summary(report, hits, True, 0.0)


@pytest.mark.parametrize("shared", [False, True])
def test_of_a_packed_file_that_was_cut_what_is_there_is_found(tmp_path: Path, shared: bool) -> None:
    """All of its last 256 KiB was left out, which may be the whole file."""
    path, packed = tmp_path / "kms-audit.log", tmp_path / "kms-audit.log.1.gz"
    anchors = fill(path, 1500)
    whole = path.read_bytes()
    packed.write_bytes(gzip.compress(whole)[:-2000])
    path.unlink()
    events: list[dict[str, Any]] = []
    reading = (lambda report, progress: Shared(report, progress, 2)) if shared else None
    report = verify(
        [packed], KEY, anchors, partial=True, observe=Hits(Query(), KEY, events.append), reading=reading
    )
    assert str(report.fault).startswith(f"{packed}:") and "can't be read" in str(report.fault)
    assert whole.count(b"\n") > len(events) > whole.count(b"\n") - 80
    assert all(event["verified"] for event in events)


def test_what_can_t_be_read_is_named_without_a_key_too(log: Path, tmp_path: Path) -> None:
    packed = tmp_path / "kms-audit.log.1.gz"
    packed.write_bytes(gzip.compress(log.read_bytes())[:-40])
    hits = Hits(Query(), None, lambda event: None)
    report = Report(in_order([packed]))
    Reading(report, None).through(None, hits)
    assert f"FAULT at {packed}: can't be read" in auditsearch.summary(report, hits, False, 0.0)


def test_until_before_since() -> None:
    with pytest.raises(UsageError, match="--until 2h is before --since 1h"):
        auditcmd.span(Namespace(since="1h", until="2h"))
    assert auditcmd.span(Namespace(since="2h", until="1h")) < ("~", "~")


def test_the_page_is_whole_and_loads_nothing(log: Path) -> None:
    text = page_of(log)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    names = {tag for tag, _ in tags.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "a", "form"})
    assert not any(
        name.startswith("on") or name in ("src", "href") for _, attrs in tags.tags for name in attrs
    )
    assert "default-src 'none'" in text and not re.search(r"url\((?!#)", text)


def test_no_thread_id_breaks_out_of_the_markup(log: Path) -> None:
    text = page_of(log)
    assert "<script" not in text and "&lt;script&gt;" in text


def test_the_page_tells_what_the_log_holds(log: Path) -> None:
    text = re.sub(r"<[^>]+>", " ", page_of(log))
    assert "The chains verify." in text and "8 records" in text
    for row in ("decrypt 1 1 1", "encrypt 2 0 0", "2000 0 1 1 0", "1000 4 0 0 2"):
        assert re.search(r"\s+".join(row.split()), text), row
    assert re.search(r"k_7", text) and "rotation_finished" in text
    never = text.split("DEKs never used")[1].split("Deletions due")[0]
    assert "k_7" in never and "k_1 " not in never
    assert re.search(r"k_1\s+\d\s+5,000,000\s+17\s+2026-11-23T\S+\s+1000\s", text)
    assert re.search(r"k_7\s+1970-01-01T00:00:01", never) and re.search(r"k_8\s+never", never)
    assert "2 are older than 90 days and were not used since." in text
    assert "the DEK k_7 has 2,147,483,648 encrypts of 4,294,967,296" in text


KINDS = [
    ("encrypt", "ok"),
    ("decrypt", "failed"),
    ("decrypt_batch", "ok"),
    ("reencrypt", "ok"),
    ("get_wrapped", "ok"),
    ("create_dek", "ok"),
    ("shred", "ok"),
    ("rotate_kek", "refused"),
]


def test_what_is_counted_is_what_json_says(tmp_path: Path) -> None:
    """Whatever a text holds, over hours, by socket and TCP and by nobody, within a time and without."""
    chance, path, clock = random.Random(3), tmp_path / "kms-audit.log", Clock()
    book = AuditLog(path, KEY, "1.1", clock)
    for number in range(900):
        clock.now += chance.randrange(60)
        (op, outcome), key_id = chance.choice(KINDS), f"k_{chance.randrange(9)}"
        thread = "".join(chance.choices(WORDS, k=chance.randrange(4)))
        key = key_fragment(key_id, thread) if chance.random() < 0.8 else fragment()
        peer = peer_fragment(chance.choice((0, 1, 10, -1)), 0, number, chance.choice(("", "tcp")))
        named = [fragment(keys=["k_7", f"k_x{number % 5}"]), fragment(new_key_id="k_y", embedded=1)]
        more = (
            chance.choice(named) if op == "reencrypt" else named[0] if op == "decrypt_batch" else fragment()
        )
        book.record(op, outcome, 200, key, peer, more)
    book.close()
    block = path.read_bytes()
    events = [json.loads(line)["event"] for line in block.splitlines()]
    stamps = [event["ts"] for event in events]
    for since, until in (("", ""), (stamps[99], ""), (stamps[99], stamps[400]), ("", stamps[3][:20])):
        meant = [event for event in events if since <= event["ts"] < (until or "~")]
        for verified in (True, False):
            counts = auditcounts.Counts(since, until)
            counts(block, verified)
            assert_counted(counts, meant)


def assert_counted(counts: auditcounts.Counts, events: list[dict[str, Any]]) -> None:
    calls = collections.Counter((e["ts"][:13], e["op"], e["outcome"]) for e in events)
    assert {tuple(map(bytes.decode, call)): n for call, n in counts.calls.items()} == calls
    uids = collections.Counter((str(max(e.get("uid", -1), -1)), e["outcome"]) for e in events)
    assert {(uid.decode() or "-1", out.decode()): n for (uid, out), n in counts.uids.items()} == uids
    used = ("encrypt", "decrypt", "decrypt_batch", "reencrypt", "get_wrapped")
    good = [event for event in events if event["outcome"] == "ok" and event["op"] in used]
    keys = collections.Counter(e["key_id"] for e in good if "key_id" in e and e["op"] != "decrypt_batch")
    keys.update(key for event in good for key in event.get("keys", ()))
    keys.update(event["new_key_id"] for event in good if "new_key_id" in event)
    assert {key.decode(): n for key, n in counts.keys.items()} == keys
    told = [event for event in events if event["op"] in auditcounts.TOLD]
    assert [event["seq"] for event in counts.told] == [e["seq"] for e in told][-auditcounts.EVENTS :]
    assert counts.lines == len(events)


def test_a_fault_stands_in_the_page(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3] + lines[4:]))
    assert "The log has a fault." in page_of(log)


def test_an_empty_log_makes_a_page(tmp_path: Path) -> None:
    path = tmp_path / "kms-audit.log"
    path.touch()
    assert "none in this time" in page_of(path)


def test_refusals_that_are_one_record_count_as_many(tmp_path: Path) -> None:
    path, counts = tmp_path / "kms-audit.log", auditcounts.Counts()
    book = AuditLog(path, KEY, "1.1", Clock())
    refusals = Refusals(book, Metrics(1).block(0))
    for _ in range(30):
        refusals.add(Peer(2000, 2000, 1), PolicyRefused("uid 2000 may not encrypt", entry=3), "encrypt")
    refusals.flush(everything=True)
    book.close()
    assert verify([path], KEY, {}, observe=counts).ok
    assert counts.lines == 2 and dict(counts.uids) == {(b"2000", b"refused"): 30}
    assert [(op, outcome, count) for (_, op, outcome), count in counts.calls.items()] == [
        (b"encrypt", b"refused", 30)
    ]


def test_a_clock_that_was_wrong_hides_no_day(tmp_path: Path) -> None:
    path, clock = tmp_path / "kms-audit.log", Clock(0.0)
    book = AuditLog(path, KEY, "1.1", clock)
    for now in (0.0, 1_790_000_000.0, 1_790_100_000.0):
        clock.now = now
        book.record("encrypt", "ok", 200, key_fragment("k_1"))
    book.close()
    assert re.findall("<title>([^:]*): 1 ok", page_of(path)) == ["1970-01-01", "2026-09-21", "2026-09-22"]


def test_a_page_over_months_has_bars_of_days(tmp_path: Path) -> None:
    path = tmp_path / "kms-audit.log"
    clock = Clock()
    book = AuditLog(path, KEY, "1.1", clock)
    for _ in range(40):
        book.record("encrypt", "ok", 200, key_fragment("k_1"))
        clock.now += 86_400
    book.close()
    text = page_of(path)
    assert "in the busiest day" in text and text.count("<title>2026") == 40


# ---- as commands ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped() -> Iterator[Daemon]:
    with Daemon(workers=1) as daemon:
        with daemon.session() as kms:
            for i in range(3):
                kms.ok("POST", "/deks", {"thread_id": f"t{i}", "key_id": f"k_{i}"}, 201)
                kms.encrypt(f"k_{i}", b"hi")
        daemon.stop()
        yield daemon


def test_search_as_a_command(stopped: Daemon) -> None:
    done = stopped.offline("audit", "search", "--key", "k_1", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [event["op"] for event in events] == ["create_dek", "encrypt"]
    assert all(event["verified"] for event in events)
    assert re.search(rb"2 records found in 1 file .*; [0-9]+ chains verified\n", done.stderr)
    done = stopped.offline("audit", "search", "--op", "encrypt", "--since", "1h")
    assert done.stdout.count(b"\n") == 4 and b"k_2" in done.stdout
    assert stopped.offline("audit", "search", "--since", "soon").returncode == 2
    done = stopped.offline("audit", "search", "--json", "--csv")
    assert done.returncode == 2 and not done.stdout and b"--json and --csv exclude" in done.stderr
    assert stopped.offline("audit", "search", "--outcome", "good").returncode == 2


def test_a_page_that_can_t_be_written_is_told_before_the_log_is_read(stopped: Daemon, tmp_path: Path) -> None:
    done = stopped.offline("audit", "report", f"{tmp_path}/none/page.html", f"{tmp_path}/no-log")
    assert done.returncode == 1 and b"there is no folder" in done.stderr and b"no-log" not in done.stderr


def test_report_as_a_command(stopped: Daemon, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    done = stopped.offline("audit", "report", str(target))
    assert done.returncode == 0, done.stderr
    text = target.read_text()
    assert "The chains verify." in text and "k_1" in text and target.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
def test_the_page_in_a_browser(log: Path, tmp_path: Path) -> None:
    """Narrow, wide, light, dark, on paper: laid out within the window, and nothing asked for beyond it."""
    target = tmp_path / "page.html"
    target.write_text(page_of(log))
    seen = {}
    with Browser(tmp_path / "profile") as browser:
        for width in (400, 1200):
            browser.open(target.as_uri(), width)
            for media, scheme in (("screen", "light"), ("screen", "dark"), ("print", "light")):
                browser.show(media, scheme)
                seen[media, scheme] = browser.ask("getComputedStyle(document.body).backgroundColor")
                assert browser.ask("document.documentElement.scrollWidth") <= width
        assert "The chains verify." in browser.ask("document.body.innerText")
        assert EVIL.replace("\\", "") in browser.ask("document.body.innerText").replace("\\", "")
        assert browser.ask("document.scripts.length") == 0
        assert browser.requests() == [target.as_uri()] * 2
    light, dark, paper = seen.values()
    assert light == paper == "rgb(255, 255, 255)" and dark != light
