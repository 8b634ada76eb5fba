"""A real daemon in a folder of its own: started, asked, stopped or killed, and always cleaned up.

    with Daemon(workers=2) as daemon:                       # started and ready
        with daemon.session() as kms:
            key = kms.create_dek("thread-1")["key_id"]
        daemon.kill()                                       # SIGKILL; workers must die with it
        daemon.start()                                      # the same folder again
        assert daemon.cli("status").returncode == 0
        daemon.stop()                                       # SIGTERM; asserts exit code 0

    refused = Daemon({"memory_lock": 7}).refusal()          # must not come up
    assert refused.code == 1 and "memory_lock" in refused.stderr

The folder (`home`, under /tmp, so that socket paths stay under 108 bytes) holds `s` (the socket),
`data/`, `config.yaml`, `kek`, `out` and `err`. It is laid out once, by the constructor; tests may edit
what is there between two starts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from . import procs, warm, wire
from .folders import new_folder
from .wire import Body, Reply, Session

REPO = Path(__file__).resolve().parents[2]
COMMAND = warm.WORDS

# Where the master key comes from. `hexfile` and `rawfile` are named in the YAML; `env` starts without one.
SOURCES = ("hexfile", "rawfile", "yaml", "credential", "env", "none")


class DaemonFailed(AssertionError):
    """It ended instead of serving, or ended with another exit code than it should."""

    def __init__(self, what: str, code: int | None, stderr: str) -> None:
        super().__init__(f"{what} (exit code {code}); its stderr:\n{stderr}")
        self.code = code
        self.stderr = stderr


class Daemon:
    """One `progressdb-kms` and its folder. Nothing is started before `start()` or `with`.

    config    keys for the YAML beside the master key
    kek       32 bytes; random where not given
    source    one of SOURCES: how the daemon gets the KEK
    workers   written to the YAML where given
    args      further arguments of the command line
    env       further environment; the rest is a short fixed list, so that nothing of the caller's gets in
    command   what to run instead of COMMAND; `--socket … --data-dir … --config …` is added
    wrapper   put before the command: ("strace", "-D", …). It must exec, or be strace -D, so that the pid is
              the daemon's own
    home      an existing, empty folder; made where not given
    """

    running: ClassVar[list[Daemon]] = []  # for the report of a failed test
    linger = 10.0  # seconds that its other processes may outlive it

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        kek: bytes | None = None,
        source: str = "hexfile",
        workers: int | str | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = COMMAND,
        wrapper: Sequence[str] = (),
        home: Path | None = None,
        ready_timeout: float = 60.0,
    ) -> None:
        assert source in SOURCES, f"source is one of {SOURCES}"
        self.home = home or new_folder()
        self.kek = os.urandom(32) if kek is None else kek
        self.source = source
        self.args, self.command, self.wrapper = list(args), list(command), list(wrapper)
        self.env = dict(env or {})
        self.ready_timeout = ready_timeout
        self.process: subprocess.Popen[bytes] | None = None
        self._known: set[procs.Proc] = set()
        self._err_start = 0
        self.data_dir.mkdir(mode=0o700, exist_ok=True)
        self.write_kek(self.kek)
        self.write_config({**(config or {}), **({} if workers is None else {"workers": workers})})

    # ---- the folder --------------------------------------------------------------------------------

    @property
    def socket(self) -> Path:
        return self.home / "s"

    @property
    def data_dir(self) -> Path:
        return self.home / "data"

    @property
    def config_file(self) -> Path:
        return self.home / "config.yaml"

    @property
    def kek_file(self) -> Path:
        return self.home / "kek"

    @property
    def audit_log(self) -> Path:
        return self.data_dir / "kms-audit.log"

    def write_kek(self, kek: bytes) -> None:
        """Make this the KEK that the next start reads (with source `yaml`: also call write_config)."""
        self.kek = kek
        if self.source in ("hexfile", "credential"):
            write_secret(self.kek_file, kek.hex().encode() + b"\n")
        elif self.source == "rawfile":
            write_secret(self.kek_file, kek)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """The YAML: these keys and the one for the master key."""
        key: dict[str, Any] = {}
        if self.source in ("hexfile", "rawfile"):
            key = {"master_key_file": str(self.kek_file)}
        elif self.source == "yaml":
            key = {"master_key_hex": self.kek.hex()}
        elif self.source == "credential":
            key = {"master_key_credential": self.kek_file.name}
        self.config = {**key, **config}
        write_secret(self.config_file, yaml.safe_dump(self.config).encode())

    def copy(self, *, data: bool = True) -> Daemon:
        """A stopped twin in a folder of its own, with this one's files (`data=False`: an empty data-dir)."""
        twin = Daemon(
            kek=self.kek, source=self.source, args=self.args, env=self.env, command=self.command,
            ready_timeout=self.ready_timeout,
        )  # fmt: skip
        for name in ("kek", "config.yaml"):
            if (self.home / name).exists():
                text = (self.home / name).read_bytes()
                write_secret(twin.home / name, text.replace(bytes(self.home), bytes(twin.home)))
        twin.config = self.config
        if data:
            shutil.copytree(self.data_dir, twin.data_dir, dirs_exist_ok=True)
        return twin

    # ---- start -------------------------------------------------------------------------------------

    @property
    def argv(self) -> list[str]:
        found = [*self.wrapper, *self.command, "--socket", str(self.socket), "--data-dir", str(self.data_dir)]
        if self.source != "env":
            found += ["--config", str(self.config_file)]
        return found + self.args

    def environment(self) -> dict[str, str]:
        found = base_environment(self.home)
        if self.source == "env":
            found["PROGRESSDB_KMS_MASTER_KEY_HEX"] = self.kek.hex()
        if self.source == "credential":
            found["CREDENTIALS_DIRECTORY"] = str(self.home)
        return {**found, **self.env}

    def spawn(self) -> Daemon:
        """Start it and don't wait."""
        assert self.process is None or self.process.poll() is not None, "it is running already"
        with open(self.home / "out", "ab") as out, open(self.home / "err", "ab") as err:
            self._err_start = err.tell()
            self.process = self._starter()(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.home,
                env=self.environment(),
                start_new_session=True,  # so that what is left of it can be found by its session
            )
        Daemon.running.append(self)
        return self

    def _starter(self) -> type[subprocess.Popen[bytes]]:
        odd = self.wrapper or self.source in ("env", "credential")
        return subprocess.Popen if odd or not warm.possible(self.command, self.env) else warm.Warm

    def start(self) -> Daemon:
        """Start it and wait until /healthz answers 200. DaemonFailed as soon as it ends instead."""
        return self.spawn().wait_ready()

    def wait_ready(self) -> Daemon:
        deadline = time.monotonic() + self.ready_timeout
        while not self.healthy():
            code = self._live().poll()
            if code is not None:
                self._forget()
                raise DaemonFailed("the daemon ended before it served", code, self.stderr)
            if time.monotonic() > deadline:
                raise DaemonFailed(f"no answer from /healthz in {self.ready_timeout:g} s", None, self.stderr)
            time.sleep(0.01)
        self.pids()
        return self

    def healthy(self) -> bool:
        try:
            return wire.request(self.socket, "GET", "/healthz", timeout=5).status == 200
        except OSError:
            return False

    def refusal(self) -> DaemonFailed:
        """Start it, expecting that it refuses: what it said. AssertionError where it serves; cleans up."""
        try:
            self.start()
        except DaemonFailed as failed:
            if failed.code is None:
                raise
            return failed
        finally:
            self.close()
        raise AssertionError("the daemon serves, but should have refused to start")

    # ---- the living --------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self._live().pid

    def pids(self) -> list[int]:
        """The whole process tree: the parent first, then its workers (and their children, if any)."""
        found = procs.tree(self.pid)
        self._known.update(member for pid in found if (member := procs.proc(pid)) is not None)
        return found

    @property
    def writer(self) -> int:
        """The process that writes the store, a child of the one that was started. For `trace_steps`,
        `kill_at`, and to kill the keeper alone. Needs root: the daemon is not dumpable."""
        found = [pid for pid in self.pids() if procs.writes_to(pid, self.data_dir / "kms.db")]
        assert len(found) == 1, f"{len(found)} processes have the store open for writing: {found}"
        return found[0]

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def stdout(self) -> str:
        return _text(self.home / "out")

    @property
    def stderr(self) -> str:
        """Of the present or the last run."""
        return _text(self.home / "err", self._err_start)

    def session(self, timeout: float = wire.TIMEOUT) -> Session:
        """A new keep-alive connection; use it in a `with`."""
        return Session(self.socket, timeout)

    def request(
        self, method: str, path: str, body: Body = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        return wire.request(self.socket, method, path, body, headers)

    def ok(self, method: str, path: str, body: Body = None, status: int = 200) -> Any:
        """The JSON of one call; UnexpectedReply where its status is another."""
        with self.session() as session:
            return session.ok(method, path, body, status)

    # ---- the command line --------------------------------------------------------------------------

    def cli(self, *args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """`progressdb-kms ARGS… --socket S`, for online commands. Options are those of `cli` below."""
        return cli(*args, "--socket", str(self.socket), **{"env": self.env, "cwd": self.home, **options})

    def offline(self, *args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """`progressdb-kms ARGS… --data-dir D --config C`, for offline commands."""
        folders = ("--data-dir", str(self.data_dir), "--config", str(self.config_file))
        env = {name: value for name, value in self.environment().items() if name == "CREDENTIALS_DIRECTORY"}
        return cli(*args, *folders, **{"env": {**env, **self.env}, "cwd": self.home, **options})

    # ---- the end -----------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        self._live().send_signal(number)

    def stop(self, timeout: float = 120.0, code: int = 0) -> None:
        """SIGTERM. DaemonFailed where it doesn't end, ends with another exit code, or leaves processes."""
        self.pids()
        self.signal(signal.SIGTERM)
        self.wait(timeout, code)

    def wait(self, timeout: float = 120.0, code: int = 0) -> None:
        """Wait for its end, which came by other means; checks as `stop` does."""
        try:
            found = self._live().wait(timeout)
        except subprocess.TimeoutExpired:
            raise DaemonFailed(
                f"still running {timeout:g} s after it should end", None, self.stderr
            ) from None
        self._gone()
        if found != code:
            raise DaemonFailed(f"exit code {found} instead of {code}", found, self.stderr)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """All of its processes are stopped meanwhile: what comes is there all at once when they go on."""
        pids = self.pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        procs.wait_until(lambda: all(map(_stopped, pids)), 60, "the daemon to stop")
        try:
            yield
        finally:
            for pid in reversed(pids):
                os.kill(pid, signal.SIGCONT)

    def stopped_behind(self, sent: Sequence[tuple[Any, bytes]]) -> Iterator[bytes]:
        """SIGTERM comes when all of this lies on the sockets. Yields what is answered, socket by socket."""
        with self.standing_still():
            for sock, data in sent:
                sock.sendall(data)
            self.signal(signal.SIGTERM)
        for sock, _ in sent:
            with sock.makefile("rb") as answers:
                yield answers.read()

    def kill(self) -> None:
        """SIGKILL to the parent alone: the workers must die with it."""
        self.pids()
        self.signal(signal.SIGKILL)
        self.wait(code=-signal.SIGKILL)

    def _gone(self) -> None:
        """Assert that nothing of the run is left: no known process, none of its session."""
        sid = self._live().pid
        try:
            procs.wait_until(
                lambda: not any(p.alive() for p in self._known) and not procs.session_members(sid),
                self.linger,
                "the daemon's other processes to end",
            )
        finally:
            procs.end({*self._known, *procs.session_members(sid)})
            self._forget()

    def close(self) -> None:
        """End whatever still runs, without asking, and remove the folder."""
        if self.process is not None:
            if self.process.poll() is None:
                self._known.update(procs.session_members(self.process.pid))
                self.process.kill()
                self.process.wait()
            procs.end({*self._known, *procs.session_members(self.process.pid)})
            self._forget()
            self.process = None
        shutil.rmtree(self.home, ignore_errors=True)

    def _live(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, "it was never started"
        return self.process

    def _forget(self) -> None:
        self._known.clear()
        if self in Daemon.running:
            Daemon.running.remove(self)

    def __enter__(self) -> Daemon:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *error: object) -> None:
        self.close()


def cli(
    *args: str,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 240.0,
    wrapper: Sequence[str] = (),
) -> subprocess.CompletedProcess[bytes]:
    """`progressdb-kms ARGS…` to its end, in a clean environment; look at returncode, stdout and stderr."""
    words = [*wrapper, *COMMAND, *args]
    starter = warm.Warm if not wrapper and warm.possible(COMMAND, env or {}) else subprocess.Popen
    variables = {**base_environment(cwd or Path("/nonexistent")), **(env or {})}
    pipe = subprocess.PIPE
    with starter(words, stdin=pipe, stdout=pipe, stderr=pipe, env=variables, cwd=cwd) as process:
        try:
            out, err = process.communicate(stdin, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def base_environment(home: Path) -> dict[str, str]:
    """What every process of the tests gets: no variable of the caller but PATH."""
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(REPO),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _stopped(pid: int) -> bool:
    return all((procs.stat(thread) or "T")[0] == "T" for thread in procs.threads(pid))


def write_secret(path: Path, data: bytes) -> None:
    """Write with mode 0600, replacing what is there."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, 0o600)
        file.write(data)


def _text(path: Path, start: int = 0) -> str:
    try:
        return path.read_bytes()[start:].decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
