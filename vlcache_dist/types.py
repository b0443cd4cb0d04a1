"""Values that every part of the system shares, in memory and on the wire.

All of them are frozen ``msgspec.Struct``s: cheap to make, comparable, and encoded as MessagePack without a second
declaration. This module knows neither torch nor Ray nor ZeroMQ.

Vocabulary
----------
vision token   one row of the vision encoder's output after the 2x2 merger, one prompt position
span           the run of vision tokens that one image or video occupies in a prompt
content key    32-byte digest that names what a span shows (see ``hashing``)
object         what a store keeps for a content key: its unrotated KV, or its encoder output
variant        16 bytes that name the computation which produced an object; copies share it, recomputations do not
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

ContentKey = bytes  #: 32 bytes
Variant = bytes  #: 16 bytes
WorkerId = str  #: ``{role}-{name}#{incarnation}``: never reused, not even after a restart


class Role(enum.StrEnum):
    """The pool a worker belongs to. ``COLOCATED`` prefills and decodes over one KV pool."""

    ENCODER = "encoder"
    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


class ObjectKind(enum.StrEnum):
    """What a store may hold under a content key."""

    KV = "kv"  #: [layer][K|V][token][kv_head][head_dim], K unrotated
    EMBEDDING = "embedding"  #: [token][hidden], the encoder's output
    STAGING = "staging"  #: packed pages on their way from prefill to decode; no content key


class ReuseMode(enum.StrEnum):
    """What a request allows (DESIGN: contracts)."""

    OFF = "off"  #: compute everything, read no cache, fill no cache
    EXACT = "exact"  #: only exact prefixes are reused
    APPROX = "approx"  #: image KV is reused at any position, with the recompute plan


class KVSource(enum.StrEnum):
    """Where a span's KV came from, for provenance."""

    COMPUTED = "computed"
    PREFIX = "prefix"  #: the (exact or approximate) prefix cache of this worker
    LOCAL = "local"  #: this worker's image store
    REMOTE = "remote"  #: another worker's image store, through the transport


class MediaSpan(msgspec.Struct, frozen=True):
    """One image or video inside a prompt.

    ``start`` and ``length`` count prompt positions. ``grid`` is (t, h, w) in *patches* as transformers'
    ``image_grid_thw``: ``length == t * h * w / merge**2``. ``second_per_grid`` is the time between two temporal
    patches in seconds (videos; 0.0 for images). ``index`` is the item's place in the request's media list.
    """

    key: ContentKey
    start: int
    length: int
    grid: tuple[int, int, int]
    modality: Literal["image", "video"] = "image"
    second_per_grid: float = 0.0
    index: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are drawn. ``temperature == 0`` is greedy. ``logprobs`` is the number of alternatives per token
    (None: no logprobs at all). ``stop`` strings are matched on decoded text and are not returned."""

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class TokenLogprobs(msgspec.Struct, frozen=True):
    """The chosen token's natural-log probability and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class SpanReport(msgspec.Struct, frozen=True):
    """Provenance of one span, as the API returns it.

    ``recomputed_tokens`` counts vision tokens that were computed in at least one layer although the span was
    reused; for a computed span ``reused_tokens == recomputed_tokens == 0``. ``recomputed_layer_tokens`` is the sum
    of the plan's counts over layers (token-layers). ``bytes_moved`` is what crossed the transport for this span.
    ``deviation``: what the canary saw, in units of its limit (None: nobody watched); above 1 the span and all behind it
    are ``escalated``: computed in full before the first token was released, whatever was reused at first. ``why``:
    "canary" (its own probes, after the warm pass), "earlier span" (another's, likewise), "remembered" (such a context
    proved harmful before: nothing was tried), "trusted" (it proved harmless before: nobody watched), "rechecked" (it
    alarmed, or one before it; a second pass corrected it and left the answer as it was, so that it is not escalated).
    """

    digest: str
    source: KVSource
    vision_tokens: int
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    recomputed_layer_tokens: int = 0
    bytes_moved: int = 0
    holder: str = ""
    deviation: float | None = None
    escalated: bool = False
    why: str = ""
