"""bin/progressdb-kms and bin/dev.sh, run in a skeleton of the tree: nothing is made in the tree itself."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms import __version__
from tests.harness.daemon import REPO, base_environment, write_secret
from tests.harness.fakekms import kek_id_of
from tests.harness.wire import request


@pytest.fixture
def tree(short_tmp: Path) -> Path:
    """A clone, of which the name would trip a careless script."""
    root = short_tmp / "a clone's"
    (root / "bin").mkdir(parents=True)
    for name in ("progressdb-kms", "dev.sh", "venv"):
        shutil.copy(REPO / "bin" / name, root / "bin")
    for name in ("progressdb_kms", "setup.cfg", "pyproject.toml", "README.md"):
        if (REPO / name).exists():
            (root / name).symlink_to(REPO / name)
    return root


def environment(root: Path) -> dict[str, str]:
    found = base_environment(root)
    del found["PYTHONPATH"]
    path = f"{Path(sys.executable).parent}:{found['PATH']}"  # the Python of the tests, which has the packages
    return {**found, "PATH": path}


# ---- bin/progressdb-kms ------------------------------------------------------------------------------


class TestProgram:
    def run(self, tree: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *options, str(tree / "bin" / "progressdb-kms"), *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment(tree))

    def test_from_the_tree(self, tree: Path) -> None:
        done = self.run(tree, "--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"progressdb-kms {__version__}\n", "")

    def test_by_a_link(self, tree: Path, short_tmp: Path) -> None:
        (short_tmp / "kms").symlink_to(tree / "bin" / "progressdb-kms")
        done = subprocess.run([short_tmp / "kms", "--version"], capture_output=True, env=environment(tree))
        assert done.stdout == f"progressdb-kms {__version__}\n".encode()

    def test_missing_packages_are_named(self, tree: Path) -> None:
        done = self.run(tree, "status", options=("-S",))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            "progressdb-kms: cryptography, pyyaml and sqlitedict: not installed "
            "(bin/dev.sh puts all into .venv; "
            "or: apt install python3-cryptography python3-yaml python3-sqlitedict)\n"
        )

    @pytest.mark.parametrize("words", [("--help",), ("-h",), ("--version",), ("encrypt", "--help")])
    def test_help_needs_no_package(self, tree: Path, words: tuple[str, ...]) -> None:
        done = self.run(tree, *words, options=("-S",))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == self.run(tree, *words).stdout != ""

    @pytest.mark.parametrize(
        ("module", "package"),
        [("cryptography", "pip install cryptography"), ("yaml", "PyYAML"), ("sqlitedict", "sqlitedict")],
    )
    def test_a_missing_package_is_named_by_the_module_too(
        self, tree: Path, short_tmp: Path, module: str, package: str
    ) -> None:
        """`python -m progressdb_kms`, where one of them is not there."""
        (short_tmp / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
        write_secret(short_tmp / "c.yaml", b"workers: 1\n")
        words = ["verify", "--data-dir", str(short_tmp), "--config", str(short_tmp / "c.yaml")]
        env = {**environment(tree), "PYTHONPATH": f"{short_tmp}:{tree}"}
        command = [sys.executable, "-m", "progressdb_kms", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 1 and package in done.stderr and f"python3-{module}" in done.stderr
        assert "internal" not in done.stderr and len(done.stderr.splitlines()) == 1

    def test_the_tree_s_environment_is_taken(self, tree: Path) -> None:
        python = tree / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        python.chmod(0o755)
        done = self.run(tree, "list", "--thread-id", "a b", options=("-S",))
        words = [str(tree.resolve() / "bin" / "progressdb-kms"), "list", "--thread-id", "a b"]
        assert done.returncode == 0 and done.stdout.splitlines() == words
        assert self.run(tree, "--version").stdout == f"progressdb-kms {__version__}\n"  # not without need

    def test_it_stops_at_an_environment_that_lacks_them_too(self, tree: Path) -> None:
        """The interpreter of .venv must not start itself again and again."""
        (tree / ".venv" / "bin").mkdir(parents=True)
        (tree / ".venv" / "bin" / "python").symlink_to(sys.executable)
        about = f"home = {Path(sys.executable).resolve().parent}\ninclude-system-site-packages = false\n"
        (tree / ".venv" / "pyvenv.cfg").write_text(about)
        done = self.run(tree, "status", options=("-S",))
        assert done.returncode == 1 and "not installed" in done.stderr

    def test_serving_through_it(self, tree: Path, short_tmp: Path) -> None:
        done = self.run(tree, "serve", "--data-dir", str(short_tmp / "d"))
        assert done.returncode == 1 and "no master key is given" in done.stderr


# ---- bin/test ----------------------------------------------------------------------------------------


class TestTest:
    SHARED = f"-n {2 * min(4, os.cpu_count() or 1)} --dist loadscope"

    def pytest_of(self, root: Path, *words: str) -> str:
        """The words that pytest gets from `bin/test --no-lint WORDS…`: its environment is a fake one."""
        (root / "bin").mkdir()
        (root / "tests").mkdir()
        shutil.copy(REPO / "bin" / "test", root / "bin")
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(REPO / name, root)
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        python = root / f".venv-test-{version}" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text('#!/bin/sh\n[ "$2" != pytest ] || printf "%s " "$@"\n')
        python.chmod(0o755)
        stamp = '{ cat setup.cfg pyproject.toml; python3 -V; pwd; } | cksum >"$0"'
        env = environment(root)
        subprocess.run(["sh", "-c", stamp, python.parents[1] / "stamp"], cwd=root, env=env, check=True)
        command = ["sh", "bin/test", "--no-lint", *words]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    @pytest.mark.parametrize(
        "words", ["", "-x", "-k chunked", "-k tests", "-v -m root", "--durations=5 -rs", "--maxfail 1"]
    )
    def test_several_processes_share_it_whatever_the_options(self, short_tmp: Path, words: str) -> None:
        assert self.SHARED in self.pytest_of(short_tmp, *words.split())

    @pytest.mark.parametrize("words", ["tests", "tests::one -x", "-s", "-vs", "--pdb", "-n 3", "-p no:xdist"])
    def test_one_alone_has_the_terminal_and_chosen_tests(self, short_tmp: Path, words: str) -> None:
        found = self.pytest_of(short_tmp, *words.split())
        assert self.SHARED not in found and found.endswith(words)

    def test_long_tests_are_asked_for(self, short_tmp: Path) -> None:
        assert "-m not long" in self.pytest_of(short_tmp, "-x")

    def test_a_fast_run_is_shared_by_as_many_as_there_are_cores(self, short_tmp: Path) -> None:
        found = self.pytest_of(short_tmp, "--fast", "-x")
        assert "-m not long and not slow" in found and f"-n {min(4, os.cpu_count() or 1)} --dist" in found

    def test_all_are_run_with_long(self, short_tmp: Path) -> None:
        assert "not long" not in self.pytest_of(short_tmp, "--long")


# ---- bin/dev.sh ----------------------------------------------------------------------------------------


class Served:
    """What bin/dev.sh printed, and the daemon that it became."""

    def __init__(self, process: subprocess.Popen[str], lines: list[str]) -> None:
        self.process = process
        words = dict(line.split(None, 1) for line in lines)
        self.socket, self.kek_id, self.command = words["socket"], words["kek_id"], words["try"]
        self.all = words["all"]


@contextlib.contextmanager
def serving(tree: Path, *words: str) -> Iterator[Served]:
    process = dev(tree, "--no-build", *words)
    assert process.stdout is not None and process.stderr is not None
    try:
        lines = [process.stdout.readline().rstrip("\n") for _ in range(4)]
        assert all(lines), process.stderr.read()
        served = Served(process, lines)
        assert " ready: " in process.stdout.readline()  # the daemon's own line
        assert request(served.socket, "GET", "/healthz").status == 200
        yield served
        process.send_signal(signal.SIGINT)  # Ctrl-C
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()


def dev(tree: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = ["sh", str(tree / "bin" / "dev.sh"), *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env or environment(tree), cwd=tree.parent, **pipes)


def failing(tree: Path, *words: str) -> tuple[int, str]:
    process = dev(tree, *words)
    out, err = process.communicate(timeout=60)
    assert out == ""
    return process.returncode, err


class TestDev:
    def test_the_printed_line_works_when_pasted(self, tree: Path) -> None:
        with serving(tree) as served:
            assert served.socket == str(tree / ".kms" / "kms.sock")
            assert served.command.startswith("curl --unix-socket ")
            if not shutil.which("curl"):
                pytest.skip("curl is not installed")
            done = subprocess.run(["sh", "-c", served.command + " -sS"], capture_output=True)
            found = json.loads(done.stdout)
            assert found["kek_id"] == served.kek_id and found["key_id"]
            assert len(shlex.split(served.command)) == 8

    def test_key_and_data_are_kept(self, tree: Path) -> None:
        with serving(tree) as served:
            first = served.kek_id
        key = tree / ".kms" / "master.key"
        assert kek_id_of(bytes.fromhex(key.read_text())) == first
        assert (
            stat.S_IMODE(key.stat().st_mode) == 0o600
            and stat.S_IMODE((tree / ".kms").stat().st_mode) == 0o700
        )
        assert (tree / ".kms" / "data" / "kms.db").exists()
        with serving(tree) as served:
            assert served.kek_id == first

    def test_the_key_is_never_made_anew_over_data(self, tree: Path) -> None:
        data = tree / ".kms" / "data"
        data.mkdir(parents=True)
        (data / "kms.db").write_bytes(b"x")
        code, err = failing(tree, "--no-build")
        assert code == 1 and err == (
            f"dev.sh: {data} has data, but its key {tree}/.kms/master.key is gone: "
            f"put the key back, or remove {data} to start anew\n"
        )
        assert os.listdir(tree / ".kms") == ["data"]

    def test_places_of_one_s_own(self, tree: Path, short_tmp: Path) -> None:
        write_secret(short_tmp / "key", bytes(range(32)))
        words = ("--mkfile=key", "--socket", "s", "--data-dir", str(short_tmp / "its data"))
        with serving(tree, *words) as served:
            assert served.socket == str(short_tmp / "s") and served.kek_id == kek_id_of(bytes(range(32)))
        assert (short_tmp / "its data" / "kms.db").exists()
        assert not (tree / ".kms" / "master.key").exists()

    def test_a_program_of_one_s_own(self, tree: Path, short_tmp: Path) -> None:
        program = short_tmp / "kms"
        program.write_text('#!/bin/sh\ncase $1 in kek-id) echo "0011223344556677  f";; *) echo "$@";; esac\n')
        program.chmod(0o755)
        process = dev(tree, "--kms-bin", "./kms")
        out, err = process.communicate(timeout=60)
        lines = out.splitlines()
        assert process.returncode == 0 and lines[1] == "kek_id  0011223344556677"
        kms = tree / ".kms"
        assert lines[4] == f"serve --socket {kms}/kms.sock --data-dir {kms}/data --config {kms}/config.yaml"
        assert not (tree / ".venv").exists()

    def test_a_deep_clone(self, tree: Path, short_tmp: Path) -> None:
        """A socket's path is at most 107 bytes long."""
        deep = short_tmp / ("d" * 100) / "tree"
        deep.parent.mkdir()
        tree.rename(deep)
        (short_tmp / "run").mkdir()
        env = {**environment(deep), "XDG_RUNTIME_DIR": str(short_tmp / "run")}
        program = short_tmp / "kms"
        program.write_text("#!/bin/sh\necho 0\n")
        program.chmod(0o755)
        out, _ = dev(deep, "--kms-bin", str(program), env=env).communicate(timeout=60)
        assert out.splitlines()[0] == f"socket  {short_tmp}/run/progressdb-kms-dev-{os.getuid()}.sock"

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (("--bogus",), 2, "dev.sh: unknown option --bogus (see bin/dev.sh --help)\n"),
            (("--socket",), 2, "dev.sh: --socket needs a path (see bin/dev.sh --help)\n"),
            (("--data-dir=",), 2, "dev.sh: --data-dir needs a path (see bin/dev.sh --help)\n"),
            (("--no-build", "--mkfile", "/no/key"), 1, "dev.sh: there is no key file /no/key (make one: "),
            (("--kms-bin", "/no/kms"), 1, "dev.sh: /no/kms can't be run\n"),
        ],
    )
    def test_wrong_options(self, tree: Path, words: tuple[str, ...], code: int, message: str) -> None:
        found, err = failing(tree, *words)
        assert found == code and err.startswith(message) and err.count("\n") == 1
        assert not (tree / ".kms" / "master.key").exists()

    def test_help_names_every_option(self, tree: Path) -> None:
        out, err = dev(tree, "--help").communicate(timeout=60)
        assert err == "" and not (tree / ".kms").exists()
        for name in (
            "--no-build",
            "--kms-bin PATH",
            "--socket PATH",
            "--data-dir PATH",
            "--mkfile PATH",
            "--help",
        ):
            assert f"  {name} " in out

    @pytest.mark.long
    def test_from_nothing(self, tree: Path) -> None:
        """With the package index: an environment is made, the package installed, and both taken again."""
        env = {
            **environment(tree),
            **{name: os.environ[name] for name in os.environ if name.startswith("PIP_")},
        }
        for told in ("installing the package", ""):
            process = dev(tree, "--mkfile", "/no/key", env=env)
            _, err = process.communicate(timeout=600)
            assert process.returncode == 1 and "there is no key file" in err
            assert told in err and ("installing" in err) == bool(told)
        installed = subprocess.run([tree / ".venv/bin/progressdb-kms", "--version"], capture_output=True)
        assert installed.stdout == f"progressdb-kms {__version__}\n".encode()
