"""What a rotation leaves in the data-dir: nothing where it did not happen, and lines instead of a million
files."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from progressdb_kms.crypto import envelope
from progressdb_kms.crypto.aead import Aead
from progressdb_kms.crypto.keyring import fingerprint
from progressdb_kms.encoding import b64encode
from progressdb_kms.store.snapshots import LINES, SMALL
from tests.harness import Daemon
from tests.harness.procs import wait_until
from tests.harness.wire import UnexpectedReply


def fill(daemon: Daemon, count: int) -> list[str]:
    """So many DEKs, by `import`. Returns their key_ids."""
    kek = memoryview(bytearray(daemon.kek))
    kek_id = fingerprint(kek)
    names = [f"k{n:06d}" for n in range(count)]
    with open(daemon.home / "lines", "w") as file:
        for name in names:
            dek = memoryview(bytearray(os.urandom(32)))
            blob = envelope.wrap(Aead(kek), kek_id, name, os.urandom(12), dek)
            print(json.dumps({"key_id": name, "thread_id": "t", "wrapped": b64encode(blob)}), file=file)
    done = daemon.offline("import", str(daemon.home / "lines"))
    assert done.returncode == 0, done.stderr
    (daemon.home / "lines").unlink()
    return names


def listed(daemon: Daemon) -> list[dict[str, object]]:
    done = daemon.offline("backups", "list", "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def snapshots(daemon: Daemon) -> Path:
    return daemon.data_dir / "kms-deks-backup"


def rotating(daemon: Daemon, deks: int) -> threading.Thread:
    """Started, with a rotation of so many under way in a thread: the daemon is to be killed under it."""
    fill(daemon, deks)
    daemon.start()
    root = snapshots(daemon)

    def run() -> None:
        over = (OSError, http.client.HTTPException, UnexpectedReply)
        with contextlib.suppress(*over), daemon.session() as kms:
            kms.rotate(os.urandom(32))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: root.is_dir() and len(list(root.glob("*/*.json"))) > 100, 60, "the first files")
    return thread


@contextlib.contextmanager
def stopped_rotating(deks: int) -> Iterator[tuple[Daemon, threading.Thread]]:
    """A daemon that stands still in the middle of it; another one, where it was done before that."""
    for _ in range(5):
        with contextlib.closing(Daemon(workers=1)) as daemon:
            started = rotating(daemon, deks)
            daemon.signal(signal.SIGSTOP)
            if not listed(daemon)[0]["finished"]:
                yield daemon, started
                return
            daemon.signal(signal.SIGCONT)
            started.join()
    raise AssertionError("the rotation is always done before the daemon is stopped")


def test_killed_and_resumed_at_once() -> None:
    with stopped_rotating(4000) as (daemon, started):
        daemon.kill()
        started.join()
        (left,) = listed(daemon)
        assert left["finished"] is False and left["rewrapped"] is None
        daemon.start()
        time.sleep(1.1)  # a name of its own
        daemon.write_kek(os.urandom(32))
        with daemon.session() as kms:
            assert kms.rotate(daemon.kek)["rewrapped"] == 4000
        wait_until(lambda: len(os.listdir(snapshots(daemon))) == 2, 60, "the first snapshot to be tidied up")
        (kept,) = listed(daemon)
        assert kept["finished"] is True and kept["deks"] == 4000 and kept["path"] != left["path"]
        daemon.stop()
        assert daemon.offline("verify").returncode == 0


def test_prune_knows_what_was_left() -> None:
    with stopped_rotating(3000) as (daemon, started):
        done = daemon.offline("backups", "prune", "--keep", "1", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["paths"] == [], "it is being written"
        daemon.kill()
        started.join()
        (left,) = listed(daemon)
        done = daemon.offline("backups", "prune", "--keep", "1", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["paths"] == [left["path"]]
        assert os.listdir(snapshots(daemon)) == [] and listed(daemon) == []


def test_a_shredded_dek_that_comes_back_is_told(daemon: Daemon, tmp_path: Path) -> None:
    """With a copy of the folder, or since another was mounted over it when the DEK was shredded."""
    with daemon.session() as kms:
        gone, kept = (kms.create_dek("t")["key_id"] for _ in range(2))
        daemon.write_kek(os.urandom(32))
        folder = Path(kms.rotate(daemon.kek)["backup"])
        shutil.copytree(folder, tmp_path / "copy")
        kms.ok("DELETE", f"/deks/{gone}", {"immediately": True})
    row = (tmp_path / "copy" / f"{gone}.json").read_bytes()
    for name, content in ((f"{gone}.json", row), (LINES, row.replace(b"\n", b"") + b"\n")):
        assert daemon.offline("verify", "--json").returncode == 0
        (folder / name).write_bytes(content)
        done = daemon.offline("verify")
        assert done.returncode == 1 and f"{gone}: was shredded".encode() in done.stderr
        assert kept.encode() not in done.stderr
        (folder / name).unlink()


@pytest.mark.long
def test_lines_in_a_large_store() -> None:
    daemon = Daemon(workers=1)
    try:
        names = fill(daemon, SMALL + 100)
        daemon.start()
        old = daemon.kek
        with daemon.session() as kms:
            before = kms.get_wrapped(names[77])["wrapped"].encode()[-64:-4]
            daemon.write_kek(os.urandom(32))
            folder = Path(kms.rotate(daemon.kek)["backup"])
            assert os.listdir(folder) == [LINES] and before in (folder / LINES).read_bytes()
            kms.ok("DELETE", f"/deks/{names[77]}", {"immediately": True})
            assert before not in (folder / LINES).read_bytes()
            found = listed(daemon)
            assert [(row["deks"], row["rewrapped"]) for row in found] == [(SMALL + 99, SMALL + 100)]
        daemon.stop()
        daemon.write_config({"workers": 1, "previous_master_keys": [{"hex": old.hex()}]})
        for key, restored in ((names[78], 0), (names[77], None), (None, 0)):
            words = ("--key", key) if key else ()
            done = daemon.offline("restore", "--snapshot", str(folder), *words, "--json")
            if restored is None:
                assert done.returncode == 1 and b"shredded" in done.stderr
            else:
                assert done.returncode == 0 and json.loads(done.stdout)["restored"] == restored, done.stderr
        assert daemon.offline("verify").returncode == 0
    finally:
        daemon.close()
