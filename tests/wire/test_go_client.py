"""The client that the service is for: Go's net/http over a Unix dialer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness import Daemon

SOURCE = Path(__file__).with_name("goclient.go")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("go") is None:
        pytest.skip("there is no Go here")
    folder = tmp_path_factory.mktemp("go")
    env = {**os.environ, "GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
    done = subprocess.run(
        ["go", "build", "-o", "client", str(SOURCE)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "client"


@pytest.mark.parametrize("workers", [1, 2])
def test_go(program: Path, workers: int) -> None:
    with Daemon(workers=workers) as daemon:
        keks = [os.urandom(32).hex() for _ in range(2)]
        done = subprocess.run(
            [str(program), str(daemon.socket), *keks], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
