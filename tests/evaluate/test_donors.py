"""Donor policies: canonical KV says nothing of a prompt, a first request's KV can."""

from __future__ import annotations

import pytest
import torch

from vlcache_dist.errors import ConfigError
from vlcache_dist.evaluate.cases import Case, Dialogue, Donor, Shown
from vlcache_dist.evaluate.cli import load_suite
from vlcache_dist.evaluate.donors import canonical, leak
from vlcache_dist.evaluate.trial import Trial
from vlcache_dist.evaluate.workbench import Workbench

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench("tiny", device="cpu", dtype="float32")


def test_a_probe_reads_a_secret_from_a_first_requests_kv_and_nothing_from_canonical_kv(bench: Workbench) -> None:
    found = leak(bench, ("QF", "AX", "MB", "ZD"), pictures=8)
    assert found.chance == 0.25
    assert found.first_request >= 0.6, found
    assert found.canonical == found.chance, "canonical KV must not differ in a single bit"


def test_canonical_kv_depends_on_the_picture_alone(bench: Workbench) -> None:
    picture = Shown("form", 7)
    prompts = [Dialogue.user(text, picture, "Read it.") for text in ("The code word is QF.\n", "A river.\n")]
    common = Trial(bench, [Case("x", prompt, (), (canonical(picture),)) for prompt in prompts]).recorded
    own = Trial(bench, [Case("x", prompt, (), (Donor(prompt, 0),)) for prompt in prompts]).recorded
    assert torch.equal(common.k[:, 0], common.k[:, 1]) and torch.equal(common.v[:, 0], common.v[:, 1])
    assert not torch.equal(own.v[1:, 0], own.v[1:, 1])
    assert torch.equal(own.v[0, 0], own.v[0, 1]), "layer 0 sees the encoder's output alone"


def test_a_suite_with_canonical_donors() -> None:
    recorded, common = load_suite("tune", 2, 0), load_suite("tune", 2, 0, "canonical")
    assert [c.dialogue for c in recorded] == [c.dialogue for c in common]
    assert all(d is None or len(d.dialogue.turns) == 1 for c in common for d in c.donors)
    with pytest.raises(ConfigError):
        load_suite("tune", 2, 0, "mine")
