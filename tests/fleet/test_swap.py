"""How long a rotation keeps all others from the rows, measured; and what it finds while others write."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.crypto import envelope
from progressdb_kms.crypto.aead import Aead
from progressdb_kms.crypto.keyring import REGION_SIZE, KekNotLoaded, Keyring
from progressdb_kms.encoding import new_key_id
from progressdb_kms.errors import Conflict, StoreUnavailable
from progressdb_kms.store.contract import DekRecord
from tests.harness import postgres

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())

ROWS = 20_000


class Site:
    """A keyring, and two hosts of a fleet, of which the first rotates."""

    def __init__(self, fleet: postgres.Fleet) -> None:
        self.keyring = Keyring(memoryview(bytearray(REGION_SIZE)))
        self.old = self.keyring.install(memoryview(os.urandom(32)), 1)
        self.new_key = memoryview(os.urandom(32))
        self.keyring.activate(self.old, 1)
        self.new = self.keyring.install(self.new_key)
        self.keyring.row_key[:] = os.urandom(32)
        self.keyring.audit_key[:] = os.urandom(32)
        fleet.sql("UPDATE kms.fleet SET active_kek = ''")
        self.one = fleet.store(self.keyring.row_key, "one")
        self.two = fleet.store(self.keyring.row_key, "two")
        fleet.sql(f"UPDATE kms.hosts SET keks = ARRAY['{self.old}', '{self.new}']")
        for store in (self.one, self.two):
            with store.transaction():
                if store is self.one:
                    store.activate(self.old, 1, "2026-01-01T00:00:00.000000Z")
                    self.two.acting = self.old
                store.write("audit:key", self.audit_key())
        self.made = 0

    def audit_key(self) -> dict[str, Any]:
        from progressdb_kms.service import ownkeys

        return ownkeys.wrap(self.keyring, self.old, envelope.AUDIT_KEY, self.keyring.audit_key)

    def deks(self, count: int, dek: memoryview) -> list[DekRecord]:
        made = []
        with self.keyring.borrow(self.old) as kek:
            for _ in range(count):
                self.made += 1
                key_id = new_key_id(self.made, os.urandom(10))
                blob = envelope.wrap(Aead(kek), self.old, key_id, os.urandom(12), dek)
                made.append(DekRecord(key_id, "t", blob, self.old, 1, "2026-01-01T00:00:00.000000Z"))
        return made

    def fill(self, store: Any, count: int) -> None:
        dek = memoryview(bytearray(os.urandom(32)))
        for _ in range(0, count, 1000):
            with store.transaction():
                store.put_all(self.deks(min(count, 1000), dek))

    def rotate(self, tmp_path: Path) -> dict[str, Any]:
        """Returns the answer, with the seconds of each phase, and of the lock."""
        from progressdb_kms.service.fleetrotation import FleetRotation

        rotation = FleetRotation({self.new}, self.one, self.keyring, tmp_path)
        steps = rotation.run(self.new_key)
        seconds: dict[str, float] = {}
        last = time.monotonic()
        while True:
            try:
                next(steps)
            except StopIteration as done:
                seconds["lock"] = time.monotonic() - self.one.locked_at
                return {**done.value, "seconds": seconds}
            phase, now = rotation.progress["phase"] if rotation.progress else "", time.monotonic()
            seconds[phase] = seconds.get(phase, 0.0) + now - last
            last = now


def measured(site: Site, tmp_path: Path, rows: int, others: int) -> dict[str, Any]:
    """`others`: rows a second that the second host writes meanwhile."""
    site.fill(site.one, rows)
    over = threading.Event()
    late: list[str] = []

    from progressdb_kms.fleet.store import Fenced

    def write() -> None:
        dek = memoryview(bytearray(os.urandom(32)))
        while not over.wait(0.02):
            try:
                new = site.deks(max(1, others // 50), dek)
                with site.two.transaction():
                    site.two.put_all(new)
            except (Fenced, KekNotLoaded):  # the swap has taken place: a keeper would follow it
                return
            late.extend(one.key_id for one in new)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        found = site.rotate(tmp_path)
    finally:
        over.set()
        writer.join()
    return {**found, "late": late}


def check(site: Site, fleet: postgres.Fleet, found: dict[str, Any]) -> None:
    rows = fleet.sql(f"SELECT key_id FROM kms.deks WHERE key_id = ANY('{{{','.join(found['late'])}}}')")
    assert len(rows) == len(found["late"])
    assert fleet.sql("SELECT DISTINCT kek_id FROM kms.deks") == [(site.new,)]
    keks, total = site.one.added_up()
    state = site.two.state()
    assert state.total == total and {kek_id: row.deks for kek_id, row in state.keks.items()} == keks
    site.two.vouch()


@pytest.mark.long
def test_the_lock_of_the_swap(fleet_database: postgres.Fleet, tmp_path: Path) -> None:
    site = Site(fleet_database)
    found = measured(site, tmp_path, ROWS, 500)
    seconds = found["seconds"]
    print(
        f"\n{ROWS} rows: staged {ROWS / seconds['rewrapping']:.0f} a second, compared in "
        f"{seconds['comparing']:.1f} s; {len(found['late'])} written meanwhile; "
        f"the swap held the lock for {1000 * seconds['lock']:.1f} ms"
    )
    check(site, fleet_database, found)


class TestTheSwap:
    @pytest.fixture
    def site(self, fleet_database: postgres.Fleet) -> Site:
        site = Site(fleet_database)
        site.fill(site.one, 50)
        return site

    def whole(self, site: Site, fleet: postgres.Fleet, kek_id: str) -> None:
        assert fleet.sql("SELECT DISTINCT kek_id FROM kms.deks") == [(kek_id,)]
        assert fleet.sql("SELECT active_kek, rotating FROM kms.fleet") == [(kek_id, False)]
        site.two.vouch()

    def given_up(self, site: Site, fleet: postgres.Fleet) -> None:
        """As the keeper tidies up: the state before is whole, and the next rotation works."""
        with site.one.transaction():
            site.one.staging(False)
        self.whole(site, fleet, site.old)
        assert site.keyring.active.kek_id == site.old and site.new in site.keyring.kek_ids()

    def test_a_rotation(self, site: Site, fleet_database: postgres.Fleet, tmp_path: Path) -> None:
        found = site.rotate(tmp_path)
        assert (found["rewrapped"], found["kek_version"], found["backup"]) == (50, 2, "deks_old_1")
        self.whole(site, fleet_database, site.new)
        assert site.keyring.kek_ids() == [site.new] and site.one.acting == site.new

    def test_how_much_is_asked_under_the_lock(
        self, site: Site, fleet_database: postgres.Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many rows others wrote meanwhile: while it asks, all of them wait."""
        from progressdb_kms.fleet.engine import Session

        real, settle, asked = Session.execute, site.one.settle, []

        def late(*args: Any) -> None:
            dek = memoryview(bytearray(os.urandom(32)))
            with site.two.transaction():
                site.two.put_all(site.deks(40, dek))
            settle(*args)

        def noted(session: Any, sql: Any, *args: Any) -> Any:
            if site.one.locked_at:
                asked.append(sql)
            return real(session, sql, *args)

        site.one.settle = late
        monkeypatch.setattr(Session, "execute", noted)
        site.rotate(tmp_path)
        monkeypatch.undo()
        assert 0 < len(asked) <= 30, asked
        assert fleet_database.sql("SELECT count(*) FROM kms.deks") == [(90,)]
        self.whole(site, fleet_database, site.new)

    def test_somebody_reads_for_longer_than_it_waits(
        self, site: Site, fleet_database: postgres.Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from progressdb_kms.fleet.store import Locked
        from progressdb_kms.service import fleetrotation

        monkeypatch.setattr(fleetrotation, "PATIENCE", 0.5)
        with fleet_database.reader(site.keyring.row_key).snapshot(), pytest.raises(Locked):
            site.rotate(tmp_path)
        self.given_up(site, fleet_database)
        assert site.rotate(tmp_path)["rewrapped"] == 50

    @pytest.mark.parametrize("done", [True, False], ids=["done", "not done"])
    def test_nobody_knows_whether_it_took_place(
        self,
        site: Site,
        fleet_database: postgres.Fleet,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        done: bool,
    ) -> None:
        """The connection is lost at the COMMIT of the swap, before it or after it."""
        from progressdb_kms.fleet.store import FleetStore, Unknown

        real = FleetStore._end_inside

        def lost(store: Any, session: Any, statements: Any) -> None:
            if not site.one.locked_at:
                return real(store, session, statements)
            monkeypatch.undo()
            if done:
                real(store, session, statements)
            raise Unknown("the connection was lost")

        monkeypatch.setattr(FleetStore, "_end_inside", lost)
        if done:
            assert site.rotate(tmp_path)["rewrapped"] == 50
            self.whole(site, fleet_database, site.new)
            assert site.keyring.kek_ids() == [site.new] and site.one.acting == site.new
        else:
            with pytest.raises(StoreUnavailable):
                site.rotate(tmp_path)
            self.given_up(site, fleet_database)

    def test_a_host_that_lost_the_key_meanwhile(
        self, site: Site, fleet_database: postgres.Fleet, tmp_path: Path
    ) -> None:
        """The census is taken again under the lock."""
        fleet_database.sql(f"UPDATE kms.hosts SET keks = ARRAY['{site.old}'], name = 'h2' WHERE host = 'two'")
        with pytest.raises(Conflict, match="not configured on every host of the fleet: h2"):
            site.rotate(tmp_path)
        self.given_up(site, fleet_database)

    def test_the_host_itself_was_put_out(
        self, site: Site, fleet_database: postgres.Fleet, tmp_path: Path
    ) -> None:
        from progressdb_kms.fleet.store import Fenced

        real = site.one.check_staged

        def fenced(after: str, limit: int) -> Any:
            fleet_database.sql("UPDATE kms.hosts SET fenced = true WHERE host = 'one'")
            return real(after, limit)

        site.one.check_staged = fenced
        with pytest.raises(Fenced):
            site.rotate(tmp_path)
        assert site.two.abandoned()
        with site.two.transaction():
            site.two.staging(False)
        self.whole(site, fleet_database, site.old)
