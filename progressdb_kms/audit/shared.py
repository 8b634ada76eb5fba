"""The reading of a log, shared among processes.

The files are cut into pieces, and the pieces dealt out to processes that are forked for it. Such a process
does what costs: it reads a piece, makes the HMAC of each line, and observes. It can't know how the chains
stood before the piece; so it tells with what line of each chain its piece begins, and with which it ends.
This process has the one machine that knows the chains, and takes the pieces in order: where a piece begins
as the machine expects, it goes on behind the piece, and no line is looked at again. What is not so plain
(a start, a shred, a torn record, an edited line, one that an anchor names) comes back as it stands and goes
through the machine here; and a piece that doesn't fit is read here once more, line by line. So what is found,
and where, is what one process finds.

A process that is forked holds what this one holds, the audit key in its locked pages, and no more. What goes
through the pipes are lines of the log, numbers, and what observers say; no key. It ends with `os._exit`: the
pages are wiped by whoever made them.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Callable, NamedTuple, NoReturn, Protocol, Union, runtime_checkable

from ..disk import regular
from ..encoding import json_dumps
from ..errors import OperatorError
from .chain import SPECIAL, Chain, Report, Verifier, Watch
from .log import RECORD, genuine
from .verify import BLOCK, Blocks, Observer, Reading, TooLong, Unreadable

PIECE = 16 * BLOCK
"""Bytes of a log that are a piece of work: some 10,000 records."""

LEAST = 4 * PIECE
"""Bytes of all files from which on others are asked to help: it takes them 20 ms to be there."""

MOST = 8
"""Processes: more would wait for this one, and for the disk."""

PACKED = 10
"""Bytes of a log that gzip makes one of: to share out files that are packed."""

PIPE = 1 << 20
"""Bytes of answers that may wait for this process, so that none waits for it where all goes well."""


class HelperGone(OperatorError):
    default_code = "helper_gone"


Progress = Callable[[int, int], None]


@runtime_checkable
class Sharing(Protocol):
    """An observer whose work may be done in other processes."""

    def __call__(self, block: bytes, verified: bool) -> None:
        """See `verify.Observer`."""

    def apart(self) -> None:
        """From now on in a process of its own."""

    def piece(self) -> Any:
        """There: what must be told in the order of the log, of what was seen since the last call; as JSON
        takes it."""

    def told_of(self, found: Any) -> None:
        """Here: take it."""

    def rest(self) -> Any:
        """There, at the end: all else."""

    def add(self, rest: Any) -> None:
        """Here: take it."""


class _Unit(NamedTuple):
    """What one process does at a time: a piece of a file, or a packed file as a whole. `stop`: None for the
    end of the file."""

    file: int
    start: int
    stop: int | None
    size: int


Run = Union[str, "tuple[int, list[list[Any]]]"]
"""A line that is not so plain; or so many that are, and of each chain in them (name, seq and prev of the
first; seq, sig and event of the last)."""


# ---- there: a piece ---------------------------------------------------------------------------------


class _Scan(Verifier):
    """Goes through lines without knowing what was before them."""

    def __init__(self, key: memoryview, watch: dict[bytes, Watch]) -> None:
        super().__init__(key, watch, True, Report([]))
        self._runs: list[Run] = []
        self._first: dict[bytes, tuple[int, bytes]] = {}
        self._from = 0

    @property
    def looked(self) -> int:
        """So many lines were not plain."""
        return sum(isinstance(run, str) for run in self._runs)

    def look(self, line: bytes, ended: bool, shaped: bool, block: bytes) -> None:
        if shaped and self._begins_with(line):
            return
        self._cut(self.line - 1)
        self._runs.append(line.decode("latin-1"))
        self._from = self.line

    def _begins_with(self, line: bytes) -> bool:
        record = RECORD.fullmatch(line)
        if record is None or record[5] in SPECIAL or record[2] in self.chains:
            return False
        event, name, digits, prev, _, sig = record.groups()
        seq, watch = int(digits), self.watch.get(name, {})
        if seq in watch or not genuine(self.key, record):
            return False
        chain = self.chains[name] = Chain(name, seq, watch)
        chain.follow(seq, sig, event)
        self._first[name] = (seq, prev)
        return True

    def _cut(self, line: int) -> None:
        """A run ends with this line."""
        if line > self._from:
            self._runs.append((line - self._from, list(self._ends())))
        self._first.clear()
        self.chains.clear()

    def _ends(self) -> Iterator[list[Any]]:
        for name, chain in self.chains.items():
            seq, prev = self._first[name]
            text = (part.decode("latin-1") for part in (name, prev, chain.sig, chain.event))
            yield [next(text), seq, next(text), chain.seq, next(text), next(text)]

    def take(self) -> list[Run]:
        self._cut(self.line)
        runs, self._runs, self._from = self._runs, [], self.line
        return runs


class _Worker:
    """What a process does that was forked for it."""

    def __init__(self, files: Sequence[int], scan: _Scan | None, observe: Sharing | None) -> None:
        self._files = files
        self._scan = scan
        self._observe = observe

    def answers(self, units: Sequence[_Unit]) -> Iterator[dict[str, Any]]:
        if self._observe is not None:
            self._observe.apart()
        for unit in units:
            yield from self._unit(unit)
        yield {"rest": self._observe.rest() if self._observe else None}

    def _unit(self, unit: _Unit) -> Iterator[dict[str, Any]]:
        """An answer for each piece. The last of them tells what this process could not do: `left`, where it
        stopped before a line that is too long, or `error`, why the file can't be read on."""
        file, raw = _opened(self._files[unit.file])
        stop, ended = unit.start, False
        try:
            blocks = Blocks(file, start=unit.start, careful=True)
            while not ended:
                stop += PIECE
                tail = b"".join(map(self._look, blocks.read(stop)))
                ended = blocks.ended or stop == unit.stop
                yield self._answer(ended, at=raw.tell(), tail=tail.decode("latin-1"))
        except Unreadable as error:
            yield self._answer(True, error=str(error))
        except TooLong as found:
            yield self._answer(True, left=found.position)

    def _look(self, block: bytes) -> bytes:
        """Returns what stands behind the last line end, where this is it."""
        whole, looked = block.endswith(b"\n"), 1
        if self._scan is not None and whole:
            before = self._scan.looked
            self._scan.feed(block)
            looked = self._scan.looked - before
        if self._observe is not None:
            self._observe(block, not looked)
        return b"" if whole else block

    def _answer(self, last: bool, **more: Any) -> dict[str, Any]:
        runs = self._scan.take() if self._scan else []
        return {"last": last, "runs": runs, "seen": self._observe.piece() if self._observe else None, **more}


class _Seat(io.RawIOBase):
    """A descriptor that others read too, with a position of its own."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset += os.fstat(self._descriptor).st_size
        self._at = offset + (self._at if whence == os.SEEK_CUR else 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = os.preadv(self._descriptor, [buffer], self._at)
        self._at += size
        return size


def _opened(descriptor: int) -> tuple[BinaryIO, BinaryIO]:
    """As `tail.opened`."""
    raw: Any = io.BufferedReader(_Seat(descriptor), BLOCK)
    return (gzip.GzipFile(fileobj=raw) if _is_packed(descriptor) else raw), raw  # type: ignore[return-value]


def _is_packed(descriptor: int) -> bool:
    return os.pread(descriptor, 2, 0) == b"\x1f\x8b"


# ---- the processes ----------------------------------------------------------------------------------


class _Helper:
    def __init__(self, worker: _Worker, units: Sequence[_Unit], others: Sequence[_Helper]) -> None:
        here, there = os.pipe()
        with contextlib.suppress(OSError, AttributeError):  # a user has so much of pipes; Python 3.10 on
            fcntl.fcntl(there, fcntl.F_SETPIPE_SZ, PIPE)
        self._child = os.fork()
        if not self._child:
            _work(worker.answers(units), there, [here, *(other.fileno() for other in others)])
        os.close(there)
        self._answers = os.fdopen(here, "rb")

    def fileno(self) -> int:
        return self._answers.fileno()

    def answer(self) -> dict[str, Any]:
        """Raises HelperGone."""
        line = self._answers.readline()
        if not line.endswith(b"\n"):
            raise HelperGone(
                "a process that reads the log is gone", hint="is there memory enough? see the kernel's log"
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self._answers.close()
        os.kill(self._child, signal.SIGKILL)  # it holds nothing that must be put in order
        os.waitpid(self._child, 0)


def _work(answers: Iterator[dict[str, Any]], there: int, others: Sequence[int]) -> NoReturn:
    """It leaves nothing to do for whoever forked it: no file is flushed twice, no key wiped too early."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is asked to end ends this one
        for other in others:
            os.close(other)
        file = os.fdopen(there, "wb")  # noqa: SIM115  # its end is heard, so it comes when all is said
        for answer in answers:
            file.write(json_dumps(answer).encode() + b"\n")
            file.flush()
        os._exit(0)
    except BrokenPipeError:
        os._exit(1)  # nobody listens any more
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


# ---- here -------------------------------------------------------------------------------------------


def join(machine: Verifier, runs: Sequence[Any]) -> bool:
    """Take a piece. False: it doesn't fit, from `machine.line` on; line by line it will turn out why."""
    for run in runs:
        if isinstance(run, str):
            if not machine.chains:  # it would ask for what stands around it
                return False
            machine.feed(run.encode("latin-1") + b"\n")
        elif not _continues(machine, *run):
            return False
    return True


def _continues(machine: Verifier, lines: int, ends: Sequence[Sequence[Any]]) -> bool:
    for name, seq, prev, *_ in ends:
        chain = machine.chains.get(name.encode())
        if chain is None:
            fits = (seq == 1) == (prev == "") and (seq == 1 or machine.partial)
        else:
            fits = (seq, prev.encode()) == (chain.seq + 1, chain.sig)
        if not fits:
            return False
    for name, first, _, *last in ends:
        key, (seq, sig, event) = name.encode(), last
        if key not in machine.chains:
            machine.chains[key] = Chain(key, first, machine.watch.setdefault(key, {}))
        machine.chains[key].follow(seq, sig.encode(), event.encode("latin-1"))
    machine.line += lines
    return True


class Shared(Reading):
    """As Reading, by several processes where there is enough to read."""

    def __init__(self, report: Report, progress: Progress | None, processes: int = MOST) -> None:
        super().__init__(report, progress)
        self._processes = min(processes, MOST)
        self._files: list[int] = []  # descriptors; -1 for one that this process reads alone
        self._units: list[list[_Unit]] = []
        self._helpers: dict[_Unit, _Helper] = {}
        self._number = 0  # of the next file
        self._own: tuple[int, Blocks, BinaryIO] | None = None  # what this process reads of a file

    def through(self, machine: Verifier | None, observe: Observer | None) -> None:
        """Raises HelperGone, else as Reading does."""
        if observe is not None and not isinstance(observe, Sharing):
            super().through(machine, observe)
            return
        with contextlib.ExitStack() as stack:
            self._files = self._open(stack) if self._processes > 1 else []
            self._units = [list(self._cut(number)) for number in range(len(self._files))]
            helpers = self._fork(stack, machine, observe)
            super().through(machine, observe)
            for helper in helpers:
                rest = helper.answer()["rest"]
                if observe is not None:
                    observe.add(rest)

    def _open(self, stack: contextlib.ExitStack) -> list[int]:
        """Before anybody is forked, so that all read the same files, whatever is renamed meanwhile. Of very
        many the last are read by this process alone."""
        room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        found: list[int] = []
        for path in self.report.files:
            descriptor = -1
            with contextlib.suppress(OSError):  # who reads it alone says why
                descriptor = regular(path) if len(found) < room else -1
            if descriptor >= 0:
                stack.callback(os.close, descriptor)
            found.append(descriptor)
        return found

    def _cut(self, number: int) -> Iterator[_Unit]:
        descriptor = self._files[number]
        size = os.fstat(descriptor).st_size if descriptor >= 0 else 0
        if size and _is_packed(descriptor):
            yield _Unit(number, 0, None, size * PACKED)
            return
        for start in range(0, size, PIECE):
            stop = start + PIECE if start + PIECE < size else None
            yield _Unit(number, start, stop, min(PIECE, size - start))

    def _fork(
        self, stack: contextlib.ExitStack, machine: Verifier | None, observe: Sharing | None
    ) -> list[_Helper]:
        """Deal the units out. The end of the log may still grow: this process reads it itself."""
        units = [unit for some in self._units for unit in some if not self._grows(unit)]
        if sum(unit.size for unit in units) < LEAST:
            self._units = []
            return []
        shares: list[list[_Unit]] = [[] for _ in range(self._processes)]
        loads = [0] * self._processes
        for unit in units:
            least = loads.index(min(loads))
            loads[least] += unit.size
            shares[least].append(unit)
        sys.stdout.flush()
        helpers: list[_Helper] = []
        for share in filter(None, shares):
            worker = _Worker(self._files, _Scan(machine.key, machine.watch) if machine else None, observe)
            helper = _Helper(worker, share, helpers)
            stack.callback(helper.close)
            helpers.append(helper)
            self._helpers.update(dict.fromkeys(share, helper))
        return helpers

    def _grows(self, unit: _Unit) -> bool:
        last = unit.file == len(self._files) - 1 and unit.stop is None
        return last and not _is_packed(self._files[unit.file])

    # -- file by file

    def sizes(self) -> list[int]:
        if not self._files:
            return super().sizes()
        return [os.fstat(descriptor).st_size if descriptor >= 0 else 0 for descriptor in self._files]

    def one(self, path: str, machine: Verifier | None, observe: Observer | None) -> None:
        number = self._number
        self._number += 1
        units = self._units[number] if self._units else []
        if not units:
            super().one(path, machine, observe)
            return
        trouble: Unreadable | None = None
        for unit in units:
            try:
                self._unit(unit, machine if trouble is None else None, observe)
            except Unreadable as error:  # what others read behind it was seen by them
                trouble = trouble or error
        if trouble is not None:
            raise trouble

    def _unit(self, unit: _Unit, machine: Verifier | None, observe: Observer | None) -> None:
        helper = self._helpers.get(unit)
        if helper is None:
            self._here(unit, unit.start, machine, observe)
            return
        start, last = unit.start, False
        while not last:
            answer = helper.answer()
            last = answer["last"]
            self._take(unit, start, answer, machine, observe)
            start += PIECE

    def _take(
        self,
        unit: _Unit,
        start: int,
        answer: dict[str, Any],
        machine: Verifier | None,
        observe: Observer | None,
    ) -> None:
        left = answer.get("left")
        if machine is not None and self.report.fault is None:
            with self.going_on(observe):
                before = machine.line
                if join(machine, answer["runs"]):
                    machine.end_of_file(answer.get("tail", "").encode("latin-1"))
                else:
                    stop = start + PIECE if left is None else left
                    self._again(unit.file, start, stop, machine, machine.line - before)
        if isinstance(observe, Sharing):
            observe.told_of(answer["seen"])
        if left is not None:
            self._here(unit, left, machine, observe)
        elif "error" in answer:
            raise Unreadable(answer["error"])
        else:
            self.tell(answer["at"])

    def _again(self, number: int, start: int, stop: int, machine: Verifier, done: int) -> None:
        """A piece that was seen, line by line; so many lines of it the machine knows."""
        blocks, _ = self._blocks(number, start)
        for block in blocks.read(stop):
            lines = block.count(b"\n")
            if not block.endswith(b"\n"):
                machine.end_of_file(block)
            elif lines > done:
                machine.feed(block.split(b"\n", done)[-1])
            done = max(0, done - lines)

    def _here(self, unit: _Unit, start: int, machine: Verifier | None, observe: Observer | None) -> None:
        """What nobody else has read, on from where this process was, if it was there."""
        if self._own is None or (self._own[0], self._own[1].position) != (unit.file, start):
            self._own = (unit.file, *self._blocks(unit.file, start, live=self._grows(unit)))
        _, blocks, raw = self._own
        for block in blocks.read(unit.stop):
            self.block(block, machine, observe)
            self.tell(raw.tell())

    def _blocks(self, number: int, start: int, live: bool = False) -> tuple[Blocks, BinaryIO]:
        file, raw = _opened(self._files[number])
        try:
            return Blocks(file, live=live, start=start), raw
        except TooLong:
            raise Unreadable("it changes while it is read") from None
