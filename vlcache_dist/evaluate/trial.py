"""One batch of cases: computed in full, recorded under their donors, and recomputed in part over what was recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from vlcache_dist.evaluate.cases import Case, Dialogue, Donor
from vlcache_dist.evaluate.dense import Attention, Captured, DenseCache, Resume, Shift
from vlcache_dist.evaluate.workbench import Tokens, Workbench


@dataclass(frozen=True, slots=True)
class Answers:
    """Per case: next-token log-probabilities behind the prompt fp32 [B, vocab] and the greedy answer's tokens."""

    logprobs: torch.Tensor
    token_ids: list[list[int]]


@dataclass(frozen=True, slots=True)
class Deviation:
    """Squared norms over heads of fresh minus cached K (unrotated) and V, and of the cached ones: [layer, B, M]."""

    dk: np.ndarray
    dv: np.ndarray
    k: np.ndarray
    v: np.ndarray


@dataclass(frozen=True, slots=True)
class _Run:
    """Arguments of ``DenseModel.run`` for the active rows of some cases; ``columns[i]``: the vision column of each row,
    -1 for text; ``last`` int64 [B]: each case's last row."""

    x: torch.Tensor
    index: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    cache: DenseCache
    kept: Captured
    shifts: Sequence[Shift]
    columns: Sequence[np.ndarray]
    last: torch.Tensor
    resume: Resume | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """A donor's picture: unrotated K and V [layer, n, kv_head, head_dim], positions int [3, n], hidden states [n, C]
    behind the layers that ran."""

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor


def of(bench: Workbench, cases: Sequence[Case]) -> Trial:
    """The trial of a batch; the bench keeps its last ones."""
    key = tuple(cases)
    trial = bench.trials.pop(key, None) or Trial(bench, cases)
    bench.trials[key] = trial
    while len(bench.trials) > bench.max_trials:
        del bench.trials[next(iter(bench.trials))]
    return trial


class Trial:
    """Vision tokens of case b are columns [0, sum of its spans) of every [B, M] array; the rest is padding.

    Encoder outputs on the bench are forgotten. ``columns[b]``: the slice of each span. ``known`` bool [B, M]: there is
    a recorded K, V. ``computed``: K (unrotated) and V of a full run, [layer, B, M, kv_head, head_dim]; ``deviation``:
    their distance from the recorded ones."""

    def __init__(self, bench: Workbench, cases: Sequence[Case]) -> None:
        self.bench, self.cases, dense = bench, cases, bench.dense
        bench.encode(p for case in self.cases for p in case.dialogue.pictures)
        self.tokens = [bench.tokens(case.dialogue) for case in self.cases]
        self._length = max(len(t.ids) for t in self.tokens)
        self._rows = self._length + bench.max_answer
        self._x, index, self._positions = _stack(bench, self.tokens, self._rows)
        self._cache = dense.new_cache(len(self.cases), self._rows)
        self.columns: list[list[slice]] = []
        for t in self.tokens:
            edges = np.cumsum([0, *(span.length for span in t.spans)])
            self.columns.append([slice(int(a), int(b)) for a, b in pairwise(edges)])
        width = max(c[-1].stop for c in self.columns)
        where = np.full((len(self.cases), width), self._rows, np.int64)
        for b, t in enumerate(self.tokens):
            for span, here in zip(t.spans, self.columns[b], strict=True):
                where[b, here] = np.arange(span.start, span.end)
        self._there = where < self._rows
        self._vision = torch.from_numpy(where).to(bench.device)  # cache rows of vision tokens
        gather = self._vision.clamp(max=self._length - 1)
        hidden, fresh = dense.run(self._x, index, self._positions, self._cache, capture=gather)
        assert fresh is not None
        self.full = self._answer(hidden[self._each, [len(t.ids) - 1 for t in self.tokens]], self._cache)
        self.computed = fresh
        self.known = np.zeros(where.shape, bool)
        self._vision_positions = self._positions.gather(2, gather[None].expand(3, -1, -1))
        self._record(fresh)
        self.deviation = _deviation(fresh, self._kept)
        self._passes: dict[tuple[bytes, bytes], tuple[Answers, Deviation]] = {}
        self._lent: dict[tuple[bytes, bytes, bytes], tuple[Captured, np.ndarray]] = {}
        bench.forget()

    @property
    def num_layers(self) -> int:
        return self.bench.dense.num_layers

    @property
    def recorded(self) -> Captured:
        """The donors' K (unrotated) and V: [layer, B, M, kv_head, head_dim], 0 where there is none."""
        return self._kept

    @property
    def _each(self) -> torch.Tensor:
        return torch.arange(len(self.cases), device=self.bench.device)

    def reuse(
        self,
        fresh: np.ndarray,
        *,
        rotated: bool = True,
        only: Sequence[int] | None = None,
        probes: np.ndarray | None = None,
        shifted: bool = False,
        kept: Captured | None = None,
        resume: int | None = None,
    ) -> tuple[Answers, Deviation | None]:
        """Answers with cached K, V of every vision token and layer that ``fresh`` bool [layer, B, M] does not name.
        ``only``: the cases to run (all); results are in their order. ``probes`` bool [B, M]: tokens, fresh in every
        layer, whose deviation is wanted ([layer, B, M], 0 elsewhere). ``rotated=False`` leaves keys at the positions at
        which they were recorded. ``shifted``: cached tokens of a picture follow those of it that are fresh in every
        layer (``dense.Shift``). ``kept``: of the cases that run, in place of what was recorded (``lent``). ``resume``:
        reused pictures enter this layer with the hidden states that they had where they were recorded."""
        dense, device = self.bench.dense, self.bench.device
        picked = list(range(len(self.cases)) if only is None else only)
        run = self._prepared(picked, fresh, rotated, shifted, kept)
        if resume is not None:
            run = replace(run, resume=self._resumed(run, picked, resume))
        widest = run.index.shape[1]
        capture = None if probes is None else torch.arange(widest, device=device).expand((len(picked), -1))
        hidden, seen = dense.run(
            run.x, run.index, run.positions, run.cache, run.mask, capture, run.shifts, resume=run.resume
        )
        answers = self._answer(hidden[torch.arange(len(picked)), run.last], run.cache, picked)
        if probes is None or seen is None:
            return answers, None
        dev = _deviation(_by_column(run, seen, len(self.known[0])), run.kept)
        wanted = probes[picked] & self.known[picked]
        return answers, Deviation(*(np.where(wanted, part, 0.0) for part in (dev.dk, dev.dv, dev.k, dev.v)))

    def watched(self, fresh: np.ndarray, probes: np.ndarray) -> tuple[Answers, Deviation]:
        """``reuse`` with probes: a first pass. It is done once for all plans that share it."""
        key = fresh.tobytes(), probes.tobytes()
        if key not in self._passes:
            answers, seen = self.reuse(fresh, probes=probes)
            assert seen is not None
            self._passes[key] = answers, seen
        return self._passes[key]

    def attention(self, fresh: np.ndarray, *, shifted: bool = False) -> np.ndarray:
        """What the prompt's last token pays to each vision token, mean over heads, with reuse as in ``reuse``: fp32
        [layer, B, M], 0 where there is none."""
        run = self._prepared(list(range(len(self.cases))), fresh, True, shifted)
        seen = Attention(run.last.to(self.bench.device))
        self.bench.dense.run(run.x, run.index, run.positions, run.cache, run.mask, None, run.shifts, seen)
        return self._paid(seen, slice(None))

    def lent(self, fresh: np.ndarray, probes: np.ndarray, first: Mapping[int, int]) -> tuple[Captured, np.ndarray]:
        """What a second pass starts from (``engine.verdict``), for the cases in ``first``, in its order; its values are
        the columns from which on pictures are suspicious: in these, what the tokens ``probes`` bool [B, M] have gained
        on average in a pass with ``fresh`` is added to all that was recorded of their picture, layer by layer, K before
        rotation; new pictures have what that pass computed. And the attention that its last token pays, as in
        ``attention``. The last ones are kept."""
        key = fresh.tobytes(), probes.tobytes(), repr(first).encode()
        if key not in self._lent:
            self._lent = {key: self._lend(fresh, probes, first)}
        return self._lent[key]

    def again(
        self, fresh: np.ndarray, kept: Captured, first: Mapping[int, int]
    ) -> tuple[Answers, np.ndarray, np.ndarray]:
        """``reuse`` of the cases in ``first`` over ``kept`` (theirs, in its order); new pictures from the columns
        ``first`` on are not computed, ``kept`` has theirs too (``lent``). Besides the answers what a pass
        behind an alarm is judged by, [layer, B, M]: |V fresh - V kept| / |V kept| of tokens that are fresh in every
        layer, NaN elsewhere, and the attention that the prompt's last token pays, as in ``attention``."""
        only = list(first)
        inside = np.arange(self.known[0].size) >= np.array([first[b] for b in only])[:, None]
        run = self._prepared(only, fresh, True, False, kept, inside & self._there[only])
        attention = Attention(run.last.to(self.bench.device))
        rows = torch.arange(run.index.shape[1], device=self.bench.device).expand(len(only), -1)
        hidden, seen = self.bench.dense.run(
            run.x, run.index, run.positions, run.cache, run.mask, rows, run.shifts, attention
        )
        assert seen is not None
        answers = self._answer(hidden[torch.arange(len(only)), run.last], run.cache, only)
        dev = _deviation(_by_column(run, seen, len(self.known[0])), kept)
        whole = fresh[:, only].all(0) & self.known[only]
        with np.errstate(invalid="ignore", divide="ignore"):
            left = np.where(whole, np.sqrt(dev.dv) / np.maximum(np.sqrt(dev.v), 1e-12), np.nan)
        return answers, left, self._paid(attention, only)

    def _lend(self, fresh: np.ndarray, probes: np.ndarray, first: Mapping[int, int]) -> tuple[Captured, np.ndarray]:
        picked = list(first)
        run = self._prepared(picked, fresh, True, False)
        attention = Attention(run.last.to(self.bench.device))
        seen = self._seen(run, attention)
        kept = Captured(run.kept.k.clone(), run.kept.v.clone())
        for i, b in enumerate(picked):
            for donor, here in zip(self.cases[b].donors, self.columns[b], strict=True):
                at = here.start + np.flatnonzero(probes[b, here])
                if here.start >= first[b] and donor is None:
                    kept.k[:, i, here], kept.v[:, i, here] = seen.k[:, i, here], seen.v[:, i, here]
                if here.start < first[b] or donor is None or not len(at):
                    continue
                for part, now in ((kept.k, seen.k), (kept.v, seen.v)):
                    part[:, i, here] += (now[:, i, at] - part[:, i, at]).mean(1, keepdim=True)
        return kept, self._paid(attention, picked)

    def recomputed(self, fresh: np.ndarray) -> Captured:
        """K (unrotated) and V of the tokens that are fresh in every layer, computed over the recorded ones of all
        others: [layer, B, M, kv_head, head_dim]; what stands for other tokens means nothing."""
        return self._seen(self._prepared(list(range(len(self.cases))), fresh, True, False), None)

    def _seen(self, run: _Run, attention: Attention | None) -> Captured:
        rows = torch.arange(run.index.shape[1], device=self.bench.device).expand(len(run.index), -1)
        _, seen = self.bench.dense.run(
            run.x, run.index, run.positions, run.cache, run.mask, rows, run.shifts, attention
        )
        assert seen is not None
        return _by_column(run, seen, len(self.known[0]))

    def _paid(self, attention: Attention, picked: Sequence[int] | slice) -> np.ndarray:
        paid = torch.stack(attention.layers)
        at = self._vision[picked].clamp(max=paid.shape[-1] - 1)[None].expand(len(paid), -1, -1)
        return np.where(self._there[picked], paid.gather(2, at).cpu().numpy(), 0.0)

    def _prepared(
        self,
        picked: Sequence[int],
        fresh: np.ndarray,
        rotated: bool,
        shifted: bool,
        kept: Captured | None = None,
        held: np.ndarray | None = None,
    ) -> _Run:
        """``held`` bool [picked, M]: columns of which ``kept`` has K and V besides those with recorded ones."""
        dense, device = self.bench.dense, self.bench.device
        chosen = torch.tensor(picked, device=device)
        have = self.known[picked] if held is None else self.known[picked] | held
        fresh = fresh.copy()
        fresh[:, picked] = np.where(self.known[picked], fresh[:, picked], ~have)
        cache = DenseCache(self._cache.k[:, chosen], self._cache.v[:, chosen])
        kept = kept or Captured(self._kept.k[:, chosen], self._kept.v[:, chosen])
        to = self._vision_positions if rotated else self._kept_positions
        index = torch.where(torch.from_numpy(have).to(device), self._vision[chosen], self._rows)
        dense.fill(cache, index, kept, to[:, chosen])

        rows, columns = [], []
        for b in picked:
            t = self.tokens[b]
            column = np.full(len(t.ids), -1)
            for span, here in zip(t.spans, self.columns[b], strict=True):
                column[span.start : span.end] = np.arange(here.start, here.stop)
            active = np.arange(len(t.ids)) >= t.spans[0].start
            vision = column >= 0
            active[vision] = fresh[:, b, column[vision]].any(0)
            rows.append(np.flatnonzero(active))
            columns.append(column[rows[-1]])
        widest = max(map(len, rows))
        row = np.full((len(picked), widest), self._rows, np.int64)
        mask = np.zeros((self.num_layers, len(picked), widest), bool)
        for i, (b, r, c) in enumerate(zip(picked, rows, columns, strict=True)):
            row[i, : len(r)] = r
            mask[:, i, : len(r)] = np.where(c >= 0, fresh[:, b, c.clip(0)], True)
        at = torch.from_numpy(row).to(device)
        inside = at.clamp(max=self._length - 1)
        return _Run(
            x=self._x[chosen].gather(1, inside[..., None].expand(-1, -1, self._x.shape[-1])),
            index=at,
            positions=self._positions[:, chosen].gather(2, inside[None].expand(3, -1, -1)),
            mask=torch.from_numpy(mask).to(device),
            cache=cache,
            kept=kept,
            shifts=self._shifts(picked, fresh, rows) if shifted else (),
            columns=columns,
            last=torch.tensor([len(r) - 1 for r in rows]),
        )

    def _shifts(self, picked: Sequence[int], fresh: np.ndarray, rows: Sequence[np.ndarray]) -> list[Shift]:
        shifts = []
        for i, b in enumerate(picked):
            for donor, span, here in zip(self.cases[b].donors, self.tokens[b].spans, self.columns[b], strict=True):
                probes, stale = fresh[:, b, here].all(0), ~fresh[:, b, here].any(0)
                if donor is None or not probes.any() or not stale.any():
                    continue
                at = torch.from_numpy(here.start + np.flatnonzero(probes))
                left = torch.from_numpy(np.flatnonzero(stale))
                shifts.append(
                    Shift(
                        i,
                        torch.from_numpy(np.searchsorted(rows[i], span.start + np.flatnonzero(probes))),
                        self._kept.k[:, b, at],
                        self._kept.v[:, b, at],
                        span.start + left,
                        self._vision_positions[:, b, here.start + left],
                    )
                )
        return shifts

    def _resumed(self, run: _Run, picked: Sequence[int], layer: int) -> Resume:
        states: dict[Donor, torch.Tensor] = {}
        for donors in self._donors(below=layer):
            states |= {donor: found.hidden for donor, found in donors.items()}
        rows = torch.zeros(run.index.shape, dtype=torch.bool)
        x = torch.zeros_like(run.x)
        for i, b in enumerate(picked):
            for given, here in zip(self.cases[b].donors, self.columns[b], strict=True):
                if given is not None:
                    inside = (run.columns[i] >= here.start) & (run.columns[i] < here.stop)
                    at = np.flatnonzero(inside)
                    rows[i, at] = True
                    x[i, at] = states[given][run.columns[i][at] - here.start]
        return Resume(layer, rows.to(x.device), x)

    def _record(self, like: Captured) -> None:
        """Keep the K and V of donors' pictures."""
        self._kept = Captured(torch.zeros_like(like.k), torch.zeros_like(like.v))
        self._kept_positions = self._vision_positions.clone()
        found: dict[Donor, _Found] = {}
        for donors in self._donors():
            found |= donors
        for b, case in enumerate(self.cases):
            for given, here in zip(case.donors, self.columns[b], strict=True):
                if given is not None:
                    one = found[given]
                    self._kept.k[:, b, here], self._kept.v[:, b, here] = one.k, one.v
                    self._kept_positions[:, b, here] = one.positions
                    self.known[b, here] = True

    def _donors(self, below: int | None = None) -> Iterator[dict[Donor, _Found]]:
        """Run every donor up to the end of its picture. ``below``: through so many layers, or all."""
        bench, dense = self.bench, self.bench.dense
        donors = [d for case in self.cases for d in case.donors if d is not None]
        bench.encode(p for d in donors for p in d.dialogue.pictures)
        wanted: dict[Dialogue, list[int]] = {}
        for donor in dict.fromkeys(donors):
            wanted.setdefault(donor.dialogue, []).append(donor.index)
        cut = []
        for dialogue, indices in wanted.items():
            t, last = bench.tokens(dialogue), max(indices)
            stop, spans = t.spans[last].end, t.spans[: last + 1]
            cut.append(Tokens(t.ids[:stop], t.positions[:, :stop], t.delta, spans, t.pictures))
        for start in range(0, len(cut), 64):
            part, asked = cut[start : start + 64], list(wanted.items())[start : start + 64]
            x, index, positions = _stack(bench, part, max(len(t.ids) for t in part))
            at = [
                torch.cat([torch.arange(t.spans[n].start, t.spans[n].end) for n in indices])
                for t, (_, indices) in zip(part, asked, strict=True)
            ]
            capture = torch.nn.utils.rnn.pad_sequence(at, batch_first=True).to(bench.device)
            cache = dense.new_cache(len(part), x.shape[1])
            hidden, seen = dense.run(x, index, positions, cache, capture=capture, below=below)
            assert seen is not None
            found: dict[Donor, _Found] = {}
            for i, (dialogue, indices) in enumerate(asked):
                stop = 0
                for n in indices:
                    here = slice(stop, stop := stop + part[i].spans[n].length)
                    found[Donor(dialogue, n)] = _Found(
                        seen.k[:, i, here], seen.v[:, i, here], positions[:, i, at[i][here]], hidden[i, at[i][here]]
                    )
            yield found
        bench.forget()

    def _answer(self, hidden: torch.Tensor, cache: DenseCache, picked: Sequence[int] | None = None) -> Answers:
        """Greedy decoding from the last prompt rows' hidden states [B, C]."""
        dense, device = self.bench.dense, self.bench.device
        chosen = list(range(len(self.cases)) if picked is None else picked)
        lengths = torch.tensor([len(self.tokens[b].ids) for b in chosen], device=device)
        deltas = torch.tensor([self.tokens[b].delta for b in chosen], device=device)
        logits = dense.logits(hidden)
        logprobs = logits.log_softmax(-1)
        eos = torch.tensor(sorted(self.bench.config.eos_token_ids), device=device)
        done = torch.zeros(len(chosen), dtype=torch.bool, device=device)
        drawn = []
        for step in range(self.bench.max_answer):
            token = logits.argmax(-1)
            drawn.append(token)
            done |= torch.isin(token, eos)
            if bool(done.all()) or step == self.bench.max_answer - 1:
                break
            at = lengths + step
            position = (at + deltas).to(torch.int32)[None, :, None].expand(3, -1, -1)
            hidden, _ = dense.run(dense.embed(token)[:, None], at[:, None], position, cache)
            logits = dense.logits(hidden[:, 0])
        return Answers(logprobs, torch.stack(drawn, 1).tolist())


def _stack(
    bench: Workbench, prompts: Sequence[Tokens], padding: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embedded prompts [B, L, C], their cache rows int64 [B, L] (``padding`` behind the end), positions [3, B, L]."""
    length = max(len(t.ids) for t in prompts)
    ids, positions = np.zeros((len(prompts), length), np.int64), np.zeros((3, len(prompts), length), np.int32)
    index = np.full((len(prompts), length), padding, np.int64)
    for b, t in enumerate(prompts):
        n = len(t.ids)
        ids[b, :n], positions[:, b, :n], index[b, :n] = t.ids, t.positions, np.arange(n)
    x = bench.dense.embed(torch.from_numpy(ids).to(bench.device)).clone()
    for b, t in enumerate(prompts):
        for span, picture in zip(t.spans, t.pictures, strict=False):
            x[b, span.start : span.end] = bench.embedding(picture)
    return x, torch.from_numpy(index).to(bench.device), torch.from_numpy(positions).to(bench.device)


def _by_column(run: _Run, seen: Captured, width: int) -> Captured:
    """K and V of the rows that ran, [layer, B, R, ...], at their vision columns: [layer, B, width, ...]."""
    back = torch.zeros(len(run.columns), width, dtype=torch.long)
    for i, c in enumerate(run.columns):
        back[i, c[c >= 0]] = torch.from_numpy(np.flatnonzero(c >= 0))
    each = torch.arange(len(run.columns))[:, None]
    return Captured(seen.k[:, each, back], seen.v[:, each, back])


def _deviation(fresh: Captured, kept: Captured) -> Deviation:
    def squares(x: torch.Tensor) -> np.ndarray:
        return x.float().square().sum((-1, -2)).cpu().numpy()

    return Deviation(squares(fresh.k - kept.k), squares(fresh.v - kept.v), squares(kept.k), squares(kept.v))
