"""A small engine with random weights and made-up pictures (random encoder output), for the engine's tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch

from vlcache_dist.engine.api import (
    Admitted,
    Compute,
    Event,
    Failed,
    Mode,
    PrefillDone,
    RecordDropped,
    Reuse,
    SpanRecorded,
    TokenEvent,
)
from vlcache_dist.engine.build import MakeRunner, make_whole_runner
from vlcache_dist.engine.engine import Engine, EngineConfig, new_variant
from vlcache_dist.errors import StoreFull
from vlcache_dist.kv.arena import Arena, allocate_pages
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import Extent, ObjectStore
from vlcache_dist.model.config import ModelConfig, TextConfig, VisionConfig
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.types import FinishReason, MediaSpan, ObjectKind, ReuseMode, SamplingParams
from vlcache_dist.wire import Generation

torch.set_num_threads(1)

VOCAB = 96
IMAGE_TOKEN, VIDEO_TOKEN, EOS = 93, 94, 95
MERGE = 2

Part = int | str | tuple[int, ...]  #: n random text tokens, a picture by name, or these text tokens


def model_config(
    layers: int = 4, heads: int = 4, kv_heads: int = 2, section: tuple[int, ...] = (2, 3, 3)
) -> ModelConfig:
    dim = 2 * sum(section)
    text = TextConfig(VOCAB, heads * dim, 96, layers, heads, kv_heads, 1e-6, 500.0, section, 4096)
    vision = VisionConfig(1, 32, 32, 2, heads * dim, (0,), spatial_merge_size=MERGE, tokens_per_second=2)
    return ModelConfig(text, vision, True, "float32", IMAGE_TOKEN, VIDEO_TOKEN, 91, 92, (EOS,))


def random_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = LanguageModel(config.text, config.tie_word_embeddings, "cpu", dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.parameters().items():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1 + mean)
    return model


@dataclass
class Result:
    """What one request's events said."""

    admitted: Admitted | None = None
    done: PrefillDone | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[torch.Tensor] = field(default_factory=list)  # [vocab] each, by token id
    finish: FinishReason | None = None
    recorded: list[SpanRecorded] = field(default_factory=list)
    dropped: list[RecordDropped] = field(default_factory=list)
    failed: Failed | None = None
    unresolved: list[int] = field(default_factory=list)


class World:
    """An engine, its store, and a resolver that behaves like the library's: own store, else compute and record."""

    def __init__(
        self,
        seed: int = 0,
        *,
        config: ModelConfig | None = None,
        dtype: str = "float32",
        block_size: int = 4,
        num_blocks: int = 256,
        arena_tokens: int = 2048,
        max_batch_tokens: int = 512,
        max_running: int = 8,
        max_waiting: int = 64,
        model: LanguageModel | None = None,
        tp_size: int = 1,
        make_runner: MakeRunner = make_whole_runner,
    ) -> None:
        self.config = config or model_config()
        torch_dtype = getattr(torch, dtype)
        self.model = model or random_model(self.config, seed, torch_dtype)
        text = self.model.config
        self.layout = KVLayout(
            text.num_layers, text.num_kv_heads, text.head_dim, text.hidden_size, dtype, "test", tp_size=tp_size
        )
        self.arena = Arena(self.layout, arena_tokens * self.layout.kv_token, "cpu")
        self.arena.tensor.fill_(float("nan"))  # whatever is read before it is written shows
        self.store = ObjectStore(self.arena.tensor.numel(), alignment=self.arena.alignment)
        self.pages = allocate_pages(self.layout, num_blocks, block_size, "cpu")
        runner, streamer = make_runner(self.model, self.pages, self.arena)
        self.engine = Engine(
            EngineConfig(block_size, max_batch_tokens, max_running, max_waiting, 4096),
            self.config,
            runner,
            self.store,
            streamer,
        )
        self.rng = np.random.default_rng(seed)
        self.grids: dict[str, tuple[int, int, int]] = {}
        self.embeddings: dict[bytes, torch.Tensor] = {}
        self.results: dict[str, Result] = {}
        self.generations: dict[str, Generation] = {}
        self.num_store_full = 0
        self.now = 0.0
        self._ids = itertools.count()
        self._recording: set[bytes] = set()

    # -- prompts ------------------------------------------------------------------------------------------------

    def picture(self, name: str, grid: tuple[int, int, int] = (1, 8, 8)) -> None:
        """Make up a picture (a video if grid[0] > 1). Other worlds of the same seed make up the same one."""
        self.grids[name] = grid
        generator = torch.Generator().manual_seed(sum(name.encode()))
        length = grid[0] * grid[1] * grid[2] // MERGE**2
        self.embeddings[self.key(name)] = torch.randn(length, self.layout.hidden, generator=generator)

    @staticmethod
    def key(name: str) -> bytes:
        return name.encode().ljust(32, b"\0")

    def text(self, count: int) -> tuple[int, ...]:
        return tuple(self.rng.integers(0, 90, count).tolist())

    def generation(
        self,
        parts: Sequence[Part],
        *,
        reuse: str = "approx",
        plan: str = "uniform:20",
        max_tokens: int = 1,
        tenant: str = "t",
        request_id: str | None = None,
    ) -> Generation:
        tokens: list[int] = []
        spans: list[MediaSpan] = []
        for part in parts:
            if isinstance(part, int):
                tokens += self.text(part)
            elif isinstance(part, tuple):
                tokens += part
            else:
                grid = self.grids[part]
                length = grid[0] * grid[1] * grid[2] // MERGE**2
                video = grid[0] > 1
                modality = "video" if video else "image"
                index = len(spans)
                spans.append(
                    MediaSpan(self.key(part), len(tokens), length, grid, modality, 0.5 if video else 0.0, index)
                )
                tokens += [VIDEO_TOKEN if video else IMAGE_TOKEN] * length
        return Generation(
            request_id=request_id or f"r{next(self._ids)}",
            tenant=tenant,
            token_ids=tuple(tokens),
            spans=tuple(spans),
            sampling=SamplingParams(max_tokens=max_tokens, logprobs=VOCAB, ignore_eos=True),
            reuse=ReuseMode(reuse),
            plan=plan,
        )

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, *generations: Generation, mode: Mode = Mode.GENERATE) -> list[Result]:
        """Add all, drive to the end, return their results."""
        for generation in generations:
            self.add(generation, mode)
        self.drive()
        return [self.results[generation.request_id] for generation in generations]

    def ask(self, parts: Sequence[Part], mode: Mode = Mode.GENERATE, **options: object) -> Result:
        return self.run(self.generation(parts, **options), mode=mode)[0]  # type: ignore[arg-type]

    def add(self, generation: Generation, mode: Mode = Mode.GENERATE) -> Result:
        self.engine.add(generation, self.now, mode)
        self.generations[generation.request_id] = generation
        self.results[generation.request_id] = Result()
        return self.results[generation.request_id]

    def drive(self) -> None:
        while self.resolve() or self.engine.has_work():
            self.step()

    def drive_some(self, steps: int) -> None:
        for _ in range(steps):
            self.resolve()
            self.step()

    def step(self) -> list[Event]:
        self.now += 1.0
        events = self.engine.step(self.now)
        for event in events:
            self._note(event)
        return events

    def resolve(self) -> bool:
        progressed = False
        for request_id, result in self.results.items():
            while result.unresolved and (source := self.source(request_id, result.unresolved[0])) is not None:
                self.engine.provide(request_id, result.unresolved.pop(0), source)
                progressed = True
        return progressed

    def source(self, request_id: str, index: int) -> Compute | Reuse | None:
        """What the library would give; None: wait."""
        try:
            return self._source(request_id, index)
        except StoreFull:
            self.num_store_full += 1
            self.engine.relieve()
            return None

    def _source(self, request_id: str, index: int) -> Compute | Reuse | None:
        generation = self.generations[request_id]
        span = generation.spans[index]
        if generation.reuse is ReuseMode.OFF:
            return Compute(self.embedding(span))
        if generation.reuse is ReuseMode.APPROX:
            if (kv := self.store.lookup(ObjectKind.KV, span.key, pin=True)) is not None:
                return self.reuse(span, kv, generation.plan)
            if span.key in self._recording:
                return None
        embedding, record = self.embedding(span), None
        if span.key not in self._recording and self.engine.recordable(request_id, index):
            with suppress(StoreFull):  # then it is computed and not recorded
                record = self.begin_record(span)
                self._recording.add(span.key)
        return Compute(embedding, record)

    def embedding(self, span: MediaSpan) -> Extent:
        """Encoder output in a staging extent of its own: NaN again as soon as the engine lets go of it, see below."""
        extent = self.store.stage(self.layout.embedding_elements(span.length), self.now)
        self.engine.runner.store_embeddings(self.embeddings[span.key], extent)
        return self.store.commit(extent, pin=True)

    def begin_record(self, span: MediaSpan) -> Extent:
        extent = self.store.begin(
            ObjectKind.KV, span.key, new_variant(), self.layout.kv_elements(span.length), self.now
        )
        self.arena.kv_view(extent, span.length).fill_(float("nan"))
        return extent

    def reuse(self, span: MediaSpan, kv: Extent, plan: str) -> Reuse:
        parsed = Plan.parse(plan)
        depths = parsed.depths(span.length, self.layout.num_layers)
        try:
            return Reuse(kv, depths, self.embedding(span) if depths.any() else None, canary=parsed.canary)
        except StoreFull:
            self.store.unpin(kv)
            raise

    def _note(self, event: Event) -> None:
        result = self.results.setdefault(event.request_id, Result())
        match event:
            case Admitted(needed=needed):
                result.admitted = event
                result.unresolved = list(needed)
            case SpanRecorded(extent=extent):
                result.recorded.append(event)
                self._recording.discard(extent.key)
            case RecordDropped(key=key):
                result.dropped.append(event)
                self._recording.discard(key)
            case PrefillDone():
                result.done = event
            case TokenEvent(token_id=token_id, logprobs=logprobs, finish=finish):
                result.tokens.append(token_id)
                result.finish = finish
                assert logprobs is not None
                by_id = torch.full((VOCAB,), float("nan"))
                by_id[[i for i, _ in logprobs.top]] = torch.tensor([p for _, p in logprobs.top])
                result.logprobs.append(by_id)
            case Failed():
                result.failed = event
                result.unresolved = []

    # -- looking inside -----------------------------------------------------------------------------------------

    def kv_of(self, request_id: str) -> tuple[torch.Tensor, torch.Tensor]:
        """K (rotated) and V [layer, token, kv_head, head_dim] in the pages of a parked or running request."""
        sequence = self.engine._sequences[request_id]
        slots = sequence.slots(0, sequence.num_computed)
        flat = self.pages.flatten(2, 3)[:, :, slots]
        return flat[:, 0].clone(), flat[:, 1].clone()

    def object_of(self, name: str) -> torch.Tensor:
        """The stored KV object of a picture [layer, 2, token, kv_head, head_dim], a view of the arena."""
        extent = self.store.lookup(ObjectKind.KV, self.key(name))
        assert extent is not None, f"{name} is not in the store"
        return self.arena.kv_view(extent, len(self.embeddings[self.key(name)]))

    def assert_idle_but_objects(self) -> None:
        """Nothing is held by anybody; cached objects may be there."""
        self.engine.validate()
        stats, store = self.engine.stats(), self.store.stats()
        assert (stats.waiting, stats.running, stats.parked) == (0, 0, 0)
        assert stats.blocks_free == stats.blocks_total
        assert (store.filling, store.pinned, store.quarantined) == (0, 0, 0)

    def assert_idle(self) -> None:
        """Nothing is held by anybody, and nothing but cached objects was in the store, which is cleared."""
        self.assert_idle_but_objects()
        self.store.clear()
        assert self.store.stats().committed == 0, "staging extents were left behind"
