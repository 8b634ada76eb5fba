"""A flat JSON object, read where it lies: for request bodies that carry a key.

`json.loads` leaves three to five copies of every string behind. This scanner returns positions only; the
caller decodes a key from the request buffer straight into locked memory. It is stricter than JSON: one
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

Span = tuple[int, int]


def scan(body: Buffer) -> tuple[dict[str, Span], dict[str, bool]]:
    """Returns (name -> (start, end) of each string value without its quotes, name -> each boolean value).

    Raises ValueError, without quoting the body. Copies names only, and those are at most 32 bytes long.
    """
    found = _OPEN.match(body)
    if found is None:
        raise ValueError("the body must be a JSON object")
    spans: dict[str, Span] = {}
    flags: dict[str, bool] = {}
    at = found.end()
    while _CLOSE.fullmatch(body, at) is None:
        if spans or flags:
            if body[at : at + 1] != b",":
                raise ValueError("the body ends too early, or goes on behind the object, or is not JSON")
            at += 1
        member = _MEMBER.match(body, at)
        if member is None:
            raise ValueError("the body must be a JSON object of plain strings (no escapes, nothing nested)")
        name = bytes(body[member.start(1) : member.end(1)]).decode("utf-8", "replace")
        if name in spans or name in flags:
            raise ValueError("a name stands twice in the body")
        if member.start(2) >= 0:
            spans[name] = member.span(2)
        else:
            flags[name] = member.end(3) - member.start(3) == 4
        at = member.end()
    return spans, flags
