"""From dialogues to tensors: token ids, M-RoPE positions, where answers are, and pictures as cells.

All rows of a batch show pictures of the same sizes, so that the vision tower runs on plain tensors; and batches come in
a limited number of shapes, so that a step of each can be one CUDA graph.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from training.tasks import VALIDATION_SEEDS, Draw, Grid, Sample, families, sample
from vlcache_dist.demo.scenes import COLORS, LETTERS, SHAPES, Scene
from vlcache_dist.evaluate.cases import Shown

DEFAULT_SYSTEM = "You are a helpful assistant."
CELL_FIELDS = 9  #: sprite, top, left, ink (3), paper (3)
DIGITS = "0123456789"
CHARACTERS = LETTERS + DIGITS
MOST = 12  #: cells on a side
THINGS = 1 + len(CHARACTERS) + len(SHAPES)
AUX_CLASSES = (THINGS, 1 + len(CHARACTERS), 1 + len(COLORS))
#: What the language model should know early of a picture's token: the first and second character in the cell on its
#: left, what opens its row and its column, and which row and column that is.
PLACE_CLASSES = (THINGS, 1 + len(CHARACTERS), THINGS, THINGS, MOST, MOST)
PAD = 8  #: pixels around a sprite in the atlas, so that shifts read nothing


@lru_cache
def sprite_names() -> tuple[str, ...]:
    """In atlas order; 0 is the empty cell."""
    pairs = [a + b for a in LETTERS for b in LETTERS] + [a + b for a in DIGITS for b in DIGITS]
    return ("", *pairs, *CHARACTERS, *SHAPES)


_NUMBER = {name: number for number, name in enumerate(sprite_names())}


def cells(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What the painter needs of each cell, int16 [cells, CELL_FIELDS], and what auxiliary readers should see in it,
    int16 [cells, 9]: first character or shape, second character, colour (0: none); then ``PLACE_CLASSES``."""
    out = np.zeros((scene.rows * scene.columns, CELL_FIELDS), np.int16)
    aux = np.zeros((len(out), 3), np.int16)
    out[:, 1:3], out[:, 6:9] = PAD, scene.background
    for sprite in scene.sprites:
        dy, dx = sprite.shift
        for qy in range(2 if sprite.is_shape else 1):
            for qx in range(2 if sprite.is_shape else 1):
                at = (sprite.row + qy) * scene.columns + sprite.column + qx
                out[at, :6] = _NUMBER[sprite.name], PAD + 28 * qy - dy, PAD + 28 * qx - dx, *sprite.color
                if sprite.is_shape:
                    aux[at, 0] = 1 + len(CHARACTERS) + SHAPES.index(sprite.name)
                    aux[at, 2] = 1 + list(COLORS).index(sprite.color_name)
                else:
                    for place, char in enumerate(sprite.name):
                        aux[at, place] = 1 + CHARACTERS.index(char)
    return out, np.concatenate((aux, _places(aux.reshape(scene.rows, scene.columns, 3))), 1)


def _places(aux: np.ndarray) -> np.ndarray:
    rows, columns, _ = aux.shape
    out = np.zeros((rows, columns, len(PLACE_CLASSES)), np.int16)
    out[:, 1:, :2] = aux[:, :-1, :2]
    out[:, :, 2], out[:, :, 3] = aux[:, :1, 0], aux[:1, :, 0]
    out[:, :, 4], out[:, :, 5] = np.arange(rows)[:, None], np.arange(columns)
    return out.reshape(rows * columns, -1)


class Encoder:
    """Text to ids with the checkpoint's tokenizer, as the chat template writes it."""

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "endoftext")
        found = [self._tokenizer.token_to_id(f"<|{name}|>") for name in names]
        self.im_start, self.im_end, self.vision_start, self.vision_end, self.image_pad, self.end = found
        self._text = lru_cache(maxsize=100_000)(self._plain)

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, row: Sample) -> tuple[list[int], list[tuple[int, Shown]], list[tuple[int, int]]]:
        """Token ids; (start, picture) of every span; half-open ranges of ids to be learnt, end of turn included."""
        ids: list[int] = []
        spans: list[tuple[int, Shown]] = []
        answers: list[tuple[int, int]] = []
        turns = row.dialogue.turns
        if turns[0][0] != "system":
            turns = (("system", (DEFAULT_SYSTEM,)), *turns)
        for role, parts in turns:
            ids += (self.im_start, *self._text(f"{role}\n"))
            start = len(ids)
            for part in parts:
                if isinstance(part, str):
                    ids += self._text(part)
                else:
                    spans.append((len(ids) + 1, part))
                    ids += (self.vision_start, *[self.image_pad] * (part.rows * part.columns), self.vision_end)
            ids.append(self.im_end)
            if role == "assistant":
                answers.append((start, len(ids)))
            ids += self._text("\n")
        return ids, spans, answers


def positions(length: int, spans: list[tuple[int, Shown]]) -> np.ndarray:
    """M-RoPE positions int32 [3, length] of images: text counts on, an image takes its grid, text goes on behind it."""
    out = np.zeros((3, length), np.int32)
    done = now = 0
    for start, shown in spans:
        out[:, done:start] = now + np.arange(start - done)
        now += start - done
        n = shown.rows * shown.columns
        out[0, start : start + n] = now
        out[1, start : start + n] = now + np.repeat(np.arange(shown.rows), shown.columns)
        out[2, start : start + n] = now + np.tile(np.arange(shown.columns), shown.rows)
        now, done = now + max(shown.rows, shown.columns), start + n
    out[:, done:] = now + np.arange(length - done)
    return out


@dataclass(slots=True)
class Batch:
    """``ids`` int64 [B, L]; ``positions`` [3, B, L]; flat indices ``learn`` [T] of rows that predict ``target`` (-100:
    a place to spare), ``answer`` int64 [T] numbering the answer that each belongs to (places to spare: one more); per
    picture slot ``cells`` int16 [B, n, CELL_FIELDS], ``aux`` int16 [B, n, 9] and its ``grids``; ``vision``: flat
    indices of the pictures' tokens, slot by slot. ``ids`` at those are of no meaning and spread over the vocabulary:
    the gradient of one embedding for all would be a queue of thousands."""

    ids: torch.Tensor
    positions: torch.Tensor
    learn: torch.Tensor
    target: torch.Tensor
    answer: torch.Tensor
    vision: torch.Tensor
    cells: list[torch.Tensor]
    aux: list[torch.Tensor]
    grids: list[Grid]
    families: list[tuple[str, str]]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.ids, self.positions, self.learn, self.target, self.answer, self.vision, *self.cells, *self.aux]

    @property
    def shape(self) -> tuple[Any, ...]:
        return (*self.grids, *self.ids.shape, len(self.learn))

    def to(self, device: torch.device) -> Batch:
        moved = [t.to(device, non_blocking=True) for t in self.tensors]
        n = len(self.cells)
        return Batch(*moved[:6], moved[6 : 6 + n], moved[6 + n :], self.grids, self.families)


def collate(rows: list[Sample], encoder: Encoder, length: int, learn_length: int = 0) -> Batch:
    """Rows longer than ``length`` lose their last answers. ``learn_length``: tokens to learn, if it is to be the same
    for all batches; answers that find no place there are not learnt."""
    ids = np.full((len(rows), length), encoder.end, np.int64)
    where = np.zeros((3, len(rows), length), np.int64)
    learn: list[np.ndarray] = []
    families: list[tuple[str, str]] = []
    spans_of = []
    taken = 0
    for b, row in enumerate(rows):
        tokens, spans, answers = encoder.encode(row)
        n = min(len(tokens), length)
        ids[b, :n] = tokens[:n]
        where[:, b, :n] = positions(len(tokens), spans)[:, :n]
        for (start, stop), family in zip(answers, row.families, strict=True):
            if stop <= length and (not learn_length or taken + stop - start <= learn_length):
                taken += stop - start
                learn.append(b * length + np.arange(start, stop))
                families.append(family)
        spans_of.append(spans)
    slots = range(len(spans_of[0]))
    painted = [[cells(spans[slot][1].scene()) for spans in spans_of] for slot in slots]
    grids = [(spans_of[0][slot][1].rows, spans_of[0][slot][1].columns) for slot in slots]
    vision = np.concatenate(
        [
            b * length + spans[slot][0] + np.arange(grids[slot][0] * grids[slot][1])
            for slot in slots
            for b, spans in enumerate(spans_of)
        ]
    )
    target = np.concatenate(learn)
    answer = np.concatenate([np.full(len(places), n) for n, places in enumerate(learn)])
    labels = ids.reshape(-1)[target]
    source = target - 1
    if spare := max(0, learn_length - len(source)):
        # Places that are not learnt, each of them once (see ``ids``).
        free = np.setdiff1d(np.arange(ids.size), source)[:spare]
        source, labels = np.concatenate((source, free)), np.concatenate((labels, np.full(spare, -100)))
        answer = np.concatenate((answer, np.full(spare, len(families))))
    ids.reshape(-1)[vision] = np.arange(len(vision)) % encoder.end
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(where),
        torch.from_numpy(source),
        torch.from_numpy(labels),
        torch.from_numpy(answer),
        torch.from_numpy(vision),
        [torch.from_numpy(np.stack([c for c, _ in slot])) for slot in painted],
        [torch.from_numpy(np.stack([a for _, a in slot])) for slot in painted],
        grids,
        families,
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """``rows`` dialogues of ``length`` tokens over pictures of ``grids``, with about ``room`` tokens of text."""

    grids: tuple[Grid, ...]
    room: int
    rows: int
    length: int

    @property
    def learn_length(self) -> int:
        """Tokens to learn: answers take a fifth to a quarter of the text."""
        return self.rows * max(16, self.room // 4)


def shapes(tokens: int) -> dict[int, list[Shape]]:
    """By number of pictures: two shapes in five of 8 x 8 cells, the others of 4 to 12 cells on either side (several
    pictures: 9). ``tokens``: in a batch, about."""
    rng = random.Random("shapes")
    found: dict[int, list[Shape]] = {}
    for count, most, variety in ((1, MOST, 24), (2, 9, 12), (3, 9, 8)):
        sides = [rng.sample(range(4, most + 1), most - 3) for _ in range(2 * count * variety)]
        flat = iter([side for group in sides for side in group])  # every side as often as the others
        found[count] = []
        for number in range(variety):
            grids = tuple((next(flat), next(flat)) if number % 5 > 1 else (8, 8) for _ in range(count))
            room = (96, 128, 160, 192, 384)[number % 5 if number % 5 > 1 else number % 4]
            length = -(-(sum(rows * columns for rows, columns in grids) + 64 + room) // 32) * 32
            found[count].append(Shape(grids, room, max(1, tokens // length), length))
    return found


def fitting(draw: Draw, shape: Shape, encoder: Encoder) -> Sample:
    """A dialogue whose pictures and first answer lie within the shape's length. ``sample`` counts text roughly, and
    prose has more tokens than it looks."""
    room = shape.room
    while True:
        row = sample(draw, shape.grids, room)
        _, spans, answers = encoder.encode(row)
        pictures = max(start + shown.rows * shown.columns for start, shown in spans)
        if max(pictures, answers[0][1]) <= shape.length:
            return row
        room //= 2


def stream(encoder: Encoder, seed: int, tokens: int, hardness: Any) -> Iterator[Batch]:
    """Batches of about ``tokens`` tokens for ever. ``hardness`` in [0, 1] is read anew for each if it is a shared
    value: at 0 one picture of 8 x 8 cells and little text, at 1 up to three of all sizes."""
    rng = random.Random(seed)
    known = shapes(tokens)
    easy = [shape for shape in known[1] if shape.grids == ((8, 8),) and shape.room < 384]
    while True:
        now = float(getattr(hardness, "value", hardness))
        count = rng.choices((1, 2, 3), (1.0, 0.9 * now, 0.35 * now))[0]
        shape = rng.choice(known[count] if rng.random() < now else easy)
        draw = Draw(rng, hardness=now)
        rows = [fitting(draw, shape, encoder) for _ in range(shape.rows)]
        yield collate(rows, encoder, shape.length, shape.learn_length)


SIZES: tuple[Grid, ...] = ((8, 8), (6, 7), (9, 5))


def validation(encoder: Encoder, per_family: int, sizes: Sequence[Grid] = SIZES) -> Iterator[Batch]:
    """The held-in split that picks the best checkpoint: fixed, one question per dialogue, pictures that training cannot
    draw. (The suite "held-out" of ``vlcache_dist.evaluate`` picks nothing.)"""
    for count in (1, 2, 3):
        for family in families(count):
            draw = Draw(random.Random(f"validation {count} {family}"), VALIDATION_SEEDS)
            for grids in ([size] * count for size in sizes):
                rows = [sample(draw, grids, 96, family, more=False) for _ in range(per_family)]
                longest = max(len(encoder.encode(row)[0]) for row in rows)
                yield collate(rows, encoder, -(-longest // 32) * 32)
