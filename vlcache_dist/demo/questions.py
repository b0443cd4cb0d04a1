"""What the demo asks: the same pictures in changing contexts, with answers that are known."""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcache_dist.demo.pictures import Picture, draw

WORDS = (  # noqa: SIM905
    "the river house garden window letter music winter summer morning story teacher doctor farmer sailor "
    "child friend street bridge forest island valley table lamp book paper bottle door wall apple coffee "
    "water stone silver walks finds keeps brings opens builds reads writes leaves old young small quiet "
    "bright heavy warm early slow near under "
).split()


@dataclass(frozen=True, slots=True)
class Question:
    """One request of the demo. ``asked`` is the index of the picture that the question is about, ``worker`` the index
    of the prefill worker that must take it."""

    name: str
    messages: list[dict[str, Any]]
    truth: str
    asked: int
    worker: int


def save_pictures(folder: Path) -> list[tuple[Path, Picture]]:
    """Draw the demo's pictures and write them as PNG files: from here on they are read like any user's file."""
    pictures = []
    for number in range(6):
        cells = 12 if number == 0 else 8  # a vision token per cell
        picture = draw("form", seed=100 + number, rows=cells, columns=cells)
        path = folder / f"picture-{number}.png"
        path.write_bytes(picture.png())
        pictures.append((path, picture))
    return pictures


def questions(pictures: Sequence[tuple[Path, Picture]]) -> list[Question]:
    """The demo's requests, in the order in which they must be asked."""
    (path, picture), *others = pictures
    image = _image(path)
    fact, other = picture.facts[0], picture.facts[1]
    slot = others[1][1].facts[0]
    in_slot_two = f"In picture 2, {slot.question[0].lower()}{slot.question[1:]}"
    prefix = f"Look at the picture.{sentences(random.Random(0), 240)}\n"
    three = [others[0], others[1], others[2]]
    again = [others[3], others[1], others[4]]
    return [
        Question("cold", _user(image, _text(fact.question)), fact.answer, 0, 0),
        Question("behind a long text", _user(_text(prefix), image, _text(fact.question)), fact.answer, 0, 1),
        Question("question first", _user(_text(other.question + "\n"), image), other.answer, 0, 1),
        Question("among three", _labelled(three, in_slot_two), slot.answer, 1, 0),
        Question("same slot, other pictures", _labelled(again, in_slot_two), slot.answer, 1, 1),
    ]


def warm_up(folder: Path) -> list[dict[str, Any]]:
    """A conversation about a picture that the demo does not use."""
    path = folder / "warm-up.png"
    path.write_bytes(draw("form", seed=99).png())
    return _user(_image(path), _text("Look at the picture."))


def _user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(path: Path) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _labelled(pictures: Sequence[tuple[Path, Picture]], question: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for number, (path, _) in enumerate(pictures, start=1):
        parts += [_text(f"{'' if number == 1 else chr(10)}Picture {number}: "), _image(path)]
    return _user(*parts, _text(question))


def sentences(rng: random.Random, words: int) -> str:
    """Unrelated sentences of so many words, each behind a space."""
    text = ""
    while words > 0:
        length = min(words, rng.randint(4, 10))
        text += "".join(f" {rng.choice(WORDS)}" for _ in range(length)) + "."
        words -= length
    return text
