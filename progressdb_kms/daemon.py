"""The processes, and the order in which they come and go.

    supervisor   binds, holds the lock of the data-dir, loads the keys; then waits for signals and deaths
      keeper     the only writer of the store (keeper)
      worker 1…n serve connections on the shared listening socket (httpd), each pinned to a core

The supervisor has one thread and no SQLite connection, so that it may fork at any time: a worker or keeper
that dies is replaced. All share two regions made before any fork: the locked one with the keyring, and the
counters. With `workers: 1` nothing is forked: the keeper runs in the main thread, the server in another.

Coming: harden, lock the data-dir, bind (so that a client's connect waits rather than fails), load the keys,
open and check the store, start workers, say that we are ready. Going (SIGTERM): the socket's name goes first,
what was received is answered, workers end, the keeper writes the last audit heads, keys are wiped.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple, NoReturn, Optional

from . import __version__, hardening, jobs, opening, systemd
from .aead import KEY_SIZE
from .api import App
from .audit import FILE_NAME as AUDIT_LOG
from .audit import AuditLog
from .config import Loaded, Settings
from .encoding import json_dumps
from .errors import AlreadyRunning, ConfigError, KMSError, OperatorError
from .httpd import BACKLOG, Limits, Server
from .keeper import STAGING_SLOTS, Keeper
from .keyring import REGION_SIZE, Keyring
from .lockedmem import LockedBuffer
from .metrics import Metrics
from .opening import Configured
from .service import Service, StagingSlots
from .startup import ConfiguredKey
from .store import SqliteReader

log = logging.getLogger("progressdb_kms")

DRAIN_SECONDS = 20.0
"""How long answers in flight may take at SIGTERM; below systemd's 90 s until SIGKILL."""

ANCHOR_SECONDS = 5.0
"""How often a worker has the head of its audit chain kept in the store while it only reads."""

BEAT_SECONDS = 1.0
"""How often each process shows that its main loop runs."""

STALE_SECONDS = 20.0
"""A process whose main loop has not run for so long keeps the watchdog from being fed."""

RESPAWN_SECONDS = 0.5
"""Least time between two starts of the same process, so that one that can't live does not eat the machine."""


class Shared(NamedTuple):
    """What was made before the first fork, and belongs to all."""

    settings: Settings
    keys: Configured
    region: LockedBuffer
    keyring: Keyring
    staging: memoryview
    metrics: Metrics
    inbox: socket.socket
    outbox: socket.socket
    listener: socket.socket
    measures: list[dict[str, Any]]
    started: float


# ---- signals ---------------------------------------------------------------------------------------


END = signal.SIGUSR1
"""The supervisor's word to a child. Not SIGTERM, which `timeout` or a container's manager may send to the
whole group: then the keeper would be gone before the workers have answered."""

NOTICED = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, END))


class Signals:
    """SIGTERM, SIGINT and SIGHUP, as flags; SIGCHLD ends a wait.

    They are waited for and never handled: a handler's frame on the stack gets all registers of the thread,
    and round keys stay in the wide ones long after a cipher is done.

    A child leaves SIGTERM and SIGINT alone: the supervisor ends all in order, by END.
    """

    def __init__(self, child: bool = False) -> None:
        self.stop = False
        self.hangup = False
        left_alone = (signal.SIGTERM, signal.SIGINT) if child else (END,)
        self._awaited = NOTICED - frozenset(left_alone)
        for number in left_alone:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, NOTICED)  # threads that are started from now on inherit it

    def wait(self, seconds: float) -> None:
        """Until a signal comes, but no longer than this."""
        if hasattr(signal, "sigtimedwait"):
            found = signal.sigtimedwait(self._awaited, seconds)
            if found is not None:
                self._note(found.si_signo)
            return
        deadline = time.monotonic() + seconds  # macOS
        while not (waiting := signal.sigpending() & self._awaited) and time.monotonic() < deadline:
            time.sleep(0.02)
        if waiting:
            self._note(signal.sigwait(waiting))

    def take_hangup(self) -> bool:
        taken, self.hangup = self.hangup, False
        return taken

    def _note(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT, END):
            self.stop = True
        elif number == signal.SIGHUP:
            self.hangup = True


class SignalPipe(Signals):
    """For a loop that waits for more than signals: a thread waits for them, and `fd` becomes readable."""

    def __init__(self, child: bool = False) -> None:
        super().__init__(child)
        self.fd, self._write = os.pipe()
        for descriptor in (self.fd, self._write):
            os.set_blocking(descriptor, False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def clear(self) -> None:
        """Empty the descriptor; the flags stay."""
        with suppress(BlockingIOError):
            while os.read(self.fd, 512):
                pass

    def _listen(self) -> None:
        while True:
            self._note(signal.sigwait(self._awaited))
            with suppress(BlockingIOError):  # it is readable already
                os.write(self._write, b"\0")


# ---- the socket ------------------------------------------------------------------------------------


def listen(settings: Settings) -> tuple[socket.socket, bool]:
    """(listening socket, whether its name is ours to remove): systemd's, or bound at `socket`."""
    given = systemd.listen_socket()
    if given is not None:
        return given, False
    _clear_stale(settings.socket)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o777 & ~(0o600 if settings.socket_group is not None else settings.socket_mode))
    try:
        sock.bind(str(settings.socket))
    except OSError as error:
        raise ConfigError(
            f"the socket {settings.socket} can't be bound: {error.strerror}",
            hint="its folder must exist and be writable by the daemon's user",
        ) from error
    finally:
        os.umask(old)
    if settings.socket_group is not None:
        _hand_to_group(settings)
    sock.listen(BACKLOG)
    return sock, True


def _hand_to_group(settings: Settings) -> None:
    """Group first, then the wider mode: there is no moment in which others could connect."""
    assert settings.socket_group is not None
    try:
        os.chown(settings.socket, -1, settings.socket_group)
        os.chmod(settings.socket, settings.socket_mode)
    except OSError as error:
        raise ConfigError(
            f"the socket can't be given to the group {settings.socket_group}: {error.strerror}",
            hint="the daemon's user must be a member of it",
        ) from error


def _clear_stale(path: Path) -> None:
    """Remove a socket that nobody answers at; refuse anything else that stands there."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"the socket {path} can't be looked at: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{path} is there and is no socket: it is not removed", hint="choose another `socket`"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EAGAIN and not isinstance(error, socket.timeout):
                raise ConfigError(f"the socket {path} can't be tried: {error.strerror}") from error
            raise AlreadyRunning(f"the socket {path} is in use, and its server is busy") from None
        from .httpd import peer_of

        holder = peer_of(probe)
        raise AlreadyRunning(
            f"the socket {path} is in use by pid {holder.pid} (uid {holder.uid})",
            hint="stop that one first, or choose another --socket",
        )


# ---- starting --------------------------------------------------------------------------------------


def serve(loaded: Loaded, ready: Optional[Callable[[str], None]] = None) -> int:
    """Run the daemon until SIGTERM. Returns the exit code. Raises OperatorError where it can't start."""
    settings = loaded.settings
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="progressdb-kms: %(levelname)s: %(message)s"
    )
    measures = [measure._asdict() for measure in hardening.harden()]
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    lock = opening.claim(settings.data_dir)
    listener, ours = listen(settings)
    region = LockedBuffer(REGION_SIZE + STAGING_SLOTS * KEY_SIZE, settings.memory_lock)
    try:
        if region.kind != "memfd_secret":
            _warn_of_memory(settings, region.kind)
        keyring = Keyring(region.view)
        keys = _install(loaded, keyring)
        inbox, outbox = jobs.channel()
        staging = region.view[REGION_SIZE:]
        metrics = Metrics(settings.workers + 1)
        shared = Shared(
            settings, keys, region, keyring, staging, metrics, inbox, outbox, listener, measures, time.time()
        )
        run = Alone if settings.workers == 1 else Supervisor
        return run(shared, lock, ready or _announce).run(ours)
    finally:
        region.wipe()
        listener.close()
        os.close(lock)


def _warn_of_memory(settings: Settings, kind: str) -> None:
    if kind == "mlock":
        log.info("no memfd_secret on this kernel: keys are in mlock'ed memory, which root can read")
    elif settings.memory_lock != "off":
        log.warning("memory can't be locked: keys may be swapped out (raise LimitMEMLOCK or `ulimit -l`)")


def _install(loaded: Loaded, keyring: Keyring) -> Configured:
    """Move the configured keys into the shared keyring, and wipe where they came from."""
    with loaded:
        settings = loaded.settings
        master = ConfiguredKey(keyring.install(loaded.master, 0), settings.master_source)
        sources = loaded.previous_sources
        previous = [ConfiguredKey(keyring.install(k, 0), s) for k, s in zip(loaded.previous, sources)]
        pending = None
        if loaded.pending is not None:
            pending = ConfiguredKey(keyring.install(loaded.pending, 0), loaded.pending_source)
    return Configured(master, previous, pending)


def _announce(line: str) -> None:
    print(line, flush=True)


# ---- a worker --------------------------------------------------------------------------------------


class Worker:
    """The serving side of one process."""

    def __init__(self, shared: Shared, slot: int, chain: str) -> None:
        settings = shared.settings
        self._shared = shared
        self._counters = shared.metrics.block(slot - 1)
        for gauge in ("connections", "beats"):
            self._counters.clear(gauge)
        path = settings.data_dir
        self._audit = AuditLog(path / AUDIT_LOG, shared.keyring.audit_key, chain)
        keeper = jobs.KeeperClient(shared.outbox)
        keeper.call("hello", {"chain": chain})
        self._reader = SqliteReader(path)
        self._service = Service(
            self._reader,
            shared.keyring,
            self._audit,
            keeper,
            settings.peer_rules,
            self._counters,
            self._about,
        )
        share = STAGING_SLOTS // settings.workers
        slots = StagingSlots(shared.staging, (slot - 1) * share, share)
        app = App(self._service, slots, shared.metrics, settings.max_body_bytes)
        limits = Limits(settings.max_connections, settings.idle_timeout, settings.request_timeout)
        listener = shared.listener.dup()
        self.server = Server(listener, app, limits, self._counters, shared.metrics, settings.memory_lock)

    def _about(self) -> dict[str, Any]:
        shared = self._shared
        slab = self.server.slab
        return {
            "workers": shared.settings.workers,
            "restarts": sum(max(0, n - 1) for n in shared.metrics.gauge("starts")),
            "uptime_seconds": round(time.time() - shared.started, 3),
            "memory": {
                "kind": shared.region.kind,
                "locked_bytes": shared.region.locked_bytes + slab.locked_bytes,
                "required": shared.settings.memory_lock == "require",
                "wipe_on_free": hardening.wipe_on_free_active(),
            },
            "hardening": shared.measures,
        }

    def run(self, stop: Callable[[float], bool], hangup: Callable[[], bool]) -> None:
        """Serve until `stop(seconds)`, which waits so long at most, says so."""
        with hardening.signals_blocked():
            acceptor = threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True)
            acceptor.start()
        next_anchor = time.monotonic() + ANCHOR_SECONDS
        while not stop(BEAT_SECONDS):
            self._counters.add("beats", 1)
            if hangup():
                self._reopen()
            if time.monotonic() >= next_anchor:
                self._anchor()
                next_anchor = time.monotonic() + ANCHOR_SECONDS
        self.server.shutdown()
        acceptor.join()
        with hardening.signals_blocked():
            self.server.take_waiting()
        if not self.server.drain(DRAIN_SECONDS):
            log.warning("connections were cut: they did not end within %g s", DRAIN_SECONDS)
        self._anchor()
        self._audit.close()
        self._reader.close()
        self.server.slab.wipe()

    def _reopen(self) -> None:
        try:
            self._audit.reopen()
        except KMSError as error:
            log.error("%s (%s)", error.message, error.hint)

    def _anchor(self) -> None:
        try:
            self._service.anchor()
        except KMSError as error:
            log.warning("the head of the audit log is not kept in the store now: %s", error.message)


# ---- everything in one process ---------------------------------------------------------------------


class Alone:
    """`workers: 1`: the keeper in the main thread, the worker in another."""

    def __init__(self, shared: Shared, lock: int, announce: Callable[[str], None]) -> None:
        self._shared = shared
        self._announce = announce
        self._stop = threading.Event()
        self._hangup = threading.Event()
        self._failure: Optional[BaseException] = None

    def run(self, ours: bool) -> int:
        shared = self._shared
        signals = SignalPipe()
        keeper, epoch = _open_keeper(shared, 0)
        shared.metrics.block(0).add("starts", 1)
        up = threading.Event()
        thread = threading.Thread(target=self._work, args=(f"{epoch}.1", up))
        thread.start()
        notifier = Notifier(shared)
        while thread.is_alive():
            keeper.round(0.2, signals.fd)
            signals.clear()
            if up.is_set():
                notifier.ready(self._announce)
                notifier.beat()
            if signals.take_hangup():
                notifier.reloading()
                _reopen_keeper(keeper)
                self._hangup.set()
            if signals.stop and not self._stop.is_set():
                notifier.stopping()
                _remove_name(shared.settings, ours)
                self._stop.set()
        keeper.close()
        if self._failure is not None:
            raise self._failure
        return 0

    def _work(self, chain: str, up: threading.Event) -> None:
        try:
            worker = Worker(self._shared, 1, chain)
            up.set()
            worker.run(self._stop.wait, self._take_hangup)
        except BaseException as error:
            self._failure = error

    def _take_hangup(self) -> bool:
        taken = self._hangup.is_set()
        self._hangup.clear()
        return taken


def _open_keeper(shared: Shared, incarnation: int) -> tuple[Keeper, int]:
    return opening.open_keeper(
        shared.settings.data_dir, shared.keyring, shared.keys, shared.staging, shared.inbox, incarnation
    )


def _reopen_keeper(keeper: Keeper) -> None:
    try:
        keeper.reopen()
    except KMSError as error:
        log.error("%s (%s)", error.message, error.hint)


def _remove_name(settings: Settings, ours: bool) -> None:
    """From here on a connect fails at once instead of waiting for nobody."""
    if ours:
        settings.socket.unlink(missing_ok=True)


class Notifier:
    """What systemd and the person at the terminal hear."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._said = False
        interval = systemd.watchdog_seconds()
        self._interval = interval / 2 if interval else None
        self._next = 0.0

    def ready(self, announce: Callable[[str], None]) -> None:
        if self._said:
            return
        self._said = True
        active = self._shared.keyring.active
        settings = self._shared.settings
        announce(
            f"progressdb-kms {__version__} ready: socket={settings.socket} kek_id={active.kek_id} "
            f"kek_version={active.version} workers={settings.workers} memory={self._shared.region.kind}"
        )
        systemd.notify(f"READY=1\nSTATUS=KEK {active.kek_id}, {settings.workers} workers")

    def reloading(self) -> None:
        systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        systemd.notify("READY=1")

    def stopping(self) -> None:
        systemd.notify("STOPPING=1")

    def beat(self) -> None:
        now = time.monotonic()
        if self._interval is not None and now >= self._next:
            systemd.notify("WATCHDOG=1")
            self._next = now + self._interval


# ---- several processes -----------------------------------------------------------------------------


class Child:
    """A keeper or worker process in its place; replaced when it dies."""

    def __init__(self, slot: int) -> None:
        self.slot = slot  # 0: the keeper
        self.pid = 0
        self.incarnation = -1
        self.started = 0.0
        self.beats = 0
        self.fresh = 0.0


class Supervisor:
    def __init__(self, shared: Shared, lock: int, announce: Callable[[str], None]) -> None:
        self._shared = shared
        self._lock = lock
        self._announce = announce
        self._children = [Child(slot) for slot in range(shared.settings.workers + 1)]
        self._epoch = 0
        self._signals = Signals()

    def run(self, ours: bool) -> int:
        notifier = Notifier(self._shared)
        self._start_keeper()
        for child in self._children[1:]:
            self._start_worker(child)
        notifier.ready(self._announce)
        while not self._signals.stop:
            self._signals.wait(BEAT_SECONDS / 4)
            if self._signals.take_hangup():
                notifier.reloading()
                self._tell(signal.SIGHUP, self._children)
            self._replace_dead()
            if self._all_alive():
                notifier.beat()
        notifier.stopping()
        _remove_name(self._shared.settings, ours)
        self._end(self._children[1:])
        self._end(self._children[:1])
        return 0

    # ---- children --------------------------------------------------------------------------------

    def _fork(self, child: Child, main: Callable[[], None]) -> None:
        child.incarnation += 1
        child.started = child.fresh = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        supervisor = os.getpid()
        with hardening.signals_blocked():  # as long as the child has no Signals of its own
            child.pid = os.fork()
            if not child.pid:
                _in_child(supervisor, self._lock, main)
        block = child.slot - 1 if child.slot else self._shared.settings.workers
        self._shared.metrics.block(block).add("starts", 1)

    def _start_keeper(self) -> None:
        child = self._children[0]
        read, write = os.pipe()
        incarnation = child.incarnation + 1

        def main() -> None:
            os.close(read)
            _keeper_main(self._shared, incarnation, write)

        self._fork(child, main)
        os.close(write)
        with open(read, "rb") as answers:
            line = answers.readline()
        told: dict[str, Any] = (
            json.loads(line) if line else {"error": ["the keeper process ended at its start", ""]}
        )
        if "error" in told:
            os.waitpid(child.pid, 0)
            child.pid = 0
            self._end(self._children[1:])
            raise StartFailed(told["error"][0], hint=told["error"][1])
        if not incarnation:
            self._epoch = told["epoch"]

    def _start_worker(self, child: Child) -> None:
        suffix = f".{child.incarnation + 1}" if child.incarnation >= 0 else ""
        chain = f"{self._epoch}.{child.slot}{suffix}"
        self._fork(child, lambda: _worker_main(self._shared, child.slot, chain))

    def _replace_dead(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.pid:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if not pid:
                    continue
                name = f"worker {child.slot}" if child.slot else "the keeper"
                log.error("%s (pid %d) ended (%s): it is replaced", name, pid, _how(status))
                child.pid = 0
                self._wipe_staging(child.slot)
            if now - child.started >= RESPAWN_SECONDS:
                if child.slot:
                    self._start_worker(child)
                else:
                    self._start_keeper()

    def _wipe_staging(self, slot: int) -> None:
        """New KEKs that a dead worker had brought."""
        if slot:
            share = STAGING_SLOTS // self._shared.settings.workers * KEY_SIZE
            self._shared.staging[(slot - 1) * share : slot * share] = bytes(share)

    def _all_alive(self) -> bool:
        """Has every main loop run lately?"""
        beats = self._shared.metrics.gauge("beats")
        now = time.monotonic()
        for child in self._children:
            seen = beats[child.slot - 1 if child.slot else -1]
            if seen != child.beats:
                child.beats, child.fresh = seen, now
        return all(now - child.fresh < STALE_SECONDS for child in self._children)

    def _tell(self, number: int, children: list[Child]) -> None:
        for child in children:
            if child.pid:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    def _end(self, children: list[Child]) -> None:
        """END, wait, and SIGKILL for what does not end in time."""
        self._tell(END, children)
        deadline = time.monotonic() + DRAIN_SECONDS + 5
        while any(child.pid for child in children):
            for child in children:
                if child.pid and os.waitpid(child.pid, os.WNOHANG)[0]:
                    child.pid = 0
            if time.monotonic() > deadline:
                self._tell(signal.SIGKILL, children)
            self._signals.wait(0.05)


class StartFailed(OperatorError):
    """What the keeper process told of its failure to start."""

    default_code = "start_failed"


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit code {os.WEXITSTATUS(status)}"


def _in_child(supervisor: int, lock: int, main: Callable[[], None]) -> NoReturn:
    """Never returns into the supervisor's frames, whatever happens."""
    code = 1
    try:
        # Not SIGTERM: nobody is left to end them in order, and a worker would wait for a keeper that is gone
        # while the next daemon starts. What was acknowledged is on disk.
        hardening.die_with_parent(supervisor, signal.SIGKILL)
        os.close(lock)  # else the data-dir would stay locked after the supervisor's death
        main()
        code = 0
    except KMSError as error:
        log.error("%s%s", error.message, f" ({error.hint})" if error.hint else "")
    except BaseException:
        log.exception("a process of the daemon ended with an error")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _keeper_main(shared: Shared, incarnation: int, report: int) -> None:
    signals = SignalPipe(child=True)
    try:
        keeper, epoch = _open_keeper(shared, incarnation)
    except KMSError as error:
        os.write(report, json_dumps({"error": [error.message, error.hint]}).encode() + b"\n")
        return
    os.write(report, json_dumps({"epoch": epoch}).encode() + b"\n")
    os.close(report)
    counters = shared.metrics.block(shared.settings.workers)
    counters.clear("beats")
    while not signals.stop:
        keeper.round(BEAT_SECONDS, signals.fd)
        counters.add("beats", 1)
        signals.clear()
        if signals.take_hangup():
            _reopen_keeper(keeper)
    keeper.close()


def _worker_main(shared: Shared, slot: int, chain: str) -> None:
    signals = Signals(child=True)
    _pin(slot)
    worker = Worker(shared, slot, chain)

    def stop(seconds: float) -> bool:
        if not signals.stop and not signals.hangup:
            signals.wait(seconds)
        return signals.stop

    worker.run(stop, signals.take_hangup)


def _pin(slot: int) -> None:
    """One core a worker: two threads on two cores would only fight for the interpreter's lock."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        with suppress(OSError):
            os.sched_setaffinity(0, {cores[(slot - 1) % len(cores)]})
