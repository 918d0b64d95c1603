"""One side of a comparison, alone in a process of its own: time and peak memory of its first call.

Run as ``python -m benchmarks.fresh SPECIFICATION``; it writes one line of JSON to standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .setup import Setup
from .sides import Side

ROOT = Path(__file__).resolve().parent.parent
MARK = "RESULT "


@dataclass(frozen=True)
class Alone:
    """What the process found.

    Attributes:
        seconds: of the call.
        peak: bytes it needed on top of what was there before.
        notes: of the side.
    """

    seconds: float
    peak: int
    notes: dict[str, Any] = field(default_factory=dict)


def measure(side: Side, setup: Setup, files: Path | None = None) -> Alone:
    """Run a side in a process of its own.

    Raises:
        RuntimeError: the process failed; with its last words.
    """
    told = {"side": asdict(side), "setup": setup.to_json(), "files": str(files) if files else ""}
    command = [sys.executable, "-m", "benchmarks.fresh", json.dumps(told)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{side.label} failed in a process of its own:\n{done.stderr[-2000:]}")
    return Alone(**json.loads(lines[-1].removeprefix(MARK)))


def main(specification: str) -> None:
    """Measure one side in this process."""
    import torch

    from . import memory, sides, timing

    told = json.loads(specification)
    setup, side = Setup(**told["setup"]), Side(**told["side"])
    torch.set_grad_enabled(False)
    built = sides.build(side, setup, Path(told["files"]) if told["files"] else None)
    synchronise = timing.synchroniser(setup.device)
    spent: list[float] = []

    def call() -> None:
        start = time.perf_counter()
        built.call()
        synchronise()
        spent.append(time.perf_counter() - start)

    peak = memory.peak(call, setup.device)
    notes = {name: value for name, value in built.notes.items() if isinstance(value, int | float | str)}
    print(MARK + json.dumps(asdict(Alone(spent[0], peak, notes))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
