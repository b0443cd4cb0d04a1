"""Prefix caches over the paged pool: blocks of earlier sequences that a new one starts with. Pure, one owner.

Two caches that never mix. *Exact* holds blocks no approximation ever touched; every request may use them.
*Approximate* holds tainted blocks, named by plan and reused variants as well, for ``approx`` requests only, so that
the next turn of a chat over reused images computes its new tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlcache_dist.kv.block_chain import BlockChain, BlockName
from vlcache_dist.kv.paged_pool import PagedPool
from vlcache_dist.types import ReuseMode


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


class _Cache:
    """Blocks by name, and back."""

    def __init__(self, pool: PagedPool) -> None:
        self._pool = pool
        self._blocks: dict[bytes, tuple[int, BlockName]] = {}
        self._names: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, name: BlockName) -> int | None:
        """The block that holds exactly these contents after exactly this parent; the digest alone is not trusted."""
        found = self._blocks.get(name.digest)
        return found[0] if found is not None and found[1] == name else None

    def put(self, name: BlockName, block: int) -> None:
        if name.digest not in self._blocks and not self._pool.is_adopted(block):
            self._pool.adopt(block, self._forget)
            self._blocks[name.digest] = (block, name)
            self._names[block] = name.digest

    def _forget(self, block: int) -> None:
        del self._blocks[self._names.pop(block)]

    def validate(self) -> None:
        assert {block: digest for digest, (block, _) in self._blocks.items()} == self._names
        assert all(self._pool.is_adopted(block) for block in self._names)


class PrefixCache:
    """The exact and the approximate cache of one engine."""

    def __init__(self, pool: PagedPool) -> None:
        self._pool = pool
        self._exact = _Cache(pool)
        self._approx = _Cache(pool)
        self._queried = self._exact_hits = self._approx_hits = 0

    def match(self, chain: BlockChain, reuse: ReuseMode) -> PrefixMatch:
        """The longest cached prefix of a prompt, exact blocks first. The caller frees the blocks at the pool.

        At least the last token is left to compute, and no match ends inside a span: pages hold rotated K, of which
        a span cannot be recorded. With ``ReuseMode.OFF`` nothing matches.
        """
        if reuse is ReuseMode.OFF:
            return PrefixMatch((), 0, None)
        self._queried += chain.num_tokens
        blocks: list[int] = []
        tainted_from: int | None = None
        for index in range(max(chain.num_tokens - 1, 0) // chain.block_size):
            block = self._exact.get(chain.exact(index))
            if block is None and reuse is ReuseMode.APPROX:
                block = self._approx.get(chain.approx(index))
                if block is not None and tainted_from is None:
                    tainted_from = index * chain.block_size
            if block is None:
                break
            blocks.append(block)
        num_tokens = chain.cut(len(blocks) * chain.block_size)
        del blocks[num_tokens // chain.block_size :]
        if tainted_from is not None and tainted_from >= num_tokens:
            tainted_from = None
        self._pool.share(blocks)
        exact = num_tokens if tainted_from is None else tainted_from
        self._exact_hits += exact
        self._approx_hits += num_tokens - exact
        return PrefixMatch(tuple(blocks), num_tokens, tainted_from)

    def insert(
        self,
        chain: BlockChain,
        blocks: list[int] | tuple[int, ...],
        *,
        start: int,
        stop: int,
        tainted_from: int | None,
    ) -> None:
        """Offer the full blocks of positions [start, stop), whose KV is written in all layers.

        ``blocks`` is the sequence's block table, referenced by the caller. ``tainted_from`` is the first position
        whose KV approximation touched, by a match or by a span reused with less than a full plan (None: nowhere);
        blocks that reach it go to the approximate cache. Contents already cached keep their block.
        """
        size = chain.block_size
        for index in range(start // size, stop // size):
            if tainted_from is None or (index + 1) * size <= tainted_from:
                self._exact.put(chain.exact(index), blocks[index])
            else:
                self._approx.put(chain.approx(index), blocks[index])

    def stats(self) -> PrefixStats:
        return PrefixStats(len(self._exact), len(self._approx), self._queried, self._exact_hits, self._approx_hits)

    def validate(self) -> None:
        """Raise AssertionError unless pool and caches agree about every adopted block."""
        self._pool.validate()
        self._exact.validate()
        self._approx.validate()
