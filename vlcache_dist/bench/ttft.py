"""Time to first token of one request: one image and some text, cold and warm, beside transformers in the same process.

Clocks. Cold: from patches in (on CUDA: pinned) host memory to the first token id on the host; vision tower, prefill and
recording included. Warm: from a tokenized prompt, with the image's KV and encoder output in the local store, behind a
new prefix. Floor: the warm request's forward pass alone, captured in one bare CUDA graph and replayed. Every warm and
cold request has a text of its own, so no prefix cache helps.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlcache_dist.bench.shapes import hub_config, model_config, random_models
from vlcache_dist.config import EngineSettings
from vlcache_dist.engine.api import Admitted, Compute, Failed, PrefillDone, Reuse, TokenEvent
from vlcache_dist.engine.batch import StepBatch
from vlcache_dist.engine.build import build_engine, build_store, kv_layout
from vlcache_dist.engine.engine import Engine, new_variant
from vlcache_dist.kernels import backends
from vlcache_dist.kernels.backends import Auto
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.vision import VisionTower
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.types import MediaSpan, ObjectKind, ReuseMode, SamplingParams
from vlcache_dist.wire import Generation

TEXT_TOKENS = 64
WARM_UP = 3
DECODE_BATCHES, DECODE_CONTEXT, DECODE_STEPS = (1, 64), 2048, 32


@dataclass(slots=True)
class _Image:
    """A picture of random patches: ``grid`` in patches, ``tokens`` after merging."""

    key: bytes
    grid: tuple[int, int, int]
    tokens: int
    patches: torch.Tensor


class Bench:
    """One model with random weights and everything a request needs, on one device."""

    ranks = 1  #: that share the language model

    def __init__(
        self,
        shape: str,
        device: str,
        max_vision_tokens: int,
        plan: str,
        *,
        layers: int | None = None,
        max_batch_tokens: int | None = None,
        page_tokens: int | None = None,
    ) -> None:
        """``max_vision_tokens``: of a request; ``max_batch_tokens``: of a step, None: so many that no prompt is cut;
        ``page_tokens``: that the KV pages hold, None: enough for ``decode_ms``."""
        self.device = torch.device(device)
        dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.config = model_config(shape, layers)
        self.plan = Plan.parse(plan)
        self.layout = kv_layout(self.config, f"random {shape}", dtype, self.ranks)
        token_bytes = (self.layout.kv_token + self.layout.hidden) * self.layout.itemsize
        if page_tokens is None:
            page_tokens = max(DECODE_BATCHES) * (DECODE_CONTEXT + 512) if self.device.type == "cuda" else 0
        blocks = max(max_vision_tokens + 4096, page_tokens) * self.layout.kv_token * self.layout.itemsize
        settings = EngineSettings(
            store_bytes=3 * max_vision_tokens * token_bytes + (64 << 20),
            kv_bytes=blocks,
            max_batch_tokens=max_batch_tokens or max_vision_tokens + 4096,
        )
        self.arena, self.store = build_store(self.layout, settings, self.device)
        limit = max(self.config.text.max_position_embeddings, max_vision_tokens + 2048)
        self.engine, self.tower = self._build(settings, limit)
        self.text_tokens = TEXT_TOKENS
        self.rng = np.random.default_rng(0)
        self._requests = 0

    def image(self, tokens: int) -> _Image:
        """A square picture of about ``tokens`` vision tokens (a multiple of 4 on each side)."""
        side = max(4, round(tokens**0.5 / 4) * 4)
        grid = (1, 2 * side, 2 * side)
        patches = torch.randn(grid[1] * grid[2], self.config.vision.patch_elements)
        if self.device.type == "cuda":
            patches = patches.to(torch.bfloat16).pin_memory()
        return _Image(self.rng.bytes(32), grid, side * side, patches)

    def rest(self) -> None:
        """Capture the graphs that were missed, as a worker does when nobody waits."""
        while self.tower.prepare() or self.engine.runner.prepare():
            pass

    def cold_ms(self, image: _Image) -> float:
        """One cold request, from patches on the host to the first token."""
        self.rest()
        generation = self._generation([image])
        started = time.perf_counter()
        rows = self.tower.forward(image.patches, [image.grid])
        embedding = self._store_embedding(image, rows)
        record = self.store.begin(
            ObjectKind.KV, image.key, new_variant(), self.layout.kv_elements(image.tokens), time.monotonic()
        )
        self._run([(generation, [Compute(embedding, record)])])
        return (time.perf_counter() - started) * 1e3

    def warm_ms(self, image: _Image) -> float:
        """One warm request; the image's objects must be in the store."""
        return self.warm_batch_ms([image], 1)

    def warm_batch_ms(self, images: Sequence[_Image], requests: int) -> float:
        """``requests`` warm requests at once, each about all ``images``, until all have their first token."""
        self.rest()
        generations = [self._generation(images) for _ in range(requests)]
        depths = [self.plan.depths(image.tokens, self.layout.num_layers) for image in images]
        started = time.perf_counter()
        self._run([(g, [self._reuse(*pair) for pair in zip(images, depths, strict=True)]) for g in generations])
        return (time.perf_counter() - started) * 1e3

    def _reuse(self, image: _Image, depths: np.ndarray) -> Reuse:
        kv = self.store.lookup(ObjectKind.KV, image.key, pin=True)
        embedding = self.store.lookup(ObjectKind.EMBEDDING, image.key, pin=True)
        if kv is None or embedding is None:
            raise RuntimeError("the image is not in the store: a cold request must come first")
        return Reuse(kv, depths, embedding)

    def tower_ms(self, image: _Image) -> float:
        """The vision tower alone."""
        self.rest()
        started = time.perf_counter()
        self.tower.forward(image.patches, [image.grid])
        self._wait()
        return (time.perf_counter() - started) * 1e3

    def floor_ms(self, image: _Image, runs: int) -> float | None:
        """The last warm step's forward pass, replayed from one CUDA graph; None without CUDA."""
        if self.device.type != "cuda":
            return None
        steps: list[StepBatch] = []
        launch = self.engine.runner.launch

        def note(step: StepBatch, *arguments: Any) -> Any:
            steps.append(step)
            return launch(step, *arguments)

        self.engine.runner.launch = note  # type: ignore[method-assign, assignment]
        try:
            self.warm_ms(image)
        finally:
            self.engine.runner.launch = launch  # type: ignore[method-assign]
        runner = self.engine.runner
        batch = ForwardBatch.from_step(steps[-1], self.device)
        scatter = ScatterBatch.from_step(steps[-1], self.device)

        def forward() -> torch.Tensor:
            return runner.model.forward(batch, runner.pages, runner.arena.tensor, scatter).argmax(-1)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            token = forward()

        def replay() -> float:
            started = time.perf_counter()
            graph.replay()
            token.tolist()
            return (time.perf_counter() - started) * 1e3

        return median(replay, runs)

    def decode_ms(self, batch: int) -> float:
        """One decode step of ``batch`` sequences of ``DECODE_CONTEXT`` tokens: the median over many."""
        for _ in range(batch):
            self._requests += 1
            tokens = self.rng.integers(1, 800, DECODE_CONTEXT).tolist()
            sampling = SamplingParams(max_tokens=DECODE_STEPS + WARM_UP + batch, ignore_eos=True)
            generation = Generation(str(self._requests), "", tuple(tokens), (), sampling, ReuseMode.OFF, str(self.plan))
            self.engine.add(generation, time.monotonic())
        waiting = batch
        while waiting:
            waiting -= sum(isinstance(event, PrefillDone) for event in self.engine.step(time.monotonic()))

        def step() -> float:
            self.rest()
            started = time.perf_counter()
            self.engine.step(time.monotonic())
            return (time.perf_counter() - started) * 1e3

        took = median(step, DECODE_STEPS - 2)
        while self.engine.has_work():
            self.engine.step(time.monotonic())
        return took

    def decode_bytes(self, batch: int) -> int:
        """What a decode step must read: weights (of the embedding only ``batch`` rows) and the sequences' KV."""
        model = self.engine.runner.model
        weights = sum(tensor.nbytes for tensor in model.parameters().values())
        if not model.tied:
            weights -= model.embed_tokens.nbytes
        return weights + batch * DECODE_CONTEXT * self.layout.kv_token * self.layout.itemsize

    def copy_gb_s(self) -> float:
        """GB/s, read plus written, of a device copy of 1 GiB."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)

        def copy() -> float:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            target.copy_(source)
            after.record()
            after.synchronize()
            return before.elapsed_time(after)

        return 2 * source.nbytes / median(copy, 10) / 1e6

    # -- inside -------------------------------------------------------------------------------------------------

    def _build(self, settings: EngineSettings, limit: int) -> tuple[Engine, VisionTower]:
        language, tower = random_models(self.config, self.device, self.arena.tensor.dtype)
        engine = build_engine(language, self.config, settings, self.arena, self.store, max_model_len=limit)
        return engine, tower

    def _generation(self, images: Sequence[_Image]) -> Generation:
        """A request with its own text: half of it in front of the images, half behind, a token between two of them."""
        self._requests += 1
        text = self.rng.integers(1, min(self.config.image_token_id, 800), self.text_tokens + len(images)).tolist()
        half = self.text_tokens // 2
        tokens, spans = text[:half], []
        for index, image in enumerate(images):
            if index:
                tokens.append(text.pop())
            spans.append(MediaSpan(image.key, len(tokens), image.tokens, image.grid, index=index))
            tokens += [self.config.image_token_id] * image.tokens
        tokens += text[half : self.text_tokens]
        return Generation(
            request_id=str(self._requests),
            tenant="",
            token_ids=tuple(tokens),
            spans=tuple(spans),
            sampling=SamplingParams(max_tokens=1, ignore_eos=True),
            reuse=ReuseMode.APPROX,
            plan=str(self.plan),
        )

    def _store_embedding(self, image: _Image, rows: torch.Tensor) -> Any:
        elements = self.layout.embedding_elements(image.tokens)
        extent = self.store.begin(ObjectKind.EMBEDDING, image.key, new_variant(), elements, time.monotonic())
        self.engine.runner.store_embeddings(rows, extent)
        return self.store.commit(extent, pin=True)

    def _run(self, requests: Sequence[tuple[Generation, Sequence[Compute | Reuse]]]) -> None:
        finished = 0
        for generation, _ in requests:
            self.engine.add(generation, time.monotonic())
        sources = {generation.request_id: given for generation, given in requests}
        while self.engine.has_work():
            for event in self.engine.step(time.monotonic()):
                if isinstance(event, Admitted):
                    for index, source in enumerate(sources[event.request_id]):
                        self.engine.provide(event.request_id, index, source)
                elif isinstance(event, Failed):
                    raise event.error
                elif isinstance(event, TokenEvent):
                    finished += event.finish is not None
        if finished != len(requests):
            raise RuntimeError("the engine came to rest without a token")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def median(measure: Callable[[], float], runs: int) -> float:
    """The median of ``runs`` measurements after a warm-up, in the measurement's unit."""
    for _ in range(WARM_UP):
        measure()
    return statistics.median(measure() for _ in range(runs))


def transformers_ms(shape: str, device: str, images: Sequence[_Image], runs: int) -> list[float]:
    """Transformers (sdpa) on the same shapes and inputs: from patches on the host to the first token id."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from vlcache_dist.model.weights import BUNDLED, resolve

    cuda = device.startswith("cuda")
    folder = resolve(BUNDLED)
    config = Qwen2_5_VLConfig.from_pretrained(folder) if shape == "tiny" else Qwen2_5_VLConfig(**_nested(shape))
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    rng = np.random.default_rng(1)
    medians = []
    for image in images:

        def once(image: _Image = image) -> float:
            text = rng.integers(1, 800, TEXT_TOKENS).tolist()
            half = TEXT_TOKENS // 2
            ids = text[:half] + [config.image_token_id] * image.tokens + text[half:]
            row = torch.tensor([ids])
            started = time.perf_counter()
            with torch.inference_mode():
                logits = model(
                    input_ids=row.to(device),
                    pixel_values=image.patches.to(device, non_blocking=True),
                    image_grid_thw=torch.tensor([image.grid], device=device),
                    mm_token_type_ids=(row == config.image_token_id).int().to(device),
                    attention_mask=torch.ones_like(row).to(device),
                    logits_to_keep=1,
                ).logits
                int(logits[0, -1].argmax())
            return (time.perf_counter() - started) * 1e3

        medians.append(median(once, runs))
    return medians


def run(
    shape: str, device: str, vision_tokens: Sequence[int], plan: str, runs: int, *, with_transformers: bool = True
) -> dict[str, Any]:
    """The report: machine and one row per image size. Times in milliseconds, medians of ``runs``."""
    bench = Bench(shape, device, max(vision_tokens), plan)
    images = [bench.image(tokens) for tokens in vision_tokens]
    rows: list[dict[str, Any]] = []
    for image in images:

        def cold(image: _Image = image) -> float:
            image.key = bench.rng.bytes(32)
            return bench.cold_ms(image)

        cold_ms = median(cold, runs)
        warm_ms = median(lambda image=image: bench.warm_ms(image), runs)  # type: ignore[misc]
        floor_ms = bench.floor_ms(image, runs)
        depths = bench.plan.depths(image.tokens, bench.layout.num_layers)
        rows.append(
            {
                "vision_tokens": image.tokens,
                "active_tokens": TEXT_TOKENS + int((depths > 0).sum()),
                "cold_ms": cold_ms,
                "vision_tower_ms": median(lambda image=image: bench.tower_ms(image), runs),  # type: ignore[misc]
                "warm_ms": warm_ms,
                "warm_floor_ms": floor_ms,
                "transformers_ms": None,
                "kv_bytes": bench.layout.kv_elements(image.tokens) * bench.layout.itemsize,
            }
        )
    attention = backends.select(bench.device, bench.arena.tensor.dtype, bench.layout.head_dim)
    report = {
        "machine": machine(device),
        "shape": shape,
        "plan": plan,
        "runs": runs,
        "attention": [
            b.name for b in ((attention.few, attention.many) if isinstance(attention, Auto) else (attention,))
        ],
        "rows": rows,
    }
    if device.startswith("cuda"):
        steps = {batch: bench.decode_ms(batch) for batch in DECODE_BATCHES}
        report["copy_gb_s"] = bandwidth = bench.copy_gb_s()
        report["decode"] = [
            {
                "batch": batch,
                "context": DECODE_CONTEXT,
                "step_ms": ms,
                "tokens_per_s": batch / ms * 1e3,
                "of_copy_bandwidth": bench.decode_bytes(batch) / ms / 1e6 / bandwidth,
            }
            for batch, ms in steps.items()
        ]
    if with_transformers:
        del bench
        for row, ms in zip(rows, transformers_ms(shape, device, images, runs), strict=True):
            row["transformers_ms"] = ms
    return report


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    about = {"python": platform.python_version(), "torch": str(torch.__version__), "cpu": platform.processor()}
    if device.startswith("cuda"):
        about["gpu"] = torch.cuda.get_device_name(device)
        about["cuda"] = str(torch.version.cuda)
    return about


def _nested(shape: str) -> dict[str, Any]:
    """The hub's flat configuration as transformers 5 nests it."""
    flat = hub_config(shape)
    vision = flat.pop("vision_config")
    outer = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    text = {k: v for k, v in flat.items() if k not in (*outer, "architectures", "torch_dtype", "model_type")}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": text.pop("rope_scaling")["mrope_section"],
    }
    return {"text_config": text, "vision_config": vision, **{k: flat[k] for k in outer}}
