"""Are the files that are open still the files at their paths, and as long as they must be?

A file that was unlinked or replaced under the daemon takes every write, and all that is written is gone when
its last descriptor is closed. Descriptors that are opened with O_PATH tell of the file that they were opened
on: how many names it has. Its device and inode are held against those at the path; the numbers alone would
not do, since they are given to another file once this one is gone. To close such a descriptor costs no lock
of SQLite's.

The database is no shorter than the smaller of its last size and all that was committed since (a foreign
VACUUM cuts it rightly). Its log may be cut to nothing by a checkpoint, a foreign one too, and never so that
frames are lost which its index counts.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from ..errors import StoreUnavailable
from . import outside

_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Watch:
    """Over the database at `path`, its write-ahead log and other files of that folder: those of `names`.

    `committed` gives the bytes of the database as it was last committed, by whomever.
    """

    def __init__(self, path: Path, names: Sequence[str], committed: Callable[[], int]) -> None:
        """Raises OSError where one of them can't be had."""
        self.names = names
        self._path, self._committed = path, committed
        self._held: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._cut = ""  # why one of them is too short: this stays, while what was moved may come back
        try:
            for name in names:
                self._held[name] = os.open(path.with_name(name), _FLAGS)
                self._sizes[name] = os.fstat(self._held[name]).st_size
            self.files = {name: _identity(os.fstat(fd)) for name, fd in self._held.items()}
        except OSError:
            self.close()
            raise
        self._size = self._least = self._sizes.get(path.name, 0)
        self._log = 0

    def look(self, unsure: bool = False) -> str:
        """What is wrong, in words; empty where nothing is, or nothing is watched. `unsure`: it isn't known
        what was committed, so lengths tell nothing."""
        return (
            self._cut or self._look_at_places() or ("" if unsure or not self._held else self._look_at_sizes())
        )

    def _look_at_places(self) -> str:
        for name, descriptor in self._held.items():
            try:
                there = os.lstat(self._path.with_name(name))
            except PermissionError as error:
                return f"{name} was closed to the daemon ({error.strerror})"
            except OSError as error:
                gone = not os.fstat(descriptor).st_nlink
                return f"{name} was {'removed' if gone else 'moved away'} under the daemon ({error.strerror})"
            if _identity(there) != self.files[name] or not os.fstat(descriptor).st_nlink:
                what = "a symbolic link" if stat.S_ISLNK(there.st_mode) else "another file"
                return f"{name} was replaced under the daemon: {what} is in its place"
            self._sizes[name] = there.st_size
        return ""

    def _look_at_sizes(self) -> str:
        log_name = self._path.name + "-wal"
        size, log = self._sizes[self._path.name], self._sizes[log_name]
        try:
            length = self._committed()  # read after the size: who cuts the file commits before that
        except StoreUnavailable as error:
            return error.message
        if size < min(self._size, self._least, length):
            self._cut = f"{self._path.name} was cut to {size} bytes under the daemon"
        elif log < self._log and (cut := outside.cut(self._path)) is not False:
            why = f"{log_name} was cut to {log} bytes under the daemon"
            if cut is None:
                return f"{why}; whether it may be can't be found out now"
            self._cut = why
        self._size, self._log, self._least = size, log, length
        return self._cut

    def begun(self) -> None:
        """A transaction of ours was: nobody else's COMMIT comes between this and ours."""
        if self._held:
            self._least = min(self._least, self._committed())

    def checkpointed(self) -> None:
        """We cut the log."""
        self._log = 0

    def release(self, *names: str) -> None:
        """Look at these no more."""
        for name in names:
            if name in self._held:
                os.close(self._held.pop(name))

    def close(self) -> None:
        self.release(*list(self._held))


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino
