"""The manual's runbook, followed to the letter: each command of each chapter is run, in its order.

The text is read, not copied: what is edited there is what runs here. A chapter is taken apart into commands:
the lines of its indented blocks, and `progressdb-kms …` (or a command of ours with an argument) in backticks.
Places like /etc/progressdb-kms are those of a folder of the test's; words in capitals are filled in by the
chapter's scenario. Before a command of the socket the daemon is started where it doesn't run, before
`restore` and `import` it is stopped, as the runbook's introduction says. A chapter without a scenario of its
own is run with a daemon that has some DEKs. At the end of each the daemon starts, every DEK opens that
should, and both verifies are clean.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple, Union

import pytest

from progressdb_kms.tools import cli as command_line
from progressdb_kms.tools.command import ONLINE
from progressdb_kms.tools.commands import COMMANDS
from progressdb_kms.tools.manual import text_of
from tests.harness.book import book
from tests.harness.daemon import REPO, Daemon, base_environment, write_secret
from tests.harness.procs import wait_until
from tests.tools.test_imports import go_blob

BOOK = book()
CONFIG = "/etc/progressdb-kms/progressdb-kms.yaml"

GROUPS = {command.name: command.group for command in COMMANDS}
FIRST_WORDS = {command.name.partition(" ")[0] for command in COMMANDS}
STOPPED = ("restore", "import")
OTHERS = ("cp", "grep", "install", "rm", "litestream", "mv")
"""Programs that the blocks use beside ours. What begins with another word is no command: YAML."""


# ---- reading --------------------------------------------------------------------------------------------


def chapters() -> dict[str, str]:
    text = BOOK.split("\n## Runbook\n", 1)[1].split("\n## ", 1)[0]
    parts = re.split(r"^### (.+)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def commands(chapter: str) -> list[str]:
    """In the order of the text. Optional parts are taken, and what is left out is the configuration."""
    found = []
    for match in re.finditer(r"^ {4}(\S.*)$|`([^`\n]+)`", chapter, flags=re.M):
        line = re.sub(r"\s+# .*", "", match[1]) if match[1] else _inline(match[2])
        if line and line.split()[0] in ("progressdb-kms", *OTHERS):
            if not line.startswith("grep"):  # the brackets are its own
                line = re.sub(r"\[([^]]+)\]", r"\1", line)
            found.append(re.sub(r"(?: --config)? …", f" --config {CONFIG}", line))
    return found


def _inline(span: str) -> str:
    words = span.split()
    if words[0] == "progressdb-kms" and len(words) > 1:
        return span
    if len(words) > 1 and words[0] in FIRST_WORDS and words[0] != "serve":
        return f"progressdb-kms {span}"
    return ""


def name_of(line: str) -> str:
    """Of our command, such as `audit verify`."""
    words = shlex.split(line)
    return next((n for n in (" ".join(words[1:3]), words[1]) if n in GROUPS), words[0])


# ---- a world for a chapter ------------------------------------------------------------------------------

Word = Union[str, Callable[[], str]]


class World:
    """A daemon with DEKs, and the folders that the runbook names. Scenarios override what differs."""

    def __init__(self) -> None:
        self.daemon = Daemon(workers=1)
        self.words: dict[str, Word] = {}
        self.boxes: dict[str, bytes] = {}
        self.ran: list[str] = []
        self.home = self.daemon.home
        self.backups = self.home / "backup"
        self.backups.mkdir()
        self.configure()
        (self.home / "bin").mkdir()
        tool = self.home / "bin" / "progressdb-kms"
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m progressdb_kms "$@"\n')
        tool.chmod(0o755)

    def configure(self, **more: object) -> None:
        own = {"data_dir": str(self.daemon.data_dir), "socket": str(self.daemon.socket)}
        self.daemon.write_config({**own, "workers": 1, **more})

    def prepare(self) -> None:
        """What the chapter takes for granted."""
        self.start()
        self.create(3)

    def before(self, line: str) -> None:
        """What happens in the world before this command."""

    def finish(self) -> None:
        """What must hold at the end."""
        self.start()
        self.opens()
        self.stop()

    # ---- what scenarios do ------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self.daemon.alive

    def start(self) -> None:
        if not self.running:
            self.daemon.start()

    def stop(self) -> None:
        if self.running:
            self.daemon.stop()

    def create(self, count: int, thread: str = "t") -> list[str]:
        made = []
        with self.daemon.session() as kms:
            for _ in range(count):
                key_id = str(kms.create_dek(thread)["key_id"])
                self.boxes[key_id] = kms.encrypt(key_id, key_id.encode())
                made.append(key_id)
        return made

    def opens(self) -> None:
        with self.daemon.session() as kms:
            for key_id, box in self.boxes.items():
                assert kms.decrypt(key_id, box) == key_id.encode()

    def backup(self) -> Path:
        file = self.backups / f"kms-{len(list(self.backups.iterdir()))}"
        assert self.daemon.offline("backup", str(file)).returncode == 0
        return file

    # ---- running a line ---------------------------------------------------------------------------------

    def place(self, line: str) -> str:
        """The line in this world."""
        for there, here in (
            (CONFIG, self.daemon.config_file),
            ("/etc/progressdb-kms/kek.key", self.daemon.kek_file),
            ("/var/lib/progressdb-kms", self.daemon.data_dir),
            ("/run/progressdb-kms/kms.sock", self.daemon.socket),
        ):
            line = line.replace(there, str(here))
        line = re.sub(r"/backup/kms-\d{4}-\d\d-\d\d[T:\d]*", lambda match: str(self.newest()), line)
        line = re.sub(r"(?<![\w/])/(backup|var|tmp/replica|mnt)(?=/|\b)", rf"{self.home}/\1", line)
        for word, value in self.words.items():
            if re.search(rf"\b{word}(?![\w])", line):
                line = re.sub(rf"\b{word}(?![\w])…?", value if isinstance(value, str) else value(), line)
        return line

    def newest(self) -> Path:
        return max(self.backups.glob("kms-[0-9]*"), key=lambda path: path.stat().st_mtime_ns)

    def follow(self, line: str) -> None:
        self.before(line)
        if line.startswith("progressdb-kms"):
            name = name_of(line)
            if GROUPS[name] == ONLINE:
                self.start()
            if name in STOPPED:
                self.stop()
            if GROUPS[name] != ONLINE and "--config" not in line and name not in ("kek-id", "genkey"):
                line += f" --config {CONFIG}"
        placed = self.place(line)
        env = {
            **base_environment(self.home),
            "PROGRESSDB_KMS_SOCKET": str(self.daemon.socket),
            "PATH": f"{self.home}/bin:{os.environ['PATH']}",
        }
        done = subprocess.run(
            ["sh", "-ec", placed], cwd=self.home, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{placed}\n{done.stdout}{done.stderr}"
        assert "genkey" not in done.stdout + done.stderr
        self.ran.append(line)
        self.output = done.stdout


class Snapshots(World):
    """Lines on the snapshots of rotations: there is one, and its KEK is a previous key."""

    def snapshot(self) -> str:
        (found,) = (self.daemon.data_dir / "kms-deks-backup").glob("*Z-*[0-9a-f]/")
        return str(found)

    def rotate(self) -> None:
        self.start()
        done = self.daemon.cli("rotate-kek", "--config", str(self.daemon.config_file), "--generate")
        assert done.returncode == 0, done.stderr
        (old,) = self.home.glob("kek.old-*")
        self.configure(previous_master_keys=[{"file": str(old)}])


class BackUp(World):
    def before(self, line: str) -> None:
        assert self.running  # it may run beside the daemon


class NewHost(Snapshots):
    """The backup of another host, its log, and a DEK that was shredded since."""

    def prepare(self) -> None:
        super().prepare()
        self.dead, self.one = self.create(1)[0], next(iter(self.boxes))
        self.copy = self.backup()
        self.daemon.ok("DELETE", f"/deks/{self.dead}", {"immediately": True})
        del self.boxes[self.dead]
        self.stop()
        old = self.daemon.data_dir.rename(self.home / "the old host")
        self.daemon.data_dir.mkdir(mode=0o700)
        self.begun()
        for log in old.glob("kms-audit.log*"):
            shutil.copy2(log, self.daemon.data_dir)
        self.words = {"FILE": str(self.daemon.kek_file), "DIR": self.snapshot, "ID": self.one}

    def begun(self) -> None:
        """The package started the daemon with a key of its own; what it began is moved away."""
        key = self.daemon.kek_file.read_bytes()
        write_secret(self.daemon.kek_file, os.urandom(32).hex().encode())
        self.start()
        self.stop()
        self.daemon.kek_file.unlink()
        write_secret(self.daemon.kek_file, key)
        (self.home / "what it began").mkdir()
        for made in list(self.daemon.data_dir.iterdir()):
            made.rename(self.home / "what it began" / made.name)

    def newest(self) -> Path:
        return self.copy

    def before(self, line: str) -> None:
        if "backups list" in line or ("--snapshot" in line and not self.home.glob("kek.old-*")):
            self.rotate()

    def finish(self) -> None:
        super().finish()
        self.start()
        assert self.daemon.request("GET", f"/deks/{self.dead}").json()["state"] == "shredded"
        self.stop()


class Rotate(World):
    def finish(self) -> None:
        assert list(self.home.glob("kek.old-*"))
        super().finish()


class LostKey(World):
    """The file is lost before each of the ways out. The old key of the end is a copy that somebody had."""

    def prepare(self) -> None:
        super().prepare()
        self.kept = self.daemon.kek_file.read_bytes()
        self.early = self.backup()
        self.early_boxes = dict(self.boxes)
        self.create(1)
        self.words = {"NEW": self.new, "FILES": self.files, "FILE": str(self.early)}

    def new(self) -> str:
        self.brought = self.home / f"new-{os.urandom(4).hex()}"
        write_secret(self.brought, os.urandom(32).hex().encode())
        return str(self.brought)

    def files(self) -> str:
        write_secret(self.home / "a copy", self.kept)
        return f'"{self.home}/a copy" {self.daemon.kek_file if self.daemon.kek_file.exists() else ""}'

    def before(self, line: str) -> None:
        name = name_of(line)
        if name == "rotate-kek":
            assert self.running  # it was not stopped
            self.daemon.kek_file.unlink(missing_ok=True)
        elif (
            self.running
        ):  # all the ways out are behind us: what was said of the configuration, and a restart
            if "--config" not in self.ran[-1]:
                self.daemon.kek_file.unlink(missing_ok=True)
                shutil.copy2(self.brought, self.daemon.kek_file)
            self.stop()
            self.start()
            self.opens()
            self.stop()
        if name == "restore":
            write_secret(self.daemon.kek_file, self.kept)  # the key of that time
            self.boxes = self.early_boxes


class Shred(World):
    def prepare(self) -> None:
        super().prepare()
        (self.dead,) = self.create(1, thread="to be deleted")
        del self.boxes[self.dead]
        self.words = {"THREAD": "'to be deleted'", "KEY": self.dead}

    def follow(self, line: str) -> None:
        super().follow(line)
        assert "kms status" not in line or re.search("^erasures +0 due$", self.output, re.M)

    def finish(self) -> None:
        assert any("kms status" in line for line in self.ran)
        assert self.daemon.ok("GET", "/status")["erasures_due"] == 0
        assert self.daemon.request("GET", f"/deks/{self.dead}").json()["state"] == "shredded"
        super().finish()


class Used(World):
    def prepare(self) -> None:
        super().prepare()
        self.words = {"KEY": next(iter(self.boxes))}

    def finish(self) -> None:
        assert "DEKs used most" in (self.home / "report.html").read_text()
        super().finish()


class FromGo(World):
    def prepare(self) -> None:
        folder = self.home / "var/lib/old-kms/kms-deks"
        folder.mkdir(parents=True)
        for name in ("k_1", "k_2"):
            row = {"key_id": name, "thread_id": "t", "wrapped": go_blob(self.daemon.kek)}
            (folder / f"{name}.json").write_text(json.dumps(row))

    def finish(self) -> None:
        self.start()
        assert len(self.daemon.ok("GET", "/deks")["deks"]) == 2
        self.create(1)
        super().finish()


class Upgrade(World):
    """There and back: `export` with one release, `import` with the other into an empty data-dir."""

    def finish(self) -> None:
        self.stop()
        file = self.home / "deks.jsonl"
        assert self.daemon.offline("export", str(file)).returncode == 0
        self.daemon.data_dir.rename(self.home / "of the other release")
        self.daemon.data_dir.mkdir(mode=0o700)
        assert self.daemon.offline("import", str(file)).returncode == 0
        super().finish()


class Taken(World):
    """kms.db is unlinked under the daemon."""

    def prepare(self) -> None:
        super().prepare()
        (self.daemon.data_dir / "kms.db").unlink()
        wait_until(lambda: "kms-rescue-" in self.daemon.stderr, 30, "the journal to name the rescue")
        self.words = {"RESCUE": str(next(self.daemon.data_dir.glob("kms-rescue-*.db")))}


class Damaged(World):
    """The disk lost the heads of two pages of kms.db: no page tells any more where its rows are."""

    def prepare(self) -> None:
        super().prepare()
        (self.home / "mnt").mkdir()
        self.create(40)
        self.dead, *_ = self.create(5)
        self.backup()
        self.create(40)
        self.daemon.ok("DELETE", f"/deks/{self.dead}", {"immediately": True})
        del self.boxes[self.dead]
        self.stop()
        path, first = self.daemon.data_dir / "kms.db", next(iter(self.boxes))
        data = bytearray(path.read_bytes())
        for place in (8192, data.index(f"meta:{first}{{".encode()) & -4096):
            data[place : place + 8] = os.urandom(8)
        path.write_bytes(data)
        done = self.daemon.offline("restore", str(self.newest()))
        assert (
            done.returncode == 1
            and b"copy the whole data-dir" in done.stderr
            and b"--force" not in done.stderr
        )
        done = self.daemon.offline("verify")
        assert done.returncode == 1 and b"copy the whole data-dir" in done.stderr

    def finish(self) -> None:
        super().finish()
        self.start()
        assert self.daemon.request("GET", f"/deks/{self.dead}").json()["state"] == "shredded"
        self.stop()


SCENARIOS: dict[str, type[World]] = {
    "The store's files were removed, replaced or cut": Taken,
    "The store's file is damaged": Damaged,
    "Back up": BackUp,
    "Upgrade and downgrade": Upgrade,
    "Restore on a new host": NewHost,
    "Rotate the KEK": Rotate,
    "A key file was lost": LostKey,
    "What was used, and what was not": Used,
    "Shred for a deletion request": Shred,
    "Move from the Go service": FromGo,
}

ELSEWHERE = {"Replicate with Litestream": "tests/process/test_litestream.py"}
"""Chapters that another test follows, because they need a program that may not be here."""


def not_in_the_manual(data_dir: Path) -> set[str]:
    """Files of the data-dir that the table of formats has not."""
    table = re.findall(r"^\| (`.+?) \|", text_of("formats"), re.M)
    named = [
        re.escape(name).replace("<time>", ".+") for row in table for name in re.findall("`([^`/]+)", row)
    ]
    ours = re.compile(f"({'|'.join(named)})(-wal|-shm)?")
    return {path.name for path in data_dir.iterdir() if not ours.fullmatch(path.name)}


# ---- the tests ------------------------------------------------------------------------------------------


class Case(NamedTuple):
    title: str
    text: str


CASES = [Case(*item) for item in chapters().items()]
each_chapter = pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)


@pytest.fixture
def world(case: Case) -> Iterator[World]:
    made = SCENARIOS.get(case.title, World)()
    yield made
    made.daemon.close()


@each_chapter
def test_a_chapter_to_the_letter(case: Case, world: World) -> None:
    if case.title in ELSEWHERE:
        assert case.title.split()[-1] in (REPO / ELSEWHERE[case.title]).read_text()
        pytest.skip(f"{ELSEWHERE[case.title]} follows it")
    world.prepare()
    for line in commands(case.text):
        world.follow(line)
    world.finish()
    assert not not_in_the_manual(world.daemon.data_dir)
    for command in (["verify"], ["audit", "verify", "--partial"]):
        done = world.daemon.offline(*command)
        assert done.returncode == 0, done.stderr.decode()


@each_chapter
def test_each_command_is_one(case: Case) -> None:
    for line in commands(case.text):
        if line.startswith("progressdb-kms"):
            words = shlex.split(re.sub(r"\$\([^)]*\)", "now", line))
            command_line.build_parser().parse_args(words[1:])


def test_every_scenario_has_a_chapter_and_most_have_commands() -> None:
    titles = {case.title for case in CASES}
    assert {*SCENARIOS, *ELSEWHERE} <= titles
    assert all(commands(case.text) for case in CASES if case.title in SCENARIOS and "grade" not in case.title)
    assert sum(len(commands(case.text)) for case in CASES) >= 20


def test_reading() -> None:
    text = """Say `restore FILE --force`, or `--force`, `enable`, `verify …` and:

    progressdb-kms shred KEY --now     # for each
    dbs:
"""
    assert commands(text) == [
        "progressdb-kms restore FILE --force",
        f"progressdb-kms verify --config {CONFIG}",
        "progressdb-kms shred KEY --now",
    ]
