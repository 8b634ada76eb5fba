"""Keys that are no secret, or were not drawn at random: no KEK, and no DEK of a caller's."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from ..crypto.memory import wipe
from ..errors import WeakKey
from .keysource import KEY_SIZE

AT_RANDOM = "a key is 32 bytes that were drawn at random"

PUBLISHED_KEYS: Sequence[bytes] = tuple(
    map(
        bytes.fromhex,
        (
            "00112233445566778899aabbccddeeff" * 2,
            "f3c9a7df8b0e52c4a14ea2d0b38ef615f739482decdb0e8c7701435a4bfd98c2",
            "60324e8965b4ee7188d2cc0dfcb7928d53851aa8fcd1044884e30c9af28413c1",
            "0123456789abcdef" * 4,
            "b748dbd094c8da033bb830f52963c051f2c41387c27c89bcf507736da944f337",
            "d899a1b62c16e8a97f804f8c317c8c09eb758d2e231a4faf63dc882bc5f5ec3f",
            "a7e484d3f2ab9e1058c47dae6b9c1f2afb123b02c4de98ae7f615c099d5c621f",
            "f721ff8758c05e78b9361cff8d13e738d1e5069cf4ff03b7cbc9bf5fce0e3341",
            "f45cc3ba20183ed884dbc639f018f66fd5112792c7d07987ac1084c867441367",
            "7d2d7bd0f14a52e270b5cf39821c68eea09bcc50809d670a9ee27a6f49fd0160",
            "64fbe498eb2a2cea151e4491941b4de9c5a309852660c4979cf32a199bb7baf7",
        ),
    )
)
"""Keys of sample files, scripts and tests of ProgressDB's repository: whoever copied one has the key that
everybody has. As previous keys they open: to move away from one is what that is for."""

MIN_DISTINCT = 8
"""Fewest distinct bytes. 32 random bytes have about 30; fewer than 8 come once in 10**27 keys."""


def check_master_key(key: memoryview, place: str = "it") -> None:
    """Raises WeakKey for a key that is no secret or was not drawn at random. The message begins with `place`.

    Compares in place and in constant time, and makes no copy.
    """
    if len(key) != KEY_SIZE:
        raise WeakKey(f"{place} has {len(key)} bytes instead of {KEY_SIZE}", hint=AT_RANDOM)
    for published in PUBLISHED_KEYS:
        if hmac.compare_digest(key, published):
            why = "is published in a file of ProgressDB, so everybody knows it"
            raise WeakKey(f"{place} {why}", hint=AT_RANDOM)
    seen = bytearray(256)
    for byte in key:
        seen[byte] = 1
    distinct = sum(seen)
    with memoryview(seen) as view:
        wipe(view)
    if distinct < MIN_DISTINCT:
        why = f"has fewer than {MIN_DISTINCT} distinct bytes: it was not drawn at random"
        raise WeakKey(f"{place} {why}", hint=AT_RANDOM)
