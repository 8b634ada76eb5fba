"""Key_ids that begin with given characters: where in the order of all of them these begin.

The API lists DEKs in order of key_id behind a cursor, which is a key_id itself. So the DEKs of a prefix, of
which a shell wants some while a person types, are one page, however many others there are.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator

from ..client import Client, Dek
from ..encoding import KEY_ID

LONGEST = 128

_FIRST = "".join(sorted(string.ascii_letters + string.digits))
_OTHERS = "".join(sorted(_FIRST + "-.:_"))


def before(prefix: str) -> str | None:
    """A cursor: no key_id behind it is less than those that begin so, and all of these are behind it. None
    where no key_id begins so."""
    if not KEY_ID.fullmatch(prefix):
        return None
    stem, known = prefix[:-1], _OTHERS if len(prefix) > 1 else _FIRST
    at = known.index(prefix[-1])
    return (stem + known[at - 1]).ljust(LONGEST, _OTHERS[-1]) if at else stem


def beginning(
    kms: Client, prefix: str, thread_id: str | None, page_size: int, unused_for: int | None = None
) -> Iterator[Dek]:
    """The DEKs of a prefix, in order."""
    cursor = before(prefix) if prefix else ""
    if cursor is None:
        return iter(())
    found = kms.list(thread_id, page_size, cursor, unused_for)
    return itertools.takewhile(lambda dek: dek.key_id.startswith(prefix), found)
