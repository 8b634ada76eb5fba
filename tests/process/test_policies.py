"""The page of memory by which policies come to the workers, and what a worker sees that looks while it is
written: the policies of before or those of after, whole."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from progressdb_kms.process import policies

OLD: list[dict[str, Any]] = [{"uid": 1, "operations": ["encrypt"]}]
NEW: list[dict[str, Any]] = [{"uid": 2, "keys": [f"k_{number}" for number in range(50)]}]


class Meanwhile(mmap.mmap):
    """Something else happens between two looks at it."""

    looks = 0
    then: Callable[[], object] = staticmethod(lambda: None)

    def __getitem__(self, part: Any) -> Any:
        seen = super().__getitem__(part)
        self.looks += 1
        if self.looks == 1:
            self.then()
        return seen


@pytest.mark.parametrize(("first", "second"), [(OLD, NEW), (NEW, OLD)], ids=["longer", "shorter"])
def test_a_worker_that_looks_while_they_are_renewed_sees_one_or_the_other(
    monkeypatch: pytest.MonkeyPatch, first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> None:
    made: list[Meanwhile] = []

    def memory(*args: Any) -> Meanwhile:
        made.append(Meanwhile(*args))
        return made[-1]

    monkeypatch.setattr(policies.mmap, "mmap", memory)
    settings: Any = SimpleNamespace(policies=first, config_file="kms.yaml")
    page = policies.Policies(settings)
    monkeypatch.setattr(policies, "read_policies", lambda path: second)
    made[-1].then = page.renew  # type: ignore[method-assign]
    uids = [policy.uid for policy in page.read()]
    assert made[-1].looks > 1
    assert uids == [second[0]["uid"]]
