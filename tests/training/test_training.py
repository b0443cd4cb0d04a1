"""The bundled model's training: what is drawn, what is computed, and a few steps from nothing to a checkpoint."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.batches import CELL_FIELDS, Encoder, Shape, cells, collate, fitting, positions, shapes, stream, validation
from training.export import MAX_BYTES, TEMPLATE, export, fresh_model
from training.network import MEAN, STD, atlas, forward, paint
from training.shrink import Neurons, dialogues, parts, shrink
from training.tasks import TRAIN_SEEDS, VALIDATION_SEEDS, WEIGHTS, Draw, dense, families, sample
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
        seen = forward(model.config, *parts, batch, sprites, noise=False)
        pixels = [paint(c.flatten(0, 1), sprites, noise=False) for c in batch.cells]
        doubled = [p.view(-1, 3, 1, 196).expand(-1, 3, 2, 196).reshape(-1, 1176) for p in pixels]
        grids = [[1, 2 * rows_, 2 * columns] for rows_, columns in batch.grids for _ in range(2)]
        theirs = model.model.visual(torch.cat(doubled), torch.tensor(grids))
        theirs = getattr(theirs, "pooler_output", theirs)
        theirs = torch.cat(list(theirs)) if isinstance(theirs, tuple | list) else theirs
        assert torch.allclose(seen.tokens, theirs, atol=2e-4), (seen.tokens - theirs).abs().max()
        x = model.model.language_model.embed_tokens(batch.ids)
        x = x.flatten(0, 1).index_copy(0, batch.vision, seen.tokens).view(x.shape)
        out = model.model.language_model(inputs_embeds=x, position_ids=batch.positions).last_hidden_state
        expected = model.lm_head(out.flatten(0, 1)[batch.learn])
    assert torch.allclose(seen.logits, expected, atol=2e-3), (seen.logits - expected).abs().max()


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
    assert checkpoint.config.text.num_layers == 10
    checkpoint.load_language_model("cpu", torch.float32)
    checkpoint.load_vision_tower("cpu", torch.float32)


def test_a_model_grows_up_when_data_are_as_hard_as_they_get(tmp_path: Path) -> None:
    """Until then whole pictures are read and auxiliary readers learn; from then on neither."""
    trainer = Trainer(tmp_path, seconds=3600.0, rate=3e-3, tokens=256, workers=0, seed=1, device="cpu")
    trainer.sizes = [(4, 4)]
    reader = trainer.aux[0].weight

    def run_at(progress: float) -> bool:
        """Whether the readers learnt."""
        trainer.schedule.before, before = progress * 3600, reader.clone()
        trainer.run(1, 1, lambda text: None)
        return not torch.equal(reader, before)

    assert run_at(0.2) and not trainer.grown
    young = trainer.one_step
    assert not run_at(0.6) and trainer.grown and trainer.one_step is not young


def test_whole_pictures_are_read_only_by_the_young() -> None:
    for hardness in (0.5, 1.0):
        draw = Draw(random.Random(3), hardness=hardness)
        asked = {draw.fact(Shown("form", 3, 6, 6).scene()).question for _ in range(100)}
        assert any(q.startswith("Read row") for q in asked) == (hardness < 1)


def test_shrinking_keeps_what_is_needed(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the MLPs' neurons write little. If they are copies of others they are not missed, since these write
    their part as well; if they are not, they are."""
    monkeypatch.setattr("training.shrink.BATCHES", 3)
    torch.manual_seed(4)
    config = copy.deepcopy(fresh_model(encoder).config)
    config.text_config.update({"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "intermediate_size": 64})
    config.vision_config.update({"depth": 2, "fullatt_block_indexes": [1], "intermediate_size": 64})
    student = type(fresh_model(encoder))(config).float()
    wide = copy.deepcopy(config)
    wide.text_config.intermediate_size = wide.vision_config.intermediate_size = 128
    teacher = type(student)(wide).float()
    batch, sprites = next(stream(encoder, 9, 600, 0.0)), atlas()

    def said(model: Any) -> torch.Tensor:
        with torch.no_grad():
            named = dict(model.named_parameters())
            return forward(config, *parts(named, torch.float32), batch, sprites, noise=False).logits

    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if ".mlp." in name and "merger" not in name:
                p.normal_(0, 0.3)
                if name.endswith("down_proj.weight"):
                    p[:, 64:] *= 0.003
    lost: list[list[float]] = []
    for copied in (False, True):
        if copied:
            for name, p in teacher.named_parameters():
                if ".mlp." in name and "merger" not in name and not name.endswith("down_proj.bias"):
                    p.data = p.data[:64].repeat(2, *[1] * (p.ndim - 1)) if "down" not in name else p.data
        neurons = Neurons(teacher)
        neurons.watch(batch, sprites)
        lost.append([neurons.kept(name, 64)[3] for name in neurons.down])
        shrink(teacher, student, dialogues(encoder, 600, 3), lambda text: None)
        assert (said(student) - said(teacher)).abs().max() < 0.2 * said(teacher).abs().max()
    assert len(lost[0]) == 4 and sorted(lost[1])[2] < min(lost[0]) / 100, lost


def test_a_start_goes_on_from_a_checkpoint(tmp_path: Path, encoder: Encoder) -> None:
    """With a frozen tower only the language model changes, and what it could say is not forgotten at once."""
    torch.manual_seed(3)
    export(fresh_model(encoder), tmp_path / "start")
    options = {"seconds": 3600.0, "rate": 3e-3, "tokens": 256, "workers": 0, "seed": 1, "device": "cpu"}
    trainer = Trainer(tmp_path, start=tmp_path / "start", frozen_tower=True, **options)
    before = {n: p.clone() for n, p in trainer.every.items()}
    trainer.sizes = [(4, 4)]
    trainer.run(2, 1, lambda text: None)
    changed = {n for n, p in trainer.every.items() if not torch.equal(p, before[n])}
    assert changed and not [n for n in changed if "visual" in n]


def test_batches_have_few_shapes_of_all_sizes(encoder: Encoder) -> None:
    known = shapes(4000)
    assert {side for many in known.values() for shape in many for grid in shape.grids for side in grid} == set(
        range(4, 13)
    )
    assert all(len(shape.grids) == count for count, many in known.items() for shape in many)
    easy, hard = stream(encoder, 1, 1000, 0.0), stream(encoder, 1, 2000, 1.0)
    assert {tuple(next(easy).grids) for _ in range(6)} == {((8, 8),)}
    seen = {}
    for _ in range(30):
        batch = next(hard)
        assert batch.learn.unique().numel() == len(batch.learn) and int(batch.learn.max()) < batch.ids.numel()
        learnt = batch.target >= 0
        assert torch.equal(batch.ids.flatten()[batch.learn + 1][learnt], batch.target[learnt])
        assert int(batch.answer.max()) <= len(batch.families)
        assert batch.vision.numel() == len(batch.ids) * sum(a * b for a, b in batch.grids)
        assert seen.setdefault(batch.shape, [t.shape for t in batch.tensors]) == [t.shape for t in batch.tensors]
    assert {len(b) - 3 for b in seen} == {1, 2, 3}


def test_a_dialogue_that_does_not_fit_is_drawn_again(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text has more tokens than was guessed: pictures must not lie behind the row's end."""
    plain, lengths = Draw.prose, []

    def verbose(draw: Draw, count: int) -> str:
        return plain(draw, 4 * count)

    monkeypatch.setattr(Draw, "prose", verbose)
    draw, shape = Draw(random.Random(3)), Shape(((8, 8),), 384, 40, 512)
    drawn = [sample(draw, shape.grids, shape.room, "prefix") for _ in range(40)]
    assert any(encoder.encode(row)[1][0][0] + 64 > shape.length for row in drawn), "nothing was too long"
    for _ in range(40):
        _, ((start, shown),), answers = encoder.encode(fitting(draw, shape, encoder))
        lengths.append(max(start + shown.rows * shown.columns, answers[0][1]))
    assert max(lengths) <= shape.length


def test_places_are_told_to_the_early_layers(encoder: Encoder) -> None:
    scene_ = Shown("form", 3, 4, 6).scene()
    _, aux = cells(scene_)
    aux = aux.reshape(4, 6, -1)
    assert (aux[:, 1:, 3:5] == aux[:, :-1, :2]).all() and not aux[:, 0, 3:5].any()
    assert (aux[:, :, 5] == aux[:, :1, 0]).all() and (aux[:, :, 6] == aux[:1, :, 0]).all()
    assert (aux[2, :, 7] == 2).all() and (aux[:, 5, 8] == 5).all()


def test_dense_answers_read_in_order() -> None:
    scene_ = Shown("form", 3, 4, 6).scene()
    row = {s.column: s.name for s in scene_.sprites if s.row == scene_.sprites[0].row}
    facts = {f.question: f.answer for f in dense(scene_, True)}
    first = f"Read row {scene_.sprites[0].row + 1}."
    assert facts[first] == " ".join(row[c] for c in sorted(row)) and facts["Read all."].startswith(facts[first])
    shapes_ = dense(Shown("shapes", 4, 6, 8).scene(), False)
    assert all(f.answer.count(",") == 3 for f in shapes_) and "Read all." not in {f.question for f in shapes_}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_step_is_the_step(tmp_path: Path, encoder: Encoder) -> None:
    """Three batches of one shape: kernel by kernel, recorded, replayed; against a trainer that records nothing. The
    pictures' noise differs, so only the course of the loss is compared."""
    losses = []
    for graphed in (True, False):
        options = {"seconds": 3600.0, "rate": 1e-3, "tokens": 4096, "workers": 0, "seed": 1, "device": "cuda"}
        trainer = Trainer(tmp_path / str(graphed), **options)
        trainer.one_step._graphed = graphed
        batches = stream(encoder, 3, 4096, 0.0)
        shape = None
        found = []
        while len(found) < 6:
            batch = next(batches)
            shape = shape or batch.shape
            if batch.shape == shape:
                trainer._set_rates()
                trainer.step += 50
                found.append(trainer.one_step(batch).item())
        assert trainer.one_step.graphs == int(graphed)
        losses.append(found)
    assert np.allclose(losses[0], losses[1], rtol=0.05), losses


def test_export_refuses_what_is_too_large(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.export.MAX_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="MiB"):
        export(fresh_model(encoder), tmp_path / "x")
