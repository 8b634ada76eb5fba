"""Callers of a fleet's daemons, who write down what they asked and were told: a history for `checker`.

Each caller makes DEKs, uses them on any host, disables, enables and shreds them; it knows no more of the
others than which DEKs there are. A DEK is used once its create was acknowledged: before that nobody promises
anything of it. What was encrypted is kept, and decrypted again on any host, for good."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

from tests.harness.daemon import Daemon
from tests.harness.wire import Reply, Session, b64

from .checker import ABSENT, DISABLED, ENABLED, OTHER, SHREDDED, Op

TEXT = b"what was said"

FOUND = {200: ENABLED, 404: ABSENT, 410: SHREDDED, 422: OTHER, 423: DISABLED}
"""What an answer to a use says of the DEK. Others say nothing."""

CHANGES = {"disable": DISABLED, "enable": ENABLED, "shred": SHREDDED}


class Deks:
    """Those that were acknowledged, and a ciphertext under each, which never changes."""

    def __init__(self, recent: int) -> None:
        """`recent`: of how many of the newest most uses are; any may be chosen."""
        self._lock = threading.Lock()
        self._recent = recent
        self.names: list[str] = []
        self.sealed: dict[str, str] = {}

    def add(self, key_id: str) -> None:
        with self._lock:
            self.names.append(key_id)

    def choose(self, rng: random.Random) -> str:
        with self._lock:
            among = self.names if rng.random() < 0.1 else self.names[-self._recent :]
            return rng.choice(among) if among else ""

    def keep(self, key_id: str, sealed: str) -> None:
        with self._lock:
            self.sealed.setdefault(key_id, sealed)


class Caller(threading.Thread):
    """`rest`: seconds between two calls; `patience`: those after which an answer is given up for lost."""

    def __init__(
        self, number: int, daemons: Sequence[Daemon], deks: Deks, seed: int, rest: float, patience: float
    ) -> None:
        super().__init__(daemon=True)
        self._number, self._daemons, self._deks = number, daemons, deks
        self._rest, self._patience = rest, patience
        self._rng = random.Random(seed * 1000 + number)
        self._sessions: list[Session | None] = [None] * len(daemons)
        self._made = 0
        self.history: list[Op] = []
        self.over = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.over.wait(self._rest):
                self._call()
        except BaseException as error:  # told by `Load`
            self.error = error
        finally:
            self.close()

    def close(self) -> None:
        for session in filter(None, self._sessions):
            session.close()

    def _call(self) -> None:
        key_id, rng = self._deks.choose(self._rng), self._rng
        at = rng.randrange(len(self._daemons))
        what = rng.choices(("use", "create", "disable", "enable", "shred"), (60, 8, 10, 14, 1))[0]
        if what == "create" or not key_id:
            self.create(at)
        elif what == "use":
            self.use(at, key_id)
        else:
            self.change(at, key_id, what)

    def create(self, at: int) -> None:
        self._made += 1
        key_id = f"c{self._number}-{self._made}"
        for _ in range(5):  # to repeat it is safe: the same DEK
            sent = time.monotonic()
            reply = self._ask(at, "POST", "/deks", {"key_id": key_id, "thread_id": "t"})
            known = reply is not None and reply.status in (200, 201)
            self._write_down(at, key_id, sent, ENABLED, writes=True, known=known)
            if known:
                self._deks.add(key_id)
                return
            at = self._rng.randrange(len(self._daemons))
            if self.over.wait(0.1):
                return

    def use(self, at: int, key_id: str) -> bool:
        """Was it answered?"""
        sealed = self._deks.sealed.get(key_id)
        path = "/decrypt" if sealed else "/encrypt"
        body = {"key_id": key_id, **({"ciphertext": sealed} if sealed else {"plaintext": b64(TEXT)})}
        sent = time.monotonic()
        reply = self._ask(at, "POST", path, body)
        state = FOUND.get(reply.status) if reply is not None else None
        if reply is None or state is None:
            return False
        if state == ENABLED and not sealed:
            self._deks.keep(key_id, json.loads(reply.body)["ciphertext"])
        elif state == ENABLED and json.loads(reply.body)["plaintext"] != b64(TEXT):
            state = OTHER
        self._write_down(at, key_id, sent, state)
        return True

    def change(self, at: int, key_id: str, what: str) -> None:
        sent = time.monotonic()
        if what == "shred":
            reply = self._ask(at, "DELETE", f"/deks/{key_id}", {"immediately": True})
        else:
            reply = self._ask(at, "POST", f"/deks/{key_id}/{what}", {})
        if reply is not None and reply.status in (404, 410):
            self._write_down(at, key_id, sent, FOUND[reply.status])
        elif reply is None or reply.status != 409:
            known = reply is not None and reply.status == 200
            self._write_down(at, key_id, sent, CHANGES[what], writes=True, known=known)

    def _write_down(
        self, at: int, key_id: str, sent: float, state: str, writes: bool = False, known: bool = True
    ) -> None:
        self.history.append(Op(key_id, sent, time.monotonic(), state, writes, known, f"host {at}"))

    def _ask(self, at: int, method: str, path: str, body: Any) -> Reply | None:
        """None: nobody knows what became of it."""
        try:
            session = self._sessions[at]
            if session is None:
                session = self._sessions[at] = Session(self._daemons[at].socket, self._patience)
            return session.request(method, path, body)
        except (OSError, http.client.HTTPException, EOFError):
            broken, self._sessions[at] = self._sessions[at], None
            if broken is not None:
                broken.close()
            return None


class Load:
    """In a `with` block: callers at work. `finish` afterwards, when all is well again."""

    def __init__(
        self, daemons: Sequence[Daemon], callers: int, seed: int, rest: float = 0.002, patience: float = 10.0
    ) -> None:
        self._daemons = daemons
        self._deks = Deks(40)
        self._callers = [Caller(n, daemons, self._deks, seed, rest, patience) for n in range(callers)]

    def __enter__(self) -> Load:
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *error: object) -> None:
        for caller in self._callers:
            caller.over.set()
        for caller in self._callers:
            caller.join(120)
        for caller in self._callers:
            assert not caller.is_alive() and caller.error is None, caller.error

    @property
    def calls(self) -> int:
        return sum(len(caller.history) for caller in self._callers)

    def history(self) -> list[Op]:
        return [op for caller in self._callers for op in caller.history]

    def finish(self, patience: float) -> list[Op]:
        """Ask each host for each DEK. Returns all of the history."""
        last = Caller(len(self._callers), self._daemons, self._deks, 0, 0.0, 10.0)
        deadline = time.monotonic() + patience
        for key_id in list(self._deks.names):
            for at in range(len(self._daemons)):
                while not last.use(at, key_id):
                    assert time.monotonic() < deadline, f"host {at} does not tell of {key_id}"
                    time.sleep(0.05)
        last.close()
        return self.history() + last.history
