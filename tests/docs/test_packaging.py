"""What packaging/ says agrees with the tables of the program (manual pages: test_manual)."""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

import pytest
import yaml

from progressdb_kms.config import load
from progressdb_kms.config.options import BY_NAME, OPTIONS
from progressdb_kms.process.supervisor import SLOW_SECONDS
from progressdb_kms.process.worker import DRAIN_SECONDS
from progressdb_kms.tools.cli import build_parser
from progressdb_kms.tools.manual import default_text
from tests.harness.daemon import write_secret

REPO = Path(__file__).resolve().parents[2]
PACKAGING = REPO / "packaging"
UNITS = PACKAGING / "systemd"


PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # some come with the tests' packages


def needs(*programs: str) -> Callable[[Any], Any]:
    missing = [program for program in programs if shutil.which(program, path=PATH) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": PATH}
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_loader(path.name, SourceFileLoader(path.name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- systemd ----------------------------------------------------------------------------------------


def unit(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@needs("systemd-analyze")
@pytest.mark.parametrize(("drop_in", "limit"), [(None, 0.5), ("tcp.conf", 1.3), ("fleet.conf", 1.3)], ids=str)
def test_the_unit_is_hardened(tmp_path: Path, drop_in: str | None, limit: float) -> None:
    """With TCP, or a fleet, it sees the host's network: that is all that the drop-in gives away."""
    path = tmp_path / "progressdb-kms.service"
    parts = ["progressdb-kms.service", *([drop_in] if drop_in else [])]
    path.write_text("\n".join((UNITS / name).read_text() for name in parts))
    done = run("systemd-analyze", "security", "--offline=true", "--no-pager", str(path))
    level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    if level is None:
        pytest.skip(f"this systemd-analyze can't look at a file: {done.stdout.strip()[:80]}")
    assert float(level[1]) <= limit


@needs("systemd-analyze")
def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    for path in sorted(UNITS.glob("*.*")):
        if path.suffix not in (".service", ".socket", ".timer"):
            continue
        name, text = path.name, path.read_text()
        (tmp_path / name).write_text(text.replace("=/usr/bin/progressdb-kms", "=/bin/true"))
    done = run("systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir())))
    assert (done.returncode, done.stdout) == (0, "")


def test_units_configuration_and_socket_agree() -> None:
    service, socket = unit("progressdb-kms.service"), unit("progressdb-kms.socket")
    settings = yaml.safe_load((PACKAGING / "progressdb-kms.yaml").read_text())
    assert service["ExecStart"] == [
        "/usr/bin/progressdb-kms serve --config /etc/progressdb-kms/progressdb-kms.yaml"
    ]
    assert socket["ListenStream"] == [settings["socket"]]
    assert socket["SocketMode"] == [f"0{settings['socket_mode']:o}"]
    assert socket["SocketGroup"] == [settings["socket_group"]] == service["Group"]
    assert settings["data_dir"] == "/var/lib/" + service["StateDirectory"][0]
    assert service["StateDirectoryMode"] == ["0700"]
    assert settings["data_dir"] in (PACKAGING / "progressdb-kms.logrotate").read_text()


def test_the_timer_s_command_is_one_of_ours() -> None:
    service = unit("progressdb-kms-metrics.service")
    words = shlex.split(service["ExecStart"][0])
    args = build_parser().parse_args(words[1:])
    assert words[0] == "/usr/bin/progressdb-kms" and args.command.name == "metrics"
    assert args.socket == unit("progressdb-kms.socket")["ListenStream"][0]
    assert args.textfile.startswith(f"/run/{service['RuntimeDirectory'][0]}/")


def test_the_backup_s_command_is_one_of_ours_and_may_write_where_it_must() -> None:
    """Into its own folder, which is not the data-dir, and a note into that."""
    service = unit("progressdb-kms-backup.service")
    words = shlex.split(service["ExecStart"][0])
    args = build_parser().parse_args(words[1:])
    assert words[0] == "/usr/bin/progressdb-kms" and args.command.name == "backup" and args.keep > 1
    assert args.file == f"/var/lib/{service['StateDirectory'][0]}"
    data_dir = yaml.safe_load((PACKAGING / "progressdb-kms.yaml").read_text())["data_dir"]
    assert service["ReadWritePaths"] == [data_dir]
    assert args.config in unit("progressdb-kms.service")["ExecStart"][0]


@pytest.mark.parametrize("kind", ["backup", "metrics"])
def test_both_packages_bring_the_timers(kind: str) -> None:
    for name in (f"progressdb-kms-{kind}.service", f"progressdb-kms-{kind}.timer"):
        assert (PACKAGING / "rpm/progressdb-kms.spec").read_text().count(f"%{{_unitdir}}/{name}\n") == 2
        assert name[len("progressdb-kms-") :] in (PACKAGING / "debian/rules").read_text()
    assert f"--name=progressdb-kms-{kind} " in (PACKAGING / "debian/rules").read_text()


def test_the_filter_of_system_calls_lets_the_key_memory_through() -> None:
    rules = unit("progressdb-kms.service")["SystemCallFilter"]
    assert "memfd_secret" in rules[0].split()
    assert unit("progressdb-kms.service")["LimitMEMLOCK"] == ["infinity"]


def test_where_the_host_runs_short_the_unit_comes_last() -> None:
    """`packaging/test-boot` has a process of it killed."""
    service, backup = (unit(f"progressdb-kms{kind}.service") for kind in ("", "-backup"))
    assert service["OOMPolicy"] == ["continue"] and int(service["OOMScoreAdjust"][0]) < 0
    text = (REPO / "progressdb_kms/manual/install.md").read_text()
    times = {"five": 5}[re.search(r"processors it gets (\w+) times", text)[1]]  # type: ignore[index]
    assert int(service["CPUWeight"][0]) == 100 * times and "CPUWeight" not in backup  # 100: what is not said


def test_systemd_waits_for_an_end_in_order() -> None:
    """And the comment above it says how long that takes; by the keeper, which ends last, it is brief."""
    text = (PACKAGING / "systemd" / "progressdb-kms.service").read_text()
    (stop,) = re.findall(r"(?m)^TimeoutStopSec=(\d+)s$", text)
    assert f"for up to {DRAIN_SECONDS:g} s,\n# then its processes get 5 s more" in text
    assert int(stop) >= DRAIN_SECONDS + 5 + SLOW_SECONDS


# ---- the sample configuration ------------------------------------------------------------------------


def sample() -> dict[str, Any]:
    """The sample with each `#name: value` taken in."""
    text = (PACKAGING / "progressdb-kms.yaml").read_text()
    active = re.sub(r"^#(?=[a-z_]+:|  - )", "", text, flags=re.MULTILINE)
    values = yaml.safe_load(active)
    assert isinstance(values, dict)
    return values


def test_the_sample_names_every_key_once() -> None:
    text = (PACKAGING / "progressdb-kms.yaml").read_text()
    names = re.findall(r"^#?([a-z_]+):(?: |$)", text, flags=re.MULTILINE)
    assert sorted(names) == sorted(option.name for option in OPTIONS)


def test_what_the_sample_comments_out_is_the_default() -> None:
    text = (PACKAGING / "progressdb-kms.yaml").read_text()
    commented = set(re.findall(r"^#([a-z_]+):", text, flags=re.MULTILINE))
    for name, value in sample().items():
        if name in commented and default_text(BY_NAME[name]) != "(none)":
            assert value == BY_NAME[name].default, name


def test_the_sample_states_the_limits() -> None:
    text = (PACKAGING / "progressdb-kms.yaml").read_text()
    for option in OPTIONS:
        if option.high and not option.private:
            about = text[: text.index(f"#{option.name}:")].rpartition("\n\n")[2]
            assert f"{option.low:g}" in about and f"{option.high:d}" in about, option.name


def test_the_daemon_takes_the_sample(short_tmp: Path) -> None:
    """But for the key file and the group, which a package makes."""
    text = (PACKAGING / "progressdb-kms.yaml").read_text().replace("socket_group: progressdb-kms\n", "")
    write_secret(short_tmp / "c.yaml", text.encode())  # whatever the umask: who may write to it is checked
    with load.load({"config": str(short_tmp / "c.yaml")}, {}, need_key=False) as loaded:
        assert loaded.settings.memory_lock == "require"
        assert loaded.settings.socket_mode == 0o660


# ---- packages and scripts ------------------------------------------------------------------------------


def test_the_ranges_of_dependencies_are_the_same_everywhere() -> None:
    ranges = dict(re.findall(r"^    (\w+)>=([0-9.]+)", (REPO / "setup.cfg").read_text(), re.M))
    control = (PACKAGING / "debian/control").read_text()
    spec = (PACKAGING / "rpm/progressdb-kms.spec").read_text()
    for package, debian, rpm in (
        ("cryptography", "python3-cryptography", "python3-cryptography"),
        ("pyyaml", "python3-yaml", "python3-pyyaml"),
        ("sqlitedict", "python3-sqlitedict", "python3-sqlitedict"),
    ):
        assert f"{debian} (>= {ranges[package]})" in control
        assert f"{rpm} >= {ranges[package]}\n" in spec
    start = script(PACKAGING / "zipapp/__main__.py")
    assert str(start.LOWEST_CRYPTOGRAPHY) == ranges["cryptography"]
    assert (
        f"python_requires = >={'.'.join(map(str, start.LOWEST_PYTHON))}\n" in (REPO / "setup.cfg").read_text()
    )


def test_the_lock_pins_each_package_for_each_host() -> None:
    build = script(REPO / "bin/build-zipapp")
    rows = [line.split() for line in build.LOCK.read_text().splitlines()]
    assert [(row[0], *row[4:]) for row in rows] == [(name, *host) for name, host in build.all_wanted()]
    assert all(re.fullmatch(r"[0-9a-f]{64}", row[3]) for row in rows)


def test_the_runbook_knows_which_package_starts_the_daemon() -> None:
    """On a new host nothing may have begun a log before the old one is there."""
    rules = (PACKAGING / "debian" / "rules").read_text()
    spec = (PACKAGING / "rpm" / "progressdb-kms.spec").read_text()
    assert re.search(r"^\tdh_installsystemd progressdb-kms\.service$", rules, re.M)  # not --no-start
    assert not re.search(r"systemctl (re)?start|enable --now", spec)
    restore = (
        (REPO / "progressdb_kms/manual/runbook.md")
        .read_text()
        .split("## Restore on a new host", 1)[1]
        .split("\n2. ", 1)[0]
    )
    assert "The Debian package starts it at once" in restore
    assert "`systemctl stop progressdb-kms.socket progressdb-kms.service`" in restore
    for made in ("/etc/progressdb-kms/kek.key", "/var/lib/progressdb-kms"):
        assert f"`{made}`" in restore


def test_the_user_of_the_spec_is_that_of_sysusers() -> None:
    (line,) = (UNITS / "progressdb-kms.sysusers").read_text().splitlines()
    assert f"%global user_line {line}\n" in (PACKAGING / "rpm/progressdb-kms.spec").read_text()


@pytest.mark.parametrize(
    "path",
    ["packaging/source-tree", "packaging/build-deb", "packaging/build-rpm", "packaging/test-boot",
     "packaging/test-container", "bin/release", "bin/memory-matrix",
     "packaging/debian/progressdb-kms.postinst", "packaging/debian/progressdb-kms.postrm"],
)  # fmt: skip
def test_the_shell_takes_the_scripts(path: str) -> None:
    done = run("sh", "-n", str(REPO / path))
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("packaging/build-deb", "dpkg-buildpackage dh lintian"),
        ("packaging/build-rpm", "rpmbuild rpmlint"),
        ("packaging/test-boot", "systemd-nspawn nsenter mmdebstrap"),
        ("packaging/test-container", "buildah mmdebstrap unshare"),
        ("bin/release", "git"),
    ],
)
def test_a_script_names_the_tools_that_it_lacks_in_one_line(path: str, named: str) -> None:
    """And where they come from. On a host that has none: `command -v` finds nothing."""
    done = run("sh", "-c", 'command() { return 1; }; . "$0"', str(REPO / path))
    (line,) = done.stdout.splitlines()
    assert done.returncode != 0 and line.startswith(f"{path}: ") and "apt install " in line
    assert all(tool in line.partition("(")[0] for tool in named.split())


def test_the_image_is_pinned_and_not_run_by_root() -> None:
    text = (PACKAGING / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.M)
    assert len(bases) == 2 and all(re.fullmatch(r"[a-z]+:\d+\.\d+-slim", base) for base in bases)
    last = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last, re.M)
    assert re.search(r"^HEALTHCHECK ", last, re.M)
    for package in re.findall(r"^ +(python3\S*) \\$", last, re.M):
        assert "=" in package


def test_the_lines_for_a_container_fit_the_image() -> None:
    """They want an engine, and `test-container` builds and runs the image without one, as they say."""
    text = (REPO / "progressdb_kms/manual/install.md").read_text().replace("\\\n", " ")
    build, start = (shlex.split(line, comments=True) for line in re.findall(r"^ {4}(docker .*)$", text, re.M))
    file, image = build[build.index("-f") + 1], build[build.index("-t") + 1]
    assert (REPO / file).is_file() and build[-1] == "." and start[-1] == image
    words = " ".join(start)
    for flag in ("--read-only", "--cap-drop ALL", "--security-opt no-new-privileges", "--network none"):
        assert flag in words
    places = {word.rpartition(":")[2] for word, before in zip(start[1:], start) if before == "-v"}
    image_text = (REPO / file).read_text()
    (volumes,) = re.findall(r"^VOLUME (\[.*\])$", image_text, re.M)
    (command,) = re.findall(r"^CMD (\[.*\])$", image_text, re.M)
    assert places == {*json.loads(volumes), str(Path(json.loads(command)[-1]).parent)}
    (uid,) = re.findall(r"^USER (\d+):", image_text, re.M)
    assert f"uid {uid}" in text and f"group {uid}" in text
    tried = (PACKAGING / "test-container").read_text()
    assert (
        all(place in tried for place in places)
        and f"--reuid={uid}" in tried
        and "unshare --mount --net" in tried
    )


def test_a_command_that_needs_a_credential_is_run_by_systemd() -> None:
    """The line of the manual is one of ours, the credential is the drop-in's, and `test-boot` runs it so."""
    joined = re.compile(r"\s*\\\n\s*")
    text = joined.sub(" ", (REPO / "progressdb_kms/manual/install.md").read_text())
    (line,) = re.findall(r"^ {4}(systemd-run .*)$", text, re.M)
    before, _, command = line.partition(" progressdb-kms ")
    assert build_parser().parse_args(shlex.split(command)).command.name == "verify"
    assert f"{before} progressdb-kms verify" in joined.sub(" ", (PACKAGING / "test-boot").read_text())
    (loaded,) = unit("credential.conf")["LoadCredentialEncrypted"]
    assert f"-p LoadCredentialEncrypted={loaded}" in before


def test_what_the_manual_has_pip_install_is_there() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg")
    pages = "".join(path.read_text() for path in (REPO / "progressdb_kms/manual").glob("*.md"))
    extras = set(re.findall(r"pip install '?progressdb-kms\[(\w+)\]", pages))
    assert extras and extras <= set(setup["options.extras_require"])


@needs("hadolint")
def test_hadolint_has_nothing_to_say_about_the_image() -> None:
    done = run("hadolint", str(PACKAGING / "Dockerfile"))
    assert (done.returncode, done.stdout) == (0, "")


def test_the_picture_is_what_the_script_draws() -> None:
    drawn = subprocess.run(
        [sys.executable, str(PACKAGING / "draw")], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert drawn == (PACKAGING / "processes.svg").read_text("utf-8")
