"""Qwen2.5-VL shapes by name, for benchmarks with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vlcache_dist.errors import ConfigError
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.vision import VisionTower
from vlcache_dist.model.weights import BUNDLED, Checkpoint

# hidden, layers, heads, KV heads, intermediate, vocabulary, tied; the vision tower differs in its output size only.
# Source: config.json of Qwen/Qwen2.5-VL-{3B,7B,32B}-Instruct; 72b: the defaults of transformers' Qwen2_5_VLTextConfig.
_TEXT = {
    "3b": (2048, 36, 16, 2, 11008, 151936, True),
    "7b": (3584, 28, 28, 4, 18944, 152064, False),
    "32b": (5120, 64, 40, 8, 27648, 152064, False),
    "72b": (8192, 80, 64, 8, 29568, 152064, False),
}


def hub_config(shape: str) -> dict[str, Any]:
    """``config.json`` of a shape in the hub's flat form. Raises ConfigError for an unknown shape."""
    if shape not in _TEXT:
        raise ConfigError(f"shape {shape!r} is not one of tiny, {', '.join(_TEXT)}")
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = _TEXT[shape]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "max_window_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_channels": 3,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
    }


def model_config(shape: str, layers: int | None = None) -> ModelConfig:
    """The configuration of a shape, with fewer language-model layers if asked for."""
    if shape == "tiny":
        config = Checkpoint.open(BUNDLED).config
    else:
        config = ModelConfig.parse(hub_config(shape))
    return config if layers is None else replace(config, text=replace(config.text, num_layers=layers))


def random_models(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[LanguageModel, VisionTower]:
    """Both models with weights drawn on the device: N(0, 0.02) for matrices, ones for norms."""
    generator = torch.Generator(device).manual_seed(seed)
    language = LanguageModel(config.text, config.tie_word_embeddings, device, dtype)
    tower = VisionTower(config.vision, device, dtype)
    with torch.inference_mode():
        for name, tensor in (*language.parameters().items(), *tower.parameters().items()):
            if "norm" in name or "ln_q" in name:
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, 0.02, generator=generator)
    return language, tower
