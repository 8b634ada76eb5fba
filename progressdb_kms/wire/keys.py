"""The routes whose body or answer is a key: it is read where it lies, see `secretjson`, and copied into
locked memory only."""

from __future__ import annotations

from typing import Union

from ..audit.log import fragment, key_fragment
from ..config.weakkeys import check_master_key
from ..crypto.aead import KEY_SIZE
from ..encoding import KEK_ID, b64decode_into, b64encode_into, hex_decode_into, new_key_id
from ..errors import BadRequest, WeakKey
from ..service.service import wrapped_source
from . import secretjson
from .call import App, Call, Reply
from .fields import checked_key_id
from .reading import answer, answer_blob, fields_of, json_body, may_use

Found = dict[str, Union[memoryview, bool]]


def wrap(app: App, call: Call) -> Reply:
    found = _secret_fields(call, strings=("dek", "key_id"))
    key_id = _plain(found, "key_id")
    dek = call.scratch[:KEY_SIZE]
    try:
        b64decode_into(_string(found, "dek"), dek)  # before the key_id is named: see `rewrap`
        if key_id is not None:
            call.key = key_fragment(checked_key_id(key_id))
        if call.rights:
            may_use(app, call, key_id or new_key_id(0, bytes(10)))
        check_master_key(dek)  # a buffer that nobody filled, or a key that everybody has, protects nothing
        blob, kek_id, version, name = app.service.wrap(dek, key_id, call.peer.uid)
    except WeakKey as error:
        raise BadRequest.invalid("dek", f"can't be a DEK: {error.message}") from None
    except ValueError as error:
        raise BadRequest.invalid("dek", str(error)) from None
    finally:
        call.scratch[:] = bytes(len(call.scratch))
    call.key = key_fragment(name)
    return answer_blob(blob, kek_id, version)


def unwrap(app: App, call: Call) -> Reply:
    fields = fields_of(call)
    wrapped = wrapped_source(fields.data("wrapped"), fields.optional_key_id())
    fields.end()
    call.key = key_fragment(wrapped.key_id)
    may_use(app, call, wrapped.key_id)
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
    found = _secret_fields(call, strings=("key_id", "new_kek_hex"))
    key_id = _plain(found, "key_id")
    if key_id is None:
        raise BadRequest.missing("key_id")
    with app.staging.take() as new_kek:
        _new_kek(found, new_kek.view)  # before the key_id is named: who swaps the two sends a KEK as that
        call.key = key_fragment(checked_key_id(key_id))
        may_use(app, call, key_id)
        done = app.service.change("rewrap", key_id=key_id, new_kek=new_kek)
    call.details = fragment(new_kek_id=done["kek_id"])
    done["kek_version"] = str(done["kek_version"])
    names = {f"new_{name}": done[name] for name in ("wrapped", "kek_id", "kek_version")}
    return answer({"status": "ok", **done, **names})


def rotate_kek(app: App, call: Call) -> Reply:
    """To a KEK that comes along, or to one of next_master_keys, by its kek_id."""
    found = _secret_fields(call, strings=("new_kek_hex", "new_kek_id"), booleans=("dry_run",))
    dry_run, named = found.get("dry_run", False), _plain(found, "new_kek_id")
    if named is not None:
        if "new_kek_hex" in found or not KEK_ID.fullmatch(named):
            raise BadRequest.invalid("new_kek_id", "must be a kek_id, in place of new_kek_hex")
        done = app.service.change("rotate", timeout=None, kek_id=named, dry_run=dry_run)
    else:
        with app.staging.take() as new_kek:
            _new_kek(found, new_kek.view)
            done = app.service.change("rotate", timeout=None, new_kek=new_kek, dry_run=dry_run)
    call.details = fragment(
        new_kek_id=done["kek_id"], rewrapped=done["rewrapped"], dry_run=done["status"] != "ok"
    )
    return answer({**done, "kek_version": str(done["kek_version"])})


def _new_kek(found: Found, view: memoryview) -> None:
    try:
        hex_decode_into(_string(found, "new_kek_hex"), view)
    except ValueError as error:
        raise BadRequest.invalid("new_kek_hex", str(error)) from None


def _secret_fields(call: Call, strings: tuple[str, ...], booleans: tuple[str, ...] = ()) -> Found:
    try:
        found = secretjson.scan(memoryview(json_body(call)))
    except ValueError as error:
        raise BadRequest(str(error), code="malformed_json") from None
    for name, value in found.items():
        if name not in strings and name not in booleans:
            raise BadRequest("a field of the body is not known here", code="unknown_field")
        if isinstance(value, bool) != (name in booleans):
            raise BadRequest.invalid(name, "must be a string" if name in strings else "must be true or false")
    return found


def _string(found: Found, name: str) -> memoryview:
    value = found.get(name)
    if not isinstance(value, memoryview):
        raise BadRequest.missing(name)
    return value


def _plain(found: Found, name: str) -> str | None:
    """A value that is no secret."""
    if name not in found:
        return None
    value = _string(found, name)
    if len(value) > 128:
        raise BadRequest.invalid(name, "is too long")
    return bytes(value).decode("utf-8", "replace")
