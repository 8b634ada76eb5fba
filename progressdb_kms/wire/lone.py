"""How to wait for the next request of a connection that is alone in the daemon.

To be woken is half of a lone call where a core that has nothing to do is halted. To look without sleeping
until it comes costs a core, and takes longer where that core is wanted, or is the other half of the peer's.
No number tells which it is, so it is tried: of ROUND waits the first TRIAL look, as many sleep, and the rest
do what was clearly quicker. Nobody looks for longer than SPIN.
"""

from __future__ import annotations

SPIN = 0.0002
"""Seconds to look for the next request before sleeping."""

TRIAL, ROUND = 64, 4096
"""Waits."""

CLEARLY = 0.9
"""Of the time that sleeping took: what costs a core must pay."""

LONGEST = 5 * SPIN
"""Seconds that a wait counts for at most: who is idle tells nothing of what is quicker."""


class Lone:
    """`spins`: look before the next wait?"""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.spins = True
        self._waits = 0
        self._looked = self._slept = 0.0

    def waited(self, seconds: float) -> None:
        """So long until something came."""
        self._waits += 1
        if self._waits <= TRIAL:
            self._looked += min(seconds, LONGEST)
            self.spins = self._waits < TRIAL
        elif self._waits <= 2 * TRIAL:
            self._slept += min(seconds, LONGEST)
            self.spins = self._waits == 2 * TRIAL and self._looked < CLEARLY * self._slept
        elif self._waits >= ROUND:
            self._begin()
