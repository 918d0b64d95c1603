"""Draws the curves of an ablation bench: quality over steps, one line a variant, the mean over its seeds.

python -m benchmarks.evidence output/ablation/table.json docs/evidence.svg
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from davae_core import atomic, command
from davae_core.checkpoints import foreign_json
from davae_core.errors import DAVAEError

from .charts import Chart, Line, render

SHOWN = {"st-lpips-alex": "ST-LPIPS (alex)", "base_error": "error of the base", "detail_error": "error of the detail"}


def line(label: str, curves: Mapping[str, Sequence[Mapping[str, float]]], figure: str) -> Line:
    """The mean of a figure over the seeds, at the steps that all of them were measured at."""
    at = [{point["step"]: point[figure] for point in curve if point.get(figure)} for curve in curves.values()]
    steps = sorted(set.intersection(*map(set, at))) if at else []
    return Line(label, tuple((step, statistics.mean(run[step] for run in at)) for step in steps if step > 0))


def charts(table: Mapping[str, Any]) -> list[Chart]:
    """A chart for each figure of each group that has curves."""
    groups = dict.fromkeys(key.partition("/")[0] for key in table)
    return [
        Chart(
            f"{group}: {title}",
            "steps",
            title,
            tuple(
                line(key.partition("/")[2], row["curves"], figure)
                for key, row in table.items()
                if key.startswith(f"{group}/")
            ),
        )
        for group in groups
        for figure, title in SHOWN.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw from the command line.

    Raises:
        DAVAEError: no run of the table has a curve.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("table", type=Path, help="table.json of a bench")
    parser.add_argument("out", type=Path, help="SVG file to write")
    args = parser.parse_args(argv)
    drawn = [one for one in charts(foreign_json.read(args.table)) if any(part.points for part in one.lines)]
    if not drawn:
        raise DAVAEError(f"{args.table} has no curve: finish a training of it: python -m davae_core.training ablate")
    atomic.write(args.out, render(drawn))


if __name__ == "__main__":
    command.run(main)
