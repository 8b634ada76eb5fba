"""Uses of DEKs on their way from the worker that sees them to the store: each is counted once."""

from __future__ import annotations

import os
import random
import threading
from typing import Any

import pytest

from progressdb_kms.encoding import json_dumps
from progressdb_kms.errors import AuthenticationFailed, Conflict, KeyNotFound
from progressdb_kms.fleet.reader import HOSTS
from progressdb_kms.process.worker import ANCHOR_SECONDS
from progressdb_kms.service import usage
from progressdb_kms.service.channel import MAX_JOB
from progressdb_kms.service.service import Service
from progressdb_kms.service.usage import (
    DECRYPTED,
    ENCRYPTED,
    SPENT,
    TOUCHED,
    USING,
    Uses,
    counts,
    dead,
    describe_usage,
    near,
)
from progressdb_kms.store.contract import HEAVY, KEK_ROW, DekRecord, Usage
from tests.service.test_anchors import site as keeper_site  # noqa: F401
from tests.service.test_service import TEXT
from tests.service.test_service import Site as ServiceSite


def rows(uses: Uses, now: float = 100.0) -> dict[str, list[int]]:
    """The next batch, taken at once."""
    batch = uses.batch(now)
    uses.taken({})
    return {name: counts for name, *counts in batch["rows"]} if batch else {}


def use(uses: Uses, name: str, encrypts: int, decrypts: int, uid: int) -> None:
    uses.add(ENCRYPTED, [name] * encrypts, uid)
    uses.add(DECRYPTED, [name] * decrypts, uid)
    if not encrypts and not decrypts:
        uses.add(TOUCHED, [name], uid)


def some(workers: int = 1, **heavy: int) -> Uses:
    return Uses("1.1", heavy, workers)


def test_uses_of_a_beat_are_one_row() -> None:
    uses = some()
    for one in (("a", 1, 0, 7), ("b", 0, 1, 7), ("a", 5, 0, 8), ("a", 0, 2, 9), ("c", 0, 0, 9)):
        use(uses, *one)
    assert rows(uses, 100.7) == {
        "a": [6, 2, 100, 100, 9],
        "b": [0, 1, 100, 100, 7],
        "c": [0, 0, 100, 100, 9],
    }
    assert uses.batch(101) is None


def test_what_waits_keeps_its_first_time_and_is_handed_over_oldest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(usage, "LEAST", 2)
    uses = some(workers=1000)
    for name in "abcd":
        use(uses, name, 1, 0, 1)
    assert list(rows(uses, 10)) == ["a", "b"]
    use(uses, "d", 1, 0, 2)
    use(uses, "a", 1, 0, 2)
    assert rows(uses, 20) == {"c": [1, 0, 10, 10, 1], "d": [2, 0, 10, 20, 2]}
    assert rows(uses, 30) == {"a": [1, 0, 20, 20, 2]} and not rows(uses)


def test_what_is_used_much_goes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "LEAST", 2)
    monkeypatch.setattr(usage, "SOON", 4)
    uses = some(1000, heavy=HEAVY)
    for name in (*"abcdef", "heavy"):
        use(uses, name, 1, 0, 1)
    use(uses, "e", 2, 0, 1)
    assert list(rows(uses)) == ["heavy", "a"]
    use(uses, "e", 1, 0, 1)
    assert rows(uses) == {"e": [4, 0, 100, 100, 1], "b": [1, 0, 100, 100, 1]}
    assert list(rows(uses)) == ["c", "d"] and list(rows(uses)) == ["f"] and not rows(uses)


def test_of_one_key_no_more_than_that_can_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is used: what a worker holds of a key at any time is below SOON and the uses of two
    beats, of which one is on its way."""
    monkeypatch.setattr(usage, "LEAST", 2)
    monkeypatch.setattr(usage, "SOON", 50)
    uses, chance = some(1000), random.Random(5)
    counted = used = 0
    for beat in range(400):
        for number in range(20):
            use(uses, f"other{beat % 50}.{number}", 1, 0, 1)
        more = chance.choice((0, 3, 40))
        use(uses, "a", more, 0, 1)
        used += more
        batch = uses.batch(beat)
        assert used - counted < 50 + 2 * 40
        counted += sum(row[1] for row in (batch or {"rows": ()})["rows"] if row[0] == "a")
        uses.taken({})
        assert used - counted < 50


def test_lost_is_what_the_machine_may_do_meanwhile() -> None:
    """A beat, another for the answer, and a job's 5 s, at 300,000 a second."""
    assert usage.LOST >= usage.SOON + (2 * ANCHOR_SECONDS + 5) * 300_000


def test_500_rows_a_second_at_most_over_all_workers() -> None:
    for workers in (1, 2, 4, 8):
        uses = some(workers)
        for number in range(1000):
            use(uses, f"k{number}", 1, 0, 1)
        assert len(rows(uses)) * workers / ANCHOR_SECONDS <= 500


def test_the_longest_names_fit_a_job() -> None:
    uses = some()
    for number in range(200):
        use(uses, f"{number:0128}", 1, 0, 2**32 - 2)
    batch = uses.batch(2e9)
    assert batch is not None and len(json_dumps(batch)) + 20 * len(batch["rows"]) < MAX_JOB - 1000


def test_while_nothing_is_taken_no_more_than_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "LEAST", 1)
    monkeypatch.setattr(usage, "MOST", 3)
    monkeypatch.setattr(usage, "BUSY", 2)
    uses = some(1000)
    for _ in range(2):
        for number in range(8):
            use(uses, f"k{number}", 1, 0, 1)
        uses.batch(1)
    use(uses, "busy", 2, 0, 1)  # takes the place of the newest
    found = []
    while more := rows(uses):
        found += [(name, counts[0]) for name, counts in more.items()]
    assert found == [("k0", 1), ("k1", 2), ("k2", 2), ("busy", 2)]


def test_a_batch_comes_again_until_it_is_taken() -> None:
    uses = some()
    use(uses, "a", 1, 0, 1)
    first = uses.batch(1)
    use(uses, "a", 1, 0, 1)
    assert uses.batch(2) == first and first is not None
    uses.taken({})
    second = uses.batch(3)
    assert second is not None and second["number"] == first["number"] + 1
    assert second["rows"] == [("a", 1, 0, 2, 2, 1)]


def test_what_waits_counts_for_the_limit() -> None:
    uses = some()
    use(uses, "a", 3, 0, 1)
    uses.batch(1)  # on its way
    use(uses, "a", 3, 0, 1)
    uses.batch(1)
    uses.taken({"a": SPENT - 4})
    assert uses.spent == frozenset()
    uses.taken({"a": SPENT - 3})
    assert uses.spent == {"a"}


def test_threads_lose_no_use() -> None:
    uses = some()
    begun = threading.Barrier(5)

    def work() -> None:
        begun.wait()
        for _ in range(20_000):
            use(uses, "a", 1, 0, 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    counted = 0
    while any(thread.is_alive() for thread in threads):
        counted += rows(uses).get("a", [0])[0]
    counted += rows(uses).get("a", [0])[0]
    assert counted == 80_000


def test_who_is_dead_by_now() -> None:
    running = ["1.1", "1.2", "2.1", "2.2.1", "2.1.1"]
    assert dead("3.1", running) == running
    assert dead("2.1.1", running) == ["1.1", "1.2", "2.1"]
    assert dead("2.3", running) == ["1.1", "1.2"]
    assert dead("2.3", ["2", "", "2."]) == [""]  # these are no names of ours


def test_in_a_fleet_each_host_knows_its_own_workers() -> None:
    """Else one that starts would take those of other hosts for dead."""
    assert USING.startswith(HOSTS)


def test_what_the_api_tells() -> None:
    record = DekRecord("a", "t", b"", "", 1, "")
    assert describe_usage(record, None) == {"usage": {"encrypts": 0, "decrypts": 0}}
    known = describe_usage(record, Usage(1, 2, 60, 120, 0))["usage"]
    assert known == {
        "encrypts": 1,
        "decrypts": 2,
        "first_used_at": "1970-01-01T00:01:00.000000Z",
        "last_used_at": "1970-01-01T00:02:00.000000Z",
        "last_uid": 0,
    }
    assert "last_uid" not in describe_usage(record, Usage(1, 2, 60, 120))["usage"]  # a stranger over TCP
    assert describe_usage(record._replace(state="shredded"), Usage(1)) == {}


def test_what_the_operator_hears() -> None:
    lines = near({"a": HEAVY, "b": SPENT + 5})
    assert lines[0].startswith("the DEK b has 4,294,967,301 encrypts, which is the end")
    assert "the DEK a has 2,147,483,648 encrypts of 4,294,967,296" in lines[1]
    (kek,) = near({KEK_ROW + "aa": HEAVY})
    assert kek.startswith("the KEK aa has wrapped 2,147,483,648 DEKs of") and "rotate-kek --generate" in kek
    assert counts({KEK_ROW + "aa": SPENT, "a": HEAVY, "b": SPENT}) == (1, 1)


class TestTheService:
    """Every way to use a DEK is counted, and nothing that failed."""

    @pytest.fixture
    def service(self) -> ServiceSite:
        return ServiceSite()

    def test_what_is_a_use(self, service: ServiceSite) -> None:
        kms, scratch = service.service, service.scratch
        nonce, sealed = kms.encrypt(kms.dek("k"), TEXT, b"", scratch, 7)
        message = nonce + sealed
        assert rows(kms.uses) == {"k": [1, 0, 100, 100, 7]}
        kms.decrypt(kms.dek("k"), message, b"", scratch, 8)
        kms.decrypt(kms.dek(kms.entry("k").wrapped), message, b"", scratch, 9)
        assert rows(kms.uses) == {"k": [0, 2, 100, 100, 9]}
        items: Any = [("k", TEXT, b""), ("absent", TEXT, b""), ("k", TEXT, b"")]
        kms.encrypt_many(items, scratch, 7)
        kms.decrypt_many([("k", message, b""), ("k", bytes(40), b"")], scratch, 7)
        assert rows(kms.uses) == {"k": [2, 1, 100, 100, 7]}
        kms.unwrap(kms.entry("k").wrapped, scratch, 5)  # a use that can't be counted, but is one
        assert rows(kms.uses) == {"k": [0, 0, 100, 100, 5]}
        with pytest.raises(AuthenticationFailed):
            kms.decrypt(kms.dek("k"), bytes(60), b"", scratch)
        with pytest.raises(KeyNotFound):
            kms.encrypt(kms.dek("absent"), TEXT, b"", scratch)
        assert rows(kms.uses) == {}

    def test_one_that_is_spent_opens_and_seals_no_more(self, service: ServiceSite) -> None:
        kms, scratch = service.service, service.scratch
        nonce, sealed = kms.encrypt(kms.dek("k"), TEXT, b"", scratch)
        kms.uses.taken({"k": SPENT})
        for source in ("k", kms.entry("k").wrapped):
            with pytest.raises(Conflict, match="4,294,967,296 encrypts") as caught:
                kms.encrypt(kms.dek(source), TEXT, b"", scratch)
            assert caught.value.code == "key_spent" and "another DEK" in caught.value.hint
        (result,) = kms.encrypt_many([("k", TEXT, b"")], scratch)
        assert isinstance(result, Conflict)
        assert kms.decrypt(kms.dek("k"), nonce + sealed, b"", scratch) == TEXT

    def test_a_worker_that_starts_knows_what_is_spent(self, service: ServiceSite) -> None:
        with service.store.transaction():
            service.store.count([("k", Usage(SPENT))])
        unused: Any = None
        kms = Service(service.store, service.keyring, unused, unused, unused, unused, dict)
        with pytest.raises(Conflict):
            kms.encrypt(kms.dek("k"), TEXT, b"", service.scratch)

    def test_wraps_are_uses_of_the_kek(self, service: ServiceSite) -> None:
        kms, name = service.service, KEK_ROW + service.kek_id
        dek = memoryview(bytearray(os.urandom(32)))
        kms.wrap(dek, None, 7)
        kms.wrap(dek, "k", 8)
        assert rows(kms.uses) == {name: [2, 0, 100, 100, 8]}
        kms.uses.taken({name: SPENT})
        with pytest.raises(Conflict, match="wrapped 4,294,967,296 DEKs") as caught:
            kms.wrap(dek, None)
        assert caught.value.code == "kek_spent" and "rotate-kek" in caught.value.hint
        kms.encrypt(kms.dek("k"), TEXT, b"", service.scratch)  # what was wrapped serves on
