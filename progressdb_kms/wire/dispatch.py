"""The way through: hold the peer against the rules, run the route's function, write the audit record, and
only then give the answer back. An error is an answer too.
"""

from __future__ import annotations

import itertools
import logging
import time

from ..audit.log import Fragment, fragment
from ..crypto.memory import wipe
from ..encoding import json_dumps
from ..errors import KMSError, LengthRequired, PeerRefused, PolicyRefused, UnsupportedMediaType, for_peer
from ..rules import Peer, Rights
from .call import App, Call, Reply, Route
from .http1 import Head

log = logging.getLogger(__name__)

_request_numbers = itertools.count(1)


def admit(app: App, route: Route, head: Head, peer: Peer, rights: Rights | None) -> None:
    """Judge a request by its head, before its body is read. Raises PeerRefused (also as PolicyRefused),
    UnsupportedMediaType, LengthRequired."""
    if peer.via:
        _no_browser(app, head)
    if rights and route.op:
        rights.check_operation(route.op)
        _, error = rights.spend(1)  # whatever comes of it: it costs a line of the audit log
        if error is not None:
            raise error
    if route.admin:
        app.service.rules.check(peer, True)
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


def dispatch(app: App, route: Route, call: Call, begun: float = 0.0) -> Reply:
    """Carry a request out, or what is left of it since it was `begun`. Always an answer, never an exception;
    the audit record is written before it."""
    started = begun or time.perf_counter()
    number = _number(app)
    outcome = "failed"
    try:
        reply = route.handler(app, call)
        outcome = "ok"
    except PolicyRefused as error:
        return refuse(app, route, call, error)
    except (KMSError, MemoryError) as error:
        reply = _answer_error(call, for_peer(error))
    except Exception as error:
        log.exception("request %s (%s) failed", number, route.path)
        reply = _answer_error(call, for_peer(error, number))
    if route.op:
        reply = _recorded(app, route, call, reply, outcome, number)
    app.service.counters.request(route.op or "service", reply.status, time.perf_counter() - started)
    return reply


def refuse(app: App, route: Route, call: Call, error: PeerRefused) -> Reply:
    """What dispatch does for a peer that `admit` refused: nothing, on the record. What a policy refuses may
    come in thousands: it is counted, and recorded as one."""
    reply = _answer_error(call, error)
    if isinstance(error, PolicyRefused):
        app.denied(call.peer, error, route.op or "connect")
    elif route.op:
        app.service.counters.add("refused_peers", 1)
        reply = _recorded(app, route, call, reply, "refused", _number(app))
    app.service.counters.request(route.op or "service", reply.status, 0.0)
    return reply


def _number(app: App) -> str:
    """The request's id: each process has a chain of its own, and none is used again."""
    return f"{app.service.audit.chain}-{next(_request_numbers)}"


def _recorded(app: App, route: Route, call: Call, reply: Reply, outcome: str, number: str) -> Reply:
    """The reply with its receipt; an error in its place where it can't be recorded: no record, no answer."""
    about = Fragment(f'{call.key}{call.peer_fragment},"request_id":"{number}"{call.details}')
    try:
        reply.receipt = app.service.audit.record(route.op, outcome, reply.status, about)
    except (KMSError, MemoryError) as error:
        if reply.secret:
            wipe(memoryview(reply.body))
        return error_reply(for_peer(error))
    return reply


def _answer_error(call: Call, error: KMSError) -> Reply:
    call.details = Fragment(call.details + fragment(code=error.code))
    return error_reply(error)


def error_reply(error: KMSError) -> Reply:
    """What a peer hears of an error."""
    body: dict[str, str] = {"code": error.code, "message": error.message}
    if error.hint:
        body["hint"] = error.hint
    text = json_dumps({"error": body}).encode("ascii")
    return Reply(error.status, text, extra=error.header, close=error.close)
