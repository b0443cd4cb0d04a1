"""Prefix caches over the paged pool: blocks of earlier sequences that a new one starts with. Pure, one owner.

Two caches that never mix. *Exact* holds blocks no approximation ever touched; every request may use them.
*Approximate* holds tainted blocks, named by plan and reused variants as well, for ``approx`` requests only, so that
the next turn of a chat over reused images computes its new tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from vlcache_dist.kv.block_chain import BlockChain, Variants
from vlcache_dist.kv.paged_pool import PagedPool
from vlcache_dist.types import ReuseMode

_Source = Callable[[BlockChain, int], int | None]


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The sequence's first blocks, referenced for the caller, and the tokens they cover. ``tainted_from``: position
    of the first approximated block among them, None if all are exact."""

    blocks: tuple[int, ...]
    num_tokens: int
    tainted_from: int | None


@dataclass(frozen=True, slots=True)
class PrefixStats:
    exact_blocks: int
    approx_blocks: int
    queried_tokens: int
    exact_hit_tokens: int
    approx_hit_tokens: int


class _Blocks:
    """One cache's blocks by what precedes them and what they hold; several where only reused variants differ.

    Keys hold the contents themselves, not only digests, so a hit is compared token by token.
    """

    def __init__(self, pool: PagedPool) -> None:
        self._pool = pool
        self._blocks: dict[tuple[bytes, bytes], dict[Variants, int]] = {}  # most recently inserted last
        self._names: dict[int, tuple[bytes, bytes, Variants]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def get(self, parent: bytes, contents: bytes) -> dict[Variants, int]:
        return self._blocks.get((parent, contents), {})

    def put(self, parent: bytes, contents: bytes, variants: Variants, block: int) -> None:
        """Offer a block unless one like it is there, or this one is offered already."""
        known = self._blocks.get((parent, contents), {})
        if variants in known or self._pool.is_adopted(block):
            return
        self._pool.adopt(block, self._forget)
        self._blocks.setdefault((parent, contents), known)[variants] = block
        self._names[block] = (parent, contents, variants)

    def _forget(self, block: int) -> None:
        parent, contents, variants = self._names.pop(block)
        known = self._blocks[parent, contents]
        del known[variants]
        if not known:
            del self._blocks[parent, contents]

    def validate(self) -> None:
        assert self._names == {
            block: (parent, contents, variants)
            for (parent, contents), known in self._blocks.items()
            for variants, block in known.items()
        }
        assert all(self._pool.is_adopted(block) for block in self._names)


class PrefixCache:
    """The exact and the approximate cache of one engine."""

    def __init__(self, pool: PagedPool) -> None:
        self._pool = pool
        self._exact = _Blocks(pool)
        self._approx = _Blocks(pool)
        self._queried = self._exact_hits = self._approx_hits = 0

    def match(self, chain: BlockChain, reuse: ReuseMode, *, divisible: Collection[int] = ()) -> PrefixMatch:
        """The longest cached prefix of a prompt. The caller frees the blocks at the pool.

        At least the last token is left to compute, and no match ends inside a span: pages hold rotated K, from which
        the span cannot be recorded. ``divisible`` names spans (by ``MediaSpan.index``) that need not be recorded; an
        ``exact`` match may end inside those. With ``ReuseMode.OFF`` nothing matches. Approximate blocks match whatever
        variants they were made from, unless the chain requests others; its ``variants`` say which they were.
        """
        if reuse is ReuseMode.OFF:
            return PrefixMatch((), 0, None)
        limit = max(chain.num_tokens - 1, 0) // chain.block_size
        requested = chain.requested
        blocks, tainted_from = self._walk(chain, limit, (self._try_exact,))
        if reuse is ReuseMode.APPROX and len(blocks) < limit and len(self._approx):
            best = blocks, tainted_from, chain.variants
            # A stretch may be in both caches, and only one of them lead on to what follows it.
            for sources in ((self._try_exact, self._try_approx), (self._try_approx, self._try_exact)):
                chain.resolve(0, requested)
                blocks, tainted_from = self._walk(chain, limit, sources)
                if len(blocks) > len(best[0]):
                    best = blocks, tainted_from, chain.variants
                if len(blocks) == limit:
                    break
            blocks, tainted_from, matched = best
            chain.resolve(0, matched)
        num_tokens = chain.cut(len(blocks) * chain.block_size, divisible if reuse is ReuseMode.EXACT else ())
        del blocks[num_tokens // chain.block_size :]
        covered = sum(span.start < num_tokens for span in chain.spans)
        chain.resolve(covered, requested[covered:])
        if tainted_from is not None and tainted_from >= num_tokens:
            tainted_from = None
        self._pool.share(blocks)
        exact = num_tokens if tainted_from is None else tainted_from
        self._queried += chain.num_tokens
        self._exact_hits += exact
        self._approx_hits += num_tokens - exact
        return PrefixMatch(tuple(blocks), num_tokens, tainted_from)

    def insert(
        self, chain: BlockChain, blocks: Sequence[int], *, start: int, stop: int, tainted_from: int | None
    ) -> None:
        """Offer the full blocks of positions [start, stop), whose KV is written in all layers.

        ``blocks`` is the sequence's block table, referenced by the caller. ``tainted_from`` is the first position
        whose KV approximation touched, by a match or by a span reused with less than a full plan (None: nowhere);
        blocks that reach it go to the approximate cache. Contents already cached keep their block.
        """
        size = chain.block_size
        for index in range(start // size, stop // size):
            contents = chain.contents(index)
            if tainted_from is None or (index + 1) * size <= tainted_from:
                self._exact.put(chain.exact_parent(index), contents, (), blocks[index])
            else:
                overlaps = chain.overlaps(index)
                variants = chain.variants[overlaps.start : overlaps.stop]
                self._approx.put(chain.approx_parent(index), contents, variants, blocks[index])

    def stats(self) -> PrefixStats:
        return PrefixStats(len(self._exact), len(self._approx), self._queried, self._exact_hits, self._approx_hits)

    def validate(self) -> None:
        """Raise AssertionError unless pool and caches agree about every adopted block."""
        self._pool.validate()
        self._exact.validate()
        self._approx.validate()

    def _walk(self, chain: BlockChain, limit: int, sources: Sequence[_Source]) -> tuple[list[int], int | None]:
        """Blocks from the start on, each from the first source that has it, and where the first approximate one
        begins."""
        blocks: list[int] = []
        tainted_from: int | None = None
        for index in range(limit):
            for source in sources:
                if (block := source(chain, index)) is not None:
                    break
            else:
                break
            if source == self._try_approx and tainted_from is None:
                tainted_from = index * chain.block_size
            blocks.append(block)
        return blocks, tainted_from

    def _try_exact(self, chain: BlockChain, index: int) -> int | None:
        block = self._exact.get(chain.exact_parent(index), chain.contents(index)).get(())
        if block is not None:
            for place in chain.overlaps(index):
                if chain.spans[place].start >= index * chain.block_size:
                    chain.resolve(place, (None,))
        return block

    def _try_approx(self, chain: BlockChain, index: int) -> int | None:
        overlaps = chain.overlaps(index)
        wanted = chain.variants[overlaps.start : overlaps.stop]
        known = self._approx.get(chain.approx_parent(index), chain.contents(index))
        for variants in reversed(known):
            if all(want is None or want == have for want, have in zip(wanted, variants, strict=True)):
                chain.resolve(overlaps.start, variants)
                return known[variants]
        return None
