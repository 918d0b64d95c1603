"""Write the finished files of a run out of its state, while it goes on or after it: no settings are needed.

python -m davae_core.training export output/1024
python -m davae_core.training export output/1024 --step 40000
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from .. import devices
from ..errors import CheckpointError, DAVAEError
from . import stages
from .data import survey
from .data.prompts import Blank
from .data.stored_latents import StoredLatents
from .run import folder, heartbeat, keeper, origins, player, recorded
from .run import state as states
from .run.config import IMAGES
from .run.launch import Collect, Images, measured
from .run.task import Task


@dataclass(frozen=True)
class ExportConfig:
    """Which run, which step, where to."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run (its --run.out)."""
    step: int = 0
    """Step of a checkpoint that was kept (--run.keep-every); 0 for the state that was saved last."""
    out: Path | None = None
    """Folder for the files; without it the checkpoint's own, step_0040000 in the folder of the run."""


def export(config: ExportConfig) -> list[Path]:
    """Write the files, with the averaged weights; returns their paths.

    Raises:
        DAVAEError: there is no such state, or something it was made from is gone or another.
    """
    where = folder.checkpoint(config.run, config.step) if config.step else config.run
    saved = states.load_header(where)
    if saved is None:
        kept = sorted(int(path.parent.name.removeprefix("step_")) for path in config.run.glob(f"step_*/{states.FILE}"))
        steps = f"; there are {', '.join(map(str, kept))}" if kept else ""
        raise DAVAEError(f"{where} holds no state{' of that step' if config.step else ''}{steps}")
    if saved.about.stage not in stages.STAGES:
        raise CheckpointError(
            f"{where / states.FILE} was saved before states told their recipe: --run.resume exports it"
        )
    stage = stages.STAGES[saved.about.stage]
    recipe: Any = recorded.from_json(stage.kind, saved.about.settings)
    out = config.out or folder.checkpoint(config.run, saved.step)
    written: list[Path] = []
    stage.train(recipe, partial(_write, state=where, saved=saved, out=out, written=written))
    return written


def _write(
    recipe: Any,
    multiple: int,
    build: Callable[[Any, Images], Task],
    unused: bool = False,
    latents: StoredLatents | Blank | None = None,
    collect: Collect = survey.collect,
    *,
    state: Path,
    saved: states.State,
    out: Path,
    written: list[Path],
) -> int:
    """What :func:`davae_core.training.run.launch.launch` does, without training."""
    device = devices.device("auto")
    heartbeat.at("reading the list of images")
    found = collect(recipe.data, multiple, recipe.run.out)
    heartbeat.at("reading what the run was made from")
    _check_same(state, saved.about.origins, origins.of_files(recipe))

    def images() -> Iterable[torch.Tensor]:
        """For statistics; only a task that takes some needs the images to be those of the run."""
        used = found if latents is None else latents.fitted(found, recipe.data)
        _check_same(state, saved.about.origins, {IMAGES: origins.of_images(used.sources)})
        return measured(recipe.data, recipe.run.seed, multiple, device, used)

    heartbeat.at("loading the models")
    task = build(recipe, images)
    task.to(device)
    heartbeat.at(f"reading the state of step {saved.step}")
    tensors = states.load(state).tensors
    with torch.no_grad():
        for name, phase in task.phases.items():
            for key, parameter in phase.named_parameters():
                if not parameter.requires_grad:
                    continue
                weight = f"{name}/{player.WEIGHT}{key}"
                stored = tensors.get(f"{name}/{player.AVERAGE}{key}", tensors.get(weight))
                if stored is None:
                    raise CheckpointError(f"{state / states.FILE} has no {weight}: it was saved by another version")
                parameter.copy_(stored)
    del tensors
    heartbeat.at(f"writing the files of step {saved.step} to {out}")
    with torch.no_grad():
        written += task.export(out, keeper.history(saved.about, saved.recipe, saved.step))
    return 0


def _check_same(state: Path, before: Mapping[str, states.Origin], now: Mapping[str, states.Origin]) -> None:
    """Raise DAVAEError where something that the run in the folder ``state`` was made from has been replaced."""
    changed = origins.replaced(before, now)
    if changed:
        raise DAVAEError(
            f"the run in {state} was made from something else, so these would not be its files: "
            f"{'; '.join(changed.values())}. Put back what it was made from; or go on with what is there now, and the "
            f"run writes its files with a note of it: --run.resume --run.change {' '.join(changed)}"
        )


def main(args: list[str] | None = None) -> int:
    """Export from the command line."""
    config = tyro.cli(ExportConfig, description=__doc__, args=args)
    with heartbeat.ending():
        for path in export(config):
            heartbeat.say(f"wrote {path}")
    return 0
