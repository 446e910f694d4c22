"""Small inline SVG charts. Text goes through Markup.format, which escapes it; colours are CSS
classes.

Every chart is drawn 400 units wide, so that its text stays legible at the width of a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH = 400
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 34
MOST_POINTS = 240


@dataclass(frozen=True)
class Bar:
    """One line of an interval chart; style is a series number, dots are the seeds' own values."""

    name: str
    value: float
    low: float
    high: float
    style: int
    dots: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Curve:
    """One line of a curve chart; thin ones are single seeds."""

    points: list[tuple[float, float]]
    style: int
    thin: bool = False


def interval_chart(
    bars: Sequence[Bar], *, title: str, unit: str, reference: tuple[str, float] | None = None, names: int = 104
) -> Markup:
    """Points with their intervals on one horizontal axis, and a dashed reference line; names: width kept for the bars' names."""
    row, left = 32, names
    height = TOP + 14 + row * len(bars) + BOTTOM
    values = [x for bar in bars for x in (bar.low, bar.high, *bar.dots)]
    if reference is not None:
        values.append(reference[1])
    low, high = _padded(min(values), max(values))
    bottom = height - BOTTOM

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - RIGHT)

    parts = []
    for tick in ticks(low, high):
        parts.append(_line("grid", x(tick), TOP + 14, x(tick), bottom))
        parts.append(_text("tick", x(tick), bottom + 15, _short(tick), "middle"))
    if reference is not None:
        parts.append(_line("reference", x(reference[1]), TOP + 10, x(reference[1]), bottom))
        parts.append(_text("tick", x(reference[1]), TOP + 6, reference[0], "middle"))
    for index, bar in enumerate(bars):
        y = TOP + 14 + row * (index + 0.5)
        parts.append(_text("name", left - 10, y + 4, bar.name, "end"))
        parts += [_circle(f"dot s{bar.style}", x(dot), y + 8, 2.2) for dot in bar.dots]
        parts.append(_line(f"bar s{bar.style}", x(bar.low), y, x(bar.high), y))
        parts += [_line(f"bar s{bar.style}", x(end), y - 4, x(end), y + 4) for end in (bar.low, bar.high)]
        parts.append(_circle(f"mark s{bar.style}", x(bar.value), y, 5))
    parts.append(_text("axis", (left + WIDTH - RIGHT) / 2, height - 3, unit, "middle"))
    return _svg(parts, height, title)


def curve_chart(
    curves: Sequence[Curve], *, title: str, x_name: str, y_name: str, height: int = 250
) -> Markup:
    """Lines over a common x; the y axis fits the thick lines, thin ones may be cut at its edge."""
    thick = [curve for curve in curves if not curve.thin] or curves
    xs = [px for curve in curves for px, _ in curve.points]
    ys = [py for curve in thick for _, py in curve.points]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_low, y_high = _padded(min(ys), max(ys))
    bottom = height - BOTTOM

    def place(px: float, py: float) -> str:
        x = LEFT + (px - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = bottom - (min(max(py, y_low), y_high) - y_low) / (y_high - y_low) * (bottom - TOP)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tick in ticks(y_low, y_high):
        _, y = map(float, place(x_low, tick).split(","))
        parts.append(_line("grid", LEFT, y, WIDTH - RIGHT, y))
        parts.append(_text("tick", LEFT - 7, y + 4, _short(tick), "end"))
    for tick in ticks(x_low, x_high):
        x, _ = map(float, place(tick, y_low).split(","))
        parts.append(_text("tick", x, bottom + 15, _short(tick), "middle"))
    for curve in sorted(curves, key=lambda curve: not curve.thin):
        style = f"curve s{curve.style}" + (" thin" if curve.thin else "")
        line = " ".join(place(px, py) for px, py in thinned(curve.points))
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(style, line))
    parts.append(_text("axis", (LEFT + WIDTH - RIGHT) / 2, height - 3, x_name, "middle"))
    parts.append(_text("axis", LEFT, TOP - 2, y_name, "start"))
    return _svg(parts, height, title)


def head_chart(
    scores: Sequence[Sequence[float]], selected: Sequence[Sequence[bool]], *, title: str
) -> Markup:
    """Summed score of every head, one mark per clip: filled where selected, hollow where not.

    scores, selected: [clip][head].
    """
    heads, height = max(len(row) for row in scores), 220
    values = [value for row in scores for value in row]
    low, high = _padded(min(values), max(values))
    bottom = height - BOTTOM
    step = (WIDTH - LEFT - RIGHT) / heads

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - TOP)

    parts = []
    for tick in ticks(low, high):
        parts.append(_line("grid", LEFT, y(tick), WIDTH - RIGHT, y(tick)))
        parts.append(_text("tick", LEFT - 7, y(tick) + 4, _short(tick), "end"))
    every = max(1, math.ceil(heads / 16))
    for head in range(heads):
        middle = LEFT + step * (head + 0.5)
        if head % every == 0:
            parts.append(_text("tick", middle, bottom + 15, str(head), "middle"))
        for clip, row in enumerate(scores):
            if head < len(row):
                offset = (clip + 0.5) / len(scores) - 0.5
                name = "head on" if selected[clip][head] else "head off"
                parts.append(
                    _circle(name, middle + 0.6 * step * offset, y(row[head]), min(4.5, max(1.5, step / 6)))
                )
    parts.append(_text("axis", (LEFT + WIDTH - RIGHT) / 2, height - 3, "head", "middle"))
    return _svg(parts, height, title)


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers inside [low, high], at most `most` of them."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), max(size, 1))]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def running_mean(points: list[tuple[float, float]], reach: int) -> list[tuple[float, float]]:
    """Mean of every value with up to `reach` neighbours on each side."""
    out = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - reach) : i + reach + 1]
        out.append((x, sum(y for _, y in near) / len(near)))
    return out


def _padded(low: float, high: float) -> tuple[float, float]:
    space = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return low - space, high + space


def _short(value: float) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}") if abs(value) > 1e-12 else "0"


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        name, x1, y1, x2, y2
    )


def _circle(name: str, x: float, y: float, radius: float) -> Markup:
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(name, x, y, round(radius, 1))


def _text(name: str, x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        name, x, y, anchor, text
    )


def _svg(parts: list[Markup], height: float, title: str) -> Markup:
    frame = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return frame.format(WIDTH, round(height), title, Markup("").join(parts))
