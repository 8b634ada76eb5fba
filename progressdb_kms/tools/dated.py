"""`backup FOLDER`: backups under the times at which they were made, and what goes when a new one is there.

    kms-0123abcd-20261126T020000Z.backup            the data-dir's id (its first 8 digits) and the time
    kms-0123abcd-20261126T020000Z.backup.failed     made, but it did not pass the drill

With `--keep N` the new one is opened as a drill at once. Only where it passes, older ones go, and of those
only what was made here: a regular file of this user's (for root of the folder's owner, as the new one is),
with a name of this form and the id of this data-dir, whose last line is that of a whole backup; the newest N
stay, the new one among them. One that is dated later than the new one was made while a clock was wrong, then
or now: it counts for nothing and stays, or it would take the place of each that is made from here on. What
failed a drill is for a person to look at: it counts for nothing either, and nothing removes it. What a killed
one left half done goes before the new one is made, with `--keep` or without. Two hosts may share a folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

from ..config.load import Loaded
from ..disk import sync
from ..encoding import json_dumps
from ..service import lastbackup
from ..service.lastbackup import LastBackup
from ..service.start import host_id
from . import asowner, drill
from .backup import Progress, backup, check_target, last_line, remove_all_left
from .checkup import FAILED
from .console import CommandFailed, replaced, say

ID = 8
"""Hex digits of the data-dir's id that stand in a name."""


def make(loaded: Loaded, folder: Path, keep: int | None, progress: Progress) -> dict[str, Any]:
    """A backup of the present time. With `keep` also a drill, after which old ones are removed. Raises
    CommandFailed where one of these fails: nothing was removed then."""
    data_dir = loaded.settings.data_dir
    with asowner.acting_as(asowner.of(data_dir)):
        start = f"kms-{host_id(data_dir)[:ID]}"
    file = folder / f"{start}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.backup"
    check_target(data_dir, file)  # in a folder of others nothing is removed
    _remove_left(loaded, folder, f"{start}-*.backup")
    result = made(loaded, file, progress)
    note(data_dir, file)
    if keep is not None:
        _drill(loaded, file, progress)
        with asowner.acting_as(asowner.of(folder)):
            result.update(checked=True, removed=_prune(file, start, keep))
    return result


def _remove_left(loaded: Loaded, folder: Path, names: str) -> None:
    """Of a night that was cut short: no other has its name."""
    remove_all_left(folder, names)
    if loaded.settings.store != "sqlite":
        from . import fleetbackup

        fleetbackup.remove_all_left(folder, names)


def made(loaded: Loaded, file: Path, progress: Progress) -> dict[str, Any]:
    """A backup of this host's store, or of its fleet's."""
    if loaded.settings.store == "sqlite":
        return backup(loaded.settings.data_dir, file, progress)
    from . import fleetbackup

    return fleetbackup.make(loaded, file, progress)


def _drill(loaded: Loaded, file: Path, progress: Progress) -> None:
    try:
        drill.check(loaded, file, progress)
    except CommandFailed as error:
        aside = file.with_name(file.name + FAILED)
        os.rename(file, aside)
        sync(file.parent)
        with contextlib.suppress(CommandFailed):  # it may have failed because it is damaged
            note(loaded.settings.data_dir, aside)
        raise CommandFailed(
            f"{error.message}; it is kept as {aside.name}, and no older one was removed", hint=error.hint
        ) from None
    note_checked(loaded.settings.data_dir, file)


def _prune(new: Path, start: str, keep: int) -> list[str]:
    """Returns what was removed."""
    folder, form = new.parent, re.compile(re.escape(start) + "-[0-9]{8}T[0-9]{6}Z[.]backup")
    names = sorted((name for name in os.listdir(folder) if form.fullmatch(name)), reverse=True)
    later = names[: names.index(new.name)]
    if later:
        say(f"{len(later)} in {folder} dated later than the new one, up to {later[0]}: left, and not counted")
        names = names[len(later) :]
    old = [folder / name for name in names if _ours(folder / name)][keep:]
    for file in old:
        file.unlink()
    if old:
        sync(folder)
    return [str(file) for file in old]


def _ours(file: Path) -> bool:
    about = file.lstat()
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
        return False
    try:
        last_line(file)
    except CommandFailed:
        say(f"{file} is no whole backup: it is left where it is")
        return False
    return True


# ---- the note of the last one ------------------------------------------------------------------------


def note(data_dir: Path, file: Path) -> None:
    """A backup was made."""
    contents, old = last_line(file), lastbackup.read(data_dir)
    checked = old.checked_at if old else ""
    _write(data_dir, LastBackup(str(file.absolute()), contents.created_at, contents.sha256, checked))


def note_checked(data_dir: Path, file: Path) -> None:
    """A backup passed its drill: of interest where it is the last one that was made of this store."""
    last = lastbackup.read(data_dir)
    with contextlib.suppress(CommandFailed):  # a rescued store has no last line
        contents = last_line(file)
        if last is not None and last.sha256 == contents.sha256:
            _write(data_dir, last._replace(checked_at=contents.created_at))


def _write(data_dir: Path, last: LastBackup) -> None:
    """The backup is there also where it can't be noted."""
    try:
        with (
            asowner.acting_as(asowner.of(data_dir)),
            replaced(data_dir / lastbackup.FILE_NAME) as file,
        ):
            file.write(json_dumps(last._asdict()).encode() + b"\n")
    except OSError as error:
        say(f"the daemon is not told of this backup: {data_dir}: {error.strerror}")
