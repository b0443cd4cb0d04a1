"""A checkpoint folder in the hub's format, from a model under training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from training.batches import Encoder

TEMPLATE = Path(__file__).parents[1] / "vlcache_dist" / "data" / "tiny"  #: tokenizer, chat template, preprocessing
MAX_BYTES = 12 << 20
_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_DAMPED = ("o_proj.weight", "down_proj.weight", "attn.proj.weight")  # what writes into the residual stream


def fresh_model(encoder: Encoder) -> Any:
    """transformers' Qwen2.5-VL, 6.1 M parameters, with random weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    template = json.loads((TEMPLATE / "config.json").read_text())
    text, vision = template["text_config"], template["vision_config"]
    text.update(num_hidden_layers=10, intermediate_size=192, layer_types=["full_attention"] * 10)
    vision.update(depth=5, hidden_size=192, num_heads=6, intermediate_size=256, fullatt_block_indexes=[2, 4])
    ids = {"image_token_id": encoder.image_pad, "vision_start_token_id": encoder.vision_start}
    more = {k: template[k] for k in ("video_token_id", "vision_end_token_id", "tie_word_embeddings")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids, **more)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name:
                p.normal_(0, (0.3 if name.endswith(_DAMPED) else 1.0) / math.sqrt(p[0].numel()))
    return model.float()


def export(model: Any, folder: Path) -> None:
    """bf16 weights and everything beside them. Raises ValueError if the folder is larger than ``MAX_BYTES``."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: p.detach().to(torch.bfloat16).contiguous().cpu()
        for name, p in model.named_parameters()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=True))
    config.update(architectures=["Qwen2_5_VLForConditionalGeneration"], dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in _FILES:
        shutil.copy(TEMPLATE / name, folder / name)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MAX_BYTES:
        raise ValueError(f"{folder}: {size / 2**20:.2f} MiB, more than {MAX_BYTES >> 20}")
