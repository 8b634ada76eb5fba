"""A daemon a module and a connection a test. A module that wants another daemon defines its own `daemon`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import Daemon, Session


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(workers=1) as running:
        yield running


@pytest.fixture
def kms(daemon: Daemon) -> Iterator[Session]:
    with daemon.session() as session:
        yield session
