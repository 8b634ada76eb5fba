"""Looks for secrets in the memory of other processes.

    report = scan(daemon.pids(), [Secret("KEK", kek), Secret("DEK", dek), Secret("message", text, key=False)])
    report.assert_clean()                       # else: what, in which form, at which address of which mapping
    assert report.secret_pages > 0              # pages that nobody can read: memfd_secret

    python -m tests.harness.memscan [--tree] --secret KEK=@kek.hex PID…

What is found: the bytes themselves, hex in both cases, base64 (three alignments, both alphabets), the same
texts as wide strings (a Python str with one foreign letter), the digits of a Python int, the key
pads of HMAC-SHA256 and its states after them, for AES keys the round keys of both directions in both byte
orders, and GCM's hash key.
Also parts: 8 bytes of a key or round key are a hit, since that is what one spilled register holds.

How. The 8-byte windows of every form go into one set, and memory is read as a grid of aligned 8-byte words:
any 15 bytes in a row hold one whole word of the grid, so a copy at an odd address is met too, and the time
doesn't depend on the number of secrets (about 200 MB/s; zero and repeated blocks cost next to nothing).
Where a word is met, its neighbourhood is compared with the form.

/proc/PID/mem of a process that is not dumpable (PR_SET_DUMPABLE 0, as the daemon sets) can only be
opened with CAP_SYS_PTRACE, so by root. Pages of memfd_secret give EIO even then; they are counted.
"""

from __future__ import annotations

import argparse
import base64
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import aeskeys, procs

PAGE = os.sysconf("SC_PAGESIZE")
BLOCK = 1 << 16  # unit of reading, of the zero test and of the test for repetition
_ZEROS = bytes(BLOCK)
_CAP_SYS_PTRACE = 19

# Pages of the kernel, the same in every process, or refusing to be read.
_KERNEL_MAPPINGS = ("[vvar]", "[vvar_vclock]", "[vsyscall]", "[vdso]")


class ScanRefused(Exception):
    """The memory of a process may not be read; says what is missing."""


class Secret(NamedTuple):
    """What to look for. `key=False` for data of any length from 15 bytes on: no key schedule."""

    label: str
    value: bytes
    key: bool = True


class Form(NamedTuple):
    """One way in which a secret can stand in memory. `step`: its alignment, in bytes. `least`: how many bytes
    of it in a row are a hit (8 bytes of key, so that no chance makes one)."""

    label: str
    name: str
    data: bytes
    step: int
    least: int


class Mapping(NamedTuple):
    start: int
    end: int
    perms: str
    name: str  # "[heap]", "[stack]", "[stack of thread N]", "[anon]", or a file

    @property
    def private_anonymous(self) -> bool:
        return self.perms[3] == "p" and self.name.startswith("[")


class Hit(NamedTuple):
    pid: int
    label: str
    form: str
    address: int  # of the first byte that matches
    length: int  # bytes that match
    of: int  # bytes of the whole form
    mapping: Mapping

    def __str__(self) -> str:
        where = f"{self.mapping.name} {self.mapping.perms} {self.mapping.start:#x}-{self.mapping.end:#x}"
        what = f"{self.label} as {self.form}, {self.length} of {self.of} bytes"
        return f"pid {self.pid}: {what} at {self.address:#x} in {where}"


class Unreadable(NamedTuple):
    pid: int
    mapping: Mapping
    pages: int


class Report(NamedTuple):
    hits: list[Hit]
    unreadable: list[Unreadable]
    scanned: int  # bytes read
    seconds: float

    @property
    def secret_pages(self) -> int:
        """Pages of memfd_secret: mapped, and readable by nobody else. Counted once a process."""
        return sum(row.pages for row in self.unreadable if "secretmem" in row.mapping.name)

    def assert_clean(self) -> None:
        assert not self.hits, str(self)

    def mappings(self) -> set[tuple[int, int]]:
        """(pid, start) of each mapping with a hit."""
        return {(hit.pid, hit.mapping.start) for hit in self.hits}

    def __str__(self) -> str:
        shown = [str(hit) for hit in self.hits[:50]]
        more = [f"... and {len(self.hits) - 50} more"] if len(self.hits) > 50 else []
        pages = sum(row.pages for row in self.unreadable)
        rest = f"{len(self.hits)} hits in {self.scanned >> 20} MiB"
        rest += f"; {pages} unreadable pages, {self.secret_pages} of them memfd_secret"
        return "\n".join([*shown, *more, rest])


# ---- forms ---------------------------------------------------------------------------------------


def forms(secret: Secret) -> list[Form]:
    """Every form of one secret. ValueError where it is too short or too plain to be told from chance."""
    value = secret.value
    if len(value) < 15 or len(set(value)) < 8:
        raise ValueError(f"{secret.label}: at least 15 bytes, 8 of them different, else chance finds it")
    found = [("raw", value, 1, 8), *_texts(value)]
    if secret.key:
        found += _key_forms(value)
    return [Form(secret.label, *row) for row in found]


def _texts(value: bytes) -> Iterator[tuple[str, bytes, int, int]]:
    hexes = {"hex": value.hex(), "HEX": value.hex().upper()}
    for name, digits in hexes.items():
        yield name, digits.encode(), 1, 16
        yield f"{name}, 2-byte str", digits.encode("utf-16-le"), 2, 32
        yield f"{name}, 4-byte str", digits.encode("utf-32-le"), 4, 64
    for shift in range(3):
        text = _base64_core(value, shift)
        yield f"base64, alignment {shift}", text, 1, 12
        url = text.replace(b"+", b"-").replace(b"/", b"_")
        if url != text:
            yield f"base64url, alignment {shift}", url, 1, 12
        yield f"base64, alignment {shift}, 2-byte str", text.decode().encode("utf-16-le"), 2, 24


def _base64_core(value: bytes, shift: int) -> bytes:
    """The letters that depend on `value` alone, where `shift` other bytes stand before it."""
    text = base64.b64encode(bytes(shift) + value)
    first = (8 * shift + 5) // 6
    last = 8 * (shift + len(value)) // 6
    return text[first:last]


def _key_forms(key: bytes) -> Iterator[tuple[str, bytes, int, int]]:
    if len(key) != 32:
        raise ValueError("an AES-256 key has 32 bytes; use key=False for other data")
    schedule = aeskeys.expand(key)
    decrypt = aeskeys.decrypt_round_keys(schedule)
    yield "raw, words swapped", aeskeys.swapped(key), 4, 8
    yield "AES round keys 2-14", schedule[32:], 4, 8
    yield "AES round keys 2-14, words swapped", aeskeys.swapped(schedule[32:]), 4, 8
    yield "AES decryption round keys 13-1", decrypt, 4, 8
    yield "AES decryption round keys 13-1, words swapped", aeskeys.swapped(decrypt), 4, 8
    for name, value in aeskeys.ghash_keys(key).items():
        yield f"GHASH key {name}", value, 1, 8
    yield "HMAC inner pad", bytes(byte ^ 0x36 for byte in key), 1, 8
    yield "HMAC outer pad", bytes(byte ^ 0x5C for byte in key), 1, 8
    for name, value in aeskeys.hmac_states(key).items():
        yield f"HMAC {name} state", value, 4, 8
    yield "int, big-endian", _int_digits(int.from_bytes(key, "big")), 4, 12
    yield "int, little-endian", _int_digits(int.from_bytes(key, "little")), 4, 12


def _int_digits(number: int) -> bytes:
    """As CPython keeps it: 30-bit digits in 32-bit words, the lowest first."""
    return b"".join((number >> shift & 0x3FFFFFFF).to_bytes(4, sys.byteorder) for shift in range(0, 240, 30))


class _Index:
    """All windows of all forms: 8-byte word of the machine -> its places, as (number of the form, offset)."""

    def __init__(self, secrets: Sequence[Secret]) -> None:
        self.forms = [form for secret in secrets for form in forms(secret)]
        self.places: dict[int, tuple[tuple[int, int], ...]] = {}
        for number, form in enumerate(self.forms):
            for offset in range(0, len(form.data) - 7, form.step):
                word = int.from_bytes(form.data[offset : offset + 8], sys.byteorder)
                self.places[word] = (*self.places.get(word, ()), (number, offset))
        self.words = frozenset(self.places)


# ---- memory --------------------------------------------------------------------------------------


def cannot_scan() -> str:
    """Why this process can't read the memory of a daemon that is not dumpable; "" where it can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux's /proc/PID/mem"
    capable = int(procs.status(os.getpid(), "CapEff") or "0", 16) >> _CAP_SYS_PTRACE & 1
    if not capable:
        return "reading /proc/PID/mem of a process that is not dumpable needs root (CAP_SYS_PTRACE)"
    try:
        if int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text()) == 3:
            return "kernel.yama.ptrace_scope is 3: nobody may read the memory of another process"
    except FileNotFoundError:
        pass
    return ""


def mappings(pid: int) -> list[Mapping]:
    stacks = _stack_pointers(pid)
    found = []
    for line in _read(f"/proc/{pid}/maps").splitlines():
        span, perms, _, _, _, *name = line.split(None, 5)
        start, end = (int(part, 16) for part in span.split("-"))
        thread = next((tid for tid, pointer in stacks.items() if start <= pointer < end), 0)
        default = f"[stack of thread {thread}]" if thread else "[anon]"
        found.append(Mapping(start, end, perms, name[0].strip() if name else default))
    return found


def _stack_pointers(pid: int) -> dict[int, int]:
    """Thread id -> stack pointer, for threads that wait in the kernel."""
    found = {}
    for thread in procs.threads(pid):
        try:
            fields = Path(f"/proc/{pid}/task/{thread}/syscall").read_text().split()
            found[thread] = int(fields[-2], 16)
        except (OSError, ValueError, IndexError):
            continue
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ScanRefused(f"{path}: the process is gone") from None
    except PermissionError:
        raise ScanRefused(f"{path}: {cannot_scan() or 'permission denied'}") from None


class _Process:
    """The readable blocks of one process."""

    def __init__(self, pid: int, stack: ExitStack) -> None:
        self.pid = pid
        self.mem = self._open("mem", stack)
        self.pagemap = self._open("pagemap", stack)
        self.unreadable: list[Unreadable] = []

    def _open(self, name: str, stack: ExitStack) -> int:
        path = f"/proc/{self.pid}/{name}"
        try:
            fd = os.open(path, os.O_RDONLY)
        except PermissionError:
            raise ScanRefused(f"{path}: {cannot_scan() or 'permission denied'}") from None
        except FileNotFoundError:
            raise ScanRefused(f"{path}: the process is gone") from None
        stack.callback(os.close, fd)
        return fd

    def blocks(self, mapping: Mapping) -> Iterator[tuple[int, bytes]]:
        """(address, bytes) of all that can be read, in blocks of at most BLOCK."""
        failed = 0
        for start, end in self._present(mapping):
            for address in range(start, end, BLOCK):
                size = min(BLOCK, end - address)
                try:
                    yield address, self.read(address, size)
                except OSError:
                    for page in range(address, address + size, PAGE):
                        try:
                            yield page, self.read(page, PAGE)
                        except OSError:
                            failed += 1
        if failed:
            self.unreadable.append(Unreadable(self.pid, mapping, failed))

    def _present(self, mapping: Mapping) -> Iterator[tuple[int, int]]:
        """The parts that hold pages at all. Only of private anonymous memory is it certain that a page that
        is neither present nor swapped out holds nothing: stacks and arenas are mostly so."""
        if not mapping.private_anonymous:
            yield mapping.start, mapping.end
            return
        for start in range(mapping.start, mapping.end, 512 * PAGE):
            end = min(mapping.end, start + 512 * PAGE)
            entries = os.pread(self.pagemap, (end - start) // PAGE * 8, start // PAGE * 8)
            if any(entries):
                yield from _runs(start, memoryview(entries).cast("Q"))

    def read(self, address: int, size: int) -> bytes:
        data = os.pread(self.mem, size, address)
        if len(data) != size:
            raise OSError("short read")
        return data

    def around(self, mapping: Mapping, start: int, end: int) -> tuple[int, bytes]:
        """The readable bytes of [start, end) next to its middle, cut to the mapping: (address, bytes)."""
        start, end = max(start, mapping.start), min(end, mapping.end)
        try:
            return start, self.read(start, end - start)
        except OSError:
            page = (start + end) // 2 // PAGE * PAGE
            return page, self.read(page, PAGE)


def _runs(start: int, entries: memoryview) -> Iterator[tuple[int, int]]:
    """Joined runs of pages that are present (bit 63 of the pagemap entry) or swapped out (bit 62)."""
    first: int | None = None
    for number, entry in enumerate(entries):
        if entry >> 62:
            first = number if first is None else first
        elif first is not None:
            yield start + first * PAGE, start + number * PAGE
            first = None
    if first is not None:
        yield start + first * PAGE, start + len(entries) * PAGE


# ---- the scan ------------------------------------------------------------------------------------


def scan(pids: Iterable[int], secrets: Sequence[Secret], *, freeze: bool = False) -> Report:
    """Look for each secret in each process. ScanRefused where the memory of one can't be read.

    `freeze` stops the processes meanwhile (SIGSTOP), for a process that is busy: what moves while it
    is read can be missed.
    """
    began = time.monotonic()
    index = _Index(secrets)
    clean: set[int] = set()  # hashes of blocks without a hit: the same pages stand in every worker
    hits: list[Hit] = []
    unreadable: list[Unreadable] = []
    scanned = 0
    with ExitStack() as stack:
        processes = [_Process(pid, stack) for pid in pids]
        if freeze:
            _freeze(processes, stack)
        for process in processes:
            for mapping in mappings(process.pid):
                if mapping.name in _KERNEL_MAPPINGS:
                    continue
                for address, block in process.blocks(mapping):
                    scanned += len(block)
                    if not _is_clean(block, index, clean):
                        hits += _hits(process, mapping, address, block, index)
            unreadable += process.unreadable
    return Report(_unique(hits), unreadable, scanned, time.monotonic() - began)


def _freeze(processes: Iterable[_Process], stack: ExitStack) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
        stack.callback(os.kill, process.pid, signal.SIGCONT)
    for process in processes:
        procs.wait_until(partial(_stopped, process.pid), what="the process to stop")


def _stopped(pid: int) -> bool:
    fields = procs.stat(pid)
    return fields is None or fields[0] in "TtZ"


def _is_clean(block: bytes, index: _Index, clean: set[int]) -> bool:
    if block == _ZEROS[: len(block)] or (digest := hash(block)) in clean:
        return True
    if index.words.isdisjoint(memoryview(block).cast("Q")):
        clean.add(digest)
        return True
    return False


def _hits(process: _Process, mapping: Mapping, address: int, block: bytes, index: _Index) -> Iterator[Hit]:
    for number, word in enumerate(memoryview(block).cast("Q")):
        for which, offset in index.places.get(word, ()):
            form = index.forms[which]
            place = address + 8 * number
            begin, text = process.around(mapping, place - len(form.data), place + len(form.data))
            first, last = _extent(text, place - begin, form.data, offset)
            if last - first >= form.least:
                found = place - offset + first
                yield Hit(process.pid, form.label, form.name, found, last - first, len(form.data), mapping)


def _extent(text: bytes, at: int, form: bytes, offset: int) -> tuple[int, int]:
    """Which bytes [first, last) of `form` stand in `text`, given that form[offset:offset+8] stands at `at`.
    (0, 0) where they no longer do: a living process may have gone on."""
    if text[at : at + 8] != form[offset : offset + 8]:
        return 0, 0
    first, last = offset, offset + 8
    while first > 0 and at - (offset - first) > 0 and text[at - (offset - first) - 1] == form[first - 1]:
        first -= 1
    while last < len(form) and at + last - offset < len(text) and text[at + last - offset] == form[last]:
        last += 1
    return first, last


def _unique(hits: list[Hit]) -> list[Hit]:
    """One row a copy. A copy is met once for each of its words, and part of it may look like another form too
    (base64 like base64url): the longest counts."""
    found: list[Hit] = []
    for hit in sorted(set(hits), key=lambda hit: (hit.pid, hit.label, hit.address, -hit.length)):
        last = found[-1] if found else None
        same = last is not None and (last.pid, last.label) == (hit.pid, hit.label)
        if last is None or not same or hit.address + hit.length > last.address + last.length:
            found.append(hit)
    return found


# ---- the command ---------------------------------------------------------------------------------


def _secret(text: str) -> Secret:
    """LABEL=HEX or LABEL=@FILE (hex or raw bytes)."""
    label, _, value = text.partition("=")
    data = Path(value[1:]).read_bytes() if value.startswith("@") else value.encode()
    try:
        data = bytes.fromhex(data.decode("ascii").strip())
    except ValueError:
        if not value.startswith("@"):
            raise argparse.ArgumentTypeError("LABEL=HEX or LABEL=@FILE") from None
    return Secret(label, data, key=len(data) == 32)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: nothing found; 1: something; 2: it couldn't look."""
    parser = argparse.ArgumentParser(
        prog="memscan", description="Look for secrets in the memory of processes."
    )
    parser.add_argument("pid", type=int, nargs="+")
    parser.add_argument(
        "--secret", type=_secret, action="append", required=True, metavar="LABEL=HEX|LABEL=@FILE"
    )
    parser.add_argument("--tree", action="store_true", help="also all descendants of each process")
    parser.add_argument("--freeze", action="store_true", help="stop the processes meanwhile")
    args = parser.parse_args(argv)
    pids = [member for pid in args.pid for member in (procs.tree(pid) if args.tree else [pid])]
    try:
        report = scan(pids, args.secret, freeze=args.freeze)
    except (ScanRefused, ValueError) as error:
        print(f"memscan: {error}", file=sys.stderr)
        return 2
    print(report)
    return 1 if report.hits else 0


if __name__ == "__main__":
    sys.exit(main())
