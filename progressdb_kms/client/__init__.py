"""For programs that call the daemon: `Client`, what its calls return and the errors that they raise."""

from __future__ import annotations

from .calls import DEFAULT_SOCKET, BatchResult, Client, Key
from .handle import DekHandle, Receipted
from .results import (
    AuthenticationFailed,
    Conflict,
    Dek,
    KekSpent,
    KeyDisabled,
    KeyNotFound,
    KeyShredded,
    KeySpent,
    PeerRefused,
    RateLimited,
    Readiness,
    RequestRefused,
    RotationResult,
    ServiceFailed,
    Unavailable,
    Usage,
    Wrapped,
)
from .transport import BadAnswer, ClientError, ConnectionFailed, ListenerRefused

__all__ = [
    "DEFAULT_SOCKET",
    "AuthenticationFailed",
    "BadAnswer",
    "BatchResult",
    "Client",
    "ClientError",
    "Conflict",
    "ConnectionFailed",
    "Dek",
    "DekHandle",
    "Key",
    "KekSpent",
    "KeyDisabled",
    "KeyNotFound",
    "KeyShredded",
    "KeySpent",
    "ListenerRefused",
    "PeerRefused",
    "RateLimited",
    "Readiness",
    "Receipted",
    "RequestRefused",
    "RotationResult",
    "ServiceFailed",
    "Unavailable",
    "Usage",
    "Wrapped",
]
