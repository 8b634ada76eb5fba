"""What the process does about itself before it touches a key.

First `prepare` starts the same program once more in the same process (execve), with an environment that only
takes effect at a start:

    PYTHONMALLOC=malloc                     Python's objects come from the C library …
    GLIBC_TUNABLES  malloc.perturb=165      … which overwrites each block that is freed,
                    malloc.tcache_count=0   … also those that its cache would take untouched
                    malloc.arena_max=1      and three for speed: one heap for all threads (the interpreter
                    malloc.mmap_threshold   lets one of them run at a time) stays in the processor's cache,
                    malloc.trim_threshold   and the memory of long bodies is not fetched from the kernel anew
    LD_BIND_NOW=1                           no symbol is looked up later: that spills registers, which may
                                            hold half a DEK, onto the stack

    PYTHONUTF8=1                            names of files are UTF-8, whatever the locale says
    OPENSSL_ia32cap=:~0x40000000000         on x86, GCM without VPCLMULQDQ. The code for that leaves powers of
                                            2H, which lead to H and so to forged messages, on the stack after
                                            each message of some 300 bytes and more. What that costs is in the
                                            manual's page `secrets`

What was inherited in the place of these, or for OpenSSL on other processors, decides nothing.
So what the interpreter and OpenSSL copy is gone when it is freed; it costs about a tenth of the speed. A
master key in the environment leaves it on this occasion, by way of a pipe: the kernel shows the environment
that a process was started with, in /proc, for as long as it lives.

Then `harden` turns off core files, ptrace by equals and gains of privilege, and looks whether it worked.
There is no mlockall: it would lock every thread's stack. The pages of keys are locked by `crypto.memory`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

HEX_VARIABLE = "PROGRESSDB_KMS_MASTER_KEY_HEX"
FD_VARIABLE = "PROGRESSDB_KMS_MASTER_KEY_FD"
MARKER = "PROGRESSDB_KMS_PREPARED"
"""Holds the pid of the process that `prepare` started anew. execve keeps the pid: there is no second time."""

TUNABLES: Mapping[str, str] = {
    "glibc.malloc.tcache_count": "0",
    "glibc.malloc.perturb": "165",
    "glibc.malloc.arena_max": "1",
    "glibc.malloc.mmap_threshold": str(4 << 20),
    "glibc.malloc.trim_threshold": str(8 << 20),
}

_PLACES = ("PATH", "HOME", "PLATLIBDIR", "USERBASE", "NOUSERSITE", "SAFEPATH", "PYCACHEPREFIX")
KEPT = frozenset(f"PYTHON{name}" for name in (*_PLACES, "DONTWRITEBYTECODE", "MALLOC"))
"""Where the interpreter and its modules are is the caller's to say; how it behaves (warnings as errors, a
known seed of hashes, prompts at the end) is not, nor are glibc's older names for its tunables."""

CAPABILITY = {"OPENSSL_ia32cap": f":~{1 << 42:#x}"}
"""Of OpenSSL's second word (CPUID leaf 7, EBX and ECX) all but bit 42, VPCLMULQDQ. Other processors than x86
have another variable."""

CAPABILITIES = re.compile("OPENSSL_[a-z0-9]+cap")
"""How OpenSSL is told which instructions to do without. Without any, AES-GCM is 20 to 80 times as slow."""

MAX_HANDED_OVER = 256
"""Bytes of the variable that go into the pipe. A key has 64; what is longer is refused where it is read."""


class Measure(NamedTuple):
    """One measure and whether it is in force; `detail` is a sentence for `doctor` and `/status`."""

    name: str
    ok: bool
    detail: str


# ---- a second start --------------------------------------------------------------------------------


def prepare(argv: Sequence[str], environ: Mapping[str, str]) -> None:
    """Start this program anew in this process where its environment needs it; returns where it doesn't.

    `argv`: the arguments after the program's name. Call it first of all: before any thread, before the
    working directory changes, with nothing read from stdin. Returns too where it can't be done; `harden`
    reports that.
    """
    wanted = new_environment(environ, os.getpid(), wipes=_can_wipe_on_free())
    command = _command_line()
    if wanted is None or command is None:
        return
    if HEX_VARIABLE in environ and not has_config(argv):
        wanted[FD_VARIABLE] = str(_hand_over(environ[HEX_VARIABLE]))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until `__main__` lets it end the program
    with contextlib.suppress(OSError):
        os.execve(sys.executable, command, wanted)  # noqa: S606  # our own interpreter and arguments
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if FD_VARIABLE in wanted:
        os.close(int(wanted[FD_VARIABLE]))


def new_environment(environ: Mapping[str, str], pid: int, *, wipes: bool) -> dict[str, str] | None:
    """The environment to start with, without a key in it, or None where this one will do, or is such.

    `wipes`: the C library and the interpreter know how to wipe on free.
    """
    if environ.get(MARKER) == str(pid):
        return None
    changes = dict(CAPABILITY)
    if wipes:
        tunables = merged_tunables(environ.get("GLIBC_TUNABLES", ""))
        changes.update(PYTHONMALLOC="malloc", GLIBC_TUNABLES=tunables, LD_BIND_NOW="1", PYTHONUTF8="1")
    inherited = {name for name in environ if name.startswith(("PYTHON", "MALLOC_"))} - KEPT
    inherited |= {name for name in environ if CAPABILITIES.fullmatch(name)}
    dropped = {HEX_VARIABLE, FD_VARIABLE} & set(environ) | inherited - set(changes)
    if not dropped and all(environ.get(name) == value for name, value in changes.items()):
        return None
    kept = {name: value for name, value in environ.items() if name not in dropped}
    return {**kept, **changes, MARKER: str(pid)}


def merged_tunables(present: str) -> str:
    """GLIBC_TUNABLES (`name=value:name=value`) with ours in it, others kept."""
    pairs = dict(part.partition("=")[::2] for part in present.split(":") if "=" in part)
    return ":".join(f"{name}={value}" for name, value in {**pairs, **TUNABLES}.items())


def has_config(argv: Sequence[str]) -> bool:
    """With a configuration file the key of the environment is not used, and so is dropped unread."""
    return any(arg == "--config" or arg.startswith("--config=") for arg in argv)


def _can_wipe_on_free() -> bool:
    """CPython on glibc. The free-threaded build has its own allocator and refuses PYTHONMALLOC=malloc."""
    if sys.implementation.name != "cpython" or "free-threading" in sys.version:
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (OSError, ValueError):
        return False


def _command_line() -> list[str] | None:
    """How this process was started: interpreter, its options, program, arguments. None where nobody knows."""
    try:
        with open("/proc/self/cmdline", "rb") as file:
            words = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
    except OSError:
        return None
    return [sys.executable, *words[1:]] if sys.executable else None


def _hand_over(key: str) -> int:
    """Put the key into a pipe that the new program inherits; returns the end to read from."""
    reader, writer = os.pipe()
    os.write(writer, os.fsencode(key)[:MAX_HANDED_OVER])
    os.close(writer)
    os.set_inheritable(reader, True)
    return reader


# ---- hardening -------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39

UMASK = 0o077

_libc = ctypes.CDLL(None, use_errno=True)


def harden() -> list[Measure]:
    """Take all measures and tell which are in force. None of them failing keeps the daemon from serving.

    Linux resets "not dumpable" at execve, so this comes after `prepare`. Children inherit all of it.
    """
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)  # ptrace by the same user; a core_pattern with a pipe asks for no RLIMIT_CORE
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    os.umask(UMASK)
    core = resource.getrlimit(resource.RLIMIT_CORE)
    dumpable, no_new_privileges = _prctl(_PR_GET_DUMPABLE), _prctl(_PR_GET_NO_NEW_PRIVS)
    return [
        second_start(),
        Measure("no_core_files", core == (0, 0), f"RLIMIT_CORE is {core[0]} (soft), {core[1]} (hard)"),
        Measure("not_dumpable", dumpable == 0, f"PR_GET_DUMPABLE is {dumpable}"),
        Measure("no_new_privs", no_new_privileges == 1, f"PR_GET_NO_NEW_PRIVS is {no_new_privileges}"),
        _wipe_on_free(),
    ]


REMEDY = "let it execute its own interpreter: NoExecPaths= and SystemCallFilter= in the unit may forbid it"


def second_start() -> Measure:
    """`prepare` returned, though it was needed?"""
    if new_environment(os.environ, os.getpid(), wipes=_can_wipe_on_free()) is None:
        return Measure("second_start", True, "nothing that was inherited decides what memory keeps of keys")
    why = "the program could not be started anew: freed memory and stacks may keep copies of keys"
    if HEX_VARIABLE in os.environ:
        why += f", and {HEX_VARIABLE} can be read in /proc as long as it runs"
    return Measure("second_start", False, why)


def _wipe_on_free() -> Measure:
    if wipe_on_free_active():
        return Measure("wipe_on_free", True, "freed memory is overwritten (tried)")
    if sys.flags.ignore_environment:
        return Measure("wipe_on_free", False, "python -I and -E ignore PYTHONMALLOC: use -s, or neither")
    return Measure("wipe_on_free", False, "needs CPython on glibc, and its second start")


def _prctl(option: int, value: int = 0) -> int:
    """-1 where the system refuses."""
    words = [ctypes.c_ulong(word) for word in (value, 0, 0, 0)]
    return int(_libc.prctl(ctypes.c_int(option), *words))


# ---- does free() wipe? -----------------------------------------------------------------------------

_PROBES = (32, 36, 40, 44, 48, 56)
"""Copies of 8 random bytes in each probe: at most 448 bytes, few enough for Python's allocator and glibc's
cache. One probe alone was seen to say yes by chance, where its block was taken at once by something else."""


def wipe_on_free_active() -> bool:
    """Free objects of Python and look at what is left of them: each must be filled anew, mostly.

    Three tries, since a block may be given out again, and filled with other things, before the look."""
    return any(all(_is_wiped(copies) for copies in _PROBES) for _ in range(3))


def _is_wiped(copies: int) -> bool:
    """The neighbours keep the pages mapped; nothing is allocated between the free and the look. The kernel
    does the looking: write(2) from an address that is gone fails, where a load would crash."""
    word = os.urandom(8)
    objects = [b"".join([word] * copies) for _ in range(5)]
    reader, writer = os.pipe()
    place = ctypes.c_void_p(id(objects[2]) + bytes.__basicsize__ - 1)
    arguments = ctypes.c_int(writer), place, ctypes.c_size_t(8 * copies)
    look = _libc.write
    try:
        objects[2] = b""
        size: int = look(*arguments)
        left = os.read(reader, size) if size > 0 else b""
        # Two bytes: one for what was freed, its complement for what was given out again. The rest: links.
        filled = sum(sorted(map(left.count, set(map(bytes, zip(left)))))[-2:])
        return word not in left and filled * 2 >= 8 * copies
    finally:
        os.close(reader)
        os.close(writer)


# ---- for children ----------------------------------------------------------------------------------


def die_with_parent(parent: int) -> None:
    """Have the kernel kill us when the parent's thread that forked us ends. Call it right after fork.

    `parent`: its pid, taken before the fork: if it is gone already, we are at once.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


# A thread that handles a signal while it ciphers leaves its registers, and round keys in them, on its stack.
# Faults stay: blocked, they would end the process without a word.
BLOCKED = frozenset(signal.valid_signals()) - {
    signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS
}  # fmt: skip


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Threads started in this block never run a signal's handler; the calling thread does again after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
