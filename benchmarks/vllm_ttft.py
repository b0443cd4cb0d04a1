"""vLLM on the same questions: 7B shapes, dummy weights, one image and about 64 text tokens, batch of one.

    python benchmarks/vllm_ttft.py --json FILE [--graph]

Runs where vLLM is installed (0.24 was used). ``cold``: a picture never seen; ``same_image``: it was asked about before,
behind another prefix (vLLM reuses encoder output); ``exact_prefix``: system prompt and picture repeat, the question is
new. ``engine_ms`` is from scheduled to first token, ``wall_ms`` includes the processor. Medians of ``--runs``. vLLM
compiles and captures with ``--graph`` (its default), and runs eagerly without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlcache_dist.bench.shapes import hub_config
from vlcache_dist.model.weights import BUNDLED, resolve

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
WORDS = ("river", "mountain", "house", "garden", "window", "market", "letter", "music", "winter", "summer")
MAX_PIXELS = 16384 * 28 * 28


def model_folder(shape: str) -> Path:
    """Configuration, tokenizer and processor of a shape; the weights are dummies."""
    folder, bundled = Path(tempfile.mkdtemp()), resolve(BUNDLED)
    for name in FILES:
        shutil.copy(bundled / name, folder)
    own = json.loads((bundled / "config.json").read_text())
    config = hub_config(shape) | {name: own[name] for name in SPECIAL if name in own}
    text = own.get("text_config", own)
    config |= {name: text[name] for name in ("bos_token_id", "eos_token_id") if text.get(name) is not None}
    config["vision_token_id"] = config["image_token_id"]
    config["vision_config"]["in_chans"] = 3
    config["rope_scaling"] = {"type": "mrope", **config["rope_scaling"]}
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((bundled / "preprocessor_config.json").read_text())
    processor |= {"max_pixels": MAX_PIXELS, "size": {"shortest_edge": 56 * 56, "longest_edge": MAX_PIXELS}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    video = processor | {"video_processor_type": "Qwen2VLVideoProcessor"}
    video.pop("image_processor_type", None)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


def measure(shape: str, sides: list[int], runs: int, graph: bool) -> dict[str, Any]:
    import torch
    import vllm

    llm = vllm.LLM(
        model=str(model_folder(shape)), load_format="dummy", dtype="bfloat16", max_model_len=20_000,
        max_num_batched_tokens=20_480, gpu_memory_utilization=0.7, limit_mm_per_prompt={"image": 1, "video": 0},
        enforce_eager=not graph, enable_prefix_caching=True, seed=0, disable_log_stats=False, max_num_seqs=8,
    )  # fmt: skip
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    def ask(image: Image.Image, before: str) -> tuple[float, float]:
        prompt = (
            f"<|im_start|>system\n{before}<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
            f"{words(40)}<|im_end|>\n<|im_start|>assistant\n"
        )
        started = time.perf_counter()
        request = [{"prompt": prompt, "multi_modal_data": {"image": image}}]
        output = llm.generate(request, sampling, use_tqdm=False)[0]
        wall = (time.perf_counter() - started) * 1e3
        return wall, (output.metrics.first_token_ts - output.metrics.scheduled_ts) * 1e3

    def new_image(side: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))

    rows = []
    for side in sides:
        took: dict[str, list[tuple[float, float]]] = {"cold": [], "same_image": [], "exact_prefix": []}
        ask(new_image(side), words(12))
        for _ in range(runs):
            image, prefix = new_image(side), words(12)
            took["cold"].append(ask(image, words(12)))
            took["same_image"].append(ask(image, prefix))
            took["exact_prefix"].append(ask(image, prefix))
        row: dict[str, Any] = {"vision_tokens": (side // 28) ** 2}
        for name, pairs in took.items():
            row[f"{name}_wall_ms"], row[f"{name}_engine_ms"] = (statistics.median(c) for c in zip(*pairs, strict=True))
        rows.append(row)
        print({k: round(v, 1) for k, v in row.items()}, flush=True)
    about = {"gpu": torch.cuda.get_device_name(), "torch": str(torch.__version__), "vllm": vllm.__version__}
    return {"machine": about, "shape": shape, "graph": graph, "runs": runs, "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--sides", default="896,1792,3584")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--graph", action="store_true", help="torch.compile and CUDA graphs")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    report = measure(options.shape, [int(n) for n in options.sides.split(",")], options.runs, options.graph)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
