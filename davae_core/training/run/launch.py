"""What every training does around its task: processes and data."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from ... import bounds
from ..data import dataset, survey
from ..data.config import DataConfig
from ..data.prompts import Blank
from ..data.stored_latents import StoredLatents
from ..data.survey import Collection
from . import config, folder, heartbeat, loop, origins, recorded, resume
from . import state as states
from .precision import settled
from .task import Batch, Task
from .validation import Validation

logger = logging.getLogger(__name__)

Images = Callable[[], Iterable[torch.Tensor]]
Collect = Callable[[DataConfig, int, Path | None], Collection]
SURVEY_BATCH, SURVEY_STEPS, HELD_BATCH = 16, 64, 8
ENDING = ".safetensors"
SURVEY_PASSES = 4  # over a small set, for its crops and mirror images


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


class Launch(Protocol):
    """What a task hands its recipe to: :func:`launch`, or what only exports."""

    def __call__(
        self,
        recipe: Any,
        multiple: int,
        build: Callable[[Any, Images], Task],
        unused: bool = False,
        latents: StoredLatents | Blank | None = None,
        collect: Collect = survey.collect,
    ) -> int:
        """Do something with the task that ``build`` makes; the exit code."""


def launch(
    recipe: Recipe,
    multiple: int,
    build: Callable[[Any, Images], Task],
    unused: bool = False,
    latents: StoredLatents | Blank | None = None,
    collect: Collect = survey.collect,
    *,
    stage: str = "",
    name: str = "",
) -> int:
    """Train what ``build`` makes; returns the exit code.

    Args:
        recipe: all settings.
        multiple: image sides are multiples of it.
        build: makes the task of the recipe, whose precision is settled; the second argument gives images
            ``[B, 3, H, W]`` to measure statistics on.
        unused: some trained parameters have no part in the loss.
        latents: of the images; then the batches hold these and no images.
        collect: finds the images, or what else a step is made of.
        stage, name: how the recipe was asked for.

    Raises:
        DAVAEError: the folder belongs to another run, or something that the recipe names is not there, or names no
            file that the run could leave.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_file(recipe)
    with heartbeat.ending():
        heartbeat.at("looking for devices and other processes")
        # No buffer changes in training, and the position table of SD3.5-medium alone is 453 MB.
        several = DistributedDataParallelKwargs(
            gradient_as_bucket_view=True, find_unused_parameters=unused, broadcast_buffers=False
        )
        accelerator = Accelerator(cpu=_several_on_cpu(), mixed_precision="no", kwargs_handlers=[several])
        with folder.claimed(recipe.run.out) if accelerator.is_main_process else nullcontext():
            return _train(recipe, multiple, build, latents, collect, accelerator, (stage, name))


def check_file(recipe: Any) -> None:
    """Raise DAVAEError where the name of the finished file (``file``, of recipes that have it) is none, or is taken."""
    if (name := getattr(recipe, "file", None)) is None:
        return
    path = PureWindowsPath(name)  # knows the separators of either system
    taken = path.name.lower() == states.FILE
    fits = path.name == name and path.suffix.lower() == ENDING and not taken
    expected = f"the name of a {ENDING} file, without a folder (--run.out names that)"
    why = " (the state of the run has this name)" if taken else ""
    bounds.require("file", f"{name!r}{why}", fits, expected)


def _train(
    recipe: Any,
    multiple: int,
    build: Callable[[Any, Images], Task],
    latents: StoredLatents | Blank | None,
    collect: Collect,
    accelerator: Accelerator,
    named: tuple[str, str],
) -> int:
    """What :func:`launch` does in the folder of the run."""
    saved = resume.found(recipe.run)
    before = str(saved.recipe.get("run.precision")) if saved else None
    run = replace(recipe.run, precision=settled(recipe.run.precision, accelerator.device, before))
    recipe = replace(recipe, run=run)
    heartbeat.at("reading the list of images")
    found = collect(recipe.data, multiple, run.out)
    if latents is not None:
        found = latents.fitted(found, recipe.data)
    if accelerator.is_main_process:
        logger.info("%s", found.table)
    heartbeat.at("reading what the run is made from")
    about = states.About(*named, recorded.to_json(recipe), origins.origins(recipe, found.sources))
    if saved is not None:  # before models are loaded
        resume.changes(saved, config.flat(recipe), about.origins, run)
    heartbeat.at("loading the models")
    task = build(recipe, partial(measured, recipe.data, run.seed, multiple, accelerator.device, found))
    held = partial(
        dataset.held_out,
        recipe.data,
        multiple,
        min(run.micro_batch or run.batch, HELD_BATCH),
        limit=run.validate_images or None,
        collection=found,
        latents=latents,
    )

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

    validation = Validation(held if found.held else None, run.prompts)
    begun: Callable[[], Path] = partial(found.table.save, run.out)
    return loop.train(task, config.flat(recipe), run, recipe.optimiser, accelerator, batches, about, validation, begun)


def measured(
    data: DataConfig, seed: int, multiple: int, device: torch.device, found: Collection
) -> Iterator[torch.Tensor]:
    """Images ``[B, 3, H, W]`` to measure statistics on, the same for a seed; few are taken 4 times."""
    enough = SURVEY_PASSES * math.ceil(len(found.sources) / SURVEY_BATCH)
    for batch in dataset.loader(
        data,
        batch=SURVEY_BATCH,
        seed=seed,
        multiple=multiple,
        steps=min(SURVEY_STEPS, enough),
        collection=found,
    ):
        yield batch["image"].to(device)


def _several_on_cpu() -> bool:
    """One of several processes, without a GPU: unless told so, Accelerate takes each for a run of its own."""
    return "LOCAL_RANK" in os.environ and not (torch.cuda.is_available() or torch.xpu.is_available())
