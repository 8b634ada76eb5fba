"""Each error row of the API over the socket: a status, a code that names the field, no traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from progressdb_kms.audit.log import Fragment
from progressdb_kms.rules import Peer, PeerRules
from progressdb_kms.service.metrics import Metrics
from progressdb_kms.wire import dispatch
from progressdb_kms.wire.call import App, Call
from progressdb_kms.wire.http1 import parse_head
from progressdb_kms.wire.routes import ROUTES
from tests.harness import Daemon, Session, raw
from tests.harness.wire import b64

LIMIT = 100_000  # max_body_bytes of the daemon here
POSTS = sorted({route.path for route in ROUTES if route.method == "POST" and "{" not in route.path})
POSTS.remove("/clock/accept")  # needs no body
JSON = {"Content-Type": "application/json"}
NEED_A_BODY = [path for path in POSTS if path != "/clock/accept"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon({"max_body_bytes": LIMIT}, workers=1) as running:
        yield running


class TestEveryRoute:
    @pytest.mark.parametrize("path", NEED_A_BODY)
    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[]", b'"x"', b"\xff{}", b'{"a":1}}', b"nul", b'{"key_id":"a","key_id":"b"}']
    )
    def test_a_body_that_is_no_object(self, kms: Session, path: str, body: bytes) -> None:
        reply = kms.request("POST", path, body, JSON)
        assert (reply.status, reply.code) == (400, "malformed_json")

    @pytest.mark.parametrize("path", POSTS)
    def test_a_field_that_is_not_known(self, kms: Session, path: str) -> None:
        reply = kms.request("POST", path, {"surprise": "x", "thread_id": "t"})
        assert (
            reply.status == 400
            and reply.code in ("unknown_field", "missing_key_id")
            or "missing" in reply.code
        )

    @pytest.mark.parametrize("path", POSTS)
    @pytest.mark.parametrize("kind", ["text/plain", "application/xml", "application/x-www-form-urlencoded"])
    def test_another_media_type(self, kms: Session, path: str, kind: str) -> None:
        reply = kms.request("POST", path, b"{}", {"Content-Type": kind})
        assert (reply.status, reply.code) == (415, "unsupported_media_type")

    @pytest.mark.parametrize("path", NEED_A_BODY)
    def test_json_with_a_charset_is_json(self, kms: Session, path: str) -> None:
        reply = kms.request("POST", path, b"{}", {"Content-Type": "Application/JSON; charset=utf-8"})
        assert reply.status == 201 if path == "/deks" else reply.code.startswith("missing_")

    @pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
    def test_another_method_hears_which_there_are(self, kms: Session, route: Any) -> None:
        path = route.path.replace("{key_id}", "k_1")
        known = {one.method for one in ROUTES if one.path == route.path}
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - known:
            reply = kms.request(method, path)
            assert (reply.status, reply.code) == (405, "method_not_allowed")
            assert set(reply.headers["Allow"].split(", ")) == known | ({"HEAD"} if "GET" in known else set())

    @pytest.mark.parametrize("path", POSTS)
    def test_a_body_past_the_limit_is_refused_before_it_comes(self, daemon: Daemon, path: str) -> None:
        app: Any = SimpleNamespace(max_body_bytes=LIMIT)
        limit = next(route.body_limit(app) for route in ROUTES if route.path == path)
        head = f"POST {path} HTTP/1.1\r\nHost: unix\r\nContent-Length: {limit + 1}\r\n\r\n"
        answer = raw(daemon.socket, head.encode(), end=False)  # returns: the daemon hung up
        assert answer.startswith(b"HTTP/1.1 413 ") and b'"body_too_large"' in answer
        assert b"max_body_bytes" in answer  # what to do about it

    @pytest.mark.parametrize(
        "path", ["/", "/nothing", "/deks/", "/deks/a/b", "/deks/a/disable/x", "/Status", "//status"]
    )
    def test_an_unknown_path(self, kms: Session, path: str) -> None:
        for method in ("GET", "POST", "DELETE"):
            reply = kms.request(method, path)
            assert (reply.status, reply.code) == (404, "not_found")
            assert "openapi" in reply.json()["error"]["hint"]


class TestData:
    @pytest.fixture
    def key(self, kms: Session) -> str:
        return kms.create_dek("t")["key_id"]

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ({}, "missing_key_id"),
            ({"key_id": None}, "missing_key_id"),
            ({"key_id": 1}, "invalid_key_id"),
            ({"key_id": "a b"}, "invalid_key_id"),
            ({"key_id": "K"}, "missing_FIELD"),
            ({"key_id": "K", "FIELD": None}, "missing_FIELD"),
            ({"key_id": "K", "FIELD": 1}, "invalid_FIELD"),
            ({"key_id": "K", "FIELD": "a"}, "invalid_FIELD"),
            ({"key_id": "K", "FIELD": "QR=="}, "invalid_FIELD"),
            ({"key_id": "K", "FIELD": "QQ==\n"}, "invalid_FIELD"),
            ({"key_id": "K", "FIELD": "-_-_"}, "invalid_FIELD"),
            ({"key_id": "K", "FIELD": "", "aad": "x"}, "invalid_aad"),
            ({"key_id": "K", "FIELD": "", "aad": 1}, "invalid_aad"),
            ({"key_id": "K", "FIELD": "", "wrapped": "AAAA"}, "invalid_wrapped"),
            ({"key_id": "K", "FIELD": "", "more": 1}, "unknown_field"),
        ],
        ids=json.dumps,
    )
    @pytest.mark.parametrize(("path", "field"), [("/encrypt", "plaintext"), ("/decrypt", "ciphertext")])
    def test_bad_fields_are_named(
        self, kms: Session, key: str, path: str, field: str, fields: dict[str, Any], code: str
    ) -> None:
        body = {
            name.replace("FIELD", field): key if value == "K" else value for name, value in fields.items()
        }
        reply = kms.request("POST", path, body)
        assert (reply.status, reply.code) == (400, code.replace("FIELD", field))
        # and the same, where it is an item of a batch
        (item,) = kms.ok("POST", path + "_batch", {"items": [body]})["items"]
        assert item["error"]["code"] == reply.code

    @pytest.mark.parametrize(
        "spelled",
        [
            '{"key_id":"%s","plaintext":"%s"}',
            '{"key_id": "%s", "plaintext": "%s"}',
            '{ "key_id" : "%s" , "plaintext" : "%s" }',
            '\n{"key_id":"%s",\t"plaintext":"%s"}\r\n',
            '{"key_id":"%s","plaintext":"%s","aad":null}',
            '{"key_id":"%s","plaintext":"%s","aad":""}',
        ],
    )
    def test_json_may_be_spelled_in_any_way(self, kms: Session, key: str, spelled: str) -> None:
        for data in (b"", b"\xff\xef\xff", bytes(300)):  # the second has a / in its base64
            escaped = "".join(f"\\u{ord(c):04x}" for c in b64(data))
            for text in {b64(data), b64(data).replace("/", "\\/"), escaped}:
                reply = kms.request("POST", "/encrypt", (spelled % (key, text)).encode(), JSON)
                assert reply.status == 200
                fields = {"key_id": key, **reply.json()}
                assert kms.ok("POST", "/decrypt", fields)["plaintext"] == b64(data)

    @pytest.mark.parametrize(("colon", "comma"), [(":", ","), (": ", ", "), (" : ", " , ")])
    @pytest.mark.parametrize("count", [1, 2, 100, 500])
    def test_a_page_may_be_spelled_in_any_way(
        self, kms: Session, key: str, colon: str, comma: str, count: int
    ) -> None:
        fields = {"items": [{"key_id": key, "plaintext": b64(b"%d" % n)} for n in range(count)]}
        body = json.dumps(fields, separators=(comma, colon)).encode()
        sealed = kms.request("POST", "/encrypt_batch", body, JSON).json()["items"]
        fields = {"items": [{"key_id": key, **item} for item in sealed]}
        body = json.dumps(fields, separators=(comma, colon)).encode()
        opened = kms.request("POST", "/decrypt_batch", body, JSON).json()["items"]
        assert [item["plaintext"] for item in opened] == [b64(b"%d" % n) for n in range(count)]

    @pytest.mark.parametrize(
        "tear",
        [
            lambda body: body[:-1],
            lambda body: body + b"x",
            lambda body: body.replace(b"},{", b"}{"),
            lambda body: body.replace(b"},{", b"},,{"),
            lambda body: body.replace(b"},{", b"}]}{"),
            lambda body: body.replace(b"},{", b"};{"),
            lambda body: body[:-2] + b",]}",
            lambda body: body.replace(b'{"items"', b'{"Items"'),
            lambda body: body[:-2] + b"]}]}",
        ],
    )
    def test_a_page_that_is_no_json(self, kms: Session, key: str, tear: Any) -> None:
        items = [{"key_id": key, "plaintext": ""}] * 3
        body = tear(json.dumps({"items": items}, separators=(",", ":")).encode())
        reply = kms.request("POST", "/encrypt_batch", body, JSON)
        assert reply.status == 400 and reply.code in ("malformed_json", "unknown_field", "missing_items")

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ({}, "missing_items"),
            ({"items": []}, "invalid_items"),
            ({"items": {}}, "invalid_items"),
            ({"items": [{"key_id": "k", "plaintext": "", "ciphertext": ""}] * 1001}, "invalid_items"),
            ({"items": [{}], "key_id": "k"}, "unknown_field"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_bad_batches(self, kms: Session, fields: dict[str, Any], code: str) -> None:
        for path in ("/encrypt_batch", "/decrypt_batch", "/reencrypt"):
            reply = kms.request("POST", path, fields)
            if path == "/reencrypt" and "items" not in fields:
                code = "missing_key_id"
            assert (reply.status, reply.code) == (400, code)

    @pytest.mark.parametrize("size", [0, 1, 27, 28])
    def test_what_is_too_short_fails_like_a_wrong_key(self, kms: Session, key: str, size: int) -> None:
        reply = kms.request("POST", "/decrypt", {"key_id": key, "ciphertext": b64(bytes(size))})
        assert (reply.status, reply.code) == (422, "authentication_failed")


class TestRaw:
    """Bodies of application/octet-stream: key_id in the query, AAD as base64 in X-KMS-AAD."""

    @pytest.mark.parametrize("size", [0, 1, 3000, 4096, 70_000, LIMIT - 28])
    @pytest.mark.parametrize("aad", ["", "dGhyZWFkIDc="])
    def test_round_trip(self, kms: Session, size: int, aad: str) -> None:
        key = kms.create_dek("t")["key_id"]
        data = bytes(range(256)) * (size // 256 + 1)
        reply = kms.request("POST", f"/encrypt?key_id={key}", data[:size], {"X-KMS-AAD": aad})
        assert reply.status == 200 and reply.headers["Content-Type"] == "application/octet-stream"
        assert len(reply.body) == size + 28
        opened = kms.request("POST", f"/decrypt?key_id={key}", reply.body, {"X-KMS-AAD": aad})
        assert opened.status == 200 and opened.body == data[:size]
        other = kms.request("POST", f"/decrypt?key_id={key}", reply.body, {"X-KMS-AAD": "b3RoZXI="})
        assert (other.status, other.code) == (422, "authentication_failed")
        if size < 3000:  # the same format as in JSON
            fields = {"key_id": key, "ciphertext": b64(reply.body), "aad": aad}
            assert kms.ok("POST", "/decrypt", fields)["plaintext"] == b64(data[:size])

    @pytest.mark.parametrize(
        ("query", "aad", "code"),
        [
            ("", "", "missing_key_id"),
            ("?key_id=a%2Fb", "", "invalid_key_id"),
            ("?key_id=KEY&aad=x", "", "unknown_field"),
            ("?key_id=KEY", "***", "invalid_aad"),
        ],
    )
    def test_bad_requests_are_named(self, kms: Session, query: str, aad: str, code: str) -> None:
        query = query.replace("KEY", kms.create_dek("t")["key_id"])
        for path in ("/encrypt", "/decrypt"):
            reply = kms.request("POST", path + query, bytes(40), {"X-KMS-AAD": aad})
            assert (reply.status, reply.code) == (400, code)


def answer_of(handler: Any) -> tuple[int, dict[str, str]]:
    service: Any = SimpleNamespace(
        rules=PeerRules(), counters=Metrics(1).block(0), audit=SimpleNamespace(chain="1.1")
    )
    app = App(service, Any, Any, 0)  # type: ignore[arg-type]
    head = parse_head(b"GET /healthz HTTP/1.1\r\nHost: unix\r\n\r\n")
    locked = memoryview(bytearray(64))
    call = Call(head, b"", Peer(1, 2, 3), Fragment(""), locked, locked)
    reply = dispatch.dispatch(app, ROUTES[0]._replace(handler=handler), call)
    return reply.status, json.loads(bytes(reply.body))["error"]


def test_an_internal_error_names_a_request_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A fault of ours: 500, the traceback in the log alone, and the thread goes on."""
    status, error = answer_of(lambda app, call: 1 / 0)
    assert status == 500 and error["code"] == "internal"
    (record,) = caplog.records
    assert error["message"].split()[-1] in record.getMessage()
    assert "ZeroDivisionError" in caplog.text and "Zero" not in str(error)


def test_want_of_memory_is_no_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    def greedy(app: App, call: Call) -> Any:
        raise MemoryError

    told = {"code": "overloaded", "message": "no memory is left", "hint": "try again"}
    assert answer_of(greedy) == (503, told) and not caplog.records


class TestFraming:
    """What is refused before it has a route is answered, and the connection closed. Each clause of the RFC is
    in tests/wire; these are the statuses."""

    @pytest.mark.parametrize(
        ("request_bytes", "status", "code"),
        [
            (b"GET /healthz HTTP/1.1\r\n\r\n", 400, "malformed_request"),
            (b"GET /healthz HTTP/1.1\r\nHost : u\r\n\r\n", 400, "malformed_request"),
            (b"GET /%b HTTP/1.1\r\nHost: u\r\n\r\n" % (b"x" * 2100), 414, "uri_too_long"),
            (b"GET / HTTP/1.1\r\nHost: u\r\nExpect: the-worst\r\n\r\n", 417, "expectation_failed"),
            (b"GET / HTTP/1.1\r\nHost: u\r\nX: %b\r\n\r\n" % (b"x" * 9000), 431, "head_too_large"),
            (b"CONNECT a:1 HTTP/1.1\r\nHost: u\r\n\r\n", 501, "not_implemented"),
            (b"GET / HTTP/2.0\r\nHost: u\r\n\r\n", 505, "http_version_not_supported"),
            (b"\x16\x03\x01\x02\x00\x01", 400, "malformed_request"),
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_refused_and_closed(self, daemon: Daemon, request_bytes: bytes, status: int, code: str) -> None:
        answer = raw(daemon.socket, request_bytes, end=False)  # returns: the daemon hung up
        assert answer.startswith(b"HTTP/1.1 %d " % status) and b'"%b"' % code.encode() in answer
        assert b"Connection: close\r\n" in answer

    def test_a_head_that_does_not_come(self) -> None:
        with Daemon({"request_timeout": 1}, workers=1) as daemon:
            answer = raw(daemon.socket, b"GET / HTTP/1.1\r\nHo", end=False)
            assert answer.startswith(b"HTTP/1.1 408 ")


NO_THREADS = """
import sys, threading
start = threading.Thread.start
def refused(self):
    if self.name == "waiting":
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = refused
from progressdb_kms.__main__ import main
sys.exit(main())
"""


def test_where_no_thread_is_left_the_hint_names_its_limit() -> None:
    """Not max_connections, which has nothing to do with it."""
    with Daemon(workers=1, command=(sys.executable, "-c", NO_THREADS)) as daemon:
        reply = daemon.request("POST", "/create_dek_for_thread", {"thread_id": "t"})
        assert (reply.status, reply.code) == (503, "overloaded")
        assert b"no thread is left" in reply.body
        assert b"TasksMax=" in reply.body and b"LimitNPROC=" in reply.body
