"""Can all of the service's work be done? Whoever asks is told, and the journal where it changes.

- Whether the store can be written is tried with every change; after one that failed, with growing pauses.
- The files that are open must be those that the next start would find. Where they aren't, nothing is written
  any more (see `store.watch`). Where it is the database itself that is gone, what is open is written to a new
  file while the daemon lives: with its end all is lost that no backup has.
- Commands beside the daemon learn from kms.lock which files are its own.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

from ..encoding import timestamp
from ..errors import AuditUnavailable, KMSError, StoreUnavailable
from ..journal import NAMED, Chore, Matter
from ..pause import Pause
from ..store.sqlite import FILE_NAME
from .anchors import Anchors
from .clock import REMEDY
from .common import Common
from .keks import Keks
from .lock import Files, publish
from .usage import near

log = logging.getLogger(__name__)

WRITE_PAUSES = 1.0, 30.0
"""How often a row is tried after writing one failed."""

PROVED_SECONDS = 1.0
"""So long a row that was written tells that one can be: who asks again and again takes no disk flushes from
those who change something."""

REMIND_SECONDS = 86400.0
"""How often the journal is told of a KEK that is older than kek_max_age_days."""


class Health:
    """The keeper's. `writing`: whether the last change could be made."""

    def __init__(self, common: Common, keks: Keks, anchors: Anchors) -> None:
        self._store, self._data_dir, self._audit = common.store, common.data_dir, common.audit
        self._clock, self._time = common.time.clock, common.time
        self._keks, self._anchors = keks, anchors
        self.writing = Pause(*WRITE_PAUSES)
        self._rescuing = Chore("don't stop the daemon: what it holds can't be rescued now", WRITE_PAUSES)
        self._outage = Matter("not ready: %s", "ready again")
        self._rescued = ""
        self._rescuer: threading.Thread | None = None
        self._published: Files = {}
        self._next_reminder = self._next_probe = 0.0

    # ---- can the store be written? ---------------------------------------------------------------

    def ready(self) -> dict[str, Any]:
        """What keeps the service from doing all of its work, in words."""
        audit = list(self._audit.reasons())
        reasons, warnings = self._keks.look(self._clock.now())
        if held := self._time.look().held:
            warnings.append(f"scheduled deletions are held: {held} ({REMEDY})")
        if not (store := self._probe()):  # else it may not be readable either
            warnings += near(self._store.heavy())[:NAMED]
        told = {"reasons": audit + reasons + store, "warnings": warnings}
        return {**told, "audit_writable": not audit, "store_writable": not store}

    def _probe(self) -> list[str]:
        """Why no row can be written: a full disk lets an empty transaction pass. Not tried where one was
        written a moment ago, and all is well as far as it is known."""
        if self._clock.monotonic() < self._next_probe and not (self.writing.why or self._store.trouble()):
            return []
        try:
            with self._store.transaction():
                self._store.write("probe", {"at": timestamp(self._clock.now())})
                self._anchors.write()
        except StoreUnavailable as error:
            self.failed(error)
            rescue = self._store.lost() and (self._rescued or self._rescuing.why)
            return [error.message, *filter(None, [rescue])]
        self.writing.worked()
        self._next_probe = self._clock.monotonic() + PROVED_SECONDS
        return []

    def failed(self, error: KMSError) -> None:
        """A change was not made. Files that are gone are no reason any more once they are there again."""
        if not self._store.lost():
            self.writing.failed(error.line)

    def tell(self) -> None:
        """One line where the service stops being ready, and one where it is again; never one a call."""
        audit = ""
        try:
            self._audit.check()
        except AuditUnavailable as error:
            audit = error.line
        if self.writing.why and self.writing.over():
            self._probe()
        self._outage.tell(audit, self._store.lost() or self.writing.why or self._store.trouble())

    def _remind(self) -> None:
        """Of a KEK that is too old: when it has become that, and each day after."""
        why, now = self._keks.overdue(self._clock.now()), self._clock.monotonic()
        if not why:
            self._next_reminder = now
        elif now >= self._next_reminder:
            self._next_reminder = now + REMIND_SECONDS
            log.warning("%s", why)

    # ---- are the files in their places? ----------------------------------------------------------

    def look(self) -> None:
        """Are the files that are open those that the next start would find? If not, rescue what is open."""
        self._remind()
        why, alone = self._store.lost(), self._rescuer is None or not self._rescuer.is_alive()
        if self._rescued and not why:
            log.warning("the store's files are there again: remove what was rescued, it is behind now")
            self._rescued = ""
        if self._rescuing.why and not why and alone:
            self._rescuing.attend(lambda: None)  # there is nothing to be rescued any more
        if why.startswith(FILE_NAME) and not self._rescued and alone and self._rescuing.over():
            self._rescuer = threading.Thread(target=self._rescuing.attend, args=[self._rescue])
            self._rescuer.start()
        if not why and self._published != self._store.files():
            with contextlib.suppress(OSError):  # commands beside the daemon are not told, then
                publish(self._data_dir, self._store.files())
                self._published = self._store.files()

    def _rescue(self) -> None:
        """In a thread, since it may be long: meanwhile no transaction is begun. Tried until it is done."""
        file = self._store.rescue(self._clock.now())
        self._rescued = (
            f"what the daemon held is in {file}: put the store's files back, or mount their file system, and "
            f"it goes on; else stop it, then `progressdb-kms restore {file}`"
        )
        log.error("%s", self._rescued)

    def close(self) -> None:
        """Before the store is closed."""
        if lost := self._store.lost():
            self.look()
        if self._rescuer is not None:
            self._rescuer.join()
            if lost and self._rescuing.why:
                self._rescuing.attend(self._rescue)
