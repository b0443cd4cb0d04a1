"""Time to first token over HTTP on two devices, with a decode worker and without (``vlcache_dist.bench.http_ttft``).

python benchmarks/http_ttft.py --shape 7b --json FILE
python benchmarks/http_ttft.py --shape tiny --device cpu --vision-tokens 64 --json FILE     # a rehearsal
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from vlcache_dist.bench.checkpoint import write_random
from vlcache_dist.bench.http_ttft import Client, measure, picture
from vlcache_dist.bench.two_devices import DEVICES, Report, free_port, machine, two_nodes
from vlcache_dist.config import Settings

LAYOUTS = {"disaggregated": {"prefills": 2, "decodes": 1}, "colocated": {"prefills": 2, "decodes": 0}}
GIB = 1 << 30


def settings(layout: str, model: Path, device: str, port: int, address: str, longest: int) -> Settings:
    """Of a deployment whose prompts have up to ``longest`` tokens."""
    engine = {"kv_bytes": 6 * GIB, "store_bytes": 16 * GIB} if device == "cuda" else {"kv_bytes": 64 << 20}
    return Settings.of(
        model={"model": str(model), "served_name": "random", "device": device, "max_model_len": longest},
        engine={"store_bytes": 128 << 20, "plan": "uniform:2,min=16", **engine},
        serve={
            **LAYOUTS[layout],
            "encoders": DEVICES,
            "port": port,
            "address": address,
            "pool_resources": True,
            "gpus_per_worker": 0.33 if device == "cuda" else 0.0,
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b", help="7b, 3b or tiny")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--layout", action="append", choices=list(LAYOUTS), help="repeatable [default: all]")
    parser.add_argument("--vision-tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--pictures", type=int, default=8, help="of each size")
    parser.add_argument("--runs", type=int, default=15, help="local hits of each size")
    parser.add_argument("--checkpoint", type=Path, help="folder of the random checkpoint; kept for the next run")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    began = time.monotonic()
    about: dict[str, Any] = {"machine": machine(given.device), "shape": given.shape, "weights": "random"}
    report = Report(given.json, about)
    sizes, longest = given.vision_tokens, max(given.vision_tokens) + 512
    with tempfile.TemporaryDirectory() as temporary:
        model = given.checkpoint or Path(temporary) / "checkpoint"
        writer = multiprocessing.get_context("spawn").Process(
            target=write_random, args=(model, given.shape, given.device)
        )
        if not (model / "model.safetensors.index.json").exists():
            writer.start()
        with two_nodes(given.device) as address:
            count = given.pictures + 2  # two are for warming up
            with ThreadPoolExecutor() as threads:
                drawn = {n: list(threads.map(lambda seed, n=n: picture(n, seed), range(n, n + count))) for n in sizes}
            if writer.pid is not None:
                writer.join()
                if writer.exitcode:
                    return 1
            print(f"prepared in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            for layout in given.layout or list(LAYOUTS):
                config = settings(layout, model, given.device, free_port(), address, longest)
                try:
                    run(layout, config, drawn, given.runs, report, began)
                except Exception as error:
                    report.fail(layout, error)
    report.contents["wall_s"] = round(time.monotonic() - began, 1)
    report.write()
    return 1 if report.contents["errors"] else 0


def run(layout: str, config: Settings, drawn: dict[int, list[bytes]], runs: int, report: Report, began: float) -> None:
    """One deployment: started, warmed up on pictures that are not used again, measured, stopped."""
    from vlcache_dist.serve.cluster import running

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s {layout}: {text}", file=sys.stderr, flush=True)

    with running(config, ready_s=150.0, say=say) as url:
        status = httpx.get(f"{url}/status", timeout=30.0).raise_for_status().json()
        workers = sorted(w["name"] for w in status["workers"] if w["role"] in ("prefill", "colocated"))
        client = Client(url, config.model.served_name or "")
        try:
            for tokens, pictures in drawn.items():
                for names in (workers, workers[::-1]):
                    measure(client, names, tokens, pictures[:2] if names is workers else pictures[1:2], 4)
                say(f"{tokens} tokens: warm")
                for row in measure(client, workers, tokens, pictures[2:], runs):
                    report.add([{"layout": layout, **row, "jpeg_bytes": len(pictures[2])}])
                    say(f"{tokens} {row['kind']}: TTFT {row['ttft_ms']:.1f} ms, second {row['second_ms']:.1f} ms")
        finally:
            client.close()


if __name__ == "__main__":
    sys.exit(main())
