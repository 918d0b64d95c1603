"""Train a KL autoencoder in the SD3 VAE's layout from nothing: the base of the tiny models.

    python -m davae_core.training.base_autoencoder micro --help

Writes base_autoencoder.safetensors, scaled so that the latent has the spread that SD3's normalisation expects.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..autoencoder import Autoencoder, AutoencoderConfig
from ..checkpoints import files
from ..latent import BASE_NORMALISATION
from . import pretrained, script
from .config import OptimiserConfig, RunConfig, from_command_line
from .data import DataConfig
from .draws import Draws
from .losses import Reconstruction, ReconstructionConfig, sampled, start_certain
from .report import tile
from .task import Batch, Losses, Phase

FILE = "base_autoencoder.safetensors"


@dataclass(frozen=True)
class BaseAutoencoderRecipe:
    """A base autoencoder."""

    data: DataConfig
    run: RunConfig
    optimiser: OptimiserConfig = OptimiserConfig()
    losses: ReconstructionConfig = ReconstructionConfig(perceptual=0.0)
    model: AutoencoderConfig = AutoencoderConfig()


class BaseAutoencoderPhase(Phase):
    """Image to a sample of its latent to image."""

    def __init__(self, model: Autoencoder, losses: ReconstructionConfig, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed
        self.losses = Reconstruction(losses)

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        x = batch["image"]
        moments = self.model.encoder(x)
        noise = Draws(self.seed, step, batch["position"]).normal("latent", moments.chunk(2, dim=1)[0])
        return self.losses(x, self.model.decoder(sampled(moments, noise)), moments)


class BaseAutoencoderTask:
    """Trains :class:`BaseAutoencoderPhase` and leaves a file in the SD3 VAE's layout."""

    def __init__(self, recipe: BaseAutoencoderRecipe, images: script.Images) -> None:
        torch.manual_seed(recipe.run.seed)
        self.model = Autoencoder(recipe.model)
        start_certain(self.model.encoder.conv_out)
        if recipe.run.compile:
            self.model.encoder.compile()
            self.model.decoder.compile()
        self.images = images
        self.phases: dict[str, Phase] = {
            "autoencoder": BaseAutoencoderPhase(self.model, recipe.losses, recipe.run.seed)
        }

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.phases["autoencoder"].to(device)

    def sheet(self, batch: Batch) -> torch.Tensor:
        """Images above their reconstructions."""
        x = batch["image"][:8]
        return tile([x, self.model.decode(self.model.encode(x)).float()])

    def export(self, folder: Path) -> list[Path]:
        """The autoencoder in fp32."""
        _, std = script.statistics(self.model.encode(x) for x in self.images())
        spread = float(std.square().mean().sqrt())
        wanted = 1 / BASE_NORMALISATION[self.model.config.latent_channels][1]
        state = scaled(self.model.state_dict(), wanted / spread)
        files.save(folder / FILE, state, {"modelspec.title": "Base autoencoder"})
        return [folder / FILE]


def scaled(state: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """The same autoencoder with a latent ``factor`` times as large: folded into the two convolutions beside it."""
    state = dict(state)
    weight, bias = state["encoder.conv_out.weight"].clone(), state["encoder.conv_out.bias"].clone()
    channels = weight.shape[0] // 2  # means first, then log-variances
    weight[:channels] *= factor
    bias[:channels] *= factor
    bias[channels:] += 2 * torch.log(torch.tensor(factor))
    state["encoder.conv_out.weight"], state["encoder.conv_out.bias"] = weight, bias
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"] / factor
    return state


def load(path: Path) -> Autoencoder:
    """The autoencoder in a file in the SD3 VAE's layout, or in a checkpoint that holds one."""
    state = pretrained.autoencoder(path)
    model = Autoencoder(AutoencoderConfig.from_state_dict(state))
    model.load_state_dict(state)
    return model.eval()


def main(args: list[str] | None = None) -> int:
    """Train from the command line."""
    from .recipes import BASE_AUTOENCODER

    recipe = from_command_line(BASE_AUTOENCODER, __doc__, args)
    return script.launch(recipe, recipe.model.factor, lambda images: BaseAutoencoderTask(recipe, images))


if __name__ == "__main__":
    script.main(main)
