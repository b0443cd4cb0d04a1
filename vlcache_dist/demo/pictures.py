"""Seeded pictures with facts, of the three kinds that the bundled model reads: forms, tables and shapes.

A picture is a grid of 28-pixel cells (one vision token each) with an even number of cells on either side that is a
multiple of four, because the model was trained on sides of 112 pixels and multiples. Text is Pillow's default font, as
the model was trained on; other fonts it cannot read.

    form     two-letter labels, each with a two-digit value on its right, scattered
    table    one-digit cells under letters N-Z, beside letters A-M
    shapes   eight shapes in eight colours, one in each 2 x 2 block of cells
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Kind = Literal["form", "table", "shapes"]
Color = tuple[int, int, int]

CELL = 28
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLORS: dict[str, Color] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 220),
    "yellow": (240, 210, 30),
    "purple": (140, 60, 190),
    "orange": (255, 140, 0),
    "pink": (250, 150, 200),
    "brown": (120, 70, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
_OVERSAMPLE = 4


@dataclass(frozen=True, slots=True)
class Fact:
    """A question about a picture and the only right answer, in the words that the bundled model uses."""

    question: str
    answer: str


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
    canvas = _Canvas(random.Random(f"{kind} {seed} {rows} {columns}"), rows, columns)
    facts = {"form": _form, "table": _table, "shapes": _shapes}[kind](canvas)
    return Picture(kind, canvas.finish(), tuple(facts))


def form(labels: dict[str, int], seed: int = 0, rows: int = 8, columns: int = 8) -> Picture:
    """A form with the given labels (two capital letters) and values (0-99), at places drawn from ``seed``. Raises
    ValueError if they do not fit."""
    canvas = _Canvas(random.Random(f"form {seed} {rows} {columns}"), rows, columns)
    entries = [(label, f"{value:02d}") for label, value in labels.items()]
    return Picture("form", canvas.finish_with(entries), tuple(_value(label, value) for label, value in entries))


class _Canvas:
    """A picture under construction: background, then coloured masks."""

    def __init__(self, rng: random.Random, rows: int, columns: int) -> None:
        self.rng, self.rows, self.columns = rng, rows, columns
        self.light = rng.random() < 0.75
        low, high = (205, 255) if self.light else (0, 50)
        background = tuple(rng.randint(low, high) for _ in range(3))
        self._pixels: np.ndarray = np.full((rows * CELL, columns * CELL, 3), background, np.float32)

    def ink(self) -> Color:
        low, high = (0, 90) if self.light else (180, 255)
        return self.rng.randint(low, high), self.rng.randint(low, high), self.rng.randint(low, high)

    def paint(self, mask: np.ndarray, row: int, column: int, shift: tuple[int, int], color: Color) -> None:
        """Blend ``color`` through ``mask`` (uint8, whole cells), moved by ``shift`` (dy, dx) and cut at its cells."""
        alpha = np.zeros(mask.shape, np.float32)
        dy, dx = shift
        height, width = mask.shape
        alpha[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = mask[
            max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)
        ]
        weight = alpha[:, :, None] / 255
        here = (slice(row * CELL, row * CELL + height), slice(column * CELL, column * CELL + width))
        self._pixels[here] += weight * (np.asarray(color, np.float32) - self._pixels[here])

    def entries(self, entries: list[tuple[str, str]]) -> None:
        """Labels with their values, each pair in two neighbouring cells, in reading order."""
        slots = range(self.rows * (self.columns // 2))
        if len(entries) > len(slots):
            raise ValueError(f"{len(entries)} labels do not fit into {self.rows} x {self.columns} cells")
        for slot, pair in zip(sorted(self.rng.sample(slots, len(entries))), entries, strict=True):
            row, column = divmod(slot, self.columns // 2)
            shift, color = (self.rng.randint(-4, 4), self.rng.randint(-2, 2)), self.ink()
            for i, text in enumerate(pair):
                self.paint(_text(text), row, 2 * column + i, shift, color)

    def finish_with(self, entries: list[tuple[str, str]]) -> Image.Image:
        self.entries(entries)
        return self.finish()

    def finish(self) -> Image.Image:
        """Add the sensor noise that the model was trained with."""
        noise = np.random.default_rng(self.rng.getrandbits(64)).normal(0, 6, self._pixels.shape)
        return Image.fromarray(np.rint(np.clip(self._pixels + noise, 0, 255)).astype(np.uint8))


def _form(canvas: _Canvas) -> list[Fact]:
    rng = canvas.rng
    most = min(canvas.rows * canvas.columns // 2, 16)
    labels = {rng.choice(LETTERS) + rng.choice(LETTERS): None for _ in range(rng.randint(3, most))}
    entries = [(label, f"{rng.randrange(100):02d}") for label in labels]
    canvas.entries(entries)
    return [_value(label, value) for label, value in entries]


def _value(label: str, value: str) -> Fact:
    return Fact(f"What is the value of {label}?", value)


def _table(canvas: _Canvas) -> list[Fact]:
    rng, ink = canvas.rng, canvas.ink()
    rows = rng.sample(LETTERS[:13], rng.randint(2, min(7, canvas.rows - 1)))
    columns = rng.sample(LETTERS[13:], rng.randint(2, min(7, canvas.columns - 1)))

    def put(row: int, column: int, text: str) -> None:
        canvas.paint(_text(text), row, column, (rng.randint(-3, 3), rng.randint(-3, 3)), ink)

    for i, name in enumerate(rows, 1):
        put(i, 0, name)
    for j, name in enumerate(columns, 1):
        put(0, j, name)
    facts = []
    for i, row in enumerate(rows, 1):
        digits = [str(rng.randrange(10)) for _ in columns]
        for j, (column, digit) in enumerate(zip(columns, digits, strict=True), 1):
            put(i, j, digit)
            facts.append(Fact(f"What is in row {row}, column {column}?", digit))
        facts.append(Fact(f"Read row {row}.", " ".join(digits)))
    return facts


def _shapes(canvas: _Canvas) -> list[Fact]:
    rng = canvas.rng
    height, width = canvas.rows // 2, canvas.columns // 2
    places = rng.sample(range(height * width), rng.randint(2, min(height * width, 12)))
    found: dict[int, tuple[str, str]] = {}
    for place in sorted(places):
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        r, g, b = (min(255, max(0, value + rng.randint(-15, 15))) for value in COLORS[color])
        row, column = divmod(place, width)
        shift = rng.randint(-6, 6), rng.randint(-6, 6)
        canvas.paint(_shape(shape), 2 * row, 2 * column, shift, (r, g, b))
        found[place] = (color, shape)
    facts = []
    for place in range(height * width):
        row, column = divmod(place, width)
        answer = " ".join(found[place]) if place in found else "nothing"
        facts.append(Fact(f"What is at row {row + 1}, column {column + 1}?", answer))
    for color, shape in found.values():
        if [c for c, _ in found.values()].count(color) == 1:
            facts.append(Fact(f"Which shape is {color}?", shape))
    return facts


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
