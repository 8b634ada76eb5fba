"""Key files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..command import JSON, OFFLINE, Arg, command, no_stream
from ..console import CommandFailed, error_detail, safe, say, show

if TYPE_CHECKING:
    pass


@command(
    "genkey",
    OFFLINE,
    "make a key file",
    "Writes 32 random bytes as hex, mode 0600, synced with the folder; never over a file that "
    "exists. Prints the kek_id, never the key. Keep a copy in a safe place: without it every DEK "
    "is lost.",
    (Arg(("file",), "the key file to make", "file", "FILE"), JSON),
    keys=True,
    examples=("progressdb-kms genkey /etc/progressdb-kms/kek.key",),
)
def genkey(args: argparse.Namespace) -> None:
    no_stream(args.file, "a key goes to a file of its own, never through a pipe or a terminal")
    from ...crypto.aead import KEY_SIZE
    from ...crypto.memory import LockedBuffer
    from .. import keyfiles

    with LockedBuffer(KEY_SIZE) as memory:
        kek_id = keyfiles.random_key(memory.view)
        keyfiles.write_key(Path(args.file), memory.view)
    show({"file": args.file, "kek_id": kek_id}, args.json)


@command(
    "kek-id",
    OFFLINE,
    "tell the kek_id of key files",
    "Prints the fingerprint by which the store names a KEK: finds the file that a message asks for.",
    (Arg(("file",), "a key file", "file", "FILE", "+"), JSON),
    keys=True,
    examples=("progressdb-kms kek-id /etc/progressdb-kms/kek.key*",),
)
def kek_id(args: argparse.Namespace) -> None:
    from ...errors import KMSError
    from .. import keyfiles

    bad = 0
    for name in args.file:
        try:
            found = keyfiles.kek_id_of(Path(name))
        except KMSError as error:
            if len(args.file) == 1:
                raise
            bad += 1
            if args.json:
                show({"file": name, "error": error_detail(error)}, True)
            else:
                say(error.message)
            continue
        if args.json:
            show({"file": name, "kek_id": found}, True)
        else:
            sys.stdout.write(f"{found}  {safe(name)}\n")
    if bad:
        raise CommandFailed(f"{bad} of {len(args.file)} hold no key that may be read")
