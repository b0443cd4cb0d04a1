"""The reuse error taken apart (docs/reuse.md): what a token suffers itself, what it inherits, what is read of it.

*Self error* of a token: its V computed over the stale rest of its picture, less the cached one. *Propagated*: from
there to a full run's, what earlier tokens of the picture pass on. *Cumulative* of a plan: over layers and stale tokens,
the attention that the prompt's last token pays in a full run x the relative deviation of the token's cached V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from vlcache_dist.evaluate.cases import Case, batches
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.policies import Policy, SpanView, parse_policy
from vlcache_dist.evaluate.report import HARMFUL_KL
from vlcache_dist.evaluate.scoring import kl_divergence
from vlcache_dist.evaluate.trial import Trial
from vlcache_dist.evaluate.trial import of as trial_of
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.evaluate.workers import Unit
from vlcache_dist.reuse.calibrate import roc

STEPS = 16  #: passes, each with every 16th token of a picture fresh: their few earlier neighbours hardly count
PARTS = 16  #: of a picture, first tokens first


def error_units(cases: Sequence[Case], plans: Sequence[str], journal: Journal) -> list[Unit]:
    """A unit per batch that ``journal`` lacks. ``plans``: policies that look at nothing but a picture's size."""
    units = []
    for name, start, batch in batches(cases):
        key = _key(name, start, batch, plans)
        units.append(Unit((key,), partial(_measure, batch, tuple(plans), key)))
    return [unit for unit in units if unit.keys[0] not in journal] or units


def read_errors(cases: Sequence[Case], plans: Sequence[str], journal: Journal) -> dict[str, Any]:
    """``formats``: per format the means over cases and tokens of ``self`` and ``propagated`` by layer (relative to the
    cached V's norm), both by place in the picture in the layer of the largest self error, and ``cumulative`` by layer
    of reuse without recomputation. ``plans``: per plan the cumulative error and the KL of the first token, means over
    all cases. ``auc``: how well the first plan's cumulative error tells harmful cases (KL) from others."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, start, batch in batches(cases):
        found.setdefault(name, []).extend(journal[_key(name, start, batch, plans)])
    everything = [one for group in found.values() for one in group]
    formats = []
    for name, group in found.items():
        parts = {kind: np.mean([one[kind] for one in group], 0) for kind in ("self", "propagated")}
        layer = int(parts["self"].mean(1).argmax())
        formats.append(
            {
                "format": name,
                "cases": len(group),
                **{kind: np.round(values.mean(1), 4).tolist() for kind, values in parts.items()},
                "layer": layer,
                **{f"{kind}_by_part": np.round(values[layer], 4).tolist() for kind, values in parts.items()},
                "cumulative": np.round(np.mean([one["cumulative"] for one in group], 0), 4).tolist(),
            }
        )
    errors, kl = (np.array([[one[what][plan] for plan in plans] for one in everything]) for what in ("errors", "kl"))
    return {
        "cases": len(everything),
        "formats": formats,
        "plans": [
            {"policy": plan, "cumulative": round(float(errors[:, i].mean()), 4), "kl": round(float(kl[:, i].mean()), 6)}
            for i, plan in enumerate(plans)
        ],
        "auc": round(roc(errors[:, 0], kl[:, 0] > HARMFUL_KL)[1], 4),
    }


def _key(name: str, start: int, batch: Sequence[Case], plans: Sequence[str]) -> str:
    return f"{name} {start}-{start + len(batch)} errors {' '.join(plans)}"


def _measure(batch: Sequence[Case], plans: tuple[str, ...], key: str, bench: Workbench) -> dict[str, Any]:
    trial = trial_of(bench, batch)
    by_self, by_others = split(trial)
    attention = trial.attention(np.ones((trial.num_layers, *trial.known.shape), bool))
    with np.errstate(invalid="ignore", divide="ignore"):
        weighted = attention * np.nan_to_num(np.sqrt(trial.deviation.dv / trial.deviation.v), posinf=0.0)
    stale, kl = {}, {}
    for plan in plans:
        fresh = chosen(trial, parse_policy(plan))
        answers, _ = trial.reuse(fresh)
        kl[plan] = kl_divergence(trial.full.logprobs.cpu().numpy(), answers.logprobs.cpu().numpy())
        stale[plan] = np.where(trial.known & ~fresh, weighted, 0.0).sum((0, 2))
    out = []
    for b in range(len(batch)):
        places = [
            here
            for donor, here in zip(batch[b].donors, trial.columns[b], strict=True)
            if donor is not None and here.stop - here.start >= PARTS
        ]
        out.append(
            {
                **{
                    kind: np.mean([_parts(values[:, b, here]) for here in places], 0).round(5).tolist()
                    for kind, values in (("self", by_self), ("propagated", by_others))
                },
                "cumulative": (weighted[:, b] * trial.known[b]).sum(1).round(5).tolist(),
                "errors": {plan: round(float(stale[plan][b]), 5) for plan in plans},
                "kl": {plan: round(float(kl[plan][b]), 7) for plan in plans},
            }
        )
    return {key: out}


def split(trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """|V over the stale rest - V cached| / |V cached|, and |V of a full run - V over the stale rest| / |V cached|, of
    every reused token: fp32 [layer, B, M] each, 0 where nothing is reused."""
    shape = (trial.num_layers, *trial.known.shape)
    by_self, by_others = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    cached, full = trial.recorded.v, trial.computed.v
    norm = torch.linalg.vector_norm(cached.float(), dim=(-1, -2)).clamp(min=1e-12)
    for step in range(STEPS):
        alone = np.zeros(trial.known.shape, bool)
        for b, columns in enumerate(trial.columns):
            for here in columns:
                alone[b, here.start + step : here.stop : STEPS] = True
        alone &= trial.known
        seen = trial.recomputed(np.broadcast_to(alone, shape)).v
        for out, difference in ((by_self, seen - cached), (by_others, full - seen)):
            found = torch.linalg.vector_norm(difference.float(), dim=(-1, -2)) / norm
            out[:, alone] = found.cpu().numpy()[:, alone]
    return by_self, by_others


def chosen(trial: Trial, policy: Policy) -> np.ndarray:
    """What a policy that looks at nothing but a picture's size computes: bool [layer, B, M]."""
    fresh = np.zeros((trial.num_layers, *trial.known.shape), bool)
    for b, (tokens, columns) in enumerate(zip(trial.tokens, trial.columns, strict=True)):
        for span, here in zip(tokens.spans, columns, strict=True):
            width = span.grid[2] // trial.bench.config.vision.spatial_merge_size
            unseen = np.zeros((trial.num_layers, span.length), np.float32)
            rng = np.random.default_rng([b, here.start])
            fresh[:, b, here] = policy.choose(SpanView(span.length, trial.num_layers, width, unseen, rng)).fresh
    return fresh


def _parts(values: np.ndarray) -> np.ndarray:
    """[layer, n] -> means over equal parts, [layer, PARTS]."""
    return np.stack([part.mean(1) for part in np.array_split(values, PARTS, axis=1)], 1)
