"""Drawn configurations and prompts, transformers' answers to them, and a small paged runner of our own model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from vlcache_dist.engine.batch import ChunkWork, SpanWork, build_step
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.rope import mrope_positions
from vlcache_dist.model.vision import VisionTower
from vlcache_dist.model.weights import Checkpoint
from vlcache_dist.types import MediaSpan

BLOCK = 8
torch.set_num_threads(1)
#: transformers 5.17 truncates second_per_grid itself, 5.23 does not; they agree on whole seconds only.
FRACTIONAL_SECONDS = "int(next(second_per_grid_ts))" not in inspect.getsource(Qwen2_5_VLModel.get_rope_index)


@dataclass
class Prompt:
    """Token ids with expanded vision tokens, spans in order, and per span its patches [N, patch_elements]."""

    token_ids: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    spans: list[MediaSpan] = field(default_factory=list)
    patches: list[torch.Tensor] = field(default_factory=list)

    def text(self, ids: Sequence[int]) -> None:
        self.token_ids += [int(i) for i in ids]
        self.types += [0] * len(ids)

    def oracle_inputs(self) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": torch.tensor([self.token_ids]), "mm_token_type_ids": torch.tensor([self.types])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for kind, pixels, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            of = [i for i, span in enumerate(self.spans) if span.modality == kind]
            if of:
                inputs[pixels] = torch.cat([self.patches[i] for i in of])
                inputs[grids] = torch.tensor([self.spans[i].grid for i in of])
                if kind == "video":
                    inputs["second_per_grid_ts"] = torch.tensor([self.spans[i].second_per_grid for i in of])
        return inputs


def draw_config(rng: np.random.Generator) -> Qwen2_5_VLConfig:
    head_dim, kv_heads = int(rng.choice([8, 16, 32])), int(rng.choice([1, 2]))
    heads = kv_heads * int(rng.choice([1, 2, 4] if head_dim < 32 else [1, 2]))
    cuts = np.sort(rng.choice(np.arange(1, head_dim // 2), 2, replace=False))
    depth, vision_heads = int(rng.integers(2, 5)), int(rng.choice([2, 3]))
    patch, merge = int(rng.choice([2, 4, 7])), int(rng.choice([2, 2, 2, 3]))
    hidden = heads * head_dim
    theta = float(rng.choice([500.0, 1e4, 1e6]))
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": int(rng.integers(60, 400)),
            "hidden_size": hidden,
            "intermediate_size": int(rng.integers(20, 130)),
            "num_hidden_layers": int(rng.integers(2, 5)),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": theta,
                "mrope_section": [int(x) for x in np.diff([0, *cuts, head_dim // 2])],
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "initializer_range": 0.1,
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_heads * int(rng.choice([8, 16, 20])),
            "intermediate_size": int(rng.integers(20, 90)),
            "num_heads": vision_heads,
            "out_hidden_size": hidden,
            "patch_size": patch,
            "spatial_merge_size": merge,
            "temporal_patch_size": int(rng.choice([1, 2])),
            "window_size": int(rng.integers(1, 5)) * merge * patch + int(rng.integers(0, patch)),
            "fullatt_block_indexes": [int(i) for i in np.flatnonzero(rng.random(depth) < 0.5)],
            "tokens_per_second": int(rng.integers(1, 5)),
            "initializer_range": 0.1,
        },
        image_token_id=50,
        video_token_id=51,
        vision_start_token_id=52,
        vision_end_token_id=53,
        tie_word_embeddings=bool(rng.random() < 0.5),
    )


def draw_model(config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights; biases and norms too, or a forgotten one would go unseen."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def draw_prompt(rng: np.random.Generator, config: Qwen2_5_VLConfig, images: int, videos: int) -> Prompt:
    """Images and videos in random order with text before, between and after; some texts are empty."""
    prompt, vision = Prompt(), config.vision_config
    kinds = rng.permutation(["image"] * images + ["video"] * videos)
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    if images + videos == 0 or rng.random() < 0.7:
        prompt.text(rng.integers(0, 50, int(rng.integers(1, 9))))
    for kind in kinds:
        t = int(rng.integers(2, 5)) if kind == "video" else 1
        grid = (t, *(int(x) * vision.spatial_merge_size for x in rng.integers(1, 6, 2)))
        length = int(np.prod(grid)) // vision.spatial_merge_size**2
        seconds = 0.0
        if kind == "video":
            seconds = float(rng.choice([0.1, 0.25, 0.7, 1.0, 3.3] if FRACTIONAL_SECONDS else [1.0, 2.0, 4.0]))
        prompt.text([52])
        prompt.spans.append(MediaSpan(b"", len(prompt.token_ids), length, grid, str(kind), seconds, len(prompt.spans)))
        prompt.token_ids += [50 if kind == "image" else 51] * length
        prompt.types += [1 if kind == "image" else 2] * length
        prompt.patches.append(torch.from_numpy(rng.normal(size=(int(np.prod(grid)), patch)).astype(np.float32)))
        prompt.text([53])
        prompt.text(rng.integers(0, 50, int(rng.integers(0, 6))))
    return prompt


def save_checkpoint(
    model: Qwen2_5_VLForConditionalGeneration, folder: Path, *, hub: bool = False, shard_size: str = "5GB"
) -> Path:
    """Write a checkpoint in transformers 5's names and nested configuration, or in the hub's names and flat one.

    Which names ``save_pretrained`` itself chooses depends on the version of transformers."""
    model.save_pretrained(folder, max_shard_size=shard_size)

    def rename(name: str) -> str:
        bare = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if hub or bare.startswith("lm_head."):
            return bare
        return f"model.{bare}" if bare.startswith("visual.") else bare.replace("model.", "model.language_model.", 1)

    for path in folder.glob("*.safetensors"):
        tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text())
        index["weight_map"] = {rename(name): file for name, file in index["weight_map"].items()}
        path.write_text(json.dumps(index))
    if hub:
        _flatten_config(folder)
    return folder


def _flatten_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "torch_dtype": text.pop("dtype", None) or "float32"}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["vision_config"].pop("rope_parameters", None)
    config["vision_config"]["in_chans"] = config["vision_config"].pop("in_channels", 3)
    (folder / "config.json").write_text(json.dumps(text | config | {"model_type": "qwen2_5_vl"}))


class PagedRunner:
    """Our model over paged KV: every sequence's blocks are scattered over the pool, unwritten pages are NaN."""

    def __init__(self, checkpoint: Checkpoint, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        self.config, self.device = checkpoint.config, device
        text = self.config.text
        self.model: LanguageModel = checkpoint.load_language_model(device, dtype)
        self.tower: VisionTower = checkpoint.load_vision_tower(device, dtype)
        self.kv_row = text.num_kv_heads * text.head_dim
        self.arena = torch.full((1 << 20,), float("nan"), device=device, dtype=dtype)
        self.used = 0
        shape = (text.num_layers, 2, 256, BLOCK, text.num_kv_heads, text.head_dim)
        self.pages = torch.full(shape, float("nan"), device=device, dtype=dtype)
        self.free = list(np.random.default_rng(seed).permutation(256))
        self.rows_per_layer: tuple[int, ...] = ()

    def allocate(self, elements: int) -> int:
        base, self.used = self.used, self.used + elements
        assert self.used <= len(self.arena)
        return base

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """All pictures of all prompts in one packed call; per prompt and span the arena offset of its output."""
        patches = [p for prompt in prompts for p in prompt.patches]
        if not patches:
            return [[] for _ in prompts]
        out = self.tower.forward(torch.cat(patches), [s.grid for prompt in prompts for s in prompt.spans])
        base = self.allocate(out.numel())
        self.arena[base : base + out.numel()] = out.reshape(-1)
        bases = []
        for prompt in prompts:
            bases.append([])
            for span in prompt.spans:
                bases[-1].append(base)
                base += span.length * out.shape[1]
        return bases

    def sequence(self, prompt: Prompt, spans: Sequence[SpanWork] | None, extra: int = 0) -> Sequence_:
        count = len(prompt.token_ids) + extra
        positions, delta = mrope_positions(len(prompt.token_ids), prompt.spans, self.config)
        tail = np.broadcast_to(np.arange(len(prompt.token_ids), count, dtype=np.int32) + np.int32(delta), (3, extra))
        blocks = [self.free.pop() for _ in range(-(-count // BLOCK))]
        return Sequence_(
            token_ids=np.array(prompt.token_ids + [0] * extra),
            positions=np.concatenate([positions, tail], axis=1),
            block_table=np.array(blocks, np.int32),
            spans=list(spans or ()),
            length=len(prompt.token_ids),
        )

    def fresh(self, prompts: Sequence[Prompt], extra: int = 0) -> list[Sequence_]:
        """Sequences whose spans are computed from encoder output."""
        return [
            self.sequence(
                prompt,
                [SpanWork(s.start, s.length, embed_base=b) for s, b in zip(prompt.spans, bases, strict=True)],
                extra,
            )
            for prompt, bases in zip(prompts, self.encode(prompts), strict=True)
        ]

    def step(self, chunks: Sequence[ChunkWork]) -> torch.Tensor:
        text = self.config.text
        step = build_step(
            chunks, num_layers=text.num_layers, block_size=BLOCK, kv_row=self.kv_row, hidden=text.hidden_size
        )
        self.rows_per_layer = step.rows_kv
        batch, scatter = ForwardBatch.from_step(step, self.device), ScatterBatch.from_step(step, self.device)
        return self.model.forward(batch, self.pages, self.arena, scatter)

    def greedy(self, sequences: Sequence[Sequence_], logits: torch.Tensor, count: int) -> list[list[int]]:
        """``count`` tokens per sequence, all sequences in one batch, starting from the prefill's logits."""
        tokens = [[int(t)] for t in logits.argmax(-1)]
        for i in range(count - 1):
            for sequence, drawn in zip(sequences, tokens, strict=True):
                sequence.token_ids[sequence.length + i] = drawn[-1]
            logits = self.step([s.chunk(s.length + i, s.length + i + 1, True) for s in sequences])
            for drawn, token in zip(tokens, logits.argmax(-1).tolist(), strict=True):
                drawn.append(token)
        return tokens

    def kv(self, sequence: Sequence_, count: int) -> torch.Tensor:
        """[L, 2, Hkv, count, D] of positions [0, count), as transformers orders heads and tokens."""
        index = np.arange(count)
        slots = torch.from_numpy(sequence.block_table[index // BLOCK].astype(np.int64) * BLOCK + index % BLOCK)
        flat = self.pages.view(*self.pages.shape[:2], -1, *self.pages.shape[-2:])
        return flat[:, :, slots].transpose(2, 3)


@dataclass
class Sequence_:
    token_ids: np.ndarray
    positions: np.ndarray
    block_table: np.ndarray
    spans: list[SpanWork]
    length: int

    def chunk(self, start: int, end: int, sample: bool) -> ChunkWork:
        return ChunkWork(self.token_ids, self.positions, self.block_table, start, end, sample, self.spans)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest deviation over the largest magnitude."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max()) if theirs.numel() else 0.0
