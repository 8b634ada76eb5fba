"""A flat JSON object, read where it lies: for request bodies that carry a key.

`json.loads` leaves three to five copies of every string behind. This scanner returns parts of the buffer; the
caller decodes a key from there straight into locked memory. It is stricter than JSON: one
object, string and boolean values, no escapes (hex and base64 need none), no name twice.
"""

from __future__ import annotations

import re

from ..encoding import Buffer

_OPEN = re.compile(rb"[ \t\r\n]*\{")
_MEMBER = re.compile(
    rb'[ \t\r\n]*"([^"\\\x00-\x1f]{1,32})"[ \t\r\n]*:'
    rb'[ \t\r\n]*(?:"([^"\\\x00-\x1f]*)"|(true|false))[ \t\r\n]*'
)
_CLOSE = re.compile(rb"[ \t\r\n]*\}[ \t\r\n]*")


def scan(body: Buffer) -> dict[str, memoryview | bool]:
    """The members: a string is the part of the body where it lies, without its quotes.

    Raises ValueError, without quoting the body. Copies names only, and those are at most 32 bytes long.
    """
    found = _OPEN.match(body)
    if found is None:
        raise ValueError("the body must be a JSON object")
    members: dict[str, memoryview | bool] = {}
    at = found.end()
    while _CLOSE.fullmatch(body, at) is None:
        if members:
            if body[at : at + 1] != b",":
                raise ValueError("the body ends too early, or goes on behind the object, or is not JSON")
            at += 1
        member = _MEMBER.match(body, at)
        if member is None:
            raise ValueError("the body must be a JSON object of plain strings (no escapes, nothing nested)")
        name = bytes(body[member.start(1) : member.end(1)]).decode("utf-8", "replace")
        if name in members:
            raise ValueError("a name stands twice in the body")
        start, end = member.span(2)
        members[name] = memoryview(body)[start:end] if start >= 0 else member.end(3) - member.start(3) == 4
        at = member.end()
    return members
