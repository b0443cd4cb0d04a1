"""A checkpoint of a model's shapes with random weights, in the hub's format: what whole deployments are measured with.

The tokenizer is the bundled one. Rows of the output head that do not belong to one of its printable ASCII tokens are
zero, so that greedy answers are text of exactly ``max_tokens`` tokens and every token can be shown to a client at once;
this changes no shape and no amount of work.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from vlcache_dist.bench.shapes import hub_config, random_models
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.weights import BUNDLED, resolve

SHARD_BYTES = 4 << 30
MAX_PIXELS = 12_845_056  #: 16,384 vision tokens, as in the published checkpoints
_TOKENS = ("bos_token_id", "eos_token_id", "image_token_id", "video_token_id")
_TOKENS_OF_VISION = ("vision_start_token_id", "vision_end_token_id")


def write_random(folder: Path, shape: str, device: str, dtype: str = "bfloat16", seed: int = 0) -> None:
    """Write ``config.json``, tokenizer, processor and weights drawn on ``device`` into ``folder``, which is made.
    ``shape`` as in ``hub_config``, or ``tiny``. Raises ConfigError for an unknown shape."""
    bundled = resolve(BUNDLED)
    config = _config(shape, bundled)
    folder.mkdir(parents=True, exist_ok=True)
    for path in bundled.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.startswith(("config", "model", "preprocessor")):
            shutil.copy(path, folder / path.name)
    processor = json.loads((bundled / "preprocessor_config.json").read_text())
    processor["max_pixels"] = processor["size"]["longest_edge"] = MAX_PIXELS
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    language, tower = random_models(ModelConfig.parse(config), torch.device(device), getattr(torch, dtype), seed)
    weights = language.parameters() | tower.parameters()
    head = weights.get("lm_head.weight", weights["model.language_model.embed_tokens.weight"])
    with torch.inference_mode():
        said = printable(bundled)
        kept = head[said].clone()
        head.zero_()
        head[said] = kept
    _write_shards(folder, weights)


def printable(folder: Path) -> list[int]:
    """Ids of the tokens that are printable ASCII text by themselves."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = ((token, tokenizer.decode([token])) for token in range(tokenizer.get_vocab_size()))
    return [token for token, text in texts if text and text.isascii() and text.isprintable()]


def _config(shape: str, bundled: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((bundled / "config.json").read_text())
    if shape == BUNDLED:
        return known
    tokens = {**known["text_config"], **known}
    return {**hub_config(shape), **{name: tokens[name] for name in (*_TOKENS, *_TOKENS_OF_VISION)}}


def _write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    shards = list(_shards(weights))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    contents = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(contents, indent=1))


def _shards(weights: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names, in groups of at most ``SHARD_BYTES``, and at least one."""
    names: list[str] = []
    size = 0
    for name, tensor in weights.items():
        taken = tensor.numel() * tensor.element_size()
        if names and size + taken > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += taken
    yield names
