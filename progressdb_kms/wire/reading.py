"""What the routes share: reading a request, and finding the DEK that it means."""

from __future__ import annotations

from typing import Any

from ..audit.log import key_fragment
from ..encoding import Buffer, b64encode, json_dumps
from ..errors import BadRequest, KMSError, UnsupportedMediaType
from ..service.service import Entry, Source
from .call import JSON, App, Call, Reply
from .fields import Fields, checked_key_id
from .items import parsed_json


def json_body(call: Call) -> Buffer:
    """The body, which claims to be JSON."""
    if call.head.content_type not in ("", JSON):
        raise UnsupportedMediaType(f"send {JSON}")
    return call.body


def fields_of(call: Call) -> Fields:
    return Fields(parsed_json(json_body(call)))


def optional_fields_of(call: Call) -> Fields:
    return fields_of(call) if len(call.body) else Fields({})


def known_query(call: Call, *names: str) -> None:
    for name in call.head.query:
        if name not in names:
            raise BadRequest(f"the query parameter {name[:40]!r} is not known here", code="unknown_field")


def path_key_id(app: App, call: Call) -> str:
    key_id = checked_key_id(call.head.path.split("/")[2])
    call.key = key_fragment(key_id)
    may_use(app, call, key_id)
    return key_id


def may_use(app: App, call: Call, key_id: str) -> None:
    """Raises PolicyRefused. The store knows the thread, where it knows the key."""
    if call.rights:
        call.rights.check_key(key_id, app.service.thread_of(key_id))


def answer(value: Any, status: int = 200) -> Reply:
    return Reply(status, json_dumps(value).encode("ascii"))


def answer_blob(blob: bytes, kek_id: str, version: int) -> Reply:
    return answer({"wrapped": b64encode(blob), "kek_id": kek_id, "kek_version": str(version)})


def usable(app: App, call: Call, source: Source) -> Entry:
    """The DEK that is meant, looked up once; it is named in the audit record whatever comes of it."""
    if not isinstance(source, str):
        call.key = key_fragment(source.key_id)
        may_use(app, call, source.key_id)
        return app.service.dek(source)
    try:
        dek = app.service.entry(source)
    except KMSError:
        call.key = key_fragment(source)
        may_use(app, call, source)  # of what one may not use one does not hear, either
        raise
    call.key = dek.fragment
    if call.rights:
        call.rights.check_key(source, dek.thread_id)
    return dek


def query_dek(app: App, call: Call) -> Entry:
    """The DEK of `?key_id=`, the one parameter."""
    known_query(call, "key_id")
    key_id = call.head.query.get("key_id")
    if key_id is None:
        raise BadRequest.missing("key_id")
    return usable(app, call, checked_key_id(key_id))
