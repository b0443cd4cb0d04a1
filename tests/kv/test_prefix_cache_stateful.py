"""Prompts that run, grow, finish and evict each other at random. The model writes down what each block's KV *is*
(the whole prefix it was computed from); whatever a match returns must be KV that the request may have."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vlcache_dist.kv.block_chain import BlockChain
from vlcache_dist.kv.paged_pool import PagedPool
from vlcache_dist.kv.prefix_cache import PrefixCache
from vlcache_dist.types import MediaSpan, ReuseMode

SIZE = 4
IMAGES = {"A": 3, "B": 6}
VARIANTS = [None, b"v" * 16, b"w" * 16]
segments = st.lists(st.sampled_from(["x", "yz", "xxxx", "A", "B"]), min_size=1, max_size=6)


def prompt(pieces):
    tokens, spans = [], []
    for piece in pieces:
        if piece in IMAGES:
            length = IMAGES[piece]
            spans.append(MediaSpan(piece.encode() * 32, len(tokens), length, (1, 2, 2 * length), index=len(spans)))
            tokens += [0] * length
        else:
            tokens += map(ord, piece)
    return tokens, spans


@dataclass
class Running:
    tokens: list[int]
    spans: list[MediaSpan]
    tenant: str
    plan: str
    chain: BlockChain
    blocks: list[int]
    matched: int
    tainted_from: int | None

    def prefix(self, index):
        """What stands before the end of a block, as the exact KV's only ingredients."""
        end = (index + 1) * SIZE
        seen = tuple((span.key, span.start) for span in self.spans if span.start < end)
        return (self.tenant, tuple(self.tokens[:end]), seen)

    def exact(self, index):
        return ("exact", self.prefix(index))

    def approx(self, index):
        end = (index + 1) * SIZE
        used = tuple(v for span, v in zip(self.spans, self.chain.variants, strict=True) if span.start < end)
        return ("approx", self.plan, self.prefix(index), used)

    def computes(self, index):
        is_exact = self.tainted_from is None or (index + 1) * SIZE <= self.tainted_from
        return self.exact(index) if is_exact else self.approx(index)


class PrefixMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(6, 24))
    def start(self, num_blocks):
        self.pool = PagedPool(num_blocks)
        self.cache = PrefixCache(self.pool)
        self.running: list[Running] = []
        self.kv: dict[int, object] = {}  # what a block holds
        self.num_blocks = num_blocks

    def offered(self):
        return {self.kv[block] for block in self.kv if self.pool.is_adopted(block)}

    def allocate(self, count):
        blocks = self.pool.allocate(count)
        if blocks is not None:
            in_use = {block for other in self.running for block in other.blocks}
            assert not set(blocks) & in_use and len(set(blocks)) == count
            for block in blocks:
                self.kv[block] = "blank"
        return blocks

    def compute(self, seq, first):
        """Write and offer the full blocks from ``first`` on."""
        full = len(seq.tokens) // SIZE
        for index in range(first, full):
            self.kv[seq.blocks[index]] = seq.computes(index)
        self.cache.insert(
            seq.chain, seq.blocks, start=first * SIZE, stop=len(seq.tokens), tainted_from=seq.tainted_from
        )

    @rule(
        pieces=segments,
        tenant=st.sampled_from(["t", "u"]),
        plan=st.sampled_from(["none", "uniform:5"]),
        reuse=st.sampled_from(ReuseMode),
        variants=st.lists(st.sampled_from(VARIANTS), min_size=6, max_size=6),
        requested=st.lists(st.sampled_from(VARIANTS), max_size=6),
        again=st.integers(0, 3),
        data=st.data(),
    )
    def request(self, pieces, tenant, plan, reuse, variants, requested, again, data):
        tokens, spans = prompt(pieces)
        if again and self.running:  # the next turn of a prompt that runs
            known = data.draw(st.sampled_from(self.running))
            tokens, spans, tenant, plan = [*known.tokens, 9], known.spans, known.tenant, known.plan
        chain = BlockChain(tokens, spans, block_size=SIZE, tenant=tenant, plan=plan)
        seq = Running(tokens, spans, tenant, plan, chain, [], 0, None)
        for span, variant in zip(spans, requested, strict=False):
            chain.set_variant(span.index, variant)
        offered = self.offered()
        if again == 3:  # a match given up for want of blocks leaves no trace
            self.pool.free(self.cache.match(chain, reuse).blocks)
        match = self.cache.match(chain, reuse)
        for span, have, want in zip(spans, chain.variants, chain.requested, strict=True):
            assert have == want if span.start >= match.num_tokens else want is None or have in (want, None)
        seq.blocks, seq.matched = list(match.blocks), match.num_tokens

        assert match.num_tokens == len(match.blocks) * SIZE < max(len(tokens), 1)
        assert not any(span.start < match.num_tokens < span.end for span in spans)
        for index, block in enumerate(match.blocks):
            tainted = match.tainted_from is not None and index * SIZE >= match.tainted_from
            allowed = {seq.exact(index)} | ({seq.approx(index)} if tainted else set())
            assert self.kv[block] in allowed
        if match.tainted_from is not None:
            assert self.kv[match.blocks[match.tainted_from // SIZE]] == seq.approx(match.tainted_from // SIZE)
            assert reuse is ReuseMode.APPROX
        expected = 0
        while (expected + 1) * SIZE < len(tokens) and seq.exact(expected) in offered:
            expected += 1
        while any(span.start < expected * SIZE < span.end for span in spans):
            expected -= 1
        if reuse is ReuseMode.APPROX:
            assert len(match.blocks) >= expected
        else:
            assert len(match.blocks) == (expected if reuse is ReuseMode.EXACT else 0)

        seq.tainted_from = match.tainted_from
        new = self.allocate(-(-len(tokens) // SIZE) - len(seq.blocks))
        if new is None:
            self.pool.free(seq.blocks)
            return
        seq.blocks += new
        for span, variant in zip(spans, variants, strict=False):
            if span.start >= seq.matched:
                reused = variant if reuse is ReuseMode.APPROX else None
                chain.set_variant(span.index, reused)
                if reused is not None and seq.tainted_from is None:
                    seq.tainted_from = span.start
        self.running.append(seq)
        self.compute(seq, seq.matched // SIZE)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 6))
    def grow(self, data, count):
        seq = data.draw(st.sampled_from(self.running))
        new = self.allocate(-(-(len(seq.tokens) + count) // SIZE) - len(seq.blocks))
        if new is None:
            return
        first = len(seq.tokens) // SIZE
        answer = [100 + len(seq.tokens) + i for i in range(count)]
        seq.blocks += new
        seq.tokens = seq.tokens + answer
        seq.chain.extend(answer)
        self.compute(seq, first)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        seq = data.draw(st.sampled_from(self.running))
        self.running.remove(seq)
        self.pool.free(seq.blocks)

    @rule()
    def drop_contents(self):
        self.pool.drop_contents()
        assert not self.offered()

    @invariant()
    def agrees(self):
        if not hasattr(self, "pool"):
            return
        self.cache.validate()
        uses = [block for seq in self.running for block in seq.blocks]
        for block in range(self.num_blocks):
            assert self.pool.references(block) == uses.count(block)
        for seq in self.running:
            for index in range(len(seq.tokens) // SIZE):
                held = self.kv[seq.blocks[index]]
                assert held in (seq.exact(index), seq.approx(index)), "a block in use was overwritten"
                if index * SIZE >= seq.matched:
                    assert held == seq.computes(index)

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        for seq in self.running:
            self.pool.free(seq.blocks)
        self.cache.validate()
        assert self.pool.num_free == self.num_blocks


TestPrefix = PrefixMachine.TestCase
TestPrefix.settings = settings(max_examples=300, stateful_step_count=30, deadline=None, derandomize=True)
