"""From dialogues to tensors: token ids, M-RoPE positions, where answers are, and pictures as cells.

All rows of a batch show pictures of the same sizes, so that the vision tower runs on plain tensors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

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
AUX_CLASSES = (1 + len(CHARACTERS) + len(SHAPES), 1 + len(CHARACTERS), 1 + len(COLORS))
PAD = 8  #: pixels around a sprite in the atlas, so that shifts read nothing


@lru_cache
def sprite_names() -> tuple[str, ...]:
    """In atlas order; 0 is the empty cell."""
    pairs = [a + b for a in LETTERS for b in LETTERS] + [a + b for a in DIGITS for b in DIGITS]
    return ("", *pairs, *CHARACTERS, *SHAPES)


_NUMBER = {name: number for number, name in enumerate(sprite_names())}


def cells(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What the painter needs of each cell, int16 [cells, CELL_FIELDS], and what an auxiliary reader should see in it,
    int16 [cells, 3]: first character or shape, second character, colour (0: none)."""
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
    return out, aux


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
    """``ids`` int64 [B, L]; ``positions`` [3, B, L]; flat indices ``learn`` of rows that predict ``target``, ``answer``
    int64 [T] numbering the answer that each belongs to; per picture slot ``cells`` [B, n, CELL_FIELDS], ``aux``
    [B, n, 3] and its ``grids``; ``vision``: flat indices of the pictures' tokens, slot by slot."""

    ids: torch.Tensor
    positions: torch.Tensor
    learn: torch.Tensor
    target: torch.Tensor
    answer: torch.Tensor
    cells: list[torch.Tensor]
    aux: list[torch.Tensor]
    vision: torch.Tensor
    grids: list[Grid]
    families: list[tuple[str, str]]

    def to(self, device: torch.device) -> Batch:
        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        return Batch(
            move(self.ids),
            move(self.positions),
            move(self.learn),
            move(self.target),
            move(self.answer),
            [move(c) for c in self.cells],
            [move(a) for a in self.aux],
            move(self.vision),
            self.grids,
            self.families,
        )


def collate(rows: list[Sample], encoder: Encoder, length: int) -> Batch:
    """Rows longer than ``length`` lose their last answers."""
    ids = np.full((len(rows), length), encoder.end, np.int64)
    where = np.zeros((3, len(rows), length), np.int64)
    learn: list[np.ndarray] = []
    answer: list[np.ndarray] = []
    families: list[tuple[str, str]] = []
    spans_of = []
    for b, row in enumerate(rows):
        tokens, spans, answers = encoder.encode(row)
        n = min(len(tokens), length)
        ids[b, :n] = tokens[:n]
        where[:, b, :n] = positions(len(tokens), spans)[:, :n]
        for (start, stop), family in zip(answers, row.families, strict=True):
            if stop <= length:
                learn.append(b * length + np.arange(start, stop))
                answer.append(np.full(stop - start, len(families)))
                families.append(family)
        spans_of.append(spans)
    slots = range(len(spans_of[0]))
    painted = [[cells(spans[slot][1].scene()) for spans in spans_of] for slot in slots]
    grids = [(spans_of[0][slot][1].rows, spans_of[0][slot][1].columns) for slot in slots]
    vision = [
        b * length + spans[slot][0] + np.arange(grids[slot][0] * grids[slot][1])
        for slot in slots
        for b, spans in enumerate(spans_of)
    ]
    target = np.concatenate(learn)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(where),
        torch.from_numpy(target - 1),
        torch.from_numpy(ids.reshape(-1)[target]),
        torch.from_numpy(np.concatenate(answer)),
        [torch.from_numpy(np.stack([c for c, _ in slot])) for slot in painted],
        [torch.from_numpy(np.stack([a for _, a in slot])) for slot in painted],
        torch.from_numpy(np.concatenate(vision)),
        grids,
        families,
    )


def draw_grids(rng: random.Random, hardness: float) -> list[Grid]:
    """Sizes of a batch's pictures: mostly one of 8 x 8 cells at first, later any from 4 to 12 cells on either side, and
    up to three."""
    count = rng.choices((1, 2, 3), (1.0, 0.9 * hardness, 0.35 * hardness))[0]
    grids: list[Grid] = []
    for _ in range(count):
        if rng.random() < 0.6 - 0.2 * hardness:
            grids.append((8, 8))
        else:
            top = 12 if count == 1 else 9
            grids.append((rng.randint(4, top), rng.randint(4, top)))
    return grids


def stream(encoder: Encoder, seed: int, tokens: int, hardness: float) -> Iterator[Batch]:
    """Batches of about ``tokens`` tokens for ever. ``hardness`` is read anew for each if it is a shared value."""
    rng = random.Random(seed)
    while True:
        now = float(getattr(hardness, "value", hardness))
        grids = draw_grids(rng, now)
        room = rng.choice((96, 128, 160, 192, 384 if now > 0.2 else 128))
        vision = sum(rows * columns for rows, columns in grids)
        length = -(-(vision + 64 + room) // 32) * 32
        draw = Draw(rng, hardness=now)
        rows = [sample(draw, grids, room) for _ in range(max(1, tokens // length))]
        yield collate(rows, encoder, length)


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
