"""The bundled model's training: what is drawn, what is computed, and a few steps from nothing to a checkpoint."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from training.batches import CELL_FIELDS, Encoder, cells, collate, draw_grids, positions, stream, validation
from training.export import MAX_BYTES, TEMPLATE, export, fresh_model
from training.network import MEAN, STD, atlas, forward, paint
from training.tasks import TRAIN_SEEDS, VALIDATION_SEEDS, WEIGHTS, Draw, families, sample
from training.train import Trainer
from vlcache_dist.demo.pictures import paint as paint_scene
from vlcache_dist.evaluate.cases import Shown
from vlcache_dist.media import MediaRef
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.rope import mrope_positions
from vlcache_dist.prompt import Conversation, PromptBuilder, TokenText
from vlcache_dist.wire import MediaMeta

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(TEMPLATE / "tokenizer.json")


def rows(count: int, grids: list[tuple[int, int]], family: str | None = None, seed: int = 0) -> list:
    draw = Draw(random.Random(seed))
    return [sample(draw, grids, 96, family) for _ in range(count)]


def test_batches_are_painted_as_pictures_are() -> None:
    for kind, grid in (("form", (8, 8)), ("table", (5, 7)), ("shapes", (6, 9))):
        shown = Shown(kind, 3, *grid)
        drawn = shown.scene()
        about, aux = cells(drawn)
        assert about.shape == (grid[0] * grid[1], CELL_FIELDS) and aux.max() > 0
        batch = paint(torch.from_numpy(about), atlas(), noise=False)
        patches = batch.view(*grid, 2, 2, 3, 14, 14).permute(4, 0, 2, 5, 1, 3, 6).reshape(3, grid[0] * 28, grid[1] * 28)
        pixels = patches * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        truth = np.asarray(paint_scene(drawn), np.float32).transpose(2, 0, 1) / 255
        assert np.abs(pixels.numpy() - truth).mean() < 0.03  # the noise that only one of them has


@pytest.mark.parametrize("grids", [[(8, 8)], [(5, 7), (9, 4)], [(4, 4), (8, 8), (6, 6)]])
def test_prompts_are_what_the_server_would_build(encoder: Encoder, grids: list[tuple[int, int]]) -> None:
    builder = PromptBuilder.from_folder(TEMPLATE, merge_size=2, max_model_len=4096)
    text = TokenText(builder.tokenizer)
    config = ModelConfig.load(TEMPLATE)
    for row in rows(12, grids):
        ids, spans, answers = encoder.encode(row)
        asked = type(row.dialogue)(row.dialogue.turns[:-1])
        pictures = asked.pictures
        metas = [MediaMeta("image", (1, 2 * p.rows, 2 * p.columns)) for p in pictures]
        media = tuple(MediaRef("image", (), str(i)) for i in range(len(pictures)))
        keys = [bytes([i]) * 32 for i in range(len(pictures))]
        prompt = builder.build(Conversation(asked.messages(), media), keys, metas)
        start, stop = answers[-1]
        assert list(prompt.token_ids) == ids[:start]
        assert text.decode(ids[start : stop - 1]) == row.dialogue.turns[-1][1][0] and ids[stop - 1] == encoder.im_end
        expected, _ = mrope_positions(len(ids), prompt.spans, config)
        assert (positions(len(ids), spans) == expected).all()


def test_every_family_asks_what_has_that_answer() -> None:
    assert {f for n in (1, 2, 3) for f in families(n)} == set(WEIGHTS)
    for count in (1, 2, 3):
        for family in families(count):
            for row in rows(8, [(8, 8)] * count, family, seed=5):
                turns = row.dialogue.turns
                assert turns[-1][0] == "assistant" and turns[-1][1][0], "an answer is empty"
                assert len(row.families) == sum(role == "assistant" for role, _ in turns)
    rule = rows(30, [(8, 8)], "rule", seed=2)
    backwards = [r for r in rule if r.families[0][1] == "backwards"]
    (picture,) = backwards[0].dialogue.pictures
    asked, answer = backwards[0].dialogue.turns[-2][1][-1], backwards[0].dialogue.turns[-1][1][0]
    truth = {f.question: f.answer for f in picture.scene().facts}
    assert truth[asked] == answer[::-1]


def test_splits_share_no_picture(encoder: Encoder) -> None:
    assert TRAIN_SEEDS[1] <= VALIDATION_SEEDS[0]
    first, again = (next(validation(encoder, 2, [(4, 4)])) for _ in range(2))
    assert torch.equal(first.ids, again.ids)


def test_the_network_is_transformers_model(encoder: Encoder) -> None:
    """Sizes that are no multiple of a window, two pictures, fp32."""
    model = fresh_model(encoder)
    batch = collate(rows(2, [(5, 7), (8, 4)], "labelled"), encoder, 320)
    sprites = atlas()
    with torch.no_grad():
        parts = [
            {n.removeprefix(p): w for n, w in model.named_parameters() if n.startswith(p)}
            for p in ("model.visual.", "model.language_model.")
        ]
        logits, tokens = forward(model.config, *parts, batch, sprites, noise=False)
        pixels = [paint(c.flatten(0, 1), sprites, noise=False) for c in batch.cells]
        doubled = [p.view(-1, 3, 1, 196).expand(-1, 3, 2, 196).reshape(-1, 1176) for p in pixels]
        grids = [[1, 2 * rows_, 2 * columns] for rows_, columns in batch.grids for _ in range(2)]
        seen = model.model.visual(torch.cat(doubled), torch.tensor(grids))
        theirs = getattr(seen, "pooler_output", seen)
        theirs = torch.cat(list(theirs)) if isinstance(theirs, tuple | list) else theirs
        assert torch.allclose(tokens, theirs, atol=2e-4), (tokens - theirs).abs().max()
        x = model.model.language_model.embed_tokens(batch.ids)
        x = x.flatten(0, 1).index_copy(0, batch.vision, tokens).view(x.shape)
        out = model.model.language_model(inputs_embeds=x, position_ids=batch.positions).last_hidden_state
        expected = model.lm_head(out.flatten(0, 1)[batch.learn])
    assert torch.allclose(logits, expected, atol=2e-3), (logits - expected).abs().max()


def test_a_few_steps_learn_something_resume_and_export(tmp_path: Path) -> None:
    options = {"seconds": 3600.0, "rate": 3e-3, "tokens": 256, "workers": 0, "seed": 1, "device": "cpu"}
    said: list[str] = []
    trainer = Trainer(tmp_path, **options)
    trainer.sizes = [(4, 4)]
    trainer.run(3, 1, said.append)
    assert trainer.step == 3 and (tmp_path / "best" / "model.safetensors").exists()
    again = Trainer(tmp_path, **options)
    assert again.resume() and again.step == 3 and again.schedule.before > 0
    assert all(torch.equal(p, again.named[n]) for n, p in trainer.named.items())
    again.sizes = [(4, 4)]
    again.run(1, 1, said.append)
    history = json.loads((tmp_path / "history.json").read_text())
    assert [entry["step"] for entry in history] == [3, 4] and 0 <= history[0]["mean"] <= 1
    size = sum(f.stat().st_size for f in (tmp_path / "best").iterdir())
    assert 10 << 20 < size <= MAX_BYTES

    from vlcache_dist.model.weights import Checkpoint

    checkpoint = Checkpoint.open(str(tmp_path / "best"), None)
    assert checkpoint.config.text.num_layers == 8
    checkpoint.load_language_model("cpu", torch.float32)
    checkpoint.load_vision_tower("cpu", torch.float32)


def test_sizes_grow_with_hardness(encoder: Encoder) -> None:
    rng = random.Random(0)
    easy, hard = ([draw_grids(rng, h) for _ in range(300)] for h in (0.0, 1.0))
    assert all(len(g) == 1 for g in easy) and {len(g) for g in hard} == {1, 2, 3}
    assert {s for g in hard for grid in g for s in grid} == set(range(4, 13))
    batch = next(stream(encoder, 1, 2000, 1.0))
    assert len(batch.learn) and int(batch.learn.max()) < batch.ids.numel()
    assert batch.vision.numel() == len(batch.ids) * sum(a * b for a, b in batch.grids)


def test_export_refuses_what_is_too_large(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.export.MAX_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="MiB"):
        export(fresh_model(encoder), tmp_path / "x")
