"""When is a scheduled deletion due? Not because a clock was wrong for a second."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.crypto.keyring import REGION_SIZE, Keyring
from progressdb_kms.crypto.memory import LockedBuffer
from progressdb_kms.encoding import LATEST, timestamp, wall
from progressdb_kms.service import start
from progressdb_kms.service.channel import channel
from progressdb_kms.service.clock import AHEAD, Anchor, Clock, Reading, age, judge, overdue
from progressdb_kms.service.keeper import Keeper
from progressdb_kms.service.lock import claim
from progressdb_kms.service.shredding import JANITOR_SECONDS
from progressdb_kms.store.seal import ActiveKek
from tests.harness.configured import configured, named

NOW = 1_795_000_000.0
HOUR, DAY = 3600.0, 86400.0
YEARS = 10 * 365 * DAY

ANCHOR = Anchor(NOW, NOW, "boot", 1000.0)

JUDGED = [
    # since the anchor by the wall clock, by the time since boot (None: another boot) -> trusted, held
    (0.0, 0.0, 0.0, ""),
    (HOUR, HOUR, HOUR, ""),
    (HOUR, HOUR + 299, HOUR + 299, ""),  # within 5 minutes
    (0.0, 301.0, 301.0, "behind"),
    (-HOUR, 0.0, 0.0, "60 minutes behind"),
    (DAY, 0.0, 0.0, ""),  # ahead by a day: the trusted time has not passed, so nothing comes early
    (8 * DAY, 0.0, 0.0, "8 days ahead"),
    (YEARS, 1.0, 1.0, "3650 days ahead"),
    (30 * DAY, 30 * DAY, 30 * DAY, ""),  # a month of work
    (DAY, None, DAY, ""),  # off for a day
    (AHEAD, None, AHEAD, ""),
    (AHEAD + 1, None, 0.0, "went on by 7 days over a reboot"),
    (YEARS, None, 0.0, "went on by 3650 days"),
    (-299.0, None, 0.0, ""),
    (-HOUR, None, 0.0, "went back by 60 minutes"),
    (-YEARS, None, 0.0, "the clock shows 20"),  # before this release was made
]


@pytest.mark.parametrize(("wall", "uptime", "trusted", "held"), JUDGED)
def test_judge(wall: float, uptime: float | None, trusted: float, held: str) -> None:
    boot, since = ("boot", 1000.0 + uptime) if uptime is not None else ("another", 5.0)
    found = judge(ANCHOR, Reading(NOW + wall, boot, since))
    assert found.trusted == NOW + trusted
    assert held in found.held and bool(found.held) == bool(held)


def test_judge_without_boot_ids_each_start_is_a_reboot() -> None:
    anchor = ANCHOR._replace(boot="")
    assert judge(anchor, Reading(NOW + DAY, "", 5.0)).trusted == NOW + DAY


def test_judge_an_uptime_that_went_back_is_another_boot() -> None:
    """A virtual machine that was set back to a snapshot."""
    assert judge(ANCHOR, Reading(NOW + 60, "boot", 5.0)) == (NOW + 60, "")


def test_the_first_look_trusts_the_wall_unless_it_can_not_be() -> None:
    assert judge(None, Reading(NOW, "boot", 5.0)) == (NOW, "")
    assert judge(None, Reading(86400.0, "boot", 5.0)).held == "the clock shows 1970-01-02"


def test_times_are_those_that_can_be_written() -> None:
    assert timestamp(LATEST + 1e12) == timestamp(LATEST) == "9999-12-31T23:59:59.000000Z"
    assert timestamp(-0.5) == timestamp(-1e12) == "1970-01-01T00:00:00.000000Z"


def test_a_clock_that_python_has_no_words_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def late() -> float:
        raise OverflowError("timestamp too large to convert to C _PyTime_t")

    monkeypatch.setattr(time, "time", late)
    assert wall() == LATEST and Clock().now() == LATEST


@pytest.mark.parametrize(
    ("begun", "seconds"),
    [
        (timestamp(NOW - 60), 60.0),
        (timestamp(NOW), 0.0),
        (timestamp(NOW + 1), None),  # it would be younger than nothing
        (timestamp(86400.0), None),  # no right clock showed that
        ("", None),
        ("2026", None),
    ],
)
def test_an_age_that_nobody_can_tell_is_none(begun: str, seconds: float | None) -> None:
    assert age(begun, NOW) == seconds


def test_a_kek_is_overdue_by_what_was_configured() -> None:
    kek = ActiveKek("aa", 1, timestamp(NOW - 30 * DAY))
    assert overdue(kek, NOW, None) == overdue(kek, NOW, 30) == overdue(None, NOW, 1) == ""
    why = overdue(kek, NOW, 29)
    assert "the KEK aa is the active one for 30 days, and kek_max_age_days is 29" in why and "rotate" in why
    assert "nobody can tell how old the KEK aa is" in overdue(kek._replace(since=""), NOW, 29)


# ---- the keeper ----------------------------------------------------------------------------------------


class Fake(Clock):
    """Clocks that a test moves."""

    def __init__(self) -> None:
        self.wall, self.boot, self.uptime = NOW, "first", 5000.0

    def now(self) -> float:
        return min(max(self.wall, 0.0), LATEST)

    def monotonic(self) -> float:
        return self.uptime

    def reading(self) -> Reading:
        return Reading(self.now(), self.boot, self.uptime)

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.uptime += seconds


class Site:
    """A keeper that is driven round by round, and may be started anew."""

    max_age_days: int | None = None

    def __init__(self, folder: Path, clock: Fake) -> None:
        self.folder = folder
        self.clock = clock
        self.region, self.staging = LockedBuffer(REGION_SIZE), LockedBuffer(32)
        self.keyring = Keyring(self.region.view)
        self.kek_id = self.keyring.install(memoryview(bytearray(os.urandom(32))), 1)
        self.inbox, self.outbox = channel()
        self.keeper: Keeper | None = None
        self.start()

    def start(self) -> None:
        keys = configured(named(self.kek_id), kek_max_age_days=self.max_age_days)
        self.keeper, _ = start.open_keeper(self.folder, self.keyring, keys, self.staging.view, self.inbox, 0)

    def reboot(self, off: float) -> None:
        """Power off, and on after so long by the wall clock."""
        self.stop()
        self.clock.boot, self.clock.uptime = f"after {self.clock.boot}", 20.0
        self.clock.wall += off
        self.start()

    def stop(self) -> None:
        assert self.keeper is not None
        self.keeper.close()

    def round(self) -> None:
        """Long enough for the janitor to look, on all clocks."""
        assert self.keeper is not None
        self.clock.pass_by(JANITOR_SECONDS)
        for _ in range(5):
            self.keeper.round(0.0)

    def do(self, op: str, **args: Any) -> Any:
        assert self.keeper is not None
        result = self.keeper._writes[op]
        with self.keeper._store.transaction():
            self.keeper._effects.clear()
            found = result(**args)
        for effect in self.keeper._effects:
            effect()
        return found

    def scheduled(self, days: int = 30) -> str:
        key_id = str(self.do("create", thread_id="t")["key_id"])
        self.do("transition", key_id=key_id, action="schedule_deletion", days=days)
        return key_id

    def state(self, key_id: str) -> str:
        assert self.keeper is not None
        record = self.keeper._store.get(key_id)
        assert record is not None
        return record.state

    @property
    def warnings(self) -> str:
        assert self.keeper is not None
        ready: Any = self.keeper._others["ready"]
        return " ".join(ready()["warnings"])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    clock = Fake()
    monkeypatch.setattr(start, "Clock", lambda: clock)
    tmp_path.chmod(0o700)
    lock = claim(tmp_path)
    made = Site(tmp_path, clock)
    yield made
    made.stop()
    made.inbox.close()
    made.outbox.close()
    lock.close()


def test_a_deletion_is_carried_out_in_time(site: Site) -> None:
    key_id = site.scheduled(days=30)
    site.clock.pass_by(30 * DAY - HOUR)
    site.round()
    assert site.state(key_id) == "pending_deletion" and site.warnings == ""
    site.clock.pass_by(HOUR)
    site.round()
    assert site.state(key_id) == "shredded"


def test_ten_years_for_a_second(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    key_id = site.scheduled(days=30)
    site.clock.wall += YEARS
    site.round()
    assert site.state(key_id) == "pending_deletion"
    assert "3650 days ahead" in site.warnings and "clock accept" in site.warnings
    site.clock.wall -= YEARS
    site.round()
    assert site.state(key_id) == "pending_deletion" and site.warnings == ""
    told = [record.getMessage() for record in caplog.records if "scheduled deletions" in record.getMessage()]
    assert len(told) == 2 and "are held" in told[0] and "go on" in told[1]
    site.clock.pass_by(30 * DAY)
    site.round()
    assert site.state(key_id) == "shredded"  # in its time, as if nothing had been


def test_a_clock_set_back_keeps_neither_the_janitor_nor_an_erasure(site: Site) -> None:
    due, key_id = site.scheduled(days=1), site.scheduled(days=30)
    left = str(site.do("create", thread_id="t")["key_id"])
    site.do("transition", key_id=left, action="shred")
    site.clock.wall -= YEARS / 20
    site.round()
    assert site.keeper is not None and site.keeper._store.names("erasure:") == []  # finished all the same
    assert "behind" in site.warnings
    site.clock.pass_by(2 * DAY)
    site.round()
    assert site.state(due) == "pending_deletion"  # by the wall clock it is not
    site.clock.wall += YEARS / 20
    site.round()
    assert (site.state(due), site.state(key_id), site.warnings) == ("shredded", "pending_deletion", "")


def test_a_start_with_a_wrong_clock_ahead(site: Site) -> None:
    key_id = site.scheduled(days=6)
    site.reboot(off=YEARS)
    for _ in range(3):
        site.round()
    assert site.state(key_id) == "pending_deletion" and "over a reboot" in site.warnings
    site.reboot(off=60)  # and again, with the same wrong clock: no week is won by a reboot
    site.round()
    assert site.state(key_id) == "pending_deletion" and "over a reboot" in site.warnings
    site.clock.wall -= YEARS
    site.round()
    assert site.state(key_id) == "pending_deletion" and site.warnings == ""
    site.clock.pass_by(6 * DAY)
    site.round()
    assert site.state(key_id) == "shredded"


def test_a_start_with_a_clock_that_lost_its_battery(site: Site) -> None:
    """What is scheduled before the clock is set must not be due the moment that it is."""
    real = site.clock.wall
    site.reboot(off=60)
    site.clock.wall = 0.0
    key_id = site.scheduled(days=7)
    site.round()
    assert "the clock shows 1970-01-01" in site.warnings
    site.clock.wall = real + 120
    site.round()
    assert site.state(key_id) == "pending_deletion" and site.warnings == ""


def test_a_host_that_was_off_for_a_month(site: Site) -> None:
    due, key_id = site.scheduled(days=14), site.scheduled(days=60)
    site.reboot(off=30 * DAY)
    site.round()
    assert site.state(due) == "pending_deletion" and "30 days over a reboot" in site.warnings
    told = site.do("accept_clock")
    assert "30 days" in told["held"]
    site.round()
    assert (site.state(due), site.state(key_id), site.warnings) == ("shredded", "pending_deletion", "")
    site.reboot(off=60)  # it was kept
    site.round()
    assert site.warnings == ""


def test_off_for_a_day_is_nothing(site: Site) -> None:
    key_id = site.scheduled(days=2)
    site.reboot(off=DAY)
    site.round()
    assert site.state(key_id) == "pending_deletion" and site.warnings == ""
    site.clock.pass_by(DAY)
    site.round()
    assert site.state(key_id) == "shredded"


def test_a_power_cut_after_idle_weeks(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trusted time is kept while nothing else is written."""
    site.scheduled(days=300)
    for _ in range(40):
        site.clock.pass_by(DAY)
        site.round()
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "close", lambda self: self._store.close())
        site.reboot(off=HOUR)
    site.round()
    assert site.warnings == ""


@pytest.mark.parametrize("wall", [LATEST + YEARS, -YEARS * 10, 0.0])
def test_no_call_fails_for_a_clock(site: Site, wall: float) -> None:
    site.clock.wall = wall
    key_id = site.scheduled(days=365)
    site.round()
    assert site.state(key_id) == "pending_deletion" and site.warnings
    site.do("accept_clock")
    site.do("transition", key_id=key_id, action="enable")


def test_the_journal_reminds_of_an_old_kek_when_it_has_become_that_and_each_day(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def reminders() -> int:
        return sum("kek_max_age_days is 90" in record.getMessage() for record in caplog.records)

    site.clock.wall = wall()  # by which the store noted when the KEK became the active one
    site.reboot(60.0)
    site.clock.pass_by(91 * DAY)
    site.round()
    assert reminders() == 0 and site.warnings == ""
    site.max_age_days = 90
    site.reboot(60.0)
    for _ in range(10):
        site.round()
    assert reminders() == 1 and "kek_max_age_days is 90" in site.warnings
    site.clock.pass_by(DAY)
    site.round()
    assert reminders() == 2
    site.clock.wall -= 30 * DAY  # set back: it isn't that old by this clock
    site.round()
    assert reminders() == 2 and "kek_max_age_days" not in site.warnings
    site.clock.wall += 30 * DAY
    site.round()
    assert reminders() == 3
