"""Real daemons with a wall clock that is wrong: by the shim, and by libfaketime where it is installed."""

from __future__ import annotations

import contextlib
import glob
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness.daemon import Daemon
from tests.harness.faults import Shim
from tests.harness.procs import wait_until

YEARS = 10 * 365 * 86400


def warnings(daemon: Daemon) -> list[str]:
    """Those of the clock; a rotation by the API leaves one of its own."""
    found = daemon.request("GET", "/readyz")
    assert found.status == 200
    return [line for line in found.json()["warnings"] if "clock" in line]


def held(daemon: Daemon) -> str:
    (line,) = (
        line
        for line in daemon.request("GET", "/metrics").body.decode().splitlines()
        if line.startswith("progressdb_kms_erasures_held")
    )
    return line.split()[1]


def scheduled(daemon: Daemon, days: int = 30) -> str:
    key_id = str(daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"])
    daemon.ok("DELETE", f"/deks/{key_id}", {"pending_days": days})
    return key_id


def without_time(lines: bytes, key_id: str) -> bytes:
    rows = [json.loads(line) for line in lines.splitlines()]
    for row in rows:
        if row["key_id"] == key_id:
            del row["created_at"]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_ten_years_for_a_second_shred_nothing() -> None:
    """The janitor looks at once: a fresh keeper does. Told by readyz, status, log, metric, and doctor."""
    with Shim() as shim, Daemon(env=shim.env, workers=2) as daemon:
        key_id = scheduled(daemon)
        assert warnings(daemon) == [] and held(daemon) == "0"
        daemon.stop()
        shim.clock(YEARS)
        daemon.start()  # no start waits for a clock
        other = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        (told,) = warnings(daemon)
        assert "3650 days ahead" in told and "clock accept" in told and held(daemon) == "1"
        assert "ahead" in daemon.ok("GET", "/status")["erasures_held"]
        assert "scheduled deletions are held" in daemon.stderr
        assert daemon.ok("GET", f"/deks/{key_id}")["state"] == "pending_deletion"
        asked = ("--config", str(daemon.config_file), "--data-dir", str(daemon.data_dir))
        assert b"scheduled deletions are held" in daemon.cli("doctor", *asked).stdout
        shim.clock(0)
        assert warnings(daemon) == [] and held(daemon) == "0"
        assert "scheduled deletions go on" in daemon.stderr
        daemon.stop()
        daemon.start()
        assert warnings(daemon) == []
        assert daemon.ok("GET", f"/deks/{key_id}")["state"] == "pending_deletion"
        assert daemon.ok("GET", f"/deks/{other}")["state"] == "enabled"
        daemon.stop()
        assert b"held" not in daemon.offline("doctor").stdout
        assert daemon.offline("verify").returncode == 0
        assert daemon.offline("audit", "verify").returncode == 0


def test_the_operator_accepts_a_clock() -> None:
    """Due by the clock that was accepted, and recorded with who did it."""
    with Shim() as shim, Daemon(env=shim.env, workers=2) as daemon:
        key_id = scheduled(daemon, days=20)
        daemon.stop()
        shim.clock(30 * 86400)
        checks = json.loads(daemon.offline("doctor", "--json").stdout)["checks"]
        (told,) = (check["text"] for check in checks if check["check"] == "clock")
        assert "deletions are held" in told and "30 days ahead" in told, "before the start, too"
        daemon.start()
        assert "30 days ahead" in warnings(daemon)[0]
        done = daemon.cli("clock", "accept", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["now"] > found["trusted"] and "30 days" in found["held"]
        assert warnings(daemon) == []
        events = [json.loads(line)["event"] for line in daemon.audit_log.read_text().splitlines()]
        (event,) = (event for event in events if event["op"] == "accept_clock")
        assert event["trusted"] == found["trusted"] and event["uid"] is not None
        daemon.stop()
        daemon.start()
        wait_until(
            lambda: daemon.ok("GET", f"/deks/{key_id}")["state"] == "shredded", 30, "the deletion that is due"
        )


def test_a_restore_brings_the_trusted_time_too() -> None:
    """A new host's clock may well be wrong, and a store without a trusted time would take its word."""
    with Shim() as shim, Daemon(env=shim.env, workers=1) as daemon:
        key_id = scheduled(daemon)
        backup = str(daemon.home / "backup")
        assert daemon.offline("backup", backup).returncode == 0
        daemon.stop()
        for path in daemon.data_dir.iterdir():
            path.unlink()
        shim.clock(YEARS)
        assert daemon.offline("restore", backup).returncode == 0
        daemon.start()
        assert "3650 days ahead" in warnings(daemon)[0]
        assert daemon.ok("GET", f"/deks/{key_id}")["state"] == "pending_deletion"
        shim.clock(0)
        assert warnings(daemon) == []
        daemon.stop()
        assert daemon.offline("verify").returncode == 0


@contextlib.contextmanager
def imported(
    daemon: Daemon, lines: bytes, env: Mapping[str, str] | None = None
) -> Iterator[tuple[Daemon, str]]:
    """Another host with what this one, which is stopped, exported; and what the import said of it."""
    with contextlib.closing(daemon.copy(data=False)) as twin:
        twin.env = dict(env or {})
        done = twin.offline("import", "-", stdin=lines)
        assert done.returncode == 0
        yield twin.start(), done.stderr.decode()


def test_an_import_into_an_empty_store_trusts_no_clock_that_is_ahead() -> None:
    """A new host has no trusted time yet: what was scheduled for later was shredded by its first start. A row
    that tells no time gets one of that clock, and is no witness for it."""
    with Shim() as shim, Daemon(env=shim.env, workers=1) as daemon:
        key_id, later = scheduled(daemon, days=5), scheduled(daemon, days=30)
        lines = without_time(daemon.offline("export").stdout, later)
        daemon.stop()
        shim.clock(20 * 86400)
        with imported(daemon, lines, shim.env) as (twin, said):
            assert "1 of the deletions are due by this host's clock, and held" in said
            assert "20 days ahead" in warnings(twin)[0] and held(twin) == "1"
            assert twin.ok("GET", f"/deks/{key_id}")["state"] == "pending_deletion"
            assert twin.cli("clock", "accept").returncode == 0
            wait_until(lambda: twin.ok("GET", f"/deks/{key_id}")["state"] == "shredded", 60, "the shred")
            assert twin.ok("GET", f"/deks/{later}")["state"] == "pending_deletion"


def test_an_import_whose_rows_are_near_to_the_clock_leaves_no_lag() -> None:
    """The trusted time began at the newest row then, and stayed behind by that for ever: what was due, and
    each deletion after it, came up to a week late, and nothing told of it."""
    with Shim() as shim, Daemon(env=shim.env, workers=1) as daemon:
        key_id = scheduled(daemon, days=5)
        lines = daemon.offline("export").stdout
        daemon.stop()
        shim.clock(6 * 86400)
        with imported(daemon, lines, shim.env) as (twin, said):
            wait_until(lambda: twin.ok("GET", f"/deks/{key_id}")["state"] == "shredded", 60, "the shred")
            assert (said, warnings(twin), held(twin)) == ("", [], "0")


def test_an_import_holds_nothing_that_is_not_due(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(workers=1)
    scheduled(daemon)
    daemon.stop()
    with imported(daemon, daemon.offline("export").stdout) as (twin, said):
        assert (said, warnings(twin), held(twin)) == ("", [], "0")


def test_nor_does_one_into_a_store_that_never_had_a_dek() -> None:
    """Its daemon ran once, to see that it does, and kept as trusted what the clock showed."""
    with Shim() as shim, Daemon(workers=1) as daemon:
        key_id = scheduled(daemon)
        lines = daemon.offline("export").stdout
        daemon.stop()
        shim.clock(YEARS)
        with contextlib.closing(daemon.copy(data=False)) as twin:
            twin.env = shim.env
            twin.start()
            twin.stop()
            done = twin.offline("import", "-", stdin=lines)
            assert done.returncode == 0 and b"1 of the deletions are due" in done.stderr
            twin.start()
            assert "days ahead" in warnings(twin)[0] and held(twin) == "1"
            assert twin.ok("GET", f"/deks/{key_id}")["state"] == "pending_deletion"


def test_only_an_admin_accepts_a_clock() -> None:
    with Daemon({"admin_peer_uids": [4711]}) as daemon:
        reply = daemon.request("POST", "/clock/accept")
        assert (reply.status, reply.code) == (403, "peer_refused")


@pytest.mark.parametrize(
    "seconds", [-3600, -60 * 365 * 86400, 250 * 365 * 86400], ids=["back", "1966", "2276"]
)
def test_no_call_fails_for_a_clock(seconds: int) -> None:
    if seconds > 0 and sys.version_info < (3, 10):
        pytest.skip("Python 3.9 itself ends where the clock is past 2262")
    with Shim() as shim, Daemon(env=shim.env, workers=1) as daemon:
        shim.clock(seconds)
        key_id = scheduled(daemon)
        body: dict[str, Any] = {"key_id": key_id}
        daemon.ok("POST", f"/deks/{key_id}/enable")
        daemon.ok("POST", "/encrypt", {**body, "plaintext": "aGVsbG8="})
        daemon.ok("POST", "/rotate_kek", {"new_kek_hex": bytes(range(7, 39)).hex()})
        daemon.ok("DELETE", f"/deks/{key_id}", {"immediately": True})
        daemon.ok("GET", "/deks")
        assert warnings(daemon) != []
        shim.clock(0)
        assert warnings(daemon) == [] and "internal" not in daemon.stderr and "Traceback" not in daemon.stderr


def libfaketime() -> str:
    found = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
    if not found:
        pytest.skip("libfaketime is not installed (apt install libfaketime)")
    return found[0]


def test_with_libfaketime(short_tmp: Path) -> None:
    """The same by a library that others wrote, over a clock that it changes while the daemon runs."""
    offset = short_tmp / "offset"
    offset.write_text("+0\n")
    env = {
        "LD_PRELOAD": libfaketime(),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with Daemon(env=env, workers=1) as daemon:
        key_id = scheduled(daemon)
        offset.write_text("+3650d\n")
        assert "days ahead" in warnings(daemon)[0]
        offset.write_text("-1d\n")
        assert "behind" in warnings(daemon)[0]
        offset.write_text("+205y\n")  # the kernel itself takes no later clock than 2232
        late = scheduled(daemon)
        assert daemon.ok("GET", f"/deks/{late}")["delete_at"] > "2231"
        daemon.ok("POST", "/rotate_kek", {"new_kek_hex": bytes(range(7, 39)).hex()})
        assert "days ahead" in warnings(daemon)[0]
        offset.write_text("+0\n")
        assert warnings(daemon) == [] and "Traceback" not in daemon.stderr
        assert daemon.ok("GET", f"/deks/{key_id}")["state"] == "pending_deletion"
