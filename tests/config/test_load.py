"""Settings and keys from files, flags and the environment; and that nothing of a key is told or left."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import grp
import hmac
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.config import keysource, yamlfile
from progressdb_kms.config import load as config
from progressdb_kms.config.keysource import MASTER, PENDING, PREVIOUS, Source
from progressdb_kms.config.load import Loaded, load
from progressdb_kms.config.options import MAX_PREVIOUS, Settings
from progressdb_kms.config.weakkeys import check_master_key
from progressdb_kms.errors import ConfigError, KMSError, WeakKey
from tests.harness.memscan import Secret, cannot_scan, scan
from tests.harness.procs import children

REPO = Path(__file__).resolve().parents[2]


def key(number: int) -> bytes:
    """A key of tests: never weak, never a part of a message by chance."""
    return hmac.digest(b"tests", bytes([number]), "sha256")


A, B, C, D = map(key, range(4))
ALL = [A, B, C, D]


class Place:
    """A folder with a configuration file, and what is beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "kms.yaml"

    def put(self, name: str, data: object, mode: int = 0o600) -> str:
        path = self.folder / name
        path.write_bytes(data if isinstance(data, bytes) else str(data).encode())
        path.chmod(mode)
        return str(path)

    def load(
        self,
        text: object,
        environ: Mapping[str, str] | None = None,
        *,
        mode: int = 0o600,
        need_key: bool = True,
        **flags: str,
    ) -> Loaded:
        self.put("kms.yaml", text, mode)
        return load({"config": str(self.file), **flags}, environ or {}, need_key=need_key)

    def refused(self, text: object, environ: Mapping[str, str] | None = None, **options: Any) -> str:
        """The message and hint with which it is refused; no part of a key is in them."""
        return refused(lambda: self.load(text, environ, **options))


def of_role(loaded: Loaded, *roles: str) -> list[memoryview]:
    return [view for source, view in loaded.keys if source.role in roles]


def refused(act: Any) -> str:
    gc.disable()  # else it may free here what other tests left
    try:
        before = held()
        with pytest.raises(ConfigError) as caught:
            act()
        assert held() == before  # though the traceback still holds all frames
    finally:
        gc.enable()
    said = f"{caught.value.message} | {caught.value.hint}"
    for secret in ALL:
        for start in range(0, 56, 8):
            assert secret.hex()[start : start + 8] not in said.lower()
    return said


def held() -> tuple[str, int]:
    """Locked memory of this process in kB, and its open descriptors."""
    status = Path("/proc/self/status").read_text()
    return status.partition("VmLck:")[2].split()[0], len(os.listdir("/proc/self/fd"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


HEX = f"master_key_hex: {A.hex()}\n"


# ---- settings --------------------------------------------------------------------------------------


def test_defaults(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    with place.load(HEX) as loaded:
        settings = loaded.settings
    assert settings.config_file == str(place.file)
    assert settings.socket == Path("/tmp/progressdb-kms.sock")
    assert settings.data_dir == place.folder / "kms-data"
    assert (settings.socket_mode, settings.socket_group) == (0o600, None)
    assert settings.peer_rules[:2] == (None, None)
    assert settings.memory_lock == "try"
    assert settings.max_body_bytes == 8 * 1024 * 1024
    assert settings.max_connections == 2048
    assert (settings.idle_timeout, settings.request_timeout) == (120, 30)


FULL = (
    HEX
    + """\
socket: unix://run/s
socket_mode: 0660
socket_group: GROUP
tcp_address: 127.0.0.1:6820
data_dir: /var/lib/kms
allowed_peer_uids: [1000, 33]
admin_peer_uids: []
workers: 3
memory_lock: off
max_body_bytes: 65536
max_connections: 10
idle_timeout: 1.5
request_timeout: 2
allow_missing_keks: true
open_embedded_messages: true
kek_max_age_days: 365
"""
)


def test_every_key_in_a_file(place: Place) -> None:
    group = grp.getgrgid(0).gr_name
    with place.load(FULL.replace("GROUP", group)) as loaded:
        settings = loaded.settings
    assert settings == Settings(
        config_file=str(place.file),
        socket=place.folder / "run" / "s",  # relative to the file's folder
        socket_mode=0o660,
        socket_group=0,
        tcp_address="127.0.0.1:6820",
        data_dir=Path("/var/lib/kms"),
        allowed_peer_uids=frozenset((33, 1000)),
        admin_peer_uids=frozenset(),
        workers=3,
        memory_lock="off",
        max_body_bytes=65536,
        max_connections=10,
        idle_timeout=1.5,
        request_timeout=2.0,
        master=settings.master,
        allow_missing_keks=True,
        open_embedded_messages=True,
        kek_max_age_days=365,
        store="sqlite",
        postgresql=None,
        policies=(),
    )
    assert settings.master is not None and settings.master.label == f"master_key_hex in {place.file}"
    assert settings.master_key_file is None


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (3, 3), (4, 4), (96, 4)])
def test_workers_auto(place: Place, monkeypatch: pytest.MonkeyPatch, cores: int, workers: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    with place.load(HEX + "workers: auto") as loaded:
        assert loaded.settings.workers == workers


def test_precedence(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    environ = {"PROGRESSDB_KMS_SOCKET": "/env", "PROGRESSDB_KMS_DATA_DIR": "env"}
    with place.load(HEX + "socket: /file", environ, socket="unix:///flag") as loaded:
        assert loaded.settings.socket == Path("/flag")
        assert loaded.settings.data_dir == place.folder / "env"  # relative to the working directory
    with place.load(HEX + "socket: /file", environ) as loaded:
        assert loaded.settings.socket == Path("/file")
    with place.load(HEX, environ) as loaded:
        assert loaded.settings.socket == Path("/env")
    with place.load(HEX, {"PROGRESSDB_KMS_SOCKET": ""}) as loaded:
        assert loaded.settings.socket == Path("/tmp/progressdb-kms.sock")


class Recorder(dict[str, str]):
    """An environment that remembers what was asked of it, and can't be walked through unnoticed."""

    def __init__(self, values: Mapping[str, str]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)

    def _everything(self) -> Any:
        raise AssertionError("the whole environment was read")

    __iter__ = keys = values = items = copy = _everything


PRIVATE = {
    "PROGRESSDB_KMS_MASTER_KEY_HEX": B.hex(),
    "PROGRESSDB_KMS_MASTER_KEY_FILE": "/nonexistent",
    "PROGRESSDB_KMS_MASTER_KEY_FD": "0",
    "PROGRESSDB_KMS_ALLOWED_UIDS": "1",
}


def test_with_a_file_private_variables_are_not_even_read(place: Place) -> None:
    environ = Recorder(PRIVATE)
    with place.load(HEX, environ) as loaded:
        assert loaded.keys[0][1] == A
        assert loaded.settings.peer_rules[:2] == (None, None)
    assert environ.asked == {"PROGRESSDB_KMS_SOCKET", "PROGRESSDB_KMS_DATA_DIR"}
    message = place.refused("workers: 1", environ)
    assert "names no master key (the environment is not asked where there is a file)" in message
    assert environ.asked == {"PROGRESSDB_KMS_SOCKET", "PROGRESSDB_KMS_DATA_DIR"}


def test_without_a_file_the_environment(place: Place) -> None:
    environ = Recorder(
        {
            "PROGRESSDB_KMS_MASTER_KEY_FILE": place.put("key", A.hex()),
            "PROGRESSDB_KMS_ALLOWED_UIDS": "1000, 33",
            "PROGRESSDB_KMS_SOCKET": "unix:///s",
            "PROGRESSDB_KMS_DATA_DIR": "/d",
        }
    )
    with load({}, environ) as loaded:
        assert loaded.keys[0][1] == A
        assert loaded.settings.config_file is None
        assert loaded.settings.allowed_peer_uids == frozenset((33, 1000))
        assert loaded.settings.admin_peer_uids is None
        assert loaded.settings.socket == Path("/s")
        assert loaded.settings.data_dir == Path("/d")
        assert loaded.settings.master_key_file == str(place.folder / "key")
        label = f"PROGRESSDB_KMS_MASTER_KEY_FILE {place.folder / 'key'}"
        assert loaded.settings.master == Source("file", str(place.folder / "key"), label)
    assert set(PRIVATE) < environ.asked


@pytest.mark.parametrize("uids", ["", " ", "root", "1,,2", "1;2", "-1", "1.0"])
def test_wrong_uids_in_the_environment_never_let_everybody_in(uids: str) -> None:
    environ = {"PROGRESSDB_KMS_MASTER_KEY_HEX": A.hex(), "PROGRESSDB_KMS_ALLOWED_UIDS": uids}
    assert refused(lambda: load({}, environ)).startswith("PROGRESSDB_KMS_ALLOWED_UIDS must be")


def test_labels_name_the_place(place: Place) -> None:
    environ = {"PROGRESSDB_KMS_MASTER_KEY_HEX": A.hex(), "PROGRESSDB_KMS_SOCKET": "http://x"}
    assert refused(lambda: load({}, environ)).startswith("PROGRESSDB_KMS_SOCKET must be a path")
    assert place.refused(HEX, data_dir="").startswith("--data-dir must be a path")
    assert place.refused(HEX + "workers: x").startswith(f"workers in {place.file} must be auto")


@pytest.mark.parametrize("form", ["{}", "unix://{}"])
def test_a_socket_path_that_no_socket_can_have(place: Place, form: str) -> None:
    longest = "/" + "s" * 106
    with place.load(HEX + f"socket: {form.format(longest)}") as loaded:
        assert loaded.settings.socket == Path(longest)
    message = place.refused(HEX + f"socket: {form.format(longest + 's')}")
    assert "is 108 bytes long as an absolute path; a socket's path has at most 107" in message
    assert "socket" in place.refused(HEX + f"socket: /{'ä' * 54}")  # bytes count, not characters


def test_a_socket_for_everybody_needs_a_list_of_peers(place: Place) -> None:
    for mode in ("0666", "0602", "0604"):
        message = place.refused(HEX + f"socket_mode: {mode}")
        assert f"socket_mode {mode} lets every user of this host in" in message
        assert "allowed_peer_uids" in message
    with place.load(HEX + "socket_mode: 0666\nallowed_peer_uids: [1000]") as loaded:
        assert loaded.settings.socket_mode == 0o666


def test_socket_group(place: Place) -> None:
    with place.load(HEX + "socket_group: 4711") as loaded:
        assert loaded.settings.socket_group == 4711
    for name in ("no-such-group-here", "\N{SUPERSCRIPT TWO}"):
        assert "names no group of this host" in place.refused(HEX + f"socket_group: {name}")


def test_a_configuration_that_is_named_by_nothing_is_none() -> None:
    """`--config "$UNSET"`: the environment's keys and rules were taken instead."""
    message = refused(lambda: load({"config": ""}, {"PROGRESSDB_KMS_MASTER_KEY_HEX": A.hex()}))
    assert "is no regular file" in message and "--config names a file" in message


# ---- exactly one master key ------------------------------------------------------------------------


def test_no_master_key(place: Place) -> None:
    message = refused(lambda: load({}, {}))
    assert "no master key is given" in message
    assert "progressdb-kms genkey FILE" in message
    assert "PROGRESSDB_KMS_MASTER_KEY_FILE=FILE" in message
    for text in ("", "# nothing\n", "---\n", f"previous_master_keys: [{{hex: {A.hex()}}}]"):
        assert "put `master_key_file: FILE` into it" in place.refused(text)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (HEX + "master_key_file: k", ("master_key_hex in ", "master_key_file /")),
        (HEX + "master_key_credential: k", ("master_key_hex in ", "master_key_credential k")),
        ("master_key_credential: k\nmaster_key_file: k", ("master_key_file /", "master_key_credential k")),
        (HEX + f"master_key: {A.hex()}", ("has both master_key_hex and its other spelling master_key",)),
        (f"master_key: {A.hex()}\n" + HEX, ("has both master_key_hex and its other spelling master_key",)),
        (f"master_key: {A.hex()}\nmaster_key_file: k", ("master_key_hex in ", "master_key_file /")),
    ],
)
def test_two_master_keys(place: Place, text: str, names: tuple[str, ...]) -> None:
    place.put("k", A.hex())
    for need_key in (True, False):
        message = place.refused(text, {"CREDENTIALS_DIRECTORY": str(place.folder)}, need_key=need_key)
        assert "keep one" in message
        assert all(name in message for name in names)


def test_two_master_keys_in_the_environment(place: Place) -> None:
    environ = {
        "PROGRESSDB_KMS_MASTER_KEY_HEX": A.hex(),
        "PROGRESSDB_KMS_MASTER_KEY_FILE": place.put("key", A),
    }
    message = refused(lambda: load({}, environ))
    assert "PROGRESSDB_KMS_MASTER_KEY_HEX and PROGRESSDB_KMS_MASTER_KEY_FILE" in message


def _fd_environment(content: str) -> dict[str, str]:
    reader, writer = os.pipe()
    os.write(writer, content.encode())
    os.close(writer)
    return {"PROGRESSDB_KMS_MASTER_KEY_FD": str(reader)}


@pytest.mark.parametrize("source", ["hex", "alias", "file", "raw", "credential", "variable", "pipe"])
def test_each_source_of_a_master_key(place: Place, source: str) -> None:
    place.put("key", f"\n{A.hex().upper()} \r\n", 0o400)
    place.put("raw", A)
    credentials = {"CREDENTIALS_DIRECTORY": str(place.folder)}
    texts = {
        "hex": HEX,
        "alias": f"master_key: '{A.hex()}'",
        "file": "master_key_file: key",
        "raw": "master_key_file: ./raw",
        "credential": "master_key_credential: key",
    }
    if source in texts:
        loaded = place.load(texts[source], credentials if source == "credential" else {})
    elif source == "variable":
        loaded = load({}, {"PROGRESSDB_KMS_MASTER_KEY_HEX": A.hex()})
    else:
        loaded = load({}, _fd_environment(A.hex()))
    labels = {
        "file": f"master_key_file {place.folder}/key",
        "raw": f"master_key_file {place.folder}/raw",
        "credential": "master_key_credential key",
        "variable": "PROGRESSDB_KMS_MASTER_KEY_HEX",
        "pipe": "PROGRESSDB_KMS_MASTER_KEY_HEX",
    }
    with loaded:
        assert loaded.keys[0][1] == A
        assert len(loaded.keys) == 1
        assert loaded.memory is not None and loaded.memory.kind in ("memfd_secret", "mlock", "unlocked")
        assert loaded.settings.master == loaded.keys[0][0]
        assert loaded.settings.master.label == labels.get(source, f"master_key_hex in {place.file}")
        expected = (
            str(place.folder / {"file": "key", "raw": "raw"}[source]) if source in ("file", "raw") else None
        )
        assert loaded.settings.master_key_file == expected


def test_the_text_of_a_key_needs_no_quotes(place: Place) -> None:
    """Digits alone, and what YAML 1.1 takes for a number in octal or with an exponent."""
    for digits in ("12345678" * 8, "01234567" * 8, "1" * 62 + "e5", "0x" + "1" * 62, "1_" * 32):
        if all(digit in "0123456789abcdef" for digit in digits):
            assert "distinct bytes" in place.refused(f"master_key_hex: {digits}")
        else:
            assert "is not one" in place.refused(f"master_key_hex: {digits}")


def test_a_wrong_key_file_is_named(place: Place) -> None:
    place.put("key", A.hex()[1:])
    message = place.refused("master_key_file: key")
    assert message.startswith(f"master_key_file {place.folder}/key must be 64 hex digits")
    place.put("key", A.hex(), 0o640)
    message = place.refused("master_key_file: key")
    assert f"master_key_file {place.folder}/key is open to others (mode 0640)" in message
    assert "chmod 0600" in message
    (place.folder / "key").unlink()
    assert "key can't be read: No such file" in place.refused("master_key_file: key")


# ---- previous keys ---------------------------------------------------------------------------------


def test_previous_keys_in_their_order(place: Place) -> None:
    place.put("p", B)
    text = HEX + f"previous_master_keys:\n- file: p\n- hex: {C.hex()}\n- credential: p2\n"
    place.put("p2", D.hex())
    with place.load(text, {"CREDENTIALS_DIRECTORY": str(place.folder)}) as loaded:
        assert [bytes(view) for view in of_role(loaded, PREVIOUS)] == [B, C, D]
        assert loaded.keys[0][1] == A
        assert [source.label for source, _ in loaded.keys[1:]] == [
            f"previous_master_keys entry 1 {place.folder}/p",
            f"previous_master_keys entry 2 in {place.file}",
            "previous_master_keys entry 3 p2",
        ]


def test_a_key_that_stands_twice_is_kept_once(place: Place) -> None:
    text = HEX + "previous_master_keys:\n" + "".join(f"- hex: {k.hex()}\n" for k in (B, A, B, C))
    with place.load(text) as loaded:
        assert [bytes(view) for view in of_role(loaded, PREVIOUS)] == [B, C]
        assert [source.label.split()[2] for source, _ in loaded.keys[1:]] == ["1", "4"]


def test_a_weak_key_may_be_a_previous_one(place: Place) -> None:
    """It is how one gets away from it."""
    weak = [digits for digits, _ in WEAK if len(digits) == 64]
    entries = ", ".join(f"{{hex: '{digits}'}}" for digits in weak)
    with place.load(HEX + f"previous_master_keys: [{entries}]") as loaded:
        assert [bytes(view).hex() for view in of_role(loaded, PREVIOUS)] == weak


def test_as_many_previous_keys_as_there_may_be(place: Place) -> None:
    keys = [key(number) for number in range(100, 100 + MAX_PREVIOUS)]
    text = HEX + "previous_master_keys:\n" + "".join(f"- hex: {k.hex()}\n" for k in keys)
    with place.load(text) as loaded:
        assert [bytes(view) for view in of_role(loaded, PREVIOUS)] == keys


# ---- an unfinished rotation --------------------------------------------------------------------------


def test_pending(place: Place) -> None:
    place.put("key", A.hex())
    following = place.put("key.next", B.hex())
    with place.load("master_key_file: key") as loaded:
        assert loaded.keys[0][1] == A
        source, view = loaded.keys[1]
        assert view == B
        assert (source.role, source.place) == (PENDING, following)


def test_pending_is_only_looked_for_beside_a_key_file(place: Place) -> None:
    place.put("kms.yaml.next", B.hex())
    place.put("key.next", B.hex())
    place.put("key", A.hex())
    text = "master_key_credential: key"
    for loaded in (place.load(HEX), place.load(text, {"CREDENTIALS_DIRECTORY": str(place.folder)})):
        with loaded:
            assert of_role(loaded, PENDING) == []


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (B.hex().encode(), 0o644, "is open to others"),
        (b"", 0o600, "must be 64 hex digits"),
        (bytes(32), 0o600, "fewer than 8 distinct bytes"),
    ],
)
def test_a_pending_file_is_held_to_the_same_rules(
    place: Place, content: bytes, mode: int, words: str
) -> None:
    place.put("key", A.hex())
    place.put("key.next", content, mode)
    message = place.refused("master_key_file: key")
    assert f"{place.folder}/key.next of a rotation that was not finished" in message
    assert words in message


# ---- weak keys ---------------------------------------------------------------------------------------

WEAK = [
    ("00" * 32, "fewer than 8 distinct bytes"),
    ("00112233445566778899aabbccddeeff" * 2, "published"),
    ("f3c9a7df8b0e52c4a14ea2d0b38ef615f739482decdb0e8c7701435a4bfd98c2", "published"),
    ("60324e8965b4ee7188d2cc0dfcb7928d53851aa8fcd1044884e30c9af28413c1", "published"),
    ("0123456789abcdef" * 4, "published"),
    ("b748dbd094c8da033bb830f52963c051f2c41387c27c89bcf507736da944f337", "published"),
    ("d899a1b62c16e8a97f804f8c317c8c09eb758d2e231a4faf63dc882bc5f5ec3f", "published"),
    ("a7e484d3f2ab9e1058c47dae6b9c1f2afb123b02c4de98ae7f615c099d5c621f", "published"),
    ("f721ff8758c05e78b9361cff8d13e738d1e5069cf4ff03b7cbc9bf5fce0e3341", "published"),
    ("f45cc3ba20183ed884dbc639f018f66fd5112792c7d07987ac1084c867441367", "published"),
    ("7d2d7bd0f14a52e270b5cf39821c68eea09bcc50809d670a9ee27a6f49fd0160", "published"),
    ("64fbe498eb2a2cea151e4491941b4de9c5a309852660c4979cf32a199bb7baf7", "published"),
    ("01020304050607" + "01" * 25, "fewer than 8 distinct bytes"),
    ("ff" * 16, "16 bytes instead of 32"),
    ("", "0 bytes instead of 32"),
]


@pytest.mark.parametrize(("digits", "words"), WEAK)
def test_weak_keys(digits: str, words: str) -> None:
    with pytest.raises(WeakKey, match=words) as caught:
        check_master_key(memoryview(bytes.fromhex(digits)))
    assert "drawn at random" in caught.value.hint and "genkey" not in caught.value.hint


def test_keys_that_are_not_weak() -> None:
    check_master_key(memoryview(A))
    check_master_key(memoryview(bytes.fromhex("0102030405060708" + "01" * 24)))  # 8 distinct bytes
    for digits, words in WEAK:
        if words == "published":
            near = bytearray.fromhex(digits)
            near[31] ^= 1
            check_master_key(memoryview(near))


@pytest.mark.parametrize(("digits", "words"), [weak for weak in WEAK if len(weak[0]) == 64])
def test_a_weak_master_key_is_refused_with_its_source(place: Place, digits: str, words: str) -> None:
    place.put("key", digits)
    assert f"master_key_hex in {place.file}: it" in place.refused(f"master_key_hex: '{digits}'")
    message = place.refused("master_key_file: key")
    assert f"master_key_file {place.folder}/key: it" in message
    assert words in message


# ---- what to do about a key that is not there ------------------------------------------------------

GENKEY = "`progressdb-kms genkey FILE` makes one"
FIND = "where the key is lost, put it back from its copy: `progressdb-kms kek-id FILE…` finds it"
KEEP = "does the daemon still run? Don't stop it: `rotate-kek` moves the store to a new key"

NO_KEY = {
    "gone": (lambda path: None, ""),
    "cut": (lambda path: path.write_bytes(b"0011"), ""),
    "weak": (lambda path: path.write_bytes(bytes(32)), "a key is 32 bytes that were drawn at random; "),
    "a folder": (Path.mkdir, "name the file in it; "),  # docker makes one where a file to mount is gone
    "unnamed": (None, "put `master_key_file: FILE` into it; "),
}


@pytest.mark.parametrize("wrong", NO_KEY)
@pytest.mark.parametrize(
    ("store", "first", "advice"),
    [
        ([], True, GENKEY),
        ([], False, FIND),
        (["kms.db"], True, f"{FIND}; {KEEP}"),
        (["kms-audit.log"], True, f"{FIND}; {KEEP}"),  # of a store that is lost
        (["kms.db"], False, f"{FIND}; {KEEP}"),
    ],
)
def test_a_new_key_is_proposed_where_none_was_in_use(
    place: Place, wrong: str, store: list[str], first: bool, advice: str
) -> None:
    make, own = NO_KEY[wrong]
    text = "data_dir: d\n"
    if make:
        make(place.folder / "key")
        text += "master_key_file: key\n"
    (place.folder / "d").mkdir()
    for name in store:
        place.put(f"d/{name}", b"")
    if (path := place.folder / "key").is_file():
        path.chmod(0o600)
    place.put("kms.yaml", text)
    said = refused(lambda: load({"config": str(place.file)}, {}, first=first))
    assert said.partition(" | ")[2] == own + advice


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who may not look")
@pytest.mark.parametrize("name", ["key", "kms.yaml"])
def test_what_may_not_be_read_is_not_lost(place: Place, name: str) -> None:
    for folder in [place.folder, *place.folder.parents]:
        if folder.stat().st_uid == 0 and folder != folder.parent and folder.name != "tmp":
            folder.chmod(folder.stat().st_mode | 0o055)
    place.put("key", A)
    place.put("kms.yaml", "master_key_file: key\n", 0o644)
    (place.folder / name).chmod(0o600)
    os.seteuid(65534)
    try:
        said = refused(lambda: load({"config": str(place.file)}, {}))
    finally:
        os.seteuid(0)
    assert "Permission denied" in said and "as root, or as the daemon's user" in said
    assert "genkey" not in said and "put it back" not in said


# ---- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workers 3", "must hold `key: value` lines"),
        (A.hex(), "must hold `key: value` lines"),
        ("- workers: 3", "must hold `key: value` lines"),
        ("workers: 3\nwrokers: 4", "unknown key 'wrokers', did you mean 'workers'?"),
        ("master_key_hx: " + A.hex(), "did you mean 'master_key_hex'?"),
        (A.hex() + ": 1", "not shown here"),
        (f"? [{A.hex()}]\n: 1", "not shown here"),
        ("workers: 3\nworkers: 4", "workers stands twice, again in line 2"),
        (f"{A.hex()}: 3\n{A.hex()}: 4", "a key stands twice, again in line 2"),
        (f"previous_master_keys: [{{hex: {A.hex()}, hex: {B.hex()}}}]", "hex stands twice"),
        ("workers:", "has no value"),
        ("workers: ~", "has no value"),
        ("workers: [", "is not YAML, line 1, column 11"),
        (f"master_key_hex: '{A.hex()}", "is not YAML, line 1"),
        (f"master_key_hex: {A.hex()}\n\tworkers: 3", "is not YAML, line 2, column 1"),
        (f"master_key_hex: *{A.hex()}", "aliases (*name) are not taken"),
        (f"master_key_hex: &k {A.hex()}\nworkers: *k", "aliases (*name) are not taken"),
        (f"master_key_hex: {A.hex()}\n---\nworkers: 2", "is not YAML, line 2"),
        ("master_key_hex: !!python/object/apply:os.system [id]", "must be 64 hex digits"),
        ("data_dir: !!python/name:os.system ''", "must be a path"),
        ("data_dir: !secret x", "must be a path"),
        (b"workers: \xff\xfe", "bytes that are no text"),
        (b"workers: \x00", "bytes that are no text"),
        ("workers: " + "[" * 10 + "]" * 10, "must be auto or a whole number"),
        ("[" * 200_000, "nested too deeply"),
        ("allowed_peer_uids: [" + "1," * 20_000 + "]", "must be a list of at most 1000"),
        ("# " + "x" * (1 << 20), "is larger than 1048576 bytes"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_faults_of_a_file(place: Place, text: object, words: str) -> None:
    message = place.refused(text)
    assert words in message
    assert str(place.file) in message


def test_an_alias_bomb_ends_at_once(place: Place) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    assert "aliases" in place.refused("\n".join(lines))


@pytest.mark.parametrize(
    ("mode", "text", "words"),
    [
        (0o640, HEX, "master_key_hex in FILE: a file with a key in it is open to others (mode 0640)"),
        (0o604, HEX, "master_key_hex in FILE: a file with a key in it is open to others (mode 0604)"),
        (
            0o640,
            f"master_key_file: k\nprevious_master_keys: [{{file: k}}, {{hex: {B.hex()}}}]",
            "previous_master_keys entry 2 in FILE",
        ),
        (0o620, "master_key_file: k", "may be written by others (mode 0620)"),
        (0o602, "master_key_file: k", "may be written by others (mode 0602)"),
    ],
)
def test_a_file_that_is_too_open(place: Place, mode: int, text: str, words: str) -> None:
    place.put("k", A.hex())
    message = place.refused(text, mode=mode)
    assert words.replace("FILE", str(place.file)) in message
    assert "chmod 0600" in message


def test_a_file_without_a_secret_may_be_read_by_all(place: Place) -> None:
    place.put("k", A.hex())
    with place.load("master_key_file: k\nprevious_master_keys: [{file: k}]", mode=0o644) as loaded:
        assert loaded.keys[0][1] == A


def test_what_is_no_file(place: Place) -> None:
    assert "can't be read: No such file" in refused(lambda: load({"config": str(place.file)}, {}))
    os.mkfifo(place.file, 0o600)
    assert "is no regular file" in refused(lambda: load({"config": str(place.file)}, {}))
    assert "is no regular file" in refused(lambda: load({"config": str(place.folder)}, {}))


@pytest.mark.root
def test_files_of_somebody_else(place: Place) -> None:
    place.put("kms.yaml", HEX)
    os.chown(place.file, 1234, 0)
    assert "belongs to uid 1234" in refused(lambda: load({"config": str(place.file)}, {}))
    os.chown(place.put("key", A.hex()), 1234, 0)
    os.chown(place.file, 0, 0)
    assert "key belongs to uid 1234" in place.refused("master_key_file: key")


@pytest.mark.root
def test_a_credential_that_systemd_opened_to_a_user_by_an_acl(place: Place) -> None:
    place.put("key", A.hex(), 0o440)
    with place.load("master_key_credential: key", {"CREDENTIALS_DIRECTORY": str(place.folder)}) as loaded:
        assert loaded.keys[0][1] == A
    assert "mode 0440" in place.refused("master_key_file: key")


def test_a_relative_path_to_the_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put("kms.yaml", HEX + "data_dir: d")
    monkeypatch.chdir(place.folder.parent)
    with load({"config": f"{place.folder.name}/kms.yaml"}, {}) as loaded:
        assert loaded.settings.config_file == str(place.file)
        assert loaded.settings.data_dir == place.folder / "d"


# ---- the child that parses -----------------------------------------------------------------------------


def test_without_pyyaml(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "apt install python3-yaml" in place.refused(HEX)


@pytest.mark.parametrize("fault", ["raise", "interrupt", "exit", "kill"])
def test_a_child_that_dies(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    """It never comes back into the caller's frames, prints nothing, and is reaped."""

    def fail(path: str, descriptor: int) -> Any:
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"raise": ValueError(A.hex()), "interrupt": KeyboardInterrupt(), "exit": SystemExit(0)}[fault]

    monkeypatch.setattr(yamlfile, "_answer", fail)
    caller, escaped, before = os.getpid(), place.folder / "escaped", set(children(os.getpid()))
    try:
        assert "the parser of" in place.refused(HEX)
    finally:
        if os.getpid() != caller:
            escaped.touch()
            os._exit(1)
    assert not escaped.exists()
    assert capfd.readouterr() == ("", "")
    assert set(children(os.getpid())) <= before  # others' may end meanwhile


def test_an_error_that_nobody_thought_of(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tree: Any, path: str) -> Any:
        raise LookupError(A.hex())

    monkeypatch.setattr(yamlfile, "_check", fail)
    assert "can't be parsed (LookupError)" in place.refused(HEX)


def test_where_children_are_reaped_by_the_kernel(place: Place) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with place.load(HEX) as loaded:
            assert loaded.keys[0][1] == A
    finally:
        signal.signal(signal.SIGCHLD, before)


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
def test_any_bytes_give_an_answer_without_a_word_of_them(content: bytes) -> None:
    """In this process: what the child would do with a file of these bytes."""
    canary = A.hex()
    reader, writer = os.pipe()
    os.write(writer, content + b"\nmaster_key_hex: " + canary.encode())
    os.close(writer)
    with FileIO(reader) as source:
        line, _, keys = yamlfile._answer("F", source).partition(b"\n")
    assert canary not in line.decode("ascii")
    assert len(keys) % 32 == 0
    assert not keys or "error" not in json.loads(line)


# ---- nothing is left --------------------------------------------------------------------------------


def all_keys(place: Place) -> Loaded:
    place.put("key", A)
    place.put("key.next", B)
    return place.load(f"master_key_file: key\nprevious_master_keys: [{{hex: {C.hex()}}}]")


def test_close_unmaps(place: Place) -> None:
    before = held()
    loaded = all_keys(place)
    assert loaded.memory is not None
    assert held() != before or loaded.memory.kind == "unlocked"
    loaded.close()
    loaded.close()
    assert held() == before
    assert loaded.memory is None


@pytest.mark.parametrize("hold", [lambda view: view[:], ctypes.c_char.from_buffer], ids=["slice", "pointer"])
def test_close_wipes_first(place: Place, hold: Any) -> None:
    """Even where something that was forgotten keeps the pages mapped."""
    loaded = all_keys(place)
    views = of_role(loaded, MASTER, PREVIOUS, PENDING)
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in views]
    held_back = hold(views[1])
    assert [ctypes.string_at(address, 32) for address in addresses] == [A, C, B]
    with pytest.raises(BufferError):
        loaded.close()
    assert [ctypes.string_at(address, 32) for address in addresses] == [bytes(32)] * 3
    del held_back


def test_an_exception_in_the_block_wipes(place: Place) -> None:
    with pytest.raises(LookupError), place.load(HEX) as loaded:
        mine = loaded.keys[0][1][:]
        raise LookupError
    assert bytes(mine) == bytes(32)


STEPS = {
    "read": keysource,
    "check_master_key": config,
    "compare_digest": hmac,
    "wipe": config,
    "Source": config,
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failure_at_each_step_leaves_nothing_locked(
    place: Place, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    place.put("key", A.hex())
    place.put("key.next", B.hex())
    monkeypatch.setattr(STEPS[step], step, fail)
    before = held()
    with pytest.raises(error) as caught:
        place.load(f"master_key_file: key\nprevious_master_keys: [{{hex: {A.hex()}}}]")
    assert caught.value.__traceback__ is not None
    assert held() == before


def test_memory_that_must_be_locked_and_is_not(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def no_memory(size: int, mode: str) -> Any:
        asked.append(mode)
        raise OSError

    monkeypatch.setattr(config, "LockedBuffer", no_memory)
    for mode in ("require", "try", "off"):
        with pytest.raises(OSError):
            place.load(HEX + f"memory_lock: {mode}")
    assert asked == ["require", "try", "off"]


def test_settings_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command does that has no use for keys: it reads none and needs none."""
    monkeypatch.setattr(Loaded, "read_keys", None)
    place.put("key", b"no key at all", 0o666)
    for text in ("workers: 2", HEX + "workers: 2", "master_key_file: key\nworkers: 2"):
        with place.load(text, need_key=False) as loaded:
            assert loaded.settings.workers == 2
            assert loaded.keys == []
    with load({}, {}, need_key=False) as loaded:
        assert loaded.settings.master is None


def test_nothing_secret_is_in_a_repr(place: Place) -> None:
    with place.load(HEX) as loaded:
        said = f"{loaded!r} {loaded.settings!r} {loaded.keys!r} {loaded.memory!r}"
    assert A.hex()[:8] not in said


def test_errors_are_of_the_operator() -> None:
    with pytest.raises(KMSError) as caught:
        load({}, {})
    assert caught.value.code == "config"
    assert keysource.SCRATCH_SIZE + (2 + MAX_PREVIOUS) * 32 <= 4096  # one page


# ---- a look at the memory of a process -----------------------------------------------------------------

PROGRAM = """
import os, sys
sys.path.insert(0, {repo!r})
from progressdb_kms.process import hardening
hardening.prepare(sys.argv[1:], os.environ)
hardening.harden()
from progressdb_kms.config.load import ConfigError, load
try:
    loaded = load({{"config": sys.argv[2] if sys.argv[1:] else None}}, os.environ)
    roles = [source.role for source, _ in loaded.keys]
    print("loaded", len(roles), "pending" in roles, "yaml" in sys.modules, flush=True)
except ConfigError as error:
    print("refused", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def loading(config_file: str | None, **environ: str) -> Iterator[tuple[int, str]]:
    """A process that has loaded this configuration: its pid, and what it printed."""
    command = [sys.executable, "-c", PROGRAM.format(repo=str(REPO))]
    command += ["--config", config_file] if config_file else []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"LANG": "C.UTF-8", **environ}
    ) as process:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().strip()
        assert process.stdin is not None
        process.stdin.close()


SOURCES = {
    "yaml": (
        f"master_key_hex: {A.hex()}\nprevious_master_keys: [{{hex: {B.hex().upper()}}}]",
        "loaded 2 False",
    ),
    "hex file": ("master_key_file: hex\nprevious_master_keys: [{file: raw}]", "loaded 3 True"),
    "raw file": ("master_key_file: raw", "loaded 1 False"),
    "credential": ("master_key_credential: hex", "loaded 1 False"),
    "variable": (None, "loaded 1 False"),
    "two keys": (f"master_key_hex: {A.hex()}\nmaster_key_file: hex", "refused"),
    "too long": (f"master_key_hex: {A.hex()}0", "refused"),
    "no YAML": (f"master_key_hex: [{A.hex()}", "refused"),
    "unknown": (f"master_key_hx: {A.hex()}", "refused"),
    "bad file": ("master_key_file: bad", "refused"),
    "bad variable": (None, "refused"),
}


@pytest.mark.root
@pytest.mark.skipif(bool(cannot_scan()), reason=cannot_scan() or "-")
@pytest.mark.parametrize("source", SOURCES)
def test_no_copy_of_a_key_outside_locked_memory(place: Place, source: str) -> None:
    text, expected = SOURCES[source]
    place.put("hex", f"{A.hex()}\n")
    place.put("hex.next", C.hex())
    place.put("raw", B)
    place.put("bad", A.hex() + "00")
    environ = {"CREDENTIALS_DIRECTORY": str(place.folder)}
    if text is None:
        environ["PROGRESSDB_KMS_MASTER_KEY_HEX"] = A.hex() + ("x" if expected == "refused" else "")
    config_file = None if text is None else place.put("kms.yaml", text)
    with loading(config_file, **environ) as (pid, said):
        assert said.startswith(expected)
        assert not said.endswith("True")  # PyYAML was never here
        report = scan([pid], [Secret(str(number), secret) for number, secret in enumerate(ALL)])
        report.assert_clean()
        assert A.hex() not in Path(f"/proc/{pid}/environ").read_text()
        assert report.secret_pages == 0 or expected != "refused"


@pytest.mark.root
@pytest.mark.skipif(bool(cannot_scan()), reason=cannot_scan() or "-")
def test_the_look_finds_a_key_in_ordinary_memory(place: Place) -> None:
    """And only there where it has to be: `memory_lock: off` maps pages that root may read."""
    with loading(place.put("kms.yaml", HEX + "memory_lock: off")) as (pid, said):
        assert said.startswith("loaded")
        report = scan([pid], [Secret("master", A)])
    assert len(report.hits) == 1
    assert report.hits[0].form == "raw"


class TestStoreOfAFleet:
    BLOCK = "postgresql: {hosts: [db1, db2:5433], database: kms, user: kms}\n"

    def test_both_are_handed_on_as_they_stand(self, place: Place) -> None:
        place.put("kms.yaml", "store: postgresql\n" + self.BLOCK)
        flags = {"config": str(place.file)}
        with load(flags, {}, need_key=False, fleet=True) as loaded:
            assert loaded.settings.store == "postgresql"
            assert loaded.settings.postgresql == {
                "hosts": ["db1", "db2:5433"],
                "database": "kms",
                "user": "kms",
            }

    def test_who_can_t_work_with_it_says_so(self, place: Place) -> None:
        text = place.refused("store: postgresql\n" + self.BLOCK, need_key=False)
        assert "not this host's own" in text and "help fleet" in text

    def test_a_block_that_nobody_reads_is_refused(self, place: Place) -> None:
        assert "of no use for `store: sqlite`" in place.refused(self.BLOCK, need_key=False)
