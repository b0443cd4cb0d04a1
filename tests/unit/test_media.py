"""Grids and patches against transformers' own processors; limits; hostile files."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vlcache_dist
from vlcache_dist.config import MediaSettings
from vlcache_dist.errors import InvalidMedia, PayloadTooLarge
from vlcache_dist.hashing import ModelIdentity
from vlcache_dist.media import MediaItem, MediaProcessor

TINY = Path(vlcache_dist.__file__).parent / "data" / "tiny"
LIMITS = MediaSettings(max_bytes=300_000, max_pixels=400_000, max_video_pixels=2_000_000, max_frames=20)
MODEL = ModelIdentity("tiny", "", "w", "float32")


@pytest.fixture(scope="module")
def processor() -> MediaProcessor:
    return MediaProcessor.from_folder(TINY, LIMITS)


@pytest.fixture(scope="module")
def oracle() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil.from_pretrained(TINY)


def pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, fmt: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, fmt, **options)
    return out.getvalue()


@pytest.mark.parametrize("size", [(224, 336), (50, 3), (3, 50), (123, 457), (28, 28), (20, 20)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_patches_equal_transformers(
    processor: MediaProcessor, oracle: Qwen2VLImageProcessorPil, mode: str, size: tuple[int, int]
) -> None:
    data = encoded(Image.fromarray(pixels(*size)).convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    item = MediaItem.of("image", (data,))
    found, wanted = processor.patches(item), oracle(images=[Image.open(io.BytesIO(data))], return_tensors="np")
    assert found.values.dtype == np.float32
    np.testing.assert_array_equal(found.values, wanted["pixel_values"])
    assert list(found.grid) == wanted["image_grid_thw"][0].tolist()
    assert processor.meta(item).grid == found.grid


@given(width=st.integers(1, 900), height=st.integers(1, 900))
def test_grid_from_the_header_is_the_decoded_grid_s_formula(
    processor: MediaProcessor, oracle: Qwen2VLImageProcessorPil, width: int, height: int
) -> None:
    item = MediaItem.of("image", (encoded(Image.new("1", (width, height))),))
    if width * height > LIMITS.max_pixels or max(width, height) / min(width, height) > 200:
        with pytest.raises(InvalidMedia):
            processor.meta(item)
        return
    t, h, w = processor.meta(item).grid
    assert t == 1 and h * w == oracle.get_number_of_image_patches(height, width)
    assert processor.num_tokens((t, h, w)) == h * w // 4


def transformers_video_patchify() -> Any:
    """The method itself, out of a module that cannot be imported without torchvision."""
    package = importlib.util.find_spec("transformers.models.qwen2_vl")
    assert package is not None and package.origin is not None
    source = Path(package.origin).with_name("video_processing_qwen2_vl.py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "patchify":
            scope: dict[str, Any] = {"torch": torch}
            exec(compile(ast.Module([node], []), "patchify", "exec"), scope)
            return scope["patchify"]
    pytest.skip("this transformers has no separate patchify")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_video_patches_equal_transformers(
    processor: MediaProcessor, oracle: Qwen2VLImageProcessorPil, count: int
) -> None:
    frames = [pixels(84, 56, seed) for seed in range(count)]
    item = MediaItem.of("video", tuple(encoded(frame) for frame in frames), fps=4.0)
    found = processor.patches(item)
    mean, std = np.asarray(oracle.image_mean), np.asarray(oracle.image_std)
    video = torch.from_numpy(np.stack([((f / 255 - mean) / std).transpose(2, 0, 1) for f in frames])).float()[None]
    wanted, t, h, w = transformers_video_patchify()(None, video, 14, 2, 2)
    assert found.grid == (t, h, w)
    np.testing.assert_allclose(found.values, wanted[0].numpy(), atol=1e-5)
    meta = processor.meta(item)
    assert (meta.modality, meta.grid, meta.second_per_grid) == ("video", found.grid, 0.5)


def test_rate_of_frames_defaults_to_two_a_second(processor: MediaProcessor) -> None:
    item = MediaItem.of("video", (encoded(pixels(56, 56)),) * 2)
    assert processor.meta(item).second_per_grid == 1.0


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_animations_are_videos(processor: MediaProcessor, fmt: str) -> None:
    images = [Image.new("RGB", (84, 56), (40 * i, 200, 10)) for i in range(5)]
    data = encoded(images[0], fmt, save_all=True, append_images=images[1:], duration=250, lossless=True)
    item = MediaItem.of("video", (data,))
    meta = processor.meta(item)
    assert meta.second_per_grid == pytest.approx(0.5)
    assert meta.grid == (3, 4, 6)
    assert processor.patches(item).grid == meta.grid
    sampling = processor.sampling(item)
    assert sampling is not None and len(sampling.frames) == 5
    assert processor.meta(MediaItem.of("video", (data,), fps=1.0)).second_per_grid == 2.0
    assert processor.meta(MediaItem.of("image", (data,))).grid == (1, 4, 6)


def test_video_limits_of_their_own(tmp_path: Path) -> None:
    shutil.copy(TINY / "preprocessor_config.json", tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}})
    )
    own = MediaProcessor.from_folder(tmp_path, LIMITS)
    data = encoded(Image.new("RGB", (224, 224)))
    assert own.meta(MediaItem.of("image", (data,))).grid == (1, 16, 16)
    video = MediaItem.of("video", (data, data))
    assert own.meta(video).grid == (1, 4, 4) == own.patches(video).grid


def test_the_hub_s_configuration_form(tmp_path: Path) -> None:
    """``min_pixels`` and ``max_pixels`` instead of ``size``, and no file for videos: one pair of limits for both."""
    values = json.loads((TINY / "preprocessor_config.json").read_text())
    del values["size"]
    values |= {"min_pixels": 3136, "max_pixels": 112 * 112}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    hub = MediaProcessor.from_folder(tmp_path, LIMITS)
    data = encoded(Image.new("RGB", (224, 224)))
    image, video = MediaItem.of("image", (data,)), MediaItem.of("video", (data, data))
    assert hub.patches(image).grid == hub.meta(image).grid == (1, 8, 8)
    assert hub.patches(video).grid == hub.meta(video).grid == (1, 8, 8)
    assert hub.settings["image_size"] == hub.settings["video_size"] == [3136, 112 * 112]


def test_exif_orientation_is_not_applied(processor: MediaProcessor, oracle: Qwen2VLImageProcessorPil) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(pixels(112, 56), "JPEG", exif=exif)
    assert processor.patches(MediaItem.of("image", (data,))).grid == (1, 4, 8)
    assert oracle(images=[Image.open(io.BytesIO(data))], return_tensors="np")["image_grid_thw"][0].tolist() == [1, 4, 8]


HOSTILE = {
    "empty": b"",
    "text": b"not a picture",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "cut header": encoded(pixels(56, 56))[:20],
    "cut body": encoded(pixels(56, 56))[:-3000],
    "bad checksum": encoded(pixels(56, 56)).replace(b"IHDR", b"IHDX"),
    "tiff is not taken": encoded(pixels(56, 56), "TIFF"),
    "too many pixels": encoded(Image.new("1", (700, 700))),
    "too long": encoded(Image.new("1", (1, 250))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_one_kind_of_error_that_names_the_item(processor: MediaProcessor, name: str) -> None:
    item = MediaItem.of("image", (HOSTILE[name],), "messages[0].content[1]")
    with pytest.raises(InvalidMedia, match=r"^messages\[0\]\.content\[1\]"):
        processor.meta(item)
        processor.patches(item)


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    header = bytearray(encoded(Image.new("1", (1, 1))))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(InvalidMedia):
        MediaProcessor.from_folder(TINY).meta(MediaItem.of("image", (bytes(header),)))


def test_video_errors(processor: MediaProcessor) -> None:
    small, big = encoded(pixels(56, 56)), encoded(pixels(84, 56))
    with pytest.raises(InvalidMedia, match="frame 1 is 84 x 56"):
        processor.meta(MediaItem.of("video", (small, big)))
    with pytest.raises(InvalidMedia, match="frame 1: not a picture"):
        processor.meta(MediaItem.of("video", (small, b"x")))
    with pytest.raises(InvalidMedia, match="21 frames"):
        processor.meta(MediaItem.of("video", (small,) * 21))
    wide = encoded(Image.new("1", (600, 600)))
    with pytest.raises(InvalidMedia, match="more than 2000000 pixels"):
        processor.meta(MediaItem.of("video", (wide,) * 10))
    with pytest.raises(PayloadTooLarge):
        processor.meta(MediaItem.of("image", (b"x" * 300_001,)))


def test_content_keys_follow_what_is_shown(processor: MediaProcessor) -> None:
    a, b = encoded(pixels(56, 56, 1)), encoded(pixels(56, 56, 2))

    def key(item: MediaItem, salt: bytes = b"s") -> bytes:
        return processor.content_key(item, salt, MODEL)

    image = MediaItem.of("image", (a,), "here")
    assert key(image) == key(MediaItem.of("image", (a,), "there")) and len(key(image)) == 32
    different = [
        key(image),
        key(image, b"other tenant"),
        key(MediaItem.of("image", (b,))),
        key(MediaItem.of("video", (a, b))),
        key(MediaItem.of("video", (b, a))),
        key(MediaItem.of("video", (a, b), fps=4.0)),
        key(MediaItem.of("video", (a,))),
    ]
    assert len(set(different)) == len(different)
    assert key(MediaItem.of("video", (a, b))) == key(MediaItem.of("video", (a, b), fps=2.0))
