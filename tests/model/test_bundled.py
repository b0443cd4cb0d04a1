"""The bundled checkpoint, from pictures through transformers' PIL processor and chat template to the answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_oracle import PagedRunner, Prompt, relative
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlcache_dist.model.weights import Checkpoint
from vlcache_dist.types import MediaSpan

TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open("tiny")


@pytest.fixture(scope="module")
def oracle(checkpoint: Checkpoint) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint.folder)


@pytest.fixture(scope="module")
def processor(checkpoint: Checkpoint) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil.from_pretrained(checkpoint.folder)


def build(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    processor: Qwen2VLImageProcessorPil,
    content: list[str | Image.Image],
) -> Prompt:
    """One user message of texts and pictures in the given order."""
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image"} for c in content]
    message = [{"role": "user", "content": parts}]
    ids = tokenizer(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))["input_ids"]
    pictures = iter([c for c in content if isinstance(c, Image.Image)])
    prompt = Prompt()
    for token in ids:
        if token != checkpoint.config.image_token_id:
            prompt.text([token])
            continue
        pixels = processor(images=[next(pictures)], return_tensors="pt")
        grid = tuple(pixels["image_grid_thw"][0].tolist())
        span = MediaSpan(b"", len(prompt.token_ids), int(np.prod(grid)) // 4, grid, index=len(prompt.spans))
        prompt.spans.append(span)
        prompt.patches.append(pixels["pixel_values"])
        prompt.token_ids += [token] * span.length
        prompt.types += [1] * span.length
    return prompt


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Random tiles, large enough to survive the patches."""
    tiles = np.random.default_rng(seed).integers(0, 256, (height // 28, width // 28, 3), np.uint8)
    return Image.fromarray(tiles.repeat(28, 0).repeat(28, 1))


@pytest.mark.parametrize(
    "content",
    [
        ["The code word is dog. What is the code word?"],
        [picture(0, 224, 224), "What is at row 2, column 3?"],
        ["What is the value of QF?", picture(1, 224, 336)],
        ["Picture 1:", picture(2, 224, 224), "Picture 2:", picture(3, 336, 224), "In picture 2, what is in row A?"],
        [picture(4, 301, 190), picture(5, 112, 448), "Transcribe."],
    ],
    ids=["text", "picture-first", "question-first", "labelled", "odd-sizes"],
)
def test_same_answer_as_transformers(
    checkpoint: Checkpoint,
    oracle: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    processor: Qwen2VLImageProcessorPil,
    content: list[str | Image.Image],
) -> None:
    prompt = build(checkpoint, tokenizer, processor, content)
    runner = PagedRunner(checkpoint)
    (sequence,) = runner.fresh([prompt], extra=TOKENS)
    logits = runner.step([sequence.chunk(0, sequence.length, True)])
    inputs = prompt.oracle_inputs()
    with torch.no_grad():
        assert relative(logits[0], oracle(**inputs).logits[0, -1]) < 1e-4
        answer = oracle.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    expected = answer[0, len(prompt.token_ids) :].tolist()
    ours = runner.greedy([sequence], logits, TOKENS)[0]
    assert ours[: len(expected)] == expected
    assert len(expected) == TOKENS or expected[-1] in checkpoint.config.eos_token_ids


def test_bf16_follows_fp32(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, processor: Qwen2VLImageProcessorPil
) -> None:
    """The checkpoint's own dtype: same first token, distribution close."""
    prompt = build(checkpoint, tokenizer, processor, [picture(0, 224, 224), "What is at row 2, column 3?"])
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        runner = PagedRunner(checkpoint, dtype=dtype)
        (sequence,) = runner.fresh([prompt])
        results.append(runner.step([sequence.chunk(0, sequence.length, True)])[0])
    exact, half = results
    assert int(exact.argmax()) == int(half.argmax())
    assert float((exact.softmax(-1) * (exact.log_softmax(-1) - half.log_softmax(-1))).sum()) < 0.02
