"""One DEK as an object, for a program that works in one thread of a chat at a time.

box = kms.dek("room-42")                     the thread's DEK, made where there is none
sealed = box.encrypt(b"hello", aad=b"message 7")
text, receipt = box.receipted.encrypt(b"hello")    with the audit receipt, to keep beside the message
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple, Protocol, Union

from ..encoding import KEY_ID, Buffer
from .results import Dek
from .transport import ClientError

Item = Union[Buffer, tuple[Buffer, bytes]]
"""Data, or data and AAD."""


class Calls(Protocol):
    """What a handle needs of a Client."""

    @property
    def last_receipt(self) -> str: ...
    @property
    def last_receipts(self) -> list[str]: ...
    def encrypt(self, key: str, plaintext: Buffer, aad: bytes = b"") -> bytes: ...
    def decrypt(self, key: str, ciphertext: Buffer, aad: bytes = b"") -> bytes: ...
    def encrypt_batch(self, items: Iterable[tuple[str, Buffer, bytes]]) -> list[bytes | ClientError]: ...
    def decrypt_batch(self, items: Iterable[tuple[str, Buffer, bytes]]) -> list[bytes | ClientError]: ...
    def describe(self, key_id: str) -> Dek: ...


class Receipted(NamedTuple):
    """The bytes, and the audit receipt of the call that made them: `audit verify --receipts` takes it."""

    data: bytes
    receipt: str


def key_id_of_thread(thread_id: str) -> str:
    """The key_id of a thread's own DEK: `thread:` and the thread_id where that fits, else its SHA-256.

    It is the same for each caller, so that two who ask at once get one DEK and not two. Raises TypeError for
    what is no text: None would be the thread of that name.
    """
    if not isinstance(thread_id, str):
        raise TypeError(f"a thread_id is a str, not {type(thread_id).__name__}")
    plain = f"thread:{thread_id}"
    if KEY_ID.fullmatch(plain):
        return plain
    return f"thread:sha256:{hashlib.sha256(thread_id.encode('utf-8')).hexdigest()}"


class DekHandle:
    """Encrypts and decrypts under one DEK. Safe for threads; it holds no key and costs nothing to make."""

    def __init__(self, calls: Calls, key_id: str) -> None:
        self._calls = calls
        self.key_id = key_id

    def encrypt(self, plaintext: Buffer, aad: bytes = b"") -> bytes:
        """Returns nonce | ciphertext | tag: 28 bytes more than the plaintext."""
        return self._calls.encrypt(self.key_id, plaintext, aad)

    def decrypt(self, ciphertext: Buffer, aad: bytes = b"") -> bytes:
        """Raises AuthenticationFailed for another key, another AAD, or a changed bit."""
        return self._calls.decrypt(self.key_id, ciphertext, aad)

    def encrypt_many(self, items: Iterable[Item]) -> list[bytes | ClientError]:
        """A page in as few requests as the limits allow; one result an item, in order."""
        return self._calls.encrypt_batch(_under(self.key_id, items))

    def decrypt_many(self, items: Iterable[Item]) -> list[bytes | ClientError]:
        """Likewise; an item that fails is an error in its place and spoils no other."""
        return self._calls.decrypt_batch(_under(self.key_id, items))

    def describe(self) -> Dek:
        return self._calls.describe(self.key_id)

    @property
    def receipted(self) -> ReceiptedHandle:
        """The same, with the audit receipt of each call."""
        return ReceiptedHandle(self._calls, self.key_id)

    def __repr__(self) -> str:
        return f"DekHandle({self.key_id!r})"


def _under(key_id: str, items: Iterable[Item]) -> Iterable[tuple[str, Buffer, bytes]]:
    for item in items:
        data, aad = item if isinstance(item, tuple) else (item, b"")
        yield key_id, data, aad


class ReceiptedHandle:
    """As DekHandle, for callers who keep receipts beside their messages."""

    def __init__(self, calls: Calls, key_id: str) -> None:
        self._calls = calls
        self.key_id = key_id

    def encrypt(self, plaintext: Buffer, aad: bytes = b"") -> Receipted:
        return Receipted(self._calls.encrypt(self.key_id, plaintext, aad), self._calls.last_receipt)

    def decrypt(self, ciphertext: Buffer, aad: bytes = b"") -> Receipted:
        return Receipted(self._calls.decrypt(self.key_id, ciphertext, aad), self._calls.last_receipt)

    def encrypt_many(self, items: Iterable[Item]) -> list[Receipted | ClientError]:
        """Items of one request have one receipt."""
        return self._each(self._calls.encrypt_batch(_under(self.key_id, items)))

    def decrypt_many(self, items: Iterable[Item]) -> list[Receipted | ClientError]:
        return self._each(self._calls.decrypt_batch(_under(self.key_id, items)))

    def _each(self, results: list[bytes | ClientError]) -> list[Receipted | ClientError]:
        both = zip(results, self._calls.last_receipts)
        return [Receipted(one, receipt) if isinstance(one, bytes) else one for one, receipt in both]
