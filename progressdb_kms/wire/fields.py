"""The members of a JSON body, each taken once and checked."""

from __future__ import annotations

import re
from typing import Any

from ..crypto.envelope import Wrapped
from ..encoding import KEY_ID, MAX_THREAD_ID, b64decode
from ..errors import BadRequest
from ..service.service import wrapped_source

MAX_ITEMS = 1000
"""Items of a batch. A page of chat is 100."""


class Fields:
    """The members of a JSON object, each taken once and checked; what is left over is an error."""

    __slots__ = ("_values",)

    def __init__(self, values: Any) -> None:
        if not isinstance(values, dict):
            raise BadRequest("the body must be a JSON object", code="malformed_json")
        self._values: dict[str, Any] = values

    def _absent(self, name: str) -> bool:
        """null stands for a field that was left out."""
        if self._values.get(name) is not None:
            return False
        self._values.pop(name, None)
        return True

    def text(self, name: str) -> str:
        value = self._values.pop(name, None)
        if value is None:
            raise BadRequest.missing(name)
        if not isinstance(value, str):
            raise BadRequest.invalid(name, "must be a string")
        return value

    def data(self, name: str) -> bytes:
        try:
            return b64decode(self.text(name))
        except ValueError as error:
            raise BadRequest.invalid(name, f"is {error}") from None

    def aad(self, name: str = "aad", default: bytes = b"") -> bytes:
        return default if self._absent(name) else self.data(name)

    def key_id(self, name: str = "key_id") -> str:
        return checked_key_id(self.text(name), name)

    def optional_key_id(self) -> str | None:
        return None if self._absent("key_id") else self.key_id()

    def source(self) -> str | Wrapped:
        """A key_id, or an inline wrapped DEK."""
        if self._absent("wrapped"):
            return self.key_id()
        return wrapped_source(self.data("wrapped"), self.optional_key_id())

    def optional_thread_id(self) -> str | None:
        return None if self._absent("thread_id") and self._absent("thread_key") else self.thread_id()

    def thread_id(self) -> str:
        """Under this name or as `thread_key`, which some clients send."""
        old, new = self._values.pop("thread_key", None), self._values.get("thread_id")
        if old is not None and new is not None and old != new:
            raise BadRequest("thread_id and thread_key contradict each other", code="invalid_thread_id")
        if new is None:
            self._values["thread_id"] = old
        return checked_thread_id(self.text("thread_id"))

    def integer(self, name: str, low: int, high: int, default: int) -> int:
        value = self._values.pop(name, None)
        if value is None:
            return default
        whole = type(value) is int or (type(value) is float and value.is_integer())  # 7.0 is 7 in JSON
        if not whole or not low <= value <= high:
            raise BadRequest.invalid(name, f"must be a whole number from {low} to {high}")
        return int(value)

    def flag(self, name: str) -> bool:
        value = self._values.pop(name, None)
        if value is not None and not isinstance(value, bool):
            raise BadRequest.invalid(name, "must be true or false")
        return bool(value)

    def items(self) -> list[Any] | None:
        """However many."""
        value = self._values.pop("items", None)
        if not isinstance(value, (list, type(None))):
            raise wrong_number()
        return value

    def end(self) -> None:
        """A misspelt `aad` that was ignored would leave data unbound: unknown names are refused."""
        if self._values:
            name = min(self._values)
            raise BadRequest(f"the field {name[:40]!r} is not known here", code="unknown_field")


def wrong_number() -> BadRequest:
    return BadRequest.invalid("items", f"must be an array of 1 to {MAX_ITEMS} items")


def checked_key_id(value: str, name: str = "key_id") -> str:
    if not KEY_ID.fullmatch(value):
        raise BadRequest.invalid(
            name, "must be 1 to 128 of A-Z a-z 0-9 . _ : - and begin with a letter or digit"
        )
    return value


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def checked_thread_id(value: str) -> str:
    if not 1 <= len(value) <= MAX_THREAD_ID or _UNPRINTABLE.search(value):
        raise BadRequest.invalid("thread_id", f"must be 1 to {MAX_THREAD_ID} printable characters")
    return value
