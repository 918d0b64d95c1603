"""AdamW over named parameters, the learning rate of a step, and the optimiser's state as plain tensors."""

import math
from collections.abc import Mapping

import torch

from ...errors import CheckpointError
from . import sharding
from .config import OptimiserConfig

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(config: OptimiserConfig, step: int, steps: int) -> float:
    """Of optimiser step ``step`` (from 0) of ``steps``: a linear rise, then constant or half a cosine to 0."""
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "constant" or step < config.warmup:
        return config.lr * rise
    done = (step - config.warmup) / max(steps - config.warmup, 1)
    return config.lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def adamw(parameters: Mapping[str, torch.nn.Parameter], config: OptimiserConfig) -> torch.optim.AdamW:
    """One group that decays (two dimensions and more) and one that does not."""
    decays = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    on = {p.device.type for p in parameters.values()}
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=on <= {"cpu", "cuda"})


def state_tensors(optimiser: torch.optim.Optimizer, names: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """The moments by ``parameter name/moment``; empty before the first step."""
    return {
        f"{name}/{moment}": optimiser.state[parameter][moment]
        for name, parameter in names.items()
        if parameter in optimiser.state
        for moment in _MOMENTS
    }


def load_state(
    optimiser: torch.optim.Optimizer, names: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what :func:`state_tensors` gave.

    Raises:
        CheckpointError: the tensors are of other parameters.
    """
    for name, parameter in names.items():
        found = {moment: tensors.get(f"{name}/{moment}") for moment in _MOMENTS}
        if all(value is None for value in found.values()):
            continue
        for moment, value in found.items():
            if value is None or (moment != "step" and value.shape != parameter.shape):
                raise CheckpointError(f"the saved optimiser does not fit the parameter {name}; start a new run")
            if moment != "step":
                own = sharding.part_of(value, parameter).clone()
            else:  # a fused optimiser counts on the device
                own = value.to(parameter.device if optimiser.defaults["fused"] else "cpu", copy=True)
            optimiser.state[parameter][moment] = own
