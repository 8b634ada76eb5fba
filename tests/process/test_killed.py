"""kill -9 of the process that writes, right before any step that it takes on the disk.

Its supervisor stands still meanwhile, so that the daemon dies as a whole; test_lifecycle kills parts of it
under load.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest

from tests.harness import Daemon, Session, procs
from tests.harness.daemon import DaemonFailed
from tests.harness.faults import Step, Steps, kill_at, need_strace, trace_steps
from tests.harness.kept import Kept
from tests.harness.wire import UnexpectedReply

ROUNDS = 2
NEW = os.urandom(32)


class Site(NamedTuple):
    daemon: Daemon
    kept: Kept
    victim: str  # the DEK that the operation is about
    wrapped: bytes  # its wrapped form, as base64
    sealed: bytes
    copy: Path


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A stopped daemon with DEKs that were rotated once (so that there are snapshots), and a copy of it."""
    need_strace()
    kept = Kept()
    with Daemon(workers=1) as daemon:
        with daemon.session() as kms:
            kept.create(kms, 4)
            victim = kms.create_dek("victim")["key_id"]
            sealed = kms.encrypt(victim, b"victim")
            daemon.write_kek(os.urandom(32))
            kms.rotate(daemon.kek)
            wrapped = kms.get_wrapped(victim)["wrapped"].encode()
        daemon.stop()
        copy = daemon.home.with_name(daemon.home.name + "-copy")
        shutil.copytree(daemon.home, copy, ignore=shutil.ignore_patterns("s"))
        yield Site(daemon, kept, victim, wrapped, sealed, copy)
    shutil.rmtree(copy)


def begin(site: Site) -> Site:
    """The daemon as it was, serving, and what it must keep."""
    if site.daemon.alive:
        site.daemon.kill()  # an earlier test failed
    for path in site.daemon.home.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(site.copy, site.daemon.home, dirs_exist_ok=True)
    site.daemon.start()
    kept = Kept()
    kept.sealed = dict(site.kept.sealed)
    return site._replace(kept=kept)


def rotate(kms: Session, site: Site) -> None:
    kms.rotate(NEW)


def rewrap(kms: Session, site: Site) -> None:
    kms.ok("POST", "/rewrap", {"key_id": site.victim, "new_kek_hex": NEW.hex()})


def shred(kms: Session, site: Site) -> None:
    kms.ok("DELETE", f"/deks/{site.victim}", {"immediately": True})


def create(kms: Session, site: Site) -> None:
    site.kept.create(kms)


def traces(site: Site) -> list[Path]:
    piece = site.wrapped[-64:-4]
    return [path for path in site.daemon.data_dir.rglob("*") if path.is_file() and piece in path.read_bytes()]


def victim_is_whole(kms: Session, site: Site) -> None:
    assert kms.decrypt(site.victim, site.sealed) == b"victim"


def victim_is_whole_or_gone(kms: Session, site: Site) -> None:
    """Where the tombstone was written, the next start finishes the erasure by itself."""
    state = kms.ok("GET", f"/deks/{site.victim}")["state"]
    if state == "enabled":
        victim_is_whole(kms, site)
        shred(kms, site)
    assert kms.request("GET", f"/get_wrapped?key_id={site.victim}").status == 410


class Case(NamedTuple):
    run: Callable[[Session, Site], None]
    after: Callable[[Session, Site], None]
    leaves_traces: bool = True


CASES = {
    "create": Case(create, victim_is_whole),
    "rotate": Case(rotate, victim_is_whole),
    "rewrap": Case(rewrap, victim_is_whole),
    "shred": Case(shred, victim_is_whole_or_gone, leaves_traces=False),
}


def steps_of(site: Site, case: Case) -> Steps:
    site, daemon = begin(site), site.daemon
    with trace_steps(daemon.writer, daemon.data_dir) as steps, daemon.session() as kms:
        case.run(kms, site)
    daemon.stop()
    assert len(steps) >= 3, [str(step) for step in steps]
    return steps


def die_and_recover(site: Site, case: Case, step: Step) -> bool:
    """Returns whether it died at that step; else it went another way, and is killed after its answer."""
    site, daemon = begin(site), site.daemon
    writer = procs.proc(daemon.writer)
    assert writer is not None
    daemon.signal(signal.SIGSTOP)  # no other keeper comes
    with kill_at(writer.pid, step):
        gone = contextlib.suppress(OSError, http.client.HTTPException, UnexpectedReply)
        with gone, daemon.session() as kms:
            case.run(kms, site)
        with contextlib.suppress(AssertionError):
            procs.wait_until(lambda: not writer.alive(), 10)
        died = not writer.alive()
    daemon.kill()
    daemon.write_config(
        {"workers": 1, "previous_master_keys": [{"hex": NEW.hex()}]}
    )  # whichever is active now
    try:
        daemon.start()
    except DaemonFailed as refused:  # the new one, and the old one is no master any more
        assert "was rotated out" in str(refused)
        daemon.write_config({"workers": 1, "previous_master_keys": [{"hex": daemon.kek.hex()}]})
        daemon.write_kek(NEW)
        daemon.start()
    with daemon.session() as kms:
        site.kept.opens(kms)
        case.after(kms, site)
        assert kms.request("GET", "/readyz").status == 200, f"killed at {step}"
    site.kept.verifies(daemon)
    if not case.leaves_traces:
        assert traces(site) == [], f"killed at {step}"
    return died


@pytest.mark.parametrize("name", CASES)
def test_killed_at_some_steps(site: Site, name: str) -> None:
    steps = steps_of(site, CASES[name]).spread(ROUNDS)
    died = [step for step in steps if die_and_recover(site, CASES[name], step)]
    assert 2 * len(died) >= len(steps)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_step(site: Site, name: str) -> None:
    steps = list(steps_of(site, CASES[name]))
    died = [step for step in steps if die_and_recover(site, CASES[name], step)]
    assert 2 * len(died) >= len(steps)
