"""The serving benchmark's plan: two layouts on the same devices, pictures of their own for every point."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vlcache_dist.loadtest import scenario
from vlcache_dist.loadtest.records import Objective
from vlcache_dist.loadtest.run import Options
from vlcache_dist.serve.readiness import pools, require_room

FILE = Path(__file__).parents[2] / "benchmarks" / "serving.py"


@pytest.fixture(scope="module")
def serving() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serving_benchmark", FILE)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layout", ["disaggregated", "colocated"])
def test_layouts_fit_the_same_two_devices(serving: ModuleType, layout: str) -> None:
    settings = serving.settings(layout, Path("/model"), "cuda", 1234, "127.0.0.1:1")
    offered = [{"encoder_pool": 1, "prefill_pool": 1, "GPU": 1.0}, {"encoder_pool": 1, "prefill_pool": 1, "GPU": 1.0}]
    offered[1]["decode_pool"] = 1
    require_room(settings.serve, offered)
    roles = {pool.role: pool.workers for pool in pools(settings.serve)}
    assert roles == (
        {"encoder": 2, "prefill": 2, "decode": 1} if layout == "disaggregated" else {"encoder": 2, "colocated": 2}
    )


def test_no_two_points_share_a_picture_and_all_reuse_shares_are_there(serving: ModuleType) -> None:
    base = Options((), (10.0,), (), Objective(200.0, 50.0), duration_s=2.0, seed=1)
    each = serving.cases(8, 4, [0.95, 0.0, 0.5])
    seen: set[scenario.Picture] = set()
    for number, case in enumerate([*serving.warm_ups(each), *each]):
        options = serving.point_options(base, number, case)
        planned = scenario.plan(case.scenario, case.share, options.count(10.0), options.seed + 1)
        shown = {picture for request in planned for picture in request.images}
        assert not seen & shown
        seen |= shown
    assert [case.share for case in each] == [0.95, 0.0, 0.5, 0.5] and each[-1].scenario.name == "text"


def test_the_file_keeps_what_was_measured_when_something_fails(
    serving: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = serving.Report(tmp_path / "out.json", {"shape": "tiny"})
    report.add([{"layout": "colocated"}])
    report.fail("colocated, images, 50%", RuntimeError("no"))
    contents = json.loads((tmp_path / "out.json").read_text())
    assert contents["rows"] == [{"layout": "colocated"}] and contents["errors"] == [
        "colocated, images, 50%: RuntimeError: no"
    ]
    assert "RuntimeError: no" in capsys.readouterr().err
