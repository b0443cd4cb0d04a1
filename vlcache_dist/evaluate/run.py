"""Every policy over every case of a suite, in one run: the same donors, the same full answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from vlcache_dist.errors import InvalidPlan
from vlcache_dist.evaluate.cases import Case, batches
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.policies import Attend, Policy, SpanView, parse_policy
from vlcache_dist.evaluate.report import Outcome, edit_distance, pass_flops
from vlcache_dist.evaluate.scoring import is_right, kl_divergence
from vlcache_dist.evaluate.trial import Answers, Trial
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.evaluate.workers import Unit


def evaluate(bench: Workbench, cases: Sequence[Case], policies: Sequence[Policy]) -> Iterator[Outcome]:
    """Outcomes case by case. Raises InvalidPlan for a policy that does not fit the model."""
    for _, start, batch in batches(cases):
        trial = Trial(bench, batch)
        bench.forget()
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
        units.append(Unit(tuple(missing.values()), partial(_measure, batch, start, missing)))
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
    trial = Trial(bench, batch)
    bench.forget()
    return {
        key: [asdict(outcome) for outcome in _outcomes(trial, parse_policy(spelling), seed=start)]
        for spelling, key in keys.items()
    }


def _outcomes(trial: Trial, policy: Policy, seed: int) -> Iterator[Outcome]:
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
    watched = probes if policy.canary is not None else None
    answers, seen = trial.reuse(fresh, rotated=policy.rotated, probes=watched, shifted=policy.shifted)
    escalated = np.zeros(len(trial.cases), bool)
    if policy.canary is not None and seen is not None:
        with np.errstate(invalid="ignore"):
            ratios = np.sqrt(seen.dv / seen.v)
        for b in range(len(trial.cases)):
            first = _first_alarm(trial, policy, ratios, probes, b)
            if first is not None:
                escalated[b] = True
                fresh[:, b, first:] = True
                computed[b] += trial.num_layers * _reused(trial, b, first)
        answers = _replaced(trial, answers, fresh, np.flatnonzero(escalated).tolist())
    yield from _judged(trial, policy, answers, computed, escalated)


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


def _first_alarm(trial: Trial, policy: Policy, ratios: np.ndarray, probes: np.ndarray, b: int) -> int | None:
    """The column where the first span that alarms begins."""
    assert policy.canary is not None
    for donor, here in zip(trial.cases[b].donors, trial.columns[b], strict=True):
        at = here.start + np.flatnonzero(probes[b, here])
        if donor is not None and policy.canary.excess(ratios[:, b, at]) > 1:
            return here.start
    return None


def _reused(trial: Trial, b: int, first: int = 0) -> int:
    """Vision tokens with recorded KV from a column on."""
    return int(trial.known[b, first:].sum())


def _replaced(trial: Trial, answers: Answers, fresh: np.ndarray, again: list[int]) -> Answers:
    """The answers of cases ``again`` from a second pass."""
    if not again:
        return answers
    second, _ = trial.reuse(fresh, only=again)
    logprobs, token_ids = answers.logprobs.clone(), list(answers.token_ids)
    for i, b in enumerate(again):
        logprobs[b], token_ids[b] = second.logprobs[i], second.token_ids[i]
    return Answers(logprobs, token_ids)


def _judged(
    trial: Trial, policy: Policy, answers: Answers, computed: np.ndarray, escalated: np.ndarray
) -> Iterator[Outcome]:
    bench, layers = trial.bench, trial.num_layers
    full, other = trial.full.logprobs.cpu().numpy(), answers.logprobs.cpu().numpy()
    kl = kl_divergence(full, other)
    for b, case in enumerate(trial.cases):
        tokens, reused = trial.tokens[b], _reused(trial, b)
        behind = len(tokens.ids) - tokens.spans[0].start
        passes = 2 if escalated[b] else 1
        text_layers = passes * layers + (policy.attend.layer + 1 if policy.attend is not None else 0)
        token_layers = text_layers * (behind - reused) + int(computed[b])
        text, full_text = bench.text(answers.token_ids[b]), bench.text(trial.full.token_ids[b])
        ended = [_until_end(bench, ids) for ids in (answers.token_ids[b], trial.full.token_ids[b])]
        yield Outcome(
            format=case.format,
            policy=policy.name,
            right=is_right(text, case.answers, case.metric),
            full_right=is_right(full_text, case.answers, case.metric),
            kl=float(kl[b]),
            first_token_agrees=int(full[b].argmax()) == int(other[b].argmax()),
            same_answer=text == full_text,
            edit=edit_distance(*ended),
            computed_share=float(computed[b]) / max(layers * reused, 1),
            escalated=bool(escalated[b]),
            flops=pass_flops(bench.config.text, token_layers, len(tokens.ids)),
        )


def _until_end(bench: Workbench, token_ids: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(token_ids) if token in bench.config.eos_token_ids]
    return list(token_ids[: ends[0]] if ends else token_ids)
