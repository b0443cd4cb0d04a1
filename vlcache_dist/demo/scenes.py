"""What a picture of the bundled model's world shows, before anybody paints it: sprites in a grid of cells, and facts.

``pictures`` paints scenes with NumPy, one by one; the training paints batches of them on the device. Both see the same
scenes, so what is evaluated is what was learnt. The kinds and their questions:

    form     two-letter labels, each with a two-digit value on its right, scattered: value of a label, label of a value
    table    one-digit cells under letters N-Z, beside letters A-M: a cell, a row
    shapes   eight shapes in eight colours, one in each 2 x 2 block of cells: what is where, shape of a colour,
             colour of a shape, how many of a colour or a shape
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["form", "table", "shapes"]
Color = tuple[int, int, int]

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


@dataclass(frozen=True, slots=True)
class Fact:
    """A question about a picture and the only right answer, in the words that the bundled model uses. ``family`` names
    the kind of question."""

    question: str
    answer: str
    family: str = ""


@dataclass(frozen=True, slots=True)
class Sprite:
    """``name``: a text of one or two characters (one cell), or a shape (2 x 2 cells). It stands at cell (``row``,
    ``column``), moved by ``shift`` (dy, dx) pixels and cut at its cells. ``color_name``: of shapes."""

    name: str
    row: int
    column: int
    shift: tuple[int, int]
    color: Color
    color_name: str = ""

    @property
    def is_shape(self) -> bool:
        return self.name in SHAPES


@dataclass(frozen=True, slots=True)
class Scene:
    """``rows`` x ``columns`` cells. ``noise``: seed of the painter's noise. ``facts``: all that can be asked."""

    kind: Kind
    rows: int
    columns: int
    background: Color
    sprites: tuple[Sprite, ...]
    facts: tuple[Fact, ...]
    noise: int


def scene(kind: Kind, rng: random.Random, rows: int, columns: int) -> Scene:
    """A scene drawn from ``rng``. Raises ValueError for a side of less than 4 cells."""
    if rows < 4 or columns < 4:
        raise ValueError(f"{rows} x {columns} cells: at least 4 on either side")
    sketch = Sketch(rng, rows, columns)
    facts = {"form": _form, "table": _table, "shapes": _shapes}[kind](sketch)
    return sketch.finish(kind, facts)


class Sketch:
    """A scene under construction. The order in which ``rng`` is drawn from makes the picture of a seed."""

    def __init__(self, rng: random.Random, rows: int, columns: int) -> None:
        self.rng, self.rows, self.columns = rng, rows, columns
        self.light = rng.random() < 0.75
        low, high = (205, 255) if self.light else (0, 50)
        self.background = rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)
        self.sprites: list[Sprite] = []

    def ink(self) -> Color:
        low, high = (0, 90) if self.light else (180, 255)
        return self.rng.randint(low, high), self.rng.randint(low, high), self.rng.randint(low, high)

    def entries(self, entries: list[tuple[str, str]]) -> None:
        """Labels with their values, each pair in two neighbouring cells, in reading order. Raises ValueError if they
        do not fit."""
        slots = range(self.rows * (self.columns // 2))
        if len(entries) > len(slots):
            raise ValueError(f"{len(entries)} labels do not fit into {self.rows} x {self.columns} cells")
        for slot, pair in zip(sorted(self.rng.sample(slots, len(entries))), entries, strict=True):
            row, column = divmod(slot, self.columns // 2)
            shift, color = (self.rng.randint(-4, 4), self.rng.randint(-2, 2)), self.ink()
            for i, text in enumerate(pair):
                self.sprites.append(Sprite(text, row, 2 * column + i, shift, color))

    def finish(self, kind: Kind, facts: list[Fact]) -> Scene:
        noise = self.rng.getrandbits(64)
        return Scene(kind, self.rows, self.columns, self.background, tuple(self.sprites), tuple(facts), noise)


def value_of(label: str, value: str) -> Fact:
    """The question for the number beside a label."""
    return Fact(f"What is the value of {label}?", value, "value")


def _form(sketch: Sketch) -> list[Fact]:
    rng = sketch.rng
    most = min(sketch.rows * (sketch.columns // 2), 16)
    labels = {rng.choice(LETTERS) + rng.choice(LETTERS): None for _ in range(rng.randint(3, most))}
    entries = [(label, f"{rng.randrange(100):02d}") for label in labels]
    sketch.entries(entries)
    values = [value for _, value in entries]
    back = [Fact(f"Which label has the value {v}?", k, "label") for k, v in entries if values.count(v) == 1]
    return [value_of(label, value) for label, value in entries] + back


def _table(sketch: Sketch) -> list[Fact]:
    rng, ink = sketch.rng, sketch.ink()
    rows = rng.sample(LETTERS[:13], rng.randint(2, min(7, sketch.rows - 1)))
    columns = rng.sample(LETTERS[13:], rng.randint(2, min(7, sketch.columns - 1)))

    def put(row: int, column: int, text: str) -> None:
        sketch.sprites.append(Sprite(text, row, column, (rng.randint(-3, 3), rng.randint(-3, 3)), ink))

    for i, name in enumerate(rows, 1):
        put(i, 0, name)
    for j, name in enumerate(columns, 1):
        put(0, j, name)
    facts = []
    for i, row in enumerate(rows, 1):
        digits = [str(rng.randrange(10)) for _ in columns]
        for j, (column, digit) in enumerate(zip(columns, digits, strict=True), 1):
            put(i, j, digit)
            facts.append(Fact(f"What is in row {row}, column {column}?", digit, "cell"))
        facts.append(Fact(f"Read row {row}.", " ".join(digits), "row"))
    return facts


def _shapes(sketch: Sketch) -> list[Fact]:
    rng = sketch.rng
    height, width = sketch.rows // 2, sketch.columns // 2
    places = rng.sample(range(height * width), rng.randint(2, min(height * width, 12)))
    found: dict[int, tuple[str, str]] = {}
    for place in sorted(places):
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        r, g, b = (min(255, max(0, value + rng.randint(-15, 15))) for value in COLORS[color])
        row, column = divmod(place, width)
        shift = rng.randint(-6, 6), rng.randint(-6, 6)
        sketch.sprites.append(Sprite(shape, 2 * row, 2 * column, shift, (r, g, b), color))
        found[place] = (color, shape)
    facts = []
    for place in range(height * width):
        row, column = divmod(place, width)
        answer = " ".join(found[place]) if place in found else "nothing"
        facts.append(Fact(f"What is at row {row + 1}, column {column + 1}?", answer, "place"))
    colors, shapes = [c for c, _ in found.values()], [s for _, s in found.values()]
    for color, shape in found.values():
        if colors.count(color) == 1:
            facts.append(Fact(f"Which shape is {color}?", shape, "shape"))
    facts += [Fact(f"What color is the {s}?", c, "color") for c, s in found.values() if shapes.count(s) == 1]
    facts += [Fact(f"How many {c} shapes are there?", str(colors.count(c)), "count color") for c in COLORS]
    facts += [Fact(f"How many {plural(s)} are there?", str(shapes.count(s)), "count shape") for s in SHAPES]
    return facts


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"
