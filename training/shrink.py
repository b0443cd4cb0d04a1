"""A smaller model that starts where a larger one is: ``python -m training.shrink --teacher FOLDER --out FOLDER``.

Circuits that find things in a picture ("what stands right of this label") take most of a training from nothing to form,
and they live in attention. So depth, width and attention are kept as they are; what shrinks is the MLPs, of both the
language model and the vision tower: the neurons that matter most are kept (scored as weights are in Wanda,
arXiv 2306.11695: by the norm of what they carry times the norm of what they write), and what they write is fitted anew
to what all of them wrote (least squares over real dialogues).

What comes out is a start for ``training.train --start``.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from training.batches import Batch, Encoder, stream
from training.export import TEMPLATE, export, fresh_model
from training.network import Weights, atlas, forward

BATCHES = 32  #: of dialogues that the fit sees
DAMPING = 1e-6  #: of the fit, in units of the mean squared activation
HARDNESS = (0.0, 0.3, 0.6, 1.0)


def load(folder: Path) -> Any:
    """transformers' Qwen2.5-VL of a checkpoint folder, fp32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def parts(named: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[Weights, Weights]:
    """Vision tower's and language model's parameters by name, in the compute dtype; the embedding as it is."""
    cast = {n: p if "embed_tokens" in n else p.to(dtype) for n, p in named.items() if n != "lm_head.weight"}
    found = []
    for prefix in ("model.visual.", "model.language_model."):
        found.append({n.removeprefix(prefix): p for n, p in cast.items() if n.startswith(prefix)})
    return found[0], found[1]


def dialogues(encoder: Encoder, tokens: int, seed: int) -> Iterator[Batch]:
    """Batches of every hardness."""
    sources = [stream(encoder, seed + number, tokens, hardness) for number, hardness in enumerate(HARDNESS)]
    chance = random.Random(seed)
    while True:
        yield next(chance.choice(sources))


class Neurons:
    """Moments of what every MLP of ``model`` carries between its two halves: the second, [neurons, neurons], and the
    mean, [neurons], by the name of the matrix that writes."""

    def __init__(self, model: Any) -> None:
        named = dict(model.named_parameters())
        self.down = {n: p.detach() for n, p in named.items() if n.endswith("mlp.down_proj.weight")}
        self.second = {n: torch.zeros(p.shape[1], p.shape[1], dtype=torch.float64) for n, p in self.down.items()}
        self.mean = {n: torch.zeros(p.shape[1], dtype=torch.float64) for n, p in self.down.items()}
        self.rows = dict.fromkeys(self.down, 0)
        self._config, (self._vision, self._language) = model.config, parts(named, torch.float32)
        self._names = {p.data_ptr(): n for n, p in self.down.items()}

    @torch.no_grad()
    def watch(self, batch: Batch, sprites: torch.Tensor) -> None:
        """Run the model over a batch."""
        linear = F.linear

        def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            if (name := self._names.get(weight.data_ptr())) is not None:
                seen = x.flatten(0, -2).double()
                self.second[name].addmm_(seen.T, seen)
                self.mean[name] += seen.sum(0)
                self.rows[name] += len(seen)
            return linear(x, weight, bias)

        F.linear = watched
        try:
            forward(self._config, self._vision, self._language, batch, sprites)
        finally:
            F.linear = linear

    def kept(self, name: str, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """The neurons to keep [count]; the weights [hidden, count] by which they write what all wrote, and what is to
        be added to a bias [hidden] for it; and what share of the MLP's output, in squares, is lost."""
        second, mean = self.second[name] / self.rows[name], self.mean[name] / self.rows[name]
        down = self.down[name].double()
        score = second.diagonal().sqrt() * down.norm(dim=0)
        chosen = score.topk(count).indices.sort().values
        has_bias = name.startswith("model.visual.")
        centre = torch.outer(mean, mean) if has_bias else torch.zeros_like(second)
        spread = second - centre
        among = spread[chosen][:, chosen]
        damped = among + DAMPING * among.diagonal().mean() * torch.eye(count, dtype=torch.float64)
        fitted = torch.linalg.solve(damped, spread[chosen] @ down.T).T
        shift = down @ mean - fitted @ mean[chosen] if has_bias else torch.zeros(len(down), dtype=torch.float64)
        lost = ((down @ spread) * down).sum() - 2 * ((fitted @ spread[chosen]) * down).sum()
        lost += ((fitted @ among) * fitted).sum()
        return chosen, fitted, shift, float(lost / ((down @ second) * down).sum())


@torch.no_grad()
def shrink(teacher: Any, student: Any, batches: Iterator[Batch], say: Any = print) -> None:
    """Copy ``teacher`` into ``student``, a model of the same shapes but for its MLPs, in place."""
    neurons, sprites = Neurons(teacher), atlas()
    for _ in range(BATCHES):
        neurons.watch(next(batches), sprites)
    theirs = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        if ".mlp." not in name or "merger" in name:
            p.copy_(theirs[name])
    mine = dict(student.named_parameters())
    for name in neurons.down:
        prefix = name.removesuffix("down_proj.weight")
        chosen, fitted, shift, lost = neurons.kept(name, mine[name].shape[1])
        mine[name].copy_(fitted)
        for half in ("gate_proj.", "up_proj."):
            mine[f"{prefix}{half}weight"].copy_(theirs[f"{prefix}{half}weight"][chosen])
            if f"{prefix}{half}bias" in mine:
                mine[f"{prefix}{half}bias"].copy_(theirs[f"{prefix}{half}bias"][chosen])
        if f"{prefix}down_proj.bias" in mine:
            mine[f"{prefix}down_proj.bias"].copy_(theirs[f"{prefix}down_proj.bias"] + shift)
        say(f"{prefix}: {len(chosen)} of {neurons.down[name].shape[1]} neurons, {lost:.2%} of the output is lost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=TEMPLATE, help="checkpoint folder of the larger model")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.manual_seed(1)
    encoder = Encoder(TEMPLATE / "tokenizer.json")
    student = fresh_model(encoder)
    shrink(load(a.teacher), student, dialogues(encoder, 4096, 11))
    export(student, a.out)


if __name__ == "__main__":
    main()
