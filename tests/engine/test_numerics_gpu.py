"""The engine on a GPU at 3B shapes with fewer layers: against transformers, and against itself."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from vlcache_dist.bench.shapes import hub_config
from vlcache_dist.config import EngineSettings
from vlcache_dist.engine.api import Admitted, Compute, Failed, Reuse, TokenEvent
from vlcache_dist.engine.build import build_engine, build_store, kv_layout
from vlcache_dist.engine.engine import Engine, new_variant
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.vision import VisionTower
from vlcache_dist.types import MediaSpan, ObjectKind, ReuseMode, SamplingParams
from vlcache_dist.wire import Generation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYERS, DEPTH, GRID = 4, 8, (1, 40, 48)
TOKENS = GRID[1] * GRID[2] // 4
KEY = b"k" * 32


class Rig:
    """transformers in fp32 and bf16 and an engine, all with the same bf16 weights."""

    def __init__(self) -> None:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        flat = hub_config("3b") | {
            "num_hidden_layers": LAYERS,
            "max_window_layers": LAYERS,
            "tie_word_embeddings": True,
        }
        flat["vision_config"] |= {"depth": DEPTH, "fullatt_block_indexes": [3, 7]}
        vision = flat["vision_config"]
        outer = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        text = {k: v for k, v in flat.items() if k not in (*outer, "vision_config", "architectures", "model_type")}
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": text.pop("rope_theta"),
            "mrope_section": text.pop("rope_scaling")["mrope_section"],
        }
        config = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True, **{k: flat[k] for k in outer}
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.reference = Qwen2_5_VLForConditionalGeneration(config).eval().bfloat16().float()
        self.config = ModelConfig.parse(flat)
        self.patches = torch.randn(GRID[1] * GRID[2], self.config.vision.patch_elements, device="cuda").bfloat16()
        rng = np.random.default_rng(0)
        self.before, self.after = rng.integers(1, 800, 20).tolist(), rng.integers(1, 800, 40).tolist()
        self.ids = [*self.before, *[self.config.image_token_id] * TOKENS, *self.after]
        self.exact = self.transformers()
        self.reference = self.reference.bfloat16()
        self.rounded = self.transformers()
        weights = self.reference.state_dict()
        self.language = LanguageModel(self.config.text, True, "cuda", torch.bfloat16)
        self.tower = VisionTower(self.config.vision, "cuda", torch.bfloat16)
        with torch.inference_mode():
            for name, tensor in (*self.language.parameters().items(), *self.tower.parameters().items()):
                tensor.copy_(weights[name].view(tensor.shape))
        del self.reference, weights
        self.layout = kv_layout(self.config, "numerics", "bfloat16")
        settings = EngineSettings(store_bytes=256 << 20, kv_bytes=512 << 20, max_batch_tokens=4096)
        self.arena, self.store = build_store(self.layout, settings, torch.device("cuda"))
        self.engine: Engine = build_engine(self.language, self.config, settings, self.arena, self.store)
        self.logits: list[torch.Tensor] = []
        compute = self.language.logits

        def note(x: torch.Tensor) -> torch.Tensor:
            logits = compute(x)
            self.logits.append(logits[0])
            return logits

        self.language.logits = note  # type: ignore[method-assign]
        self.requests = 0

    def transformers(self) -> torch.Tensor:
        row = torch.tensor([self.ids], device="cuda")
        with torch.inference_mode():
            return (
                self.reference(
                    input_ids=row,
                    pixel_values=self.patches.to(self.reference.dtype),
                    image_grid_thw=torch.tensor([GRID], device="cuda"),
                    mm_token_type_ids=(row == self.config.image_token_id).int(),
                    attention_mask=torch.ones_like(row),
                    logits_to_keep=1,
                )
                .logits[0, -1]
                .float()
            )

    def embedding(self, *, kept: bool) -> object:
        if kept and (found := self.store.lookup(ObjectKind.EMBEDDING, KEY, pin=True)) is not None:
            return found
        elements, now = self.layout.embedding_elements(TOKENS), time.monotonic()
        extent = (
            self.store.begin(ObjectKind.EMBEDDING, KEY, new_variant(), elements, now)
            if kept
            else self.store.stage(elements, now)
        )
        self.engine.runner.store_embeddings(self.tower.forward(self.patches, [GRID]), extent)
        return self.store.commit(extent, pin=True)

    def ask(self, source: Compute | Reuse, reuse: ReuseMode) -> torch.Tensor:
        self.requests += 1
        generation = Generation(
            request_id=str(self.requests), tenant=str(self.requests), token_ids=tuple(self.ids),
            spans=(MediaSpan(KEY, len(self.before), TOKENS, GRID),),
            sampling=SamplingParams(max_tokens=1, ignore_eos=True), reuse=reuse, plan="full",
        )  # fmt: skip
        self.engine.add(generation, 0.0)
        answered = False
        while self.engine.has_work():
            for event in self.engine.step(0.0):
                if isinstance(event, Admitted):
                    self.engine.provide(event.request_id, 0, source)
                elif isinstance(event, Failed):
                    raise event.error
                answered |= isinstance(event, TokenEvent)
        assert answered
        return self.logits[-1].float()


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    yield Rig()
    torch.cuda.empty_cache()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_no_further_from_fp32_than_transformers_in_bf16(rig: Rig) -> None:
    ours = rig.ask(Compute(rig.embedding(kept=False)), ReuseMode.OFF)  # type: ignore[arg-type]
    theirs = distance(rig.rounded, rig.exact)
    assert 0 < theirs < 0.1, "the reference itself must make sense"
    assert distance(ours, rig.exact) <= 1.5 * theirs


def test_a_full_plan_is_no_reuse(rig: Rig) -> None:
    off = rig.ask(Compute(rig.embedding(kept=False)), ReuseMode.OFF)  # type: ignore[arg-type]
    record = rig.store.begin(ObjectKind.KV, KEY, new_variant(), rig.layout.kv_elements(TOKENS), 0.0)
    rig.ask(Compute(rig.embedding(kept=True), record), ReuseMode.APPROX)  # type: ignore[arg-type]
    kv = rig.store.lookup(ObjectKind.KV, KEY, pin=True)
    assert kv is not None
    depths = np.full(TOKENS, LAYERS, np.int32)
    full = rig.ask(Reuse(kv, depths, rig.embedding(kept=True)), ReuseMode.APPROX)  # type: ignore[arg-type]
    theirs = distance(rig.rounded, rig.exact)
    assert distance(full, rig.exact) <= 1.5 * theirs and distance(full, off) <= 1.5 * theirs, "roundings differ at most"
    rig.engine.validate()
