"""However the items of a batch are written, what comes of them is what JSON makes of them."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.encoding import b64encode
from progressdb_kms.errors import BadRequest, KMSError
from progressdb_kms.wire import items as reading
from progressdb_kms.wire.fields import MAX_ITEMS, Fields
from progressdb_kms.wire.items import PAGE, PAGE_BYTES, batch_items


def read(row: Any) -> Any:
    """A row as the routes read it."""
    if type(row) is tuple:
        return row
    try:
        fields = Fields(row)
        found = fields.source(), fields.data("ciphertext"), fields.aad()
        fields.end()
        return found
    except KMSError as error:
        return error.code


def pages_of(body: bytes) -> list[list[Any]]:
    pages = batch_items(memoryview(body), "ciphertext")
    assert not isinstance(pages, Fields)
    return list(pages)


def rows_of(body: bytes) -> Any:
    """All rows, or the code of what is wrong with the whole."""
    try:
        return [read(row) for page in pages_of(body) for row in page]
    except BadRequest as error:
        return error.code


def expected(body: bytes) -> Any:
    return [read(row) for row in json.loads(body)["items"]]


def item(key_id: str = "k", data: bytes = b"data", colon: str = ":", comma: str = ",") -> str:
    return f'{{"key_id"{colon}"{key_id}"{comma}"ciphertext"{colon}"{b64encode(data)}"}}'


def body_of(*items: str, comma: str = ",") -> bytes:
    return ('{"items":[' + comma.join(items) + "]}").encode()


ODD = (
    '{"key_id":"k","ciphertext":"ZGF0YQ"}',
    '{"key_id":"k","ciphertext":"ZGF0YR=="}',
    '{"key_id":"k","ciphertext":""}',
    '{"key_id":"k","ciphertext":"ZGF0\\u0059Q=="}',
    '{"key_id":"k","ciphertext":"ZGF0YQ==\\"},{\\"key_id\\":\\"k\\",\\"ciphertext\\":\\"ZGF0YQ=="}',
    '{"key_id":"k"}',
    '{"key_id":"-k","ciphertext":"ZGF0YQ=="}',
    '{"key_id":"","ciphertext":"ZGF0YQ=="}',
    '{"key_id":"k","ciphertext":"ZGF0YQ==","aad":"ZGF0YQ=="}',
    '{"key_id":"k","ciphertext":"ZGF0YQ==","ciphertext ":"ZGF0YQ=="}',
    '{"ciphertext":"ZGF0YQ==","key_id":"k"}',
    '{"key_id":"k","plaintext":"ZGF0YQ=="}',
    '{"key_id":"k","ciphertext":null}',
    '{"key_id":["k","ciphertext"]}',
    '"k"',
    "{}",
)

PLAIN = st.builds(
    item,
    st.sampled_from(("k", "k", "other", "k" * 128)),
    st.binary(max_size=8),
    st.sampled_from((":", ":", ": ", " : ")),
    st.sampled_from((",", ",", ", ")),
)


@given(
    st.lists(PLAIN | st.sampled_from(ODD), min_size=1, max_size=12),
    st.sampled_from((",", ", ", " , ", ",\n")),
)
def test_all_spellings(items: list[str], comma: str) -> None:
    body = body_of(*items, comma=comma)
    assert rows_of(body) == expected(body)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("place", [0, 1, 7, 9])
@pytest.mark.parametrize("names", [["k"], ["k", "other", "third"]])
def test_one_that_is_written_otherwise(odd: str, place: int, names: list[str]) -> None:
    items = [item(names[at % len(names)], os.urandom(at)) for at in range(9)]
    body = body_of(*items[:place], odd, *items[place:])
    assert rows_of(body) == expected(body)


@pytest.mark.parametrize("names", [["k"], ["k", "other"], [f"k{at}" for at in range(1000)]])
@pytest.mark.parametrize("size", [0, 1, 200, 1000, PAGE_BYTES])
def test_pages(names: list[str], size: int) -> None:
    """Of at most PAGE items in PAGE_BYTES, or one that is longer; a page of chat is one page."""
    count = 1000 if size <= 200 else 40
    items = [item(names[at % len(names)], os.urandom(size)) for at in range(count)]
    pages = pages_of(body_of(*items))
    assert [read(row) for page in pages for row in page] == expected(body_of(*items))
    assert all(type(row) is tuple for page in pages for row in page)
    for page in pages:
        assert len(page) <= PAGE
        assert len(page) == 1 or sum(len(row[1]) for row in page[:-1]) * 4 // 3 < PAGE_BYTES
    assert len(pages_of(body_of(*items[:100]))) == (size <= 200 or len(pages))


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"items":[]}', "invalid_items"),
        (b'{"items":[ ] }', "invalid_items"),
        (body_of(*[item()] * (MAX_ITEMS + 1)), "invalid_items"),
        (body_of(*[item()] * MAX_ITEMS, "{}"), "invalid_items"),
        (body_of("{}", *[item()] * MAX_ITEMS), "invalid_items"),
        (body_of(*["{}"] * (MAX_ITEMS + 1)), "invalid_items"),
        (body_of(item())[:-1], "malformed_json"),
        (body_of(item(), item())[:-2], "malformed_json"),
        (body_of(item(), item(), "")[:-1], "malformed_json"),
        (body_of(item(), item(), item())[:-1] + b',"more":1}', "unknown_field"),
        (body_of(item(), item(), item()) + b"x", "malformed_json"),
        (body_of(item(), item(), item() + item()), "malformed_json"),
        (body_of(item(), item(), item()[:-1]), "malformed_json"),
        (body_of(item(), item(), item() + "\x01"), "malformed_json"),
        (body_of(item(), item().replace("ZGF0YQ", "\x01"), item()), "malformed_json"),
        (body_of(item(), item("k\xff"), item()).replace(b"\xc3", b""), "malformed_json"),
    ],
)
def test_what_is_no_batch(body: bytes, code: str) -> None:
    assert rows_of(body) == code
    assert rows_of(body.replace(b'"items":[', b'"items": [')) == code


@pytest.mark.parametrize(
    ("items", "code"),
    [
        ([item("a"), *ODD], ""),
        ([], "invalid_items"),
        (["{}"] * (MAX_ITEMS + 1), "invalid_items"),
    ],
    ids=["some", "none", "too many"],
)
def test_the_name_written_otherwise(items: list[str], code: str) -> None:
    body = body_of(*items).replace(b"items", b"\\u0069tems")
    assert rows_of(body) == (code or expected(body))
    assert rows_of(body[:-1] + b',"more":1}') == "unknown_field"


def test_no_items_at_all() -> None:
    """These may be the fields of one."""
    fields = batch_items(b'{"key_id":"k","items":null}', "ciphertext")
    assert isinstance(fields, Fields) and fields.key_id() == "k"
    fields.end()


def test_as_many_as_there_may_be() -> None:
    assert len(rows_of(body_of(*[item()] * MAX_ITEMS))) == MAX_ITEMS
    assert len(rows_of(body_of("{}", *[item()] * (MAX_ITEMS - 1)))) == MAX_ITEMS


def test_who_writes_each_in_a_way_of_its_own_costs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is behind an item is looked through a few times a page, not for each item of it."""
    looked: list[int] = []
    real = reading._alike

    def alike(*args: Any) -> int:
        looked.append(args[2])
        return real(*args)

    monkeypatch.setattr(reading, "_alike", alike)
    for forms in ("ab", "aabb", "aaabbb"):
        looked.clear()
        items = [item(colon=":" if form == "a" else ": ") for form in forms] * (PAGE // len(forms))
        assert len(rows_of(body_of(*items))) == len(items) and 1 <= len(looked) <= 24
