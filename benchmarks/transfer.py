"""How fast one process reads another's arena through NIXL, beside a plain copy of the same bytes.

    python benchmarks/transfer.py --json FILE                      CPU memory, both processes on this machine
    python benchmarks/transfer.py --device cuda --json FILE        GPU 0 reads GPU 1's memory; peer copy in the same run

The same as ``vlcache-dist bench transfer``, without the command line's dependencies; ``vlcache_dist.bench.transfer``
says what the figures are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vlcache_dist.bench.transfer import SIZES, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="write the report here")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes, multiples of 8")
    parser.add_argument("--seconds", type=float, default=1.0, help="per size and kind of copy")
    options = parser.parse_args()
    report = run(options.device, sorted(options.sizes), options.seconds)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["rows"]:
        print(row)
