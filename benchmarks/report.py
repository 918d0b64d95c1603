"""Result files to a table in Markdown and a picture of how time and memory grow.

python -m benchmarks.report benchmarks/results/*.json --plot benchmarks/results/growth.svg
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from davae_core import atomic, command
from davae_core.errors import DAVAEError
from davae_core.evaluation.figures import Bound

from . import bounds, machine
from .charts import Chart, Line, render
from .record import CaseResult, SideResult, case_from_json
from .sides import COMFY, CORE

HEAD = ("", "first", "second", "ratio", "arithmetic", "bound", "")
# What a row of the table is of, and how it says so.
FIGURES = {"time": "", "memory": ", peak memory", "shared": ", weights shared", "sum": ""}
GIB = 2**30
# Which cases show growth, how a side of them is labelled, with its model and the number on the x axis, and the axis.
GROWTH = (
    ("equal ", r"(native|adapted), (\d+) px", "picture, px a side"),
    ("batch ", r"(native|adapted), 512 px(?:, batch (\d+))?", "pictures at a time (512 px)"),
)


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        DAVAEError: it is none.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        told["results"] = [case_from_json(case) for case in told["cases"]]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DAVAEError(f"{path} is no result file of the benchmarks ({problem!r}); make one with --json") from problem
    return told


def markdown(told: dict[str, Any]) -> str:
    """The table of one run, under a line that says how and where it was made."""
    results: list[CaseResult] = told["results"]
    where = f"{machine.name(told['machine'])}, torch {told['machine']['torch']}, {told['setup']['dtype']}"
    lines = [f"`{told['command']}`, {told['date']}, {where}", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for result in results:
        for of in FIGURES:
            row = _row(result, of)
            if row:
                lines.append("| " + " | ".join(row) + " |")
    for name, why in told.get("left_out", {}).items():
        lines.append(f"| {name} | left out: {why} |" + " |" * (len(HEAD) - 2))
    return "\n".join(lines) + "\n"


def _row(result: CaseResult, of: str) -> list[str] | None:
    """A line of the table; None for what was not measured."""
    first, second = result.sides[:2]
    value = result.figure(of)
    if value is None:
        return None
    kept = [bound for limit in _limits(result, of) for bound in bounds.judge([result], [limit])]
    if of == "memory":
        assert first.peak is not None and second.peak is not None
        figures = [f"{first.peak / GIB:.2f} GiB", f"{second.peak / GIB:.2f} GiB", f"{value:.2f}", ""]
    elif of == "sum":
        one, two, *more = result.sums.items()
        others = "".join(f"; {name}: {seconds:.3g} s" for name, seconds in more)
        figures = [f"{one[1]:.3g} s", f"{two[1]:.3g} s", f"{value:.1f}", ""]
        kept_by = ", ".join(bound.limits() for bound in kept)
        return [f"{one[0]} / {two[0]} (sums of parts{others})", *figures, kept_by, _verdict(kept)]
    elif of == "shared":
        figures = [f"{value:.1%}", "", "", ""]
    else:
        low, high = result.ratio.quartiles
        said = "" if result.arithmetic is None else f"{result.arithmetic:.2f}"
        figures = [_seconds(first), _seconds(second), f"{value:.2f} ({low:.2f} to {high:.2f})", said]
    return [result.title + FIGURES[of], *figures, ", ".join(bound.limits() for bound in kept), _verdict(kept)]


def _limits(result: CaseResult, of: str) -> list[bounds.Limit]:
    return [limit for limit in (*bounds.FULL, *bounds.QUICK) if limit.case == result.name and limit.of == of]


def _verdict(kept: Sequence[Bound]) -> str:
    return "" if not kept else "kept" if all(bound.passed for bound in kept) else "**missed**"


def _seconds(side: SideResult) -> str:
    """Median, and how fast that is."""
    rate = ""
    if "images_per_second" in side.notes:
        rate = f" ({side.notes['images_per_second']:.3g} img/s)"
    elif side.cost is not None and side.cost.flops:
        rate = f" ({side.cost.flops / side.seconds.median / 1e12:.3g} TFLOP/s)"
    return f"{side.seconds.median:.3g} s{rate}"


def scaling(results: Sequence[CaseResult]) -> list[Chart]:
    """Time and memory of a model call against the picture's size and against the batch.

    Times against the size are those of ComfyUI's route, which users take; the rest is measured in bare torch alone.
    """
    charts = []
    for kind, pattern, x_label in GROWTH:
        sides = [side for result in results if result.name.startswith(kind) for side in result.sides]
        for title, y_label in (("Time of a model call", "seconds"), ("Peak memory of a model call", "GiB")):
            points: dict[str, dict[float, float]] = {"native": {}, "adapted": {}}
            route = COMFY if (kind, y_label) == ("equal ", "seconds") else CORE
            for side in sides:
                match, y = re.fullmatch(rf"{pattern} \({route}\)", side.label), _figure(side, y_label)
                if match and y:
                    points[match[1]].setdefault(float(match[2] or 1), y)
            lines = [Line(label, tuple(sorted(some.items()))) for label, some in points.items()]
            charts.append(Chart(title, x_label, y_label, tuple(lines)))
    return charts


def _figure(side: SideResult, unit: str) -> float | None:
    if unit == "seconds":
        return side.seconds.median
    return None if side.peak is None else side.peak / GIB


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables; with ``--plot`` write the picture, of what has been measured at two places at least."""
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="files written with --json")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="write the picture of growth to this file")
    options = parser.parse_args(argv)
    runs = [read(path) for path in options.results]
    print("\n".join(markdown(told) for told in runs))
    if options.plot:
        charts = scaling([result for told in runs for result in told["results"]])
        charts = [chart for chart in charts if any(len(line.points) > 1 for line in chart.lines)]
        atomic.write(options.plot, render(charts))


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
