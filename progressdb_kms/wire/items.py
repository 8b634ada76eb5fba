"""JSON bodies of any length, so that none holds the interpreter or the memory for long.

One `json.loads` of 8 MiB of `{},` keeps everybody out for 0.35 s and takes 193 MiB. So a batch is read item
by item, in pages, of which each is done and gone before the next is read; and what a parser is to read is
counted before, at the speed of memory.

Beside JSON there are two shorter ways to read a page of 100 short messages, which as a whole takes a
millisecond. By JSON that is 0.35 ms of it, by the form that clients write (PLAIN) 0.14, by what the items
have in common (`_alike`) 0.09. One message alone: 3.5 us by JSON, 1.0 by its form, of some 15 for an encrypt
without HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from ..encoding import KEY_ID, Buffer, b64decode, json_item, json_loads
from ..errors import BadRequest
from .fields import MAX_ITEMS, Fields, wrong_number

PAGE = 128
"""Items that are worked on at a time: a page of chat is 100, under one DEK that is opened once."""

PAGE_BYTES = 44 * 1024
"""Bytes of a body that they are written in, or one item that is longer: about 0.2 ms of work."""

SMALL = 16 * 1024
"""Bytes of a body that are parsed without being counted before: at worst 0.4 ms."""

MEMBERS = 16
"""Members that an object here may have: more than any call knows."""

_COUNTED = 1 << 16


def _malformed() -> BadRequest:
    return BadRequest("the body is not valid JSON (UTF-8, no name twice, no NaN)", code="malformed_json")


def _bounded(body: Buffer, objects: int, error: BadRequest) -> None:
    """Raise this error for what no body with so many objects can be made of, before a parser sees it."""
    raw = memoryview(body)
    limits = {b"{": objects, b"[": objects, b":": objects * MEMBERS, b",": objects * (MEMBERS + 1)}
    counts = dict.fromkeys(limits, 0)
    for at in range(0, len(raw), _COUNTED):
        piece = bytes(raw[at : at + _COUNTED])
        for sign, limit in limits.items():
            counts[sign] += piece.count(sign)
            if counts[sign] > limit:
                raise error


def parsed_json(body: Buffer) -> Any:
    """The value of a body that is no batch."""
    if len(body) > SMALL:
        error = BadRequest("the body has more parts than any call takes", code="malformed_json")
        _bounded(body, 1 + MEMBERS, error)
    try:
        return json_loads(bytes(body))
    except ValueError:
        raise _malformed() from None


# ---- batches -------------------------------------------------------------------------------------------

_START = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"items"[ \t\r\n]*:[ \t\r\n]*\[')
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n]*([,\]])")
_END = re.compile(r"[ \t\r\n]*\}[ \t\r\n]*")


PLAIN = {
    field: rb'\{"key_id" ?: ?"(%b)" ?, ?"%b" ?: ?"([^"]*)"\}' % (KEY_ID.pattern.encode(), field.encode())
    for field in ("plaintext", "ciphertext")
}
"""An object as most clients write it. Data with an escape in them fit too, and then are no base64 as they
stand: `[^"]` is a tight loop of the engine, a class of two characters takes ten times as long."""

_ITEM = {field: re.compile(plain + rb" ?(, ?|\])") for field, plain in PLAIN.items()}


def batch_items(body: Buffer, field: str) -> Iterator[list[Any]] | Fields:
    """The rows of `{"items": [...]}` in pages: (key_id, data, b"") of an item that is written as most clients
    do, and of any other what JSON makes of it. Raises BadRequest, also behind some pages. Of an object
    without items its fields."""
    start = _START.match(body)
    if start is not None:
        return _items(body, start.end(), _ITEM.get(field), field)
    fields = Fields(parsed_json(body))
    rows = fields.items()
    if rows is None:
        return fields
    fields.end()
    return _pages(iter(rows))


def _pages(rows: Iterator[Any], count: int = 0) -> Iterator[list[Any]]:
    """`count`: of those that were read before."""
    page: list[Any] = []
    for row in rows:
        page.append(row)
        if len(page) == PAGE:
            count = _counted(count, page)
            yield page
            page = []
    if _counted(count, page) > count:
        yield page


def _counted(count: int, page: list[Any]) -> int:
    count += len(page)
    if not 1 <= count <= MAX_ITEMS:
        raise wrong_number()
    return count


def _items(body: Buffer, at: int, plain: re.Pattern[bytes] | None, field: str) -> Iterator[list[Any]]:
    """From behind the bracket. As long as items are written plainly, nothing is decoded but their data."""
    page: list[Any] = []
    count, begun, tries, last = 0, at, 0, False
    while plain is not None and not last and (item := plain.match(body, at)) is not None:
        try:
            page.append((item[1].decode("ascii"), b64decode(item[2]), b""))
        except ValueError:
            break
        at, last = item.end(), item[3] == b"]"
        if not last and tries * 8 < len(page) + 32:  # else each is written in a way of its own
            at, tries = _alike(body, item, begun + PAGE_BYTES, page), tries + 1
        if last or len(page) >= PAGE or at >= begun + PAGE_BYTES:
            count = _counted(count, page)
            yield page
            page, begun, tries = [], at, 0
    if last:
        return _nothing_more(_text(body, at), 0)
    rest = memoryview(body)[at:]
    if len(rest) > SMALL:
        _bounded(rest, 2 * MAX_ITEMS, wrong_number())
    yield from _pages(chain(page, _other_items(_text(rest, 0), not count and not page)), count)


def _alike(body: Buffer, item: re.Match[bytes], end: int, page: list[Any]) -> int:
    """Add to the page those behind this one, up to `end`, that are written as it is. They are found by what
    stands between them: there are quotes in it, and none in key_ids and base64. Returns where the next
    begins."""
    at, (data, tail) = item.end(), item.span(2)
    middle = bytes(body[item.end(1) : data])
    lead = bytes(body[tail:at]) + bytes(body[item.start() : item.start(1)])
    before, *texts = bytes(body[tail:end]).split(lead, PAGE - len(page))
    key_id, mine = item[1].decode("ascii"), item[1] + middle
    for text in () if before else texts[:-1]:
        if text.startswith(mine):
            coded = text[len(mine) :]
        else:
            name, found, coded = text.partition(middle)
            key_id, mine = str(name, "latin-1"), name + middle
            if not found or not KEY_ID.fullmatch(key_id):
                break
        try:
            page.append((key_id, b64decode(coded), b""))
        except ValueError:
            break
        at += len(lead) + len(text)
    return at


def _text(body: Buffer, at: int) -> str:
    try:
        return str(memoryview(body)[at:], "utf-8")
    except ValueError:
        raise _malformed() from None


def _other_items(text: str, none_yet: bool) -> Iterator[Any]:
    at = _SPACE.match(text).end()  # type: ignore[union-attr]
    if none_yet and text[at : at + 1] == "]":
        return _nothing_more(text, at + 1)
    while True:
        try:
            row, at = json_item(text, at)
        except ValueError:
            raise _malformed() from None
        yield row
        between = _BETWEEN.match(text, at)
        if between is None:
            raise _malformed()
        if between[1] == "]":
            return _nothing_more(text, between.end())
        at = _SPACE.match(text, between.end()).end()  # type: ignore[union-attr]


def _nothing_more(text: str, at: int) -> None:
    """Behind the items the object ends; a member more is unknown, anything else no JSON."""
    if _END.fullmatch(text, at) is None:
        rest = text[at:].lstrip(" \t\r\n")
        Fields(parsed_json(("{" + rest[1:] if rest[:1] == "," else "").encode())).end()
        raise _malformed()
