"""Seeded suites for the bundled model: the same questions in contexts that other contexts' KV is reused in.

``tune`` is for studies and calibration, ``held-out`` is touched by neither: other formats as well as other pictures
and other words. Every format can be answered by the bundled model when everything is computed.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from vlcache_dist.demo.pictures import Fact, Kind
from vlcache_dist.demo.questions import WORDS
from vlcache_dist.evaluate.cases import Case, Dialogue, Donor, Shown

_LOOK = "Look at the picture."


class _Draw:
    """A source of pictures, questions and words for one case."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def picture(self, kind: Kind = "form", cells: tuple[int, int] = (8, 8)) -> Shown:
        return Shown(kind, self.rng.getrandbits(40), *cells)

    def any_picture(self) -> Shown:
        kinds: tuple[Kind, ...] = ("form", "table", "shapes")
        return self.picture(self.rng.choice(kinds), self.rng.choice([(8, 8), (8, 8), (8, 12), (12, 12)]))

    def fact(self, picture: Shown) -> Fact:
        facts = [f for f in picture.scene().facts if not f.question.startswith("Read row")]
        return self.rng.choice(facts)

    def words(self, count: int) -> str:
        text = ""
        while count > 0:
            length = min(count, self.rng.randint(4, 10))
            text += "".join(f" {self.rng.choice(WORDS)}" for _ in range(length)) + "."
            count -= length
        return text

    def system(self) -> str:
        return f"You are a{self.words(self.rng.randint(4, 16))}"

    def bare(self, picture: Shown) -> Dialogue:
        return Dialogue.user(picture, self.fact(picture).question)


def _in(number: int, question: str) -> str:
    return f"In picture {number}, {question[0].lower()}{question[1:]}"


def _labelled(pictures: list[Shown], *after: str, before: str = "", system: str = "") -> Dialogue:
    parts: list[str | Shown] = [before] if before else []
    for number, picture in enumerate(pictures, 1):
        parts += [f"{'' if number == 1 else chr(10)}Picture {number}: ", picture]
    return Dialogue.user(*parts, *after, system=system)


def _other_text(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    picture = d.any_picture()
    fact = d.fact(picture)
    donor = Dialogue.user(f"{_LOOK}{d.words(d.rng.randint(40, 160))}\n", picture, d.fact(picture).question)
    return Dialogue.user(picture, fact.question), fact.answer, (Donor(donor, 0),)


def _other_system(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    picture = d.any_picture()
    fact = d.fact(picture)
    return Dialogue.user(picture, fact.question, system=d.system()), fact.answer, (Donor(d.bare(picture), 0),)


def _question_first(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    picture = d.picture()
    fact, other = d.fact(picture), d.fact(picture)
    donor = Dialogue.user(other.question + "\n", picture)
    return Dialogue.user(fact.question + "\n", picture), fact.answer, (Donor(donor, 0),)


def _question_first_bare(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    picture = d.picture()
    fact = d.fact(picture)
    return Dialogue.user(fact.question + "\n", picture), fact.answer, (Donor(d.bare(picture), 0),)


def _long_prefix(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    picture = d.any_picture()
    fact = d.fact(picture)
    target = Dialogue.user(f"{_LOOK}{d.words(d.rng.randint(180, 240))}\n", picture, fact.question)
    return target, fact.answer, (Donor(d.bare(picture), 0),)


def _needle(d: _Draw, label: str, picture: Shown, words: int) -> Dialogue:
    before = f"{_LOOK}{d.words(words)} The code word is {label}.{d.words(words)}\n"
    return Dialogue.user(before, picture, "What is the value of the code word?")


def _code_word(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    picture = d.picture()
    facts = picture.scene().facts
    fact, other = d.rng.choice(facts), d.rng.choice(facts)
    donor = _needle(d, _label(other), picture, d.rng.randint(10, 60))
    return _needle(d, _label(fact), picture, d.rng.randint(10, 60)), fact.answer, (Donor(donor, 0),)


def _code_word_bare(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    picture = d.picture()
    fact = d.fact(picture)
    return _needle(d, _label(fact), picture, d.rng.randint(10, 60)), fact.answer, (Donor(d.bare(picture), 0),)


def _label(fact: Fact) -> str:
    return fact.question.removeprefix("What is the value of ").removesuffix("?")


def _same_slot(asked: int, count: int) -> Callable[[_Draw], tuple[Dialogue, str, tuple[Donor | None, ...]]]:
    def build(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
        pictures = [d.picture() for _ in range(count)]
        fact = d.fact(pictures[asked])
        donors = []
        for i, picture in enumerate(pictures):
            others = [d.picture() for _ in range(count)]
            others[i] = picture
            donors.append(Donor(_labelled(others[: i + 1], _in(i + 1, d.fact(picture).question)), i))
        return _labelled(pictures, _in(asked + 1, fact.question)), fact.answer, tuple(donors)

    return build


def _swapped(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    pictures = [d.picture(), d.picture()]
    asked = d.rng.randrange(2)
    fact = d.fact(pictures[asked])
    donor = _labelled(pictures[::-1], _in(1, d.fact(pictures[1]).question))
    return _labelled(pictures, _in(asked + 1, fact.question)), fact.answer, (Donor(donor, 1), Donor(donor, 0))


def _alone_then_labelled(count: int) -> Callable[[_Draw], tuple[Dialogue, str, tuple[Donor | None, ...]]]:
    def build(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
        pictures = [d.picture() for _ in range(count)]
        asked = d.rng.randrange(count)
        fact = d.fact(pictures[asked])
        donors = tuple(Donor(d.bare(picture), 0) for picture in pictures)
        return _labelled(pictures, _in(asked + 1, fact.question)), fact.answer, donors

    return build


def _later_turn(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    picture = d.any_picture()
    first, fact = d.fact(picture), d.fact(picture)
    turns = (
        ("system", (d.system(),)),
        ("user", (picture, first.question)),
        ("assistant", (first.answer,)),
        ("user", (fact.question,)),
    )
    return Dialogue(turns), fact.answer, (Donor(d.bare(picture), 0),)


def _second_picture_later(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    old, new = d.picture(), d.picture()
    first, fact = d.fact(old), d.fact(new)
    turns = (
        ("user", ("Picture 1: ", old, _in(1, first.question))),
        ("assistant", (first.answer,)),
        ("user", ("Picture 2: ", new, _in(2, fact.question))),
    )
    return Dialogue(turns), fact.answer, (Donor(d.bare(old), 0), Donor(d.bare(new), 0))


def _window(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    shots = [d.picture() for _ in range(4)]
    asked = d.rng.randrange(3)
    fact = d.fact(shots[1 + asked])
    donor = _labelled(shots[:3], _in(3, d.fact(shots[2]).question))
    target = _labelled(shots[1:], _in(asked + 1, fact.question))
    return target, fact.answer, (Donor(donor, 1), Donor(donor, 2), None)


def _twice(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    picture = d.picture()
    fact = d.fact(picture)
    donor = Donor(d.bare(picture), 0)
    asked = d.rng.randint(1, 2)
    return _labelled([picture, picture], _in(asked, fact.question)), fact.answer, (donor, donor)


def _pair_question_first(d: _Draw) -> tuple[Dialogue, str, tuple[Donor | None, ...]]:
    pictures = [d.picture(), d.picture()]
    asked = d.rng.randrange(2)
    fact = d.fact(pictures[asked])
    donor = _labelled(pictures[::-1], before=_in(1, d.fact(pictures[1]).question) + "\n")
    target = _labelled(pictures, before=_in(asked + 1, fact.question) + "\n")
    return target, fact.answer, (Donor(donor, 1), Donor(donor, 0))


_TUNE = {
    "other text before": _other_text,
    "question first": _question_first,
    "another code word": _code_word,
    "same slot, asked first": _same_slot(0, 2),
    "swapped labels": _swapped,
    "alone, then one of two": _alone_then_labelled(2),
}
_HELD_OUT = {
    "other system prompt": _other_system,
    "long prefix": _long_prefix,
    "question first, recorded after": _question_first_bare,
    "code word, recorded without": _code_word_bare,
    "later turn": _later_turn,
    "same slot, asked middle": _same_slot(1, 3),
    "same slot, asked last": _same_slot(1, 2),
    "alone, then one of three": _alone_then_labelled(3),
    "sliding window": _window,
    "same picture twice": _twice,
    "second picture in a later turn": _second_picture_later,
    "question first, pictures swapped": _pair_question_first,
}
SUITES = {"tune": _TUNE, "held-out": _HELD_OUT}


def generate(suite: str, cases_per_format: int, seed: int = 0) -> list[Case]:
    """The suite's cases, format by format; the same ones for the same arguments. Raises ValueError for an unknown
    suite."""
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r}: known are {', '.join(SUITES)}")
    cases = []
    for name, build in SUITES[suite].items():
        for number in range(cases_per_format):
            dialogue, answer, donors = build(_Draw(random.Random(f"{suite} {name} {seed} {number}")))
            cases.append(Case(name, dialogue, (answer,), donors))
    return cases
