"""Preparing a picture, ours beside transformers': ``python benchmarks/pixels.py --json FILE``. CPU time, anywhere."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlcache_dist.pixels import Cutter, PixelConfig

LIMITS = (56 * 56, 16384 * 28 * 28)


def cpu_ms(call: Callable[[], Any], runs: int) -> float:
    """Median CPU milliseconds of a call."""
    times = []
    for _ in range(runs):
        began = time.process_time()
        call()
        times.append((time.process_time() - began) * 1e3)
    return round(statistics.median(times), 1)


def row(side: int, runs: int, cutter: Cutter, oracle: Qwen2VLImageProcessorPil) -> dict[str, Any]:
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)

    def ours() -> np.ndarray:
        cut, _ = cutter.cut(picture, LIMITS)
        return cutter.values([cut] * 2)

    def theirs() -> np.ndarray:
        size = {"shortest_edge": LIMITS[0], "longest_edge": LIMITS[1]}
        done = oracle(images=[picture], size=size, input_data_format="channels_last", return_tensors="np")
        return np.asarray(done["pixel_values"])

    found = ours()
    return {
        "side": side,
        "vision_tokens": len(found) // 4,
        "equal_bits": bool(np.array_equal(found, theirs())),
        "cpu_ms": cpu_ms(ours, runs),
        "transformers_cpu_ms": cpu_ms(theirs, runs),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", default="448,896,1792,3584")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    folder = Path(str(resources.files("vlcache_dist") / "data" / "tiny"))
    cutter, oracle = Cutter(PixelConfig.read(folder)), Qwen2VLImageProcessorPil.from_pretrained(folder)
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"numpy": np.__version__, "transformers": transformers.__version__},
        "rows": [row(int(side), options.runs, cutter, oracle) for side in options.sides.split(",")],
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    for each in report["rows"]:
        print(each)
