"""Three daemons under load while what they stand on fails: what their callers were told is held against what
can have happened (`checker`). For a few seconds here, with one engine; for five minutes in `bin/test --long`,
with three servers of which standbys take over."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.conftest import MakeDaemon
from tests.harness import postgres
from tests.harness.daemon import Daemon
from tests.harness.proxy import Proxy
from tests.harness.quickfence import QUICK, WITHOUT, quick

from .checker import Op, check
from .load import Caller, Deks, Load

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())

PATIENCE = 120.0
LONG_SECONDS = 300.0


class Hosts:
    """Daemons, each with a network of its own to each server."""

    def __init__(self, daemons: Sequence[Daemon], networks: Sequence[Sequence[Proxy]]) -> None:
        self.daemons, self.networks = daemons, networks

    @contextlib.contextmanager
    def stopped(self, at: int) -> Iterator[None]:
        pids = self.daemons[at].pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def killed(self, at: int) -> Iterator[None]:
        self.daemons[at].kill()
        yield
        self.daemons[at].start()

    @contextlib.contextmanager
    def network(self, at: int, how: str) -> Iterator[None]:
        """`how`: stall or cut."""
        for proxy in self.networks[at]:
            getattr(proxy, how)()
        try:
            yield
        finally:
            for proxy in self.networks[at]:
                proxy.open()

    def wait_until_well(self) -> None:
        deadline = time.monotonic() + PATIENCE
        for daemon in self.daemons:
            while daemon.request("GET", "/readyz").status != 200:
                assert time.monotonic() < deadline, daemon.request("GET", "/readyz").body
                time.sleep(0.1)


def settled(hosts: Hosts, load: Load, seen: bool) -> list[Op]:
    """All is well again: nothing that was told is wrong, and what the fleet says of itself adds up."""
    hosts.wait_until_well()
    history = load.finish(PATIENCE)
    violations = check(history, seen)
    assert not violations, "\n".join(violations[:20])
    for daemon in hosts.daemons:
        daemon.stop()
        block = {**daemon.config["postgresql"], "fence_seconds": "60"}  # one that commands take
        daemon.write_config({**daemon.config, "postgresql": block})
    for command in (("audit", "verify"), ("verify",)):
        done = hosts.daemons[1].offline(*command)  # the one that was stopped
        assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return history


def pause(load: Load, calls: int) -> None:
    """Until so many more calls are over."""
    wanted, deadline = load.calls + calls, time.monotonic() + PATIENCE
    while load.calls < wanted:
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- one engine --------------------------------------------------------------------------------------

FENCE = 1.0


@pytest.fixture(params=[""])
def hosts(
    fleet_database: postgres.Fleet,
    make_daemon: MakeDaemon,
    short_tmp: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Hosts]:
    """The parameter: a safeguard that they do without."""
    command, kek, server = (
        quick(request.param),
        os.urandom(32),
        f"{fleet_database.where.folder}/.s.PGSQL.5432",
    )
    daemons, networks = [], []
    for number in range(3):
        folder = short_tmp / str(number)
        folder.mkdir()
        networks.append([Proxy(str(folder / ".s.PGSQL.5432"), server)])
        config = fleet_database.configured(FENCE)
        config["postgresql"]["hosts"] = [str(folder)]
        daemons.append(make_daemon(config, kek=kek, command=command, workers=1))
    yield Hosts(daemons, networks)
    for (proxy,) in networks:
        proxy.close()


def test_a_few_seconds(hosts: Hosts, fleet_database: postgres.Fleet) -> None:
    beyond = 1.3 * FENCE  # longer than a host is waited for
    with Load(hosts.daemons, callers=3, seed=1, rest=0.01, patience=1.0) as load:
        pause(load, 30)
        with hosts.stopped(1):
            time.sleep(beyond)
        pause(load, 20)
        with hosts.killed(0):
            pause(load, 20)
        with hosts.network(2, "stall"):
            time.sleep(beyond)
        pause(load, 20)
        with fleet_database.away("immediate"), hosts.network(1, "cut"):
            time.sleep(0.3)
        hosts.wait_until_well()
        pause(load, 50)
    history = settled(hosts, load, seen=True)
    assert sum(op.writes and op.known for op in history) > 20


@pytest.mark.long
@pytest.mark.parametrize("hosts", ["", *WITHOUT], indirect=True)
def test_without_a_safeguard_it_is_found(hosts: Hosts, request: pytest.FixtureRequest) -> None:
    """A host that is cut off, and what another one changes meanwhile. (Of the other safeguards the simulation
    shows what they are good for.)"""
    deks = Deks(1)
    caller = Caller(0, hosts.daemons, deks, seed=0, rest=0.0, patience=30.0)
    caller.create(0)
    (key_id,) = deks.names
    assert caller.use(2, key_id)  # it remembers that
    with hosts.network(2, "stall"):
        caller.change(0, key_id, "disable")
        end = time.monotonic() + FENCE
        while time.monotonic() < end:
            caller.use(2, key_id)
    hosts.wait_until_well()
    caller.close()
    assert [op.state for op in caller.history if op.writes and op.known] == ["enabled", "disabled"]
    without = request.node.callspec.params["hosts"]
    assert bool(check(caller.history)) == bool(without)


# ---- three servers -----------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[postgres.Cluster]:
    from progressdb_kms.fleet import schema
    from progressdb_kms.fleet.engine import Link

    with postgres.Cluster(tmp_path) as one:
        link = Link(one.where)
        schema.create(link)
        link.close()
        yield one


@pytest.fixture
def clustered(cluster: postgres.Cluster, make_daemon: MakeDaemon) -> Iterator[Hosts]:
    kek, where = os.urandom(32), cluster.where
    daemons, networks = [], []
    for number in range(3):
        networks.append([Proxy(("127.0.0.1", 0), ("127.0.0.1", node.port)) for node in cluster.nodes])
        block = {
            "hosts": [f"localhost:{proxy.address[1]}" for proxy in networks[-1]],
            "database": where.database,
            "user": where.user,
            "password_file": where.password_file,
            "tls_ca": where.tls_ca,
            "fence_seconds": "6",
        }
        config = {"store": "postgresql", "postgresql": block}
        daemons.append(make_daemon(config, kek=kek, command=QUICK, workers=1 + number // 2))
    yield Hosts(daemons, networks)
    for proxies in networks:
        for proxy in proxies:
            proxy.close()


@pytest.fixture
def small_disk() -> Iterator[postgres.Postgres]:
    """An engine that waits for its disk, of 200 MB."""
    if os.geteuid():
        pytest.skip("only root may mount")
    server = postgres.Postgres({"wal_keep_size": "0", "max_wal_size": "64MB"}, durable=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200m,mode=0755", "tmpfs", str(server.folder)], check=False
    )
    if done.returncode:
        pytest.skip("tmpfs can't be mounted here")
    try:
        with server:
            yield server
    finally:
        server.stop("immediate")
        subprocess.run(["umount", str(server.folder)], check=True)
        server.close()


@pytest.mark.long
def test_the_disk_of_the_engine_is_full(small_disk: postgres.Postgres, make_daemon: MakeDaemon) -> None:
    """Changes are refused, nothing that was acknowledged is lost, and no daemon needs a restart."""
    with postgres.Fleet(small_disk) as fleet:
        kek = os.urandom(32)
        daemons = [make_daemon(fleet.configured(2), kek=kek, command=QUICK, workers=1) for _ in range(2)]
        hosts, ballast = Hosts(daemons, [[], []]), small_disk.folder / "ballast"
        with Load(daemons, callers=4, seed=1, patience=5.0) as load:
            pause(load, 100)
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
            refused = 0
            deadline = time.monotonic() + PATIENCE
            while not refused and time.monotonic() < deadline:
                body = {"thread_id": "t" * 500}
                refused += daemons[0].request("POST", "/deks", body).status == 503
            assert refused
            time.sleep(2.0)
            ballast.unlink()
            if not small_disk.pid:
                small_disk.start()
            hosts.wait_until_well()
            pause(load, 100)
        settled(hosts, load, seen=False)
        fleet.reconnect()


class Troubles:
    """What befalls hosts, engine and network, one after another, by a seed."""

    def __init__(self, hosts: Hosts, cluster: postgres.Cluster, rng: random.Random) -> None:
        self._hosts, self._cluster, self._rng = hosts, cluster, rng
        self.told: list[str] = []

    def next(self) -> None:
        one = self._rng.choice(
            (
                self._daemon_killed,
                self._daemon_stopped,
                self._daemon_stopped,
                self._part_stopped,
                self._part_killed,
                self._all_killed,
                self._primary_restarted,
                self._network,
                self._network,
                self._primary_killed,
                self._primary_stopped,
                self._cancelled,
                self._standby_away,
            )
        )
        self.told.append(one.__name__)
        one()

    def _some(self) -> float:
        """Shorter than a lease, as long as it, or longer than a host is waited for."""
        return self._rng.choice((1.0, 5.0, 6.0, 8.0))

    def _at(self) -> int:
        return self._rng.randrange(len(self._hosts.daemons))

    def _daemon_killed(self) -> None:
        with self._hosts.killed(self._at()):
            time.sleep(self._some())

    def _all_killed(self) -> None:
        for daemon in self._hosts.daemons:
            daemon.kill()
        for daemon in self._hosts.daemons:
            daemon.start()

    def _daemon_stopped(self) -> None:
        with self._hosts.stopped(self._at()):
            time.sleep(self._some())

    def _part(self) -> int:
        """A keeper or a worker of the host that has several processes; the rest goes on without it."""
        return self._rng.choice(self._hosts.daemons[-1].pids()[1:])

    def _part_stopped(self) -> None:
        pid = self._part()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._some())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def _part_killed(self) -> None:
        os.kill(self._part(), signal.SIGKILL)
        time.sleep(self._some())

    def _network(self) -> None:
        with self._hosts.network(self._at(), self._rng.choice(("stall", "cut"))):
            time.sleep(self._some())

    def _primary_killed(self) -> None:
        old = self._cluster.primary
        old.stop("kill")
        time.sleep(self._rng.choice((0.0, 2.0)))
        self._cluster.fail_over()
        time.sleep(1.0)
        self._cluster.join(old)

    def _primary_restarted(self) -> None:
        self._cluster.primary.stop("immediate")
        time.sleep(self._some())
        self._cluster.primary.start()

    def _primary_stopped(self) -> None:
        """It goes on later, and doesn't know that it is none any more."""
        old = self._cluster.primary
        group = [old.pid, *_children(old.pid)]
        for pid in group:
            os.kill(pid, signal.SIGSTOP)
        self._cluster.fail_over()
        time.sleep(self._some())
        for pid in group:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        time.sleep(2.0)
        old.stop("kill")
        self._cluster.join(old)

    def _cancelled(self) -> None:
        """COMMIT says OK, with a WARNING, though no standby has it; then a standby takes over."""
        standbys = [node for node in self._cluster.nodes if node is not self._cluster.primary]
        for node in standbys:
            node.stop()
        for _ in range(5):
            time.sleep(0.3)
            self._cluster.primary.sql(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            )
        for node in standbys:
            node.start()
        if self._rng.random() < 0.5:
            self._primary_killed()

    def _standby_away(self) -> None:
        node = self._rng.choice([node for node in self._cluster.nodes if node is not self._cluster.primary])
        node.stop("kill")
        time.sleep(1.0)
        node.start()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.long
def test_five_minutes(
    clustered: Hosts, cluster: postgres.Cluster, record_property: Callable[[str, Any], None]
) -> None:
    seed = int(os.environ.get("FLEET_SEED", time.time_ns() % 100_000))
    seconds = float(os.environ.get("FLEET_SECONDS", LONG_SECONDS))
    print(f"\nFLEET_SEED={seed}")
    troubles = Troubles(clustered, cluster, random.Random(seed))
    end = time.monotonic() + seconds
    with Load(clustered.daemons, callers=8, seed=seed) as load:
        while time.monotonic() < end:
            pause(load, 100)
            troubles.next()
            clustered.wait_until_well()
        pause(load, 200)
    history = settled(clustered, load, seen=False)
    known = sum(op.writes and op.known for op in history)
    unknown = sum(op.writes and not op.known for op in history)
    told = {name: troubles.told.count(name) for name in sorted(set(troubles.told))}
    record_property("calls", len(history))
    print(f"{len(history)} calls, {known} changes acknowledged, {unknown} not; {told}")
    assert known > 500
