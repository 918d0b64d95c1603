"""The stages of a training and the recipes that each of them knows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import recipes
from .run import heartbeat
from .run.config import from_command_line
from .run.launch import Launch, launch
from .tasks import adapter, autoencoder, base_autoencoder, base_dit, few_steps, predictor, tiny_decoder


@dataclass(frozen=True)
class Stage:
    """One kind of training.

    Attributes:
        about: the help text; its first line says what is trained.
        kind: the class of its recipes.
        recipes: name to (one line about it, recipe).
        train: hands a recipe's task to what trains it; gives the exit code.
    """

    about: str
    kind: type[Any]
    recipes: Mapping[str, tuple[str, Any]]
    train: Callable[[Any, Launch], int]


STAGES = {
    "autoencoder": Stage(
        autoencoder.__doc__ or "", autoencoder.AutoencoderRecipe, recipes.AUTOENCODER, autoencoder.train
    ),
    "adapter": Stage(adapter.__doc__ or "", adapter.AdapterRecipe, recipes.ADAPTER, adapter.train),
    "steps": Stage(few_steps.__doc__ or "", few_steps.FewStepsRecipe, recipes.FEW_STEPS, few_steps.train),
    "predictor": Stage(predictor.__doc__ or "", predictor.PredictorRecipe, recipes.PREDICTOR, predictor.train),
    "tiny_decoder": Stage(
        tiny_decoder.__doc__ or "", tiny_decoder.TinyDecoderRecipe, recipes.TINY_DECODER, tiny_decoder.train
    ),
    "base_autoencoder": Stage(
        base_autoencoder.__doc__ or "",
        base_autoencoder.BaseAutoencoderRecipe,
        recipes.BASE_AUTOENCODER,
        base_autoencoder.train,
    ),
    "base_dit": Stage(base_dit.__doc__ or "", base_dit.BaseDiTRecipe, recipes.BASE_DIT, base_dit.train),
}


def run(stage: str, args: list[str]) -> int:
    """Train a stage as a command line says: a recipe's name, then changes of it; the exit code."""
    chosen = STAGES[stage]
    prog = f"python -m davae_core.training {stage}"
    recipe = from_command_line(chosen.recipes, chosen.about, args, prog)
    heartbeat.at("reading the files that the recipe names")
    name = next((arg for arg in args if arg in chosen.recipes), "")
    with heartbeat.ending():
        return chosen.train(recipe, partial(launch, stage=stage, name=name))
