"""The zipapp: the same bytes from two builds, and a daemon on a host that has Python alone.

What a bundle is made of comes from build/zipapp or the package index; without both these tests are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest

from progressdb_kms import __version__
from progressdb_kms.tools.manual import text_of
from tests.harness.daemon import Daemon

REPO = Path(__file__).resolve().parents[2]
HERE = ("--python", f"{sys.version_info[0]}.{sys.version_info[1]}")
"""What all of six Pythons need takes a minute to fetch."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a zipapp is built from, as it is now: others may be editing the tree."""
    folder = tmp_path_factory.mktemp("tree")
    for part in ("progressdb_kms", "packaging/zipapp"):
        shutil.copytree(REPO / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("bin/build-zipapp", "bin/venv", "packaging/zipapp.lock"):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / file, folder / file)
    return folder


def build(tree: Path, output: str, *options: str) -> Path:
    """One zipapp, of the packages that the real tree has fetched."""
    done = subprocess.run(
        [sys.executable, str(tree / "bin/build-zipapp"), *options, "--cache", str(REPO / "build/zipapp")]
        + ["--output", str(tree / output)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode and "pip" in done.stderr:
        pytest.skip(f"the package index is out of reach: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def plain(tree: Path) -> Path:
    return build(tree, "one", *HERE)


@pytest.fixture(scope="module")
def bundle(tree: Path) -> Path:
    return build(tree, "one", "--bundle", *HERE)


# ---- the file ----------------------------------------------------------------------------------------


def later(tree: Path) -> None:
    for file in (*(tree / "progressdb_kms").iterdir(), tree / "packaging/zipapp/__main__.py"):
        os.utime(file, (1, 1))


def test_two_builds_are_the_same(tree: Path, plain: Path) -> None:
    later(tree)
    assert build(tree, "two", *HERE).read_bytes() == plain.read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--bundle",)], ids=["plain", "bundle"])
def test_two_builds_for_all_pythons_are_the_same(tree: Path, options: tuple[str, ...]) -> None:
    first = build(tree, "all", *options).read_bytes()
    later(tree)
    assert build(tree, "again", *options).read_bytes() == first
    name = "progressdb-kms-<arch>.pyz" if options else "progressdb-kms.pyz"
    (told,) = re.findall(rf"dist/{name}` \((\d+) MB\)", text_of("install"))
    assert len(first) < (int(told) + 1) * 1_000_000  # of fewer Pythons it is less


def test_the_file_is_executable_and_has_no_times(bundle: Path) -> None:
    assert bundle.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert bundle.stat().st_mode & 0o777 == 0o755
    with zipfile.ZipFile(bundle) as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_plain_one_carries_no_cryptography_and_no_native_code(plain: Path) -> None:
    with zipfile.ZipFile(plain) as archive:
        names = archive.namelist()
    assert "sqlitedict.py" in names and "yaml/loader.py" in names
    assert not [name for name in names if name.startswith("cryptography") or name.endswith(".so")]


def run(
    pyz: Path, *words: str, python: str = sys.executable, **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, str(pyz), *words],
        capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environ},
    )  # fmt: skip


def test_both_run_here(plain: Path, bundle: Path) -> None:
    for pyz in (plain, bundle):
        done = run(pyz, "--version")
        assert (done.returncode, done.stdout) == (0, f"progressdb-kms {__version__}\n"), done.stderr
        done = run(pyz, "help", "threats")
        assert (done.returncode, done.stdout.partition("\n")[0]) == (0, "# Threat model"), done.stderr


def test_a_package_that_was_changed_is_not_taken(tree: Path, plain: Path, short_tmp: Path) -> None:
    """What is in the cache is held against the lock, and so is what pip would bring."""
    cache = short_tmp / "cache"
    shutil.copytree(REPO / "build/zipapp", cache)
    (package,) = cache.glob("sqlitedict*")
    package.write_bytes(package.read_bytes() + b"\0")
    done = subprocess.run(
        [sys.executable, str(tree / "bin/build-zipapp"), "--cache", str(cache), "--output", str(short_tmp)],
        capture_output=True, text=True, env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(cache)},
    )  # fmt: skip
    assert done.returncode != 0
    assert not list(short_tmp.glob("*.pyz"))


# ---- hosts that won't do -----------------------------------------------------------------------------


def test_a_host_without_cryptography_is_told_where_it_comes_from(plain: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(plain), "status"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "python3-cryptography" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("version", "code"), [("37.0.4", 1), ("38.0.0", 0), ("100.0", 0)])
def test_the_range_of_cryptography_is_checked(plain: Path, tmp_path: Path, version: str, code: int) -> None:
    (tmp_path / "cryptography").mkdir()
    (tmp_path / "cryptography/__init__.py").write_text(f"__version__ = {version!r}\n")
    done = run(plain, "--version", PYTHONPATH=str(tmp_path))
    assert done.returncode == code
    if code:
        assert "38 or newer is needed" in done.stderr and version in done.stderr


def test_an_old_python_is_told(plain: Path) -> None:
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    paths = [path for name in ("python3.8", "python3.7", "python3.6") if (path := shutil.which(name))]
    paths += [str(path) for minor in (8, 7, 6) for path in pyenv.glob(f"versions/3.{minor}.*/bin/python")]
    old = [
        path for path in paths if not subprocess.run([path, "-c", ""], stderr=subprocess.DEVNULL).returncode
    ]
    if not old:
        pytest.skip("no Python older than 3.9 is here")
    done = run(plain, "--version", python=old[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert "Python 3.9 or newer is needed, this is 3." in done.stderr


def altered(bundle: Path, target: Path, old: bytes, new: bytes) -> Path:
    """The bundle with another native/index.json."""
    with zipfile.ZipFile(bundle) as archive, zipfile.ZipFile(target, "w") as out:
        for name in archive.namelist():
            data = archive.read(name)
            if name == "native/index.json":
                assert old in data
                data = data.replace(old, new)
            out.writestr(name, data)
    return target


def test_a_bundle_for_another_machine_says_so(bundle: Path, tmp_path: Path) -> None:
    wrong = altered(bundle, tmp_path / "w.pyz", f'"{os.uname().machine}"'.encode(), b'"vax"')
    done = run(wrong, "--version")
    assert done.returncode == 1 and "is for vax" in done.stderr


def test_a_bundle_without_this_python_names_those_it_has(bundle: Path, tmp_path: Path) -> None:
    tag = sys.implementation.cache_tag.encode()
    done = run(altered(bundle, tmp_path / "w.pyz", tag, b"cpython-2"), "--version")
    assert done.returncode == 1 and "this is " + sys.implementation.cache_tag in done.stderr


# ---- the daemon ----------------------------------------------------------------------------------------


def test_a_daemon_from_the_plain_one(plain: Path, make_daemon: type[Daemon]) -> None:
    daemon = make_daemon(command=(sys.executable, str(plain)))
    with daemon.session() as kms:
        assert kms.create_dek("t")["key_id"]
        assert kms.ok("GET", "/openapi.json")["info"]["version"] == __version__
    daemon.stop()


LOCKED_DOWN = """
set -eu
mount -t tmpfs -o noexec,nosuid,mode=1777 tmpfs /dev/shm
mount -t tmpfs -o noexec,nosuid,mode=1777 tmpfs "$3"
cp "$2" "$3/kms.pyz"
for folder in "$@"; do
    case $folder in */dist-packages | */site-packages) mount -t tmpfs -o ro tmpfs "$folder" ;; esac
done
mount -o remount,bind,ro /
python=$1
cd "$3"
! touch /usr/x 2>/dev/null
cp /bin/true ./x && ! ./x 2>/dev/null
! "$python" -c 'import cryptography' 2>/dev/null
! "$python" -c 'import pip' 2>/dev/null
umask 077
"$python" kms.pyz genkey kek >/dev/null
printf 'master_key_file: kek\\nworkers: 2\\n' >c.yaml
"$python" kms.pyz --config c.yaml --socket s --data-dir d >out 2>&1 &
daemon=$!
i=0
until grep -q ready out; do
    i=$((i + 1))
    [ $i -lt 200 ] && kill -0 $daemon || { cat out >&2; exit 1; }
    sleep 0.1
done
dek=$("$python" kms.pyz create-dek --socket s --thread-id t)
printf 'what a chat says' | "$python" kms.pyz encrypt --socket s --key-id "$dek" >e
"$python" kms.pyz decrypt --socket s --key-id "$dek" <e
echo
"$python" kms.pyz status --json --socket s | grep -o wipe_on_free | sort -u
find . /dev/shm -name '*.so*'
kill -TERM $daemon
wait $daemon
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root (mounts)")
def test_a_host_without_packages_network_exec_and_writable_files(bundle: Path) -> None:
    """Everything but one noexec tmpfs is read-only, what pip and apt installed is hidden, no network."""
    with tempfile.TemporaryDirectory(dir="/tmp") as home, tempfile.TemporaryDirectory(dir="/tmp") as shelf:
        serves_locked_down(Path(shutil.copy(bundle, shelf)), Path(home))


def serves_locked_down(bundle: Path, home: Path) -> None:
    python = os.path.realpath(sys.executable)
    ask = "import site, sysconfig; print(*site.getsitepackages(), sysconfig.get_path('purelib'))"
    asked = subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, text=True, check=True)
    hidden = sorted({folder for folder in asked.stdout.split() if os.path.isdir(folder)})
    assert hidden and sysconfig.get_path("stdlib") not in hidden
    done = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", LOCKED_DOWN, "-"]
        + [python, str(bundle), str(home), *hidden],
        capture_output=True, text=True, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )  # fmt: skip
    if done.stderr.startswith("unshare: "):  # not allowed here, or in a chroot that is no mount point
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "what a chat says"
    assert "wipe_on_free" in lines[1] and len(lines) == 2, "a library was unpacked"
