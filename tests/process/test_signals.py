"""Signals are waited for: one that was sent is never lost, and one that was not is never taken for one."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.harness import REPO

STOPPED = """
import os, signal, sys, time
from progressdb_kms.process.signals import Signals

signals, noted = Signals(), []
note, signals._note = signals._note, lambda number: (noted.append(number), note(number))
for _ in range(5):
    waiting = os.getpid()
    if not os.fork():
        time.sleep(0.1)
        os.kill(waiting, signal.SIGSTOP)
        time.sleep(0.4)
        if len(sys.argv) > 1:
            os.kill(waiting, int(sys.argv[1]))
        os.kill(waiting, signal.SIGCONT)
        os._exit(0)
    begun = time.monotonic()
    while time.monotonic() < begun + 0.3:
        signals.wait(0.3)
    os.wait()
print(sorted({*noted} - {signal.SIGCHLD, signal.SIGALRM}), signals.stop, signals.hangup)
"""


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ([], "[] False False"),
        ([signal.SIGHUP], f"[{signal.SIGHUP!r}] False True"),
        ([signal.SIGTERM], f"[{signal.SIGTERM!r}] True False"),
    ],
    ids=["nothing", "SIGHUP", "SIGTERM"],
)
def test_stopped_past_the_end_of_a_wait(sent: list[int], told: str) -> None:
    """A worker ended because its debugger, or the freezer of a suspended machine, had let go of it."""
    words = [sys.executable, "-c", STOPPED, *(str(int(number)) for number in sent)]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (told, "")


def test_a_wait_ends_by_itself_and_by_what_was_sent_before() -> None:
    script = "from progressdb_kms.process.signals import *; s = Signals(); s.wait(0.2); print(s.stop); "
    script += "os.kill(os.getpid(), signal.SIGTERM); s.wait(600); print(s.stop)"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["False", "True"], "")
