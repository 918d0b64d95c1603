"""Train a KL autoencoder in the LDM layout from nothing: the base of the tiny models.

    python -m davae_core.training base_autoencoder micro --help

Writes base_autoencoder.safetensors, scaled so that the latent has the spread that its family's normalisation expects.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ... import bases, tiny
from ...autoencoder import Autoencoder, AutoencoderConfig
from ...checkpoints import files, metadata
from ...held_out import flat, reconstruction_errors
from ...history import History
from ...images import tile
from ..data.config import DataConfig
from ..data.draws import Draws
from ..objective import Reconstruction, ReconstructionConfig, sampled, start_certain, statistics
from ..run.config import OptimiserConfig, RunConfig
from ..run.launch import Images, Launch, launch
from ..run.task import Batch, Losses, Phase
from ..run.validation import SHEET_IMAGES


@dataclass(frozen=True)
class BaseAutoencoderRecipe:
    """A base autoencoder."""

    data: DataConfig
    run: RunConfig
    optimiser: OptimiserConfig = OptimiserConfig()
    losses: ReconstructionConfig = ReconstructionConfig(perceptual=0.0)
    model: AutoencoderConfig = AutoencoderConfig()
    family: str = ""
    """The base model whose units the latent is made for (sd1, sdxl, sd3, flux1, vavae); "" tells it from the shapes."""


class BaseAutoencoderPhase(Phase):
    """Image to a sample of its latent to image."""

    def __init__(self, model: Autoencoder, losses: ReconstructionConfig, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed
        self.losses = Reconstruction(losses)

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        x = batch["image"]
        moments = self.model.moments(x)
        noise = Draws(self.seed, step, batch["position"]).normal("latent", moments.chunk(2, dim=1)[0])
        return self.losses(x, self.model.decode(sampled(moments, noise)), moments)


class BaseAutoencoderTask:
    """Trains :class:`BaseAutoencoderPhase` and leaves a file in the LDM layout."""

    def __init__(self, recipe: BaseAutoencoderRecipe, images: Images) -> None:
        torch.manual_seed(recipe.run.seed)
        self.base = bases.base_of(recipe.model, recipe.family)
        self.model = Autoencoder(recipe.model)
        start_certain(self.model.quant_conv or self.model.encoder.conv_out)
        if recipe.run.compile:
            self.model.encoder.compile()
            self.model.decoder.compile()
        self.images = images
        phase = BaseAutoencoderPhase(self.model, recipe.losses, recipe.run.seed)
        self.distance = phase.losses.distance
        self.phases: dict[str, Phase] = {"autoencoder": phase}

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.phases["autoencoder"].to(device)

    def sheet(self, batch: Batch) -> torch.Tensor:
        """Images above their reconstructions; on the CPU, made one image after another."""
        x = batch["image"][:SHEET_IMAGES].split(1)
        return tile(
            [torch.cat(x).cpu(), torch.cat([self.model.decode(self.model.encode(one)).float().cpu() for one in x])]
        )

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """PSNR and, where the loss has one, perceptual distance of the reconstructions."""

        def reconstruct(x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"base": self.model.decode(self.model.encode(x))}

        images = (x for batch in batches for x in batch["image"].split(1))
        return flat(reconstruction_errors(images, reconstruct, [self.distance] if self.distance else []))

    def export(self, folder: Path, history: History) -> list[Path]:
        """The autoencoder in fp32, with the name of its family."""
        state = self.model.state_dict()
        if self.base.normalisation is not None:
            _, std = statistics(self.model.encode(x) for batch in self.images() for x in batch.split(1))
            spread = float(std.square().mean().sqrt())
            state = scaled(state, 1 / self.base.normalisation[1] / spread)
        family = {bases.BASE_KEY: self.base.name} if self.base.name else {}
        about = {"modelspec.title": "Base autoencoder", **family, **metadata.history_entry(history)}
        files.save(folder / tiny.BASE_AUTOENCODER, state, about)
        return [folder / tiny.BASE_AUTOENCODER]


def scaled(state: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """The same autoencoder with a latent ``factor`` times as large: folded into the two convolutions beside it."""
    state = dict(state)
    before, after = "encoder.conv_out", "decoder.conv_in"
    if "quant_conv.weight" in state:
        before, after = "quant_conv", "post_quant_conv"
    weight, bias = state[f"{before}.weight"].clone(), state[f"{before}.bias"].clone()
    channels = weight.shape[0] // 2  # means first, then log-variances
    weight[:channels] *= factor
    bias[:channels] *= factor
    bias[channels:] += 2 * torch.log(torch.tensor(factor))
    state[f"{before}.weight"], state[f"{before}.bias"] = weight, bias
    state[f"{after}.weight"] = state[f"{after}.weight"] / factor
    return state


def train(recipe: BaseAutoencoderRecipe, launch: Launch = launch) -> int:
    """Train on the images of the recipe; the exit code."""
    return launch(recipe, recipe.model.factor, BaseAutoencoderTask)
