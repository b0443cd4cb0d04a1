"""The placement simulation: bookkeeping that can be worked out by hand, and what the policies do in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlcache_dist.bench.placement import EngineTimes, Pools, Simulation, read_engine
from vlcache_dist.cli import app
from vlcache_dist.errors import ConfigError
from vlcache_dist.loadtest.scenario import Scenario
from vlcache_dist.loadtest.trace import Arrival, Shown, Trace, read, write
from vlcache_dist.serve.placement import POLICIES

ENGINE = {
    "machine": {"name": "made up"},
    "shape": "none",
    "plan": "uniform:2",
    "rows": [
        {"vision_tokens": 1000, "warm_ms": 8.0, "vision_tower_ms": 10.0, "cold_ms": 40.0},
        {"vision_tokens": 2000, "warm_ms": 10.0, "vision_tower_ms": 20.0, "cold_ms": 70.0},
    ],
}
TIMES = EngineTimes(ENGINE)
POOLS = Pools(prefills=2, encoders=1, link_bytes_per_s=1e9, link_base_s=1e-3, kv_token_bytes=1000, announce_s=0.0)


def trace(*arrivals: tuple[float, list[str]], tokens: int = 1000) -> Trace:
    made = [Arrival(at, 50, tuple(Shown(name, tokens) for name in names)) for at, names in arrivals]
    return Trace("made", "by hand", made)


def test_engine_times_are_the_measured_ones_and_interpolated() -> None:
    assert TIMES.encode_s(1000) == pytest.approx(0.010) and TIMES.encode_s(1500) == pytest.approx(0.015)
    assert TIMES.compute_s(0, 1500) == pytest.approx(0.009)
    assert TIMES.compute_s(1000, 0) == pytest.approx(0.006 + 0.030 - 0.010)
    with pytest.raises(ConfigError, match="two"):
        EngineTimes({"rows": ENGINE["rows"][:1]})


def test_a_cold_a_warm_and_a_fetched_request() -> None:
    """Round robin over two workers: computed at the first, fetched by the second, local at the first again."""
    row = Simulation(trace((0.0, ["a"]), (1.0, ["a"]), (2.0, ["a"])), POOLS, TIMES, "round-robin").run()
    cold, warm = 10.0 + 26.0, 8.0
    fetch = 1.0 + 1e6 / 1e9 * 1e3
    assert row["ttft_mean_ms"] == pytest.approx((cold + warm + fetch + warm) / 3, abs=0.01)
    assert (row["local_share"], row["remote_share"], row["computed_share"]) == pytest.approx((1 / 3,) * 3, abs=1e-3)
    assert row["gib_moved"] == pytest.approx(1e6 / 2**30, abs=1e-3)


def test_what_is_being_computed_is_computed_once() -> None:
    """Three requests at once for one picture: one computes, those beside it wait, fetch once per worker, or share."""
    row = Simulation(trace((0.0, ["a"]), (0.0, ["a"]), (0.0, ["a"])), POOLS, TIMES, "round-robin").run()
    assert row["computed_share"] == pytest.approx(1 / 3, abs=1e-3)
    assert row["ttft_p99_ms"] == pytest.approx(10 + 26 + 2 + 8, abs=0.1)


def test_a_small_store_forgets_the_least_recently_used() -> None:
    pools = Pools(prefills=1, encoders=1, kv_token_bytes=1000, store_bytes=2_000_000, announce_s=0.0)
    shown = [["a"], ["b"], ["a"], ["c"], ["a"], ["b"]]
    row = Simulation(trace(*((float(n), names) for n, names in enumerate(shown))), pools, TIMES, "least-ttft").run()
    assert row["local_share"] == pytest.approx(2 / 6, abs=1e-3)  # both of a; b was pushed out by c


@pytest.mark.parametrize("seed", [0, 1])
def test_a_hot_image_is_replicated_rather_than_queued_for(seed: int) -> None:
    each = Scenario("hot", zipf=2.0, sizes=((32, 32),))
    requests = Trace.planned(each, 300.0, 0.95, 600, seed)
    rows = {name: Simulation(requests, Pools(prefills=4), TIMES, name).run() for name in POLICIES}
    assert rows["affinity"]["remote_share"] == 0 < rows["least-ttft"]["remote_share"]
    for name in ("affinity", "round-robin", "random"):
        assert rows["least-ttft"]["ttft_mean_ms"] <= rows[name]["ttft_mean_ms"], name
    assert rows["least-ttft"]["ttft_mean_ms"] < rows["affinity"]["ttft_mean_ms"] / 2
    again = Simulation(requests, Pools(prefills=4), TIMES, "least-ttft").run()
    assert again == rows["least-ttft"]


def test_the_command_and_its_files(tmp_path: Path) -> None:
    engine, traces, out = tmp_path / "ttft.json", tmp_path / "trace.json", tmp_path / "out.json"
    engine.write_text(json.dumps(ENGINE))
    write(traces, [trace((0.0, ["a"]), (0.1, ["a"]))])
    command = ["bench", "placement", "--engine", str(engine), "--trace", str(traces), "--rate", "5", "--json", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert [row["policy"] for row in report["rows"]] == list(POLICIES)
    assert report["engine"]["machine"] == {"name": "made up"} and report["traces"]["made"]["requests"] == 2
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="neither"):
        read(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="no report"):
        read_engine(tmp_path / "other.json")


def test_traces_are_scaled_and_enlarged() -> None:
    given = trace((3.0, ["a"]), (4.0, ["b"]), (7.0, ["a"]))
    fast = given.scaled(10.0)
    assert [a.at_s for a in fast.arrivals] == pytest.approx([0.0, 0.05, 0.2])
    assert given.enlarged(4).arrivals[0].images == (Shown("a", 4000),)
    with pytest.raises(ConfigError):
        given.scaled(0.0)
