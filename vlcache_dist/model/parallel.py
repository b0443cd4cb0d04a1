"""One rank's part of the language model under tensor parallelism.

Heads and MLP features are dealt out in contiguous runs: rank r of n has query heads [r Hq/n, (r+1) Hq/n), the KV heads
they attend to, and the same share of the MLP's features. Q, K, V, gate and up projections are split by rows, the output
and down projections by columns, whose partial products are summed over the ranks, twice per layer (Megatron-LM, arXiv
1909.08053). Norms and the token embedding are whole on every rank; the output head only on rank 0, which draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlcache_dist.errors import ConfigError
from vlcache_dist.model.config import TextConfig
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.weights import Checkpoint

ROWS = tuple(f"{name}_proj.{part}" for name in ("q", "k", "v", "gate", "up") for part in ("weight", "bias"))
COLUMNS = ("o_proj.weight", "down_proj.weight")

AllReduce = Callable[[torch.Tensor], torch.Tensor]  #: sums over all ranks, in place, on the current stream


@dataclass(frozen=True, slots=True)
class Shard:
    """``rank`` of ``size``."""

    rank: int
    size: int

    def part(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Which part of a checkpoint's tensor of this name and shape the rank keeps."""
        whole = (slice(None),) * len(shape)
        if name.endswith(ROWS):
            return (self._run(shape[0]), *whole[1:])
        if name.endswith(COLUMNS):
            return (whole[0], self._run(shape[1]))
        return whole

    def elements(self, name: str, shape: tuple[int, ...]) -> int:
        """How many elements of it that is."""
        split = name.endswith(ROWS) or name.endswith(COLUMNS)
        return math.prod(shape) // (self.size if split else 1)

    def _run(self, count: int) -> slice:
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


def shard_config(config: TextConfig, size: int) -> TextConfig:
    """The shape of one of ``size`` shards: fewer heads and features, all layers, the whole hidden state. Raises
    ConfigError if heads or features cannot be dealt out evenly."""
    if size < 1 or config.num_kv_heads % size or config.num_heads % size or config.intermediate_size % size:
        shares = [n for n in range(1, config.num_kv_heads + 1) if _divides(config, n)]
        raise ConfigError(
            f"engine.tensor_parallel = {size}: it must divide the model's {config.num_kv_heads} KV heads, "
            f"{config.num_heads} query heads and {config.intermediate_size} MLP features; "
            f"choose one of {', '.join(map(str, shares))}"
        )
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


def _divides(config: TextConfig, size: int) -> bool:
    return not (config.num_kv_heads % size or config.num_heads % size or config.intermediate_size % size)


class LanguageShard(LanguageModel):
    """Weights are uninitialized until ``fill`` or ``load_shard``. ``config`` is the whole model's; ``self.config`` the
    shard's. Every rank must run the same batches in the same order."""

    def __init__(
        self,
        config: TextConfig,
        tied: bool,
        shard: Shard,
        all_reduce: AllReduce,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        """Raises ConfigError as ``shard_config``."""
        headless = tied or shard.rank > 0  # then no memory is taken for an output head
        super().__init__(shard_config(config, shard.size), headless, device, dtype)
        self.shard = shard
        self._all_reduce = all_reduce

    def reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """See ``LanguageModel.reduce``: in place."""
        return self._all_reduce(partial)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """As ``LanguageModel.logits`` on rank 0; elsewhere zeros [n, 1] of no meaning: there is no output head."""
        return super().logits(x) if self.shard.rank == 0 else x.new_zeros((len(x), 1), dtype=torch.float32)

    def fill(self, name: str, whole: torch.Tensor) -> None:
        """Take this rank's part of a tensor that the whole model would hold as ``name``."""
        mine = self.parameters().get(name)
        if mine is not None:
            with torch.inference_mode():
                mine.copy_(whole[self.shard.part(name, tuple(whole.shape))])


def load_shard(
    checkpoint: Checkpoint, shard: Shard, all_reduce: AllReduce, device: torch.device | str, dtype: torch.dtype
) -> LanguageShard:
    """A rank's weights, converted to ``dtype``; only its own parts are read from the files. Raises ConfigError."""
    config = checkpoint.config
    model = LanguageShard(config.text, config.tie_word_embeddings, shard, all_reduce, device, dtype)
    parameters = model.parameters()
    with torch.inference_mode():
        for name, stored, part in _parts(checkpoint, shard, parameters):
            parameters[name].copy_(stored[part].to(device))
    return model


def _parts(checkpoint: Checkpoint, shard: Shard, names: Iterable[str]) -> Iterator[tuple[str, Any, tuple[slice, ...]]]:
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(checkpoint.tensors[name].file, []).append(name)
    for path, members in by_file.items():
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in members:
                stored = checkpoint.tensors[name]
                yield name, file.get_slice(stored.name), shard.part(name, stored.shape)
