"""What every training does around its task: processes and data."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from ..data import dataset, survey
from ..data.config import DataConfig
from ..data.stored_latents import StoredLatents
from . import config, loop
from .task import Batch, Task
from .validation import Validation

logger = logging.getLogger(__name__)

Images = Callable[[], Iterable[torch.Tensor]]


class Recipe(Protocol):
    """What the recipes of all scripts have."""

    @property
    def data(self) -> DataConfig:
        """The images."""

    @property
    def run(self) -> config.RunConfig:
        """Length, batch, output."""

    @property
    def optimiser(self) -> config.OptimiserConfig:
        """AdamW."""


def launch(
    recipe: Recipe,
    multiple: int,
    build: Callable[[Images], Task],
    unused: bool = False,
    latents: StoredLatents | None = None,
) -> int:
    """Train what ``build`` makes; returns the exit code.

    Args:
        recipe: all settings.
        multiple: image sides are multiples of it.
        build: makes the task; gets a function that gives images ``[B, 3, H, W]`` to measure statistics on.
        unused: some trained parameters have no part in the loss.
        latents: of the images; then the batches hold these and no images.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # No buffer changes in training, and the position table of SD3.5-medium alone is 453 MB.
    several = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True, find_unused_parameters=unused, broadcast_buffers=False
    )
    accelerator = Accelerator(cpu=_several_on_cpu(), mixed_precision="no", kwargs_handlers=[several])
    run = recipe.run
    found = survey.collect(recipe.data, multiple, run.out)
    if latents is not None:
        found = latents.fitted(found, recipe.data)
    if accelerator.is_main_process:
        logger.info("%s", found.table)

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
            collection=found,
            latents=latents,
        )

    def images() -> Iterator[torch.Tensor]:
        for batch in dataset.loader(
            recipe.data, batch=SURVEY_BATCH, seed=run.seed, multiple=multiple, steps=SURVEY_STEPS, collection=found
        ):
            yield batch["image"].to(accelerator.device)

    task = build(images)
    if accelerator.is_main_process:
        found.table.save(run.out)
    held = partial(
        dataset.held_out,
        recipe.data,
        multiple,
        min(run.micro_batch or run.batch, HELD_BATCH),
        limit=run.validate_images or None,
        collection=found,
        latents=latents,
    )
    validation = Validation(held if found.held else None, run.prompts)
    return loop.train(task, config.flat(recipe), run, recipe.optimiser, accelerator, batches, validation)


SURVEY_BATCH, SURVEY_STEPS, HELD_BATCH = 16, 64, 8


def _several_on_cpu() -> bool:
    """One of several processes, without a GPU: unless told so, Accelerate takes each for a run of its own."""
    return "LOCAL_RANK" in os.environ and not (torch.cuda.is_available() or torch.xpu.is_available())
