"""Our model against transformers' Qwen2_5_VLForConditionalGeneration, fp32 on CPU, over drawn configurations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from model_oracle import (
    PagedRunner,
    Prompt,
    Sequence_,
    draw_config,
    draw_model,
    draw_prompt,
    relative,
    save_checkpoint,
)
from transformers import Qwen2_5_VLForConditionalGeneration

from vlcache_dist.model.rope import mrope_positions
from vlcache_dist.model.weights import Checkpoint

CASES = 28
GREEDY = 32
TOLERANCE = 1e-4


@dataclass
class Case:
    oracle: Qwen2_5_VLForConditionalGeneration
    runner: PagedRunner
    prompts: list[Prompt]
    sequences: list[Sequence_]
    logits: torch.Tensor  # [len(prompts), vocab], after the prompts
    outputs: list


@pytest.fixture(scope="module", params=range(CASES), ids=lambda seed: f"draw{seed}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    seed: int = request.param
    rng = np.random.default_rng(seed)
    config = draw_config(rng)
    oracle = draw_model(config, seed)
    folder: Path = tmp_path_factory.mktemp(f"draw{seed}")
    save_checkpoint(oracle, folder, hub=seed % 4 >= 2, shard_size="50KB" if seed % 2 else "5GB")
    runner = PagedRunner(Checkpoint(folder), seed)
    prompts = [draw_prompt(rng, config, images=seed % 5, videos=seed % 3 % 2), draw_prompt(rng, config, 1, 0)]
    prompts += [draw_prompt(rng, config, 0, seed % 2)] if seed % 3 else []
    sequences = runner.fresh(prompts, extra=GREEDY)
    if seed % 2:  # in two chunks, cut anywhere, each prompt elsewhere
        cuts = [int(rng.integers(1, s.length)) if s.length > 1 else 0 for s in sequences]
        runner.step([s.chunk(0, cut, False) for s, cut in zip(sequences, cuts, strict=True) if cut])
        logits = runner.step([s.chunk(cut, s.length, True) for s, cut in zip(sequences, cuts, strict=True)])
    else:
        logits = runner.step([s.chunk(0, s.length, True) for s in sequences])
    with torch.no_grad():
        outputs = [oracle(**prompt.oracle_inputs(), use_cache=True) for prompt in prompts]
    return Case(oracle, runner, prompts, sequences, logits, outputs)


def test_vision_embeddings(case: Case) -> None:
    for prompt in case.prompts:
        for span, patches in zip(prompt.spans, prompt.patches, strict=True):
            with torch.no_grad():
                expected = case.oracle.model.visual(patches, grid_thw=torch.tensor([span.grid])).pooler_output
            assert relative(case.runner.tower.forward(patches, [span.grid]), expected) < TOLERANCE


def test_vision_batch_equals_single_images(case: Case) -> None:
    patches = [p for prompt in case.prompts for p in prompt.patches]
    grids = [s.grid for prompt in case.prompts for s in prompt.spans]
    packed = case.runner.tower.forward(torch.cat(patches), grids)
    single = torch.cat([case.runner.tower.forward(p, [g]) for p, g in zip(patches, grids, strict=True)])
    assert relative(packed, single) < 1e-5


def test_positions(case: Case) -> None:
    for prompt in case.prompts:
        inputs = {k: v for k, v in prompt.oracle_inputs().items() if not k.startswith("pixel")}
        expected, _ = case.oracle.model.get_rope_index(**inputs)
        positions, _ = mrope_positions(len(prompt.token_ids), prompt.spans, case.runner.config)
        np.testing.assert_array_equal(positions, expected[:, 0].numpy())


def test_every_layers_keys_and_values(case: Case) -> None:
    for sequence, output in zip(case.sequences, case.outputs, strict=True):
        ours = case.runner.kv(sequence, sequence.length)
        for n, layer in enumerate(output.past_key_values.layers):
            assert relative(ours[n, 0], layer.keys[0]) < TOLERANCE
            assert relative(ours[n, 1], layer.values[0]) < TOLERANCE


def test_last_position_logits(case: Case) -> None:
    for ours, output in zip(case.logits, case.outputs, strict=True):
        assert relative(ours, output.logits[0, -1]) < TOLERANCE


def test_greedy_tokens_and_decode_positions(case: Case) -> None:
    ours = case.runner.greedy(case.sequences, case.logits, GREEDY)
    seen: list[torch.Tensor] = []
    hook = case.oracle.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["position_ids"][-3:, 0, -1]), with_kwargs=True
    )
    with hook, torch.no_grad():
        for prompt, sequence, tokens in zip(case.prompts, case.sequences, ours, strict=True):
            seen.clear()
            answer = case.oracle.generate(
                **prompt.oracle_inputs(), max_new_tokens=GREEDY, do_sample=False, pad_token_id=0
            )
            assert tokens == answer[0, len(prompt.token_ids) :].tolist()
            theirs = torch.stack(seen[1:], 1).numpy()
            np.testing.assert_array_equal(sequence.positions[:, sequence.length :][:, : GREEDY - 1], theirs)
