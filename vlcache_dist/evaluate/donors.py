"""Whose KV is reused: what the choice does to answers, and what it gives away of the donor's prompt.

*First request*: the KV of whoever showed the picture first, under that request's prompt. *Canonical*: the KV of the
picture behind the default system prompt and nothing else. Canonical KV is a function of the picture alone, so it
cannot carry anything of a tenant's prompt; ``leak`` shows that the other one can.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vlcache_dist.evaluate.cases import Case, Dialogue, Donor, Shown
from vlcache_dist.evaluate.trial import Trial
from vlcache_dist.evaluate.workbench import Workbench


def canonical(picture: Shown) -> Donor:
    """The picture behind the default system prompt. What follows a picture does not reach its KV."""
    return Donor(Dialogue.user(picture), 0)


def with_canonical_donors(cases: Sequence[Case]) -> list[Case]:
    """The same requests; every reused picture's KV is canonical."""
    return [
        replace(
            case,
            donors=tuple(
                None if donor is None else canonical(picture)
                for donor, picture in zip(case.donors, case.dialogue.pictures, strict=True)
            ),
        )
        for case in cases
    ]


@dataclass(frozen=True, slots=True)
class Leak:
    """Share of held-out pictures of which a linear probe names the secret that stood in the donor's prompt."""

    secrets: int
    first_request: float
    canonical: float

    @property
    def chance(self) -> float:
        return 1 / self.secrets


def leak(bench: Workbench, secrets: Sequence[str], pictures: int = 16, seed: int = 0) -> Leak:
    """Every picture is recorded behind every secret; a ridge probe on the mean V of its tokens in all layers is fitted
    on half of the pictures and tried on the other half."""
    rng = random.Random(f"leak {seed}")
    shown = [Shown("form", rng.getrandbits(40)) for _ in range(pictures)]
    first, common = [], []
    for picture in shown:
        prompts = [Dialogue.user(f"The code word is {secret}.\n", picture, "Read it.") for secret in secrets]
        first.append(_recorded(bench, prompts, [Donor(prompt, 0) for prompt in prompts]))
        common.append(_recorded(bench, prompts, [canonical(picture)] * len(prompts)))
    return Leak(len(secrets), _probe(np.stack(first)), _probe(np.stack(common)))


def _recorded(bench: Workbench, prompts: Sequence[Dialogue], donors: Sequence[Donor]) -> np.ndarray:
    """Mean V of each donor's picture: fp32 [prompt, layer x head_dim x kv_head]."""
    cases = [Case("leak", prompt, (), (donor,)) for prompt, donor in zip(prompts, donors, strict=True)]
    trial = Trial(bench, cases)
    mean = trial.recorded.v.mean(2).transpose(0, 1).flatten(1).float().cpu().numpy()
    return mean


def _probe(features: np.ndarray) -> float:
    """[picture, secret, feature] -> accuracy on the second half of the pictures, of a probe fitted on the first half.
    A picture's own mean is taken off: the probe looks for what the prompt added."""
    centred = features - features.mean(1, keepdims=True)
    half, secrets = len(features) // 2, features.shape[1]
    scale = np.abs(centred).max()
    if scale == 0:  # not a bit differs: there is nothing to look at
        return 1 / secrets
    train, test = (part.reshape(-1, part.shape[-1]) / scale for part in (centred[:half], centred[half:]))
    gram = torch.from_numpy(train @ train.T).double()
    truth = torch.eye(secrets, dtype=torch.double).repeat(half, 1)
    ridge = 1e-3 * float(gram.diagonal().mean())
    weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.double), truth)
    said = (torch.from_numpy(test @ train.T).double() @ weights).argmax(1).numpy()
    return float((said == np.tile(np.arange(secrets), len(features) - half)).mean())
