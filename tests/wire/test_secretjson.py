"""The scanner of bodies that carry a key: positions only, stricter than JSON, silent about what it read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.wire.secretjson import scan

TEXT = st.text(alphabet=st.characters(blacklist_characters='"\\', min_codepoint=32, max_codepoint=0x2FFF))


@pytest.mark.parametrize(
    ("body", "strings", "flags"),
    [
        (b"{}", {}, {}),
        (b" \t\r\n{ } ", {}, {}),
        (b'{"a":"b"}', {"a": b"b"}, {}),
        (b'{"a":""}', {"a": b""}, {}),
        (b'{"a":"b","c":true,"d":false}', {"a": b"b"}, {"c": True, "d": False}),
        (b' { "a" : "b" , "c" : true } \n', {"a": b"b"}, {"c": True}),
    ],
)
def test_taken(body: bytes, strings: dict[str, bytes], flags: dict[str, bool]) -> None:
    assert scan(memoryview(bytearray(body))) == {**strings, **flags}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b'"a"', b"{", b'{"a"}', b'{"a":}', b'{"a":1}', b'{"a":null}', b'{"a":[]}',
        b'{"a":{"b":"c"}}', b'{"a":"b"', b'{"a":"b",}', b'{"a":"b"}{', b'{"a":"b"}x', b'{"a":"b" "c":"d"}',
        b'{"a":"b";"c":"d"}', b'{"a":"b","a":"c"}', b'{"a":"b","a":true}', b'{"a":"\\u0041"}', b'{"a":"b\n"}',
        b'{"a":truex}', b'{,}', b'{"":"b"}', b'{"' + b"n" * 33 + b'":"b"}', b"{'a':'b'}", b'{"a":"secret',
    ],
)  # fmt: skip
def test_refused_without_a_word_of_it(body: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        scan(body)
    assert "secret" not in str(caught.value)


@given(
    st.dictionaries(TEXT.filter(lambda name: 0 < len(name.encode()) <= 32), TEXT | st.booleans(), max_size=5)
)
def test_agrees_with_json(value: dict[str, object]) -> None:
    body = json.dumps(value, ensure_ascii=False).encode()
    found = {name: one if isinstance(one, bool) else str(one, "utf-8") for name, one in scan(body).items()}
    assert found == value


@given(st.binary(max_size=60) | st.text(alphabet='{}":,ab \\tru', max_size=30).map(str.encode))
def test_any_bytes(body: bytes) -> None:
    try:
        scan(body)
    except ValueError:
        return
    assert isinstance(json.loads(body.decode("utf-8", "replace")), dict)
