"""The KEK of a fleet is rotated: three daemons on one database, and what they do meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.fleet.test_daemons import PATIENCE, TEXT, configured, until, use
from tests.harness import memscan, postgres
from tests.harness.daemon import Daemon, write_secret
from tests.harness.fakekms import kek_id_of as kek_id
from tests.harness.faults import without_memfd_secret
from tests.harness.memscan import Secret, scan
from tests.harness.wire import Reply, Session, b64

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())


class Hosts:
    """Daemons of one fleet. `new`: the KEK that each of them has in next_master_keys."""

    def __init__(
        self, database: postgres.Fleet, workers: tuple[int, ...] = (1, 2, 1), wrapper: Sequence[str] = ()
    ) -> None:
        self.database = database
        self.kek, self.new = os.urandom(32), os.urandom(32)
        self.all: list[Daemon] = []
        for number in workers:
            daemon = Daemon(kek=self.kek, workers=number, wrapper=wrapper)
            write_secret(daemon.home / "next", self.new)
            config = {"workers": number, "next_master_keys": [{"file": "next"}]}
            daemon.write_config({**configured(database), **config})
            self.all.append(daemon)

    def __enter__(self) -> Hosts:
        try:
            for daemon in self.all:
                daemon.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for daemon in self.all:
            daemon.close()

    def rotate(self, number: int = 0, **more: Any) -> Reply:
        with self.all[number].session(PATIENCE * 3) as session:
            return session.request("POST", "/rotate_kek", {"new_kek_id": kek_id(self.new), **more})

    @contextlib.contextmanager
    def rotating(self, phase: str, number: int = 0) -> Iterator[list[Reply]]:
        """From when a rotation is in this phase, or over. The list has its answer at the end."""
        answers: list[Reply] = []

        def rotate() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # its daemon is killed
                answers.append(self.rotate(number))

        thread = threading.Thread(target=rotate)
        thread.start()
        try:
            with self.all[number].session(PATIENCE) as session:
                until(lambda: answers or _phase(session) == phase)
            yield answers
        finally:
            thread.join()

    @contextlib.contextmanager
    def locked(self, table: str, mode: str) -> Iterator[None]:
        """Somebody else's lock."""
        server = self.database.server
        with server.connect(self.database.where.database) as other:
            other.execute("BEGIN")
            other.execute(f"LOCK TABLE kms.{table} IN {mode} MODE")
            yield
            other.execute("COMMIT")

    def filled(self, count: int) -> list[str]:
        """DEKs that are there."""
        made: list[str] = []

        def make(daemon: Daemon) -> None:
            with daemon.session(PATIENCE) as session:
                made.extend(session.create_dek("many")["key_id"] for _ in range(count // 12))

        threads = [threading.Thread(target=make, args=(daemon,)) for daemon in self.all * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return made

    def keks_of_rows(self) -> list[str]:
        rows = self.database.sql("SELECT DISTINCT kek_id FROM kms.deks WHERE kek_id <> ''")
        return [row[0] for row in rows]

    def active(self) -> set[str]:
        return {ok(daemon, "GET", "/status")["kek_id"] for daemon in self.all}


def ok(daemon: Daemon, method: str, path: str, body: Any = None, status: int = 200) -> Any:
    """Under load another host may have to be waited for."""
    with daemon.session(PATIENCE) as session:
        return session.ok(method, path, body, status)


def _phase(session: Session) -> str:
    rotation = session.ok("GET", "/status")["rotation"]
    return str(rotation["phase"]) if rotation else ""


@pytest.fixture
def hosts(fleet_database: postgres.Fleet) -> Iterator[Hosts]:
    with Hosts(fleet_database) as made:
        yield made


class Load:
    """Callers on each host, who make DEKs, use them, and change their state; until the end of a `with`."""

    def __init__(self, hosts: Hosts, troubled: bool = False) -> None:
        """`troubled`: a call may be answered 503; what it was about counts for nothing then."""
        self.hosts, self.troubled = hosts, troubled
        self.states: dict[str, str] = {}
        self.sealed: dict[str, str] = {}
        self.bad: list[Any] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=each) for each in enumerate(hosts.all)]

    def _call(self, caller: int, daemon: Daemon) -> None:
        try:
            with daemon.session(PATIENCE) as session:
                while not self._over.is_set():
                    self._once(session, caller)
        except Exception as error:
            self.bad.append(error)

    def _once(self, session: Session, caller: int) -> None:
        made = session.request("POST", "/deks", {"thread_id": f"thread-{caller}"})
        if not self._well(made, 201):
            return
        key_id = made.json()["key_id"]
        sealed = session.request("POST", "/encrypt", {"key_id": key_id, "plaintext": TEXT})
        if not self._well(sealed, 200):
            return
        state, number = "enabled", len(self.sealed) % 4
        if number == 1:
            done = session.request("POST", f"/deks/{key_id}/disable", {})
            state = "disabled" if self._well(done, 200) else ""
        elif number == 2:
            done = session.request("DELETE", f"/deks/{key_id}", {"immediately": True})
            state = "shredded" if self._well(done, 200) else ""
        if state:
            self.states[key_id] = state
            self.sealed[key_id] = sealed.json()["ciphertext"]
        for name in list(self.sealed)[-20:]:
            found = use(session, name)
            if found not in (200, 423, 410) and not (self.troubled and found == 503):
                self.bad.append((name, found))

    def _well(self, reply: Reply, wanted: int) -> bool:
        if reply.status != wanted and not (self.troubled and reply.status == 503):
            self.bad.append((reply.status, reply.body))
        return reply.status == wanted

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """On each host: what was answered holds."""
        assert self.bad == []
        wanted = {"enabled": 200, "disabled": 423, "shredded": 410}
        for daemon in self.hosts.all:
            with daemon.session(PATIENCE) as session:
                for key_id, state in self.states.items():
                    assert use(session, key_id) == wanted[state], (key_id, state)
                    if state == "enabled":
                        fields = {"key_id": key_id, "ciphertext": self.sealed[key_id]}
                        assert session.ok("POST", "/decrypt", fields)["plaintext"] == TEXT


def left(daemon: Daemon) -> list[tuple[str, str]]:
    """The tables that rotations left, as the command tells of them."""
    done = daemon.offline("backups", "list", "--json")
    assert done.returncode == 0, done.stderr
    return [(row["kek_id"], row["path"]) for row in map(json.loads, done.stdout.splitlines())]


def test_a_rotation_under_load(hosts: Hosts) -> None:
    old, new = kek_id(hosts.kek), kek_id(hosts.new)
    assert {row[0] for row in hosts.database.sql("SELECT unnest(keks) FROM kms.hosts")} == {old, new}
    with Load(hosts) as load:
        until(lambda: len(load.sealed) > 30 or load.bad)
        reply = hosts.rotate()
        assert reply.status == 200, reply.body
        assert hosts.active() == {new}
        seen = len(load.sealed)
        until(lambda: len(load.sealed) > seen + 30 or load.bad)
    load.check()
    assert hosts.database.sql("SELECT DISTINCT kek_id FROM kms.deks WHERE kek_id <> ''") == [(new,)]
    assert hosts.database.sql("SELECT DISTINCT keks FROM kms.hosts") == [([new],)]
    assert left(hosts.all[1]) == [(old, "deks_old_1")]
    hosts.database.sql("CREATE TABLE kms.deks_old_10 (LIKE kms.deks INCLUDING ALL)")
    hosts.database.sql("ALTER TABLE kms.deks_old_10 OWNER TO kms")
    assert hosts.all[0].offline("backups", "prune", "--keep", "1").returncode == 0
    assert left(hosts.all[2]) == [("", "deks_old_10")]


# ---- killed at each step ---------------------------------------------------------------------------------


class Meanwhile:
    """What another host does in the middle of a step."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        with hosts.all[1].session(PATIENCE) as session:
            self.before = [session.create_dek("t")["key_id"] for _ in range(3)]

    def act(self) -> None:
        with self.hosts.all[1].session(PATIENCE) as session:
            self.made = session.create_dek("t")["key_id"]
            self.sealed = session.encrypt(self.made, b"hello")
            shredded, disabled, rewrapped = self.before
            session.ok("DELETE", f"/deks/{shredded}", {"immediately": True})
            session.ok("POST", f"/deks/{disabled}/disable", {})
            session.ok("POST", "/rewrap", {"key_id": rewrapped, "new_kek_hex": self.hosts.kek.hex()})

    def check(self, daemons: list[Daemon]) -> None:
        for daemon in daemons:
            with daemon.session(PATIENCE) as session:
                assert session.decrypt(self.made, self.sealed) == b"hello"
                assert [use(session, key_id) for key_id in self.before] == [410, 423, 200]


@contextlib.contextmanager
def held_at(hosts: Hosts, step: str) -> Iterator[None]:
    """The first host rotates, and is at this step."""
    with contextlib.ExitStack() as stack:
        if step == "swapping":
            stack.enter_context(hosts.locked("deks", "ACCESS SHARE"))
        stack.enter_context(hosts.rotating("rewrapping" if step != "swapping" else step))
        if step == "comparing":
            stack.enter_context(hosts.locked("touched", "SHARE"))
            until(lambda: hosts.database.sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
        yield
        hosts.all[0].kill()


@pytest.mark.long
@pytest.mark.parametrize("step", ["rewrapping", "comparing", "swapping"])
def test_the_host_that_rotates_is_killed(hosts: Hosts, step: str) -> None:
    """The state before is whole, also with what others did; and the next rotation has all of it."""
    old, new = kek_id(hosts.kek), kek_id(hosts.new)
    if step != "swapping":
        hosts.filled(3000)
    meanwhile = Meanwhile(hosts)
    with held_at(hosts, step):
        if step != "comparing":  # whoever writes there waits for the test's own lock
            meanwhile.act()
    if step == "comparing":
        meanwhile.act()
    assert hosts.keks_of_rows() == [old]
    meanwhile.check(hosts.all[1:])
    hosts.all[0].start()
    assert hosts.active() == {old}
    if step == "swapping":
        reply = hosts.rotate(2)
        assert reply.status == 200, reply.body
    else:
        last = hosts.all[2]
        words = ("--config", str(last.config_file), "--new-key-file", str(last.home / "next"))
        done = last.cli("rotate-kek", *words)
        assert done.returncode == 0, done.stderr
        assert kek_id(bytes.fromhex(last.kek_file.read_text())) == new
    assert hosts.active() == {new} and hosts.keks_of_rows() == [new]
    meanwhile.check(hosts.all)


# ---- the barrier ---------------------------------------------------------------------------------------


def pids_get(daemon: Daemon, number: int) -> None:
    for pid in daemon.pids():
        os.kill(pid, number)


def wraps(daemon: Daemon) -> str:
    """The KEK that it wraps under; "" where it wraps nothing."""
    with daemon.session(PATIENCE) as session:
        reply = session.request("POST", "/wrap", {"dek": b64(os.urandom(32))})
    assert reply.status in (200, 503), reply.body
    return str(reply.json()["kek_id"]) if reply.status == 200 else ""


@pytest.mark.long
@pytest.mark.parametrize("stopped", [1, 2], ids=["two workers", "one worker"])
def test_a_host_that_is_stopped_in_the_barrier(hosts: Hosts, stopped: int) -> None:
    """It is fenced, and answers nothing under the old KEK when it goes on."""
    new, victim = kek_id(hosts.new), hosts.all[stopped]
    key_id = ok(hosts.all[0], "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    with victim.session(PATIENCE) as session:
        sealed = session.encrypt(key_id, b"hello")
        pids_get(victim, signal.SIGSTOP)
        try:
            reply = hosts.rotate()
            assert reply.status == 200, reply.body
            assert [row[0] for row in hosts.database.sql("SELECT fenced FROM kms.hosts")].count(True) == 1
        finally:
            pids_get(victim, signal.SIGCONT)
        found = {wraps(victim)}
        until(lambda: found.add(wraps(victim)) or new in found)
        assert found <= {"", new}
        until(lambda: use(session, key_id) == 200)
        assert session.decrypt(key_id, sealed) == b"hello"
    until(lambda: hosts.database.sql("SELECT DISTINCT keks FROM kms.hosts WHERE NOT fenced") == [([new],)])


@pytest.mark.long
def test_the_host_that_rotates_is_killed_before_it_answers(hosts: Hosts) -> None:
    """It is done then: the others are there already, and its own next start is under the new KEK, though its
    configuration has the old one as its master key. Who asks again is answered when it holds everywhere."""
    new = kek_id(hosts.new)
    key_id = ok(hosts.all[0], "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    pids_get(hosts.all[2], signal.SIGSTOP)
    try:
        with hosts.rotating(""):
            until(lambda: hosts.database.sql("SELECT active_kek FROM kms.fleet") == [(new,)])
            hosts.all[0].kill()
        with hosts.all[1].session(PATIENCE) as session:
            until(lambda: wraps(hosts.all[1]) == new)
            assert use(session, key_id) == 200
        hosts.all[0].start()
        assert "let next_master_keys entry 1" in hosts.all[0].stderr
        reply = hosts.rotate()
        assert (reply.status, reply.json()["rewrapped"]) == (200, 0)
    finally:
        pids_get(hosts.all[2], signal.SIGCONT)
    until(lambda: wraps(hosts.all[2]) == new)


SLOW = """
import sys, threading, time
from progressdb_kms.fleet.host import Host
real = Host._follow
def follow(self):
    time.sleep(5.0)
    yield from real(self)
Host._follow = follow
from progressdb_kms.__main__ import main
sys.exit(main())
"""


@pytest.mark.long
def test_a_host_that_has_not_heard_of_the_swap_writes_under_the_new_kek(hosts: Hosts) -> None:
    """Its thread that follows the changes is slow. Its first write is refused by the fence; then it follows
    at once, and its caller hears of nothing."""
    new, slow = kek_id(hosts.new), hosts.all[2]
    slow.stop()
    slow.command = [sys.executable, "-c", SLOW]
    slow.start()
    ok(slow, "POST", "/deks", {"thread_id": "t"}, 201)
    with hosts.rotating("") as answers:
        until(lambda: hosts.database.sql("SELECT active_kek FROM kms.fleet") == [(new,)])
        made = ok(slow, "POST", "/deks", {"thread_id": "t"}, 201)
        assert not answers and made["kek_id"] == new
    assert [reply.status for reply in answers] == [200]


# ---- who rotates is stopped, or loses its keeper ---------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("owner", [0, 1], ids=["one worker", "two workers"])
def test_the_host_that_rotates_is_stopped(hosts: Hosts, owner: int) -> None:
    """It is fenced though no change waits for it, and what it staged is thrown away. When it goes on, its
    rotation fails, whatever the others have done by then."""
    new, victim, other = kek_id(hosts.new), hosts.all[owner], 1 - owner
    hosts.filled(3000)
    with hosts.rotating("rewrapping", owner) as answers:
        pids_get(victim, signal.SIGSTOP)
        try:
            until(lambda: hosts.database.sql("SELECT rotating FROM kms.fleet") == [(False,)])
            assert hosts.database.sql("SELECT to_regclass('kms.deks_next')::text") == [(None,)]
            late = ok(hosts.all[other], "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
            reply = hosts.rotate(other)
            assert reply.status == 200, reply.body
        finally:
            pids_get(victim, signal.SIGCONT)
    assert [reply.status for reply in answers] in ([503], [409])
    with victim.session(PATIENCE) as session:
        until(lambda: use(session, late) == 200)
    assert wraps(victim) == new and hosts.keks_of_rows() == [new]


@pytest.mark.long
def test_a_keeper_is_killed(hosts: Hosts) -> None:
    """Of the host that rotates, and of another one in the barrier; with keys that came by SIGHUP."""
    hosts.filled(24)
    new, two = kek_id(hosts.new), hosts.all[1]
    told = f"SELECT count(*) FROM kms.hosts WHERE NOT fenced AND keks @> ARRAY['{new}']"
    two.write_config({**two.config, "next_master_keys": []})
    two.signal(signal.SIGHUP)
    until(lambda: hosts.database.sql(told) == [(2,)])
    two.write_config({**two.config, "next_master_keys": [{"file": "next"}]})
    two.signal(signal.SIGHUP)
    until(lambda: hosts.database.sql(told) == [(3,)])
    with contextlib.ExitStack() as reader:
        reader.enter_context(hosts.locked("deks", "ACCESS SHARE"))
        with hosts.rotating("swapping", 1) as answers:
            before = two.pids()
            os.kill(before[1], signal.SIGKILL)  # the first that is forked
    assert [reply.status for reply in answers] == [503]
    until(lambda: hosts.database.sql("SELECT rotating FROM kms.fleet") == [(False,)])
    until(lambda: hosts.database.sql(told) == [(3,)])
    (keeper,) = set(two.pids()) - set(before)
    with hosts.rotating("", 0) as answers:
        os.kill(keeper, signal.SIGKILL)
    assert [reply.status for reply in answers] == [200]
    until(lambda: wraps(two) == new)
    assert hosts.keks_of_rows() == [new]


# ---- who has the new KEK -------------------------------------------------------------------------------


@pytest.mark.long
def test_a_kek_comes_and_goes_by_sighup(fleet_database: postgres.Fleet) -> None:
    """And each host that lacks it, or has another key in a file of that name, is named."""
    with Hosts(fleet_database, workers=(1, 2)) as hosts:
        old, new = kek_id(hosts.kek), kek_id(hosts.new)
        told = "SELECT array_agg(DISTINCT keks) FROM kms.hosts"
        write_secret(hosts.all[1].home / "next", os.urandom(32))
        hosts.all[1].signal(signal.SIGHUP)
        until(lambda: hosts.database.sql(f"{told} WHERE NOT keks @> ARRAY['{new}']") != [(None,)])
        for number in (0, 1):
            reply = hosts.rotate(number)
            assert (reply.status, reply.code) == (409, "kek_not_everywhere"), reply.body
        hosts.all[1].write_config(
            {**hosts.all[1].config, "next_master_keys": [{"hex": hosts.new.hex()}], "master_key_file": "kek"}
        )
        hosts.all[1].signal(signal.SIGHUP)
        both = sorted([old, new])
        until(
            lambda: {tuple(row[0]) for row in hosts.database.sql("SELECT keks FROM kms.hosts")} == {(*both,)}
        )
        assert hosts.rotate(1, dry_run=True).status == 200
        for daemon in hosts.all:
            config = {name: value for name, value in daemon.config.items() if name != "next_master_keys"}
            daemon.write_config(config)
            daemon.signal(signal.SIGHUP)
        until(lambda: {tuple(row[0]) for row in hosts.database.sql("SELECT keks FROM kms.hosts")} == {(old,)})
        assert hosts.rotate().code == "kek_not_everywhere"
        assert hosts.active() == {old}


def test_a_host_that_comes_late(hosts: Hosts) -> None:
    """With the old key alone it is told what to do. What was shredded before is due until the old KEK is
    gone, and then on the record; and that KEK never comes back."""
    new = kek_id(hosts.new)
    one, two, late = hosts.all
    key_id = ok(one, "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    late.stop()
    ok(two, "DELETE", f"/deks/{key_id}", {"immediately": True})
    assert ok(one, "GET", "/status")["erasures_due"] == ok(two, "GET", "/status")["erasures_due"] == 1
    done = one.cli("rotate-kek", "--generate", "--config", str(one.config_file))  # which no host has
    assert done.returncode == 1 and b"not configured on every host" in done.stderr
    assert not list(one.home.glob("kek.*"))
    done = one.cli("rotate-kek", "--kek-id", new, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backup"] == "deks_old_1" and b"next_master_keys" in done.stderr
    until(lambda: ok(two, "GET", "/status")["erasures_due"] == 0)
    events = one.audit_log.read_text() + two.audit_log.read_text()
    assert events.count("shred_complete") == 1
    for daemon in hosts.all[:2]:  # the old KEK, by another name
        write_secret(daemon.home / "next", hosts.kek)
        daemon.signal(signal.SIGHUP)
        until(lambda: "was rotated out: take it out there" in daemon.stderr)  # noqa: B023
    late.write_config({name: value for name, value in late.config.items() if name != "next_master_keys"})
    refused = late.refusal()
    assert f"the fleet's active KEK {new} is not configured on this host" in refused.stderr
    assert f"bring the key {new} here" in refused.stderr
    assert hosts.database.sql("SELECT DISTINCT keks FROM kms.hosts") == [([new],)]


@pytest.mark.long
def test_of_two_rotations_one_is_refused(hosts: Hosts) -> None:
    """The other waits for somebody who reads all rows, and meanwhile all hosts go on."""
    new = kek_id(hosts.new)
    with contextlib.ExitStack() as reader:
        reader.enter_context(hosts.locked("deks", "ACCESS SHARE"))
        with hosts.rotating("swapping") as answers:
            reply = hosts.rotate(1)
            assert (reply.status, reply.code) == (409, "rotation_in_progress"), reply.body
            reply = hosts.rotate(0)
            assert (reply.status, reply.code) == (409, "rotation_in_progress"), reply.body
            for daemon in hosts.all:
                key_id = ok(daemon, "POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
                ok(daemon, "POST", f"/deks/{key_id}/disable", {})
            assert not answers
            reader.close()
    assert [reply.status for reply in answers] == [200]
    assert hosts.active() == {new} and hosts.keks_of_rows() == [new]


def places(daemon: Daemon, secret: Secret) -> int:
    """Regions of memory that hold it; one that all processes share counts once."""
    return len({hit.mapping.start for hit in scan(daemon.pids(), [secret]).hits})


@pytest.mark.long
@pytest.mark.skipif(bool(memscan.cannot_scan()), reason=memscan.cannot_scan() or "-")
def test_the_old_kek_is_in_no_memory_after_the_answer(fleet_database: postgres.Fleet) -> None:
    """Where root can read all of it, the keyring too. It comes back by no SIGHUP either."""
    with Hosts(fleet_database, wrapper=without_memfd_secret()) as hosts:
        old, new = Secret("old KEK", hosts.kek), Secret("new KEK", hosts.new)
        for daemon in hosts.all:
            assert places(daemon, old) == 1
        lasting = [daemon.pids() for daemon in hosts.all]  # a shred has a child that ends at once
        with Load(hosts) as load:
            until(lambda: len(load.sealed) > 20 or load.bad)
            reply = hosts.rotate()
            assert reply.status == 200, reply.body
            for pids in lasting:
                scan(pids, [old]).assert_clean()
        load.check()
        for daemon in hosts.all:
            pids = daemon.pids()
            write_secret(daemon.home / "next", hosts.kek)
            daemon.signal(signal.SIGHUP)
            until(lambda: "was rotated out: take it out there" in daemon.stderr)  # noqa: B023
            until(lambda: daemon.pids() == pids)  # noqa: B023  # a child reads the configuration, and ends
            scan(daemon.pids(), [old]).assert_clean()
            assert places(daemon, new) == 1


# ---- the database's side ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
def test_sessions_are_ended_meanwhile(fleet_database: postgres.Fleet, how: str) -> None:
    """Of any host, at any moment. Each rotation is done, or nothing of it is; and nothing else is lost."""
    chance = random.Random(4711)
    busy = "pid = (SELECT pid FROM pg_stat_activity WHERE usename = 'kms' AND state <> 'idle' LIMIT 1)"
    with Hosts(fleet_database) as hosts:
        hosts.filled(1200)
        with Load(hosts, troubled=True) as load:
            deadline = time.monotonic() + PATIENCE * 3
            answers: list[int] = []
            while 200 not in answers:
                assert time.monotonic() < deadline, answers
                over = threading.Event()

                def end(over: threading.Event = over) -> None:
                    while not over.wait(chance.uniform(0.0, 0.4)):
                        fleet_database.sql(f"SELECT {how}(pid) FROM pg_stat_activity WHERE {busy}")

                thread = threading.Thread(target=end)
                thread.start()
                try:
                    answers.append(hosts.rotate(chance.randrange(3)).status)
                finally:
                    over.set()
                    thread.join()
                assert len(hosts.keks_of_rows()) == 1
                assert answers[-1] in (200, 409, 503), answers
            seen = len(load.sealed)
            until(lambda: len(load.sealed) > seen + 10)
        load.check()
        new = kek_id(hosts.new)
        until(lambda: hosts.active() == {new})
        assert hosts.keks_of_rows() == [new]
