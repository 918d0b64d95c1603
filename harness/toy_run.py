"""A training small enough to see through, with everything around it real: images, loading processes, launch, files.

python -m harness.toy_run IMAGES OUT --run.steps 1000 --pause 0.05
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from davae_core import command
from davae_core.checkpoints import files, metadata
from davae_core.history import History
from davae_core.training.data.config import DataConfig
from davae_core.training.run.config import OptimiserConfig, RunConfig, from_command_line
from davae_core.training.run.launch import launch
from davae_core.training.run.task import Batch, Losses, Phase

FILE = "line.safetensors"


@dataclass(frozen=True)
class LineRecipe:
    """Fits two numbers to the mean of images."""

    data: DataConfig
    run: RunConfig
    optimiser: OptimiserConfig = OptimiserConfig(lr=0.1, warmup=0, ema=0.9)
    base: Path | None = None
    """A file that the run is made from."""
    gradient_checkpointing: bool = False
    """Changes nothing."""
    pause: float = 0.0
    """Seconds that each step takes longer."""
    fail_at: int = -1
    """A step that fails."""


class Line(Phase):
    """Pulls its weights to the mean of the images, which changes with the batch."""

    def __init__(self, at_step: Callable[[int], None] = lambda step: None, pause: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.at_step, self.pause = at_step, pause

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        time.sleep(self.pause)
        self.at_step(step)
        return {"loss": ((self.weight - batch["image"].mean()) ** 2).sum()}


@dataclass
class LineTask:
    """Trains lines; leaves the first one's weights.

    Attributes:
        phases: of the training.
        on_sheet: called before a sheet is drawn.
        on_export: called before the file is written.
    """

    phases: dict[str, Phase]
    on_sheet: Callable[[], None] = lambda: None
    on_export: Callable[[], None] = lambda: None
    shown: list[int] = field(default_factory=list)

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    def sheet(self, batch: Batch) -> torch.Tensor:
        """A black picture."""
        self.on_sheet()
        self.shown.append(len(self.shown))
        return torch.zeros(3, 8, 8)

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Nothing to measure."""
        return {}

    def export(self, folder: Path, history: History) -> list[Path]:
        """The weights, with their history."""
        self.on_export()
        state = {"weight": next(self.phases["line"].parameters())}
        files.save(folder / FILE, state, metadata.history_entry(history))
        return [folder / FILE]


def draw_images(folder: Path, count: int = 6) -> Path:
    """Pictures of 8 x 8 pixels, each of its own grey."""
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


def recipe(images: Path, out: Path, **options: Any) -> LineRecipe:
    """A recipe of 8 steps; options are those of the run, or, if there is none of that name, of the recipe."""
    run = RunConfig(out, steps=8, batch=2, log_every=1, sample_every=0)
    own = {name: options.pop(name) for name in list(options) if not hasattr(run, name)}
    data = replace(DataConfig((str(images),), size=8, flip=False, workers=0, max_broken=0), **own.pop("data", {}))
    return LineRecipe(data, replace(run, **options), **own)


def run(given: LineRecipe, phases: Mapping[str, Phase] | None = None, **task: Any) -> int:
    """Train it through :func:`davae_core.training.run.launch.launch`; the exit code."""

    def fail(step: int) -> None:
        if step == given.fail_at:
            raise RuntimeError("a step that fails")

    def build(made: LineRecipe, images: object) -> LineTask:
        return LineTask(dict(phases or {"line": Line(fail, made.pause)}), **task)

    return launch(given, 8, build, name="line")


def main(args: list[str]) -> int:
    """Train from a command line: images, folder of the run, and changes of the recipe."""
    known = {"line": ("a line", recipe(Path(args[0]), Path(args[1])))}
    return run(from_command_line(known, __doc__ or "", ["line", *args[2:]]))


if __name__ == "__main__":
    command.run(partial(main, sys.argv[1:]))
