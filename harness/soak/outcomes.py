"""What can happen to a file, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

READ, REFUSED = "read", "refused with our error"
NAMELESS = "refused without the file's name"
RAW, CRASH, HANG, MEMORY, WRONG = (
    "raw traceback",
    "crash",
    "over 2 s",
    "memory over 2x the file + 200 MB",
    "accepted but wrong",
)
GOOD = (READ, REFUSED)
ALL = (READ, REFUSED, NAMELESS, RAW, CRASH, HANG, MEMORY, WRONG)


@dataclass
class Tally:
    """Counts of a run, and what it found.

    Attributes:
        seed: of all files.
        done: files so far; the next one has this number.
        counts: by outcome.
        finds: ``[number, outcome, subject, damage, words]`` of every outcome that should not be.
    """

    seed: int = 0
    done: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    finds: list[list] = field(default_factory=list)

    def add(self, number: int, outcome: str, subject: str, damage: str, words: str) -> None:
        """Count one file."""
        self.done = number + 1
        self.counts[outcome] += 1
        if outcome not in GOOD:
            self.finds.append([number, outcome, subject, damage, words[:300]])

    @property
    def bad(self) -> int:
        """Files with an outcome that should not be."""
        return sum(count for outcome, count in self.counts.items() if outcome not in GOOD)
