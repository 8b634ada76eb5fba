"""Any bytes give a request, a need for more, or a KMSError; and it does not matter how they are cut."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from progressdb_kms.errors import KMSError
from progressdb_kms.wire.http1 import Reader, Room

PIECES = st.sampled_from(
    [
        b"GET",
        b"POST",
        b" ",
        b"/",
        b"/encrypt",
        b"?a=b",
        b"%41",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"\r\n",
        b"\r\n\r\n",
    ]
    + [b"\n", b"\r", b"Host: unix", b"Content-Length: 5", b"Content-Length: "]
    + [b"Transfer-Encoding: chunked"]
    + [b":", b"0", b"5", b"hello", b"5\r\nhello\r\n", b"0\r\n\r\n", b";", b"\t", b"\x00", b"\xff"]
    + [b"Connection: close", b"Expect: 100-continue"]
)
ALMOST = st.lists(st.one_of(PIECES, st.binary(max_size=3)), max_size=24).map(b"".join)
MUTATED = st.tuples(
    st.sampled_from(
        [
            b"POST /encrypt HTTP/1.1\r\nHost: unix\r\nContent-Length: 5\r\n\r\nhello",
            b"POST / HTTP/1.1\r\nHost: unix\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
        ]
    ),
    st.integers(0, 90),
    st.binary(max_size=3),
    st.integers(0, 3),
).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + t[3] :])


def outcome(data: bytes) -> None | tuple[object, ...] | str:
    try:
        used, request = Reader(lambda head: Room(100)).feed(data, 0, len(data), memoryview(data))
        return None if request is None else (request.head, bytes(request.body), used)
    except KMSError as error:
        assert error.status in (400, 413, 414, 417, 431, 501, 505)
        return "refused"


def dripped(data: bytes) -> None | tuple[object, ...] | str:
    """A byte at a time, to one machine."""
    machine, at = Reader(lambda head: Room(100)), 0
    try:
        for end in range(1, len(data) + 1):
            used, request = machine.feed(data, at, end, memoryview(data))
            at += used
            if request is not None:
                return request.head, bytes(request.body), at
    except KMSError:
        return "refused"
    return None


def check(data: bytes) -> None:
    """Never another exception; a prefix is refused only if the whole is, and never read differently."""
    whole = outcome(data)
    assert dripped(data) == whole
    for size in range(len(data)):
        begun = outcome(data[:size])
        if begun == "refused":
            assert whole == "refused"
        elif begun is not None:
            assert whole == begun
    if isinstance(whole, tuple):
        assert outcome(data + b"GET / HTTP/1.1\r\n") == whole


@given(st.one_of(ALMOST, MUTATED, st.binary(max_size=200)))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes(data: bytes) -> None:
    check(data)


@pytest.mark.long
@given(st.one_of(ALMOST, MUTATED, st.binary(max_size=2000)))
@settings(max_examples=50_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_for_long(data: bytes) -> None:
    check(data)
