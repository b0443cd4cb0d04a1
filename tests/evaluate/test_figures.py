"""Plots come from the JSON alone, the committed one included; detector and position figures are what they say."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from vlcache_dist.errors import ConfigError
from vlcache_dist.evaluate.detector import figures
from vlcache_dist.evaluate.figures import read_json, write_plots
from vlcache_dist.evaluate.study import Sighting
from vlcache_dist.evaluate.tables import fill

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "quality-tiny.json"


def test_the_committed_results_can_be_drawn(tmp_path: Path) -> None:
    written = write_plots(read_json(RESULTS), tmp_path)
    assert {path.stem for path in written} >= {"quality-accuracy", "quality-kl"}
    for path in written:
        assert ET.fromstring(path.read_text()).tag.endswith("svg")


def test_the_pages_tables_are_those_of_the_committed_results() -> None:
    for page in (RESULTS.parents[2] / "docs").glob("*.md"):
        text = page.read_text()
        assert fill(text, read_json(RESULTS)) == text, f"python benchmarks/quality_tables.py {page.name}"


def test_tables_are_filled_in_place() -> None:
    page = "a\n<!-- table: ttft -->\nold\n<!-- end -->\nb\n"
    rows = {"ttft": [{"plan": "off", "ttft_ms": 12.34, "ratio_to_off": 1.0}]}
    filled = fill(page, rows)
    assert "| `off` | 12.3 ms | 1.00 |" in filled and "old" not in filled and filled.endswith("<!-- end -->\nb\n")
    assert fill(filled, rows) == filled
    with pytest.raises(ConfigError, match="no 'ttft'"):
        fill(page, {})
    with pytest.raises(ConfigError, match="known are"):
        fill("<!-- table: x -->\n<!-- end -->", {})


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("{", "[]", json.dumps({"rows": 1})):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"x\.json"):
            read_json(path)


def sighting(format_: str, harmful: bool, ratio: float) -> Sighting:
    ratios = np.full((1, 2, 2, 3), 0.01, np.float32)
    ratios[0, 1, 1, 1] = ratio
    return Sighting(format_, True, not harmful, 0.0, not harmful, 0.5, ratios, ratios[..., 0])


def test_a_limit_is_drawn_on_one_suite_and_tried_on_another() -> None:
    tuned = [sighting("a", False, 0.1)] * 9 + [sighting("b", True, 1.0)] * 3
    tried = (
        [sighting("c", False, 0.2)] * 4
        + [sighting("d", True, 0.9)] * 3
        + [sighting("d", False, 0.9), sighting("d", True, 0.1)]
    )
    found = figures({(0, 3): tuned}, {(0, 3): tried})
    (one,) = found["probe_sets"]
    assert one["layer"] == 1 and 0.2 < one["limit"] < 0.9
    assert (one["held_out_harmful"], one["held_out_caught"]) == (4, 0.75)
    assert one["held_out_false_alarms"] == 0.2
    assert (one["held_out_cases_in_harmless_formats"], one["held_out_false_alarms_in_harmless_formats"]) == (4, 0.0)
    assert [f["harmful"] for f in found["formats"]] == [0, 3, 0, 4]
    assert found["roc"]["by_layer"][1][0] == [0, 0] and found["roc"]["by_layer"][1][-1] == [1, 1]
