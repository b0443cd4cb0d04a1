"""Every message that crosses a process boundary, as tagged MessagePack structs validated on decode.

A message is a frozen ``msgspec.Struct`` with a unique tag; its reply type stands in ``REPLIES``. Large binary
payloads (picture bytes) travel beside the message as raw frames, never inside it. ``rpc`` puts messages into
envelopes that carry the wire version, the call id and the remaining time.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.reuse.books import Observation, Standing
from vlcache_dist.transfer.base import PeerInfo
from vlcache_dist.types import (
    ContentKey,
    FinishReason,
    MediaSpan,
    ObjectKind,
    ReuseMode,
    Role,
    SamplingParams,
    SpanReport,
    TokenLogprobs,
    Variant,
    WorkerId,
)

WIRE_VERSION = 1


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the tag is the class name."""


class Ok(Message, frozen=True):
    """Nothing to say."""


# -- cache directory --------------------------------------------------------------------------------------------


class WorkerLoad(msgspec.Struct, frozen=True):
    """What placement needs to know, sent with every heartbeat. Counts are tokens or bytes, times seconds."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0  #: active tokens not yet computed
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    store_bytes_used: int = 0
    store_bytes_total: int = 0
    pass_s: float = 0.0  #: measured, recent: seconds of a forward pass besides its tokens; 0 if unknown, as below
    token_s: float = 0.0  #: seconds of an active token; of an encoder: of a vision token
    read_bytes_per_s: dict[WorkerId, float] = {}  #: measured per peer; 0 if it cannot be read from
    read_latency_s: dict[WorkerId, float] = {}  #: measured per peer: seconds of a small READ


class WorkerInfo(msgspec.Struct, frozen=True):
    """A member. ``address`` is its ZeroMQ endpoint, ``peer`` its transport endpoint (None: none).
    ``started``: seconds of the wall clock; of two workers of one name the later one is the member."""

    worker_id: WorkerId
    name: str  #: stable, e.g. "prefill-0"
    role: Role
    address: str
    peer: PeerInfo | None = None
    draining: bool = False
    started: float = 0.0


class Member(msgspec.Struct, frozen=True):
    info: WorkerInfo
    load: WorkerLoad
    age_s: float  #: since its last heartbeat


class MediaMeta(msgspec.Struct, frozen=True):
    """All that a prompt needs to know about an image it need not see. ``grid`` in patches."""

    modality: Literal["image", "video"]
    grid: tuple[int, int, int]
    second_per_grid: float = 0.0


class Entry(msgspec.Struct, frozen=True):
    key: ContentKey
    kind: ObjectKind
    variant: Variant
    nbytes: int
    meta: MediaMeta


class Holder(msgspec.Struct, frozen=True):
    """A hint: this worker announced the object. Only the worker itself knows whether it still has it."""

    worker_id: WorkerId
    address: str
    variant: Variant
    nbytes: int


class KeyState(msgspec.Struct, frozen=True):
    key: ContentKey
    meta: MediaMeta | None
    kv: tuple[Holder, ...] = ()
    embedding: tuple[Holder, ...] = ()
    producer: WorkerId | None = None  #: who has claimed the KV now


class Register(Message, frozen=True):
    info: WorkerInfo


class Registered(Message, frozen=True):
    epoch: str  #: changes when the shard has lost its state: announce again
    heartbeat_s: float
    expiry_s: float
    replaced: bool = False  #: not registered: a later worker of the same name is a member


class Unregister(Message, frozen=True):
    worker_id: WorkerId


class Heartbeat(Message, frozen=True):
    worker_id: WorkerId
    load: WorkerLoad
    draining: bool = False


class HeartbeatAck(Message, frozen=True):
    epoch: str
    known: bool  #: False: register and announce again
    held: int = 0  #: fingerprint of what this shard believes the worker to hold


class ListMembers(Message, frozen=True):
    role: Role | None = None


class Members(Message, frozen=True):
    epoch: str
    members: tuple[Member, ...]


class Announce(Message, frozen=True):
    """Committed objects only. Ends the sender's claim on the same keys and wakes those who wait."""

    worker_id: WorkerId
    entries: tuple[Entry, ...]


class Retract(Message, frozen=True):
    worker_id: WorkerId
    objects: tuple[tuple[ContentKey, ObjectKind, Variant], ...]


class Lookup(Message, frozen=True):
    keys: tuple[ContentKey, ...]


class Found(Message, frozen=True):
    epoch: str
    states: tuple[KeyState, ...]  #: same order as the keys


class Claim(Message, frozen=True):
    """Ask to be the one producer of a key's object (single flight)."""

    worker_id: WorkerId
    key: ContentKey
    kind: ObjectKind
    ttl_s: float


class ClaimReply(Message, frozen=True):
    """Granted; or a holder has it already; or somebody else (``producer``) is at it: wait."""

    granted: bool
    holders: tuple[Holder, ...] = ()
    producer: WorkerId | None = None


class Unclaim(Message, frozen=True):
    """The producer gave up (abort, error): waiters are woken and one of them may claim."""

    worker_id: WorkerId
    key: ContentKey
    kind: ObjectKind


class Await(Message, frozen=True):
    """Long poll: answers when the key has a holder, when its claim ends, or when ``timeout_s`` is over."""

    key: ContentKey
    kind: ObjectKind
    timeout_s: float


class Awaited(Message, frozen=True):
    holders: tuple[Holder, ...]  #: empty: the claim ended without an object, or time is up


class ShareBooks(Message, frozen=True):
    """A prefill worker's guard to the common books of its model (``scope``: fingerprint), every heartbeat. ``epoch``:
    of the shard that it heard last; ``copies`` go to a new one. ``known``: rank per format."""

    worker_id: WorkerId
    scope: str
    epoch: str
    known: dict[str, tuple[int, int]]
    news: tuple[Observation, ...]
    copies: tuple[Standing, ...] = ()


class SharedBooks(Message, frozen=True):
    """What the worker did not know. Another ``epoch`` than it named: nothing was counted, tell again with copies."""

    epoch: str
    standings: tuple[Standing, ...]


# -- any worker with a store ------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """Handshake between two workers before the first READ."""

    peer: PeerInfo


class HelloReply(Message, frozen=True):
    peer: PeerInfo


class Acquire(Message, frozen=True):
    """Lease an object for reading. ``variant`` None: any. ``checksum``: the reader wants to verify what it read.
    ``prefix``: only so many bytes of the object's start will be read, and the checksum is of those (0: all).
    Errors: ObjectGone, LayoutMismatch."""

    reader: WorkerId
    key: ContentKey
    kind: ObjectKind
    layout: KVLayout
    variant: Variant | None = None
    ttl_s: float = 10.0
    checksum: bool = False
    prefix: int = 0


class Lease(Message, frozen=True):
    """``offset`` and ``nbytes`` in the holder's arena. The object neither moves nor changes while the lease lives.
    ``checksum``: 16-byte BLAKE3 of the bytes that will be read, of each shard, where the reader asked for it."""

    lease_id: int
    generation: int
    variant: Variant
    offset: int
    nbytes: int
    ttl_s: float
    checksum: bytes | None = None


class Renew(Message, frozen=True):
    """``checksum``: the reader wants to verify what it read of the whole extent (a handoff, which nobody acquires)."""

    lease_id: int
    generation: int
    ttl_s: float
    checksum: bool = False


class Release(Message, frozen=True):
    lease_id: int
    generation: int


class Released(Message, frozen=True):
    """``valid``: the lease lived until now and the generation never changed, so what was read may be used."""

    valid: bool


class Status(Message, frozen=True):
    pass


class StatusReply(Message, frozen=True):
    status: dict[str, Any]


class Forget(Message, frozen=True):
    """An object will not be used again: free it as soon as nobody reads it. Unknown objects are ignored."""

    key: ContentKey
    kind: ObjectKind


class Drain(Message, frozen=True):
    """Take no new requests; finish what runs."""


# -- encoder ----------------------------------------------------------------------------------------------------


class MediaSource(msgspec.Struct, frozen=True):
    """Where the bytes of a request's media can be fetched (the ingress keeps them until the request ends)."""

    address: str
    request_id: str


class GetMedia(Message, frozen=True):
    request_id: str
    index: int


class MediaReply(Message, frozen=True):
    """The bytes travel as the attachment; ``frames`` > 1 for a video given as a list of pictures."""

    frames: int


class Encode(Message, frozen=True):
    """Make sure the encoder output of a span exists, and say where. The encoder is single flight per key. Bytes may
    be attached; otherwise they are pulled from ``source`` when needed. ``private``: the result is not announced (the
    request reads and fills no cache; its keys are its own). Errors: InvalidMedia, Overloaded."""

    span: MediaSpan
    source: MediaSource
    timeout_s: float
    private: bool = False


class Encoded(Message, frozen=True):
    holder: Holder
    computed: bool  #: False: it was there already


# -- prefill and decode -----------------------------------------------------------------------------------------


class Generation(msgspec.Struct, frozen=True):
    """One request as workers see it: tokens, spans, sampling. ``plan`` is the canonical spelling (``reuse.plan``)."""

    request_id: str
    tenant: str
    token_ids: tuple[int, ...]
    spans: tuple[MediaSpan, ...]
    sampling: SamplingParams
    reuse: ReuseMode
    plan: str
    num_generated: int = 0  #: the last tokens of ``token_ids`` that are answer already (retry after a lost worker)


class HandoffSpan(msgspec.Struct, frozen=True):
    """A span whose pages decode can rebuild: rotate the object's K, then overwrite the shipped rows."""

    index: int
    key: ContentKey
    variant: Variant


class Handoff(msgspec.Struct, frozen=True):
    """Where a prefilled sequence's KV is. ``rows`` are half-open position ranges packed, in order, into the staging
    extent ``staging`` at the prefill worker; every other position lies in one of ``spans``."""

    worker_id: WorkerId
    address: str
    ticket: str
    num_tokens: int
    rows: tuple[tuple[int, int], ...]
    spans: tuple[HandoffSpan, ...]
    staging: Lease | None  #: None: colocated, handed over by reference


class DonorContext(msgspec.Struct, frozen=True):
    """The context in which a picture's KV is computed for others: token ids ``before`` it and ``after`` it (at least
    one). ``ahead``: before the request that shows it is answered, else when there is time."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    ahead: bool


class Prefill(Message, frozen=True):
    """Compute a prompt's KV and its first token. Streams one ``Prefilled``; a colocated worker
    goes on with ``Tokens``. ``hints``: what the ingress, which had to ask for the sake of placement, heard from the
    directory; a hint that proves stale costs one more look-up. ``donor``: the only context that KV is recorded in;
    None: the request's own."""

    generation: Generation
    source: MediaSource
    timeout_s: float
    hints: tuple[KeyState, ...] = ()
    donor: DonorContext | None = None


class Prefilled(Message, frozen=True):
    """``queue_ms``: until the request was admitted. ``compute_ms``: from there to the first token, fetches included."""

    token_id: int
    logprobs: TokenLogprobs | None
    finish: FinishReason | None  #: set if the first token already ends the answer (then there is no handoff)
    reports: tuple[SpanReport, ...]
    cached_tokens: int  #: prompt tokens that were not computed in full
    handoff: Handoff | None
    queue_ms: float
    compute_ms: float
    plan: str = ""  #: in force, if the guard changed what was asked for
    guard: str = "normal"  #: how careful reuse is for such prompts (``reuse.ladder.Level``)


class ReleaseHandoff(Message, frozen=True):
    """Decode has the pages (or the request is over): the prefill worker frees them."""

    ticket: str


class Decode(Message, frozen=True):
    """Continue a prefilled sequence. ``first_token`` is already with the client. Streams ``Tokens``."""

    generation: Generation
    first_token: int
    handoff: Handoff
    source: MediaSource
    timeout_s: float


class Tokens(Message, frozen=True):
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason | None
    bytes_moved: int = 0  #: by the handoff; on the first message only
    images_moved: int = 0  #: image objects fetched for the handoff (0: all were here)


REPLIES: dict[type[Message], type[Message]] = {
    Register: Registered,
    Unregister: Ok,
    Heartbeat: HeartbeatAck,
    ListMembers: Members,
    Announce: Ok,
    Retract: Ok,
    Lookup: Found,
    Claim: ClaimReply,
    Unclaim: Ok,
    Await: Awaited,
    ShareBooks: SharedBooks,
    Hello: HelloReply,
    Acquire: Lease,
    Renew: Lease,
    Release: Released,
    Status: StatusReply,
    Forget: Ok,
    Drain: Ok,
    GetMedia: MediaReply,
    Encode: Encoded,
    Prefill: Prefilled,
    ReleaseHandoff: Ok,
    Decode: Tokens,
}
