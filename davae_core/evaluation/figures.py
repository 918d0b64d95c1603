"""What an evaluation writes down: figures, the bounds they must keep, and the settings they were measured with."""

import json
import math
import platform
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import atomic

PACKAGES = ("torch", "numpy", "safetensors", "pillow", "stlpips_pytorch", "lpips")


@dataclass(frozen=True)
class Bound:
    """A figure and the limits it must keep; None where there is no such limit."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the figure keeps the bound; one that is not a number does not."""
        kept = (
            self.at_least is None or self.value >= self.at_least,
            self.at_most is None or self.value <= self.at_most,
            self.below is None or self.value < self.below,
        )
        return all(kept) and not math.isnan(self.value)

    def to_json(self) -> dict[str, Any]:
        """The fields, and whether it passed."""
        return {**asdict(self), "passed": self.passed}

    def limits(self) -> str:
        """The limits in words."""
        signs = ((">=", self.at_least), ("<=", self.at_most), ("<", self.below))
        return ", ".join(f"{sign} {limit:g}" for sign, limit in signs if limit is not None)


def bound_from_json(told: Mapping[str, Any]) -> Bound:
    """Undo :meth:`Bound.to_json`."""
    return Bound(told["name"], told["value"], told["at_least"], told["at_most"], told["below"])


def bounds_table(bounds: Sequence[Bound]) -> str:
    """One line per bound: its name, the figure, the limits, and ``pass`` or ``FAIL``."""
    rows = [(b.name, f"{b.value:.3f}", b.limits(), "pass" if b.passed else "FAIL") for b in bounds]
    return table(("", "figure", "must be", ""), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in (head, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def versions() -> dict[str, str]:
    """Python, platform, and the version of each package that has a part in the figures and is installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write figures, indented; infinite ones and those that are not numbers become null."""
    atomic.write(path, (json.dumps(_plain(values), indent=1, allow_nan=False) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def add_common_arguments(parser: ArgumentParser) -> None:
    """``--json``, ``--batch`` and ``--device``."""
    parser.add_argument("--json", type=Path, metavar="F", help="write settings and figures to this file")
    parser.add_argument("--batch", type=at_least(1), default=32, help="images at a time (default: 32)")
    parser.add_argument("--device", default="cpu", help='where to compute, for example "cuda" (default: cpu)')


def at_least(smallest: int) -> Callable[[str], int]:
    """A reader of whole numbers for a command line, which refuses those below ``smallest``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise ArgumentTypeError(f"expected a whole number of at least {smallest}, got {text!r}")
        return value

    return read


def seconds(work: Callable[[], object], on: torch.device) -> float:
    """How long a call takes, until the device has done it."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    begun = time.perf_counter()
    work()
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter() - begun
