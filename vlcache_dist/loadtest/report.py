"""The report: one HTML file with everything in it, from a ``Run``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from vlcache_dist.loadtest import svg
from vlcache_dist.loadtest.analysis import cdf
from vlcache_dist.loadtest.records import Measurement, Point, Run
from vlcache_dist.types import KVSource

MIB = 2**20
LATE_MS = 50.0  #: of clients, from which on it is said
STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: 2px 9px; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child, td:nth-child(2) { text-align: left }
.worse { color: #b00020 } .better { color: #11752f }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); gap: 14px } svg { width: 100% }
svg text { font: 10px system-ui, sans-serif; fill: #333 } svg .title { font-size: 12px; font-weight: 600 }
.grid { stroke: #eee } .axis { stroke: #555; fill: none }
"""


def html(run: Run) -> str:
    """The whole page. Needs nothing from anywhere else."""
    about = [
        ("model", run.model),
        ("workers", ", ".join(f"{count} {role}" for role, count in sorted(run.workers.items()))),
        ("clients", str(run.clients)),
        (
            "objective",
            f"TTFT {run.objective.ttft_ms:g} ms, {run.objective.itl_ms:g} ms between tokens on average",
        ),
        ("machine", run.host),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))),
        ("started", run.started),
    ]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Load test</title>",
        f"<style>{STYLE}</style></head><body><h1>Load test</h1><table>",
        *(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in about),
        "</table><p>Every point is measured twice with the same requests at the same times, on pictures that no other "
        "point has shown: with <code>reuse=off</code> (dashed) and with reuse. Times to first token count from the "
        "moment at which a request was due. A repeated share is a share of image slots.</p>",
        *([f"<p class='worse'>{escape(said)}</p>"] if (said := early(run)) else []),
    ]
    for (scenario, rate), points in groupby(run.points, key=lambda point: (point.scenario, point.rate)):
        parts.append(_section(scenario, rate, list(points)))
    return "".join([*parts, "</body></html>"])


def early(run: Run) -> str:
    """One sentence if the run ended before all points were measured; empty if it did not."""
    if not run.missing:
        return ""
    return f"The run ended early: {len(run.points)} of {run.planned} points were measured."


def table(points: Sequence[Point]) -> list[list[str]]:
    """Rows of the comparison, as text: the heads first. Shared by the page and by Markdown."""
    rows = [
        [
            *["repeated", "reuse", "answered", "refused", "TTFT p50", "p90", "p99", "ITL p50", "goodput/s", "right"],
            *["hits", "recomputed", "fetched MiB", "handed over MiB", "TTFT p50 against off"],
        ]
    ]
    for point in points:
        base = next((arm.summary.ttft_p50 for arm in point.arms if arm.reuse == "off"), 0.0)
        for arm in point.arms:
            s = arm.summary
            ratio = f"{s.ttft_p50 / base:.2f}×" if base and arm.reuse != "off" else ""
            rows.append(
                [
                    f"{point.repeated:.0%}",
                    arm.reuse,
                    f"{s.answered}/{s.sent}",
                    str(s.refused),
                    f"{s.ttft_p50:.0f}",
                    f"{s.ttft_p90:.0f}",
                    f"{s.ttft_p99:.0f}",
                    f"{s.itl_p50:.1f}",
                    f"{s.goodput:.2f}",
                    f"{s.right:.0%}",
                    f"{s.hit_share:.0%}",
                    f"{s.recompute_share:.1%}",
                    f"{s.bytes_fetched / MIB:.1f}",
                    f"{s.bytes_handed_over / MIB:.1f}",
                    ratio,
                ]
            )
    return rows


def markdown(points: Sequence[Point]) -> str:
    """The comparison as a Markdown table."""
    heads, *rows = table(points)
    body = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join([*body, *(["", caution] if (caution := late(points)) else [])]) + "\n"


def late(points: Sequence[Point]) -> str:
    """One sentence if clients could not keep their schedule; empty if they could. Their lateness is part of the times
    to first token."""
    worst, point, arm = max(
        ((arm.summary.late_p99_ms, point, arm) for _, point, arm in _arms(points)), key=lambda each: each[0]
    )
    if worst <= LATE_MS:
        return ""
    return (
        f"Clients sent late, and times to first token count it: by up to {worst:.0f} ms (p99) at {point.repeated:.0%} "
        f"repeated, reuse={arm.reuse}."
    )


def _section(scenario: str, rate: float, points: list[Point]) -> str:
    heads, *rows = table(points)
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(_cell(text) for text in row) + "</tr>" for row in rows)
    plots = "".join(f"<div>{plot}</div>" for plot in [*_latency(points), *_by_share(points), *_pools(points)])
    title = f"{escape(scenario)}, {rate:g} requests per second"
    caution = f"<p class='worse'>{escape(said)}</p>" if (said := late(points)) else ""
    return f"<h2>{title}</h2><table><tr>{head}</tr>{body}</table>{caution}<div class='plots'>{plots}</div>"


def _cell(text: str) -> str:
    mark = ""
    if text.endswith("×"):
        ratio = float(text[:-1])
        mark = ' class="worse"' if ratio > 1.02 else ' class="better"' if ratio < 0.98 else ""
    return f"<td{mark}>{escape(text)}</td>"


def _arms(points: Sequence[Point]) -> Iterable[tuple[int, Point, Measurement]]:
    for color, point in enumerate(points):
        for arm in point.arms:
            yield color, point, arm


def _latency(points: Sequence[Point]) -> list[str]:
    def name(point: Point, arm: Measurement) -> str:
        return f"{point.repeated:.0%} {arm.reuse}"

    ttft, itl = [], []
    for color, point, arm in _arms(points):
        answered = [record for record in arm.records if record.status == "answered"]
        off = arm.reuse == "off"
        ttft.append(svg.Series(name(point, arm), cdf([r.ttft_ms for r in answered]), color, off, step=True))
        gaps = cdf([gap for r in answered for gap in r.itl_ms])
        itl.append(svg.Series(name(point, arm), gaps, color, off, step=True))
    return [
        svg.lines("Time to first token (CDF)", "ms", "share of answers", ttft, 1.0),
        svg.lines("Time between tokens (CDF)", "ms", "share of gaps", itl, 1.0),
    ]


def _by_share(points: Sequence[Point]) -> list[str]:
    modes = list(dict.fromkeys(arm.reuse for point in points for arm in point.arms))

    def series(value: str, scale: float = 1.0) -> list[svg.Series]:
        return [
            svg.Series(
                mode,
                [
                    (point.repeated * 100, getattr(arm.summary, value) * scale)
                    for point in points
                    for arm in point.arms
                    if arm.reuse == mode
                ],
                color,
                mode == "off",
            )
            for color, mode in enumerate(modes)
        ]

    x = "repeated image slots, %"
    warm = [(point, arm) for _, point, arm in _arms(points) if arm.reuse != "off"]
    names = [f"{point.repeated:.0%}" for point, _ in warm]

    def source(name: str) -> list[float]:
        return [arm.summary.tokens[name] / (sum(arm.summary.tokens.values()) or 1) * 100 for _, arm in warm]

    moved = [
        ("fetched by prefill", [arm.summary.bytes_fetched / MIB for _, arm in warm]),
        ("handed to decode", [arm.summary.bytes_handed_over / MIB for _, arm in warm]),
    ]
    return [
        svg.lines("TTFT p50", x, "ms", series("ttft_p50")),
        svg.lines("TTFT p99", x, "ms", series("ttft_p99")),
        svg.lines("Goodput at the objective", x, "requests per second", series("goodput")),
        svg.bars(
            "Where image KV came from", "% of vision tokens", names, [(s.value, source(s.value)) for s in KVSource], 100
        ),
        svg.lines("Recomputed on a hit", x, "% of vision tokens", series("recompute_share", 100)),
        svg.bars("KV moved", "MiB", names, moved),
    ]


def _pools(points: Sequence[Point]) -> list[str]:
    """Pool use over time, of the point with the most reuse."""
    plots = []
    for arm in points[-1].arms if points else []:
        roles = sorted({sample.role for sample in arm.pools})

        def over_time(value: str, roles: Sequence[str] = roles, arm: Measurement = arm) -> list[svg.Series]:
            return [
                svg.Series(
                    role, [(s.at_s, getattr(s, value)) for s in arm.pools if s.role == role and s.at_s >= 0], color
                )
                for color, role in enumerate(roles)
            ]

        about = f"{points[-1].repeated:.0%} repeated, {arm.reuse}"
        plots.append(svg.lines(f"Requests in the pools ({about})", "s", "running", over_time("running")))
        plots.append(svg.lines(f"Paged KV in use ({about})", "s", "share", over_time("kv")))
        plots.append(svg.lines(f"Object store in use ({about})", "s", "share", over_time("store")))
    return plots
