"""The service as a worker sees it: the one object with state, of which each worker process has its own.

It reads the store, borrows KEKs, runs `envelope` on locked scratch memory, and hands every change to the
keeper. What it remembers of the store are wrapped DEKs only, and only for the generation of the keyring in
which they were read: the keeper counts that up before it answers a change, so no worker acts on old state
after that answer.

Nothing here knows HTTP: arguments are checked values, errors are KMSErrors.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple, TypeVar, Union

from ..audit.log import AuditLog, Fragment, key_fragment
from ..crypto import aead, envelope
from ..crypto.aead import NONCE_SIZE, Aead
from ..crypto.envelope import Wrapped
from ..crypto.keyring import KekNotLoaded, Keyring, KeyringChanged, Loan
from ..encoding import Buffer, new_key_id, wall
from ..errors import AuthenticationFailed, BadRequest, Conflict, KeyNotFound, KMSError, Unavailable
from ..rules import PeerRules
from ..store.contract import KEK_ROW, DekRecord, Usage
from ..store.policy import DAMAGED, need_enabled
from ..store.sealed import Reader
from .channel import KeeperClient, Staged
from .clock import age
from .metrics import Block
from .usage import DECRYPTED, ENCRYPTED, NOBODY, TOUCHED, Uses, counts

YOUNG = 25_000
"""Wrapped DEKs that a worker remembers before it begins to forget, and at most twice as many: 40 MB."""

ATTEMPTS = 5
"""How often an operation is tried while KEKs change under it. Twice is rare, three times unheard of."""

T = TypeVar("T")


class Entry(NamedTuple):
    """What is remembered of a DEK that may be used. Of one that a caller brings nobody knows the thread."""

    generation: int
    thread_id: str | None
    kek_version: int
    wrapped: Wrapped
    fragment: Fragment


class Readiness(NamedTuple):
    """Reasons why the service can't do all of its work, none where it can; what the operator should see to
    before that comes; and whether log and store can be written."""

    reasons: list[str]
    warnings: list[str]
    audit_writable: bool
    store_writable: bool


Source = Union[str, Wrapped]
"""Which DEK: a stored one by its key_id, or one that a caller brings."""

BatchItem = tuple[Source, bytes, bytes]
"""One item of a batch: which DEK, what data, which AAD. No named tuple: making it took as long as a seal."""

Batch = Sequence[Union[BatchItem, KMSError]]
Results = list[Union[bytes, KMSError]]
Groups = dict[Source, list[int]]
"""Which of them are under a DEK."""
One = Callable[[Aead, bytes, bytes], bytes]
"""What is done with each of them: the cipher under its DEK, its data, its AAD."""
Openers = dict[str, Aead]
"""Ciphers under KEKs, by their kek_ids."""


class Service:
    families: Mapping[str, str] = {}  # metrics beside those of every service

    def __init__(
        self,
        reader: Reader,
        keyring: Keyring,
        audit: AuditLog,
        keeper: KeeperClient,
        rules: PeerRules,
        counters: Block,
        about: Callable[[], dict[str, Any]],
        embedded: bool = False,
        workers: int = 1,
    ) -> None:
        """`about` tells what only the daemon knows, for `status`: workers, memory, uptime."""
        self._reader = reader
        self.keyring = keyring
        self.audit = audit
        self._keeper = keeper
        self.rules = rules
        self.counters = counters
        self.about = about
        self._embedded = embedded
        self._young: dict[str, Entry] = {}
        self._old: dict[str, Entry] = {}  # what was young before; whatever is asked for is young again
        self._unknown: dict[str, int] = {}  # key_ids that only a caller's blob names, by generation
        self._anchored = 0, False
        self._turn: memoryview | None = None
        self._turn_opener: tuple[Loan, Aead] | None = None
        self.uses = Uses(audit.chain if audit else "", reader.heavy(), workers)

    # ---- finding a DEK -----------------------------------------------------------------------------

    def entry(self, key_id: str) -> Entry:
        """The DEK of this id, usable. Raises KeyNotFound, KeyDisabled, KeyShredded, and AuthenticationFailed
        where the row holds a DEK that is bound to another id."""
        generation = self.keyring.generation
        found = self._young.get(key_id)
        if found is not None and found.generation == generation:
            return found
        found = self._remembered(key_id) or usable(generation, self.record(key_id))
        if len(self._young) >= YOUNG:
            self._young, self._old = {}, self._young
        self._young[key_id] = found
        return found

    def _remembered(self, key_id: str) -> Entry | None:
        """What is good in this generation. Nearly always it is a young one, which `entry` sees by itself."""
        found = self._young.get(key_id) or self._old.get(key_id)
        return found if found is not None and found.generation == self.keyring.generation else None

    def record(self, key_id: str) -> DekRecord:
        """The row of this id, in whatever state. Raises KeyNotFound."""
        return self._reader.existing(key_id)

    def thread_of(self, key_id: str) -> str | None:
        """The thread of a DEK in whatever state; None where the store doesn't know it."""
        found = self._remembered(key_id) or self._reader.get(key_id)
        return found.thread_id if found is not None else None

    def allow(self, key_id: str) -> None:
        """What stands of this key_id in the store decides for a blob that a caller holds, too. One that the
        store doesn't know is a caller's own. Raises KeyDisabled, KeyShredded."""
        generation = self.keyring.generation
        if self._unknown.get(key_id) == generation:
            return
        try:
            self.entry(key_id)
        except KeyNotFound:
            if len(self._unknown) >= YOUNG:
                self._unknown.clear()
            self._unknown[key_id] = generation

    # ---- working under a DEK -----------------------------------------------------------------------

    def dek(self, source: Source) -> Entry:
        """The DEK that is meant, usable. Raises what `entry` and `allow` raise."""
        if isinstance(source, str):
            return self.entry(source)
        self.allow(source.key_id)
        return Entry(self.keyring.generation, None, 0, source, key_fragment(source.key_id))

    def begin_turn(self, scratch: memoryview) -> None:
        """Of many requests, one after another with this scratch memory: one cipher under a KEK serves all of
        them, as long as it is lent. It lasts until `end_turn`, which comes before anybody waits."""
        self._turn = scratch

    def end_turn(self) -> None:
        self._turn = self._turn_opener = None

    def _opener(self, loan: Loan, kek: memoryview, scratch: memoryview) -> Aead:
        if scratch is not self._turn:
            return Aead(kek)
        if self._turn_opener is None or self._turn_opener[0] is not loan:
            self._turn_opener = loan, Aead(kek)
        return self._turn_opener[1]

    def _unwrapped(self, dek: Entry, scratch: memoryview) -> memoryview:
        """The DEK, in `scratch`, which the caller wipes whatever comes of it. Looked up and unwrapped again
        where KEKs change meanwhile."""
        for _ in range(ATTEMPTS):
            try:
                loan = self.keyring.borrow(dek.wrapped.kek_id)
                with loan as kek:
                    opener = self._opener(loan, kek, scratch)
                    key = envelope.unwrap(opener, dek.wrapped, scratch)
                    del opener  # before its KEK's loan ends
                return key
            except (KeyringChanged, KekNotLoaded) as changed:
                dek = self.dek(dek.wrapped if dek.thread_id is None else dek.wrapped.key_id)
                if isinstance(changed, KekNotLoaded) and changed.kek_id == dek.wrapped.kek_id:
                    raise
        raise Unavailable("the keyring changes too fast", hint="try again")

    def _with_dek(self, dek: Entry, scratch: memoryview, work: Callable[..., T], *args: Any) -> T:
        """`work(cipher under the DEK, *args)`; the DEK is in `scratch` meanwhile, and wiped after."""
        try:
            return work(Aead(self._unwrapped(dek, scratch)), *args)
        finally:
            scratch[:] = _ZEROS

    def encrypt(
        self, dek: Entry, plaintext: Buffer, aad: bytes, scratch: memoryview, uid: int = NOBODY
    ) -> tuple[bytes, bytes]:
        """(nonce, ciphertext | tag) under the DEK. Raises Conflict where it has encrypted all it may."""
        key_id = dek.wrapped.key_id
        self.uses.check(key_id)
        nonce = os.urandom(NONCE_SIZE)
        sealed = self._with_dek(dek, scratch, aead.seal, nonce, plaintext, aad)
        self.uses.add(ENCRYPTED, (key_id,), uid)
        return nonce, sealed

    def decrypt(
        self, dek: Entry, message: Buffer, aad: bytes, scratch: memoryview, uid: int = NOBODY
    ) -> bytes:
        """Raises AuthenticationFailed: another DEK, another AAD or a changed bit."""
        opened = self._with_dek(dek, scratch, aead.open, message, aad)
        self.uses.add(DECRYPTED, (dek.wrapped.key_id,), uid)
        return opened

    def open_embedded(self, message: bytes, scratch: memoryview) -> bytes:
        """What ProgressDB's embedded mode sealed, under any loaded KEK. Raises AuthenticationFailed."""
        if not self._embedded:
            raise AuthenticationFailed(
                "this is a message of ProgressDB's embedded mode, sealed under the master key itself",
                code="embedded_message",
                hint="open_embedded_messages: true opens those, and /reencrypt moves them under a DEK",
            )
        for kek_id in self.keyring.kek_ids():
            try:
                with self.keyring.borrow(kek_id) as kek:
                    opened = envelope.open_embedded(kek, message, scratch)
            except (AuthenticationFailed, KekNotLoaded, KeyringChanged):
                continue
            finally:
                scratch[:] = _ZEROS
            self.counters.add("embedded_messages", 1)
            return opened
        raise AuthenticationFailed

    def encrypt_many(self, items: Batch, scratch: memoryview, uid: int = NOBODY) -> Results:
        return self._many(items, scratch, _encrypt_item, uid)

    def decrypt_many(self, items: Batch, scratch: memoryview, uid: int = NOBODY) -> Results:
        return self._many(items, scratch, aead.open, uid)

    def _many(self, items: Batch, scratch: memoryview, one: One, uid: int) -> Results:
        """Each DEK is unwrapped once; an item that fails spoils no other. Results in order: of an item
        that is an error already, that error.

        The active KEK is lent once for all of it, and serves with one cipher: without that, a page over many
        DEKs takes half as long again. Where it changed meanwhile, all is done again, each DEK for itself."""
        groups: Groups = defaultdict(list)
        results: Results = [_NOT_DONE] * len(items)
        for index, item in enumerate(items):
            if type(item) is tuple:
                groups[item[0]].append(index)
            else:
                results[index] = item  # type: ignore[assignment]
        try:
            active = self.keyring.active.kek_id
            with (loan := self.keyring.borrow(active)) as kek:
                openers = {active: self._opener(loan, kek, scratch)}
                names = self._each_dek(groups, items, scratch, one, results, openers)
                del openers  # before its KEK's loan ends
        except (KeyringChanged, KekNotLoaded):
            names = self._each_dek(groups, items, scratch, one, results, {})
        finally:
            scratch[:] = _ZEROS  # under that cipher, each DEK is written over the one before
        self.uses.add(ENCRYPTED if one is _encrypt_item else DECRYPTED, names, uid)
        return results

    def _each_dek(
        self, groups: Groups, items: Batch, scratch: memoryview, one: One, results: Results, openers: Openers
    ) -> list[str]:
        """The key_id of each item it worked for. A DEK whose KEK has no opener is unwrapped for itself."""
        names: list[str] = []
        for source, indices in groups.items():
            try:
                name = source if isinstance(source, str) else source.key_id
                if one is _encrypt_item:
                    self.uses.check(name)
                dek = self.dek(source)
                opener = openers.get(dek.wrapped.kek_id)
                if opener is None:
                    done = self._with_dek(dek, scratch, _each, items, indices, one, results)
                else:
                    key = envelope.unwrap(opener, dek.wrapped, scratch)
                    done = _each(Aead(key), items, indices, one, results)
                names += [name] * done
            except KMSError as error:
                for index in indices:
                    results[index] = error.bare()
        return names

    # ---- wrapping DEKs that the caller holds --------------------------------------------------------

    def wrap(self, dek: memoryview, key_id: str | None, uid: int = NOBODY) -> tuple[bytes, str, int, str]:
        """(blob, kek_id, kek_version, key_id). Without a key_id, a generated one is bound. Raises Conflict
        where the KEK has wrapped all it may."""
        if key_id is not None:
            self.allow(key_id)
        name = key_id or new_key_id(int(wall() * 1000), os.urandom(10))
        for _ in range(ATTEMPTS):
            active = self.keyring.active
            self.uses.check(KEK_ROW + active.kek_id)
            try:
                with self.keyring.borrow(active.kek_id) as kek:
                    blob = envelope.wrap(Aead(kek), active.kek_id, name, os.urandom(NONCE_SIZE), dek)
                self.uses.add(ENCRYPTED, (KEK_ROW + active.kek_id,), uid)
                return blob, active.kek_id, active.version, name
            except (KeyringChanged, KekNotLoaded):
                continue
        raise Unavailable("the keyring changes too fast", hint="try again")

    def unwrap(self, wrapped: Wrapped, scratch: memoryview, uid: int = NOBODY) -> memoryview:
        """The DEK, in `scratch`, which the caller wipes. A DEK that the store knows as disabled or
        shredded stays closed here too."""
        dek = self._unwrapped(self.dek(wrapped), scratch)
        self.uses.add(TOUCHED, (wrapped.key_id,), uid)
        return dek

    # ---- changes: the keeper makes them ---------------------------------------------------------------

    def change(
        self, op: str, timeout: float | None = 30.0, new_kek: Staged | None = None, **args: Any
    ) -> dict[str, Any]:
        """A job for the keeper. Refused before it is begun where it could not be recorded."""
        self.audit.check()
        return self._keeper.call(op, args, self.audit.head, timeout, new_kek)

    def ask(self, op: str) -> dict[str, Any]:
        """A question to the keeper."""
        return self._keeper.call(op, {}, None, 5.0)

    def anchor(self, last: bool = False) -> None:
        """Have kept in the store what moved since last time: the head of this worker's audit chain, and what
        was done under which key. `last`: all of that, however much it is, and that it is all."""
        more = True
        while more:
            head, uses = self.audit.head, self.uses.batch(wall())
            more = last and uses is not None
            anchored = head[1], self.audit.failing
            if anchored == self._anchored and uses is None and not last:
                return
            closed = head[0] if last and not more else ""
            failing = anchored[1] > self._anchored[1]  # nobody is ready, then, and the keeper tells it
            told = {"uses": uses or None, "closed": closed, "failing": failing}
            self._keeper.call("anchor", told, head, 5.0)
            self._anchored = anchored
            self.uses.taken(self._reader.heavy())

    # ---- listings ---------------------------------------------------------------------------------------

    def page(self, after: str, limit: int, thread_id: str | None) -> list[DekRecord]:
        """One damaged row keeps nobody from the others; it is listed as that."""
        found = self._reader.judged(after, limit, thread_id)
        return [record or DekRecord(key_id, "", b"", "", 0, "", DAMAGED) for key_id, record in found]

    def usage(self, records: Sequence[DekRecord]) -> dict[str, Usage]:
        """Of these DEKs those that were used; the last second may be missing."""
        return self._reader.usage([record.key_id for record in records])

    def stored(self) -> dict[str, Any]:
        """What the store tells, for `status` and the metrics; of uses the last second may be missing."""
        active, begun = self.keyring.active, self._reader.state().active
        seconds = age(begun.since, wall()) if begun else None
        keks, wraps = self._reader.keks(), KEK_ROW + active.kek_id
        near, spent = counts(self._reader.heavy())
        scheduled, first = self._reader.span("deletion:")
        return {
            "kek_id": active.kek_id,
            "kek_version": str(active.version),
            "kek_since": begun.since if begun and seconds is not None else None,
            "kek_age_seconds": seconds,
            "kek_wraps": self._reader.usage([wraps]).get(wraps, Usage()).encrypts,
            "deks": {
                "total": sum(row.deks for row in keks.values()),
                "by_kek": {
                    kek_id: {"version": row.version, "count": row.deks, "since": row.since}
                    for kek_id, row in keks.items()
                },
                "near_limit": near,
                "spent": spent,
            },
            "deletions": {"scheduled": scheduled, "next_at": first[9:].partition("|")[0] or None},
        }

    def status(self) -> dict[str, Any]:
        return {
            **self.stored(),
            "audit": {"chain": self.audit.chain, "seq": self.audit.head[1]},
            **self.about(),
            **self.ask("status"),
            "state": "not_ready" if self.readiness().reasons else "ready",
        }

    def readiness(self) -> Readiness:
        audit = self.audit.reasons()
        try:
            told = Readiness(**self.ask("ready"))
        except KMSError as error:
            told = Readiness([error.message], [], True, False)
        reasons = audit + told.reasons
        memory = self.about()["memory"]
        if memory["required"] and memory["kind"] == "unlocked":
            reasons.append("memory_lock is 'require', and memory is not locked")
        writable = told.audit_writable and not audit
        return told._replace(reasons=list(dict.fromkeys(reasons)), audit_writable=writable)


def usable(generation: int, record: DekRecord) -> Entry:
    """What is remembered of this row. Raises KeyDisabled, KeyShredded, AuthenticationFailed."""
    need_enabled(record.key_id, record.state)
    wrapped = envelope.stored(record.key_id, record.wrapped)
    fragment = key_fragment(record.key_id, record.thread_id)
    return Entry(generation, record.thread_id, record.kek_version, wrapped, fragment)


def _encrypt_item(cipher: Aead, data: bytes, aad: bytes) -> bytes:
    nonce = os.urandom(NONCE_SIZE)
    return nonce + aead.seal(cipher, nonce, data, aad)


def _each(
    cipher: Aead,
    items: Batch,
    indices: list[int],
    one: One,
    results: Results,
) -> int:
    """The items of one DEK, each for itself. How many it worked for."""
    done = len(indices)
    for index in indices:
        _, data, aad = items[index]  # type: ignore[misc]  # errors are in no group
        try:
            results[index] = one(cipher, data, aad)
        except KMSError as error:
            results[index] = error.bare()
            done -= 1
    return done


_ZEROS = bytes(envelope.SCRATCH_SIZE)
_NOT_DONE = Conflict("not done")


def wrapped_source(blob: bytes, key_id: str | None) -> Wrapped:
    """A blob that came inline. Raises BadRequest; a key_id given beside it must be the one in it."""
    try:
        wrapped = envelope.parse(blob)
    except ValueError as error:
        raise BadRequest.invalid("wrapped", str(error)) from None
    if key_id not in (None, wrapped.key_id):
        raise BadRequest.invalid("key_id", "is not the one that the wrapped DEK is bound to")
    return wrapped
