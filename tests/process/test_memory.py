"""No key outside the secret pages: every process of the daemon is scanned after each way of using keys."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.crypto import envelope
from progressdb_kms.crypto.aead import Aead
from progressdb_kms.service import ownkeys
from progressdb_kms.service.ownkeys import ROWS
from progressdb_kms.store.sqlite import SqliteReader
from progressdb_kms.wire.http1 import LONG
from tests.harness import Daemon, Session, memscan, raw
from tests.harness.daemon import DaemonFailed
from tests.harness.faults import injecting, need_strace, without_memfd_secret
from tests.harness.load import hammer
from tests.harness.memscan import Secret, forms, scan
from tests.harness.procs import wait_until
from tests.harness.wire import b64, connect

pytestmark = [
    pytest.mark.fresh,
    pytest.mark.skipif(bool(memscan.cannot_scan()), reason=memscan.cannot_scan() or "-"),
]

CONNECTIONS = 16


class Material:
    """Keys and texts that a run works with, and that nobody may find afterwards."""

    def __init__(self, daemon: Daemon) -> None:
        self.dek, self.marker = os.urandom(32), os.urandom(48)
        self.text = b64(self.marker)
        with daemon.session() as kms:
            self.wrapped = kms.ok("POST", "/wrap", {"dek": b64(self.dek)})["wrapped"]
            self.keys = [kms.create_dek("t")["key_id"] for _ in range(4)]

    @property
    def secrets(self) -> list[Secret]:
        return [Secret("DEK", self.dek), Secret("plaintext", self.marker, key=False)]

    def work(self, kms: Session, number: int) -> None:
        """One operation; all kinds of them come in turn."""
        key = self.keys[number % len(self.keys)]
        _OPERATIONS[number % len(_OPERATIONS)](self, kms, key)

    def inline(self, kms: Session, key: str) -> None:
        sealed = kms.ok("POST", "/encrypt", {"wrapped": self.wrapped, "plaintext": self.text})["ciphertext"]
        opened = kms.ok("POST", "/decrypt", {"wrapped": self.wrapped, "ciphertext": sealed})
        assert opened["plaintext"] == self.text
        assert kms.request("POST", "/decrypt", {"key_id": key, "ciphertext": sealed}).status == 422

    def stored(self, kms: Session, key: str) -> None:
        assert kms.decrypt(key, kms.encrypt(key, self.marker, b"aad"), b"aad") == self.marker

    def batch(self, kms: Session, key: str) -> None:
        items = kms.ok("POST", "/encrypt_batch", {"items": [{"key_id": key, "plaintext": self.text}] * 10})
        again = {"items": [{"key_id": key, **item} for item in items["items"]]}
        assert {item["plaintext"] for item in kms.ok("POST", "/decrypt_batch", again)["items"]} == {self.text}

    def long(self, kms: Session, key: str) -> None:
        sealed = kms.request("POST", f"/encrypt?key_id={key}", self.marker * 300)
        assert kms.request("POST", f"/decrypt?key_id={key}", sealed.body).body == self.marker * 300

    def long_inline(self, kms: Session, key: str) -> None:
        """Under the DEK that the scan knows: it is after long messages that a cipher leaves its hash key."""
        text = b64(self.marker * 300)
        sealed = kms.ok("POST", "/encrypt", {"wrapped": self.wrapped, "plaintext": text})["ciphertext"]
        assert (
            kms.ok("POST", "/decrypt", {"wrapped": self.wrapped, "ciphertext": sealed})["plaintext"] == text
        )

    def failing(self, kms: Session, key: str) -> None:
        """Errors that are answered in an item's place, beside plaintexts of others."""
        good = b64(kms.encrypt(key, self.marker))
        bad = [b64(os.urandom(60)), good[:-4] + "AAA=", b64(b"short")]
        opened = {"items": [{"key_id": key, "ciphertext": text} for text in (good, *bad, good)]}
        answers = kms.ok("POST", "/decrypt_batch", opened)["items"]
        assert [sorted(answer) for answer in answers] == [["plaintext"], *[["error"]] * 3, ["plaintext"]]
        names = (key, "k_absent", self.keys[0])
        sealed = {"items": [{"key_id": name, "plaintext": self.text} for name in names]}
        answers = kms.ok("POST", "/encrypt_batch", sealed)["items"]
        assert [sorted(answer) for answer in answers] == [["ciphertext"], ["error"], ["ciphertext"]]
        move = {"key_id": key, "new_key_id": "k_absent", "ciphertext": good}
        assert kms.request("POST", "/reencrypt", move).status == 404
        moved = kms.ok("POST", "/reencrypt", {"items": [move, {**move, "new_key_id": key}]})["items"]
        assert [sorted(answer) for answer in moved] == [["error"], ["ciphertext"]]

    def unwrap(self, kms: Session, key: str) -> None:
        assert kms.ok("POST", "/unwrap", {"wrapped": self.wrapped}) == {"dek": b64(self.dek)}
        kms.ok("POST", "/wrap", {"dek": b64(self.dek)})

    def reencrypt(self, kms: Session, key: str) -> None:
        fields = {"key_id": key, "new_key_id": self.keys[0], "ciphertext": b64(kms.encrypt(key, self.marker))}
        kms.ok("POST", "/reencrypt", fields)


_OPERATIONS: list[Any] = [
    Material.inline, Material.stored, Material.batch, Material.long, Material.long_inline, Material.failing,
    Material.unwrap, Material.reencrypt,
]  # fmt: skip


def used(daemon: Daemon, count: int = 30) -> list[Secret]:
    """The daemon did so many operations; what went through it."""
    material = Material(daemon)
    hammer(daemon.socket, material.work, count=count, threads=4)
    daemon.request("GET", "/readyz")  # for which the keeper reads the key file
    return [Secret("KEK", daemon.kek), *material.secrets]


def nothing_kept(daemon: Daemon, secrets: list[Secret]) -> None:
    """Who has a copy of the data-dir, of a backup or of the journal has none of them, in any spelling."""
    given = (daemon.kek_file, daemon.config_file)
    texts = {
        path: path.read_bytes() for path in daemon.home.rglob("*") if path.is_file() and path not in given
    }
    assert {"kms.db", "kms.db-wal", "kms-audit.log", "out", "err"} <= {path.name for path in texts}
    for form in (form for secret in secrets for form in forms(secret)):
        assert not [path for path, text in texts.items() if form.data in text], (form.label, form.name)


# ---- start and work --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["hexfile", "rawfile", "yaml", "credential", "env"])
def test_start_and_use_leave_no_copy(source: str) -> None:
    with Daemon(source=source, workers=None if source == "env" else 2) as daemon:
        scan(daemon.pids(), used(daemon)).assert_clean()
        for pid in daemon.pids():
            for name in ("environ", "cmdline"):
                assert daemon.kek.hex().encode() not in Path(f"/proc/{pid}/{name}").read_bytes()


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_after_thousands_of_operations(count: int) -> None:
    with Daemon(workers=2) as daemon:
        material = Material(daemon)
        hammer(daemon.socket, material.work, count=count, threads=CONNECTIONS)
        secrets = [Secret("KEK", daemon.kek), *own_keys(daemon), *material.secrets]
        scan(daemon.pids(), secrets).assert_clean()
        nothing_kept(daemon, secrets)


LAST = {
    "encrypt": lambda text, sealed: ("/encrypt", {"plaintext": text}),
    "decrypt": lambda text, sealed: ("/decrypt", {"ciphertext": sealed}),
    "encrypt_batch": lambda text, sealed: ("/encrypt_batch", {"items": [{"plaintext": text}] * 2}),
    "decrypt_batch": lambda text, sealed: ("/decrypt_batch", {"items": [{"ciphertext": sealed}] * 2}),
    "with a failure": lambda text, sealed: (
        "/decrypt_batch",
        {"items": [{"ciphertext": sealed}, {"ciphertext": sealed[:-8] + "AAAAAAA="}]},
    ),
    "reencrypt": lambda text, sealed: ("/reencrypt", {"items": [{"ciphertext": sealed}] * 2}),
}


@pytest.mark.parametrize("size", [pytest.param(48, marks=pytest.mark.long), 300])
def test_what_the_last_call_leaves(size: int) -> None:
    """No later one is there to overwrite it: the C code for base64 makes short texts on the stack."""
    with Daemon(workers=1) as daemon, daemon.session() as kms:
        key_id = kms.create_dek("t")["key_id"]
        for name, last in LAST.items():
            plaintext = os.urandom(size)
            sealed = kms.ok("POST", "/encrypt", {"key_id": key_id, "plaintext": b64(plaintext)})["ciphertext"]
            path, body = last(b64(plaintext), sealed)
            for item in body.get("items", [body]):
                item |= {"key_id": key_id, **({"new_key_id": key_id} if name == "reencrypt" else {})}
            kms.ok("POST", path, body)
            report = scan(daemon.pids(), [Secret("plaintext", plaintext, key=False)])
            assert not report.hits, f"{name}: {report}"


def own_keys(daemon: Daemon) -> list[Secret]:
    """Each record of the audit log is signed with the one, each row of the store with the other."""
    found, kek = [], memoryview(bytearray(daemon.kek))
    with contextlib.closing(SqliteReader(daemon.data_dir)) as reader:
        for name, row in ROWS.items():
            scratch = memoryview(bytearray(envelope.SCRATCH_SIZE))
            wrapped = ownkeys.parse(name, reader.read(row) or {})
            found.append(Secret(name, bytes(envelope.unwrap(Aead(kek), wrapped, scratch))))
    return found


def test_previous_and_rejected_keys() -> None:
    previous = os.urandom(32)
    with Daemon({"previous_master_keys": [{"hex": previous.hex()}]}, workers=2) as daemon:
        secrets = [*used(daemon), Secret("previous KEK", previous)]
        scan(daemon.pids(), secrets).assert_clean()


# ---- new KEKs in requests ----------------------------------------------------------------------------


def rotation(new: bytes, rest: str = "", length: int = 0, path: str = "/rotate_kek") -> bytes:
    body = b'{"new_kek_hex":"%b"%b}' % (new.hex().encode(), rest.encode())
    head = f"POST {path} HTTP/1.1\r\nHost: unix\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


def test_a_rotation_in_small_pieces(daemon: Daemon) -> None:
    new, moved = os.urandom(32), os.urandom(32)
    secrets = [*used(daemon), Secret("new KEK", new), Secret("KEK of one", moved)]
    key = daemon.ok("GET", "/deks")["deks"][0]["key_id"]
    for request in (rotation(new), rotation(moved, f',"key_id":"{key}"', path="/rewrap")):
        with connect(daemon.socket) as sock:
            for at in range(0, len(request), 7):
                sock.sendall(request[at : at + 7])
                time.sleep(0.001)  # so that it is read in pieces, too
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    daemon.kek = new
    scan(daemon.pids(), [*secrets, *used(daemon)]).assert_clean()
    nothing_kept(daemon, secrets)


REFUSED: dict[str, Callable[[bytes], bytes]] = {
    "bad JSON": lambda new: rotation(new)[:-1] + b"]",
    "not closed": lambda new: rotation(new, ',"dry_run":tru'),
    "a field too many": lambda new: rotation(new, ',"more":"x"'),
    "too long": lambda new: rotation(new, " " * 1200),
    "too many digits": lambda new: rotation(new).replace(b'"}', b'00"}'),
    "no hex": lambda new: rotation(new).replace(b'"}', b'g"}'),
    "no such DEK": lambda new: rotation(new, ',"key_id":"k_absent"', path="/rewrap"),
    "no key_id": lambda new: rotation(new, path="/rewrap"),
    "cut off": lambda new: rotation(new, length=200),
    "a bad chunk": lambda new: CHUNKED + b"53\r\n" + rotation(new)[-83:] + b"\r\nzz\r\n",
    "another path": lambda new: rotation(new).replace(b"/rotate_kek", b"/nothing"),
    "another type": lambda new: rotation(new).replace(b"unix", b"unix\r\nContent-Type: text/plain"),
}
CHUNKED = b"POST /rotate_kek HTTP/1.1\r\nHost: u\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_refused_requests_leave_no_copy() -> None:
    secrets = []
    with Daemon({"request_timeout": 1}, workers=1) as daemon:
        for name, make in REFUSED.items():
            new = os.urandom(32)
            secrets.append(Secret(name, new))
            request = make(new)
            answer = raw(daemon.socket, [request[at : at + 50] for at in range(0, len(request), 50)])
            assert not answer.startswith(b"HTTP/1.1 2"), (name, answer)
        secrets += used(daemon)
        scan(daemon.pids(), secrets).assert_clean()
        nothing_kept(daemon, secrets)
        assert daemon.ok("GET", "/status")["kek_version"] == "1"


@pytest.mark.parametrize("end", ["served", "in chunks", "cut off", "too slow"])
def test_a_long_body_leaves_no_copy(end: str) -> None:
    """Wherever in it, and whatever buffer it had moved to by then."""
    markers = [os.urandom(32) for _ in range(6)]
    body = bytearray(3 * LONG)
    for number, marker in enumerate(markers):
        at = number * LONG // 2 + 100
        body[at : at + len(marker)] = marker
    with Daemon({"request_timeout": 1 if end == "too slow" else 30}, workers=1) as daemon:
        key_id = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        head = (
            f"POST /encrypt?key_id={key_id} HTTP/1.1\r\nHost: u\r\nContent-Type: application/octet-stream\r\n"
        )
        with connect(daemon.socket, 60.0) as sock:
            if end == "in chunks":
                sock.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
                for at in range(0, len(body), 100_000):
                    piece = body[at : at + 100_000]
                    sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
                sock.sendall(b"0\r\n\r\n")
            else:
                sent = len(body) if end == "served" else len(body) - LONG // 4
                sock.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body[:sent])
            if end != "cut off":
                status = b"408" if end == "too slow" else b"200"
                assert sock.recv(12) == b"HTTP/1.1 " + status
        wait_until(lambda: kept(daemon) == 0, 60, "the body to be gone")
        scan(
            daemon.pids(), [Secret(f"marker {n}", m, key=False) for n, m in enumerate(markers)]
        ).assert_clean()


def kept(daemon: Daemon) -> int:
    limits = daemon.ok("GET", "/status")["limits"]
    return int(limits["body_bytes"]["used"]) + int(limits["connections"]["used"]) - 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can connect as another user")
def test_a_refused_peer_leaves_no_copy() -> None:
    new = os.urandom(32)
    with Daemon({"admin_peer_uids": [12345]}, workers=1) as daemon:
        assert daemon.request("POST", "/rotate_kek", {"new_kek_hex": new.hex()}).status == 403
        scan(daemon.pids(), [Secret("new KEK", new), Secret("KEK", daemon.kek)]).assert_clean()


# ---- what else happens to a daemon -------------------------------------------------------------------


def test_after_a_new_worker_a_hangup_and_offline_commands() -> None:
    with Daemon(workers=2) as daemon:
        secrets = used(daemon)
        victim = next(pid for pid in daemon.pids() if pid not in (daemon.pid, daemon.writer))
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in daemon.pids() and len(daemon.pids()) == 4, 20, "a new worker")
        daemon.signal(signal.SIGHUP)
        assert daemon.offline("backup", str(daemon.home / "b")).returncode == 0
        assert daemon.offline("verify").returncode == 0
        secrets += used(daemon)
        scan(daemon.pids(), secrets).assert_clean()
        nothing_kept(daemon, secrets)


EXIT_GROUP = {"x86_64": "231", "aarch64": "94"}.get(platform.machine(), "")


def at_exit(seconds: float) -> str:
    """strace holds each process there for so long."""
    return f"exit_group:delay_enter={seconds * 1e6:.0f}"


def at_its_end(process: subprocess.Popen[bytes]) -> int:
    """Wait until the process has done all but exit. Its pid."""
    if not EXIT_GROUP:
        pytest.skip("the number of exit_group is not known for this machine")
    where = Path(f"/proc/{process.pid}/syscall")
    wait_until(lambda: where.read_text().split()[0] == EXIT_GROUP, 60, "the exit")
    return process.pid


@pytest.mark.parametrize("words", [("verify",), ("export", "-")], ids=" ".join)
def test_offline_commands_keep_no_copy(daemon: Daemon, words: tuple[str, ...]) -> None:
    """`verify` opens every DEK, `export` the row key: what is left in its process when it has done so."""
    need_strace()
    secrets = used(daemon)
    daemon.stop()
    folders = ["--data-dir", str(daemon.data_dir), "--config", str(daemon.config_file)]
    nowhere = subprocess.DEVNULL
    for seconds in (2.5, 20):  # on a slow machine it may be gone before all of it has been read
        command = [*injecting(at_exit(seconds)), *daemon.command, *words, *folders]
        process = subprocess.Popen(command, env=daemon.environment(), stdout=nowhere, stderr=nowhere)
        with process, contextlib.suppress(OSError):
            scan([at_its_end(process)], secrets).assert_clean()
            return process.kill()
    raise AssertionError("it ended before it could be looked at")


# ---- without memfd_secret ------------------------------------------------------------------------------


def test_the_fallback_holds_each_key_in_one_place() -> None:
    """mlock'ed pages can be read by root: the KEK is in that one mapping, and nowhere else."""
    with Daemon(wrapper=without_memfd_secret(), workers=2) as daemon:
        kek, *others = used(daemon)
        assert daemon.ok("GET", "/status")["memory"]["kind"] == "mlock"
        report = scan(daemon.pids(), [kek])
        assert {hit.mapping.start for hit in report.hits} == {report.hits[0].mapping.start}
        assert "hex" not in str(report) and "base64" not in str(report)
        scan(daemon.pids(), others).assert_clean()


def test_sigterm_wipes() -> None:
    """The shared page as it is right before the exit of the last process."""
    with Daemon(wrapper=without_memfd_secret(at_exit(2.5)), workers=1) as daemon:
        secrets = used(daemon)
        assert scan([daemon.pid], secrets[:1]).hits  # readable, in this kind of memory
        assert daemon.process is not None
        daemon.process.terminate()
        scan([at_its_end(daemon.process)], secrets).assert_clean()


def limited(mode: str) -> Daemon:
    """A daemon that may lock nothing: not even root, since the capability is dropped too."""
    drop = ["setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock", "prlimit", "--memlock=0:0"]
    return Daemon({"memory_lock": mode}, wrapper=drop, workers=1)


class TestNothingCanBeLocked:
    def test_require_refuses(self) -> None:
        daemon = limited("require")
        text = str(daemon.refusal())
        assert "LimitMEMLOCK" in text and "ulimit -l" in text and "Traceback" not in text

    def test_try_warns_and_tells(self) -> None:
        with limited("try") as daemon:
            assert "LimitMEMLOCK" in daemon.stderr and "ulimit -l" in daemon.stderr
            assert daemon.ok("GET", "/status")["memory"]["kind"] == "unlocked"
            kek, *others = used(daemon)
            assert len({start for _, start in scan(daemon.pids(), [kek]).mappings()}) == 1
            scan(daemon.pids(), others).assert_clean()

    def test_off_says_nothing(self) -> None:
        with limited("off") as daemon:
            assert "LimitMEMLOCK" not in daemon.stderr
            assert daemon.ok("GET", "/status")["memory"]["kind"] == "unlocked"


# ---- core files --------------------------------------------------------------------------------------------


def test_an_abort_leaves_no_core() -> None:
    """Each process, with a limit that would allow a core file of any size."""
    with Daemon(wrapper=["prlimit", "--core=unlimited"], workers=2) as daemon:
        kek, *_ = used(daemon)
        pids = daemon.pids()
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        with contextlib.suppress(DaemonFailed):
            daemon.wait(code=-signal.SIGABRT)
        found = [path for folder in (daemon.home, Path("/tmp")) for path in folder.glob("core*")]
        assert all(kek.value not in path.read_bytes() for path in found if path.is_file())
        assert not list(daemon.home.rglob("core*"))


# ---- secret routes while a request is under way ------------------------------------------------------------


def _chunked(new: bytes, size: int) -> bytes:
    body = rotation(new).partition(b"\r\n\r\n")[2]
    return CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in _cut(body, size))


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_new_kek_on_its_way_has_no_copy(workers: int) -> None:
    """By every framing, with the last piece missing: nothing of it may stand in readable memory meanwhile."""
    with Daemon(workers=workers) as daemon, contextlib.ExitStack() as held:
        secrets = [Secret("KEK", daemon.kek)]
        for name, size, make in (
            ("whole", 4096, lambda new: rotation(new)[:-1]),
            ("byte by byte", 1, lambda new: rotation(new)[:-1]),
            ("head, then body", 60, lambda new: rotation(new)[:-1]),
            (
                "asked for",
                4096,
                lambda new: rotation(new).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")[:-1],
            ),
            ("a chunk", 4096, lambda new: _chunked(new, 4096)),
            ("small chunks", 4096, lambda new: _chunked(new, 5)),
            ("chunks byte by byte", 1, lambda new: _chunked(new, 30)),
            (
                "behind another request",
                4096,
                lambda new: b"GET /healthz HTTP/1.1\r\nHost: u\r\n\r\n" + rotation(new)[:-1],
            ),
        ):
            new = os.urandom(32)
            secrets.append(Secret(name, new))
            sock = held.enter_context(connect(daemon.socket))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # 411 may come first
                for piece in _cut(make(new), size):
                    sock.sendall(piece)
                    time.sleep(0.001)
        time.sleep(0.5)
        scan(daemon.pids(), secrets).assert_clean()
