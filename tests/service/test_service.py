"""The service over the twin of the store: DEKs are wiped whatever fails; a change at work is noticed."""

from __future__ import annotations

import os
from typing import Any, Callable

import pytest

from progressdb_kms.audit.log import fragment
from progressdb_kms.crypto import aead, envelope
from progressdb_kms.crypto.aead import Aead
from progressdb_kms.crypto.envelope import parse
from progressdb_kms.crypto.keyring import REGION_SIZE, Keyring
from progressdb_kms.encoding import b64encode_bytes
from progressdb_kms.errors import (
    AuditUnavailable,
    AuthenticationFailed,
    KeyDisabled,
    KeyNotFound,
    KeyShredded,
    KMSError,
    Unavailable,
)
from progressdb_kms.rules import Peer, PeerRules
from progressdb_kms.service import service
from progressdb_kms.service.channel import StagingSlots
from progressdb_kms.service.metrics import Metrics
from progressdb_kms.service.service import Service
from progressdb_kms.store.contract import DekRecord
from progressdb_kms.wire import dispatch, routes
from progressdb_kms.wire.call import App, Call
from progressdb_kms.wire.http1 import parse_head
from tests.harness.memstore import MemoryStore

TEXT = b"a message"


class Fault(Exception):
    """Raised in the middle of something."""


class Site:
    """A service with a DEK, nothing of it outside this process."""

    def __init__(self) -> None:
        self.store = MemoryStore(memoryview(bytearray(32)))
        self.keyring = Keyring(memoryview(bytearray(REGION_SIZE)))
        self.kek = memoryview(bytearray(os.urandom(32)))
        self.kek_id = self.keyring.install(self.kek, 1)
        self.keyring.activate(self.kek_id, 1)
        self.dek = os.urandom(32)
        unused: Any = None
        self.service = Service(
            self.store, self.keyring, unused, unused, PeerRules(), Metrics(1).block(0), dict
        )
        self.scratch = memoryview(bytearray(envelope.SCRATCH_SIZE))
        self.put("k")

    def put(self, key_id: str, **fields: Any) -> None:
        dek = memoryview(bytearray(self.dek))
        blob = envelope.wrap(Aead(self.kek), self.kek_id, key_id, os.urandom(12), dek)
        with self.store.transaction():
            self.store.put(DekRecord(key_id, "t", blob, self.kek_id, 1, "")._replace(**fields))
        self.keyring.touch()

    def rotate(self, *key_ids: str) -> None:
        """To a new KEK, which wraps these DEKs then; the old one is gone."""
        old, self.kek = self.kek_id, memoryview(bytearray(os.urandom(32)))
        self.kek_id = self.keyring.install(self.kek, 2)
        for key_id in key_ids:
            self.put(key_id)
        self.keyring.activate(self.kek_id, 2)
        self.keyring.remove(old)

    def encrypt(self) -> bytes:
        nonce, sealed = self.service.encrypt(self.service.dek("k"), TEXT, b"", self.scratch)
        return nonce + sealed


@pytest.fixture
def site() -> Site:
    return Site()


class TestWiped:
    """An exception at each step leaves no key in the scratch memory."""

    STEPS = [
        (envelope, "unwrap"),
        (aead, "seal"),
        (aead, "open"),
        (service, "Aead"),
        (service.os, "urandom"),
    ]

    def works(self, site: Site) -> list[Callable[[], object]]:
        sealed = site.encrypt()
        site.put("other")
        return [
            lambda: site.service.encrypt(site.service.dek("k"), TEXT, b"", site.scratch),
            lambda: site.service.decrypt(site.service.dek("k"), sealed, b"", site.scratch),
            lambda: site.service.encrypt_many([("k", TEXT, b"")], site.scratch),
            lambda: site.service.decrypt_many([("k", sealed, b"")], site.scratch),
            lambda: site.service.encrypt_many([("k", TEXT, b""), ("other", TEXT, b"")], site.scratch),
            lambda: site.service.decrypt_many([("k", sealed, b""), ("other", sealed, b"")], site.scratch),
        ]

    @pytest.mark.parametrize(("where", "name"), STEPS, ids=[name for _, name in STEPS])
    @pytest.mark.parametrize("after", [False, True], ids=["before it", "after it"])
    def test_whatever_fails(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, after: bool
    ) -> None:
        real, struck = getattr(where, name), []

        def failing(*args: Any) -> Any:
            struck.append(name)
            if after:
                real(*args)
            raise Fault

        for work in self.works(site):
            with monkeypatch.context() as patch:
                patch.setattr(where, name, failing)
                try:
                    work()
                except Fault:
                    pass
                assert not any(site.scratch), name
        assert struck

    def test_a_wrong_tag(self, site: Site) -> None:
        with pytest.raises(AuthenticationFailed):
            site.service.decrypt(site.service.dek("k"), bytes(60), b"", site.scratch)
        assert not any(site.scratch)

    @pytest.mark.parametrize("path", ["/wrap", "/unwrap", "/rewrap", "/rotate_kek"])
    def test_a_call_that_carries_a_key(self, site: Site, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
        """Scratch, answer and staging slot, where the service fails in the middle."""

        def failing(*args: Any, **more: Any) -> Any:
            raise Fault

        for name in ("wrap", "unwrap", "change"):
            monkeypatch.setattr(site.service, name, failing)
        staging, answer = memoryview(bytearray(64)), memoryview(bytearray(64))
        app = App(site.service, StagingSlots(staging, 0, 2), Metrics(1), 1 << 20)
        blob = site.store.get("k").wrapped  # type: ignore[union-attr]
        body = {
            "/wrap": b'{"dek":"%b"}' % b64encode_bytes(site.dek),
            "/unwrap": b'{"wrapped":"%b"}' % b64encode_bytes(blob),
            "/rewrap": b'{"key_id":"k","new_kek_hex":"%b"}' % os.urandom(32).hex().encode(),
            "/rotate_kek": b'{"new_kek_hex":"%b"}' % os.urandom(32).hex().encode(),
        }[path]
        head = parse_head(b"POST %b HTTP/1.1\r\nHost: u\r\n\r\n" % path.encode())
        call = Call(head, bytearray(body), Peer(0, 0, 0), fragment(), site.scratch, answer)
        with pytest.raises(Fault):
            routes.find(head).handler(app, call)
        assert not any(site.scratch) and not any(staging) and not any(answer)

    @pytest.mark.parametrize("error", [AuditUnavailable("the disk is full"), MemoryError()], ids=repr)
    def test_an_answer_that_can_not_be_recorded(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        """The DEK stayed in the waiter's answer until another one was written over it; and where no memory
        was left for the record, the worker ended."""

        class Full:
            chain = "1.0"

            def record(self, *about: Any) -> str:
                raise error

        monkeypatch.setattr(site.service, "audit", Full())
        unused: Any = None
        app = App(site.service, unused, unused, 1 << 20)
        blob = site.store.get("k").wrapped  # type: ignore[union-attr]
        head = parse_head(b"POST /unwrap HTTP/1.1\r\nHost: u\r\n\r\n")
        body = b'{"wrapped":"%b"}' % b64encode_bytes(blob)
        answer = memoryview(bytearray(64))
        call = Call(head, bytearray(body), Peer(0, 0, 0), fragment(), site.scratch, answer)
        reply = dispatch.dispatch(app, routes.find(head), call)
        assert reply.status == 503 and not reply.secret
        assert not any(site.scratch) and not any(answer)


class TestTurns:
    """Of many requests, one after another: the cipher under the KEK is made once, and is gone at the end."""

    @pytest.fixture
    def made(self, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
        """The key of each cipher that was made."""
        made: list[bytes] = []

        def noted(key: memoryview) -> Aead:
            made.append(bytes(key))
            return Aead(key)

        monkeypatch.setattr(service, "Aead", noted)
        return made

    def test_one_cipher_under_the_kek_for_all(self, site: Site, made: list[bytes]) -> None:
        site.service.begin_turn(site.scratch)
        sealed = [site.encrypt() for _ in range(3)]
        assert made == [bytes(site.kek), *[site.dek] * 3]
        site.service.end_turn()
        for one in sealed:
            assert site.service.decrypt(site.service.dek("k"), one, b"", site.scratch) == TEXT
        assert made.count(bytes(site.kek)) == 4  # out of a turn, one each

    def test_one_for_a_page_over_many_deks(self, site: Site, made: list[bytes]) -> None:
        """Out of a turn; in one, none beside that of the turn."""
        site.put("other")
        page = [("k", TEXT, b""), ("other", TEXT, b""), ("k", TEXT, b"")]
        site.service.encrypt_many(page, site.scratch)
        assert made == [bytes(site.kek), site.dek, site.dek]
        site.service.begin_turn(site.scratch)
        site.encrypt()
        site.service.encrypt_many(page, site.scratch)
        assert made.count(bytes(site.kek)) == 2
        site.service.end_turn()

    def test_who_works_elsewhere_meanwhile_has_its_own(self, site: Site, made: list[bytes]) -> None:
        site.service.begin_turn(site.scratch)
        site.encrypt()
        other = memoryview(bytearray(envelope.SCRATCH_SIZE))
        site.service.encrypt(site.service.dek("k"), TEXT, b"", other)
        assert made.count(bytes(site.kek)) == 2

    def test_a_kek_that_goes_in_a_turn_opens_nothing_more(self, site: Site) -> None:
        site.service.begin_turn(site.scratch)
        site.encrypt()
        other = site.keyring.install(memoryview(bytearray(os.urandom(32))), 2)
        site.keyring.activate(other, 2)
        site.keyring.remove(site.kek_id)
        with pytest.raises(Unavailable):
            site.encrypt()
        assert site.keyring.install(site.kek, 3) == site.kek_id  # and once it is back, does again
        site.encrypt()


class TestChanges:
    def test_what_is_remembered_is_good_for_one_generation(self, site: Site) -> None:
        site.encrypt()
        with site.store.transaction():
            site.store.put(site.store.get("k")._replace(state="disabled"))  # type: ignore[union-attr]
        site.encrypt()  # nobody was told
        site.keyring.touch()
        with pytest.raises(KeyDisabled):
            site.encrypt()

    @pytest.mark.parametrize(
        ("state", "error"),
        [("disabled", KeyDisabled), ("pending_deletion", KeyDisabled), ("shredded", KeyShredded)],
    )
    def test_a_dek_that_must_not_be_used(self, site: Site, state: str, error: type[KMSError]) -> None:
        site.put("k", state=state)
        with pytest.raises(error):
            site.encrypt()
        with pytest.raises(error):
            site.service.unwrap(parse(site.store.get("k").wrapped), site.scratch)  # type: ignore[union-attr]

    def test_swapped_rows(self, site: Site) -> None:
        """Each blob opens by itself, but as the DEK of the other key: neither is used."""
        site.put("other")
        rows = [site.store.get(key_id) for key_id in ("k", "other")]
        with site.store.transaction():
            for row, swapped in zip(rows, reversed(rows)):
                site.store.put(row._replace(wrapped=swapped.wrapped))  # type: ignore[union-attr]
        site.keyring.touch()
        for key_id in ("k", "other"):
            with pytest.raises(AuthenticationFailed):
                site.service.encrypt(site.service.dek(key_id), TEXT, b"", site.scratch)
            assert isinstance(site.service.decrypt_many([(key_id, b"", b"")], site.scratch)[0], KMSError)

    @pytest.mark.parametrize("at", [*range(10), 11, 15, 30, -1])
    def test_a_flipped_bit_in_a_row(self, site: Site, at: int) -> None:
        row: Any = site.store.get("k")
        blob = bytearray(row.wrapped)
        blob[at] ^= 1
        site.put("k", wrapped=bytes(blob))
        with pytest.raises(
            (AuthenticationFailed, Unavailable)
        ):  # a flip in the kek_id names a KEK not loaded
            site.encrypt()

    def test_no_such_dek(self, site: Site) -> None:
        with pytest.raises(KeyNotFound, match="k_absent"):
            site.service.encrypt(site.service.dek("k_absent"), TEXT, b"", site.scratch)

    def test_a_kek_that_is_not_loaded(self, site: Site) -> None:
        other = site.keyring.install(memoryview(bytearray(os.urandom(32))), 2)
        site.keyring.activate(other, 2)
        site.keyring.remove(site.kek_id)
        with pytest.raises(Unavailable, match=site.kek_id) as caught:
            site.encrypt()
        assert caught.value.code == "kek_not_loaded" and "previous_master_keys" in caught.value.hint

    def test_a_kek_that_is_replaced_at_work(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """The keeper rotates between the look at the row and the use of its KEK: done again, with the new."""
        real, rotated = envelope.unwrap, []

        def rotating(*args: Any) -> Any:
            if not rotated:
                rotated.append(site.kek_id)
                site.rotate("k")
            return real(*args)

        monkeypatch.setattr(envelope, "unwrap", rotating)
        sealed = site.encrypt()
        assert rotated and site.service.decrypt(site.service.dek("k"), sealed, b"", site.scratch) == TEXT

    def test_a_kek_that_goes_before_its_use(self, site: Site) -> None:
        """The row was looked at before the rotation: it is looked at again."""
        dek, sealed = site.service.dek("k"), site.encrypt()
        site.rotate("k")
        assert site.service.decrypt(dek, sealed, b"", site.scratch) == TEXT

    @pytest.mark.parametrize("use", ["decrypt", "unwrap"])
    def test_a_kek_that_moves_under_a_callers_own_dek(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, use: str
    ) -> None:
        """Of which the store knows nothing: the blob is all there is."""
        sealed, moved, real = site.encrypt(), [], envelope.unwrap
        blob = envelope.wrap(
            Aead(site.kek), site.kek_id, "mine", os.urandom(12), memoryview(bytearray(site.dek))
        )

        def moving(*args: Any) -> Any:
            if not moved:
                old, kek = site.kek_id, site.kek
                site.rotate()
                moved.append(site.keyring.install(kek, 1))
                assert moved == [old]
            return real(*args)

        monkeypatch.setattr(envelope, "unwrap", moving)
        if use == "unwrap":
            assert site.service.unwrap(parse(blob), site.scratch) == site.dek
        else:
            assert site.service.decrypt(site.service.dek(parse(blob)), sealed, b"", site.scratch) == TEXT
        assert moved

    def test_a_kek_that_is_replaced_under_a_page(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between the first DEK of a page and its second."""
        names = ["k", "second", "third"]
        for name in names[1:]:
            site.put(name)
        real, calls = envelope.unwrap, 0

        def rotating(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                site.rotate(*names)
            return real(*args)

        monkeypatch.setattr(envelope, "unwrap", rotating)
        sealed = site.service.encrypt_many([(name, TEXT, b"") for name in names], site.scratch)
        page = [(name, message, b"") for name, message in zip(names, sealed)]
        assert calls == 6  # nothing that was made before is kept
        assert site.service.decrypt_many(page, site.scratch) == [TEXT] * 3  # type: ignore[arg-type]
        assert not any(site.scratch)


def test_it_forgets_bit_by_bit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for of late is remembered; never more than twice YOUNG."""
    monkeypatch.setattr(service, "YOUNG", 4)
    for name in (names := [f"k{n}" for n in range(20)]):
        site.put(name)
    looked: list[str] = []
    real = site.store.get
    monkeypatch.setattr(site.store, "get", lambda key_id: looked.append(key_id) or real(key_id))  # type: ignore[func-returns-value]
    for name in names:
        site.service.entry(name)
        site.service.entry("k0")
        assert len(site.service._young) + len(site.service._old) <= 8
    assert looked == names
    site.service.entry(names[-2])
    assert looked == names
    site.service.entry(names[1])
    assert looked == [*names, names[1]]


def test_a_page_over_all_kinds_of_deks(site: Site) -> None:
    """Stored under the active KEK, under one that is still loaded, disabled, absent, brought by the caller:
    each item gets what it would get alone."""
    site.put("second")
    sealed = site.encrypt()
    inline = parse(site.store.get("k").wrapped)  # type: ignore[union-attr]
    site.put("off", state="disabled")
    site.kek = memoryview(bytearray(os.urandom(32)))
    site.kek_id = site.keyring.install(site.kek, 2)
    site.keyring.activate(site.kek_id, 2)
    site.put("new")
    sources = ["k", "new", "off", "none", inline, "second", "new"]
    results = site.service.decrypt_many([(source, sealed, b"") for source in sources], site.scratch)
    wrong = site.service.decrypt_many([("new", bytes(40), b""), ("k", sealed, b"")], site.scratch)
    said = [result if isinstance(result, bytes) else type(result) for result in [*results, *wrong]]
    assert said == [TEXT, TEXT, KeyDisabled, KeyNotFound, TEXT, TEXT, TEXT, AuthenticationFailed, TEXT]
