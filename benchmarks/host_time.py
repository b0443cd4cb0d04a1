"""What a warm request costs the host: everything but the forward pass, on a CPU: ``python benchmarks/host_time.py``.

    python benchmarks/host_time.py --json FILE                     this tree
    python benchmarks/host_time.py --against FOLDER --json FILE    and another tree of this project, in turns
    python benchmarks/host_time.py --profile                       where the time goes

From the plan's spelling to the token's event: plan, admission, sources, scheduling, layout of rows, and filling a
graph's inputs. The pass is left out: ``Runner.launch`` pads the step into a graph's arrays, as it does before a replay,
and returns a token. On a GPU this time is exposed, except for what ``sequence.offer`` does while the device computes
(``hidden_ms``).

Weights play no part, so shapes are tiny ones with the layers of 7B. Medians; with ``--against`` the trees take turns in
short processes, so that both see the same machine, and the ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAYERS = 28
BLOCK = 128  #: tokens of a page, as on a GPU
SIZES = (1024, 4096, 16384)
PLANS = ("uniform:2,min=16",)


def shallow(shape: str, layers: int | None) -> Any:
    """The tiny shape with 28 layers and positions for long prompts."""
    from vlcache_dist.bench.shapes import model_config

    config = model_config(shape, layers)
    return replace(config, text=replace(config.text, max_position_embeddings=2 * SIZES[-1]))


class Host:
    """A bench whose passes are not computed."""

    def __init__(self, tokens: int, plan: str) -> None:
        import torch

        from vlcache_dist.bench import ttft
        from vlcache_dist.config import EngineSettings
        from vlcache_dist.engine.engine import new_variant
        from vlcache_dist.engine.graph_shapes import shape_for
        from vlcache_dist.engine.graphs import PaddedStep, pad_step
        from vlcache_dist.types import ObjectKind

        torch.manual_seed(0)
        ttft.model_config = shallow  # type: ignore[assignment]
        ttft.EngineSettings = partial(EngineSettings, block_size=BLOCK)  # type: ignore[assignment, misc]
        self.bench = bench = ttft.Bench("tiny", "cpu", tokens, plan, layers=LAYERS)
        self.image = bench.image(tokens)
        self.hidden_s = 0.0
        block_size = bench.engine.runner.pages.shape[3]
        arrays: dict[Any, PaddedStep] = {}

        class Done:
            def result(self) -> tuple[list[int], list[None]]:
                return [7], [None]

        def launch(step: Any, *_: Any) -> Done:
            shape = shape_for(step)
            if shape is not None:
                if shape not in arrays:
                    arrays[shape] = PaddedStep.empty(shape, block_size)
                pad_step(step, shape, arrays[shape])
            return Done()

        bench.engine.runner.launch = launch  # type: ignore[method-assign, assignment]
        now = time.monotonic()
        for kind, elements in (
            (ObjectKind.KV, bench.layout.kv_elements(self.image.tokens)),
            (ObjectKind.EMBEDDING, bench.layout.embedding_elements(self.image.tokens)),
        ):
            bench.store.commit(bench.store.begin(kind, self.image.key, new_variant(), elements, now))
        self._watch_offers()

    def _watch_offers(self) -> None:
        """Time what is hidden behind the device: hashing of the prompt's blocks."""
        from vlcache_dist.engine.sequence import Sequence

        original = Sequence.offer

        def timed(sequence: Any, *arguments: Any) -> None:
            before = time.perf_counter()
            original(sequence, *arguments)
            self.hidden_s += time.perf_counter() - before

        Sequence.offer = timed  # type: ignore[method-assign]

    def request(self) -> tuple[float, float]:
        """Milliseconds of one warm request: exposed, hidden."""
        from vlcache_dist.reuse.plan import Plan

        bench, self.hidden_s = self.bench, 0.0
        generation = bench._generation([self.image])
        started = time.perf_counter()
        depths = Plan.parse(generation.plan).depths(self.image.tokens, bench.layout.num_layers)
        bench._run([(generation, [bench._reuse(self.image, depths)])])
        total = time.perf_counter() - started
        return (total - self.hidden_s) * 1e3, self.hidden_s * 1e3


def measure(sizes: list[int], runs: int) -> list[dict[str, Any]]:
    rows = []
    for plan in PLANS:
        for size in sizes:
            host = Host(size, plan)
            for _ in range(3):
                host.request()
            times = [host.request() for _ in range(runs)]
            exposed, hidden = (statistics.median(column) for column in zip(*times, strict=True))
            rows.append({"plan": plan, "vision_tokens": host.image.tokens, "exposed_ms": exposed, "hidden_ms": hidden})
    return rows


def in_tree(tree: Path, sizes: list[int], runs: int) -> list[dict[str, Any]]:
    """``measure`` of the package in ``tree``, by this very script."""
    command = [sys.executable, str(Path(__file__).resolve()), "--runs", str(runs), "--sizes", ",".join(map(str, sizes))]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--bare"], env=environment, capture_output=True, text=True, check=True, cwd=tree)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def compare(other: Path, sizes: list[int], runs: int, turns: int) -> list[dict[str, Any]]:
    """Rows with ``before_ms`` (the other tree), ``after_ms`` (this one) and their ratio."""
    trees = {"before": other.resolve(), "after": ROOT}
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in trees}
    for _ in range(turns):
        for name, tree in trees.items():
            found[name].append(in_tree(tree, sizes, runs))
    rows = []
    for index, row in enumerate(found["after"][0]):
        pairs = [
            (before[index]["exposed_ms"], after[index]["exposed_ms"])
            for before, after in zip(found["before"], found["after"], strict=True)
        ]
        rows.append(
            {
                "plan": row["plan"],
                "vision_tokens": row["vision_tokens"],
                "before_ms": statistics.median(b for b, _ in pairs),
                "after_ms": statistics.median(a for _, a in pairs),
                "after_over_before": statistics.median(a / b for b, a in pairs),
                "hidden_ms": statistics.median(turn[index]["hidden_ms"] for turn in found["after"]),
            }
        )
    return rows


def profile(size: int, requests: int) -> None:
    host = Host(size, PLANS[0])
    host.request()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(requests):
        host.request()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(28)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="vision tokens")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--against", type=Path, help="folder of another tree")
    parser.add_argument("--turns", type=int, default=5, help="with --against")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--bare", action="store_true", help="print the rows as JSON and nothing else")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = [int(n) for n in options.sizes.split(",")]
    if options.profile:
        profile(sizes[-1], 300)
        return
    if options.against is None:
        rows = measure(sizes, options.runs)
    else:
        rows = compare(options.against, sizes, options.runs, options.turns)
    if options.bare:
        print(json.dumps(rows))
        return
    import platform

    about = {"machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}}
    for row in rows:
        print(row, flush=True)
    if options.json is not None:
        options.json.write_text(
            json.dumps({**about, "layers": LAYERS, "runs": options.runs, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
