"""What a few probe tokens of one request see: the measurement that the canary is built on.

For every case and every set of probe tokens: the answer with everything else of the pictures reused, whether that was
harmful, and the deviation of the probes' fresh K and V from the cached ones in each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from vlcache_dist.evaluate.cases import Case, batches
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.report import HARMFUL_KL
from vlcache_dist.evaluate.scoring import is_right, kl_divergence
from vlcache_dist.evaluate.trial import Trial
from vlcache_dist.evaluate.trial import of as trial_of
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.evaluate.workers import Unit
from vlcache_dist.reuse.probes import probe_tokens


@dataclass(frozen=True, slots=True)
class Sighting:
    """One case under one probe set. ``ratios`` [span, 2 (K, V), layer, probe]: |fresh - cached| / |cached| of each
    probe token (NaN where a span has fewer); only reused spans are listed. ``full_ratios``: the same against a full
    run's K and V, over all tokens of the span, pooled: [span, 2, layer]. ``entropy``: of the first token after reuse,
    nats."""

    format: str
    full_right: bool
    reuse_right: bool
    kl: float
    agrees: bool
    entropy: float
    ratios: np.ndarray
    full_ratios: np.ndarray

    @property
    def harmful(self) -> bool:
        return self.kl > HARMFUL_KL or (self.full_right and not self.reuse_right)


def sighting_units(cases: Sequence[Case], probe_sets: Sequence[tuple[int, int]], journal: Journal) -> list[Unit]:
    """A unit per batch, for those (leading, strided) probe sets that ``journal`` lacks."""
    units = []
    for name, start, batch in batches(cases):
        keys = {probes: _key(name, start, batch, probes) for probes in probe_sets}
        missing = {probes: key for probes, key in keys.items() if key not in journal} or keys
        units.append(Unit(tuple(missing.values()), partial(_measure, batch, missing), (name, start)))
    return units


def read_sightings(cases: Sequence[Case], probes: tuple[int, int], journal: Journal) -> list[Sighting]:
    """What ``sighting_units`` left in the journal, in the order of the cases of each format."""
    found: list[Sighting] = []
    for name, start, batch in batches(cases):
        for value in journal[_key(name, start, batch, probes)]:
            arrays = {field: np.array(value[field], np.float32) for field in ("ratios", "full_ratios")}
            found.append(Sighting(**(value | arrays)))
    return found


def _key(name: str, start: int, batch: Sequence[Case], probes: tuple[int, int]) -> str:
    return f"{name} {start}-{start + len(batch)} probes {probes[0]},{probes[1]}"


def _measure(batch: Sequence[Case], keys: dict[tuple[int, int], str], bench: Workbench) -> dict[str, Any]:
    trial = trial_of(bench, batch)
    return {key: [_json(s) for s in _sightings(trial, *probes)] for probes, key in keys.items()}


def _json(sighting: Sighting) -> dict[str, Any]:
    arrays = {field: np.round(getattr(sighting, field), 6).tolist() for field in ("ratios", "full_ratios")}
    return asdict(sighting) | arrays


def statistics(
    sightings: Sequence[Sighting], *, of_keys: bool = False, averaged: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The canary's statistic fp32 [layer, case], and bool [case]: was the reuse harmful. The largest deviation of V
    over a case's pictures and their probes; ``of_keys``: of K before rotation; ``averaged``: over a picture's probes
    the mean."""
    over = np.nanmean if averaged else np.nanmax
    values = np.stack([over(s.ratios[:, 0 if of_keys else 1], axis=2).max(0) for s in sightings], 1)
    return values, np.array([s.harmful for s in sightings])


def _sightings(trial: Trial, leading: int, strided: int) -> list[Sighting]:
    bench = trial.bench
    probes = np.zeros(trial.known.shape, bool)
    for b, columns in enumerate(trial.columns):
        for here in columns:
            probes[b, here.start + probe_tokens(here.stop - here.start, leading, strided)] = True
    fresh = np.broadcast_to(probes, (trial.num_layers, *probes.shape))
    answers, seen = trial.watched(fresh, probes)
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
                float(-(answers.logprobs[b].exp() * answers.logprobs[b]).sum()),
                np.stack(ratios),
                np.array(full_ratios, np.float32),
            )
        )
    return out
