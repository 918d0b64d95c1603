"""Finished runs as a table: mean and spread over the seeds, and each variant against its group's control."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import atomic
from ...checkpoints import foreign_json
from ...evaluation import figures
from .variants import ABOUT, Variant, control

# Figure to its title, its format, and whether more is better.
COLUMNS: Mapping[str, tuple[str, str, bool]] = {
    "st-lpips-alex": ("ST-LPIPS", ".4f", False),
    "psnr": ("PSNR, dB", ".2f", True),
    "mottle": ("mottle", ".2f", False),
    "mottle_ratio": ("/ floor", ".2f", False),
    "off_white": ("off white", ".2%", False),
    "base_error": ("base error", ".3f", False),
    "detail_error": ("detail error", ".3f", False),
    "recon_gain": ("recon. gain, dB", ".2f", True),
    "recon_st-lpips-alex": ("recon. ST-LPIPS", ".4f", False),
}
DECISIVE = "st-lpips-alex"
ENOUGH = 3  # seeds

Result = Mapping[str, Any]


def result(out: Path, variant: Variant, seed: int) -> Path:
    """The file of a finished run."""
    return out / variant.group / variant.name / f"{seed}.json"


def finished(out: Path, variant: Variant) -> dict[int, Result]:
    """The runs of a variant by seed.

    Raises:
        DAVAEError: a file is damaged.
    """
    paths = (out / variant.group / variant.name).glob("*.json")
    return {int(path.stem): foreign_json.read(path) for path in sorted(paths) if path.stem.isdigit()}


def verdict(own: Mapping[int, Result], others: Mapping[int, Result], name: str = DECISIVE) -> str:
    """A variant against the control, by the differences between runs of one seed.

    ``better`` or ``worse`` where there are enough seeds, all differences have one sign, and their mean is more than two
    standard errors from zero; otherwise ``no difference seen``, or ``too few seeds``.
    """
    seeds = sorted(own.keys() & others.keys())
    apart = [own[seed]["figures"][name] - others[seed]["figures"][name] for seed in seeds]
    if len(apart) < ENOUGH:
        return "too few seeds"
    mean, error = statistics.mean(apart), statistics.stdev(apart) / math.sqrt(len(apart))
    if abs(mean) <= 2 * error or not (all(d > 0 for d in apart) or all(d < 0 for d in apart)):
        return "no difference seen"
    return "better" if (mean > 0) == COLUMNS[name][2] else "worse"


def summary(runs: Mapping[int, Result]) -> dict[str, dict[str, float]]:
    """Mean of each figure over the seeds, and its standard deviation (not a number for one seed)."""
    out = {}
    for name in COLUMNS:
        values = [run["figures"][name] for run in runs.values() if run["figures"].get(name) is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            out[name] = {"mean": statistics.mean(values), "spread": spread}
    return out


def line(values: Mapping[str, float]) -> str:
    """The figures of one run for people."""
    return ", ".join(f"{title} {values[name]:{form}}" for name, (title, form, _) in COLUMNS.items() if name in values)


def markdown(told: Mapping[str, Mapping[str, Any]]) -> str:
    """One table for each group."""
    parts = []
    for group, about in ABOUT.items():
        rows = {key: row for key, row in told.items() if key.startswith(f"{group}/")}
        names = [name for name in COLUMNS if any(name in row["figures"] for row in rows.values())]
        if not rows:
            continue
        head = [
            "variant",
            "seeds",
            *(COLUMNS[name][0] for name in names),
            "against the first, by ST-LPIPS",
            "what it is",
        ]
        lines = [head, ["---"] * len(head)]
        for key, row in rows.items():
            cells = [_cell(row["figures"].get(name), COLUMNS[name][1]) for name in names]
            lines.append([key.partition("/")[2], str(len(row["seeds"])), *cells, row["verdict"], row["about"]])
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts.append(f"## {group}: {about}\n\n{text}\n")
    return "\n".join(parts) or "no run is finished\n"


def _cell(value: Mapping[str, float] | None, form: str) -> str:
    if value is None:
        return ""
    spread = "" if math.isnan(value["spread"]) else f" ± {value['spread']:{form}}"
    return f"{value['mean']:{form}}{spread}"


def collect(out: Path, variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """Rows by ``group/name``, of variants with a finished run."""
    told = {}
    for variant in variants:
        if runs := finished(out, variant):
            others = finished(out, control(variant.group))
            is_control = variant == control(variant.group)
            told[variant.key] = {
                "about": variant.about,
                "seeds": sorted(runs),
                "figures": summary(runs),
                "verdict": "" if is_control else verdict(runs, others),
                "curves": {seed: run["curve"] for seed, run in runs.items()},
            }
    return told


def write(out: Path, variants: Sequence[Variant]) -> str:
    """Write ``table.md`` and ``table.json``; the former's text."""
    told = collect(out, variants)
    text = markdown(told)
    out.mkdir(parents=True, exist_ok=True)
    atomic.write(out / "table.md", text.encode())
    figures.write_json(out / "table.json", told)
    return text
