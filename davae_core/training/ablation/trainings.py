"""The trainings of a variant: changes of the tiny family's recipes, run by the same code as by hand."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ... import checkpoints, tiny
from ...checkpoints import foreign_json
from ...errors import DAVAEError
from ...evaluation import figures
from .. import residual, stages
from ..data import stored_latents
from ..run import folder
from ..run.launch import launch
from ..run.loop import FINISHED
from .budget import BenchConfig
from .variants import Changes, Variant

RECIPES = "micro"  # of which the variants are changes
RESIDUAL = "residual.safetensors"  # the given DA-VAE with the given predictor inside


class Stopped(Exception):
    """A training was stopped; its state is saved, and the bench goes on from it."""


@dataclass(frozen=True)
class Checkpoint:
    """A file that a training has left on its way, and at which step."""

    step: int
    path: Path


def changed(recipe: Any, changes: Changes) -> Any:
    """A recipe with settings replaced by dotted name.

    Raises:
        DAVAEError: it has no such setting.
    """
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if head not in ({field.name for field in fields(recipe)} if is_dataclass(recipe) else ()):
            raise DAVAEError(f"{type(recipe).__name__} has no setting {name!r}")
        recipe = replace(recipe, **{head: changed(getattr(recipe, head), {rest: value}) if rest else value})
    return recipe


def stage_1(config: BenchConfig, variant: Variant, seed: int, out: Path) -> list[Checkpoint]:
    """Train a DA-VAE with a new detail branch from the given one's decoder, or that decoder alone.

    Raises:
        Stopped: by a signal.
    """
    alone = variant.group == "decoder"
    recipe = stages.STAGES["autoencoder"].recipes[f"{RECIPES}-robust" if alone else RECIPES][1]
    steps = config.steps.decoder if alone else config.steps.latent
    recipe = changed(recipe, {
        **_common(config, seed, out, steps, config.latent_batch, ("train", "other")),
        "base": config.autoencoder,
        "start": config.autoencoder if alone else None,
        "decoder": None if alone else config.autoencoder,
        "run.keep_every": 0,
        **variant.autoencoder,
    })  # fmt: skip
    return _run("autoencoder", recipe, tiny.AUTOENCODER)


def stage_2(config: BenchConfig, variant: Variant, seed: int, out: Path, autoencoder: Path) -> list[Checkpoint]:
    """Train an adapter from zero.

    Raises:
        Stopped: by a signal.
    """
    recipe = stages.STAGES["adapter"].recipes[RECIPES][1]
    stored = latents(config, autoencoder) if autoencoder == given(config, variant) else None
    steps = config.steps.adapter
    recipe = changed(recipe, {
        **_common(config, seed, out, steps, config.batch, ("train",)),
        "model": config.model,
        "text_encoder": config.text_encoder,
        "autoencoder": autoencoder,
        "latents": stored,
        "keep_latents": stored is None,
        "detail_warmup": steps // 3,
        "recommended.size": side(config),
        "run.compile": config.compile,
        "run.keep_every": steps // config.checkpoints,
        **variant.adapter,
    })  # fmt: skip
    return _run("adapter", recipe, tiny.ADAPTER)


def prepare(config: BenchConfig, variants: Sequence[Variant], settings: Mapping[str, Any]) -> None:
    """Compute the latents of the training pictures that adapters are trained on, or what is missing of them, and before
    that the DA-VAE with a predictor inside, where a variant asks for it.

    Args:
        config: the bench.
        variants: what it runs.
        settings: its settings, with hashes; the DA-VAE with a predictor inside is made anew where it is of others.
    """
    adapter = stages.STAGES["adapter"].recipes[RECIPES][1]
    data = replace(adapter.data, images=(str(config.images / "train"),), size=side(config))
    for autoencoder in dict.fromkeys(given(config, variant) for variant in variants if variant.group == "adapter"):
        made_of = {name: settings.get(name) for name in ("autoencoder", "predictor", "images", "size")}
        if autoencoder != config.autoencoder and not _made_of(autoencoder, made_of):
            parts = [config.images / part for part in ("train", "other")]
            everything = replace(data, images=tuple(str(part) for part in parts if part.is_dir()))
            residual.write(
                residual.ResidualConfig(everything, config.autoencoder, config.predictor, autoencoder, device="cpu")
            )
            shutil.rmtree(latents(config, autoencoder), ignore_errors=True)  # of the one before
            figures.write_json(autoencoder.with_suffix(".json"), made_of)
        asked = stored_latents.LatentsConfig(data, autoencoder, latents(config, autoencoder), dtype="fp32")
        stored_latents.compute(asked)


def _made_of(autoencoder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the DA-VAE with a predictor inside is there, and was made of these files and pictures."""
    told = autoencoder.with_suffix(".json")
    return autoencoder.is_file() and told.is_file() and foreign_json.read(told) == settings


def given(config: BenchConfig, variant: Variant) -> Path:
    """The DA-VAE that a variant begins with."""
    return config.out / RESIDUAL if variant.residual else config.autoencoder


def latents(config: BenchConfig, autoencoder: Path) -> Path:
    """Where the latents of a DA-VAE that variants begin with are."""
    return config.out / ("latents_residual" if autoencoder == config.out / RESIDUAL else "latents")


def side(config: BenchConfig) -> int:
    """Of the pictures, in pixels: what the given adapter draws.

    Raises:
        DAVAEError: its file does not say.
    """
    size = checkpoints.load_adapter(config.adapter).config.recommended.size
    if not size:
        raise DAVAEError(f"{config.adapter} does not recommend a size; give an adapter that does (--adapter)")
    return size


def _common(
    config: BenchConfig, seed: int, out: Path, steps: int, batch: int, parts: tuple[str, ...]
) -> dict[str, Any]:
    there = tuple(str(config.images / part) for part in parts if (config.images / part).is_dir())
    return {
        "data.images": there,
        "data.size": side(config),
        "run.out": out,
        "run.steps": steps,
        "run.batch": batch,
        "run.seed": seed,
        "run.precision": config.precision,
        "run.resume": True,
        "run.sample_every": 0,
        "run.save_minutes": 2.0,
    }


def _run(stage: str, recipe: Any, file: str) -> list[Checkpoint]:
    """Train, unless that is finished; the file at each checkpoint, the last one's in the folder of the run."""
    out, steps, every = recipe.run.out, recipe.run.steps, recipe.run.keep_every
    if not (out / file).is_file():
        code = stages.STAGES[stage].train(recipe, partial(launch, stage=stage, name=RECIPES))
        if code != FINISHED:
            raise Stopped
    between = [Checkpoint(n, folder.checkpoint(out, n) / file) for n in range(every, steps, every)] if every else []
    return [*(point for point in between if point.path.is_file()), Checkpoint(steps, out / file)]
