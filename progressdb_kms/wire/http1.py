"""HTTP/1.1 in strict reading of RFC 9112, as one state machine: bytes in, requests out. No socket, no clock.

A message that two parsers could read in two ways is refused, never repaired: request smuggling lives in the
gap. Where the RFC lets a server be lenient, this one isn't, and every refusal closes the connection.

    head ──judged──▶ body by length ──▶ request
      ▲        └───▶ chunked body ─────▶ request
      └───────────── next ◀───────────────┘

`Reader` is the machine; the server and the tests both run it. Between a head and its body it asks its owner
for the `Room` that the body gets, so that who, what and how much are decided before a byte of it is read.

The grammar is in the expressions below, each under its rule. A short head is parsed once: `Reader` knows the
last thousand, because a keep-alive client sends the same head again and again.
"""

from __future__ import annotations

import ipaddress
import mmap
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Callable, NamedTuple, Union

from ..crypto.memory import wipe
from ..encoding import Buffer
from ..errors import (
    BodyTooLarge,
    ExpectationFailed,
    HeadTooLarge,
    MalformedRequest,
    MethodUnknown,
    UriTooLong,
    VersionNotSupported,
)

MAX_HEAD = 8192
"""Bytes of request line and header section: what common servers take."""

MAX_TARGET = 2048
"""Bytes of the request target: a key_id of 128 characters and a thread_id of 512, percent-encoded, fit."""

MAX_HEADERS = 64
"""Header lines: the real client sends six."""

MAX_CHUNK_LINE = 256
"""Bytes of a chunk-size line with its extensions, of which nobody needs any."""

MAX_TRAILER = 2048
"""Bytes of a trailer section, which is checked and dropped."""

REMEMBERED = 512
"""Bytes of the longest head that is remembered: a thousand of 8 KiB would be 30 MiB of a peer's choice."""

STEP, LONG = 4096, 1 << 20
"""Bytes of a body's first buffer, which doubles as bytes come: a length that was only told costs nothing.
At so many it moves to pages of its own for all of it: none is there before something is written to it, none
is copied again, and all go back to the system. In such pages from the start, 300 bytes took 11 us and 50 kB
42, where they take 4 and 10: the kernel makes each page anew."""

PIECE = 1 << 16
"""Bytes that are received at once: a peer that sends as quickly as they are taken holds nobody up, nor does
the kernel while it makes pages for them."""

# ---- grammar ---------------------------------------------------------------------------------------

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2

# RFC 9112, 3: method SP request-target SP HTTP-version, single spaces, visible characters only.
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % _TOKEN)

# RFC 9112, 5: field-name ":" OWS field-value OWS; no space before the colon, no folding, no control bytes.
_FIELD = re.compile(
    rb"(%b):[ \t]*((?:[\x21-\x7e\x80-\xff](?:[ \t\x21-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)[ \t]*" % _TOKEN
)

# RFC 3986, 3.2.2 and 3.3: what may stand as it is in a host, a path and a query. Not `" < > [ ] \ ^ ` { | }`.
_UNRESERVED = r"A-Za-z0-9._~\-"
_SUB_DELIMS = r"!$&'()*+,;="
_PATH = rf"/[{_UNRESERVED}{_SUB_DELIMS}:@/%]*"
_QUERY = rf"[{_UNRESERVED}{_SUB_DELIMS}:@/?%]*"
_REG_NAME = rf"(?:[{_UNRESERVED}{_SUB_DELIMS}]|%[0-9A-Fa-f]{{2}})"

# RFC 9112, 3.2: origin-form and absolute-form. authority-form belongs to CONNECT, "*" to OPTIONS.
_ORIGIN = re.compile(rf"({_PATH})(?:\?({_QUERY}))?")
_ABSOLUTE = re.compile(rf"(?i:https?)://([^/?#]+)({_PATH})?(?:\?({_QUERY}))?")

# RFC 9110, 7.2: uri-host [ ":" port ]. No userinfo (4.2.4). A literal in brackets is IPv6 here.
_HOST = re.compile(rf"(?:\[([0-9A-Fa-f:.]+)\]|{_REG_NAME}*)(?::[0-9]{{0,5}})?")

_LENGTH = re.compile(rb"[0-9]{1,15}")  # RFC 9110, 8.6: digits, and nothing that int() would also take

# RFC 9112, 7.1.1: chunk-ext with white space around ";" and "=", and quoted strings with quoted pairs.
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_BWS = rb"[ \t]*"
_EXTENSION = (
    _BWS + b";" + _BWS + _TOKEN + b"(?:" + _BWS + b"=" + _BWS + b"(?:" + _TOKEN + b"|" + _QUOTED + b"))?"
)
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})((?:" + _EXTENSION + rb")*)")
_BARE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_PERCENT = re.compile(r"%([0-9A-Fa-f]{2})")

# What the start of a request can't contain once a line end is seen, or before any is.
_START = re.compile(rb"(?:\r\n)?(?:%b(?: [\x21-\x7e]*(?: [HTP/0-9.]*)?)?)?\r?" % _TOKEN)


Searchable = Union[bytes, mmap.mmap]


class Head(NamedTuple):
    """A request without its body."""

    method: str
    target: str
    path: str  # percent-decoded
    query: Mapping[str, str]
    version: str  # "1.0" or "1.1"
    headers: Mapping[str, str]  # names in lower case
    content_length: int  # bytes; 0 where there is none
    chunked: bool
    keep_alive: bool
    expect_continue: bool
    content_type: str  # the media type alone, in lower case
    coded: bool  # has a Content-Encoding other than identity


# ---- finding the head ------------------------------------------------------------------------------


def find_head_end(buffer: Searchable, start: int, end: int, seen: int = 0) -> int:
    """Offset behind the blank line that ends a head, or -1: more is needed. `seen`: bytes that an earlier
    look found no fault in.

    Raises as soon as the bytes can't become a request any more, so that nobody waits for the rest of a TLS
    handshake or of a line that ends in a bare LF.
    """
    found = buffer.find(b"\r\n\r\n", start + seen - 3 if seen > 3 else start, end)
    if found >= 0:
        if found + 4 - start > MAX_HEAD:
            raise HeadTooLarge(f"the head is longer than {MAX_HEAD} bytes")
        if found == start:
            raise MalformedRequest("two empty lines stand where a request should begin")
        return found + 4
    _reject_early(bytes(buffer[start:end]), seen)
    return -1


def _reject_early(begun: bytes, seen: int) -> None:
    line, newline, _ = begun.partition(b"\n")
    if line == b"\r" and newline:  # RFC 9112, 2.2: one empty line before a request is skipped
        line, newline, _ = begun[2:].partition(b"\n")
    if newline and not line.endswith(b"\r"):
        raise MalformedRequest("a line ends in a bare LF")
    if not newline:
        if len(line) > MAX_TARGET + 64:
            raise UriTooLong(f"the request line is longer than {MAX_TARGET} bytes")
        if _START.fullmatch(line) is None:
            raise MalformedRequest("this is not the start of an HTTP request")
    else:
        if _BARE.search(begun, max(0, seen - 1)):
            raise MalformedRequest("a bare CR or LF stands in the head")
        _request_line(line[:-1])
    if len(begun) > MAX_HEAD:
        raise HeadTooLarge(f"the head is longer than {MAX_HEAD} bytes")


# ---- judging the head ------------------------------------------------------------------------------


def parse_head(raw: bytes) -> Head:
    """`raw`: one head with the blank line that ends it. Raises HttpError."""
    if raw.startswith(b"\r\n"):
        raw = raw[2:]
    lines = raw[:-4].split(b"\r\n")
    method, target, version = _request_line(lines[0])
    headers = _headers(lines[1:])
    path, query = _target(method, target, headers)
    length, chunked = _framing(headers, version)
    connection = {option.strip(" \t").lower() for option in headers.get("connection", "").split(",")}
    keep = "close" not in connection and (version == "1.1" or "keep-alive" in connection)
    content_type = headers.get("content-type", "").partition(";")[0].strip(" \t").lower()
    # RFC 9110, 10.1.1: in HTTP/1.0 the expectation must be ignored.
    expect = headers.get("expect") if version == "1.1" else None
    if expect is not None and expect.lower() != "100-continue":
        raise ExpectationFailed("of the expectations, 100-continue alone is known")
    coded = headers.get("content-encoding", "identity").lower() != "identity"  # RFC 9110, 8.4
    rest = (length, chunked, keep, expect is not None, content_type, coded)
    return Head(method, target, path, query, version, headers, *rest)


def _request_line(line: bytes) -> tuple[str, str, str]:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        if len(line) > MAX_TARGET + 64:
            raise UriTooLong(f"the request target is longer than {MAX_TARGET} bytes")
        raise MalformedRequest("the request line is not `METHOD target HTTP/1.1`")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise VersionNotSupported("HTTP/1.1 is spoken here")
    if len(target) > MAX_TARGET:
        raise UriTooLong(f"the request target is longer than {MAX_TARGET} bytes")
    if len(method) > 20:
        raise MethodUnknown("no method has such a long name")
    # RFC 9110, 2.5: a higher minor version is read as the highest that is known.
    return method.decode(), target.decode(), "1.0" if minor == b"0" else "1.1"


# Where two lines of one name are two messages in one, or can't be joined into a list.
_SINGLE = frozenset(("host", "content-length", "transfer-encoding", "content-type", "expect", "x-kms-aad"))


def _headers(lines: list[bytes]) -> Mapping[str, str]:
    if len(lines) > MAX_HEADERS:
        raise HeadTooLarge(f"there are more than {MAX_HEADERS} header lines")
    headers: dict[str, str] = {}
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise MalformedRequest("a header line is not `Name: value`")
        name, value = match[1].decode().lower(), match[2].decode("latin-1")
        if name in headers:
            if name in _SINGLE:
                raise MalformedRequest(f"the header {name} stands twice")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return MappingProxyType(headers)


def _target(method: str, target: str, headers: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
    if method == "CONNECT":
        raise MethodUnknown("this is no proxy")
    if target == "*" and method == "OPTIONS":
        return "*", MappingProxyType({})
    match = _ORIGIN.fullmatch(target)
    if match is not None:
        path, query = match[1], match[2]
    else:
        match = _ABSOLUTE.fullmatch(target)  # RFC 9112, 3.2.2: must be taken; its authority replaces Host
        if match is None:
            raise MalformedRequest("the request target is neither a path nor a URL")
        if not match[1].rstrip(":0123456789") or not valid_host(match[1]):  # RFC 9110, 4.2.1: never empty
            raise MalformedRequest("the authority of the request target is not valid")
        path, query = match[2] or "/", match[3]
    return _decode(path), _query(query)


def valid_host(host: str) -> bool:
    match = _HOST.fullmatch(host)
    if match is not None and match[1] is not None:
        try:
            ipaddress.IPv6Address(match[1])
        except ValueError:
            return False
    return match is not None


def _decode(text: str) -> str:
    """Percent-decoding; a `%` that is none, or bytes that are no UTF-8, are refused."""
    if "%" not in text:
        return text
    if "%" in _PERCENT.sub("", text):
        raise MalformedRequest("a % in the target is not followed by two hex digits")
    raw = _PERCENT.sub(lambda found: chr(int(found[1], 16)), text).encode("latin-1")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedRequest("the target is not UTF-8") from None


def _query(text: str | None) -> Mapping[str, str]:
    values: dict[str, str] = {}
    for pair in text.split("&") if text else ():
        name, _, value = pair.partition("=")
        name = _decode(name.replace("+", " "))
        if name in values:
            raise MalformedRequest("a query parameter stands twice")
        values[name] = _decode(value.replace("+", " "))
    return MappingProxyType(values)


def _framing(headers: Mapping[str, str], version: str) -> tuple[int, bool]:
    """(Content-Length, chunked), by RFC 9112, 6.3, where every doubt is a refusal; and Host, by 3.2."""
    host = headers.get("host")
    if host is None and version == "1.1":
        raise MalformedRequest("the header Host is missing")
    if host is not None and not valid_host(host):
        raise MalformedRequest("the header Host is not valid")
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is not None:
        if length is not None:
            raise MalformedRequest("Content-Length and Transfer-Encoding exclude each other")
        if version == "1.0":
            raise MalformedRequest("HTTP/1.0 knows no Transfer-Encoding")
        if coding.lower() != "chunked":
            if re.search(r"(?i)(?:^|,)[ \t]*chunked[ \t]*$", coding) and coding.lower().count("chunked") == 1:
                raise MethodUnknown("of the transfer codings, chunked alone is known")
            raise MalformedRequest("the last transfer coding is not chunked, or stands twice")
        return 0, True
    if length is None:
        return 0, False
    if _LENGTH.fullmatch(length.encode("latin-1")) is None:
        raise MalformedRequest("Content-Length is not a number")
    return int(length), False


# ---- chunked bodies --------------------------------------------------------------------------------


class Chunked:
    """A push decoder of the chunked coding (RFC 9112, 7.1). Extensions and trailers are checked and dropped.

    `limit`: bytes of the decoded body. Feed what comes; `done` says when the message is over. `reserve` is
    asked before the body grows.
    """

    def __init__(self, limit: int, reserve: Callable[[int], None]) -> None:
        self.body = bytearray()
        self.done = False
        self._limit = limit
        self._reserve = reserve
        self._left = 0  # bytes of the present chunk
        self._state = "size"
        self._trailer = 0

    def feed(self, data: Buffer) -> int:
        """Take in what can be taken; returns how many bytes. The rest is to be given again, with more."""
        view = memoryview(data)
        at = 0
        while not self.done:
            used = self._data(view[at:]) if self._state == "data" else self._line(view[at:])
            if not used:
                break
            at += used
        return at

    def _data(self, view: memoryview) -> int:
        size = min(self._left, len(view))
        self._reserve(size)
        self.body += view[:size]
        self._left -= size
        if not self._left:
            self._state = "end"
        return size

    def _line(self, view: memoryview) -> int:
        bound = {"size": MAX_CHUNK_LINE, "end": 0, "trailer": MAX_TRAILER - self._trailer}[self._state]
        begun = bytes(view[: bound + 2])
        end = begun.find(b"\r\n")
        lf = begun.find(b"\n")
        if lf >= 0 and lf != end + 1:
            raise MalformedRequest("a line of a chunked body ends in a bare LF")
        cr = begun.find(b"\r")
        if 0 <= cr < len(begun) - 1 and cr != end:
            raise MalformedRequest("a bare CR stands in a chunked body")
        if end < 0:
            if len(begun) >= bound + 2 or (self._state == "end" and begun not in (b"", b"\r")):
                raise MalformedRequest("a line of a chunked body is too long, or a chunk longer than it says")
            return 0
        getattr(self, "_on_" + self._state)(begun[:end])
        return end + 2

    def _on_size(self, line: bytes) -> None:
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise MalformedRequest("a chunk size is not a hex number")
        self._left = int(match[1], 16)
        if self._left + len(self.body) > self._limit:
            raise BodyTooLarge(f"the body is longer than {self._limit} bytes")
        self._state = "data" if self._left else "trailer"

    def _on_end(self, line: bytes) -> None:
        self._state = "size"

    def _on_trailer(self, line: bytes) -> None:
        if not line:
            self.done = True
            return
        self._trailer += len(line) + 2
        if _FIELD.fullmatch(line) is None:
            raise MalformedRequest("a trailer line is not `Name: value`")


# ---- the machine -----------------------------------------------------------------------------------


class Room(NamedTuple):
    """What a body gets, decided from its head."""

    limit: int
    """bytes"""
    reserve: Callable[[int], None] = lambda size: None
    """asked before so many more bytes are kept; may raise"""
    store: Callable[[int], memoryview] | None = None
    """where a body that comes in pieces lies, by its length; None: on the heap"""
    route: Any = None
    """the judge's own"""


_NO_ROOM = Room(0)


class Request(NamedTuple):
    """`body` may lie in the buffer that was fed: it is gone when that is overwritten."""

    head: Head
    body: memoryview | bytes
    room: Room


def _moved(begun: bytearray, length: int) -> mmap.mmap:
    try:
        pages = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError from None
    pages[: len(begun)] = begun
    return pages


Known = dict[bytes, Head]
"""Short heads that were parsed."""

KNOWN = 1024


class Reader:
    """The requests of one connection, one after another. `judge` gives a head's body its room; what it raises
    leaves `feed`, with `head` and `head_size` telling of which request."""

    def __init__(self, judge: Callable[[Head], Room], known: Known | None = None) -> None:
        self._judge = judge
        self._known: Known = {} if known is None else known
        self.reset()

    def reset(self) -> None:
        """As before the first byte of a request."""
        self.head: Head | None = None
        self.head_size = 0  # bytes
        self._seen = 0
        self._room = _NO_ROOM
        self._body: None | bytearray | memoryview | mmap.mmap = None
        self._kept = 0  # bytes of it that may be written to
        self._filled = 0
        self._chunked: Chunked | None = None

    @property
    def size(self) -> int:
        """Bytes of a body that is not whole, as far as it is known."""
        if self._chunked is not None:
            return len(self._chunked.body)
        return 0 if self.head is None else self.head.content_length

    def feed(self, data: Searchable, start: int, end: int, view: memoryview) -> tuple[int, Request | None]:
        """(bytes used, a request): None stands for more that is needed. Feed again from behind what was used,
        with more. `view`: of the data. Raises HttpError and BodyTooLarge."""
        head, at = self.head, start
        if head is None:
            at = find_head_end(data, start, end, self._seen)
            if at < 0:
                self._seen = end - start
                return 0, None
            self.head_size = at - start
            raw = data[start:at]
            self.head = head = self._known.get(raw) or self._parse(raw)
            room = self._judge(head)
            length = head.content_length
            if length > room.limit:
                raise BodyTooLarge(f"the body has {length} bytes; here at most {room.limit} are taken")
            if at + length <= end and not head.chunked:  # all of it is here: nothing to remember
                self.head, self._seen = None, 0
                return at + length - start, Request(head, view[at : at + length] if length else b"", room)
            self._room = room
        taken, body = (self._feed_chunked if head.chunked else self._feed_length)(view[at:end], head)
        return at + taken - start, self._request(head, body)

    def _parse(self, raw: bytes) -> Head:
        head = parse_head(raw)
        if len(raw) <= REMEMBERED:
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[raw] = head
        return head

    def _feed_chunked(self, view: memoryview, head: Head) -> tuple[int, memoryview | None]:
        if self._chunked is None:
            self._chunked = Chunked(self._room.limit, self._room.reserve)
        taken = self._chunked.feed(view)
        return taken, memoryview(self._chunked.body) if self._chunked.done else None

    def _feed_length(self, view: memoryview, head: Head) -> tuple[int, memoryview | None]:
        length = head.content_length
        if self._body is None:
            self._body = bytearray() if self._room.store is None else self._room.store(length)
            self._kept = len(self._body)
        taken = min(length - self._filled, len(view))
        if self._kept < self._filled + taken:
            self._grow(length, self._filled + taken)
        self._body[self._filled : self._filled + taken] = view[:taken]
        return taken, self._whole(taken, length)

    def _grow(self, length: int, come: int) -> None:
        more = min(length, max(STEP, come + min(come, LONG))) - self._kept
        self._room.reserve(more)
        if isinstance(self._body, bytearray):
            if self._kept + more <= LONG:
                self._body += bytes(more)
            else:
                self._body = _moved(self._body, length)
        self._kept += more

    def _whole(self, taken: int, length: int) -> memoryview | None:
        assert self._body is not None
        self._filled += taken
        return memoryview(self._body) if self._filled == length else None

    def place(self) -> memoryview | None:
        """Where the rest of a long body may be received without a copy; tell `placed` how much came. Release
        it before."""
        if self.head is None or self._body is None:
            return None
        if self._filled == self._kept:
            self._grow(self.head.content_length, self._filled)
        return memoryview(self._body)[self._filled : min(self._kept, self._filled + PIECE)]

    def placed(self, size: int) -> Request | None:
        assert self.head is not None
        return self._request(self.head, self._whole(size, self.head.content_length))

    def _request(self, head: Head, body: memoryview | None) -> Request | None:
        """Once its body is there."""
        if body is None:
            return None
        room = self._room
        self.reset()
        return Request(head, body, room)

    def wipe(self) -> None:
        """What came of a body that nobody will take. It may hold plaintext or a key. This takes no memory:
        there may be none."""
        if self._chunked is not None:
            wipe(memoryview(self._chunked.body))
        if not isinstance(self._body, (mmap.mmap, type(None))):  # pages of its own go as they are
            wipe(memoryview(self._body)[: self._filled])
