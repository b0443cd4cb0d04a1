"""Train the bundled model from nothing: ``python -m training.train --out FOLDER --minutes 20``.

Everything is drawn on the fly: scenes by worker processes, pixels on the device. The time limit is the schedule
(warm-up, constant rate, decay over the last 40 %; data that get harder until 45 %), so half the speed gives a worse
model, not a longer run. A model is *young* while the data get harder: it is asked to read whole pictures, every token
of an answer counts the same, and auxiliary readers show the way. Then every answer counts the same.
``FOLDER/state.pt`` is written every two minutes and taken up by the same command; ``FOLDER/best`` is the checkpoint
with the best validation so far, and only that is exported.

``--start CHECKPOINT`` goes on from a model that can see and find already (``training.shrink``, an earlier release):
grown from the first step, and with ``--frozen-tower`` only the language model learns.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from training.batches import AUX_CLASSES, PLACE_CLASSES, SIZES, Batch, Encoder, stream, validation
from training.export import TEMPLATE, export, fresh_model
from training.network import EAGER, Blocks, Weights, atlas, forward
from training.shrink import load, parts
from training.step import Step
from training.tasks import Grid

SAVE_S = 120.0
WARM_UP, DECAY_FROM = 300, 0.6
GROWN_AT = 0.45  #: of the time
AUX_WEIGHT, PLACE_WEIGHT = 0.5, 0.3


@dataclass(slots=True)
class Schedule:
    """``progress`` in [0, 1] of the time, over all runs of this folder."""

    seconds: float
    rate: float
    before: float = 0.0
    started: float = 0.0

    @property
    def progress(self) -> float:
        return min(1.0, (self.before + time.monotonic() - self.started) / self.seconds)

    def learning_rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / WARM_UP)
        return self.rate * warm * min(1.0, max(0.005, (1 - self.progress) / (1 - DECAY_FROM)))


def by_answer(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross entropy in which every answer counts the same, however long: who can read whole rows already learns most
    from the short answers that are still wrong."""
    learnt = batch.target >= 0
    # Sizes of the batch's shape alone: the step may be a CUDA graph.
    length = torch.zeros(len(learnt) + 1, device=logits.device).scatter_add_(0, batch.answer, learnt.float())
    weight = learnt / length[batch.answer].clamp(min=1)
    each = F.cross_entropy(logits, batch.target.clamp(min=0), reduction="none")
    return (each * weight).sum() / weight.sum()


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, tokenizer: Path, tokens: int, hardness: Any, seed: int) -> None:
        self._arguments = tokenizer, tokens, hardness, seed

    def __iter__(self) -> Any:
        tokenizer, tokens, hardness, seed = self._arguments
        info = torch.utils.data.get_worker_info()
        if info is not None:
            torch.set_num_threads(1)
        return stream(Encoder(tokenizer), seed * 1000 + (info.id if info else 0), tokens, hardness)


class Trainer:
    def __init__(
        self,
        out: Path,
        *,
        seconds: float,
        rate: float,
        tokens: int,
        workers: int,
        seed: int,
        device: str,
        compiled: bool = False,
        start: Path | None = None,
        frozen_tower: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.out, self.device = out, torch.device(device)
        self.dtype = torch.bfloat16
        self.tokenizer = TEMPLATE / "tokenizer.json"
        self.model = (fresh_model(Encoder(self.tokenizer)) if start is None else load(start)).to(self.device)
        self.started = start is not None
        hidden = self.model.config.text_config.hidden_size
        #: Readers of what a picture's token shows and of where it stands; they are not exported.
        self.aux = nn.ModuleList(nn.Linear(hidden, sum(c)) for c in (AUX_CLASSES, PLACE_CLASSES)).to(self.device)
        if frozen_tower:
            self.model.model.visual.requires_grad_(False)
        self.every = {n: p for n, p in self.model.named_parameters() if n != "lm_head.weight"}
        self.named = {n: p for n, p in self.every.items() if p.requires_grad}
        matrices = [p for p in self.named.values() if p.ndim >= 2]
        vectors = [p for p in self.named.values() if p.ndim < 2]
        groups = [
            {"params": [*matrices, *(r.weight for r in self.aux)], "weight_decay": 0.05},
            {"params": [*vectors, *(r.bias for r in self.aux)], "weight_decay": 0.0},
        ]
        self.parameters = [*matrices, *vectors, *(() if self.started else self.aux.parameters())]
        cuda = self.device.type == "cuda"
        first = torch.tensor(rate, device=self.device) if cuda else rate
        self.optimizer = torch.optim.AdamW(groups, lr=first, betas=(0.9, 0.97), fused=cuda, capturable=cuda)
        torch.backends.cuda.enable_cudnn_sdp(False)  # its plans are made per shape, within the step
        self.schedule = Schedule(seconds, rate)
        self.sprites = atlas().to(self.device)
        self.hardness = multiprocessing.get_context("spawn").Value("d", 0.0)
        self.tokens, self.workers, self.seed = tokens, workers, seed
        self.step, self.seen_tokens, self.best = 0, 0, -1.0
        self.history: list[dict[str, Any]] = []
        self.sizes: Sequence[Grid] = SIZES
        self.right = torch.zeros(2, device=self.device)  # answer tokens that were right, and all
        self.aux_weights = torch.zeros(2, device=self.device)
        self.one_step = Step(self.loss, self.optimizer, self.parameters)
        self.blocks = Blocks.compiled() if compiled else EAGER

    # -- state --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Written beside and moved: a run that is stopped here leaves the old state."""
        state = {
            "model": self.model.state_dict(),
            "aux": self.aux.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "tokens": self.seen_tokens,
            "seconds": self.schedule.progress * self.schedule.seconds,
            "best": self.best,
            "history": self.history,
        }
        torch.save(state, self.out / "state.new")
        os.replace(self.out / "state.new", self.out / "state.pt")

    def resume(self) -> bool:
        path = self.out / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.aux.load_state_dict(state["aux"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seen_tokens, self.best = state["step"], state["tokens"], state["best"]
        self.schedule.before, self.history = state["seconds"], state["history"]
        return True

    # -- training -----------------------------------------------------------------------------------------------

    def weights(self) -> tuple[Weights, Weights]:
        """Vision tower's and language model's parameters in the compute dtype, the embedding as it is."""
        return parts(self.every, self.dtype)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Of the answers, and of the auxiliary readers while the model is young: what is in each cell, from the vision
        tower's tokens; what is beside it and where it is, from the language model's early layers. (They see normalized
        states: else these grow, and later layers cannot write over them.)"""
        vision, language = self.weights()
        seen = forward(self.model.config, vision, language, batch, self.sprites, blocks=self.blocks)
        learnt = batch.target >= 0
        self.right += torch.stack((((seen.logits.argmax(-1) == batch.target) & learnt).sum(), learnt.sum()))
        if self.grown:
            return by_answer(seen.logits, batch)
        loss = F.cross_entropy(seen.logits, batch.target)
        truth = torch.cat([aux.flatten(0, 1) for aux in batch.aux]).long().unbind(1)
        classes = AUX_CLASSES, PLACE_CLASSES
        for reader, states, sizes, weight in zip(
            self.aux, (seen.tokens, seen.early), classes, self.aux_weights, strict=True
        ):
            read = reader(F.rms_norm(states.float(), states.shape[-1:])).split(sizes, -1)
            told = truth[: len(sizes)] if sizes is AUX_CLASSES else truth[len(AUX_CLASSES) :]
            loss = loss + weight * sum(F.cross_entropy(part, column) for part, column in zip(read, told, strict=True))
        return loss

    def run(self, max_steps: int, validate: int, say: Any = print, seconds: float = math.inf) -> None:
        """Until the time is over, or after ``max_steps`` more steps or ``seconds``; the next run goes on.
        ``validate``: questions per family and size."""
        data = _Stream(self.tokenizer, self.tokens, self.hardness, self.seed + self.step)
        more = {"prefetch_factor": 4, "multiprocessing_context": "spawn"} if self.workers else {}
        batches = iter(
            torch.utils.data.DataLoader(
                data, batch_size=None, num_workers=self.workers, pin_memory=self.device.type == "cuda", **more
            )
        )
        first = next(batches)  # workers take seconds to start: the clock does not run yet
        self.schedule.started = saved = time.monotonic()
        last = self.step + max_steps
        while self.schedule.progress < 1 and self.step < last and time.monotonic() - self.schedule.started < seconds:
            self._grow()
            self._set_rates()
            batch, first = (first if first is not None else next(batches)), None
            loss = self.one_step(batch)
            self.step += 1
            self.seen_tokens += batch.ids.numel()
            if self.step % 200 == 0 or self.step in (1, 10, 50):
                right, all_of_them = self.right.tolist()
                self.right.zero_()
                took = time.monotonic() - self.schedule.started
                say(f"step {self.step}, {self.schedule.progress:.1%}, loss {loss.item():.3f}, "
                    f"right {right / all_of_them:.3f}, {self.seen_tokens / 1e6:.1f} M tokens, {took:.0f} s, "
                    f"{self.one_step.graphs} graphs")  # fmt: skip
            if time.monotonic() - saved > SAVE_S:
                self.validate(validate, say)
                self.save()
                saved = time.monotonic()
        self.validate(validate, say)
        self.save()

    @property
    def grown(self) -> bool:
        return bool(self.hardness.value >= 1)

    def _grow(self) -> None:
        """Data get harder; once they are as hard as they get, the loss changes, and steps are recorded anew."""
        young = not self.grown
        self.hardness.value = 1.0 if self.started else min(1.0, self.schedule.progress / GROWN_AT)
        if young and self.grown:
            self.one_step = Step(self.loss, self.optimizer, self.parameters)

    def _set_rates(self) -> None:
        """Filled in place: a recorded step reads them where they are."""
        for group in self.optimizer.param_groups:
            rate = self.schedule.learning_rate(self.step)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        for place, weight in enumerate((AUX_WEIGHT, PLACE_WEIGHT)):
            self.aux_weights[place].fill_(weight * (1 - self.hardness.value))

    # -- validation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, per_family: int, say: Any = print) -> dict[str, float]:
        """Exact match of whole answers on the held-in validation split, per family; the best checkpoint is kept."""
        vision, language = self.weights()
        found: dict[str, list[bool]] = defaultdict(list)
        for batch in validation(Encoder(self.tokenizer), per_family, self.sizes):
            batch = batch.to(self.device)
            seen = forward(self.model.config, vision, language, batch, self.sprites)
            wrong = (seen.logits.argmax(-1) != batch.target).long()
            count = torch.zeros(len(batch.families), dtype=torch.long, device=self.device)
            count.index_add_(0, batch.answer, wrong)
            pictures = len(batch.grids)
            for (family, kind), errors in zip(batch.families, count.tolist(), strict=True):
                found[f"{family}/{pictures}/{kind}"].append(errors == 0)
        shares = {name: sum(hits) / len(hits) for name, hits in sorted(found.items())}
        mean = sum(shares.values()) / len(shares)
        self.history.append({"step": self.step, "progress": self.schedule.progress, "mean": mean, "families": shares})
        worst = ", ".join(f"{n} {v:.2f}" for n, v in sorted(shares.items(), key=lambda item: item[1])[:8])
        say(f"validation: mean {mean:.4f}; lowest: {worst}")
        if mean > self.best:
            self.best = mean
            export(self.model, self.out / "best")
        (self.out / "history.json").write_text(json.dumps(self.history, indent=1) + "\n")
        return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="state, history and the best checkpoint")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, earlier runs included")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate")
    parser.add_argument("--tokens", type=int, default=32768, help="per step")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that draw scenes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many; the same command goes on")
    parser.add_argument("--validate", type=int, default=24, help="questions per family and size")
    parser.add_argument("--start", type=Path, help="checkpoint folder to go on from")
    parser.add_argument("--frozen-tower", action="store_true", help="the vision tower stays as it is")
    parser.add_argument("--compile", action="store_true", help="fuse the layers with torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        a.out,
        seconds=60 * a.minutes,
        rate=a.rate,
        tokens=a.tokens,
        workers=a.workers,
        seed=a.seed,
        device=a.device,
        compiled=a.compile,
        start=a.start,
        frozen_tower=a.frozen_tower,
    )
    count = sum(p.numel() for p in trainer.named.values())
    print(f"{count / 1e6:.2f} M parameters{', resumed' if trainer.resume() else ''}", flush=True)
    trainer.run(a.steps, a.validate, lambda text: print(text, flush=True), a.seconds)


if __name__ == "__main__":
    main()
