"""A client for the daemon's socket.

    with Client("/run/progressdb-kms/kms.sock") as kms:
        dek = kms.create_dek("thread-1")
        box = kms.encrypt(dek.key_id, b"hello", aad=b"message 7")
        assert kms.decrypt(dek.key_id, box, aad=b"message 7") == b"hello"

- One `Client` serves any number of threads: each call borrows a keep-alive connection from a pool. A fork is
  noticed: the child opens its own connections.
- A call that fails raises a member of ClientError; `code` is stable, `message` is for people.
- A connection that the daemon closed while it lay idle is opened again, once a call. What may have been
  carried out already is repeated only where that does no harm; a create or a rotation never is.
- `retry_seconds` is a budget: so long a call is repeated, with growing pauses, while the daemon can't be
  reached, is too busy, or is not able now.
- A new KEK goes out from locked memory, never as `bytes` or `str`. What a caller encrypts, decrypts, wraps or
  unwraps is in the caller's own memory anyway.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Union
from urllib.parse import quote, urlencode

from ..crypto.aead import KEY_SIZE
from ..crypto.memory import LockedBuffer
from ..encoding import Buffer
from .handle import DekHandle, key_id_of_thread
from .results import Dek, Readiness, RotationResult, Usage, Wrapped, failure
from .transport import (
    BadAnswer,
    ClientError,
    ConnectionFailed,
    ListenerRefused,
    Pool,
    Reply,
    Request,
    bad_answer,
)

DEFAULT_SOCKET = "/tmp/progressdb-kms.sock"  # noqa: S108  # where the ProgressDB server looks, too

TIMEOUT = 30.0
"""Seconds without a byte from the daemon before a call fails; a rotation has no limit of its own."""

RAW_ABOVE = 64 * 1024
"""Bytes from which a payload travels as a raw body: base64 would cost a third more, and copies."""

MAX_RAW_AAD = 2048
"""Bytes of AAD that fit a header line safely; a longer one travels in JSON."""

MAX_RESPONSE = 257 * 1024 * 1024
"""Bytes of an answer that are read at most: what the largest max_body_bytes leads to. A wrong socket must
not fill the caller's memory."""

BATCH_ITEMS = 1000
BATCH_BYTES = 4 * 1024 * 1024
"""Items and payload bytes of one request of a batch: the daemon's item limit, and half of its default body
limit, since base64 adds a third."""

BUSY = (429, 503)
"""Statuses after which the same request may do better."""

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between two tries: doubled each time, half of it by chance, so that not all come back at once."""

Key = Union[str, bytes]
"""A key_id, or a wrapped DEK (then nothing is read from the daemon's store)."""

BatchResult = list[Union[bytes, ClientError]]
"""One entry an item, in order: the bytes, or why there are none."""


class Client:
    """Calls the daemon at `socket_path` (`unix://PATH` is taken too). Connects with the first call.

    `timeout`: seconds without a byte from the daemon, None for ever. `max_response`: bytes. `retry_seconds`:
    how long a call may be repeated in all, 0 for not at all. `server_uid`: the daemon's UID, where its socket
    lies in a folder that others may write to; see `listener`. `patient`: disable, enable and shred are waited
    for as long as the daemon answers others: in a fleet they may wait for a host that is dead.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str] = DEFAULT_SOCKET,
        *,
        timeout: float | None = TIMEOUT,
        max_response: int = MAX_RESPONSE,
        retry_seconds: float = 0.0,
        server_uid: int | None = None,
        patient: bool = False,
    ) -> None:
        path = os.fspath(socket_path)
        self.socket_path = path[len("unix://") :] if path.startswith("unix://") else path
        self._timeout = timeout
        self._patient = patient
        self._retry_seconds = retry_seconds
        self._pool = Pool(self.socket_path, max_response, server_uid)
        self._local = threading.local()

    def close(self) -> None:
        """Close the idle connections. The client may be used again: it opens new ones."""
        self._pool.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.socket_path!r})"

    @property
    def last_receipt(self) -> str:
        """The audit receipt of this thread's last call, `<chain>:<seq>:<16 hex digits>`; "" without one.

        Kept beside a message it is a witness: `progressdb-kms audit verify --receipts FILE`.
        """
        return str(getattr(self._local, "receipt", ""))

    @property
    def last_receipts(self) -> list[str]:
        """Of this thread's last batch: the receipt of the call that each item went by, in order."""
        return list(getattr(self._local, "receipts", ()))

    # ---- keys --------------------------------------------------------------------------------------

    def create_dek(self, thread_id: str, key_id: str | None = None) -> Dek:
        """Make a DEK. Without a key_id each call makes a new one, so it is never repeated after a lost
        connection; with one, the same thread gets the DEK that is there already."""
        fields = {"thread_id": thread_id, **({} if key_id is None else {"key_id": key_id})}
        return _dek(self._json("POST", "/deks", fields, repeatable=key_id is not None))

    def get_wrapped(self, key_id: str) -> Wrapped:
        return _wrapped(self._json("GET", "/get_wrapped?" + urlencode({"key_id": key_id}, safe=":")))

    def describe(self, key_id: str) -> Dek:
        return _dek(self._json("GET", _dek_path(key_id)))

    def list(
        self,
        thread_id: str | None = None,
        page_size: int = 1000,
        after: str = "",
        unused_for: int | None = None,
    ) -> Iterator[Dek]:
        """All DEKs, or those of a thread, in order of key_id; those behind the key_id `after`; those that are
        older than so many seconds and were not used since. Pages are asked for as they are needed."""
        cursor: str | None = after
        while cursor is not None:
            query = {"limit": str(page_size), "cursor": cursor or None, "thread_id": thread_id}
            if unused_for is not None:
                query["unused_for"] = str(unused_for)
            # A thread_id that is empty is asked for like any other, and refused: it does not mean all.
            wanted = {name: value for name, value in query.items() if value is not None}
            page = self._json("GET", "/deks?" + urlencode(wanted, safe=":"))
            yield from (_dek(row) for row in _field(page, "deks", list))
            following = page.get("next_cursor")
            cursor = str(following) if following else None

    def disable(self, key_id: str) -> Dek:
        return self._change("POST", _dek_path(key_id) + "/disable", {})

    def enable(self, key_id: str) -> Dek:
        """Take a disabled key into use again; cancels a scheduled deletion."""
        return self._change("POST", _dek_path(key_id) + "/enable", {})

    def shred(self, key_id: str, immediately: bool = False, pending_days: int | None = None) -> Dek:
        """Schedule a crypto-shred (in 7 days, or in 1 to 365 `pending_days`), or do it at once, for good.

        Where both are asked for nothing is done: raises RequestRefused."""
        fields: dict[str, Any] = {"immediately": True} if immediately else {}
        if pending_days is not None:
            fields["pending_days"] = pending_days
        return self._change("DELETE", _dek_path(key_id), fields or None)

    def _change(self, method: str, path: str, fields: dict[str, Any] | None) -> Dek:
        return _dek(self._json(method, path, fields, patient=self._patient))

    def dek(self, thread_id: str = "", *, key_id: str = "") -> DekHandle:
        """A handle for the DEK of a thread, which is made where there is none, or for one that is known.

        A thread's DEK is the one with the key_id `thread:<thread_id>` (`key_id_of_thread`), so that all who
        ask get the same. One of the thread that was made under another key_id, by ProgressDB or by
        `create_dek`, is not looked for: give that key_id.

        Raises KeyShredded where the thread's DEK was: what was deleted stays deleted.
        """
        if key_id:
            return DekHandle(self, key_id)
        return DekHandle(self, self.create_dek(thread_id, key_id_of_thread(thread_id)).key_id)

    # ---- data --------------------------------------------------------------------------------------

    def encrypt(self, key: Key, plaintext: Buffer, aad: bytes = b"") -> bytes:
        """Returns nonce | ciphertext | tag: 28 bytes more than the plaintext."""
        return self._crypt("encrypt", "plaintext", "ciphertext", key, plaintext, aad)

    def decrypt(self, key: Key, ciphertext: Buffer, aad: bytes = b"") -> bytes:
        """Raises AuthenticationFailed for another key, another AAD, or a changed bit."""
        return self._crypt("decrypt", "ciphertext", "plaintext", key, ciphertext, aad)

    def encrypt_batch(self, items: Iterable[tuple[Key, Buffer] | tuple[Key, Buffer, bytes]]) -> BatchResult:
        """Encrypt (key, plaintext[, aad]) items, in as few requests as the daemon's limits allow."""
        return self._batch("/encrypt_batch", "plaintext", "ciphertext", items)

    def decrypt_batch(self, items: Iterable[tuple[Key, Buffer] | tuple[Key, Buffer, bytes]]) -> BatchResult:
        """Decrypt (key, ciphertext[, aad]) items. One that fails leaves the others alone."""
        return self._batch("/decrypt_batch", "ciphertext", "plaintext", items)

    def reencrypt(
        self,
        key_id: str,
        new_key_id: str,
        ciphertext: Buffer,
        aad: bytes = b"",
        new_aad: bytes | None = None,
    ) -> bytes:
        """Move data from one key to another inside the daemon. `new_aad`: as `aad` where not given."""
        fields = {"key_id": key_id, "new_key_id": new_key_id, "ciphertext": _b64(ciphertext)}
        if aad:
            fields["aad"] = _b64(aad)
        target = aad if new_aad is None else new_aad
        if aad or target:
            fields["new_aad"] = _b64(target)
        return _bytes(self._json("POST", "/reencrypt", fields), "ciphertext")

    def wrap(self, dek: Buffer, key_id: str | None = None) -> Wrapped:
        """Wrap a 32-byte DEK of the caller's, bound to `key_id` (generated where not given)."""
        fields = {"dek": _b64(dek), **({} if key_id is None else {"key_id": key_id})}
        return _wrapped(self._json("POST", "/wrap", fields))

    def unwrap(self, wrapped: bytes) -> bytes:
        """The plaintext DEK: from here on it is the caller's to protect."""
        return _bytes(self._json("POST", "/unwrap", {"wrapped": _b64(wrapped)}), "dek")

    # ---- KEKs --------------------------------------------------------------------------------------

    def rewrap(self, key_id: str, new_kek: Buffer) -> Wrapped:
        """Move one DEK to another KEK (32 bytes, best a view on locked memory)."""
        start = json.dumps({"key_id": key_id})[:-1] + ', "new_kek_hex": "'
        return _wrapped(self._with_kek("/rewrap", start, new_kek, '"}', repeatable=True))

    def rotate_kek(self, new_kek: Buffer, dry_run: bool = False) -> RotationResult:
        """Move all DEKs to a new KEK. Returns when it is done, however long that takes; see `status`."""
        end = '", "dry_run": true}' if dry_run else '"}'
        found = self._with_kek("/rotate_kek", '{"new_kek_hex": "', new_kek, end, repeatable=dry_run)
        return _rotated(found)

    def rotate_to(self, kek_id: str, dry_run: bool = False) -> RotationResult:
        """In a fleet: the same, to a KEK that every host has in next_master_keys."""
        body = json.dumps({"new_kek_id": kek_id, "dry_run": dry_run}).encode()
        headers = {"Content-Type": "application/json"}
        reply = self._exchange(Request("POST", "/rotate_kek", body, headers, None, repeatable=True))
        return _rotated(_parse(_check(reply)))

    # ---- the service -------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        return self._json("GET", "/status")

    def accept_clock(self) -> dict[str, Any]:
        """Let the daemon trust the wall clock as it stands, so that scheduled deletions go on."""
        return self._json("POST", "/clock/accept", {})

    def healthy(self) -> bool:
        """True where something answers `/healthz` with 200; never raises for a daemon that is down."""
        try:
            return self._exchange(Request("GET", "/healthz", timeout=self._timeout)).status == 200
        except ClientError:
            return False

    def ready(self) -> Readiness:
        """Whether the service can do all of its work. Raises ConnectionFailed where it doesn't run."""
        reply = self._exchange(Request("GET", "/readyz", timeout=self._timeout))
        if reply.status not in (200, 503):
            raise failure(reply.status, _error(reply))
        found = _parse(reply)
        error = found.get("error")
        reasons = [str(reason) for reason in found.get("reasons") or ()]
        if not reasons and isinstance(error, dict):
            reasons = [str(error.get("message", ""))]
        warnings = [str(warning) for warning in found.get("warnings") or ()]
        return Readiness(reply.status == 200, reasons, warnings)

    def metrics(self) -> str:
        """Prometheus text."""
        return self._checked(Request("GET", "/metrics", timeout=self._timeout)).body.decode(
            "utf-8", "replace"
        )

    # ---- requests ----------------------------------------------------------------------------------

    def _crypt(self, op: str, give: str, take: str, key: Key, data: Buffer, aad: bytes) -> bytes:
        if isinstance(key, str) and len(data) > RAW_ABOVE and len(aad) <= MAX_RAW_AAD:
            return self._raw(f"/{op}?" + urlencode({"key_id": key}, safe=":"), data, aad)
        return _bytes(self._json("POST", "/" + op, _item(give, key, data, aad)), take)

    def _raw(self, path: str, data: Buffer, aad: bytes) -> bytes:
        headers = {"Content-Type": "application/octet-stream", **({"X-KMS-AAD": _b64(aad)} if aad else {})}
        body = data if isinstance(data, bytes) else memoryview(data)
        reply = self._checked(Request("POST", path, body, headers, timeout=self._timeout))
        if reply.kind != "application/octet-stream":
            raise bad_answer(f"it is {reply.kind or 'of no type'} instead of application/octet-stream")
        return reply.body

    def _batch(self, path: str, give: str, take: str, items: Iterable[tuple[Any, ...]]) -> BatchResult:
        results: BatchResult = []
        self._local.receipts = receipts = list[str]()
        for group in _groups(items):
            fields = {"items": [_item(give, key, data, *aad) for key, data, *aad in group]}
            answers = _field(self._json("POST", path, fields), "items", list)
            if len(answers) != len(group):
                raise bad_answer(f"it has {len(answers)} items instead of {len(group)}")
            results += [_result(answer, take) for answer in answers]
            receipts += [self.last_receipt] * len(group)
        return results

    def _json(
        self,
        method: str,
        path: str,
        fields: Mapping[str, Any] | None = None,
        *,
        repeatable: bool = True,
        patient: bool = False,
    ) -> dict[str, Any]:
        body = None if fields is None else json.dumps(fields, separators=(",", ":")).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = Request(method, path, body, headers, self._timeout, repeatable, patient)
        return _parse(self._checked(request))

    def _with_kek(self, path: str, start: str, kek: Buffer, end: str, repeatable: bool) -> dict[str, Any]:
        """POST a body that holds a KEK as hex; it is put together in locked memory and wiped."""
        if len(kek) != KEY_SIZE:
            raise ValueError(f"a KEK has {KEY_SIZE} bytes")
        head, tail = start.encode(), end.encode()
        size = len(head) + 2 * KEY_SIZE + len(tail)
        with LockedBuffer(size) as memory:
            body = memory.view
            body[: len(head)] = head
            hex_into(kek, body[len(head) : len(head) + 2 * KEY_SIZE])
            body[size - len(tail) :] = tail
            headers = {"Content-Type": "application/json"}
            reply = self._exchange(Request("POST", path, body, headers, None, repeatable))
        return _parse(_check(reply))

    def _checked(self, request: Request) -> Reply:
        """Repeats within the budget what may be repeated."""
        until = time.monotonic() + self._retry_seconds
        pause = FIRST_PAUSE
        while True:
            wait = 0.0
            try:
                reply = self._exchange(request)
                if reply.status not in BUSY or not request.repeatable:
                    return _check(reply)
                wait, failed = reply.retry_after, failure(reply.status, _error(reply))
            except ConnectionFailed as error:
                again = request.repeatable or error.code == "connection_failed"
                if isinstance(error, ListenerRefused) or not again:
                    raise
                failed = error
            wait = max(wait, pause * random.uniform(0.5, 1.0))  # noqa: S311  # not for a secret
            if time.monotonic() + wait > until:
                raise failed
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _exchange(self, request: Request) -> Reply:
        self._local.receipt = ""
        reply = self._pool.exchange(request)
        self._local.receipt = reply.receipt
        return reply


# ---- fields ----------------------------------------------------------------------------------------


def hex_into(key: Buffer, out: memoryview) -> None:
    """Write a key as lower-case hex into a buffer of twice its size, by way of nothing else."""
    digits = b"0123456789abcdef"
    for i in range(len(key)):
        out[2 * i] = digits[key[i] >> 4]
        out[2 * i + 1] = digits[key[i] & 15]


def _dek_path(key_id: str) -> str:
    return "/deks/" + quote(key_id, safe=":")


def _item(name: str, key: Key, data: Buffer, aad: bytes = b"") -> dict[str, str]:
    fields = {"key_id": key} if isinstance(key, str) else {"wrapped": _b64(key)}
    fields[name] = _b64(data)
    if aad:
        fields["aad"] = _b64(aad)
    return fields


def _result(answer: Any, name: str) -> bytes | ClientError:
    if not isinstance(answer, dict):
        raise bad_answer("one of its items is not an object")
    return failure(0, answer["error"]) if "error" in answer else _bytes(answer, name)


def _groups(items: Iterable[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """Cut into requests of at most BATCH_ITEMS items, and of BATCH_BYTES where they have more than one."""
    group: list[tuple[Any, ...]] = []
    size = 0
    for item in items:
        if group and (len(group) == BATCH_ITEMS or size + len(item[1]) > BATCH_BYTES):
            yield group
            group, size = [], 0
        group.append(item)
        size += len(item[1])
    if group:
        yield group


def _b64(data: Buffer) -> str:
    return base64.b64encode(data).decode("ascii")


def _check(reply: Reply) -> Reply:
    if not 200 <= reply.status < 300:
        raise failure(reply.status, _error(reply))
    return reply


def _error(reply: Reply) -> Any:
    try:
        return _parse(reply).get("error")
    except BadAnswer:
        return None


def _parse(reply: Reply) -> dict[str, Any]:
    try:
        found = json.loads(reply.body)
    except (ValueError, RecursionError):
        raise bad_answer("it is not JSON") from None
    if not isinstance(found, dict):
        raise bad_answer("it is not a JSON object")
    return found


def _field(fields: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    value = fields.get(name)
    if not isinstance(value, kind):
        raise bad_answer(f"its field {name!r} is missing or of another type")
    return value


def _bytes(fields: Mapping[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(_field(fields, name, str), validate=True)
    except binascii.Error:
        raise bad_answer(f"its field {name!r} is not base64") from None


def _dek(fields: Mapping[str, Any]) -> Dek:
    return Dek(
        _field(fields, "key_id", str),
        _field(fields, "thread_id", str),
        _field(fields, "state", str),
        _field(fields, "kek_id", str),
        _field(fields, "kek_version", str),
        str(fields.get("created_at") or ""),
        str(fields.get("delete_at") or ""),
        str(fields.get("shredded_at") or ""),
        _bytes(fields, "wrapped") if "wrapped" in fields else b"",
        _usage(_field(fields, "usage", dict)) if "usage" in fields else None,
    )


def _usage(fields: Mapping[str, Any]) -> Usage:
    return Usage(
        _field(fields, "encrypts", int),
        _field(fields, "decrypts", int),
        str(fields.get("first_used_at") or ""),
        str(fields.get("last_used_at") or ""),
        _field(fields, "last_uid", int) if "last_uid" in fields else None,
    )


def _rotated(found: dict[str, Any]) -> RotationResult:
    return RotationResult(
        _field(found, "kek_id", str),
        _field(found, "kek_version", str),
        _field(found, "rewrapped", int),
        str(found.get("backup") or ""),
        dict(found.get("by_kek") or {}),
        str(found.get("warning") or ""),
    )


def _wrapped(fields: Mapping[str, Any]) -> Wrapped:
    version = _field(fields, "kek_version", str)
    return Wrapped(_bytes(fields, "wrapped"), _field(fields, "kek_id", str), version)
