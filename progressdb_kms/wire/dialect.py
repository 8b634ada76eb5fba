"""ProgressDB's forms of a message, told apart from ours by their first byte and looked at only then.

The third generation of its client keeps what we gave as `ciphertext` as the JSON token that it was, quotes
and all, and takes the token of `plaintext` as the message, which was JSON when it was encrypted:

    "<base64 of nonce | ciphertext | tag>"                        under the thread's DEK

Its embedded mode, the default of v0.2, seals under the KEK itself, without AAD; `open_embedded_messages`
opens that, and only that: a wrapped DEK of its has the same form, but 32 random bytes are never JSON:

    {"ciphertext": base64 of nonce | ciphertext | tag, "key_info": {}}

A message of ours is a nonce, a ciphertext and a tag: that it had one of these forms by chance doesn't happen.
"""

from __future__ import annotations

from ..crypto.aead import NONCE_SIZE, TAG_SIZE
from ..encoding import b64decode, is_json, json_loads
from ..errors import PlaintextNotJson

FIRST_BYTES = (b'"', b"{")

OVERHEAD = NONCE_SIZE + TAG_SIZE


MAX_PARTS = 100_000
"""Parts of a JSON document that is looked through, in 15 ms; a message of 100 kB has some thousand."""


def _parts(text: bytes) -> int:
    return sum(map(text.count, (b"[", b"{", b",")))


def kept_token(data: bytes) -> bytes | None:
    """The message in a kept token; None where it is none."""
    return _message(data[1:-1]) if data[:1] == data[-1:] == b'"' else None


def embedded(data: bytes) -> bytes | None:
    """What embedded mode sealed; None where it has another form."""
    if data[:1] != b"{" or data[-1:] != b"}" or _parts(data) > 64:
        return None
    try:
        value = json_loads(data)
    except ValueError:
        return None
    sealed = value.get("ciphertext")
    if not isinstance(sealed, str) or not set(value) <= {"ciphertext", "key_info"}:
        return None
    return _message(sealed.encode("utf-8", "replace"))


def _message(text: bytes) -> bytes | None:
    try:
        data = b64decode(text)
    except ValueError:
        return None
    return data if len(data) >= OVERHEAD else None


def raw_json(plaintext: bytes) -> bytes:
    """The body of an answer with this message in it as it stands. Raises PlaintextNotJson."""
    if _parts(plaintext) > MAX_PARTS or not is_json(plaintext):
        raise PlaintextNotJson(
            "the message opens, but it is not JSON, and can't be answered as such",
            hint="send the ciphertext without the quotes of its JSON token, and the answer is base64",
        )
    return b'{"plaintext":%b}' % plaintext
