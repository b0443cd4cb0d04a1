"""Figures of an evaluation as SVG, written by hand: small, and without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 380, 62, 34, 190, 46
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")

Points = Sequence[tuple[float, float]]


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Points],
    *,
    lines: bool = True,
    y_range: tuple[float, float] | None = None,
) -> str:
    """An SVG document of named series of (x, y): points, joined in the given order if ``lines``."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    if not xs:
        raise ValueError(f"{title}: nothing to draw")
    x0, x1 = _spread(min(xs), max(xs))
    y0, y1 = y_range or _spread(min(*ys, 0.0), max(ys))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (x - x0) / (x1 - x0) * width, _TOP + (y1 - y) / (y1 - y0) * height

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="13">{escape(title)}</text>',
    ]
    for i in range(5):
        x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        px, py = at(x, y)
        out += [
            f'<path d="M{_LEFT} {py:.1f}h{width}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.3g}</text>',
            f'<text x="{px:.1f}" y="{_TOP + height + 16}" text-anchor="middle">{x:.3g}</text>',
        ]
    out += [
        f'<text x="{_LEFT + width / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(14 {_TOP + height / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for i, (name, points) in enumerate(series.items()):
        color, placed = _COLORS[i % len(_COLORS)], [at(x, y) for x, y in points]
        if lines and len(placed) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
            out.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        if not lines or len(placed) < 30:
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in placed]
        y = _TOP + 8 + 16 * i
        out += [
            f'<circle cx="{_LEFT + width + 14}" cy="{y}" r="4" fill="{color}"/>',
            f'<text x="{_LEFT + width + 22}" y="{y + 4}">{escape(name)}</text>',
        ]
    return "".join(out) + "</svg>\n"


def _spread(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, low + 0.5)
