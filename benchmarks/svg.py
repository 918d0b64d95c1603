"""Line charts on logarithmic axes, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 360
COLUMNS = 2
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 48
COLOURS = ("#4878a8", "#c8553d", "#5b8e4a", "#8a6fb0")
PAPER, INK, GRID = "#ffffff", "#222222", "#dddddd"


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: for the legend.
        points: x and y, both above 0.
    """

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """A chart with both axes logarithmic.

    Attributes:
        title, x_label, y_label: texts.
        lines: what is drawn; those without points are left out.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


def render(charts: Sequence[Chart]) -> str:
    """Charts in one picture, two in a row."""
    drawn = [chart for chart in charts if any(line.points for line in chart.lines)]
    parts = [
        f'<g transform="translate({i % COLUMNS * WIDTH} {i // COLUMNS * HEIGHT})">{_chart(chart)}</g>'
        for i, chart in enumerate(drawn)
    ]
    width, height = max(1, min(COLUMNS, len(drawn))) * WIDTH, max(1, math.ceil(len(drawn) / COLUMNS)) * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">'
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>' + "".join(parts) + "</svg>\n"
    )


def _chart(chart: Chart) -> str:
    lines = [line for line in chart.lines if line.points]
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points]
    to_x = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    ticks = _decades(min(ys), max(ys))
    to_y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_text(WIDTH / 2, 20, chart.title, "middle", 'font-size="14"')]
    for y in ticks:
        parts.append(f'<path d="M{LEFT} {to_y(y):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 6, to_y(y) + 4, f"{y:g}", "end"))
    for x in xs:
        parts.append(f'<path d="M{to_x(x):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{GRID}"/>')
        parts.append(_text(to_x(x), HEIGHT - BOTTOM + 16, f"{x:g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, chart.x_label, "middle"))
    turned = f'transform="rotate(-90 14 {HEIGHT / 2:g})"'
    parts.append(_text(14, HEIGHT / 2, chart.y_label, "middle", turned))
    for i, line in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        places = [(to_x(x), to_y(y)) for x, y in sorted(line.points)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
        parts.append(f'<rect x="{LEFT + 10}" y="{TOP + 9 + 18 * i}" width="14" height="4" fill="{colour}"/>')
        parts.append(_text(LEFT + 30, TOP + 15 + 18 * i, line.label))
    return "".join(parts)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Values from ``low`` to ``high``, logarithmically, to places from ``start`` to ``end``."""
    span = math.log(high / low) or 1.0

    def place(value: float) -> float:
        return start + (end - start) * math.log(value / low) / span

    return place


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten from at or below ``low`` to at or above ``high``."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
