"""Suites, policies, public data, figures: everything of the evaluation that needs no model."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from vlcache_dist.demo.pictures import draw
from vlcache_dist.errors import ConfigError, InvalidPlan
from vlcache_dist.evaluate.cases import Case, Dialogue, Shown, by_format
from vlcache_dist.evaluate.cli import split_policies
from vlcache_dist.evaluate.generated import SUITES, generate
from vlcache_dist.evaluate.plots import chart
from vlcache_dist.evaluate.policies import SpanView, parse_policy
from vlcache_dist.evaluate.public import read_folder
from vlcache_dist.evaluate.scoring import edit_distance, is_right, kl_divergence, score

N, LAYERS = 64, 10


def view(seed: int = 0) -> SpanView:
    deviation = np.zeros((LAYERS, N), np.float32)
    deviation[1, [7, 40, 3]] = [3, 2, 1]
    return SpanView(N, LAYERS, 8, deviation, np.random.default_rng(seed))


def fresh_tokens(spelling: str, layer: int = 5) -> list[int]:
    return np.flatnonzero(parse_policy(spelling).choose(view()).fresh[layer]).tolist()


def test_suites_are_seeded_and_share_nothing() -> None:
    assert generate("held-out", 2, 1) == generate("held-out", 2, 1) != generate("held-out", 2, 2)
    tune, held = generate("tune", 2), generate("held-out", 2)
    assert not set(by_format(tune)) & set(by_format(held))
    assert not {p for c in tune for p in c.dialogue.pictures} & {p for c in held for p in c.dialogue.pictures}
    with pytest.raises(ValueError, match="known are"):
        generate("other", 1)


@pytest.mark.parametrize("suite", SUITES)
def test_donors_show_the_same_picture(suite: str) -> None:
    for case in generate(suite, 2):
        for picture, donor in zip(case.dialogue.pictures, case.donors, strict=True):
            assert donor is None or donor.dialogue.pictures[donor.index] == picture
            assert donor is None or donor.dialogue != case.dialogue


def test_a_case_needs_a_donor_per_picture() -> None:
    with pytest.raises(ValueError, match="0 donors for 1 pictures"):
        Case("x", Dialogue.user(Shown(), "What?"), ("1",), ())


def test_selections() -> None:
    assert fresh_tokens("uniform:5") == [0, 1, 2, 3]
    assert fresh_tokens("last:5") == [60, 61, 62, 63]
    assert fresh_tokens("blend:4.6") == [3, 7, 40]
    assert fresh_tokens("epic:5") == [0, 16, 32, 48]
    assert fresh_tokens("epic:20") == sorted([*range(0, 64, 8), *range(1, 41, 8)])
    assert fresh_tokens("mpic:4") == [0, 1, 2, 3]
    assert fresh_tokens("none") == fresh_tokens("unrotated") == []
    assert len(fresh_tokens("random:5")) == 4
    assert fresh_tokens("none+canary:0,3,5<0.5") == [10, 32, 53]
    assert fresh_tokens("inverse:0-100", 0) == [] and len(fresh_tokens("inverse:0-100", 9)) == N


@pytest.mark.parametrize("name", ["random", "last", "epic", "uniform"])
def test_equal_budget(name: str) -> None:
    for percent in (5, 20):
        count = -(-N * percent // 100)
        assert parse_policy(f"{name}:{percent}").choose(view()).computed == count * LAYERS
    blend = parse_policy(f"blend:{percent}").choose(view())
    assert blend.computed == 2 * N + (LAYERS - 2) * count, "finding the tokens costs two whole layers"
    inverse = parse_policy("inverse:0-10").choose(view())
    assert inverse.computed == LAYERS * 7 > inverse.fresh.sum(), "hidden states of later use are computed"


@pytest.mark.parametrize(
    "spelling",
    ["", "random:x", "random:", "inverse:5", "blend:-1", "epic:nan", "nonsense", "none+canary:0,3,5<1,left:8<1"],
)
def test_bad_policies(spelling: str) -> None:
    with pytest.raises(InvalidPlan):
        parse_policy(spelling)


def test_a_comma_belongs_to_its_spelling() -> None:
    text = "none,uniform:5,min=4,none+canary:0,3,5<0.5,again:5@8<0.02x2,left:7<0.4,counts:8*4,2*6,full"
    watched = "none+canary:0,3,5<0.5,again:5@8<0.02x2,left:7<0.4"
    assert split_policies(text) == ["none", "uniform:5,min=4", watched, "counts:8*4,2*6", "full"]


def test_public_layouts(tmp_path: Path) -> None:
    (tmp_path / "png").mkdir()
    for seed in (1, 2):
        (tmp_path / "png" / f"{seed}.png").write_bytes(draw("form", seed).png())
    lines = [
        {"question": "What?", "image": "1.png", "answers": ["a", "b"]},
        {"query": "How many?", "imgname": "2.png", "label": "10"},
        {"question": "Which?", "image": "1.png", "A": "cat", "B": "dog", "answer": "B"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    cases = read_folder(tmp_path)
    assert {name: len(group) for name, group in by_format(cases).items()} == {
        "behind other text": 3,
        "question first": 3,
        "second of two": 2,
    }
    first, chart_, choice = by_format(cases)["question first"]
    assert (first.answers, first.metric) == (("a", "b"), "exact")
    assert (chart_.answers, chart_.metric) == (("10",), "relaxed")
    assert choice.metric == "choice" and "B. dog" in str(choice.dialogue.turns)
    assert len(read_folder(tmp_path, 1)) == 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "a.jsonl:1"),
        ("[]", "an object"),
        ('{"question": "x", "image": "no.png", "answer": "1"}', "no picture 'no.png'"),
        ('{"question": "x"}', "none of image"),
    ],
)
def test_public_mistakes_are_named(tmp_path: Path, line: str, why: str) -> None:
    with pytest.raises(ConfigError, match=r"no \*\.jsonl"):
        read_folder(tmp_path)
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=why):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("more", "metric"),
    [
        ({"docId": 1}, "anls"),
        ({"metric": "anls"}, "anls"),
        ({"answers": ["a"] * 10}, "vqa"),
        ({"answer": "a"}, "exact"),
    ],
)
def test_a_layout_has_its_metric(tmp_path: Path, more: dict[str, object], metric: str) -> None:
    (tmp_path / "1.png").write_bytes(draw("form", 1).png())
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "What?", "image": "1.png", "answer": "a", **more}))
    assert {case.metric for case in read_folder(tmp_path)} == {metric}


def test_an_unknown_metric_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(draw("form", 1).png())
    line = {"question": "What?", "image": "1.png", "answer": "a", "metric": "bleu"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(ConfigError, match="'bleu': known are exact"):
        read_folder(tmp_path)


def test_scores_between_right_and_wrong() -> None:
    assert score("Abcde.", ("abcdx", "q"), "anls") == pytest.approx(0.8) and score("abcde", ("vwxye",), "anls") == 0
    people = ("red",) * 2 + ("blue",) * 8
    assert score("Red", people, "vqa") == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert score("blue", people, "vqa") == 1 and score("green", people, "vqa") == 0
    assert is_right("abcde", ("abcdx",), "anls") and not is_right("red", people[:1], "vqa")


def test_scoring() -> None:
    assert is_right("  Red  Circle. ", ("red circle",)) and not is_right("red", ("red circle",))
    assert is_right("1,040", ("1000",), "relaxed") and not is_right("1,060", ("1000",), "relaxed")
    assert not is_right("1,040", ("1000",)) and not is_right("many", ("10",), "relaxed")
    assert is_right("It is (B).", ("B",), "choice") and not is_right("Because", ("B",), "choice")
    p = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    assert kl_divergence(p, p).tolist() == [0, 0]
    assert kl_divergence(p[:1], p[1:])[0] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))
    assert (
        edit_distance([1, 2, 3], [1, 3]) == 1 and edit_distance([], [1, 2]) == 2 and edit_distance([1, 2], [2, 1]) == 2
    )


def test_charts_are_documents() -> None:
    root = ET.fromstring(chart("a < b", "x", "y", {"one & two": [(0, 1), (1, 2)], "flat": [(0.5, 1)]}))
    assert root.tag.endswith("svg") and "one & two" in "".join(root.itertext())
    with pytest.raises(ValueError, match="nothing to draw"):
        chart("t", "x", "y", {"none": []})


def test_parts_and_layers_that_a_study_looks_at() -> None:
    assert fresh_tokens("band:1/8") == list(range(8, 16))
    layer = parse_policy("layer:3").choose(view())
    assert layer.fresh.sum(1).tolist() == [N if n == 3 else 0 for n in range(LAYERS)]
    assert layer.computed == 4 * N, "the hidden states below are computed too"


@pytest.mark.parametrize("spelling", ["attend:5", "attend:5@8+none", "band:8/8", "band:1", "attend:x@8", "layer:x"])
def test_bad_study_policies(spelling: str) -> None:
    with pytest.raises(InvalidPlan):
        parse_policy(spelling)


def test_tuning_and_reporting_share_no_picture_at_any_seed_they_use() -> None:
    def pictures(suite: str, seed: int) -> set[Shown]:
        cases = generate(suite, 4, seed)
        shown = {p for case in cases for p in case.dialogue.pictures}
        return shown | {p for case in cases for d in case.donors if d is not None for p in d.dialogue.pictures}

    tuned = set().union(*(pictures("tune", seed) for seed in (0, 1, 10, 11, 12)))
    for suite, seed in (("held-out", 1000), ("multi-hop", 1000), ("rules", 1000)):
        assert not tuned & pictures(suite, seed)


def test_sizes_come_in_steps_of_a_cell() -> None:
    sizes = {(p.rows, p.columns) for case in generate("held-out", 2) for p in case.dialogue.pictures}
    assert any(rows % 4 for rows, _ in sizes) and len(sizes) > 12
    picture = next(p for case in generate("tune", 1) for p in case.dialogue.pictures)
    assert picture.picture().image.size == (picture.columns * 28, picture.rows * 28)


def test_rules_change_the_answer() -> None:
    groups = by_format(generate("rules", 6))
    for case in by_format(generate("tune", 6))["rows from the bottom, recorded without"]:
        (picture,) = case.dialogue.pictures
        said = str(case.dialogue.turns[-1][1][-1])
        row, column = (int(part.strip("?,")) for part in said.split() if part.strip("?,").isdigit())
        there = [
            s for s in picture.scene().sprites if (picture.rows // 2 - s.row // 2, s.column // 2 + 1) == (row, column)
        ]
        assert case.answers == (f"{there[0].color_name} {there[0].name}" if there else "nothing",)
    for case in groups["numbers backwards, recorded without"]:
        label = str(case.dialogue.turns[-1][1][-1]).removeprefix("What is the value of ").removesuffix("?")
        facts = [fact for fact in case.dialogue.pictures[0].scene().facts if fact.family == "value"]
        (value,) = [fact.answer for fact in facts if f" {label}?" in fact.question]
        assert case.answers == (value[::-1],)
    for case in groups["recorded with rows from the bottom"]:
        assert "bottom" not in str(case.dialogue) and "bottom" in str(case.donors)


def test_every_family_is_asked() -> None:
    for suite in ("tune", "held-out"):
        said = [str(case.dialogue.turns[-1][1]).lower() for case in generate(suite, 150)]
        for words in ("how many", "what color is", "read row", "which label", "what is the value", "which shape"):
            assert any(words in one for one in said), (suite, words)
    held_out, tune = by_format(generate("held-out", 1)), by_format(generate("tune", 1))
    assert not held_out.keys() & tune.keys()
    assert held_out.keys() >= by_format(generate("rules", 1)).keys() | by_format(generate("multi-hop", 1)).keys()
    names = by_format(generate("abilities", 1))
    assert {"label, before", "count shape, after", "cell, before"} <= names.keys() and len(names) == 18


def test_questions_over_two_pictures_have_one_answer() -> None:
    for case in by_format(generate("multi-hop", 8))["color across two pictures"]:
        first, second = (picture.scene().sprites for picture in case.dialogue.pictures)
        asked = str(case.dialogue.turns[-1][1][-1]).split("that is ")[1].split()[0]
        (shape,) = [s.name for s in first if s.color_name == asked]
        assert [s.color_name for s in second if s.name == shape] == list(case.answers)
