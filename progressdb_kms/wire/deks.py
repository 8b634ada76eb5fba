"""The routes of DEKs: made, shown, listed, disabled, shredded. None of these bodies carries a secret."""

from __future__ import annotations

import os
import re
from typing import Any

from ..audit.log import fragment, key_fragment
from ..crypto import aead
from ..crypto.aead import KEY_SIZE, NONCE_SIZE, Aead
from ..encoding import KEY_ID, json_dumps, new_key_id, timestamp, wall
from ..errors import AuthenticationFailed, BadRequest, Conflict
from ..service.deks import describe
from ..service.usage import TOUCHED, describe_usage
from ..store.contract import DekRecord, Usage
from ..store.policy import DAMAGED, SHREDDED
from .call import DEFAULT_PAGE, MAX_PAGE, App, Call, Reply
from .fields import checked_key_id, checked_thread_id
from .reading import answer, answer_blob, fields_of, known_query, optional_fields_of, path_key_id, query_dek

MAX_LOOKS = 20
"""Pages of the store that one call for a page looks through, where policies hide some of it."""

LOOK = 50
"""Rows that are read at a time: a millisecond of work, after which others are let in."""


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
    entry = query_dek(app, call)
    app.service.uses.add(TOUCHED, (entry.wrapped.key_id,), call.peer.uid)
    return answer_blob(entry.wrapped.blob, entry.wrapped.kek_id, entry.kek_version)


def list_deks(app: App, call: Call) -> Reply:
    known_query(call, "cursor", "limit", "thread_id", "unused_for")
    cursor, limit, thread_id = (call.head.query.get(name) for name in ("cursor", "limit", "thread_id"))
    size = DEFAULT_PAGE if limit is None else int(limit) if re.fullmatch("[0-9]{1,4}", limit) else 0
    if not 1 <= size <= MAX_PAGE:
        raise BadRequest.invalid("limit", f"must be a whole number from 1 to {MAX_PAGE}")
    if thread_id is not None:
        checked_thread_id(thread_id)
    since = _unused_since(call)
    if cursor:  # the last, since it may be as it should and still be of another run
        veiled = re.fullmatch("~([0-9a-f]{2})+", cursor)
        cursor = _unveiled(cursor) if veiled else checked_key_id(cursor, "cursor")
    shown, following = _visible(app, call, cursor or "", size, thread_id, since)
    text = f'{{"deks":[{",".join(shown)}],"next_cursor":{json_dumps(following)}}}'
    return Reply(200, text.encode("ascii"))


def _unused_since(call: Call) -> str | None:
    text = call.head.query.get("unused_for")
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,10}", text):
        raise BadRequest.invalid("unused_for", "must be a whole number of seconds")
    return timestamp(wall() - int(text))


def _unused(record: DekRecord, usage: Usage | None, since: str) -> bool:
    """One that is younger than that time was no use to anybody yet, and is not meant; nor is one that is
    damaged, of which nobody knows."""
    last = timestamp(usage.last) if usage else ""
    return record.state not in (SHREDDED, DAMAGED) and max(record.created_at, last) < since


def _visible(
    app: App, call: Call, after: str, size: int, thread_id: str | None, since: str | None
) -> tuple[list[str], str | None]:
    """A page of what the peer may use, each as JSON, and where the next one begins; of what was not used
    `since` then. Where little of much is shown the page is short, or empty, and yet not the last: no call
    looks through the whole store."""
    shown: list[str] = []
    seen = 0
    while len(shown) < size and seen < MAX_LOOKS * size:
        look = min(size - len(shown), LOOK)
        records = app.service.page(after, look + 1, thread_id)
        more, records = len(records) > look, records[:look]
        usage = app.service.usage(records)
        for record in records:
            used = usage.get(record.key_id)
            asked_for = since is None or _unused(record, used, since)
            if asked_for and (not call.rights or call.rights.sees(record.key_id, record.thread_id)):
                shown.append(json_dumps({**describe(record), **describe_usage(record, used)}))
        if not more:
            return shown, None
        after, seen = records[-1].key_id, seen + look
        call.breathe()
    return shown, _cursor(after, bool(call.rights) and len(shown) < size)  # of a full one the last was shown


_VEIL = os.urandom(KEY_SIZE)
"""Of all workers of this run, which fork from who made it. It hides names; no key is under it."""


def _cursor(key_id: str, veiled: bool = False) -> str:
    """Veiled where it goes to somebody who may not see the DEK where it stands, and where a damaged row there
    has a name that no DEK can have."""
    if not veiled and KEY_ID.fullmatch(key_id):
        return key_id
    nonce = os.urandom(NONCE_SIZE)
    return "~" + (nonce + aead.seal(Aead(memoryview(_VEIL)), nonce, key_id.encode(), b"")).hex()


def _unveiled(cursor: str) -> str:
    try:
        return aead.open(Aead(memoryview(_VEIL)), bytes.fromhex(cursor[1:]), b"").decode()
    except (ValueError, AuthenticationFailed):
        raise Conflict("the cursor is of another run: list from the start", code="wrong_cursor") from None


def describe_dek(app: App, call: Call) -> Reply:
    record = app.service.record(path_key_id(app, call))
    used = app.service.usage([record]).get(record.key_id)
    return answer({**describe(record), **describe_usage(record, used)})


def disable_or_enable(app: App, call: Call) -> Reply:
    optional_fields_of(call).end()
    action = call.head.path.rpartition("/")[2]
    return answer(app.service.change("transition", key_id=path_key_id(app, call), action=action))


def delete_dek(app: App, call: Call) -> Reply:
    key_id = path_key_id(app, call)
    fields = optional_fields_of(call)
    now = fields.flag("immediately")
    days = fields.integer("pending_days", 1, 365, 0)
    fields.end()
    if now and days:  # one of the two is a mistake, and what is shredded stays so
        raise BadRequest("immediately and pending_days contradict each other", code="invalid_pending_days")
    call.details = fragment(immediately=now)
    action = "shred" if now else "schedule_deletion"
    done = app.service.change("transition", key_id=key_id, action=action, days=days or 7)
    call.details = fragment(immediately=now, delete_at=done.get("delete_at"))
    return answer(done)
