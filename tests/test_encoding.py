"""One spelling per value, and nothing of a key in a message."""

from __future__ import annotations

import base64
import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from progressdb_kms import encoding

STRICT = re.compile(encoding.BASE64)


def decodes(text: Any) -> bool:
    try:
        encoding.b64decode(text)
    except ValueError:
        return False
    return True


class TestBase64:
    @given(st.binary(max_size=100))
    def test_round_trip(self, data: bytes) -> None:
        text = base64.b64encode(data)
        for spelled in (text, text.decode(), bytearray(text), memoryview(text)):
            assert encoding.b64decode(spelled) == data
        assert encoding.b64encode(data).encode() == encoding.b64encode_bytes(data) == text

    @pytest.mark.parametrize("size", range(9))
    def test_exactly_the_strict_spelling(self, size: int) -> None:
        """Every word over letters that stand for the kinds there are, against the grammar."""
        letters = b"AQEz=*" if size < 6 else b"AE=*" if size < 8 else b"A=*"
        for word in map(bytes, itertools.product(letters, repeat=size)):
            assert decodes(word) == (size % 4 == 0 and STRICT.fullmatch(word) is not None), word

    @given(st.binary(max_size=40))
    @example(b"QQ==\n")
    @example(b"QR==")
    @example(b"-_-_")
    def test_any_bytes(self, raw: bytes) -> None:
        assert decodes(raw) == (len(raw) % 4 == 0 and STRICT.fullmatch(raw) is not None)

    @pytest.mark.parametrize("text", ["QUI=é", "ＱQ==", "Q Q=", "QQ", "====", "A" * 5])
    def test_other_text(self, text: str) -> None:
        assert not decodes(text)

    @given(st.binary(min_size=1, max_size=48))
    def test_into_a_buffer(self, data: bytes) -> None:
        out = memoryview(bytearray(68))
        size = encoding.b64encode_into(memoryview(data), out)
        assert bytes(out[:size]) == base64.b64encode(data)
        back = memoryview(bytearray(len(data)))
        encoding.b64decode_into(out[:size], back)
        assert bytes(back) == data

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "A" * 43,
            "A" * 44,
            "A" * 43 + "B",
            "A" * 42 + "==",
            "A" * 42 + "B=",
            "A" * 44 + "====",
            "*" * 44,
        ],
    )
    def test_not_the_base64_of_32_bytes(self, text: str) -> None:
        with pytest.raises(ValueError, match="^must be base64 of exactly 32 bytes$"):
            encoding.b64decode_into(text.encode(), memoryview(bytearray(32)))


class TestHex:
    @given(st.binary(min_size=32, max_size=32), st.booleans())
    def test_into_a_buffer(self, key: bytes, upper: bool) -> None:
        text = key.hex().upper() if upper else key.hex()
        out = memoryview(bytearray(32))
        encoding.hex_decode_into(text.encode(), out)
        assert bytes(out) == key

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("ab" * 31, "got 62"),
            ("ab" * 33, "got 66"),
            ("", "got 0"),
            ("ab" * 31 + "ag", "character 63 or 64"),
            ("+1" + "ab" * 31, "character 1 or 2"),
            (" 1" + "ab" * 31, "character 1 or 2"),
        ],
    )
    def test_refused_without_a_digit_of_it(self, text: str, says: str) -> None:
        with pytest.raises(ValueError, match=says) as caught:
            encoding.hex_decode_into(text.encode(), memoryview(bytearray(32)))
        assert "ab" not in str(caught.value)


class TestIds:
    @pytest.mark.parametrize("text", ["a", "0", "A" * 128, "k_1", "mine:1.2-3_4"])
    def test_key_id(self, text: str) -> None:
        assert encoding.KEY_ID.fullmatch(text)

    @pytest.mark.parametrize(
        "text", ["", "A" * 129, "_a", ".a", "-a", "a/b", "a b", "a\n", "é", "../a", "a\0"]
    )
    def test_no_key_id(self, text: str) -> None:
        assert not encoding.KEY_ID.fullmatch(text)

    def test_new_ones_sort_by_time(self) -> None:
        ids = [encoding.new_key_id(now, bytes([255 - now]) * 10) for now in range(200)]
        assert ids == sorted(ids) and all(encoding.KEY_ID.fullmatch(one) for one in ids)

    def test_new_ones_hold_all_of_the_randomness(self) -> None:
        assert encoding.new_key_id(1, bytes(range(10))) == "k_00000000000100010203040506070809"


@pytest.mark.parametrize(
    ("now", "text"),
    [(0.0, "1970-01-01T00:00:00.000000Z"), (1764000000.25, "2025-11-24T16:00:00.250000Z"),
     (951782400.999999, "2000-02-29T00:00:00.999999Z")],
)  # fmt: skip
def test_timestamp(now: float, text: str) -> None:
    assert encoding.timestamp(now) == text


class TestJson:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            '{"a":1,"a":2}',
            '{"a":{"b":1,"b":1}}',
            "NaN",
            "[Infinity]",
            "-Infinity",
            "[" * 100_000,
            b"\xff",
            b"\xed\xa0\x80",
            '{"a":1}x',
            "'a'",
            "01",
            '"\x01"',
            b"\xef\xbb\xbf{}",
        ],
    )
    def test_refused(self, text: Any) -> None:
        with pytest.raises(ValueError):
            encoding.json_loads(text)

    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=9))
    def test_round_trip_in_one_line_of_ascii(self, value: Any) -> None:
        text = encoding.json_dumps(value)
        assert text.isascii() and "\n" not in text
        assert json.loads(text) == encoding.json_loads(text.encode()) == value

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), b"bytes", {1, 2}])
    def test_no_json(self, value: Any) -> None:
        with pytest.raises((ValueError, TypeError)):
            encoding.json_dumps(value)

    @given(st.binary(max_size=60))
    def test_any_bytes(self, raw: bytes) -> None:
        try:
            encoding.json_loads(raw)
        except ValueError:
            pass
