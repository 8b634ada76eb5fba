"""Memory that may hold keys: locked, never in a core file, wiped when done.

What may live here: KEKs, the audit key and the row key, a DEK while it is in use, and what a worker receives,
since a key may be in it. What must hold:

- A key exists in a locked buffer or nowhere. No `bytes` or `str` is ever made of it, because neither
  can be wiped and both are copied freely.
- Each page is locked (never swapped), left out of core files, and, where the kernel has
  memfd_secret (Linux 5.14), taken out of the kernel's own mapping: then not even root reads it
  through /proc/PID/mem or ptrace.
- Only these pages are locked. `mlockall` would lock every thread's stack.

The three kinds, best first: `memfd_secret`, `mlock` (mmap + mlock + MADV_DONTDUMP), `unlocked`.

The buffers of a daemon that runs (a KEK on its way, a rotation's scratch) are made as its configuration says
(`settle`), and where none can be locked any more, the log is told once, and once when it's over.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os

from ..errors import LockRefused, StoreUnavailable
from ..journal import Matter

PAGE = mmap.PAGESIZE

# One number on every architecture (asm-generic numbering, where all new calls are added).
_SYS_MEMFD_SECRET = 447
_MADV_DONTDUMP = 16  # <asm-generic/mman-common.h>

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.syscall.restype = ctypes.c_long
_libc.getrandom.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)


def wipe(view: memoryview) -> None:
    """Overwrite with zeros. A foreign call through a pointer: no compiler sees it, none drops it."""
    if len(view):
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(view)), 0, len(view))


def random_into(view: memoryview) -> None:
    """Fill with random bytes of the OS, at most 256 (getrandom(2) gives these whole). They pass through no
    other object, and it takes no descriptor: a process that has none left goes on making keys."""
    if _libc.getrandom(ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view), 0) != len(view):
        raise StoreUnavailable("the OS gave too few random bytes")


class _Settled:
    """For buffers that are made without a word about it: in this process, and those that it forks."""

    mode = "try"
    shortage: Matter | None = None  # None: nobody is told


def settle(mode: str, locked: bool) -> None:
    """`mode` as for LockedBuffer. `locked`: all was so far, so that the end of it is news."""
    shortage = Matter("no memory can be locked any more: %s", "memory can be locked again", logging.WARNING)
    _Settled.mode, _Settled.shortage = mode, shortage if locked else None


def _tell(so: str) -> None:
    if _Settled.shortage is not None:
        _Settled.shortage.tell(so and f"what brings or moves a KEK {so} (raise LimitMEMLOCK)")


class LockedBuffer:
    """A zero-filled region of whole pages for secrets, shared with processes forked later.

    Life cycle: made, used through `view` (and slices of it), wiped and unmapped by `close()`. `map` is the
    mapping itself, for `find` in place. `close()` is idempotent and refuses (BufferError) while slices of
    `view` are still alive, so that no cipher object can outlive its key.
    """

    def __init__(self, size: int, mode: str = "") -> None:
        """Map at least `size` bytes. `mode`: `require` (LockRefused where no page can be locked),
        `try`, or `off`; empty: as `settle` says."""
        length = (size + PAGE - 1) // PAGE * PAGE
        try:
            self.map, self.kind = _map_pages(length, mode or _Settled.mode)
        except LockRefused:
            _tell("is refused")
            raise
        _tell("uses memory that may be swapped out" if self.kind == "unlocked" else "")
        self.view = memoryview(self.map)[:size]

    @property
    def locked_bytes(self) -> int:
        """Bytes that count against RLIMIT_MEMLOCK."""
        return 0 if self.map.closed or self.kind == "unlocked" else len(self.map)

    def wipe(self) -> None:
        if not self.map.closed:
            with memoryview(self.map) as whole:
                wipe(whole)

    def close(self) -> None:
        if self.map.closed:
            return
        self.wipe()
        self.view.release()
        self.map.close()

    def __enter__(self) -> LockedBuffer:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        # While an exception travels, its frames may still hold slices: wiping is what counts.
        self.wipe()
        if kind is None:
            self.close()


def _map_pages(length: int, mode: str) -> tuple[mmap.mmap, str]:
    if mode != "off":
        secret = _memfd_secret(length)
        if secret is not None:
            return secret, "memfd_secret"
    region = mmap.mmap(-1, length)  # MAP_SHARED | MAP_ANONYMOUS
    refused = 0
    if mode != "off":
        address = ctypes.addressof(ctypes.c_char.from_buffer(region))
        if _libc.mlock(address, length) == 0:
            region.madvise(_MADV_DONTDUMP)
            return region, "mlock"
        refused = ctypes.get_errno()
    if mode == "require":
        region.close()
        raise LockRefused(
            f"memory_lock is 'require', but {length} bytes can't be locked ({os.strerror(refused)})",
            hint="raise the limit: LimitMEMLOCK=infinity in the unit, or `ulimit -l unlimited` before",
        )
    region.madvise(_MADV_DONTDUMP)
    return region, "unlocked"


def _memfd_secret(length: int) -> mmap.mmap | None:
    """Pages that the kernel itself can't read any more; None where it has none or the limit forbids."""
    fd = _libc.syscall(_SYS_MEMFD_SECRET, os.O_CLOEXEC)
    if fd < 0:
        return None
    try:
        os.ftruncate(fd, length)
        return mmap.mmap(fd, length, mmap.MAP_SHARED)
    except OSError:  # RLIMIT_MEMLOCK: such pages are always locked
        return None
    finally:
        os.close(fd)
