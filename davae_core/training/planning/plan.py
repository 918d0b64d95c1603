"""What a training needs: arithmetic, memory and time, each figure with the formula it is counted by.

    python -m davae_core.training plan --gpus 8 --memory 80 --images 100k --size 1024

Nothing is run and no file is read. Memory is that of tensors: leave a tenth of a GPU for the libraries and for gaps, as
the choice of the micro-batch here does.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

import tyro

from ...autoencoder import AutoencoderConfig
from ...errors import DAVAEError
from ...latent import LatentSpec
from ...mmdit import MMDiTConfig
from ..stages import STAGES
from ..tasks.adapter import AdapterRecipe
from ..tasks.autoencoder import AutoencoderRecipe
from . import dit, vae
from .terms import Bytes, Flops, human, peak

USABLE = 0.9
TEXT_TOKENS = 77 + 256
FACTORS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
Recipe = AdapterRecipe | AutoencoderRecipe


@dataclass(frozen=True)
class PlanConfig:
    """A training on GPUs."""

    gpus: int = 8
    """GPUs of all machines together."""
    memory: float = 80.0
    """Of one GPU, in GB (10^9 bytes)."""
    images: str = "100k"
    """Images in the collection: a number, or one with k, M or B."""
    size: int = 0
    """Side of the images in pixels; 0: of the recipe."""
    recipe: str = ""
    """A recipe of stage 1 or 2; without one: sd3_vae_f16, and sd35m_1024 or sd35m_2048, whichever is nearer in size."""
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
        recipe: name and settings.
        flops: of one image in one step.
        memory: of one GPU.
        trained: parameters.
        micro_batch: images at once.
        fits: whether the memory is enough.
    """

    name: str
    recipe: Recipe
    flops: list[Flops]
    memory: list[Bytes]
    trained: int
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


def stage1(recipe: AutoencoderRecipe) -> vae.Stage1:
    """The shapes of a recipe on the SD3 VAE."""
    base = AutoencoderConfig()
    return vae.Stage1(
        base,
        LatentSpec(base.latent_channels, recipe.detail_channels, recipe.scale),
        recipe.data.size**2,
        bf16=recipe.run.precision == "bf16",
        recompute=recipe.gradient_checkpointing,
        perceptual=recipe.losses.perceptual > 0,
    )


def stage2(recipe: AdapterRecipe, text: int) -> dit.Stage2:
    """The shapes of a recipe on SD3.5-medium and an f16 DA-VAE."""
    model, latent = MMDiTConfig(), LatentSpec()
    side = recipe.data.size // (latent.factor * model.patch)
    return dit.Stage2(
        model,
        latent,
        tokens=side**2,
        text=text,
        rank=recipe.rank,
        targets=recipe.targets,
        bf16=recipe.frozen == "bf16",
        recompute=recipe.gradient_checkpointing,
    )


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
    choices = [micro] if micro else [part for part in range(share, 0, -1) if share % part == 0]
    for part in choices:
        flops, memory, trained = count(recipe, config, part)
        fits = peak(memory) <= USABLE * config.memory * 1e9
        if fits:
            break
    return Plan(name, recipe, flops, memory, trained, part, fits)


def count(recipe: Recipe, config: PlanConfig, micro: int) -> tuple[list[Flops], list[Bytes], int]:
    """Operations of one image, bytes of one GPU and trained parameters."""
    if isinstance(recipe, AutoencoderRecipe):
        shape = stage1(recipe)
        return vae.flops(shape), vae.memory(shape, micro), vae.parameters(shape)[1]
    adapted = stage2(recipe, config.text)
    davae = vae.Stage1(pixels=recipe.data.size**2, bf16=adapted.bf16, perceptual=False)
    held = sum(vae.parameters(davae))
    encoders = [replace(term, backward=0.0, again=0.0) for term in vae.flops(davae)[:3]]
    memory = dit.memory(adapted, micro, config.gpus, config.shard)
    memory += [Bytes("DA-VAE, which encodes the images", f"{held:,} x 4", held * 4.0), vae.encoding(davae, micro)]
    return dit.flops(adapted) + encoders, memory, dit.parameters(adapted)[1]


def lines(made: Plan, config: PlanConfig) -> list[str]:
    """The plan as text."""
    run, size = made.recipe.run, made.recipe.data.size
    forward, step = (sum(values) for values in ([f.forward for f in made.flops], [f.step for f in made.flops]))
    rows = [("", "one image, forward -> a step of training", "")]
    for term in made.flops:
        rows.append((f"{human(term.forward, 'FLOP')} -> {human(term.step, 'FLOP')}", term.name, term.formula))
    rows += [(f"{human(forward, 'FLOP')} -> {human(step, 'FLOP')}", "together", "sum"), ("", "", "")]
    rows.append(("", f"one GPU, {made.micro_batch} images at once", ""))
    for held in made.memory:
        rows.append((f"{held.count / 1e9:.2f} GB", f"{held.name} ({held.when})", held.formula))
    most = peak(made.memory) / 1e9
    rows.append((f"{most:.1f} GB", "at most", "always + max(encoding, training + max(loss, backward))"))
    verdict = "fits" if made.fits else "does NOT fit"
    rows += [
        (f"{most / config.memory:.0%}", f"of {config.memory:g} GB: {verdict}", f"limit {USABLE:.0%}"),
        ("", "", ""),
    ]
    seconds = run.batch * step / (config.gpus * config.tflops * 1e12 * config.utilisation)
    hours, images = run.steps * seconds / 3600, number(config.images)
    exchanged = 2 * (config.gpus - 1) / config.gpus * 4 * made.trained
    rows += [
        ("", f"{config.gpus} GPUs", ""),
        (human(run.batch * step, "FLOP"), "a step", f"batch {run.batch} x {human(step, 'FLOP')}"),
        (f"{seconds:.3g} s", "a step", f"/ ({config.gpus} x {config.tflops:g} TFLOP/s x {config.utilisation:g})"),
        (human(exchanged, "B"), "exchanged by each GPU a step", f"2 (n - 1) / n x 4 x {made.trained:,}"),
        (f"{images / run.batch * seconds / 3600:.3g} h", f"a pass over {images:,} images", "images / batch x step"),
        (f"{run.steps * run.batch / images:.3g}", "passes", f"{run.steps:,} steps x batch / images"),
        (f"{hours:.3g} h", "in all", f"{run.steps:,} steps"),
        (f"{hours * config.gpus / 24:.3g}", "GPU-days", "hours x GPUs / 24"),
    ]
    head = f"{made.name}: {size} px, batch {run.batch} = {config.gpus} GPUs x {run.batch // config.gpus} images"
    return [head, "", *(f"{value:>24}  {name:<52} {formula}".rstrip() for value, name, formula in rows), ""]


def chosen(config: PlanConfig) -> dict[str, Recipe]:
    """The recipes to plan, at the size that is asked for.

    Raises:
        DAVAEError: there is no recipe of that name.
    """
    known: dict[str, Recipe] = {
        name: recipe
        for stage in ("autoencoder", "adapter")
        for name, (_, recipe) in STAGES[stage].recipes.items()
        if name.startswith("sd3")
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
    plans = [plan(name, recipe, config) for name, recipe in chosen(config).items()]
    for made in plans:
        print("\n".join(lines(made, config)))
    return 0 if all(made.fits for made in plans) else 1
