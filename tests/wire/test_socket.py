"""The cases of the state machine through a real socket: what it says of bytes is what the daemon does."""

from __future__ import annotations

import array
import contextlib
import fcntl
import re
import socket
import termios
import time

import pytest

from progressdb_kms.wire import http1
from progressdb_kms.wire.routes import ROUTES
from progressdb_kms.wire.slab import SPARES
from tests.conftest import MakeDaemon
from tests.harness import Daemon, Session, raw
from tests.harness.wire import b64, connect

from .test_http1 import BAD, GOOD, NEXT, STATUSES, UNFINISHED, get

STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in STATUS.findall(answer)]


def split(data: bytes, pieces: int) -> list[bytes]:
    size = max(1, -(-len(data) // pieces))
    return [data[at : at + size] for at in range(0, len(data), size)]


def routed(data: bytes) -> bytes:
    """To a path whose body is read: what has no route is refused before."""
    return data.replace(b"POST / ", b"POST /encrypt ")


@pytest.mark.parametrize("pieces", [1, 5], ids=["whole", "in pieces"])
def test_good_messages_are_answered_and_the_next_too(daemon: Daemon, pieces: int) -> None:
    for clause, data, _ in GOOD:
        answer = raw(daemon.socket, split(routed(data) + NEXT, pieces))
        found = [status for status in statuses(answer) if status != 100]
        keeps = b"HTTP/1.0" not in data
        assert len(found) == 1 + keeps and b"malformed_request" not in answer, (clause, answer)
        assert not keeps or found[1] == 200, (clause, answer)


@pytest.mark.parametrize("pieces", [1, 5], ids=["whole", "in pieces"])
def test_malformed_messages_are_refused_and_the_connection_closed(daemon: Daemon, pieces: int) -> None:
    for clause, data in BAD:
        answer = raw(daemon.socket, split(routed(data) + NEXT, pieces), end=False)
        assert statuses(answer) in ([400], [501]) and b"Connection: close" in answer, (clause, answer)


def test_other_refusals_have_their_status(daemon: Daemon) -> None:
    for clause, data, status in STATUSES:
        if status != 413:  # the daemon's limit is another
            answer = raw(daemon.socket, data, end=False)
            assert statuses(answer) == [status], (clause, answer)


def test_what_is_unfinished_gets_no_answer(daemon: Daemon) -> None:
    for data in UNFINISHED:
        assert raw(daemon.socket, routed(data)) == b"", data


class TestHeads:
    @pytest.mark.parametrize("size", [3903, 3904, 4096, http1.MAX_HEAD])
    def test_up_to_the_limit_they_are_read(self, daemon: Daemon, size: int) -> None:
        """3,903 bytes with a chunked body were reset without an answer, and more were refused."""
        key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        body = b'{"key_id":"%b","plaintext":"aGVsbG8="}' % key.encode()
        start = (
            b"POST /encrypt HTTP/1.1\r\nHost: u\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\nX-Fill: "
        )
        head = start + b"v" * (size - len(start) - 4) + b"\r\n\r\n"
        chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in split(body, 4)) + b"0\r\n\r\n"
        assert len(head) == size
        assert statuses(raw(daemon.socket, head + chunked + NEXT)) == [200, 200]
        assert statuses(raw(daemon.socket, [head, chunked, NEXT])) == [200, 200]

    def test_past_the_limit_they_are_refused(self, daemon: Daemon) -> None:
        data = get("X-Fill: " + "v" * http1.MAX_HEAD)
        assert statuses(raw(daemon.socket, data, end=False)) == [431]
        assert statuses(raw(daemon.socket, split(data, 20), end=False)) == [431]


class TestCoding:
    @pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
    def test_what_is_coded_is_not_taken_for_the_message(self, kms: Session, route: object) -> None:
        method, path = route.method, route.path.replace("{key_id}", "k_1")  # type: ignore[attr-defined]
        body = None if method == "GET" else b"{}"
        reply = kms.request(method, path, body, {"Content-Encoding": "gzip"})
        assert (reply.status, reply.code) == (415, "unsupported_media_type")

    def test_identity_is_no_coding(self, kms: Session) -> None:
        assert kms.request("GET", "/healthz", None, {"Content-Encoding": "Identity"}).status == 200


class TestExpect:
    HEAD = b"POST /encrypt HTTP/1.1\r\nHost: u\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"

    def test_it_is_answered_once(self, daemon: Daemon) -> None:
        with connect(daemon.socket) as sock:
            sock.sendall(self.HEAD % 4)
            assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            for piece in (b"{", b"}", b"  "):
                sock.sendall(piece)
                time.sleep(0.01)
            assert statuses(sock.recv(1000)) == [400]

    def test_who_sent_the_body_already_needs_no_answer(self, daemon: Daemon) -> None:
        assert statuses(raw(daemon.socket, self.HEAD % 2 + b"{}")) == [400]

    def test_it_comes_behind_answers_that_are_not_taken_yet(self, daemon: Daemon) -> None:
        """Of some count of these answers the last one just fits, and it does not any more."""
        for ahead in range(1, 14):
            with connect(daemon.socket) as sock:
                sock.sendall(get(target="/metrics") * ahead + self.HEAD % 4)
                settled(daemon, sock)
                come = b""
                while not come.endswith(b"HTTP/1.1 100 Continue\r\n\r\n"):
                    come += sock.recv(1 << 20)
                for piece in (b"{", b"}  "):
                    sock.sendall(piece)
                    settled(daemon, sock)
                assert statuses(sock.recv(1000)) == [400]

    def test_what_is_refused_is_not_asked_for(self, daemon: Daemon) -> None:
        assert statuses(raw(daemon.socket, self.HEAD % (1 << 30), end=False)) == [413]
        assert statuses(raw(daemon.socket, (self.HEAD % 4).replace(b"encrypt", b"nothing"))) == [404]


class TestSecretRoutes:
    PATHS = [route.path for route in ROUTES if route.secret]

    @pytest.mark.parametrize("path", PATHS)
    def test_chunked_is_refused(self, daemon: Daemon, path: str) -> None:
        """Its decoder's buffer was readable memory while the rest was waited for."""
        head = f"POST {path} HTTP/1.1\r\nHost: u\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        answer = raw(daemon.socket, head + b"2\r\n{}\r\n0\r\n\r\n", end=False)
        assert statuses(answer) == [411] and b'"length_required"' in answer

    @pytest.mark.parametrize("path", PATHS)
    def test_slowly_they_are_read_too(self, daemon: Daemon, path: str) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: u\r\nContent-Length: 12\r\n\r\n".encode()
        assert statuses(raw(daemon.socket, [head, b'{"x"', b':"y"', b" }  "])) == [400]


CREATE = (
    b"POST /deks HTTP/1.1\r\nHost: u\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n"
    b'{"thread_id":"t"}'
)


def settled(daemon: Daemon, sock: socket.socket) -> int:
    """Bytes of answers that lie there when no more come."""
    before = -1
    while (now := waiting(sock)) != before:
        before = now
        assert daemon.healthy() and daemon.healthy()  # it had some turns
    return now


def waiting(sock: socket.socket) -> int:
    size = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, size)
    return size[0]


class TestAhead:
    """Pipelining: requests that were sent ahead are answered in order, all of them."""

    def test_those_that_are_refused_are_answered_too(self, make_daemon: MakeDaemon) -> None:
        """Behind a head that came in two pieces, and more of them than one turn takes."""
        daemon, missing = make_daemon(workers=1), get(target="/nowhere")
        with connect(daemon.socket, 60.0) as sock:
            sock.sendall(missing[:10])
            assert daemon.healthy()  # the one thread has seen those bytes
            sock.sendall(missing[10:] + missing * 200 + NEXT)
            sock.shutdown(socket.SHUT_WR)
            with sock.makefile("rb") as answers:
                assert statuses(answers.read()) == [404] * 201 + [200]

    @pytest.mark.parametrize("count", [2, 50, 3000])
    def test_all_are_answered(self, daemon: Daemon, count: int) -> None:
        assert statuses(raw(daemon.socket, NEXT * count)) == [200] * count

    @pytest.mark.parametrize("count", [3, 20])
    def test_of_many_at_once_that_end_behind_what_they_sent(
        self, make_daemon: MakeDaemon, count: int
    ) -> None:
        """Each end is told of while the last answers are still to be sent."""
        daemon = make_daemon(workers=1)
        for _ in range(20):
            with contextlib.ExitStack() as opened:
                socks = [opened.enter_context(connect(daemon.socket, 60.0)) for _ in range(30)]
                for sock in socks:
                    sock.sendall(NEXT * count)
                    sock.shutdown(socket.SHUT_WR)
                for sock in socks:
                    with sock.makefile("rb") as answers:
                        assert statuses(answers.read()) == [200] * count

    def test_behind_one_that_waits_for_the_keeper(self, kms: Session, daemon: Daemon) -> None:
        assert statuses(raw(daemon.socket, (CREATE + NEXT) * 20)) == [201, 200] * 20

    def test_behind_those_that_wait_of_more_than_there_is_locked_memory_for(
        self, make_daemon: MakeDaemon
    ) -> None:
        """What lay behind was dropped, and its connection closed, where no piece was free to keep it."""
        daemon = make_daemon(workers=1)
        with contextlib.ExitStack() as opened:
            socks = [opened.enter_context(connect(daemon.socket, 60.0)) for _ in range(3 * SPARES)]
            for _ in range(5):
                with daemon.standing_still():
                    for sock in socks:
                        sock.sendall((CREATE + NEXT) * 3)
            for sock in socks:
                sock.shutdown(socket.SHUT_WR)
                with sock.makefile("rb") as answers:
                    assert statuses(answers.read()) == [201, 200] * 15
        assert daemon.stderr.count("locked memory") == 0

    @pytest.mark.parametrize("bad", [BAD[0][1], get("Connection: close", target="/nowhere")])
    def test_a_last_word_behind_answers_that_lie(self, daemon: Daemon, bad: bytes) -> None:
        """It was lost where these filled the buffer to its end."""
        with connect(daemon.socket, 60.0) as sock:
            sock.sendall(NEXT * 2000)
            size = len(raw(daemon.socket, NEXT))
            full = settled(daemon, sock) // size
        assert 0 < full < 2000
        for count in (full - 1, full, full + 1):
            with connect(daemon.socket, 60.0) as sock:
                sock.sendall(NEXT * count + bad)
                sock.shutdown(socket.SHUT_WR)
                settled(daemon, sock)
                with sock.makefile("rb") as answers:
                    assert statuses(answers.read())[full - 1 :] == [200] * (count - full + 1) + [
                        400 if bad == BAD[0][1] else 404
                    ]

    def test_behind_one_that_is_refused_and_was_whole(self, daemon: Daemon) -> None:
        post = b"POST /nothing HTTP/1.1\r\nHost: u\r\nContent-Length: 2\r\n\r\n{}"
        assert statuses(raw(daemon.socket, post + NEXT)) == [404, 200]

    def test_a_long_body_and_more_behind_it(self, kms: Session, daemon: Daemon) -> None:
        key = kms.create_dek("t")["key_id"]
        data = bytes(range(256)) * 300  # each way, all of it fits into the buffers of a socket
        head = f"POST /encrypt?key_id={key} HTTP/1.1\r\nHost: u\r\nContent-Type: application/octet-stream\r\n"
        request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data
        answer = raw(daemon.socket, request + NEXT + request)
        sealed = answer[answer.index(b"\r\n\r\n") + 4 :][: len(data) + 28]
        assert kms.request("POST", f"/decrypt?key_id={key}", sealed).body == data
        rest = answer[answer.index(b"\r\n\r\n") + 4 + len(data) + 28 :]
        assert rest.startswith(b"HTTP/1.1 200 ") and rest.count(b"HTTP/1.1 200 OK") == 2


@pytest.fixture(scope="module")
def small() -> object:
    with Daemon({"max_body_bytes": 100_000}, workers=1) as running:
        yield running


class TestTakenBack:
    """What /encrypt takes, /decrypt takes back: it was 200 there and 413 here, for ever."""

    def test_raw(self, small: Daemon) -> None:
        with small.session() as kms:
            key = kms.create_dek("t")["key_id"]
            for size in (100_000 - 28, 100_000 - 27, 100_000):
                sealed = kms.request("POST", f"/encrypt?key_id={key}", bytes(size))
                opened = kms.request("POST", f"/decrypt?key_id={key}", sealed.body)
                assert (sealed.status, opened.status, opened.body) == (200, 200, bytes(size))
            assert kms.request("POST", f"/encrypt?key_id={key}", bytes(100_001)).status == 413

    def test_json(self, small: Daemon) -> None:
        with small.session() as kms:
            key = kms.create_dek("t")["key_id"]
            frame = len('{"key_id":"","plaintext":""}') + len(key)
            data = bytes((100_000 - frame) // 4 * 3)
            assert kms.decrypt(key, kms.encrypt(key, data)) == data
            # ProgressDB keeps the token with its quotes, and sends that as base64 once more
            kept = b64(b'"%b"' % b64(kms.encrypt(key, b'"' + b"a" * (len(data) - 2) + b'"')).encode())
            assert kms.request("POST", "/decrypt", {"key_id": key, "ciphertext": kept}).status == 200

    def test_batches(self, small: Daemon) -> None:
        with small.session() as kms:
            key = kms.create_dek("t")["key_id"]
            each = {"key_id": key, "plaintext": b64(bytes(12))}
            items = kms.ok("POST", "/encrypt_batch", {"items": [each] * 1000})["items"]
            again = {"items": [{"key_id": key, **item} for item in items]}
            opened = kms.ok("POST", "/decrypt_batch", again)["items"]
            assert {item["plaintext"] for item in opened} == {each["plaintext"]}
            moved = {"items": [{**item, "new_key_id": key} for item in again["items"]]}
            assert len(kms.ok("POST", "/reencrypt", moved)["items"]) == 1000
