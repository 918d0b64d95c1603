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
    before, mark, after = document.read_text(encoding="utf-8").partition(MARK)
    lines = after.strip("\n").splitlines()
    size = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))  # of this table alone
    rows = [line for line in lines[:size][2:] if f"--seed {tally.seed}`" not in line]
    table = [HEAD, "|" + "---|" * (len(outcomes.ALL) + 2), *rows, row(tally)]
    rest = "\n".join(lines[size:]).strip("\n")
    document.write_text(f"{before}{mark}\n\n" + "\n".join(table) + f"\n\n{rest}".rstrip("\n") + "\n", encoding="utf-8")
