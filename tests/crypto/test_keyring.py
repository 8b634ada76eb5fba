"""The shared region of KEKs: what readers see while the keeper changes it."""

from __future__ import annotations

import os

import pytest

from progressdb_kms.crypto import keyring
from progressdb_kms.crypto.keyring import (
    REGION_SIZE,
    SLOTS,
    KekNotLoaded,
    Keyring,
    KeyringChanged,
    fingerprint,
)
from progressdb_kms.errors import Conflict


def secret() -> memoryview:
    return memoryview(bytearray(os.urandom(32)))


@pytest.fixture
def region() -> memoryview:
    return memoryview(bytearray(REGION_SIZE))


@pytest.fixture
def ring(region: memoryview) -> Keyring:
    return Keyring(region)


def test_an_empty_one(ring: Keyring) -> None:
    assert ring.kek_ids() == [] and ring.generation == 0
    with pytest.raises(KekNotLoaded):
        _ = ring.active
    with pytest.raises(KekNotLoaded, match="ff"):
        ring.borrow("ff" * 8)


def test_what_was_installed_is_lent_in_place(ring: Keyring, region: memoryview) -> None:
    key = secret()
    kek_id = ring.install(key, 7)
    assert kek_id == fingerprint(key)
    with ring.borrow(kek_id) as lent:
        assert lent == key and lent.obj is region.obj
    ring.activate(kek_id, 8)
    assert ring.active == (kek_id, 8) and ring.generation == 1


def test_twice_is_once(ring: Keyring) -> None:
    key = secret()
    assert ring.install(key, 1) == ring.install(key, 2)
    assert len(ring.kek_ids()) == 1


def test_all_processes_see_the_same(ring: Keyring, region: memoryview) -> None:
    other = Keyring(region)
    kek_id = ring.install(secret(), 1)
    ring.activate(kek_id, 1)
    assert other.active == ring.active
    with other.borrow(kek_id):
        pass
    second = ring.install(secret(), 2)
    ring.activate(second, 2)
    ring.remove(kek_id)
    with pytest.raises(KekNotLoaded):
        other.borrow(kek_id)
    assert other.active.kek_id == second and other.generation == 2


def test_removed_is_wiped(ring: Keyring, region: memoryview) -> None:
    keys = [secret(), secret()]
    first, second = (ring.install(key, 1) for key in keys)
    ring.activate(second, 2)
    ring.remove(first)
    assert bytes(keys[0]) not in bytes(region) and bytes(keys[1]) in bytes(region)
    with pytest.raises(ValueError, match="active"):
        ring.remove(second)


def test_what_must_be_seen_first_stands_before_a_fence(
    ring: Keyring, region: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On ARM another core may see stores in any order but over a fence: the name comes after the key, and
    goes before it; who holds an old loan sees the stamp before either."""
    old = ring.install(secret(), 1)
    ring.activate(old, 1)
    key, seen = secret(), []
    start = keyring._HEADER + keyring._SLOT  # of the second slot
    stamp, name, place = (slice(start + at, start + at + size) for at, size in ((0, 8), (8, 8), (32, 32)))
    before = bytes(region[stamp])

    def fence() -> None:
        seen.append((bytes(region[stamp]) != before, any(region[name]), bytes(region[place]) == bytes(key)))

    monkeypatch.setattr(keyring, "_fence", fence)
    kek_id = ring.install(key, 2)
    assert seen == [(True, False, False), (True, False, True)] and any(region[name])
    before = bytes(region[stamp])
    ring.remove(kek_id)
    assert seen[2:] == [(True, False, True)] and not any(region[place])


@pytest.mark.parametrize("moment", ["before the loan", "during the loan"])
def test_a_key_that_goes_while_it_is_lent(ring: Keyring, moment: str) -> None:
    first, second = ring.install(secret(), 1), ring.install(secret(), 2)
    ring.activate(second, 2)
    loan = ring.borrow(first)
    with pytest.raises(KeyringChanged):
        if moment == "before the loan":
            ring.remove(first)
        with loan:
            ring.remove(first)


def test_another_key_in_the_same_slot_is_noticed(ring: Keyring, region: memoryview) -> None:
    """Its kek_id is what a reader holds: the stamp tells that the slot was used again in between."""
    key = secret()
    first, second = ring.install(key, 1), ring.install(secret(), 2)
    ring.activate(second, 2)
    with pytest.raises(KeyringChanged), ring.borrow(first):
        ring.remove(first)
        assert ring.install(key, 1) == first  # the very same again, in the same place


def test_an_error_inside_is_not_hidden_by_a_good_key(ring: Keyring) -> None:
    kek_id = ring.install(secret(), 1)
    with pytest.raises(LookupError), ring.borrow(kek_id):
        raise LookupError


def test_a_full_one(ring: Keyring) -> None:
    for _ in range(SLOTS):
        ring.install(secret(), 1)
    with pytest.raises(Conflict, match=str(SLOTS)):
        ring.install(secret(), 1)


def test_a_region_that_is_too_small() -> None:
    with pytest.raises(ValueError, match=str(REGION_SIZE)):
        Keyring(memoryview(bytearray(REGION_SIZE - 8)))


def test_nothing_of_a_key_is_shown(ring: Keyring) -> None:
    key = secret()
    ring.install(key, 1)
    assert bytes(key).hex() not in repr(ring)
