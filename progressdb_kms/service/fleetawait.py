"""A host of a fleet starts whether its database is there or not: until it is, this stands in for the keeper.

Every job is answered at once, by why there is no store; a thread tries to open it, for ever. What waits and
what ends the daemon is told apart by the error: StoreUnavailable is mended by waiting (nobody answers, no
primary, it starts up, no connection is left, its disk is full). Whatever an operator has to mend (the
configuration, keys, TLS, the password, a fleet of another schema or one that was put back) is raised by
`round`, also when it is found out after an hour: to try that again would only hide it."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from typing import Callable

from ..errors import StoreUnavailable
from ..fleet.engine import UNREACHABLE
from .channel import answer, receive
from .keeper import Keeper

log = logging.getLogger("progressdb_kms")

FIRST_SECONDS = 30.0
"""How long a start waits for a try that neither works nor fails, before it listens without a store."""

REMIND_SECONDS = 900.0
"""How often the journal is told of what is still away; of another reason at once."""

END_SECONDS = 2.0
"""How long the end waits for a try that is under way. Cut off, it is as a kill -9 at a start."""


class Awaiting:
    """Where a Keeper is expected."""

    def __init__(
        self,
        open_it: Callable[[], tuple[Keeper, int]],
        inbox: socket.socket,
        pause: float,
        opened: Callable[[int], None],
    ) -> None:
        """`open_it` makes the keeper and says the epoch of its chain, which `opened` is told; `pause`:
        seconds between two tries."""
        self._open_it, self._inbox, self._pause, self._opened = open_it, inbox, pause, opened
        self._keeper: Keeper | None = None
        self._found: tuple[Keeper, int] | None = None
        self._fatal: BaseException | None = None
        self._why = StoreUnavailable("the fleet's database was not reached yet", code=UNREACHABLE)
        self._begun, self._remind = time.monotonic(), 0.0
        self._tried, self._over = threading.Event(), threading.Event()
        self._woken, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._try, name="opening", daemon=True)
        self._thread.start()

    # ---- the thread that tries -------------------------------------------------------------------

    def _try(self) -> None:
        while not self._over.is_set():
            try:
                self._found = self._open_it()
                break
            except StoreUnavailable as error:
                self._failed(error)
            except BaseException as error:  # raised by `round`, in the process's own thread
                self._fatal = error
                break
            self._tried.set()
            self._over.wait(self._pause)
        self._tried.set()
        os.write(self._waker, b"!")

    def _failed(self, error: StoreUnavailable) -> None:
        now = time.monotonic()
        if error.message != self._why.message or now >= self._remind:
            log.error("no store yet, it is tried again for ever: %s", error.line)
            self._remind = now + REMIND_SECONDS
        self._why = error.bare()

    # ---- in a keeper's place ---------------------------------------------------------------------

    def first(self) -> tuple[Keeper | Awaiting, int]:
        """The keeper and its epoch, where the first try worked, else this and 0. Raises what no waiting
        mends."""
        self._tried.wait(FIRST_SECONDS)
        self._take()
        if self._keeper is not None and self._found is not None:
            return self._found
        return self, 0

    def _take(self) -> None:
        if self._keeper is not None:
            return
        if self._fatal is not None:
            raise self._fatal
        if self._found is not None:
            self._keeper, epoch = self._found
            self._opened(epoch)
            if self._remind:
                log.info("the fleet's store is there, after %d s", time.monotonic() - self._begun)

    def round(self, timeout: float, wakeup: int = -1) -> None:
        """As a keeper's."""
        if self._keeper is not None:
            return self._keeper.round(timeout, wakeup)
        watched = [self._inbox.fileno(), self._woken] + ([wakeup] if wakeup >= 0 else [])
        select.select(watched, [], [], timeout)
        why = self._why
        while (job := receive(self._inbox)) is not None:
            answer(job, StoreUnavailable(why.message, code=why.code, hint=why.hint))
        self._take()
        return None

    def reopen(self) -> None:
        """SIGHUP. Without a keeper there is no log that is open."""
        if self._keeper is not None:
            self._keeper.reopen()

    def close(self) -> None:
        self._over.set()
        self._thread.join(END_SECONDS)
        if self._keeper is None and self._found is not None:
            self._keeper = self._found[0]
        if self._keeper is not None:
            self._keeper.close()
