"""Can the store be written? Tried where somebody asks, and not for each who asks again and again: each try is
a flush of the disk that whoever changes something waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.service.health import PROVED_SECONDS
from progressdb_kms.store.sqlite import FILE_NAME

from .test_clock import Site
from .test_clock import site as site  # the fixture


@pytest.fixture
def tries(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rows that are tried."""
    assert site.keeper is not None
    found: list[str] = []
    store, write = site.keeper._store, site.keeper._store.write

    def noted(name: str, value: Any) -> None:
        found.extend([name] * (name == "probe"))
        write(name, value)

    monkeypatch.setattr(store, "write", noted)
    return found


def reasons(site: Site) -> list[str]:
    assert site.keeper is not None
    told = site.keeper._health.ready()
    assert told["store_writable"] == (not told["reasons"])
    return list(told["reasons"])


def test_who_asks_again_and_again_costs_one_flush_a_second(site: Site, tries: list[str]) -> None:
    for second in range(1, 4):
        assert not any(reasons(site) for _ in range(100))
        assert len(tries) == second
        site.clock.pass_by(PROVED_SECONDS)


def test_after_a_write_that_failed_it_is_tried_at_once(site: Site, tries: list[str]) -> None:
    assert site.keeper is not None
    assert not reasons(site)
    site.keeper._health.writing.failed("the disk is full")
    assert not reasons(site) and len(tries) == 2
    assert not site.keeper._health.writing.why


def test_a_file_that_is_gone_is_told_at_once(site: Site, tmp_path: Path) -> None:
    assert not reasons(site)
    moved = (tmp_path / FILE_NAME).rename(tmp_path / "elsewhere")
    assert [reason.split(" under ")[0] for reason in reasons(site)] == [f"{FILE_NAME} was moved away"]
    moved.rename(tmp_path / FILE_NAME)
    assert not reasons(site)
