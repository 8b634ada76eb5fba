"""The table of configuration keys: each with values that are taken and values that are not."""

from __future__ import annotations

from typing import Any

import pytest

from progressdb_kms.config.options import ALIASES, BY_NAME, KEY_LISTS, MASTER_KEYS, OPTIONS
from progressdb_kms.config.values import ANY, MAX_NEXT, MAX_PREVIOUS, MAX_UIDS, Scalar, Value, shown, unknown
from progressdb_kms.errors import ConfigError
from progressdb_kms.tools.manual import default_text

CANARY = "deadbeefcafe"


def text(value: str) -> Scalar:
    return Scalar(value, "str")


def number(value: str) -> Scalar:
    return Scalar(value, "int")


def decimal(value: str) -> Scalar:
    return Scalar(value, "float")


KEY = "0123456789abcdefABCDEF" + "7" * 42

RIGHT: list[tuple[str, Value, Any]] = [
    ("policies", [], []),
    (
        "policies",
        [
            {
                "uid": number("20002"),
                "operations": [text("encrypt"), text("decrypt")],
                "threads": [text("room-*")],
                "keys": [text("k_*"), number("7")],
                "per_second": number("500"),
            },
            {"gid": number("0"), "operations": [text("list_deks")]},
        ],
        [
            {
                "uid": 20002,
                "operations": ["decrypt", "encrypt"],
                "threads": ["room-*"],
                "keys": ["k_*", "7"],
                "per_second": 500,
            },
            {"gid": 0, "operations": ["list_deks"]},
        ],
    ),
    ("master_key_hex", text(KEY), bytes.fromhex(KEY)),
    ("master_key_hex", number("0" * 64), bytes(32)),  # 64 decimal digits: YAML sees a number
    ("master_key_file", text("/etc/kms.key"), "/etc/kms.key"),
    ("master_key_credential", text("kms-master.key"), "kms-master.key"),
    ("previous_master_keys", [], []),
    (
        "previous_master_keys",
        [{"file": text("/k")}, {"credential": text("c")}],
        [("file", "/k"), ("credential", "c")],
    ),
    ("previous_master_keys", [{"hex": text(KEY)}], [("hex", bytes.fromhex(KEY))]),
    (
        "next_master_keys",
        [{"hex": text(KEY)}, {"file": text("k")}],
        [("hex", bytes.fromhex(KEY)), ("file", "k")],
    ),
    ("socket", text("/run/kms.sock"), "/run/kms.sock"),
    ("socket", text("unix:///run/kms.sock"), "/run/kms.sock"),
    ("socket", text("unix://kms.sock"), "kms.sock"),
    ("socket", text("./a:1"), "./a:1"),
    ("socket_mode", number("0600"), 0o600),
    ("socket_mode", text("0660"), 0o660),
    ("socket_mode", number("660"), 0o660),
    ("socket_mode", text("0o660"), 0o660),
    ("socket_mode", number("0666"), 0o666),
    ("socket_group", text("adm"), "adm"),
    ("socket_group", number("4"), "4"),
    ("socket_group", text("4294967294"), "4294967294"),
    ("data_dir", text("/var/lib/kms"), "/var/lib/kms"),
    ("store", text("sqlite"), "sqlite"),
    ("store", text("postgresql"), "postgresql"),
    (
        "postgresql",
        {"hosts": [text("db1:5432"), text("db2")], "fence_seconds": number("60")},
        {"hosts": ["db1:5432", "db2"], "fence_seconds": "60"},
    ),
    ("allowed_peer_uids", [number("1000"), number("0"), number("1000")], [0, 1000]),
    ("allowed_peer_uids", [], []),
    ("admin_peer_uids", [number("4294967294")], [4294967294]),
    ("allow_missing_keks", Scalar("true", "bool"), True),
    ("open_embedded_messages", Scalar("true", "bool"), True),
    ("tcp_address", text("127.0.0.1:6820"), "127.0.0.1:6820"),
    ("tcp_address", text("[::1]:65535"), "[::1]:65535"),
    ("tcp_address", text("127.1.2.3:1"), "127.1.2.3:1"),
    ("allow_missing_keks", Scalar("false", ANY), False),
    ("workers", text("auto"), "auto"),
    ("workers", number("1"), 1),
    ("workers", Scalar("64", ANY), 64),
    ("memory_lock", text("require"), "require"),
    ("memory_lock", text("try"), "try"),
    ("memory_lock", Scalar("off", "bool"), "off"),
    ("kek_max_age_days", number("1"), 1),
    ("kek_max_age_days", number("36500"), 36500),
    ("max_body_bytes", number("4096"), 4096),
    ("max_body_bytes", number("268435456"), 268435456),
    ("max_connections", number("1"), 1),
    ("max_connections", number("65536"), 65536),
    ("idle_timeout", number("120"), 120.0),
    ("idle_timeout", decimal("0.1"), 0.1),
    ("request_timeout", decimal("2.5"), 2.5),
    ("request_timeout", number("3600"), 3600.0),
]

WRONG: list[tuple[str, Value, str]] = [
    ("store", text("mysql"), "sqlite or postgresql"),
    ("store", [text("sqlite")], "sqlite or postgresql"),
    ("postgresql", text("db1"), "a mapping such as"),
    ("postgresql", [text("db1")], "a mapping such as"),
    ("policies", text("all"), "a list of at most 100 mappings"),
    ("policies", [{"uid": number("1"), "keys": [text("a")]}] * 101, "a list of at most 100 mappings"),
    ("policies", [text("uid")], "entry 1 must be a mapping"),
    ("policies", [{"uid": number("1")}], "entry 1 narrows nothing"),
    ("policies", [{"operations": [text("encrypt")]}], "entry 1 must name either a uid or a gid"),
    ("policies", [{"uid": number("1"), "gid": number("1"), "keys": [text("a")]}], "either a uid or a gid"),
    ("policies", [{"uid": text("root"), "keys": [text("a")]}], "entry 1: uid must be a number"),
    ("policies", [{"uid": number("1"), "key": [text("a")]}], "unknown key 'key', did you mean 'keys'?"),
    ("policies", [{"uid": number("1"), "keys": text("k_*")}], "keys must be a list of 1 to 100 patterns"),
    ("policies", [{"uid": number("1"), "threads": []}], "threads must be a list of 1 to 100"),
    ("policies", [{"uid": number("1"), "threads": [[]]}], "threads must be a list of 1 to 100 patterns"),
    ("policies", [{"uid": number("1"), "operations": [text("crypt")]}], "did you mean "),
    ("policies", [{"uid": number("1"), "operations": [text("encrypt_batch")]}], "did you mean encrypt?"),
    ("policies", [{"uid": number("1"), "operations": [text("shred")]}], "did you mean delete_dek?"),
    ("policies", [{"uid": number("1"), "operations": [text("????")]}], "known are accept_clock, "),
    ("policies", [{"uid": number("1"), "per_second": number("0")}], "per_second must be a whole number"),
    ("master_key_hex", text(KEY[:-1]), "must be 64 hex digits (32 bytes), got 63 characters"),
    ("master_key_hex", text(KEY + "00"), "got 66 characters"),
    ("master_key_hex", text(KEY[:-1] + "g"), "character 63 or 64 is not one"),
    ("master_key_hex", text("Ä" * 64), "is not one"),
    ("master_key_hex", text(f" {KEY[2:]} "), "is not one"),
    ("master_key_hex", Scalar("true", "bool"), "64 hex digits"),
    ("master_key_hex", [text(KEY)], "64 hex digits"),
    ("master_key_file", number("7"), "must be a path"),
    ("master_key_file", text(""), "must be a path"),
    ("master_key_file", text("a\0b"), "can't be shown"),
    ("master_key_credential", text("../kms"), "name of a systemd credential"),
    ("master_key_credential", text(".."), "name of a systemd credential"),
    ("master_key_credential", number("7"), "name of a systemd credential"),
    ("previous_master_keys", {"hex": text(KEY)}, f"a list of at most {MAX_PREVIOUS}"),
    ("previous_master_keys", [{"file": text("k")}] * (MAX_PREVIOUS + 1), f"a list of at most {MAX_PREVIOUS}"),
    ("next_master_keys", [{"file": text("k")}] * (MAX_NEXT + 1), f"a list of at most {MAX_NEXT}"),
    ("previous_master_keys", [text(KEY)], "entry 1 must be a mapping"),
    ("previous_master_keys", [{"file": text("k")}, {"hexx": text(KEY)}], "entry 2: unknown key 'hexx', did"),
    ("previous_master_keys", [{"hex": text(KEY), "file": text("k")}], "entry 1 must have exactly one"),
    ("previous_master_keys", [{}], "entry 1 must have exactly one"),
    ("previous_master_keys", [{"hex": text(KEY[2:])}], "entry 1: hex must be 64 hex digits"),
    ("previous_master_keys", [{"file": number("7")}], "entry 1: file must be a path"),
    ("previous_master_keys", [{"credential": text("a/b")}], "entry 1: credential must be"),
    ("socket", text("tcp://127.0.0.1:9"), "a path or unix://PATH"),
    ("socket", text("unix://"), "a path or unix://PATH"),
    ("socket", number("9"), "a path or unix://PATH"),
    ("socket", text("unix:/run/kms.sock"), "write unix:// and the path behind it"),
    ("socket", text("@kms"), "an abstract name has no permissions; write a path, such as /run/"),
    ("socket", text("127.0.0.1:8200"), "an address is none; write a path, such as /run/"),
    ("socket", text("localhost:1"), "an address is none"),
    ("socket", text("[::1]:8200"), "an address is none"),
    ("socket", text(":8200"), "an address is none"),
    ("socket_mode", number("0777"), "at most 0666"),
    ("socket_mode", number("02660"), "at most 0666"),
    ("socket_mode", number("384"), "at most 0666"),
    ("socket_mode", text("rw-"), "at most 0666"),
    ("socket_mode", Scalar("600", "float"), "at most 0666"),
    ("socket_group", [text("adm")], "name or number of a group"),
    ("socket_group", number("-1"), "name or number of a group"),
    ("socket_group", number("4294967295"), "name or number of a group"),
    ("socket_group", number("0x4"), "name or number of a group"),
    *(
        ("socket_group", text(digits), "name or number of a group")
        for digits in ("4294967295", "99999999999999999999", "9" * 5000, "010", "\N{ARABIC-INDIC DIGIT FOUR}")
    ),
    ("data_dir", {"a": text("b")}, "must be a path"),
    ("data_dir", text("a\nb"), "can't be shown"),
    ("allowed_peer_uids", number("1000"), "a list of at most"),
    ("allowed_peer_uids", [text("1000")], "a list of at most"),
    ("allowed_peer_uids", [number("-1")], "a list of at most"),
    ("allowed_peer_uids", [number("1_000")], "a list of at most"),
    ("allowed_peer_uids", [number("4294967295")], "a list of at most"),
    ("allowed_peer_uids", [number("1")] * (MAX_UIDS + 1), "a list of at most"),
    ("admin_peer_uids", [Scalar("root", ANY)], "a list of at most"),
    ("allow_missing_keks", text("yes"), "true or false"),
    ("open_embedded_messages", text("yes"), "true or false"),
    *(
        ("tcp_address", text(word), "127.0.0.1:PORT or [::1]:PORT")
        for word in (
            "0.0.0.0:6820", "10.0.0.1:6820", "[::]:6820", "[fe80::1]:6820", "[::ffff:127.0.0.1]:6820",
            "::1:6820",
            "localhost:6820", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:+1",
            "[127.0.0.1]:6820", "127.1:6820", ":6820", "6820", "kms.example:6820", "127.0.0.1:06820",
        )
    ),
    ("allow_missing_keks", ["true"], "true or false"),
    ("workers", number("0"), "auto or a whole number from 1 to 64"),
    ("workers", number("65"), "auto or a whole number from 1 to 64"),
    ("workers", text("3"), "auto or a whole number from 1 to 64"),
    ("workers", Scalar("true", "bool"), "auto or a whole number from 1 to 64"),
    ("workers", decimal("2.0"), "auto or a whole number from 1 to 64"),
    ("workers", number("0x2"), "auto or a whole number from 1 to 64"),
    ("workers", number("010"), "auto or a whole number from 1 to 64"),
    ("memory_lock", text("yes"), "require, try or off"),
    ("memory_lock", Scalar("false", "bool"), "require, try or off"),
    ("memory_lock", [text("off")], "require, try or off"),
    ("max_body_bytes", number("4095"), "from 4096 to 268435456"),
    ("kek_max_age_days", number("0"), "from 1 to 36500"),
    ("kek_max_age_days", decimal("0.5"), "from 1 to 36500"),
    ("max_body_bytes", number("268435457"), "from 4096 to 268435456"),
    ("max_body_bytes", text("8 MiB"), "from 4096 to 268435456"),
    ("max_connections", number("0"), "from 1 to 65536"),
    ("max_connections", number("65537"), "from 1 to 65536"),
    ("max_connections", number("9" * 20), "from 1 to 65536"),
    ("idle_timeout", number("0"), "from 0.1 to 86400"),
    ("idle_timeout", decimal(".inf"), "from 0.1 to 86400"),
    ("idle_timeout", text("30"), "from 0.1 to 86400"),
    ("request_timeout", decimal("0.05"), "from 0.1 to 3600"),
    ("request_timeout", number("3601"), "from 0.1 to 3600"),
    ("request_timeout", decimal("1e3"), "from 0.1 to 3600"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "expected"), RIGHT)
def test_right(name: str, value: Value, expected: Any) -> None:
    assert BY_NAME[name].read(value, "here") == expected


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_wrong(name: str, value: Value, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BY_NAME[name].read(value, f"{name} in F")
    assert caught.value.message.startswith(f"{name} in F ")
    assert words in caught.value.message


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_no_value_is_quoted(option: Any) -> None:
    """Whatever stands in the wrong place may be a key."""
    for value in (text(CANARY), [text(CANARY)], {CANARY * 5: text(CANARY)}, [{CANARY * 5: text(CANARY)}]):
        try:
            option.read(value, option.name)
        except ConfigError as error:
            assert CANARY not in error.message + error.hint
    assert CANARY not in repr(text(CANARY))


def test_each_option_has_a_right_and_a_wrong_value() -> None:
    names = {option.name for option in OPTIONS}
    assert {row[0] for row in RIGHT} == names == {row[0] for row in WRONG}


def test_the_keys_are_those_of_the_contract() -> None:
    assert [option.name for option in OPTIONS] == [
        *("master_key_hex", "master_key_file", "master_key_credential", "previous_master_keys"),
        *("next_master_keys", "allow_missing_keks", "open_embedded_messages"),
        *("socket", "socket_mode", "socket_group", "tcp_address", "data_dir", "store", "postgresql"),
        *("allowed_peer_uids", "admin_peer_uids"),
        *("policies", "kek_max_age_days"),
        *("workers", "memory_lock", "max_body_bytes", "max_connections", "idle_timeout", "request_timeout"),
    ]  # fmt: skip
    assert ALIASES == {"master_key": "master_key_hex"}
    assert {option.env for option in OPTIONS if option.env} == {
        f"PROGRESSDB_KMS_{name}"
        for name in ("SOCKET", "DATA_DIR", "MASTER_KEY_FILE", "MASTER_KEY_HEX", "ALLOWED_UIDS")
    }
    private = {option.name for option in OPTIONS if option.private}
    uids = {"allowed_peer_uids", "admin_peer_uids", "policies"}
    assert private == {*MASTER_KEYS, *KEY_LISTS, *uids}


def test_each_default_is_a_value_that_is_taken() -> None:
    """What the documentation shows can be written into a file."""
    for option in OPTIONS:
        if default_text(option) != "(none)":
            assert option.read(Scalar(default_text(option), ANY), option.name) == option.default


def test_default_texts() -> None:
    assert default_text(BY_NAME["socket_mode"]) == "0600"
    assert default_text(BY_NAME["max_body_bytes"]) == "8388608"
    assert default_text(BY_NAME["idle_timeout"]) == "120"
    assert default_text(BY_NAME["workers"]) == "auto"
    assert default_text(BY_NAME["socket_group"]) == default_text(BY_NAME["policies"]) == "(none)"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("worker", "unknown key 'worker', did you mean 'workers'?"),
        ("master-key-file", "did you mean 'master_key_file'?"),
        ("zzz", "unknown key 'zzz'"),
        (KEY, "not shown"),
        (CANARY * 3, "not shown"),
        ("a b", "not shown"),
        ("", "not shown"),
    ],
)
def test_unknown(name: str, words: str) -> None:
    message = unknown(name, BY_NAME)
    assert words in message
    assert (shown(name) is None) == ("not shown" in message)
    assert shown(name) is not None or not name or name not in message
