"""What a fault must not cost: DEKs that were acknowledged, each with a message that only it opens.

kept = Kept()
kept.create(session, 5)
…                        # the fault
kept.opens(session)      # every message opens
kept.verifies(daemon)    # stopped by this: `verify` and `audit verify` find nothing
"""

from __future__ import annotations

from .daemon import Daemon
from .wire import Session


class Kept:
    def __init__(self) -> None:
        self.sealed: dict[str, bytes] = {}

    @property
    def keys(self) -> list[str]:
        return list(self.sealed)

    def create(self, session: Session, count: int = 1) -> list[str]:
        made = []
        for _ in range(count):
            key_id = session.create_dek("thread")["key_id"]
            self.sealed[key_id] = session.encrypt(key_id, b"message of " + key_id.encode())
            made.append(key_id)
        return made

    def opens(self, session: Session) -> None:
        for key_id, sealed in self.sealed.items():
            assert session.decrypt(key_id, sealed) == b"message of " + key_id.encode()

    def verifies(self, daemon: Daemon) -> None:
        if daemon.alive:
            daemon.stop()
        for command in (("verify",), ("audit", "verify")):
            done = daemon.offline(*command)
            assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
