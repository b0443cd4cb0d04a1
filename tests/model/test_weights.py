"""Checkpoints in every form they come in, and what is wrong with the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from model_oracle import draw_config, draw_model, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from vlcache_dist.errors import CheckpointError
from vlcache_dist.model.weights import Checkpoint, resolve

Tensors = dict[str, torch.Tensor]
TIED, UNTIED = 1, 2  # seeds


def save(
    folder: Path, seed: int, *, hub: bool = False, sharded: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    config = draw_config(np.random.default_rng(7))
    config.tie_word_embeddings = seed == TIED
    model = draw_model(config, seed).to(dtype)
    return save_checkpoint(model, folder, hub=hub, shard_size="20KB" if sharded else "5GB")


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def parameters(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Tensors:
    language = checkpoint.load_language_model("cpu", dtype)
    return language.parameters() | checkpoint.load_vision_tower("cpu", dtype).parameters()


@pytest.mark.parametrize("seed", [TIED, UNTIED])
@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_form_holds_the_same_weights(tmp_path: Path, seed: int, hub: bool, sharded: bool) -> None:
    reference = Checkpoint(save(tmp_path / "reference", seed))
    folder = save(tmp_path / "other", seed, hub=hub, sharded=sharded)
    assert (folder / "model.safetensors.index.json").exists() == sharded
    other = Checkpoint(folder)
    assert any(tensor.name.startswith("visual.") for tensor in other.tensors.values()) == hub
    assert other.fingerprint == reference.fingerprint
    ours, theirs = parameters(other), Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "reference")
    expected = dict(theirs.named_parameters())
    assert set(ours) == set(expected)  # named_parameters lists tied ones once
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=0)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(tmp_path: Path, stored: torch.dtype, computed: torch.dtype) -> None:
    checkpoint = Checkpoint(save(tmp_path, UNTIED, dtype=stored))
    assert checkpoint.config.dtype == str(stored).removeprefix("torch.")
    on_disk = load_file(tmp_path / "model.safetensors")
    for name, tensor in parameters(checkpoint, computed).items():
        assert tensor.dtype == computed
        torch.testing.assert_close(tensor, on_disk[name].to(computed), rtol=0, atol=0)


def test_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    first, second = Checkpoint(save(tmp_path / "a", UNTIED)), Checkpoint(save(tmp_path / "b", 3))
    assert len(first.fingerprint) == 64
    assert first.fingerprint != second.fingerprint
    nudged = save(tmp_path / "c", UNTIED)
    rewrite(nudged, lambda tensors: tensors["model.language_model.layers.1.self_attn.k_proj.bias"].add_(1e-3))
    assert Checkpoint(nudged).fingerprint != first.fingerprint
    changed = save(tmp_path / "d", UNTIED)
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 12345.0
    (changed / "config.json").write_text(json.dumps(config))
    assert Checkpoint(changed).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.1.self_attn.v_proj.bias",
        "model.visual.merger.mlp.2.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, UNTIED)
    rewrite(folder, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(CheckpointError, match=f"missing tensor {name}$"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["model.language_model.layers.9.mlp.up_proj.weight", "visual.pos_embed", "extra.bias"])
def test_extra_tensor(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, UNTIED)
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=f"extra tensor {name}$"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["model.language_model.layers.0.self_attn.k_proj.weight", "model.visual.patch_embed.proj.weight"]
)
def test_misshapen_tensor(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, UNTIED)
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(CheckpointError, match=rf"tensor {name} is \(.*expected \("):
        Checkpoint(folder)


def test_errors_use_the_names_of_the_file(tmp_path: Path) -> None:
    folder = save(tmp_path, UNTIED, hub=True)
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is"):
        Checkpoint(folder)
    rewrite(folder, lambda tensors: tensors.__delitem__("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"missing tensor model\.norm\.weight$"):
        Checkpoint(folder)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    folder, name = save(tmp_path, UNTIED), "model.language_model.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=f"{name} has dtype I8"):
        Checkpoint(folder)


def test_tied_head_may_be_stored_twice_if_equal(tmp_path: Path) -> None:
    folder = save(tmp_path, TIED)
    embedding = "model.language_model.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    Checkpoint(folder)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding] + 1}))
    with pytest.raises(CheckpointError, match=r"extra tensor lm_head\.weight"):
        Checkpoint(folder)


def test_tensor_stored_under_both_names(tmp_path: Path) -> None:
    folder = save(tmp_path, UNTIED)
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="stored twice"):
        Checkpoint(folder)


@pytest.mark.parametrize("damage", ["absent", "empty", "truncated header"])
def test_unreadable_file(tmp_path: Path, damage: str) -> None:
    folder = save(tmp_path, UNTIED)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes(content[:100] if damage == "truncated header" else b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(folder)


def test_truncated_data(tmp_path: Path) -> None:
    folder = save(tmp_path, UNTIED)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = save(tmp_path, UNTIED, sharded=True)
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        Checkpoint(folder)


def test_hub_names_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    save(tmp_path, UNTIED)
    Checkpoint.open("Some/Model", revision="abc")
    assert asked == [("Some/Model", "abc")]


@pytest.mark.parametrize("name", ["no/such/folder/anywhere", "Some/Model"])
def test_neither_folder_nor_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=name):
        resolve(name)
