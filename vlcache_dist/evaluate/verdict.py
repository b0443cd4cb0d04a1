"""What becomes of a batch whose canaries have been read, as in ``engine.verdict``: released, computed once more over
KV that follows the probes, or computed in full."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from vlcache_dist.errors import InvalidPlan
from vlcache_dist.evaluate.dense import Captured
from vlcache_dist.evaluate.scoring import kl_divergence
from vlcache_dist.evaluate.trial import Answers, Deviation, Trial
from vlcache_dist.reuse.canary import Again, Canary


@dataclass(frozen=True, slots=True)
class Settled:
    """Per case of a batch: the answer that is released; ``computed`` int64 [B]: token-layers of reused pictures that
    came on top of the first pass; ``others`` int64 [B]: those of text and new pictures; bool [B] each: an alarm was
    raised, the answer is a second pass', everything was computed. ``moved`` fp64 [B]: nats by which the second pass
    moved the first token, NaN where there was none."""

    answers: Answers
    computed: np.ndarray
    others: np.ndarray
    alarmed: np.ndarray
    rechecked: np.ndarray
    escalated: np.ndarray
    moved: np.ndarray


def settle(
    trial: Trial, canary: Canary, fresh: np.ndarray, probes: np.ndarray, answers: Answers, seen: Deviation
) -> Settled:
    """``fresh`` bool [layer, B, M], ``answers`` and ``seen`` are the first pass', ``probes`` bool [B, M] its probes."""
    if canary.again is not None and canary.again.passes > 1:
        raise InvalidPlan(f"{canary}: only the engine makes more than one pass behind an alarm")
    size, layers = len(trial.cases), trial.num_layers
    with np.errstate(invalid="ignore"):
        ratios = np.sqrt(seen.dv / seen.v)
    found = ((b, _first_alarm(trial, canary, ratios, probes, b)) for b in range(size))
    first = {b: span for b, span in found if span is not None}
    computed, others = np.zeros(size, np.int64), np.zeros(size, np.int64)
    rechecked, moved = np.zeros(size, bool), np.full(size, np.nan)
    full = set(first)
    if canary.again is not None and first:
        second, again = _chosen(trial, canary.again, fresh, probes, first)
        after, _ = trial.reuse(second, only=list(first), kept=again)
        kl = kl_divergence(after.logprobs.cpu().numpy(), answers.logprobs[list(first)].cpu().numpy())
        for i, (b, span) in enumerate(first.items()):
            start = trial.columns[b][span].start
            computed[b] += int((second[:, b, start:] & trial.known[b, start:]).sum())
            others[b] += layers * others_behind(trial, b, span)
            moved[b], rechecked[b] = kl[i], kl[i] <= canary.again.limit
        kept = [i for i, b in enumerate(first) if rechecked[b]]
        answers = _replaced(answers, after, [list(first)[i] for i in kept], kept)
        full -= set(np.flatnonzero(rechecked).tolist())
    if full:
        everything = fresh.copy()
        for b in full:
            start = trial.columns[b][first[b]].start
            everything[:, b, start:] = True
            computed[b] += layers * int(trial.known[b, start:].sum())
            others[b] += layers * others_behind(trial, b, first[b])
        whole = [b for b in full if not trial.known[b, : trial.columns[b][first[b]].start].any()]
        answers = _replaced(answers, trial.full, whole, whole)
        if rest := sorted(full - set(whole)):
            after, _ = trial.reuse(everything, only=rest)
            answers = _replaced(answers, after, rest, range(len(rest)))
    alarmed, escalated = np.zeros(size, bool), np.zeros(size, bool)
    alarmed[list(first)] = True
    escalated[list(full)] = True
    return Settled(answers, computed, others, alarmed, rechecked, escalated, moved)


def others_behind(trial: Trial, b: int, span: int) -> int:
    """Rows of text and new pictures from the start of a span on."""
    tokens, start = trial.tokens[b], trial.columns[b][span].start
    return len(tokens.ids) - tokens.spans[span].start - int(trial.known[b, start:].sum())


def _first_alarm(trial: Trial, canary: Canary, ratios: np.ndarray, probes: np.ndarray, b: int) -> int | None:
    """The first span that alarms."""
    for index, (donor, here) in enumerate(zip(trial.cases[b].donors, trial.columns[b], strict=True)):
        at = here.start + np.flatnonzero(probes[b, here])
        if donor is not None and canary.excess(ratios[:, b, at]) > 1:
            return index
    return None


def _chosen(
    trial: Trial, again: Again, fresh: np.ndarray, probes: np.ndarray, first: Mapping[int, int]
) -> tuple[np.ndarray, Captured]:
    """What a second pass computes, bool [layer, B, M], and the K, V that it reuses."""
    starts = {b: trial.columns[b][span].start for b, span in first.items()}
    kept, paid = trial.lent(fresh, probes, starts)
    second = fresh.copy()
    for i, (b, start) in enumerate(starts.items()):
        suspicious = trial.known[b] & (np.arange(len(trial.known[b])) >= start)
        stale = np.flatnonzero(suspicious & ~fresh[:, b].all(0))
        order = np.argsort(-paid[again.layer, i, stale], kind="stable")
        second[:, b, stale[order[: again.count(int(suspicious.sum()))]]] = True
    return second, kept


def _replaced(answers: Answers, by: Answers, cases: Iterable[int], rows: Iterable[int]) -> Answers:
    """``answers`` with those of ``cases`` from ``rows`` of others."""
    logprobs, token_ids = answers.logprobs.clone(), list(answers.token_ids)
    for b, i in zip(cases, rows, strict=True):
        logprobs[b], token_ids[b] = by.logprobs[i], by.token_ids[i]
    return Answers(logprobs, token_ids)
