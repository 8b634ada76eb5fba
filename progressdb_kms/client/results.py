"""What the client's calls return and raise. Import these names from `client`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .transport import ClientError

# ---- errors ----------------------------------------------------------------------------------------


class RequestRefused(ClientError):
    """4xx: the request is at fault, and nothing was done; the subclasses tell the common cases apart."""


class PeerRefused(RequestRefused):
    """403: this UID may not make the call."""


class KeyNotFound(RequestRefused):
    """404: no such key_id."""


class Conflict(RequestRefused):
    """409: the request contradicts the state of the service."""


class KeySpent(Conflict):
    """409: the DEK has encrypted all that it may, and only decrypts: make another one."""


class KekSpent(Conflict):
    """409: the KEK has wrapped all that it may, and only unwraps: rotate it."""


class KeyShredded(RequestRefused):
    """410: the key is gone for ever."""


class AuthenticationFailed(RequestRefused):
    """422: wrong key, wrong AAD or changed data; they look alike."""


class KeyDisabled(RequestRefused):
    """423: `enable` brings the key back."""


class RateLimited(RequestRefused):
    """429: past the rate that a policy leaves this UID."""


class ServiceFailed(ClientError):
    """5xx: the daemon is at fault."""


class Unavailable(ServiceFailed):
    """503: not able now."""


_BY_STATUS: Mapping[int, type[ClientError]] = {
    403: PeerRefused,
    409: Conflict,
    410: KeyShredded,
    422: AuthenticationFailed,
    423: KeyDisabled,
    429: RateLimited,
    503: Unavailable,
}

# For the items of a batch, which have no status, and to tell an unknown key from an unknown path.
_BY_CODE: Mapping[str, type[ClientError]] = {
    "key_not_found": KeyNotFound,
    "peer_refused": PeerRefused,
    "key_shredded": KeyShredded,
    "authentication_failed": AuthenticationFailed,
    "plaintext_not_json": RequestRefused,
    "key_disabled": KeyDisabled,
    "key_spent": KeySpent,
    "kek_spent": KekSpent,
    "policy_refused": PeerRefused,
    "rate_limited": RateLimited,
    "conflict": Conflict,
    "internal": ServiceFailed,
    **dict.fromkeys(
        (
            *("unavailable", "store_unavailable", "store_unreachable", "audit_unavailable", "overloaded"),
            *("kek_not_loaded", "keyring_full"),
        ),
        Unavailable,
    ),
}


def failure(status: int, error: Any) -> ClientError:
    """The exception for an error object of the API. `status` is 0 for an item of a batch."""
    fields: Mapping[str, Any] = error if isinstance(error, dict) else {}
    code = str(fields.get("code", "")) or f"http_{status}"
    message = str(fields.get("message", "")) or f"the daemon answered with HTTP status {status}"
    group = ServiceFailed if status >= 500 else RequestRefused
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status) or group
    return kind(message, code=code, status=status, hint=str(fields.get("hint", "")))


# ---- results ---------------------------------------------------------------------------------------


class Usage(NamedTuple):
    """What was done under a DEK, but for the last second. Times are RFC 3339 in UTC, "" where it was never
    used; `last_uid` is None then, and where nobody knows it."""

    encrypts: int
    decrypts: int
    first_used_at: str = ""
    last_used_at: str = ""
    last_uid: int | None = None


class Dek(NamedTuple):
    """A DEK as the service describes it. Times are RFC 3339 in UTC, "" where they don't apply; `wrapped` is
    filled in by `create_dek` alone, `usage` by `describe` and `list`."""

    key_id: str
    thread_id: str
    state: str
    kek_id: str
    kek_version: str
    created_at: str
    delete_at: str = ""
    shredded_at: str = ""
    wrapped: bytes = b""
    usage: Usage | None = None


class Wrapped(NamedTuple):
    """A wrapped DEK: opaque, may be stored anywhere, opens under the KEK it names only."""

    wrapped: bytes
    kek_id: str
    kek_version: str


class RotationResult(NamedTuple):
    """`backup` is the folder of the per-key snapshots (in a fleet the table that the rows were in before), ""
    after a dry run. `by_kek`: DEKs per KEK before. `warning`: no configured file of the daemon's holds the
    key, and its next start needs it."""

    kek_id: str
    kek_version: str
    rewrapped: int
    backup: str
    by_kek: Mapping[str, int]
    warning: str = ""


class Readiness(NamedTuple):
    """True where the service can do all of its work; `reasons` says what is in the way, `warnings` what the
    operator should see to."""

    ready: bool
    reasons: Sequence[str]
    warnings: Sequence[str] = ()

    def __bool__(self) -> bool:
        return self.ready
