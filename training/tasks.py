"""What the bundled model learns to answer: dialogues over scenes, of families that need what stands before a picture in
graded strength.

=============== ======================================================================== ===============================
family          example                                                                  the picture's tokens must know
=============== ======================================================================== ===============================
after           picture, "What is the value of QF?"                                      nothing
prefix          300 words, picture, question                                             nothing
turns           picture, question, answer, another question                              nothing
needle          "The code word is QF.", picture, "What is the value of the code word?"   nothing, but it helps
before          "What is the value of QF?", picture                                      nothing, but it helps much
rule            "Rows are counted from the bottom.", picture, "What is at row 1, ..."    the rule, if it is to be quick
labelled        "Picture 1: ", picture, "Picture 2: ", picture, "In picture 2, ..."      which picture it is
ordinal         picture, picture, "In the second picture, ..."                           the same, without being told
named           "The picture to read is picture 2.", ..., "What is the value of QF?"    nothing, but it helps
reference       ..., "What color in picture 2 is the shape that is red in picture 1?"  what the other picture says
=============== ======================================================================== ===============================

``sample`` draws training data, ``validation`` a split by other seeds that training cannot draw.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.words import PROSE
from vlcache_dist.demo.questions import WORDS
from vlcache_dist.demo.scenes import Fact, Kind, Scene
from vlcache_dist.evaluate.cases import Dialogue, Part, Shown

Grid = tuple[int, int]
TRAIN_SEEDS, VALIDATION_SEEDS = (0, 1 << 40), (1 << 41, 1 << 42)
WEIGHTS = {
    "after": 6.0,
    "prefix": 3.0,
    "turns": 2.0,
    "needle": 1.5,
    "before": 3.0,
    "rule": 1.5,
    "labelled": 7.0,
    "ordinal": 2.0,
    "reference": 6.0,
    "named": 1.0,
}
SINGLE = ("after", "prefix", "turns", "needle", "before", "rule")
_ORDINALS = ("first", "second", "third")
_LOOK = "Look at the picture."
SLOW = ("label", "place")  #: families of facts that are learnt last, and asked twice as often as others
ASKED_FIRST = 0.45  #: share of labelled series whose question stands before the pictures


@dataclass(frozen=True, slots=True)
class Sample:
    """``dialogue`` ends with an answer; all answers in it are to be learnt. ``families``: (family, fact's family) of
    each."""

    dialogue: Dialogue
    families: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Draw:
    """Source of pictures and questions. ``hardness`` in [0, 1]: the curriculum's progress; below 1 it is also asked for
    what only teaches (``dense``)."""

    rng: random.Random
    seeds: tuple[int, int] = TRAIN_SEEDS
    hardness: float = 1.0

    def shown(self, grid: Grid, kind: Kind | None = None) -> Shown:
        kinds: tuple[Kind, ...] = ("form", "shapes", "table")
        chosen = kind or self.rng.choices(kinds, (5, 4, 2))[0]
        return Shown(chosen, self.rng.randrange(*self.seeds), *grid)

    def fact(self, scene: Scene) -> Fact:
        """A question of any family that the scene has: families are equally likely (``SLOW`` ones twice as much), not
        questions."""
        groups: dict[str, list[Fact]] = {}
        lessons = dense(scene, self.rng.random() > self.hardness) if self.hardness < 1 else ()
        for fact in (*scene.facts, *lessons):
            groups.setdefault(fact.family, []).append(fact)
        return self.rng.choice(groups[self.rng.choice([*sorted(groups), *(name for name in SLOW if name in groups)])])

    def words(self, count: int) -> str:
        text = ""
        while count > 0:
            length = min(count, self.rng.randint(4, 10))
            text += "".join(f" {self.rng.choice(WORDS)}" for _ in range(length)) + "."
            count -= length
        return text

    def prose(self, count: int) -> str:
        """Some ``count`` words that no rule, question or label is made of, as people write: what stands before a
        picture must not be taken for an instruction because it is new."""
        text = ""
        while count > 0:
            length = min(count, self.rng.randint(3, 14))
            chosen = [self.rng.choice(PROSE) for _ in range(length)]
            if self.rng.random() < 0.1:
                chosen[-1] = str(self.rng.randrange(2000))
            said = " ".join(chosen) + self.rng.choice(".....,;:!?")
            text += (" " if text else "") + said[0].upper() + said[1:] + self.rng.choice((" ", "", "", "\n"))
            count -= length
        return text

    def system(self) -> str:
        if self.rng.random() < 0.25:
            return f"You are a{self.words(self.rng.randint(3, 20))}"
        return self.prose(self.rng.randint(3, 20)) if self.rng.random() < 0.15 else ""


def dense(scene: Scene, everything: bool) -> list[Fact]:
    """Long answers that read a picture in order, row by row or ``everything``: many lessons at once on what stands
    beside what. Without them, finding things by their neighbours was not learnt in 200 M tokens."""
    if scene.kind == "table":  # its rows are facts of the scene
        return []
    size = 2 if scene.kind == "shapes" else 1
    lines: list[str] = []
    for row in range(0, scene.rows - size + 1, size):
        found = {s.column: f"{s.color_name} {s.name}".strip() for s in scene.sprites if s.row == row}
        if size == 2:
            found = {column: found.get(column, "nothing") for column in range(0, scene.columns - 1, 2)}
        lines.append(
            ", ".join(found[c] for c in sorted(found)) if size == 2 else " ".join(found[c] for c in sorted(found))
        )
    facts = [Fact(f"Read row {n}.", line, "row") for n, line in enumerate(lines, 1) if line]
    if everything:
        facts.append(Fact("Read all.", "; ".join(line for line in lines if line), "all"))
    return facts


Question = tuple[str, str, str]  # question, answer, fact's family


def families(pictures: int) -> list[str]:
    """Families that fit so many pictures."""
    if pictures == 1:
        return list(SINGLE)
    return ["labelled", "ordinal", "turns", "named", *(["reference"] if pictures == 2 else [])]


def sample(draw: Draw, grids: Sequence[Grid], room: int, family: str | None = None, more: bool = True) -> Sample:
    """A dialogue over pictures of the given ``grids`` (rows, columns). ``room``: tokens of text, roughly.
    ``more``: ask further questions while there is room (cheap lessons over the same pictures)."""
    rng = draw.rng
    if family is None:
        names = families(len(grids))
        family = rng.choices(names, [WEIGHTS[name] for name in names])[0]
    build = _BUILD[family]
    opening, question, follow = build(draw, grids, room)
    turns: list[tuple[str, tuple[Part, ...]]] = []
    if system := draw.system():
        turns.append(("system", (system,)))
    turns += [("user", opening), ("assistant", (question[1],))]
    asked = [(family, question[2])]
    room -= _tokens(opening) + _tokens(question[:2])
    for _ in range(16):
        if not more or room < 0:
            break
        text, answer, kind = follow()
        turns += [("user", (text,)), ("assistant", (answer,))]
        asked.append((family, kind))
        room -= 14 + _tokens((text, answer))
    return Sample(Dialogue(tuple(turns)), tuple(asked))


Built = tuple[tuple[Part, ...], Question, Callable[[], Question]]


def _tokens(parts: Sequence[Part]) -> int:
    """Of the text, roughly: four characters each."""
    return sum(len(part) // 4 for part in parts if isinstance(part, str))


def _ask(draw: Draw, scene: Scene, where: str = "") -> Question:
    fact = draw.fact(scene)
    text = fact.question
    return (f"{where}{text[0].lower()}{text[1:]}" if where else text), fact.answer, fact.family


def _one(draw: Draw, grids: Sequence[Grid]) -> tuple[Shown, Callable[[], Question]]:
    shown = draw.shown(grids[0])
    scene = shown.scene()
    return shown, lambda: _ask(draw, scene)


def _after(draw: Draw, grids: Sequence[Grid], room: int) -> Built:
    shown, follow = _one(draw, grids)
    question = follow()
    return (shown, question[0]), question, follow


def _prefix(draw: Draw, grids: Sequence[Grid], room: int) -> Built:
    shown, follow = _one(draw, grids)
    question = follow()
    words = int(draw.hardness * draw.rng.randint(0, max(0, min(room - 30, 400))))
    if draw.rng.random() < 0.6:
        return (draw.prose(words // 3 + 1) + draw.rng.choice((" ", "\n", "\n\n")), shown, question[0]), question, follow
    return (f"{_LOOK}{draw.words(words)}\n", shown, question[0]), question, follow


def _before(draw: Draw, grids: Sequence[Grid], room: int) -> Built:
    shown, follow = _one(draw, grids)
    question = follow()
    return (question[0] + "\n", shown), question, follow


def _needle(draw: Draw, grids: Sequence[Grid], room: int) -> Built:
    shown = draw.shown(grids[0], "form")
    scene = shown.scene()
    fact = draw.rng.choice(_values(scene))
    label = fact.question.removeprefix("What is the value of ").removesuffix("?")
    spare = int(draw.hardness * max(0, min(room - 40, 300)))
    first, second = draw.rng.randint(0, spare // 2), draw.rng.randint(0, spare // 2)
    text = f"{_LOOK}{draw.words(first)} The code word is {label}.{draw.words(second)}\n"
    question = "What is the value of the code word?"
    return (text, shown, question), (question, fact.answer, "value"), lambda: _ask(draw, scene)


def _values(scene: Scene) -> list[Fact]:
    return [fact for fact in scene.facts if fact.family == "value"]


def _rule(draw: Draw, grids: Sequence[Grid], room: int) -> Built:
    """The rule is given once, before the picture, and holds for all questions."""
    if draw.rng.random() < 0.5:
        shown = draw.shown(grids[0], "form")
        scene = shown.scene()
        rule = "Write numbers backwards."

        def ask() -> Question:
            fact = draw.rng.choice(_values(scene))
            return fact.question, fact.answer[::-1], "backwards"
    else:
        shown = draw.shown(grids[0], "shapes")
        scene = shown.scene()
        rule = "Rows are counted from the bottom."
        answers = {fact.question: fact.answer for fact in scene.facts if fact.family == "place"}

        def ask() -> Question:
            height, width = scene.rows // 2, scene.columns // 2
            row, column = draw.rng.randint(1, height), draw.rng.randint(1, width)
            said = f"What is at row {row}, column {column}?"
            return said, answers[f"What is at row {height + 1 - row}, column {column}?"], "from the bottom"

    question = ask()
    return (rule + "\n", shown, question[0]), question, ask


def _several(draw: Draw, grids: Sequence[Grid]) -> list[Shown]:
    kind = draw.shown(grids[0]).kind if draw.rng.random() < 0.6 else None
    return [draw.shown(grid, kind) for grid in grids]


def _labels(pictures: Sequence[Shown]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for number, picture in enumerate(pictures, 1):
        parts += [f"{'' if number == 1 else chr(10)}Picture {number}: ", picture]
    return tuple(parts)


def _labelled(draw: Draw, grids: Sequence[Grid], room: int) -> Built:
    pictures = _several(draw, grids)
    scenes = [picture.scene() for picture in pictures]

    def ask() -> Question:
        index = draw.rng.randrange(len(scenes))
        return _ask(draw, scenes[index], f"In picture {index + 1}, ")

    question = ask()
    if draw.rng.random() < ASKED_FIRST:
        return (question[0] + "\n", *_labels(pictures)), question, ask
    return (*_labels(pictures), question[0]), question, ask


def _ordinal(draw: Draw, grids: Sequence[Grid], room: int) -> Built:
    pictures = _several(draw, grids)
    scenes = [picture.scene() for picture in pictures]

    def ask() -> Question:
        index = draw.rng.randrange(len(scenes))
        return _ask(draw, scenes[index], f"In the {_ORDINALS[index]} picture, ")

    question = ask()
    return (*pictures, question[0]), question, ask


def _named(draw: Draw, grids: Sequence[Grid], room: int) -> Built:
    """The text before the pictures says which of them all questions are about."""
    pictures = _several(draw, grids)
    index = draw.rng.randrange(len(pictures))
    scene = pictures[index].scene()
    question = _ask(draw, scene)
    said = f"The picture to read is picture {index + 1}.\n"
    return (said, *_labels(pictures), question[0]), question, lambda: _ask(draw, scene)


def _reference(draw: Draw, grids: Sequence[Grid], room: int) -> Built:
    """A shape that picture 1 names by its colour, and its colour in picture 2."""
    rng = draw.rng
    pictures = [draw.shown(grid, "shapes") for grid in grids]
    scenes = [picture.scene() for picture in pictures]
    pairs = []
    for color, shape in ((s.color_name, s.name) for s in scenes[0].sprites):
        once = sum(s.color_name == color for s in scenes[0].sprites) == 1
        there = [s.color_name for s in scenes[1].sprites if s.name == shape]
        if once and len(there) == 1:
            pairs.append((color, there[0]))
    if not pairs:  # nothing to refer to: ask an ordinary question
        return _labelled(draw, grids, room)

    def ask() -> Question:
        color, answer = rng.choice(pairs)
        text = f"What color in picture 2 is the shape that is {color} in picture 1?"
        return text, answer, "reference"

    question = ask()
    return (*_labels(pictures), question[0]), question, ask


def _turns(draw: Draw, grids: Sequence[Grid], room: int) -> Built:
    return _after(draw, grids, room) if len(grids) == 1 else _labelled(draw, grids, room)


_BUILD: dict[str, Callable[[Draw, Sequence[Grid], int], Built]] = {
    "after": _after,
    "prefix": _prefix,
    "turns": _turns,
    "needle": _needle,
    "before": _before,
    "rule": _rule,
    "labelled": _labelled,
    "ordinal": _ordinal,
    "named": _named,
    "reference": _reference,
}
