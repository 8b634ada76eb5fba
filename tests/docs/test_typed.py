"""README and manual, typed as they stand: the calls in bash and zsh, the production set-up as root."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from progressdb_kms import __version__
from tests.harness import Daemon
from tests.harness.book import book
from tests.harness.daemon import REPO
from tests.harness.wire import free_port, host_of

BOOK = book()


def section(heading: str) -> str:
    return BOOK.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


TOUR = re.findall(r"```sh\n(.*?)```", section("A short tour"), re.S)[0]
(COMMANDS,) = re.findall(r"On the command line:\n\n```sh\n(.*?)```", BOOK, re.S)
EXAMPLES = re.findall(r"`(kms [^`]*)` \|$", section("HTTP API"), re.M)


def needs(program: str) -> str:
    return shutil.which(program) or pytest.skip(f"there is no {program} here")


def lines_to_paste(daemon: Daemon) -> str:
    """What bin/dev.sh writes for its socket; the README's own definition of `kms` must be the same."""
    text = (REPO / "bin" / "dev.sh").read_text()
    body = text.split("cat <<'END'\n", 2)[-1].split("\nEND\n", 1)[0]
    (defined,) = re.findall(r"^`(kms\(\) \{.*\})`$", BOOK, re.M)
    return defined.replace("/run/progressdb-kms/kms.sock", str(daemon.socket)) + "\n" + body


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_table_of_calls(shell: str, daemon: Daemon, tmp_path: Path) -> None:
    needs("curl")
    assert len(EXAMPLES) >= 23
    typed = [lines_to_paste(daemon), *(f"{example} || echo FAILED\necho\necho MARK" for example in EXAMPLES)]
    done = subprocess.run(
        [needs(shell), "-c", "\n".join(typed)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    answers = done.stdout.split("MARK\n")
    assert done.stderr == "" and len(answers) == len(EXAMPLES) + 1
    for example, answer in zip(EXAMPLES, answers):
        assert not answer.startswith('{"error"') and "FAILED" not in answer and answer.strip(), (
            example,
            answer,
        )
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    tour = "\n".join([lines_to_paste(daemon), TOUR])
    done = subprocess.run(
        [needs(shell), "-c", tour], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == '{"plaintext":"aGVsbG8="}' and done.stderr == ""
    daemon.stop()
    daemon.start()  # nothing that was typed keeps it from starting


PYTHON = re.findall(r"```python\n(.*?)```", BOOK, re.S)


def test_the_lines_of_python(daemon: Daemon) -> None:
    assert len(PYTHON) == 2
    for block in PYTHON:
        assert "/run/progressdb-kms/kms.sock" in block
        exec(block.replace("/run/progressdb-kms/kms.sock", str(daemon.socket)), {})
    assert daemon.ok("GET", "/deks?thread_id=room-42")["deks"]


def test_the_key_of_a_master_key_that_was_hashed(tmp_path: Path) -> None:
    """The page ProgressDB has the line; what it makes is a key that the daemon takes."""
    needs("xxd")
    (line,) = re.findall(r"^ {4}(xxd .*)$", BOOK, re.M)
    (tmp_path / "old-master.hex").write_text("00ff" * 12 + "\n")
    subprocess.run([needs("bash"), "-c", line], cwd=tmp_path, check=True, timeout=60)
    made = tmp_path / "kek.key"
    assert bytes.fromhex(made.read_text()) == hashlib.sha256(bytes.fromhex("00ff" * 12)).digest()
    assert made.stat().st_mode & 0o777 == 0o600


def test_how_to_see_whether_progressdb_is_served() -> None:
    """The block of the page ProgressDB, typed on a host with the daemon on its port."""
    needs("curl")
    (block,) = re.findall(
        r"((?:^ {4}\S.*\n)+)", BOOK.split("\n### Check it\n", 1)[1].split("\n#", 1)[0], re.M
    )
    address = host_of(free_port())
    with Daemon({"tcp_address": address, "allowed_peer_uids": [os.geteuid()]}, workers=1) as daemon:
        daemon.ok("POST", "/deks", {"key_id": "t:1700000000000000000"}, 201)
        with daemon.config_file.open("a") as file:
            file.write(f"socket: {daemon.socket}\ndata_dir: {daemon.data_dir}\n")
        typed = re.sub(r"^ {4}", "", block, flags=re.M).replace("127.0.0.1:6820", address)
        typed = re.sub(
            r"(progressdb-kms [^#\n]*?)( *)(#|$)", rf"\1 --config {daemon.config_file} \3", typed, flags=re.M
        )
        typed = typed.replace("progressdb-kms ", f"{sys.executable} -m progressdb_kms ")
        done = subprocess.run(
            [needs("bash"), "-e", "-c", typed], cwd=REPO, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("ok") and "create_dek" in done.stdout
    assert re.search(rf"^ok +tcp +{address} answers$", done.stdout, re.M)


def test_how_to_hold_the_log_against_the_journal(daemon: Daemon) -> None:
    """The lines of the page on threats: of store and log together, put back, nothing else tells."""
    (block,) = re.findall(r"((?:^ {4}\S.*\n)+)", section("Threat model"), re.M)
    typed = (
        re.sub(r"^ {4}", "", block, flags=re.M)
        .replace("journalctl -u progressdb-kms -o cat", f"cat {daemon.home}/err")
        .replace("progressdb-kms audit", f"{sys.executable} -m progressdb_kms audit")
        .replace(
            "/etc/progressdb-kms/progressdb-kms.yaml", f"{daemon.config_file} --data-dir {daemon.data_dir}"
        )
        .replace("receipts receipts", f"receipts {daemon.home}/receipts")
        .replace(">receipts", f">{daemon.home}/receipts")
    )

    def told() -> subprocess.CompletedProcess[str]:
        command = [needs("bash"), "-e", "-c", typed]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)

    found = told()  # before the first hour is over: nothing was held against anything, and that is no "ok"
    assert found.returncode == 1 and "holds no receipt" in found.stderr
    daemon.stop()
    earlier = daemon.home / "earlier"
    shutil.copytree(daemon.data_dir, earlier)
    daemon.start()
    daemon.ok("POST", "/deks", {"thread_id": "t"}, 201)
    daemon.stop()
    found = told()
    assert found.returncode == 0 and re.search("receipts +[1-9]", found.stdout), found.stdout + found.stderr
    shutil.rmtree(daemon.data_dir)
    earlier.rename(daemon.data_dir)
    assert daemon.offline("audit", "verify").returncode == 0
    found = told()
    assert found.returncode == 1 and "fault" in found.stdout, found.stdout + found.stderr


@pytest.mark.long
def test_the_first_line_of_the_production_set_up(tmp_path: Path) -> None:
    """An environment and the package in it, by pip and its index: under another path than /opt."""
    (block,) = re.findall(r"```sh\n(.*?)```", section("Production set-up"), re.S)
    first = block.splitlines()[0].replace("/opt/progressdb-kms", str(tmp_path / "opt"))
    copy = tmp_path / "tree"
    shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info"))
    subprocess.run([needs("sh"), "-c", first], cwd=copy, check=True, timeout=600)
    made = subprocess.run([tmp_path / "opt/bin/progressdb-kms", "--version"], capture_output=True, text=True)
    assert made.stdout == f"progressdb-kms {__version__}\n"


PRIVATE = """
set -e
mount -t tmpfs x "$1"
mkdir "$1"/up "$1"/work "$1"/bin
mount -t overlay x -o lowerdir=/etc,upperdir="$1"/up,workdir="$1"/work /etc
for folder in /run /var/lib /opt /usr/local/bin; do mount -t tmpfs -o mode=0755 x $folder; done
. "$2"
"""


PACKAGES = Path(yaml.__file__).parents[1]


def everybodys_python() -> str:
    """One of our version that another user may run, with our packages: root's own may lie in its home."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    test = f"import sys, yaml, cryptography; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    for python in (sys.executable, f"/usr/bin/python{version}", "/usr/bin/python3"):
        command = ["runuser", "-u", "nobody", "--", python, "-c", test]
        if (
            subprocess.run(
                command, env={**os.environ, "PYTHONPATH": f"{REPO}:{PACKAGES}"}, capture_output=True
            ).returncode
            == 0
        ):
            return python
    pytest.skip(f"no Python {version} with the packages that another user may run")


@pytest.mark.root
def test_the_production_set_up(short_tmp: Path) -> None:
    """In mounts of its own: users, folders and files go as the block says, and the daemon serves."""
    for program in ("unshare", "useradd", "runuser"):
        needs(program)
    (block,) = re.findall(r"```sh\n(.*?)```", section("Production set-up"), re.S)
    first, *lines, last = block.strip().splitlines()
    assert first.startswith("python3 bin/venv /opt/progressdb-kms") and " --config " in last
    commands = COMMANDS.replace("\n", "\n[ $? = 0 ] || echo FAILED\n")
    program = f'#!/bin/sh\nPYTHONPATH={REPO}:{PACKAGES} exec {everybodys_python()} -m progressdb_kms "$@"\n'
    script = short_tmp / "typed"
    script.write_text(
        "mkdir -p /opt/progressdb-kms/bin\n"  # in the place of pip's work
        f"cat > /opt/progressdb-kms/bin/progressdb-kms <<'END'\n{program}END\n"
        "chmod 755 /opt/progressdb-kms/bin/progressdb-kms\n"
        "export PATH=/usr/local/bin:$PATH\n" + "\n".join(lines) + f"\n{last} & \n"
        "for i in $(seq 100); do progressdb-kms status --ready 2>/dev/null && break; sleep 0.2; done\n"
        "progressdb-kms create-dek --thread-id room-42\n"
        "daemon=$!\n"
        "stat -c '%U %a %n' /run/progressdb-kms/kms.sock /etc/progressdb-kms/kek.key\n"
        f"{commands.replace('/backup/', f'{short_tmp}/backup-')}"
        "kill $daemon\n"
        "wait\n"
        "progressdb-kms verify\n"  # offline, and nothing named: the packages' configuration
        "progressdb-kms audit verify\n"
    )
    mounts = short_tmp / "mounts"
    mounts.mkdir()
    short_tmp.chmod(0o755)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", PRIVATE, "sh", str(mounts), str(script)],
        cwd=REPO, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if "mount:" in done.stderr or done.stderr.startswith("unshare:"):
        pytest.skip(f"no mounts of its own here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout, done.stdout + done.stderr
    assert len(list(short_tmp.glob("backup-kms-*"))) == 1
    assert "0 failed" in done.stdout and "\nready\n" in done.stdout
    assert re.search(r"^deks +1$", done.stdout, re.M) and done.stdout.count("result") == 2
    assert "progressdb-kms 660 /run/progressdb-kms/kms.sock" in done.stdout
    assert "progressdb-kms 600 /etc/progressdb-kms/kek.key" in done.stdout
