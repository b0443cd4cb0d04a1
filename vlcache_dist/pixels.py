"""Pixels to patches: transformers' Qwen2-VL image processor, bit for bit, in NumPy and Pillow.

Not imported from transformers, because its image processors pull in torch's compiler and distributed tensors: seconds
of every process's start. Pixels are bytes, so rescaling and normalizing is a table of 256 values per channel, made by
transformers' formula; a picture is cut while it still consists of bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlcache_dist.errors import CheckpointError, UnsupportedModel

MAX_ASPECT = 200  #: longer side to shorter side
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class PixelConfig:
    """``preprocessor_config.json``, with transformers' defaults. ``image_size`` and ``video_size``: least and most
    pixels of a picture, and of a frame, after resizing. ``resample``: Pillow's number of the filter."""

    image_size: tuple[int, int] = (56 * 56, 28 * 28 * 1280)
    video_size: tuple[int, int] = (56 * 56, 28 * 28 * 1280)
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    resample: int = 3
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD

    @classmethod
    def read(cls, folder: Path) -> PixelConfig:
        """From a checkpoint folder: the ``image_processor`` of ``processor_config.json`` where it has one, else
        ``preprocessor_config.json``; limits of videos from ``video_preprocessor_config.json``, else those of images.
        Raises CheckpointError for a file that is missing or cannot be read, UnsupportedModel for a value that cannot
        be served."""
        values = _load(folder / "processor_config.json").get("image_processor") or _load(
            folder / "preprocessor_config.json"
        )
        if not values:
            raise CheckpointError(f"{folder} has no preprocessor_config.json: how pictures are prepared is unknown")
        try:
            return _parse(cls, values, _load(folder / "video_preprocessor_config.json"))
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder}: preprocessor_config.json: {error}") from error

    def resized(self, height: int, width: int, limits: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a picture is resized to: multiples of ``patch_size * merge_size``, within ``limits``
        (pixels), near the picture's aspect ratio (transformers' ``smart_resize``). Raises ValueError for an aspect
        ratio above 200."""
        longer, shorter = max(height, width), min(height, width)
        if longer / shorter > MAX_ASPECT:
            raise ValueError(f"absolute aspect ratio must be smaller than {MAX_ASPECT}, got {longer / shorter}")
        factor = self.patch_size * self.merge_size
        h, w = round(height / factor) * factor, round(width / factor) * factor
        least, most = limits
        if h * w > most:
            beta = math.sqrt(height * width / most)
            h = max(factor, math.floor(height / beta / factor) * factor)
            w = max(factor, math.floor(width / beta / factor) * factor)
        elif h * w < least:
            beta = math.sqrt(least / (height * width))
            h, w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
        return h, w

    def table(self) -> np.ndarray:
        """What the vision tower sees of a byte: float32 [channel, 256], rounded where transformers rounds."""
        values = np.arange(256, dtype=np.uint8)
        scaled = (values.astype(np.float64) * self.rescale_factor if self.do_rescale else values).astype(np.float32)
        if not self.do_normalize:
            return np.broadcast_to(scaled, (len(self.image_mean), 256))
        mean, std = (np.array(each, dtype=np.float32)[:, None] for each in (self.image_mean, self.image_std))
        normalized: np.ndarray = (scaled - mean) / std
        return normalized


class Cutter:
    """Resizes pictures and cuts them into patches. Thread-safe."""

    def __init__(self, config: PixelConfig) -> None:
        self._config = config
        self._table = config.table()

    def cut(self, pixels: np.ndarray, limits: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
        """``pixels``: uint8 [height, width, 3]; ``limits`` as in ``PixelConfig.resized``, whose ValueError this raises.
        Returns uint8 [h*w, 3, patch*patch], patches that are merged into one token side by side, and the grid (h, w).
        """
        config = self._config
        height, width = config.resized(pixels.shape[0], pixels.shape[1], limits)
        image = Image.fromarray(pixels).resize((width, height), resample=Image.Resampling(config.resample))
        p, m = config.patch_size, config.merge_size
        h, w = height // p, width // p
        cut = np.asarray(image).reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        return np.ascontiguousarray(cut).reshape(h * w, 3, p * p), (h, w)

    def values(self, frames: list[np.ndarray]) -> np.ndarray:
        """Of as many results of ``cut``, all of one size, as a patch has frames: float32 [h*w, 3 * frames * patch *
        patch]. The same array may be given several times, as for a picture."""
        count, channels, area = frames[0].shape
        out = np.empty((count, channels, len(frames), area), np.float32)
        for t, frame in enumerate(frames):
            if t and frame is frames[t - 1]:
                out[:, :, t] = out[:, :, t - 1]
                continue
            for c in range(channels):
                out[:, c, t] = self._table[c][frame[:, c]]
        return out.reshape(count, -1)


def _load(path: Path) -> dict[str, Any]:
    """Empty if there is no such file."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return values


def _parse(cls: type[PixelConfig], values: dict[str, Any], video: dict[str, Any]) -> PixelConfig:
    given = {name: values[name] for name in cls.__dataclass_fields__ if values.get(name) is not None}
    for name in ("image_mean", "image_std"):
        if name in given:
            given[name] = tuple(float(value) for value in given[name])
            if len(given[name]) != 3:
                raise ValueError(f"{name} = {values[name]!r} has not three channels")
    if values.get("do_resize") is False:
        raise UnsupportedModel("preprocessor_config.json: do_resize = false: only pictures that are resized are served")
    image_size = _limits(values, (56 * 56, 28 * 28 * 1280))
    given |= {"image_size": image_size, "video_size": _limits(video, image_size)}
    return cls(**given)


def _limits(values: dict[str, Any], default: tuple[int, int]) -> tuple[int, int]:
    size = values.get("size") or {}
    least, most = (
        values.get(name) or size.get(edge) or usual
        for name, edge, usual in zip(
            ("min_pixels", "max_pixels"), ("shortest_edge", "longest_edge"), default, strict=True
        )
    )
    return int(least), int(most)
