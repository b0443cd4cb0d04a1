"""The hash chain over a sequence's full blocks: a block's name covers its tokens, what its vision tokens show, and
everything before it. Pure.

Two chains run beside each other. *Exact*: seeded with the tenant; vision tokens count as (content key, offset in the
span). *Approximate*: seeded with tenant and plan; vision tokens also count with the variant of the object that was
reused for them (None: computed). Blocks are hashed when first asked for, so a miss at the first block costs one hash.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from vlcache_dist.hashing import frame
from vlcache_dist.types import MediaSpan, Variant

_PIECE = struct.Struct(">32sQIId")  # content key, offset in span, first row in block, rows, seconds per grid
_NO_VARIANT = b"\0" * 17


@dataclass(frozen=True, slots=True)
class BlockName:
    """``digest`` (32 bytes) covers ``parent`` and ``contents``; a cache compares all three on a hit."""

    digest: bytes
    parent: bytes
    contents: bytes


class BlockChain:
    """One sequence's tokens, growing, and the names of its full blocks.

    ``variants``: per span, in the order given, the 16-byte variant that is, or would be, reused (None: computed); may be corrected by
    ``set_variant`` until blocks are inserted. ``tenant``'s sequences share blocks with no other tenant's.
    """

    def __init__(
        self,
        tokens: Sequence[int] | np.ndarray,
        spans: Sequence[MediaSpan],
        *,
        block_size: int,
        tenant: str,
        plan: str = "",
        variants: Sequence[Variant | None] = (),
    ) -> None:
        self.block_size = block_size
        self.spans = tuple(sorted(spans, key=lambda span: span.start))
        self._order = {span.index: place for place, span in enumerate(self.spans)}
        if len(self._order) != len(self.spans):
            raise ValueError("two spans have the same index")
        for span in spans:
            if len(span.key) != 32:
                raise ValueError(f"span {span.index} has a content key of {len(span.key)} bytes, not 32")
        given = dict(zip((span.index for span in spans), variants, strict=bool(variants)))
        self._variants = [given.get(span.index) for span in self.spans]
        self._tokens = bytearray(np.asarray(tokens, np.int32).tobytes())
        seed = [("tenant", tenant.encode())]
        self._exact_seed = blake3(frame([*seed, ("chain", b"exact")])).digest()
        self._approx_seed = blake3(frame([*seed, ("chain", b"approx"), ("plan", plan.encode())])).digest()
        self._exact: list[BlockName] = []
        self._approx: list[BlockName] = []

    @property
    def num_tokens(self) -> int:
        return len(self._tokens) // 4

    @property
    def num_full_blocks(self) -> int:
        return self.num_tokens // self.block_size

    def extend(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append text tokens (an answer grows); spans never come after the prompt."""
        self._tokens += np.asarray(tokens, np.int32).tobytes()

    def set_variant(self, span_index: int, variant: Variant | None) -> None:
        """Say what a span (by its ``MediaSpan.index``) really reuses; approximate names from there on change."""
        place = self._order[span_index]
        if self._variants[place] != variant:
            self._variants[place] = variant
            del self._approx[self.spans[place].start // self.block_size :]

    def exact(self, block: int) -> BlockName:
        """Name of a full block in the exact chain. Raises IndexError beyond the last full block."""
        return self._name(self._exact, self._exact_seed, block, with_variants=False)

    def approx(self, block: int) -> BlockName:
        """Name of a full block in the approximate chain. Raises IndexError beyond the last full block."""
        return self._name(self._approx, self._approx_seed, block, with_variants=True)

    def cut(self, num_tokens: int) -> int:
        """``num_tokens``, or the last block boundary below it that does not lie inside a span."""
        for span in reversed(self.spans):
            if span.start < num_tokens < span.end:
                num_tokens = span.start // self.block_size * self.block_size
        return num_tokens

    def _name(self, names: list[BlockName], seed: bytes, block: int, *, with_variants: bool) -> BlockName:
        if not 0 <= block < self.num_full_blocks:
            raise IndexError(f"block {block} of {self.num_full_blocks} full ones")
        while len(names) <= block:
            parent = names[-1].digest if names else seed
            contents = self._contents(len(names), with_variants)
            names.append(BlockName(blake3(parent + contents).digest(), parent, contents))
        return names[block]

    def _contents(self, block: int, with_variants: bool) -> bytes:
        """Tokens (fixed length), then one fixed-length record per span that overlaps the block."""
        start, stop = block * self.block_size, (block + 1) * self.block_size
        parts = [bytes(self._tokens[4 * start : 4 * stop])]
        for span, variant in zip(self.spans, self._variants, strict=True):
            a, b = max(span.start, start), min(span.end, stop)
            if a < b:
                parts.append(_PIECE.pack(span.key, a - span.start, a - start, b - a, span.second_per_grid))
                if with_variants:
                    parts.append(_NO_VARIANT if variant is None else b"\1" + variant)
        return b"".join(parts)
