"""The client that the service is for: Go's net/http over a Unix dialer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness import Daemon
from tests.harness.wire import free_port, host_of

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
def test_first_and_second_generation(program: Path, workers: int) -> None:
    with Daemon(workers=workers) as daemon:
        keks = [os.urandom(32).hex() for _ in range(2)]
        done = subprocess.run(
            [str(program), "first", str(daemon.socket), *keks], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("tcp", [False, True], ids=["socket", "tcp"])
@pytest.mark.parametrize("workers", [1, 2])
def test_third_generation(program: Path, workers: int, tcp: bool) -> None:
    address = host_of(free_port())
    config = {"tcp_address": address} if tcp else {}
    with Daemon(config, workers=workers) as daemon, subprocess.Popen(
        [str(program), "third", address if tcp else str(daemon.socket)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as client:  # fmt: skip
        assert client.stdin is not None and client.stdout is not None
        said = client.stdout.readline()
        assert said == "restart\n", said
        daemon.stop()
        daemon.start()
        rest = client.communicate("on\n", timeout=60)
        assert (client.returncode, *rest) == (0, "done\n", "")
