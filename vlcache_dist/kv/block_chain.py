"""The hash chain over a sequence's full blocks: what a block holds, and everything before it. Pure.

Two chains run beside each other. *Exact*: seeded with the tenant; vision tokens count as (content key, offset in the
span). *Approximate*: seeded with tenant and plan; spans also count with the variant of the object that was reused for
them, or as computed. Blocks are hashed when first asked for, so a miss at the first block costs nothing more.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence

import numpy as np
from blake3 import blake3

from vlcache_dist.hashing import frame
from vlcache_dist.types import MediaSpan, Variant

KEY_BYTES = 32
VARIANT_BYTES = 16
_PIECE = struct.Struct(">32sQIId")  # content key, offset in span, first row in block, rows, seconds per grid
_COMPUTED = b"\0" * (1 + VARIANT_BYTES)

Variants = tuple[Variant | None, ...]


class BlockChain:
    """One sequence's tokens, growing, and what its full blocks are called.

    ``requested``, one per span in order of position: the 16-byte variant that the caller reuses for it; None means
    computed or, before ``PrefixCache.match``, any. ``variants``: the same, but as matched where a match covers the
    span. Sequences of two tenants never share a block. Raises ValueError for keys and variants of another size.
    """

    def __init__(
        self,
        tokens: Sequence[int] | np.ndarray,
        spans: Sequence[MediaSpan],
        *,
        block_size: int,
        tenant: str,
        plan: str = "",
    ) -> None:
        self.block_size = block_size
        self.spans = tuple(sorted(spans, key=lambda span: span.start))
        self._order = {span.index: place for place, span in enumerate(self.spans)}
        if len(self._order) != len(self.spans):
            raise ValueError("two spans have the same index")
        for span in self.spans:
            if len(span.key) != KEY_BYTES:
                raise ValueError(f"span {span.index} has a content key of {len(span.key)} bytes, not {KEY_BYTES}")
        self._requested: list[Variant | None] = [None] * len(self.spans)
        self._variants = self._requested.copy()
        self._tokens = bytearray(np.asarray(tokens, np.int32).tobytes())
        self._first_span = 0  # of the block after the last one in ``_contents``
        self._contents: list[bytes] = []
        self._overlaps: list[range] = []  # places of the spans in each block
        seed = [("tenant", tenant.encode())]
        self._exact = [blake3(frame([*seed, ("chain", b"exact")])).digest()]
        self._approx = [blake3(frame([*seed, ("chain", b"approx"), ("plan", plan.encode())])).digest()]

    @property
    def num_tokens(self) -> int:
        return len(self._tokens) // 4

    @property
    def num_full_blocks(self) -> int:
        return self.num_tokens // self.block_size

    @property
    def requested(self) -> Variants:
        return tuple(self._requested)

    @property
    def variants(self) -> Variants:
        return tuple(self._variants)

    def extend(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append text tokens (an answer grows); spans never come after the prompt."""
        self._tokens += np.asarray(tokens, np.int32).tobytes()

    def set_variant(self, span_index: int, variant: Variant | None) -> None:
        """Say what a span (by its ``MediaSpan.index``) really reuses, before blocks from there on are inserted."""
        if variant is not None and len(variant) != VARIANT_BYTES:
            raise ValueError(f"a variant of {len(variant)} bytes, not {VARIANT_BYTES}")
        place = self._order[span_index]
        self._requested[place] = variant
        self.resolve(place, (variant,))

    def resolve(self, first: int, variants: Variants) -> None:
        """Name spans by place (the prompt's first one is 0) after the blocks that a match found for them."""
        for place, variant in enumerate(variants, first):
            if self._variants[place] != variant:
                self._variants[place] = variant
                del self._approx[self.spans[place].start // self.block_size + 1 :]

    def contents(self, block: int) -> bytes:
        """What a full block holds: tokens (fixed length), then a fixed-length record per span in it. Raises
        IndexError beyond the last full block."""
        if 0 <= block < len(self._contents):
            return self._contents[block]
        if not 0 <= block < self.num_full_blocks:
            raise IndexError(f"block {block} of {self.num_full_blocks} full ones")
        while len(self._contents) <= block:
            self._append_contents()
        return self._contents[block]

    def overlaps(self, block: int) -> range:
        """Places of the spans that have tokens in a full block."""
        self.contents(block)
        return self._overlaps[block]

    def exact_parent(self, block: int) -> bytes:
        """32-byte digest of everything before a block, in the exact chain."""
        while len(self._exact) <= block:
            contents = self.contents(len(self._exact) - 1)
            self._exact.append(blake3(self._exact[-1] + contents).digest())
        return self._exact[block]

    def approx_parent(self, block: int) -> bytes:
        """32-byte digest of everything before a block, in the approximate chain."""
        while len(self._approx) <= block:
            last = len(self._approx) - 1
            reused = (self._variants[place] for place in self.overlaps(last))
            tail = b"".join(_COMPUTED if variant is None else b"\1" + variant for variant in reused)
            self._approx.append(blake3(self._approx[-1] + self.contents(last) + tail).digest())
        return self._approx[block]

    def cut(self, num_tokens: int, divisible: Collection[int] = ()) -> int:
        """``num_tokens``, or the last block boundary below it that does not lie inside a span, other than the
        ``divisible`` ones (by ``MediaSpan.index``)."""
        for span in reversed(self.spans):
            if span.start < num_tokens < span.end and span.index not in divisible:
                num_tokens = span.start // self.block_size * self.block_size
        return num_tokens

    def _append_contents(self) -> None:
        start = len(self._contents) * self.block_size
        stop = start + self.block_size
        parts = [bytes(self._tokens[4 * start : 4 * stop])]
        first = self._first_span
        while first < len(self.spans) and self.spans[first].end <= start:
            first += 1
        place = first
        while place < len(self.spans) and self.spans[place].start < stop:
            span = self.spans[place]
            a, b = max(span.start, start), min(span.end, stop)
            parts.append(_PIECE.pack(span.key, a - span.start, a - start, b - a, span.second_per_grid))
            place += 1
        self._first_span = first
        self._contents.append(b"".join(parts))
        self._overlaps.append(range(first, place))
