"""What every training does around its task: processes and data."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from ..data import dataset
from . import config, loop
from .task import Batch, Task
from .validation import Validation

Images = Callable[[], Iterable[torch.Tensor]]


class Recipe(Protocol):
    """What the recipes of all scripts have."""

    @property
    def data(self) -> dataset.DataConfig:
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
    # No buffer changes in training, and the position table of SD3.5-medium alone is 453 MB.
    several = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True, find_unused_parameters=unused, broadcast_buffers=False
    )
    accelerator = Accelerator(cpu=_several_on_cpu(), mixed_precision="no", kwargs_handlers=[several])
    run = recipe.run

    def batches(start: int) -> Iterable[Batch]:
        return dataset.loader(
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
        for batch in dataset.loader(
            recipe.data, batch=SURVEY_BATCH, seed=run.seed, multiple=multiple, steps=SURVEY_STEPS
        ):
            yield batch["image"].to(accelerator.device)

    validation = Validation(None, run.prompts)
    return loop.train(build(images), config.flat(recipe), run, recipe.optimiser, accelerator, batches, validation)


SURVEY_BATCH, SURVEY_STEPS = 16, 64


def _several_on_cpu() -> bool:
    """One of several processes, without a GPU: unless told so, Accelerate takes each for a run of its own."""
    return "LOCAL_RANK" in os.environ and not (torch.cuda.is_available() or torch.xpu.is_available())
