"""A worker: a process that serves. And what all processes of the daemon share."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..audit.log import FILE_NAME as AUDIT_LOG
from ..audit.log import AuditLog
from ..config.options import Settings
from ..crypto.keyring import Keyring
from ..crypto.memory import LockedBuffer
from ..errors import KMSError
from ..journal import Chore
from ..service import channel, lastbackup
from ..service.keeper import Keeper
from ..service.lock import Claim
from ..service.metrics import Metrics
from ..service.plan import Configured
from ..service.service import Service
from ..store.sqlite import SqliteReader
from ..wire import loopback
from ..wire.admission import Limits
from ..wire.call import App
from ..wire.doors import Door, peer_of
from ..wire.server import Server
from ..wire.slab import Slab
from . import hardening, streams
from .policies import Policies
from .signals import Signals
from .socket import Name, hosts

log = logging.getLogger("progressdb_kms")


DRAIN_SECONDS = 20.0
"""How long answers in flight may take at SIGTERM; below systemd's 90 s until SIGKILL."""

ANCHOR_SECONDS = 0.5
"""How often a worker has the head of its audit chain kept in the store, where it moved: half of the second of
records that may be cut off unnoticed after a sudden death."""

STOCK_SECONDS = 5.0
"""How often a worker counts its open files, threads and audit records."""


class Shared(NamedTuple):
    """What was made before the first fork, and belongs to all."""

    settings: Settings
    lock: Claim
    keys: Configured
    region: LockedBuffer
    keyring: Keyring
    staging: memoryview
    metrics: Metrics
    inbox: socket.socket
    outbox: socket.socket
    name: Name
    tcp: socket.socket | None
    measures: list[dict[str, Any]]
    started: float
    slabs: list[Slab]
    """Locked memory of the connections of each worker."""
    limits: Limits
    policies: Policies
    fleet: Any
    """A `fleetside.FleetSide`, or False: that is loaded where it is configured, and nowhere else"""


# ---- a worker --------------------------------------------------------------------------------------


class Worker:
    """Makes a server of the listening sockets and a `Service`, and looks after both."""

    def __init__(self, shared: Shared, slot: int, chain: str) -> None:
        settings = shared.settings
        self._shared = shared
        self._slot = slot
        self._counters = shared.metrics.block(slot - 1)
        self._counters.clear()
        self._next_stock = 0.0
        self._lines = 0  # audit records that were counted
        path = settings.data_dir
        keyring = shared.keyring
        # First: where there is no store, there shall be no log either.
        self._reader = (shared.fleet.reader if shared.fleet else SqliteReader)(path, keyring.row_key)
        self._audit = AuditLog(path / AUDIT_LOG, keyring.audit_key, chain, change=keyring.change)
        self._keeper = channel.KeeperClient(shared.outbox)
        self._introduced = False
        self._introduce()
        self._service = (shared.fleet.service if shared.fleet else Service)(
            self._reader, keyring, self._audit, self._keeper, settings.peer_rules, self._counters,
            self._about, settings.open_embedded_messages, settings.workers,
        )  # fmt: skip
        share = channel.STAGING_SLOTS // settings.workers
        slots = channel.StagingSlots(shared.staging, (slot - 1) * share, share)
        app = App(self._service, slots, shared.metrics, settings.max_body_bytes, hosts=hosts(settings))
        self._listener = shared.name.listener.dup()
        doors = [Door(self._listener, peer_of)]
        if shared.tcp is not None:
            doors.append(Door(shared.tcp, loopback.Peers().identify))
        server = shared.fleet.server if shared.fleet else Server
        self.server = server(doors, app, shared.limits, shared.slabs[slot - 1])
        self._anchoring = Chore("the head of the audit log is not kept in the store now")
        self.server.narrow(shared.policies.read())

    def _introduce(self) -> None:
        """The keeper records the chain of this worker. Where it can't (the log was unlinked, the disk is
        full) the worker is up all the same, and says why it does nothing; it asks again."""
        try:
            if self._shared.fleet:
                self._shared.fleet.begin(self._audit)
            self._keeper.call("hello", {"chain": self._audit.chain})
            self._audit.release()
            self._introduced = True
        except KMSError as error:
            self._audit.hold(error)

    def _about(self) -> dict[str, Any]:
        shared = self._shared
        locked = shared.region.locked_bytes + sum(slab.buffer.locked_bytes for slab in shared.slabs)
        return {
            "workers": shared.settings.workers,
            "restarts": sum(max(0, n - 1) for n in shared.metrics.gauge("starts")),
            "uptime_seconds": round(time.monotonic() - shared.started, 3),
            "memory": {
                "kind": shared.region.kind,
                "locked_bytes": locked,
                "required": shared.settings.memory_lock == "require",
                "wipe_on_free": next(one["ok"] for one in shared.measures if one["name"] == "wipe_on_free"),
            },
            "hardening": shared.measures,
            "limits": self._limits(locked),
            "kek_max_age_days": shared.settings.kek_max_age_days,
            "backup": last._asdict() if (last := lastbackup.read(shared.settings.data_dir)) else None,
            "disk_free_bytes": _free(shared.settings.data_dir),
        }

    def _limits(self, locked: int) -> dict[str, dict[str, int | None]]:
        """What is used of what may be: by all workers together, but open files, which are each process's."""
        shared, gauge = self._shared, self._shared.metrics.gauge
        rows = {
            "connections": (sum(gauge("connections")), shared.settings.max_connections),
            "open_files": (max(gauge("open_files")), shared.limits.descriptors),
            "threads": (sum(gauge("threads")), resource.getrlimit(resource.RLIMIT_NPROC)[0]),
            "body_bytes": (sum(gauge("body_bytes")), self.server.shares.most),
            "locked_bytes": (locked, resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        }
        unlimited = (resource.RLIM_INFINITY, sys.maxsize)
        return {
            name: {"used": used, "limit": None if limit in unlimited else limit}
            for name, (used, limit) in rows.items()
        }

    def _take_stock(self) -> None:
        """For the metrics of all workers, whichever answers. Now and then: a thousand files take a moment."""
        if time.monotonic() < self._next_stock:
            return
        self._next_stock = time.monotonic() + STOCK_SECONDS
        lines, self._lines = self._audit.head[1] - self._lines, self._audit.head[1]
        self._counters.add("audit_lines", lines)
        self._counters.set("threads", threading.active_count())
        with contextlib.suppress(OSError):
            self._counters.set("open_files", len(os.listdir("/proc/self/fd")))

    def run(self, signals: Signals) -> None:
        """Serve until the signal to stop."""
        with hardening.signals_blocked():
            waiter = threading.Thread(target=self.server.serve_forever, name="waiter", daemon=True)
            waiter.start()
        while not signals.wait(ANCHOR_SECONDS):
            if not waiter.is_alive():  # another process serves again, this one never
                raise RuntimeError("the thread that serves connections has ended")
            self._counters.set("beats", self.server.turns)
            self._take_stock()
            streams.catch_up()
            if self._shared.name.take_over(self._slot, self._listener):
                self.server.renew(self._listener)
            if signals.take_hangup():
                self.server.narrow(self._shared.policies.read())
                if self._introduced:
                    reopen(self._audit)
            if self._introduced:
                self._anchor()
            else:
                self._introduce()
        if not self.server.drain(DRAIN_SECONDS):
            log.warning("connections were cut: they did not end within %g s", DRAIN_SECONDS)
        if self._introduced:
            self._anchor(last=True)
        self._audit.close()
        self._reader.close()
        self.server.slab.buffer.wipe()

    def _anchor(self, last: bool = False) -> None:
        self._anchoring.attend(partial(self._service.anchor, last))


def _free(folder: Path) -> int | None:
    """Bytes; None where the folder is gone, of which others tell."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free
    return None


def reopen(what: Keeper | AuditLog) -> None:
    """The audit log, at SIGHUP: of a worker, or of the keeper."""
    try:
        what.reopen()
    except KMSError as error:
        log.error("%s", error.line)
