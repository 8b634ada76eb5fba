"""The numbers that the manual names are those that the program has; that it keeps to them other tests try."""

from __future__ import annotations

import inspect
import re

import pytest

from progressdb_kms import journal
from progressdb_kms.audit import shared
from progressdb_kms.config import options, values, weakkeys
from progressdb_kms.crypto import envelope
from progressdb_kms.encoding import MAX_THREAD_ID
from progressdb_kms.fleet import lease
from progressdb_kms.process import supervisor, worker
from progressdb_kms.service import anchors, clock, metrics, shredding
from progressdb_kms.service.service import Service
from progressdb_kms.store import snapshots
from progressdb_kms.tools.manual import text_of
from progressdb_kms.wire import admission, call, fields, http1, pace, sending, server, slab
from progressdb_kms.wire.receiving import INLINE, INLINE_ITEMS
from tests.harness import REPO

UNITS = REPO / "packaging" / "systemd"


def of_unit(name: str, pattern: str) -> int:
    (found,) = re.findall(pattern, (UNITS / name).read_text())
    return int(found)


WATCHDOG = of_unit("progressdb-kms.service", r"(?m)^WatchdogSec=(\d+)s$")
KEPT = of_unit("progressdb-kms-backup.service", r"--keep (\d+)")
SCRAPED = of_unit("progressdb-kms-metrics.timer", r"(?m)^OnUnitInactiveSec=(\d+)s$")


def has(path: str, *lines: str) -> bool:
    """Are these lines of the module? It is not imported: psycopg may not be here."""
    text = (REPO / "progressdb_kms" / f"{path}.py").read_text()
    return all(f"\n{line}\n" in text for line in lines)


OFF = (clock.BACK, clock.AHEAD) == (300, 7 * 86400)
HANGS = supervisor.STALE_SECONDS + WATCHDOG <= 60
PATIENCE = inspect.signature(Service.change).parameters["timeout"].default

SAID: list[tuple[str, str, bool]] = [
    ("api", f"up to {fields.MAX_ITEMS:,} as for encrypt", True),
    ("api", f"`limit` 1 to {call.MAX_PAGE:,} (default {call.DEFAULT_PAGE})", True),
    ("api", f"a `thread_id` 1 to {MAX_THREAD_ID} characters, none of them a control character", True),
    ("api", f"more than {INLINE_ITEMS} items or {INLINE >> 10} KiB are worked on beside", True),
    ("api", "bodies and answers of more than 64 KiB", INLINE == sending.LARGE == 64 << 10),
    ("decisions", "one piece of 64 KiB at a time", http1.PIECE == 64 << 10),
    ("api", "they get at most a quarter of the time, and rest", pace.REST == 3 and pace.RECENT == 1),
    ("api", f"where {server.AT_ONCE} such wait at a worker already, a second later", True),
    ("api", "counted, by each worker: a record a minute and at the end", admission.EACH == 60),
    ("api", "hand over twice a second", worker.ANCHOR_SECONDS == 0.5),
    ("configuration", f"At most {options.MAX_SOCKET_PATH} bytes", True),
    ("configuration", f"one for each core that this process may use, at most {options.MAX_WORKERS}", True),
    ("configuration", f"may move to, at most {values.MAX_NEXT},", True),
    ("configuration", f"at most {values.MAX_PREVIOUS}", True),
    ("configuration", f"fewer than {weakkeys.MIN_DISTINCT} distinct bytes", True),
    ("configuration", "as much as three bodies of full length", admission.BODIES == 3),
    ("configuration", "is connected, or tried within the last minute", metrics.SECONDS == 60),
    ("runbook", f"the oldest beyond {KEPT} go", True),
    ("runbook", "more than 5 minutes behind it or more than 7 days ahead", OFF),
    ("runbook", "after 5 s at first and every minute in the end", shredding.ERASE_PAUSES == (5, 60)),
    ("runbook", f"A rotation of up to {snapshots.SMALL:,} DEKs needs an inode a DEK", True),
    ("runbook", "a keeper that was killed meanwhile: half a minute", supervisor.KEEPER_PAUSES[1] == 30),
    ("troubleshooting", f"a change is told so after {PATIENCE:g} s", True),
    ("troubleshooting", "restarts the daemon after a minute at most", HANGS),
    ("troubleshooting", "shreds that are due for more than a minute", journal.OVERDUE_SECONDS == 60),
    ("install", f"within a minute (the journal names it after {supervisor.STALE_SECONDS:g} s", HANGS),
    ("monitoring", f"every {SCRAPED} s, whole or not at all", True),
    ("threats", "once an hour and at a stop", anchors.WITNESS_SECONDS == 3600),
    ("secrets", f"{envelope.SCRATCH_SIZE} bytes of locked scratch", True),
    ("secrets", f"{slab.ANSWER} locked bytes", True),
    ("secrets", f"at most {http1.REMEMBERED} bytes are remembered, up to {http1.KNOWN:,} a worker", True),
    ("commands", f"a log of more than {shared.LEAST >> 20} MiB is shared among the cores", True),
    ("commands", "eight at most", shared.MOST == 8),
    ("fleet", "then one in 15 minutes", has("service/fleetawait", "REMIND_SECONDS = 900.0")),
    ("fleet", "it asks again and again for ten minutes", has("service/fleetrotation", "PATIENCE = 600.0")),
    ("fleet", "the first of them after some 15 s",
        has("fleet/engine", "CONNECT_SECONDS = 5", "ANSWER_SECONDS = 10.0")),
    ("fleet", "Default 60, from 10 to 3600", has("fleet/settings", "FENCE_SECONDS = 60.0, 10.0, 3600.0")),
    ("fleet", "`HOST:PORT`, up to 16", has("fleet/settings", "MAX_HOSTS = 16")),
    ("fleet", "`fence_seconds` less a twentieth after it", lease.margin(60) == 3),
    ("fleet", "four fit into that time", lease.BEATS == 4),
    ("monitoring", "of the engine is at most 10 s old", has("service/fleetkeeper", "SURVEY_SECONDS = 10.0")),
]  # fmt: skip
"""The page, its words, and what must hold of the program where the words don't name its number."""


@pytest.mark.parametrize(("page", "words", "holds"), SAID, ids=lambda value: str(value)[:60])
def test_the_words_of_the_page_are_the_program_s(page: str, words: str, holds: bool) -> None:
    assert holds
    assert words in " ".join(text_of(page).split())
