"""What a daemon does otherwise where its store is a fleet's. Made before the first fork; not loaded else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.options import Settings
from ..fleet.board import Board
from ..fleet.engine import Link
from ..fleet.reader import FleetReader
from ..fleet.settings import where
from ..service import fleetkeeper, start
from ..service.fleetkeys import Coming
from ..service.fleetworker import FleetService
from ..service.keeper import Keeper
from .board import Board as Policies


class FleetSide:
    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError: what says where the database is."""
        self._where = where(settings)
        self._board = Board.new()
        self._coming = Coming(settings)

    def reader(self, data_dir: Path, row_key: memoryview) -> FleetReader:
        """A worker's own; it connects when it is first asked."""
        link = Link(self._where, "progressdb-kms worker")
        return FleetReader(link, start.host_id(data_dir), row_key)

    def service(self, reader: Any, *args: Any) -> FleetService:
        return FleetService(self._board, self._where.fence_seconds, reader, *args)

    def open_keeper(self, *args: Any) -> tuple[Keeper, int]:
        """`args`: as of `start.open_keeper`."""
        return fleetkeeper.open_keeper(self._where, self._board, self._coming, *args)

    def policies(self, settings: Settings) -> Policies:
        """The board that is renewed at SIGHUP; the coming KEKs with it."""
        return _Renewed(settings, self._coming)


class _Renewed(Policies):
    def __init__(self, settings: Settings, coming: Coming) -> None:
        super().__init__(settings)
        self._coming = coming

    def renew(self) -> None:
        super().renew()
        self._coming.renew()
