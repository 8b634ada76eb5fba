"""Locked buffers: what the kernel says of their pages, and that nothing outlives a close."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.crypto import memory
from progressdb_kms.crypto.memory import PAGE, LockedBuffer, wipe
from progressdb_kms.errors import LockRefused

SECRET = bytes(range(1, 33))

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def no_memfd_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_memfd_secret", lambda length: None)


class NoLocks:
    """A C library whose mlock has no room left."""

    def mlock(self, address: int, length: int) -> int:
        ctypes.set_errno(errno.ENOMEM)
        return -1


@pytest.fixture
def no_locks(no_memfd_secret: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_libc", NoLocks())


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """What other tests left is not freed between two looks at what this process holds."""
    gc.disable()
    yield
    gc.enable()


def held() -> tuple[str, int, int]:
    """Locked kB, mappings and descriptors of this process."""
    status = Path("/proc/self/status").read_text()
    maps = Path("/proc/self/maps").read_text()
    shared = sum("secretmem" in line or "/dev/zero" in line for line in maps.splitlines())
    return status.partition("VmLck:")[2].split()[0], shared, len(os.listdir("/proc/self/fd"))


def about(buffer: LockedBuffer) -> tuple[str, list[str]]:
    """The name of a buffer's mapping and its VmFlags (proc_pid_smaps(5))."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer.view))
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for number, line in enumerate(lines):
        span = line.split()[0]
        if "-" in span and int(span.split("-")[0], 16) <= address < int(span.split("-")[1], 16):
            flags = next(row for row in lines[number:] if row.startswith("VmFlags:"))
            return line.split(None, 5)[-1], flags.split()[1:]
    raise AssertionError("not mapped")


# ---- one buffer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["require", "try", "off"])
@pytest.mark.parametrize("size", [1, 32, PAGE, PAGE + 1, 3 * PAGE])
def test_a_new_buffer_holds_zeros(mode: str, size: int) -> None:
    with LockedBuffer(size, mode) as buffer:
        assert bytes(buffer.view) == bytes(size)
        assert not buffer.view.readonly
        pages = (size + PAGE - 1) // PAGE * PAGE
        assert buffer.locked_bytes == (0 if mode == "off" else pages)
        assert buffer.kind in (("unlocked",) if mode == "off" else ("memfd_secret", "mlock"))
        buffer.view[size - 1] = 7
        assert buffer.view[size - 1] == 7


@linux
def test_pages_of_memfd_secret_are_read_by_nobody_else() -> None:
    with LockedBuffer(32) as buffer:
        if buffer.kind != "memfd_secret":
            pytest.skip("this kernel, or its limit on locked memory, gives no memfd_secret")
        name, flags = about(buffer)
        assert "secretmem" in name
        assert "lo" in flags
        buffer.view[:] = SECRET
        with pytest.raises(OSError) as caught:
            _read_memory(buffer)
        assert caught.value.errno == errno.EIO


@linux
def test_locked_pages_are_not_dumped(no_memfd_secret: None) -> None:
    with LockedBuffer(32) as buffer:
        assert buffer.kind == "mlock"
        _, flags = about(buffer)
        assert "lo" in flags
        assert "dd" in flags
        buffer.view[:] = SECRET
        assert _read_memory(buffer) == SECRET  # what memfd_secret is better at


@linux
def test_unlocked_pages_are_not_dumped_either(no_locks: None) -> None:
    for mode in ("try", "off"):
        with LockedBuffer(32, mode) as buffer:
            assert buffer.kind == "unlocked"
            _, flags = about(buffer)
            assert "lo" not in flags
            assert "dd" in flags


def _read_memory(buffer: LockedBuffer) -> bytes:
    """As another process would, through the kernel."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer.view))
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), len(buffer.view), address)


def test_off_does_not_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("asked for locked memory")

    monkeypatch.setattr(memory, "_memfd_secret", never)
    monkeypatch.setattr(memory, "_libc", None)
    with LockedBuffer(32, "off") as buffer:
        assert buffer.kind == "unlocked"


@linux
def test_require_refuses_and_says_what_to_set(no_locks: None) -> None:
    before = held()
    with pytest.raises(LockRefused) as caught:
        LockedBuffer(32, "require")
    assert held() == before
    assert "memory_lock is 'require'" in caught.value.message
    assert os.strerror(errno.ENOMEM) in caught.value.message
    assert "LimitMEMLOCK" in caught.value.hint
    assert "ulimit -l" in caught.value.hint


@linux
@pytest.mark.root
def test_without_any_limit_left() -> None:
    """The kernel's own refusal, in a child: a user without rights, and RLIMIT_MEMLOCK 0."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
            os.setresuid(65534, 65534, 65534)
            os.write(writer, LockedBuffer(32, "try").kind.encode() + b": ")
            LockedBuffer(32, "require")
        except LockRefused as error:
            os.write(writer, error.message.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as answer:
        said = answer.read()
    os.waitpid(child, 0)
    assert said.startswith("unlocked: memory_lock is 'require'")
    assert "can't be locked" in said


# ---- life cycle --------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("mode", ["try", "off"])
def test_close_gives_everything_back(mode: str) -> None:
    before = held()
    buffer = LockedBuffer(3 * PAGE, mode)
    assert held() != before
    buffer.close()
    buffer.close()
    assert held() == before
    assert buffer.locked_bytes == 0
    with pytest.raises(ValueError, match="released"):
        len(buffer.view)


def test_close_wipes_first_and_refuses_while_a_slice_lives() -> None:
    buffer = LockedBuffer(64)
    mine = buffer.view[16:48]
    mine[:] = SECRET
    with pytest.raises(BufferError):
        buffer.close()
    assert bytes(mine) == bytes(32)


def test_wipe_is_for_all_of_it_and_may_be_repeated() -> None:
    with LockedBuffer(PAGE + 32) as buffer:
        buffer.view[:32] = SECRET
        buffer.view[PAGE:] = SECRET
        buffer.wipe()
        assert bytes(buffer.view) == bytes(PAGE + 32)
        buffer.wipe()
    buffer.wipe()


def test_an_exception_wipes() -> None:
    with pytest.raises(LookupError), LockedBuffer(32) as buffer:
        mine = buffer.view[:]
        mine[:] = SECRET
        raise LookupError
    assert bytes(mine) == bytes(32)
    mine.release()
    buffer.close()


@linux
def test_the_end_of_a_block_closes() -> None:
    before = held()
    with LockedBuffer(32) as buffer:
        buffer.view[:] = SECRET
    assert held() == before


def test_children_share_it() -> None:
    with LockedBuffer(32) as buffer:
        child = os.fork()
        if not child:
            try:
                buffer.view[:] = SECRET
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert bytes(buffer.view) == SECRET


def test_nothing_of_it_is_shown() -> None:
    with LockedBuffer(32) as buffer:
        buffer.view[:] = SECRET
        assert repr(SECRET)[2:-1] not in repr(buffer) and SECRET.hex() not in repr(buffer)


# ---- wipe --------------------------------------------------------------------------------------------


def test_wipe_touches_its_view_alone() -> None:
    data = bytearray(b"\xff" * 48)
    with memoryview(data) as view, view[16:32] as middle:
        wipe(middle)
    assert data == b"\xff" * 16 + bytes(16) + b"\xff" * 16


def test_wipe_of_nothing() -> None:
    wipe(memoryview(bytearray()))


def test_wipe_refuses_what_can_not_be_written() -> None:
    with pytest.raises(TypeError):
        wipe(memoryview(b"constant"))
