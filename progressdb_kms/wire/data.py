"""`encrypt` and `decrypt`: a message in, a message out, as JSON or as raw bytes."""

from __future__ import annotations

import re

from ..audit.log import fragment
from ..encoding import Buffer, b64decode, b64encode_bytes
from ..errors import BadRequest
from ..service.service import Entry
from . import dialect
from .call import BINARY, JSON, App, Call, Reply
from .items import PLAIN
from .reading import fields_of, query_dek, usable

# What clients send most, read without a JSON parser: the key_id, then the data, nothing else. Whatever does
# not look exactly so goes the long way, and so does what is not base64 as it stands.
LONG = 64 * 1024
"""Bytes of a body whose data are not copied before they are decoded."""

_ONE = {field: re.compile(plain) for field, plain in PLAIN.items()}


def encrypt(app: App, call: Call) -> Reply:
    dek, plaintext, aad = _read(app, call, "plaintext")
    nonce, sealed = app.service.encrypt(dek, plaintext, aad, call.scratch, call.peer.uid)
    if call.head.content_type == BINARY:
        return Reply(200, nonce, BINARY, rest=(sealed,))
    return Reply(200, b'{"ciphertext":"%b"}' % b64encode_bytes(nonce + sealed))


def decrypt(app: App, call: Call) -> Reply:
    dek, message, aad = _read(app, call, "ciphertext")
    raw = call.head.content_type == BINARY
    if not raw and message[:1] in dialect.FIRST_BYTES and dek.thread_id is not None:
        reply = _progressdb(app, call, dek, bytes(message), aad)
        if reply is not None:
            return reply
    opened = app.service.decrypt(dek, message, aad, call.scratch, call.peer.uid)
    return Reply(200, opened, BINARY) if raw else Reply(200, b'{"plaintext":"%b"}' % b64encode_bytes(opened))


def _progressdb(app: App, call: Call, dek: Entry, data: bytes, aad: bytes) -> Reply | None:
    """The answer to a request in ProgressDB's own form, see `dialect`; None where it has another."""
    kept = dialect.kept_token(data)
    if kept is not None:
        opened = app.service.decrypt(dek, kept, aad, call.scratch, call.peer.uid)
    elif aad or (sealed := dialect.embedded(data)) is None:
        return None
    else:
        opened = app.service.open_embedded(sealed, call.scratch)
        call.details = fragment(embedded=1)
    return Reply(200, dialect.raw_json(opened))


def _read(app: App, call: Call, field: str) -> tuple[Entry, Buffer, bytes]:
    """(DEK, data, AAD) of a request, each read once."""
    kind, body = call.head.content_type, call.body
    if kind == JSON:
        one = _ONE[field].fullmatch(body)
        if one is not None and (data := _plain_base64(one, body)) is not None:
            call.body = b""  # 8 MiB that need not stay while the answer is made
            return usable(app, call, one[1].decode("ascii")), data, b""
    elif kind == BINARY:
        return _read_raw(app, call)
    fields = fields_of(call)
    dek = usable(app, call, fields.source())
    found = dek, fields.data(field), fields.aad()
    fields.end()
    return found


def _plain_base64(one: re.Match[bytes], body: Buffer) -> bytes | None:
    """The data, without another copy of them where they are long. None: they are no base64."""
    try:
        return b64decode(one[2] if len(body) < LONG else body[one.start(2) : one.end(2)])
    except ValueError:
        return None


def _read_raw(app: App, call: Call) -> tuple[Entry, Buffer, bytes]:
    """Raw bodies: the key_id is in the query, the AAD as base64 in the header X-KMS-AAD."""
    dek = query_dek(app, call)
    try:
        return dek, call.body, b64decode(call.head.headers.get("x-kms-aad", ""))
    except ValueError as error:
        raise BadRequest.invalid("aad", f"(header X-KMS-AAD) is {error}") from None
