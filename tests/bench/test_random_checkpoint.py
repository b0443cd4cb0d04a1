"""Checkpoints with random weights: what a benchmark serves must load, and answer with text of the length asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from vlcache_dist import LLM, SamplingParams
from vlcache_dist.bench import checkpoint
from vlcache_dist.bench.checkpoint import printable, write_random
from vlcache_dist.demo.pictures import draw
from vlcache_dist.errors import ConfigError
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.weights import BUNDLED, Checkpoint, resolve


def test_it_answers_with_printable_text_to_the_last_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 10 << 20)
    write_random(tmp_path / "model", "tiny", "cpu", "float32")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    (tmp_path / "picture.png").write_bytes(draw("form", 3).png())
    llm = LLM(model=str(tmp_path / "model"), device="cpu", dtype="float32")
    image = {"type": "image_url", "image_url": {"url": (tmp_path / "picture.png").as_uri()}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]
    answer = llm.chat(messages, SamplingParams(max_tokens=9))
    assert len(answer.token_ids) == 9 and set(answer.token_ids) <= set(printable(resolve(BUNDLED)))
    assert answer.text.isascii() and answer.finish_reason == "length"


def test_two_seeds_are_two_models(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_random(tmp_path / str(seed), "tiny", "cpu", "float32", seed)
    assert Checkpoint(tmp_path / "0").fingerprint != Checkpoint(tmp_path / "1").fingerprint


@pytest.mark.parametrize("shape", ["3b", "7b"])
def test_larger_shapes_speak_the_bundled_tokenizers_tokens(shape: str) -> None:
    config = ModelConfig.parse(checkpoint._config(shape, resolve(BUNDLED)))
    tokenizer = Tokenizer.from_file(str(resolve(BUNDLED) / "tokenizer.json"))
    assert config.image_token_id == tokenizer.token_to_id("<|image_pad|>")
    assert config.text.vocab_size > 150_000 and config.text.hidden_size in (2048, 3584)
    bundled = json.loads((resolve(BUNDLED) / "config.json").read_text())
    assert checkpoint._config(shape, resolve(BUNDLED))["eos_token_id"] == bundled["text_config"]["eos_token_id"]


def test_an_unknown_shape_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="9000b"):
        write_random(tmp_path / "model", "9000b", "cpu")
    assert not (tmp_path / "model").exists()
