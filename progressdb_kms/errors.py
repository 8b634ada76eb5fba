"""Every failure that a peer or an operator can meet, grouped by whose fault it is.

An error carries what the peer may hear: an HTTP status, a stable machine-readable `code`, and one
sentence. It never carries key material, plaintext or a traceback. The base class and the group
classes can't be raised by accident: raise a leaf.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

E = TypeVar("E", bound="KMSError")


class KMSError(Exception):
    """Base of all errors of this package. `message` is safe to show to any peer.

    `hint` says what to do next; the CLI prints it after the message. `close` tells the HTTP edge
    that the connection can't be used further, `header` is a line that the answer has, with its end.
    """

    status: ClassVar[int] = 0
    default_code: ClassVar[str] = ""
    default_message: ClassVar[str] = ""
    default_hint: ClassVar[str] = ""
    close: ClassVar[bool] = False
    header = ""

    def __init__(self, message: str = "", *, code: str = "", hint: str = "") -> None:
        if not self.status:
            raise TypeError(f"{type(self).__name__} is a group of errors: raise one of its members")
        self.message = message or self.default_message
        super().__init__(self.message)
        self.code = code or self.default_code
        self.hint = hint or self.default_hint

    @property
    def line(self) -> str:
        """For a log: the message, and the hint where there is one."""
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def bare(self: E) -> E:
        """Itself, for an error that is kept as a value: without the frames that it came through, which hold
        all that they saw (plaintexts), and without the errors before it, which hold theirs."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self


# ---- the peer's request can't be carried out as it stands ---------------------------------------


class RequestError(KMSError):
    """The request is at fault: sending it again unchanged gives the same answer."""


class BadRequest(RequestError):
    """400: malformed input. `field` names the part of the request that is wrong."""

    status = 400
    default_code = "bad_request"

    @classmethod
    def missing(cls, field: str) -> BadRequest:
        return cls(f"the field {field!r} is missing", code=f"missing_{field}")

    @classmethod
    def invalid(cls, field: str, why: str) -> BadRequest:
        return cls(f"the field {field!r} {why}", code=f"invalid_{field}")


class PeerRefused(RequestError):
    """403: the peer's UID may not make this call."""

    status = 403
    default_code = "peer_refused"


class PolicyRefused(PeerRefused):
    """403: a policy narrows what this peer may do. `entry` counts from 1."""

    default_code = "policy_refused"

    def __init__(self, message: str, *, entry: int) -> None:
        super().__init__(message)
        self.entry = entry


class RateLimited(PolicyRefused):
    """429: past the rate of a policy, which counts by the second."""

    status = 429
    default_code = "rate_limited"
    header = "Retry-After: 1\r\n"


class NotFound(RequestError):
    """404: no such path."""

    status = 404
    default_code = "not_found"


class KeyNotFound(RequestError):
    """404: no such key_id in the store."""

    status = 404
    default_code = "key_not_found"


class MethodNotAllowed(RequestError):
    """405: `allow` lists the methods that the path knows (RFC 9110, 15.5.6)."""

    status = 405
    default_code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.header = f"Allow: {allow}\r\n"


class Conflict(RequestError):
    """409: the request contradicts the state of the service."""

    status = 409
    default_code = "conflict"


class KeyShredded(RequestError):
    """410: the DEK was crypto-shredded; what was encrypted under it is gone for ever."""

    status = 410
    default_code = "key_shredded"


class BodyTooLarge(RequestError):
    """413: the body is longer than the route allows. The body is not read."""

    status = 413
    default_code = "body_too_large"
    default_hint = "send it in parts, or raise max_body_bytes in the daemon's configuration"
    close = True


class UnsupportedMediaType(RequestError):
    """415: neither JSON nor, where the route takes it, application/octet-stream."""

    status = 415
    default_code = "unsupported_media_type"


class AuthenticationFailed(RequestError):
    """422: the AEAD tag did not verify. Wrong key, wrong AAD and a changed bit look alike."""

    status = 422
    default_code = "authentication_failed"
    default_message = "the data does not open under this key"


class PlaintextNotJson(RequestError):
    """422: the message opens, but what it holds can't stand in an answer as raw JSON, which was asked for."""

    status = 422
    default_code = "plaintext_not_json"


class KeyDisabled(RequestError):
    """423: the DEK is disabled or scheduled for deletion; `enable` brings it back."""

    status = 423
    default_code = "key_disabled"


# ---- the bytes on the connection are not a request ----------------------------------------------


class HttpError(KMSError):
    """The framing is at fault (RFC 9112). The answer is sent and the connection closed."""

    close = True


class MalformedRequest(HttpError):
    status = 400
    default_code = "malformed_request"


class RequestTimeout(HttpError):
    status = 408
    default_code = "request_timeout"


class LengthRequired(HttpError):
    """411: a body that carries a key needs a Content-Length, so that it is received into locked memory."""

    status = 411
    default_code = "length_required"


class UriTooLong(HttpError):
    status = 414
    default_code = "uri_too_long"


class ExpectationFailed(HttpError):
    status = 417
    default_code = "expectation_failed"


class HeadTooLarge(HttpError):
    status = 431
    default_code = "head_too_large"


class MethodUnknown(HttpError):
    status = 501
    default_code = "not_implemented"


class VersionNotSupported(HttpError):
    status = 505
    default_code = "http_version_not_supported"


# ---- the service is at fault, or can't act now --------------------------------------------------


class ServiceError(KMSError):
    """Nothing is wrong with the request."""


class InternalError(ServiceError):
    """500: a defect. The log has a traceback under the request id that the answer names."""

    status = 500
    default_code = "internal"


class Unavailable(ServiceError):
    """503: not able now."""

    status = 503
    default_code = "unavailable"


class StoreUnavailable(Unavailable):
    """503: the store can't be read or written (disk full, I/O error, read-only)."""

    default_code = "store_unavailable"


class AuditUnavailable(Unavailable):
    """503: no audit record could be written, so no answer is given."""

    default_code = "audit_unavailable"


class Overloaded(Unavailable):
    """503: too many connections."""

    default_code = "overloaded"
    close = True


def for_peer(error: Exception, number: str = "") -> KMSError:
    """What a peer hears of it. `number`: under it the daemon's log tells of one that is a fault of ours."""
    if isinstance(error, KMSError):
        return error.bare()
    if isinstance(error, MemoryError):
        return Overloaded("no memory is left", hint="try again")
    return InternalError(f"an internal error; the daemon's log tells more under {number}")


# ---- the operator's set-up is at fault: the daemon does not start, the command ends with 1 -------


class OperatorError(KMSError):
    """Raised before anything is served it ends the process with exit code 1 and one line; a call that meets
    one hears it as what is our fault."""

    status = 500


class ConfigError(OperatorError):
    """The configuration is wrong. Names the key and the file, never the value."""

    default_code = "config"


class UnusableKey(ConfigError):
    """No key: none is named, or what is named is not there, or is none. What to do depends on whether a store
    needs it: `config.load` says more."""

    default_hint = "`progressdb-kms kek-id FILE…` tells which file holds which key"


class WeakKey(UnusableKey):
    """A master key that is published, too short or too regular."""

    default_code = "weak_key"


class KeyMismatch(OperatorError):
    """The configured keys don't fit the store. Names kek_ids and counts."""

    default_code = "kek_mismatch"


class StoreDamaged(OperatorError):
    """The store is not ours, of a newer version, or damaged."""

    default_code = "store_damaged"


class OtherSchema(StoreDamaged):
    """The store is whole, and of another program or release."""


class LockRefused(OperatorError):
    """Memory can't be locked, and the configuration requires it. 503 once it serves."""

    status = 503
    default_code = "memory_lock_refused"


class AlreadyRunning(OperatorError):
    """Another daemon holds this data-dir or socket."""

    default_code = "already_running"
