"""JSON bodies of any length, so that none holds the interpreter or the memory for long.

One `json.loads` of 8 MiB of `{},` keeps everybody out for 0.35 s and takes 193 MiB. So a batch is read item
by item, in pages, of which each is done and gone before the next is read; and what a parser is to read is
counted before, at the speed of memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..encoding import Buffer, b64decode, json_item, json_loads
from ..errors import BadRequest
from .fields import MAX_ITEMS, Fields

PAGE = 128
"""Items that are worked on at a time: a page of chat is 100, under one DEK that is opened once."""

PAGE_BYTES = 32 * 1024
"""Bytes of their data, or one item that is longer: about 0.2 ms of work."""

SMALL = 16 * 1024
"""Bytes of a body that are parsed without being counted before: at worst 0.4 ms."""

MEMBERS = 16
"""Members that an object here may have: more than any call knows."""

_COUNTED = 1 << 16


def _malformed() -> BadRequest:
    return BadRequest("the body is not valid JSON (UTF-8, no name twice, no NaN)", code="malformed_json")


def _bounded(body: Buffer, objects: int) -> None:
    """Refuse what no body with so many objects can be made of, before a parser sees it."""
    raw = memoryview(body)
    limits = {b"{": objects, b"[": objects, b":": objects * MEMBERS, b",": objects * (MEMBERS + 1)}
    counts = dict.fromkeys(limits, 0)
    for at in range(0, len(raw), _COUNTED):
        piece = bytes(raw[at : at + _COUNTED])
        for sign, limit in limits.items():
            counts[sign] += piece.count(sign)
            if counts[sign] > limit:
                raise BadRequest("the body has more parts than any call takes", code="malformed_json")


def parsed_json(body: Buffer) -> Any:
    """The value of a body that is no batch."""
    if len(body) > SMALL:
        _bounded(body, 1 + MEMBERS)
    try:
        return json_loads(bytes(body))
    except ValueError:
        raise _malformed() from None


# ---- batches -------------------------------------------------------------------------------------------

_KEY_ID = rb"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
_START = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"items"[ \t\r\n]*:[ \t\r\n]*\[')
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n]*([,\]])")
_END = re.compile(r"[ \t\r\n]*\}[ \t\r\n]*")


def item_pattern(field: str, colon: bytes, comma: bytes) -> bytes:
    """Data with an escape in them fit too, and then are no base64 as they stand: `[^"]` is a tight loop of
    the engine, a class of two characters takes ten times as long."""
    return rb'\{"key_id"%b"(%b)"%b"%b"%b"([^"]*)"\}' % (colon, _KEY_ID, comma, field.encode(), colon)


_ITEM = {
    field: re.compile(item_pattern(field, b" ?: ?", b" ?, ?") + rb" ?(, ?|\])")
    for field in ("plaintext", "ciphertext")
}


def is_batch(body: Buffer) -> bool:
    return _START.match(body) is not None


def batch_items(body: Buffer, field: str) -> Iterator[list[Any]]:
    """The rows of `{"items": [...]}` in pages: (key_id, data, b"") of an item that is written as most clients
    do, and of any other what JSON makes of it. Raises BadRequest, also behind some pages."""
    start = _START.match(body)
    if start is None:
        return pages(iter(_rows(Fields(parsed_json(body)))))
    return pages(_items(body, start.end(), _ITEM.get(field), field))


def _rows(fields: Fields) -> list[Any]:
    rows = fields.items()
    if rows is None:
        raise BadRequest.missing("items")
    fields.end()
    return rows


def pages(rows: Iterator[Any]) -> Iterator[list[Any]]:
    page: list[Any] = []
    size = count = 0
    for row in rows:
        count += 1
        if count > MAX_ITEMS:
            raise _wrong_number()
        page.append(row)
        size += len(row[1]) if isinstance(row, tuple) else PAGE_BYTES // PAGE
        if len(page) == PAGE or size >= PAGE_BYTES:
            yield page
            page, size = [], 0
    if not count:
        raise _wrong_number()
    if page:
        yield page


def _wrong_number() -> BadRequest:
    return BadRequest.invalid("items", f"must be an array of 1 to {MAX_ITEMS} items")


def _items(body: Buffer, at: int, plain: re.Pattern[bytes] | None, field: str) -> Iterator[Any]:
    """From behind the bracket. As long as items are written plainly, nothing is decoded but their data."""
    first = at
    while plain is not None and (item := plain.match(body, at)) is not None:
        row: Any
        try:
            row = item[1].decode("ascii"), b64decode(item[2]), b""
        except ValueError:
            if b"\\" in item[2]:
                break
            row = {"key_id": item[1].decode("ascii"), field: item[2].decode("utf-8", "replace")}
        at = item.end()
        yield row
        if item[3] == b"]":
            _nothing_more(_text(body, at), 0)
            return
    rest = memoryview(body)[at:]
    if len(rest) > SMALL:
        try:
            _bounded(rest, 2 * MAX_ITEMS)
        except BadRequest:
            raise _wrong_number() from None
    yield from _other_items(_text(rest, 0), at == first)


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
