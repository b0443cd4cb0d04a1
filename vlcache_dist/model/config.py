"""Qwen2.5-VL's configuration, read from ``config.json`` in either of its two forms.

The hub's form is flat (the language model's values at the top, ``rope_scaling`` beside them); transformers 5 nests them
under ``text_config`` with ``rope_parameters``. Keys that are absent have transformers' defaults, because transformers
leaves defaults out when it writes. Whatever this project does not compute exactly is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcache_dist.errors import CheckpointError, UnsupportedModel

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower. Sizes in pixels: ``patch_size``, ``window_size``; ``full_attention_blocks`` attend over a whole
    frame, the others inside windows."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    full_attention_blocks: tuple[int, ...]
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    tokens_per_second: int = 4
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_elements(self) -> int:
        """Length of one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The language model. ``mrope_section`` counts rotary frequencies; section i takes position axis i % 3."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        """``hidden_size / num_heads`` of the whole model; a shard (``model.parallel``) has fewer heads, as wide."""
        return 2 * sum(self.mrope_section)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything computation depends on. ``dtype`` is the one the checkpoint names; ``eos_token_ids`` end an answer."""

    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    dtype: str
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read ``config.json`` and, for the end-of-answer tokens, ``generation_config.json`` if there is one.

        Raises CheckpointError if a file is missing or is no JSON object, UnsupportedModel for what is refused.
        """
        generation = folder / "generation_config.json"
        return cls.parse(_read_json(folder / "config.json"), _read_json(generation) if generation.exists() else {})

    @classmethod
    def parse(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Build from the parsed JSON files. Raises UnsupportedModel naming the key and the value that is refused."""
        _refuse_other_architectures(config)
        text = config.get("text_config") or config
        vision = config.get("vision_config") or {}
        eos = (generation or {}).get("eos_token_id", text.get("eos_token_id", 151645))
        return cls(
            text=_text(text),
            vision=_vision(vision),
            tie_word_embeddings=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            dtype=_dtype(config, text),
            image_token_id=config.get("image_token_id", 151655),
            video_token_id=config.get("video_token_id", 151656),
            vision_start_token_id=config.get("vision_start_token_id", 151652),
            vision_end_token_id=config.get("vision_end_token_id", 151653),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected")
    return value


def _refuse_other_architectures(config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    if kind != "qwen2_5_vl":
        raise UnsupportedModel(f"model_type {kind!r}: only 'qwen2_5_vl' is supported")
    names = config.get("architectures") or [ARCHITECTURE]
    if ARCHITECTURE not in names:
        raise UnsupportedModel(f"architectures {names!r}: only {ARCHITECTURE!r} is supported")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise UnsupportedModel(f"quantization_config ({method!r}): quantized checkpoints are not supported")


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    named = (source.get(key) for source in (config, text) for key in ("dtype", "torch_dtype"))
    dtype = next((name for name in named if name), "float32")
    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype {dtype!r}: one of {', '.join(DTYPES)} is supported")
    return dtype


def _text(text: Mapping[str, Any]) -> TextConfig:
    layers = text.get("layer_types") or ()
    if text.get("use_sliding_window") or "sliding_attention" in layers:
        raise UnsupportedModel("use_sliding_window true: sliding-window attention is not supported")
    _refuse_activation("text", text)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise UnsupportedModel(f"rope type {kind!r}: only 'default' and 'mrope' are supported")
    heads = text.get("num_attention_heads", 64)
    kv_heads = text.get("num_key_value_heads", 8)
    config = TextConfig(
        vocab_size=text.get("vocab_size", 152064),
        hidden_size=text.get("hidden_size", 8192),
        intermediate_size=text.get("intermediate_size", 29568),
        num_layers=text.get("num_hidden_layers", 80),
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-5)),
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
        mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
        max_position_embeddings=text.get("max_position_embeddings", 32768),
    )
    if config.hidden_size % config.num_heads or config.num_heads % config.num_kv_heads:
        raise UnsupportedModel(
            f"hidden_size {config.hidden_size}, num_attention_heads {config.num_heads} and num_key_value_heads "
            f"{config.num_kv_heads} do not divide"
        )
    head_dim = config.hidden_size // config.num_heads
    if text.get("head_dim") not in (None, head_dim):
        raise UnsupportedModel(f"head_dim {text['head_dim']}: hidden_size / num_attention_heads is expected")
    if config.head_dim != head_dim:
        raise UnsupportedModel(f"mrope_section {list(config.mrope_section)} does not add up to {head_dim // 2}")
    return config


def _vision(vision: Mapping[str, Any]) -> VisionConfig:
    _refuse_activation("vision", vision)
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") != "axial":
        raise UnsupportedModel(f"vision rope type {rope['rope_type']!r}: only 'axial' is supported")
    config = VisionConfig(
        depth=vision.get("depth", 32),
        hidden_size=vision.get("hidden_size", 3584),
        intermediate_size=vision.get("intermediate_size", 3420),
        num_heads=vision.get("num_heads", 16),
        out_hidden_size=vision.get("out_hidden_size", 3584),
        full_attention_blocks=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
        in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
        patch_size=_one("patch_size", vision.get("patch_size", 14)),
        temporal_patch_size=_one("temporal_patch_size", vision.get("temporal_patch_size", 2)),
        spatial_merge_size=vision.get("spatial_merge_size", 2),
        window_size=vision.get("window_size", 112),
        tokens_per_second=vision.get("tokens_per_second", 4),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )
    if config.hidden_size % config.num_heads or config.head_dim % 4:
        raise UnsupportedModel(f"vision hidden_size {config.hidden_size} with num_heads {config.num_heads}")
    return config


def _refuse_activation(part: str, config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"{part} hidden_act {config['hidden_act']!r}: only 'silu' is supported")


def _one(name: str, value: int | Sequence[int]) -> int:
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise UnsupportedModel(f"vision {name} {value!r}: one number is expected")
    return values.pop()
