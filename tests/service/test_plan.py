"""Do the configured keys fit the store? Every case, as a row."""

from __future__ import annotations

import pytest

from progressdb_kms.config.keysource import COMING, MASTER, PENDING, PREVIOUS
from progressdb_kms.errors import KeyMismatch
from progressdb_kms.service.plan import ConfiguredKey, plan
from progressdb_kms.store.contract import KekCount
from tests.harness.configured import configured, named

OLD, NEW, THIRD = "0" * 16, "1" * 16, "2" * 16


def key(kek_id: str, role: str = MASTER) -> ConfiguredKey:
    return named(kek_id, f"file {kek_id[0]}", role)


def count(deks: int) -> KekCount:
    return KekCount(1, deks, "2026-01-01")


FITS = [
    # stored, DEKs by KEK, master, previous, pending -> active, version, adopt, a word of the notice
    (None, {}, OLD, [], None, OLD, 1, True, ""),
    ((OLD, 3), {OLD: 5}, OLD, [], None, OLD, 3, False, ""),
    ((OLD, 3), {}, OLD, [], None, OLD, 3, False, ""),
    ((OLD, 3), {OLD: 5, NEW: 1}, OLD, [NEW], None, OLD, 3, False, ""),
    ((OLD, 3), {OLD: 5}, NEW, [OLD], None, NEW, 4, True, "changes"),
    ((OLD, 3), {OLD: 5}, OLD, [], NEW, OLD, 3, False, "did not happen"),
    ((NEW, 4), {NEW: 5}, OLD, [], NEW, NEW, 4, False, "--resume"),
    ((NEW, 4), {NEW: 5, OLD: 1}, OLD, [], NEW, NEW, 4, False, "--resume"),
]


@pytest.mark.parametrize(
    ("stored", "keks", "master", "previous", "pending", "active", "version", "adopt", "notice"), FITS
)
def test_fits(
    stored: tuple[str, int] | None, keks: dict[str, int], master: str, previous: list[str],
    pending: str | None, active: str, version: int, adopt: bool, notice: str,
) -> None:  # fmt: skip
    found = plan(
        stored,
        {kek_id: count(deks) for kek_id, deks in keks.items()},
        configured(
            key(master),
            *(key(kek_id, PREVIOUS) for kek_id in previous),
            *(key(kek_id, PENDING) for kek_id in [pending] if kek_id),
        ),
        {},
    )
    assert (found.active, found.version, found.adopt) == (active, version, adopt)
    assert notice in found.notice and bool(found.notice) == bool(notice)


REFUSED = [
    # the master key is another one
    ((OLD, 1), {OLD: 5}, NEW, [], [OLD, "5 DEKs need it since 2026-01-01", f"file 1 holds the KEK {NEW}"]),
    # no DEK needs the active one, but the audit key does
    ((OLD, 1), {}, NEW, [], [OLD, "the audit key needs it"]),
    # one that was rewrapped to a third KEK
    ((OLD, 1), {OLD: 5, THIRD: 2}, OLD, [NEW], [THIRD, "2 DEKs", "previous_master_keys"]),
    ((OLD, 1), {OLD: 5, THIRD: 2, NEW: 1}, OLD, [], [THIRD, NEW, "2 DEKs", "1 DEKs"]),
]


@pytest.mark.parametrize(("stored", "keks", "master", "previous", "says"), REFUSED)
def test_refused_with_what_to_do(
    stored: tuple[str, int], keks: dict[str, int], master: str, previous: list[str], says: list[str]
) -> None:
    with pytest.raises(KeyMismatch) as caught:
        rows = {kek_id: count(deks) for kek_id, deks in keks.items()}
        keys = configured(key(master), *(key(kek_id, PREVIOUS) for kek_id in previous))
        plan(stored, rows, keys, {})
    text = caught.value.message + " " + caught.value.hint
    assert all(word in text for word in says), text
    assert "nothing was changed" in text and "kek-id FILE" in text


def test_a_retired_kek_is_no_master_unless_it_is_wanted() -> None:
    """Two key files were swapped: no key is absent, but the old KEK would be the active one again."""
    keys = configured(key(OLD), key(NEW, PREVIOUS))
    with pytest.raises(KeyMismatch) as caught:
        plan((NEW, 2), {NEW: count(5)}, keys, {OLD: "2026-11-24T10:00:00Z"})
    text = caught.value.message + " " + caught.value.hint
    for word in (f"file 0 holds the KEK {OLD}", "rotated out on 2026-11-24", NEW, "--allow-retired-kek"):
        assert word in text
    forced = plan((NEW, 2), {NEW: count(5)}, keys._replace(allow_retired=True), {OLD: "2026-11-24"})
    assert (forced.active, forced.adopt) == (OLD, True)
    same = plan((OLD, 3), {OLD: count(5)}, keys, {OLD: "2026-11-24"})  # a backup from before was restored
    assert (same.active, same.adopt) == (OLD, False)


def test_a_fleet_that_was_rotated_is_followed_before_the_configuration_is_changed() -> None:
    """The master key is the old one, rotated out; the active one stands in next_master_keys."""
    coming = named(NEW, "next_master_keys entry 1 /k", COMING)
    other = named(THIRD, "next_master_keys.old entry 1 /k", PREVIOUS)  # a role is no matter of words
    keys = configured(key(OLD), other, coming)
    assert keys.coming == {NEW: coming.source} and keys.kek_ids == {OLD, NEW, THIRD}
    found = plan((NEW, 2), {NEW: count(5)}, keys, {OLD: "2026-11-24T10:00:00Z"})
    assert (found.active, found.version, found.adopt) == (NEW, 2, False)
    assert "let next_master_keys entry 1 /k be the master key" in found.notice
    before = plan((OLD, 1), {OLD: count(5)}, keys, {})
    assert (before.active, before.adopt, before.notice) == (OLD, False, "")


def test_missing_keks_may_be_allowed_but_never_the_active_one() -> None:
    keys = configured(key(OLD), allow_missing_keks=True)
    found = plan((OLD, 1), {OLD: count(5), THIRD: count(2)}, keys, {})
    assert found.active == OLD and THIRD in found.notice and "2 DEKs" in found.notice
    with pytest.raises(KeyMismatch, match="the store's active KEK"):
        plan((NEW, 1), {OLD: count(5)}, keys, {})
