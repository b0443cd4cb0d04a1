"""What a few probe tokens of one request see: the measurement that the canary is built on.

For every case and every set of probe tokens: the answer with everything else of the pictures reused, whether that was
harmful, and the deviation of the probes' fresh K and V from the cached ones in each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlcache_dist.evaluate.cases import Case, by_format
from vlcache_dist.evaluate.scoring import is_right, kl_divergence
from vlcache_dist.evaluate.trial import Trial
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.reuse.probes import probe_tokens

HARMFUL_KL = 0.1
BATCH = 32


@dataclass(frozen=True, slots=True)
class Sighting:
    """One case under one probe set. ``ratios`` [span, 2 (K, V), layer, probe]: |fresh - cached| / |cached| of each
    probe token (NaN where a span has fewer); only reused spans are listed. ``full_ratios``: the same against a full
    run's K and V, over all tokens of the span, pooled: [span, 2, layer]."""

    format: str
    full_right: bool
    reuse_right: bool
    kl: float
    agrees: bool
    ratios: np.ndarray
    full_ratios: np.ndarray

    @property
    def harmful(self) -> bool:
        return self.kl > HARMFUL_KL or (self.full_right and not self.reuse_right)


def sight(
    bench: Workbench,
    cases: Sequence[Case],
    probe_sets: Sequence[tuple[int, int]],
    progress: Callable[[str], None] = lambda text: None,
) -> dict[tuple[int, int], list[Sighting]]:
    """Measure all cases with each (leading, strided) probe set."""
    found: dict[tuple[int, int], list[Sighting]] = {probes: [] for probes in probe_sets}
    for name, group in by_format(cases).items():
        for start in range(0, len(group), BATCH):
            trial = Trial(bench, group[start : start + BATCH])
            for leading, strided in probe_sets:
                found[leading, strided] += _sightings(trial, leading, strided)
            bench.forget()
            progress(f"{name}: {min(start + BATCH, len(group))}/{len(group)}")
    return found


def _sightings(trial: Trial, leading: int, strided: int) -> list[Sighting]:
    bench = trial.bench
    probes = np.zeros(trial.known.shape, bool)
    for b, columns in enumerate(trial.columns):
        for here in columns:
            probes[b, here.start + probe_tokens(here.stop - here.start, leading, strided)] = True
    fresh = np.broadcast_to(probes, (trial.num_layers, *probes.shape))
    answers, seen = trial.reuse(fresh, probes=probes)
    assert seen is not None
    kl = kl_divergence(trial.full.logprobs.cpu().numpy(), answers.logprobs.cpu().numpy())
    out = []
    for b, case in enumerate(trial.cases):
        ratios, full_ratios = [], []
        for donor, here in zip(case.donors, trial.columns[b], strict=True):
            if donor is None:
                continue
            at = np.flatnonzero(probes[b, here]) + here.start
            pair = [np.sqrt(d[:, b, at] / c[:, b, at]) for d, c in ((seen.dk, seen.k), (seen.dv, seen.v))]
            padded = np.full((2, trial.num_layers, leading + strided), np.nan, np.float32)
            padded[:, :, : len(at)] = np.stack(pair)
            ratios.append(padded)
            dev = trial.deviation
            full_ratios.append(
                [np.sqrt(d[:, b, here].sum(-1) / c[:, b, here].sum(-1)) for d, c in ((dev.dk, dev.k), (dev.dv, dev.v))]
            )
        text, full_text = bench.text(answers.token_ids[b]), bench.text(trial.full.token_ids[b])
        out.append(
            Sighting(
                case.format,
                is_right(full_text, case.answers, case.metric),
                is_right(text, case.answers, case.metric),
                float(kl[b]),
                int(trial.full.logprobs[b].argmax()) == int(answers.logprobs[b].argmax()),
                np.stack(ratios),
                np.array(full_ratios, np.float32),
            )
        )
    return out
