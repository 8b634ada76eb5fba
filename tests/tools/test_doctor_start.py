"""What `doctor` passes starts, and what does not start it has failed: on data-dirs of real daemons."""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any, Callable

import pytest

from progressdb_kms.crypto.memory import PAGE
from progressdb_kms.tools import asowner, doctor
from tests.conftest import MakeDaemon
from tests.harness import Daemon
from tests.harness.daemon import DaemonFailed, write_secret
from tests.harness.faults import need_mount
from tests.harness.wire import free_port, host_of


@pytest.fixture
def stopped(make_daemon: MakeDaemon) -> Daemon:
    """A daemon that has served, with its store as it was before the last start beside it."""
    daemon = make_daemon(workers=1)
    for _ in range(3):
        daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})
    daemon.stop()
    shutil.copy(daemon.data_dir / "kms.db", daemon.home / "old.db")
    daemon.start()
    daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})
    daemon.stop()
    return daemon


def report(daemon: Daemon, **options: Any) -> dict[str, list[dict[str, str]]]:
    done = daemon.offline("doctor", "--socket", str(daemon.socket), "--json", **options)
    found = json.loads(done.stdout)
    assert done.returncode == (1 if found["failed"] else 0), done.stderr
    return {
        level: [row for row in found["checks"] if row["level"] == level] for level in ("fail", "warn", "ok")
    }


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_it_passes_starts(stopped: Daemon) -> None:
    before = files(stopped.data_dir)
    found = report(stopped)
    assert found["fail"] == [] and "start" in [row["check"] for row in found["ok"]]
    assert files(stopped.data_dir) == before  # nothing is changed, nothing is left
    stopped.start()
    assert report(stopped)["fail"] == []
    stopped.stop()


def test_a_daemon_on_tcp(make_daemon: MakeDaemon) -> None:
    address = host_of(free_port())
    daemon = make_daemon({"tcp_address": address, "allowed_peer_uids": [os.geteuid()]}, workers=1)

    def told() -> list[tuple[str, str]]:
        found = report(daemon)
        return [(level, row["text"]) for level in found for row in found[level] if row["check"] == "tcp"]

    served = ("ok", f"served there are only the UIDs {os.geteuid()}")
    assert told() == [("ok", f"{address} answers"), served]
    daemon.stop()
    assert told() == [("ok", f"{address} can be bound"), served]


def put_back(daemon: Daemon) -> None:
    shutil.copy(daemon.home / "old.db", daemon.data_dir / "kms.db")


def delete(daemon: Daemon) -> None:
    (daemon.data_dir / "kms.db").unlink()


def swap_keys(daemon: Daemon) -> None:
    write_secret(daemon.kek_file, os.urandom(32).hex().encode())


def damage_audit_key(daemon: Daemon) -> None:
    with closing(sqlite3.connect(daemon.data_dir / "kms.db")) as db:
        db.execute(
            "UPDATE kms SET value = replace(value, '\"wrapped\"', '\"wrapping\"') WHERE key = 'audit:key'"
        )
        db.commit()


@pytest.mark.parametrize(
    "harm",
    [
        put_back,
        pytest.param(delete, marks=pytest.mark.long),
        pytest.param(swap_keys, marks=pytest.mark.long),
        damage_audit_key,
    ],
)
def test_what_would_not_start_is_told_before(stopped: Daemon, harm: Callable[[Daemon], None]) -> None:
    harm(stopped)
    found = report(stopped)
    assert found["fail"], "doctor saw nothing"
    refused = stopped.copy().refusal()
    assert refused.code == 1
    message = refused.stderr.splitlines()[-1].partition(": ")[2][:40]
    home = str(stopped.home)
    texts = [row["text"].replace(home, "HOME") for row in found["fail"]]
    assert any("would not start" in text for text in texts), (texts, message)


def test_an_edited_audit_line(stopped: Daemon) -> None:
    text = stopped.audit_log.read_text()
    edited = text.replace('"outcome":"ok"', '"outcome":"refused"', 1)
    assert edited != text
    stopped.audit_log.write_text(edited)
    (found,) = report(stopped)["fail"]
    assert found["check"] == "start" and "the audit log has a fault" in found["text"]


def test_a_record_that_is_torn_at_the_end(stopped: Daemon) -> None:
    """A full disk leaves it, or kill -9; the next start closes it. The advice was to find out who did it."""
    with open(stopped.audit_log, "ab") as log:
        log.write(b'{"event":{"chain":"1.0","seq":4')
    (found,) = report(stopped)["fail"]
    assert "no recovery event accounts for it" in found["text"]
    assert "its next start closes it" in found["todo"]
    stopped.start()
    assert not report(stopped)["fail"]


def test_a_file_system_that_is_read_only(stopped: Daemon) -> None:
    """As the kernel makes it after an error of the disk: no start, and doctor passed it."""
    need_mount()
    where = str(stopped.data_dir)
    for words in (["--bind", where, where], ["-o", "remount,ro,bind", where]):
        if subprocess.run(["mount", *words], capture_output=True, check=False).returncode:
            pytest.skip("nothing can be mounted here")
    try:
        (found,) = report(stopped)["fail"]
        assert found["text"] == f"the file system of {stopped.data_dir} is read-only"
        with pytest.raises(DaemonFailed, match="Read-only file system"):
            stopped.start()
    finally:
        subprocess.run(["umount", where], check=True)
    stopped.start()


@pytest.mark.parametrize("name", ["", "kms.db", "kms-audit.log"], ids=["folder", "store", "log"])
def test_what_can_t_be_written(stopped: Daemon, name: str) -> None:
    """Root may write all but what is immutable: so another is the owner."""
    if os.geteuid() == 0:
        for path in (stopped.data_dir, *stopped.data_dir.iterdir()):
            os.chown(path, 12345, 12345)
    path = stopped.data_dir / name
    path.chmod(path.stat().st_mode & 0o555)
    found = report(stopped)["fail"]
    assert f"{path} can't be written" in [row["text"] for row in found]


def test_erasures_that_are_due(stopped: Daemon) -> None:
    stopped.start()
    key = stopped.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
    with closing(sqlite3.connect(stopped.data_dir / "kms.db")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM deks").fetchall()
        assert stopped.cli("shred", key, "--now").returncode == 1
        assert any("1 shredded DEKs" in row["text"] for row in report(stopped)["warn"])
    stopped.stop()


@pytest.mark.root
def test_the_least_locked_memory_that_it_passes(stopped: Daemon) -> None:
    """It passed two pages less than a start takes: the buffers of whole pages, and those of the keeper."""
    with open(stopped.config_file, "a") as file:
        file.write("memory_lock: require\n")
    drop = ["setpriv", "--bounding-set", "-ipc_lock,-sys_resource", "--inh-caps", "-ipc_lock,-sys_resource"]
    for size in range(70 * PAGE, 100 * PAGE, PAGE):
        stopped.wrapper = [*drop, "prlimit", f"--memlock={size}:{size}"]
        if not report(stopped, wrapper=stopped.wrapper)["fail"]:
            break
    stopped.start()
    with stopped.session() as kms:
        kms.ok("GET", "/readyz")
        kms.rotate(os.urandom(32))
    stopped.stop()


def test_too_little_locked_memory(stopped: Daemon) -> None:
    with stopped.config_file.open("a") as file:
        file.write("memory_lock: require\n")
    wrapper = ["sh", "-c", 'ulimit -l 64; exec "$@"', "sh"]
    if os.geteuid() == 0:  # root locks what it likes: as the data-dir's owner it may not
        for path in (stopped.home, stopped.data_dir, *stopped.data_dir.iterdir(), stopped.kek_file):
            os.chown(path, 12345, 12345)
    found = [row for row in report(stopped, wrapper=wrapper)["fail"] if row["check"] == "memory"]
    assert found and "need can't be locked (limit 64 KiB, this shell's)" in found[0]["text"]


@pytest.mark.root
def test_before_the_first_start_of_a_package(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is the daemon's, the data-dir is not there yet, and it is root who asks."""
    config, key = short_tmp / "c.yaml", short_tmp / "kek"
    write_secret(key, os.urandom(32).hex().encode())
    os.chown(key, 12345, 12345)
    short_tmp.chmod(0o755)
    write_secret(config, b"master_key_file: kek\ndata_dir: data\nsocket: s\n")
    config.chmod(0o644)
    row = pwd.struct_passwd(("progressdb-kms", "x", 12345, 12345, "", "/", "/"))
    monkeypatch.setattr(asowner, "PACKAGED_CONFIG", str(config))
    monkeypatch.setattr(asowner.pwd, "getpwnam", lambda name: row)
    patient = doctor.Patient(argparse.Namespace(socket=None, data_dir=None, config=str(config)))
    assert patient.owner == 12345 and patient.trouble is None
    failed = [
        f for check in (doctor._config, doctor._key_file) for f in check(patient) if f.level != doctor.OK
    ]
    assert failed == []


@pytest.mark.root
@pytest.mark.parametrize("whose", [0, 12345], ids=["root's", "the daemon's"])
@pytest.mark.parametrize("command", [["verify"], ["doctor"], ["audit", "verify"]], ids=" ".join)
def test_root_hears_what_the_daemon_s_user_would_hear(
    stopped: Daemon, command: list[str], whose: int
) -> None:
    """The key file is the daemon's, as the packages make it, and what is wrong is something else."""
    with stopped.config_file.open("a") as file:
        file.write("previous_master_keys: [{file: gone}]\n")
    for path in (stopped.home, stopped.data_dir, *stopped.data_dir.iterdir(), stopped.kek_file):
        os.chown(path, 12345, 12345)
    os.chown(stopped.config_file, whose, whose)
    stopped.config_file.chmod(0o644)
    done = stopped.offline(*command)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 1
    assert f"{stopped.home}/gone can't be read: No such file" in said
    assert "chown" not in said and "another key" not in said


@pytest.mark.root
def test_root_hears_what_the_daemon_s_user_may_not_read(stopped: Daemon) -> None:
    """A key as root's genkey makes it: all was well for root, and the daemon did not start."""
    stopped.home.chmod(0o755)
    stopped.config_file.chmod(0o644)
    for path in (stopped.data_dir, *stopped.data_dir.iterdir()):
        os.chown(path, 12345, 12345)

    def config() -> dict[str, str]:
        found = json.loads(stopped.offline("doctor", "--json").stdout)
        (row,) = (row for row in found["checks"] if row["check"] == "config")
        return dict(row)

    row = config()
    assert row["level"] == "fail" and "Permission denied" in row["text"] and "uid 12345" in row["text"]
    assert f"{stopped.kek_file}" in row["text"] and "chown 12345" in row["todo"]
    os.chown(stopped.kek_file, 12345, 12345)
    assert config()["level"] == "ok"
