"""The API as OpenAPI 3.1, made from the table of routes and the schemas below.

The daemon loads none of this: it serves `wire/openapi.json` as that stands in the package. After a change
here, of the routes or of the version, `python -m progressdb_kms.tools.openapi` writes it anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .. import __version__
from ..encoding import MAX_THREAD_ID, json_dumps
from ..wire.call import BINARY, JSON, MAX_PAGE, PROMETHEUS, SECRET_BODY, TEXT, Route
from ..wire.fields import MAX_ITEMS
from ..wire.routes import ROUTES

FILE = Path(__file__).parent.parent / "wire" / "openapi.json"

Schema = dict[str, Any]

_KEY_ID: Schema = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"}
_THREAD_ID: Schema = {
    "type": "string", "minLength": 1, "maxLength": MAX_THREAD_ID, "pattern": r"^[^\x00-\x1f\x7f-\x9f]+$"
}  # fmt: skip
_BASE64: Schema = {
    "type": "string",
    "contentEncoding": "base64",
    "pattern": "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$",
}
_DEK: Schema = {"type": "string", "pattern": "^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$"}
_HEX_KEY: Schema = {"type": "string", "pattern": "^[0-9A-Fa-f]{64}$"}
_TEXT: Schema = {"type": "string"}
_NULL: Schema = {"type": "null"}
_RAW_JSON: Schema = {
    "description": "What was encrypted, as it stands, where `ciphertext` was the JSON token of a ciphertext."
}


_COUNT: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}

_MEMBERS: dict[str, Schema] = {
    "key_id": _KEY_ID,
    "new_key_id": _KEY_ID,
    "thread_id": _THREAD_ID,
    "thread_key": _THREAD_ID,
    **dict.fromkeys(("plaintext", "ciphertext", "aad", "new_aad", "wrapped", "new_wrapped"), _BASE64),
    "dek": _DEK,
    "new_kek_hex": _HEX_KEY,
    **dict.fromkeys(("immediately", "dry_run", "ready"), _FLAG),
    **dict.fromkeys(("encrypts", "decrypts", "last_uid"), _COUNT),
}
"""What a member of this name is, wherever it stands. Any other is text, where nothing else is said."""


def _object(required: str, optional: str = "", /, **other: Schema) -> Schema:
    """An object with these members and no other, and `other` ones that need a schema of their own. Names are
    space-separated, each perhaps with its type behind it: `kek_id count:integer since:string|null`."""
    properties: dict[str, Schema] = {}
    names = [word.partition(":") for word in f"{required} {optional}".split()]
    for name, _, kind in names:
        kinds = kind.split("|")
        typed = {"type": kinds if len(kinds) > 1 else kind} if kind else _MEMBERS.get(name, _TEXT)
        properties[name] = other.get(name, typed)
    needed = [name for name, _, _ in names[: len(required.split())]]
    added = {name: schema for name, schema in other.items() if name not in properties}
    return {
        "type": "object",
        "properties": {**properties, **added},
        "required": needed + list(added),
        "additionalProperties": False,
    }


def _request(required: str, optional: str = "", /, **other: Schema) -> Schema:
    """As `_object`; null stands for an optional member that was left out."""
    made = _object(required, optional, **other)
    for name in optional.split():
        if made["properties"][name] is not _NULL:
            made["properties"][name] = {"anyOf": [made["properties"][name], _NULL]}
    return made


_NAMED: dict[str, Schema] = {}


def _named(name: str, schema: Schema, about: str = "") -> Schema:
    """A schema with a name of its own, which a generated client gives to its model."""
    _NAMED[name] = {**schema, "title": name, **({"description": about} if about else {})}
    return {"$ref": f"#/components/schemas/{name}"}


def _map(of: Schema) -> Schema:
    return {"type": "object", "additionalProperties": of}


def _list(of: Schema, **more: int) -> Schema:
    return {"type": "array", "items": of, **more}


def _either(*choices: Schema) -> Schema:
    return {"oneOf": list(choices)}


def _items(name: str, item: Schema) -> Schema:
    return _named(name, _object("items", items=_list(item, minItems=1, maxItems=MAX_ITEMS)))


def _data(name: str, field: str) -> Schema:
    """Data under a stored DEK, or under one that comes along."""
    stored = _named(f"{name}Stored", _request(f"key_id {field}", "aad wrapped", wrapped=_NULL))
    inline = _named(f"{name}Inline", _request(f"wrapped {field}", "key_id aad"))
    return _named(name, {"anyOf": [stored, inline]})


_DETAIL = _named("ErrorDetail", _object("code message", "hint"), "`code` is stable.")
_ERROR = _named("Error", _object("error", error=_DETAIL))
_WRAPPED = _named("WrappedDek", _object("wrapped kek_id kek_version"))
_MOVE = _named("Reencrypt", _request("key_id new_key_id ciphertext", "aad new_aad"))
_USAGE = _named(
    "Usage",
    _object("encrypts decrypts", "first_used_at last_used_at last_uid"),
    "What was done under a DEK, but for the last second or so.",
)
_DESCRIPTION = _named(
    "Dek",
    _object(
        "key_id thread_id state kek_id kek_version created_at",
        "delete_at shredded_at wrapped usage",
        thread_id=_TEXT,
        state={"enum": ["enabled", "disabled", "pending_deletion", "shredded", "damaged"]},
        usage=_USAGE,
    ),
    "A DEK without its key. Times are RFC 3339 in UTC. `damaged`, in a list only: its row is not as the "
    "daemon wrote it, and all but `key_id` and `usage` is empty or 0.",
)


def _done(field: str) -> Schema:
    return _named(field.title(), _object(field))


def _all_done(field: str) -> Schema:
    """Items in the order of the request; an error is one item's."""
    return _named(f"{field.title()}Batch", _object("items", items=_list(_either(_done(field), _ERROR))))


_PLAINTEXT, _CIPHERTEXT = _done("plaintext"), _done("ciphertext")
_PLAINTEXTS, _CIPHERTEXTS = _all_done("plaintext"), _all_done("ciphertext")
_ENCRYPT, _DECRYPT = _data("EncryptRequest", "plaintext"), _data("DecryptRequest", "ciphertext")

_DAYS = {"type": "integer", "minimum": 1, "maximum": 365}

_SUMMARIES = {
    "GET /healthz": "Liveness",
    "GET /health": "Liveness, under the name that older clients try",
    "GET /readyz": "Readiness: 503 with the reasons where something is amiss",
    "GET /status": "Version, KEK, counts, memory protection, progress of a rotation",
    "GET /metrics": "Prometheus metrics",
    "GET /openapi.json": "This API as OpenAPI 3.1",
    "POST /clock/accept": "Trust the wall clock as it stands",
    "POST /create_dek_for_thread": "Make a DEK for a thread",
    "GET /get_wrapped": "The wrapped DEK of a key_id",
    "POST /encrypt": "Encrypt under a DEK",
    "POST /decrypt": "Decrypt under a DEK",
    "POST /encrypt_batch": "Encrypt up to 1,000 items",
    "POST /decrypt_batch": "Decrypt up to 1,000 items",
    "POST /reencrypt": "Move a ciphertext from one DEK to another",
    "POST /wrap": "Wrap a DEK that the caller holds",
    "POST /unwrap": "Unwrap a DEK for the caller",
    "POST /rewrap": "Move one stored DEK to another KEK",
    "POST /rotate_kek": "Rewrap every DEK under a new KEK",
    "POST /deks": (
        "Make a DEK, with a key_id of the caller's choice if wanted; that one again gives the same DEK"
    ),
    "GET /deks": "DEKs in order of key_id, page by page",
    "GET /deks/{key_id}": "One DEK, without its wrapped bytes",
    "DELETE /deks/{key_id}": "Schedule a crypto-shred, or shred now",
    "POST /deks/{key_id}/disable": "Refuse all use of a DEK",
    "POST /deks/{key_id}/enable": "Allow it again, or cancel a deletion",
}

_RAW = "/encrypt", "/decrypt"
"""These take application/octet-stream too."""

_REQUESTS: dict[str, Schema] = {
    "/create_dek_for_thread": _either(
        _named("ThreadRequest", _request("thread_id", "thread_key", thread_key=_NULL)),
        _named("ThreadKeyRequest", _request("thread_key", "thread_id", thread_id=_NULL)),
    ),
    "/deks": {
        "anyOf": [
            _named("CreateRequest", _request("thread_id", "key_id thread_key", thread_key=_NULL)),
            _named("CreateByThreadKeyRequest", _request("thread_key", "key_id thread_id", thread_id=_NULL)),
            _named(
                "CreateByKeyRequest",
                _request("", "key_id thread_id thread_key", thread_id=_NULL, thread_key=_NULL),
            ),
        ]
    },
    "/encrypt": _ENCRYPT,
    "/decrypt": _DECRYPT,
    "/encrypt_batch": _items("EncryptBatchRequest", _ENCRYPT),
    "/decrypt_batch": _items("DecryptBatchRequest", _DECRYPT),
    "/reencrypt": {"anyOf": [_MOVE, _items("ReencryptBatchRequest", _MOVE)]},
    "/wrap": _named("WrapRequest", _object("dek", "key_id")),
    "/unwrap": _named("UnwrapRequest", _request("wrapped", "key_id")),
    "/rewrap": _named("RewrapRequest", _object("key_id new_kek_hex")),
    "/rotate_kek": _either(
        _named("RotateRequest", _object("new_kek_hex", "dry_run")),
        _named("RotateToRequest", _object("new_kek_id", "dry_run")),
    ),
    "DELETE /deks/{key_id}": (
        _DELETE := _either(
            _named(
                "ScheduleDeletionRequest",
                _request("", "pending_days immediately", pending_days=_DAYS, immediately={"const": False}),
            ),
            _named(
                "ShredRequest",
                _request("immediately", "pending_days", immediately={"const": True}, pending_days=_NULL),
            ),
        )
    ),
    "/deks/{key_id}/disable": (_EMPTY := _named("EmptyRequest", _request(""))),
    "/deks/{key_id}/enable": _EMPTY,
    "/clock/accept": _EMPTY,
}

_BACKUP = _named("LastBackup", _object("file created_at sha256 checked_at"), "`checked_at`: see the manual.")
_STATUS = _object(
    "version state kek_id kek_version kek_since:string|null kek_age_seconds:number|null "
    "kek_max_age_days:integer|null workers:integer restarts:integer uptime_seconds:number "
    "disk_free_bytes:integer|null erasures_due:integer erasures_held kek_wraps:integer",
    deks=_named(
        "DekCounts",
        _object(
            "total:integer near_limit:integer spent:integer",
            by_kek=_map(_named("KekUse", _object("version:integer count:integer since"))),
        ),
    ),
    deletions=_named("Deletions", _object("scheduled:integer next_at:string|null")),
    audit=_named("AuditHead", _object("chain seq:integer")),
    memory=_named("Memory", _object("kind locked_bytes:integer required:boolean wipe_on_free:boolean")),
    hardening=_list(_named("Measure", _object("name ok:boolean detail"))),
    limits=_map(_named("Limit", _object("used:integer limit:integer|null"), "null: unlimited.")),
    backup={"anyOf": [_BACKUP, _NULL]},
    rotation={"anyOf": [_named("Rotation", _object("phase done:integer total:integer new_kek_id")), _NULL]},
)
_ROTATED = "status kek_id kek_version rewrapped:integer"

_ANSWERS: dict[str, Schema] = {
    "/create_dek_for_thread": _named("NewDek", _object("key_id wrapped kek_id kek_version")),
    "/get_wrapped": _WRAPPED,
    "/wrap": _WRAPPED,
    "/unwrap": _named("UnwrappedDek", _object("dek")),
    "/encrypt": _CIPHERTEXT,
    "/decrypt": _named(
        "DecryptedValue",
        _object("plaintext", plaintext={"anyOf": [_BASE64, _RAW_JSON]}),
        "Base64 of the message, or the message itself, for a call in the third dialect.",
    ),
    "POST /deks": _either(
        _DESCRIPTION,
        _named("ThirdDialectDek", _object("key_id wrapped_dek:object kek_id kek_version created_at")),
    ),
    "/encrypt_batch": _CIPHERTEXTS,
    "/decrypt_batch": _PLAINTEXTS,
    "/reencrypt": {"anyOf": [_CIPHERTEXT, _CIPHERTEXTS]},
    "GET /deks": _named("DekPage", _object("deks next_cursor:string|null", deks=_list(_DESCRIPTION))),
    "/clock/accept": _named("AcceptedClock", _object("status now trusted held", status={"const": "ok"})),
    "/readyz": _named(
        "Readiness", _object("ready reasons warnings", reasons=_list(_TEXT), warnings=_list(_TEXT))
    ),
    "/status": _named("Status", _STATUS, "null stands for what is not known, or not there."),
    "/rewrap": _named(
        "Rewrapped",
        _object("status key_id kek_id kek_version wrapped new_kek_id new_kek_version new_wrapped", "warning"),
    ),
    "/rotate_kek": _either(
        _named("Rotated", _object(_ROTATED + " backup", "warning")),
        _named("RotationRehearsed", _object(_ROTATED, by_kek=_map({"type": "integer"})), "A dry run."),
    ),
}

_QUERIES: dict[str, list[tuple[str, bool, Schema]]] = {
    "/get_wrapped": [("key_id", True, _KEY_ID)],
    "GET /deks": [
        ("cursor", False, _either(_KEY_ID, {"type": "string", "pattern": "^(~([0-9a-f]{2})+)?$"})),
        ("limit", False, {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}),
        ("thread_id", False, _THREAD_ID),
        ("unused_for", False, {"type": "integer", "minimum": 0, "maximum": 9_999_999_999}),
    ],
}


def document() -> Schema:
    paths: dict[str, Schema] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "progressdb-kms",
            "version": __version__,
            "description": "HTTP over a Unix socket; its permissions and the peer's UID say who may call.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://kms", "description": "Over the Unix socket; any Host will do."}],
        "security": [],
        "paths": paths,
        "components": {"schemas": dict(sorted(_NAMED.items()))},
    }


def _of(table: dict[str, Any], route: Route) -> Any:
    return table.get(f"{route.method} {route.path}", table.get(route.path))


def _operation(route: Route) -> Schema:
    operation: Schema = {
        "summary": _SUMMARIES[f"{route.method} {route.path}"],
        "operationId": _name_of(route),
        "parameters": _parameters(route),
        "responses": _responses(route),
    }
    request = _of(_REQUESTS, route) if route.method != "GET" else None
    if request is not None:
        required = request not in (_EMPTY, _DELETE)
        operation["requestBody"] = {"required": required, "content": {JSON: {"schema": request}}}
        if route.secret:
            operation["requestBody"]["description"] = f"At most {SECRET_BODY} bytes, no escapes in strings."
        if route.path in _RAW:
            operation["description"] = (
                f"Also with Content-Type {BINARY}: the body is the data, `key_id` in the query, the AAD as "
                f"base64 in the header X-KMS-AAD, and the answer is {BINARY}."
            )
    return operation


def _name_of(route: Route) -> str:
    """What a person would call it: the path where that is one word, else the operation."""
    word = route.path[1:]
    return word.partition(".")[0] if re.fullmatch(r"[a-z_]+(\.json)?", word) and word != "deks" else route.op


def _parameters(route: Route) -> list[Schema]:
    path = [("key_id", "path", True, _KEY_ID)] if "{" in route.path else []
    query = [(name, "query", needed, schema) for name, needed, schema in _of(_QUERIES, route) or ()]
    return [{"name": name, "in": place, "required": r, "schema": s} for name, place, r, s in path + query]


_ERRORS = {
    "400": "Malformed; `code` names the field",
    "403": "This UID may not make this call",
    "404": "No such key",
    "408": "The request came too slowly",
    "409": "In conflict with the state of the key or of the service",
    "410": "The key was shredded",
    "413": "The body is too long",
    "414": "The request target is too long",
    "415": "Neither JSON nor a raw body where one is taken",
    "422": "Does not open: wrong key, wrong AAD or changed data",
    "423": "The key is disabled or scheduled for deletion",
    "429": "Past the rate of a policy; `Retry-After` says for how long",
    "431": "The head of the request is too long",
    "500": "A defect; the daemon's log tells more",
    "503": "Not able now: audit log, store, or too many connections",
}


def _responses(route: Route) -> Schema:
    kind = {"/metrics": PROMETHEUS, "/health": TEXT, "/healthz": TEXT}.get(route.path, JSON)
    schema = _of(_ANSWERS, route)
    if schema is None:
        schema = (
            _DESCRIPTION if route.path.startswith("/deks") else {"type": "object"} if kind == JSON else _TEXT
        )
    success = "201" if (route.method, route.path) == ("POST", "/deks") else "200"
    responses: Schema = {
        success: {"description": "Done", "content": {kind.partition(";")[0]: {"schema": schema}}}
    }
    for status, text in _ERRORS.items():
        body = _ANSWERS["/readyz"] if (status, route.path) == ("503", "/readyz") else _ERROR
        responses[status] = {"description": text, "content": {JSON: {"schema": body}}}
    return responses


def text() -> str:
    """As the file has it: a line for each path and each model, so that a diff shows what changed."""
    whole = document()
    paths, models = _lines(whole.pop("paths")), _lines(whole.pop("components")["schemas"])
    return f'{{{_lines(whole)},\n"paths":{{{paths}}},\n"components":{{"schemas":{{{models}}}}}}}\n'


def _lines(members: Schema) -> str:
    return ",".join(f"\n{json_dumps(name)}:{json_dumps(value)}" for name, value in members.items())


if __name__ == "__main__":
    FILE.write_text(text(), encoding="ascii")
