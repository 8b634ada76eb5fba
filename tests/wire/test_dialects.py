"""ProgressDB's dialects: three generations of its client drive the daemon, see tests/harness/dialects.py."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from progressdb_kms.crypto import envelope
from tests.harness import Daemon, Session
from tests.harness.dialects import GENERATIONS, First, Third, tokens
from tests.harness.wire import b64

THIRD_FIELDS = {"key_id", "wrapped_dek", "kek_id", "kek_version", "created_at"}


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "workers"])
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with Daemon(workers=request.param) as running:
        yield running


@pytest.fixture
def third(daemon: Daemon) -> Iterator[Third]:
    client = Third(daemon.socket)
    yield client
    client.close()


def made(kms: Session, body: dict[str, Any], status: int = 201) -> Any:
    return kms.ok("POST", "/deks", body, status)


class TestDeks:
    def test_its_own_thread(self, kms: Session) -> None:
        answer = made(kms, {"key_id": "t:1730000000000000001"})
        assert set(answer) == THIRD_FIELDS and answer["kek_version"] == "1"
        found = kms.ok("GET", "/deks/t:1730000000000000001")
        assert found["thread_id"] == "t:1730000000000000001"
        blob = base64.b64decode(answer["wrapped_dek"]["ciphertext"], validate=True)
        assert envelope.parse(blob).key_id == "t:1730000000000000001"

    @pytest.mark.parametrize("body", [{}, {"key_id": None, "thread_id": None}])
    def test_nothing_given(self, kms: Session, body: dict[str, Any]) -> None:
        one, two = made(kms, body), made(kms, body)
        assert one["key_id"].startswith("k_") and one["key_id"] != two["key_id"]
        assert kms.ok("GET", "/deks/" + one["key_id"])["thread_id"] == one["key_id"]

    def test_the_same_key_id_again(self, daemon: Daemon, kms: Session) -> None:
        first = made(kms, {"key_id": "t:2"})
        assert made(kms, {"key_id": "t:2"}) == first
        named = made(kms, {"key_id": "t:2", "thread_id": "t:2"})
        assert named["wrapped"] == first["wrapped_dek"]["ciphertext"]
        reply = kms.request("POST", "/deks", {"key_id": "t:2", "thread_id": "another"})
        assert (reply.status, reply.code) == (409, "key_exists")
        made(kms, {"key_id": "room", "thread_id": "lobby"})
        assert kms.request("POST", "/deks", {"key_id": "room"}).status == 409
        records = [json.loads(line)["event"] for line in daemon.audit_log.read_text().splitlines()]
        mine = [r for r in records if r.get("key_id") == "t:2" and r["op"] == "create_dek"]
        assert [(r["outcome"], r.get("repeated", False)) for r in mine] == [
            ("ok", False), ("ok", True), ("ok", True), ("failed", False),
        ]  # fmt: skip

    def test_at_once_from_many(self, daemon: Daemon) -> None:
        """One DEK, whoever comes first."""
        seen: list[str] = []

        def ask() -> None:
            with daemon.session() as kms:
                seen.append(json.dumps(made(kms, {"key_id": "t:raced"})))

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 16 and len(set(seen)) == 1

    def test_of_a_dek_out_of_use(self, kms: Session) -> None:
        made(kms, {"key_id": "t:3"})
        for method, path, status in (
            ("POST", "/deks/t:3/disable", 423),
            ("DELETE", "/deks/t:3", 423),
            ("POST", "/deks/t:3/enable", 201),
        ):
            kms.ok(method, path)
            assert kms.request("POST", "/deks", {"key_id": "t:3"}).status == status
        assert kms.request("POST", "/deks", {"key_id": "t:3", "thread_id": "u"}).status == 409
        kms.ok("DELETE", "/deks/t:3", {"immediately": True})
        for thread in ({}, {"thread_id": "t:3"}, {"thread_id": "u"}):
            assert kms.request("POST", "/deks", {"key_id": "t:3", **thread}).status == 410


JSON_MESSAGES = [
    b"{}", b"null", b'"text"', b"0", b"-0", b"1e5", b"12345678901234567890.1234567890", b"[1,2,[]]",
    b'{"a":1,"a":2}', '{"body":"hé 🔐"}'.encode(), b'{"s":"\\ud800"}', b' {"spaced" : [ 1 , 2 ] }\n',
    b"9" * 5000, b"[" * 100 + b"]" * 100, b'{"text":"' + b"x" * 100_000 + b'"}', b'"aGk="',
]  # fmt: skip
OTHER_MESSAGES = [
    b"", b"hello", b"{", b"NaN", b"[Infinity]", b"-Infinity", b"\xef\xbb\xbf{}", b"\xff", b"'a'", b"01",
    b'"a\nb"', b"{} {}", b"[" * 200_000 + b"]" * 200_000, "１".encode(),
    b'{"a":1,}', b"1.", b'"\xed\xa0\x80"',
]  # fmt: skip


class TestRawJson:
    """The token of `ciphertext`, quotes included, brings the message back as raw JSON."""

    @pytest.mark.parametrize("text", JSON_MESSAGES, ids=lambda text: repr(text[:30]))
    def test_comes_back_as_it_was(self, third: Third, text: bytes) -> None:
        key = third.create("t:raw")
        kept = third.encrypt(key, text)
        assert kept[:1] == kept[-1:] == b'"'
        reply = third.call("POST", "/decrypt", 200, {"key_id": key, "ciphertext": b64(kept)})
        assert reply.body == b'{"plaintext":' + text + b"}"

    @pytest.mark.parametrize("text", OTHER_MESSAGES, ids=lambda text: repr(text[:30]))
    def test_what_is_no_json_says_so(self, third: Third, text: bytes) -> None:
        key = third.create("t:raw")
        kept = third.encrypt(key, text)
        reply = third.call("POST", "/decrypt", 422, {"key_id": key, "ciphertext": b64(kept)})
        assert reply.code == "plaintext_not_json" and "base64" in reply.json()["error"]["hint"]
        bare = json.loads(kept)
        found = third.call("POST", "/decrypt", 200, {"key_id": key, "ciphertext": bare}).json()
        assert base64.b64decode(found["plaintext"]) == text

    def test_with_aad(self, third: Third) -> None:
        key = third.create("t:raw")
        fields = {"key_id": key, "plaintext": b64(b'{"a":1}'), "aad": b64(b"room")}
        kept = tokens(third.call("POST", "/encrypt", 200, fields).body)["ciphertext"].encode()
        fields = {"key_id": key, "ciphertext": b64(kept), "aad": b64(b"room")}
        assert third.call("POST", "/decrypt", 200, fields).json() == {"plaintext": {"a": 1}}
        reply = third.call("POST", "/decrypt", 422, {**fields, "aad": b64(b"hall")})
        assert reply.code == "authentication_failed"

    def test_another_threads_dek_or_a_changed_token_opens_nothing(self, third: Third) -> None:
        kept = third.encrypt(third.create("t:mine"), b"{}")
        third.create("t:yours")
        for key, token in (("t:yours", kept), ("t:mine", kept[:5] + b"AAAA" + kept[9:])):
            reply = third.call("POST", "/decrypt", 422, {"key_id": key, "ciphertext": b64(token)})
            assert reply.code == "authentication_failed"

    @pytest.mark.parametrize(
        "token",
        [
            b'"',
            b'""',
            b'"AAAA"',
            b'"' + b"A" * 36 + b'"',
            b'"not base64!' + b"x" * 40 + b'"',
            b'"' + b"A" * 40,
        ],
        ids=repr,
    )
    def test_quotes_alone_are_no_token(self, third: Third, token: bytes) -> None:
        key = third.create("t:raw")
        reply = third.call("POST", "/decrypt", 422, {"key_id": key, "ciphertext": b64(token)})
        assert reply.code == "authentication_failed"

    def test_not_elsewhere(self, daemon: Daemon, third: Third, kms: Session) -> None:
        """A batch, a move, a raw body and a call with an inline DEK take the message itself."""
        key = third.create("t:raw")
        kept = third.encrypt(key, b"{}")
        item = {"key_id": key, "ciphertext": b64(kept)}
        (found,) = kms.ok("POST", "/decrypt_batch", {"items": [item]})["items"]
        assert found["error"]["code"] == "authentication_failed"
        inline = {"wrapped": json.loads(third.wrapped_dek)["ciphertext"], "ciphertext": b64(kept)}
        for path, body in (
            ("/reencrypt", {**item, "new_key_id": key}),
            (f"/decrypt?key_id={key}", kept),
            ("/decrypt", inline),
        ):
            reply = kms.request("POST", path, body)
            assert (reply.status, reply.code) == (422, "authentication_failed"), path


PAYLOADS = [0, 1, 15, 40, 300, 4096, 50_000, 100_000]


def message(size: int) -> bytes:
    """JSON of this many bytes, which the third generation needs; of none where there is no room."""
    return b'"%b"' % (b"m" * (size - 2)) if size >= 2 else b"7" * size


@pytest.mark.parametrize("generation", GENERATIONS)
class TestLoad:
    def test_one_connection_in_sequence(self, daemon: Daemon, generation: type[First | Third]) -> None:
        client = generation(daemon.socket)
        client.healthy()
        key = client.create(f"t:load-{generation.__name__}-{daemon.pid}")
        texts = [message(size) for size in PAYLOADS if size or generation is First] * 4
        kept = [client.encrypt(key, text) for text in texts]
        for start in range(0, len(kept), 25):
            for text, one in zip(texts[start : start + 25], kept[start : start + 25]):
                assert client.decrypt(key, one) == client.message(text)
        assert client.session.connections == 1
        client.close()

    def test_a_restart_under_it(self, generation: type[First | Third]) -> None:
        """One error at most where it met the stop, then as before: nothing that was acknowledged is lost."""
        with Daemon(workers=1) as daemon:
            client = generation(daemon.socket)
            key = client.create("t:before")
            kept = [client.encrypt(key, message(size)) for size in (2, 300)]
            for end in (daemon.stop, daemon.kill):
                end()
                with pytest.raises((OSError, AssertionError)):
                    client.encrypt(key, b"{}")
                daemon.start()
                assert [client.decrypt(key, one) for one in kept] == [
                    client.message(message(size)) for size in (2, 300)
                ]
                key = client.create("t:before" if generation is Third else "t:after")
                kept = [client.encrypt(key, message(size)) for size in (2, 300)]
            client.close()

    def test_two_servers_at_once(self, daemon: Daemon, generation: type[First | Third]) -> None:
        errors: list[BaseException] = []

        def serve(number: int) -> None:
            try:
                client = generation(daemon.socket)
                for thread in range(3):
                    key = client.create(
                        f"t:{generation.__name__}:{daemon.pid}:{thread}"
                    )  # both the same ones
                    texts = [b'{"server":%d,"n":%d}' % (number, n) for n in range(50)]
                    kept = [client.encrypt(key, text) for text in texts]
                    assert [client.decrypt(key, one) for one in kept] == [client.message(t) for t in texts]
                client.close()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert not errors
