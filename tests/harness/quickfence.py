"""Daemons of a fleet with a shorter `fence_seconds` than may be configured: for tests that wait for it.

make_daemon(fleet_database.configured(fence_seconds=2), command=QUICK)
"""

from __future__ import annotations

import sys

PROGRAM = """
import sys
from progressdb_kms.fleet import settings
settings.FENCE_SECONDS = 60.0, 1.0, 3600.0
from progressdb_kms.__main__ import main
sys.exit(main())
"""

QUICK = (sys.executable, "-c", PROGRAM)
