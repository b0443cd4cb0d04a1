"""Dashboards and alerts name what the declarations declare, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
from types import ModuleType
from typing import Any

import pytest
import yaml
from kubectl import DEPLOY, of_kind

from vlcache_dist.metrics import DECLARED, Metric

OF_RAY = {"le", "component"}  #: labels that Prometheus, Ray or the PodMonitor add
FUNCTIONS = {"sum", "by", "rate", "histogram_quantile", "absent", "or"}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", DEPLOY / "monitoring" / "dashboard.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known() -> dict[str, Metric]:
    found = {metric.ray_name: metric for metric in DECLARED if metric.kind != "histogram"}
    return found | {f"{metric.ray_name}_bucket": metric for metric in DECLARED if metric.kind == "histogram"}


def check(expression: str) -> None:
    """Metrics exist, and labels are theirs."""
    names = set(re.findall(r"\bray_\w+", expression))
    assert names, expression
    assert names <= set(known()), f"{names - set(known())} in {expression}"
    labels = set(re.findall(r'(\w+)\s*(?:=~|!=|=)\s*"', expression))
    labels |= {each.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for each in group.split(",")}
    allowed = OF_RAY.union(*(known()[name].labels for name in names))
    assert labels <= allowed, f"{labels - allowed} in {expression}"


def alerts() -> list[dict[str, Any]]:
    rule = yaml.safe_load((DEPLOY / "monitoring" / "alerts.yaml").read_text())
    return [alert for group in rule["spec"]["groups"] for alert in group["rules"]]


def test_the_dashboard_is_what_the_declarations_generate(generator: ModuleType) -> None:
    written = (DEPLOY / "monitoring" / "grafana-dashboard.json").read_text()
    assert written == generator.text(), "run python deploy/monitoring/dashboard.py"


def test_the_dashboard_names_declared_metrics_and_leaves_none_out(generator: ModuleType) -> None:
    panels = generator.dashboard()["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    for expression in expressions:
        check(expression)
    shown = {name for expression in expressions for name in re.findall(r"\bray_\w+", expression)}
    assert {known()[name].name for name in shown} >= {metric.name for metric in DECLARED} - {
        "vlcache_worker_draining",
        "vlcache_worker_encoded_items_total",
        "vlcache_worker_prompt_tokens_total",
        "vlcache_worker_generated_tokens_total",
        "vlcache_worker_scattered_tokens_total",
    }
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_alerts_name_declared_metrics(alert: dict[str, Any]) -> None:
    check(alert["expr"])
    assert set(alert) == {"alert", "expr", "for", "labels", "annotations"}
    assert alert["labels"]["severity"] in ("warning", "critical")
    shown = set(re.findall(r"\$labels\.(\w+)", json.dumps(alert["annotations"])))
    grouped = set(re.findall(r"by \((\w+)\)", alert["expr"]))
    metrics = [known()[name] for name in re.findall(r"\bray_\w+", alert["expr"])]
    assert shown <= (grouped or set(metrics[0].labels))


def test_a_metric_that_does_not_exist_would_be_found() -> None:
    with pytest.raises(AssertionError, match="ray_vlcache_nonsense"):
        check("rate(ray_vlcache_nonsense[5m])")
    with pytest.raises(AssertionError, match="colour"):
        check('ray_vlcache_requests_running{colour="red"}')


def test_the_overlay_carries_the_dashboard() -> None:
    (config,) = of_kind("kind-cpu", "ConfigMap")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config["data"]["grafana-dashboard.json"])["uid"] == "vlcache"


def test_declarations_follow_the_conventions() -> None:
    assert len({metric.name for metric in DECLARED}) == len(DECLARED)
    for metric in DECLARED:
        assert re.fullmatch(r"vlcache_[a-z_]+", metric.name) and metric.help
        assert metric.name.endswith("_total") == (metric.kind == "counter")
