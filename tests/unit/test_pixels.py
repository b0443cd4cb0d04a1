"""The preprocessor's configuration: transformers' reading of it, and what cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from vlcache_dist.errors import CheckpointError, UnsupportedModel
from vlcache_dist.pixels import Cutter, PixelConfig


def written(folder: Path, values: Any, name: str = "preprocessor_config.json") -> Path:
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {"patch_size": 14},
        {"resample": 2, "do_rescale": False},
        {"do_normalize": False, "rescale_factor": 0.01},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "min_pixels": 3136, "max_pixels": 12544},
        {"patch_size": 16, "temporal_patch_size": 1, "size": {"shortest_edge": 1024, "longest_edge": 65536}},
    ],
)
def test_any_configuration_gives_transformers_patches(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = written(tmp_path, {"image_processor_type": "Qwen2VLImageProcessor", **values})
    config, oracle = PixelConfig.read(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
    picture = np.random.default_rng(3).integers(0, 256, (150, 210, 3), dtype=np.uint8)
    cutter = Cutter(config)
    cut, grid = cutter.cut(picture, config.image_size)
    wanted = oracle(images=[picture], input_data_format="channels_last", return_tensors="np")
    assert [1, *grid] == wanted["image_grid_thw"][0].tolist()
    np.testing.assert_array_equal(cutter.values([cut] * config.temporal_patch_size), wanted["pixel_values"])


def test_a_processor_config_wins_as_in_transformers(tmp_path: Path) -> None:
    written(tmp_path, {"max_pixels": 3136 * 4})
    written(tmp_path, {"image_processor": {"max_pixels": 3136 * 9}}, "processor_config.json")
    oracle = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert PixelConfig.read(tmp_path).image_size[1] == oracle.size["longest_edge"] == 3136 * 9
    written(tmp_path, {"processor_class": "Qwen2_5_VLProcessor"}, "processor_config.json")
    assert PixelConfig.read(tmp_path).image_size[1] == 3136 * 4


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (None, "has no preprocessor_config.json"),
        ("{", "cannot be read"),
        ([1], "is no JSON object"),
        ({"image_mean": [0.5]}, "has not three channels"),
        ({"image_std": 0.5}, "preprocessor_config.json: "),
        ({"size": [1, 2]}, "preprocessor_config.json: "),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, values: Any, why: str) -> None:
    if values is not None:
        written(tmp_path, values)
    with pytest.raises(CheckpointError, match=why):
        PixelConfig.read(tmp_path)


def test_pictures_that_are_not_resized_are_not_served(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="do_resize = false"):
        PixelConfig.read(written(tmp_path, {"do_resize": False}))


@pytest.mark.parametrize("size", [(1, 1), (27, 29), (28, 5600), (1000, 1), (5000, 4000), (56, 56)])
def test_sizes_are_smart_resize(size: tuple[int, int]) -> None:
    config = PixelConfig()
    try:
        wanted = smart_resize(*size, 28, *config.image_size)
    except ValueError as refused:
        with pytest.raises(ValueError, match=str(refused)):
            config.resized(*size, config.image_size)
        return
    assert config.resized(*size, config.image_size) == wanted
