"""What becomes of a batch whose canaries have been read, as in ``engine.verdict``: released, computed once more over
KV that follows the probes, or computed in full."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from vlcache_dist.evaluate.dense import Captured
from vlcache_dist.evaluate.scoring import kl_divergence
from vlcache_dist.evaluate.trial import Answers, Deviation, Trial
from vlcache_dist.reuse.canary import Again, Canary


@dataclass(slots=True)
class Settled:
    """Per case of a batch: the answer that is released; ``computed`` int64 [B]: token-layers of reused pictures that
    came on top of the first pass; ``others`` int64 [B]: those of text and new pictures; bool [B] each: an alarm was
    raised, the answer is a later pass', everything was computed. ``moved`` fp64 [B]: nats by which the last pass but a
    full one moved the first token, NaN where there was none; ``left`` fp64 [layer, B]: how far what it computed is from
    what had been lent (``reuse.canary``)."""

    answers: Answers
    computed: np.ndarray
    others: np.ndarray
    alarmed: np.ndarray
    rechecked: np.ndarray
    escalated: np.ndarray
    moved: np.ndarray
    left: np.ndarray

    @classmethod
    def calm(cls, answers: Answers, cases: int, num_layers: int) -> Settled:
        """Before anything is judged."""
        nothing, never = np.zeros(cases, np.int64), np.zeros(cases, bool)
        nan = np.full((num_layers + 1, cases), np.nan)
        return cls(answers, nothing, nothing.copy(), never, never.copy(), never.copy(), nan[0], nan[1:])


def settle(
    trial: Trial, canary: Canary, fresh: np.ndarray, probes: np.ndarray, answers: Answers, seen: Deviation
) -> Settled:
    """``fresh`` bool [layer, B, M], ``answers`` and ``seen`` are the first pass', ``probes`` bool [B, M] its probes."""
    size, layers = len(trial.cases), trial.num_layers
    with np.errstate(invalid="ignore"):
        ratios = np.sqrt(seen.dv / seen.v)
    found = ((b, _first_alarm(trial, canary, ratios, probes, b)) for b in range(size))
    first = {b: span for b, span in found if span is not None}
    settled = Settled.calm(answers, size, layers)
    settled.alarmed[list(first)] = True
    if canary.again is not None and first:
        _again(trial, canary.again, fresh, probes, first, settled)
    full = set(first) - set(np.flatnonzero(settled.rechecked).tolist())
    if full:
        everything = fresh.copy()
        for b in full:
            start = trial.columns[b][first[b]].start
            everything[:, b, start:] = True
            settled.computed[b] += layers * int(trial.known[b, start:].sum())
            settled.others[b] += layers * others_behind(trial, b, first[b])
        whole = [b for b in full if not trial.known[b, : trial.columns[b][first[b]].start].any()]
        settled.answers = _replaced(settled.answers, trial.full, whole, whole)
        if rest := sorted(full - set(whole)):
            after, _ = trial.reuse(everything, only=rest)
            settled.answers = _replaced(settled.answers, after, rest, range(len(rest)))
    settled.escalated[list(full)] = True
    return settled


def _again(
    trial: Trial, again: Again, fresh: np.ndarray, probes: np.ndarray, first: Mapping[int, int], settled: Settled
) -> None:
    """Passes over what the probes lent, for the cases in ``first`` (the span that alarmed), until their answers stand
    still or all passes are made."""
    starts = {b: trial.columns[b][span].start for b, span in first.items()}
    kept, attention = trial.lent(fresh, probes, starts)
    paid = {b: attention[again.layer, i] for i, b in enumerate(first)}
    row = {b: i for i, b in enumerate(first)}
    before, now, doubtful = settled.answers, fresh.copy(), list(first)
    for turns_left in reversed(range(again.passes)):
        for b in doubtful:
            _add_attended(trial, again, now, b, starts[b], paid[b])
        rows = [row[b] for b in doubtful]
        after, left, attention = trial.again(
            now, Captured(kept.k[:, rows], kept.v[:, rows]), {b: starts[b] for b in doubtful}
        )
        kl = kl_divergence(after.logprobs.cpu().numpy(), before.logprobs[doubtful].cpu().numpy())
        moved: list[int] = []
        for i, b in enumerate(doubtful):
            settled.computed[b] += int((now[:, b, starts[b] :] & trial.known[b, starts[b] :]).sum())
            settled.others[b] += trial.num_layers * _text_behind(trial, b, first[b])
            settled.moved[b] = kl[i]
            settled.left[:, b] = np.nanmean(left[:, i, starts[b] :], 1)
            paid[b] = attention[again.layer, i]
            if again.fits(settled.left[:, b]):
                settled.rechecked[b] = kl[i] <= again.limit
                moved += [] if settled.rechecked[b] else [b]
        calm = [i for i, b in enumerate(doubtful) if settled.rechecked[b]]
        settled.answers = _replaced(settled.answers, after, [doubtful[i] for i in calm], calm)
        before = _replaced(before, after, doubtful, range(len(doubtful)))
        doubtful = moved
        if not doubtful or not turns_left:
            return


def _add_attended(trial: Trial, again: Again, fresh: np.ndarray, b: int, start: int, paid: np.ndarray) -> None:
    """Of what is stale behind column ``start``, ``fresh`` also gets the tokens to which most was ``paid`` fp [M]."""
    suspicious = trial.known[b] & (np.arange(len(trial.known[b])) >= start)
    stale = np.flatnonzero(suspicious & ~fresh[:, b].all(0))
    order = np.argsort(-paid[stale], kind="stable")
    fresh[:, b, stale[order[: again.count(int(suspicious.sum()))]]] = True


def others_behind(trial: Trial, b: int, span: int) -> int:
    """Rows of text and new pictures from the start of a span on."""
    tokens, start = trial.tokens[b], trial.columns[b][span].start
    return len(tokens.ids) - tokens.spans[span].start - int(trial.known[b, start:].sum())


def _text_behind(trial: Trial, b: int, span: int) -> int:
    """Rows of text from the start of a span on: all that a pass behind an alarm makes besides what it chose. New
    pictures stay as the first pass left them."""
    tokens = trial.tokens[b]
    return len(tokens.ids) - tokens.spans[span].start - sum(s.length for s in tokens.spans[span:])


def _first_alarm(trial: Trial, canary: Canary, ratios: np.ndarray, probes: np.ndarray, b: int) -> int | None:
    """The first span that alarms."""
    for index, (donor, here) in enumerate(zip(trial.cases[b].donors, trial.columns[b], strict=True)):
        at = here.start + np.flatnonzero(probes[b, here])
        if donor is not None and canary.excess(ratios[:, b, at]) > 1:
            return index
    return None


def _replaced(answers: Answers, by: Answers, cases: Iterable[int], rows: Iterable[int]) -> Answers:
    """``answers`` with those of ``cases`` from ``rows`` of others."""
    logprobs, token_ids = answers.logprobs.clone(), list(answers.token_ids)
    for b, i in zip(cases, rows, strict=True):
        logprobs[b], token_ids[b] = by.logprobs[i], by.token_ids[i]
    return Answers(logprobs, token_ids)
