"""The wire API as a table of routes. A row says all that is decided before a byte of a body is read, and
names the function that turns the request into an answer.
"""

from __future__ import annotations

import pkgutil

from .. import __version__
from ..audit.log import fragment
from ..errors import MethodNotAllowed, NotFound
from . import batches, data, deks, gauges, keys
from .call import PROMETHEUS, TEXT, App, Call, Reply, Route
from .fields import MAX_ITEMS
from .http1 import Head
from .reading import answer, optional_fields_of


def health(app: App, call: Call) -> Reply:
    return Reply(200, b"ok", TEXT)


def ready(app: App, call: Call) -> Reply:
    found = app.service.readiness()
    value = {"ready": not found.reasons, "reasons": found.reasons, "warnings": found.warnings}
    return answer(value, 503 if found.reasons else 200)


def status(app: App, call: Call) -> Reply:
    return answer({"version": __version__, **app.service.status()})


def metrics(app: App, call: Call) -> Reply:
    return Reply(200, app.metrics.render(gauges.families(app)).encode("ascii"), PROMETHEUS)


_OPENAPI: bytes = pkgutil.get_data("progressdb_kms", "wire/openapi.json")  # type: ignore[assignment]
"""Made of this table by `tools.openapi`; read once, while the package can be read."""


def openapi_document(app: App, call: Call) -> Reply:
    return Reply(200, _OPENAPI)


def accept_clock(app: App, call: Call) -> Reply:
    optional_fields_of(call).end()
    done = app.service.change("accept_clock")
    call.details = fragment(now=done["now"], trusted=done["trusted"])
    return answer(done)


# ---- the table ---------------------------------------------------------------------------------------

SLACK = 1024
"""Bytes by which a body for /decrypt may be longer than one for /encrypt: nonce and tag as base64 (40), a
longer name of the field, and white space of another encoder."""

ITEM_SLACK, MOVE_SLACK = 64, 256
"""The same for an item of a batch; and for one of reencrypt, which names another key."""

ROUTES = (
    Route("GET", "/healthz", "", health),
    Route("GET", "/health", "", health),
    Route("GET", "/readyz", "", ready, waits=True),
    Route("GET", "/status", "", status, waits=True),
    Route("GET", "/metrics", "", metrics, waits=True),
    Route("GET", "/openapi.json", "", openapi_document),
    Route("POST", "/clock/accept", "accept_clock", accept_clock, admin=True, waits=True),
    Route("POST", "/create_dek_for_thread", "create_dek", deks.create_dek_for_thread, waits=True),
    Route("GET", "/get_wrapped", "get_wrapped", deks.get_wrapped),
    Route("POST", "/encrypt", "encrypt", data.encrypt),
    Route("POST", "/decrypt", "decrypt", data.decrypt, slack=SLACK, tokens=True),
    Route("POST", "/encrypt_batch", "encrypt_batch", batches.encrypt_batch, batch=True),
    Route("POST", "/decrypt_batch", "decrypt_batch", batches.decrypt_batch,
          batch=True, slack=MAX_ITEMS * ITEM_SLACK),
    Route("POST", "/reencrypt", "reencrypt", batches.reencrypt, batch=True, slack=MAX_ITEMS * MOVE_SLACK),
    Route("POST", "/wrap", "wrap", keys.wrap, secret=True),
    Route("POST", "/unwrap", "unwrap", keys.unwrap, admin=True, secret=True),
    Route("POST", "/rewrap", "rewrap", keys.rewrap, admin=True, secret=True, waits=True),
    Route("POST", "/rotate_kek", "rotate_kek", keys.rotate_kek, admin=True, secret=True, waits=True),
    Route("POST", "/deks", "create_dek", deks.create_dek, waits=True),
    Route("GET", "/deks", "list_deks", deks.list_deks, long=True),
    Route("GET", "/deks/{key_id}", "describe_dek", deks.describe_dek),
    Route("DELETE", "/deks/{key_id}", "delete_dek", deks.delete_dek, admin=True, waits=True),
    Route("POST", "/deks/{key_id}/disable", "disable_dek", deks.disable_or_enable, admin=True, waits=True),
    Route("POST", "/deks/{key_id}/enable", "enable_dek", deks.disable_or_enable, admin=True, waits=True),
)  # fmt: skip

_STATIC = {(r.method, r.path): r for r in ROUTES if "{" not in r.path}
_DYNAMIC = {(r.method, r.path.partition("}")[2]): r for r in ROUTES if "{" in r.path}


def find(head: Head) -> Route:
    """Raises NotFound, or MethodNotAllowed with the methods that the path knows."""
    method = "GET" if head.method == "HEAD" else head.method
    route = _find(method, head.path)
    if route is None:
        allowed = sorted({r.method for r in ROUTES if _find(r.method, head.path)})
        if allowed:
            allow = ", ".join(allowed + (["HEAD"] if "GET" in allowed else []))
            raise MethodNotAllowed(f"{head.path[:80]} does not know {head.method}", allow=allow)
        raise NotFound("there is nothing at this path", hint="GET /openapi.json lists what there is")
    return route


def _find(method: str, path: str) -> Route | None:
    parts = path.split("/")
    if len(parts) < 3 or parts[1] != "deks" or not parts[2]:
        return _STATIC.get((method, path))
    return _DYNAMIC.get((method, "".join("/" + part for part in parts[3:])))
