"""What ``benchmarks/tune.py`` chooses from measurements; measuring needs a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="only Linux has it")
from triton.runtime.errors import OutOfResources

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tune() -> Any:
    spec = importlib.util.spec_from_file_location("tune", BENCHMARKS / "tune.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tune"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def rows(tune: Any, case: str, **us: float | None) -> list[Any]:
    return [tune.Row("x", case, None if n == "default" else {"name": n}, t) for n, t in us.items()]


def test_attention_must_win_on_the_whole_and_lose_nowhere(tune: Any) -> None:
    one = rows(tune, "one", default=10.0, fast=8.0, slow_once=5.0, broken=1.0, even=10.0)
    many = rows(tune, "many", default=50.0, fast=50.5, slow_once=60.0, broken=None, even=50.0)
    assert tune.choose_attention([*one, *many]) == {"name": "fast"}
    assert tune.choose_attention([r for r in (*one, *many) if r.config != {"name": "fast"}]) is None


def test_swiglu_is_fused_from_where_it_is_ahead_on(tune: Any) -> None:
    large = rows(tune, "large", default=100.0, a=90.0, b=95.0, c=None)
    middle = rows(tune, "middle", default=30.0, a=29.0, b=20.0, c=1.0)
    small = rows(tune, "small", default=10.0, a=11.0, b=9.0, c=1.0)
    assert tune.choose_swiglu({10: small, 30: middle, 100: large}) == (30, {"name": "a"})
    behind = rows(tune, "large", default=100.0, a=101.0, b=99.5)
    assert tune.choose_swiglu({100: behind, 10: small}) is None, "never only where there are few rows"


def test_what_is_wrong_or_does_not_launch_is_not_timed(tune: Any) -> None:
    def fail() -> float:
        raise OutOfResources(300_000, 232_448, "shared memory")

    config = tune.attention_candidates()[0]
    assert tune.measured("k", "c", config, lambda: 0.001, lambda: 5.0).us == 5.0
    for error in (lambda: 0.5, lambda: float("nan"), fail):
        row = tune.measured("k", "c", config, error, lambda: pytest.fail("timed"))
        assert row.us is None and row.why


def test_candidates_differ_and_the_default_is_first(tune: Any) -> None:
    candidates = tune.attention_candidates()
    assert candidates[0] == tune.attention.default_config(tune.DTYPE, 128, 1, 128, True)
    assert len(set(candidates)) == len(candidates) > 20 and {c.early for c in candidates} == {True, False}
    assert len(set(tune.swiglu_candidates())) == len(tune.swiglu_candidates())


def test_a_report_is_what_the_kernels_read(tune: Any, tmp_path: Path) -> None:
    fields = tune.asdict(tune.swiglu_candidates()[0])
    chosen = {
        "attention": tune.asdict(tune.attention_candidates()[1]),
        "swiglu": [{"inputs": 3584, "outputs": 18944, "from_rows": 4160, "config": fields}],
    }
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"machine": {}, "chosen": chosen, "rows": []}))
    known = tune.tuned.read(file)
    assert tune.AttentionConfig(**known.attention) == tune.attention_candidates()[1]
    assert known.swiglu == {(3584, 18944): (4160, fields)} and tune.SwigluConfig(**fields)
