"""The table of ``docs/RELIABILITY.md``: a row for each run, with its command."""

from __future__ import annotations

from pathlib import Path

from . import outcomes
from .outcomes import Tally

MARK = "<!-- files -->"
HEAD = "| command | files | " + " | ".join(outcomes.ALL) + " |"


def row(tally: Tally) -> str:
    """One run."""
    counts = " | ".join(f"{tally.counts.get(name, 0):,}" for name in outcomes.ALL)
    return f"| `python3 dev.py soak --files {tally.done} --seed {tally.seed}` | {tally.done:,} | {counts} |"


def write(document: Path, tally: Tally) -> None:
    """Put the row of this run in the place of an earlier one with the same seed, or below the others."""
    text = document.read_text(encoding="utf-8")
    before, _, after = text.partition(MARK)
    rows = [line for line in after.splitlines() if line.startswith("| `")]
    rest = (
        after[after.rindex(rows[-1]) + len(rows[-1]) :]
        if rows
        else after[after.index("\n\n", 1) :]
        if "\n\n" in after[1:]
        else "\n"
    )
    rows = [
        line for line in rows if not line.startswith("| `python3 dev.py soak") or f"--seed {tally.seed}`" not in line
    ]
    table = [HEAD, "|" + "---|" * (len(outcomes.ALL) + 2), *rows, row(tally)]
    document.write_text(f"{before}{MARK}\n" + "\n".join(table) + rest, encoding="utf-8")
