"""Line charts on logarithmic axes, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "davae", "svg.fonttype": "none"}  # the same charts give the same file

from matplotlib import pyplot  # noqa: E402

COLUMNS, WIDTH, HEIGHT = 2, 5.0, 3.8  # inches a chart


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


def render(charts: Sequence[Chart]) -> bytes:
    """Charts in one SVG picture, two in a row; those without points are left out."""
    drawn = [chart for chart in charts if any(line.points for line in chart.lines)]
    rows, columns = max(1, math.ceil(len(drawn) / COLUMNS)), max(1, min(COLUMNS, len(drawn)))
    figure, places = pyplot.subplots(rows, columns, figsize=(columns * WIDTH, rows * HEIGHT), squeeze=False)
    for place, chart in zip(places.flat, drawn, strict=False):
        xs = sorted({x for line in chart.lines for x, _ in line.points})
        for line in chart.lines:
            if line.points:
                place.plot(*zip(*line.points, strict=True), marker="o", label=line.label)
        place.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label, xscale="log", yscale="log")
        place.set_xticks(xs, [f"{x:g}" for x in xs], minor=False)
        place.set_xticks([], minor=True)
        place.grid(True, color="#dddddd")
        place.legend()
    for place in places.flat[len(drawn) :]:
        place.axis("off")
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return out.getvalue()
