"""Inputs for kernel tests: fresh random values, poison (NaN) everywhere a kernel must not read or must overwrite."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NAN = float("nan")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the 2-norm; NaN where ``got`` holds one."""
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def rounding(dtype: torch.dtype, device: str) -> float:
    """Relative error that one rounding to ``dtype`` explains. Triton's interpreter truncates to bfloat16."""
    return 1e-6 if dtype == torch.float32 else 3e-3 if device == "cuda" else 6e-3


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype).to(device)


@dataclass
class Paged:
    """S segments over pages; slots that hold no key of a segment are ``poison``."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    cu_q: torch.Tensor
    kv_len: torch.Tensor
    block_table: torch.Tensor
    max_q: int
    max_kv: int
    scale: float

    def args(self) -> tuple[object, ...]:
        return (
            self.q, self.k_pages, self.v_pages, self.cu_q, self.kv_len, self.block_table, self.max_q, self.max_kv,
            self.scale,
        )  # fmt: skip

    def want(self) -> torch.Tensor:
        """fp64 result by plain softmax over the keys of each segment, one segment after the other."""
        q, k, v = (x.double().cpu() for x in (self.q, self.k_pages, self.v_pages))
        ratio = q.shape[1] // k.shape[2]
        bounds, table = self.cu_q.tolist(), self.block_table.long().cpu()
        out = []
        for s, keys in enumerate(self.kv_len.tolist()):
            rows = q[bounds[s] : bounds[s + 1]]
            ks = k[table[s]].flatten(0, 1)[:keys].repeat_interleave(ratio, 1)
            vs = v[table[s]].flatten(0, 1)[:keys].repeat_interleave(ratio, 1)
            scores = torch.einsum("qhd,khd->hqk", rows, ks) * self.scale
            seen = torch.arange(keys)[None] <= torch.arange(len(rows))[:, None] + keys - len(rows)
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), vs))
        return torch.cat(out)


def paged(
    segments: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype,
    device: str, generator: torch.Generator, poison: float = NAN, extra_rows: int = 0,
) -> Paged:  # fmt: skip
    """``segments``: (queries, keys) each. The blocks of the segments are shuffled among unused ones."""
    counts = [-(-keys // block_size) for _, keys in segments]
    order = torch.randperm(sum(counts) + 3, generator=generator)
    pages = torch.full((2, len(order), block_size, kv_heads, dim), poison, dtype=torch.float32)
    table = torch.zeros((len(segments), max(counts) + 1), dtype=torch.int32)
    used = 0
    for s, ((_, keys), count) in enumerate(zip(segments, counts, strict=True)):
        mine = order[used : used + count]
        used += count
        table[s, :count] = mine.int()
        slots = (mine[:, None] * block_size + torch.arange(block_size)).flatten()[:keys]
        pages.view(2, -1, kv_heads, dim)[:, slots] = torch.randn((2, keys, kv_heads, dim), generator=generator)
    lengths = torch.tensor([queries for queries, _ in segments])
    cu_q = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
    q = torch.randn((int(lengths.sum()) + extra_rows, heads, dim), generator=generator)
    pages = pages.to(dtype).to(device)
    return Paged(
        q.to(dtype).to(device), pages[0], pages[1], cu_q.to(device),
        torch.tensor([keys for _, keys in segments], dtype=torch.int32, device=device), table.to(device),
        int(lengths.max()), max(keys for _, keys in segments), dim**-0.5,
    )  # fmt: skip


def angles(rows: int, dim: int, device: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand((rows, dim // 2), generator=generator) * 100
    return angle.cos().to(device), angle.sin().to(device)
