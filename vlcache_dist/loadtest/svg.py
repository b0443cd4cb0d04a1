"""Plots as inline SVG: lines, steps and stacked bars; no script, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import msgspec

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 28, 62
PALETTE = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


class Series(msgspec.Struct, frozen=True):
    """A named line. ``dashed`` sets the baseline apart from what it is compared with; ``color`` is an index."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    dashed: bool = False
    step: bool = False


def lines(title: str, x_label: str, y_label: str, series: Sequence[Series], y_max: float | None = None) -> str:
    """A line plot whose axes begin at 0."""
    points = [point for each in series for point in each.points]
    frame = _Frame(max((x for x, _ in points), default=1.0), y_max or max((y for _, y in points), default=1.0))
    body = []
    for each in series:
        if not each.points:
            continue
        path, before = "", 0.0
        for number, (x, y) in enumerate(each.points):
            if number and each.step:
                path += f"L{frame.x(x)},{frame.y(before)}"
            path += f"{'L' if number else 'M'}{frame.x(x)},{frame.y(y)}"
            before = y
        dash = ' stroke-dasharray="5 3"' if each.dashed else ""
        body.append(f'<path d="{path}" fill="none" stroke="{_color(each.color)}" stroke-width="1.6"{dash}/>')
    legend = [(each.name, each.color, each.dashed) for each in series]
    return frame.wrap(title, x_label, y_label, "".join(body), legend)


def bars(
    title: str,
    y_label: str,
    names: Sequence[str],
    parts: Sequence[tuple[str, Sequence[float]]],
    y_max: float | None = None,
) -> str:
    """Stacked bars: one per name, ``parts`` from the bottom up."""
    tops = [sum(values[i] for _, values in parts) for i in range(len(names))]
    frame = _Frame(float(len(names)), y_max or max(tops, default=1.0), x_ticks=False)
    body = []
    for i, name in enumerate(names):
        base = 0.0
        for color, (part, values) in enumerate(parts):
            low, high = frame.y(base), frame.y(base + values[i])
            base += values[i]
            body.append(
                f'<rect x="{frame.x(i + 0.15)}" y="{high}" width="{round(frame.x(0.7) - frame.x(0), 1)}" '
                f'height="{round(low - high, 1)}" '
                f'fill="{_color(color)}"><title>{escape(f"{name} {part}: {values[i]:g}")}</title></rect>'
            )
        body.append(
            f'<text x="{frame.x(i + 0.5)}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{escape(name)}</text>'
        )
    return frame.wrap(
        title, "", y_label, "".join(body), [(part, color, False) for color, (part, _) in enumerate(parts)]
    )


class _Frame:
    """Data coordinates to pixels, axes and legend."""

    def __init__(self, x_max: float, y_max: float, x_ticks: bool = True) -> None:
        self._x_max, self._y_max, self._x_ticks = x_max or 1.0, y_max or 1.0, x_ticks

    def x(self, value: float) -> float:
        return round(LEFT + value / self._x_max * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - min(value / self._y_max, 1.0) * (HEIGHT - TOP - BOTTOM), 1)

    def wrap(self, title: str, x_label: str, y_label: str, body: str, legend: Sequence[tuple[str, int, bool]]) -> str:
        axis = HEIGHT - BOTTOM
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(title)}">',
            f'<text x="{WIDTH / 2}" y="16" text-anchor="middle" class="title">{escape(title)}</text>',
        ]
        for tick in _ticks(self._y_max):
            out.append(
                f'<path d="M{LEFT},{self.y(tick)}H{WIDTH - RIGHT}" class="grid"/>'
                f'<text x="{LEFT - 4}" y="{self.y(tick) + 4}" text-anchor="end">{tick:g}</text>'
            )
        if self._x_ticks:
            for tick in _ticks(self._x_max):
                out.append(f'<text x="{self.x(tick)}" y="{axis + 14}" text-anchor="middle">{tick:g}</text>')
        middle = (TOP + axis) / 2
        out += [
            body,
            f'<path d="M{LEFT},{TOP}V{axis}H{WIDTH - RIGHT}" class="axis"/>',
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{axis + 28}" text-anchor="middle">{escape(x_label)}</text>',
            f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
            f"{escape(y_label)}</text>",
            self._legend(legend),
            "</svg>",
        ]
        return "".join(out)

    def _legend(self, entries: Sequence[tuple[str, int, bool]]) -> str:
        out, x, y = [], float(LEFT), HEIGHT - 20
        for name, color, dashed in entries:
            width = 24 + 5.6 * len(name)
            if x + width > WIDTH:
                x, y = float(LEFT), y + 13
            dash = ' stroke-dasharray="5 3"' if dashed else ""
            out.append(
                f'<path d="M{x},{y - 3}h14" stroke="{_color(color)}" stroke-width="3"{dash}/>'
                f'<text x="{x + 18}" y="{y}">{escape(name)}</text>'
            )
            x += width
        return "".join(out)


def _color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _ticks(top: float) -> list[float]:
    """About five round numbers from 0 to ``top``."""
    step = 10 ** math.floor(math.log10(top / 4)) if top > 0 else 1.0
    step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 5)
    return [round(number * step, 10) for number in range(int(top / step) + 1)]
