"""The KEKs of the service, in one locked region that all of its processes share.

    header:  generation u64 | active slot u64 (0 = none) | audit key 32 | change u64 | unused 8 |
             row key 32 | unused 32                                      (128 bytes)
    slots:   stamp u64 | kek_id 8 | version u64 | unused 8 | key 32      (64 bytes each)

Rules:

- One process writes (the keeper; before it, the supervisor); any may read. No lock is shared between
  processes, because a process killed while it holds one would stop all others.
- `generation` grows with every change that readers must see: another active KEK, a rewrap, a disable,
  a shred. What a reader remembers is good for the generation in which it was read, and no longer.
- `change` is the number of the last change of the store that is on disk. Every audit record carries it.
- A slot's `stamp` grows before its key is written or wiped, and its kek_id is the first thing to go and
  the last to come. `borrow` compares both before and after: work that ran while the key changed under
  it raises KeyringChanged, and the caller does it again. So no result of a half-wiped key ever leaves.

Memory model. A word is written by one aligned store of 8 bytes: nobody sees half of it. x86 keeps the order
of stores, and that of loads. ARM keeps neither by itself, so:

- Where one store must be seen before another, the writer stands at `_fence` between them.
- A reader's looks and its cipher are thousands of instructions apart, and a core reorders loads within some
  hundreds. That is distance, and no guarantee by the letter; a fence for each loan would cost more than the
  cipher. Should it ever fail, a DEK does not open (its tag), and the caller asks again; what the store keeps
  is wrapped by the writer itself, and a rotation opens again whatever it wrapped.
- Who was told that a change is made finds it made: the answer's way through a socket orders memory.
"""

from __future__ import annotations

import select
import sys
from typing import NamedTuple

from ..errors import Conflict, Unavailable
from .aead import KEY_SIZE, mac
from .memory import wipe

_HEADER = 128
_GENERATION, _ACTIVE, _CHANGE = 0, 1, 6  # words of the header
_SLOT = 64
_NAME, _VERSION = 1, 2  # words of a slot, behind its stamp
_KEY = 32  # offset of the key in its slot
SLOTS = 126
REGION_SIZE = _HEADER + SLOTS * _SLOT  # 8,192 bytes: two pages

FINGERPRINT_LABEL = b"progressdb-kms kek_id v1"


class KeyringChanged(Exception):
    """The key was replaced while it was in use: do the work again."""


class KekNotLoaded(Unavailable):
    """503: the keyring holds no KEK of this id."""

    default_code = "kek_not_loaded"
    default_hint = "add it to previous_master_keys"

    def __init__(self, kek_id: str) -> None:
        super().__init__(f"the KEK {kek_id} that wraps this DEK is not loaded")
        self.kek_id = kek_id


class Active(NamedTuple):
    """The KEK that wraps new DEKs."""

    kek_id: str
    version: int


def fingerprint(key: memoryview) -> str:
    """The kek_id of a KEK: 16 hex digits, stable, and it tells nothing of the key (HMAC is a PRF)."""
    return mac(key, FINGERPRINT_LABEL)[:8].hex()


def _fence() -> None:
    """What was stored before this is seen before what is stored after it: the interpreter's lock is given
    away (a release) and taken again (an acquire)."""
    select.select((), (), (), 0)


class Keyring:
    """A view on the shared region. Cheap to make; every process has its own."""

    def __init__(self, region: memoryview) -> None:
        if len(region) < REGION_SIZE:
            raise ValueError(f"the keyring's region must have {REGION_SIZE} bytes")
        self._region = region
        self._words = region[:REGION_SIZE].cast("Q")
        self._loans: dict[str, Loan] = {}  # by kek_id: where it was last seen, checked at each use

    # ---- reading -----------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        return self._words[_GENERATION]

    @property
    def audit_key(self) -> memoryview:
        return self._region[16 : 16 + KEY_SIZE]

    @property
    def row_key(self) -> memoryview:
        return self._region[64 : 64 + KEY_SIZE]

    def change(self) -> int:
        return self._words[_CHANGE]

    @property
    def active(self) -> Active:
        """Raises KekNotLoaded while the keyring is empty."""
        while True:
            slot = self._words[_ACTIVE]
            if not slot:
                raise KekNotLoaded("(none)")
            found = Active(self._kek_id(slot), self._words[_word(slot) + _VERSION])
            if self._words[_ACTIVE] == slot and self._used(slot):
                return found

    def kek_ids(self) -> list[str]:
        return [self._kek_id(slot) for slot in range(1, SLOTS + 1) if self._used(slot)]

    def borrow(self, kek_id: str) -> Loan:
        """`with keyring.borrow(kek_id) as key:` the 32 bytes of the KEK, in place.

        Raises KekNotLoaded; on leaving, KeyringChanged where the slot changed meanwhile.
        """
        loan = self._loans.get(kek_id)
        if loan is None or not loan.good():
            loan = self._loan(kek_id)
        return loan

    # ---- writing: the keeper only -----------------------------------------------------------------

    def install(self, key: memoryview, version: int = 0, spare: int = 0) -> str:
        """Copy a KEK into a free slot, or find it there already. Returns its kek_id: that of the copy, since
        what is shown here may change under our eyes. Raises Conflict where no more than `spare` are free."""
        free = [slot for slot in range(1, SLOTS + 1) if not self._used(slot)]
        if len(free) <= spare:
            if (kek_id := fingerprint(key)) in self.kek_ids():
                return kek_id
            raise Conflict(
                f"the keyring holds {SLOTS - spare} KEKs already",
                code="keyring_full",
                hint="`rotate-kek` moves all DEKs to one, and a restart leaves the others out",
            )
        word, place = _word(free[0]), self._place(free[0])
        self._words[word] += 1
        self._words[word + _VERSION] = version
        _fence()
        place[:] = key
        kek_id = fingerprint(place)
        if kek_id in self.kek_ids():
            wipe(place)
        else:
            _fence()
            self._words[word + _NAME] = _name(kek_id)  # last: from now on it is found
        return kek_id

    def activate(self, kek_id: str, version: int) -> None:
        """Let this KEK wrap new DEKs from now on."""
        slot = self._find(kek_id)
        self._words[_word(slot) + _VERSION] = version
        _fence()
        self._words[_ACTIVE] = slot
        self.touch()

    def remove(self, kek_id: str) -> None:
        """Wipe a KEK. Whoever is using it right now gets KeyringChanged."""
        slot = self._find(kek_id)
        if self._words[_ACTIVE] == slot:
            raise ValueError("the active KEK can't be removed")
        word = _word(slot)
        self._words[word] += 1
        self._words[word + _NAME] = 0  # first: see Loan
        _fence()
        self._words[word + _VERSION] = 0
        wipe(self._place(slot))
        self._loans.pop(kek_id, None)

    def publish(self, change: int) -> None:
        """This change is on disk."""
        self._words[_CHANGE] = change

    def touch(self) -> None:
        """Tell all processes that what they remember of the store or the keyring is old."""
        self._words[_GENERATION] += 1

    # ---- slots ---------------------------------------------------------------------------------

    def _used(self, slot: int) -> bool:
        return self._words[_word(slot) + _NAME] != 0

    def _kek_id(self, slot: int) -> str:
        return self._words[_word(slot) + _NAME].to_bytes(8, sys.byteorder).hex()

    def _place(self, slot: int) -> memoryview:
        start = _word(slot) * 8 + _KEY
        return self._region[start : start + KEY_SIZE]

    def _find(self, kek_id: str) -> int:
        for slot in range(1, SLOTS + 1):
            if self._used(slot) and self._kek_id(slot) == kek_id:
                return slot
        raise KekNotLoaded(kek_id)

    def _loan(self, kek_id: str) -> Loan:
        slot = self._find(kek_id)
        loan = Loan(self._words, _word(slot), _name(kek_id), self._place(slot))
        if not loan.good():
            raise KeyringChanged  # between the look and now
        self._loans[kek_id] = loan
        return loan


def _word(slot: int) -> int:
    """The index of a slot's stamp; slots count from 1."""
    return (_HEADER + (slot - 1) * _SLOT) // 8


def _name(kek_id: str) -> int:
    """A kek_id as the word that stands in its slot."""
    return int.from_bytes(bytes.fromhex(kek_id), sys.byteorder)


class Loan:
    """A KEK on loan; see Keyring.borrow. It never changes, so that all who borrow this KEK may share one: it
    is good as long as its slot has the stamp that it had before the kek_id was read there. Whether it was
    good is known at the end: nothing that was made before leaves."""

    def __init__(self, words: memoryview, word: int, name: int, key: memoryview) -> None:
        self._words = words
        self._word = word  # index of the slot's stamp; its kek_id is the next word
        self._stamp = words[word]
        self._name = name
        self._key = key

    def good(self) -> bool:
        words, word = self._words, self._word
        return bool(words[word] == self._stamp and words[word + 1] == self._name)

    def __enter__(self) -> memoryview:
        return self._key

    def __exit__(self, kind: object, *rest: object) -> None:
        if not self.good():
            raise KeyringChanged from None
