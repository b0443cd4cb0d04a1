"""The generator is deterministic, and the bundled model (through transformers) answers its questions."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import vlcache_dist
from vlcache_dist.demo.pictures import draw, form
from vlcache_dist.media import MediaItem, MediaProcessor
from vlcache_dist.prompt import PromptBuilder, TokenText, parse_messages

TINY = Path(vlcache_dist.__file__).parent / "data" / "tiny"


def test_same_seed_same_file() -> None:
    for kind in ("form", "table", "shapes"):
        assert draw(kind, 3).png() == draw(kind, 3).png() != draw(kind, 4).png()  # type: ignore[arg-type]
        assert draw(kind, 3).facts == draw(kind, 3).facts  # type: ignore[arg-type]


def test_sizes_and_limits() -> None:
    assert draw("form", 0, 8, 12).image.size == (336, 224)
    with pytest.raises(ValueError, match="multiples of 4"):
        draw("table", 0, 8, 10)
    with pytest.raises(ValueError, match="do not fit"):
        form({f"A{letter}": 1 for letter in "ABCDEFGHI"}, rows=4, columns=4)


def test_the_bundled_model_answers() -> None:
    torch.set_num_threads(1)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    processor = MediaProcessor.from_folder(TINY)
    prompts = PromptBuilder.from_folder(TINY, merge_size=2, max_model_len=4096)
    text = TokenText(prompts.tokenizer)
    rng = random.Random(5)
    pictures = [draw(kind, seed) for kind in ("form", "table", "shapes") for seed in range(7)]  # type: ignore[arg-type]
    pictures.append(form({"QF": 47, "AB": 5, "ZZ": 90}, rows=12, columns=8))
    right = asked = 0
    for picture in pictures:
        item = MediaItem.of("image", (picture.png(),))
        patches = processor.patches(item)
        for fact in rng.sample(picture.facts, 2):
            content = [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": fact.question}]
            prompt = prompts.build(
                parse_messages([{"role": "user", "content": content}]), [item.digest], [processor.meta(item)]
            )
            ids = torch.tensor([prompt.token_ids])
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=torch.from_numpy(patches.values),
                    image_grid_thw=torch.tensor([patches.grid]),
                    mm_token_type_ids=(ids == model.config.image_token_id).int(),
                    max_new_tokens=24,
                )
            right += text.decode(out[0, ids.shape[1] :].tolist()) == fact.answer
            asked += 1
    assert right / asked >= 0.95, f"{right} of {asked}"
