"""How a warm request's cost grows: ``python benchmarks/growth.py --shape 7b --json FILE``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vlcache_dist.bench.growth import REQUESTS, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="256,1024,4096,16384")
    parser.add_argument("--large", type=int, default=4096)
    parser.add_argument("--image", type=int, default=1024, help="tokens of each of several images")
    parser.add_argument("--max-requests", type=int, default=REQUESTS[-1])
    parser.add_argument("--plan", default="uniform:2,min=16")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    sizes = [int(n) for n in options.sizes.split(",")]
    report = run(
        options.shape, options.device, options.plan, options.runs, sizes=sizes, large=options.large,
        image=options.image, max_requests=options.max_requests,
    )  # fmt: skip
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    for part in ("by_image", "by_active_tokens", "by_requests", "by_images"):
        for row in report[part]:
            print(part, {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
