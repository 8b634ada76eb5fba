"""The wire API: a table of routes, and a function for each that turns a request into an answer.

`dispatch` is the one way through: find the route, hold the peer against the rules, run the function, write
the audit record, and only then give the answer back. An error is an answer too.
"""

from __future__ import annotations

import binascii
import itertools
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple, TypeVar

from .. import __version__
from ..audit.log import Fragment, fragment, key_fragment
from ..config.load import check_master_key
from ..crypto.aead import KEY_SIZE
from ..crypto.envelope import Wrapped
from ..encoding import (
    Buffer,
    b64decode,
    b64decode_into,
    b64encode,
    b64encode_bytes,
    b64encode_into,
    hex_decode_into,
    json_dumps,
    new_key_id,
    timestamp,
    wall,
)
from ..errors import (
    AuthenticationFailed,
    BadRequest,
    InternalError,
    KMSError,
    LengthRequired,
    MethodNotAllowed,
    NotFound,
    PeerRefused,
    PolicyRefused,
    RateLimited,
    UnsupportedMediaType,
    WeakKey,
)
from ..rules import Peer, Rights
from ..service.keeper import describe
from ..service.usage import told
from ..service.worker import Batch, BatchItem, Entry, Results, wrapped_source
from ..store.contract import DekRecord, Usage
from ..store.policy import SHREDDED
from . import dialect, gauges, openapi, secretjson
from .call import (
    BINARY,
    DEFAULT_PAGE,
    JSON,
    MAX_PAGE,
    PROMETHEUS,
    TEXT,
    App,
    Call,
    Reply,
    Route,
)
from .fields import MAX_ITEMS, Fields, checked_key_id, checked_thread_id
from .http1 import Head
from .items import batch_items, is_batch, item_pattern, pages, parsed_json

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_LOOKS = 20
"""Pages of the store that one call for a page looks through, where policies hide some of it."""


def _json(call: Call) -> Buffer:
    """The body, which claims to be JSON."""
    if call.head.content_type not in ("", JSON):
        raise UnsupportedMediaType(f"send {JSON}")
    return call.body


def fields_of(call: Call) -> Fields:
    return Fields(parsed_json(_json(call)))


def optional_fields_of(call: Call) -> Fields:
    return fields_of(call) if len(call.body) else Fields({})


def query_value(call: Call, name: str) -> str | None:
    return call.head.query.get(name)


def known_query(call: Call, *names: str) -> None:
    for name in call.head.query:
        if name not in names:
            raise BadRequest(f"the query parameter {name[:40]!r} is not known here", code="unknown_field")


def path_key_id(app: App, call: Call) -> str:
    key_id = checked_key_id(call.head.path.split("/")[2])
    call.key = key_fragment(key_id)
    _may_use(app, call, key_id)
    return key_id


def _may_use(app: App, call: Call, key_id: str) -> None:
    """Raises PolicyRefused. The store knows the thread, where it knows the key."""
    if call.rights:
        call.rights.check_key(key_id, app.service.thread_of(key_id))


def answer(value: Any, status: int = 200) -> Reply:
    return Reply(status, json_dumps(value).encode("ascii"))


# ---- DEKs ------------------------------------------------------------------------------------------


def create_dek_for_thread(app: App, call: Call) -> Reply:
    fields = fields_of(call)
    thread_id = fields.thread_id()
    fields.end()
    made = _create(app, call, thread_id)
    return answer({name: made[name] for name in ("key_id", "wrapped", "kek_id", "kek_version")})


def create_dek(app: App, call: Call) -> Reply:
    fields = fields_of(call)
    key_id = fields.optional_key_id()
    thread_id = fields.optional_thread_id()
    fields.end()
    made = _create(app, call, thread_id, key_id)
    if thread_id is not None:
        return answer(made, 201)
    # ProgressDB's third dialect knows no thread, and keeps `wrapped_dek`, whatever JSON it is.
    wrapped = {"wrapped_dek": {"ciphertext": made["wrapped"], "key_info": {}}}
    return answer({**{name: made[name] for name in _THIRD}, **wrapped}, 201)


_THIRD = ("key_id", "kek_id", "kek_version", "created_at")


def _create(app: App, call: Call, thread_id: str | None, key_id: str | None = None) -> dict[str, Any]:
    call.key = key_fragment(key_id, thread_id or "") if key_id else fragment(thread_id=thread_id)
    if call.rights:  # a key_id without a thread is its own thread; one that is made looks like this
        call.rights.check_key(key_id or new_key_id(0, bytes(10)), thread_id or key_id or "")
    made = app.service.change("create", thread_id=thread_id, key_id=key_id)
    call.key = key_fragment(made["key_id"], made["thread_id"])
    if made.pop("repeated", False):
        call.details = fragment(repeated=True)
    return made


def get_wrapped(app: App, call: Call) -> Reply:
    known_query(call, "key_id")
    key_id = query_value(call, "key_id")
    if key_id is None:
        raise BadRequest.missing("key_id")
    entry = _usable(app, call, checked_key_id(key_id))
    app.service.uses.add(key_id, 0, 0, call.peer.uid)
    body = {
        "wrapped": b64encode(entry.wrapped.blob),
        "kek_id": entry.wrapped.kek_id,
        "kek_version": str(entry.kek_version),
    }
    return answer(body)


def _usable(app: App, call: Call, key_id: str) -> Entry:
    try:
        entry = app.service.entry(key_id)
    except KMSError:
        call.key = key_fragment(key_id)
        raise
    call.key = entry.fragment
    if call.rights:
        call.rights.check_key(key_id, entry.thread_id)
    return entry


def list_deks(app: App, call: Call) -> Reply:
    known_query(call, "cursor", "limit", "thread_id", "unused_for")
    cursor, limit, thread_id = (query_value(call, name) for name in ("cursor", "limit", "thread_id"))
    if cursor:
        checked_key_id(cursor, "cursor")
    if limit is not None and not re.fullmatch("[0-9]{1,4}", limit):
        raise BadRequest.invalid("limit", f"must be a whole number from 1 to {MAX_PAGE}")
    size = int(limit) if limit is not None else DEFAULT_PAGE
    if not 1 <= size <= MAX_PAGE:
        raise BadRequest.invalid("limit", f"must be a whole number from 1 to {MAX_PAGE}")
    if thread_id is not None:
        checked_thread_id(thread_id)
    shown, following = _visible(app, call, cursor or "", size, thread_id, _unused_since(call))
    return answer({"deks": shown, "next_cursor": following})


def _unused_since(call: Call) -> str | None:
    text = query_value(call, "unused_for")
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,10}", text):
        raise BadRequest.invalid("unused_for", "must be a whole number of seconds")
    return timestamp(wall() - int(text))


def _unused(record: DekRecord, usage: Usage | None, since: str) -> bool:
    """One that is younger than that time was no use to anybody yet, and is not meant."""
    used = timestamp(usage.last) if usage else ""
    return record.state != SHREDDED and max(record.created_at, used) < since


def _visible(
    app: App, call: Call, after: str, size: int, thread_id: str | None, since: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    """A page of what the peer may use, and where the next one begins; of what was not used `since` then.
    Where little of much is shown the page is short, or empty, and yet not the last: no call looks through the
    whole store."""
    shown: list[dict[str, Any]] = []
    for _ in range(MAX_LOOKS):
        records = app.service.page(after, size + 1, thread_id)
        more, records = len(records) > size, records[:size]
        usage = app.service.usage(records)
        for record in records:
            used = usage.get(record.key_id)
            if since is not None and not _unused(record, used, since):
                continue
            if not call.rights or call.rights.sees(record.key_id, record.thread_id):
                shown.append({**describe(record), **told(record, used)})
                if len(shown) == size:
                    last = record is records[-1] and not more
                    return shown, None if last else record.key_id
        if not more:
            return shown, None
        after = records[-1].key_id
    return shown, after


def describe_dek(app: App, call: Call) -> Reply:
    record = app.service.record(path_key_id(app, call))
    return answer({**describe(record), **told(record, app.service.usage([record]).get(record.key_id))})


def disable_dek(app: App, call: Call) -> Reply:
    return _transition(app, call, "disable")


def enable_dek(app: App, call: Call) -> Reply:
    return _transition(app, call, "enable")


def _transition(app: App, call: Call, action: str) -> Reply:
    return answer(app.service.change("transition", key_id=path_key_id(app, call), action=action))


def disable_or_enable(app: App, call: Call) -> Reply:
    optional_fields_of(call).end()
    return disable_dek(app, call) if call.head.path.endswith("/disable") else enable_dek(app, call)


def delete_dek(app: App, call: Call) -> Reply:
    key_id = path_key_id(app, call)
    fields = optional_fields_of(call)
    now = fields.flag("immediately")
    days = fields.integer("pending_days", 1, 365, 7)
    fields.end()
    call.details = fragment(immediately=now)
    done = app.service.change(
        "transition", key_id=key_id, action="shred" if now else "schedule_deletion", days=days
    )
    call.details = fragment(immediately=now, delete_at=done.get("delete_at"))
    return answer(done)


def accept_clock(app: App, call: Call) -> Reply:
    optional_fields_of(call).end()
    done = app.service.change("accept_clock")
    call.details = fragment(now=done["now"], trusted=done["trusted"])
    return answer(done)


# ---- data ------------------------------------------------------------------------------------------


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
        _usable(app, call, key_id)
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
        _usable(app, call, source)
    else:
        call.key = key_fragment(source.key_id)
        _may_use(app, call, source.key_id)
    return source


def _raw_source(app: App, call: Call) -> tuple[str, bytes]:
    """Raw bodies: the key_id is in the query, the AAD as base64 in the header X-KMS-AAD."""
    known_query(call, "key_id")
    key_id = query_value(call, "key_id")
    if key_id is None:
        raise BadRequest.missing("key_id")
    _usable(app, call, checked_key_id(key_id))
    try:
        return key_id, b64decode(call.head.headers.get("x-kms-aad", ""))
    except ValueError as error:
        raise BadRequest.invalid("aad", f"(header X-KMS-AAD) is {error}") from None


def encrypt_batch(app: App, call: Call) -> Reply:
    return _batch(app, call, "plaintext", "ciphertext", app.service.encrypt_many)


def decrypt_batch(app: App, call: Call) -> Reply:
    return _batch(app, call, "ciphertext", "plaintext", app.service.decrypt_many)


Many = Callable[[Batch, memoryview, int], Results]


def _batch(app: App, call: Call, given: str, wanted: str, work: Many) -> Reply:
    def carry_out(rows: list[Any]) -> tuple[Batch, Results]:
        items = _each(rows, lambda fields: (fields.source(), fields.data(given), fields.aad()))
        if call.rights:
            items = _permitted(app, call, items, lambda item: (item[0],))
        return items, work(items, call.scratch, call.peer.uid)

    return _batch_reply(app, call, wanted, batch_items(_json(call), given), carry_out)


def _permitted(
    app: App,
    call: Call,
    items: Sequence[T | KMSError],
    sources: Callable[[T], Sequence[str | Wrapped]],
) -> list[T | KMSError]:
    """The items that the peer's policies allow; in place of the others, the errors. The first item's use was
    counted with the call."""
    results: list[T | KMSError] = []
    for item in items:
        if isinstance(item, KMSError):
            results.append(item)
            continue
        try:
            for source in sources(item):
                _may_use(app, call, source if isinstance(source, str) else source.key_id)
            results.append(item)
        except PolicyRefused as error:
            call.denials.add(error.entry)
            results.append(error.bare())
    results = _within_rates(call, results)
    denied = sum(isinstance(item, (PolicyRefused, RateLimited)) for item in results)
    app.service.counters.add("policy_denials", denied)
    return results


def _within_rates(call: Call, items: list[T | KMSError]) -> list[T | KMSError]:
    asked = sum(not isinstance(item, KMSError) for item in items)
    assert call.rights is not None
    granted, error = call.rights.spend(asked)
    for index, item in enumerate(items):
        if error is not None and not isinstance(item, KMSError):
            granted -= 1
            if granted < 0:
                call.denials.add(error.entry)
                items[index] = error.bare()
    return items


def _each(rows: list[Any], read: Callable[[Fields], T]) -> list[T | KMSError]:
    """What `read` makes of each row; of a malformed one the error, which spoils no other. A row that is read
    already, or found bad, stays as it is."""
    results: list[T | KMSError] = []
    for row in rows:
        if isinstance(row, (tuple, KMSError)):
            results.append(row)  # type: ignore[arg-type]
            continue
        try:
            fields = Fields(row)
            item = read(fields)
            fields.end()
            results.append(item)
        except KMSError as error:
            results.append(error.bare())
    return results


def _batch_reply(
    app: App,
    call: Call,
    wanted: str,
    pages: Iterator[list[Any]],
    carry_out: Callable[[list[Any]], tuple[Batch, Results]],
) -> Reply:
    """Page by page, so that a long batch is never there as text, items and results at once, and lets others
    in between. An item that is malformed or failed has an error in its place. One audit record for all."""
    out, count, failed = bytearray(b'{"items":['), 0, 0
    keys: set[str] = set()
    lead = b'{"%b":"' % wanted.encode("ascii")
    for rows in pages:
        items, results = carry_out(rows)
        sources = {item[0] for item in items if not isinstance(item, KMSError)}
        keys.update(source if isinstance(source, str) else source.key_id for source in sources)
        failed += sum([isinstance(result, KMSError) for result in results])
        count += len(results)
        out += b",".join([_rendered(lead, result) for result in results]) + b","
        call.breathe()
    out[-1:] = b"]}"
    denied = sorted(call.denials) or None
    call.details = fragment(count=count, failed=failed, keys=sorted(keys), denied_by=denied)
    app.service.counters.add("items", count)
    return Reply(200, memoryview(out))


def _rendered(lead: bytes, result: bytes | KMSError) -> bytes:
    if isinstance(result, KMSError):
        return _item_error(result)
    return lead + binascii.b2a_base64(result, newline=False) + b'"}'


def _item_error(error: KMSError) -> bytes:
    return json_dumps({"error": {"code": error.code, "message": error.message}}).encode("ascii")


class _Move(NamedTuple):
    """A ciphertext under one DEK, and the DEK and AAD that it shall be under."""

    source: str
    data: bytes
    aad: bytes
    target: str
    new_aad: bytes


def reencrypt(app: App, call: Call) -> Reply:
    """From one DEK to another; the plaintext never leaves the process."""

    body = _json(call)
    if is_batch(body):
        return _reencrypt_batch(app, call, batch_items(body, ""))
    fields = fields_of(call)
    rows = fields.items()
    if rows is not None:
        fields.end()
        return _reencrypt_batch(app, call, pages(iter(rows)))
    move = _move(fields)
    fields.end()
    call.key = key_fragment(move.source)
    for key_id in (move.source, move.target):
        _may_use(app, call, key_id)
    call.details = fragment(new_key_id=move.target)
    (result,), embedded = _moved(app, call, [move])
    call.details = Fragment(call.details + fragment(embedded=embedded or None))
    if isinstance(result, KMSError):
        raise result
    return Reply(200, b'{"ciphertext":"%b"}' % b64encode_bytes(result))


def _reencrypt_batch(app: App, call: Call, rows: Iterator[list[Any]]) -> Reply:
    embedded = 0

    def carry_out(page: list[Any]) -> tuple[Batch, Results]:
        nonlocal embedded
        moves = _each(page, _move)
        if call.rights:
            moves = _permitted(app, call, moves, lambda move: (move.source, move.target))
        results, opened = _moved(app, call, moves)
        embedded += opened
        return _sources(moves), results

    reply = _batch_reply(app, call, "ciphertext", rows, carry_out)
    call.details = Fragment(call.details + fragment(embedded=embedded or None))
    return reply


def _move(fields: Fields) -> _Move:
    source, target = fields.key_id(), fields.key_id("new_key_id")
    data, aad = fields.data("ciphertext"), fields.aad()
    return _Move(source, data, aad, target, fields.aad("new_aad", aad))


def _sources(moves: Sequence[_Move | KMSError]) -> Batch:
    return [move if isinstance(move, KMSError) else (move.source, move.data, move.aad) for move in moves]


def _moved(app: App, call: Call, moves: Sequence[_Move | KMSError]) -> tuple[Results, int]:
    """(ciphertexts, how many were messages of ProgressDB's embedded mode)."""
    opened = app.service.decrypt_many(_sources(moves), call.scratch, call.peer.uid)
    embedded = _open_embedded(app, call, moves, opened)
    again = [_again(move, text) for move, text in zip(moves, opened)]
    return app.service.encrypt_many(again, call.scratch, call.peer.uid), embedded


def _open_embedded(app: App, call: Call, moves: Sequence[_Move | KMSError], results: Results) -> int:
    """What did not open under its DEK may be a message of ProgressDB's embedded mode."""
    done = 0
    for index, (move, result) in enumerate(zip(moves, results)):
        if isinstance(move, _Move) and isinstance(result, AuthenticationFailed) and not move.aad:
            sealed = dialect.embedded(move.data)
            if sealed is not None:
                results[index] = _result(app.service.open_embedded, sealed, call.scratch)
                done += not isinstance(results[index], KMSError)
    return done


def _result(work: Callable[..., bytes], *args: Any) -> bytes | KMSError:
    try:
        return work(*args)
    except KMSError as error:
        return error.with_traceback(None)


def _again(move: _Move | KMSError, opened: bytes | KMSError) -> BatchItem | KMSError:
    if isinstance(move, KMSError):
        return move
    return opened if isinstance(opened, KMSError) else (move.target, opened, move.new_aad)


# ---- bodies that carry a key: read in place, see secretjson ------------------------------------------


def wrap(app: App, call: Call) -> Reply:
    body, spans, _ = _secret_fields(call, strings=("dek", "key_id"))
    key_id = _plain(body, spans, "key_id")
    if key_id is not None:
        call.key = key_fragment(checked_key_id(key_id))
    if call.rights:
        _may_use(app, call, key_id or new_key_id(0, bytes(10)))
    dek = call.scratch[:KEY_SIZE]
    try:
        b64decode_into(_span(body, spans, "dek"), dek)
        check_master_key(dek)  # a buffer that nobody filled, or a key that everybody has, protects nothing
        blob, kek_id, version, name = app.service.wrap(dek, key_id)
    except WeakKey as error:
        raise BadRequest.invalid("dek", f"can't be a DEK: {error.message}") from None
    except ValueError as error:
        raise BadRequest.invalid("dek", str(error)) from None
    finally:
        call.scratch[:] = bytes(len(call.scratch))
    call.key = key_fragment(name)
    return answer({"wrapped": b64encode(blob), "kek_id": kek_id, "kek_version": str(version)})


def unwrap(app: App, call: Call) -> Reply:
    fields = fields_of(call)
    wrapped = wrapped_source(fields.data("wrapped"), fields.optional_key_id())
    fields.end()
    call.key = key_fragment(wrapped.key_id)
    _may_use(app, call, wrapped.key_id)
    out = call.answer
    try:
        dek = app.service.unwrap(wrapped, call.scratch, call.peer.uid)
        out[:8] = b'{"dek":"'
        end = 8 + b64encode_into(dek, out[8:])
    finally:
        call.scratch[:] = bytes(len(call.scratch))
    out[end : end + 2] = b'"}'
    return Reply(200, out[: end + 2], secret=True)


def rewrap(app: App, call: Call) -> Reply:
    body, spans, _ = _secret_fields(call, strings=("key_id", "new_kek_hex"))
    key_id = _plain(body, spans, "key_id")
    if key_id is None:
        raise BadRequest.missing("key_id")
    call.key = key_fragment(checked_key_id(key_id))
    _may_use(app, call, key_id)
    with app.staging.take() as new_kek:
        _new_kek(body, spans, new_kek.view)
        done = app.service.change("rewrap", key_id=key_id, new_kek=new_kek)
    call.details = fragment(new_kek_id=done["kek_id"])
    names = {
        "new_wrapped": done["wrapped"],
        "new_kek_id": done["kek_id"],
        "new_kek_version": str(done["kek_version"]),
    }
    return answer({"status": "ok", **done, "kek_version": str(done["kek_version"]), **names})


def rotate_kek(app: App, call: Call) -> Reply:
    body, spans, flags = _secret_fields(call, strings=("new_kek_hex",), booleans=("dry_run",))
    with app.staging.take() as new_kek:
        _new_kek(body, spans, new_kek.view)
        dry_run = flags.get("dry_run", False)
        done = app.service.change("rotate", timeout=None, new_kek=new_kek, dry_run=dry_run)
    call.details = fragment(
        new_kek_id=done["kek_id"], rewrapped=done["rewrapped"], dry_run=done["status"] != "ok"
    )
    return answer({**done, "kek_version": str(done["kek_version"])})


def _new_kek(body: memoryview, spans: Mapping[str, secretjson.Span], view: memoryview) -> None:
    try:
        hex_decode_into(_span(body, spans, "new_kek_hex"), view)
    except ValueError as error:
        raise BadRequest.invalid("new_kek_hex", str(error)) from None


def _secret_fields(
    call: Call, strings: tuple[str, ...], booleans: tuple[str, ...] = ()
) -> tuple[memoryview, dict[str, secretjson.Span], dict[str, bool]]:
    if call.head.content_type not in ("", JSON):
        raise UnsupportedMediaType(f"send {JSON}")
    body = memoryview(call.body)
    try:
        spans, flags = secretjson.scan(body)
    except ValueError as error:
        raise BadRequest(str(error), code="malformed_json") from None
    for name in (*spans, *flags):
        if name not in strings and name not in booleans:
            raise BadRequest("a field of the body is not known here", code="unknown_field")
        if (name in spans) != (name in strings):
            raise BadRequest.invalid(name, "must be a string" if name in strings else "must be true or false")
    return body, spans, flags


def _span(body: memoryview, spans: Mapping[str, secretjson.Span], name: str) -> memoryview:
    if name not in spans:
        raise BadRequest.missing(name)
    start, end = spans[name]
    return body[start:end]


def _plain(body: memoryview, spans: Mapping[str, secretjson.Span], name: str) -> str | None:
    """A value that is no secret."""
    if name not in spans:
        return None
    start, end = spans[name]
    if end - start > 128:
        raise BadRequest.invalid(name, "is too long")
    return bytes(body[start:end]).decode("utf-8", "replace")


# ---- the service itself --------------------------------------------------------------------------------


def health(app: App, call: Call) -> Reply:
    return Reply(200, b"ok", TEXT)


def ready(app: App, call: Call) -> Reply:
    found = app.service.readiness()
    value = {"ready": not found.reasons, "reasons": found.reasons, "warnings": found.warnings}
    return answer(value, 503 if found.reasons else 200)


def status(app: App, call: Call) -> Reply:
    return answer({"version": __version__, "state": "ready", **app.service.status()})


def metrics(app: App, call: Call) -> Reply:
    return Reply(200, app.metrics.render(gauges.families(app)).encode("ascii"), PROMETHEUS)


def openapi_document(app: App, call: Call) -> Reply:
    return answer(openapi.document(ROUTES))


# ---- the table ---------------------------------------------------------------------------------------

SLACK = 1024
"""Bytes by which a body for /decrypt may be longer than one for /encrypt: nonce and tag as base64 (40), a
longer name of the field, and white space of another encoder."""

ITEM_SLACK, MOVE_SLACK = 64, 256
"""The same for an item of a batch; and for one of reencrypt, which names another key."""

ROUTES = (
    Route("GET", "/healthz", "", health, "Liveness"),
    Route("GET", "/health", "", health, "Liveness, under the name that older clients try"),
    Route(
        "GET", "/readyz", "", ready, "Readiness: 503 with the reasons where something is amiss", waits=True
    ),
    Route(
        "GET",
        "/status",
        "",
        status,
        "Version, KEK, counts, memory protection, progress of a rotation",
        waits=True,
    ),
    Route("GET", "/metrics", "", metrics, "Prometheus metrics", waits=True),
    Route("GET", "/openapi.json", "", openapi_document, "This API as OpenAPI 3.1"),
    Route(
        "POST",
        "/clock/accept",
        "accept_clock",
        accept_clock,
        "Trust the wall clock as it stands",
        admin=True,
        waits=True,
    ),
    Route(
        "POST",
        "/create_dek_for_thread",
        "create_dek",
        create_dek_for_thread,
        "Make a DEK for a thread",
        waits=True,
    ),
    Route("GET", "/get_wrapped", "get_wrapped", get_wrapped, "The wrapped DEK of a key_id"),
    Route("POST", "/encrypt", "encrypt", encrypt, "Encrypt under a DEK", raw=True),
    Route("POST", "/decrypt", "decrypt", decrypt, "Decrypt under a DEK", raw=True, slack=SLACK, tokens=True),
    Route("POST", "/encrypt_batch", "encrypt_batch", encrypt_batch, "Encrypt up to 1,000 items", batch=True),
    Route(
        "POST",
        "/decrypt_batch",
        "decrypt_batch",
        decrypt_batch,
        "Decrypt up to 1,000 items",
        batch=True,
        slack=MAX_ITEMS * ITEM_SLACK,
    ),
    Route(
        "POST",
        "/reencrypt",
        "reencrypt",
        reencrypt,
        "Move a ciphertext from one DEK to another",
        batch=True,
        slack=MAX_ITEMS * MOVE_SLACK,
    ),
    Route("POST", "/wrap", "wrap", wrap, "Wrap a DEK that the caller holds", secret=True),
    Route("POST", "/unwrap", "unwrap", unwrap, "Unwrap a DEK for the caller", admin=True, secret=True),
    Route(
        "POST",
        "/rewrap",
        "rewrap",
        rewrap,
        "Move one stored DEK to another KEK",
        admin=True,
        secret=True,
        waits=True,
    ),
    Route(
        "POST",
        "/rotate_kek",
        "rotate_kek",
        rotate_kek,
        "Rewrap every DEK under a new KEK",
        admin=True,
        secret=True,
        waits=True,
    ),
    Route(
        "POST",
        "/deks",
        "create_dek",
        create_dek,
        "Make a DEK, with a key_id of the caller's choice if wanted; that one again gives the same DEK",
        waits=True,
    ),
    Route("GET", "/deks", "list_deks", list_deks, "DEKs in order of key_id, page by page", waits=True),
    Route("GET", "/deks/{key_id}", "describe_dek", describe_dek, "One DEK, without its wrapped bytes"),
    Route(
        "DELETE",
        "/deks/{key_id}",
        "delete_dek",
        delete_dek,
        "Schedule a crypto-shred, or shred now",
        admin=True,
        waits=True,
    ),
    Route(
        "POST",
        "/deks/{key_id}/disable",
        "disable_dek",
        disable_or_enable,
        "Refuse all use of a DEK",
        admin=True,
        waits=True,
    ),
    Route(
        "POST",
        "/deks/{key_id}/enable",
        "enable_dek",
        disable_or_enable,
        "Allow it again, or cancel a deletion",
        waits=True,
    ),
)

_STATIC = {(r.method, r.path): r for r in ROUTES if "{" not in r.path}
_DYNAMIC = {(r.method, r.path.partition("}")[2]): r for r in ROUTES if "{" in r.path}


def find(head: Head) -> Route:
    """Raises NotFound, or MethodNotAllowed with the methods that the path knows."""
    method = "GET" if head.method == "HEAD" else head.method
    route = _STATIC.get((method, head.path)) or _find_dynamic(method, head.path)
    if route is None:
        allowed = sorted({r.method for r in ROUTES if _matches(r, head.path)})
        if allowed:
            allow = ", ".join(allowed + (["HEAD"] if "GET" in allowed else []))
            raise MethodNotAllowed(f"{head.path[:80]} does not know {head.method}", allow=allow)
        raise NotFound("there is nothing at this path", hint="GET /openapi.json lists what there is")
    return route


def _find_dynamic(method: str, path: str) -> Route | None:
    parts = path.split("/")
    if len(parts) < 3 or parts[1] != "deks" or not parts[2]:
        return None
    return _DYNAMIC.get((method, "".join("/" + part for part in parts[3:])))


def _matches(route: Route, path: str) -> bool:
    if "{" not in route.path:
        return route.path == path
    return _find_dynamic(route.method, path) is route


# ---- the way through ---------------------------------------------------------------------------------

_request_prefix = os.urandom(4).hex()
_request_numbers = itertools.count(1)


def admit(app: App, route: Route, head: Head, peer: Peer, rights: Rights | None) -> None:
    """Judge a request by its head, before its body is read. Raises PeerRefused (also as PolicyRefused and
    RateLimited), UnsupportedMediaType, LengthRequired."""
    if peer.via:
        _no_browser(app, head)
    if route.admin:
        app.service.rules.check(peer, True)
    if rights and route.op:
        rights.check_operation(route.op)
        if not route.batch:
            _, error = rights.spend(1)
            if error is not None:
                raise error
    if head.coded:  # it must not be sealed as if it were the message
        raise UnsupportedMediaType("send the body as it is, without Content-Encoding")
    if route.secret and head.chunked:
        raise LengthRequired("a body with a key in it must have a Content-Length")


def _no_browser(app: App, head: Head) -> None:
    """A page of another site can make a browser on this host connect. It can't leave out Origin or
    Sec-Fetch-*, nor send another Host than its own name, nor a Content-Type of ours without asking first."""
    for name in head.headers:
        if name == "origin" or name.startswith("sec-fetch-"):
            raise PeerRefused("a browser is not served", code="browser_refused")
    if head.headers.get("host", "").lower() not in app.hosts:
        raise PeerRefused("the Host header names another address than tcp_address", code="host_refused")
    if head.method in ("POST", "DELETE") and not head.content_type:
        raise UnsupportedMediaType("over TCP each POST and DELETE must have a Content-Type")


def dispatch(app: App, route: Route, call: Call) -> Reply:
    """Carry a request out. Always an answer, never an exception; the audit record is written before it."""
    started = time.perf_counter()
    request_id = f"{_request_prefix}-{next(_request_numbers)}"
    call.op = route.op
    try:
        reply = route.handler(app, call)
        outcome = "ok"
    except PolicyRefused as error:
        return refuse(app, route, call, error)
    except KMSError as error:
        reply = _answer_error(call, error.bare())
        outcome = "failed"
    except Exception:
        log.exception("request %s (%s) failed", request_id, route.path)
        outcome = "failed"
        reply = _answer_error(
            call, InternalError(f"an internal error; the daemon's log tells more under {request_id}")
        )
    if route.op:
        reply = _recorded(app, route, call, reply, outcome, request_id)
    app.service.counters.request(route.op or "service", reply.status, time.perf_counter() - started)
    return reply


def refuse(app: App, route: Route, call: Call, error: PeerRefused) -> Reply:
    """What dispatch does for a peer that `admit` refused: nothing, on the record. What a policy refuses may
    come in thousands: it is counted, and recorded as one."""
    call.op = route.op
    reply = _answer_error(call, error)
    if isinstance(error, (PolicyRefused, RateLimited)):
        app.denied(call, error)
    elif route.op:
        app.service.counters.add("refused_peers", 1)
        request_id = f"{_request_prefix}-{next(_request_numbers)}"
        reply = _recorded(app, route, call, reply, "refused", request_id)
    app.service.counters.request(route.op or "service", reply.status, 0.0)
    return reply


def _recorded(app: App, route: Route, call: Call, reply: Reply, outcome: str, request_id: str) -> Reply:
    """The reply with its receipt; an error in its place where it can't be recorded: no record, no answer."""
    number = Fragment(f',"request_id":"{request_id}"')
    try:
        reply.receipt = app.service.audit.record(
            route.op, outcome, reply.status, call.key, call.peer_fragment, number, call.details
        )
    except KMSError as error:
        return error_reply(error)
    return reply


def _answer_error(call: Call, error: KMSError) -> Reply:
    call.details = Fragment(call.details + fragment(code=error.code))
    return error_reply(error)


def error_reply(error: KMSError) -> Reply:
    """What a peer hears of an error."""
    body: dict[str, str] = {"code": error.code, "message": error.message}
    if error.hint:
        body["hint"] = error.hint
    extra = f"Allow: {error.allow}\r\n" if isinstance(error, MethodNotAllowed) else ""
    if isinstance(error, RateLimited):
        extra = f"Retry-After: {error.retry_after}\r\n"
    return Reply(error.status, json_dumps({"error": body}).encode("ascii"), extra=extra, close=error.close)
