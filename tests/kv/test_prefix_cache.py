"""Who may hit which blocks: tenants, plans, variants, taint, spans; and blocks while and after they are used."""

import numpy as np
import pytest

from vlcache_dist.kv.block_chain import BlockChain
from vlcache_dist.kv.paged_pool import PagedPool
from vlcache_dist.kv.prefix_cache import PrefixCache
from vlcache_dist.types import MediaSpan, ReuseMode

EXACT, APPROX, OFF = ReuseMode.EXACT, ReuseMode.APPROX, ReuseMode.OFF
V, W = b"v" * 16, b"w" * 16
SIZE = 4


def image(letter, start, length, index=0, second_per_grid=0.0):
    return MediaSpan(
        letter.encode() * 32, start, length, (1, 2, 2 * length), index=index, second_per_grid=second_per_grid
    )


class Bench:
    """A pool with caches, and prompts that ran on it: ``run`` computes what is not matched, and finishes."""

    def __init__(self, num_blocks=64):
        self.pool = PagedPool(num_blocks)
        self.cache = PrefixCache(self.pool)

    def chain(self, tokens, spans=(), tenant="t", plan="uniform:5"):
        return BlockChain(tokens, spans, block_size=SIZE, tenant=tenant, plan=plan)

    def run(self, chain, reuse=APPROX, variants=None, tainted_from=None):
        """``variants`` by span index, for those that the match leaves."""
        match = self.cache.match(chain, reuse)
        for index, variant in (variants or {}).items():
            chain.set_variant(index, variant)
        if match.tainted_from is not None:
            tainted_from = match.tainted_from
        new = self.pool.allocate(-(-chain.num_tokens // SIZE) - len(match.blocks))
        blocks = [*match.blocks, *new]
        self.cache.insert(chain, blocks, start=match.num_tokens, stop=chain.num_tokens, tainted_from=tainted_from)
        self.pool.free(blocks)
        self.cache.validate()
        return match, blocks

    def hit(self, chain, reuse=APPROX):
        match = self.cache.match(chain, reuse)
        self.pool.free(match.blocks)
        self.cache.validate()
        assert len(match.blocks) * SIZE == match.num_tokens
        return match.num_tokens


def test_text_prefix_is_shared_by_block():
    bench = Bench()
    _, blocks = bench.run(bench.chain(range(10)))
    match = bench.cache.match(bench.chain([*range(9), 99, 98]), EXACT)
    assert match.blocks == tuple(blocks[:2]) and match.num_tokens == 8 and match.tainted_from is None
    bench.pool.free(match.blocks)
    assert bench.hit(bench.chain([*range(7), 99, 98, 97])) == 4
    assert bench.hit(bench.chain([99, *range(1, 9)])) == 0
    assert bench.hit(bench.chain(range(10)), OFF) == 0


def test_the_last_token_is_always_computed():
    bench = Bench()
    bench.run(bench.chain(range(8)))
    assert bench.hit(bench.chain(range(8))) == 4
    assert bench.hit(bench.chain(range(9))) == 8
    assert bench.hit(bench.chain(range(4))) == 0
    assert bench.hit(bench.chain([])) == 0


def test_tenants_never_share():
    bench = Bench()
    bench.run(bench.chain(range(10), tenant="a"))
    bench.run(bench.chain(range(10), tenant="a"), variants={}, tainted_from=0)
    assert bench.hit(bench.chain(range(10), tenant="b")) == 0
    assert bench.hit(bench.chain(range(10), tenant="")) == 0


def test_same_pad_tokens_of_another_picture_are_another_prefix():
    bench = Bench()
    tokens = [1, 2, *[7] * 8, 3, 4, 5, 6]
    bench.run(bench.chain(tokens, [image("a", 2, 8)]))
    assert bench.hit(bench.chain(tokens, [image("a", 2, 8)])) == 12
    for other in (
        [image("b", 2, 8)],
        [],
        [image("a", 2, 4), image("a", 6, 4, index=1)],
        [image("a", 2, 8, second_per_grid=0.5)],
        [image("a", 1, 8)],
    ):
        assert bench.hit(bench.chain(tokens, other)) == 0


def test_a_hit_that_ends_inside_a_span_is_cut_back():
    bench = Bench()
    tokens = [1, 2, 3, 4, 5, *[7] * 9, 8, 9]
    spans = [image("a", 5, 9)]
    bench.run(bench.chain(tokens[:13], spans))  # an aborted prefill: blocks 0-2 are complete, the span is not
    assert bench.hit(bench.chain(tokens, spans)) == 4
    bench.run(bench.chain([*tokens, 1], spans))
    assert bench.hit(bench.chain([*tokens, 1], spans)) == 16
    # Cutting back to one span's start may land in the one before it.
    tokens = [1, 2, *[7] * 4, 3, *[7] * 12]
    spans = [image("b", 2, 4), image("c", 7, 12, index=1)]
    bench.run(bench.chain(tokens, spans))
    assert bench.hit(bench.chain(tokens, spans)) == 0
    # Ending with a span's last token is no cut.
    tokens = [1, 2, *[7] * 6, 3]
    spans = [image("d", 2, 6)]
    bench.run(bench.chain(tokens, spans))
    assert bench.hit(bench.chain(tokens, spans)) == 8


def chat(turns=1, answer=(50, 51, 52, 53, 54)):
    """(tokens, spans): 5 tokens of text, 8 of image A, 4 of text; every further turn adds an answer and a question."""
    tokens = [1, 2, 3, 4, 5, *[7] * 8, 11, 12, 13, 14]
    for turn in range(1, turns):
        tokens += [*answer, 60 + turn, 61 + turn, 62 + turn]
    return tokens, [image("a", 5, 8)]


def test_tainted_blocks_are_hit_by_approx_requests_of_the_same_plan_only():
    bench = Bench()
    tokens, spans = chat()
    match, _ = bench.run(bench.chain(tokens, spans), variants={0: V}, tainted_from=5)
    assert match.num_tokens == 0
    longer = [*tokens, 21, 22, 23]
    assert bench.hit(bench.chain(longer, spans), EXACT) == 4, "only what stands before the span is exact"
    chain = bench.chain(longer, spans)
    match = bench.cache.match(chain, APPROX)
    assert match.num_tokens == 16 and match.tainted_from == 4
    assert chain.variants == (V,), "the match says what it was made from"
    bench.pool.free(match.blocks)
    assert bench.hit(bench.chain(longer, spans, plan="uniform:6")) == 4
    assert bench.hit(bench.chain(longer, spans, tenant="other")) == 0
    chain = bench.chain(longer, spans)
    chain.set_variant(0, W)
    assert bench.hit(chain) == 4, "a reader that wants another variant does not get this one"
    assert chain.variants == (W,)


def test_every_turn_of_a_chat_computes_its_new_tokens_only():
    bench = Bench()
    for turns in (1, 2, 3, 4):
        tokens, spans = chat(turns)
        chain = bench.chain(tokens, spans)
        match, _ = bench.run(chain, variants={0: V} if turns == 1 else {}, tainted_from=5)
        known = len(chat(turns - 1)[0]) // SIZE * SIZE if turns > 1 else 0
        assert match.num_tokens == known
        assert match.tainted_from == (4 if turns > 1 else None)
    assert bench.hit(bench.chain(*chat(4)), EXACT) == 4


def test_taint_after_an_exact_image():
    """The first image was computed, a later one reused: the chain goes on through both caches."""
    bench = Bench()
    tokens = [1, 2, *[7] * 5, 3, 4, 5, *[7] * 6, 6, 8, 9, 10, 11, 12]
    spans = [image("a", 2, 5), image("b", 10, 6, index=1)]
    bench.run(bench.chain(tokens, spans), variants={1: V}, tainted_from=10)
    chain = bench.chain([*tokens, 1, 2], spans)
    match, _ = bench.run(chain)
    assert match.num_tokens == 20 and match.tainted_from == 8 and chain.variants == (None, V)
    assert bench.hit(bench.chain(tokens, spans), EXACT) == 8


def test_an_exact_image_counts_as_computed_even_if_its_reuse_was_prepared():
    bench = Bench()
    tokens = [1, 2, *[7] * 6, 3, 4, *[7] * 6, 6, 8, 9, 10]
    spans = [image("a", 2, 6), image("b", 10, 6, index=1)]
    bench.run(bench.chain(tokens, spans), variants={1: V}, tainted_from=10)
    chain = bench.chain([*tokens, 1, 2], spans)
    chain.set_variant(0, W)
    assert bench.hit(chain) == 20 and chain.variants == (None, V) and chain.requested == (W, None)
    bench.pool.drop_contents()
    assert bench.hit(chain) == 0 and chain.variants == (W, None), "a later match starts from what is requested"


def test_both_images_in_one_block():
    bench = Bench()
    tokens = [1, 7, 7, 2, 7, 7, 3, 4, 5, 6, 8, 9]
    spans = [image("a", 1, 2), image("b", 4, 2, index=1)]
    bench.run(bench.chain(tokens, spans), variants={1: V}, tainted_from=2)
    chain = bench.chain(tokens, spans)
    assert bench.hit(chain) == 8 and chain.variants == (None, V)
    assert bench.hit(bench.chain(tokens, spans), EXACT) == 0


def test_exact_blocks_inserted_later_do_not_hide_what_follows_tainted_ones():
    bench = Bench()
    tokens, spans = chat(2)
    bench.run(bench.chain(tokens, spans), variants={0: V}, tainted_from=5)
    bench.run(bench.chain(chat(1)[0], spans), EXACT)
    chain = bench.chain([*tokens, 1], spans)
    assert bench.hit(chain) == 24 and chain.variants == (V,)
    # Where the exact blocks reach as far, they are preferred.
    bench.run(bench.chain(tokens, spans), EXACT)
    match = bench.cache.match(chain := bench.chain([*tokens, 1], spans), APPROX)
    assert match.num_tokens == 24 and match.tainted_from is None and chain.variants == (None,)
    bench.pool.free(match.blocks)


def test_every_attempt_starts_from_what_is_requested():
    bench = Bench()
    tokens, spans = chat(2)
    bench.run(bench.chain(tokens, spans), variants={0: V}, tainted_from=5)
    chain = bench.chain([*tokens, 1], spans)
    assert bench.hit(chain) == 24 and chain.variants == (V,)
    bench.pool.drop_contents()
    bench.run(bench.chain(tokens, spans), variants={0: W}, tainted_from=5)
    assert bench.hit(chain) == 24 and chain.variants == (W,), "the first match binds nobody"
    # The exact blocks are tried first, and the request for V holds when the tainted ones are tried after them.
    bench.run(bench.chain(chat(1)[0], spans), EXACT)
    chain = bench.chain([*tokens, 1], spans)
    chain.set_variant(0, V)
    assert bench.hit(chain) == 16 and chain.variants == (None,)


def test_an_attempt_that_leads_no_further_leaves_no_trace():
    bench = Bench()
    tokens, spans = chat(2)
    bench.run(bench.chain(tokens[:12], spans), variants={0: V}, tainted_from=5)
    bench.run(bench.chain(tokens[:16], spans), EXACT)
    chain = bench.chain(tokens, spans)
    match = bench.cache.match(chain, APPROX)
    assert match.num_tokens == 16 and match.tainted_from is None and chain.variants == (None,)
    bench.pool.free(match.blocks)


def test_an_exact_block_may_fill_a_hole_between_tainted_ones():
    bench = Bench(num_blocks=16)
    tokens, spans = chat(2)
    _, tainted = bench.run(bench.chain(tokens, spans), variants={0: V}, tainted_from=5)
    _, exact = bench.run(bench.chain(tokens[:16], spans), EXACT)
    kept = sorted({*tainted[:6], *exact} - {tainted[2]})
    bench.pool.share(kept)
    bench.pool.allocate(bench.pool.num_free)
    chain = bench.chain([*tokens, 1], spans)
    match = bench.cache.match(chain, APPROX)
    assert match.blocks == (*tainted[:2], exact[2], *tainted[3:6]) and match.tainted_from == 4
    assert chain.variants == (V,)


def test_two_variants_of_one_prompt_are_two_chains():
    bench = Bench()
    tokens, spans = chat()
    _, first = bench.run(bench.chain(tokens, spans), variants={0: V}, tainted_from=5)
    chain = bench.chain(tokens, spans)
    chain.set_variant(0, W)
    _, second = bench.run(chain, tainted_from=5)
    for variant, blocks in ((V, first), (W, second), (None, second)):
        chain = bench.chain([*tokens, 1], spans)
        chain.set_variant(0, variant)
        match = bench.cache.match(chain, APPROX)
        assert match.blocks[1:] == tuple(blocks[1:4])
        assert chain.variants == (variant or W,)
        bench.pool.free(match.blocks)


def test_variants_of_spans_that_are_not_matched_stay_as_given():
    bench = Bench()
    tokens = [1, 2, 3, 4, 5, *[7] * 9, 8, 9]
    spans = [image("a", 5, 9)]
    chain = bench.chain(tokens[:13], spans)
    chain.set_variant(0, V)
    bench.run(chain, tainted_from=5)
    chain = bench.chain(tokens, spans)
    match = bench.cache.match(chain, APPROX)
    assert match.num_tokens == 4 and match.tainted_from is None and chain.variants == (None,)
    bench.pool.free(match.blocks)


def test_a_free_block_stays_findable_until_it_is_handed_out():
    bench = Bench(num_blocks=4)
    bench.run(bench.chain(range(8)))
    taken = bench.pool.allocate(2)
    assert bench.hit(bench.chain(range(9))) == 8, "blank blocks go first"
    bench.pool.allocate(1)
    assert bench.hit(bench.chain(range(9))) == 4, "the tail is lost before the head"
    bench.pool.allocate(1)
    assert bench.hit(bench.chain(range(9))) == 0
    assert bench.pool.allocate(1) is None
    bench.pool.free(taken)
    assert bench.pool.num_free == 2
    bench.cache.validate()


def test_matched_blocks_are_not_handed_out():
    bench = Bench(num_blocks=4)
    bench.run(bench.chain(range(8)))
    match = bench.cache.match(bench.chain(range(9)), EXACT)
    taken = bench.pool.allocate(2)
    assert not set(taken) & set(match.blocks) and bench.pool.allocate(1) is None
    bench.pool.free(match.blocks)
    assert bench.pool.stats().cached == 2


def test_contents_can_be_dropped():
    bench = Bench()
    bench.run(bench.chain(range(8)))
    match = bench.cache.match(bench.chain(range(9)), EXACT)
    bench.pool.drop_contents()
    assert bench.hit(bench.chain(range(9))) == 0
    bench.pool.free(match.blocks)
    bench.cache.validate()
    assert bench.pool.stats().cached == 0 and bench.pool.num_free == 64


def test_an_answer_grows():
    bench = Bench()
    chain = bench.chain(range(6))
    blocks = bench.pool.allocate(3)
    bench.cache.insert(chain, blocks, start=0, stop=6, tainted_from=None)
    chain.extend([6, 7])
    chain.extend(np.array([8, 9]))
    bench.cache.insert(chain, blocks, start=6, stop=10, tainted_from=None)
    bench.pool.free(blocks)
    assert bench.hit(bench.chain(range(12))) == 8
    stats = bench.cache.stats()
    assert (stats.exact_blocks, stats.approx_blocks, stats.exact_hit_tokens, stats.approx_hit_tokens) == (2, 0, 8, 0)


def test_pool_refuses_misuse():
    pool = PagedPool(2)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.free([block])
    pool.free([block])
    for misuse in (lambda: pool.free([block]), lambda: pool.share([block]), lambda: pool.adopt(block, print)):
        with pytest.raises(ValueError):
            misuse()
    assert pool.allocate(3) is None and pool.num_free == 2 and pool.allocate(0) == []
    with pytest.raises(ValueError):
        pool.allocate(-1)
    with pytest.raises(ValueError):
        PagedPool(0)
    pool.validate()


def test_spans_of_a_block():
    spans = [image("b", 6, 6, index=1), image("a", 1, 3), image("c", 13, 9, index=2)]
    chain = BlockChain(range(24), spans, block_size=4, tenant="")
    assert [chain.overlaps(block) for block in range(6)] == [
        range(0, 1),
        range(1, 2),
        range(1, 2),
        range(2, 3),
        range(2, 3),
        range(2, 3),
    ]


def test_chain_refuses_misuse():
    with pytest.raises(ValueError, match="same index"):
        BlockChain([], [image("a", 0, 1), image("b", 1, 1)], block_size=4, tenant="")
    with pytest.raises(ValueError, match="content key"):
        BlockChain([], [MediaSpan(b"short", 0, 1, (1, 2, 2))], block_size=4, tenant="")
    chain = BlockChain(range(7), [image("a", 0, 1)], block_size=4, tenant="")
    with pytest.raises(ValueError, match="variant"):
        chain.set_variant(0, b"short")
    with pytest.raises(IndexError):
        chain.contents(1)
