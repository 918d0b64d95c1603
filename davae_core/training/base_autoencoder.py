"""Train a KL autoencoder in the LDM layout from nothing: the base of the tiny models.

    python -m davae_core.training.base_autoencoder micro --help

Writes base_autoencoder.safetensors, scaled so that the latent has the spread that its family's normalisation expects.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from .. import bases
from ..autoencoder import Autoencoder, AutoencoderConfig
from ..checkpoints import files
from ..checkpoints.opening import open_any
from ..errors import CheckpointError
from . import script
from .config import OptimiserConfig, RunConfig, from_command_line
from .data import DataConfig
from .draws import Draws
from .losses import Reconstruction, ReconstructionConfig, sampled, start_certain
from .report import tile
from .task import Batch, Losses, Phase

FILE = "base_autoencoder.safetensors"
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True)
class BaseAutoencoderRecipe:
    """A base autoencoder."""

    data: DataConfig
    run: RunConfig
    optimiser: OptimiserConfig = OptimiserConfig()
    losses: ReconstructionConfig = ReconstructionConfig(perceptual=0.0)
    model: AutoencoderConfig = AutoencoderConfig()
    family: str = ""
    """The base model whose units the latent is made for (sd1, sdxl, sd3, vavae); "" tells it from the shapes."""


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

    def __init__(self, recipe: BaseAutoencoderRecipe, images: script.Images) -> None:
        torch.manual_seed(recipe.run.seed)
        self.base = bases.base_of(recipe.model, recipe.family)
        self.model = Autoencoder(recipe.model)
        start_certain(self.model.quant_conv or self.model.encoder.conv_out)
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
        """The autoencoder in fp32, with the name of its family."""
        state = self.model.state_dict()
        if self.base.normalisation is not None:
            _, std = script.statistics(self.model.encode(x) for x in self.images())
            spread = float(std.square().mean().sqrt())
            state = scaled(state, 1 / self.base.normalisation[1] / spread)
        family = {bases.BASE_KEY: self.base.name} if self.base.name else {}
        files.save(folder / FILE, state, {"modelspec.title": "Base autoencoder", **family})
        return [folder / FILE]


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


def load(path: Path) -> Autoencoder:
    """The VAE in a file or folder of any layout (alone, in a whole checkpoint, of diffusers); in fp32.

    Of a whole checkpoint no more than the VAE is read.

    Raises:
        CheckpointError: the file cannot be read or holds no such autoencoder.
    """
    opened = open_any(path)
    if "vae" not in opened.parts:
        raise CheckpointError(
            f"{path.name} holds no VAE that a DA-VAE can be made on: it is {opened.detected.description}"
        )
    stored = opened.parts["vae"].native
    state = {name: stored[name].float() for name in stored if name.startswith(PARTS)}
    try:
        model = Autoencoder(AutoencoderConfig.from_state_dict(state))
        model.load_state_dict(state)
    except (CheckpointError, RuntimeError) as problem:
        told = " ".join(line.strip() for line in str(problem).splitlines()[:3])
        raise CheckpointError(f"{path.name} holds no VAE that a DA-VAE can be made on: {told}") from problem
    return model.eval()


def base_of_file(path: Path, config: AutoencoderConfig, family: str = "") -> bases.Base:
    """Which base model the VAE in a file belongs to, see :func:`davae_core.bases.base_of`."""
    return bases.base_of(config, family, dict(open_any(path).told))


def main(args: list[str] | None = None) -> int:
    """Train from the command line."""
    from .recipes import BASE_AUTOENCODER

    recipe = from_command_line(BASE_AUTOENCODER, __doc__, args)
    return script.launch(recipe, recipe.model.factor, lambda images: BaseAutoencoderTask(recipe, images))


if __name__ == "__main__":
    script.main(main)
