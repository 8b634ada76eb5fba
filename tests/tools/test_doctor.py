"""`doctor`: each check finds the fault that it is there to find, and is silent about a sound host."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from progressdb_kms.encoding import timestamp
from progressdb_kms.store.sqlite import APPLICATION_ID, SCHEMA_VERSION, USAGE_TABLE
from progressdb_kms.tools import doctor
from progressdb_kms.tools.doctor import FAIL, OK, WARN, Finding, Patient
from tests.harness.daemon import cli, write_secret
from tests.harness.fakekms import FakeKms, kek_id_of

KEK = bytes(range(32))
A = kek_id_of(KEK)


@pytest.fixture
def home(short_tmp: Path) -> Path:
    """What a sound installation looks like, the daemon stopped."""
    write_secret(short_tmp / "F", KEK.hex().encode())
    write_secret(short_tmp / "c.yaml", b"master_key_file: F\nsocket: s\ndata_dir: d\n")
    (short_tmp / "d").mkdir(mode=0o700)
    make_store(short_tmp / "d", {A: [1, 5, ""]}, A)
    write_secret(short_tmp / "d" / "kms-audit.log", b"{}\n")
    return short_tmp


def make_store(folder: Path, counts: dict[str, list[Any]], active: str, since: str = "2026") -> None:
    write_secret(folder / "kms.db", b"")
    with contextlib.closing(sqlite3.connect(folder / "kms.db")) as db:
        db.execute(f"PRAGMA application_id={APPLICATION_ID}")
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        for table in ("kms", "deks"):
            db.execute(f"CREATE TABLE {table} (key TEXT PRIMARY KEY, value BLOB)")
        db.execute(USAGE_TABLE)
        state = {"change": 1, "active": [active, 1, since], "keks": counts, "sum": "00", "own": "00"}
        rows = [("store:state", state)]
        db.executemany("INSERT INTO kms VALUES (?, ?)", [(name, json.dumps(value)) for name, value in rows])
        db.commit()


def patient(home: Path, **settings: str) -> Patient:
    if settings:
        text = (home / "c.yaml").read_text() + "".join(
            f"{name}: {value}\n" for name, value in settings.items()
        )
        write_secret(home / "c.yaml", text.encode())
    return Patient(argparse.Namespace(socket=None, data_dir=None, config=str(home / "c.yaml")))


Look = Callable[[Patient], doctor.Findings]


def levels(look: Look, who: Patient) -> list[str]:
    return [finding.level for finding in look(who)]


def only(look: Look, who: Patient) -> Finding:
    """The one finding that is not `ok`; each says what to do."""
    (found,) = [finding for finding in look(who) if finding.level != OK]
    assert found.text
    return found


SOUND = (
    doctor._versions, doctor._config, doctor._key_file, doctor._rotation, doctor._folder, doctor._store,
    doctor._audit, doctor._clock,
)  # fmt: skip


@pytest.mark.parametrize("look", SOUND, ids=lambda look: str(look.__name__))
def test_a_sound_installation(home: Path, look: Look) -> None:
    assert set(levels(look, patient(home))) <= {OK}


class TestConfig:
    def test_wrong(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What it does not tell is not looked at (`hardening` is left out: it would harden us)."""
        some = tuple(check for check in doctor.CHECKS if check.name != "hardening")
        monkeypatch.setattr(doctor, "CHECKS", some)
        who = patient(home, wrokers="2")
        assert who.settings is None and only(doctor._config, who).level == FAIL
        assert {name for name, _ in doctor.examine(who)} == {"versions", "config", "memory", "ptrace"}

    def test_a_key_that_can_t_be_read(self, home: Path) -> None:
        (home / "F").chmod(0o644)
        who = patient(home)
        assert who.settings is not None and "open to others" in only(doctor._config, who).text
        assert "chmod 0600" in only(doctor._key_file, who).todo

    def test_a_credential_outside_of_systemd(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_secret(home / "c.yaml", b"master_key_credential: kek\ndata_dir: d\n")
        monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
        assert only(doctor._config, patient(home)).level == WARN

    def test_a_key_file_in_a_folder_of_credentials(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What kind of a source it is was read from the words of a message, which has the path in it."""
        monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
        write_secret(home / "c.yaml", b"master_key_file: credentials/kek\ndata_dir: d\n")
        found = only(doctor._config, patient(home))
        assert found.level == FAIL and "can't be read" in found.text

    def test_a_key_file_that_is_gone(self, home: Path) -> None:
        (home / "F").unlink()
        assert only(doctor._key_file, patient(home)).level == FAIL

    def test_a_key_in_the_data_dir(self, home: Path) -> None:
        """Every copy of it, which is to be worth nothing without the key, holds the key."""
        for name, text in (("F", "master_key_file: d/F\n"), ("c.yaml", f"master_key_hex: {KEK.hex()}\n")):
            place = home / "d" / name
            (home / name).rename(place)
            config = place if name == "c.yaml" else home / "c.yaml"
            write_secret(config, f"{text}socket: s\ndata_dir: {home}/d\n".encode())
            asked = Patient(argparse.Namespace(socket=None, data_dir=None, config=str(config)))
            found = [row for row in doctor._key_file(asked) if row.level == WARN]
            assert len(found) == 1 and found[0].text.startswith(f"{place} is in the data-dir")

    def test_a_configuration_in_the_data_dir_without_a_key(self, home: Path) -> None:
        (home / "c.yaml").rename(home / "d" / "c.yaml")
        write_secret(home / "d" / "c.yaml", b"master_key_file: ../F\nsocket: s\ndata_dir: .\n")
        asked = Patient(argparse.Namespace(socket=None, data_dir=None, config=str(home / "d" / "c.yaml")))
        assert levels(doctor._key_file, asked) == [OK]

    def test_a_key_file_that_others_may_replace(self, home: Path) -> None:
        home.chmod(0o777)
        assert "others may replace" in only(doctor._key_file, patient(home)).text
        home.chmod(0o1777)
        assert levels(doctor._key_file, patient(home)) == [OK]


class TestRotation:
    def test_unfinished(self, home: Path) -> None:
        write_secret(home / "F.next", os.urandom(32))
        found = only(doctor._rotation, patient(home))
        assert found.level == WARN and "--resume" in found.todo

    def test_parts_and_old_keys(self, home: Path) -> None:
        write_secret(home / ".F.next.00112233.part", b"")
        write_secret(home / f"F.old-{A}", b"")
        assert levels(doctor._rotation, patient(home)) == [WARN, OK]


class TestHost:
    def test_cryptography_too_old(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cryptography.__version__", "37.0.4")
        assert only(doctor._versions, patient(home)).level == FAIL

    @pytest.mark.parametrize(
        ("kind", "lock", "level"),
        [
            ("memfd_secret", "try", OK),
            ("mlock", "require", OK),
            ("unlocked", "try", WARN),
            ("unlocked", "require", FAIL),
        ],
    )
    def test_memory(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lock: str, level: str
    ) -> None:
        class Buffer:
            def __init__(self, size: int) -> None:
                self.kind = kind

            def __enter__(self) -> Buffer:
                return self

            def __exit__(self, *about: object) -> None:
                pass

        who = patient(home, memory_lock=lock)
        monkeypatch.setattr(doctor, "LockedBuffer", Buffer)
        assert levels(doctor._memory, who) == [level]

    def test_open_files(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("resource.getrlimit", lambda what: (1024, 1024))
        assert only(doctor._descriptors, patient(home, max_connections="1000")).level == WARN
        monkeypatch.setattr("resource.getrlimit", lambda what: (1024, 1064))
        assert levels(doctor._descriptors, patient(home)) == [OK]

    def test_the_clock(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 3600)
        assert "set back" in only(doctor._clock, patient(home)).todo
        monkeypatch.setattr(time, "time", lambda: 0.0)
        assert only(doctor._clock, patient(home)).level == FAIL

    @pytest.mark.parametrize(("free", "level"), [(1 << 40, OK), (200 << 20, WARN), (1 << 20, FAIL)])
    def test_the_disk(self, home: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
        about = argparse.Namespace(f_bavail=free >> 12, f_frsize=4096, f_files=10, f_favail=5)
        monkeypatch.setattr(os, "statvfs", lambda path: about)
        assert levels(doctor._disk, patient(home)) == [level]
        about.f_favail = 0
        assert "no inode" in only(doctor._disk, patient(home)).text


class TestDataDir:
    def test_open_to_others(self, home: Path) -> None:
        (home / "d").chmod(0o750)
        assert "mode 0750" in only(doctor._folder, patient(home)).text

    def test_a_file_that_is_open_to_others(self, home: Path) -> None:
        (home / "d" / "kms.db").chmod(0o644)
        found = only(doctor._folder, patient(home))
        assert found.level == FAIL and "kms.db" in found.text

    @pytest.mark.root
    def test_a_file_of_another_user(self, home: Path) -> None:
        os.chown(home / "d" / "kms.db", 12345, 12345)
        assert "kms.db" in only(doctor._folder, patient(home)).text

    def test_before_the_first_start(self, home: Path) -> None:
        for path in (home / "d").iterdir():
            path.unlink()
        (home / "d").rmdir()
        for look in (doctor._folder, doctor._store, doctor._audit, doctor._disk):
            assert set(levels(look, patient(home))) <= {OK}


class TestStore:
    def test_damaged(self, home: Path) -> None:
        path = home / "d" / "kms.db"
        data = bytearray(path.read_bytes())
        data[4096:] = os.urandom(len(data) - 4096)
        path.write_bytes(data)
        assert only(doctor._store, patient(home)).level == FAIL
        path.write_bytes(b"no database at all, but long enough to be one" * 100)
        found = only(doctor._store, patient(home))
        assert found.level == FAIL and "restore" in found.todo

    def test_of_something_else(self, home: Path) -> None:
        for pragma, says in (
            ("application_id=1", "something else"),
            (f"application_id={APPLICATION_ID};PRAGMA user_version=99", "schema version 99"),
        ):
            with contextlib.closing(sqlite3.connect(home / "d" / "kms.db")) as db:
                db.executescript(f"PRAGMA {pragma}")
            assert says in only(doctor._store, patient(home)).text

    def test_a_key_that_is_not_configured(self, home: Path) -> None:
        (home / "d" / "kms.db").unlink()
        make_store(home / "d", {A: [1, 5, ""], "00112233aabbccdd": [1, 2, ""]}, A)
        found = only(doctor._store, patient(home))
        assert found.level == FAIL and "the KEK 00112233aabbccdd is not configured" in found.text

    def test_the_pending_key_counts(self, home: Path) -> None:
        new = bytes(range(1, 33))
        write_secret(home / "F.next", new)
        (home / "d" / "kms.db").unlink()
        make_store(home / "d", {}, kek_id_of(new))
        assert levels(doctor._store, patient(home)) == [OK, WARN]  # … finish with --resume

    def test_no_audit_log(self, home: Path) -> None:
        (home / "d" / "kms-audit.log").unlink()
        assert only(doctor._audit, patient(home)).level == WARN


class TestDaemon:
    @pytest.fixture
    def kms(self, home: Path) -> Iterator[FakeKms]:
        home.chmod(0o755)
        with FakeKms(home / "s", KEK) as fake:
            yield fake

    def test_up(self, home: Path, kms: FakeKms) -> None:
        assert levels(doctor._daemon, patient(home)) == [OK]
        assert levels(doctor._socket, patient(home)) == [OK]

    def test_down(self, home: Path) -> None:
        assert only(doctor._socket, patient(home)).level == WARN
        found = only(doctor._daemon, patient(home))
        assert found.level == WARN and "systemctl" in found.todo

    def test_not_ready(self, home: Path, kms: FakeKms) -> None:
        kms.not_ready = ["the audit log was unlinked"]
        assert only(doctor._daemon, patient(home)) == Finding(
            FAIL, "it is not ready: the audit log was unlinked"
        )

    def test_another_release(self, home: Path, kms: FakeKms, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "__version__", "9.9")
        assert only(doctor._daemon, patient(home)).level == WARN

    def test_what_speaks_something_else(self, home: Path) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(home / "s"))
            sock.listen()
            (home / "s").unlink()
            (home / "s").write_text("")
            assert only(doctor._socket, patient(home)).text.endswith("is no socket")

    def test_a_folder_that_is_open_to_all(self, home: Path, kms: FakeKms) -> None:
        for mode, level in ((0o1777, WARN), (0o777, FAIL)):
            home.chmod(mode)
            assert only(doctor._socket, patient(home)).level == level


def test_a_list_of_callers_without_who_looks_after_the_daemon(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patient, "owner", 997)
    assert levels(doctor._peers, patient(home)) == []
    who = patient(home, allowed_peer_uids="[998]")
    root, own = doctor._peers(who)
    assert (root.level, own.level) == (WARN, WARN)
    assert "uid 0 is not served" in root.text and "uid 997 is not served" in own.text
    who = patient(home, admin_peer_uids="[0, 997]")
    assert levels(doctor._peers, who) == [OK]


BARRED = ["accept_clock", "delete_dek", "disable_dek", "enable_dek", "rewrap", "rotate_kek", "unwrap"]


@pytest.mark.parametrize(
    ("policies", "admins", "barred"),
    [
        ("[{uid: 998, operations: [encrypt]}]", "", []),
        ("[{uid: 0, operations: [encrypt]}]", "", []),  # the daemon's own user is left
        ("[{uid: 0, operations: [encrypt]}, {uid: 997, operations: [decrypt]}]", "", BARRED),
        ("[{uid: 0, operations: [encrypt]}]", "[0]", BARRED),
        (
            "[{uid: 0, operations: [rotate_kek, unwrap, rewrap, delete_dek]}]",
            "[0]",
            [*BARRED[:1], *BARRED[2:4]],
        ),
        ("[{gid: 0, operations: [encrypt]}]", "[0]", BARRED),
        ("[{uid: 998, operations: [encrypt]}]", "[998]", BARRED),
        ("[{uid: 0, keys: [k_*]}, {uid: 997, per_second: 5}]", "", []),
    ],
)
def test_policies_that_leave_nobody_who_rotates_and_shreds(
    home: Path, monkeypatch: pytest.MonkeyPatch, policies: str, admins: str, barred: list[str]
) -> None:
    monkeypatch.setattr(Patient, "owner", 997)
    keys = {"policies": policies, "allowed_peer_uids": "[0, 997, 998]"}
    keys.update({"admin_peer_uids": admins} if admins else {})
    *warned, last = doctor._policies(patient(home, **keys))
    assert last.level == OK
    assert [finding.text.rpartition(" ")[2] for finding in warned] == barred
    assert {finding.level for finding in warned} <= {WARN}
    assert all("operations" in finding.todo for finding in warned)


@pytest.mark.parametrize(
    ("policies", "rules", "warned"),
    [
        ("[{uid: 998, operations: [encrypt]}]", {}, True),
        ("[{uid: 998, operations: [encrypt]}]", {"allowed_peer_uids": "[0, 998]"}, False),
        ("[{gid: 998, operations: [encrypt]}]", {}, False),
    ],
)
def test_policies_that_other_uids_of_a_user_get_around(
    home: Path, policies: str, rules: dict[str, str], warned: bool
) -> None:
    *found, last = doctor._policies(patient(home, policies=policies, **rules))
    assert last.level == OK and ["subuid" in finding.text for finding in found] == [True] * warned


def test_no_policies_no_line(home: Path) -> None:
    assert list(doctor._policies(patient(home))) == []


def listening(host: str = "127.0.0.1") -> socket.socket:
    sock = socket.socket()
    sock.bind((host, 0))
    sock.listen()
    return sock


def address_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()
    return f"{host}:{port}"


class TestTcp:
    @pytest.fixture
    def running(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "is_held", lambda data_dir: True)

    def test_without_an_address(self, home: Path) -> None:
        assert levels(doctor._tcp, patient(home)) == []

    def test_it_can_be_bound(self, home: Path) -> None:
        with listening() as free:
            address = address_of(free)
        found = list(doctor._tcp(patient(home, tcp_address=address, allowed_peer_uids="[7, 1234]")))
        assert [finding.text for finding in found] == [
            f"{address} can be bound", "served there are only the UIDs 7, 1234"
        ]  # fmt: skip
        assert {finding.level for finding in found} == {OK}

    def test_another_program_listens_there(self, home: Path) -> None:
        with listening() as other:
            who = patient(home, tcp_address=address_of(other), allowed_peer_uids="[7]")
            bad = only(doctor._tcp, who)
        assert bad.level == FAIL and "can't be bound: Address already in use" in bad.text

    def test_who_is_served_without_a_list(self, home: Path) -> None:
        with listening() as free:
            address = address_of(free)
        told = only(doctor._tcp, patient(home, tcp_address=address, admin_peer_uids="[4321]"))
        assert told.level == WARN and "4321" in told.text and "0, " in told.text
        assert "allowed_peer_uids" in told.todo

    def test_the_daemon_runs_and_nothing_answers(self, home: Path, running: None) -> None:
        with listening() as free:
            address = address_of(free)
        bad = only(doctor._tcp, patient(home, tcp_address=address, allowed_peer_uids="[7]"))
        assert bad.level == FAIL and f"nothing answers at {address}" in bad.text and "tcp.conf" in bad.todo

    @pytest.mark.parametrize(
        ("answer", "level", "told"),
        [
            ("200 OK", OK, "answers"),
            ("403 Forbidden", OK, f"answers, and refuses uid {os.geteuid()}"),
            ("404 Not Found", FAIL, "answers /healthz with 404"),
        ],
    )
    def test_what_answers(self, home: Path, running: None, answer: str, level: str, told: str) -> None:
        def once() -> None:
            peer, _ = server.accept()
            with peer:
                while b"\r\n\r\n" not in peer.recv(4096, socket.MSG_PEEK):
                    pass
                peer.recv(4096)
                peer.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())

        with listening() as server:
            address = address_of(server)
            thread = threading.Thread(target=once)
            thread.start()
            found = list(doctor._tcp(patient(home, tcp_address=address, allowed_peer_uids="[7]")))
            thread.join(30)
        assert (found[0].level, found[0].text) == (level, f"{address} {told}")

    @pytest.mark.root
    def test_another_user_answers(self, home: Path, running: None) -> None:
        """Where the daemon does not listen, or not yet, anybody may."""
        code = (
            "import os, socket; os.setuid(20_005); s = socket.create_server(('127.0.0.1', 0))\n"
            "print(s.getsockname()[1], flush=True); peer = s.accept()[0]; peer.recv(4096)\n"
            "peer.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n'); peer.recv(1)"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            try:
                address = f"127.0.0.1:{int(other.stdout.readline())}"
                found = list(doctor._tcp(patient(home, tcp_address=address, allowed_peer_uids="[7]")))
            finally:
                other.kill()
        assert found[0].level == FAIL and f"uid 20005 answers at {address}" in found[0].text

    def test_the_unit_lacks_the_drop_in(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        families = ["AF_UNIX"]
        monkeypatch.setattr(doctor, "_of_unit", lambda who, name: families[0])
        with listening() as free:
            who = patient(home, tcp_address=address_of(free), allowed_peer_uids="[7]")
        assert "lets the daemon have no TCP: AF_UNIX" in only(doctor._tcp, who).text
        families[0] = "AF_UNIX AF_INET AF_NETLINK"
        assert set(levels(doctor._tcp, who)) == {OK}

    def test_the_kernel_does_not_tell(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def silent(host: str) -> None:
            raise OSError("no such protocol")

        monkeypatch.setattr(doctor.loopback, "check", silent)
        bad = only(doctor._tcp, patient(home, tcp_address="127.0.0.1:6820"))
        assert bad.level == FAIL and "does not tell who connects" in bad.text


@pytest.fixture
def real(home: Path) -> Path:
    """With a store that a start takes."""
    shutil.rmtree(home / "d")
    done = cli("import", "-", "--config", "c.yaml", stdin=b"", cwd=home)
    assert done.returncode == 0, done.stderr
    return home


class TestReport:
    def test_text(self, real: Path) -> None:
        home = real
        done = cli("doctor", "--config", "c.yaml", cwd=home)
        out = done.stdout.decode()
        assert (done.returncode, done.stderr) == (0, b"")
        assert f"ok    store       {home}/d/kms.db is whole: 0 DEKs, active KEK {A} since 20" in out
        assert f"warn  daemon      can't connect to {home}/s: there is no such socket\n" in out
        assert out.splitlines()[-1].startswith("0 failed, ")

    def test_a_failure_is_the_exit_code(self, real: Path) -> None:
        home = real
        (home / "d").chmod(0o777)
        done = cli("doctor", "--config", "c.yaml", "--json", cwd=home)
        found = json.loads(done.stdout)
        assert done.returncode == 1 and found["failed"] == 1
        (bad,) = [check for check in found["checks"] if check["level"] == FAIL]
        assert bad["check"] == "data-dir" and bad["todo"] == f"chmod 0700 {home}/d"

    def test_it_changes_nothing(self, real: Path) -> None:
        home = real
        before = sorted(home.rglob("*"))
        cli("doctor", "--config", "c.yaml", cwd=home)
        assert sorted(home.rglob("*")) == before

    def test_a_check_that_breaks_is_a_failure(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(who: Patient) -> doctor.Findings:
            raise RuntimeError("oh")

        monkeypatch.setattr(
            doctor, "CHECKS", (doctor.Check("x", broken), doctor.Check("clock", doctor._clock))
        )
        found = list(doctor.examine(patient(home)))
        assert [(name, finding.level) for name, finding in found] == [("x", FAIL), ("clock", OK)]


def test_a_dek_that_comes_near_its_end(home: Path) -> None:
    with contextlib.closing(sqlite3.connect(home / "d" / "kms.db")) as db, db:
        db.execute("INSERT INTO usage VALUES ('k', ?, 0, 1, 1, 0), ('few', 3, 0, 1, 1, 0)", (2**31,))
    found = only(doctor._store, patient(home))
    assert found.text.startswith("the DEK k has 2,147,483,648 encrypts of") and "another" in found.todo


def test_an_old_kek(home: Path) -> None:
    (home / "d" / "kms.db").unlink()
    make_store(home / "d", {A: [1, 5, ""]}, A, since="2026-01-01T00:00:00.000000Z")
    assert levels(doctor._store, patient(home)) == [OK]
    assert "kek_max_age_days is 30" in only(doctor._store, patient(home, kek_max_age_days="30")).text


def test_no_backup_an_old_one_and_one_without_a_drill(home: Path) -> None:
    note = home / "d" / "kms-backup.json"

    def noted(made: float, checked: float, name: str = "x") -> None:
        now = time.time()
        text = json.dumps(
            {
                "file": str(home / name),
                "created_at": timestamp(now - made * 3600),
                "sha256": "00",
                "checked_at": timestamp(now - checked * 3600),
            }
        )
        write_secret(note, text.encode())

    assert "was ever made" in only(doctor._backup, patient(home)).text
    noted(48, 48)
    found = only(doctor._backup, patient(home))
    assert str(home / "x") in found.text and "progressdb-kms-backup.timer" in found.todo
    noted(2, 24 * 9)
    assert "--check" in only(doctor._backup, patient(home)).todo
    noted(2, 24)
    found = only(doctor._backup, patient(home))
    assert found.level == WARN and "where it is no more" in found.text
    (home / "x").touch()
    assert levels(doctor._backup, patient(home)) == [OK]
    (home / "x.failed").touch()
    noted(2, 24, "x.failed")
    found = only(doctor._backup, patient(home))
    assert found.level == WARN and "failed its drill" in found.text and "--check" in found.todo
    noted(2, 2, "x.failed")
    assert levels(doctor._backup, patient(home)) == [OK], "it passed, once a key was configured again"
