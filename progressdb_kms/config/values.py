"""What a value of the configuration may look like: a parser for each kind.

A value comes from YAML, a flag or the environment as a `Scalar` (text, and the type that YAML sees in it), a
list or a mapping of such; `Option.read` gives plain data that fits into JSON, or raises ConfigError. The
message names the place and what was expected, and never quotes the value: it may be a key that went into the
wrong line.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Any, Callable, NamedTuple, Union

from ..encoding import hex_decode_into
from ..errors import ConfigError
from ..rules import CALLED, OPERATIONS
from .keysource import FILE_VARIABLE, HEX_VARIABLE, KEY_SIZE

MAX_PREVIOUS = 100
"""Most previous_master_keys: they, the next ones and the master key fit into one page of locked memory."""

MAX_NEXT = 8
"""Most next_master_keys: one is what a rotation moves to."""

MAX_UIDS = 1000
MAX_UID = 2**32 - 2  # (uid_t)-1 means "no user"

MAX_POLICIES = 100
MAX_PATTERNS = 100
MAX_PATTERN = 512  # characters: as long as a thread_id


class Scalar(NamedTuple):
    """One value as it was written. `type` is YAML's (str, int, float, bool, null, …), or ANY."""

    text: str
    type: str

    def __repr__(self) -> str:
        return "<Scalar>"  # it may be a key


ANY = "any"
"""The type of what comes from a flag or the environment, which know only text."""

Value = Union[Scalar, list[Any], dict[str, Any]]


class Wrong(Exception):
    """A value is not what the option expects. The text completes "NAME …"; it never quotes the value."""


class Option(NamedTuple):
    """One key. `expects` completes "must be …", with {low} and {high} filled in; both are inclusive.

    `settle`, for what needs the host, makes the setting of a value that isn't None, the folder that a path
    is relative to, and a label.
    """

    name: str
    parse: Callable[[Value, Option], Any]
    expects: str
    default: Any = None
    low: float = 0
    high: float = 0
    flag: str = ""
    env: str = ""
    private: bool = False  # a secret or a rule about peers: with --config it comes from that file only
    settle: Callable[[Any, str, str], Any] = lambda value, folder, label: value

    def read(self, value: Value, label: str) -> Any:
        """Raises ConfigError; `label` says where the value stands, such as `workers in /etc/kms.yaml`."""
        try:
            return self.parse(value, self)
        except Wrong as wrong:
            raise ConfigError(f"{label} {wrong}") from None

    def wrong(self) -> Wrong:
        return Wrong(f"must be {self.expects.format(low=self.low, high=self.high)}")


# ---- parsers -------------------------------------------------------------------------------------

_WHOLE = re.compile(r"0|[1-9][0-9]{0,18}")
_DECIMAL = re.compile(r"(?:0|[1-9][0-9]{0,9})(?:\.[0-9]{1,6})?")
_MODE = re.compile(r"(?:0o?)?[0246]{3}")
_CREDENTIAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]{0,254}")
_NUMERIC = ("int", "float", ANY)


def plain_text(value: Value, option: Option) -> str:
    if not isinstance(value, Scalar) or value.type not in ("str", ANY) or not value.text:
        raise option.wrong()
    if not value.text.isprintable():
        raise Wrong("holds a character that can't be shown")
    return value.text


def _number(value: Value, option: Option, form: re.Pattern[str]) -> str:
    if not isinstance(value, Scalar) or value.type not in _NUMERIC or not form.fullmatch(value.text):
        raise option.wrong()
    if not option.low <= float(value.text) <= option.high:
        raise option.wrong()
    return value.text


def whole_number(value: Value, option: Option) -> int:
    return int(_number(value, option, _WHOLE))


def seconds(value: Value, option: Option) -> float:
    return float(_number(value, option, _DECIMAL))


def worker_count(value: Value, option: Option) -> int | str:
    return "auto" if isinstance(value, Scalar) and value.text == "auto" else whole_number(value, option)


def one_of(*words: str) -> Callable[[Value, Option], str]:
    """Any type of scalar: YAML 1.1 takes a bare `off` for a truth value."""

    def parse(value: Value, option: Option) -> str:
        if not isinstance(value, Scalar) or value.text not in words:
            raise option.wrong()
        return value.text

    return parse


def text_block(value: Value, option: Option) -> dict[str, Any]:
    """Plain texts, and lists of them: who uses the block checks them, nobody else loads what that takes."""
    if not isinstance(value, dict):
        raise option.wrong()
    return {name: _text_or_texts(item) for name, item in value.items()}


def _text_or_texts(value: Value) -> str | list[str]:
    """What is no text within a list is an empty one: no member takes that."""
    return value.text if isinstance(value, Scalar) else [getattr(one, "text", "") for one in value]


def true_or_false(value: Value, option: Option) -> bool:
    return one_of("true", "false")(value, option) == "true"


def file_mode(value: Value, option: Option) -> int:
    """0600, "0600", 600 and 0o600 are all meant as octal: nobody means decimal 600, which is 01130."""
    if (
        not isinstance(value, Scalar)
        or value.type not in ("int", "str", ANY)
        or not _MODE.fullmatch(value.text)
    ):
        raise option.wrong()
    return int(value.text[-3:], 8)


def group_name(value: Value, option: Option) -> str:
    if isinstance(value, Scalar) and value.text.isdecimal():  # in quotes, too
        return str(whole_number(value._replace(type="int"), option._replace(high=MAX_UID)))
    return plain_text(value, option)


def socket_path(value: Value, option: Option) -> str:
    """A path, or the same as a URL: `unix:///run/kms.sock`."""
    text = plain_text(value, option)
    if text.startswith("unix://"):
        text = text[len("unix://") :]
    for pattern, instead in _NO_PATHS:
        if pattern.match(text):
            raise Wrong(f"{option.wrong()}: {instead}")
    if not text or "://" in text:
        raise option.wrong()
    return text


_NO_PATHS = (
    (re.compile(r"unix:(?!//)"), "write unix:// and the path behind it, or the path alone"),
    (
        re.compile("@"),
        "an abstract name has no permissions; write a path, such as /run/progressdb-kms/kms.sock",
    ),
    (re.compile(r"[^/]*:[0-9]+$"), "an address is none; write a path, such as /run/progressdb-kms/kms.sock"),
)
"""What would make a file of a strange name, and the daemon say that it is ready."""


def loopback_address(value: Value, option: Option) -> str:
    """HOST:PORT, of this host alone."""
    text = plain_text(value, option)
    try:
        host, port = host_and_port(text)
        address = ipaddress.ip_address(host)
    except ValueError:
        raise option.wrong() from None
    right = text.startswith("[::1]:") if address.version == 6 else address.is_loopback and text[0] != "["
    if not right or not 1 <= port <= 65535:
        raise option.wrong()
    return text


def host_and_port(text: str) -> tuple[str, int]:
    """`127.0.0.1:6820` or `[::1]:6820`. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not _WHOLE.fullmatch(port):
        raise ValueError("no port")
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host, int(port)


def uid_list(value: Value, option: Option) -> list[int]:
    """From the environment: with commas between."""
    if isinstance(value, Scalar) and value.type == ANY:
        value = [Scalar(part.strip(), ANY) for part in value.text.split(",")]
    if not isinstance(value, list) or len(value) > MAX_UIDS:
        raise option.wrong()
    return sorted({whole_number(item, option) for item in value})


def hex_key(value: Value, option: Option) -> bytearray:
    """Only the parser of the file calls this, in a process that ends right after it."""
    if not isinstance(value, Scalar) or value.type not in ("str", *_NUMERIC):
        raise option.wrong()
    key = bytearray(KEY_SIZE)
    try:
        with memoryview(key) as out:
            hex_decode_into(value.text.encode("ascii", "replace"), out)
    except ValueError as error:
        raise Wrong(str(error)) from None
    return key


def credential_name(value: Value, option: Option) -> str:
    if not _CREDENTIAL.fullmatch(name := plain_text(value, option)):
        raise option.wrong()
    return name


KEY_FORMS: Mapping[str, Option] = {
    row.name: row
    for row in (
        Option("hex", hex_key, "64 hex digits (32 bytes)", env=HEX_VARIABLE, private=True),
        Option("file", plain_text, "a path", env=FILE_VARIABLE, private=True),
        Option(
            "credential", credential_name, "the name of a systemd credential (no slash in it)", private=True
        ),
    )
}
"""How a key may be given: as master_key_hex and so on, or in an entry of a list of keys."""


def key_list(value: Value, option: Option) -> list[tuple[str, Any]]:
    return _entries(value, option, _key)


def _entries(value: Value, option: Option, parse: Callable[[Value, str], Any]) -> list[Any]:
    if not isinstance(value, list) or len(value) > option.high:
        raise option.wrong()
    return [parse(item, f"entry {number}") for number, item in enumerate(value, 1)]


def _key(item: Value, entry: str) -> tuple[str, Any]:
    found = _members(item, entry, KEY_FORMS, "`file: PATH`")
    if len(found) != 1:
        raise Wrong(f"{entry} must have exactly one of hex, file and credential")
    return found.popitem()


def _members(item: Value, entry: str, forms: Mapping[str, Option], example: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise Wrong(f"{entry} must be a mapping such as {example}")
    found: dict[str, Any] = {}
    for name, value in item.items():
        if name not in forms:
            raise Wrong(f"{entry}: {unknown(name, forms)}")
        try:
            found[name] = forms[name].parse(value, forms[name])
        except Wrong as wrong:
            raise Wrong(f"{entry}: {name} {wrong}") from None
    return found


def policy_list(value: Value, option: Option) -> list[dict[str, Any]]:
    return _entries(value, option, _policy)


def _policy(item: Value, entry: str) -> dict[str, Any]:
    found = _members(item, entry, _POLICY_FORMS, "`uid: 1000` with `operations: [encrypt]`")
    if ("uid" in found) == ("gid" in found):
        raise Wrong(f"{entry} must name either a uid or a gid")
    if len(found) == 1:
        raise Wrong(f"{entry} narrows nothing: give {', '.join(list(_POLICY_FORMS)[2:])}")
    return found


def _texts(value: Value, option: Option) -> list[str]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PATTERNS:
        raise option.wrong()
    if not all(isinstance(item, Scalar) and 1 <= len(item.text) <= MAX_PATTERN for item in value):
        raise option.wrong()
    return [item.text for item in value]


def _operations(value: Value, option: Option) -> list[str]:
    names = set(_texts(value, option))
    if wrong := sorted(names - OPERATIONS):
        near = CALLED.get(wrong[0]) or "".join(difflib.get_close_matches(wrong[0], OPERATIONS, 1, 0.5))
        meant = f"did you mean {near}?" if near else f"known are {', '.join(sorted(OPERATIONS))}"
        raise Wrong(f"names what is no operation ({meant})")
    return sorted(names)


_PATTERNS = (
    f"a list of 1 to {MAX_PATTERNS} patterns of 1 to {MAX_PATTERN} characters, in which * stands for any"
)

_POLICY_FORMS: Mapping[str, Option] = {
    row.name: row
    for row in (
        Option("uid", whole_number, "a number of a user", high=MAX_UID),
        Option("gid", whole_number, "a number of a group", high=MAX_UID),
        Option("operations", _operations, f"a list of 1 to {MAX_PATTERNS} operations"),
        Option("threads", _texts, _PATTERNS),
        Option("keys", _texts, _PATTERNS),
        Option("per_second", whole_number, "a whole number of operations, at least 1", low=1, high=10**9),
    )
}
"""What a policy may have: whom it names, and how it narrows that."""


# ---- words for messages ----------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,30}")


def shown(name: str) -> str | None:
    """The name of a key as a message may repeat it, or None: what stands in its place may be a secret."""
    return name if _NAME.fullmatch(name) else None


def unknown(name: str, known: Iterable[str]) -> str:
    """`unknown key 'worker', did you mean 'workers'?`"""
    if shown(name) is None:
        return "a key has a name that can't be one (it is not shown here: it may be a secret)"
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"unknown key {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
