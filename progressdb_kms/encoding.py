"""One spelling per value: strict base64, strict hex, ids, times, JSON.

Two families live here. The functions on `str` and `bytes` are for data that is not secret, or that
the caller owns anyway (plaintext). The functions whose names end in `_into` are for keys: they read
and write buffers and make no other object that holds key bytes, because a `bytes` can't be wiped.
"""

from __future__ import annotations

import json
import re
import time
from binascii import a2b_base64, b2a_base64
from datetime import datetime
from typing import Any, Callable, Union

Buffer = Union[bytes, bytearray, memoryview]

KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
"""A key_id: 1 to 128 characters; safe as a file name, in a URL and in a log line."""

KEK_ID = re.compile(r"[0-9a-f]{16}")
"""A kek_id: the first 8 bytes of an HMAC, as lower-case hex."""

MAX_THREAD_ID = 512
"""Longest thread_id in characters: far above any seen, and keeps a row within one page."""


PART = 3 << 18
"""Bytes that are converted at a time: whole groups in both directions."""


# ---- base64 (RFC 4648, section 4): standard alphabet, padded, canonical --------------------------

# The last character before the padding carries 2 or 4 bits that must be zero: without this check,
# "QQ==" and "QR==" would be two spellings of one value.
BASE64 = rb"[A-Za-z0-9+/]*(?:[AQgw]==|[AEIMQUYcgkosw048]=)?"
_BASE64 = re.compile(BASE64)
_LAST = {1: b"AQgw", 2: b"AEIMQUYcgkosw048"}  # by the bytes in the last group
_NOT_BASE64 = "not base64 (standard alphabet, with padding)"


def b64decode(text: str | Buffer) -> bytes:
    """Decode strict base64. Raises ValueError on any other spelling (white space, URL alphabet, …)."""
    raw = text.encode("ascii", "replace") if isinstance(text, str) else text
    size = len(raw)
    try:
        data = a2b_base64(raw) if size <= PART else _in_parts(a2b_base64, raw)
    except ValueError:
        raise ValueError(_NOT_BASE64) from None
    # a2b_base64 skips what it does not know and ends at the padding: a full length shows that it did neither.
    come = len(data)
    tail = come % 3
    if size != (come + 2) // 3 * 4 or (tail and raw[tail - 4] not in _LAST[tail]):
        raise ValueError(_NOT_BASE64)
    return data


def b64encode_bytes(data: Buffer) -> bytes:
    if len(data) > PART:
        return _in_parts(lambda part: b2a_base64(part, newline=False), data)
    return b2a_base64(data, newline=False)


def _in_parts(convert: Callable[[Buffer], bytes], data: Buffer) -> bytes:
    """One call for 8 MiB would keep all other threads out for 20 ms. Raises what `convert` raises."""
    view = memoryview(data)
    return b"".join([convert(view[at : at + PART]) for at in range(0, len(view), PART)])


def b64encode(data: Buffer) -> str:
    return b2a_base64(data, newline=False).decode("ascii")


_B64_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_B64_VALUE = {c: i for i, c in enumerate(_B64_ALPHABET)}


def b64decode_into(text: Buffer, out: memoryview) -> None:
    """Decode exactly `len(out)` bytes of key. Raises ValueError; the message never quotes the input."""
    need = (len(out) + 2) // 3 * 4
    if len(text) != need or not _BASE64.fullmatch(text):
        raise ValueError(f"must be base64 of exactly {len(out)} bytes")
    pad = -len(out) % 3
    if bytes(text[need - pad :]) != b"=" * pad or text[need - pad - 1] == 0x3D:
        raise ValueError(f"must be base64 of exactly {len(out)} bytes")
    for group in range(need // 4):
        word = 0
        for i in range(4):
            word = word << 6 | _B64_VALUE.get(text[group * 4 + i], 0)
        for i in range(min(3, len(out) - group * 3)):
            out[group * 3 + i] = word >> (16 - 8 * i) & 0xFF


def b64encode_into(data: memoryview, out: memoryview) -> int:
    """Encode a key into a buffer. Returns the number of characters written (44 for 32 bytes)."""
    size = (len(data) + 2) // 3 * 4
    for group in range(size // 4):
        chunk = data[group * 3 : group * 3 + 3]
        word = chunk[0] << 16 | (chunk[1] << 8 if len(chunk) > 1 else 0)
        word |= chunk[2] if len(chunk) > 2 else 0
        for i in range(4):
            out[group * 4 + i] = _B64_ALPHABET[word >> (18 - 6 * i) & 63] if i <= len(chunk) else 0x3D
    return size


# ---- hex -----------------------------------------------------------------------------------------

_HEX_VALUE = {c: int(chr(c), 16) for c in b"0123456789abcdefABCDEF"}


def hex_decode_into(text: Buffer, out: memoryview) -> None:
    """Decode exactly `2 * len(out)` hex digits of key. Raises ValueError, without quoting the input."""
    if len(text) != 2 * len(out):
        raise ValueError(f"must be {2 * len(out)} hex digits ({len(out)} bytes), got {len(text)} characters")
    for i in range(len(out)):
        high, low = _HEX_VALUE.get(text[2 * i]), _HEX_VALUE.get(text[2 * i + 1])
        if high is None or low is None:
            raise ValueError(
                f"must be {2 * len(out)} hex digits: character {2 * i + 1} or {2 * i + 2} is not one"
            )
        out[i] = high << 4 | low


# ---- ids and times -------------------------------------------------------------------------------


def new_key_id(now_ms: int, random: bytes) -> str:
    """A fresh key_id: `k_`, 12 hex digits of the time in ms, 20 of 10 random bytes.

    Ids sort by creation time; 80 random bits keep them unique under any concurrency.
    """
    return f"k_{now_ms & 0xFFFFFFFFFFFF:012x}{random[:10].hex()}"


LATEST = 253402300799.0
"""The last second of the year 9999: RFC 3339 knows none after it, and times are compared as text."""


def wall() -> float:
    """The wall clock, whatever it shows. Python has no words for times after 2262."""
    try:
        now = time.time()
    except OverflowError:
        return LATEST
    return now if 0.0 <= now <= LATEST else min(max(now, 0.0), LATEST)


def timestamp(now: float) -> str:
    """RFC 3339 in UTC with microseconds, e.g. `2026-11-24T02:13:32.123456Z`; from 1970 to 9999."""
    now = min(max(now, 0.0), LATEST)
    whole = int(now)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((now - whole) * 1e6):06d}Z"


def moment(text: str) -> float:
    """Seconds since 1970 of what `timestamp` made. Raises ValueError."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


# ---- JSON ----------------------------------------------------------------------------------------


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return result


_COMPACT = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_STRICT = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def json_loads(data: str | bytes) -> Any:
    """Parse JSON (RFC 8259) from UTF-8. Raises ValueError; refuses NaN, duplicate names, deep nesting."""
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        return _STRICT.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


# Numbers are not read, only looked at: they go out as they are written, however long they are.
_LOOK = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=_no_constant)


def is_json(data: Buffer) -> bool:
    """Can these bytes stand in a JSON document: one value, UTF-8, no NaN, not nested too deeply?"""
    try:
        _LOOK.decode(str(data, "utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def is_text(data: memoryview) -> bool:
    """Is this UTF-8 without control characters? Looks in place: it may be a key, of which no copy may be."""
    expected = 0
    for byte in data:
        if expected:
            expected -= 1
            if byte & 0xC0 != 0x80:
                return False
        elif byte >= 0x80:
            expected = 1 if 0xC2 <= byte < 0xE0 else 2 if byte < 0xF0 else 3
            if not 0xC2 <= byte < 0xF5:
                return False
        elif byte < 0x20 and byte not in b"\t\n\r":
            return False
    return not expected


def json_item(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and where it ends. Raises ValueError as `json_loads`."""
    try:
        return _STRICT.raw_decode(text, at)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_dumps(value: Any) -> str:
    """Compact JSON, ASCII only: one line whatever the strings hold."""
    return str(value) if type(value) is int else _COMPACT.encode(value)  # it builds an encoder
