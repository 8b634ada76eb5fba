"""encrypt, decrypt, batches and reencrypt over the socket: what opens, and what must not."""

from __future__ import annotations

import base64
import json

import pytest

from tests.harness import Daemon, Session


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def dek(kms: Session, thread: str = "t") -> str:
    return str(kms.ok("POST", "/create_dek_for_thread", {"thread_id": thread})["key_id"])


def sealed(kms: Session, key: str, data: bytes, aad: bytes = b"") -> str:
    fields = {"key_id": key, "plaintext": b64(data), **({"aad": b64(aad)} if aad else {})}
    return str(kms.ok("POST", "/encrypt", fields)["ciphertext"])


@pytest.mark.parametrize("size", [0, 1, 200, 4096, 100_000])
def test_what_was_encrypted_opens(kms: Session, size: int) -> None:
    key, data = dek(kms), bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    text = sealed(kms, key, data, b"a")
    assert len(base64.b64decode(text)) == 12 + size + 16
    answer = kms.ok("POST", "/decrypt", {"key_id": key, "ciphertext": text, "aad": b64(b"a")})
    assert base64.b64decode(answer["plaintext"]) == data


def test_another_threads_dek_opens_nothing(kms: Session) -> None:
    one, other = dek(kms, "one"), dek(kms, "other")
    reply = kms.request("POST", "/decrypt", {"key_id": other, "ciphertext": sealed(kms, one, b"secret")})
    assert reply.status == 422


@pytest.mark.parametrize("at", [0, 11, 12, 20, -1])
def test_a_flipped_bit_is_noticed(kms: Session, at: int) -> None:
    key = dek(kms)
    data = bytearray(base64.b64decode(sealed(kms, key, b"secret message")))
    data[at] ^= 1
    assert kms.request("POST", "/decrypt", {"key_id": key, "ciphertext": b64(bytes(data))}).status == 422


def test_wrong_aad_and_wrong_tag_look_alike(kms: Session) -> None:
    key = dek(kms)
    text = sealed(kms, key, b"secret", b"right")
    wrong = kms.request("POST", "/decrypt", {"key_id": key, "ciphertext": text, "aad": b64(b"wrong")})
    none = kms.request("POST", "/decrypt", {"key_id": key, "ciphertext": text})
    assert (wrong.status, none.status) == (422, 422)
    assert wrong.json()["error"]["code"] == none.json()["error"]["code"]


def test_each_item_of_a_batch_has_its_own_error(kms: Session) -> None:
    one, two = dek(kms), dek(kms)
    items = [
        {"key_id": one, "ciphertext": sealed(kms, one, b"1")},
        {"key_id": one, "ciphertext": sealed(kms, two, b"2")},
        {"key_id": "k_absent", "ciphertext": sealed(kms, two, b"3")},
        {"key_id": two, "ciphertext": sealed(kms, two, b"4")},
    ]
    answers = kms.ok("POST", "/decrypt_batch", {"items": items})["items"]
    assert [answers[n]["plaintext"] for n in (0, 3)] == [b64(b"1"), b64(b"4")]
    assert answers[2]["error"]["code"] == "key_not_found"
    assert "error" in answers[1]
    assert answers[1]["error"]["code"] != "key_not_found"


@pytest.mark.parametrize(
    ("new_aad", "opens_with"), [(None, b"old"), (b"", b""), (b"new", b"new")], ids=["kept", "dropped", "new"]
)
def test_reencrypt_binds_to_the_aad_that_it_was_told(
    kms: Session, new_aad: object, opens_with: bytes
) -> None:
    source, target = dek(kms), dek(kms)
    fields = {"key_id": source, "new_key_id": target, "ciphertext": sealed(kms, source, b"x", b"old")}
    fields["aad"] = b64(b"old")
    if isinstance(new_aad, bytes):
        fields["new_aad"] = b64(new_aad)
    moved = kms.ok("POST", "/reencrypt", fields)["ciphertext"]
    right = {"key_id": target, "ciphertext": moved, "aad": b64(opens_with)}
    assert kms.ok("POST", "/decrypt", right)["plaintext"] == b64(b"x")
    for aad in {b"old", b"", b"new"} - {opens_with}:
        assert kms.request("POST", "/decrypt", {**right, "aad": b64(aad)}).status == 422


def test_the_record_of_a_batch_that_moves_names_both_ends(daemon: Daemon, kms: Session) -> None:
    """What was encrypted under a DEK is found by its name."""
    ends = [dek(kms) for _ in range(3)]
    items = [
        {"key_id": ends[0], "new_key_id": end, "ciphertext": sealed(kms, ends[0], b"x")} for end in ends[1:]
    ]
    kms.ok("POST", "/reencrypt", {"items": items})
    event = json.loads(daemon.audit_log.read_bytes().splitlines()[-1])["event"]
    assert (event["op"], event["count"], event["failed"], event["keys"]) == ("reencrypt", 2, 0, sorted(ends))


def test_an_inline_wrapped_dek_opens_at_another_daemon_with_the_same_kek(
    daemon: Daemon, kms: Session
) -> None:
    made = kms.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})
    text = kms.ok("POST", "/encrypt", {"wrapped": made["wrapped"], "plaintext": b64(b"x")})["ciphertext"]
    with Daemon(kek=daemon.kek, workers=1) as other:
        fields = {"wrapped": made["wrapped"], "ciphertext": text}
        assert other.ok("POST", "/decrypt", fields)["plaintext"] == b64(b"x")


BAD = [
    ({"plaintext": ""}, 400, "missing_key_id"),
    ({"key_id": "K"}, 400, "missing_plaintext"),
    ({"key_id": "../x", "plaintext": ""}, 400, "invalid_key_id"),
    ({"key_id": "K", "plaintext": "a"}, 400, "invalid_plaintext"),
    ({"key_id": "K", "plaintext": "aGVsbG9="}, 400, "invalid_plaintext"),
    ({"key_id": "K", "plaintext": "", "add": ""}, 400, "unknown_field"),
    ({"key_id": "k_absent", "plaintext": ""}, 404, "key_not_found"),
]


@pytest.mark.parametrize(("fields", "status", "code"), BAD)
def test_bad_input_names_the_field(kms: Session, fields: dict[str, str], status: int, code: str) -> None:
    if fields.get("key_id") == "K":
        fields = {**fields, "key_id": dek(kms)}
    reply = kms.request("POST", "/encrypt", fields)
    assert (reply.status, reply.json()["error"]["code"]) == (status, code)


def test_a_wrong_method_names_the_right_ones(kms: Session) -> None:
    reply = kms.request("GET", "/encrypt")
    assert reply.status == 405
    assert "POST" in {name.lower(): value for name, value in reply.headers.items()}["allow"]
