"""A key on its way from where it lies into locked memory: from a file, a credential, a pipe, a variable.

A file is opened first and looked at afterwards, through its descriptor: what was checked is what is read.
The bytes go by `readv` into a locked scratch buffer, are decoded there, and the scratch is wiped. A key has
one of two shapes, told apart by length alone; nothing of another length is stretched, cut or hashed into one.

    32 bytes, not all of them printable            the key itself
    64 hex digits, white space around them         the key in hex

Each slice of a buffer is made in a `with`, so that after an error the buffer can be unmapped although the
traceback still holds the frames.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, MutableMapping
from typing import Callable, NamedTuple

from ..crypto.memory import wipe
from ..encoding import hex_decode_into
from ..errors import ConfigError, UnusableKey

KEY_SIZE = 32
SCRATCH_SIZE = 256
"""Bytes of locked scratch for one key file: 64 digits and white space. A longer file is refused."""

FILE_VARIABLE = "PROGRESSDB_KMS_MASTER_KEY_FILE"
HEX_VARIABLE = "PROGRESSDB_KMS_MASTER_KEY_HEX"
FD_VARIABLE = "PROGRESSDB_KMS_MASTER_KEY_FD"
"""Number of the pipe by which `hardening.prepare` hands on the key that stood in HEX_VARIABLE."""

MASTER, PREVIOUS, COMING, PENDING = "master", "previous_master_keys", "next_master_keys", "pending"
"""What a key is for. Those of the two lists only unwrap, until a rotation moves to a coming one; the pending
one is of a rotation that was not finished."""

HEX = "hex"
"""The form of a key that stands in the configuration file: its parser decoded it, see `yamlfile`."""

_SPACE = b" \t\r\n"
NO_ACCESS = "run it as root, or as the daemon's user, who must be able to read this"


class Source(NamedTuple):
    """Where one key lies. `form`: a name of READERS. `label` is for messages, `role` is one of the four."""

    form: str
    place: str
    label: str
    role: str = MASTER


def read(source: Source, environ: Mapping[str, str], scratch: memoryview, out: memoryview) -> None:
    """Read a key into `out` (32 bytes) by way of `scratch` (SCRATCH_SIZE bytes, locked, wiped at the end).

    Raises ConfigError, which names the source and never quotes it. UnusableKey leaves it to the caller to say
    what to do: that depends on whether a store needs the key.
    """
    try:
        READERS[source.form](source, environ, scratch, out)
    except ValueError as error:
        raise UnusableKey(f"{source.label} {error}") from None
    except PermissionError as error:
        raise ConfigError(f"{source.label} can't be read: {error.strerror}", hint=NO_ACCESS) from None
    except OSError as error:
        raise UnusableKey(f"{source.label} can't be read: {error.strerror}") from None
    finally:
        wipe(scratch)


# ---- the five places -------------------------------------------------------------------------------


def _from_file(source: Source, environ: Mapping[str, str], scratch: memoryview, out: memoryview) -> None:
    """A credential is a file, too."""
    path, credential = source.place, source.form == "credential"
    if credential:
        folder = environ.get("CREDENTIALS_DIRECTORY")
        if not folder:
            raise ConfigError(
                f"{source.label} can't be read: $CREDENTIALS_DIRECTORY is not set",
                hint=f"the unit needs LoadCredential={source.place}:FILE; for a command see `help install`",
            )
        path = os.path.join(folder, source.place)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        about, link = os.fstat(descriptor), os.lstat(path)
        if stat.S_ISDIR(about.st_mode):  # as docker makes one in the place of a file that is gone
            raise UnusableKey(f"{source.label} is a folder", hint="name the file in it")
        trouble = distrust(path, about, os.geteuid(), credential)
        # Orchestrators hand secrets out as links; another user's leads where he likes.
        if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.geteuid()):
            why = f"is a symbolic link that belongs to uid {link.st_uid}"
            trouble = why, f"chown -h it to root or the daemon's user: {path}"
        if trouble:
            raise ConfigError(f"{source.label} {trouble[0]}", hint=trouble[1], code="distrust")
        decode_into(scratch, _fill(descriptor, scratch), out)
    finally:
        os.close(descriptor)


def _from_pipe(source: Source, environ: Mapping[str, str], scratch: memoryview, out: memoryview) -> None:
    """What `hardening.prepare` handed on. It can be read once, so its number is forgotten."""
    number = source.place
    if not (number.isascii() and number.isdigit() and len(number) < 6 and _is_pipe(int(number))):
        raise ConfigError(
            f"{FD_VARIABLE} names no pipe", hint=f"leave it unset; it is made from {HEX_VARIABLE}"
        )
    if isinstance(environ, MutableMapping):
        del environ[FD_VARIABLE]
    try:
        decode_into(scratch, _fill(int(number), scratch), out, raw=False)
    finally:
        os.close(int(number))


def _from_variable(source: Source, environ: Mapping[str, str], scratch: memoryview, out: memoryview) -> None:
    """The variable itself, where no re-exec took the key out of it: a character at a time makes no copy."""
    text = environ[source.place]
    if len(text) > len(scratch):
        raise ValueError(f"is longer than {len(scratch)} characters: a key is 64 hex digits")
    for at, char in enumerate(text):
        scratch[at] = ord(char) if char.isascii() else 0
    decode_into(scratch, len(text), out, raw=False)


def _from_parser(source: Source, environ: Mapping[str, str], scratch: memoryview, out: memoryview) -> None:
    if os.readv(int(source.place), [out]) != KEY_SIZE:
        raise ConfigError(f"{source.label} was lost on its way from the parser")


READERS: Mapping[str, Callable[[Source, Mapping[str, str], memoryview, memoryview], None]] = {
    "file": _from_file,
    "credential": _from_file,
    "pipe": _from_pipe,
    "variable": _from_variable,
    HEX: _from_parser,
}


# ---- files -------------------------------------------------------------------------------------------


def distrust(path: str, about: os.stat_result, uid: int, credential: bool) -> tuple[str, str] | None:
    """Why a key file can't be trusted or is no secret, and what to do about it; or None.

    systemd lets the user of a service in by an ACL, which shows as mode 0440 on a file of root.
    """
    if not stat.S_ISREG(about.st_mode):
        return "is no regular file", (
            "a key that comes from a program is handed over as a credential: master_key_credential: kek, and "
            "in the unit LoadCredential=kek:/PATH (systemd.exec(5)), where PATH is a file or a socket"
        )
    if about.st_uid not in (0, uid):
        why = f"belongs to uid {about.st_uid}: it must be root's or the daemon's own"
        return why, f"chown it to root or the daemon's user, chmod 0600 {path}"
    allowed = 0o740 if credential and about.st_uid == 0 else 0o700
    if about.st_mode & 0o777 & ~allowed:
        return f"is open to others (mode {about.st_mode & 0o7777:04o})", (
            f"chmod 0600 {path}, and change the key if others may have read it; where a group is to read it, "
            f"hand it over as a credential: master_key_credential: kek, in the unit LoadCredential=kek:{path}"
        )
    return None


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _fill(descriptor: int, scratch: memoryview) -> int:
    """Read to the end; returns the length. Raises ValueError for what is longer than a key can be."""
    size = 0
    while size < len(scratch):
        with scratch[size:] as rest:
            count = os.readv(descriptor, [rest])
        if not count:
            return size
        size += count
    raise ValueError(f"is longer than {len(scratch) - 1} bytes: a key is 64 hex digits or 32 raw bytes")


# ---- the two shapes ------------------------------------------------------------------------------------


def decode_into(text: memoryview, size: int, out: memoryview, *, raw: bool = True) -> None:
    """Decode the first `size` bytes of `text`. `raw=False`: hex only.

    Raises ValueError; the message completes "NAME …" and quotes nothing.
    """
    if size == KEY_SIZE and raw:
        if all(0x20 <= text[i] < 0x7F or text[i] in _SPACE for i in range(size)):
            raise ValueError("holds 32 characters of text: a key is 64 hex digits or 32 random bytes")
        with text[:size] as key:
            out[:] = key
        return
    start, end = _stripped(text, size)
    if end - start != 2 * KEY_SIZE:
        either = ", or exactly 32 raw bytes" if raw else ""
        raise ValueError(
            f"must be 64 hex digits, white space around them allowed{either}; it has {size} bytes"
        )
    with text[start:end] as digits:
        hex_decode_into(digits, out)


def _stripped(text: memoryview, size: int) -> tuple[int, int]:
    start, end = 0, size
    while start < end and text[start] in _SPACE:
        start += 1
    while end > start and text[end - 1] in _SPACE:
        end -= 1
    return start, end
