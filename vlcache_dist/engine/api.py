"""What goes into the engine and what comes out of it: span sources, events, the prefill-to-decode handoff.

Extents are handles of the worker's ``ObjectStore``. Handing an extent to the engine hands over one pin (committed
objects) or the extent itself (one that is being filled, or staging): the engine unpins, commits, aborts or discards it,
whatever becomes of the request.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from vlcache_dist.errors import VLCacheError
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.reuse.canary import Canary
from vlcache_dist.types import ContentKey, FinishReason, KVSource, SpanReport, TokenLogprobs, Variant


class Mode(enum.StrEnum):
    """What this engine does with a request."""

    GENERATE = "generate"  #: prefill and decode
    PREFILL = "prefill"  #: up to the first token; then the sequence is parked for ``export`` until ``release``
    RECORD = "record"  #: as GENERATE, for the sake of what is recorded: it takes no part in prefix caching
    DECODE = "decode"  #: starts from KV that another engine computed (``import_sequence``)


# -- sources of a span's KV ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute the span from its encoder output. ``embedding``: committed and pinned (of any kind but KV; a staging
    extent is discarded after use). ``record``: a FILLING extent of kind KV in which the span's KV is recorded under the
    extent's key and variant, or None. A record that may not be completed comes back as ``RecordDropped``.
    ``remembered``: KV was there, and this context is known to be harmful (provenance)."""

    embedding: Extent
    record: Extent | None = None
    remembered: bool = False


@dataclass(frozen=True, slots=True)
class Reuse:
    """Take the span's KV from ``kv`` (committed, pinned). ``depths`` int [length]: in how many layers each token is
    recomputed (``Plan.depths``). ``embedding`` as in ``Compute``; its first rows, up to the last one that is
    recomputed, are enough, and None if there is none. With ``canary``, ``depths`` include its probes and ``embedding``
    is the whole span's: if the probes deviate, the span and everything behind it are computed from it before the first
    token is released. ``groups``: edges of the layer groups in which ``kv`` is still arriving, (0, ..., num_layers); it
    is then neither committed nor pinned, and nothing that depends on it counts before ``Engine.admit``. Empty: all of
    it is there. With ``rows_arrive``, so is ``embedding``, and layers count as arrived once its rows are there. The
    rest is provenance for the report. ``trusted``: nobody watches, since such contexts proved harmless."""

    kv: Extent
    depths: np.ndarray
    embedding: Extent | None = None
    source: KVSource = KVSource.LOCAL
    bytes_moved: int = 0
    holder: str = ""
    canary: Canary | None = None
    groups: tuple[int, ...] = ()
    rows_arrive: bool = False
    trusted: bool = False


# -- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request owns all the blocks it can ever need. ``needed``: indices (into the request's spans) of spans that
    need a source, in prompt order; the others lie in the prefix cache. ``cached_tokens``: length of the prefix hit.
    In DECODE mode: now is the time for ``import_sequence``; ``needed`` is empty."""

    request_id: str
    needed: tuple[int, ...]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class SpanRecorded:
    """A recorded span is complete in every layer and committed: it may be announced and reused."""

    request_id: str
    span_index: int
    extent: Extent


@dataclass(frozen=True, slots=True)
class RecordDropped:
    """A record that was provided will not be completed (the span turned out to be tainted, covered in part by the
    prefix cache, or a repetition; or the request ended). Its extent is freed: give up the claim on ``key``."""

    request_id: str
    span_index: int
    key: ContentKey


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """All prompt tokens are computed; the first ``TokenEvent`` follows at once. ``cached_tokens`` counts prompt tokens
    that were not computed in full, ``computed_rows`` token-layers. Times in seconds of the caller's clock: from ``add``
    to the first step, and from there to now. ``discarded``: the first token of the pass that a canary threw away, with
    its logprobs if the request asked for them; comparing it with the one that follows says whether the alarm was
    right."""

    request_id: str
    reports: tuple[SpanReport, ...]
    cached_tokens: int
    computed_rows: int
    queue_s: float
    compute_s: float
    discarded: tuple[int, TokenLogprobs | None] | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token. After one with ``finish`` the engine has forgotten the request, in PREFILL mode too. The
    end-of-sequence token is delivered as well, with ``finish == STOP``."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The request is over and everything it held is freed."""

    request_id: str
    error: VLCacheError


Event = Admitted | SpanRecorded | RecordDropped | PrefillDone | TokenEvent | Failed


# -- prefill to decode --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DerivableSpan:
    """A span whose pages follow from an object's unrotated KV, except for the shipped rows inside it. ``index`` is the
    span's place in the request."""

    index: int
    key: ContentKey
    variant: Variant


@dataclass(frozen=True, slots=True)
class Export:
    """KV of positions [0, num_tokens). ``rows``: half-open position ranges, packed in order into ``staging``
    (committed, owned by the engine until ``release``; None if there are no rows). Every other position lies in one of
    ``spans``, whose objects stay pinned until ``release``."""

    num_tokens: int
    rows: tuple[tuple[int, int], ...]
    spans: tuple[DerivableSpan, ...]
    staging: Extent | None


@dataclass(frozen=True, slots=True)
class Import:
    """The other side of an ``Export``, in this worker's arena. ``objects``: KV extents of the derivable spans by span
    index, committed and pinned, of the exported variants. ``staging``: filled by a READ that is over, not committed."""

    num_tokens: int
    rows: tuple[tuple[int, int], ...]
    objects: dict[int, Extent]
    staging: Extent | None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and gauges. ``layer_rows[l]``: rows whose K and V layer l computed;
    ``layer_query_rows[l]``: rows that went through attention and MLP of layer l. ``scattered_tokens``: vision tokens
    whose pages were filled from objects. ``spans_watched``: reused spans whose canary was read;
    ``spans_escalated``: spans that were computed after all because their own canary or an earlier one called.
    ``spans_rechecked``: spans that alarmed, or stood behind one that did, and were released after a second pass;
    ``spans_streamed``: reused spans whose layers were computed on while later ones were still arriving;
    ``spans_revoked``: spans whose arriving source was withdrawn; ``vision_layer_rows``: rows of vision tokens, summed
    over the layers that computed their K and V, passes whose answer was thrown away included."""

    waiting: int
    running: int
    parked: int
    waiting_tokens: int
    blocks_free: int
    blocks_total: int
    steps: int
    finished: int
    aborted: int
    failed: int
    prompt_tokens: int
    generated_tokens: int
    exact_hit_tokens: int
    approx_hit_tokens: int
    scattered_tokens: int
    spans_recorded: int
    spans_reused: int
    layer_rows: tuple[int, ...]
    layer_query_rows: tuple[int, ...]
    spans_watched: int = 0
    spans_escalated: int = 0
    spans_rechecked: int = 0
    spans_streamed: int = 0
    spans_revoked: int = 0
    vision_layer_rows: int = 0
