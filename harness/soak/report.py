"""The table of ``docs/RELIABILITY.md``: a row for each run, with its command."""

from __future__ import annotations

import itertools
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
    put(document, MARK, HEAD, row(tally), f"--seed {tally.seed}`")


def put(document: Path, mark: str, head: str, line: str, instead_of: str) -> None:
    """Put a row into the table below a mark, in the place of those that hold a text; what follows the table stays."""
    before, _, after = document.read_text(encoding="utf-8").partition(mark)
    below = after.lstrip("\n").splitlines()
    table = list(itertools.takewhile(lambda old: old.startswith("|"), below))
    rows = [old for old in table[2:] if instead_of not in old]
    lines = [head, "|" + "---|" * (head.count("|") - 1), *rows, line]
    rest = "\n".join(below[len(table) :]).strip("\n")
    document.write_text(f"{before}{mark}\n\n" + "\n".join(lines) + f"\n\n{rest}".rstrip() + "\n", encoding="utf-8")
