"""From a picture's bytes to the first token, through ``vlcache_dist.LLM``: decoding, resizing, tokenizing included.

    python benchmarks/end_to_end.py --shape 7b --folder /tmp/random-7b --json FILE

Writes a checkpoint of random weights (with the tokenizer of the bundled model) unless the folder has one, and says how
long loading it from the page cache takes. Pictures are JPEGs whose pixels nobody has seen before (cold) or that were
asked about before (warm), every time behind a new prefix. Milliseconds, medians.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from vlcache_dist.bench.shapes import hub_config, model_config, random_models
from vlcache_dist.bench.ttft import machine, median
from vlcache_dist.config import EngineSettings
from vlcache_dist.llm import LLM
from vlcache_dist.model.weights import BUNDLED, Checkpoint, resolve
from vlcache_dist.types import SamplingParams

PROCESSOR = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
SHARD_BYTES = 4 << 30
MAX_PIXELS = 16384 * 28 * 28
WORDS = ("river", "mountain", "house", "garden", "window", "market", "letter", "music", "winter", "summer")


def write_checkpoint(shape: str, folder: Path, device: str) -> None:
    """Random weights of a shape in the hub's format, shards as they are on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    bundled = resolve(BUNDLED)
    for name in PROCESSOR:
        shutil.copy(bundled / name, folder)
    processor = json.loads((bundled / "preprocessor_config.json").read_text())
    processor |= {"max_pixels": MAX_PIXELS, "size": {"shortest_edge": 56 * 56, "longest_edge": MAX_PIXELS}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    ids = json.loads((bundled / "config.json").read_text())
    config = hub_config(shape) | {name: ids[name] for name in TOKENS if name in ids}
    (folder / "config.json").write_text(json.dumps(config))
    models = random_models(model_config(shape), torch.device(device), torch.bfloat16)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in (*models[0].parameters().items(), *models[1].parameters().items()):
        if sum(t.nbytes for t in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor.contiguous().cpu()
    index = {}
    for number, shard in enumerate(shards):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def load_s(folder: Path, device: str, runs: int) -> list[float]:
    """Seconds from the files to weights on the device, both models; the files lie in the page cache."""
    took = []
    for _ in range(runs):
        started = time.perf_counter()
        checkpoint = Checkpoint.open(str(folder))
        models = (
            checkpoint.load_language_model(device, torch.bfloat16),
            checkpoint.load_vision_tower(device, torch.bfloat16),
        )
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
        del models
    return took


def picture(rng: np.random.Generator, side: int) -> str:
    """A JPEG of ``side`` x ``side`` as a data URL: smooth areas and edges, so that its size is a photograph's."""
    small = Image.fromarray(rng.integers(0, 255, (side // 16, side // 16, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def run(folder: Path, device: str, sides: list[int], runs: int) -> list[dict[str, Any]]:
    llm = LLM(str(folder), device, max_model_len=20_000, engine=EngineSettings(store_bytes=8 << 30, kv_bytes=4 << 30))
    rng = np.random.default_rng(0)
    once = SamplingParams(max_tokens=1, ignore_eos=True)

    def ask(url: str, **options: Any) -> float:
        before, after = (" ".join(rng.choice(WORDS, 20)) for _ in range(2))
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": after}]
        messages = [{"role": "system", "content": before}, {"role": "user", "content": content}]
        started = time.perf_counter()
        llm.chat(messages, once, **options)
        return (time.perf_counter() - started) * 1e3

    rows = []
    for side in sides:
        url = picture(rng, side)
        cold: Callable[[], float] = lambda side=side: ask(picture(rng, side), plan="uniform:2,min=16")  # type: ignore[misc] # noqa: E731
        cold_ms = median(cold, max(3, runs // 2))
        ask(url, plan="uniform:2,min=16")
        warm_ms = median(lambda url=url: ask(url, plan="uniform:2,min=16"), runs)  # type: ignore[misc]
        rows.append({"side": side, "picture_bytes": len(url) * 3 // 4, "cold_ms": cold_ms, "warm_ms": warm_ms})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sides", default="896,1792,3584")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if not (options.folder / "model.safetensors.index.json").exists():
        write_checkpoint(options.shape, options.folder, options.device)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    report: dict[str, Any] = {"machine": machine(options.device), "shape": options.shape}
    report["load_s"] = load_s(options.folder, options.device, 3)
    print("load", report["load_s"], flush=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    report["rows"] = run(options.folder, options.device, [int(n) for n in options.sides.split(",")], options.runs)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
