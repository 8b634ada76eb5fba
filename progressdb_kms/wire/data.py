"""`encrypt` and `decrypt`: a message in, a message out, as JSON or as raw bytes."""

from __future__ import annotations

import re

from ..audit.log import fragment, key_fragment
from ..crypto.envelope import Wrapped
from ..encoding import Buffer, b64decode, b64encode_bytes
from ..errors import BadRequest
from . import dialect
from .call import BINARY, JSON, App, Call, Reply
from .fields import Fields, checked_key_id
from .items import item_pattern
from .reading import fields_of, known_query, may_use, query_value, usable

# What clients send most, read without a JSON parser: the key_id, then the data, nothing else. Whatever does
# not look exactly so goes the long way, and so does what is not base64 as it stands.
LONG = 64 * 1024
"""Bytes of a body whose data are not copied before they are decoded."""

_DATA = ("plaintext", "ciphertext")
_ONE = {field: re.compile(item_pattern(field, b" ?: ?", b" ?, ?")) for field in _DATA}


def encrypt(app: App, call: Call) -> Reply:
    if call.head.content_type == BINARY:
        key_id, aad = _raw_source(app, call)
        nonce, sealed = app.service.encrypt(key_id, call.body, aad, call.scratch, call.peer.uid)
        return Reply(200, sealed, BINARY, lead=nonce)
    source, plaintext, aad = _data_request(app, call, "plaintext")
    nonce, sealed = app.service.encrypt(source, plaintext, aad, call.scratch, call.peer.uid)
    return Reply(200, b'{"ciphertext":"%b"}' % b64encode_bytes(nonce + sealed))


def decrypt(app: App, call: Call) -> Reply:
    if call.head.content_type == BINARY:
        key_id, aad = _raw_source(app, call)
        opened = app.service.decrypt(key_id, call.body, aad, call.scratch, call.peer.uid)
        return Reply(200, opened, BINARY)
    source, ciphertext, aad = _data_request(app, call, "ciphertext")
    if ciphertext[:1] in dialect.FIRST_BYTES:
        reply = _progressdb(app, call, source, ciphertext, aad)
        if reply is not None:
            return reply
    opened = app.service.decrypt(source, ciphertext, aad, call.scratch, call.peer.uid)
    return Reply(200, b'{"plaintext":"%b"}' % b64encode_bytes(opened))


def _progressdb(app: App, call: Call, key_id: str | Wrapped, data: bytes, aad: bytes) -> Reply | None:
    """The answer to a request in ProgressDB's own form, see `dialect`; None where it has another."""
    if not isinstance(key_id, str):
        return None
    kept = dialect.kept_token(data)
    if kept is not None:
        opened = app.service.decrypt(key_id, kept, aad, call.scratch, call.peer.uid)
        return Reply(200, dialect.raw_json(opened))
    sealed = dialect.embedded(data) if not aad else None
    if sealed is None:
        return None
    opened = app.service.open_embedded(sealed, call.scratch)
    call.details = fragment(embedded=1)
    return Reply(200, dialect.raw_json(opened))


def _data_request(app: App, call: Call, field: str) -> tuple[str | Wrapped, bytes, bytes]:
    """(DEK, data, AAD) of a JSON body."""
    one = _ONE[field].fullmatch(call.body) if call.head.content_type == JSON else None
    if one is not None and (data := _plain_base64(_second(one, call.body))) is not None:
        key_id = one[1].decode("ascii")
        usable(app, call, key_id)
        call.body = b""  # 8 MiB that need not stay while the answer is made
        return key_id, data, b""
    fields = fields_of(call)
    source = _source(app, call, fields)
    data = fields.data(field)
    aad = fields.aad()
    fields.end()
    return source, data, aad


def _second(one: re.Match[bytes], body: Buffer) -> Buffer:
    """Without a copy, where it is long."""
    return one[2] if len(body) < LONG else body[one.start(2) : one.end(2)]


def _plain_base64(text: Buffer) -> bytes | None:
    """None: it is no base64."""
    try:
        return b64decode(text)
    except ValueError:
        return None


def _source(app: App, call: Call, fields: Fields) -> str | Wrapped:
    source = fields.source()
    if isinstance(source, str):
        usable(app, call, source)
    else:
        call.key = key_fragment(source.key_id)
        may_use(app, call, source.key_id)
    return source


def _raw_source(app: App, call: Call) -> tuple[str, bytes]:
    """Raw bodies: the key_id is in the query, the AAD as base64 in the header X-KMS-AAD."""
    known_query(call, "key_id")
    key_id = query_value(call, "key_id")
    if key_id is None:
        raise BadRequest.missing("key_id")
    usable(app, call, checked_key_id(key_id))
    try:
        return key_id, b64decode(call.head.headers.get("x-kms-aad", ""))
    except ValueError as error:
        raise BadRequest.invalid("aad", f"(header X-KMS-AAD) is {error}") from None
