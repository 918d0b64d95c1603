"""What a training needs: memory, arithmetic and time.

    python -m davae_core.training plan --gpus 8 --memory 80 --images 100k --size 1024

No file is read and nothing is computed: each phase of the training runs on tensors that have shapes alone, and what
they would take is counted. Leave a tenth of a GPU for libraries, for what kernels take for themselves and for gaps, as
the choice of the micro-batch here does.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import tyro

from ...errors import DAVAEError
from ..stages import STAGES
from .phases import Counted, count
from .skeletons import Recipe

USABLE = 0.9
PLANNED = ("sd3", "flux")  # how the names of the full-size recipes begin whose models' shapes are known here
TEXT_TOKENS = 77 + 256
FACTORS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class PlanConfig:
    """A training on GPUs."""

    gpus: int = 8
    """GPUs of all machines together."""
    memory: float = 80.0
    """Memory of one GPU in GB (10^9 bytes)."""
    images: str = "100k"
    """Images in the collection: a number, or one with k, M or B."""
    size: int = 0
    """Side of the images in pixels; 0: of the recipe."""
    recipe: str = ""
    """Recipe to plan: any at full size, for SD3 or FLUX.1. Without one: sd3_vae_f16, and sd35m_1024 or
    sd35m_2048, whichever is nearer in size."""
    micro_batch: int = 0
    """Images at once on one GPU; 0: as many as fit."""
    shard: bool = False
    """FSDP: weights, gradients and moments of stage 2 cut among the GPUs."""
    tflops: float = 989.0
    """What one GPU reaches at best in bf16, TFLOP/s: H100 SXM 989, A100 312, RTX 4090 165."""
    utilisation: float = 0.4
    """Share of it that a training reaches: an assumption, 0.3 to 0.5 is usual; measure the first hundred steps."""
    text: int = TEXT_TOKENS
    """Text tokens: 77 of CLIP and 256 of T5 in ComfyUI."""

    def __post_init__(self) -> None:
        if (
            min(self.gpus, self.text) < 1
            or min(self.memory, self.tflops, self.utilisation) <= 0
            or self.utilisation > 1
        ):
            raise DAVAEError(
                f"gpus and text must be at least 1, memory and tflops above 0, utilisation in (0, 1], got {self}"
            )


@dataclass(frozen=True)
class Plan:
    """A training, counted.

    Attributes:
        name, recipe: what is trained.
        counted: memory of one GPU and operations of one image.
        micro_batch: images at once.
        fits: whether the memory is enough.
    """

    name: str
    recipe: Recipe
    counted: Counted
    micro_batch: int
    fits: bool


def number(text: str) -> int:
    """``100k`` to 100000.

    Raises:
        DAVAEError: it is no such number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text.strip().lower())
    if match is None or not float(match.group(1)):
        raise DAVAEError(f"a number of images is like 50000, 100k or 1.5M, got {text!r}")
    return round(float(match.group(1)) * FACTORS[match.group(2)])


def plan(name: str, recipe: Recipe, config: PlanConfig) -> Plan:
    """Count a training, with the largest micro-batch that fits unless one is given.

    Raises:
        DAVAEError: the batch cannot be divided among the GPUs and micro-batches.
    """
    share, rest = divmod(recipe.run.batch, config.gpus)
    micro = config.micro_batch
    if rest or (micro and share % micro):
        raise DAVAEError(
            f"the batch of {recipe.run.batch} of {name} cannot be divided among {config.gpus} GPUs"
            f"{f' in parts of {micro} images' if micro else ''}: take a number of GPUs (--gpus) and a --micro-batch "
            "whose product divides it"
        )
    micro = micro or largest(recipe, share, config)
    counted = on_one(recipe, micro, config)
    return Plan(name, recipe, counted, micro, counted.most <= limit(config))


def largest(recipe: Recipe, share: int, config: PlanConfig) -> int:
    """The most images at once that fit, at least 1; what is guessed from the recipe's own number is counted."""
    choices = [part for part in range(1, share + 1) if share % part == 0]
    own = max(part for part in choices if part <= max(recipe.run.micro_batch, 1))
    counted = on_one(recipe, own, config, only_step=True)
    more = (limit(config) - counted.held - 2 * counted.trained) / counted.image
    for part in reversed([part for part in choices if part <= max(more, 1)]):
        if on_one(recipe, part, config).most <= limit(config):
            return part
    return 1


def limit(config: PlanConfig) -> float:
    """Bytes of a GPU that a training may take."""
    return USABLE * config.memory * 1e9


def on_one(recipe: Recipe, micro: int, config: PlanConfig, only_step: bool = False) -> Counted:
    """What one of the GPUs takes; a recipe that has nothing to shard stays whole."""
    counted = _count(recipe, micro, config.text, config.gpus > 1 and not config.shard, only_step)
    if not config.shard:
        return counted
    return counted.sharded(config.gpus) if counted.cut else counted


_count = cache(count)


def lines(made: Plan, config: PlanConfig) -> list[str]:
    """The plan as text."""
    run, size, counted = made.recipe.run, made.recipe.data.size, made.counted
    rows = [("", f"one GPU, {made.micro_batch} images at once", "")]
    rows.append((f"{counted.held / 1e9:.1f} GB", "held between the phases", "weights, gradients, moments, averages"))
    rows += [(f"{peak / 1e9:.1f} GB", name, PHASES[name]) for name, peak in counted.peaks.items()]
    verdict = "fits" if made.fits else "does NOT fit"
    share = f"{counted.most / config.memory / 1e9:.0%}"
    rows += [(share, f"of {config.memory:g} GB: {verdict}", f"limit {USABLE:.0%}"), ("", "", "")]
    flops = run.batch * counted.step
    seconds = flops / (config.gpus * config.tflops * 1e12 * config.utilisation)
    hours, images = run.steps * seconds / 3600, number(config.images)
    exchanged = 2 * (config.gpus - 1) / config.gpus * 4 * counted.trained
    rows += [
        ("", "arithmetic", ""),
        (human(counted.forward, "FLOP"), "forward pass of one image", "with what encodes it"),
        (human(counted.step, "FLOP"), "training step of one image", "with backward and recomputed passes"),
        (human(flops, "FLOP"), "a step", f"batch {run.batch}"),
        ("", "", ""),
        ("", f"{config.gpus} GPUs", ""),
        (f"{seconds:.3g} s", "a step", f"/ ({config.gpus} x {config.tflops:g} TFLOP/s x {config.utilisation:g})"),
        (human(exchanged, "B"), "exchanged by each GPU a step", f"2 (n - 1) / n x 4 x {counted.trained:,} trained"),
        (f"{images / run.batch * seconds / 3600:.3g} h", f"a pass over {images:,} images", "images / batch x step"),
        (f"{run.steps * run.batch / images:.3g}", "passes", f"{run.steps:,} steps x batch / images"),
        (f"{hours:.3g} h", "in all", f"{run.steps:,} steps"),
        (f"{hours * config.gpus / 24:.3g}", "GPU-days", "hours x GPUs / 24"),
    ]
    head = f"{made.name}: {size} px, batch {run.batch} = {config.gpus} GPUs x {run.batch // config.gpus} images"
    return [head, "", *(f"{value:>16}  {name:<36} {about}".rstrip() for value, name, about in rows), ""]


PHASES = {
    "step": "a micro-batch forward and backward, and the optimiser's step",
    "sheet": "samples, with the averaged weights beside the others",
    "statistics": "of the detail latent, in fp32",
    "export": "",
}


def human(value: float, unit: str) -> str:
    """``10816000000, "FLOP"`` to ``10.8 GFLOP``."""
    for factor, prefix in UNITS:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def chosen(config: PlanConfig) -> dict[str, Recipe]:
    """The recipes to plan, at the size that is asked for.

    Raises:
        DAVAEError: there is no recipe of that name.
    """
    known: dict[str, Recipe] = {
        name: recipe
        for stage in ("autoencoder", "adapter", "steps", "predictor", "tiny_decoder")
        for name, (_, recipe) in STAGES[stage].recipes.items()
        if name.startswith(PLANNED)
    }
    second: Literal["sd35m_1024", "sd35m_2048"] = "sd35m_2048" if config.size > 1448 else "sd35m_1024"
    names = [config.recipe] if config.recipe else ["sd3_vae_f16", second]
    if not set(names) <= known.keys():
        raise DAVAEError(f"there is no recipe {config.recipe!r} to plan; choose one of {', '.join(sorted(known))}")
    size = config.size
    if size % 32:
        raise DAVAEError(f"the size {size} is not a multiple of 32; use {size // 32 * 32} or {size // 32 * 32 + 32}")
    found = {name: known[name] for name in names}
    return {n: replace(r, data=replace(r.data, size=size)) if size else r for n, r in found.items()}


def main(args: list[str] | None = None) -> int:
    """Print the plan."""
    config = tyro.cli(PlanConfig, description=__doc__, args=args)
    number(config.images)  # said before anything is counted
    plans = [plan(name, recipe, config) for name, recipe in chosen(config).items()]
    for made in plans:
        print("\n".join(lines(made, config)))
    return 0 if all(made.fits for made in plans) else 1
