"""`rotate-kek` killed at any step, with a real daemon: no key is lost, and the next start finds its way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.daemon import Daemon, cli
from tests.harness.fakekms import kek_id_of
from tests.harness.faults import Step, Steps, killing, need_strace, steps_of

ROUNDS = 2


class Site(NamedTuple):
    daemon: Daemon
    key_id: str
    box: bytes
    copy: Path  # of all files before the rotation


@pytest.fixture
def site(short_tmp: Path) -> Iterator[Site]:
    """A daemon with a DEK and something encrypted under it, stopped, and a copy of its folder."""
    need_strace()
    with Daemon(workers=1) as daemon:
        with daemon.session() as session:
            key_id = session.create_dek("t")["key_id"]
            box = session.encrypt(key_id, b"precious")
        daemon.stop()
        copy = short_tmp / "copy"
        shutil.copytree(daemon.home, copy, ignore=shutil.ignore_patterns("s"))
        yield Site(daemon, key_id, box, copy)


def again(site: Site) -> Daemon:
    """The daemon as it was, serving."""
    for path in site.daemon.home.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(site.copy, site.daemon.home, dirs_exist_ok=True)
    return site.daemon.start()


def rotate(daemon: Daemon, *args: str, wrapper: Sequence[str] = ()) -> subprocess.CompletedProcess[bytes]:
    options = ("--config", str(daemon.config_file), "--socket", str(daemon.socket))
    return cli("rotate-kek", *options, *args, wrapper=wrapper, cwd=daemon.home)


def readable(site: Site) -> str:
    """The active kek_id of a daemon that still opens what was encrypted."""
    with site.daemon.session() as session:
        assert session.decrypt(site.key_id, site.box) == b"precious"
        return str(session.ok("GET", "/status")["kek_id"])


def key_files(daemon: Daemon) -> dict[str, str]:
    """kek_id by name, of what may be a key file."""
    names = [name for name in os.listdir(daemon.home) if "kek" in name]
    return {name: kek_id_of(bytes.fromhex((daemon.home / name).read_text())) for name in names}


def die_and_recover(site: Site, step: Step) -> None:
    daemon = again(site)
    old = readable(site)
    done = rotate(daemon, "--generate", wrapper=killing(step))
    assert done.returncode == -signal.SIGKILL, f"not killed at {step}: {done.stderr!r}"
    daemon.kill()
    daemon.start()  # the key files as they lie there are enough
    active = readable(site)
    done = rotate(daemon, "--resume")
    assert done.returncode == 0, f"killed at {step}: {done.stderr!r}"
    active = readable(site)
    wanted = {"kek": active} if active == old else {"kek": active, f"kek.old-{old}": old}
    assert key_files(daemon) == wanted, f"killed at {step}"
    daemon.stop()
    daemon.start()
    assert readable(site) == active
    daemon.stop()


def steps(site: Site) -> Steps:
    daemon = again(site)
    found = steps_of(lambda wrapper: rotate(daemon, "--generate", wrapper=wrapper), daemon.home)
    daemon.stop()
    assert len(found) >= 10, [str(step) for step in found]
    return found


def test_killed_at_some_steps(site: Site) -> None:
    for step in steps(site).spread(ROUNDS):
        die_and_recover(site, step)


@pytest.mark.long
def test_killed_at_every_step(site: Site) -> None:
    for step in steps(site):
        die_and_recover(site, step)
