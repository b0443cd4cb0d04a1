"""The same engine on one GPU and on several, and shard-to-shard READs; random weights.

    python benchmarks/tensor_parallel.py --shape 7b --json FILE                  2 GPUs
    python benchmarks/tensor_parallel.py --shape 32b --ranks 2 --json FILE       weights that one GPU may not hold
    python benchmarks/tensor_parallel.py --device cpu --shape tiny --vision-tokens 64 --json FILE

``vlcache_dist.bench.tensor_parallel`` says what the figures are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlcache_dist.bench.tensor_parallel import READ_BYTES, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cpu, or the first GPU")
    parser.add_argument("--shape", default="7b", help="tiny, 3b, 7b, 32b or 72b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to measure")
    parser.add_argument("--vision-tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--plan", default="uniform:2,min=16")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64], help="sequences of a decode step")
    parser.add_argument("--graphs", action="store_true", help="sharded engines with CUDA graphs, too")
    parser.add_argument("--read-bytes", type=int, nargs="+", default=READ_BYTES, help="of one shard, multiples of 256")
    parser.add_argument("--json", type=Path, required=True, help="write the report here")
    options = parser.parse_args()

    def save(report: dict[str, Any]) -> None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(dict([list(report.items())[-1]])), flush=True)

    run(
        options.shape,
        options.device,
        options.ranks,
        options.vision_tokens,
        options.plan,
        options.runs,
        options.batches,
        options.graphs,
        options.read_bytes,
        save,
    )
