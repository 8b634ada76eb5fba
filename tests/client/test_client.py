"""The public client: what it sends, what it returns and raises, and when it asks twice."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms import errors
from progressdb_kms.client import (
    AuthenticationFailed,
    BadAnswer,
    Client,
    ClientError,
    Conflict,
    ConnectionFailed,
    Dek,
    KekSpent,
    KeyDisabled,
    KeyNotFound,
    KeyShredded,
    KeySpent,
    PeerRefused,
    RequestRefused,
    ServiceFailed,
    Unavailable,
    Usage,
    transport,
)
from progressdb_kms.client import calls as module
from progressdb_kms.client.results import failure
from progressdb_kms.crypto.keyring import KekNotLoaded
from progressdb_kms.errors import KMSError
from tests.harness.fakekms import FakeKms, answer, kek_id_of, request, script
from tests.harness.procs import wait_until


@pytest.fixture
def path(short_tmp: Path) -> Path:
    return short_tmp / "s"


@pytest.fixture
def kms(path: Path) -> Iterator[FakeKms]:
    with FakeKms(path) as fake:
        yield fake


@pytest.fixture
def client(kms: FakeKms) -> Iterator[Client]:
    with Client(kms.path, timeout=20) as one:
        yield one


class TestCalls:
    def test_create_and_describe(self, client: Client, kms: FakeKms) -> None:
        dek = client.create_dek("thread 1")
        assert dek.thread_id == "thread 1" and dek.state == "enabled" and dek.kek_version == "1"
        assert dek.wrapped == dek.key_id.encode() + b"|" + kms.keys[dek.key_id]
        assert client.describe(dek.key_id) == dek._replace(wrapped=b"")
        assert client.create_dek("t", "mine:1").key_id == "mine:1"
        assert client.describe("mine:1").thread_id == "t"

    def test_get_wrapped(self, client: Client) -> None:
        dek = client.create_dek("t")
        assert client.get_wrapped(dek.key_id) == (dek.wrapped, dek.kek_id, "1")

    @pytest.mark.parametrize("size", [0, 1, 200, module.RAW_ABOVE, module.RAW_ABOVE + 1, 1 << 20])
    @pytest.mark.parametrize("aad", [b"", b"message 7", bytes(module.MAX_RAW_AAD + 1)])
    def test_encrypt_and_decrypt(self, client: Client, kms: FakeKms, size: int, aad: bytes) -> None:
        key = client.create_dek("t").key_id
        plaintext = os.urandom(size)
        box = client.encrypt(key, plaintext, aad)
        raw = kms.seen[-1].headers["content-type"] == "application/octet-stream"
        assert raw == (size > module.RAW_ABOVE and len(aad) <= module.MAX_RAW_AAD)
        assert len(box) == size + 28
        assert client.decrypt(key, box, aad) == plaintext
        with pytest.raises(AuthenticationFailed):
            client.decrypt(key, box, aad + b"x")

    def test_any_buffer_is_taken(self, client: Client) -> None:
        key = client.create_dek("t").key_id
        for size in (5, module.RAW_ABOVE + 1):
            plaintext = bytearray(os.urandom(size))
            box = client.encrypt(key, memoryview(plaintext))
            assert client.decrypt(key, bytearray(box)) == plaintext

    def test_a_wrapped_dek_as_key(self, client: Client, kms: FakeKms) -> None:
        dek = client.create_dek("t")
        box = client.encrypt(dek.wrapped, bytes(module.RAW_ABOVE + 1))
        assert b"key_id" not in kms.seen[-1].body
        assert client.decrypt(dek.key_id, box) == client.decrypt(dek.wrapped, box)

    def test_batches(self, client: Client) -> None:
        one, two = client.create_dek("t").key_id, client.create_dek("t").key_id
        boxes = client.encrypt_batch([(one, b"a"), (two, b"b", b"aad"), ("nobody", b"c")])
        assert isinstance(boxes[2], KeyNotFound) and boxes[2].code == "key_not_found"
        assert isinstance(boxes[0], bytes) and isinstance(boxes[1], bytes)
        back = client.decrypt_batch([(one, boxes[0]), (two, boxes[1], b"aad"), (two, boxes[1])])
        assert back[:2] == [b"a", b"b"] and isinstance(back[2], AuthenticationFailed)
        assert client.encrypt_batch([]) == []

    def test_a_batch_is_cut_at_the_limits(self, client: Client, kms: FakeKms, monkeypatch: Any) -> None:
        key = client.create_dek("t").key_id
        kms.seen.clear()
        found = client.encrypt_batch((key, b"x") for _ in range(module.BATCH_ITEMS + 1))
        assert len(found) == module.BATCH_ITEMS + 1 and len(kms.seen) == 2
        monkeypatch.setattr(module, "BATCH_BYTES", 10)
        kms.seen.clear()
        client.encrypt_batch([(key, b"12345"), (key, b"12345"), (key, b"1"), (key, b"x" * 99)])
        assert len(kms.seen) == 3

    def test_reencrypt(self, client: Client) -> None:
        old, new = client.create_dek("a").key_id, client.create_dek("b").key_id
        box = client.encrypt(old, b"text", b"aad")
        assert client.decrypt(new, client.reencrypt(old, new, box, b"aad"), b"aad") == b"text"
        moved = client.reencrypt(old, new, box, b"aad", b"other")
        assert client.decrypt(new, moved, b"other") == b"text"

    def test_wrap_and_unwrap(self, client: Client) -> None:
        dek = os.urandom(32)
        assert client.unwrap(client.wrap(dek).wrapped) == dek
        assert client.wrap(dek, "k_1").wrapped.startswith(b"k_1|")

    def test_list_goes_on_to_the_last_page(self, client: Client, kms: FakeKms) -> None:
        for number in range(5):
            client.create_dek("odd" if number % 2 else "even & more")
        assert [dek.key_id for dek in client.list(page_size=2)] == [f"k_{number:04d}" for number in range(5)]
        assert [dek.thread_id for dek in client.list("even & more", page_size=2)] == ["even & more"] * 3
        assert len(kms.seen) == 5 + 3 + 2

    def test_usage(self, client: Client, kms: FakeKms) -> None:
        dek = client.create_dek("t")
        assert dek.usage is None and client.describe(dek.key_id).usage is None
        kms.deks[dek.key_id]["usage"] = {"encrypts": 1, "decrypts": 2}
        assert client.describe(dek.key_id).usage == Usage(1, 2)
        told = {"first_used_at": "a", "last_used_at": "b", "last_uid": 7}
        kms.deks[dek.key_id]["usage"].update(told)
        assert [one.usage for one in client.list(unused_for=60)] == [Usage(1, 2, "a", "b", 7)]
        assert "unused_for=60" in kms.seen[-1].path
        kms.refuse["/encrypt"] = (409, "key_spent", "the key has encrypted 4,294,967,296 messages")
        with pytest.raises(KeySpent):
            client.encrypt(dek.key_id, b"")
        kms.refuse["/deks"] = (409, "kek_spent", "the KEK aa has wrapped 4,294,967,296 DEKs")
        with pytest.raises(KekSpent):
            client.create_dek("t")

    def test_states(self, client: Client, kms: FakeKms) -> None:
        key = client.create_dek("t").key_id
        assert client.disable(key).state == "disabled"
        with pytest.raises(KeyDisabled) as caught:
            client.encrypt(key, b"x")
        assert caught.value.hint == "enable it first"
        assert client.enable(key).state == "enabled"
        assert client.shred(key).delete_at == "in 7 days" and not kms.seen[-1].body
        assert client.shred(key, pending_days=30).delete_at == "in 30 days"
        assert client.shred(key, immediately=True).state == "shredded"
        with pytest.raises(KeyShredded):
            client.encrypt(key, b"x")

    def test_rotation(self, client: Client, kms: FakeKms) -> None:
        client.create_dek("t")
        new = os.urandom(32)
        dry = client.rotate_kek(new, dry_run=True)
        assert dry.rewrapped == 1 and dry.by_kek == {kms.kek_id: 1} and dry.backup == ""
        done = client.rotate_kek(memoryview(bytearray(new)))
        assert done == (kek_id_of(new), "2", 1, "/data/kms-deks-backup/x", {}, "")
        assert kms.kek == new
        with pytest.raises(Conflict):
            client.rotate_kek(new)

    def test_rewrap(self, client: Client, kms: FakeKms) -> None:
        key = client.create_dek("t", 'k"1').key_id
        new = os.urandom(32)
        assert client.rewrap(key, new).kek_id == kek_id_of(new) == kms.deks[key]["kek_id"]

    @pytest.mark.parametrize("size", [0, 31, 33])
    def test_a_kek_has_32_bytes(self, client: Client, kms: FakeKms, size: int) -> None:
        with pytest.raises(ValueError, match="32 bytes"):
            client.rotate_kek(bytes(size))
        assert not kms.seen

    def test_the_service(self, client: Client, kms: FakeKms) -> None:
        assert client.healthy() and client.ready() and client.metrics().startswith("progressdb_kms_")
        assert client.status()["kek_id"] == kms.kek_id
        kms.not_ready = ["the audit log is gone"]
        found = client.ready()
        assert not found and found.reasons == ["the audit log is gone"]

    def test_receipts_are_those_of_the_thread(self, client: Client, kms: FakeKms) -> None:
        assert client.last_receipt == ""
        client.create_dek("t")
        mine = client.last_receipt
        assert mine == "1.1:1:00112233aabbccdd"
        other: list[str] = []

        def elsewhere() -> None:
            other.append(client.last_receipt)
            client.create_dek("t")
            other.append(client.last_receipt)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert other == ["", "1.1:2:00112233aabbccdd"] and client.last_receipt == mine
        kms.drop.add("/deks")
        with pytest.raises(ConnectionFailed):
            client.create_dek("t")
        assert client.last_receipt == ""

    def test_a_url_is_a_path_too(self, kms: FakeKms) -> None:
        with Client(f"unix://{kms.path}") as one:
            assert one.healthy() and one.socket_path == str(kms.path)


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "code", "kind"),
        [
            (400, "missing_key_id", RequestRefused),
            (403, "peer_refused", PeerRefused),
            (404, "key_not_found", KeyNotFound),
            (404, "not_found", RequestRefused),
            (409, "kek_in_use", Conflict),
            (410, "key_shredded", KeyShredded),
            (413, "body_too_large", RequestRefused),
            (422, "authentication_failed", AuthenticationFailed),
            (423, "key_disabled", KeyDisabled),
            (500, "internal", ServiceFailed),
            (503, "store_unavailable", Unavailable),
        ],
    )
    def test_each_status(
        self, client: Client, kms: FakeKms, status: int, code: str, kind: type[ClientError]
    ) -> None:
        kms.refuse["/encrypt"] = (status, code, "the message")
        with pytest.raises(ClientError) as caught:
            client.encrypt("k_1", b"x")
        error = caught.value
        assert type(error) is kind and (error.status, error.code, error.message) == (
            status,
            code,
            "the message",
        )

    def test_an_item_of_a_batch_is_the_error_that_a_call_of_its_own_is(self) -> None:
        """It has no status, so the code must tell: of all that may become of an item."""

        def leaves(group: type[KMSError]) -> Iterator[type[KMSError]]:
            for one in group.__subclasses__():
                yield from [one] if one.default_code and one.__module__ == errors.__name__ else ()
                yield from leaves(one)

        whole = (errors.MethodUnknown, errors.VersionNotSupported, errors.OperatorError)  # of a request
        kinds = [KekNotLoaded, *(one for one in leaves(KMSError) if not issubclass(one, whole))]
        found = {(one.status, one.default_code) for one in kinds}
        found |= {(503, "store_unreachable"), (503, "keyring_full")}
        assert {(429, "rate_limited"), (403, "policy_refused"), (503, "kek_not_loaded")} <= found
        for status, code in found:
            alone, item = failure(status, {"code": code}), failure(0, {"code": code})
            assert type(item) is type(alone), code

    def test_an_error_without_a_body_of_ours(self, path: Path) -> None:
        def gateway(conn: socket.socket) -> None:
            request(conn)
            answer(conn, b"<html>", "502 Bad Gateway")

        with script(path, gateway), Client(path) as client, pytest.raises(ServiceFailed) as caught:
            client.status()
        assert (caught.value.status, caught.value.code) == (502, "http_502")

    def test_no_socket(self, path: Path) -> None:
        with Client(path) as client:
            assert not client.healthy()
            with pytest.raises(ConnectionFailed) as caught:
                client.status()
        assert str(path) in caught.value.message and "systemctl status progressdb-kms" in caught.value.hint
        assert caught.value.code == "connection_failed"

    def test_nobody_listens(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
        with Client(path) as client, pytest.raises(ConnectionFailed, match="nobody listens"):
            client.status()

    def test_a_path_that_is_too_long(self) -> None:
        with Client("/tmp/" + "x" * 200) as client, pytest.raises(ConnectionFailed, match="too long"):
            client.status()

    def test_timeout(self, path: Path) -> None:
        gone = threading.Event()

        def silent(conn: socket.socket) -> None:
            gone.wait(10)

        with script(path, silent), Client(path, timeout=0.05, patient=True) as client:
            with pytest.raises(ConnectionFailed) as caught:
                client.create_dek("t")
            with pytest.raises(ConnectionFailed) as question:
                client.status()
            with pytest.raises(ConnectionFailed) as patient:
                client.disable("k")
            gone.set()
        assert patient.value.code == "timeout"
        assert caught.value.code == "timeout" and "not known" in caught.value.hint
        assert "help troubleshooting" in question.value.hint  # somebody listens

    def test_a_change_is_waited_for_as_long_as_the_daemon_answers_others(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In a fleet it may wait for a host that is dead, longer than any answer else takes."""
        with FakeKms(path) as kms, Client(path, timeout=0.2, patient=True) as client:
            key_id, change = client.create_dek("t").key_id, kms.change

            def slow(*about: Any) -> dict[str, Any]:
                asked = [seen.path for seen in kms.seen].count("/healthz")
                wait_until(
                    lambda: [seen.path for seen in kms.seen].count("/healthz") > asked, 60, "two questions"
                )
                return change(*about)

            monkeypatch.setattr(kms, "change", slow)
            assert client.disable(key_id).state == "disabled"
            assert client.enable(key_id).state == "enabled"
            assert client.shred(key_id).state == "pending_deletion"

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"nonsense",
            b"[]",
            b"{}",
            b'{"ciphertext": 7}',
            b'{"ciphertext": "?"}',
            b'{"ciphertext": null}',
            b"[" * 100_000,
        ],
    )
    def test_answers_that_make_no_sense(self, path: Path, body: bytes) -> None:
        def serve(conn: socket.socket) -> None:
            request(conn)
            answer(conn, body)

        with script(path, serve), Client(path) as client, pytest.raises(BadAnswer):
            client.encrypt("k_1", b"x")

    @pytest.mark.parametrize(
        "data",
        [
            b"SSH-2.0-OpenSSH\r\n",
            b"HTTP/1.1 two hundred\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 2000 + b"\r\n",
        ],
    )
    def test_what_is_not_http(self, path: Path, data: bytes) -> None:
        def serve(conn: socket.socket) -> None:
            request(conn)
            conn.sendall(data)

        with script(path, serve), Client(path) as client, pytest.raises(BadAnswer):
            client.status()

    def test_a_full_queue_is_waited_for(self, path: Path) -> None:
        """connect(2) fails at once there, whatever the time limit."""
        with contextlib.ExitStack() as stack, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                    waiting.setblocking(False)
                    waiting.connect(str(path))
            with Client(path, timeout=0.2) as client, pytest.raises(ConnectionFailed) as caught:
                client.status()
            assert "takes no connections" in caught.value.message and "may hang" in caught.value.hint

            def serve() -> None:
                while not (conn := stack.enter_context(listener.accept()[0])).recv(1, socket.MSG_PEEK):
                    pass
                request(conn)
                answer(conn, b'{"a":1}')

            stack.pop_all().close()
            with ThreadPoolExecutor(1) as pool, Client(path, timeout=60) as client:
                served = pool.submit(serve)
                assert client.status() == {"a": 1}
                served.result(60)

    def test_an_answer_that_is_cut_is_none(self, path: Path) -> None:
        """Whatever ended it, the daemon was there: one that was cut within its head was an empty plaintext,
        any other `is it progressdb-kms that listens there?`."""
        kind = b"Content-Type: application/octet-stream\r\n"
        whole = b"HTTP/1.1 200 OK\r\n" + kind + b"Content-Length: 5\r\nX-KMS-Audit: 1.1:5:00\r\n\r\nhello"
        lengths = range(len(b"HTTP/1.1 200 OK\r\n"), len(whole), 3)

        def serves(length: int) -> Callable[[socket.socket], None]:
            def serve(conn: socket.socket) -> None:
                request(conn)
                conn.sendall(whole[:length])

            return serve

        with script(path, *map(serves, [*lengths, lengths[9], len(whole)])):
            for length in lengths:
                with Client(path) as client, pytest.raises(ConnectionFailed, match="within") as caught:
                    client.decrypt("k_1", b"x" * 70_000)
                assert caught.value.code == "connection_lost", length
            with Client(path, retry_seconds=60) as client:
                assert client.decrypt("k_1", b"x" * 70_000) == b"hello"

    def test_a_create_whose_answer_is_cut_is_not_sent_again(self, path: Path) -> None:
        def serve(conn: socket.socket) -> None:
            request(conn)
            conn.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 10\r\n\r\n{}")

        with script(path, serve, serve) as accepted, Client(path, retry_seconds=60) as client:
            with pytest.raises(ConnectionFailed) as caught:
                client.create_dek("t")
            assert "look before you repeat it" in caught.value.hint and len(accepted) == 1

    @pytest.mark.parametrize("declared", [True, False])
    def test_an_answer_has_a_limit(self, path: Path, declared: bool) -> None:
        def serve(conn: socket.socket) -> None:
            request(conn)
            body = b'{"a": "%s"}' % (b"x" * 200_000)
            head = b"HTTP/1.1 200 OK\r\n" + (
                b"Content-Length: %d\r\n" % len(body) if declared else b"Transfer-Encoding: chunked\r\n"
            )
            body = body if declared else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            with contextlib.suppress(OSError):
                conn.sendall(head + b"\r\n" + body)

        with (
            script(path, serve),
            Client(path, max_response=100_000) as client,
            pytest.raises(BadAnswer, match="longer"),
        ):
            client.status()

    def test_an_answer_up_to_the_limit(self, path: Path) -> None:
        def serve(conn: socket.socket) -> None:
            request(conn)
            answer(conn, b'{"a":"%s"}' % (b"x" * 92))

        with script(path, serve), Client(path, max_response=100) as client:
            assert client.status() == {"a": "x" * 92}

    def test_items_that_are_missing(self, path: Path) -> None:
        def serve(conn: socket.socket) -> None:
            request(conn)
            answer(conn, b'{"items": []}')

        with (
            script(path, serve),
            Client(path) as client,
            pytest.raises(BadAnswer, match="0 items instead of 1"),
        ):
            client.encrypt_batch([("k", b"x")])


def once(conn: socket.socket) -> None:
    """Answer one request, then close the connection in good order."""
    request(conn)
    answer(conn)


def take_and_close(conn: socket.socket) -> None:
    """The worst case: the request was read, perhaps carried out, and no answer comes."""
    request(conn)


def once_then_take_and_close(conn: socket.socket) -> None:
    once(conn)
    request(conn)


DEK = b'{"key_id":"k","thread_id":"t","state":"enabled","kek_id":"0","kek_version":"1","created_at":""}'


def create(conn: socket.socket) -> None:
    request(conn)
    answer(conn, DEK, "201 Created")


class TestConnections:
    def test_one_connection_for_many_calls(self, client: Client, kms: FakeKms) -> None:
        for _ in range(5):
            client.status()
        assert kms.connections == 1

    def test_threads_don_t_share_a_connection(self, client: Client, kms: FakeKms) -> None:
        keys = [client.create_dek(f"t{number}").key_id for number in range(8)]
        errors: list[Exception] = []

        def work(number: int) -> None:
            try:
                for turn in range(25):
                    text = f"{number} {turn}".encode()
                    assert client.decrypt(keys[number], client.encrypt(keys[number], text)) == text
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and kms.connections <= 9

    def test_a_stale_connection_is_opened_again(self, path: Path) -> None:
        closed = threading.Event()

        def once_and_close(conn: socket.socket) -> None:
            once(conn)
            conn.close()
            closed.set()

        with script(path, once_and_close, create) as accepted, Client(path, timeout=10) as client:
            client.status()
            assert closed.wait(10)
            assert client.create_dek("t") == Dek("k", "t", "enabled", "0", "1", "")
        assert len(accepted) == 2

    def test_what_may_be_repeated_is_repeated_once(self, path: Path) -> None:
        with script(path, once_then_take_and_close, once) as accepted, Client(path, timeout=10) as client:
            client.status()
            client.status()
            assert len(accepted) == 2
        path.unlink()
        with script(path, once_then_take_and_close, take_and_close, once) as accepted, Client(path) as client:
            client.status()
            with pytest.raises(ConnectionFailed):
                client.status()
            assert len(accepted) == 2

    def test_a_dek_with_a_key_id_is_the_same_one_again(self, path: Path) -> None:
        with script(path, once_then_take_and_close, create) as accepted, Client(path, timeout=10) as client:
            client.status()
            assert client.create_dek("t", "k").key_id == "k"
            assert len(accepted) == 2

    @pytest.mark.parametrize("op", ["create", "rotate"])
    def test_what_may_have_been_done_is_never_repeated(self, path: Path, op: str) -> None:
        with script(path, once_then_take_and_close, create) as accepted, Client(path, timeout=10) as client:
            client.status()
            with pytest.raises(ConnectionFailed) as caught:
                client.create_dek("t") if op == "create" else client.rotate_kek(os.urandom(32))
            assert len(accepted) == 1
            assert caught.value.code == "connection_lost" and "not known" in caught.value.hint

    def test_what_can_t_have_been_complete_is_repeated(self, path: Path) -> None:
        """The connection is closed in the middle of the request: nobody can have carried it out."""

        def hang_up(conn: socket.socket) -> None:
            once(conn)
            conn.recv(100)

        with script(path, hang_up, create) as accepted, Client(path, timeout=10) as client:
            client.status()
            client.create_dek("t" * 5_000_000)
        assert len(accepted) == 2

    def test_what_nobody_asked_for_is_no_answer(self, path: Path) -> None:
        """A goodbye on an idle connection, such as 408, must not be taken for the answer to the next call."""
        heard, said = threading.Event(), threading.Event()

        def goodbye(conn: socket.socket) -> None:
            once(conn)
            heard.wait(10)
            answer(conn, b"{}", "408 Request Timeout")
            said.set()
            with contextlib.suppress(ConnectionResetError):  # the goodbye was never read
                conn.recv(1)

        with script(path, goodbye, create) as accepted, Client(path, timeout=10) as client:
            client.status()
            heard.set()
            said.wait(10)
            assert client.create_dek("t").key_id == "k"
        assert len(accepted) == 2

    def test_a_fresh_connection_that_breaks_is_not_repeated(self, path: Path) -> None:
        with script(path, take_and_close, once) as accepted, Client(path, timeout=10) as client:
            with pytest.raises(ConnectionFailed):
                client.status()
            assert len(accepted) == 1

    def test_an_early_refusal_is_heard(self, path: Path) -> None:
        """The daemon answers 413 before it has read the body, and closes."""

        def refuse(conn: socket.socket) -> None:
            conn.recv(100)
            error = b'{"error": {"code": "body_too_large", "message": "too large"}}'
            answer(conn, error, "413 Content Too Large", "Connection: close\r\n")

        with (
            script(path, refuse),
            Client(path, timeout=10) as client,
            pytest.raises(RequestRefused) as caught,
        ):
            client.encrypt("k_1", bytes(8 << 20))
        assert caught.value.code == "body_too_large"

    def test_connection_close_is_obeyed(self, path: Path) -> None:
        def last(conn: socket.socket) -> None:
            request(conn)
            answer(conn, b"{}", more="Connection: close\r\n")
            conn.recv(1)  # would get the next request on this connection

        with script(path, last, create) as accepted, Client(path, timeout=10) as client:
            client.status()
            client.create_dek("t")
        assert len(accepted) == 2

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # this process has threads: FakeKms's
    def test_a_fork_does_not_share_connections(self, client: Client, kms: FakeKms) -> None:
        client.status()
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(0 if client.healthy() else 1)
            finally:
                os._exit(2)
        assert os.waitpid(pid, 0)[1] == 0
        client.status()
        assert kms.connections == 2

    def test_close_and_use_again(self, client: Client, kms: FakeKms) -> None:
        client.status()
        client.close()
        client.close()
        client.status()
        assert kms.connections == 2


def test_the_kek_of_a_request_is_never_bytes(client: Client, kms: FakeKms, monkeypatch: Any) -> None:
    """What is handed to the transport is a view on locked memory, wiped once the answer is there."""
    sent: list[Any] = []
    bodies: list[bytes] = []
    exchange = transport.Pool.exchange

    def spy(pool: transport.Pool, request: transport.Request) -> transport.Reply:
        sent.append(request.body)
        reply = exchange(pool, request)
        bodies.append(bytes(request.body or b""))
        return reply

    monkeypatch.setattr(transport.Pool, "exchange", spy)
    new = os.urandom(32)
    client.rotate_kek(new, dry_run=True)
    assert type(sent[0]) is memoryview and new.hex().encode() in bodies[0]
    with pytest.raises(ValueError, match="released"):
        bytes(sent[0])


def test_a_signal_that_another_thread_takes_ends_a_long_call(kms: FakeKms, client: Client) -> None:
    """Likewise one that comes right before the call that blocks: nothing wakes that."""
    over: list[bool] = []
    kms.may_rotate = lambda: bool(over)

    def interrupt() -> None:
        wait_until(lambda: kms.rotation is not None, 30, "the rotation")
        time.sleep(0.2)  # until it is waited for
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    late = threading.Timer(60, over.append, [True])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background
    try:
        late.start()
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            client.rotate_kek(os.urandom(32))
        assert not over
    finally:
        signal.signal(signal.SIGINT, before)
        over.append(True)
        late.cancel()
        thread.join()
