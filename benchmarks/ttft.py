"""Time to first token, cold and warm, beside transformers: ``python benchmarks/ttft.py --shape 7b --json FILE``.

The same as ``vlcache-dist bench ttft``, without the command line's dependencies.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vlcache_dist.bench.ttft import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vision-tokens", default="1024,4096,16384")
    parser.add_argument("--plan", default="uniform:2,min=16")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    tokens = [int(n) for n in options.vision_tokens.split(",")]
    report = run(
        options.shape, options.device, tokens, options.plan, options.runs, with_transformers=not options.no_transformers
    )
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["rows"] + report.get("decode", []):
        print(row)
