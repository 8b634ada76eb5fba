"""Fixtures for all tests.

    daemon          a running daemon with the default configuration, for this test alone
    make_daemon     make_daemon(config, workers=2, …): as many as the test wants, of any configuration
    shared_daemon   one running daemon a module: for tests that only add keys of their own
    workers         runs the test with one worker and with two: `make_daemon(workers=workers)`
    postgres_server one PostgreSQL server for the whole run of this process; skipped where there is none
    short_tmp       a folder directly under /tmp, for socket paths

A test that waits for something that never comes is ended after LIMIT seconds (marked `long`: LONG_LIMIT).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Callable

import pytest

from tests.harness import postgres, warm
from tests.harness.daemon import Daemon
from tests.harness.folders import new_folder

LIMIT = 180
LONG_LIMIT = 3600

MakeDaemon = Callable[..., Daemon]


@pytest.fixture
def make_daemon() -> Iterator[MakeDaemon]:
    """Makes and starts daemons (`start=False`: only makes); all are ended with the test."""
    made: list[Daemon] = []

    def make(*args: Any, start: bool = True, **options: Any) -> Daemon:
        made.append(Daemon(*args, **options))
        return made[-1].start() if start else made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    return make_daemon()


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    with Daemon() as one:
        yield one


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
def workers(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Postgres]:
    if why := postgres.missing():
        pytest.skip(why)
    with postgres.Postgres() as server:
        yield server


@pytest.fixture
def fleet_database(postgres_server: postgres.Postgres) -> Iterator[postgres.Fleet]:
    """A fleet of this test alone, in that server."""
    with postgres.Fleet(postgres_server) as fleet:
        yield fleet


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    folder = new_folder()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    limit = LONG_LIMIT if request.node.get_closest_marker("long") else LIMIT

    def expired(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the test was still running after {limit} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(limit)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(tryfirst=True)  # before the fixtures, of which some start daemons
def pytest_runtest_setup(item: pytest.Item) -> None:
    warm.enabled = warm.WANTED and item.get_closest_marker("fresh") is None


def pytest_configure(config: pytest.Config) -> None:
    with contextlib.suppress(ImportError):
        from hypothesis import HealthCheck, settings

        slow = [HealthCheck.too_slow]  # a slow machine is no failure
        settings.register_profile("kms", deadline=None, suppress_health_check=slow)
        settings.load_profile("kms")  # before any test is imported: each keeps what is set then
    share_what_is_rewritten()


sys.dont_write_bytecode = False  # here, whatever the environment says: what pytest makes of a test is kept


def share_what_is_rewritten() -> None:
    """Where several processes run the tests, each is the first to import a part of them: pytest rewrites
    their assertions, which takes longer than all else before the first test, and the others find it done."""
    number, count = (os.environ.get(f"PYTEST_XDIST_WORKER{name}", "") for name in ("", "_COUNT"))
    if not number:
        return
    top = Path(__file__).parent
    files = sorted(top.rglob("test_*.py"))
    for path in files[int(number[2:]) :: int(count)]:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # told when it is collected
            importlib.import_module(".".join(path.relative_to(top.parent).with_suffix("").parts))


def starts_a_daemon(item: pytest.Item) -> bool:
    """Whether it is one of those that `bin/test --fast` leaves out: tests of the process and of the commands,
    and wherever else a daemon is asked."""
    if item.path.relative_to(Path(__file__).parent).parts[0] in ("process", "tools"):
        return True
    starts = {"daemon", "make_daemon", "shared_daemon", "kms", "postgres_server"}
    asked = starts & set(getattr(item, "fixturenames", ()))
    return bool(asked) or "[postgresql" in item.name or hasattr(getattr(item, "module", None), "Daemon")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = [item for item in items if starts_a_daemon(item)]
    for item in slow:
        item.add_marker(pytest.mark.slow)
    # Files with slow tests come first: the last ones of several processes fill up what is left of the time.
    first = {item.path for item in slow}
    items.sort(key=lambda item: item.path not in first)
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(
                pytest.mark.skip(reason="needs root (mounts, ptrace of a process that is not dumpable)")
            )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what living daemons said on stderr beside the failure of a test."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed:
        for one in Daemon.running:
            pid = one.process.pid if one.process else "(ended)"
            report.sections.append((f"stderr of daemon {pid}", one.stderr[-6000:] or "(nothing)"))
