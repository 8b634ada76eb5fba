"""What a daemon does otherwise where its store is a fleet's. Made before the first fork; not loaded else."""

from __future__ import annotations

import functools
import socket
from pathlib import Path
from typing import Any, Callable

from ..audit.log import AuditLog
from ..config.options import Settings
from ..errors import StoreUnavailable
from ..fleet.board import Board
from ..fleet.engine import UNREACHABLE, Link
from ..fleet.host import RETRY
from ..fleet.reader import FleetReader
from ..fleet.settings import where
from ..service import fleetkeeper, start
from ..service.fleetawait import Awaiting
from ..service.fleetkeys import Coming
from ..service.fleetworker import FleetService
from ..service.keeper import Keeper
from ..wire.together import TogetherServer
from . import systemd
from .policies import Policies

_TRIED = "it is tried again by itself: /readyz tells why"


class FleetSide:
    server = TogetherServer

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError: what says where the database is."""
        self._where = where(settings)
        self._board = Board.new()
        self._coming = Coming(settings)
        self._settings, self._said = settings, False

    def reader(self, data_dir: Path, row_key: memoryview) -> FleetReader:
        """A worker's own; it connects when it is first asked."""
        link = Link(self._where, "progressdb-kms worker")
        return FleetReader(link, start.host_id(data_dir), row_key)

    def service(self, reader: Any, *args: Any) -> FleetService:
        known = functools.partial(self._board.knows, self._settings.workers)
        return FleetService(self._board, self._where.fence_seconds, reader, *args, everywhere=known)

    def policies(self, settings: Settings) -> Policies:
        """They are renewed at SIGHUP, and the coming KEKs with them."""
        return _Renewed(settings, self._coming)

    def open_keeper(self, *args: Any) -> tuple[Keeper | Awaiting, int]:
        """`args`: as of `start.open_keeper`. Where the database is away: what stands in for the keeper until
        it is there, and 0."""
        open_it = functools.partial(fleetkeeper.open_keeper, self._where, self._board, self._coming, *args)
        inbox: socket.socket = args[4]
        return Awaiting(open_it, inbox, self._where.fence_seconds * RETRY, self._board.opened).first()

    # ---- a start without the database ------------------------------------------------------------

    def begin(self, audit: AuditLog) -> None:
        """A worker's chain gets the number of this run, which nobody knew while there was no store. Raises
        StoreUnavailable: nobody knows it yet."""
        if not self._board.epoch:
            raise StoreUnavailable("the fleet's database was not reached yet", code=UNREACHABLE, hint=_TRIED)
        if audit.chain.startswith("0."):
            audit.chain = f"{self._board.epoch}{audit.chain[1:]}"

    @property
    def opened(self) -> bool:
        """Had this run a store at any time?"""
        return bool(self._board.epoch)

    def waits(self, announce: Callable[[str], None]) -> bool:
        """Is the start still without a store, or has a worker not heard yet that there is one? Says so once,
        and that it listens; and to systemd that it is up, which would end it else."""
        if not self._board.epoch and not self._said:
            self._said = True
            announce(f"progressdb-kms listening, not ready: socket={self._settings.socket} {self._where}")
            systemd.notify("READY=1\nSTATUS=not ready: the fleet's database is away")
        return self._said and not self._board.knows(self._settings.workers)


class _Renewed(Policies):
    def __init__(self, settings: Settings, coming: Coming) -> None:
        super().__init__(settings)
        self._coming = coming

    def renew(self) -> None:
        super().renew()
        self._coming.renew()
