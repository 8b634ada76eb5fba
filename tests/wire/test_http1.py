"""Framing, held against RFC 9110 and 9112: each message is read whole, byte by byte, and with more behind."""

from __future__ import annotations

import errno
from typing import Any, Optional

import pytest

from progressdb_kms.errors import BodyTooLarge, HttpError, KMSError
from progressdb_kms.wire import http1
from progressdb_kms.wire.http1 import Head, Reader, Room

MAX_BODY = 1000
NEXT = b"GET /healthz HTTP/1.1\r\nHost: unix\r\n\r\n"

Outcome = Optional[tuple[Head, bytes, int]]


def reader() -> Reader:
    return Reader(lambda head: Room(MAX_BODY))


def read(data: bytes) -> Outcome:
    """At once."""
    used, request = reader().feed(data, 0, len(data), memoryview(data))
    return None if request is None else (request.head, bytes(request.body), used)


def in_pieces(data: bytes) -> Outcome:
    """As it comes, a byte at a time, to one machine, which is given again what it could not use."""
    machine, at = reader(), 0
    for end in range(len(data) + 1):
        used, request = machine.feed(data, at, end, memoryview(data))
        at += used
        if request is not None:
            return request.head, bytes(request.body), at
    return None


def get(*lines: str, target: str = "/", version: str = "1.1", host: bool = True) -> bytes:
    head = [f"GET {target} HTTP/{version}", *(["Host: unix"] if host else []), *lines]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n"


def post(body: bytes, *lines: str) -> bytes:
    return (
        b"POST / HTTP/1.1\r\nHost: unix\r\n"
        + "".join(f"{line}\r\n" for line in lines).encode()
        + b"\r\n"
        + body
    )


def chunked(body: bytes) -> bytes:
    return post(body, "Transfer-Encoding: chunked")


TEN = b"0123456789"
GOOD = [
    ("RFC 9112 3: a request line and a header section", get(), b""),
    ("RFC 9112 2.2: one empty line before it is skipped", b"\r\n" + get(), b""),
    ("RFC 9112 2.3: a higher minor version is read as 1.1", get(version="1.2"), b""),
    ("RFC 9112 3.2: HTTP/1.0 needs no Host", get(version="1.0", host=False), b""),
    ("RFC 9112 3.2: Host may be empty", get("Host:", host=False), b""),
    ("RFC 9112 3.2.2: absolute-form is taken", get(target="http://unix/healthz?x=1"), b""),
    ("RFC 9112 5.1: white space around a value is no part of it", get("X-A: \t v \t"), b""),
    ("RFC 9110 5.5: obs-text in a value", get("X-A: caf\xe9"), b""),
    ("RFC 9110 5.5: an empty value", get("X-A:"), b""),
    ("RFC 9110 5.3: lines of one name are a list", get("Accept: a", "Accept: b"), b""),
    ("RFC 9112 6.2: Content-Length", post(b"hello", "Content-Length: 5"), b"hello"),
    ("RFC 9112 6.2: of zero", post(b"", "Content-Length: 0"), b""),
    ("RFC 9110 8.6: leading zeros are digits", post(b"hello", "Content-Length: 0005"), b"hello"),
    ("RFC 9112 7.1: chunked", chunked(b"5\r\nhello\r\n0\r\n\r\n"), b"hello"),
    ("RFC 9112 7.1: hex in both cases", chunked(b"a\r\n%b\r\nA\r\n%b\r\n0\r\n\r\n" % (TEN, TEN)), TEN * 2),
    ("RFC 9112 7.1: an empty body", chunked(b"0\r\n\r\n"), b""),
    ("RFC 9112 7.1.1: an extension is ignored", chunked(b'5;a=b;c="d e"\r\nhello\r\n0;x\r\n\r\n'), b"hello"),
    ("RFC 9112 7.1.1: a quoted pair", chunked(b'5;a="b\\"c"\r\nhello\r\n0\r\n\r\n'), b"hello"),
    ("RFC 9112 7.1.1: BWS", chunked(b'5 ; a = b ;c\t="d"\r\nhello\r\n0\r\n\r\n'), b"hello"),
    ("RFC 9112 3.2: Host with a port", get("Host: localhost:6820", host=False), b""),
    ("RFC 9112 3.2: Host with an empty port", get("Host: localhost:", host=False), b""),
    ("RFC 9112 3.2: Host is an IPv6 literal", get("Host: [::1]:6820", host=False), b""),
    ("RFC 9112 3.2: Host with a percent-encoding", get("Host: a%2Db", host=False), b""),
    ("RFC 9112 3.2.2: absolute-form with a port", get(target="http://[::1]:6820/healthz"), b""),
    ("RFC 9112 7.1.2: trailers are dropped", chunked(b"5\r\nhello\r\n0\r\nX-T: v\r\n\r\n"), b"hello"),
    ("RFC 9112 7: the coding's name in any case", post(b"0\r\n\r\n", "Transfer-Encoding: CHUNKED"), b""),
    ("RFC 9110 10.1.1: Expect", post(b"hello", "Content-Length: 5", "Expect: 100-continue"), b"hello"),
]  # fmt: skip


@pytest.mark.parametrize(("clause", "data", "body"), GOOD, ids=[row[0] for row in GOOD])
def test_good_messages(clause: str, data: bytes, body: bytes) -> None:
    whole = read(data)
    assert whole is not None
    assert whole[1:] == (body, len(data))
    assert in_pieces(data) == whole
    assert read(data + NEXT) == whole
    following = read((data + NEXT)[whole[2] :])
    assert following is not None and following[0].path == "/healthz"


def line(text: bytes) -> bytes:
    return text + b"\r\nHost: unix\r\n\r\n"


def header(text: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: unix\r\n" + text + b"\r\n\r\n"


BAD_LINES = [
    ("RFC 9112 3: two spaces", b"GET  / HTTP/1.1"),
    ("RFC 9112 3: two spaces before the version", b"GET /  HTTP/1.1"),
    ("RFC 9112 3: a tab", b"GET\t/ HTTP/1.1"),
    ("RFC 9112 3: a leading space", b" GET / HTTP/1.1"),
    ("RFC 9112 3: a trailing space", b"GET / HTTP/1.1 "),
    ("RFC 9112 3: a space in the target", b"GET /a b HTTP/1.1"),
    ("RFC 9112 3: no version (HTTP/0.9)", b"GET /"),
    ("RFC 9112 3: no target", b"GET HTTP/1.1"),
    ("RFC 9110 9.1: a method that is no token", b"G@T / HTTP/1.1"),
    ("RFC 9110 9.1: an empty method", b" / HTTP/1.1"),
    ("RFC 9112 2.3: the name in lower case", b"GET / http/1.1"),
    ("RFC 9112 2.3: another name", b"GET / HTTQ/1.1"),
    ("RFC 9112 2.3: no minor version", b"GET / HTTP/1"),
    ("RFC 9112 2.3: two digits", b"GET / HTTP/1.10"),
    ("RFC 9112 2.3: a sign", b"GET / HTTP/+1.1"),
    ("RFC 9112 2.3: a comma", b"GET / HTTP/1,1"),
    ("RFC 9112 3.2: a relative target", b"GET healthz HTTP/1.1"),
    ("RFC 9112 3.2: a fragment", b"GET /#a HTTP/1.1"),
    ("RFC 9112 3.2: another scheme", b"GET ftp://unix/ HTTP/1.1"),
    ("RFC 9112 3.2: * with GET", b"GET * HTTP/1.1"),
    ("RFC 9112 3.2: a control byte", b"GET /\x01 HTTP/1.1"),
    ("RFC 9112 3.2: NUL", b"GET /\x00 HTTP/1.1"),
    ("RFC 9112 3.2: DEL", b"GET /\x7f HTTP/1.1"),
    ("RFC 9112 3.2: a byte over 127", b"GET /\xe9 HTTP/1.1"),
    *((f"RFC 3986 3.3: {c:c} in a path", b"GET /a%cb HTTP/1.1" % c) for c in b'"<>[]\\^`{|}'),
    *((f"RFC 3986 3.4: {c:c} in a query", b"GET /a?b=%c HTTP/1.1" % c) for c in b'"<>[]\\^`{|}'),
    ("RFC 9110 4.2.4: userinfo", b"GET http://a@unix/ HTTP/1.1"),
    ("RFC 9110 4.2.4: userinfo with a password", b"GET http://a:b@unix/ HTTP/1.1"),
    ("RFC 9110 4.2.1: an empty host", b"GET http://:80/ HTTP/1.1"),
    ("RFC 9110 4.2.1: no host", b"GET http:/// HTTP/1.1"),
    ("RFC 3986 3.2: two ports", b"GET http://a:1:2/ HTTP/1.1"),
    ("RFC 3986 3.2.2: a bracket that stays open", b"GET http://[::1/ HTTP/1.1"),
    ("RFC 3986 3.2.2: no IPv6", b"GET http://[::g]/ HTTP/1.1"),
    ("RFC 3986 3.2.3: a port of letters", b"GET http://unix:8o/ HTTP/1.1"),
    ("RFC 3986 2.1: % without digits", b"GET /% HTTP/1.1"),
    ("RFC 3986 2.1: % with one digit", b"GET /%a HTTP/1.1"),
    ("RFC 3986 2.1: % with other letters", b"GET /%zz HTTP/1.1"),
    ("RFC 3986 2.1: no UTF-8", b"GET /%ff HTTP/1.1"),
    ("RFC 3986 3.4: a parameter twice", b"GET /?a=1&a=2 HTTP/1.1"),
    ("RFC 3986 3.4: a parameter twice, encoded", b"GET /?a=1&%61=2 HTTP/1.1"),
    ("RFC 9112 2.2: a bare CR", b"GET /\r HTTP/1.1"),
    ("RFC 9112 9.8: a TLS handshake", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    ("SOCKS 5", b"\x05\x01\x00"),
    ("a Redis command", b"*1\r\n$4\r\nPING"),
]

BAD_HEADERS = [
    ("RFC 9112 5.1: a space before the colon", b"X-A : v"),
    ("RFC 9112 5.1: a tab before the colon", b"X-A\t: v"),
    ("RFC 9112 5.2: obs-fold with a space", b"X-A: v\r\n folded"),
    ("RFC 9112 5.2: obs-fold with a tab", b"X-A: v\r\n\tfolded"),
    ("RFC 9112 5: no colon", b"X-A"),
    ("RFC 9112 5: an empty name", b": v"),
    ("RFC 9110 5.1: a space in the name", b"X A: v"),
    ("RFC 9110 5.1: a bracket in the name", b"X(A): v"),
    ("RFC 9110 5.1: a quote in the name", b'"X": v'),
    ("RFC 9110 5.1: a byte over 127 in the name", b"X\xe9: v"),
    ("RFC 9110 5.5: NUL in a value", b"X-A: a\x00b"),
    ("RFC 9110 5.5: a control byte in a value", b"X-A: a\x01b"),
    ("RFC 9110 5.5: DEL in a value", b"X-A: a\x7fb"),
    ("RFC 9110 5.5: ESC in a value", b"X-A: \x1b[0m"),
    ("RFC 9112 2.2: a bare CR in a value", b"X-A: a\rb"),
    ("RFC 9112 2.2: a bare LF in a value", b"X-A: a\nb: c"),
    ("RFC 9112 2.2: a bare LF between lines", b"X-A: a\nX-B: b"),
    ("RFC 9112 2.2: CR CR LF", b"X-A: a\r\r\nX-B: b"),
    ("RFC 9112 3.2: Host twice", b"Host: unix"),
    ("RFC 9112 6.3: Content-Length twice, alike", b"Content-Length: 5\r\nContent-Length: 5"),
    ("RFC 9112 6.3: Content-Length twice", b"Content-Length: 5\r\nContent-Length: 6"),
    ("RFC 9112 6.3: a list", b"Content-Length: 5, 5"),
    ("RFC 9110 8.6: a sign", b"Content-Length: +5"),
    ("RFC 9110 8.6: negative", b"Content-Length: -5"),
    ("RFC 9110 8.6: an underscore", b"Content-Length: 1_0"),
    ("RFC 9110 8.6: hex", b"Content-Length: 0x5"),
    ("RFC 9110 8.6: a point", b"Content-Length: 5.0"),
    ("RFC 9110 8.6: a space inside", b"Content-Length: 1 0"),
    ("RFC 9110 8.6: empty", b"Content-Length:"),
    ("RFC 9110 8.6: letters", b"Content-Length: five"),
    ("RFC 9110 8.6: other digits", "Content-Length: ５".encode()),
    ("RFC 9110 8.6: superscript digits", b"Content-Length: \xb2"),
    ("RFC 9110 8.6: far too large", b"Content-Length: 99999999999999999999"),
    ("RFC 9112 6.1: both", b"Content-Length: 5\r\nTransfer-Encoding: chunked"),
    ("RFC 9112 6.1: both, the other way round", b"Transfer-Encoding: chunked\r\nContent-Length: 5"),
    ("RFC 9112 6.1: not chunked", b"Transfer-Encoding: identity"),
    ("RFC 9112 6.1: gzip", b"Transfer-Encoding: gzip"),
    ("RFC 9112 6.1: chunked twice", b"Transfer-Encoding: chunked, chunked"),
    ("RFC 9112 6.1: chunked not last", b"Transfer-Encoding: chunked, gzip"),
    ("RFC 9112 6.1: two lines", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
    ("RFC 9112 6.1: empty", b"Transfer-Encoding:"),
    ("RFC 9112 6.1: quoted", b'Transfer-Encoding: "chunked"'),
    ("RFC 9112 6.1: xchunked", b"Transfer-Encoding: xchunked"),
    ("RFC 9112 6.1: a vertical tab", b"Transfer-Encoding: \x0bchunked"),
    ("RFC 9110 8.3: Content-Type twice", b"Content-Type: a/b\r\nContent-Type: a/b"),
]

BAD_CHUNKS = [
    ("RFC 9112 7.1: a sign", b"+5\r\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1: a minus", b"-5\r\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1: 0x", b"0x5\r\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1: an underscore", b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n"),
    ("RFC 9112 7.1: a leading space", b" 5\r\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1: a trailing space", b"5 \r\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1: no size", b"\r\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1: letters", b"g\r\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1: a size that overflows", b"fffffffffffffffff\r\nhello"),
    ("RFC 9112 7.1: more data than said", b"3\r\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1: no CRLF behind the data", b"5\r\nhello0\r\n\r\n"),
    ("RFC 9112 7.1: a bare LF behind the size", b"5\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1: a bare LF behind the data", b"5\r\nhello\n0\r\n\r\n"),
    ("RFC 9112 7.1: a bare CR behind the size", b"5\rhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1.1: a bad extension", b"5;=\r\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1.1: a control byte in an extension", b"5;a\x00\r\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1.1: an endless extension", b"5;" + b"a" * 300 + b"\r\nhello\r\n0\r\n\r\n"),
    ("RFC 9112 7.1.2: a bad trailer", b"0\r\nX T: v\r\n\r\n"),
    ("RFC 9112 7.1.2: a folded trailer", b"0\r\nX-T: v\r\n f\r\n\r\n"),
    ("RFC 9112 7.1.2: a bare LF in the trailers", b"0\r\nX-T: v\n\r\n"),
    ("RFC 9112 7.1.2: endless trailers", b"0\r\n" + b"X-T: v\r\n" * 400 + b"\r\n"),
]

BAD_HOSTS = ["a:b:c", "[::1", "%zz", "]", "127.0.0.1:8o", "[::1]x", "[1.2.3]", "[:::]", "a:1:2", "a:-1", "%"]

BAD = (
    [(clause, line(text)) for clause, text in BAD_LINES]
    + [(clause, header(text)) for clause, text in BAD_HEADERS]
    + [(clause, chunked(text)) for clause, text in BAD_CHUNKS]
    + [
        ("RFC 9112 2.2: a bare LF behind the request line", b"GET / HTTP/1.1\nHost: unix\r\n\r\n"),
        ("RFC 9112 2.2: bare LFs all through", b"GET / HTTP/1.1\nHost: unix\n\n"),
        ("RFC 9112 2.2: white space before the first header", b"GET / HTTP/1.1\r\n Host: unix\r\n\r\n"),
        ("RFC 9112 2.2: two empty lines before it", b"\r\n\r\n" + get()),
        ("RFC 9112 2.2: an LF before it", b"\n" + get()),
        ("RFC 9112 3.2: no Host in HTTP/1.1", get(host=False)),
        *((f"RFC 9112 3.2: Host {host}", get(f"Host: {host}", host=False)) for host in BAD_HOSTS),
        ("RFC 9112 3.2: Host with a space", get("Host: a b", host=False)),
        ("RFC 9112 3.2: Host with a slash", get("Host: a/b", host=False)),
        ("RFC 9112 3.2: Host with an @", get("Host: a@b", host=False)),
        (
            "RFC 9112 6.1: Transfer-Encoding in HTTP/1.0",
            b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
    ]
)


@pytest.mark.parametrize(("clause", "data"), BAD, ids=[row[0] for row in BAD])
def test_malformed_messages_are_refused(clause: str, data: bytes) -> None:
    for reading in (read, in_pieces):
        with pytest.raises(HttpError) as caught:
            reading(data)
        assert caught.value.status in (400, 501), caught.value
        assert caught.value.close
    with pytest.raises(HttpError):
        read(data + NEXT)


STATUSES = [
    ("RFC 9110 15.6.6: HTTP/2", get(version="2.0"), 505),
    ("RFC 9113 3.4: the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("RFC 9110 15.6.6: HTTP/3", get(version="3.0"), 505),
    ("RFC 9110 15.5.15: a long target", get(target="/" + "a" * 3000), 414),
    ("RFC 6585 5: many headers", get(*[f"X-{i}: v" for i in range(100)]), 431),
    ("RFC 6585 5: a long header", get("X-A: " + "v" * 9000), 431),
    ("RFC 9110 10.1.1: another expectation", get("Expect: 200-ok"), 417),
    ("RFC 9110 9.3.6: CONNECT", b"CONNECT unix:1 HTTP/1.1\r\nHost: unix\r\n\r\n", 501),
    ("RFC 9112 6.1: a coding before chunked", get("Transfer-Encoding: gzip, chunked"), 501),
    ("RFC 9110 15.5.14: a long body", post(b"", "Content-Length: 1001"), 413),
    ("RFC 9110 15.5.14: a long chunked body", chunked(b"3e9\r\n"), 413),
    ("RFC 9110 15.5.14: in many chunks", chunked((b"64\r\n" + b"a" * 100 + b"\r\n") * 11), 413),
]


@pytest.mark.parametrize(("clause", "data", "status"), STATUSES, ids=[row[0] for row in STATUSES])
def test_other_refusals_have_their_status(clause: str, data: bytes, status: int) -> None:
    for reading in (read, in_pieces):
        with pytest.raises(KMSError) as caught:
            reading(data)
        assert caught.value.status == status
        assert caught.value.close


UNFINISHED = [
    *(b"GET / HTTP/1.1\r\nHost: unix\r\n\r"[:n] for n in range(28)),
    b"\r",
    b"\r\n",
    post(b"hell", "Content-Length: 5"),
    *(chunked(b"5\r\nhello\r\n0\r\n\r\n"[:n]) for n in range(15)),
]


@pytest.mark.parametrize("data", UNFINISHED)
def test_more_is_waited_for(data: bytes) -> None:
    assert read(data) is None


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03", b"GET / HTTP/1.1\n", b"G@", b"GET / HTTP/1.1\r\nX: a\rb", b"A" * 3000],
    ids=["TLS", "bare LF", "no token", "bare CR", "endless"],
)
def test_what_can_never_become_a_request_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(HttpError):
        read(data)


def test_the_head_that_the_real_client_sends() -> None:
    data = (
        b"POST /encrypt HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 2\r\n"
        b"Content-Type: application/json; charset=utf-8\r\nAccept-Encoding: gzip\r\n\r\n{}"
    )
    found = read(data)
    assert found is not None
    head = found[0]
    assert (head.method, head.path, head.version, head.content_length) == ("POST", "/encrypt", "1.1", 2)
    assert head.keep_alive and not head.chunked and not head.expect_continue
    assert head.content_type == "application/json"
    assert head.headers["user-agent"] == "Go-http-client/1.1"


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/get_wrapped?key_id=t:123", "/get_wrapped", {"key_id": "t:123"}),
        ("/get_wrapped?key_id=t%3A123", "/get_wrapped", {"key_id": "t:123"}),
        ("/a%2Fb", "/a/b", {}),
        ("/a?b=c+d&e", "/a", {"b": "c d", "e": ""}),
        ("/a?x=%C3%A9", "/a", {"x": "é"}),
        ("http://unix", "/", {}),
        ("/a?", "/a", {}),
    ],
)
def test_targets(target: str, path: str, query: dict[str, str]) -> None:
    found = read(get(target=target))
    assert found is not None
    assert (found[0].path, dict(found[0].query)) == (path, query)


@pytest.mark.parametrize(
    ("version", "connection", "keep"),
    [
        ("1.1", None, True),
        ("1.1", "close", False),
        ("1.1", "Keep-Alive, Close", False),
        ("1.0", None, False),
        ("1.0", "keep-alive", True),
        ("1.0", "Keep-Alive", True),
        ("1.0", "keep-alive, close", False),
        ("1.1", "\x85close", True),  # RFC 9110, 5.6.3: white space is space and tab, nothing else
        ("1.0", "keep-alive\xa0", False),
    ],
)
def test_keep_alive(version: str, connection: str | None, keep: bool) -> None:
    """RFC 9112, 9.3."""
    found = read(get(*([f"Connection: {connection}"] if connection else []), version=version))
    assert found is not None and found[0].keep_alive is keep


def test_white_space_is_space_and_tab() -> None:
    found = read(get("Content-Type: application/json\x85; charset=utf-8"))
    assert found is not None and found[0].content_type == "application/json\x85"


def test_an_expectation_in_http_1_0_is_ignored() -> None:
    found = read(get("Expect: 100-continue", version="1.0"))
    assert found is not None and not found[0].expect_continue


def test_a_remembered_head_can_not_be_changed() -> None:
    head = http1.parse_head(get("X-A: v"))
    with pytest.raises(TypeError):
        head.headers["x-a"] = "w"  # type: ignore[index]


@pytest.mark.parametrize("chunked", [True, False])
def test_the_bodys_buffer_can_be_wiped(chunked: bool) -> None:
    reader = http1.Reader(lambda head: http1.Room(100), {})
    framing = b"Transfer-Encoding: chunked\r\n\r\n9\r\n" if chunked else b"Content-Length: 9\r\n\r\n"
    data = b"POST / HTTP/1.1\r\nHost: u\r\n" + framing + b"hello"
    assert reader.feed(data, 0, len(data), memoryview(data)) == (len(data), None)
    body = reader._chunked.body if reader._chunked else reader._body
    assert body is not None and bytes(body[:5]) == b"hello"
    reader.wipe()
    assert bytes(body[:5]) == bytes(5)


def test_what_is_promised_is_not_allocated() -> None:
    """A length that was only told costs nothing; a buffer is never over twice what came, nor much over it."""
    taken = 0

    def reserve(size: int) -> None:
        nonlocal taken
        taken += size

    machine = Reader(lambda head: Room(1 << 30, reserve))
    head = b"POST / HTTP/1.1\r\nHost: unix\r\nContent-Length: 1073741824\r\n\r\n"
    assert machine.feed(head, 0, len(head), memoryview(head)) == (len(head), None) and taken == 0
    for come in range(1000, 60_000, 1000):
        assert machine.feed(bytes(1000), 0, 1000, memoryview(bytes(1000))) == (1000, None)
        assert come <= taken <= max(http1.STEP, 2 * come)
    for come in range(60_000, 4 * http1.LONG, 100_000):
        assert machine.feed(bytes(100_000), 0, 100_000, memoryview(bytes(100_000))) == (100_000, None)
        assert come <= taken <= come + 100_000 + min(come + 100_000, http1.LONG)


@pytest.mark.parametrize("parts", [300, 3 * http1.LONG // 256 + 1])
def test_a_long_body_comes_without_a_copy(parts: int) -> None:
    body = bytes(range(256)) * parts
    head = post(b"", f"Content-Length: {len(body)}")
    machine = Reader(lambda head: Room(len(body)))
    assert machine.place() is None
    machine.feed(head + body[:100], 0, len(head) + 100, memoryview(head + body[:100]))
    at, request = 100, None
    while request is None:
        with machine.place() as place:  # type: ignore[union-attr]
            size = min(len(place), len(body) // 50, len(body) - at)
            place[:size] = body[at : at + size]
        request = machine.placed(size)
        at += size
    assert bytes(request.body) == body and request.head.method == "POST"
    assert read(NEXT) == read_with(machine, NEXT)


def read_with(machine: Reader, data: bytes) -> Outcome:
    used, request = machine.feed(data, 0, len(data), memoryview(data))
    return None if request is None else (request.head, bytes(request.body), used)


def test_a_body_of_which_memory_has_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: int) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(http1.mmap, "mmap", refused)
    body = bytes(2 * http1.LONG)
    data = post(body, f"Content-Length: {len(body)}")[:-1]
    with pytest.raises(MemoryError):
        Reader(lambda head: Room(len(body))).feed(data, 0, len(data), memoryview(data))


def test_a_locked_place_is_asked_for_only_where_a_body_is_not_whole() -> None:
    asked: list[int] = []

    def place(length: int) -> memoryview:
        asked.append(length)
        return memoryview(bytearray(length))

    machine = Reader(lambda head: Room(MAX_BODY, store=place))
    data = post(b"hello", "Content-Length: 5")
    assert read_with(machine, data) == read(data) and asked == []
    assert machine.feed(data, 0, len(data) - 2, memoryview(data)) == (len(data) - 2, None) and asked == [5]
    _, request = machine.feed(data, len(data) - 2, len(data), memoryview(data))
    assert request is not None and bytes(request.body) == b"hello"


def test_what_judge_raises_tells_of_which_request() -> None:
    def judge(head: Head) -> Room:
        raise BodyTooLarge("no")

    machine = Reader(judge)
    data = post(b"hello", "Content-Length: 5")
    with pytest.raises(BodyTooLarge):
        machine.feed(data, 0, len(data), memoryview(data))
    assert machine.head is not None and machine.head.content_length == 5
    assert machine.head_size == len(data) - 5


def test_a_body_of_just_the_limit_is_taken() -> None:
    assert read(post(b"a" * MAX_BODY, f"Content-Length: {MAX_BODY}")) is not None
    with pytest.raises(BodyTooLarge):
        read(post(b"", f"Content-Length: {MAX_BODY + 1}"))


def test_of_a_body_that_is_not_whole_so_much_is_known() -> None:
    """The length that its head tells, or what has come of one that tells none."""
    sized, chunked = reader(), reader()
    assert sized.size == 0
    for machine, head, size in (
        (sized, b"Content-Length: 500\r\n\r\nhello", 500),
        (chunked, b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 5),
    ):
        data = b"POST /x HTTP/1.1\r\nHost: unix\r\n" + head
        assert machine.feed(data, 0, len(data), memoryview(data)) == (len(data), None)
        assert machine.size == size
