"""Signals, which are waited for and never handled."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress

END = signal.SIGUSR1
"""The supervisor's word to a child. Not SIGTERM, which `timeout` or a container's manager may send to the
whole group: then the keeper would be gone before the workers have answered."""

ENDING = frozenset((signal.SIGTERM, signal.SIGINT))
NOTICED = ENDING | {signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM, END}


class Signals:
    """SIGTERM, SIGINT and SIGHUP, as flags; SIGCHLD ends a wait.

    They are waited for and never handled: a handler's frame on the stack gets all registers of the thread,
    and round keys stay in the wide ones long after a cipher is done.

    A child leaves SIGTERM and SIGINT alone: the supervisor ends all in order, by END.
    """

    def __init__(self, child: bool = False) -> None:
        self.stop = False
        self.hangup = False
        left_alone = ENDING if child else {END}
        self._awaited = NOTICED - left_alone - {signal.SIGALRM}
        for number in NOTICED:  # whatever our parent did with it
            signal.signal(number, signal.SIG_IGN if number in left_alone else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, NOTICED)  # threads that are started from now on inherit it

    def wait(self, seconds: float) -> bool:
        """Until a signal comes, but no longer than this; now and then less, by an alarm of the wait before.
        Is it time to end?

        Not by sigtimedwait: in a process that was stopped, frozen or traced until its time was over, Python's
        returns a record that nobody has filled in, with a number of any signal: that of SIGTERM, perhaps."""
        signal.setitimer(signal.ITIMER_REAL, seconds)
        number = signal.sigwait(self._awaited | {signal.SIGALRM})
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._note(number)
        return self.stop

    def take_hangup(self) -> bool:
        taken, self.hangup = self.hangup, False
        return taken

    def _note(self, number: int) -> None:
        if number in ENDING | {END}:
            self.stop = True
        elif number == signal.SIGHUP:
            self.hangup = True


class SignalPipe(Signals):
    """For a loop that waits for more than signals: a thread waits for them, and `fd` becomes readable."""

    def __init__(self, child: bool = False) -> None:
        super().__init__(child)
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def clear(self) -> None:
        """Empty the descriptor; the flags stay."""
        with suppress(BlockingIOError):
            while os.read(self.fd, 512):
                pass

    def _listen(self) -> None:
        while True:
            self._note(signal.sigwait(self._awaited))
            with suppress(BlockingIOError):  # it is readable already
                os.write(self._write, b"\0")
