"""M-RoPE positions: worked examples, then transformers' get_rope_index over drawn prompts with long videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_oracle import FRACTIONAL_SECONDS, draw_config
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.rope import MRope, mrope_positions
from vlcache_dist.types import MediaSpan


@pytest.fixture(scope="module")
def oracle() -> Qwen2_5_VLModel:
    config = draw_config(np.random.default_rng(5))
    config.vision_config.spatial_merge_size = 2
    config.vision_config.tokens_per_second = 2
    return Qwen2_5_VLModel(config)


@pytest.fixture(scope="module")
def config(oracle: Qwen2_5_VLModel) -> ModelConfig:
    return ModelConfig.parse(oracle.config.to_dict())


def video(start: int, grid: tuple[int, int, int], seconds: float) -> MediaSpan:
    return MediaSpan(b"", start, grid[0] * grid[1] * grid[2] // 4, grid, "video", seconds)


def test_image_between_texts(config: ModelConfig) -> None:
    positions, delta = mrope_positions(9, [MediaSpan(b"", 2, 6, (1, 4, 6))], config)
    np.testing.assert_array_equal(positions[0], [0, 1, 2, 2, 2, 2, 2, 2, 5])
    np.testing.assert_array_equal(positions[1], [0, 1, 2, 2, 2, 3, 3, 3, 5])
    np.testing.assert_array_equal(positions[2], [0, 1, 2, 3, 4, 2, 3, 4, 5])
    assert positions.dtype == np.int32
    assert delta == -3  # the next token is at 6


@pytest.mark.parametrize(
    ("seconds", "temporal"),
    [(0.0, [0, 0, 0, 0]), (0.125, [0, 0, 0, 0]), (0.25, [0, 0, 1, 1]), (0.7, [0, 1, 2, 4]), (4.0, [0, 8, 16, 24])],
)
def test_temporal_interval_truncates(config: ModelConfig, seconds: float, temporal: list[int]) -> None:
    positions, delta = mrope_positions(6, [video(1, (4, 2, 2), seconds)], config)
    np.testing.assert_array_equal(positions[0], [0, *(1 + t for t in temporal), 2])
    np.testing.assert_array_equal(positions[1:], [[0, 1, 1, 1, 1, 2]] * 2)
    assert delta == -3  # text goes on at 3, however far the video's t axis ran


def test_text_only_and_empty(config: ModelConfig) -> None:
    positions, delta = mrope_positions(4, [], config)
    np.testing.assert_array_equal(positions, [[0, 1, 2, 3]] * 3)
    assert delta == 0
    positions, delta = mrope_positions(0, [], config)
    assert positions.shape == (3, 0)
    assert delta == 0


@pytest.mark.parametrize(
    "spans",
    [
        [MediaSpan(b"", 0, 5, (1, 4, 4))],
        [MediaSpan(b"", 7, 4, (1, 4, 4))],
        [MediaSpan(b"", 0, 4, (1, 4, 4)), MediaSpan(b"", 3, 4, (1, 4, 4))],
    ],
)
def test_spans_that_do_not_fit(config: ModelConfig, spans: list[MediaSpan]) -> None:
    with pytest.raises(ValueError, match="span at"):
        mrope_positions(10, spans, config)


@pytest.mark.parametrize("seed", range(40))
def test_equals_transformers(oracle: Qwen2_5_VLModel, config: ModelConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    types, spans, seconds = [], [], []
    for _ in range(int(rng.integers(1, 6))):
        types += [0] * int(rng.integers(1, 12))
        is_video = bool(rng.random() < 0.5)
        t = int(rng.integers(2, 250)) if is_video else 1  # up to 250 frames
        grid = (t, int(rng.integers(1, 9)) * 2, int(rng.integers(1, 9)) * 2)
        fps = float(rng.choice([0.1, 0.3, 0.5, 1, 2, 3, 8, 24, 30]))
        interval = 2 / fps if FRACTIONAL_SECONDS else float(rng.integers(1, 9))
        length = t * grid[1] * grid[2] // 4
        kind = "video" if is_video else "image"
        spans.append(MediaSpan(b"", len(types), length, grid, kind, interval if is_video else 0.0, len(spans)))
        seconds += [interval] if is_video else []
        types += [2 if is_video else 1] * length
    types += [0] * int(rng.integers(1, 12))
    grids = {kind: torch.tensor([s.grid for s in spans if s.modality == kind]) for kind in ("image", "video")}
    expected, delta = oracle.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.long),
        torch.tensor([types]),
        image_grid_thw=grids["image"],
        video_grid_thw=grids["video"],
        second_per_grid_ts=torch.tensor(seconds),
    )
    positions, ours = mrope_positions(len(types), spans, config)
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    largest, last = int(positions.max()), int(positions[0, -1])
    assert int(delta) == largest + 1 - len(types)
    assert ours == last + 1 - len(types)
    if not seconds:
        assert ours == int(delta)


def test_angles_follow_their_axis(oracle: Qwen2_5_VLModel, config: ModelConfig) -> None:
    positions = torch.randint(0, 5000, (3, 17), dtype=torch.int32)
    cos, sin = MRope(config.text, "cpu")(positions)
    want_cos, want_sin = oracle.language_model.rotary_emb(torch.zeros(1), positions[:, None].long())
    half = config.text.head_dim // 2
    torch.testing.assert_close(cos, want_cos[0, :, :half], rtol=0, atol=0)
    torch.testing.assert_close(sin, want_sin[0, :, :half], rtol=0, atol=0)
    assert cos.dtype == torch.float32
    assert cos.is_contiguous() and sin.is_contiguous()
