"""The state of a training: one safetensors file, written whole or not at all."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...checkpoints import files, foreign_json
from ...checkpoints.settings import Number
from ...errors import CheckpointError

FILE = "state.safetensors"
_KIND = "training_state"
WHOLE = Number(0, 1e12, whole=True)


@dataclass(frozen=True)
class Origin:
    """Something a run is made from: a file, a folder, the images.

    Attributes:
        about: for people: a file's name, or how many images.
        hash: changes with the content, not with the place.
    """

    about: str
    hash: str


@dataclass(frozen=True)
class About:
    """What a run is.

    Attributes:
        stage, recipe: how it was started.
        settings: the whole recipe, as :func:`davae_core.training.run.recorded.to_json` writes it.
        origins: what it is made from, by the name of the setting.
        changes: what was changed on the way, one line each, oldest first.
        highest_rate: the highest learning rate asked for so far.
    """

    stage: str = ""
    recipe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    highest_rate: float = 0.0


@dataclass
class State:
    """What a run needs to go on.

    Attributes:
        recipe: the flat recipe it was made with.
        step: optimiser steps done.
        skipped: steps whose loss or gradient was not finite.
        tensors: weights, averages and moments by name; empty where only the header was read.
        about: what the run is.
    """

    recipe: dict[str, Any]
    step: int
    skipped: int
    tensors: dict[str, torch.Tensor]
    about: About = About()


def save(folder: Path, state: State) -> None:
    """Replace the state in ``folder`` in one step.

    Raises:
        WriteError: it cannot be written; the old one stays.
    """
    told = {"step": state.step, "skipped": state.skipped, "recipe": state.recipe, "about": asdict(state.about)}
    files.save(folder / FILE, state.tensors, {"davae.kind": _KIND, "davae.training": json.dumps(told)})


def load(folder: Path) -> State:
    """Read the state in ``folder``.

    Raises:
        CheckpointError: there is none, or the file is damaged or of another kind.
    """
    tensors, info = files.read(folder / FILE)
    return _parse(folder / FILE, info, tensors)


def load_header(folder: Path) -> State | None:
    """The state in ``folder`` without its tensors; None where there is none.

    Raises:
        CheckpointError: the file is damaged or of another kind.
    """
    if not (folder / FILE).exists():
        return None
    return _parse(folder / FILE, files.read_metadata(folder / FILE)[1], {})


def _parse(path: Path, info: Mapping[str, str], tensors: dict[str, torch.Tensor]) -> State:
    if info.get("davae.kind") != _KIND or "davae.training" not in info:
        raise CheckpointError(f"{path} is not the state of a training")
    with files.naming(str(path)):
        told = foreign_json.parse(info["davae.training"], "davae.training")
        step, skipped = (WHOLE.read(name, told.get(name)) for name in ("step", "skipped"))
        if not isinstance(told.get("recipe"), dict):
            raise CheckpointError("it does not tell its recipe")
        return State(told["recipe"], step, skipped, tensors, _about(told.get("about", {})))


def _about(told: Any) -> About:
    try:
        origins = {name: Origin(**value) for name, value in told.get("origins", {}).items()}
        return About(**{**told, "origins": origins, "changes": tuple(told.get("changes", ()))})
    except (TypeError, AttributeError) as problem:
        raise CheckpointError(f"what it tells of its run is damaged ({problem})") from problem


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
