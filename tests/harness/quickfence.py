"""Daemons of a fleet with a shorter `fence_seconds` than may be configured, for tests that wait for it; and
without one of the safeguards, for those that must find that out.

    make_daemon(fleet_database.configured(fence_seconds=2), command=QUICK)
"""

from __future__ import annotations

import sys

PROGRAM = """
import sys
from progressdb_kms.fleet import settings
settings.FENCE_SECONDS = 60.0, 1.0, 3600.0
{}
from progressdb_kms.__main__ import main
sys.exit(main())
"""

WITHOUT = {
    "barrier": "from progressdb_kms.fleet import barrier; barrier.everywhere = lambda *args: True",
    "lease": "from progressdb_kms.fleet.board import Board; Board.serves = lambda *args: True",
}


def quick(without: str = "") -> tuple[str, ...]:
    """The command that starts such a daemon."""
    return sys.executable, "-c", PROGRAM.format(WITHOUT.get(without, ""))


QUICK = quick()
