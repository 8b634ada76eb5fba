"""Counters that all processes share: one block of 64-bit words a process, summed when they are read.

Each word has one writer, so that no lock is shared and a scrape slows nobody: the process whose block it is;
of `starts` the supervisor, who also clears what a dead one held. Within a process a lock keeps the threads
apart. Two processes that look at a sum at the same moment may both say yes: a limit is passed by one of each
then, never by more. Nothing secret lives here.
"""

from __future__ import annotations

import mmap
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..config.values import MAX_POLICIES
from ..rules import BATCHES, OPERATIONS

OPS = (*sorted((*OPERATIONS, *BATCHES)), "service")
"""Operations as they are counted; `service` is health, status, metrics and whatever has no route."""

BUCKETS = (25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 100e-3, 1.0, 10.0)
"""Upper bounds of the latency histogram in seconds; one more counts what is slower."""

CLASSES = ("2xx", "4xx", "5xx")

_GAUGES = (
    "connections", "audit_lines", "items", "starts", "refused_connections", "beats", "embedded_messages",
    "body_bytes", "threads", "open_files", "policy_denials", "refused_peers", "short_requests_of",
)  # fmt: skip
_PER_CLASS = len(BUCKETS) + 1
_PER_OP = len(CLASSES) * _PER_CLASS + 1
"""A histogram for each class of status, whose sum is how many there were; then the sum of latencies in ns."""

UIDS = 64
"""UIDs whose connections a process counts one by one; what others hold is counted in one more row."""

OTHERS = 2**32 - 1
"""Stands for them: (uid_t)-1 is nobody."""

SECONDS = 60
"""So long a UID counts as here after it connected last."""

_HELD = ("connections", "beats", "body_bytes", "threads", "open_files", "short_requests_of")
"""Gauges of what a process holds: nothing, once it is dead."""

_TABLE = len(_GAUGES) + len(OPS) * _PER_OP
_ROW = 4
_RATES = _TABLE + (UIDS + 1) * _ROW
"""From here on, of each policy: the monotonic second in which something was done under it last, and how much
in that."""

_BLOCK = _RATES + MAX_POLICIES * 2

_OP_INDEX = {op: len(_GAUGES) + i * _PER_OP for i, op in enumerate(OPS)}
_GAUGE_INDEX = {name: i for i, name in enumerate(_GAUGES)}
_CLASS_INDEX = {2: 0, 4: _PER_CLASS, 5: 2 * _PER_CLASS}


class Holding(NamedTuple):
    """A row of a process's table. `last`: the monotonic second in which this UID connected last, or tried."""

    uid: int
    connections: int
    last: int
    body_bytes: int


class Metrics:
    """The shared blocks of `processes` processes, made before they fork."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._map = mmap.mmap(-1, max(1, processes) * _BLOCK * 8)
        self._words = memoryview(self._map).cast("Q")

    def block(self, index: int) -> Block:
        return Block(self._words, index)

    def gauge(self, name: str) -> list[int]:
        """The value in each process."""
        return [self._words[i * _BLOCK + _GAUGE_INDEX[name]] for i in range(self.processes)]

    def holdings(self) -> Iterator[Holding]:
        """What each UID holds in each process. A UID may come several times."""
        for first in range(_TABLE, len(self._words), _BLOCK):
            for at in range(first, first + _RATES - _TABLE, _ROW):
                name = self._words[at]
                if not name:
                    break
                yield Holding(name - 1, *self._words[at + 1 : at + _ROW])

    def _sum(self, *offsets: int) -> int:
        return sum(self._words[i * _BLOCK + offset] for i in range(self.processes) for offset in offsets)

    def render(self, extra: Sequence[tuple[str, str, str, Sequence[tuple[str, float]]]]) -> str:
        """Prometheus text format 0.0.4. `extra`: (name, type, help, [(labels, value)]) of the service."""
        lines: list[str] = []

        def family(name: str, kind: str, text: str) -> str:
            full = "progressdb_kms_" + name
            lines.extend((f"# HELP {full} {text}", f"# TYPE {full} {kind}"))
            return full

        name = family("requests_total", "counter", "Requests answered, by operation and class of status.")
        for op, at in _OP_INDEX.items():
            for i, c in enumerate(CLASSES):
                count = self._sum(*range(at + i * _PER_CLASS, at + (i + 1) * _PER_CLASS))
                lines.append(f'{name}{{op="{op}",status="{c}"}} {count}')
        name = family("request_seconds", "histogram", "Time from the whole request to the answer.")
        for op, at in _OP_INDEX.items():
            total, end = 0, at + _PER_OP - 1
            for i, bound in enumerate((*map("{:g}".format, BUCKETS), "+Inf")):
                total += self._sum(*range(at + i, end, _PER_CLASS))
                lines.append(f'{name}_bucket{{op="{op}",le="{bound}"}} {total}')
            lines.append(f'{name}_sum{{op="{op}"}} {self._sum(end) / 1e9:.9f}')
            lines.append(f'{name}_count{{op="{op}"}} {total}')
        for name, kind, text, samples in extra:
            full = family(name, kind, text)
            lines += [f"{full}{labels} {_number(value)}" for labels, value in samples]
        return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """A count to its last digit."""
    return f"{value:d}" if isinstance(value, int) else f"{value:g}"


class Block:
    """One process's counters."""

    def __init__(self, words: memoryview, index: int) -> None:
        self._words = words[index * _BLOCK : (index + 1) * _BLOCK]
        self._rates = [words[first : first + MAX_POLICIES * 2] for first in range(_RATES, len(words), _BLOCK)]
        self._lock = threading.Lock()

    def request(self, op: str, status: int, seconds: float) -> None:
        words, at = self._words, _OP_INDEX[op]
        count = at + _CLASS_INDEX.get(status // 100, 2 * _PER_CLASS) + bisect_left(BUCKETS, seconds)
        with self._lock:
            words[count] += 1
            words[at + _PER_OP - 1] += int(seconds * 1e9)

    def add(self, gauge: str, amount: int) -> None:
        with self._lock:
            self._words[_GAUGE_INDEX[gauge]] += amount

    def set(self, gauge: str, value: int) -> None:
        self._words[_GAUGE_INDEX[gauge]] = value

    def get(self, gauge: str) -> int:
        return int(self._words[_GAUGE_INDEX[gauge]])

    def clear(self) -> None:
        """Whoever wrote here is dead, and holds nothing any more."""
        for gauge in _HELD:
            self._words[_GAUGE_INDEX[gauge]] = 0
        self._words[_TABLE:_RATES] = memoryview(bytes(8 * (_RATES - _TABLE))).cast("Q")

    def connected(self, uid: int, second: int) -> int:
        """One connection more; returns its row's place. Past UIDS of them the last row is all others'."""
        words = self._words
        for at in range(_TABLE, _RATES - _ROW, _ROW):
            if words[at] in (0, uid + 1) or not words[at + 1] and words[at + 2] + SECONDS < second:
                break
        else:
            at, uid = _RATES - _ROW, OTHERS
        words[at] = uid + 1
        words[at + 1] += 1
        words[at + 2] = second
        return at

    def disconnected(self, row: int) -> None:
        self._words[row + 1] -= 1

    def hold(self, row: int, size: int) -> None:
        """So many bytes of bodies more; `row` -1: for one that is turned away."""
        self.add("body_bytes", size)
        if row >= 0:
            self._words[row + 3] += size

    def spend(self, number: int, count: int, limit: int) -> int:
        """How many of `count` may be done in this second under the policy of this number."""
        at, second = 2 * (number - 1), int(time.monotonic())
        own = self._words[_RATES:]
        with self._lock:
            if own[at] != second:
                own[at + 1] = 0
                own[at] = second
            done = sum(rates[at + 1] for rates in self._rates if rates[at] == second)
            granted = max(0, min(count, limit - done))
            own[at + 1] += granted
        return granted
