"""What ``vlcache-dist eval`` does, apart from reading its options."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlcache_dist.config import ModelSettings
from vlcache_dist.errors import ConfigError
from vlcache_dist.evaluate import report
from vlcache_dist.evaluate.cases import Case, by_format
from vlcache_dist.evaluate.donors import with_canonical_donors
from vlcache_dist.evaluate.generated import SUITES, generate
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.names import under_names
from vlcache_dist.evaluate.public import read_folder
from vlcache_dist.evaluate.run import outcome_units, read_outcomes
from vlcache_dist.evaluate.ttft import served, time_to_first_token
from vlcache_dist.evaluate.workers import BenchSpec, run_units
from vlcache_dist.model.weights import Checkpoint

DEFAULT_POLICIES = (
    "full,none,unrotated,uniform:5,random:5,last:5,blend:5,epic:5,mpic:4,pyramid,inverse:0-10,canary,guarded"
)


def load_suite(suite: str, cases: int, seed: int, donors: str = "recorded") -> list[Case]:
    """A generated suite by name, or a folder of public data (``cases`` lines of each file); ``donors``: "recorded" or
    "canonical" (``evaluate.donors``). Raises ConfigError."""
    if donors not in ("recorded", "canonical"):
        raise ConfigError(f"donors {donors!r}: must be recorded or canonical")
    found: list[Case] | None = None
    if suite in SUITES:
        found = generate(suite, cases, seed)
    elif Path(suite).is_dir():
        found = read_folder(Path(suite), cases)
    if found is not None:
        return with_canonical_donors(found) if donors == "canonical" else found
    raise ConfigError(f"suite {suite!r} is neither a folder nor one of {', '.join(SUITES)}")


def split_policies(text: str) -> list[str]:
    """Spellings separated by commas; a comma inside a spelling is one that no new spelling follows."""
    spellings: list[str] = []
    for piece in text.split(","):
        if spellings and (not piece or piece[0].isdigit() or piece.startswith(("min=", "again:", "left:"))):
            spellings[-1] += f",{piece}"
        else:
            spellings.append(piece)
    return spellings


def checkpoint(spec: BenchSpec) -> Checkpoint:
    """The model's, for its fingerprint and shape. Raises CheckpointError, UnsupportedModel, ConfigError."""
    settings = ModelSettings.of(model=spec.model, device=spec.device, dtype=spec.dtype)
    return Checkpoint.open(settings.model, settings.revision)


def digest(cases: Sequence[Case]) -> str:
    """Of what is asked, so that a journal is not mixed with another's."""
    return hashlib.blake2b(repr(cases).encode(), digest_size=16).hexdigest()


def run_eval(
    spec: BenchSpec,
    cases: Sequence[Case],
    policies: Mapping[str, str],
    journal: Journal,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Rows of figures, per format and policy and over all; ``policies``: spellings by name (``names.spell_out``). What
    ``journal`` has is not done again. Raises InvalidPlan, WorkerLost."""
    spellings = list(dict.fromkeys(policies.values()))
    run_units(spec, outcome_units(cases, spellings, journal), journal, workers, progress)
    return under_names(report.rows(read_outcomes(cases, spellings, journal)), policies)


def run_ttft(spec: BenchSpec, cases: Sequence[Case], per_format: int, plans: Mapping[str, str]) -> list[dict[str, Any]]:
    """See ``ttft.time_to_first_token``: the first ``per_format`` cases of every format, those ``plans`` (spellings by
    name) that the engine serves."""
    picked = [case for group in by_format(cases).values() for case in group[:per_format]]
    return time_to_first_token(spec, picked, served(plans), lambda done, total: None)
