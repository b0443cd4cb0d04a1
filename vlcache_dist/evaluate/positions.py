"""Where in a reused picture the error is: by layer and by place of the token in its picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from vlcache_dist.evaluate.cases import Case, batches
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.trial import of as trial_of
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.evaluate.workers import Unit

PARTS = 16


def position_units(cases: Sequence[Case], journal: Journal) -> list[Unit]:
    """A unit per batch that ``journal`` lacks."""
    units = []
    for name, start, batch in batches(cases):
        key = _key(name, start, batch)
        units.append(Unit((key,), partial(_measure, batch, key)))
    return [unit for unit in units if unit.keys[0] not in journal] or units


def read_positions(cases: Sequence[Case], journal: Journal) -> list[dict[str, Any]]:
    """Per format the mean of |V - V cached| / |V cached| against a full run: ``v_by_layer_and_part`` [layer][part], for
    the ``PARTS`` equal parts of a picture, first tokens first."""
    found: dict[str, list[np.ndarray]] = {}
    for name, start, batch in batches(cases):
        found.setdefault(name, []).append(np.array(journal[_key(name, start, batch)]))
    return [
        {"format": name, "v_by_layer_and_part": np.round(np.concatenate(parts).mean(0), 4).tolist()}
        for name, parts in found.items()
    ]


def _key(name: str, start: int, batch: Sequence[Case]) -> str:
    return f"{name} {start}-{start + len(batch)} positions"


def _measure(batch: Sequence[Case], key: str, bench: Workbench) -> dict[str, Any]:
    trial = trial_of(bench, batch)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.sqrt(trial.deviation.dv / trial.deviation.v)
    pictures = []
    for b, case in enumerate(batch):
        for donor, here in zip(case.donors, trial.columns[b], strict=True):
            if donor is not None:
                parts = np.array_split(ratios[:, b, here], PARTS, axis=1)
                pictures.append(
                    [[round(float(x), 5) for x in layer] for layer in np.stack([p.mean(1) for p in parts], 1)]
                )
    return {key: pictures}
