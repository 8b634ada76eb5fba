"""Uses of DEKs over a daemon's life: right over workers, kept over stops, and what a kill -9 may take."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.service.usage import LOST, SPENT, USING
from progressdb_kms.store.contract import HEAVY, KEK_ROW, Usage
from progressdb_kms.store.sqlite import SqliteReader, SqliteStore
from tests.harness import Daemon
from tests.harness.daemon import cli
from tests.harness.procs import wait_until
from tests.harness.wire import b64

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="reads the store of a daemon that is not dumpable")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(workers=2) as daemon:
        yield daemon


def usage(daemon: Daemon, key: str) -> dict[str, Any]:
    return daemon.ok("GET", "/deks/" + key)["usage"]  # type: ignore[no-any-return]


def counts(daemon: Daemon, key: str) -> tuple[int, int]:
    found = usage(daemon, key)
    return found["encrypts"], found["decrypts"]


def users(daemon: Daemon) -> int:
    """Workers that may have uses which are not kept yet."""
    with contextlib.closing(SqliteReader(daemon.data_dir)) as reader:
        return len(reader.names(USING))


def shows(daemon: Daemon, key: str, *wanted: int) -> None:
    wait_until(lambda: counts(daemon, key) == wanted, 60, f"{key} to have {wanted} uses")


def load(daemon: Daemon, key: str, rounds: int) -> tuple[int, int]:
    """Over several connections, so that each worker has some. How many encrypts and decrypts it was."""
    for _ in range(rounds):
        with daemon.session() as kms:
            sealed = kms.encrypt(key, b"hello")
            kms.decrypt(key, sealed)
            items = [{"key_id": key, "plaintext": ""}] * 3
            kms.ok("POST", "/encrypt_batch", {"items": items})
            again = {"key_id": key, "new_key_id": key, "ciphertext": b64(sealed)}
            kms.ok("POST", "/reencrypt", again)
            raw = kms.request("POST", f"/encrypt?key_id={key}", b"raw").body
            kms.request("POST", f"/decrypt?key_id={key}", raw)
            wrapped = kms.get_wrapped(key)["wrapped"]
            kms.ok("POST", "/encrypt", {"wrapped": wrapped, "plaintext": ""})
    return 7 * rounds, 3 * rounds


def inject(daemon: Daemon, key: str, encrypts: int) -> None:
    """As if it had been used so often, while the daemon is stopped."""
    store = SqliteStore(daemon.data_dir)
    with store.transaction():
        store.count([(key, Usage(encrypts, 0, 1, 1, 1))])
    store.close()


@pytest.fixture(params=[1, 2], ids=["1 worker", "2 workers"])
def each(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with Daemon(workers=request.param) as daemon:
        yield daemon


def test_right_over_workers_and_kept_over_stops(each: Daemon) -> None:
    daemon, begun = each, int(time.time()) - 1
    with daemon.session() as kms:
        key, other = (kms.create_dek("t")["key_id"] for _ in range(2))
    done = load(daemon, key, 6)
    shows(daemon, key, *done)
    shows(daemon, other, 0, 0)
    found = usage(daemon, key)
    assert found["last_uid"] == os.geteuid()
    assert time.gmtime(begun) <= time.strptime(found["first_used_at"][:19], "%Y-%m-%dT%H:%M:%S")
    assert found["first_used_at"] <= found["last_used_at"]
    more = load(daemon, key, 1)  # and at once: what is not handed over yet goes with the stop
    daemon.stop()
    daemon.start()
    assert counts(daemon, key) == (done[0] + more[0], done[1] + more[1])
    daemon.ok("DELETE", "/deks/" + key, {"immediately": True})
    assert "usage" not in daemon.ok("GET", "/deks/" + key)


def test_a_kill_takes_the_last_second_at_most(daemon: Daemon) -> None:
    with daemon.session() as kms:
        key = kms.create_dek("t")["key_id"]
    done = load(daemon, key, 4)
    shows(daemon, key, *done)
    with daemon.session() as kms:
        for _ in range(50):
            kms.encrypt(key, b"")
    daemon.kill()
    daemon.start()
    encrypts, decrypts = counts(daemon, key)
    assert done[0] <= encrypts <= done[0] + 50 and decrypts == done[1]
    load(daemon, key, 1)
    shows(daemon, key, encrypts + 7, decrypts + 3)


@pytest.mark.parametrize("victim", ["worker", pytest.param("keeper", marks=pytest.mark.long)])
def test_one_process_dies(victim: str) -> None:
    with Daemon(workers=2) as daemon:
        with daemon.session() as kms:
            key = kms.create_dek("t")["key_id"]
        done = load(daemon, key, 4)
        shows(daemon, key, *done)
        writer, before = daemon.writer, daemon.pids()
        dies = writer if victim == "keeper" else next(p for p in before[1:] if p != writer)
        os.kill(dies, signal.SIGKILL)
        wait_until(lambda: dies not in daemon.pids() and len(daemon.pids()) == len(before), 60, "a new one")
        wait_until(lambda: daemon.request("GET", "/readyz").status == 200, 60, "the daemon to be ready")
        assert counts(daemon, key) == done
        more = load(daemon, key, 2)
        shows(daemon, key, done[0] + more[0], done[1] + more[1])


def test_the_limits(daemon: Daemon) -> None:
    with daemon.session() as kms:
        many, most, fresh = (kms.create_dek(name)["key_id"] for name in ("many", "most", "fresh"))
        sealed = kms.encrypt(most, b"old")
    shows(daemon, most, 1, 0)
    daemon.stop()
    inject(daemon, many, HEAVY)
    inject(daemon, most, SPENT - 3 - 2 * LOST)
    daemon.start()
    shows(daemon, many, HEAVY, 0)  # the stop was one in order
    wait_until(lambda: users(daemon) == 2, 60, "both workers to say that they are there")
    daemon.kill()
    daemon.start()
    shows(daemon, many, HEAVY + 2 * LOST, 0)  # of two workers that may have lost so much
    shows(daemon, most, SPENT - 2, 0)
    with daemon.session() as kms:
        for _ in range(2):
            kms.encrypt(most, b"the last")

        def refused() -> bool:
            reply = kms.request("POST", "/encrypt", {"key_id": most, "plaintext": ""})
            return reply.status != 200 and (reply.status, reply.code) == (409, "key_spent")

        wait_until(refused, 60, "the DEK to be refused")
        items = [{"key_id": most, "plaintext": ""}, {"key_id": fresh, "plaintext": ""}]
        shown = kms.ok("POST", "/encrypt_batch", {"items": items})["items"]
        assert shown[0]["error"]["code"] == "key_spent" and "ciphertext" in shown[1]
        assert kms.decrypt(most, sealed) == b"old"
        moved = kms.ok("POST", "/reencrypt", {"key_id": most, "new_key_id": fresh, "ciphertext": b64(sealed)})
        assert moved["ciphertext"]
        warnings = " ".join(kms.ok("GET", "/readyz")["warnings"])
        assert f"the DEK {most} has" in warnings and "which is the end" in warnings
        assert f"the DEK {many} has" in warnings and f"of {SPENT:,} that it may have" in warnings
        deks = kms.ok("GET", "/status")["deks"]
        assert (deks["near_limit"], deks["spent"]) == (1, 1)
        metrics = kms.request("GET", "/metrics").body.decode()
    assert re.search("^progressdb_kms_deks_near_limit 1$", metrics, re.M)
    assert re.search("^progressdb_kms_deks_spent 1$", metrics, re.M)
    assert f"the DEK {many} has" in daemon.stderr and f"the DEK {most} has" in daemon.stderr
    daemon.stop()
    daemon.start()  # and it stays so
    reply = daemon.request("POST", "/encrypt", {"key_id": most, "plaintext": ""})
    assert (reply.status, reply.code) == (409, "key_spent")
    assert "make another DEK" in json.loads(reply.body)["error"]["hint"]


def active(data_dir: Path) -> str:
    reader = SqliteReader(data_dir)
    found = reader.state().active
    reader.close()
    assert found is not None
    return found.kek_id


def kept(data_dir: Path, *keys: str) -> list[int]:
    """Encrypts, by the store of a stopped daemon."""
    reader = SqliteReader(data_dir)
    found = reader.usage(keys)
    reader.close()
    return [found.get(key, Usage()).encrypts for key in keys]


@pytest.fixture(scope="module")
def stopped() -> Iterator[Daemon]:
    """With three DEKs, nobody serving it."""
    with Daemon(workers=1) as daemon:
        for name in "abc":
            daemon.ok("POST", "/deks", {"thread_id": name, "key_id": name}, status=201)
        daemon.stop()
        inject(daemon, "a", 100)
        inject(daemon, "b", 7)
        yield daemon


def run(daemon: Daemon, *words: str, data_dir: Path) -> None:
    done = cli(*words, "--data-dir", str(data_dir), "--config", str(daemon.config_file))
    assert done.returncode == 0, done.stderr


def test_a_restore_keeps_the_larger_numbers(stopped: Daemon, short_tmp: Path) -> None:
    home = stopped.data_dir
    kek = KEK_ROW + active(home)
    inject(stopped, kek, 500)
    assert kept(home, kek) == [503]
    run(stopped, "backup", str(short_tmp / "backup"), data_dir=home)
    inject(stopped, "a", 50)
    inject(stopped, kek, 10)
    inject(stopped, "c", 3)
    run(stopped, "restore", str(short_tmp / "backup"), data_dir=home)
    assert kept(home, "a", "b", "c") == [150, 7, 3]  # a nonce that was used since stays used
    run(stopped, "restore", str(short_tmp / "backup"), data_dir=short_tmp / "new")
    assert kept(short_tmp / "new", "a", "b", "c") == [100, 7, 0]
    assert kept(home, kek) == [513] and kept(short_tmp / "new", kek) == [503]


def test_an_import_wraps_nothing_under_a_kek_that_is_spent(stopped: Daemon, short_tmp: Path) -> None:
    lines, home = str(short_tmp / "lines"), stopped.data_dir
    run(stopped, "export", lines, data_dir=home)
    run(stopped, "import", lines, data_dir=short_tmp / "new")
    assert kept(short_tmp / "new", KEK_ROW + active(home)) == [3]
    inject(stopped, KEK_ROW + active(home), SPENT)
    try:
        done = cli("import", lines, "--data-dir", str(home), "--config", str(stopped.config_file))
        assert done.returncode == 1 and b"rotate-kek --generate" in done.stderr, done.stderr
    finally:
        inject(stopped, KEK_ROW + active(home), -SPENT)


@pytest.mark.long
def test_an_import_brings_them_once(stopped: Daemon, short_tmp: Path) -> None:
    before = kept(stopped.data_dir, "a", "b", "c")
    run(stopped, "export", str(short_tmp / "lines"), data_dir=stopped.data_dir)
    for _ in range(2):
        run(stopped, "import", str(short_tmp / "lines"), data_dir=short_tmp / "new")
        assert kept(short_tmp / "new", "a", "b", "c") == before and before[0] >= 100


def test_what_was_not_used_is_found() -> None:
    with Daemon(workers=1) as daemon:
        with daemon.session() as kms:
            for name in "abcd":
                kms.ok("POST", "/deks", {"thread_id": name, "key_id": name}, status=201)
        daemon.stop()
        now = int(time.time())
        store = SqliteStore(daemon.data_dir)
        with store.transaction():
            store.count([("a", Usage(1, 0, 1, now - 3600, 1)), ("c", Usage(1, 0, 1, now + 3600, 1))])
        store.close()
        daemon.start()

        def unused(seconds: int, more: str = "") -> list[str]:
            page = daemon.ok("GET", f"/deks?unused_for={seconds}{more}")
            return [row["key_id"] for row in page["deks"]]

        assert unused(86400) == []  # all are younger than that
        wait_until(lambda: unused(0) == ["a", "b", "d"], 60, "a second to pass")
        assert unused(0, "&limit=1") == ["a"] and unused(0, "&thread_id=d") == ["d"]
        daemon.ok("DELETE", "/deks/b", {"immediately": True})
        assert unused(0) == ["a", "d"]
