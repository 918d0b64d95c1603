"""What every training script does around its task: processes, data, errors for the person at the terminal."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from ..errors import DAVAEError
from . import config, data, loop
from .task import Batch, Task

Images = Callable[[], Iterable[torch.Tensor]]


class Recipe(Protocol):
    """What the recipes of all scripts have."""

    @property
    def data(self) -> data.DataConfig:
        """The images."""

    @property
    def run(self) -> config.RunConfig:
        """Length, batch, output."""

    @property
    def optimiser(self) -> config.OptimiserConfig:
        """AdamW."""


def launch(recipe: Recipe, multiple: int, build: Callable[[Images], Task], unused: bool = False) -> int:
    """Train what ``build`` makes; returns the exit code.

    Args:
        recipe: all settings.
        multiple: image sides are multiples of it.
        build: makes the task; gets a function that gives images ``[B, 3, H, W]`` to measure statistics on.
        unused: some trained parameters have no part in the loss.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    several = DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=unused)
    accelerator = Accelerator(cpu=_several_on_cpu(), mixed_precision="no", kwargs_handlers=[several])
    run = recipe.run

    def batches(start: int) -> Iterable[Batch]:
        return data.loader(
            recipe.data,
            batch=run.batch,
            seed=run.seed,
            multiple=multiple,
            start=start,
            steps=run.steps,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            micro_batch=run.micro_batch or None,
        )

    def images() -> Iterator[torch.Tensor]:
        for batch in data.loader(recipe.data, batch=SURVEY_BATCH, seed=run.seed, multiple=multiple, steps=SURVEY_STEPS):
            yield batch["image"].to(accelerator.device)

    return loop.train(build(images), config.flat(recipe), run, recipe.optimiser, accelerator, batches)


SURVEY_BATCH, SURVEY_STEPS = 16, 64


def _several_on_cpu() -> bool:
    """One of several processes, without a GPU: unless told so, Accelerate takes each for a run of its own."""
    return "LOCAL_RANK" in os.environ and not (torch.cuda.is_available() or torch.xpu.is_available())


def main(run: Callable[[], int]) -> None:
    """Run a script; what a person can put right is said without a traceback."""
    try:
        sys.exit(run())
    except DAVAEError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(loop.INTERRUPTED)


def statistics(latents: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per channel, ``[C]`` each, of latents ``[B, C, h, w]``; in float64 inside."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for z in latents:
        z = z.detach().double().cpu()
        count += z.numel() // z.shape[1]
        total = total + z.sum(dim=(0, 2, 3))
        squares = squares + (z**2).sum(dim=(0, 2, 3))
    mean = total / count
    return mean.float(), (squares / count - mean**2).clamp(min=1e-12).sqrt().float()
