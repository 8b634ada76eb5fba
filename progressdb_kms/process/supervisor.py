"""Children: a keeper and workers are started, watched, replaced and ended in order."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import IO, Any, Callable, NoReturn

from .. import __version__
from ..crypto.aead import KEY_SIZE
from ..encoding import json_dumps
from ..errors import KMSError, OperatorError, StoreUnavailable
from ..journal import Chore, Matter
from ..pause import Pause
from ..service import channel, start
from ..service.lock import Claim
from ..service.metrics import Metrics
from ..wire.answers import last_words
from ..wire.dispatch import error_reply
from ..wire.handed import refuse
from . import hardening, systemd
from .signals import END, ENDING, SignalPipe, Signals
from .streams import catch_up, ran_out
from .worker import DRAIN_SECONDS, Shared, Worker, reopen

log = logging.getLogger("progressdb_kms")

BEAT_SECONDS = 1.0
"""How often each process shows that its main loop runs; it turns as often, and for each signal and job."""

STALE_SECONDS = 20.0
"""A process whose main loop, or whose waiter, stands still for so long keeps the watchdog from being fed."""

MOMENT = 0.05
"""Seconds of a turn while something is under way: a start, an end, a process that is to be replaced."""

KEEPER_PAUSES = 1.0, 30.0
"""Seconds between two tries to start a keeper that could not open the store; the workers go on reading."""

SLOW_SECONDS = 5.0
"""A keeper that has not opened the store by then may hang, or its disk: callers wait for it no more."""

RESPAWN_SECONDS, DOUBLINGS = 0.5, 6
"""Least time between two starts of the same process, so that one that can't live does not eat the machine; of
a worker twice as long after each that failed within SLOW_SECONDS, so many times. Who was killed comes back at
once."""

TURNED_AWAY = 64
"""Callers that the supervisor answers in a turn, where no worker is there."""


class Child:
    """A keeper or worker process in its place; replaced when it dies."""

    def __init__(self, slot: int) -> None:
        self.slot = slot  # 0: the keeper
        self.pid = 0
        self.incarnation = -1
        self.started = 0.0
        self.failures = 0  # in a row, soon after the start


class Pulse:
    """Who has come on lately? By its own looks, of which none counts for more than two beats: all that stood
    still together (a frozen session) is not stuck."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._stuck = Matter(
            f"pid %s: no step for {STALE_SECONDS:g} s, it hangs, or its disk", "all processes come on again"
        )
        self._now = 0.0
        self._looked = time.monotonic()
        self._since: dict[tuple[int, int], float] = {}  # of each process and number of beats

    def beats(self, pids: Mapping[int, int]) -> bool:
        """Do all of these, pids by their block? Who does not is a line of the journal, and so is the end."""
        looked, self._looked = self._looked, time.monotonic()
        self._now += min(2 * BEAT_SECONDS, self._looked - looked)
        counts, since = self._metrics.gauge("beats"), self._since
        seen = [(pid, counts[block]) for block, pid in pids.items()]
        self._since = {one: since.get(one, self._now) for one in seen}
        stuck = [str(pid) for (pid, _), then in self._since.items() if self._now - then >= STALE_SECONDS]
        self._stuck.tell(", ".join(stuck))
        return not stuck


class Front:
    """The process that was started, to those outside: systemd, the person at the terminal, whoever looks for
    the socket's name or writes other policies."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._pulse = Pulse(shared.metrics)
        self._said = False
        self._next = 0.0
        self._interval = systemd.watchdog_seconds()

    def turn(self, pids: Mapping[int, int]) -> None:
        """To be called often. `pids`, by their block: of all that have to come on."""
        if not self._said:
            self._ready()
        self._shared.name.watch()
        if not self._pulse.beats(pids):
            return
        catch_up()
        if self._interval is not None and time.monotonic() >= self._next:
            systemd.notify("WATCHDOG=1")
            self._next = time.monotonic() + self._interval / 2

    def _ready(self) -> None:
        if self._shared.fleet and self._shared.fleet.waits(_announce):
            return
        self._said = True
        active = self._shared.keyring.active
        settings = self._shared.settings
        tcp = f" tcp={settings.tcp_address}" if self._shared.tcp is not None else ""
        _announce(
            f"progressdb-kms {__version__} ready: socket={settings.socket}{tcp} kek_id={active.kek_id} "
            f"kek_version={active.version} workers={settings.workers} memory={self._shared.region.kind}"
        )
        systemd.notify(f"READY=1\nSTATUS=KEK {active.kek_id}, {settings.workers} workers")

    def reload(self) -> None:
        """SIGHUP, before anybody else hears of it."""
        log.info("SIGHUP: the audit log is opened anew")
        systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        systemd.notify("READY=1")
        self._shared.policies.renew()

    def stop(self) -> None:
        systemd.notify("STOPPING=1")
        self._shared.name.remove()


def _announce(line: str) -> None:
    print(line, flush=True)
    if getattr(getattr(sys.stdout, "buffer", None), "dropped", 0):
        log.warning("stdout takes nothing: %s", line)


class Supervisor:
    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._children = [Child(slot) for slot in range(shared.settings.workers + 1)]
        self._epoch = 0
        self._coming: IO[bytes] | None = None  # where a keeper that starts says that it is up
        self._signals = Signals()
        self._keeping = Pause(*KEEPER_PAUSES)
        self._missing = Matter("no change can be made, and it is tried again: %s", "the keeper is up again")
        self._working = Chore("a worker is missing")
        self._failing = Matter("a worker can't come, and it is tried again: %s", "all workers are up again")
        self._words = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # of those, before they end
        self._served = time.monotonic()

    def run(self) -> int:
        front = Front(self._shared)
        try:
            self._start_keeper()
            while not self._hear(MOMENT):  # one that hangs must not keep anybody from ending the daemon
                if signal.sigpending() & ENDING:
                    return 0
            for child in self._children[1:]:
                self._start_worker(child)
            while not self._signals.stop:
                front.turn({self._block(child): child.pid for child in self._children if child.pid})
                waits = self._coming or not all(child.pid for child in self._children)
                self._signals.wait(MOMENT if waits else BEAT_SECONDS)
                if self._signals.take_hangup():
                    front.reload()
                    self._tell(signal.SIGHUP, self._children)
                self._replace_dead()
        finally:  # an error too: the keys are wiped next, and a keeper that still ran would sign rows without
            front.stop()
            self._end(self._children[1:], DRAIN_SECONDS + 5)
            self._end(self._children[:1], SLOW_SECONDS if self._coming else DRAIN_SECONDS + 5)
        return 0

    # ---- children --------------------------------------------------------------------------------

    def _fork(self, child: Child, main: Callable[[], None]) -> None:
        self._shared.lock.insist(self._shared.settings.data_dir)
        child.incarnation += 1
        child.started = time.monotonic()
        supervisor = os.getpid()
        with hardening.signals_blocked():  # as long as the child has no Signals of its own
            child.pid = os.fork()
            if not child.pid:
                _in_child(supervisor, self._shared.lock, main)
        self._shared.metrics.block(self._block(child)).add("starts", 1)

    def _block(self, child: Child) -> int:
        return child.slot - 1 if child.slot else self._shared.settings.workers

    def _start_keeper(self) -> None:
        child = self._children[0]
        with ExitStack() as failed:
            read, write = os.pipe()
            coming = failed.enter_context(open(read, "rb"))
            with open(write, "wb"):
                self._fork(child, partial(_keeper_main, self._shared, child.incarnation + 1, write))
            failed.pop_all()
        self._coming = coming  # closed when it was heard

    def _hear(self, seconds: float) -> bool:
        """Is the keeper up that starts? Raises StartFailed."""
        if self._coming is None or not select.select([self._coming], [], [], seconds)[0]:
            return False
        with self._coming as answers:
            ended = b'{"error": ["the keeper process ended at its start", ""]}'
            told: dict[str, Any] = json.loads(answers.readline() or ended)
        self._coming, child = None, self._children[0]
        if "error" in told:
            os.waitpid(child.pid, 0)
            child.pid = 0
            raise StartFailed(told["error"][0], hint=told["error"][1])
        if not child.incarnation:
            self._epoch = told["epoch"]
        return True

    def _start_worker(self, child: Child) -> None:
        suffix = f".{child.incarnation + 1}" if child.incarnation >= 0 else ""
        chain = f"{self._epoch}.{child.slot}{suffix}"
        self._fork(child, partial(_worker_main, self._shared, child.slot, chain, self._words[1]))

    def _replace_dead(self) -> None:
        for child in self._children:
            if child.pid and (child.slot or not self._coming):
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if not pid:
                    continue
                name = f"worker {child.slot}" if child.slot else "the keeper"
                if words := self._heard():
                    self._failing.tell(*words)
                else:
                    log.error("%s (pid %d) ended (%s): it is replaced", name, pid, _how(status))
                child.pid = 0
                early = time.monotonic() - child.started < SLOW_SECONDS
                failed = child.slot and early and os.WIFEXITED(status)
                child.failures = min(child.failures + 1, DOUBLINGS) if failed else 0
                self._wipe_after(child.slot)
            if time.monotonic() - child.started >= RESPAWN_SECONDS * 2**child.failures:
                if not child.slot:
                    self._revive_keeper()
                elif self._children[0].pid:  # where no process can be had now, the others go on
                    self._working.attend(partial(self._start_worker, child))
        self._turn_away()

    def _heard(self) -> list[str]:
        """Why workers could not come, which they said last."""
        with suppress(BlockingIOError):
            return os.read(self._words[0], 1 << 16).decode().splitlines()
        return []

    def _turn_away(self) -> None:
        """Where no worker has lived for long: who comes hears that, and need not wait for one."""
        living = [time.monotonic() - child.started for child in self._children[1:] if child.pid]
        if len(living) == len(self._children) - 1 and min(living) > SLOW_SECONDS:
            self._failing.tell()
        if living and max(living) > SLOW_SECONDS:
            self._served = time.monotonic()
        listener = self._shared.name.listener
        if living or time.monotonic() - self._served < SLOW_SECONDS or not refuse(listener):
            return  # where a peer may hand over descriptors, to close might wait: see `handed`
        why = StoreUnavailable("no worker can be started", hint="it is tried again; see the journal")
        with suppress(OSError):
            for _ in range(TURNED_AWAY):
                with listener.accept()[0] as caller:
                    caller.sendall(last_words(error_reply(why)))

    def _revive_keeper(self) -> None:
        """It has served, so it will again: no state of the disk ends the daemon. Who asks meanwhile hears.
        Nothing is waited for here."""
        try:
            if self._coming is None and self._keeping.over():
                self._start_keeper()
            if self._hear(0):
                self._keeping.worked()
        except (KMSError, OSError) as error:
            if self._shared.fleet and not self._shared.fleet.opened:
                raise
            self._keeping.failed(error.line if isinstance(error, KMSError) else ran_out(error) or str(error))
        self._missing.tell(self._keeping.why)
        slow = self._coming is not None and time.monotonic() - self._children[0].started > SLOW_SECONDS
        why = self._keeping.why or "the keeper process is only starting"
        self._stand_in(StoreUnavailable(why, hint="it is tried again by itself"), slow)

    def _stand_in(self, error: StoreUnavailable, slow: bool = False) -> None:
        """What they hear who ask a keeper that is not there, or is `slow` to come."""
        gone = slow or not self._children[0].pid
        while gone and (job := channel.receive(self._shared.inbox)) is not None:
            channel.answer(job, error)

    def _wipe_after(self, slot: int) -> None:
        """What a dead worker held: connections, locked memory, new KEKs."""
        if slot:
            self._shared.metrics.block(slot - 1).clear()
            self._shared.slabs[slot - 1].buffer.wipe()
            share = channel.STAGING_SLOTS // self._shared.settings.workers * KEY_SIZE
            self._shared.staging[(slot - 1) * share : slot * share] = bytes(share)

    def _tell(self, number: int, children: list[Child]) -> None:
        for child in children:
            if child.pid:  # nobody waited for it, so the number is its own still
                os.kill(child.pid, number)

    def _end(self, children: list[Child], seconds: float) -> None:
        """END, wait, and SIGKILL for what does not end in time. Nobody waits for a keeper that died too soon:
        none is started any more."""
        self._tell(END, children)
        deadline = time.monotonic() + seconds
        while any(child.pid for child in children):
            for child in self._children:
                if child.pid and os.waitpid(child.pid, os.WNOHANG)[0]:
                    child.pid = 0
            self._stand_in(StoreUnavailable("the keeper process ended before the others"))
            left = ", ".join(str(child.pid) for child in children if child.pid)
            if left and time.monotonic() > deadline:
                log.error("pid %s: no end within %g s, it hangs, or its disk: it is killed", left, seconds)
                self._tell(signal.SIGKILL, children)
                deadline = float("inf")
            self._signals.wait(MOMENT)


class StartFailed(OperatorError):
    """What the keeper process told of its failure to start."""

    default_code = "start_failed"


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)  # of a signal, its number below zero: not each has a name
    return {-one: one.name for one in signal.Signals}.get(code, f"exit code {code}")


def _in_child(supervisor: int, lock: Claim, main: Callable[[], None]) -> NoReturn:
    """Never returns into the supervisor's frames, whatever happens."""
    code = 1
    try:
        # Not SIGTERM: nobody is left to end them in order, and a worker would wait for a keeper that is gone
        # while the next daemon starts. What was acknowledged is on disk.
        hardening.die_with_parent(supervisor)
        lock.close()  # else the data-dir would stay locked after the supervisor's death
        main()
        code = 0
    except KMSError as error:
        log.error("%s", error.line)
    except BaseException as error:
        if (limit := ran_out(error)) is not None:
            log.error("%s", limit)
        else:
            log.exception("a process of the daemon ended with an error")
    finally:
        os._exit(code)


def _keeper_main(shared: Shared, incarnation: int, report: int) -> None:
    shared.name.listener.close()  # or it would look served when its name was bound again, and nobody is
    try:
        signals = SignalPipe(child=True)
        keeper, epoch = (shared.fleet or start).open_keeper(
            shared.settings.data_dir, shared.keyring, shared.keys, shared.staging, shared.inbox, incarnation
        )
    except Exception as error:
        why = (error.message, error.hint) if isinstance(error, KMSError) else (ran_out(error), "")
        if why[0] is None:
            raise
        os.write(report, json_dumps({"error": why}).encode() + b"\n")
        return
    os.write(report, json_dumps({"epoch": epoch}).encode() + b"\n")
    os.close(report)
    counters = shared.metrics.block(shared.settings.workers)
    counters.clear()
    while not signals.stop:
        keeper.round(BEAT_SECONDS, signals.fd)
        counters.add("beats", 1)
        catch_up()
        signals.clear()
        if signals.take_hangup():
            reopen(keeper)
    keeper.close()


def _worker_main(shared: Shared, slot: int, chain: str, words: int) -> None:
    signals = Signals(child=True)
    if shared.settings.workers > 1:
        _pin(slot)
    try:
        worker = Worker(shared, slot, chain)
    except KMSError as error:
        os.write(words, error.line.encode() + b"\n")  # the next one may say the same: it is told once
        os._exit(1)
    shared.name.listener.close()  # it has its own
    worker.run(signals)


def _pin(slot: int) -> None:
    """One core a worker: two threads on two cores would only fight for the interpreter's lock."""
    cores = sorted(os.sched_getaffinity(0))
    with suppress(OSError):
        os.sched_setaffinity(0, {cores[(slot - 1) % len(cores)]})
