"""Writes grafana-dashboard.json from the metric declarations: ``python deploy/monitoring/dashboard.py``.

Panels name declared metrics by object, so a metric that is renamed or removed fails here and not on a screen at night.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlcache_dist import metrics as m
from vlcache_dist.metrics import Metric

OUT = Path(__file__).with_name("grafana-dashboard.json")
UNITS = {"count": "short", "tokens": "short", "bytes": "bytes", "seconds": "s", "blocks": "short"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
Query = tuple[str, str]  # PromQL, legend


def rate(metric: Metric, by: str = "") -> str:
    """Rise per second of a counter, summed."""
    assert metric.kind == "counter"
    return f"sum{f' by ({by})' if by else ''} (rate({metric.ray_name}[$__rate_interval]))"


def share(part: Metric, whole: Metric) -> str:
    return f"{rate(part)} / {rate(whole)}"


def quantile(metric: Metric, q: float) -> str:
    assert metric.kind == "histogram"
    return f"histogram_quantile({q:g}, sum by (le) (rate({metric.ray_name}_bucket[$__rate_interval])))"


def gauge(metric: Metric, by: str) -> str:
    assert metric.kind == "gauge"
    return f"sum by ({by}) ({metric.ray_name})"


def used(free: Metric, total: Metric) -> str:
    return f"1 - sum by (worker) ({free.ray_name}) / sum by (worker) ({total.ray_name})"


def rows() -> list[tuple[str, list[dict[str, Any]]]]:
    return [
        (
            "Requests",
            [
                panel("Requests per second, by status", "reqps", (rate(m.REQUESTS, "status"), "{{status}}")),
                panel("Time to first token", "s", *((quantile(m.TTFT, q), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99))),
                panel("Under way", "short", (f"sum({m.RUNNING.ray_name})", "requests")),
                panel(
                    "Tokens per second",
                    "short",
                    (rate(m.PROMPT_TOKENS), "prompt"),
                    (rate(m.COMPLETION_TOKENS), "answer"),
                ),
            ],
        ),
        (
            "Reuse",
            [
                panel(
                    "Prompt tokens not computed in full", "percentunit", (share(m.CACHED_TOKENS, m.PROMPT_TOKENS), "")
                ),
                panel(
                    "Vision tokens per second, by source of their KV",
                    "short",
                    (rate(m.VISION_TOKENS, "source"), "{{source}}"),
                ),
                panel(
                    "Vision tokens recomputed on a hit",
                    "percentunit",
                    (
                        f'{rate(m.RECOMPUTED_TOKENS)} / sum (rate({m.VISION_TOKENS.ray_name}{{source!="computed"}}'
                        "[$__rate_interval]))",
                        "",
                    ),
                ),
                panel(
                    "Images per second", "short", (rate(m.SPANS_RECORDED), "recorded"), (rate(m.SPANS_REUSED), "reused")
                ),
                panel(
                    "Reused images computed in full after all",
                    "percentunit",
                    (share(m.SPANS_ESCALATED, m.SPANS_WATCHED), ""),
                ),
                panel("Prefix hits", "short", (rate(m.PREFIX_HIT_TOKENS, "cache"), "{{cache}}")),
            ],
        ),
        (
            "Guard",
            [
                panel(
                    "Reuse, by prompts (0 normal, 1 tightened, 2 strengthened, 3 off)",
                    "short",
                    (f"max by (format) ({m.GUARD_LEVEL.ray_name})", "{{format}}"),
                ),
                panel(
                    "First tokens that agree with full runs",
                    "percentunit",
                    (f"min by (format) ({m.DRIFT_AGREEMENT.ray_name})", "{{format}}"),
                ),
                panel(
                    "KL of first tokens against full runs, nats",
                    "short",
                    (f"max by (format) ({m.DRIFT_KL.ray_name})", "{{format}}"),
                ),
                panel(
                    "Compared requests",
                    "short",
                    (rate(m.SHADOW_RUNS), "per second"),
                    (rate(m.MISSED_ALARMS), "harmed without an alarm"),
                    (rate(m.GUARD_TRIPS), "more careful"),
                ),
                panel("Engine time for comparison", "percentunit", (rate(m.SHADOW_SECONDS, "worker"), "{{worker}}")),
            ],
        ),
        (
            "Transfers",
            [
                panel("Image KV moved", "Bps", (rate(m.BYTES_MOVED), "")),
                panel("Read, by worker", "Bps", (rate(m.READ_BYTES, "worker"), "{{worker}}")),
                panel("READs per second", "short", (rate(m.READS, "worker"), "{{worker}}")),
                panel("Handoffs", "Bps", (rate(m.HANDOFF_BYTES, "worker"), "{{worker}}")),
                panel("Failed READs per second", "short", (rate(m.READ_FAILURES, "error"), "{{error}}")),
            ],
        ),
        (
            "Pools",
            [
                declared(m.SEQUENCES_RUNNING),
                declared(m.SEQUENCES_WAITING),
                declared(m.SEQUENCES_PARKED),
                declared(m.WAITING_TOKENS),
                declared(m.PASS_SECONDS),
                declared(m.TOKEN_SECONDS),
                panel("Sequences per second, by outcome", "short", (rate(m.SEQUENCES, "outcome"), "{{outcome}}")),
                panel("KV blocks in use", "percentunit", (used(m.KV_BLOCKS_FREE, m.KV_BLOCKS), "{{worker}}")),
                panel(
                    "Store in use",
                    "percentunit",
                    (
                        f"sum by (worker) ({m.STORE_BYTES_USED.ray_name}) / sum by (worker) ({m.STORE_BYTES.ray_name})",
                        "{{worker}}",
                    ),
                ),
                declared(m.STORE_OBJECTS),
                declared(m.STORE_LEASES),
                declared(m.STORE_BYTES_QUARANTINED),
                panel("Evictions per second", "short", (rate(m.EVICTIONS, "worker"), "{{worker}}")),
                panel("Forward passes per second", "short", (rate(m.ENGINE_STEPS, "worker"), "{{worker}}")),
                panel("Vision tokens encoded per second", "short", (rate(m.ENCODED_TOKENS, "worker"), "{{worker}}")),
                declared(m.HEALTHY),
            ],
        ),
    ]


def declared(metric: Metric) -> dict[str, Any]:
    """A gauge per worker under its own help text."""
    return panel(metric.help, UNITS[metric.unit], (gauge(metric, "worker"), "{{worker}}"))


def panel(title: str, unit: str, *queries: Query) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": title,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expression, "legendFormat": legend or title}
            for number, (expression, legend) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    """Grafana's dashboard model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in rows():
        panels.append({"type": "row", "title": title, "collapsed": False, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        y += 1
        for number, each in enumerate(row):
            place = {"x": number % COLUMNS * WIDTH, "y": y + number // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append({**each, "gridPos": place})
        y += -(-len(row) // COLUMNS) * HEIGHT
    return {
        "uid": "vlcache",
        "title": "vlcache_dist",
        "schemaVersion": 39,
        "tags": ["vlcache"],
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}]
        },
        "panels": [{"id": number, **each} for number, each in enumerate(panels, start=1)],
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    OUT.write_text(text())
