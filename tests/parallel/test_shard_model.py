"""How a model is dealt out to ranks: what is refused, and what a rank reads of a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vlcache_dist.assembly import Model
from vlcache_dist.bench.shapes import model_config
from vlcache_dist.config import Settings
from vlcache_dist.engine.build import kv_layout
from vlcache_dist.errors import ConfigError
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.model.parallel import LanguageShard, Shard, load_shard, shard_config
from vlcache_dist.model.weights import Checkpoint
from vlcache_dist.transfer.fetch import checksums_agree


def unused(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("nothing is summed here")


@pytest.mark.parametrize(
    ("shape", "sizes"), [("3b", (1, 2)), ("7b", (1, 2, 4)), ("32b", (1, 2, 4, 8)), ("72b", (2, 4, 8))]
)
def test_the_shapes_that_are_served_can_be_dealt_out(shape: str, sizes: tuple[int, ...]) -> None:
    config = model_config(shape)
    for size in sizes:
        shard = shard_config(config.text, size)
        assert shard.num_heads * size == config.text.num_heads and shard.head_dim == config.text.head_dim
        layout = kv_layout(config, "weights", "bfloat16", size)
        assert layout.kv_token * size == kv_layout(config, "weights", "bfloat16").kv_token


@pytest.mark.parametrize("size", [3, 8])
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"engine.tensor_parallel = {size}.*4 KV heads.*choose one of 1, 2, 4"):
        shard_config(model_config("7b").text, size)
    settings = Settings.read(model={"model": "tiny", "device": "cpu"}, engine={"tensor_parallel": size})
    with pytest.raises(ConfigError, match=r"2 KV heads.*choose one of 1, 2$"):
        Model.open(settings)


def test_the_shards_of_a_checkpoint_make_up_the_model() -> None:
    checkpoint = Checkpoint.open("tiny")
    whole = checkpoint.load_language_model("cpu", torch.float32)
    shards = [load_shard(checkpoint, Shard(rank, 2), unused, "cpu", torch.float32) for rank in range(2)]
    parts = [shard.parameters() for shard in shards]
    for name, tensor in whole.parameters().items():
        ours = [part[name] for part in parts]
        if all(part.shape == tensor.shape for part in ours):
            assert all(torch.equal(part, tensor) for part in ours), name
        else:
            dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            assert torch.equal(torch.cat(ours, dim), tensor), name


def test_only_the_first_rank_has_an_output_head() -> None:
    config = replace(model_config("tiny"), tie_word_embeddings=False)
    first, second = (
        LanguageShard(config.text, False, Shard(rank, 2), unused, "meta", torch.float32) for rank in range(2)
    )
    assert "lm_head.weight" in first.parameters() and "lm_head.weight" not in second.parameters()
    assert second.logits(torch.empty(3, config.text.hidden_size)).shape == (3, 1)


def test_a_difference_in_tensor_parallel_size_is_named_and_encoders_have_none() -> None:
    one = kv_layout(model_config("7b"), "weights", "bfloat16")
    two = kv_layout(model_config("7b"), "weights", "bfloat16", 2)
    assert "tp_size: 1 here, 2 there" in one.difference(two)
    assert "tp_rank: 0 here, 1 there" in two.difference(_rank(two, 1))
    for layout in (one, two, _rank(two, 1)):
        assert layout.difference(one.without_kv()) == one.without_kv().difference(layout) == ""
    other = kv_layout(model_config("7b"), "other weights", "bfloat16").without_kv()
    assert two.difference(other) == "model: 'weights' here, 'other weights' there"


def test_every_shards_checksum_counts() -> None:
    a, b = b"a" * 16, b"b" * 16
    assert checksums_agree(a, a) and checksums_agree(a + b, a + b)
    assert checksums_agree(a + a, a), "encoder output, announced by a holder that has it in one piece"
    for announced in (a, b, b + a, a + b + a, b"", None):
        assert not checksums_agree(a + b, announced)
    assert not checksums_agree(a, a + b)


def _rank(layout: KVLayout, rank: int) -> KVLayout:
    return KVLayout(**{name: getattr(layout, name) for name in layout.__struct_fields__} | {"tp_rank": rank})
