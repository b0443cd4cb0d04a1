"""Which launches are fastest on this GPU: attention of one query per sequence, and SwiGLU fused or not.

    python benchmarks/tune.py --json FILE            measure
    python benchmarks/tune.py --json FILE --adopt    and use the choices from now on (in this source tree)

Every candidate is compared with fp32 torch first; one that is wrong, or does not launch, is left out and said. Times
are medians of graph replays. A launch of attention must not be slower than the default in
any case by more than 2 %, and is chosen by the geometric mean over all. Fused SwiGLU is chosen per shape, from the row
count on from which it is ahead of the library's product and the pointwise kernel behind it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from vlcache_dist.bench.device_time import graph_us
from vlcache_dist.kernels.attention import segment_attention_reference
from vlcache_dist.kernels.gpu import attention, swiglu, tuned
from vlcache_dist.kernels.gpu.attention import AttentionConfig
from vlcache_dist.kernels.gpu.swiglu import SwigluConfig
from vlcache_dist.kernels.linear import swiglu_reference

HEADS, KV_HEADS, DIM, BLOCK = 28, 4, attention.TUNED_DIM, attention.TUNED_BLOCK
DTYPE, SCALE = torch.bfloat16, DIM**-0.5
DECODE = ((1, 16_384), (1, 32_768), (1, 2_048), (8, 2_048), (64, 2_048))  #: sequences, keys of each
#: inputs, outputs, bias, rows: the language models of 7B, 3B and 32B, and the vision tower
PRODUCTS = (
    (3584, 18944, False, (1088, 4160, 16448)),
    (1280, 3456, True, (4096, 16384, 65536)),
    (2048, 11008, False, (1088, 4160, 16448)),
    (5120, 27648, False, (1088, 4160, 16448)),
)
SHARED_BYTES = 227 << 10  #: of a multiprocessor
SLOWER, AHEAD, WRONG = 1.02, 0.99, 2e-2
BYTES_APART = 256 << 20  #: that calls of a graph walk through, so that none finds its keys in L2


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate in one case; ``us`` None: it was left out, ``why``."""

    kernel: str
    case: str
    config: dict[str, Any] | None
    us: float | None
    why: str = ""


def attention_candidates() -> list[AttentionConfig]:
    """The default first, then every other combination whose buffers fit."""
    found = [attention.default_config(DTYPE, DIM, 1, BLOCK, True)]
    for block_n, warps, stages, per_sm, early in product((64, 128), (4, 8), (2, 3, 4), (1, 2), (False, True)):
        if stages * 2 * block_n * DIM * DTYPE.itemsize * per_sm <= SHARED_BYTES:
            config = AttentionConfig(16, block_n, warps, stages, True, True, per_sm=per_sm, early=early)
            found += [config] * (config not in found)
    return found


def swiglu_candidates() -> list[SwigluConfig]:
    tiles = ((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (256, 64, 64, 8, 3), (256, 64, 64, 8, 4), (128, 64, 64, 4, 4))
    return [
        SwigluConfig(*tile, persistent, group) for tile in tiles for persistent in (False, True) for group in (8, 16)
    ]


def measured(kernel: str, case: str, config: Any, error: Callable[[], float], us: Callable[[], float]) -> Row:
    """A candidate that is wrong, or does not launch (registers, shared memory), is not timed."""
    shown = None if config is None else asdict(config)
    try:
        wrong = error()
        if not wrong <= WRONG:
            return Row(kernel, case, shown, None, f"relative error {wrong:.2g}")
        return Row(kernel, case, shown, us())
    except (RuntimeError, ValueError, TritonError) as problem:
        return Row(kernel, case, shown, None, f"{type(problem).__name__}: {problem}")


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def measure_attention(sequences: int, keys: int, configs: Iterable[AttentionConfig]) -> list[Row]:
    blocks = keys // BLOCK
    layer_bytes = 2 * sequences * keys * KV_HEADS * DIM * DTYPE.itemsize
    layers = max(2, min(28, -(-BYTES_APART // layer_bytes)))
    pages = torch.randn(layers, 2, sequences * blocks + 1, BLOCK, KV_HEADS, DIM, device="cuda", dtype=DTYPE)
    table = (torch.randperm(sequences * blocks, device="cuda") + 1).view(sequences, blocks).int()
    q = torch.randn(sequences, HEADS, DIM, device="cuda", dtype=DTYPE)
    cu = torch.arange(sequences + 1, device="cuda", dtype=torch.int32)
    kv_len = torch.full((sequences,), keys, device="cuda", dtype=torch.int32)
    rest = (cu, kv_len, table, 1, keys, SCALE)
    want = segment_attention_reference(q.float(), pages[0, 0].float(), pages[0, 1].float(), *rest)

    def call(config: AttentionConfig, layer: int) -> torch.Tensor:
        return attention.segment_attention(q, *pages[layer], *rest, None, True, config=config)

    case = f"{sequences} x {keys}"
    return [
        measured(
            "attention", case, config, lambda c=config: _error(call(c, 0), want),
            lambda c=config: graph_us([lambda n=n: call(c, n) for n in range(layers)]),
        )
        for config in configs
    ]  # fmt: skip


def measure_swiglu(inputs: int, outputs: int, biased: bool, rows: int, configs: Iterable[SwigluConfig]) -> list[Row]:
    """The library's product and ``silu_mul`` first (config None)."""
    from vlcache_dist.kernels import silu_mul

    x = torch.randn(rows, inputs, device="cuda", dtype=DTYPE)
    weight = torch.randn(2 * outputs, inputs, device="cuda", dtype=DTYPE) / inputs**0.5
    bias = torch.randn(2 * outputs, device="cuda", dtype=DTYPE) if biased else None
    few = torch.linspace(0, rows - 1, 128, device="cuda").long()  # all would take the memory of a second product
    want = swiglu_reference(x[few].float(), weight.float(), None if bias is None else bias.float())
    case = f"{inputs} -> {outputs}, {rows} rows"

    def library() -> torch.Tensor:
        return silu_mul(torch.nn.functional.linear(x, weight, bias))

    found = [measured("swiglu", case, None, lambda: _error(library()[few], want), lambda: graph_us([library] * 2, 9))]
    for config in configs:
        fused: Callable[[], torch.Tensor] = lambda c=config: swiglu.swiglu(x, weight, bias, c)  # type: ignore[misc] # noqa: E731
        row = measured(
            "swiglu", case, config, lambda f=fused: _error(f()[few], want), lambda f=fused: graph_us([f] * 2, 9)
        )  # type: ignore[misc]
        found.append(row)
    return found


def choose_attention(rows: list[Row]) -> dict[str, Any] | None:
    """The fields of the best launch; None where the default is. The first row of every case is the default's."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    default = {case: found[0].us for case, found in cases.items()}
    best, least = None, AHEAD
    for config in [row.config for row in next(iter(cases.values()), [])[1:]]:
        times = [next((r.us for r in found if r.config == config), None) for found in cases.values()]
        ratios = [a / b for a, b in zip(times, default.values(), strict=True) if a is not None and b is not None]
        if len(ratios) < len(cases) or max(ratios) > SLOWER:
            continue
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        if mean < least:
            best, least = config, mean
    return best


def choose_swiglu(by_rows: dict[int, list[Row]]) -> tuple[int, dict[str, Any]] | None:
    """(rows from which on it is ahead, fields of the launch); None if the library is ahead at the most rows too."""
    counts = sorted(by_rows, reverse=True)
    library = {n: by_rows[n][0].us for n in counts}
    best: tuple[int, dict[str, Any]] | None = None
    best_us = math.inf
    for row in by_rows[counts[0]][1:]:
        if row.us is None or row.config is None or row.us >= best_us:
            continue
        since = None
        for n in counts:
            ours = next((r.us for r in by_rows[n] if r.config == row.config), None)
            theirs = library[n]
            if ours is None or theirs is None or ours > AHEAD * theirs:
                break
            since = n
        if since is not None:
            best, best_us = (since, row.config), row.us
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--adopt", action="store_true", help="copy the report to where the kernels look for it")
    options = parser.parse_args()
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    report: dict[str, Any] = {"machine": {"gpu": name, "torch": str(torch.__version__)}, "rows": []}
    found: list[Row] = []
    for sequences, keys in DECODE:
        found += measure_attention(sequences, keys, attention_candidates())
    chosen: dict[str, Any] = {"attention": choose_attention(found), "swiglu": []}
    for inputs, outputs, biased, counts in PRODUCTS:
        by_rows: dict[int, list[Row]] = {}
        for rows in sorted(counts, reverse=True):
            by_rows[rows] = measure_swiglu(inputs, outputs, biased, rows, swiglu_candidates())
            found += by_rows[rows]
            torch.cuda.empty_cache()
        if (best := choose_swiglu(by_rows)) is not None:
            chosen["swiglu"].append({"inputs": inputs, "outputs": outputs, "from_rows": best[0], "config": best[1]})
    report |= {"chosen": chosen, "rows": [asdict(row) for row in found]}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(chosen, indent=1))
    if options.adopt:
        tuned.FOLDER.mkdir(exist_ok=True)
        shutil.copy(options.json, tuned.FOLDER / tuned.file_name(name))


if __name__ == "__main__":
    main()
