"""Both forms of config.json, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_oracle import draw_config
from transformers import Qwen2_5_VLConfig

from vlcache_dist.errors import CheckpointError, UnsupportedModel
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.weights import resolve

HUB_7B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}


def test_hub_form() -> None:
    config = ModelConfig.parse(HUB_7B)
    assert config.text.num_layers == 28
    assert config.text.head_dim == 128
    assert config.text.mrope_section == (16, 24, 24)
    assert config.text.rope_theta == 1e6
    assert config.vision.tokens_per_second == 2
    assert config.vision.head_dim == 80
    assert config.vision.full_attention_blocks == (7, 15, 23, 31)
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (151645,)
    assert not config.tie_word_embeddings


def test_hub_form_equals_the_nested_form_transformers_makes_of_it(tmp_path: Path) -> None:
    Qwen2_5_VLConfig(**HUB_7B).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in nested
    assert ModelConfig.load(tmp_path) == ModelConfig.parse(HUB_7B)


@pytest.mark.parametrize("seed", range(10))
def test_nested_form_of_drawn_configurations(tmp_path: Path, seed: int) -> None:
    drawn = draw_config(np.random.default_rng(seed))
    drawn.save_pretrained(tmp_path)
    config = ModelConfig.load(tmp_path)
    text, vision = drawn.text_config, drawn.vision_config
    assert config.text.num_kv_heads == text.num_key_value_heads
    assert config.text.rope_theta == text.rope_parameters["rope_theta"]
    assert list(config.text.mrope_section) == text.rope_parameters["mrope_section"]
    assert config.text.rms_norm_eps == text.rms_norm_eps
    assert config.tie_word_embeddings == drawn.tie_word_embeddings
    assert list(config.vision.full_attention_blocks) == vision.fullatt_block_indexes
    assert config.vision.window_size == vision.window_size
    assert config.vision.tokens_per_second == vision.tokens_per_second
    assert config.image_token_id == drawn.image_token_id


def test_values_transformers_leaves_out_have_its_defaults() -> None:
    config, default = ModelConfig.parse({"model_type": "qwen2_5_vl"}), Qwen2_5_VLConfig()
    assert config.text.hidden_size == default.text_config.hidden_size
    assert config.text.num_kv_heads == default.text_config.num_key_value_heads
    assert config.text.rms_norm_eps == default.text_config.rms_norm_eps
    assert config.text.rope_theta == default.text_config.rope_parameters["rope_theta"]
    assert config.text.max_position_embeddings == default.text_config.max_position_embeddings
    assert config.vision.tokens_per_second == default.vision_config.tokens_per_second
    assert config.vision.full_attention_blocks == tuple(default.vision_config.fullatt_block_indexes)
    assert config.vision.rope_theta == default.vision_config.rope_parameters["rope_theta"]
    assert config.video_token_id == default.video_token_id
    assert config.vision_end_token_id == default.vision_end_token_id


def test_generation_config_ends_answers() -> None:
    config = ModelConfig.load(resolve("tiny"))
    assert config.eos_token_ids == (850, 848)
    assert config.dtype == "bfloat16"


def changed(**values: Any) -> dict[str, Any]:
    return json.loads(json.dumps(HUB_7B)) | values


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (changed(use_sliding_window=True), "use_sliding_window true"),
        (changed(layer_types=["full_attention", "sliding_attention"]), "use_sliding_window true"),
        (changed(rope_scaling={"type": "yarn", "factor": 4, "mrope_section": [16, 24, 24]}), "'yarn'"),
        (changed(rope_scaling={"rope_type": "linear", "factor": 2}), "'linear'"),
        (changed(rope_scaling={"type": "mrope", "mrope_section": [16, 24, 25]}), r"\[16, 24, 25\]"),
        (changed(model_type="qwen2_vl"), "'qwen2_vl'"),
        (changed(model_type="qwen3_vl"), "'qwen3_vl'"),
        (changed(architectures=["Qwen2VLForConditionalGeneration"]), "Qwen2VLForConditionalGeneration"),
        (changed(hidden_act="gelu"), "text hidden_act 'gelu'"),
        (changed(vision_config=HUB_7B["vision_config"] | {"hidden_act": "quick_gelu"}), "vision hidden_act"),
        (changed(vision_config=HUB_7B["vision_config"] | {"rope_parameters": {"rope_type": "3d"}}), "'3d'"),
        (changed(vision_config=HUB_7B["vision_config"] | {"patch_size": [14, 16]}), "patch_size"),
        (changed(quantization_config={"quant_method": "awq"}), "quantization_config .'awq'"),
        (changed(torch_dtype="float8_e4m3fn"), "'float8_e4m3fn'"),
        (changed(head_dim=64), "head_dim 64"),
        (changed(num_key_value_heads=3), "num_key_value_heads 3"),
    ],
)
def test_refusals_name_what_they_refuse(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        ModelConfig.parse(config)


def test_refusals_in_the_nested_form(tmp_path: Path) -> None:
    Qwen2_5_VLConfig(**HUB_7B).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    for change, named in (
        ({"use_sliding_window": True}, "sliding"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    ):
        with pytest.raises(UnsupportedModel, match=named):
            ModelConfig.parse(nested | {"text_config": nested["text_config"] | change})


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_unreadable_config(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.load(tmp_path)
