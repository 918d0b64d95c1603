"""Train a predictor of the detail: from the base latents of pictures alone, no captions and no diffusion model.

    python -m davae_core.training predictor micro --help

Writes a predictor file for the DA-VAE that it was trained with.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ... import bases, bounds, checkpoints, tiny
from ...davae import DAVAE
from ...errors import DAVAEError
from ...held_out import flat, reconstruction_errors
from ...history import History, Identity, Role, identity
from ...images import tile
from ...metrics import resize_bicubic
from ...perceptual import PerceptualDistance
from ...predictor import GROUPS, DetailPredictor, PredictorConfig
from ..data.config import DataConfig
from ..data.draws import Draws
from ..data.latents import LatentCache
from ..data.varied import varied
from ..objective import Reconstruction, ReconstructionConfig
from ..run.config import OptimiserConfig, RunConfig
from ..run.launch import Images, Launch, launch
from ..run.task import Batch, Losses, Phase
from ..run.validation import SHEET_IMAGES
from . import pieces
from .adapted import units
from .begin import check_family
from .recompute import blocks_of, recompute


@dataclass(frozen=True)
class PredictorRecipe:
    """A predictor for a DA-VAE."""

    data: DataConfig
    run: RunConfig
    autoencoder: Path
    """File of the DA-VAE."""
    family: str | None = None
    """Base model whose VAE the DA-VAE must stand on: sd1, sdxl, sd3, flux1 or vavae; without it any is taken."""
    start: Path | None = None
    """Predictor file whose weights the run starts from; otherwise from nothing."""
    optimiser: OptimiserConfig = OptimiserConfig(lr=1e-3, schedule="cosine")
    width: int = 128
    """Channels inside, a multiple of 32."""
    blocks: int = 6
    """Residual blocks."""
    latent: float = 1.0
    """Weight of the squared error of the latent, in the diffusion model's units."""
    losses: ReconstructionConfig = ReconstructionConfig(l1=1.0, perceptual=1.0, kl=0.0)
    """Losses of the picture that the frozen decoder makes of base and predicted detail; none is made where l1, l2 and
    perceptual are 0."""
    base_noise: float = 0.3
    """Most noise that is added to the base, in standard deviations; its level is drawn for each sample from 0 to this.
    Drawn latents are not those of pictures."""
    vary: bool = False
    """Turn, mirror and move the images and exchange their colours: for small sets, whose images would be remembered
    instead."""
    variants: int = 0
    """With --vary, how many variants an image has, itself among them, so that their latents can be kept; 0: another
    every time."""
    keep_latents: bool = False
    """Keep the latents of all images in memory."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the decoder's blocks for the backward pass and compute the rest again: less memory, more
    time."""
    file: str = tiny.PREDICTOR
    """Name of the file that the run leaves in its folder."""


class PredictorPhase(Phase):
    """Base, noised, to detail; and the picture of both."""

    def __init__(
        self, model: DetailPredictor, davae: DAVAE, recipe: PredictorRecipe, loss: Reconstruction | None
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.loss = model, recipe, loss
        self._davae = (davae,)  # in a tuple: not a submodule, it is not trained
        self.latents = LatentCache(self.encode, recipe.keep_latents)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images to latents in the diffusion model's units."""
        (davae,) = self._davae
        return davae.latent.normalise(pieces.encode(davae, x).float())

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        (davae,), recipe = self._davae, self.recipe
        draws = Draws(recipe.run.seed, step, batch["position"])
        image = varied(batch["image"], draws, recipe.variants) if recipe.vary else batch["image"]
        base, detail = davae.latent.split(self.latents(image))
        level = recipe.base_noise * draws.uniform("level").to(base).view(-1, 1, 1, 1)
        base = base + level * draws.normal("noise", base)
        predicted = self.model(base).float()
        error = (predicted - detail).square().mean()
        losses = {"loss": recipe.latent * error, "latent": error}
        if self.loss is not None:
            y = davae.decode(davae.latent.denormalise(torch.cat([base, predicted], dim=1)))
            parts = self.loss(image, y)
            losses = losses | parts | {"loss": losses["loss"] + parts["loss"]}
        return losses


@dataclass
class Parts:
    """What a predictor is trained with.

    Attributes:
        davae: in fp32.
        start: a predictor to start from.
        distance: the perceptual distance; None loads the recipe's, if it has one.
        of: what these are to the file that is made.
    """

    davae: DAVAE
    start: DetailPredictor | None = None
    distance: PerceptualDistance | None = None
    of: dict[Role, Identity] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: PredictorRecipe) -> "Parts":
        """Out of the recipe's files."""
        davae = checkpoints.load_autoencoder(recipe.autoencoder, torch.float32)
        if davae.predictor is not None:
            raise DAVAEError(
                f"{recipe.autoencoder.name} has a predictor inside: its latent holds what that does not expect, and "
                "another would have nothing to tell; give the DA-VAE it was made from"
            )
        if recipe.family:
            check_family(davae.latent, bases.base_of(davae.config.base, recipe.family), recipe.autoencoder.name)
        of: dict[Role, Identity] = {"davae": identity("davae", davae.state_dict(), recipe.autoencoder.name)}
        if recipe.start is None:
            return cls(davae, of=of)
        start = checkpoints.load_predictor(recipe.start, torch.float32)
        return cls(davae, start, of=of | {"start": Identity(recipe.start.name)})


class PredictorTask:
    """Trains :class:`PredictorPhase` and leaves a predictor.

    Args:
        recipe: all settings.
        images: of the data; nothing is measured on them.
        parts: what is trained with; the recipe's files where it is not given.
    """

    def __init__(self, recipe: PredictorRecipe, images: Images, parts: Parts | None = None) -> None:
        check_settings(recipe)
        torch.manual_seed(recipe.run.seed)
        self.recipe = recipe
        parts = parts or Parts.read(recipe)
        self.davae, self.of = parts.davae.requires_grad_(False), parts.of
        self.model = DetailPredictor(PredictorConfig(self.davae.latent, recipe.width, recipe.blocks))
        if parts.start is not None:
            check_continues(parts.start.config, self.model.config)
            self.model.load_state_dict(parts.start.state_dict())
        if recipe.gradient_checkpointing:
            recompute(blocks_of(self.davae.decoder))
        if recipe.run.compile:
            self.model.compile()
        config = recipe.losses
        loss = Reconstruction(config, parts.distance) if config.l1 or config.l2 or config.perceptual else None
        self.distance = loss.distance if loss is not None else None
        self.phases: dict[str, Phase] = {"predictor": PredictorPhase(self.model, self.davae, recipe, loss)}

    def to(self, device: torch.device) -> None:
        """Move the predictor and the DA-VAE."""
        self.phases["predictor"].to(device)
        self.davae.to(device)

    def sheet(self, batch: Batch) -> torch.Tensor:
        """Images; bicubic enlargement, no detail, predicted detail, true detail. On the CPU, one after another."""
        columns = [list(self._shown(x)) for x in batch["image"][:SHEET_IMAGES].split(1)]
        return tile([torch.cat([row.cpu() for row in rows]) for rows in zip(*columns)])

    def _shown(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield x
        yield from self._reconstructed(x).values()

    @torch.no_grad()
    def _reconstructed(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z, spec = pieces.encode(self.davae, x).float(), self.davae.latent
        base, _ = spec.split(z)
        small = self.davae.decode_base(base).float().clamp(-1, 1)
        return {
            "base_bicubic": resize_bicubic(small, spec.scale),
            "detail_0": pieces.decode(self.davae, z, 0.0).float(),
            "predicted": pieces.decode(self.davae, self.model.complete(base)).float(),
            "davae": pieces.decode(self.davae, z).float(),
        }

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """PSNR and perceptual distance of pictures with predicted detail, and beside it with none and the true one."""
        images = (x for batch in batches for x in batch["image"].split(1))
        return flat(reconstruction_errors(images, self._reconstructed, [self.distance] if self.distance else []))

    def export(self, folder: Path, history: History) -> list[Path]:
        """The predictor in fp32."""
        path = folder / self.recipe.file
        checkpoints.save_predictor(path, self.model, history=replace(history, of=self.of))
        return [path]


def check_settings(recipe: PredictorRecipe) -> None:
    """Raise DAVAEError where a setting makes no sense or two contradict each other."""
    width, fits = recipe.width, recipe.width > 0 and recipe.width % GROUPS == 0
    bounds.require("width", width, fits, f"a multiple of {GROUPS}, as {GROUPS * max(1, round(width / GROUPS))}")
    bounds.require("blocks", recipe.blocks, recipe.blocks >= 0, "at least 0")
    if recipe.variants < 0:
        raise DAVAEError(f"--variants is a number of at least 0, got {recipe.variants}")
    if recipe.vary and recipe.keep_latents and not recipe.variants:
        raise DAVAEError(
            "variants that are others every time cannot be kept, memory would fill up: give a number of them "
            "(--variants 3) or --no-keep-latents"
        )


def check_continues(start: PredictorConfig, wanted: PredictorConfig) -> None:
    """Raise DAVAEError unless a run may go on from a predictor of the shape and units of ``start``."""
    if (start.width, start.blocks) != (wanted.width, wanted.blocks):
        raise DAVAEError(
            f"the predictor to start from (--start) has width {start.width} and {start.blocks} block(s), expected "
            f"{wanted.width} and {wanted.blocks}; give its --width and --blocks"
        )
    here, there = (torch.tensor(units(config.latent)) for config in (start, wanted))
    if len(here) != len(there) or not torch.allclose(here, there, rtol=1e-3, atol=1e-4):
        raise DAVAEError(
            "the predictor to start from (--start) is for another DA-VAE: the units of its base or its detail "
            "differ from those of --autoencoder; give the DA-VAE it was trained with"
        )


def train(recipe: PredictorRecipe, launch: Launch = launch) -> int:
    """Train on the images of the recipe; the exit code."""
    return launch(recipe, checkpoints.load_autoencoder(recipe.autoencoder).latent.factor, PredictorTask)
