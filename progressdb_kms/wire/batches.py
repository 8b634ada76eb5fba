"""Many messages in one call: `encrypt_batch`, `decrypt_batch`, and `reencrypt`, which takes one or many.

Page by page, so that a long batch is never there as text, items and results at once, and lets others in
between. An item that is malformed or failed has an error in its place; one audit record tells of all.
"""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Iterator, Sequence
from typing import Any, Callable, NamedTuple, TypeVar

from ..audit.log import Fragment, fragment, key_fragment
from ..crypto.envelope import Wrapped
from ..encoding import b64encode_bytes, json_dumps
from ..errors import AuthenticationFailed, BadRequest, KMSError, PolicyRefused
from ..service.service import Batch, BatchItem, Results
from . import dialect
from .call import App, Call, Reply
from .fields import Fields
from .items import batch_items
from .reading import json_body, may_use

T = TypeVar("T")


def encrypt_batch(app: App, call: Call) -> Reply:
    return _batch(app, call, "plaintext", "ciphertext", app.service.encrypt_many)


def decrypt_batch(app: App, call: Call) -> Reply:
    return _batch(app, call, "ciphertext", "plaintext", app.service.decrypt_many)


Many = Callable[[Batch, memoryview, int], Results]
Page = Callable[[list[Any]], tuple[Sequence[Any], Results]]


def _batch(app: App, call: Call, given: str, wanted: str, work: Many) -> Reply:
    def carry_out(rows: list[Any]) -> tuple[Batch, Results]:
        items = _each(rows, lambda fields: (fields.source(), fields.data(given), fields.aad()))
        if call.rights:
            items = _permitted(app, call, items, lambda item: (item[0],))
        return items, work(items, call.scratch, call.peer.uid)

    pages = batch_items(json_body(call), given)
    if isinstance(pages, Fields):
        raise BadRequest.missing("items")
    return _batch_reply(app, call, wanted, pages, carry_out)


def _permitted(
    app: App, call: Call, items: Sequence[T | KMSError], sources: Callable[[T], Sequence[str | Wrapped]]
) -> list[T | KMSError]:
    """The items that the peer's policies allow; in place of the others, the errors. The first item's use was
    counted with the call."""
    results: list[T | KMSError] = []
    for item in items:
        try:
            for source in () if isinstance(item, KMSError) else sources(item):
                may_use(app, call, source if isinstance(source, str) else source.key_id)
            results.append(item)
        except PolicyRefused as error:
            call.denials |= {error.entry}
            results.append(error.bare())
    results = _within_rates(call, results)
    denied = sum(isinstance(item, PolicyRefused) for item in results)
    app.service.counters.add("policy_denials", denied)
    return results


def _within_rates(call: Call, items: list[T | KMSError]) -> list[T | KMSError]:
    asked = sum(not isinstance(item, KMSError) for item in items)
    assert call.rights is not None
    paid, call.paid = min(asked, call.paid), max(0, call.paid - asked)
    granted, error = call.rights.spend(asked - paid)
    granted += paid
    for index, item in enumerate(items):
        if error is not None and not isinstance(item, KMSError):
            granted -= 1
            if granted < 0:
                call.denials |= {error.entry}
                items[index] = error.bare()
    return items


def _each(rows: list[Any], read: Callable[[Fields], T]) -> list[T | KMSError]:
    """What `read` makes of each row; of a malformed one the error, which spoils no other. A row that is read
    already stays as it is."""
    results: list[T | KMSError] = []
    for row in rows:
        if type(row) is tuple:
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


def _batch_reply(app: App, call: Call, wanted: str, pages: Iterator[list[Any]], carry_out: Page) -> Reply:
    """`pages` of rows, each carried out before the next is read."""
    pieces: list[bytes] = []
    start, count, failed = b'{"items":[', 0, 0
    sources: set[str | Wrapped] = set()
    lead = b'{"%b":"' % wanted.encode("ascii")
    for rows in pages:
        items, results = carry_out(rows)
        # Whose DEK it is stands first, and behind data and AAD, of a move, that of the target.
        sources.update([one for item in items if isinstance(item, tuple) for one in item[::3]])
        failed += (bad := len(results) - list(map(type, results)).count(bytes))
        count += len(results)
        runs = [[one] for one in results] if bad else [results]
        pieces.append(start + b",".join([_rendered(lead, run) for run in runs]))
        start = b","
        call.breathe()
    denied = sorted(call.denials) or None
    keys = sorted({source if isinstance(source, str) else source.key_id for source in sources})
    call.details = fragment(count=count, failed=failed, keys=keys, denied_by=denied)
    app.service.counters.add("items", count)
    return Reply(200, pieces[0], rest=[*pieces[1:], b"]}"])


_BLANK = bytes(381)
"""Its text fills the 512 bytes of the stack in which `b2a_base64` makes short ones."""


def _rendered(lead: bytes, results: Sequence[Any]) -> bytes:
    """All of them are bytes, or it is an error alone. What `b2a_base64` leaves of the last on its stack is
    overwritten from the same place. Base64 has no line end but its last, which is cheaper to take away than
    to ask for none."""
    if isinstance(error := results[0], KMSError):
        return json_dumps({"error": {"code": error.code, "message": error.message}}).encode("ascii")
    *texts, _ = map(b2a_base64, [*results, _BLANK])
    return (lead + (b'"},' + lead).join(texts) + b'"}').replace(b"\n", b"")


class _Move(NamedTuple):
    """A ciphertext under one DEK, and the DEK and AAD that it shall be under."""

    source: str
    data: bytes
    aad: bytes
    target: str
    new_aad: bytes


def reencrypt(app: App, call: Call) -> Reply:
    """From one DEK to another; the plaintext never leaves the process."""
    fields = batch_items(json_body(call), "")
    if not isinstance(fields, Fields):  # but pages of them
        return _reencrypt_batch(app, call, fields)
    move = _move(fields)
    fields.end()
    call.key = key_fragment(move.source)
    for key_id in (move.source, move.target):
        may_use(app, call, key_id)
    call.details = fragment(new_key_id=move.target)
    (result,), embedded = _moved(app, call, [move])
    call.details = Fragment(call.details + fragment(embedded=embedded or None))
    if isinstance(result, KMSError):
        raise result
    return Reply(200, b'{"ciphertext":"%b"}' % b64encode_bytes(result))


def _reencrypt_batch(app: App, call: Call, rows: Iterator[list[Any]]) -> Reply:
    embedded = 0

    def carry_out(page: list[Any]) -> tuple[Sequence[_Move | KMSError], Results]:
        nonlocal embedded
        moves = _each(page, _move)
        if call.rights:
            moves = _permitted(app, call, moves, lambda move: (move.source, move.target))
        results, opened = _moved(app, call, moves)
        embedded += opened
        return moves, results

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
                try:
                    results[index] = app.service.open_embedded(sealed, call.scratch)
                    done += 1
                except KMSError as error:
                    results[index] = error.bare()
    return done


def _again(move: _Move | KMSError, opened: bytes | KMSError) -> BatchItem | KMSError:
    if isinstance(move, KMSError):
        return move
    return opened if isinstance(opened, KMSError) else (move.target, opened, move.new_aad)
