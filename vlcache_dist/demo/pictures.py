"""Seeded pictures with facts, of the three kinds that the bundled model reads: forms, tables and shapes (``scenes``).

A picture is a grid of 28-pixel cells (one vision token each) with an even number of cells on either side that is a
multiple of four, because the model was trained on sides of 112 pixels and multiples. Text is Pillow's default font, as
the model was trained on; other fonts it cannot read.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlcache_dist.demo.scenes import COLORS, SHAPES, Fact, Kind, Scene, Sketch, Sprite, scene, value_of

__all__ = ["CELL", "COLORS", "SHAPES", "Fact", "Kind", "Picture", "draw", "form", "mask", "paint"]

CELL = 28
NOISE = 6.0  #: standard deviation of the sensor noise that the model was trained with, of 255
_OVERSAMPLE = 4


@dataclass(frozen=True, slots=True)
class Picture:
    """``image`` is RGB; ``facts`` can all be asked."""

    kind: Kind
    image: Image.Image
    facts: tuple[Fact, ...]

    def png(self) -> bytes:
        """The picture as a PNG file."""
        out = io.BytesIO()
        self.image.save(out, "PNG")
        return out.getvalue()


def draw(kind: Kind, seed: int, rows: int = 8, columns: int = 8) -> Picture:
    """The picture of this seed. ``rows`` and ``columns`` count cells, multiples of 4 (8 and 12 are what the model
    knows best). Raises ValueError otherwise."""
    if rows % 4 or columns % 4 or rows < 4 or columns < 4:
        raise ValueError(f"{rows} x {columns} cells: both must be multiples of 4")
    drawn = scene(kind, random.Random(f"{kind} {seed} {rows} {columns}"), rows, columns)
    return Picture(kind, paint(drawn), drawn.facts)


def form(labels: dict[str, int], seed: int = 0, rows: int = 8, columns: int = 8) -> Picture:
    """A form with the given labels (two capital letters) and values (0-99), at places drawn from ``seed``. Raises
    ValueError if they do not fit."""
    sketch = Sketch(random.Random(f"form {seed} {rows} {columns}"), rows, columns)
    entries = [(label, f"{value:02d}") for label, value in labels.items()]
    sketch.entries(entries)
    facts = [value_of(label, value) for label, value in entries]
    return Picture("form", paint(sketch.finish("form", facts)), tuple(facts))


def paint(drawn: Scene) -> Image.Image:
    """The scene's picture, with its noise."""
    pixels: np.ndarray = np.full((drawn.rows * CELL, drawn.columns * CELL, 3), drawn.background, np.float32)
    for sprite in drawn.sprites:
        _blend(pixels, sprite)
    noise = np.random.default_rng(drawn.noise).normal(0, NOISE, pixels.shape)
    return Image.fromarray(np.rint(np.clip(pixels + noise, 0, 255)).astype(np.uint8))


def _blend(pixels: np.ndarray, sprite: Sprite) -> None:
    ink = mask(sprite.name)
    alpha = np.zeros(ink.shape, np.float32)
    dy, dx = sprite.shift
    height, width = ink.shape
    alpha[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = ink[
        max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)
    ]
    top, left = sprite.row * CELL, sprite.column * CELL
    here = (slice(top, top + height), slice(left, left + width))
    pixels[here] += alpha[:, :, None] / 255 * (np.asarray(sprite.color, np.float32) - pixels[here])


def mask(name: str) -> np.ndarray:
    """What a sprite of this name inks: uint8, [28, 28] for text, [56, 56] for shapes."""
    return _shape(name) if name in SHAPES else _text(name)


@lru_cache(maxsize=1024)
def _text(text: str) -> np.ndarray:
    """One or two characters in the middle of a cell: uint8 [28, 28], 255 where there is ink."""
    image = Image.new("L", (CELL * _OVERSAMPLE, CELL * _OVERSAMPLE), 0)
    pen = ImageDraw.Draw(image)
    size, centres = (22, [14.0]) if len(text) == 1 else (18, [7.5, 20.5])
    font = ImageFont.load_default(size=size * _OVERSAMPLE)
    for char, x in zip(text, centres, strict=True):
        pen.text((x * _OVERSAMPLE, 14 * _OVERSAMPLE), char, fill=255, font=font, anchor="mm")
    return np.asarray(image.resize((CELL, CELL), Image.Resampling.BOX))


@lru_cache(maxsize=16)
def _shape(name: str) -> np.ndarray:
    """A shape in the middle of a 2 x 2 block of cells: uint8 [56, 56]."""
    side, scale = 2 * CELL, 8
    image = Image.new("L", (side * scale, side * scale), 0)
    pen = ImageDraw.Draw(image)
    centre, radius = side / 2 * scale, side * 0.36 * scale

    def disc(share: float, fill: int) -> None:
        reach = radius * share
        pen.ellipse([centre - reach, centre - reach, centre + reach, centre + reach], fill=fill)

    if name in ("circle", "ring"):
        disc(1.0, 255)
        if name == "ring":
            disc(0.55, 0)
    else:
        pen.polygon([(centre + x * radius, centre + y * radius) for x, y in _OUTLINES[name]], fill=255)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)],
    "cross": [
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    ],
    "star": [
        (math.sin(k * math.pi / 5) * (0.45 if k % 2 else 1.1), -math.cos(k * math.pi / 5) * (0.45 if k % 2 else 1.1))
        for k in range(10)
    ],
    "heart": [
        *[(0, 1), (-1, -0.1), (-1, -0.55), (-0.7, -0.9), (-0.3, -0.9)],
        *[(0, -0.5), (0.3, -0.9), (0.7, -0.9), (1, -0.55), (1, -0.1)],
    ],
}
