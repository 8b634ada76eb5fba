"""`rotate-kek`: the key-file dance of `keyfiles` against a running daemon, and what the operator is told."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..client import Client, ClientError, RotationResult
from ..crypto.aead import KEY_SIZE
from ..crypto.keyring import fingerprint
from ..crypto.memory import LockedBuffer
from . import asowner, keyfiles
from .console import CommandFailed, Progress, UsageError, say, show
from .keyfiles import Active, ChangeOver, KeyFiles

if TYPE_CHECKING:
    from ..config.options import Settings

IN_A_FLEET = (
    "Now, on each host, let the new key be the master key, and take it out of next_master_keys: a start in "
    "between works.\nThe old key is no longer in any daemon's memory. What it wrapped, backups too, is dead "
    "once no file holds it.\n"
)

NOTHING_LEFT = "interrupted, and no rotation is left to finish: `progressdb-kms status` tells the active KEK"

REFRESH = 0.2
"""Seconds between two questions how far a rotation is; asked only where a terminal shows it."""


class Done(NamedTuple):
    """What there is to show: the result, further fields, and a remark for stderr."""

    result: RotationResult
    files: dict[str, Any]
    remark: str = ""


def run(args: argparse.Namespace, settings: Settings) -> None:
    client = Client(settings.socket, server_uid=args.server_uid)
    with client as kms, Progress("rotate-kek") as bar, LockedBuffer(KEY_SIZE) as memory:
        service = Daemon(kms, bar)
        if args.kek_id is not None:
            done = Done(service.rotate_to(args.kek_id, args.dry_run), {})
            if not args.dry_run:
                done = done._replace(remark=IN_A_FLEET)
            _show(args, done)
            return
        if args.generate:
            keyfiles.random_key(memory.view)
        elif args.new_key_file:
            keyfiles.read_key(Path(args.new_key_file), memory.view, asowner.daemon_user(settings))
        if args.dry_run:
            if settings.master_key_file:
                _over(args, settings, service).rehearse()
            done = Done(service.rotate(memory.view, dry_run=True), {})
        elif settings.master_key_file:
            done = _in_file(args, settings, service, memory.view)
        else:
            done = _elsewhere(args, settings, service, memory.view)
    _show(args, done)


def _in_file(args: argparse.Namespace, settings: Settings, service: Daemon, key: memoryview) -> Done:
    current = Path(str(settings.master_key_file))
    old = keyfiles.kek_id_if_there(current, _home(settings).st_uid)
    kept = KeyFiles(current).kept(old) if old else None
    change = _over(args, settings, service)
    try:
        result = change.resume() if args.resume else change.rotate(key)
    except BaseException as error:
        if not isinstance(error, Exception):
            say(
                f"interrupted: {keyfiles.RESUME} to finish"
                if KeyFiles(current).following.exists()
                else NOTHING_LEFT
            )
        raise
    files = {"key_file": current, "old_key_file": kept if kept and kept.exists() else None}
    remark = f"The daemon's configuration names another file than {current}: {result.warning}\n"
    return Done(result, files, remark if result.warning else "")


def _over(args: argparse.Namespace, settings: Settings, service: Daemon) -> ChangeOver:
    files = KeyFiles(Path(str(settings.master_key_file)))
    return ChangeOver(files, service, forget_old=args.forget_old, owner=_home(settings))


def _home(settings: Settings) -> os.stat_result:
    """Whose the files of the daemon are."""
    there = settings.data_dir.exists()
    return os.stat(settings.data_dir if there else Path(str(settings.master_key_file)).parent)


def _elsewhere(args: argparse.Namespace, settings: Settings, service: Daemon, key: memoryview) -> Done:
    if args.resume:
        raise CommandFailed(
            "the configuration names no master_key_file, so there is nothing to resume",
            hint="the new key is in the file that rotate-kek named: `progressdb-kms kek-id FILE` tells which",
        )
    if args.new_key_file is not None:
        path, beside = Path(args.new_key_file).absolute(), None
    elif settings.config_file is not None:
        beside = Path(settings.config_file)
        path = beside.with_name(f"master-key-{fingerprint(key)}")
    else:
        raise UsageError(
            "--generate needs --config: the new key file is made beside it (--new-key-file needs none)"
        )
    result = keyfiles.rotate_elsewhere(path, key, service, beside)
    return Done(result, {"key_file": path}, _lines_to_change(settings, path))


def _lines_to_change(settings: Settings, path: Path) -> str:
    """What only the operator can do: the key stands in a place that is not ours to write."""
    master = settings.master
    if master is not None and master.form == "credential":
        place, old, new = "the unit", "the source of the credential", f"LoadCredential={master.place}:{path}"
    elif settings.config_file is not None:
        place, old, new = settings.config_file, "the line", f"master_key_file: {path}"
        old += "\n    master_key_hex: …"
    else:
        place, old = "the daemon's environment", "PROGRESSDB_KMS_MASTER_KEY_HEX"
        new = f"PROGRESSDB_KMS_MASTER_KEY_FILE={path}"
    return (
        f"Before the next start, in {place}, replace {old}\nby\n    {new}\n"
        "The daemon goes on until then, but can't be started anew.\n"
    )


def _show(args: argparse.Namespace, done: Done) -> None:
    result = done.result
    values: dict[str, Any] = {
        "status": "dry_run" if args.dry_run else "ok",
        "kek_id": result.kek_id,
        "kek_version": result.kek_version or None,
        "rewrapped": result.rewrapped if result.kek_version else None,
        "backup": result.backup or None,
        "by_kek": dict(result.by_kek) if args.dry_run else None,
        **{name: str(path) for name, path in done.files.items() if path is not None},
    }
    show({name: value for name, value in values.items() if value is not None}, args.json)
    if "key_file" in done.files and not args.dry_run:
        sys.stderr.write(KEEP.format(done.files["key_file"]))
    sys.stderr.write(done.remark)


KEEP = "Keep a copy of {} in a safe place, now: the old key opens no backup that is made from here on.\n"
"""What is there, if anything, is the key of before."""


class Daemon:
    """The daemon as `keyfiles` asks it, with a bar while it works."""

    def __init__(self, kms: Client, bar: Progress) -> None:
        self._kms = kms
        self._bar = bar

    def active(self) -> Active:
        found = self._kms.status()
        rotation = found.get("rotation") or {}
        if rotation:
            self._bar(int(rotation.get("done", 0)), int(rotation.get("total", 0)))
        target = (
            None if rotation.get("phase") == "checking" else rotation.get("new_kek_id")
        )  # checking: a dry run
        return Active(str(found["kek_id"]), target)

    def rotate(self, key: memoryview, dry_run: bool = False) -> RotationResult:
        with self._watched():
            return self._kms.rotate_kek(key, dry_run)

    def rotate_to(self, kek_id: str, dry_run: bool) -> RotationResult:
        with self._watched():
            return self._kms.rotate_to(kek_id, dry_run)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join(1.0)

    def _watch(self, done: threading.Event) -> None:
        while self._bar.on and not done.wait(REFRESH):
            with contextlib.suppress(ClientError):
                self.active()
