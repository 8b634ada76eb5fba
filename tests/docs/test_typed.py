"""README and manual, typed as they stand: the calls in bash and zsh, the production set-up as root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.harness import Daemon
from tests.harness.book import book
from tests.harness.daemon import REPO

BOOK = book()


def section(heading: str) -> str:
    return BOOK.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


TOUR = re.findall(r"```sh\n(.*?)```", section("A short tour"), re.S)[0]
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
    program = f'#!/bin/sh\nPYTHONPATH={REPO}:{PACKAGES} exec {everybodys_python()} -m progressdb_kms "$@"\n'
    script = short_tmp / "typed"
    script.write_text(
        "mkdir -p /opt/progressdb-kms/bin\n"  # in the place of pip's work
        f"cat > /opt/progressdb-kms/bin/progressdb-kms <<'END'\n{program}END\n"
        "chmod 755 /opt/progressdb-kms/bin/progressdb-kms\n"
        "export PATH=/usr/local/bin:$PATH\n" + "\n".join(lines) + f"\n{last} & \n"
        "for i in $(seq 100); do progressdb-kms status --ready 2>/dev/null && break; sleep 0.2; done\n"
        "progressdb-kms create-dek --thread-id t\n"
        "stat -c '%U %a %n' /run/progressdb-kms/kms.sock /etc/progressdb-kms/kek.key\n"
        "kill $!\n"
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
    if "mount:" in done.stderr:
        pytest.skip(f"no mounts of its own here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout and "\nready\n" in done.stdout
    assert re.search(r"^deks +1$", done.stdout, re.M) and done.stdout.count("result") == 2
    assert "progressdb-kms 660 /run/progressdb-kms/kms.sock" in done.stdout
    assert "progressdb-kms 600 /etc/progressdb-kms/kek.key" in done.stdout
