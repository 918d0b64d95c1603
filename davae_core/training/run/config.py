"""What all trainings have in common to configure, and the command line made of it."""

import ast
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, TypeVar

import tyro

from ... import bounds
from ...errors import DAVAEError
from ..data import entries

Precision = Literal["auto", "fp32", "bf16"]
Recipe = TypeVar("Recipe")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW, its learning rate over time, and the moving average of the weights."""

    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices and kernels; never on biases and norms."""
    clip: float = 1.0
    """Largest norm of the gradient; longer ones are scaled down to it. 0: none is."""
    warmup: int = 100
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stay, or fall to 0 at the last step along half a cosine."""
    ema: float = 0.999
    """Decay per step of the moving average of the weights, which is what is sampled and exported; 0 for none."""

    def __post_init__(self) -> None:
        bounds.at_least_0("optimiser.lr", self.lr)
        decays = all(0 <= beta < 1 for beta in self.betas)
        bounds.require("optimiser.betas", self.betas, decays, "two numbers from 0 to below 1")
        bounds.at_least_0("optimiser.weight-decay", self.weight_decay)
        bounds.require("optimiser.clip", self.clip, self.clip >= 0, "above 0, or 0 for a gradient of any length")
        bounds.require("optimiser.warmup", self.warmup, self.warmup >= 0, "a number of steps, at least 0")
        bounds.require("optimiser.ema", self.ema, 0 <= self.ema < 1, "from 0 (no average) to below 1")


@dataclass(frozen=True)
class RunConfig:
    """How long to train, on what, and what to write where."""

    out: Path = Path("output/training")
    """Folder of the run: state.safetensors, TensorBoard events, samples/, config.json (the settings) and at the end
    the exported files."""
    steps: int = 10_000
    """Optimiser steps in all. A resumed run may have more; with the cosine schedule it is then another run, because the
    learning rate of every step depends on it, and has to be meant (see run.change)."""
    batch: int = 64
    """Images per optimiser step, over all processes together."""
    micro_batch: int = 0
    """Images that one device takes at once; its share of the batch is cut into such parts. 0: the whole share."""
    seed: int = 0
    """Random seed. What step n sees and draws depends on the seed and n alone."""
    precision: Precision = "auto"
    """Precision of the forward and backward pass; weights and optimiser stay in fp32. auto: bf16 where the device is
    faster in it (GPUs, CPUs with AMX), fp32 elsewhere; a CPU that emulates bf16 is about thirty times slower in it."""
    compile: bool = False
    """Compile the model with torch.compile."""
    resume: bool = False
    """Go on from the state in `out`, exactly as if the run had not been interrupted."""
    change: tuple[str, ...] = ()
    """Settings that differ from the run that is resumed, on purpose: names as `optimiser.lr`, or of a group as
    `optimiser`."""
    save_minutes: float = 5.0
    """Time between two writings of the state; it is also written at the end and whenever the run is interrupted."""
    keep_every: int = 0
    """Steps between two checkpoints that stay: the state and the exported files, in a folder step_0040000; 0 for
    none."""
    keep_last: int = 0
    """Number of these checkpoints to keep, the newest ones; 0 keeps all."""
    log_every: int = 10
    """Steps between two points in TensorBoard."""
    sample_every: int = 500
    """Steps between two sheets of samples (PNG and TensorBoard); 0 for none. There is one at the end in any case."""
    validate_every: int = 500
    """Steps between two measurements on the held-out images (TensorBoard and validation.jsonl); 0 for none but those
    at the start and at the end. Without held-out images there are none."""
    validate_images: int = 256
    """Held-out images that are measured at most: the first ones, always the same."""
    prompts: Path | None = None
    """Text file with the prompts of the sample sheets, one a line, with "--d SEED" at the end for a seed other than
    the prompt's number. Without it the captions of the first held-out images are drawn, or those of the batch."""
    bad_steps: int = 20
    """A step whose loss or gradient is not finite is skipped; after this many in a row the training stops."""

    def __post_init__(self) -> None:
        if self.keep_every < 0 or self.keep_last < 0:
            raise DAVAEError(f"keep_every and keep_last must not be negative, got {self}")
        if self.steps < 1 or self.batch < 1 or self.micro_batch < 0 or self.log_every < 1 or self.bad_steps < 1:
            raise DAVAEError(f"steps, batch, log_every and bad_steps must be at least 1, got {self}")


# Fields that may differ between a run and its continuation: they do not change what a step computes, but for what
# :func:`differences` says of two of them.
FREE = {"run.out", "run.steps", "run.resume", "run.save_minutes", "run.log_every", "run.sample_every", "run.bad_steps"}
FREE |= {"run.validate_every", "run.validate_images", "run.prompts"}
FREE |= {"run.change", "run.keep_every", "run.keep_last"}
FREE |= {"run.micro_batch", "run.compile", "data.images", "data.workers", "data.cache", "data.max_broken"}
FREE |= {"gradient_checkpointing", "frozen", "file"}
STEPS, IMAGES = "run.steps", "data.images"


# Fields that name a file or folder, and those that name several with what holds for their images.
PLACES = {"run.out", "run.prompts", "base", "model", "autoencoder", "adapter", "text_encoder", "embeddings", "latents"}
PLACES |= {"start", "decoder", "redraw.model", "redraw.adapter", "redraw.text_encoder", "redraw.embeddings"}
ENTRIES = {"data.images", "data.held_out"}


def flat(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe as ``{"run.steps": 1000, ...}`` with JSON values."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            out |= flat(value, f"{prefix}{field.name}.")
        else:
            out[f"{prefix}{field.name}"] = value if isinstance(value, (int, float, str, type(None))) else str(value)
    return out


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A flat recipe as a file may tell it to anyone: of files and folders their names alone, not where they lie."""
    out = dict(settings)
    for name in PLACES & out.keys():
        out[name] = _name(out[name])
    for name in ENTRIES & out.keys():
        entries = [entry.partition("::") for entry in ast.literal_eval(out[name])]
        out[name] = str(tuple(f"{_name(place)}{mark}{rest}" for place, mark, rest in entries))
    return out


def _name(place: str | None) -> str | None:
    return place and PureWindowsPath(place).name  # of either system's paths


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """What keeps ``new`` from continuing a run of ``old``: a line for people, by the name of the setting.

    The number of steps counts where the learning rate falls along a cosine that ends with them. Of the entries of
    ``data.images`` what they say of their images counts, and not where these lie.
    """
    free = FREE - ({STEPS} if _falls(old) and _falls(new) else set())
    names = [name for name in {**old, **new} if name not in free and old.get(name) != new.get(name)]
    lines = {name: f"{name}: was {old.get(name)!r}, is {new.get(name)!r}" for name in names}
    if STEPS in lines:
        lines[STEPS] += ", which changes the learning rate of every step (optimiser.schedule is cosine)"
    was, now = (_entries(settings) for settings in (old, new))
    if was and now and was != now:
        lines[IMAGES] = f"{IMAGES}: was {old[IMAGES]}, is {new[IMAGES]}"
    return lines


def _falls(settings: Mapping[str, Any]) -> bool:
    return settings.get("optimiser.schedule") == "cosine"


def _entries(settings: Mapping[str, Any]) -> list[entries.Entry]:
    """What the entries of ``data.images`` say of their images; one where all say the same, however many there are."""
    texts = ast.literal_eval(settings[IMAGES]) if IMAGES in settings else ()
    said = [_said(text) for text in texts]
    return said[:1] if len(set(said)) == 1 else said


def _said(text: str) -> entries.Entry:
    try:
        return replace(entries.parse(text), place="")
    except DAVAEError:  # a place with such a name that was there and has moved
        return entries.Entry("")


def from_command_line(
    recipes: Mapping[str, tuple[str, Recipe]], description: str, args: list[str] | None, prog: str | None = None
) -> Recipe:
    """Let the user pick a recipe by name and change any field of it.

    Args:
        recipes: name to (one line about it, recipe).
        description: of the program.
        args: the command line; ``sys.argv`` when not given.
        prog: how the program is called, for its help.
    """
    return tyro.extras.overridable_config_cli(dict(recipes), description=description, args=args, prog=prog)
