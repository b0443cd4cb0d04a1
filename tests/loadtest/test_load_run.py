"""Whole runs against the real HTTP layer around a scripted backend: what is compared, refused, shown."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from caching_server import TOKENS, CachingBackend, Served
from typer.testing import CliRunner

from vlcache_dist.cli import app
from vlcache_dist.config import Settings
from vlcache_dist.loadtest import report
from vlcache_dist.loadtest import run as load
from vlcache_dist.loadtest.counters import Disagreement, EndpointDead
from vlcache_dist.loadtest.records import Objective, Run
from vlcache_dist.loadtest.run import Options, OutOfTime, find, measure
from vlcache_dist.loadtest.scenario import SCENARIOS

OPTIONS = Options(
    scenarios=(SCENARIOS["document-qa"],),
    rates=(40.0,),
    shares=(0.0, 0.75),
    objective=Objective(1000.0, 100.0),
    duration_s=0.4,
    timeout_s=5.0,
    seed=5,
    settle_s=1.0,
)


def silent(what: str, done: int, total: int) -> None:
    """Nobody watches."""


def loadtest(*arguments: str, out: Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["loadtest", "--out", str(out), *arguments])
    return done.exit_code, " ".join(done.output.split())


def test_a_point_compares_the_same_requests_with_and_without_reuse(served: Served, backend: CachingBackend) -> None:
    told = []
    run = measure(find(served.url + "/v1"), OPTIONS, lambda *what: told.append(what))
    assert run.model == "tiny" and run.workers == {"encoder": 1, "prefill": 2, "decode": 1}
    cold, warm = run.points
    assert (cold.repeated, warm.repeated) == (0.0, 0.75)
    for point in run.points:
        off, approx = point.arms
        assert (off.reuse, approx.reuse) == ("off", "approx")
        assert [r.expected for r in off.records] == [r.expected for r in approx.records]
        assert [r.scheduled_s for r in off.records] == [r.scheduled_s for r in approx.records]
        assert off.summary.hit_share == 0.0 and off.summary.answered == 16
    assert cold.arms[1].summary.hit_share == 0.0  # its pictures are its own: the caches were full of others
    assert warm.arms[1].summary.hit_share == 0.75
    assert warm.arms[1].summary.tokens == {"computed": 4 * TOKENS, "prefix": 0, "local": 12 * TOKENS, "remote": 0}
    assert warm.arms[1].summary.recompute_share == round(12 * 4 / (16 * TOKENS), 4)
    assert warm.arms[1].counters["vlcache_requests_total{status=200}"] == 16
    assert told[-1][1:] == (16, 16)


def test_refused_requests_are_shown_and_agree(served: Served, backend: CachingBackend) -> None:
    target = find(served.url)
    backend.refuse_every = 5
    run = measure(target, OPTIONS, silent)
    for point in run.points:
        for arm in point.arms:
            assert arm.summary.refused > 0 and arm.summary.refused + arm.summary.answered == 16
            assert arm.counters["vlcache_requests_total{status=503}"] == arm.summary.refused


def test_a_server_that_counts_otherwise_is_a_loud_failure(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = served.metrics.finished
    monkeypatch.setattr(
        served.metrics, "finished", lambda p, cached, c, more: finished(p, cached + 1, c, more), raising=True
    )
    with pytest.raises(Disagreement, match="cached_tokens_total: the server counted"):
        measure(find(served.url), OPTIONS, silent)


def test_an_endpoint_that_dies_is_a_loud_failure(served: Served, backend: CachingBackend) -> None:
    target = find(served.url)
    backend.cost_s = 20.0
    with pytest.raises(EndpointDead, match="no answer within"):
        measure(target, msgspec.structs.replace(OPTIONS, timeout_s=0.3), silent)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--url", "http://127.0.0.1:9"], "EndpointDead: http://127.0.0.1:9/v1/models does not answer"),
        (["--scenario", "nonsense"], "ConfigError: scenario 'nonsense' is unknown"),
        (["--scenario", "missing.json"], "ConfigError: scenario 'missing.json' is unknown"),
        (["--api-keys", "/nowhere"], "ConfigError: API keys cannot be read from /nowhere: No such file"),
        (["--url", "http://127.0.0.1:9", "--address", "127.0.0.1:9"], "ConfigError: nothing answers at 127.0.0.1:9"),
        (["--share", "100", "--export", "{out}"], "ConfigError: reuse share = 1.0"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments: Sequence[str], word: str, tmp_path: Path) -> None:
    code, output = loadtest(*(text.replace("{out}", str(tmp_path)) for text in arguments), out=tmp_path / "out")
    assert code == 1 and word in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()


@pytest.fixture
def slow_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point takes a minute, by the clock that the run looks at."""
    now = [0.0]
    monkeypatch.setattr(load, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    point = load._point

    def slow_point(*arguments: Any) -> Any:
        now[0] += 60.0
        return point(*arguments)

    monkeypatch.setattr(load, "_point", slow_point)


@pytest.mark.usefixtures("slow_points")
def test_time_is_bounded(served: Served) -> None:
    kept: list[Run] = []
    with pytest.raises(OutOfTime, match="before point 2 of 2"):
        measure(find(served.url), msgspec.structs.replace(OPTIONS, limit_s=30.0), silent, kept.append)
    (run,) = kept
    assert [point.share for point in run.points] == [0.0] and run.missing == 1
    assert msgspec.structs.replace(OPTIONS, max_requests=7).count(40.0) == 7


@pytest.mark.usefixtures("slow_points")
def test_points_measured_in_time_are_reported(served: Served, tmp_path: Path) -> None:
    rate = ["--rate", "40", "--duration", "0.3", "--share", "50", "--share", "75", "--seed", "9", "--time-limit", "30"]
    code, output = loadtest("--url", served.url, *rate, out=tmp_path)
    assert code == 1 and "OutOfTime: 30 s are over before point 2 of 2" in output
    run = msgspec.json.decode((tmp_path / "result.json").read_bytes(), type=Run)
    assert [point.share for point in run.points] == [0.5]
    page = (tmp_path / "report.html").read_text()
    check_page(page, run)
    for text in (page, output, (tmp_path / "table.md").read_text()):
        assert "The run ended early: 1 of 2 points were measured." in text


def test_points_measured_before_the_endpoint_died_are_reported(
    served: Served, backend: CachingBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = load._point

    def then_dies(*arguments: Any) -> Any:
        backend.cost_s = 20.0 if backend.requests[load.WARM_UP :] else 0.0
        return point(*arguments)

    monkeypatch.setattr(load, "_point", then_dies)
    rate = ["--rate", "40", "--duration", "0.2", "--share", "50", "--share", "75", "--seed", "9", "--timeout", "0.3"]
    code, output = loadtest("--url", served.url, *rate, out=tmp_path)
    assert code == 1 and "EndpointDead" in output and "The run ended early: 1 of 2 points" in output
    assert len(msgspec.json.decode((tmp_path / "result.json").read_bytes(), type=Run).points) == 1


def test_the_command_writes_a_page_that_needs_nothing_else(served: Served, tmp_path: Path) -> None:
    rate = ["--rate", "40", "--duration", "0.3", "--share", "0", "--share", "50", "--seed", "9"]
    code, output = loadtest("--url", served.url, *rate, "--scenario", "chat", out=tmp_path)
    assert code == 0, output
    run = msgspec.json.decode((tmp_path / "result.json").read_bytes(), type=Run)
    assert [point.share for point in run.points] == [0.0, 0.5]
    page = (tmp_path / "report.html").read_text()
    check_page(page, run)
    shown = (tmp_path / "table.md").read_text()
    assert "| repeated | reuse |" in shown
    assert run.missing == 0 and not any("ended early" in text for text in (page, shown, output))


def test_without_a_url_a_deployment_is_started_and_stopped(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("engine: {store_bytes: 67108864}\n")
    told: list[Any] = []

    @contextmanager
    def running(given: Settings, *, say: Any) -> Iterator[str]:
        told.append(given)
        yield served.url
        told.append("stopped")

    monkeypatch.setattr("vlcache_dist.serve.cluster.running", running)
    options = ["--prefills", "3", "--decodes", "0", "--config", str(settings), "--share", "50", "--duration", "0.2"]
    code, output = loadtest(*options, "--rate", "20", out=tmp_path / "out")
    assert code == 0 and (tmp_path / "out" / "report.html").exists(), output
    given, stopped = told
    assert (given.serve.prefills, given.serve.decodes, given.serve.port) == (3, 0, 0) and stopped == "stopped"
    assert given.engine.store_bytes == 67108864 and given.serve.address is None


def check_page(page: str, run: Run) -> None:
    """Self-contained, well-formed plots, and the very numbers of the result."""
    assert not re.search(r"(?:src|href)=|url\(|@import|<script", page)
    plots = re.findall(r"<svg.*?</svg>", page)
    titles = [ElementTree.fromstring(plot).attrib["aria-label"] for plot in plots]
    for title in ("Time to first token (CDF)", "Time between tokens (CDF)", "Goodput at the objective"):
        assert title in titles
    for title in ("Where image KV came from", "KV moved", "Recomputed on a hit"):
        assert title in titles
    assert any(title.startswith("Requests in the pools") for title in titles)
    for point in run.points:
        for arm in point.arms:
            assert f"<td>{arm.summary.answered}/{arm.summary.sent}</td>" in page
            assert f"<td>{arm.summary.ttft_p50:.0f}</td>" in page


def test_clients_that_were_late_are_told(served: Served) -> None:
    run = measure(find(served.url), msgspec.structs.replace(OPTIONS, shares=(0.5,)), silent)
    (point,) = run.points
    prompt, slow = (
        [
            msgspec.structs.replace(arm, summary=msgspec.structs.replace(arm.summary, late_p99_ms=late))
            for arm in point.arms
        ]
        for late in (3.0, 4321.0)
    )
    assert report.late([msgspec.structs.replace(point, arms=prompt)]) == ""
    late = msgspec.structs.replace(point, arms=slow)
    assert "by up to 4321 ms" in report.late([late]) and report.late([late]) in report.markdown([late])
    assert "by up to 4321 ms" in report.html(msgspec.structs.replace(run, points=[late]))


RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "loadtest-tiny-cpu.json"


def test_the_report_of_the_recorded_run() -> None:
    run = msgspec.json.decode(RECORDED.read_bytes(), type=Run)
    check_page(report.html(run), run)
    assert [round(point.share, 2) for point in run.points] == [0.0, 0.25, 0.5, 0.75, 0.95]
    assert all([arm.reuse for arm in point.arms] == ["off", "approx"] for point in run.points)
    shown = (RECORDED.parents[2] / "docs" / "performance.md").read_text()
    assert report.markdown(run.points) in shown, "docs/performance.md shows another run"
    assert "localcluster" in shown and run.clients == 4 and run.workers == {"encoder": 1, "prefill": 2, "decode": 1}


def test_export_writes_files_and_sends_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["loadtest", "--export", str(tmp_path), "--share", "50", "--rate", "2", "--seed", "1"]
    )
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "document-qa-50" / "vllm.jsonl").read_text().splitlines()
    assert len(lines) == 60 and set(json.loads(lines[0])) == {"prompt", "image_files"}
