"""The KEK of a fleet is rotated: three daemons on one database, and what they do meanwhile."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fleet.test_daemons import PATIENCE, configured, until, use
from tests.harness import postgres
from tests.harness.daemon import Daemon, write_secret
from tests.harness.fakekms import kek_id_of as kek_id
from tests.harness.wire import Session

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())


class Hosts:
    """Daemons of one fleet. `new`: the KEK that each of them has in next_master_keys."""

    def __init__(self, database: postgres.Fleet, workers: tuple[int, ...] = (1, 2, 1), **more: Any) -> None:
        self.database = database
        self.kek, self.new = os.urandom(32), os.urandom(32)
        self.all: list[Daemon] = []
        for number in workers:
            daemon = Daemon(kek=self.kek, workers=number)
            write_secret(daemon.home / "next", self.new)
            daemon.write_config(
                {**configured(database), "workers": number, "next_master_keys": [{"file": "next"}], **more}
            )
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

    def rotate(self, number: int = 0, dry_run: bool = False) -> Any:
        fields = {"new_kek_id": kek_id(self.new), "dry_run": dry_run}
        with self.all[number].session(PATIENCE * 3) as session:
            return session.request("POST", "/rotate_kek", fields)

    def active(self) -> set[str]:
        return {daemon.ok("GET", "/status")["kek_id"] for daemon in self.all}


@pytest.fixture
def hosts(fleet_database: postgres.Fleet) -> Iterator[Hosts]:
    with Hosts(fleet_database) as made:
        yield made


class Load:
    """Callers on each host, who make DEKs, use them, and change their state; until the end of a `with`."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.states: dict[str, str] = {}
        self.sealed: dict[str, bytes] = {}
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
        key_id = session.create_dek(f"thread-{caller}")["key_id"]
        self.states[key_id] = "enabled"
        self.sealed[key_id] = session.encrypt(key_id, b"hello")
        number = len(self.sealed) % 4
        if number == 1:
            self._expect(session, "POST", f"/deks/{key_id}/disable", {})
            self.states[key_id] = "disabled"
        elif number == 2:
            self._expect(session, "DELETE", f"/deks/{key_id}", {"immediately": True})
            self.states[key_id] = "shredded"
        for name in list(self.sealed)[-20:]:
            found = use(session, name)
            if found not in (200, 423, 410):
                self.bad.append((name, found))

    def _expect(self, session: Session, method: str, path: str, body: Any) -> None:
        reply = session.request(method, path, body)
        if reply.status != 200:
            self.bad.append((path, reply.status, reply.body))

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
                        assert session.decrypt(key_id, self.sealed[key_id]) == b"hello"


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


def left(daemon: Daemon) -> list[tuple[str, str]]:
    """The tables that rotations left, as the command tells of them."""
    done = daemon.offline("backups", "list", "--json")
    assert done.returncode == 0, done.stderr
    return [(row["kek_id"], row["path"]) for row in map(json.loads, done.stdout.splitlines())]
