"""Which compiled forms of the Triton kernels serving uses, found without a GPU: a program of its own, because kernels
must be decorated for compiling, not for Triton's interpreter. Prints how many forms warm-up makes and which it does
not, as JSON; with ``--cold`` there is no warm-up, with ``--tuned`` launches are as a measurement may choose them. With
``--compile`` it compiles one form of each kernel for a Hopper GPU instead, which needs none, and prints what came out.

Launches are recorded instead of run: the key under which Triton keeps a compiled kernel follows from types, alignment,
divisibility and compile-time constants of the arguments, and from nothing else.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from vlcache_dist import kernels
from vlcache_dist.bench.shapes import random_models
from vlcache_dist.engine.batch import ChunkWork, SpanWork, StepBatch, build_step
from vlcache_dist.engine.graph_shapes import decode_shapes, prefill_shapes
from vlcache_dist.engine.graphs import padded_logits, padding
from vlcache_dist.engine.lazy import Traffic
from vlcache_dist.engine.runner import Runner
from vlcache_dist.kernels import backends
from vlcache_dist.kernels.gpu import attention, checksum, device, extents, gemv, packed, pointwise, rope, swiglu, tuned
from vlcache_dist.kv.arena import Arena
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.model.weights import BUNDLED, Checkpoint
from vlcache_dist.types import SamplingParams

HOPPER = GPUTarget("cuda", 90, 32)
BLOCK, BLOCKS, LAYERS = 128, 24, 3
TRAFFIC = Traffic(max_rows=2304, max_batch=8, max_keys=2048, decodes=True)
Forms = dict[str, set[str]]
FUSED = {"block_m": 64, "block_n": 64, "block_k": 64, "warps": 4, "stages": 3, "persistent": True}
EARLY = {"block_m": 16, "block_n": 64, "warps": 4, "stages": 3, "tma": True, "pdl": True, "early": True}
TUNED = tuned.Choices(EARLY, {(256, 192): (100, FUSED), (320, 128): (300, FUSED)})


class Recorder:
    """From now on every launch is noted, by kernel, and not run."""

    def __init__(self) -> None:
        self.forms: Forms = defaultdict(set)
        self._backend = make_backend(HOPPER)
        self._last: dict[str, Callable[[], CompiledKernel]] = {}
        for module in (attention, checksum, extents, gemv, packed, pointwise, rope, swiglu):
            for function in vars(module).values():
                if isinstance(function, JITFunction):
                    binder = create_function_from_signature(function.signature, function.params, self._backend)
                    function.run = partial(self._note, function, binder)

    def _note(self, function: JITFunction, binder: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bound, key, rest = binder(*args, **options)
        name, form = function.__name__, f"{key} {sorted(rest.items())}"
        if form not in self.forms[name]:
            self.forms[name].add(form)
            self._last[name] = partial(self._compile, function, {**options, "debug": False}, bound, key, rest)

    def _compile(self, function: JITFunction, options: Any, bound: Any, key: Any, rest: Any) -> CompiledKernel:
        options, signature, constants, attributes = function._pack_args(self._backend, options, bound, key, rest)
        source = ASTSource(function, signature, constants, attributes)
        return triton.compile(source, target=HOPPER, options=options.__dict__)

    def compile_each(self) -> dict[str, dict[str, int]]:
        """One form of each kernel, the last one noted, compiled to machine code: bytes of it, and how often the matrix
        units and the bulk copy engine are used."""
        result = {}
        for name, build in self._last.items():
            code = build().asm
            ptx = code["ptx"]
            counts = {"wgmma": ptx.count("wgmma.mma_async"), "tma": ptx.count("cp.async.bulk.tensor")}
            result[name] = {"bytes": len(code["cubin"]), **counts}
        return result


def pretend_hopper() -> None:
    """CPU tensors take the way of CUDA tensors on a Hopper GPU."""
    ours = backends.Triton()
    for module in [m for name, m in sys.modules.items() if name.startswith("vlcache_dist")]:
        for name in ("uses_triton", "supports_pdl", "is_hopper_or_later"):
            if hasattr(module, name):
                setattr(module, name, lambda tensor: True)
    backends._active = lambda q: ours
    kernels.uses_triton = device.is_hopper_or_later


class Site:
    def __init__(self) -> None:
        config = Checkpoint.open(BUNDLED).config
        text = replace(
            config.text, hidden_size=256, intermediate_size=192, num_layers=LAYERS, num_heads=14, num_kv_heads=2,
            mrope_section=(16, 24, 24), vocab_size=1000,
        )  # fmt: skip
        vision = replace(config.vision, hidden_size=320, num_heads=4, intermediate_size=128, depth=2)
        vision = replace(vision, full_attention_blocks=type(vision.full_attention_blocks)([1]))
        self.config = replace(config, text=text, vision=vision)
        self.language, self.tower = random_models(self.config, torch.device("cpu"), torch.bfloat16)
        self.layout = KVLayout(LAYERS, 2, 128, 256, "bfloat16", "random")
        self.arena = Arena(self.layout, 1 << 20, torch.device("cpu"))
        pages = torch.zeros(LAYERS, 2, BLOCKS, BLOCK, 2, 128, dtype=torch.bfloat16)
        self.runner = Runner(self.language, pages, self.arena, graphs=False)
        self.rng = np.random.default_rng(0)

    def step(self) -> StepBatch:
        """Some sequences: decoding, text, fresh and reused pictures with any plan and probes, chunks cut anywhere."""
        rng, chunks = self.rng, []
        for _ in range(int(rng.integers(1, TRAFFIC.max_batch + 1))):
            kind = rng.integers(0, 4)
            start = int(rng.integers(0, 700)) if kind else int(rng.integers(1, 2000))
            length = 1 if kind == 0 else int(rng.choice([2, 5, 17, 40, 130, 400]))
            spans, end = [], start + length
            if kind >= 2:
                tokens = int(rng.choice([4, 30, 256, 900]))
                depths = None
                if kind == 3:
                    depths = np.zeros(tokens, np.int32)
                    for layers in (LAYERS, *rng.integers(1, LAYERS + 1, int(rng.integers(0, 3)))):
                        depths[: int(rng.integers(0, tokens // 2 + 1))] = layers
                    depths[rng.integers(0, tokens, int(rng.integers(0, 5)))] = LAYERS
                base = 8 * int(rng.integers(0, 1000))
                spans.append(SpanWork(start, tokens, depths, kv_base=base, embed_base=0, record_base=base))
                end = start + tokens + length
            positions = np.tile(np.arange(end, dtype=np.int32), (3, 1))
            table = np.resize(np.arange(1, BLOCKS), -(-end // BLOCK))
            sample = bool(rng.random() < 0.8) or kind == 0
            chunks.append(ChunkWork(np.ones(end, np.int64), positions, table, start, end, sample, spans))
        return build_step(chunks, num_layers=LAYERS, block_size=BLOCK, kv_row=256, hidden=256)

    def traffic(self, steps: int) -> None:
        runner, rng = self.runner, self.rng
        for _ in range(steps):
            step = self.step()
            runner.launch(step, [SamplingParams()] * step.num_samples, [0] * step.num_samples)
            slots = rng.integers(0, 2000, int(rng.integers(1, 300)))
            offset = int(rng.choice([0, 24, 1 << 20, 1 << 32]))
            kernels.pack_rows(runner.pages, slots_of(slots), self.arena.tensor, offset)
            kernels.unpack_rows(self.arena.tensor, offset, runner.pages, slots_of(slots))
            kernels.word_sums(self.arena.tensor[8 * len(slots) : 1 << 14].view(torch.int32))
        for shape in (*prefill_shapes(TRAFFIC.max_rows, 8, 2048), *decode_shapes(8, 2048)):
            tensors = padding(shape, runner.pages).tensors
            padded_logits(self.language, tensors, shape, runner.pages, self.arena.tensor)

    def pictures(self, count: int) -> None:
        for _ in range(count):
            grids = [
                (int(t), 2 * int(h), 2 * int(w))
                for t, h, w in zip(*(self.rng.integers(1, most, 3) for most in (3, 14, 14)), strict=True)
            ][: int(self.rng.integers(1, 4))]
            rows = sum(t * h * w for t, h, w in grids)
            self.tower.forward(torch.zeros(rows, self.config.vision.patch_elements, dtype=torch.bfloat16), grids)


def slots_of(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))


def main() -> None:
    site = Site()
    pretend_hopper()
    if "--tuned" in sys.argv:
        tuned.choices = lambda tensor: TUNED
    recorder = Recorder()
    if "--cold" not in sys.argv:
        site.runner.expect(TRAFFIC)
        site.tower.warm_up(0.0)
    ahead = {name: set(keys) for name, keys in recorder.forms.items()}
    if "--compile" in sys.argv:
        print(json.dumps(recorder.compile_each()))
        return
    site.traffic(20)
    site.pictures(8)
    late = {name: sorted(keys - ahead.get(name, set())) for name, keys in recorder.forms.items()}
    print(json.dumps({"ahead": {n: len(k) for n, k in ahead.items()}, "late": {n: k for n, k in late.items() if k}}))


if __name__ == "__main__":
    main()
