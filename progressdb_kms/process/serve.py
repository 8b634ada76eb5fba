"""The processes, and the order in which they come and go.

    supervisor   binds, holds the lock of the data-dir, loads the keys; then waits for signals and deaths
      keeper     the only writer of the store (keeper)
      worker 1…n serve connections on the shared listening socket (wire.server); several are pinned to cores

The supervisor has one thread and no SQLite connection, so that it may fork at any time: a worker or keeper
that dies is replaced. All share what is made before any of them: locked memory, of which one part holds the
keyring and one is each worker's own, the counters, the policies.

Coming: harden, read configuration and keys, lock the data-dir, bind (so that a client's connect waits rather
than fails), put the keys into the keyring, open and check the store, start workers, say that we are ready.
Going (SIGTERM, or an error): the socket's name goes first, what was received is answered, workers end, the
keeper writes the last audit heads, keys are wiped.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import sys
import time
from typing import Any

from ..config.load import Loaded
from ..config.options import Settings, cores
from ..crypto.aead import KEY_SIZE
from ..crypto.keyring import REGION_SIZE, Keyring
from ..crypto.memory import LockedBuffer, settle
from ..errors import ConfigError, LockRefused
from ..service import channel
from ..service.lock import claim
from ..service.metrics import Metrics
from ..service.plan import Configured
from ..wire.admission import SPARE_FILES, Limits
from ..wire.lanes import THREADS
from ..wire.slab import Slab
from . import hardening, inherited
from .policies import Policies
from .socket import Name, listen_tcp
from .supervisor import Supervisor
from .worker import Shared

log = logging.getLogger("progressdb_kms")

# ---- starting --------------------------------------------------------------------------------------


def serve(loaded: Loaded, forced: dict[str, Any] | None = None) -> int:
    """Run the daemon until SIGTERM. Returns the exit code. Raises OperatorError where it can't start.

    `forced`: members of `Configured` that only the command line sets.
    """
    settings = loaded.settings
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="progressdb-kms: %(levelname)s: %(message)s"
    )
    for remark in inherited.remarks():
        log.warning("%s", remark)
    found = hardening.harden()
    _look_at_second_start(settings, hardening.second_start())
    limits = Limits(
        settings.max_connections, settings.idle_timeout, settings.request_timeout,
        _descriptors(settings), cores(),
    )  # fmt: skip
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with contextlib.ExitStack() as ending:
        lock = claim(settings.data_dir)
        name = Name(settings)
        ending.callback(name.remove)
        tcp = listen_tcp(settings)
        region = LockedBuffer(REGION_SIZE + channel.STAGING_SLOTS * KEY_SIZE, settings.memory_lock)
        ending.callback(region.wipe)
        slabs = [Slab(settings.memory_lock, THREADS) for _ in range(settings.workers)]
        kinds = {region.kind, *(slab.buffer.kind for slab in slabs)}
        settle(settings.memory_lock, locked="unlocked" not in kinds)
        if "unlocked" in kinds and settings.memory_lock != "off":
            log.warning("memory can't be locked: keys may be swapped out (raise LimitMEMLOCK or `ulimit -l`)")
        elif "mlock" in kinds:
            log.info("no memfd_secret on this kernel: keys are in mlock'ed memory, which root can read")
        keyring = Keyring(region.view)
        with loaded:  # from here on the keys are in the keyring alone
            keys = Configured.of(loaded, keyring.install)._replace(**(forced or {}))
        inbox, outbox = channel.channel()
        fleet: Any = False
        if settings.store != "sqlite":
            from .fleetside import FleetSide

            fleet = FleetSide(settings)
        shared = Shared(
            settings, lock, keys, region, keyring,
            staging=region.view[REGION_SIZE:],
            metrics=Metrics(settings.workers + 1),
            inbox=inbox, outbox=outbox,
            name=name, tcp=tcp,
            measures=[measure._asdict() for measure in found],
            started=time.monotonic(),
            slabs=slabs, limits=limits,
            policies=fleet.policies(settings) if fleet else Policies(settings),
            fleet=fleet,
        )  # fmt: skip
        return Supervisor(shared).run()


def _look_at_second_start(settings: Settings, measure: hardening.Measure) -> None:
    if not measure.ok and settings.memory_lock == "require":
        raise LockRefused(f"memory_lock is 'require', but {measure.detail}", hint=hardening.REMEDY)
    if not measure.ok:
        log.warning("%s (%s)", measure.detail, hardening.REMEDY)


def _descriptors(settings: Settings) -> int:
    """That each process may open; the soft limit was raised. A worker may come to hold all connections."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    allowed = sys.maxsize if soft == resource.RLIM_INFINITY else soft
    if allowed <= SPARE_FILES:
        told = f"{allowed} open files are allowed: a worker needs {SPARE_FILES}, and one a connection"
        raise ConfigError(told, hint="raise LimitNOFILE= in the unit, or `ulimit -n`")
    if allowed < settings.max_connections + SPARE_FILES:
        log.warning(
            "%d open files are allowed: a worker serves %d of max_connections %d (raise LimitNOFILE)",
            allowed, max(0, allowed - SPARE_FILES), settings.max_connections,
        )  # fmt: skip
    return allowed
