"""The shapes of a key, and which files are trusted with one."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.config.keysource import (
    READERS,
    SCRATCH_SIZE,
    Source,
    decode_into,
    distrust,
    read,
)
from progressdb_kms.crypto.memory import LockedBuffer
from progressdb_kms.errors import ConfigError

KEY = bytes(range(100, 132))
RAW = bytes([0xF0, *range(31)])

SHAPES = [
    (KEY.hex().encode(), KEY),
    (KEY.hex().upper().encode(), KEY),
    (b" \t\r\n" + KEY.hex().encode() + b"\r\n\n ", KEY),
    (RAW, RAW),
    (b"\n" + RAW[1:], b"\n" + RAW[1:]),
    (b"", "it has 0 bytes"),
    (b" \n", "it has 2 bytes"),
    (RAW + b"\n", "exactly 32 raw bytes; it has 33 bytes"),
    (RAW[1:], "it has 31 bytes"),
    (RAW * 2, "is not one"),
    (KEY.hex().encode()[:-1], "it has 63 bytes"),
    (KEY.hex().encode() + b"0", "it has 65 bytes"),
    (KEY.hex().encode()[:32] + b" " + KEY.hex().encode()[32:], "it has 65 bytes"),
    (KEY.hex().encode()[:-1] + b"x", "is not one"),
    (b"0x" + KEY.hex().encode()[2:], "is not one"),
    (KEY.hex().encode()[:32], "32 characters of text"),
    (b"correct horse battery staple 123", "32 characters of text"),
    (b"ABEiM0RVZneImaq7zN3u/wARIjNEVWZ3iJmqu8zd7v8=", "it has 44 bytes"),
    (b"\xef\xbb\xbf" + KEY.hex().encode(), "it has 67 bytes"),
    (b" " * (SCRATCH_SIZE - 64) + KEY.hex().encode(), f"is longer than {SCRATCH_SIZE - 1} bytes"),
]


@pytest.mark.parametrize(("content", "expected"), SHAPES)
def test_shapes(tmp_path: Path, content: bytes, expected: object) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    found, message = _read("file", str(path))
    if isinstance(expected, bytes):
        assert found == expected
    else:
        assert found is None
        assert str(expected) in message
        assert "the key" in message


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_a_key_or_a_value_error(content: bytes, raw: bool) -> None:
    out = memoryview(bytearray(32))
    try:
        decode_into(memoryview(bytearray(content)), len(content), out, raw=raw)
    except ValueError as error:
        assert not content.strip() or content.strip().decode("latin-1") not in str(error) or len(content) < 16
    else:
        stripped = content.strip(b" \t\r\n")
        assert out == content or out == bytes.fromhex(stripped.decode())


def test_the_scratch_is_wiped_and_no_slice_of_it_lives(tmp_path: Path) -> None:
    for content in (row[0] for row in SHAPES):
        path = tmp_path / "key"
        path.write_bytes(content)
        path.chmod(0o600)
        with LockedBuffer(SCRATCH_SIZE + 32, "off") as memory:
            error: ConfigError | None = None
            with memory.view[:SCRATCH_SIZE] as scratch, memory.view[SCRATCH_SIZE:] as out:
                try:
                    read(Source("file", str(path), "the key"), {}, scratch, out)
                except ConfigError as raised:
                    error = raised  # with the traceback, and so with the frames
                assert bytes(scratch) == bytes(SCRATCH_SIZE)
            memory.close()
            assert error is None or error.__traceback__ is not None


def _read(form: str, place: str, environ: dict[str, str] | None = None) -> tuple[bytes | None, str]:
    """The key, or None and the message with its hint."""
    scratch, out = memoryview(bytearray(SCRATCH_SIZE)), memoryview(bytearray(32))
    try:
        read(Source(form, place, "the key"), environ or {}, scratch, out)
    except ConfigError as error:
        assert error.hint
        return None, f"{error.message} | {error.hint}"
    return bytes(out), ""


# ---- files ---------------------------------------------------------------------------------------


def _about(mode: int, uid: int) -> os.stat_result:
    return os.stat_result((mode, 0, 0, 1, uid, 0, 32, 0, 0, 0))


FILE = stat.S_IFREG


@pytest.mark.parametrize(
    ("mode", "owner", "credential", "words"),
    [
        (FILE | 0o600, 1000, False, None),
        (FILE | 0o400, 1000, False, None),
        (FILE | 0o400, 0, False, None),
        (FILE | 0o640, 1000, False, "open to others (mode 0640)"),
        (FILE | 0o604, 0, False, "open to others (mode 0604)"),
        (FILE | 0o420, 1000, False, "open to others (mode 0420)"),
        (FILE | 0o440, 0, False, "open to others (mode 0440)"),
        (FILE | 0o440, 0, True, None),
        (FILE | 0o400, 1000, True, None),
        (FILE | 0o440, 1000, True, "open to others (mode 0440)"),
        (FILE | 0o444, 0, True, "open to others (mode 0444)"),
        (FILE | 0o460, 0, True, "open to others (mode 0460)"),
        (FILE | 0o600, 1001, False, "belongs to uid 1001"),
        (FILE | 0o600, 1001, True, "belongs to uid 1001"),
        (stat.S_IFIFO | 0o600, 1000, False, "no regular file"),
        (stat.S_IFDIR | 0o700, 1000, True, "no regular file"),
        (stat.S_IFCHR | 0o600, 0, False, "no regular file"),
    ],
)
def test_distrust(mode: int, owner: int, credential: bool, words: str | None) -> None:
    found = distrust("/k", _about(mode, owner), 1000, credential)
    assert found is None if words is None else found is not None and words in found[0]


def test_a_file_of_somebody_else_s_is_for_chown_whatever_its_mode() -> None:
    """It was told as his, and that chmod was what to do."""
    for mode in (0o600, 0o644):
        found = distrust("/k", _about(FILE | mode, 1001), 1000, False)
        assert found is not None and found[1] == "chown it to root or the daemon's user, chmod 0600 /k"


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key", 0o600)
    assert "no regular file" in _read("file", str(tmp_path / "key"))[1]


def test_a_missing_file(tmp_path: Path) -> None:
    assert "the key can't be read: No such file" in _read("file", str(tmp_path / "key"))[1]


def test_a_link_is_followed_to_what_is_checked(tmp_path: Path) -> None:
    """Orchestrators hand secrets out as links."""
    (tmp_path / "real").write_bytes(RAW)
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "key").symlink_to("real")
    assert _read("file", str(tmp_path / "key"))[0] == RAW
    (tmp_path / "real").chmod(0o644)
    assert "mode 0644" in _read("file", str(tmp_path / "key"))[1]


# ---- the other places ------------------------------------------------------------------------------


def test_credential(tmp_path: Path) -> None:
    (tmp_path / "master").write_bytes(KEY.hex().encode())
    (tmp_path / "master").chmod(0o400)
    assert _read("credential", "master", {"CREDENTIALS_DIRECTORY": str(tmp_path)})[0] == KEY
    assert "No such file" in _read("credential", "other", {"CREDENTIALS_DIRECTORY": str(tmp_path)})[1]
    message = _read("credential", "master")[1]
    assert "$CREDENTIALS_DIRECTORY is not set" in message
    assert "LoadCredential=master:" in message and "help install" in message


def test_variable() -> None:
    for value in (KEY.hex(), f" {KEY.hex()}\n"):
        assert _read("variable", "V", {"V": value})[0] == KEY
    for value in ("", KEY.hex()[1:], "ä" * 64, "\udc80" * 64, " " * 300, RAW.decode("latin-1")):
        found, message = _read("variable", "V", {"V": value})
        assert found is None
        assert value not in message or not value


def _pipe(content: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return reader


def test_pipe_is_read_once_closed_and_forgotten() -> None:
    reader = _pipe(KEY.hex().encode())
    environ = {"PROGRESSDB_KMS_MASTER_KEY_FD": str(reader), "OTHER": "1"}
    assert _read("pipe", str(reader), environ)[0] == KEY
    assert environ == {"OTHER": "1"}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)


@pytest.mark.parametrize("content", [b"", RAW, b"x" * 64, b"0" * 256])
def test_pipe_with_what_is_no_key(content: bytes) -> None:
    """Raw bytes too: a variable of the environment can't hold them."""
    reader = _pipe(content)
    found, message = _read("pipe", str(reader), {"PROGRESSDB_KMS_MASTER_KEY_FD": str(reader)})
    assert found is None
    assert "hex digits" in message
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)


def test_pipe_of_a_number_that_is_none(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        for number in ("", "-1", "+7", "x", "99999", "1234567", "٣", str(descriptor)):
            assert "names no pipe" in _read("pipe", number, {"PROGRESSDB_KMS_MASTER_KEY_FD": number})[1]
        os.fstat(descriptor)  # not closed: it is somebody else's
    finally:
        os.close(descriptor)


def test_the_places_are_five() -> None:
    assert set(READERS) == {"file", "credential", "pipe", "variable", "hex"}


def test_a_key_that_the_parser_did_not_hand_over() -> None:
    """Its process died, or the machine is out of pipes: told, and no key of zeros."""
    ends = os.pipe()
    os.write(ends[1], bytes(31))
    with pytest.raises(ConfigError, match="the key was lost on its way from the parser"):
        read(
            Source("hex", str(ends[0]), "the key"), {}, memoryview(bytearray(256)), memoryview(bytearray(32))
        )
    for end in ends:
        os.close(end)


@pytest.mark.parametrize(
    ("make", "said", "advice"),
    [
        (lambda p: os.mkfifo(p, 0o600), "is no regular file", "LoadCredential=kek:/PATH"),
        (lambda p: p.mkdir(), "is a folder", "name the file in it"),
        (lambda p: (p.write_bytes(bytes(32)), p.chmod(0o640)), "mode 0640", "master_key_credential: kek"),
        (lambda p: (p.write_bytes(bytes(32)), p.chmod(0o604)), "mode 0604", "change the key"),
    ],
    ids=["fifo", "folder", "group", "others"],
)
def test_the_advice_fits(tmp_path: Path, make: Any, said: str, advice: str) -> None:
    path = tmp_path / "kek"
    make(path)
    source = Source("file", str(path), "master_key_file")
    with pytest.raises(ConfigError) as caught:
        read(source, {}, memoryview(bytearray(SCRATCH_SIZE)), memoryview(bytearray(32)))
    assert said in caught.value.message and advice in caught.value.hint
