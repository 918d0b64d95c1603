"""The stages of a training and the recipes that each of them knows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import recipes
from .run.config import from_command_line
from .tasks import adapter, autoencoder, base_autoencoder, base_dit


@dataclass(frozen=True)
class Stage:
    """One kind of training.

    Attributes:
        about: the help text; its first line says what is trained.
        recipes: name to (one line about it, recipe).
        train: runs a recipe; gives the exit code.
    """

    about: str
    recipes: Mapping[str, tuple[str, Any]]
    train: Callable[[Any], int]


STAGES = {
    "autoencoder": Stage(autoencoder.__doc__ or "", recipes.AUTOENCODER, autoencoder.train),
    "adapter": Stage(adapter.__doc__ or "", recipes.ADAPTER, adapter.train),
    "base_autoencoder": Stage(base_autoencoder.__doc__ or "", recipes.BASE_AUTOENCODER, base_autoencoder.train),
    "base_dit": Stage(base_dit.__doc__ or "", recipes.BASE_DIT, base_dit.train),
}


def run(stage: str, args: list[str]) -> int:
    """Train a stage as a command line says: a recipe's name, then changes of it; the exit code."""
    chosen = STAGES[stage]
    prog = f"python -m davae_core.training {stage}"
    return chosen.train(from_command_line(chosen.recipes, chosen.about, args, prog))
