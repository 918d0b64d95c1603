"""The state of a training: one safetensors file, written whole or not at all."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...checkpoints import files, foreign_json
from ...checkpoints.settings import Number
from ...errors import CheckpointError

FILE = "state.safetensors"
_KIND = "training_state"
WHOLE = Number(0, 1e12, whole=True)


@dataclass
class State:
    """What a run needs to go on.

    Attributes:
        recipe: the flat recipe it was made with.
        step: optimiser steps done.
        skipped: steps whose loss or gradient was not finite.
        tensors: weights, averages and moments by name.
    """

    recipe: dict[str, Any]
    step: int
    skipped: int
    tensors: dict[str, torch.Tensor]


def save(folder: Path, state: State) -> None:
    """Replace the state in ``folder`` in one step."""
    told = {"step": state.step, "skipped": state.skipped, "recipe": state.recipe}
    files.save(folder / FILE, state.tensors, {"davae.kind": _KIND, "davae.training": json.dumps(told)})


def load(folder: Path) -> State:
    """Read the state in ``folder``.

    Raises:
        CheckpointError: there is none, or the file is damaged or of another kind.
    """
    tensors, info = files.read(folder / FILE)
    if info.get("davae.kind") != _KIND or "davae.training" not in info:
        raise CheckpointError(f"{folder / FILE} is not the state of a training")
    file = str(folder / FILE)
    with files.naming(file):
        told = foreign_json.parse(info["davae.training"], "davae.training")
        step, skipped = (WHOLE.read(name, told.get(name)) for name in ("step", "skipped"))
        if not isinstance(told.get("recipe"), dict):
            raise CheckpointError("it does not tell its recipe")
    return State(told["recipe"], step, skipped, tensors)


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
