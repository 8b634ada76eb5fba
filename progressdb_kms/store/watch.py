"""Are the files that are open still the files at their paths?

A file that was unlinked or replaced under the daemon takes every write, and all that is written is gone when
its last descriptor is closed. Descriptors that are opened with O_PATH tell of the file that they were opened
on: how many names it has. Its device and inode are held against those at the path; the numbers alone would
not do, since they are given to another file once this one is gone. To close such a descriptor costs no lock
of SQLite's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Watch:
    """Over the files of these names in a folder. `sizes` are those at the last look."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """Raises OSError where one of them can't be had."""
        self._folder = folder
        self._held: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        try:
            for name in names:
                self._held[name] = os.open(folder / name, _FLAGS)
                self.sizes[name] = os.fstat(self._held[name]).st_size
            self.files = {name: _identity(os.fstat(fd)) for name, fd in self._held.items()}
        except OSError:
            self.close()
            raise

    def look(self) -> str:
        """What is wrong, in words; empty where all are in their places."""
        for name, descriptor in self._held.items():
            try:
                there = os.lstat(self._folder / name)
            except OSError as error:
                gone = not os.fstat(descriptor).st_nlink
                return f"{name} was {'removed' if gone else 'moved away'} under the daemon ({error.strerror})"
            if _identity(there) != self.files[name] or not os.fstat(descriptor).st_nlink:
                what = "a symbolic link" if stat.S_ISLNK(there.st_mode) else "another file"
                return f"{name} was replaced under the daemon: {what} is in its place"
            self.sizes[name] = there.st_size
        return ""

    def release(self, *names: str) -> None:
        """Look at these no more."""
        for name in names:
            if name in self._held:
                os.close(self._held.pop(name))

    def close(self) -> None:
        self.release(*list(self._held))


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino
