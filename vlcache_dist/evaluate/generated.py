"""Seeded suites for the bundled model: the same questions in contexts that other contexts' KV is reused in.

``tune`` is for studies and calibration, ``held-out`` is touched by neither: other formats as well as other pictures
and other words. Questions are of every family that a scene has. What a picture's tokens must know of what stands before
them grows from format to format: nothing, which picture they are, a rule that turns the answer, what another picture
shows (``multi-hop`` and ``rules`` are those formats by themselves). ``abilities`` asks every family behind and before
the picture, to measure what the model answers when everything is computed. Sides of pictures are drawn in steps of 28
pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from vlcache_dist.demo.pictures import Fact, Kind
from vlcache_dist.demo.questions import sentences
from vlcache_dist.demo.scenes import Scene
from vlcache_dist.evaluate.cases import Case, Dialogue, Donor, Shown

Built = tuple[Dialogue, str, tuple[Donor | None, ...]]  #: request, answer, donors
_LOOK = "Look at the picture."
_ORDINALS = ("first", "second")
_SIDES = (5, 12)  #: cells of a side, least and most


class _Draw:
    """A source of pictures, questions and words for one case."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def picture(self, kind: Kind = "form") -> Shown:
        return Shown(kind, self.rng.getrandbits(40), self.rng.randint(*_SIDES), self.rng.randint(*_SIDES))

    def any_picture(self) -> Shown:
        kinds: tuple[Kind, ...] = ("form", "table", "shapes")
        return self.picture(self.rng.choice(kinds))

    def fact(self, picture: Shown, but: Fact | None = None, family: str = "") -> Fact:
        """A question of any family, or of the one given: families are equally likely, not questions. ``but``: not this
        one, unless it is the only one."""
        families: dict[str, list[Fact]] = {}
        known = [fact for fact in picture.scene().facts if family in ("", fact.family)]
        for fact in known:
            if fact != but or len(known) == 1:
                families.setdefault(fact.family, []).append(fact)
        return self.rng.choice(families[self.rng.choice(list(families))])

    def words(self, count: int) -> str:
        return sentences(self.rng, count)

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


def _other_text(d: _Draw) -> Built:
    picture = d.any_picture()
    fact = d.fact(picture)
    donor = Dialogue.user(f"{_LOOK}{d.words(d.rng.randint(40, 160))}\n", picture, d.fact(picture).question)
    return Dialogue.user(picture, fact.question), fact.answer, (Donor(donor, 0),)


def _other_system(d: _Draw) -> Built:
    picture = d.any_picture()
    fact = d.fact(picture)
    return Dialogue.user(picture, fact.question, system=d.system()), fact.answer, (Donor(d.bare(picture), 0),)


def _question_first(d: _Draw) -> Built:
    picture = d.picture()
    fact = d.fact(picture)
    other = d.fact(picture, but=fact)
    donor = Dialogue.user(other.question + "\n", picture)
    return Dialogue.user(fact.question + "\n", picture), fact.answer, (Donor(donor, 0),)


def _question_first_bare(d: _Draw) -> Built:
    picture = d.picture()
    fact = d.fact(picture)
    return Dialogue.user(fact.question + "\n", picture), fact.answer, (Donor(d.bare(picture), 0),)


def _long_prefix(d: _Draw) -> Built:
    picture = d.any_picture()
    fact = d.fact(picture)
    target = Dialogue.user(f"{_LOOK}{d.words(d.rng.randint(180, 240))}\n", picture, fact.question)
    return target, fact.answer, (Donor(d.bare(picture), 0),)


def _needle(d: _Draw, label: str, picture: Shown, words: int) -> Dialogue:
    before = f"{_LOOK}{d.words(words)} The code word is {label}.{d.words(words)}\n"
    return Dialogue.user(before, picture, "What is the value of the code word?")


def _code_word(d: _Draw) -> Built:
    picture = d.picture()
    fact = d.fact(picture, family="value")
    other = d.fact(picture, but=fact, family="value")
    donor = _needle(d, _label(other), picture, d.rng.randint(10, 60))
    return _needle(d, _label(fact), picture, d.rng.randint(10, 60)), fact.answer, (Donor(donor, 0),)


def _code_word_bare(d: _Draw) -> Built:
    picture = d.picture()
    fact = d.fact(picture, family="value")
    return _needle(d, _label(fact), picture, d.rng.randint(10, 60)), fact.answer, (Donor(d.bare(picture), 0),)


def _label(fact: Fact) -> str:
    return fact.question.removeprefix("What is the value of ").removesuffix("?")


def _same_slot(asked: int, count: int) -> Callable[[_Draw], Built]:
    def build(d: _Draw) -> Built:
        pictures = [d.picture() for _ in range(count)]
        fact = d.fact(pictures[asked])
        donors = []
        for i, picture in enumerate(pictures):
            others = [d.picture() for _ in range(count)]
            others[i] = picture
            donors.append(Donor(_labelled(others[: i + 1], _in(i + 1, d.fact(picture).question)), i))
        return _labelled(pictures, _in(asked + 1, fact.question)), fact.answer, tuple(donors)

    return build


def _swapped(d: _Draw) -> Built:
    return _swapped_pair(d, [d.picture(), d.picture()])


def _swapped_pair(d: _Draw, pictures: list[Shown]) -> Built:
    asked = d.rng.randrange(2)
    fact = d.fact(pictures[asked])
    donor = _labelled(pictures[::-1], _in(1, d.fact(pictures[1]).question))
    return _labelled(pictures, _in(asked + 1, fact.question)), fact.answer, (Donor(donor, 1), Donor(donor, 0))


def _alone_then_labelled(count: int) -> Callable[[_Draw], Built]:
    def build(d: _Draw) -> Built:
        pictures = [d.picture() for _ in range(count)]
        asked = d.rng.randrange(count)
        fact = d.fact(pictures[asked])
        donors = tuple(Donor(d.bare(picture), 0) for picture in pictures)
        return _labelled(pictures, _in(asked + 1, fact.question)), fact.answer, donors

    return build


def _later_turn(d: _Draw) -> Built:
    picture = d.any_picture()
    first, fact = d.fact(picture), d.fact(picture)
    turns = (
        ("system", (d.system(),)),
        ("user", (picture, first.question)),
        ("assistant", (first.answer,)),
        ("user", (fact.question,)),
    )
    return Dialogue(turns), fact.answer, (Donor(d.bare(picture), 0),)


def _second_picture_later(d: _Draw) -> Built:
    old, new = d.picture(), d.picture()
    first, fact = d.fact(old), d.fact(new)
    turns = (
        ("user", ("Picture 1: ", old, _in(1, first.question))),
        ("assistant", (first.answer,)),
        ("user", ("Picture 2: ", new, _in(2, fact.question))),
    )
    return Dialogue(turns), fact.answer, (Donor(d.bare(old), 0), Donor(d.bare(new), 0))


def _window(d: _Draw) -> Built:
    shots = [d.picture() for _ in range(4)]
    asked = d.rng.randrange(3)
    fact = d.fact(shots[1 + asked])
    donor = _labelled(shots[:3], _in(3, d.fact(shots[2]).question))
    target = _labelled(shots[1:], _in(asked + 1, fact.question))
    return target, fact.answer, (Donor(donor, 1), Donor(donor, 2), None)


def _twice(d: _Draw) -> Built:
    picture = d.picture()
    fact = d.fact(picture)
    donor = Donor(d.bare(picture), 0)
    asked = d.rng.randint(1, 2)
    return _labelled([picture, picture], _in(asked, fact.question)), fact.answer, (donor, donor)


def _pair_question_first(d: _Draw) -> Built:
    pictures = [d.picture(), d.picture()]
    asked = d.rng.randrange(2)
    fact = d.fact(pictures[asked])
    donor = _labelled(pictures[::-1], before=_in(1, d.fact(pictures[1]).question) + "\n")
    target = _labelled(pictures, before=_in(asked + 1, fact.question) + "\n")
    return target, fact.answer, (Donor(donor, 1), Donor(donor, 0))


def _unlabelled(d: _Draw) -> Built:
    pictures = [d.picture(), d.picture()]
    asked = d.rng.randrange(2)
    fact = d.fact(pictures[asked])
    donor = Dialogue.user(*pictures[::-1], d.fact(pictures[1]).question)
    question = f"In the {_ORDINALS[asked]} picture, {fact.question[0].lower()}{fact.question[1:]}"
    return Dialogue.user(*pictures, question), fact.answer, (Donor(donor, 1), Donor(donor, 0))


def _color_across(d: _Draw) -> Built:
    while True:
        pictures = [d.picture("shapes"), d.picture("shapes")]
        first, second = (picture.scene().sprites for picture in pictures)
        colors, shapes = [s.color_name for s in first], [s.name for s in second]
        joined = [s for s in first if colors.count(s.color_name) == 1 and shapes.count(s.name) == 1]
        if joined:
            break
    known = d.rng.choice(joined)
    answer = next(s.color_name for s in second if s.name == known.name)
    question = f"What color in picture 2 is the shape that is {known.color_name} in picture 1?"
    return _labelled(pictures, question), answer, tuple(Donor(d.bare(picture), 0) for picture in pictures)


def _rule(rule: str, kind: Kind, dropped: bool = False) -> Callable[[_Draw], Built]:
    """A rule before the picture, recorded without it; ``dropped``: the other way round."""

    def build(d: _Draw) -> Built:
        picture = d.picture(kind)
        scene = picture.scene()
        asked = d.rng.choice([f for f in scene.facts if f.family in ("value", "place")])
        ruled = Dialogue.user(rule + "\n", picture, asked.question)
        plain = Dialogue.user(picture, asked.question)
        if dropped:
            return plain, asked.answer, (Donor(ruled, 0),)
        return ruled, _by_rule(rule, asked, scene), (Donor(d.bare(picture), 0),)

    return build


def _by_rule(rule: str, asked: Fact, scene: Scene) -> str:
    if rule == _BACKWARDS:
        return asked.answer[::-1]
    row = int(asked.question.split("row ")[1].split(",")[0])
    turned = asked.question.replace(f"row {row},", f"row {scene.rows // 2 + 1 - row},")
    return next(fact.answer for fact in scene.facts if fact.question == turned)


def _ability(kind: Kind, family: str, before: bool) -> Callable[[_Draw], Built]:
    def build(d: _Draw) -> Built:
        while True:  # not every scene has every family
            picture = d.picture(kind)
            scene = picture.scene()
            facts = [fact for fact in scene.facts if fact.family == family]
            if facts:
                break
        fact = d.rng.choice(facts)
        parts = (fact.question + "\n", picture) if before else (picture, fact.question)
        return Dialogue.user(*parts), fact.answer, (Donor(Dialogue.user(f"{_LOOK}{d.words(8)}\n", picture), 0),)

    return build


def _text_names_picture(d: _Draw) -> Built:
    pictures = [d.picture(), d.picture()]
    asked = d.rng.randrange(2)
    fact = d.fact(pictures[asked])
    donor = _labelled(pictures, before=f"The picture to read is picture {2 - asked}.\n")
    before, question = f"The picture to read is picture {asked + 1}.\n", fact.question
    return _labelled(pictures, question, before=before), fact.answer, (Donor(donor, 0), Donor(donor, 1))


_BACKWARDS, _FROM_BELOW = "Write numbers backwards.", "Rows are counted from the bottom."
_TUNE: dict[str, Callable[[_Draw], Built]] = {
    "other text before": _other_text,
    "question first": _question_first,
    "another code word": _code_word,
    "same slot, asked first": _same_slot(0, 2),
    "swapped labels": _swapped,
    "alone, then one of two": _alone_then_labelled(2),
    "rows from the bottom, recorded without": _rule(_FROM_BELOW, "shapes"),
}
_MULTI_HOP: dict[str, Callable[[_Draw], Built]] = {
    "color across two pictures": _color_across,
    "text names the picture": _text_names_picture,
}
_RULES: dict[str, Callable[[_Draw], Built]] = {
    "numbers backwards, recorded without": _rule(_BACKWARDS, "form"),
    "recorded with rows from the bottom": _rule(_FROM_BELOW, "shapes", dropped=True),
}
_HELD_OUT: dict[str, Callable[[_Draw], Built]] = {
    "other system prompt": _other_system,
    "long prefix": _long_prefix,
    "question first, recorded after": _question_first_bare,
    "code word, recorded without": _code_word_bare,
    "later turn": _later_turn,
    "same slot, asked middle": _same_slot(1, 3),
    "same slot, asked last": _same_slot(1, 2),
    "alone, then one of three": _alone_then_labelled(3),
    "unlabelled, another order": _unlabelled,
    "sliding window": _window,
    "same picture twice": _twice,
    "second picture in a later turn": _second_picture_later,
    "question first, pictures swapped": _pair_question_first,
    **_RULES,
    **_MULTI_HOP,
}
_FAMILIES: dict[Kind, tuple[str, ...]] = {
    "form": ("value", "label"),
    "table": ("cell", "row"),
    "shapes": ("place", "shape", "color", "count color", "count shape"),
}
_ABILITIES = {
    f"{family}, {'before' if before else 'after'}": _ability(kind, family, before)
    for kind, families in _FAMILIES.items()
    for family in families
    for before in (False, True)
}
SUITES = {
    "tune": _TUNE,
    "held-out": _HELD_OUT,
    "multi-hop": _MULTI_HOP,
    "rules": _RULES,
    "abilities": _ABILITIES,
}


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
