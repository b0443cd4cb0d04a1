"""The one exception tree.

::

    VLCacheError                     status  retry helps
    ├── BadRequest                   400     no   the request can never succeed as it is
    │   ├── InvalidMedia             400     no   undecodable, oversized, or unreachable picture
    │   ├── InvalidPlan              400     no   a recompute plan that cannot be read or does not fit the model
    │   ├── PromptTooLong            400     no   prompt + max_tokens exceed the context
    │   ├── UnknownModel             404     no
    │   └── PayloadTooLarge          413     no
    ├── Unauthorized                 401     no
    ├── Overloaded                   503     yes  queues are full; come back later
    ├── DeadlineExceeded             504     yes
    ├── Cancelled                    499     no   the client went away
    ├── WorkerLost                   503     yes  the worker that held the request died or stopped answering
    ├── ProtocolError                500     no   a peer sent what the protocol does not allow
    ├── EngineError                  500     no   a forward pass failed
    ├── CheckpointError              500     no   a tensor is missing, extra or misshapen (start-up)
    ├── UnsupportedModel             500     no   the architecture or a config value is refused by name (start-up)
    ├── ConfigError                  500     no   a setting is wrong; names the key, the value and the fix
    └── CacheError                   500     yes  never reaches a client: the request falls back to recompute
        ├── StoreFull                             no extent can be freed now
        ├── ObjectGone                            the holder no longer has the object (a stale hint)
        ├── LeaseLost                             the lease expired, or its generation changed
        ├── LayoutMismatch                        the peer's model, dtype, layout or TP size differs; says which
        ├── TransferFailed                        the transport reported an error
        ├── TransferTimeout                       not done by the local deadline; the destination is quarantined
        └── ChecksumMismatch                      bytes arrived, but not the announced ones
"""

from __future__ import annotations


class VLCacheError(Exception):
    """Base of all errors. ``status`` is the HTTP status; ``retryable`` says whether the same call may succeed later."""

    status: int = 500
    retryable: bool = False

    @property
    def code(self) -> str:
        return type(self).__name__

    @property
    def message(self) -> str:
        return str(self)


class BadRequest(VLCacheError):
    status = 400


class InvalidMedia(BadRequest):
    pass


class InvalidPlan(BadRequest):
    pass


class PromptTooLong(BadRequest):
    pass


class UnknownModel(BadRequest):
    status = 404


class PayloadTooLarge(BadRequest):
    status = 413


class Unauthorized(VLCacheError):
    status = 401


class Overloaded(VLCacheError):
    status = 503
    retryable = True


class DeadlineExceeded(VLCacheError):
    status = 504
    retryable = True


class Cancelled(VLCacheError):
    status = 499


class WorkerLost(VLCacheError):
    status = 503
    retryable = True


class ProtocolError(VLCacheError):
    pass


class EngineError(VLCacheError):
    pass


class CheckpointError(VLCacheError):
    pass


class UnsupportedModel(VLCacheError):
    pass


class ConfigError(VLCacheError):
    pass


class CacheError(VLCacheError):
    retryable = True


class StoreFull(CacheError):
    pass


class ObjectGone(CacheError):
    pass


class LeaseLost(CacheError):
    pass


class LayoutMismatch(CacheError):
    pass


class TransferFailed(CacheError):
    pass


class TransferTimeout(CacheError):
    pass


class ChecksumMismatch(CacheError):
    pass


def _tree(root: type[VLCacheError]) -> dict[str, type[VLCacheError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_code(code: str, message: str) -> VLCacheError:
    """Rebuild an error that crossed a process boundary. An unknown code becomes ``ProtocolError``, which names it."""
    kind = _tree(VLCacheError).get(code)
    return kind(message) if kind else ProtocolError(f"{code}: {message}")
