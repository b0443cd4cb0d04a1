"""Pictures and videos of a request: from encoded bytes to grid (header only) and to patches (full decode).

The way of an item: ``MediaRef`` (what the message says) -> ``MediaItem`` (encoded bytes, digested; ``media_fetch``)
-> ``MediaMeta`` (grid, from the header alone) -> ``Patches`` (what the vision tower eats). A cache hit stops after
the digest, a prompt needs the grid, only the encoder pays for pixels.

EXIF orientation is not applied: transformers' Qwen2-VL processor does not apply it either, and it is the oracle. A
photograph that is stored rotated is seen rotated.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from PIL import Image

from vlcache_dist.config import MediaSettings
from vlcache_dist.errors import InvalidMedia, PayloadTooLarge, VLCacheError
from vlcache_dist.hashing import Json, ModelIdentity, VideoSampling, content_key, frames_digest, media_digest
from vlcache_dist.pixels import Cutter, PixelConfig
from vlcache_dist.types import ContentKey
from vlcache_dist.wire import MediaMeta

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
DEFAULT_FPS = 2.0  #: of a list of frames whose rate is not given (as qwen-vl-utils)


class MediaRef(msgspec.Struct, frozen=True):
    """An image or video as a message names it. ``where`` says so in errors, e.g. ``messages[0].content[1]``.

    ``urls``: one for an image or an animated file; the frames, in order, for a video. ``fps``: frames per second of
    the frames as given; None: from the animation, else ``DEFAULT_FPS``.
    """

    modality: Literal["image", "video"]
    urls: tuple[str, ...]
    where: str
    fps: float | None = None


class MediaItem(msgspec.Struct, frozen=True):
    """Encoded bytes. ``frames``: one file for an image or an animation, several for a video given as pictures.
    ``digest`` is that of the raw bytes (``hashing``); modality and sampling are separate fields of a content key."""

    modality: Literal["image", "video"]
    frames: tuple[bytes, ...]
    where: str
    fps: float | None
    digest: bytes

    @classmethod
    def of(
        cls,
        modality: Literal["image", "video"],
        frames: tuple[bytes, ...],
        where: str = "item",
        fps: float | None = None,
    ) -> MediaItem:
        digests = [media_digest(frame) for frame in frames]
        return cls(modality, frames, where, fps, digests[0] if len(digests) == 1 else frames_digest(digests))


@dataclass(frozen=True, slots=True)
class Patches:
    """``values``: float32 [t*h*w, channels * temporal_patch * patch * patch], ``grid``: (t, h, w) in patches."""

    values: np.ndarray
    grid: tuple[int, int, int]


class MediaProcessor:
    """Grid and patches as transformers' processors compute them, without torchvision. Thread-safe.

    Videos use the limits of ``video_preprocessor_config.json`` where the checkpoint has one, else the image
    processor's, as transformers does. Frames are resized one by one with Pillow's bicubic filter, as images are
    (torchvision's differs from it by rounding); an odd number of frames repeats the last.
    """

    def __init__(self, config: PixelConfig, limits: MediaSettings) -> None:
        self._config = config
        self._cutter = Cutter(config)
        self._limits = limits
        self.patch_size = config.patch_size
        self.merge_size = config.merge_size
        self.temporal_patch_size = config.temporal_patch_size
        self.settings: dict[str, Json] = _settings(config)  #: what a content key says of the processor

    @classmethod
    def from_folder(cls, folder: str | Path, limits: MediaSettings | None = None) -> MediaProcessor:
        """From a checkpoint folder. Raises CheckpointError, UnsupportedModel."""
        return cls(PixelConfig.read(Path(folder)), limits or MediaSettings())

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        """Vision tokens of a grid: patches after the merger."""
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def sampling(self, item: MediaItem) -> VideoSampling | None:
        """Which frames are taken (all) and the seconds between two temporal patches; None for an image. Only an
        animation without a given rate is looked into. Raises InvalidMedia."""
        if item.modality == "image":
            return None
        if len(item.frames) > 1:
            count, fps = len(item.frames), item.fps or DEFAULT_FPS
        else:
            header = self._header(item)
            count, fps = header.frames, item.fps or header.fps or DEFAULT_FPS
        return VideoSampling(tuple(range(count)), self.temporal_patch_size / fps)

    def content_key(self, item: MediaItem, salt: bytes, model: ModelIdentity) -> ContentKey:
        """The item's name in every cache. Raises InvalidMedia."""
        return content_key(
            salt=salt,
            media=item.digest,
            modality=item.modality,
            processor=self.settings,
            model=model,
            sampling=self.sampling(item),
        )

    def meta(self, item: MediaItem) -> MediaMeta:
        """Grid and timing from the files' headers; no pixel is decoded. Raises InvalidMedia or PayloadTooLarge."""
        header = self._header(item)
        if item.modality == "image":
            return MediaMeta("image", self._grid(1, header.width, header.height, self._config.image_size, item))
        steps = -(-header.frames // self.temporal_patch_size)
        fps = item.fps or header.fps or DEFAULT_FPS
        grid = self._grid(steps, header.width, header.height, self._config.video_size, item)
        return MediaMeta("video", grid, self.temporal_patch_size / fps)

    def patches(self, item: MediaItem) -> Patches:
        """Decode, resize, normalize and cut. Raises InvalidMedia or PayloadTooLarge."""
        self._header(item)
        each = self.temporal_patch_size
        if item.modality == "image":
            with _decoding(item, 0), _open(item.frames[0]) as image:
                pixels = _rgb(image)
            cut, (h, w) = self._cut(pixels, self._config.image_size, item)
            return Patches(self._cutter.values([cut] * each), (1, h, w))
        frames, h, w = [], 0, 0
        for pixels in _frames(item):
            cut, (h, w) = self._cut(pixels, self._config.video_size, item)
            frames.append(cut)
        frames += [frames[-1]] * (-len(frames) % each)
        steps = [self._cutter.values(frames[i : i + each]) for i in range(0, len(frames), each)]
        return Patches(np.concatenate(steps), (len(steps), h, w))

    def _grid(
        self, steps: int, width: int, height: int, size: tuple[int, int], item: MediaItem
    ) -> tuple[int, int, int]:
        try:
            h, w = self._config.resized(height, width, size)
        except ValueError as error:
            raise InvalidMedia(f"{item.where}: {error}") from error
        return steps, h // self.patch_size, w // self.patch_size

    def _cut(self, pixels: np.ndarray, size: tuple[int, int], item: MediaItem) -> tuple[np.ndarray, tuple[int, int]]:
        try:
            return self._cutter.cut(pixels, size)
        except ValueError as error:
            raise InvalidMedia(f"{item.where}: {error}") from error

    def _header(self, item: MediaItem) -> _Header:
        limits = self._limits
        if sum(map(len, item.frames)) > limits.max_bytes:
            raise PayloadTooLarge(f"{item.where}: more than {limits.max_bytes} bytes")
        if len(item.frames) > limits.max_frames:
            raise InvalidMedia(f"{item.where}: {len(item.frames)} frames, at most {limits.max_frames} are taken")
        first: _Header | None = None
        for i, data in enumerate(item.frames):
            with _decoding(item, i), _open(data) as image:
                width, height = image.size
                if width * height > limits.max_pixels:
                    raise InvalidMedia(
                        f"{item.where}: {width} x {height} is more than {limits.max_pixels} pixels; send it smaller"
                    )
                if first is not None:
                    if (width, height) != (first.width, first.height):
                        raise InvalidMedia(
                            f"{item.where}: frame {i} is {width} x {height}, frame 0 {first.width} x {first.height}; "
                            "the frames of a video have one size"
                        )
                    continue
                animation = item.modality == "video" and len(item.frames) == 1
                frames = int(getattr(image, "n_frames", 1)) if animation else len(item.frames)
                if frames > limits.max_frames:
                    raise InvalidMedia(f"{item.where}: {frames} frames, at most {limits.max_frames} are taken")
                if item.modality == "video" and frames * width * height > limits.max_video_pixels:
                    raise InvalidMedia(
                        f"{item.where}: {frames} frames of {width} x {height} are more than "
                        f"{limits.max_video_pixels} pixels"
                    )
                rate = _animation_fps(image, frames) if animation and item.fps is None else None
                first = _Header(width, height, frames, rate)
        if first is None:
            raise InvalidMedia(f"{item.where}: a video without frames")
        return first


@dataclass(frozen=True, slots=True)
class _Header:
    width: int
    height: int
    frames: int
    fps: float | None


@contextmanager
def _decoding(item: MediaItem, index: int) -> Iterator[None]:
    name = item.where if len(item.frames) == 1 else f"{item.where}, frame {index}"
    try:
        yield
    except VLCacheError:
        raise
    except Image.DecompressionBombError as error:
        raise InvalidMedia(f"{name}: {error}") from error
    except Exception as error:
        # Pillow's decoders raise whatever a hostile file provokes: OSError, SyntaxError, struct.error, EOFError, ...
        raise InvalidMedia(f"{name}: not a picture that can be decoded ({', '.join(FORMATS)} are): {error}") from error


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [height, width, 3]."""
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _frames(item: MediaItem) -> Iterator[np.ndarray]:
    if len(item.frames) > 1:
        for i, data in enumerate(item.frames):
            with _decoding(item, i), _open(data) as image:
                pixels = _rgb(image)
            yield pixels
        return
    with _open(item.frames[0]) as image:
        for i in range(int(getattr(image, "n_frames", 1))):
            with _decoding(item, i):
                image.seek(i)
                pixels = _rgb(image)
            yield pixels


def _animation_fps(image: Image.Image, frames: int) -> float | None:
    """Mean frames per second of an animation, None if its file does not say."""
    total_ms = 0.0
    for i in range(frames):
        image.seek(i)
        if image.format == "WEBP":
            image.load()  # Pillow knows a WebP frame's duration only after decoding it
        total_ms += float(image.info.get("duration", 0.0))
    return 1000.0 * frames / total_ms if total_ms > 0 else None


def _settings(config: PixelConfig) -> dict[str, Json]:
    return {
        "rescale_factor": config.rescale_factor,
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.merge_size,
        "do_resize": True,
        "do_rescale": config.do_rescale,
        "do_normalize": config.do_normalize,
        "resample": config.resample,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "image_size": list(config.image_size),
        "video_size": list(config.video_size),
    }
