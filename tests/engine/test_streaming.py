"""Warm prefill behind KV that is still arriving: what comes out equals what would have come had it been there, and
nothing comes out before the source is admitted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import msgspec
import pytest
import torch
from engine_cases import Result, World
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_dist.engine.api import Compute, Mode, PrefillDone, Reuse, TokenEvent
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.types import KVSource, ObjectKind, ReuseMode
from vlcache_dist.wire import Generation

LAYERS = 4
CALM, JUMPY = "canary:1,2,1<900", "canary:1,2,1<0.000001"
VARIANT = b"holder's".ljust(16, b".")


@dataclass
class Arrival:
    """One span's object on its way in."""

    request_id: str
    index: int
    name: str
    extent: Extent
    groups: tuple[int, ...]
    rows: Extent | None = None  # encoder output, if that arrives too
    landed: int = 0  # groups
    over: bool = False


class Site(World):
    """Pictures in ``remote`` come from a holder, in groups of layers; tests say when. ``arrivals``: their READs."""

    def __init__(self, groups: tuple[int, ...] = (0, 1, 2, 4), rows_arrive: bool = True, **options: object) -> None:
        super().__init__(seed=7, **options)  # type: ignore[arg-type]
        self.rows_arrive = rows_arrive
        self.groups = groups
        self.remote: dict[str, torch.Tensor] = {}
        self.arrivals: list[Arrival] = []
        self.computed: set[tuple[str, int]] = set()  # spans for which no object is to be had
        for name in ("cat", "dog", "owl"):
            self.picture(name)

    def _source(self, request_id: str, index: int) -> Compute | Reuse | None:
        generation = self.generations[request_id]
        span = generation.spans[index]
        name = span.key.rstrip(b"\0").decode()
        if (request_id, index) in self.computed:
            return Compute(self.embedding(span))
        if name not in self.remote or generation.reuse is not ReuseMode.APPROX:
            source = super()._source(request_id, index)
            canary = Plan.parse(generation.plan).canary
            return replace(source, canary=canary) if isinstance(source, Reuse) else source
        elements = self.layout.kv_elements(span.length)
        extent = self.store.begin(ObjectKind.KV, span.key, VARIANT, elements, self.now, transfer=True)
        self.arena.kv_view(extent, span.length).fill_(float("nan"))
        source = replace(self.reuse(span, extent, generation.plan), source=KVSource.REMOTE)
        rows = None
        if self.rows_arrive and source.embedding is not None:
            self.store.unpin(source.embedding)
            self.store.discard(source.embedding)
            rows = self.store.stage(self.layout.embedding_elements(span.length), self.now, transfer=True)
            self.arena.embedding_view(rows, span.length).fill_(float("nan"))
            source = replace(source, embedding=rows, rows_arrive=True)
        self.arrivals.append(Arrival(request_id, index, name, extent, self.groups, rows))
        return replace(source, groups=self.groups, canary=Plan.parse(generation.plan).canary)

    def land(self, arrival: Arrival, *, damaged: bool = False) -> None:
        """The next group of layers."""
        a, b = arrival.groups[arrival.landed], arrival.groups[arrival.landed + 1]
        kv = self.remote[arrival.name]
        self.arena.kv_view(arrival.extent, kv.shape[2])[a:b] = float("nan") if damaged else kv[a:b]
        arrival.landed += 1
        if arrival.landed == 1 and arrival.rows is not None:
            rows = self.embeddings[self.key(arrival.name)]
            self.arena.embedding_view(arrival.rows, len(rows)).copy_(rows)
        self.engine.arrived(arrival.request_id, arrival.index, b)

    def admit(self, arrival: Arrival) -> None:
        arrival.over = True
        kv = self.store.commit(arrival.extent, pin=True)
        rows = None if arrival.rows is None else self.store.commit(arrival.rows, pin=True)
        self.engine.admit(arrival.request_id, arrival.index, kv, rows)

    def revoke(self, arrival: Arrival) -> None:
        """The span is computed instead, as the library does when no other holder is left."""
        arrival.over = True
        self.computed.add((arrival.request_id, arrival.index))
        self.engine.revoke(arrival.request_id, arrival.index)
        self.store.abort(arrival.extent)
        if arrival.rows is not None:
            self.store.abort(arrival.rows)
        result = self.results[arrival.request_id]
        if arrival.request_id in self.engine._sequences:
            result.unresolved = sorted({*result.unresolved, arrival.index})

    def finish(self) -> None:
        """Everything arrives, and is valid."""
        while self.resolve() or self.engine.has_work() or any(not a.over for a in self.arrivals):
            for arrival in [a for a in self.arrivals if not a.over]:
                while arrival.landed < len(arrival.groups) - 1:
                    self.land(arrival)
                self.step()
                self.admit(arrival)
            self.step()


def made_elsewhere(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """KV as another worker recorded it, behind a text of its own."""
    holder = Site()
    for name in names:
        holder.ask([(5, 6, 7), name, (8,)], plan="none")
    return {name: holder.object_of(name).clone() for name in names}


KV = made_elsewhere(("cat", "dog"))
PROMPT = [(1, 2, 3, 4, 5), "cat", (6, 7), "dog", (8, 9, 10)]


def with_objects(**options: object) -> Site:
    """The same objects in the own store: what streaming is compared with."""
    site = Site(**options)
    for name, kv in KV.items():
        elements = site.layout.kv_elements(kv.shape[2])
        extent = site.store.begin(ObjectKind.KV, site.key(name), VARIANT, elements, 0.0)
        site.arena.kv_view(extent, kv.shape[2]).copy_(kv)
        site.store.commit(extent)
    return site


def streaming(**options: object) -> Site:
    site = Site(**options)
    site.remote = dict(KV)
    return site


def same(a: Result, b: Result) -> bool:
    return a.tokens == b.tokens and all(map(torch.equal, a.logprobs, b.logprobs))


def generation(site: Site, plan: str = "uniform:20", **options: object) -> Generation:
    return site.generation(PROMPT, plan=plan, max_tokens=3, request_id="r", **options)  # type: ignore[arg-type]


def begun(site: Site, mode: Mode = Mode.GENERATE, **options: object) -> Result:
    """The request admitted, both its sources under way."""
    result = site.add(generation(site, **options), mode)  # type: ignore[arg-type]
    site.step()
    site.resolve()
    assert len(site.arrivals) == 2
    return result


@pytest.mark.parametrize("plan", ["none", "uniform:20", "pyramid:40-10", f"uniform:20+{CALM}", f"none+{JUMPY}"])
@pytest.mark.parametrize("rows_arrive", [True, False])
@pytest.mark.parametrize("groups", [(0, 4), (0, 2, 4), (0, 1, 2, 3, 4)], ids=str)
def test_bit_for_bit_what_a_local_object_gives(plan: str, groups: tuple[int, ...], rows_arrive: bool) -> None:
    reference, site = with_objects(), streaming(groups=groups, rows_arrive=rows_arrive)
    (expected,) = reference.run(generation(reference, plan), mode=Mode.PREFILL)
    result = begun(site, Mode.PREFILL, plan=plan)
    first, second = site.arrivals
    for _ in pairwise(groups):
        for arrival in (second, first):
            site.land(arrival)
            site.step()
    assert not result.tokens and not site.engine.has_work(), "no token before the sources are admitted"
    site.admit(first)
    assert not site.engine.has_work()
    site.admit(second)
    site.drive()
    assert same(result, expected)
    for mine, theirs in zip(site.kv_of("r"), reference.kv_of("r"), strict=True):
        assert torch.equal(mine, theirs)
    assert site.engine.stats().spans_streamed == 2
    assert result.done is not None and expected.done is not None
    assert result.done.computed_rows == expected.done.computed_rows
    assert [r.source for r in result.done.reports] == [KVSource.REMOTE] * 2
    assert [r.escalated for r in result.done.reports] == [r.escalated for r in expected.done.reports]
    site.engine.release("r")
    site.assert_idle()


def test_layers_are_computed_as_they_arrive() -> None:
    """Each group's pages are written when it has landed, while the next one is still NaN."""
    site = streaming(groups=(0, 1, 2, 3, 4))
    begun(site)
    sequence = site.engine._sequences["r"]
    slots = sequence.slots(5, sequence.num_prompt)
    pages = site.pages.flatten(2, 3)
    site.step()  # what can be prepared is
    for layer in range(LAYERS):
        assert not site.engine.has_work()
        for arrival in site.arrivals:
            site.land(arrival)
        assert site.engine.has_work()
        site.step()
        written = pages[:, :, slots].flatten(1).abs().sum(-1)
        assert (written[: layer + 1] > 0).all() and (written[layer + 1 :] == 0).all()
        assert sequence.num_computed == 0
    site.finish()
    site.assert_idle()


def test_the_first_token_does_not_wait_for_the_second() -> None:
    """A worker that decodes as well tells the token of a streamed pass before it begins the next pass."""
    site = streaming()
    begun(site)
    for arrival in site.arrivals:
        while arrival.landed < len(arrival.groups) - 1:
            site.land(arrival)
    site.step()
    for arrival in site.arrivals:
        site.admit(arrival)
    passes = site.engine.stats().steps
    assert [type(event) for event in site.step()] == [PrefillDone, TokenEvent]
    assert site.engine.stats().steps == passes + 1
    site.drive()
    site.assert_idle()


def test_nothing_is_offered_before_admission() -> None:
    """The same prompt, asked again while the first is under way, starts with no block of it; afterwards with all."""
    site = streaming()
    begun(site)
    for arrival in site.arrivals:
        while arrival.landed < len(arrival.groups) - 1:
            site.land(arrival)
        site.step()
    again = msgspec.structs.replace(generation(site), request_id="again")
    second = site.add(again)
    site.step()
    assert second.admitted is not None and second.admitted.cached_tokens == 0
    site.engine.abort("again")
    site.arrivals = site.arrivals[:2]
    site.finish()
    third = site.ask(PROMPT)
    assert third.admitted is not None and third.admitted.cached_tokens > 20
    site.assert_idle()


def test_other_requests_run_between_groups() -> None:
    site = streaming()
    talk = site.add(site.generation([6], max_tokens=30))
    site.step()
    result = begun(site)
    seen = len(talk.tokens)
    for arrival in site.arrivals:
        site.land(arrival)
    for _ in range(5):  # the second group is late
        site.step()
    assert len(talk.tokens) >= seen + 5 and not result.tokens
    site.finish()
    alone = World(seed=7)
    assert torch.allclose(torch.stack(talk.logprobs), torch.stack(alone.ask([6], max_tokens=30).logprobs), atol=1e-5)
    (expected,) = with_objects().run(generation(site))
    assert torch.equal(result.logprobs[0], expected.logprobs[0])
    assert torch.allclose(torch.stack(result.logprobs), torch.stack(expected.logprobs), atol=1e-5)
    site.assert_idle()


@pytest.mark.parametrize("landed", [0, 1, 2, 3])
@pytest.mark.parametrize("which", [0, 1])
def test_a_withdrawn_source_leaves_nothing_behind(landed: int, which: int) -> None:
    """After any group, with NaN for bytes: the span is computed instead, the other one is reused, all is as if the
    first source had never been given."""
    site = streaming()
    result = begun(site)
    lost, other = site.arrivals[which], site.arrivals[1 - which]
    for _ in range(landed):
        site.land(lost, damaged=True)
        site.land(other)
        site.step()
    site.revoke(lost)
    sequence = site.engine._sequences["r"]
    pages = site.pages.flatten(2, 3)
    assert (pages[:, :, sequence.slots(0, sequence.capacity)] == 0).all(), "wrong bytes are left in the pages"
    site.finish()
    reference = with_objects()
    reference.computed = {("r", which)}
    (expected,) = reference.run(generation(reference))
    assert torch.allclose(torch.stack(result.logprobs), torch.stack(expected.logprobs), atol=1e-5)
    assert result.done is not None and expected.done is not None
    assert [r.reused_tokens for r in result.done.reports] == [r.reused_tokens for r in expected.done.reports]
    assert site.engine.stats().spans_revoked == 1
    site.assert_idle()


def test_an_object_whose_twin_is_admitted_is_read_from_the_twin() -> None:
    """Another fetch of the same variant was faster: the extent that was filled here is freed, and overwritten."""
    site = streaming()
    result = begun(site)
    cat, dog = site.arrivals
    site.land(cat)
    site.land(dog)
    site.step()
    twin = site.store.begin(ObjectKind.KV, site.key("cat"), VARIANT, cat.extent.elements, 0.0)
    site.arena.kv_view(twin, KV["cat"].shape[2]).copy_(KV["cat"])
    site.store.commit(twin)
    for arrival in (cat, dog):
        while arrival.landed < len(arrival.groups) - 1:
            site.land(arrival)
    site.admit(cat)
    site.arena.kv_view(cat.extent, KV["cat"].shape[2]).fill_(float("nan"))
    site.admit(dog)
    site.drive()
    assert same(result, with_objects().run(generation(site))[0])
    site.assert_idle()


def test_what_is_all_there_at_once_needs_no_stream() -> None:
    site = streaming()
    begun(site)
    for arrival in site.arrivals:
        for _ in pairwise(arrival.groups):
            site.land(arrival)
        site.admit(arrival)
    site.finish()
    assert site.engine.stats().spans_streamed == 0
    site.assert_idle()


def test_a_record_in_front_is_not_held_up() -> None:
    """A new picture before the arriving one: others may wait for its record, so it is computed by itself."""
    site = streaming()
    prompt = [(1, 2), "owl", (3,), "cat", (4,)]
    result = site.add(site.generation(prompt, request_id="r"))
    site.step()
    site.resolve()
    (cat,) = site.arrivals
    site.land(cat)
    site.step()
    assert [event.span_index for event in result.recorded] == [0]
    site.finish()
    reference = with_objects()
    assert same(result, reference.run(reference.generation(prompt, request_id="r"))[0])
    assert site.engine.stats().spans_streamed == 1
    site.assert_idle()


def test_chunks_in_the_middle_of_an_arriving_picture() -> None:
    options = {"max_batch_tokens": 12, "max_running": 4}
    reference, site = with_objects(**options), streaming(**options)
    (expected,) = reference.run(generation(reference, "uniform:60"))
    result = begun(site, plan="uniform:60")
    site.finish()
    assert torch.allclose(torch.stack(result.logprobs), torch.stack(expected.logprobs), atol=1e-5)
    site.assert_idle()


def test_sources_that_do_not_fit_are_refused() -> None:
    site = streaming()
    site.add(generation(site))
    site.rows_arrive = False
    early = site._source("r", 0)
    with pytest.raises(ValueError, match="before its request is admitted"):
        site.engine.provide("r", 0, early)  # type: ignore[arg-type]
    site.step()
    for groups in ((0, 2), (1, 4), (0, 2, 2, 4)):
        with pytest.raises(ValueError, match="no edges"):
            site.engine.provide("r", 0, replace(early, groups=groups))  # type: ignore[arg-type,type-var]
    with pytest.raises(ValueError, match="rows arrive only"):
        site.engine.provide("r", 0, replace(early, groups=(), rows_arrive=True))  # type: ignore[arg-type,type-var]
    site.engine.abort("r")
    site.engine.arrived("r", 0, 4)
    site.engine.revoke("r", 0)
    site.engine.validate()


ACTIONS = ("step", "land", "land", "admit", "revoke", "abort", "talk")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5)), max_size=40),
    st.sampled_from([(0, 4), (0, 2, 4), (0, 1, 2, 3, 4)]),
)
def test_any_interleaving(actions: list[tuple[str, int]], groups: tuple[int, ...]) -> None:
    """Two requests with two arriving pictures each: groups land, sources are admitted or withdrawn, requests go away
    in any order; who stays is answered as alone, and nothing is left."""
    site = streaming(groups=groups)
    prompts = {"a": PROMPT, "b": [(11,), "dog", (12, 13), "cat", (14,)]}
    lost: set[tuple[str, int]] = set()
    for name, parts in prompts.items():
        site.add(site.generation(parts, request_id=name, plan="uniform:20"))
    for action, number in actions:
        site.resolve()
        under_way = [a for a in site.arrivals if not a.over]
        arrival = under_way[number % len(under_way)] if under_way else None
        if action == "step":
            site.step()
        elif action == "talk":
            site.add(site.generation([3], max_tokens=3))
        elif action == "abort" and number == 0:
            site.engine.abort("b")
            prompts.pop("b", None)
            site.results["b"].unresolved = []
        elif arrival is not None and action == "revoke":
            lost.add((arrival.request_id, arrival.index))
            site.revoke(arrival)
        elif arrival is not None and action == "land" and arrival.landed < len(groups) - 1:
            site.land(arrival)
        elif arrival is not None and action == "admit" and arrival.landed == len(groups) - 1:
            site.admit(arrival)
        site.engine.validate()
    site.finish()
    for name, parts in prompts.items():
        reference = with_objects()
        reference.computed = lost
        (expected,) = reference.run(reference.generation(parts, request_id=name, plan="uniform:20"))
        got = torch.stack(site.results[name].logprobs)
        assert torch.allclose(got, torch.stack(expected.logprobs), atol=1e-4)
    site.assert_idle()
