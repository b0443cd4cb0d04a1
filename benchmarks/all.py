"""Everything that is measured on a GPU machine, in one command, most valuable first; ends with the table of targets.

    python benchmarks/all.py --out DIR                            all that this machine's GPUs allow
    python benchmarks/all.py --out DIR --minutes 9                as much as fits; the next call goes on
    python benchmarks/all.py --out DIR --only ttft,stalls         these parts
    python benchmarks/all.py --out benchmarks/results --table     the table alone, of reports that are there
    python benchmarks/all.py --out DIR --shape tiny --device cpu  a rehearsal anywhere

Each part is a process with a time limit, and its failure is its own. DIR/<report>.json exists once a part has
succeeded, under the name by which the documentation refers to it; DIR/logs has what parts printed, DIR/partial what
unfinished ones wrote. Ends with status 1 if a part failed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from vlcache_dist.bench.campaign import Campaign, Part  # noqa: E402
from vlcache_dist.bench.parts import parts, rehearsal  # noqa: E402
from vlcache_dist.bench.targets import table, verdicts  # noqa: E402


def devices() -> tuple[str, int]:
    """Short name of the GPUs (h200 of NVIDIA H200), and how many there are."""
    import torch

    count = torch.cuda.device_count()
    name = torch.cuda.get_device_name(0).lower().split() if count else ["none"]
    return next((word for word in name if any(c.isdigit() for c in word)), name[-1]), count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the reports go")
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: rehearse with shape tiny")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for all parts together")
    parser.add_argument("--only", default="", help="names of parts, separated by commas")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "vlcache-benchmarks")
    parser.add_argument("--list", action="store_true", help="say what would be run, and stop")
    parser.add_argument("--table", action="store_true", help="only the table of targets")
    parser.add_argument("--gpu", default="h200", help="with --table: the GPUs' name in the reports' names")
    options = parser.parse_args()
    if options.device == "cpu" and options.shape != "tiny":
        parser.error("only --shape tiny is rehearsed on a CPU")
    if options.table:
        print(table(verdicts(options.out, options.gpu)))
        return 0
    gpu, count = ("cpu", 0) if options.device == "cpu" else devices()
    chosen = rehearsal() if options.device == "cpu" else parts(options.shape, gpu, count)
    wanted = set(filter(None, options.only.split(",")))
    if unknown := wanted - {part.name for part in chosen}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in chosen)}")
    chosen = [part for part in chosen if not wanted or part.name in wanted]
    if options.list:
        for part in chosen:
            print(_line(part))
        return 0
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    folder = options.out.resolve()
    campaign = Campaign(folder, options.scratch.resolve(), None if options.device == "cpu" else count, path)
    outcomes = campaign.run(chosen, options.minutes * 60)
    if options.device == "cuda":
        print(table(verdicts(folder, gpu)), flush=True)
    for outcome in outcomes:
        if outcome.state in ("failed", "timed out"):
            print(f"\n{outcome.name}: {outcome.state}\n{outcome.why}", flush=True)
    return int(any(outcome.state in ("failed", "timed out") for outcome in outcomes))


def _line(part: Part) -> str:
    needs = f"{part.gpus} GPU{'s' * (part.gpus > 1)}" + "".join(f", {name}" for name in (*part.modules, *part.programs))
    return f"{part.name:22} {part.limit_s:4.0f} s at most, {needs:14} -> {part.file}"


if __name__ == "__main__":
    sys.exit(main())
