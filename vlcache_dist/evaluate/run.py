"""Every policy over every case of a suite, in one run: the same donors, the same full answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from vlcache_dist.errors import InvalidPlan
from vlcache_dist.evaluate.cases import Case, batches
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.policies import Attend, Policy, SpanView, parse_policy
from vlcache_dist.evaluate.report import Outcome, pass_flops
from vlcache_dist.evaluate.scoring import edit_distance, kl_divergence, score
from vlcache_dist.evaluate.trial import Answers, Trial
from vlcache_dist.evaluate.trial import of as trial_of
from vlcache_dist.evaluate.verdict import Settled, others_behind, settle
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.evaluate.workers import Unit


def evaluate(bench: Workbench, cases: Sequence[Case], policies: Sequence[Policy]) -> Iterator[Outcome]:
    """Outcomes case by case. Raises InvalidPlan for a policy that does not fit the model."""
    for _, start, batch in batches(cases):
        trial = trial_of(bench, batch)
        for policy in policies:
            yield from _outcomes(trial, policy, seed=start)


def outcome_units(cases: Sequence[Case], policies: Sequence[str], journal: Journal) -> list[Unit]:
    """A unit per batch, for those policies of which ``journal`` lacks the batch. Raises InvalidPlan."""
    for spelling in policies:
        parse_policy(spelling)
    units = []
    for name, start, batch in batches(cases):
        keys = {spelling: _key(name, start, batch, spelling) for spelling in policies}
        missing = {spelling: key for spelling, key in keys.items() if key not in journal} or keys
        units.append(Unit(tuple(missing.values()), partial(_measure, batch, start, missing), (name, start)))
    return units


def read_outcomes(cases: Sequence[Case], policies: Sequence[str], journal: Journal) -> Iterator[Outcome]:
    """What ``outcome_units`` left in the journal, batch by batch and policy by policy."""
    for name, start, batch in batches(cases):
        for spelling in policies:
            for value in journal[_key(name, start, batch, spelling)]:
                yield Outcome(**value)


def _key(name: str, start: int, batch: Sequence[Case], spelling: str) -> str:
    return f"{name} {start}-{start + len(batch)} {spelling}"


def _measure(batch: Sequence[Case], start: int, keys: dict[str, str], bench: Workbench) -> dict[str, Any]:
    trial = trial_of(bench, batch)
    return {
        key: [asdict(outcome) for outcome in _outcomes(trial, parse_policy(spelling), seed=start)]
        for spelling, key in keys.items()
    }


@dataclass(frozen=True, slots=True)
class Passes:
    """A batch's answers under a policy and what they cost: ``computed`` and ``others`` int64 [B], token-layers of
    reused pictures, and of text and new pictures. ``settled``: what its canaries led to, if it has any."""

    answers: Answers
    computed: np.ndarray
    others: np.ndarray
    settled: Settled | None


def under(trial: Trial, policy: Policy, seed: int = 0) -> Passes:
    """Answer a batch under a policy. Raises InvalidPlan for one that does not fit the model."""
    shape = (trial.num_layers, *trial.known.shape)
    fresh, probes = np.zeros(shape, bool), np.zeros(trial.known.shape, bool)
    computed = np.zeros(len(trial.cases), np.int64)
    spread = np.sqrt(trial.deviation.dk + trial.deviation.dv)
    for b, (case, tokens) in enumerate(zip(trial.cases, trial.tokens, strict=True)):
        rng = np.random.default_rng([seed, b])
        for donor, span, here in zip(case.donors, tokens.spans, trial.columns[b], strict=True):
            if donor is None:
                fresh[:, b, here] = True
                continue
            columns = span.grid[2] // trial.bench.config.vision.spatial_merge_size
            choice = policy.choose(SpanView(span.length, trial.num_layers, columns, spread[:, b, here], rng))
            fresh[:, b, here] = choice.fresh
            computed[b] += choice.computed
            if policy.canary is not None:
                probes[b, here.start + policy.canary.probes(span.length)] = True
    if policy.attend is not None:
        computed += _attended(trial, policy, policy.attend, fresh)
    others = np.array([trial.num_layers * others_behind(trial, b, 0) for b in range(len(trial.cases))])
    if policy.attend is not None:
        others += others // trial.num_layers * (policy.attend.layer + 1)
    if policy.canary is None:
        answers = trial.full
        if not fresh[:, trial.known].all():
            answers, _ = trial.reuse(fresh, rotated=policy.rotated, shifted=policy.shifted, resume=policy.resume)
        return Passes(answers, computed, others, None)
    answers, seen = trial.watched(fresh, probes)
    settled = settle(trial, policy.canary, fresh, probes, answers, seen)
    return Passes(settled.answers, computed + settled.computed, others + settled.others, settled)


def _attended(trial: Trial, policy: Policy, attend: Attend, fresh: np.ndarray) -> np.ndarray:
    """Adds the tokens that are attended to most to ``fresh``; token-layers that it costs, int64 [B]: theirs, and those
    that were fresh in the first pass once more up to the layer that chooses."""
    if attend.layer >= trial.num_layers:
        raise InvalidPlan(f"policy {policy.name!r}: the model has {trial.num_layers} layers")
    first = (fresh & trial.known)[: attend.layer + 1].sum((0, 2))
    paid = trial.attention(fresh, shifted=policy.shifted)[attend.layer]
    extra = np.zeros(len(trial.cases), np.int64)
    for b in range(len(trial.cases)):
        candidates = np.flatnonzero(trial.known[b] & ~fresh[:, b].any(0))
        count = min(len(candidates), math.ceil(_reused(trial, b) * attend.percent / 100 - 1e-9))
        chosen = candidates[np.argsort(-paid[b, candidates], kind="stable")[:count]]
        fresh[:, b, chosen] = True
        extra[b] = trial.num_layers * count + first[b]
    return extra


def _reused(trial: Trial, b: int) -> int:
    """Vision tokens with recorded KV."""
    return int(trial.known[b].sum())


def _outcomes(trial: Trial, policy: Policy, seed: int) -> Iterator[Outcome]:
    done = under(trial, policy, seed)
    answers, settled = done.answers, done.settled
    bench, layers = trial.bench, trial.num_layers
    full, other = trial.full.logprobs.cpu().numpy(), answers.logprobs.cpu().numpy()
    kl = kl_divergence(full, other)
    for b, case in enumerate(trial.cases):
        text, full_text = bench.text(answers.token_ids[b]), bench.text(trial.full.token_ids[b])
        ended = [_until_end(bench, ids) for ids in (answers.token_ids[b], trial.full.token_ids[b])]
        yield Outcome(
            format=case.format,
            policy=policy.name,
            right=score(text, case.answers, case.metric),
            full_right=score(full_text, case.answers, case.metric),
            kl=float(kl[b]),
            first_token_agrees=int(full[b].argmax()) == int(other[b].argmax()),
            same_answer=text == full_text,
            edit=edit_distance(*ended),
            reused_tokens=_reused(trial, b),
            computed_share=float(done.computed[b]) / max(layers * _reused(trial, b), 1),
            escalated=settled is not None and bool(settled.escalated[b]),
            flops=pass_flops(bench.config.text, int(done.others[b] + done.computed[b]), len(trial.tokens[b].ids)),
            alarmed=settled is not None and bool(settled.alarmed[b]),
            rechecked=settled is not None and bool(settled.rechecked[b]),
            moved=None if settled is None or np.isnan(settled.moved[b]) else float(settled.moved[b]),
            left=None if settled is None or np.isnan(settled.moved[b]) else np.round(settled.left[:, b], 6).tolist(),
        )


def _until_end(bench: Workbench, token_ids: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(token_ids) if token in bench.config.eos_token_ids]
    return list(token_ids[: ends[0]] if ends else token_ids)
