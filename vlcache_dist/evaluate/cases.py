"""What an evaluation asks: dialogues over pictures, and the contexts under which the pictures' KV was recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, Literal

from vlcache_dist.demo.pictures import Picture, paint
from vlcache_dist.demo.scenes import Kind, Scene, scene

BATCH = 32  #: cases of a format that are run together


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture: a drawn one (``kind``, ``seed``, cells), or a file where ``path`` is given."""

    kind: Kind = "form"
    seed: int = 0
    rows: int = 8
    columns: int = 8
    path: str = ""

    def picture(self) -> Picture:
        """The drawn picture with its facts. Only for drawn ones."""
        return _drawn(self)

    def scene(self) -> Scene:
        """What the drawn picture shows, unpainted. Only for drawn ones."""
        return scene(self.kind, Random(f"{self.kind} {self.seed} {self.rows} {self.columns}"), self.rows, self.columns)

    def data(self) -> bytes:
        """The encoded file. Raises OSError where ``path`` cannot be read."""
        return Path(self.path).read_bytes() if self.path else self.picture().png()

    def pixels(self) -> bytes:
        """As ``data``; a drawn picture is not compressed, which takes longer than to draw it."""
        if self.path:
            return self.data()
        out = BytesIO()
        self.picture().image.save(out, "BMP")
        return out.getvalue()


@lru_cache(maxsize=64)
def _drawn(shown: Shown) -> Picture:
    drawn = shown.scene()  # not ``draw``: it refuses sizes that the bundled model has not learnt
    return Picture(shown.kind, paint(drawn), drawn.facts)


Part = str | Shown
Metric = Literal["exact", "relaxed", "choice", "anls", "vqa"]  #: see ``scoring.score``


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages as (role, parts); the answer is generated behind the last one."""

    turns: tuple[tuple[str, tuple[Part, ...]], ...]

    @classmethod
    def user(cls, *parts: Part, system: str = "") -> Dialogue:
        """One user message, behind an own system prompt if there is one."""
        opening = (("system", (system,)),) if system else ()
        return cls((*opening, ("user", parts)))

    @property
    def pictures(self) -> tuple[Shown, ...]:
        return tuple(part for _, parts in self.turns for part in parts if isinstance(part, Shown))

    def messages(self) -> tuple[dict[str, Any], ...]:
        """As ``prompt.Conversation`` wants them."""
        return tuple({"role": role, "content": [_part(part) for part in parts]} for role, parts in self.turns)


def _part(part: Part) -> dict[str, str]:
    return {"type": "image"} if isinstance(part, Shown) else {"type": "text", "text": part}


@dataclass(frozen=True, slots=True)
class Donor:
    """The KV of picture number ``index`` of ``dialogue`` is what is reused."""

    dialogue: Dialogue
    index: int


@dataclass(frozen=True, slots=True)
class Case:
    """One request. ``donors``: one per picture of ``dialogue``, in order; None: the picture is new. ``answers``: all
    that count as right."""

    format: str
    dialogue: Dialogue
    answers: tuple[str, ...]
    donors: tuple[Donor | None, ...]
    metric: Metric = "exact"

    def __post_init__(self) -> None:
        if len(self.donors) != len(self.dialogue.pictures):
            raise ValueError(f"{self.format}: {len(self.donors)} donors for {len(self.dialogue.pictures)} pictures")


def by_format(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Cases grouped by format, in order of first appearance."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.format, []).append(case)
    return groups


def batches(cases: Sequence[Case]) -> Iterator[tuple[str, int, Sequence[Case]]]:
    """Format, number of its first case, cases: what is run together."""
    for name, group in by_format(cases).items():
        for start in range(0, len(group), BATCH):
            yield name, start, group[start : start + BATCH]
